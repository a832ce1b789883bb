"""Several processes, runs that are stopped, and threads: the numbers must be those of one run left to itself."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.run import parse_args

import evaluate
from support import processes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Seven pairs of token ids in two lengths: an uneven share for two processes."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("prompts") / "ids.jsonl"
    with open(path, "w") as file:
        for length in (8, 8, 8, 6, 6, 6, 6):
            original = rng.integers(2, 97, length).tolist()
            patch = original[:2] + [original[2] % 90 + 3] + original[3:]
            print(json.dumps(dict(original=original, patch=patch, original_answer=5, patch_answer=[6])), file=file)
    return path


def run(*command, script=None, **environment):
    """A subprocess with one thread; script, if given, is Python to be run before evaluate.py."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    env = {key: value for key, value in env.items() if value is not None}
    if script:
        modules = "import os, sys, evaluate, relp\nfrom support import kept, processes, results"
        script.write_text(f"{modules}\n{script.read_text()}\nsys.exit(evaluate.main())\n")
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def command(*arguments, script=None):
    return run(sys.executable, script or ROOT / "evaluate.py", *arguments, script=script)


def torchrun(*arguments, script=None):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script or ROOT / "evaluate.py"]
    for _ in range(3):
        result = run(*start, *arguments, script=script)
        # On a busy machine gloo aborts, once in some thirty runs, a process that has done its work and ends.
        if "terminate called without an active exception" not in result.stderr:
            break
    return result


def scores(folder):
    (file,) = Path(folder).glob("*/scores.npz")
    return dict(np.load(file))


@pytest.fixture(scope="module")
def undisturbed(checkpoint, prompts, tmp_path_factory):
    """(arguments, scores) of one process, for a family with windows, softcaps, grouped heads and post-norms."""
    out = tmp_path_factory.mktemp("undisturbed")
    arguments = ["--model", checkpoint("gemma2")[0], "--prompts", prompts, "--no-plot"]
    result = command(*arguments, "--out", out)
    assert result.returncode == 0 and "earlier runs" not in result.stdout, result.stderr
    return arguments, scores(out)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("options", [[], ["--pairs", "1"]], ids=["prompts", "one-prompt"])
