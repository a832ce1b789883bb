"""Runs that do not fit in memory end in one line; batches have as many prompts as should fit."""
# ruff: noqa: F811 (fixtures that are imported)

import pytest
import torch
from test_bad_input import refused  # noqa: F401
from test_evaluate import results, run, same, tiny  # noqa: F401

import models
import tasks
from support import scoring
from support.scoring import OUT_OF_MEMORY, by_batch, out_of_memory
from support.tokenizer import load_tokenizer

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_out_of_memory(error):
    assert out_of_memory(error)
    assert not out_of_memory(RuntimeError("sizes of tensors")) and not out_of_memory(ValueError("memory"))


@pytest.fixture
def toy():
    """A model and 20 pairs of one length."""
    model, pairs = models.from_pretrained("toy-gpt2"), tasks.ioi(load_tokenizer("toy-gpt2"), 60)
    return model, [pair for pair in pairs if len(pair.original) == len(pairs[0].original)][:20]


def test_sizes(toy):
    """As many prompts as fit, fewer patched runs; longer prompts, fewer of both; at least one."""
    model, _ = toy
    sizes = [scoring.auto_size(model, length) for length in (1, 20, 400, 10**6)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == (1, 1) and sizes[1][1] == 2**9 // 20
    per_token = 4 * (20 * model.config.d_model + 8 * model.config.d_mlp + 4 * model.config.n_heads * 20)
    assert sizes[1][0] == 2**31 // (per_token * 20) // model.config.n_layers
    assert max(len(n) for n, _ in by_batch(*toy, lambda n, rows: n, most=7)) == 7


@pytest.fixture
def room(monkeypatch):
    """room(n): no more than n prompts or patched runs go through the model together."""

    def limit(n):
        stream, block = models.Transformer.stream, models.Transformer.block

        def small(function):
            def call(self, *args, **kwargs):
                if any(isinstance(x, torch.Tensor) and len(x) > n for x in args):
                    raise MemoryError
                return function(self, *args, **kwargs)

            return call

        monkeypatch.setattr(models.Transformer, "stream", small(stream))
        monkeypatch.setattr(models.Transformer, "block", small(block))

    return limit


@pytest.mark.parametrize("size", [5, 1, "auto"])
def test_what_does_not_fit_ends_in_one_line(size, tiny, refused, room):
    room(0)
    assert OUT_OF_MEMORY in refused("--model", tiny["gpt2"], "--pairs", 8, "--batch-size", size)


def test_what_has_been_found_is_kept(tiny, run, room, monkeypatch, tmp_path):
    """A run ends in one line; with a smaller batch it goes on with the AP that was finished."""
    assert run("--model", tiny["gpt2"], "--pairs", 3, "--batch-size", 1, "--no-plot")[0] == 0
    kept = {path: path.read_bytes() for path in (tmp_path / "out" / "ap").iterdir()}
    room(0)
    code, _, err = run("--model", tiny["gpt2"], "--pairs", 8, "--batch-size", 4, "--no-plot")
    assert code == 2 and OUT_OF_MEMORY in err[0] and len(err) == 1
    monkeypatch.undo()
    code, _, err = run("--model", tiny["gpt2"], "--pairs", 8, "--batch-size", 2, "--no-plot")
    assert (code, err) == (0, [])
    assert all(path.read_bytes() == content for path, content in kept.items())
