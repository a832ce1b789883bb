"""python -m beyond.verify: AP of only those nodes that a cheap method ranks highest."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import models
import relp
import tasks
from beyond import verify
from support import resume
from support.prompts import batches, tensors
from support.tokenizer import load_tokenizer

NODES = ["mlp_out", "head", "neuron"]


@pytest.fixture
def verified(tmp_path, capsys):
    """verified(*arguments) -> (verified.json, what was printed) on toy-gpt2."""

    def call(*arguments):
        verify.main(["--model", "toy-gpt2", "--pairs", "4", "--out", str(tmp_path), *arguments])
        return json.loads((tmp_path / "toy-gpt2-ioi" / "verified.json").read_text()), capsys.readouterr().out

    return call


def averaged(compute):
    """{(node, layer, role, *part): mean over the pairs that have this role}, from compute(model, *batch)."""
    model, pairs, values = models.from_pretrained("toy-gpt2"), tasks.ioi(load_tokenizer("toy-gpt2"), 4), {}
    for numbers in batches(pairs, 4):
        scores = compute(model, *tensors([pairs[i] for i in numbers], "cpu"))
        for row, number in enumerate(numbers):
            for node, x in scores.items():
                for layer, pos, *part in np.ndindex(*x.shape[1:]):
                    key = (node, layer, pairs[number].roles[pos], *part)
                    values.setdefault(key, []).append(float(x[(row, layer, pos, *part)]))
    return {key: np.mean(value) for key, value in values.items()}


def count_cells(monkeypatch):
    """A list that grows by the number of cells that AP is run on."""
    cells, patching = [], resume.activation_patching
    counted = lambda *a: cells.append(sum(int(x.sum()) for x in a[6].values())) or patching(*a)  # noqa: E731
    monkeypatch.setattr(resume, "activation_patching", counted)
    return cells


def test_verify(verified, monkeypatch):
    """The K largest averaged scores over all kinds of nodes, AP of these and no others, the next score as the bound."""
    cells = count_cells(monkeypatch)
    found, out = verified("--nodes", ",".join(NODES), "--methods", "relp,atp", "--top", "9")
    monkeypatch.undo()
    assert sum(cells) == 9 * 4  # these nodes are in all pairs
    by_relp = averaged(lambda *a: relp.attribute(*a, NODES, lrp=True))
    by_atp = averaged(lambda *a: relp.attribute(*a, NODES))
    ap = averaged(lambda *a: resume.activation_patching(*a, ["mlp_out", "head"]))
    order = sorted(by_relp, key=lambda key: -abs(by_relp[key]))
    assert found["by"] == "relp" and found["of"] == len(by_relp) and len(found["nodes"]) == 9
    assert found["bound"] == pytest.approx(abs(by_relp[order[9]]), rel=1e-4)
    for row, key in zip(found["nodes"], order):
        assert (row["node"], row["layer"], row["position"], *row["part"]) == key
        assert row["scores"]["relp"] == pytest.approx(by_relp[key], rel=1e-4)
        assert row["scores"]["atp"] == pytest.approx(by_atp[key], abs=1e-4)
        assert row["scores"]["ap"] == pytest.approx(ap[key], abs=1e-4)
    head, *lines = out[out.index("  node ") : out.index("  (")].splitlines()
    assert head.split() == ["node", "layer", "part", "position", "AP", "RelP", "AtP"]
    for line, row in zip(lines, found["nodes"], strict=True):
        assert [float(x) for x in line.split()[-3:]] == pytest.approx(
            [row["scores"][m] for m in ("ap", "relp", "atp")], abs=6e-4
        )
    error = max(abs(row["scores"]["relp"] - row["scores"]["ap"]) for row in found["nodes"])
    assert f"largest difference to AP: {error:.3f}; no other node has a RelP score beyond {found['bound']:.3f}" in out


def test_the_first_method_ranks(verified):
    found, out = verified("--methods", "ln+ah,relp", "--top", "3", "--metric", "kl")
    sizes = [abs(row["scores"]["ln+ah"]) for row in found["nodes"]]
    assert found["by"] == "ln+ah" and sizes == sorted(sizes, reverse=True) and min(sizes) >= found["bound"] > 0
    assert {row["node"] for row in found["nodes"]} <= {"head", "mlp_out"}  # by default


def test_more_nodes_than_there_are(verified, monkeypatch):
    cells = count_cells(monkeypatch)
    found, _ = verified("--nodes", "mlp_out", "--methods", "relp", "--top", "1000")
    assert len(found["nodes"]) == found["of"] == 4 * 16 and found["bound"] == 0
    lengths = [len(pair.original) for pair in tasks.ioi(load_tokenizer("toy-gpt2"), 4)]
    assert sum(cells) == 4 * sum(lengths) < 4 * 4 * 16  # a pair has a cell where it has the role


def test_two_processes(verified, tmp_path):
    """They share the prompts out, and find what one finds."""
    one, _ = verified("--top", "3")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "beyond.verify"]
    given = ["--model", "toy-gpt2", "--pairs", "4", "--top", "3", "--out", str(tmp_path / "two")]
    subprocess.run([*start, *given], cwd=Path(models.__file__).parent, check=True, capture_output=True, timeout=240)
    two = json.loads((tmp_path / "two" / "toy-gpt2-ioi" / "verified.json").read_text())
    for row, other in zip(two.pop("nodes"), one.pop("nodes"), strict=True):
        assert row.pop("scores") == pytest.approx(other.pop("scores"), rel=1e-4) and row == other
    assert two.pop("bound") == pytest.approx(one.pop("bound"), rel=1e-4) and two == one


def test_what_cannot_be(verified):
    for given, says in ((["--methods", "ap,relp"], "AP is what verifies"), (["--top", "0"], "--top: must be from 1")):
        with pytest.raises(ValueError, match=says):
            verified(*given)
