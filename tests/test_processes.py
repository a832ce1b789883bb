"""Several processes, and runs that are stopped: the numbers must be those of one process that was left alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

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


def run(*command, script=None):
    """A subprocess with one thread; script, if given, is Python to be run ahead of evaluate.py."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if script:
        script.write_text(f"import os, sys, evaluate, relp\n{script.read_text()}\nsys.exit(evaluate.main())\n")
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def torchrun(*arguments, script=None):
    return run(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--",
        script or ROOT / "evaluate.py",
        *arguments,
        script=script,
    )


def scores(folder):
    (file,) = Path(folder).glob("*/scores.npz")
    return dict(np.load(file))


@pytest.fixture(scope="module")
def alone(checkpoint, prompts, tmp_path_factory):
    """The run of one process, for a family with every kind of piece: windows, softcaps, grouped heads, post-norms."""
    out = tmp_path_factory.mktemp("alone")
    arguments = ["--model", checkpoint("gemma2")[0], "--prompts", prompts, "--no-plot"]
    result = run(sys.executable, ROOT / "evaluate.py", *arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    return arguments, scores(out)


@pytest.mark.parametrize("options", [[], ["--shard"], ["--n", "1"]], ids=["prompts", "shard", "one-prompt"])
def test_two_processes_give_the_numbers_of_one(options, alone, tmp_path):
    arguments, wanted = alone
    result = torchrun(*arguments, *options, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("PCC with AP") == 1  # one process alone prints
    got, n = scores(tmp_path), 1 if "--n" in options else 7
    for key in wanted:
        if wanted[key].dtype == np.float32:
            assert np.isfinite(got[key]).any()
            scale = np.nanmax(np.abs(wanted[key]))
            np.testing.assert_allclose(got[key], wanted[key][:n], atol=1e-5 * scale, rtol=0)
        else:
            np.testing.assert_array_equal(got[key], wanted[key][:n])


def test_a_process_that_fails_ends_the_run_with_its_error(alone, tmp_path):
    arguments, _ = alone
    script = tmp_path / "script.py"
    script.write_text("""
def broken(*args, **kwargs):
    if evaluate.rank() == 1:
        raise ValueError("the second process is broken")
    return attribute(*args, **kwargs)
attribute, relp.attribute = relp.attribute, broken
""")
    result = torchrun(*arguments, "--out", tmp_path / "out", script=script)
    assert result.returncode != 0
    assert re.search("^evaluate.py: error: .*: the second process is broken$", result.stderr, re.M)
    assert not list(tmp_path.glob("out/*/scores.npz"))


def test_a_run_that_was_killed_goes_on_where_it_was(alone, tmp_path):
    """Killed in the second batch, started again: the finished positions are taken over, and the numbers are the same to the bit."""
    arguments, wanted = alone
    script = tmp_path / "script.py"
    script.write_text("""
save, saved = evaluate.save, []
def killed(path, write):
    save(path, write)
    saved.append(path)
    if len(saved) == 11:
        os._exit(9)
evaluate.save = killed
""")
    out = tmp_path / "out"
    assert run(sys.executable, script, *arguments, "--out", out, script=script).returncode == 9
    assert not list(out.glob("*/scores.npz")) and len(list(out.glob("*/unfinished-0-*.npz"))) == 2
    result = run(sys.executable, ROOT / "evaluate.py", *arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    assert (
        "8 positions of this batch are done" in result.stdout and "3 positions of this batch are done" in result.stdout
    )
    for key, value in scores(out).items():
        np.testing.assert_array_equal(value, wanted[key])
    assert not list(out.glob("*/unfinished*"))


def test_another_run_starts_afresh_and_says_so(alone, checkpoint, prompts, tmp_path):
    arguments, _ = alone
    script = tmp_path / "script.py"
    script.write_text("""
save = evaluate.save
evaluate.save = lambda path, write: (save(path, write), os._exit(9))
""")
    out = tmp_path / "out"
    assert run(sys.executable, script, *arguments, "--out", out, script=script).returncode == 9
    result = run(sys.executable, ROOT / "evaluate.py", *arguments, "--dtype", "float64", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "an unfinished run with other arguments is dropped" in result.stdout and "goes on" not in result.stdout
    assert not list(out.glob("*/unfinished*"))


def test_shard_needs_several_processes(alone, tmp_path):
    result = run(sys.executable, ROOT / "evaluate.py", *alone[0], "--shard", "--out", tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("evaluate.py: error: --shard needs several processes")
