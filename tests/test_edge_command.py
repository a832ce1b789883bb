"""`--task edges` as a user sees it: its files, its circuits judged again from these files alone, and bad input.

What scores, exact patching and circuits are is tested in test_edges.py.
"""
# ruff: noqa: F811 (fixtures that are imported)

import io
import itertools
import json
import math
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.patches import FancyArrowPatch
from safetensors.torch import load_file
from test_bad_input import refused  # noqa: F401
from test_evaluate import IDS, TEXT, jsonl, label, pearson, run, tiny  # noqa: F401

import evaluate
import models
import tasks
from beyond.edges import figure, judging, scoring
from beyond.edges.graph import Graph
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from support import results, statistics
from support.positions import overlay
from support.prompts import read_pairs, tensors
from support.tokenizer import load_tokenizer

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's
METHODS = {"relp": {"lrp": True}, "eap-ig-2": {"steps": 2}}
TOY = models.SHORT_NAMES["toy-gpt2"]


# ---------------------------------------------------------------------------------------------------------------------
# A run and its files


@dataclass
class Run:
    path: Path
    out: str

    def json(self, name):
        text = (self.path / name).read_text()
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in {name}"))

    @cached_property
    def summary(self):
        return self.json("summary.json")

    @cached_property
    def arrays(self):
        with np.load(self.path / "edges.npz") as file:
            return dict(file)

    def at(self, edge):
        return tuple(
            list(self.arrays[kind]).index(name) for kind, name in zip(("writers", "readers"), edge.split("->"))
        )

    def means(self, method):
        """{edge: mean score}, writer by writer."""
        mean = self.arrays[method].astype(float).mean(0)
        names = itertools.product(enumerate(self.arrays["writers"]), enumerate(self.arrays["readers"]))
        return {f"{u}->{v}": mean[i, j] for (i, u), (j, v) in names if not np.isnan(mean[i, j])}


@pytest.fixture(scope="module")
def edges(tmp_path_factory):
    """edges(*arguments) -> Run; it must end well and quietly."""

    def call(*arguments, into=None):
        folder, out, err = into or tmp_path_factory.mktemp("edges"), io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = evaluate.main(["--task", "edges", *map(str, arguments), "--out", str(folder)])
        assert (code, err.getvalue()) == (0, "")
        (file,) = folder.glob("*/edges.npz")
        return Run(file.parent, out.getvalue())

    return call


@pytest.fixture(scope="module")
def toy(edges):
    return edges("--model", "toy-gpt2", "--pairs", 4, "--held-out", 4, "--methods", "ap,relp,eap-ig-2")


def ioi(model, n):
    return tasks.ioi(load_tokenizer(str(model)), n)


def rows(n, lengths=(6,), seed=0):
    """n lines of token ids, of these lengths by turns."""
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        original = torch.randint(2, 97, (lengths[i % len(lengths)],), generator=g)
        patch = original.clone()
        patch[1::3] = (patch[1::3] + 5) % 97
        yield dict(zip(IDS, (original.tolist(), patch.tolist(), *torch.randperm(97, generator=g)[:2].tolist())))


# ---------------------------------------------------------------------------------------------------------------------
# Graphs, circuits and their areas in plain loops; nothing of beyond/edges is used


def graph_of(cfg):
    """All nodes and edges, as EAP-IG's Graph.from_model makes them of cfg: whatever is in the stream is read."""
    stream, edges = ["input"], []
    for layer in range(cfg["n_layers"]):
        heads, mlp = [f"a{layer}.h{head}" for head in range(cfg["n_heads"])], f"m{layer}"
        edges += [f"{u}->{head}<{kind}>" for u in stream for head in heads for kind in "qkv"]
        edges += [f"{u}->{mlp}" for u in (stream if cfg["parallel_attn_mlp"] else stream + heads)]
        stream += [*heads, mlp]
    return [*stream, "logits"], [*edges, *(f"{u}->logits" for u in stream)]


def ends(edge):
    """The two nodes of an edge."""
    writer, reader = edge.split("->")
    return writer, reader.partition("<")[0]


def pruned(edges):
    """Again and again without nodes that lack an edge in or an edge out; input needs none in, logits none out."""
    kept = set(edges)
    while True:
        have_in, have_out = {ends(edge)[1] for edge in kept}, {ends(edge)[0] for edge in kept}
        alive = {node for node in have_out if node == "input" or node in have_in} | {"logits"}
        fewer = {edge for edge in kept if alive.issuperset(ends(edge))}
        if fewer == kept:
            return frozenset(kept)
        kept = fewer


def ranked(scores, signed=False):
    """The largest first; or the most negative first, without which the behaviour would be weaker."""
    return sorted(scores, key=lambda name: scores[name] if signed else -abs(scores[name]))


def outgoing(nodes, edges):
    return [edge for edge in edges if ends(edge)[0] in nodes]


