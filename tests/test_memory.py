"""Runs that do not fit in memory: half as many prompts, again and again, and one line if not even one fits."""
# ruff: noqa: F811 (fixtures that are imported)

import sys

import numpy as np
import pytest
import torch
from test_bad_input import refused  # noqa: F401
from test_evaluate import results, run, same, tiny  # noqa: F401
from test_processes import ROOT
from test_processes import run as process

import models
import relp
import tasks
from support import scoring
from support.scoring import OUT_OF_MEMORY, by_batch, out_of_memory
from support.tokenizer import load_tokenizer

NOTE = "half as many from now on"
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


@pytest.mark.parametrize("error", ERRORS)
def test_batches_are_halved_until_they_fit(error, toy, capsys):
    tried, room = [], 5

    def compute(numbers, rows):
        tried.append((len(numbers), rows))
        if len(numbers) > room:
            raise error
        return list(numbers)

    found = list(by_batch(*toy, compute))
    assert sorted(i for numbers, _ in found for i in numbers) == list(range(20))
    assert all(numbers == result and len(numbers) <= room for numbers, result in found)
    assert [n for n, _ in tried if n > room] == [20, 10]  # what has not fitted is not tried again
    rows = [rows for _, rows in tried]
    assert rows[1] == rows[0] // 2 and rows[2:] == [rows[0] // 4] * 4
    assert capsys.readouterr().out.count(NOTE) == 2


def test_what_cannot_be_halved(toy):
    def compute(numbers, rows):
        raise MemoryError

    for size in (None, 8, 1):
        with pytest.raises(ValueError, match="out of memory; try a smaller --batch-size"):
            list(by_batch(*toy, compute, size))
    with pytest.raises(ValueError, match="out of memory"):  # processes that share weights must make the same calls
        list(by_batch(*toy, lambda numbers, rows: 1 if len(numbers) == 1 else compute(0, 0), shard=True))
    with pytest.raises(RuntimeError, match="sizes of tensors"):

        def wrong(numbers, rows):
            raise RuntimeError("sizes of tensors")

        list(by_batch(*toy, wrong))


def test_the_failed_attempt_is_let_go(toy):
    """Its tensors are gone when the next one begins."""
    import weakref

    held = []

    def compute(numbers, rows):
        x = torch.zeros(3)
        assert all(ref() is None for ref in held)
        held.append(weakref.ref(x))
        if len(numbers) > 5:
            raise MemoryError
        return True

    assert len(list(by_batch(*toy, compute))) == 4 and len(held) > 4


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


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_the_numbers_stay(metric, tiny, results, run, room, tmp_path):
    _, wanted = results(tiny["gpt2"], "--pairs", 8, "--metric", metric)
    for file in (tmp_path / "out" / "ap").iterdir():
        file.unlink()
    room(3)
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 8, "--metric", metric, "--no-plot")
    assert (code, err) == (0, []) and NOTE in out
    with np.load(tmp_path / "out" / "gpt2-ioi" / "scores.npz") as scores:
        same(dict(scores), wanted, atol=1e-5, rtol=1e-4)


def test_circuits_of_features(run, room, monkeypatch, tmp_path):
    sva = ["--task", "sva", "--pairs", 6, "--held-out", 3, "--structures", "simple", "--methods", "relp"]
    sva += ["--thresholds", "1e-2,1e-1,2", "--no-plot"]
    assert run(*sva)[0] == 0
    circuit = tmp_path / "out" / "toy-neox-sva" / "circuit-simple.json"
    whole = circuit.read_text()
    attribute = relp.activations_and_rho

    def small(model, original, *rest):
        if len(original) > 2:
            raise MemoryError
        return attribute(model, original, *rest)

    monkeypatch.setattr(relp, "activations_and_rho", small)
    code, out, err = run(*sva)
    assert (code, err) == (0, []) and NOTE in out and len(circuit.read_text()) == pytest.approx(len(whole), rel=0.05)


@pytest.mark.parametrize("size", [5, 1, "auto"])
def test_what_does_not_fit_ends_in_one_line(size, tiny, refused, room):
    room(0)
    assert OUT_OF_MEMORY in refused("--model", tiny["gpt2"], "--pairs", 8, "--batch-size", size)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_process_with_little_memory(tmp_path):
    """A real one: 267 prompts of the toy model would need some 300 MB, and there are 120."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import evaluate
from support import scoring
scoring.auto_size = lambda *_: (2000, 64)
options = ["--model", "toy-gpt2", "--no-plot", "--methods", "atp,relp", "--out", sys.argv[1], "--pairs"]
evaluate.main([*options, "2"])  # loads all that is needed
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
most = pages * resource.getpagesize() + 120 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
evaluate.main([*options, "400"])
"""
    result = process(sys.executable, "-c", code, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert NOTE in result.stdout and result.stdout.count("written to") == 2
