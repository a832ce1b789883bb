"""Where a batch does not fit in memory: it is halved, or the run ends in one line. Patterns that cannot fit at all."""
# ruff: noqa: F811 (fixtures that are imported)

import json
import re
import sys

import fuzz
import numpy as np
import pytest
import torch
from test_bad_input import refused  # noqa: F401
from test_evaluate import results, run, tiny  # noqa: F401
from test_processes import command, prompts, scores, torchrun, undisturbed  # noqa: F401

import models
import relp
from support import memory
from support.memory import NO_SMALLER, TOGETHER, BatchSize, out_of_memory
from support.methods import AP, ATP, Method

CPU = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(f"{CPU} 17179869184 bytes. Error code 12 (Cannot allocate memory)"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 17179869184 bytes."),
    "python": MemoryError(),
}
NOTE = "out of memory with"


def fail(raised):
    raised.append(("cuda", "cpu")[len(raised) % 2])
    raise ERRORS[raised[-1]]


@pytest.fixture
def room(monkeypatch):
    """room(most): from now on, a block runs out of memory when it gets more than `most` tokens in one call.

    Returns the kinds of errors that it raises: both, by turns.
    """
    block, raised = models.Transformer.block, []

    def limit(most):
        def limited(self, layer, x, *args, **how):
            if x.shape[0] * x.shape[1] > most:
                fail(raised)
            return block(self, layer, x, *args, **how)

        monkeypatch.setattr(models.Transformer, "block", limited)
        return raised

    return limit


def check_equal(got, wanted):
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(got[key], value, atol=1e-10 * np.nanmax(np.abs(value)), rtol=0, err_msg=key)
        else:
            np.testing.assert_array_equal(got[key], value)


def numbers_in(x):
    """All numbers of a JSON file, in order; but for what depends on the time, the command and the batch."""
    if isinstance(x, dict):
        skipped = ["seconds", "arguments", "versions"]
        skipped += ["audit", "conservation", "rounding"]  # of a few prompts only
        skipped += ["curves"]  # edges whose scores are rounding errors come in any order
        return [n for key, value in x.items() if key not in skipped for n in numbers_in(value)]
    if isinstance(x, list):
        return [n for value in x for n in numbers_in(value)]
    return [x] if isinstance(x, (int, float)) else []


# ---------------------------------------------------------------------------------------------------------------------
# What is out of memory, and what is done then


@pytest.mark.parametrize("error", ERRORS)
def test_what_is_out_of_memory(error):
    assert out_of_memory(ERRORS[error])


@pytest.mark.parametrize("error", [RuntimeError("sizes of tensors"), ValueError("memory"), KeyError("x")])
def test_what_is_not(error):
    def fails():
        raise error

    assert not out_of_memory(error)
    with pytest.raises(type(error)):
        BatchSize().attempt(fails)


def test_parts(capsys):
    """Each number once and in order; what has not fitted is not tried again; prompts and runs are halved together."""
    batch_size, tried = BatchSize(), []

    def compute(part, runs):
        tried.append((len(part), runs))
        if len(part) * runs > 12:
            raise MemoryError
        return sum(part)

    found = [*batch_size.in_parts([*range(7)], compute, 100, 8)]
    assert found == [([0, 1, 2], 3), ([3, 4, 5], 12), ([6], 6)]
    assert tried == [(7, 8), (3, 4), (3, 4), (1, 4)]
    assert [part for part, _ in batch_size.in_parts([7, 8, 9], compute, 100)] == [[7, 8, 9]]
    assert capsys.readouterr().out.count(NOTE) == 1


def test_the_failed_attempt_is_let_go():
    """Its tensors would take the room that the next attempt needs."""
    alive, seen = [], []

    class Big:
        def __init__(self):
            alive.append(self)

        def __del__(self):
            seen.append("gone")

    def compute(part, _):
        if len(part) > 1:
            big = Big()
            big.itself = big  # a circle
            alive.clear()
            raise MemoryError
        return len(seen)

    assert [found for _, found in BatchSize().in_parts([0, 1], compute, 2)] == [1, 1]