class Gpt2:
    """GPT-2 from its file, in float64; in a circuit's run, each reader sums up a stream of its own."""

    def __init__(self, path):
        weights = load_file(Path(path) / "model.safetensors")
        self.w = {name.removeprefix("transformer."): weight.double() for name, weight in weights.items()}
        config = json.loads((Path(path) / "config.json").read_text())
        self.n_layers, self.n_heads, self.known = config["n_layer"], config["n_head"], {}

    def run(self, tokens, answers, kept=None, patch=None):
        """Logit difference, and {writer: what it adds [t, d]}. Along edges that are not kept, `patch` comes."""
        w, n = self.w, len(tokens)
        own = {"input": w["wte.weight"][list(tokens)] + w["wpe.weight"][:n]}
        d = own["input"].shape[1]
        d_head, later = d // self.n_heads, torch.ones(n, n, dtype=torch.bool).triu(1)

        def read(reader, norm):
            stream = sum(own[u] if kept is None or f"{u}->{reader}" in kept else patch[u] for u in own)
            return torch.nn.functional.layer_norm(stream, [d], w[f"{norm}.weight"], w[f"{norm}.bias"], 1e-5)

        def linear(x, name, rows=slice(None), columns=slice(None)):
            return x @ w[f"{name}.weight"][rows, columns] + w[f"{name}.bias"][columns]

        for layer in range(self.n_layers):
            h, heads = f"h.{layer}.", {}
            for head in range(self.n_heads):
                name, mine = f"a{layer}.h{head}", slice(head * d_head, (head + 1) * d_head)
                q, k, v = (
                    linear(read(f"{name}<{kind}>", h + "ln_1"), h + "attn.c_attn", columns=slice(at, at + d_head))
                    for kind, at in zip("qkv", range(mine.start, 3 * d, d))
                )
                z = (q @ k.T / d_head**0.5).masked_fill(later, -math.inf).softmax(-1) @ v
                heads[name] = z @ w[h + "attn.c_proj.weight"][mine] + w[h + "attn.c_proj.bias"] / self.n_heads
            own |= heads
            hidden = linear(read(f"m{layer}", h + "ln_2"), h + "mlp.c_fc")
            own[f"m{layer}"] = linear(torch.nn.functional.gelu(hidden, approximate="tanh"), h + "mlp.c_proj")
        right, wrong = w["wte.weight"][list(answers)] @ read("logits", "ln_f")[-1]
        return float(right - wrong), own

    def metric(self, pairs, kept=None):
        """[n], of the circuit, or of the whole model."""
        for pair in pairs:
            if (pair, kept) not in self.known:
                if (pair, "patch") not in self.known:
                    self.known[pair, "patch"] = self.run(pair.patch, pair.answers)
                patch = self.known[pair, "patch"][1]
                self.known[pair, kept] = self.run(pair.original, pair.answers, kept, patch)[0]
        return np.array([self.known[pair, kept] for pair in pairs])

    def f(self, pairs, kept, counts=None):
        """(m(c) - m(empty)) / (m(model) - m(empty)), means first, and the mean of the pairs' own ratios: [W] each.

        counts [W, n]: how often each pair counts
        """
        counts = np.ones((1, len(pairs))) if counts is None else counts
        c, whole, empty = (self.metric(pairs, k) for k in (kept, None, frozenset()))
        ratio = (counts @ (c - empty)) / (counts @ (whole - empty))
        return ratio, counts @ ((c - empty) / (whole - empty)) / counts.sum(1)


def area(f, log):
    """Of f [shares, ...], by trapezoids."""
    x = np.log(SHARES) if log else np.array(SHARES)
    total = sum((x[i + 1] - x[i]) * (f[i] + f[i + 1]) / 2 for i in range(len(x) - 1))
    return total / np.log(1000) if log else total


def check_areas(run, model, judged, circuits_of):
    """Curves, areas, their intervals and differences. circuits_of: {method: (signed) -> a circuit for each share}."""
    counts = statistics.resamples([pair.group for pair in judged], seed=run.summary["arguments"]["seed"]).numpy()
    found = {method: {} for method in circuits_of}
    for method, (measure, signed) in itertools.product(circuits_of, (("cpr", True), ("cmd", False))):
        circuits, curve = circuits_of[method](signed), run.summary["curves"][method]["signed" if signed else "absolute"]
        assert curve["edges"] == [len(kept) for kept in circuits]
        for i, average in enumerate(("ratio_of_means", "mean_of_ratios")):
            f = np.array([model.f(judged, kept, counts)[i] for kept in circuits])
            assert curve[average] == pytest.approx(f[:, 0], abs=1e-4)
            for log in (False, True):
                name = measure + "_log" * log + "_mean_of_ratios" * i
                found[method][name] = area(f if signed else abs(1 - f), log)
    one, other = found
    differences = {name: found[other][name] - found[one][name] for name in found[one]}
    of_differences = run.summary["area_differences"][f"{other} - {one}"]
    for got, values in [*((run.summary["areas"][m], found[m]) for m in found), (of_differences, differences)]:
        assert got.keys() == values.keys()
        for name, x in values.items():
            assert got[name] == pytest.approx([x[0], *np.quantile(x[1:], [0.025, 0.975])], abs=1e-4), name


