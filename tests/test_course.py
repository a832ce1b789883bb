"""The course runs, its exercises are judged, and the notebook is what lessons.py makes, with fresh outputs."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from course.build import NOTEBOOK, SOURCE, cells, executed, notebook, solved
from support import lesson_figures

CELLS = cells(SOURCE.read_text(encoding="utf-8"))
WRONG = [  # to each exercise, answers that somebody might give
    ["layer_1 = 3", "layer_1 = 'two'"],
    ["worst_2 = 2, 'END'", "worst_2 = 'A'"],
    ["scores_3 = value.mean().item(), 0.0, 0.0", "scores_3 = 0.0, 0.0"],
    [
        "def my_norm(x, eps): return x / (eps + x.square().mean(-1, keepdim=True)).sqrt()",
        "def my_norm(x, eps): return (x / (eps + x.square().mean(-1, keepdim=True)).sqrt()).detach()",
        "def my_norm(x, eps): return x / (eps + x.square().mean(-1, keepdim=True)).detach()",
    ],
    ["def relp_by_hand(kinds): return atp_by_hand(kinds)"],
    ["class Repaired(models.Rules):\n    def gate(self, a, b): return 0.5 * a * b", "Repaired = models.Rules().gate"],
    ["edge_7 = 'a3.h0->logits'", "edge_7 = 'm0->nowhere'"],
]


def tagged(tag: str) -> list[int]:
    return [i for i, cell in enumerate(CELLS) if tag in cell.tags]


# ---------------------------------------------------------------------------------------------------------------------
# Running


def run(code: str, namespace: dict) -> str:
    """What a cell prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "cell", "exec"), namespace)
    return printed.getvalue()


@pytest.fixture(scope="module")
def lessons():
    """All cells run in order, with the solutions: the namespace at the end, and what the checks say to each exercise.

    That is [(no answer, the solution, [wrong answers])].
    """
    namespace, said, answers = {"__name__": "lessons"}, [], iter(WRONG)
    for i, (cell, solution) in enumerate(zip(CELLS, solved(CELLS))):
        if "check" in cell.tags:
            exercise = i - 1
            verdicts = []
            for answer in (CELLS[exercise].source, solved(CELLS)[exercise].source, *next(answers)):
                run(answer, namespace)
                verdicts.append(run(cell.source, namespace))
            said.append((verdicts[0], verdicts[1], verdicts[2:]))
        elif not cell.is_text:
            run(solution.source, namespace)
    return namespace, said


def test_earlier_exercises_can_be_done_at_the_end(lessons):
    """A class runs all cells, and goes back: no lesson overwrites what an earlier check needs."""
    for i in tagged("check"):
        run(solved(CELLS)[i - 1].source, lessons[0])
        assert run(CELLS[i].source, lessons[0]).startswith("Right. ")


def test_every_exercise_has_a_check_and_a_folded_solution():
    exercises = tagged("exercise")
    assert len(exercises) == len(WRONG) == 7
    assert tagged("check") == [i + 1 for i in exercises] and tagged("solution") == [i + 2 for i in exercises]
    for i in tagged("solution"):
        assert CELLS[i].is_text and re.fullmatch(r"<details><summary>.*</details>", CELLS[i].source, re.S)


def test_the_checks_tell_right_from_wrong(lessons):
    for before, after, wrong in lessons[1]:
        assert before == "No answer yet.\n"
        assert after.startswith("Right. ")
        assert wrong and all(verdict.startswith("Wrong. ") for verdict in wrong)


def test_the_page_on_gpt2_runs_on_a_toy(lessons):
    (page,) = tagged("network")
    code = CELLS[page].source
    assert 'models.from_pretrained("gpt2"), twenty_pairs(load_tokenizer("gpt2"))' in code and code.startswith(
        "GPT2 = False\n"
    )
    code = code.replace("GPT2 = False", "GPT2 = True").replace('"gpt2"', '"toy-gpt2"')
    assert re.search(r"^RelP: +resid_pre +\.?[\d.]+", run(code, dict(lessons[0])), re.M)


def test_the_first_cell_does_nothing_locally(monkeypatch, tmp_path):
    """On Colab, it clones and installs, once."""
    (setup,) = tagged("setup")
    commands = []

    def fake_run(command, check):
        commands.append(command)
        if command[0] == "git":
            Path(command[-1]).mkdir()
            (Path(command[-1]) / "relp.py").write_text("")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", fake_run)
    run(CELLS[setup].source, {})
    assert not commands and not list(tmp_path.iterdir()) and Path.cwd() == tmp_path
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    for _ in range(2):
        run(CELLS[setup].source, {})
    assert [command[:2] for command in commands] == [["git", "clone"], [sys.executable, "-m"]]
    assert Path.cwd() == tmp_path / "relp"