@pytest.mark.parametrize("given, lockstep, error", [("auto", True, TOGETHER), ("1", False, NO_SMALLER)])
def test_what_cannot_be_halved(given, lockstep, error):
    def fails(*_):
        raise MemoryError

    with pytest.raises(ValueError, match=re.escape(error)):
        next(BatchSize(given, lockstep).in_parts([1, 2], fails, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The command


TASKS = {
    "ioi": ["--nodes", "resid_pre,mlp_out,head_pattern", "--methods", "ap,atp,relp"],
    "kl": ["--nodes", "mlp_out", "--methods", "relp", "--metric", "kl", "--verify", "5"],
    "edges": ["--task", "edges", "--held-out", 4, "--methods", "ap,relp"],
}


@pytest.mark.parametrize("task", TASKS)
def test_auto_goes_on_with_less(task, tiny, run, room, tmp_path):
    """Said once; the scores are those of a run whose batches fit from the start."""
    argv = ["--model", tiny["gpt2"], "--pairs", 7, "--no-plot", "--dtype", "float64", *TASKS[task]]
    files, found = ("edges.npz" if task == "edges" else "scores.npz", "summary.json", "verified.json"), []
    for most, options in ((10**9, ["--batch-size", 3]), (30, [])):
        raised = room(most)
        code, out, err = run(*argv, *options)
        assert (code, err) == (0, [])
        assert out.count(NOTE) == (not options)
        contents = {path.name: path for path in tmp_path.rglob("*") if path.name in files}
        reports = [json.loads(contents[name].read_text()) for name in files[1:] if name in contents]
        found.append((dict(np.load(contents[files[0]])), numbers_in(reports)))
    assert {*raised} == {"cuda", "cpu"}
    check_equal(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-4, abs=1e-9)  # ranks of equal numbers may change


def test_circuits_of_features(run, tmp_path, monkeypatch):
    """--task sva, where what is scored in batches needs room for three pairs, and four patched runs."""
    argv = ["--task", "sva", "--structures", "simple", "--pairs", 7, "--held-out", 5, "--top", 2, "--no-plot"]
    argv += ["--nodes", "resid_post", "--methods", "ap,relp", "--dtype", "float64"]
    propagate, patch_features = relp.propagate, relp.patch_features
    found, raised = [], []

    def limited(function, model, original, *args, **how):
        if len(original) > 3 or how.get("rows", 1) > 4:
            fail(raised)
        return function(model, original, *args, **how)

    for options in (["--batch-size", 3], []):
        code, out, err = run(*argv, *options)
        assert (code, err) == (0, []) and out.count(NOTE) == (not options)
        found.append([numbers_in(json.loads(path.read_text())) for path in sorted(tmp_path.rglob("*.json"))])
        monkeypatch.setattr(relp, "propagate", lambda *args, **how: limited(propagate, *args, **how))
        monkeypatch.setattr(relp, "patch_features", lambda *args, **how: limited(patch_features, *args, **how))
    assert {*raised} == {"cuda", "cpu"}
    for got, wanted in zip(found[1], found[0]):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("task", ["ioi", "edges"])
@pytest.mark.parametrize("size, words", [(5, "try a smaller --batch-size"), (1, NO_SMALLER), ("auto", NO_SMALLER)])
def test_what_does_not_fit_ends_in_one_line(task, size, words, tiny, refused, room):
    room(10)  # not even one prompt
    assert words in refused("--model", tiny["gpt2"], "--pairs", 6, "--batch-size", size, "--no-plot", *TASKS[task])


@pytest.mark.parametrize("size, words", [(5, "try a smaller --batch-size"), ("auto", NO_SMALLER)])
def test_circuits_of_features_that_do_not_fit(size, words, refused, monkeypatch):
    def propagate(*_, **__):
        raise ERRORS["cpu"]

    monkeypatch.setattr(relp, "propagate", propagate)
    argv = ["--task", "sva", "--structures", "simple", "--pairs", 6, "--held-out", 5, "--methods", "relp", "--no-plot"]
    assert words in refused(*argv, "--batch-size", size)


@pytest.mark.parametrize("options", [[], ["--verify", 40]], ids=["kept", "verified"])
def test_finished_positions_of_ap_stay(options, tiny, run, monkeypatch):
    """From the fourth position on, four runs at a time is all that fits: the first three are not run again."""
    effects_at, run_jobs, begun, together = relp.effects_at, relp.run_jobs, [], []

    def noted(of, edits, pos, *args):
        begun.append((of.n_pos, len(of.value), pos))
        return effects_at(of, edits, pos, *args)

    def limited(of, edits, jobs, pos):
        if pos >= 3 and len(jobs) * (of.n_pos - pos) > 4 * of.n_pos:
            raise ERRORS["cpu"]
        together.append(len(jobs))
        return run_jobs(of, edits, jobs, pos)

    monkeypatch.setattr(relp, "effects_at", noted)
    monkeypatch.setattr(relp, "run_jobs", limited)
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 4, "--no-plot", "--methods", "ap,relp", *options)
    assert (code, err) == (0, []) and out.count(NOTE) == 1 and "goes on" not in out
    assert len({(n_pos, n) for n_pos, n, _ in begun}) == len({n_pos for n_pos, *_ in begun})  # no batch was halved
    assert all(begun.count(of_pos) == 1 for of_pos in begun if of_pos[-1] < 3) and len(begun) > len(set(begun))
    assert max(together) > 4


def test_a_halved_run_that_was_stopped_goes_on(tiny, results, room, capsys, tmp_path):
    """The next one tries the whole batch, which does not fit again, and then finds what is finished of the halves."""
    argv = ["--pairs", 6, "--nodes", "mlp_out", "--methods", "ap", "--dtype", "float64"]
    _, wanted = results(tiny["gpt2"], *argv, "--batch-size", 3)
    (tmp_path / "out" / "gpt2-ioi" / "scores.npz").unlink()
    room(30)
    fuzz.stop_early([*map(str, ["--model", tiny["gpt2"], "--no-plot", *argv]), "--out", str(tmp_path / "out")])
    assert len(list(tmp_path.rglob("unfinished-*"))) == 1
    capsys.readouterr()
    _, got = results(tiny["gpt2"], *argv)
    check_equal(got, wanted)
    assert not list(tmp_path.rglob("unfinished-*"))


SECOND_PROCESS = """
import models
block = models.Transformer.block
def limited(self, layer, x, *args, **how):
    if os.environ["RANK"] == "1" and x.shape[0] * x.shape[1] > 10:
        raise MemoryError
    return block(self, layer, x, *args, **how)
models.Transformer.block = limited
"""


def test_one_of_two_processes_halves_its_share(undisturbed, tmp_path):
    arguments, wanted = undisturbed
    script = tmp_path / "script.py"
    script.write_text(SECOND_PROCESS)
    result = torchrun(*arguments, "--out", tmp_path / "out", script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(NOTE) == 1 and "process 1: out of memory" in result.stdout
    got = scores(tmp_path / "out")
    for key, value in wanted.items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(got[key], value, atol=1e-5 * np.nanmax(np.abs(value)), rtol=0)


def test_processes_that_share_weights_end(undisturbed, tmp_path):
    """One cannot go on by itself, and the others wait for it. Each says a line at most, and none says it is a bug."""
    script = tmp_path / "script.py"
    script.write_text(SECOND_PROCESS)
    result = torchrun(*undisturbed[0], "--shard", "--out", tmp_path / "out", script=script)
    lines = [line for line in result.stderr.splitlines() if line.startswith("evaluate.py: error")]
    assert result.returncode != 0 and sum(TOGETHER in line for line in lines) == 1, result.stderr
    assert all("another process has stopped" in line for line in lines if TOGETHER not in line), lines


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_process_with_little_memory(tmp_path):
    """A real one: 267 prompts of the toy model would need some 300 MB, and there are 120."""
    script = tmp_path / "script.py"
    script.write_text("""
import resource
from support import memory
memory.BatchSize.chosen = lambda self, *_: (2000, 64)
options = ["--model", "toy-gpt2", "--no-plot", "--methods", "atp,relp", "--out", sys.argv[1], "--pairs"]
evaluate.main([*options, "2"])  # loads all that is needed
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
most = pages * resource.getpagesize() + 120 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.argv[1:] = [*options, "400"]
""")
    result = command(tmp_path / "out", script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(NOTE) == 1
    assert all(np.isfinite(x).any() for x in scores(tmp_path / "out").values() if x.dtype.kind == "f")


# ---------------------------------------------------------------------------------------------------------------------
# Patterns as nodes


def gpt2_small(n_layers=12, dtype=torch.float32, **fields):
    """A model of these sizes that takes no memory."""
    config = models.Config(
        family="gpt2", n_layers=n_layers, d_model=768, n_heads=12, n_kv_heads=12, d_head=64, d_mlp=3072, n_vocab=50257,
        n_ctx=1024, eps=1e-5, act="gelu_new", block="sequential", tied=True, attn_scale=0.125,
        windows=(None,) * n_layers, layer_norm=True, **fields,
    )  # fmt: skip
    with torch.device("meta"):
        return models.Transformer(config).to(dtype)


RELP, IG = Method("relp", "RelP", lrp=True), Method("ig", "IG", steps=2)
MEASURED = [  # GiB that a process has taken beside the weights, for one pair of random tokens; RelP with its audit
    ("RelP, 1024 tokens", 3.93, gpt2_small(), RELP, 1024),
    ("RelP, 512 tokens", 2.11, gpt2_small(), RELP, 512),
    ("AtP, 1024 tokens", 2.67, gpt2_small(), ATP, 1024),
    ("AtP, 512 tokens", 1.00, gpt2_small(), ATP, 512),
    ("both runs, 1024 tokens", 1.40, gpt2_small(), AP, 1024),
    ("both runs, 512 tokens", 0.42, gpt2_small(), AP, 512),
    ("IG, 4 layers", 1.44, gpt2_small(4), IG, 1024),
    ("AtP, gates and softcap, 4 layers", 1.09, gpt2_small(4, gated=True, attn_softcap=50.0), ATP, 1024),
    ("AtP, float64, 4 layers", 2.01, gpt2_small(4, torch.float64), ATP, 1024),
    ("AtP, bfloat16, 4 layers", 0.82, gpt2_small(4, torch.bfloat16), ATP, 1024),
]


@pytest.mark.parametrize("measured, model, method, length", [row[1:] for row in MEASURED], ids=[r[0] for r in MEASURED])
def test_the_estimate_is_on_the_safe_side(measured, model, method, length):
    assert 1 <= memory.memory_of_patterns(model, [method], length) / 2**30 / measured < 1.36


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda *_: 3 * 2**30)
    given = gpt2_small(), ["mlp_out", "head_pattern"], [AP, ATP]
    memory.check_patterns(*given, 960, None)
    with pytest.raises(ValueError, match="node head_pattern of one pair of 1024 tokens needs some 3.1 GiB .* 3.0 GiB"):
        memory.check_patterns(*given, 1024, None)
    memory.check_patterns(gpt2_small(), ["mlp_out", "head_q"], [ATP], 10**6, None)
    with pytest.raises(ValueError, match=r"method atp\* of one pair"):
        memory.check_patterns(gpt2_small(), ["head_q"], [Method("atp*", "AtP*")], 10**6, None)
    with pytest.raises(ValueError, match="method twopoint of one pair"):  # which is AtP* there
        memory.check_patterns(gpt2_small(), ["k"], [Method("twopoint", "two-point")], 10**6, None)


def test_the_machine_has_some_memory():
    assert 2**28 < memory.free_memory(gpt2_small(1), torch.device("cpu")) < 2**50


@pytest.mark.parametrize("node", ["head_pattern", "pattern"])
def test_patterns_are_refused_before_anything_is_computed(node, tiny, refused, room, monkeypatch):
    monkeypatch.setattr(memory, "memory_of_patterns", lambda *_: 52.3 * 2**30)
    monkeypatch.setattr(memory, "free_memory", lambda *_: 23.4 * 2**30)
    room(0)  # the first pass would end in another message
    message = refused("--model", tiny["gpt2"], "--pairs", 3, "--nodes", f"mlp_out,{node}")
    assert f"node {node} of one pair" in message and "52.3 GiB" in message and "23.4 GiB" in message


def test_late_positions_do_not_run_many_more(checkpoint, monkeypatch):
    """A resumed run is short at a late position, but has all keys and values: at most 16 times as many go together."""
    model = models.from_pretrained(str(checkpoint("gpt2")[0]))
    tokens = torch.randint(2, 97, (1, 64), generator=torch.Generator().manual_seed(0))
    patch = tokens.clone()
    patch[:, 2] += 1
    together, run_jobs = {}, relp.run_jobs

    def noted(run, edits, jobs, pos):
        together[pos] = max(len(jobs), together.get(pos, 0))
        return run_jobs(run, edits, jobs, pos)

    monkeypatch.setattr(relp, "run_jobs", noted)
    cells = {"neuron": torch.zeros(3, 64, 128, dtype=torch.bool)}
    cells["neuron"][:, [2, 32, 63], :20] = True
    relp.activation_patching(model, tokens, patch, torch.tensor([[3, 4]]), ["neuron"], cells=cells, rows=1)
    assert together == {2: 1, 32: 2, 63: 16}
