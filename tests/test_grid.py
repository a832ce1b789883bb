"""python -m beyond.grid: every number computed again another way."""

import itertools
import json

import pytest
import torch

import models
import relp
import tasks
from beyond import grid
from beyond.methods import parse_rules
from support import resume, statistics
from support.prompts import batches, tensors
from support.tokenizer import load_tokenizer

NODES = ["attn_out", "mlp_out"]


def scores_of(name, pairs, compute):
    """{node: [n, layers, positions]} from compute(model, *batch), NaN beyond a prompt's length."""
    model, longest, whole = models.from_pretrained(name), max(len(p.original) for p in pairs), {}
    for numbers in batches(pairs, 10):
        for node, x in compute(model, *tensors([pairs[i] for i in numbers], "cpu")).items():
            array = whole.setdefault(node, torch.full((len(pairs), x.shape[1], longest), torch.nan))
            array[numbers, :, : x.shape[2]] = x
    return whole


@pytest.mark.parametrize("name, flags, recipe", [
    ("toy-gpt2", ["ln", "identity", "ah"], "ln"),
    ("toy-gemma2", ["ln", "identity", "half", "ah"], "ln+half"),
])  # fmt: skip
def test_grid(name, flags, recipe, tmp_path, capsys, monkeypatch):
    """Every subset with every linear rule, its numbers those of a run with only these rules; what a rule adds."""
    monkeypatch.setattr(grid, "LINEAR", ["", "gamma=0.5"])
    given = ["--model", name, "--pairs", "5", "--seed", "3", "--nodes", ",".join(NODES), "--out", str(tmp_path)]
    grid.main(given)
    out, found = capsys.readouterr().out, json.loads((tmp_path / f"{name}-ioi" / "grid.json").read_text())
    subsets = [s for n in range(len(flags) + 1) for s in itertools.combinations(flags, n)]
    sets, paper = found["sets"], "+".join(f for f in flags if f != "ah")
    assert sets.keys() == {"+".join([*s, *linear]) or "atp" for s in subsets for linear in ([], ["gamma=0.5"])}
    assert (found["paper"], found["recipe"]) == (paper, recipe)

    pairs = tasks.ioi(load_tokenizer(name), 5, seed=3)
    groups = [p.group for p in pairs]
    weights = statistics.resamples(groups, seed=3)
    ap = scores_of(name, pairs, lambda model, *batch: resume.activation_patching(model, *batch, NODES))
    for of in ("atp", paper, recipe, "ln+ah+gamma=0.5"):
        lrp, pcc = parse_rules("none" if of == "atp" else of.replace("+", ",")), []
        scores = scores_of(name, pairs, lambda model, *batch, lrp=lrp: relp.attribute(model, *batch, NODES, lrp=lrp))
        for node in NODES:
            pcc.append(statistics.agreement(scores[node], ap[node], groups, weights)["averaged"])
            assert sets[of][node] == pytest.approx(statistics.estimate(pcc[-1]), abs=1e-4)
        assert sets[of]["mean"] == pytest.approx(statistics.estimate(sum(pcc) / 2), abs=1e-4)

    def mean(*rules):
        return sets["+".join(f for f in flags if f in rules) or "atp"]["mean"][0]

    for flag in flags:
        others = [f for f in paper.split("+") if f != flag]
        assert found["effects"][flag]["alone"][0] == pytest.approx(mean(flag) - mean())
        assert found["effects"][flag]["beside"][0] == pytest.approx(mean(*others, flag) - mean(*others))

    # what is printed: the best ten and those with a name, in order
    head, *table = out.split("  PCC with AP, ")[1].split("\n\n")[0].splitlines()
    shown, order = [line.split()[0] for line in table], sorted(sets, key=lambda s: -sets[s]["mean"][0])
    named = {
        recipe: "what the recipe of the paper's code computes",
        "atp": "no rule: the gradient",
        paper: "the paper's",
    }
    assert head.startswith(f"{len(table)} of {len(sets)} sets") and {*shown} == {*order[:10], *named}
    assert shown == [s for s in order if s in shown]
    for of, line in zip(shown, table):
        assert line.endswith(named.get(of, "]")) and f"{sets[of]['mean'][0]:.3f} [" in line

    # a second run takes AP from the store
    monkeypatch.setattr(resume, "activation_patching", lambda *a, **k: pytest.fail("AP was computed again"))
    grid.main(given)
    assert capsys.readouterr().out == out


def test_its_options(tmp_path):
    with pytest.raises(ValueError, match="unrecognized arguments: --methods"):
        grid.main(["--methods", "relp", "--out", str(tmp_path)])