# ---------------------------------------------------------------------------------------------------------------------
# The notebook

NUMBER = re.compile(r"[-+]?\d+(?:\.(\d+))?")


def agree(one: str, other: str) -> bool:
    """The same text; decimal numbers equal to a thousandth, or to one unit of the last digit that is printed."""
    words = [re.sub(r"\s+", " ", NUMBER.sub("#", text)).strip() for text in (one, other)]
    if words[0] != words[1]:
        return False
    for a, b in zip(NUMBER.finditer(one), NUMBER.finditer(other)):
        x, y = float(a[0]), float(b[0])
        unit = 10.0 ** -len(a[1]) if a[1] else 0
        if abs(x - y) > max(1.01 * unit, 1e-3 * abs(x) if a[1] else 0):
            return False
    return True


def test_agree():
    assert agree("PCC  0.248 of 17", "PCC 0.249 of 17") and agree("x -0.00", "x  0.00") and agree("-1234.5", "-1234.9")
    assert not agree("PCC 0.248", "PCC 0.251") and not agree("17 edges", "18 edges") and not agree("a 1.0", "b 1.0")
    assert not agree("1.0 2.0", "1.0")


def printed(cell: dict) -> str:
    outputs = cell.get("outputs", [])
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout")


def n_pictures(cell: dict) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_notebook_is_made_of_the_script(committed):
    """If this fails: python course/build.py --execute"""
    counts = [cell["execution_count"] for cell in committed["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))  # run once, from top to bottom
    bare = [
        {**cell, "outputs": [], "execution_count": None} if cell["cell_type"] == "code" else cell
        for cell in committed["cells"]
    ]
    for cell in bare:
        cell["source"] = "".join(cell["source"])
    made = notebook(CELLS)
    for cell in made["cells"]:
        cell["source"] = "".join(cell["source"])
    assert {**committed, "cells": bare} == made
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_the_script_prints_what_the_notebook_shows(committed, tmp_path):
    """From another folder. Without answers, the checks say that there are none."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COURSE_PICTURES": str(tmp_path / "pictures")}
    done = subprocess.run([sys.executable, SOURCE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No answer yet.") == 7
    in_notebook = "".join(map(printed, committed["cells"]))
    assert agree(done.stdout, in_notebook), "stale outputs: python course/build.py --execute"
    assert len(list((tmp_path / "pictures").iterdir())) == sum(map(n_pictures, committed["cells"])) > 7


def test_the_notebook_runs_with_the_solutions(committed):
    """Cell by cell, it shows what is committed, but that the checks say that the answers are right."""
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -r requirements-dev.txt")
    fresh = executed(notebook(solved(CELLS)))
    for cell, now, then in zip(CELLS, fresh["cells"], committed["cells"], strict=True):
        if "check" in cell.tags:
            assert printed(now).startswith("Right. ") and printed(then) == "No answer yet.\n"
        elif "exercise" not in cell.tags:
            assert agree(printed(now), printed(then)), "stale outputs: python course/build.py --execute"
            assert n_pictures(now) == n_pictures(then)


# ---------------------------------------------------------------------------------------------------------------------
# Its drawing functions


def test_bars_and_curves():
    drawn = lesson_figures.bars({"AP": [1, -2.5], "AtP": [0.5, 3], "else": [0, 0]}, ["a", "b"], "y", "title")
    assert isinstance(drawn, Figure) and len(drawn.axes[0].patches) == 6
    assert "-2.5" in [text.get_text() for text in drawn.axes[0].texts]
    lines = lesson_figures.curves([0, 1, 2], {"one": [1, 2, 3]}, "x", "y").axes[0].lines
    assert list(lines[-1].get_ydata()) == [1, 2, 3]
    assert len(set(lesson_figures.colors(["RelP", "AtP", "x", "y", "z"]))) == 5
    with pytest.raises(ValueError, match="'one' has 2"):
        lesson_figures.bars({"one": [1, 2]}, ["a", "b", "c"])
    with pytest.raises(ValueError, match="one number per x, 3"):
        lesson_figures.curves([0, 1, 2], {"one": [1, 2]})
