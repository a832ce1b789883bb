"""Several processes, runs that are stopped, and threads: the numbers must be those of one run left to itself."""

import json
import os
import re
import subprocess
import sys
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


def run(*command, **environment):
    """A subprocess with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    env = {key: value for key, value in env.items() if value is not None}
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def command(*arguments):
    return run(sys.executable, ROOT / "evaluate.py", *arguments)


def torchrun(*arguments, script=ROOT / "evaluate.py"):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script]
    for _ in range(3):
        result = run(*start, *arguments)
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
    assert result.returncode == 0, result.stderr
    return arguments, scores(out)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def close(got, wanted, n=7):
    assert got.keys() == wanted.keys()
    for key in wanted:
        if wanted[key].dtype == np.float32:
            assert np.isfinite(got[key]).any()
            scale = np.nanmax(np.abs(wanted[key]))
            np.testing.assert_allclose(got[key], wanted[key][:n], atol=1e-5 * scale, rtol=0)
        else:
            np.testing.assert_array_equal(got[key], wanted[key][:n])


@pytest.mark.parametrize("options, n", [([], 7), (["--pairs", "1"], 1), (["--shard"], 7)], ids=["", "one", "shard"])
def test_two_processes_give_the_numbers_of_one(options, n, undisturbed, tmp_path):
    arguments, wanted = undisturbed
    result = torchrun(*arguments, *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("PCC with AP") == 1  # only one process prints
    close(scores(tmp_path), wanted, n)


def test_processes_that_share_weights_go_on_together(undisturbed, tmp_path):
    """If one of them finds its part of a batch in the store and the other does not, both run AP."""
    arguments, wanted = undisturbed
    given = [*arguments, "--shard", "--out", tmp_path]
    assert torchrun(*given).returncode == 0
    files = sorted((tmp_path / "ap").iterdir())
    files[0].unlink()
    result = torchrun(*given)
    assert result.returncode == 0, result.stderr
    assert sorted((tmp_path / "ap").iterdir()) == files
    close(scores(tmp_path), wanted)


def test_one_and_two_processes_have_one_store(undisturbed, tmp_path):
    arguments, wanted = undisturbed
    assert command(*arguments, "--out", tmp_path).returncode == 0
    files = sorted((tmp_path / "ap").iterdir())
    assert len(files) == 7 and torchrun(*arguments, "--out", tmp_path).returncode == 0
    assert sorted((tmp_path / "ap").iterdir()) == files


def test_a_process_that_fails_ends_the_run_with_its_error(undisturbed, tmp_path):
    arguments, _ = undisturbed
    script = tmp_path / "evaluate.py"
    script.write_text(f"""
import sys
sys.path[0] = {str(ROOT)!r}
import evaluate, relp
from support import commandline, processes
def broken(*args, **kwargs):
    if processes.rank() == 1:
        raise ValueError("the second process is broken")
    return attribute(*args, **kwargs)
attribute, relp.attribute = relp.attribute, broken
sys.exit(commandline.run(evaluate.main))
""")
    result = torchrun(*arguments, "--out", tmp_path / "out", script=script)
    assert result.returncode != 0
    assert re.search("^evaluate.py: error: the second process is broken$", result.stderr, re.M)
    assert not list(tmp_path.glob("out/*/scores.npz"))


def test_torchrun_leaves_our_options_to_us(capsys):
    """Without "--": none is torchrun's, and none is the beginning of two of torchrun's, which it would refuse."""
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    ours = sorted(set(re.findall(r"--[a-z-]+", capsys.readouterr().out)) - {"--help"})
    assert len(ours) > 20 and "--batch-size" in ours
    for option in ours:
        assert parse_args(["evaluate.py", option]).training_script_args == [option]


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are stopped

KILLED = """
import os, sys
import evaluate
from support import results
save, saved = results.save, []
def killed(path, write):
    save(path, write)
    saved.append(path)
    if len(saved) == 5:
        os._exit(9)
results.save = killed
evaluate.main(sys.argv[1:])
"""


def test_a_run_that_was_killed_goes_on_where_it_was(undisturbed, tmp_path):
    """Killed in the second batch: the pairs that are finished are taken over, and the numbers are the same to the bit.

    AP's seconds are those of both runs.
    """
    arguments, wanted = undisturbed
    given = [*arguments, "--out", tmp_path]
    assert run(sys.executable, "-c", KILLED, *given).returncode == 9
    finished = list((tmp_path / "ap").iterdir())
    assert len(finished) == 5 and not list(tmp_path.glob("*/scores.npz"))
    for file in finished:
        with np.load(file) as content:
            arrays = dict(content)
        assert 0 < arrays["seconds"] < 60
        np.savez(file, **arrays | {"seconds": np.array(1000.0)})
    result = command(*given)
    assert result.returncode == 0, result.stderr
    (summary,) = tmp_path.glob("*/summary.json")
    assert 5000 < json.loads(summary.read_text())["seconds"]["ap"] < 5060
    close(scores(tmp_path), wanted)


def test_interrupted():
    """Ctrl-C ends in one line."""
    code = "from support import commandline\ndef main(argv): raise KeyboardInterrupt\nexit(commandline.run(main))"
    result = run(sys.executable, "-c", code)
    assert result.returncode == 130 and len(result.stderr.splitlines()) == 1 and "goes on from there" in result.stderr


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


def test_threads_of_a_caller_stay(no_choice, monkeypatch, tmp_path, capsys):
    """evaluate.main() called from Python."""
    monkeypatch.setattr(processes, "own", False)
    torch.set_num_threads(3)
    given = ["--model", "toy-gpt2", "--pairs", "2", "--methods", "relp", "--no-plot", "--out", str(tmp_path)]
    evaluate.main(given)
    assert torch.get_num_threads() == 3


def test_the_width_that_decides(no_choice, monkeypatch):
    monkeypatch.setattr(processes, "own", True)
    monkeypatch.setattr(processes, "THREADS", 2)
    for width, threads in ((processes.SMALL - 1, 1), (processes.SMALL, 2), (8, 1), (4096, 2)):
        processes.choose_threads(width)
        assert torch.get_num_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    processes.choose_threads(8)
    assert torch.get_num_threads() == 2
