"""What the command writes: folders that cannot be, a full disk, killed runs, and figures."""
# ruff: noqa: F811 (fixtures that are imported)

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluate import jsonl, run, tiny, written  # noqa: F401

import evaluate
from support import commandline, figures, results

ROOT = Path(__file__).parents[1]
SVA = ["--task", "sva", "--structures", "simple", "--pairs", "6", "--held-out", "4", "--methods", "relp"]
SVA += ["--thresholds", "1e-2,1e-1,2"]


def test_output_folders_that_cannot_be(tiny, run, capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null", "/proc/results"):
        assert commandline.run(evaluate.main, ["--model", str(tiny["gpt2"]), "--pairs", "3", "--out", str(out)]) == 2
        printed, err = capsys.readouterr()
        assert len(err.splitlines()) == 1 and err.startswith("evaluate.py: error:") and str(out) in err
        assert printed == ""  # before any work
    assert (tmp_path / "file").read_text() == "precious"


def test_a_models_folder_that_cannot_be(tiny, run, tmp_path):
    """The second model's folder is a file: the first one's results stay."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gemma2-ioi").write_text("precious")
    code, _, err = run("--model", tiny["gpt2"], tiny["gemma2"], "--pairs", 3, "--no-plot")
    assert code == 2 and len(err) == 1 and "gemma2-ioi" in err[0]
    assert sorted(p.name for p in (tmp_path / "out" / "gpt2-ioi").iterdir()) == [
        "scores.csv",
        "scores.npz",
        "summary.json",
    ]
    assert (tmp_path / "out" / "gemma2-ioi").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# Runs that cannot write, or are stopped


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file that takes 300 bytes and no more."""

    def write(self, data):
        if self.tell() + len(data) > 300:
            full_disk()
        return super().write(data)


CASES = [
    ("scores.npz", "open"),
    ("scores.npz", "write"),
    ("scores.npz", "replace"),
    ("summary.json", "write"),
    ("heatmaps.png", "write"),
    ("inspect.html", "write"),
]


@pytest.mark.parametrize("file, how", CASES)
def test_a_full_disk_leaves_the_old_files_whole(file, how, tiny, run, tmp_path, monkeypatch):
    arguments = ["--model", tiny["gpt2"], "--pairs", 3, "--nodes", "mlp_out"]
    arguments += [] if file.endswith(("png", "html")) else ["--no-plot"]
    assert run(*arguments)[0] == 0

    def files():
        """{path: content}, but for AP's store, which grows."""
        every = (path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.parent.name != "ap")
        return {path: path.read_bytes() for path in every}

    before = files()

    def replaced(source, target, replace=os.replace):
        return full_disk() if file in str(target) else replace(source, target)

    def opened(path, mode="r", *a, open=open, **k):
        if file not in str(path) or "w" not in mode:
            return open(path, mode, *a, **k)
        return full_disk() if how == "open" else FullDisk(path, "w")

    if how == "replace":
        monkeypatch.setattr(os, "replace", replaced)
    else:
        monkeypatch.setattr("builtins.open", opened)
    code, _, err = run(*arguments, "--seed", 1)
    assert code == 2 and len(err) == 1, err
    assert err[0].startswith("evaluate.py: error:") and file in err[0] and "No space left" in err[0]
    after = files()
    assert after.keys() == before.keys()  # no debris
    assert after == before
    monkeypatch.undo()
    assert run(*arguments, "--seed", 1)[0] == 0 and not list((tmp_path / "out").rglob(".*"))


@pytest.mark.parametrize("arguments", [["--pairs", "3", "--methods", "atp"], SVA], ids=["ioi", "sva"])
def test_a_run_that_is_stopped_leaves_the_old_files_whole(arguments, tiny, run, tmp_path, monkeypatch):
    """Stopped while it writes its files: all that an earlier run has written is still there, and no more."""
    arguments = [*arguments, "--model", "toy-neox" if "sva" in arguments else tiny["gpt2"]]
    assert run(*arguments)[0] == 0

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    before, save = files(), results.save

    def stopped(path, write):
        save(path, write)
        if path.name == "summary.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(results, "save", stopped)
    assert run(*arguments, "--seed", 1, "--no-plot")[0] == 130
    assert files() == before and not list((tmp_path / "out").rglob(".*"))


def test_each_source_of_prompts_has_a_folder_of_its_own(tiny, run, tmp_path):
    row = {"original": [5, 6, 7, 8], "patch": [5, 9, 7, 8], "original_answer": 1, "patch_answer": 2}
    arguments = ["--model", tiny["gpt2"], "--pairs", 3, "--methods", "relp", "--no-plot"]
    assert run(*arguments)[0] == 0
    for name in ("ioi", "mine"):
        assert run(*arguments, "--prompts", jsonl(tmp_path / f"{name}.jsonl", row))[0] == 0
    names = {"gpt2-ioi", "gpt2-ioi-ioi", "gpt2-ioi-mine"}
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == names
    assert [written(tmp_path / "out" / name)[0]["prompt_pairs"] for name in sorted(names)] == [3, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What is kept, what is drawn


def test_dollars_are_no_mathematics(tiny, run, tmp_path):
    """In tokens, in a model's name; and braces that mathematics would not like."""
    named = tmp_path / "$x_{$"
    shutil.copytree(tiny["gpt2"], named)
    row = {"original": [5, 6, 7], "patch": [5, 9, 7], "original_answer": 1, "patch_answer": 2}
    prompts = tmp_path / "pairs.jsonl"
    text = {"original": "$$ a $x_{$", "patch": "$$ b $x_{$", "original_answer": 1, "patch_answer": 2}
    for line in (row, text):
        prompts.write_text(json.dumps(line))
        code, out, err = run("--model", named, "--prompts", prompts)
        assert (code, err) == (0, []) and "could not be drawn" not in out
    assert list(tmp_path.glob("out/*/heatmaps.png"))


def test_a_figure_that_fails_costs_the_figure(tiny, run, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such colour\nand more")

    monkeypatch.setattr(figures, "heatmaps", fail)
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 3)
    assert (code, err) == (0, [])
    (line,) = [line for line in out.splitlines() if "could not be drawn" in line]
    assert "heatmaps.png could not be drawn: no such colour" in line
    assert "PCC with AP" in out and (tmp_path / "out" / "gpt2-ioi" / "inspect.html").exists()


def test_a_terminal_without_our_letters(tmp_path):
    command = [
        sys.executable,
        ROOT / "evaluate.py",
        "--model",
        "toy-gpt2",
        "--pairs",
        "2",
        "--methods",
        "atp",
        "--no-plot",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--out", tmp_path / "übung"], capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and b"\\xfcbung" in done.stdout


def test_two_runs_into_one_folder(tiny, run, tmp_path):
    """The second one is refused before its work; when the first has ended, it is not. Other folders are free."""
    out = tmp_path / "out"
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from support.results import folder_of
folder_of({str(out)!r}, "gpt2", "ioi")
print("held", flush=True)
time.sleep(100)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        arguments = ["--model", tiny["gpt2"], "--pairs", 2, "--no-plot"]
        code, printed, err = run(*arguments)
        assert code == 2 and err == [
            f"evaluate.py: error: another run is writing to {out / 'gpt2-ioi'}: wait for its end, or give another --out"
        ]
        assert not (out / "ap").exists() and "PCC" not in printed
        row = {"original": [5, 6, 7, 8], "patch": [5, 9, 7, 8], "original_answer": 1, "patch_answer": 2}
        assert run(*arguments, "--prompts", jsonl(tmp_path / "mine.jsonl", row))[0] == 0
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert run(*arguments)[0] == 0 and run(*arguments)[0] == 0
