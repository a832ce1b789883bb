"""GIM, AttnLRP, CP-LRP, expected gradients and EAP-IG: each against its published formula, written out by hand."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES

import evaluate
import models
import relp
import tasks
from beyond import paths
from beyond.edges.graph import Graph
from beyond.edges.scores import attribute_edges
from beyond.methods import NAMES, method
from beyond.rivals import ATTNLRP, CP_LRP, GIM, HalfProducts
from models import TABLE_4, Rules, from_pretrained
from support.circuits import Counted
from support.prompts import tensors
from support.tokenizer import load_tokenizer

PATHS = ("eg", "eg-3", "eap-ig-3", "eap-ig-act-2")


@pytest.fixture
def load(checkpoint):
    return lambda name, dtype=torch.float64: from_pretrained(str(checkpoint(name)[0]), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Rules

SCALE = 0.3
MASK = models.causal_mask(0, 6, 6, None, "cpu")
WAYS = {"kernel": None, "pattern shown": None, "softcap": 2.0}  # in which attention is computed, and their caps


def attention(rules, q, k, v, signal, way):
    """What goes back to q, k and v [b, t, h, d] and, if it is shown, to the pattern [b, query, h, key]."""
    shown = []

    def look(name, layer, x):
        shown[:] = [x if x.requires_grad else x.detach().requires_grad_()]  # a leaf under the AH-rule
        return shown[0]

    node = models.Nodes(look if way == "pattern shown" else None, 0)
    attend = models.Attend(SimpleNamespace(attn_scale=SCALE, attn_softcap=WAYS[way]), MASK, node)
    plain = Rules().attention(q, k, v, attend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    z = rules.attention(*leaves, attend)
    assert torch.equal(z, plain)
    return torch.autograd.grad(z, [*leaves, *shown], signal, materialize_grads=True)


@pytest.fixture
def qkvs():
    g = torch.Generator().manual_seed(5)
    return 2 * torch.randn(4, 2, 6, 3, 4, dtype=torch.float64, generator=g)  # q, k, v and the signal at z


def rows(q, k, v, signal, way):
    """The pieces of one prompt, head and query: (index, S, A, keys, values, signal, dS / d(q . k))."""
    for b, i, h in itertools.product(range(2), range(6), range(3)):
        keys, values = k[b, : i + 1, h], v[b, : i + 1, h]
        scores, slope = SCALE * keys @ q[b, i, h], SCALE
        if cap := WAYS[way]:
            scores = cap * torch.tanh(scores / cap)
            slope = SCALE * (1 - (scores / cap) ** 2)
        yield (b, i, h), scores, scores.softmax(0), keys, values, signal[b, i, h], slope


@pytest.mark.parametrize("way", WAYS)
def test_gim_of_attention(way, qkvs):
    """Its code: softmax's Jacobian at S / 2 without 1 / 2, then q and k a quarter, v one half."""
    q, k, v, signal = qkvs
    wanted = [torch.zeros_like(x) for x in (q, k, v)]
    of_pattern = torch.zeros(2, 6, 3, 6, dtype=torch.float64)
    for (b, i, h), scores, pattern, keys, values, s, slope in rows(*qkvs, way):
        hot = (scores / 2).softmax(0)
        jacobian = hot.diag() - torch.outer(hot, hot)
        of_scores = slope * (jacobian @ (values @ s))
        wanted[0][b, i, h] += keys.T @ of_scores / 4
        wanted[1][b, : i + 1, h] += torch.outer(of_scores, q[b, i, h]) / 4
        wanted[2][b, : i + 1, h] += torch.outer(pattern, s) / 2
        of_pattern[b, i, h] = v[b, :, h] @ s / 2
    got = attention(GIM["llama"], q, k, v, signal, way)
    for one, other in zip(got, wanted):
        torch.testing.assert_close(one, other)
    if way == "pattern shown":
        torch.testing.assert_close(got[3], of_pattern)