# ---------------------------------------------------------------------------------------------------------------------
# edges.npz and summary.json


def check_files(run, model, pairs):
    """Every array again, pair by pair, by the functions that the command leans on; and the correlations."""
    c, arrays, pcc = model.config, run.arrays, run.summary["pcc"]["edges"]
    cfg = {"n_layers": c.n_layers, "n_heads": c.n_heads, "parallel_attn_mlp": c.block == "parallel"}
    nodes, names = graph_of(cfg)
    heads = [f"a0.h{head}<{kind}>" for kind in "qkv" for head in range(c.n_heads)]  # per query head
    readers, (labels, at) = arrays["readers"].tolist(), overlay(pairs)
    assert arrays["writers"].tolist() == nodes[:-1] and arrays["roles"].tolist() == labels
    assert readers[: len(heads) + 1] == [*heads, "m0"] and readers[-1] == "logits"
    assert len(readers) == c.n_layers * (len(heads) + 1) + 1 and run.summary["n_edges"] == len(names)
    there = np.array([[f"{u}->{v}" in names for v in readers] for u in nodes[:-1]])
    for method in ("ap", *METHODS):
        scores, at_roles, by_role = arrays[method], arrays[f"{method}_positions"], np.zeros((len(labels), *there.shape))
        assert np.array_equal(~np.isnan(scores), np.broadcast_to(there, (len(pairs), *there.shape)))
        assert np.array_equal(~np.isnan(at_roles), np.repeat(there[..., None], len(labels), -1))
        for i, pair in enumerate(pairs):
            tokens = tensors([pair], "cpu")
            if method == "ap":
                whole, each = (patch_edges(model, *tokens, by_position=by)[0][0].numpy() for by in (False, True))
            else:
                each = attribute_edges(model, *tokens, by_position=True, **METHODS[method])[0].numpy()
                whole = each.sum(0)
            np.testing.assert_allclose(scores[i][there], whole[there], atol=1e-4)
            by_role[at[i] >= 0] += each[at[i][at[i] >= 0]]
        means = np.moveaxis(by_role / (at >= 0).sum(0)[:, None, None], 0, -1)
        np.testing.assert_allclose(at_roles[there], means[there], atol=1e-4)
        if method != "ap":
            pooled = np.corrcoef(*(x[:, there].astype(float).ravel() for x in (scores, arrays["ap"])))[0, 1]
            assert pcc[method]["pooled"] == pytest.approx(pooled, abs=1e-5)
    difference = pcc["eap-ig-2"]["pooled"] - pcc["relp"]["pooled"]
    assert run.summary["differences"]["edges"]["eap-ig-2 - relp"]["pooled"][0] == pytest.approx(difference)


def test_files(toy):
    check_files(toy, models.from_pretrained("toy-gpt2"), ioi("toy-gpt2", 4))
    files = {"edges.npz", "summary.json", "graph.json", "circuit.png", *(f"circuit-{m}.json" for m in ("ap", *METHODS))}
    assert {path.name for path in toy.path.iterdir()} == files
    assert (toy.path / "circuit.png").read_bytes().startswith(b"\x89PNG")
    scores = {m + suffix for m in ("ap", *METHODS) for suffix in ("", "_positions")}
    names = {"writers", "readers", "roles", "lengths", "original_tokens", "patch_tokens", "answers"}
    prompts = {"lengths", "original_tokens", "patch_tokens", "answers"}
    assert toy.arrays.keys() == names | scores | {f"judged_{name}" for name in prompts}
    judged = [tuple(i for i in row if i >= 0) for row in toy.arrays["judged_original_tokens"].tolist()]
    assert judged == [p.original for p in ioi("toy-gpt2", 8)[4:]]
    summary = toy.summary
    assert {"accuracy", "value", "audit", "circuits", "drawn", "versions"} <= summary.keys()
    assert (summary["prompt_pairs"], summary["judged_pairs"], summary["judged_on"]) == (4, 4, "4 held-out pairs")
    given = {"task": "edges", "seed": 0, "pairs": 4, "held_out": 4, "methods": ["ap", *METHODS]}
    assert given.items() <= summary["arguments"].items() and summary["level"] == "edge"
    passes = {m: (cost["forward"], cost["backward"]) for m, cost in summary["cost"].items()}
    assert passes["relp"] == (2, 1) and passes["eap-ig-2"] == (4, 2)
    assert 400 < passes["ap"][0] <= summary["n_edges"] < passes["ap_positions"][0]
    assert all(cost["seconds"] > 0 for cost in summary["cost"].values())
    drawn = [edge["edge"] for edge in summary["drawn"]["edges"]]
    assert drawn == ranked({edge: toy.means("relp")[edge] for edge in check_circuit(toy, "relp")})
    for edge in summary["drawn"]["edges"]:
        sizes = abs(toy.arrays["relp_positions"][toy.at(edge["edge"])])
        assert edge["role"] == toy.arrays["roles"][sizes.argmax()]


