"""Sets of rules as methods and in --grid, AtP*, parts of nodes: every number computed again another way."""
# ruff: noqa: F811 (fixtures that are imported)

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_evaluate import results, run, tiny  # noqa: F401

import models
import relp
import tasks
from beyond import atp_star, grid
from beyond.methods import parse_rules
from beyond.temperature import Temperature
from beyond.twopoint import TWO_POINT, TwoPoint
from support import statistics
from support.prompts import tensors
from support.tokenizer import load_tokenizer


@pytest.fixture
def setting(tiny):
    """setting(name, n) -> the model, and the first n pairs that its runs use."""

    def call(name, n):
        return models.from_pretrained(str(tiny[name])), tasks.ioi(load_tokenizer(str(tiny[name])), n)

    return call


def of_length(pairs):
    """[(rows, [original, patch, answers])] for each prompt length."""
    lengths = [len(p.original) for p in pairs]
    for length in dict.fromkeys(lengths):
        rows = [i for i, other in enumerate(lengths) if other == length]
        yield rows, tensors([pairs[i] for i in rows], "cpu")


def test_methods_may_be_sets_of_rules(tiny, results, setting):
    methods = "ap,atp,atp*,relp,twopoint,ig,ln+ah,half2+attention2,temperature=2+identity,epsilon=0.1"
    arguments = ["--pairs", 4, "--methods", methods, "--steps", 3, "--nodes", "q,mlp_out,head"]
    summary, scores = results(tiny["gemma2"], *arguments)
    model, pairs = setting("gemma2", 4)
    options = {
        "atp": {},
        "relp": {"lrp": True},
        "twopoint": {"lrp": TWO_POINT["gemma2"]},
        "ig": {"steps": 3},
        "ln+ah": {"lrp": models.Rules(ln=True, ah=True)},
        "half2+attention2": {"lrp": TwoPoint(two_point=("half", "attention"))},
        "temperature=2+identity": {"lrp": Temperature(identity=True, temperature=2.0)},
        "epsilon=0.1": {"lrp": models.Rules(epsilon=0.1)},
    }
    assert list(summary["pcc"]) == [*("atp", "atp*", "relp", "twopoint", "ig"), *list(options)[4:]]
    for rows, batch in of_length(pairs):
        nodes = ["q", "mlp_out", "head"]
        wanted = {m: relp.attribute(model, *batch, nodes, **how) for m, how in options.items()}
        wanted["atp*"] = atp_star.attribute(model, *batch, nodes)
        wanted["twopoint"]["q"] = wanted["atp*"]["q"]
        wanted["ap"] = relp.activation_patching(model, *batch, nodes)
        for method, of_nodes in wanted.items():
            for node, value in of_nodes.items():
                got = scores[f"{method}_{node}"][rows][:, :, : value.shape[2]]
                assert got.shape == value.shape
                assert got == pytest.approx(value.numpy(), abs=1e-4 * float(value.abs().max()))
    assert np.abs(scores["atp*_q"] - scores["atp_q"])[~np.isnan(scores["atp_q"])].max() > 1e-6
    assert np.array_equal(scores["atp*_head"], scores["atp_head"], equal_nan=True)


GPT2, GEMMA2 = ["ln", "identity", "ah"], ["ln", "identity", "half", "ah"]


def rows_of(out):
    """[(set of rules, line)] of the table that --grid prints, and its title."""
    title, *table = out.split("  PCC with AP, ")[1].split("\n\n")[0].splitlines()
    return [(line.split()[0], line) for line in table], title