@pytest.mark.parametrize("way", ["kernel", "pattern shown"])
def test_attnlrp_of_attention(way, qkvs):
    """Its paper: relevances, with the half-rule for both products and the softmax's Taylor expansion at the scores."""
    q, k, v, signal = qkvs
    wanted = [torch.zeros_like(x) for x in (q, k, v)]
    of_pattern = torch.zeros(2, 6, 3, 6, dtype=torch.float64)
    for (b, i, h), scores, pattern, keys, values, s, _ in rows(*qkvs, way):
        z = pattern @ values
        relevance = z * s
        shares = pattern[:, None] * values / z  # of key j in z_d
        r_pattern = r_values = shares * relevance / 2
        r_pattern = r_pattern.sum(1)
        r_scores = scores * (r_pattern - pattern * r_pattern.sum())
        products = SCALE * keys * q[b, i, h]  # of the dimension d in the score of key j
        r_products = products / scores[:, None] * r_scores[:, None] / 2
        wanted[0][b, i, h] += r_products.sum(0)
        wanted[1][b, : i + 1, h] += r_products
        wanted[2][b, : i + 1, h] += r_values
        of_pattern[b, i, h, : i + 1] = r_pattern
    got = attention(ATTNLRP["llama"], q, k, v, signal, way)
    for x, rho, relevance in zip((q, k, v), got, wanted):
        torch.testing.assert_close(x * rho, relevance)
    if way == "pattern shown":
        scores = SCALE * torch.einsum("bqhd,bkhd->bqhk", q, k)
        torch.testing.assert_close(scores.masked_fill(MASK, -torch.inf).softmax(-1) * got[3], of_pattern)


@pytest.mark.parametrize("way", WAYS)
def test_cp_lrp_of_attention(way, qkvs):
    """The pattern is constant: v as without a rule, q and k nothing."""
    got, plain = (attention(rules, *qkvs, way) for rules in (CP_LRP["llama"], Rules()))
    assert not got[0].any() and not got[1].any() and plain[0].any()
    torch.testing.assert_close(got[2:], plain[2:])


@pytest.mark.parametrize("way", WAYS)
def test_products_by_themselves(way, qkvs):
    """On: a quarter for q and k, half for v, with a temperature or without; v's half beside ah. Off: no rule."""
    for rules in ({}, {"temperature": 3.0}, {"ah": True}):
        without, on = (HalfProducts(**rules, products=products) for products in (False, True))
        for share, one, other in zip((0.25, 0.25, 0.5), attention(on, *qkvs, way), attention(without, *qkvs, way)):
            torch.testing.assert_close(one, share * other)
    torch.testing.assert_close(attention(HalfProducts(), *qkvs, way), attention(Rules(), *qkvs, way))