def test_two_processes_give_the_numbers_of_one(options, undisturbed, tmp_path):
    arguments, wanted = undisturbed
    result = torchrun(*arguments, *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("PCC with AP") == 1  # only one process prints
    got, n = scores(tmp_path), 1 if "--pairs" in options else 7
    assert got.keys() == wanted.keys()
    for key in wanted:
        if wanted[key].dtype == np.float32:
            assert np.isfinite(got[key]).any()
            scale = np.nanmax(np.abs(wanted[key]))
            np.testing.assert_allclose(got[key], wanted[key][:n], atol=1e-5 * scale, rtol=0)
        else:
            np.testing.assert_array_equal(got[key], wanted[key][:n])


def test_two_processes_add_to_earlier_results(undisturbed, tmp_path):
    """Both know the methods of an earlier run; --grid takes its AP in both."""
    arguments, wanted = undisturbed
    given = [*arguments, "--out", tmp_path / "out", "--nodes", "mlp_out"]
    assert command(*given, "--methods", "ap,relp,ln").returncode == 0
    script = tmp_path / "script.py"
    script.write_text("""
from beyond import grid
grid.LINEAR = [""]
relp.activation_patching = None  # is not called
""")
    result = torchrun(*given, "--methods", "twopoint", "--grid", script=script)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("PCC with AP") == 2 and result.stdout.count("what a rule adds") == 1
    got = scores(tmp_path / "out")
    assert {f"{method}_mlp_out" for method in ("ap", "relp", "ln", "twopoint")} <= got.keys()
    for key in ("ap_mlp_out", "relp_mlp_out"):
        np.testing.assert_allclose(got[key], wanted[key], atol=1e-5 * np.nanmax(np.abs(wanted[key])), rtol=0)


def test_a_process_that_fails_ends_the_run_with_its_error(undisturbed, tmp_path):
    arguments, _ = undisturbed
    script = tmp_path / "script.py"
    script.write_text("""
def broken(*args, **kwargs):
    if processes.rank() == 1:
        raise ValueError("the second process is broken")
    return attribute(*args, **kwargs)
attribute, relp.attribute = relp.attribute, broken
""")
    result = torchrun(*arguments, "--out", tmp_path / "out", script=script)
    assert result.returncode != 0
    assert re.search("^evaluate.py: error: .*: the second process is broken$", result.stderr, re.M)
    assert not list(tmp_path.glob("out/*/scores.npz"))


def test_shard_needs_several_processes(undisturbed, tmp_path):
    result = command(*undisturbed[0], "--shard", "--out", tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("evaluate.py: error: --shard needs several processes")


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_torchrun_leaves_our_options_to_us(task):
    """Without "--": none is torchrun's, and none is the beginning of two of torchrun's, which it would refuse."""
    ours = ["--task", task]
    for field in fields(evaluate.TASKS[task]):
        ours += ["--" + field.name.replace("_", "-")] + ([] if field.metadata["takes"] is None else ["value"])
    assert len(ours) > 35
    given = parse_args(["--nproc-per-node=2", "evaluate.py", *ours])
    assert (given.training_script, given.training_script_args, given.nproc_per_node) == ("evaluate.py", ours, "2")
    for option in ours:
        assert parse_args(["evaluate.py", option]).training_script_args == [option]


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are stopped

KILLED = """
save, saved = kept.save, []
def killed(path, write):
    save(path, write)
    saved.append(path)
    if len(saved) == {}:
        os._exit(9)
kept.save = killed
"""


@pytest.fixture
def kill(undisturbed, tmp_path):
    """kill(n, *options) -> the folder of results of a run that was killed when AP had finished n positions."""

    def call(n, *options):
        script, out = tmp_path / "script.py", tmp_path / "out"
        script.write_text(KILLED.format(n))
        assert command(*undisturbed[0], *options, "--out", out, script=script).returncode == 9
        assert not list(out.glob("*/scores.npz"))
        return out

    return call


def unfinished(out):
    return sorted(path.name for path in out.glob("*/unfinished-*"))


def test_a_run_that_was_killed_goes_on_where_it_was(undisturbed, kill):
    """Killed in the second batch: the finished positions are taken over, and the numbers are the same to the bit.

    AP's seconds are those of both runs, and the output says so.
    """
    arguments, wanted = undisturbed
    out = kill(11)
    files = list(out.glob("*/unfinished-0-*.npz"))
    assert len(files) == 2
    for file in files:
        with np.load(file) as content:
            arrays = dict(content)
        assert 0 < arrays["seconds"] < 60
        np.savez(file, **arrays | {"seconds": np.array(1000.0)})
    result = command(*arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    for n in (8, 3):
        assert f"{n} positions of this batch are done" in result.stdout
    assert "AP's seconds include those of earlier runs" in result.stdout
    (summary,) = out.glob("*/summary.json")
    assert 2000 < json.loads(summary.read_text())["seconds"]["ap"] < 2060
    got = scores(out)
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        np.testing.assert_array_equal(value, wanted[key])
    assert not unfinished(out)


def test_what_is_kept_of_ap_survives_runs_of_other_methods(undisturbed, kill):
    """A run without AP, in the same folder, leaves it; the run with AP then goes on, to the same bits."""
    arguments, wanted = undisturbed
    out = kill(11)
    before = unfinished(out)
    options = ["--methods", "atp", "--verify", "2", "--nodes", "mlp_out"]  # this AP of the listed nodes is another one
    result = command(*arguments, *options, "--out", out)
    assert result.returncode == 0 and unfinished(out) == before and "dropped" not in result.stdout, result.stderr
    result = command(*arguments, "--out", out)
    assert result.returncode == 0 and "8 positions of this batch are done" in result.stdout, result.stderr
    got = scores(out)
    for key in wanted:
        np.testing.assert_array_equal(got[key], wanted[key])
    assert not unfinished(out)


def test_another_run_starts_afresh_and_says_so(undisturbed, kill):
    arguments, _ = undisturbed
    out = kill(1)
    result = command(*arguments, "--dtype", "float64", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "of other arguments or another version is dropped" in result.stdout and "goes on" not in result.stdout
    assert "earlier runs" not in result.stdout and not unfinished(out)


def test_processes_that_share_weights_go_on_together(undisturbed, tmp_path):
    """From the first position that one of them has not finished: the first has kept three, the second two."""
    arguments, wanted = undisturbed
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(KILLED.format(3))
    assert torchrun(*arguments, "--shard", "--out", out, script=script).returncode != 0
    (file,) = out.glob("*/unfinished-1-*.npz")
    with np.load(file) as content:
        arrays = {key: value for key, value in content.items() if key == "seconds" or key[0] in "01"}
    assert {key[0] for key in arrays} == {"0", "1", "s"}
    np.savez(file, **arrays)
    result = torchrun(*arguments, "--shard", "--out", out)
    assert result.returncode == 0 and "3 positions of this batch are done" in result.stdout, result.stderr
    got = scores(out)
    for key in wanted:
        if wanted[key].dtype == np.float32:
            np.testing.assert_allclose(got[key], wanted[key], atol=1e-5 * np.nanmax(np.abs(wanted[key])), rtol=0)
    assert not unfinished(out)


# ---------------------------------------------------------------------------------------------------------------------
# Threads: one for small models, if nobody has said how many

THREADS = """
import runpy, sys, torch
set_num_threads = torch.set_num_threads
set_num_threads(3)  # what a machine with three cores would have
torch.set_num_threads = lambda n: (print("threads:", n), set_num_threads(n))
sys.argv = ["evaluate.py", *sys.argv[1:]]
runpy.run_path("evaluate.py", run_name="__main__")
"""


def wide_model(folder):
    """One layer, as wide as processes.SMALL says."""
    import transformers

    fields = dict(vocab_size=50, n_embd=processes.SMALL, n_layer=1, n_head=4, n_positions=8)
    transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**fields)).save_pretrained(folder)
    return folder


@pytest.fixture
def no_choice(monkeypatch):
    """No number of threads in the environment; the number of this process comes back in the end."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name, threads", [("", [1, 3, 1]), ("MKL_NUM_THREADS", [])])
def test_threads_of_the_command(name, threads, no_choice, tmp_path):
    """One on a toy, as many as there were on a wide model; no choice if the environment has made it."""
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text(json.dumps(dict(original=[5, 6], patch=[5, 7], original_answer=8, patch_answer=9)))
    given = ["--prompts", prompts, "--methods", "relp", "--no-plot", "--out", tmp_path / "out"]
    models = ["--model", "toy-gpt2", wide_model(tmp_path / "wide"), "toy-neox"]
    environment = {"OMP_NUM_THREADS": None} | ({name: "3"} if name else {})
    result = run(sys.executable, "-c", THREADS, *models, *given, **environment)
    assert result.stderr == "" and result.stdout.count("written to") == 3
    assert [int(n) for n in re.findall("^threads: (.*)", result.stdout, re.M)] == threads


def test_threads_of_a_caller_stay(no_choice, tmp_path, capsys):
    """evaluate.main() called from Python."""
    torch.set_num_threads(3)
    given = ["--model", "toy-gpt2", "--pairs", "2", "--methods", "relp", "--no-plot", "--out", str(tmp_path)]
    assert evaluate.main(given) == 0 and torch.get_num_threads() == 3


def test_the_width_that_decides(no_choice, monkeypatch):
    monkeypatch.setattr(processes, "own", True)
    monkeypatch.setattr(processes, "THREADS", 2)
    for width, threads in ((processes.SMALL - 1, 1), (processes.SMALL, 2), (8, 1), (4096, 2)):
        processes.choose_threads(width)
        assert torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    processes.choose_threads(8)
    assert torch.get_num_threads() == 2


def test_threads_of_the_circuits(no_choice, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(processes, "own", True)
    torch.set_num_threads(2)
    given = ["--task", "sva", "--structures", "simple", "--pairs", "2", "--held-out", "2", "--methods", "relp"]
    assert evaluate.main([*given, "--thresholds", "1e-3,1e-1,2", "--no-plot", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == 1