@pytest.mark.parametrize("name, flags", [("gpt2", GPT2), ("gemma2", GEMMA2)])
def test_grid(name, flags, tiny, run, setting, tmp_path, monkeypatch):
    """Every subset with every linear rule, its numbers those of a run with only these rules; what a rule adds."""
    monkeypatch.setattr(grid, "LINEAR", ["", "gamma=0.5"])
    code, out, err = run("--model", tiny[name], "--pairs", 5, "--no-plot", "--grid", "--nodes", "attn_out,mlp_out")
    assert (code, err) == (0, [])
    found = json.loads((tmp_path / "out" / f"{name}-ioi" / "grid.json").read_text())
    subsets = [s for n in range(len(flags) + 1) for s in itertools.combinations(flags, n)]
    labels = {"+".join([*s, *linear]) or "none" for s in subsets for linear in ([], ["gamma=0.5"])}
    assert found["rules"].keys() == labels and len(labels) == 2 ** (len(flags) + 1)
    paper = "+".join(f for f in flags if f != "ah")
    assert found["paper"] == paper

    model, pairs = setting(name, 5)
    groups = [p.group for p in pairs]
    with np.load(tmp_path / "out" / f"{name}-ioi" / "scores.npz") as file:
        ap = {node: torch.tensor(file[f"ap_{node}"]) for node in ("attn_out", "mlp_out")}
    for label in ("none", paper, "ln", "ln+ah+gamma=0.5"):
        lrp, got = parse_rules(label.replace("+", ",")), []
        for node in ap:
            scores = torch.full_like(ap[node], torch.nan)
            for rows, batch in of_length(pairs):
                value = relp.attribute(model, *batch, [node], lrp=lrp)[node]
                scores[rows, :, : value.shape[2]] = value
            wanted = statistics.agreement(scores, ap[node], groups)
            for what in ("averaged", "pooled", "per_prompt"):
                assert found["rules"][label][node][what][0] == pytest.approx(float(wanted[what]), abs=1e-4)
            got.append(float(wanted["averaged"]))
        assert found["rules"][label]["mean"][0] == pytest.approx(np.mean(got), abs=1e-4)

    def mean(label):
        return found["rules"][label]["mean"][0]

    for flag in flags:
        of = found["effects"][flag]
        assert of["alone"][0] == pytest.approx(mean(flag) - mean("none"))
        others = [f for f in paper.split("+") if f != flag]
        with_it = "+".join(f for f in flags if f in (*others, flag))
        assert of["beside the paper's others"][0] == pytest.approx(mean(with_it) - mean("+".join(others)))
        pairs_of_sets = [
            ("+".join(f for f in flags if f in (*s, flag)), "+".join(s) or "none") for s in subsets if flag not in s
        ]
        assert of["on average"][0] == pytest.approx(np.mean([mean(a) - mean(b) for a, b in pairs_of_sets]))
        assert all(low <= high for _, low, high in of.values())

    # what is printed: the best ten and those with a name, in order, and what each rule adds
    table, title = rows_of(out)
    order = sorted(labels, key=mean, reverse=True)
    named = {paper: "the paper's", "ln": "what the recipe of the paper's code computes", "none": "the gradient, AtP"}
    assert len(table) < len(labels) and title.startswith(f"{len(table)} of {len(labels)} sets ")
    shown = [label for label, _ in table]
    assert {*order[:10], *named} == {*shown} and [mean(s) for s in shown] == sorted(map(mean, shown), reverse=True)
    for label, line in table:
        assert f"{mean(label):.3f}".lstrip("0") in line
        assert line.endswith(named[label]) if label in named else line.endswith("]")
    effects = out.split("what a rule adds to the mean")[1].splitlines()
    for flag, line in zip(flags, effects[1:]):
        assert line.split()[0] == flag and f"{found['effects'][flag]['alone'][0]:+.3f}".replace("0.", ".") in line
    best = max(flags, key=lambda flag: found["effects"][flag]["alone"][0])
    gain, whole = found["effects"][best]["alone"][0], mean(paper) - mean("none")
    assert f"  {best} by itself makes {gain:+.3f} of the {whole:+.3f} " in out


def test_the_whole_grid_prints_little(tiny, run, tmp_path):
    """Five rules for linear layers, as in real use: ten sets and those with a name, all the others in grid.json."""
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 2, "--no-plot", "--grid", "--nodes", "mlp_out")
    assert (code, err) == (0, [])
    found = json.loads((tmp_path / "out" / "gpt2-ioi" / "grid.json").read_text())
    assert len(found["rules"]) == 2**3 * 5
    assert sum("epsilon=0.01" in name for name in found["rules"]) == 8
    table, _ = rows_of(out)
    assert 10 <= len(table) <= 13 and sum(name not in ("none", "ln", "ln+identity") for name, _ in table) <= 10
    assert {"none", "ln", "ln+identity"} <= {name for name, _ in table}
    assert all(not math.isnan(of["mean"][0]) for of in found["rules"].values())