@pytest.mark.parametrize("family", TABLE_4)
def test_the_other_rows(family):
    """Norms frozen; GIM's activations keep their derivative, the others' have the Identity-rule; gates half each."""
    g = torch.Generator().manual_seed(6)
    x, other, s = torch.randn(3, 4, 5, dtype=torch.float64, generator=g)
    phi, paper = models.PHI["silu"], TABLE_4[family]

    def back(f):
        return torch.autograd.grad(f(leaf := x.clone().requires_grad_()), leaf, s)[0]

    derivative = back(torch.nn.functional.silu)
    for rules, slope in ((GIM, derivative), (ATTNLRP, s * x.sigmoid()), (CP_LRP, s * x.sigmoid())):
        rules = rules[family]
        frozen = s * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        torch.testing.assert_close(back(lambda x, r=rules: r.norm(x, 1e-5)), frozen)
        torch.testing.assert_close(back(lambda x, r=rules: r.activation(x, phi)), slope)
        if paper.half:  # the family has gates
            torch.testing.assert_close(back(lambda x, r=rules: r.gate(x, other)), s * other / 2)
            torch.testing.assert_close(back(lambda x, r=rules: r.gate(other, x)), s * other / 2)
        assert rules.half == paper.half and rules.epsilon is None and rules.gamma is None
    assert CP_LRP[family] == dataclasses.replace(paper, ah=True)
    assert (GIM[family].temperature, ATTNLRP[family].temperature) == (2.0, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_bit_identical(name, dtype, load, pair):
    model = load(name, dtype)
    with torch.no_grad():
        plain = model(pair[0])
    for of_families in (GIM, ATTNLRP, CP_LRP):
        rules = of_families[model.config.family]
        stream, _ = relp.record(model, pair[0], (), rules, grad=True)
        assert torch.equal(model.unembed(stream, rules), plain), rules


# ---------------------------------------------------------------------------------------------------------------------
# Paths

KINDS = ["resid_pre", "attn_out", "mlp_out", "q", "k", "v", "pattern", "head", "head_k", "neuron"]


def run(model, tokens, moved=None, value=None):
    """One prompt, block by block: the nodes {(name, layer)} and the logits. The node `moved` takes this value."""
    nodes = {}

    def hook(name, layer, x):
        x = value if (name, layer) == moved else x
        nodes[name, layer] = x if x.requires_grad else x.clone().requires_grad_()
        return nodes[name, layer]

    x = model.embed(tokens)
    for layer in range(model.config.n_layers):
        x = model.block(layer, x, hook=hook)
    return nodes, model.unembed(x[:, -1])


def by_hand(model, original, patch, answers, metric, points):
    """{(name, layer): [pos, ...]}: difference times the mean gradient, hidden dimensions not yet summed; one prompt.

    points: (node, share of the way from the original to the patch run).
    """
    (start, _), (end, target) = run(model, original), run(model, patch)
    total = {key: 0 for key in start}
    for key, share in points:
        with torch.enable_grad():
            value = (start[key] + share * (end[key] - start[key])).detach()
            nodes, logits = run(model, original, key, value)
            metric(logits, target.detach() if metric is relp.kl else answers).sum().backward(
                inputs=list(nodes.values())
            )
        for node, x in nodes.items():
            total[node] = total[node] + (torch.zeros_like(x) if x.grad is None else x.grad) / len(points)
    return {key: ((end[key] - start[key]) * total[key]).detach()[0] for key in total}


def the_points(name, model, original, patch):
    """The points of a method on one prompt."""
    embedding, n_layers = ("resid_pre", 0), model.config.n_layers
    if name.startswith("eg"):
        return [
            (embedding, share) for share in paths.shares(original, patch, 3 if name == "eg-3" else 1)[:, 0].tolist()
        ]
    if name == "eap-ig-3":  # patch + k/m (original - patch)
        return [(embedding, 1 - k / 3) for k in (1, 2, 3)]
    components = [embedding, *itertools.product(("z", "mlp_out"), range(n_layers))]
    return [(key, 1 - k / 2) for key in components for k in (1, 2)]


@pytest.mark.parametrize("name, metric", [*((name, "logit_diff") for name in FAMILIES), ("qwen2", "kl")])
def test_paths_by_hand(name, metric, load, pair):
    """All kinds of nodes; one prompt by itself, so that its score does not depend on those beside it."""
    model = load(name)
    for rival in PATHS:
        got = method(rival).scores(model, *pair, KINDS, metric)
        assert list(got) == KINDS
        original, patch, answers = (x[1:2] for x in pair)
        points = the_points(rival, model, original, patch)
        wanted = by_hand(model, original, patch, answers, relp.METRICS[metric], points)
        for kind, layer in itertools.product(KINDS, range(model.config.n_layers)):
            score = wanted[relp.node_of(kind), layer]
            if kind != "neuron":  # which has no hidden dimension
                score = score.sum(-1) if kind in relp.PARTS_OF else score.flatten(1).sum(1)
            torch.testing.assert_close(got[kind][1, layer], score)
        assert min(scores[1].abs().max() for scores in got.values()) > 1e-6


def test_expected_gradients_are_the_mean_of_their_draws(load, pair):
    model = load("llama")
    points = [(paths.EMBEDDING, share) for share in paths.shares(*pair[:2], 4)]
    each = [paths.attribute(model, *pair, ["mlp_out"], "prob_diff", [point])["mlp_out"] for point in points]
    got = {name: method(name).scores(model, *pair, ["mlp_out"], "prob_diff")["mlp_out"] for name in ("eg", "eg-4")}
    torch.testing.assert_close(got["eg-4"], sum(each) / 4)
    assert torch.equal(got["eg"], each[0]) and not torch.equal(each[0], each[1])
    assert torch.equal(got["eg"], method("eg").scores(model, *pair, ["mlp_out"], "prob_diff")["mlp_out"])


def test_shares_are_uniform_and_each_pairs_own():
    g = torch.Generator().manual_seed(1)
    original, patch = torch.randint(50, (2, 4000, 7), generator=g)
    shares = paths.shares(original, patch, 3)
    assert shares.shape == (3, 4000) and shares.min() >= 0 and shares.max() < 1
    counts = torch.histc(shares, 10, 0, 1)
    assert (counts - 1200).abs().max() < 150 and shares[0].corrcoef() == 1
    assert torch.stack([*shares, shares[0].roll(1)]).corrcoef().fill_diagonal_(0).abs().max() < 0.06
    order = torch.randperm(4000, generator=g)[:50]
    assert torch.equal(paths.shares(original[order], patch[order], 2), shares[:2, order])  # first draws stay the first
    assert not torch.equal(paths.shares(patch, original, 3), shares)


@pytest.mark.parametrize("name", FAMILIES)
def test_eap_ig_of_nodes_and_of_edges(name, load, pair):
    """The scores of a node's outgoing edges add up to the node's."""
    model = load(name)
    graph = Graph.of(model.config)
    edges = attribute_edges(model, *pair, **method("eap-ig-3").options).sum(-1)
    nodes = method("eap-ig-3").scores(model, *pair, ["resid_pre", "mlp_out"], relp.logit_diff)
    torch.testing.assert_close(edges[:, graph.writers.index("input")], nodes["resid_pre"][:, 0].sum(-1))
    for layer in range(model.config.n_layers):
        torch.testing.assert_close(edges[:, graph.writers.index(f"m{layer}")], nodes["mlp_out"][:, layer].sum(-1))


def test_many_points_carry_the_whole_effect(load, pair):
    """The embedding's scores add up to the difference of the two runs' metrics."""
    model = load("qwen2")
    value, patch_value, _ = relp.compare(model, *pair, [])
    scores = method("eap-ig-60").scores(model, *pair, ["resid_pre"], relp.logit_diff)["resid_pre"]
    effect = patch_value - value
    assert (scores[:, 0].sum(-1) - effect).abs().max() < 0.05 * effect.abs().max()


def test_a_nodes_own_points_are_integrated_gradients(load, pair):
    model = load("gpt2")
    own = paths.attribute(model, *pair, ["mlp_out"], relp.logit_diff, paths.way(("mlp_out", 1), pair[0], 4))["mlp_out"]
    torch.testing.assert_close(own[:, 1], relp.attribute(model, *pair, ["mlp_out"], steps=4)["mlp_out"][:, 1])


@pytest.mark.parametrize("name, passes", [
    ("gim", (2, 1)), ("attnlrp", (2, 1)), ("cp-lrp", (2, 1)), ("eg", (3, 1)), ("eg-10", (12, 10)), ("eap-ig-5", (7, 5)),
    ("eap-ig-act-2", (2 + 2 * 7, 2 * 7)),
])  # fmt: skip
def test_passes(name, passes, load, pair):
    """Of three layers: seven components."""
    counted = Counted(load("gpt2", torch.float32))
    method(name, "gpt2").scores(counted, *pair, ["resid_pre", "mlp_out", "head"], relp.logit_diff)
    assert (counted.forward, counted.backward) == passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_low_precision(name, dtype, load, pair):
    """Finite, in float32, 0 where the runs agree, and close to float64's."""
    model, exact = load(name, dtype), load(name)
    kinds = ["resid_pre", "attn_out", "neuron"]
    *_, differs = relp.compare(model, *pair, kinds)
    for rival in (*PATHS, "gim", "attnlrp", "cp-lrp"):
        rival = method(rival, model.config.family)
        got, wanted = (
            rival.scores(model, *pair, kinds, relp.logit_diff),
            rival.scores(exact, *pair, kinds, relp.logit_diff),
        )
        for kind in kinds:
            assert got[kind].dtype == torch.float32 and got[kind].isfinite().all()
            assert (got[kind][~differs[kind]] == 0).all() and got[kind].any()
            assert relp.pearson(got[kind], wanted[kind]) > (0.98 if dtype == torch.float16 else 0.8), (rival.name, kind)


def test_what_cannot_be(load, pair):
    model = load("gpt2")
    for rival in map(method, PATHS):
        with pytest.raises(ValueError, match="unknown node 'mlp'"):
            rival.scores(model, *pair, ["mlp"], relp.logit_diff)
        with pytest.raises(ValueError, match="nodes must be a list of names"):
            rival.scores(model, *pair, "mlp_out", relp.logit_diff)
        with torch.inference_mode(), pytest.raises(ValueError, match="gradients are needed here"):
            rival.scores(model, *pair, ["mlp_out"], relp.logit_diff)


# ---------------------------------------------------------------------------------------------------------------------
# Edges, and the command


@pytest.mark.parametrize("rules", ["gim", "attnlrp", "cp-lrp"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_rules_score_edges(name, rules, load, pair):
    model = load(name)
    rival, graph = method(rules, model.config.family), Graph.of(model.config)
    edges = attribute_edges(model, *pair, **rival.options).sum(-1)
    nodes = rival.scores(model, *pair, ["mlp_out"], relp.logit_diff)["mlp_out"]
    for layer in range(model.config.n_layers):
        torch.testing.assert_close(edges[:, graph.writers.index(f"m{layer}")], nodes[:, layer].sum(-1))


def test_the_command(tmp_path, capsys):
    names = ["relp", "gim", "attnlrp", "cp-lrp", "eg", "eg-2", "eap-ig-2", "eap-ig-act-1"]
    given = ["--model", "toy-qwen2", "--pairs", "2", "--metric", "kl", "--nodes", "mlp_out,head", "--no-plot"]
    assert all(method(name).name == name for name in NAMES)
    assert evaluate.main([*given, "--methods", ",".join(names), "--out", str(tmp_path)]) == 0
    folder = tmp_path / "toy-qwen2-ioi"
    summary, scores = json.loads((folder / "summary.json").read_text()), np.load(folder / "scores.npz")
    of_gim = {rule: row["requested"] for rule, row in summary["audit"]["gim"]["rules"].items()}
    assert of_gim == {"ln": True, "half": True, "temperature": 2.0, "products": True, "zero": True}
    assert summary["audit"]["attnlrp"]["rules"]["products"]["applied"] == {"Attention": 4}
    assert summary["audit"].keys() == {"relp", "gim", "attnlrp", "cp-lrp"}
    model, pairs = from_pretrained("toy-qwen2"), tasks.ioi(load_tokenizer("toy-qwen2"), 2)
    batch = tensors(pairs[:1], "cpu")
    for name in names:
        wanted = method(name, "qwen2").scores(model, *batch, ["mlp_out", "head"], relp.kl)
        for node, of_node in wanted.items():
            got = torch.tensor(scores[f"{name}_{node}"][:1, :, : of_node.shape[2]])
            torch.testing.assert_close(got, of_node, atol=1e-4, rtol=1e-3)


NUMBER = "a number of steps from 1 to 9999 is needed, as in eg-10 or eap-ig-5"
NO_NUMBER = ("eg-", "eg-0", "eg-x", "eap-ig", "eap-ig-act", "eap-ig-act-", "eap-ig-0", "eap-ig-act-0", "eap-ig-12345")
NO_MEANING = {"edges": ("eg", "eg-10", "eap-ig-act-5", "ig"), "sva": ("eg", "eg-10", "eap-ig-act-5", "eap-ig-5")}


@pytest.mark.parametrize("arguments, says", [
    (["--methods", "gimm"], "unknown method 'gimm': choose from ap, atp, atp*, relp, twopoint, gim, attnlrp, cp-lrp, "),
    *((["--methods", name], f"method {name!r}: {NUMBER}") for name in NO_NUMBER),
    *((["--task", task, "--methods", f"relp,{name}"], f"method {name} has no meaning with --task {task}")
      for task, names in NO_MEANING.items() for name in names),
])  # fmt: skip
def test_bad_names(arguments, says, capsys):
    assert evaluate.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
