"""python -m beyond.verify: AP of the cells with the largest cheap scores, and an estimate elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
import relp
import tasks
from beyond import twopoint, verify
from support import resume
from support.inspector import of_nodes
from support.prompts import batches, tensors
from support.tokenizer import load_tokenizer

NODES = ["mlp_out", "head"]


@pytest.fixture
def verified(tmp_path, capsys):
    """verified(*arguments) -> (summary.json, scores.npz, what was printed) on toy-gpt2."""

    def call(*arguments):
        verify.main(["--model", "toy-gpt2", "--pairs", "4", "--out", str(tmp_path), *arguments])
        folder = tmp_path / "toy-gpt2-verified"
        with np.load(folder / "scores.npz") as file:
            return json.loads((folder / "summary.json").read_text()), dict(file), capsys.readouterr().out

    return call


def every_score(compute):
    """{node: [n, layers, positions, ...]}, NaN beyond a prompt, from compute(model, *batch)."""
    model, pairs, found = models.from_pretrained("toy-gpt2"), tasks.ioi(load_tokenizer("toy-gpt2"), 4), {}
    longest = max(len(pair.original) for pair in pairs)
    for numbers in batches(pairs, 4):
        for node, x in compute(model, *tensors([pairs[i] for i in numbers], "cpu")).items():
            whole = found.setdefault(node, np.full((4, x.shape[1], longest, *x.shape[3:]), np.nan))
            whole[numbers, :, : x.shape[2]] = x
    return found


def test_verify(verified, monkeypatch):
    """AP of that share of the cells and of no others, and the weighted mean of two methods elsewhere."""
    cells, patching = [], resume.activation_patching
    counted = lambda *a: cells.append(sum(int(x.sum()) for x in a[6].values())) or patching(*a)  # noqa: E731
    monkeypatch.setattr(resume, "activation_patching", counted)
    summary, found, out = verified("--nodes", ",".join(NODES), "--share", "0.1")
    monkeypatch.undo()
    cheap = {
        "atp": every_score(lambda *a: relp.attribute(*a, NODES)),
        "relp": every_score(lambda *a: relp.attribute(*a, NODES, lrp=True)),
        "twopoint": every_score(lambda *a: twopoint.attribute(*a, NODES)),
    }
    truth = every_score(lambda *a: resume.activation_patching(*a, NODES))
    strength = {node: np.max([abs(of[node]) for of in cheap.values()], axis=0) for node in NODES}
    exact = {node: found[f"exact_{node}"] for node in NODES}
    inside = np.concatenate([strength[node][exact[node]] for node in NODES])
    left = np.concatenate([strength[node][~exact[node]] for node in NODES])
    n = sum(int(np.nansum(x > 0)) for x in strength.values())
    assert len(inside) == sum(cells) == round(0.1 * n) and inside.min() >= np.nanmax(left) * (1 - 1e-5)
    for node in NODES:
        estimate = 0.6 * cheap["relp"][node] + 0.4 * cheap["twopoint"][node]
        expected = np.where(exact[node], truth[node], estimate)
        np.testing.assert_allclose(found[f"verified_{node}"], expected, atol=1e-4)
        of = summary["nodes"][node]
        assert of["exact"] == exact[node].sum() and of["cells"] == (np.nan_to_num(cheap["atp"][node]) != 0).sum()
        assert of["largest_effect"] == pytest.approx(np.abs(truth[node][exact[node]]).max(), rel=1e-4)
        assert of["largest_estimate_left"] == pytest.approx(np.nanmax(np.abs(estimate[~exact[node]])), rel=1e-4)
    assert "AP of all cells costs" in out and "largest estimate left" in out
    # the lines are the strongest of the mean maps: each has the number of its cell
    lines = out[out.index("the strongest") :].splitlines()[1:11]
    sizes = [abs(float(line.split()[-4])) for line in lines]
    assert sizes == sorted(sizes, reverse=True) and all(line.split()[0].strip(",") in NODES for line in lines)


def test_all_cells_are_ap(verified):
    summary, found, _ = verified("--nodes", "mlp_out", "--share", "1")
    truth = every_score(lambda *a: resume.activation_patching(*a, ["mlp_out"]))["mlp_out"]
    np.testing.assert_allclose(found["verified_mlp_out"], truth, atol=1e-4)
    flop = summary["flop"]
    assert flop["ap_of_exact"] == flop["ap_of_all"] and summary["nodes"]["mlp_out"]["largest_estimate_left"] == 0


def test_the_price_is_that_of_the_edited_runs():
    """Two layers, three positions: an edit at layer 0, position 1 runs two tokens through two blocks."""
    pairs = [tasks.Pair((1, 2, 3), (1, 4, 3), (5, 6), ("a", "b", "c"), "g")]
    cells = np.zeros((1, 2, 3), bool)
    cells[0, 0, 1] = True
    assert verify.price({"mlp_out": cells}, pairs) == 4
    cells[0, 1, 2] = True
    assert verify.price({"mlp_out": cells}, pairs) == 5


def test_the_page_and_the_figure_say_which_cells_are_exact(verified, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        verify.figures, "heatmaps", lambda *a, plain=verify.figures.heatmaps: drawn.append(plain(*a)) or drawn[0]
    )
    pages = []
    monkeypatch.setattr(verify.inspector, "of_nodes", lambda *a: pages.append(of_nodes(*a)) or pages[0])
    _, found, _ = verified("--nodes", "mlp_out")
    exact = found["exact_mlp_out"]
    assert pages[0].kinds[0].exact["scale"] == 1.0
    data = np.frombuffer(__import__("base64").b64decode(pages[0].kinds[0].exact["data"]), "<i2").reshape(exact.shape)
    assert ((data > 0) == exact).all() and exact.any()
    first, *others = (ax for ax in drawn[0].axes if ax.images)
    dots = [line for line in first.lines if line.get_color() == "black"]
    assert len(dots) == 1 and not any(line.get_color() == "black" for ax in others for line in ax.lines)
    assert "a black dot: AP was run there" in drawn[0].get_supxlabel()


def test_two_processes(verified, tmp_path):
    """They share the prompts out, and find what one finds."""
    _, one, _ = verified()
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "beyond.verify"]
    given = ["--model", "toy-gpt2", "--pairs", "4", "--out", str(tmp_path / "two")]
    subprocess.run([*start, *given], cwd=Path(models.__file__).parent, check=True, capture_output=True, timeout=240)
    with np.load(tmp_path / "two" / "toy-gpt2-verified" / "scores.npz") as two:
        assert two.keys() == one.keys()
        for key in one:
            np.testing.assert_allclose(two[key], one[key], atol=1e-4)


@pytest.mark.parametrize("given", ["0", "1.1", "x", "nan"])
def test_what_cannot_be(given, verified):
    with pytest.raises(ValueError, match="--share"):
        verified("--share", given)