def test_grid_takes_ap_from_disk(tiny, run, tmp_path, monkeypatch):
    """The second run of the same model and prompts patches nothing and prints the same; others are patched anew."""
    monkeypatch.setattr(grid, "LINEAR", [""])
    calls, patching = [], relp.activation_patching
    monkeypatch.setattr(relp, "activation_patching", lambda *a, **k: calls.append(1) or patching(*a, **k))
    arguments = ["--model", tiny["gpt2"], "--pairs", 3, "--no-plot", "--nodes", "mlp_out"]

    def table(out):
        return out.split("  PCC with AP, ")[1]

    first = run(*arguments, "--grid")[1]
    done = len(calls)
    assert done > 0 and table(run(*arguments, "--grid")[1]) == table(first) and len(calls) == done
    run(*arguments, "--grid", "--seed", 1)
    assert len(calls) > done
    done = len(calls)
    run(*arguments)  # without --grid, AP is what is asked for
    assert len(calls) > done
    path = tmp_path / "out" / "gpt2-ioi" / "scores.npz"
    path.write_bytes(path.read_bytes()[:200])
    done = len(calls)
    code, _, err = run(*arguments, "--grid")
    assert (code, err) == (0, []) and len(calls) > done


def test_grid_takes_no_ap_of_other_weights(tiny, run, tmp_path, monkeypatch):
    """A model that has changed in its folder: the earlier AP is not its own."""
    monkeypatch.setattr(grid, "LINEAR", [""])
    shutil.copytree(tiny["gpt2"], tmp_path / "gpt2")
    weights = load_file(tiny["gpt2"] / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"] *= 1.1
    save_file(weights, tmp_path / "gpt2" / "model.safetensors")
    arguments = ["--pairs", 3, "--no-plot", "--nodes", "mlp_out"]

    def ap(*more):
        assert run(*more, *arguments)[0] == 0
        with np.load(tmp_path / "out" / "gpt2-ioi" / "scores.npz") as scores:
            return scores["ap_mlp_out"]

    one, other = ap("--model", tiny["gpt2"]), ap("--model", tmp_path / "gpt2", "--grid")
    np.testing.assert_array_equal(other, ap("--model", tmp_path / "gpt2"))
    assert not np.allclose(one, other, atol=1e-3, equal_nan=True)


def test_figure_of_heads_and_neurons(tiny, run, tmp_path):
    arguments = ["--pairs", 2, "--nodes", "resid_pre,head,head_k,neuron", "--methods", "atp,relp"]
    code, _, err = run("--model", tiny["gemma2"], *arguments)
    picture = (tmp_path / "out" / "gemma2-ioi" / "heatmaps.png").read_bytes()
    assert (code, err) == (0, []) and picture.startswith(b"\x89PNG") and len(picture) > 10000


@pytest.mark.parametrize("arguments, words", [
    (["--grid", "--verify", "3"], ["--grid", "--verify", "choose one"]),
    (["--verify", "0"], ["--verify", "at least 1"]),
    (["--verify", "3", "--methods", "ap"], ["--verify", "--methods relp"]),
    (["--verify", "relp:3"], ["--verify", "doubt:K", "'relp:3'"]),
    (["--verify", "doubt:"], ["--verify", "doubt:K", "'doubt:'"]),
    (["--verify", "doubt:0"], ["--verify", "at least 1"]),
    (["--verify", "doubt:3", "--methods", "ap,relp"], ["--verify doubt:K", "both", "--methods"]),
    (["--verify", "doubt:3", "--grid"], ["--grid", "--verify", "choose one"]),
    (["--prompts", "pairs.jsonl", "--corruption", "s2"], ["--corruption", "no meaning with --prompts"]),
    (["--methods", "ap,ln+mlp"], ["unknown method 'ln+mlp'", "ln+ah"]),
    (["--methods", "ln3"], ["unknown method 'ln3'"]),
    (["--rules", "ln,ah2"], ["unknown rule 'ah2'", "attention2"]),
    (["--rules", "temperature=0"], ["temperature", "positive"]),
    (["--rules", "temperature=2,attention2"], ["temperature", "attention2", "choose one"]),
    (["--task", "sva", "--methods", "relp,atp*"], ["AtP*", "sva"]),
    (["--task", "sva", "--grid"], ["--grid", "sva"]),
    (["--nodes", "heads"], ["unknown node 'heads'", "head_pattern"]),
])  # fmt: skip
def test_bad_input(arguments, words, run):
    code, _, err = run(*arguments)
    assert code == 2 and len(err) == 1 and all(word in err[0] for word in words), err