def test_unequal_lengths_and_shared_keys(edges, checkpoint, tmp_path):
    """Llama: four query heads share two keys and values; each has readers of its own."""
    path, prompts = checkpoint("llama")[0], jsonl(tmp_path / "mixed.jsonl", *rows(3, (4, 3)))
    found = edges("--model", path, "--prompts", prompts, "--methods", "ap,relp,eap-ig-2", "--no-plot")
    check_files(found, models.from_pretrained(str(path)), read_pairs(prompts))
    one, other = (found.arrays["ap"][(0, *found.at(f"input->a0.h{head}<k>"))] for head in (0, 1))
    assert one != other and not (found.path / "circuit.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Circuits


def check_circuit(run, method):
    """The circuit's edges, after reading the file as EAP-IG's Graph.from_json does.

    There, cfg alone says which nodes and edges exist, a name that is none of them is an error, and what is not listed
    is silently outside, with a score of 0. The logits are always in the graph. A positive score is for the behaviour.
    """
    content = run.json(f"circuit-{results.slug(method)}.json")
    assert content.keys() == {"cfg", "nodes", "edges"}
    assert content["cfg"].keys() == {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"}
    nodes, edges = graph_of(content["cfg"])
    assert list(content["nodes"]) == nodes and sorted(content["edges"]) == sorted(edges)
    assert {type(of["in_graph"]) for what in ("nodes", "edges") for of in content[what].values()} == {bool}
    kept, inside = ({name for name, of in content[what].items() if of["in_graph"]} for what in ("edges", "nodes"))
    assert kept and kept == pruned(kept) and inside == {node for edge in kept for node in ends(edge)}
    assert len(kept) == run.summary["circuits"][method]["edges"]
    scores = {edge: of["score"] for edge, of in content["edges"].items()}
    assert scores == pytest.approx({edge: -mean for edge, mean in run.means(method).items()}, abs=1e-6)
    return kept


def test_circuit_files(toy, edges):
    cfg = {"n_layers": 4, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 128}
    assert check_circuit(toy, "ap") and toy.json("circuit-ap.json")["cfg"] == cfg
    neox = edges("--model", "toy-neox", "--pairs", 2, "--held-out", 1, "--methods", "relp,ln+ah", "--no-plot")
    assert check_circuit(neox, "ln+ah") and neox.json("circuit-relp.json")["cfg"] == cfg | {"parallel_attn_mlp": True}
    assert "a0.h0->m0" not in neox.json("circuit-relp.json")["edges"]


def test_areas_again_from_the_files(toy):
    model, pairs, everything = Gpt2(TOY), ioi("toy-gpt2", 8), frozenset(toy.means("relp"))
    patch_runs = [model.run(pair.patch, pair.answers)[0] for pair in pairs]
    np.testing.assert_allclose(model.metric(pairs, everything), model.metric(pairs), atol=1e-9)
    np.testing.assert_allclose(model.metric(pairs, frozenset()), patch_runs, atol=1e-9)
    assert model.f(pairs, everything)[0] == pytest.approx(1) and model.f(pairs, frozenset())[0] == 0
    assert toy.summary["value"]["original"][0] == pytest.approx(model.metric(pairs[:4]).mean(), abs=1e-4)
    assert toy.summary["value"]["patch"][0] == pytest.approx(np.mean(patch_runs[:4]), abs=1e-4)

    def circuits(method, signed):
        order = ranked(toy.means(method), signed)
        return [pruned(order[: int(share * len(order))]) for share in SHARES]

    check_areas(toy, model, pairs[4:], {method: partial(circuits, method) for method in METHODS})
    assert toy.summary["shares"] == list(SHARES) and toy.summary["curves"].keys() == {"ap", *METHODS, "random"}
    for curve in (of for curves in toy.summary["curves"].values() for of in curves.values()):
        assert curve["ratio_of_means"][0] == curve["edges"][0] == 0  # .001 of some 500 edges is none
        assert curve["ratio_of_means"][-1] == pytest.approx(1) and curve["edges"][-1] == len(everything)


def test_the_smallest_circuit(toy):
    """f >= .8 on the discovery pairs, and with one edge fewer not."""
    model, pairs = Gpt2(TOY), ioi("toy-gpt2", 8)
    for method in ("ap", *METHODS):
        chosen, order = toy.summary["circuits"][method], ranked(toy.means(method))
        kept, fewer = (pruned(order[:n]) for n in (chosen["items"], chosen["items"] - 1))
        assert kept == check_circuit(toy, method) and model.f(pairs[:4], kept)[0] >= 0.8 > model.f(pairs[:4], fewer)[0]
        assert chosen["f"] == pytest.approx(model.f(pairs[4:], kept)[0][0], abs=1e-4)


def test_stability(toy):
    """How often each edge is in a circuit of resampled pairs, and the overlap of every two such circuits."""
    counts = statistics.resamples([pair.group for pair in ioi("toy-gpt2", 4)], seed=0).int().tolist()[1:201]
    for method in ("ap", *METHODS):
        chosen, names, circuits = toy.summary["circuits"][method], list(toy.means(method)), []
        for count in counts:
            drawn = [toy.arrays[method][i].astype(float) for i, n in enumerate(count) for _ in range(n)]
            mean = sum(drawn) / len(drawn)
            circuits.append(set(ranked(dict(zip(names, mean[~np.isnan(mean)])))[: chosen["items"]]))
        shares = {edge: np.mean([edge in circuit for circuit in circuits]) for edge in check_circuit(toy, method)}
        overlaps = [len(one & other) / len(one | other) for one, other in itertools.combinations(circuits, 2)]
        assert chosen["inclusion"] == pytest.approx(shares)
        assert chosen["overlap"] == pytest.approx(np.mean(overlaps)) and 0 < chosen["overlap"] < 1


def test_circuits_of_nodes(edges, tiny):
    """A kept node keeps all its outgoing edges, but for those to nodes that are pruned. AP patches them all at once."""
    given = ["--pairs", 4, "--held-out", 3, "--methods", "ap,relp", "--level", "node", "--no-plot"]
    found, model, pairs = edges("--model", tiny["gpt2"], *given), Gpt2(tiny["gpt2"]), ioi(tiny["gpt2"], 7)
    means, scores = found.means("relp"), {"ap": {}, "relp": {}}
    for node in found.arrays["writers"]:
        scores["relp"][node] = sum(means[edge] for edge in outgoing([node], means))
        without = frozenset(means.keys() - set(outgoing([node], means)))
        scores["ap"][node] = (model.metric(pairs[:4], without) - model.metric(pairs[:4])).mean()

    def circuit(order, n):
        return pruned(outgoing(order[:n], means))

    def circuits(method, signed):
        order = ranked(scores[method], signed)
        return [circuit(order, int(share * len(order))) for share in SHARES]

    check_areas(found, model, pairs[4:], {method: partial(circuits, method) for method in scores})
    assert found.summary["level"] == "node" and "a share of the nodes" in found.out
    for method in scores:
        kept, n, order = (
            check_circuit(found, method),
            found.summary["circuits"][method]["items"],
            ranked(scores[method]),
        )
        nodes = {ends(edge)[0] for edge in kept}
        assert kept == {edge for edge in outgoing(nodes, means) if ends(edge)[1] in {*nodes, "logits"}}
        f = [model.f(pairs[:4], circuit(order, k))[0] for k in (n, n - 1)]
        assert kept == circuit(order, n) and f[0] >= 0.8 > f[1]


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_verify(edges, tiny, monkeypatch):
    """Exact patching of the K edges with the largest mean scores, and of no others."""
    asked = []

    def patch(*args, only, **kwargs):
        asked.append(int(only.sum()))
        return patch_edges(*args, only=only, **kwargs)

    monkeypatch.setattr(scoring, "patch_edges", patch)
    given = ["--pairs", 3, "--held-out", 3, "--methods", "ap,atp,relp", "--verify", 5, "--no-plot"]
    found = edges("--model", tiny["gemma2"], *given)
    verified, means = found.json("verified.json"), {m: found.means(m) for m in ("atp", "relp")}
    assert set(asked) == {5} and "ap" not in found.arrays and not found.summary["pcc"]
    assert verified["ranked_by"] == "relp" and verified["of"] == len(means["relp"]) and verified["seconds"] > 0
    assert [row["edge"] for row in verified["edges"]] == ranked(means["relp"])[:5]
    assert {row["scores"]["relp"] > 0 for row in verified["edges"]} == {True, False}
    model, pairs = models.from_pretrained(str(tiny["gemma2"])), ioi(tiny["gemma2"], 3)
    exact = sum(patch_edges(model, *tensors([pair], "cpu"))[0][0] for pair in pairs) / 3
    for row in verified["edges"]:
        wanted = {"ap": float(exact[found.at(row["edge"])]), **{m: of[row["edge"]] for m, of in means.items()}}
        assert row["scores"] == pytest.approx(wanted, abs=1e-4) and f"  {row['edge']} " in found.out


def test_all_pairs_of_a_file_in_its_order(edges, checkpoint, tmp_path):
    path, given = checkpoint("gpt2")[0], list(rows(105, (4, 3)))
    prompts, judge = jsonl(tmp_path / "many.jsonl", *given), jsonl(tmp_path / "judge.jsonl", *rows(3, (5, 2), seed=1))
    how = ["--model", path, "--prompts", prompts, "--methods", "relp", "--no-plot"]
    found, model, pairs = edges(*how), models.from_pretrained(str(path)), read_pairs(prompts)
    tokens = zip(found.arrays["original_tokens"], found.arrays["lengths"])
    assert [row[:n].tolist() for row, n in tokens] == [row["original"] for row in given]
    assert found.summary["prompt_pairs"] == found.summary["judged_pairs"] == len(found.arrays["relp"]) == 105
    for i in (0, 1, 50, 104):
        wanted = attribute_edges(model, *tensors([pairs[i]], "cpu"), lrp=True)[0].numpy()
        np.testing.assert_allclose(np.nan_to_num(found.arrays["relp"][i]), wanted, atol=1e-4)
    assert found.summary["judged_on"] == "the same pairs" and "judged on the same pairs" in found.out

    found, judged = edges(*how, "--pairs", 6, "--judge", judge), read_pairs(judge)
    assert found.arrays["answers"].tolist() == [list(pair.answers) for pair in pairs[:6]]
    assert found.summary["judged_pairs"] == 3 and f"judged on 3 pairs of {judge}" in found.out
    model, order = Gpt2(path), ranked(found.means("relp"), signed=True)
    f = [model.f(judged, pruned(order[: int(share * len(order))]))[0][0] for share in SHARES]
    assert found.summary["curves"]["relp"]["signed"]["ratio_of_means"] == pytest.approx(f, abs=1e-3)


def test_judge_with_the_templates(edges, tiny, tmp_path):
    judge = jsonl(tmp_path / "text.jsonl", TEXT, IDS)
    found = edges("--model", tiny["gpt2"], "--pairs", 2, "--judge", judge, "--methods", "atp", "--no-plot")
    assert (found.summary["prompt_pairs"], found.summary["judged_pairs"]) == (2, 2)
    assert found.path.name == "gpt2-edges" and f"2 pairs of {judge}" in found.out


@pytest.mark.parametrize("name", ["neox", "gemma2"])
def test_bfloat16(name, edges, checkpoint, tmp_path):
    prompts = jsonl(tmp_path / "ids.jsonl", *rows(2, (4,)))
    how = ["--model", checkpoint(name)[0], "--prompts", prompts, "--no-plot", "--methods", "ap,relp,eap-ig-2"]
    half, single = edges(*how, "--dtype", "bfloat16"), edges(*how)
    for method in ("ap", *METHODS):
        assert check_circuit(half, method) and math.isfinite(half.summary["areas"][method]["cpr"][0])
        scores, wanted = (np.array(list(found.means(method).values())) for found in (half, single))
        assert np.isfinite(scores).all() and pearson(scores, wanted) > 0.95


def test_several_models(run, edges, tiny, tmp_path):
    given = ["--pairs", 3, "--held-out", 3, "--methods", "ap,relp", "--no-plot"]
    code, out, err = run("--task", "edges", "--model", tiny["gpt2"], tiny["gemma2"], *given)
    assert (code, err) == (0, [])
    titles = {
        "PCC with exact patching, whole edges": lambda s: [s["pcc"]["edges"]["relp"]["averaged"]],
        "the same, edges x positions": lambda s: [s["pcc"]["positions"]["relp"]["averaged"]],
        "CPR (higher is better)": lambda s: [s["areas"][m]["cpr"][0] for m in ("ap", "relp", "random")],
        "CMD (lower is better)": lambda s: [s["areas"][m]["cmd"][0] for m in ("ap", "relp", "random")],
    }
    for title, numbers in titles.items():
        lines = out.split(f"\n{title}\n")[1].splitlines()[1:3]
        for line, name in zip(lines, ("gpt2", "gemma2")):
            model, *shown = line.split()
            wanted = numbers(Run(tmp_path / "out" / f"{name}-edges", out).summary)
            assert model == str(tiny[name]) and [float(x) for x in shown] == pytest.approx(wanted, abs=6e-4)
    assert "higher is better" not in edges("--model", tiny["gpt2"], *given).out


def test_the_same_seed_gives_the_same_numbers(edges, tiny):
    how = ["--model", tiny["gpt2"], "--pairs", 3, "--held-out", 3, "--methods", "ap,relp", "--no-plot", "--seed"]
    one, again, other = (edges(*how, seed) for seed in (3, 3, 4))
    assert one.arrays.keys() == again.arrays.keys() and one.summary["arguments"]["seed"] == 3
    for key, array in one.arrays.items():
        np.testing.assert_array_equal(array, again.arrays[key])
    assert all(one.summary[key] == again.summary[key] for key in one.summary.keys() - {"cost", "arguments"})
    assert one.json("circuit-relp.json") == again.json("circuit-relp.json")
    assert not np.array_equal(one.arrays["original_tokens"], other.arrays["original_tokens"])


def test_exact_patching_is_the_default_for_toys_only():
    toys, large = (evaluate.parse(["--task", "edges", *given]) for given in ([], ["--model", "gpt2"]))
    assert toys.model == evaluate.TOYS and (toys.pairs, toys.held_out, toys.level) == (None, 100, "edge")
    assert large.methods == ["atp", "relp", "twopoint", "eap-ig-5", "eap-ig-30"]
    assert toys.methods == ["ap", *large.methods]


def test_circuits_of_an_earlier_run_go(edges, tiny, tmp_path):
    how = ["--model", tiny["gpt2"], "--pairs", 2, "--held-out", 1, "--no-plot", "--methods"]
    edges(*how, "atp,relp", into=tmp_path / "out")
    found = edges(*how, "ln+ah", into=tmp_path / "out")
    files = {"edges.npz", "summary.json", "graph.json", "circuit-ln-ah.json"}
    assert {path.name for path in found.path.iterdir()} == files


def test_other_files_of_an_earlier_run_go(edges, tiny, tmp_path):
    how = ["--model", tiny["gpt2"], "--pairs", 2, "--held-out", 1, "--methods", "relp"]
    found = edges(*how, into=tmp_path / "out")
    (found.path / "verified.json").write_text("{}")
    edges(*how, "--seed", 7, "--no-plot", into=tmp_path / "out")
    assert not {"circuit.png", "verified.json"} & {path.name for path in found.path.iterdir()}


def test_one_file_of_prompts_for_two_tasks(run, checkpoint, tmp_path):
    how = ["--model", checkpoint("gpt2")[0], "--prompts", jsonl(tmp_path / "both.jsonl", *rows(2)), "--no-plot"]
    for task, methods in (("ioi", "atp,relp"), ("edges", "relp")):
        assert run("--task", task, *how, "--methods", methods)[0] == 0
    summaries = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("summary.json")]
    assert sorted(summary["arguments"]["task"] for summary in summaries) == ["edges", "ioi"]


def test_more_prompts_than_fit_into_memory(edges, tiny, tmp_path, monkeypatch):
    """First the scores by position of all pairs do not fit, then those of whole edges, then a pair's by position."""
    prompts = jsonl(tmp_path / "ids.jsonl", *rows(3, (5, 3, 4)))
    how = ["--model", tiny["gemma2"], "--prompts", prompts, "--no-plot", "--batch-size", 1, "--methods"]
    n, runs = len(graph_of({"n_layers": 3, "n_heads": 2, "parallel_attn_mlp": False})[1]), []
    for most in (2**28, n * 3 * 5 - 1, n * 3 - 1, 100):
        monkeypatch.setattr(scoring, "MOST", most)
        monkeypatch.setattr(judging, "MOST", most)
        runs.append(edges(*how, "ap,relp"))
    assert [len(found.arrays["relp"]) for found in runs] == [3, 3, 1, 1]
    assert ["relp_positions" in found.arrays for found in runs] == [True, True, False, False]
    assert [[*found.summary["pcc"]] for found in runs] == [["edges", "positions"], *[["edges"]] * 3]
    np.testing.assert_allclose(runs[1].arrays["relp_positions"], runs[0].arrays["relp_positions"], atol=1e-5)
    for found in runs[1:]:
        for method in ("ap", "relp"):
            assert found.means(method) == pytest.approx(runs[0].means(method), abs=1e-5)
            assert check_circuit(found, method) == check_circuit(runs[0], method)
            for measure, of in found.summary["areas"][method].items():
                assert of == pytest.approx(runs[0].summary["areas"][method][measure], rel=1e-3)
    assert runs[2].summary["circuits"]["relp"]["overlap"] is None  # nothing is left to resample


def test_columns_do_not_touch(edges, tiny):
    given = ["--pairs", 2, "--held-out", 2, "--methods", "relp,temperature=2+identity", "--no-plot"]
    assert not re.search(r"[\]\w][+-]\d*\.\d{3}\b", edges("--model", tiny["gpt2"], *given).out)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("arguments, words", [
    (["--methods", "ap"], ["method besides ap"]),
    (["--methods", "relp,atp*"], ["atp*", "--task edges"]),
    (["--methods", "ig"], ["ig", "--task edges"]),
    (["--methods", "eap-ig-0"], ["eap-ig-0"]),
    (["--methods", "eap-ig-x"], ["eap-ig-x"]),
    (["--methods", "eap-ig-act-5"], ["eap-ig-act-5", "--task edges"]),
    (["--methods", "eap-ig-5", "--task", "sva"], ["eap-ig-5", "--task sva"]),
    (["--nodes", "mlp_out"], ["--nodes", "--task edges"]),
    (["--structures", "simple"], ["--structures", "--task edges"]),
    (["--grid"], ["--grid", "--task edges"]),
    (["--shard"], ["--shard", "--task edges"]),
    (["--steps", "3"], ["--steps", "--task edges"]),
    (["--verify", "doubt:5"], ["--verify doubt:5", "--task edges"]),
    (["--level", "head"], ["level", "head", "node"]),
    (["--level", "node", "--task", "sva"], ["--level", "--task sva"]),
    (["--judge", "no-such-file.jsonl"], ["no-such-file.jsonl"]),
    (["--judge", ""], ["--judge"]),
], ids=label)  # fmt: skip
def test_arguments(arguments, words, tiny, refused):
    message = refused("--task", "edges", "--model", tiny["gpt2"], "--pairs", 2, *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("option", ["--prompts", "--judge"])
@pytest.mark.parametrize("rows, words", [
    (["{"], ["line 1", "JSON"]),
    ([IDS, {**IDS, "patch": IDS["original"]}], ["line 2", "differ"]),  # nothing to explain
    ([{**IDS, "original": [5] * 41, "patch": [6] * 41}], ["41", "40"]),  # the context
    ([{**IDS, "patch": [5, 9]}], ["line 1", "equally many"]),
], ids=label)  # fmt: skip
def test_files_of_pairs(option, rows, words, tiny, refused, tmp_path):
    bad = jsonl(tmp_path / "bad.jsonl", *rows)
    message = refused("--task", "edges", "--model", tiny["gpt2"], "--pairs", 2, "--methods", "relp", option, bad)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("option", ["--prompts", "--judge"])
def test_nothing_is_held_out_of_files(option, tiny, refused, tmp_path):
    given = ["--held-out", 3, option, jsonl(tmp_path / "ids.jsonl", IDS), "--pairs", 1, "--methods", "relp"]
    assert "--held-out" in refused("--task", "edges", "--model", tiny["gpt2"], *given)


@pytest.mark.parametrize("original, patch", [([5, 6, 7], [5, 9, 7]), ([5], [9])], ids=["pair", "pair of one token"])
def test_a_single_pair(original, patch, edges, tiny, tmp_path):
    """All is there but for intervals: one pair says nothing about the spread."""
    prompts = jsonl(tmp_path / "one.jsonl", {**IDS, "original": original, "patch": patch})
    found = edges("--model", tiny["gemma2"], "--prompts", prompts, "--methods", "ap,relp")
    for method in ("ap", "relp"):
        value, *interval = found.summary["areas"][method]["cpr"]
        assert math.isfinite(value) and interval == [None, None] and check_circuit(found, method)
        assert found.summary["circuits"][method]["overlap"] is None
    assert "[" not in found.out and (found.path / "circuit.png").exists()
    assert found.arrays["relp_positions"].shape[-1] == len(original)
    np.testing.assert_allclose(found.arrays["relp"][0], found.arrays["relp_positions"].sum(-1), atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def described(n, **fields):
    names = graph_of({"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False})[1]
    return [{"edge": name, "score": (-1) ** i * (n - i), "role": f"${i}"} | fields for i, name in enumerate(names[:n])]


@pytest.mark.parametrize("n", [0, 1, 40, 60])
def test_the_picture(n, tmp_path, capsys):
    edges = described(n)
    drawn = figure.draw("cash $ and $carry", edges, Graph(3, 4, False))
    results.save_figure(tmp_path / "circuit.png", lambda: drawn)
    assert capsys.readouterr().out == "" and (tmp_path / "circuit.png").read_bytes().startswith(b"\x89PNG")
    title, shown, (ax,) = drawn.get_suptitle(), edges[:40], drawn.axes
    assert title.startswith("cash $ and $carry") and ("the 40 strongest of 60 edges" in title) == (n == 60)
    nodes, roles = {node for edge in shown for node in ends(edge["edge"])}, [edge["role"] for edge in shown]
    assert sorted(text.get_text() for text in ax.texts) == sorted([*nodes, *roles])
    arrows = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)][::-1]  # the strongest is drawn last
    widths = [arrow.get_linewidth() for arrow in arrows]
    assert len(arrows) == len(shown) and widths == sorted(widths, reverse=True)
    for edge, arrow in zip(shown, arrows):
        kind = re.search(r"(q|k|v|m|logits)(\d*|>)$", edge["edge"])[1]
        assert same_color(arrow.get_edgecolor()[:3], figure.COLORS["mlp" if kind == "m" else kind])
        assert (arrow.get_linestyle() in ("--", "dashed")) == (edge["score"] > 0)


def test_a_picture_of_scores_that_are_all_zero():
    figure.draw("nothing", described(3, score=0.0), Graph(3, 4, False))


def test_the_code_in_the_readme_runs():
    readme = (Path(models.__file__).parent / "beyond" / "edges" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    namespace = {}
    exec(code, namespace)
    assert namespace["scores"].shape == namespace["exact"].shape == (1, 21, 53) and namespace["n_runs"] == 479
