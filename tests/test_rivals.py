"""GIM, AttnLRP, CP-LRP, AtP* and EAP-IG: each against its published formula, written out by hand. And all names."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES

import models
import relp
from beyond import paths, twopoint
from beyond.methods import NAMES, method, parse_rules
from beyond.rivals import HalfProducts, atp_star, attnlrp, cp_lrp, gim
from models import TABLE_4, Pass, Rules, from_pretrained


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

    c = SimpleNamespace(attn_scale=SCALE, attn_softcap=WAYS[way])
    p = Pass(rules, look if way == "pattern shown" else None)
    plain = Rules().attention(q, k, v, MASK, c, p)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    z = rules.attention(*leaves, MASK, c, p)
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
    for (b, i, h), scores, pattern, keys, values, s, slope in rows(*qkvs, way):
        hot = (scores / 2).softmax(0)
        of_scores = slope * ((hot.diag() - torch.outer(hot, hot)) @ (values @ s))
        wanted[0][b, i, h] += keys.T @ of_scores / 4
        wanted[1][b, : i + 1, h] += torch.outer(of_scores, q[b, i, h]) / 4
        wanted[2][b, : i + 1, h] += torch.outer(pattern, s) / 2
    got = attention(gim("llama"), *qkvs, way)
    if way == "pattern shown":
        wanted.append(torch.einsum("bqhd,bkhd->bqhk", signal, v) / 2)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("way", ["kernel", "pattern shown"])
def test_attnlrp_of_attention(way, qkvs):
    """Its paper: relevances, with the half-rule for both products and the softmax's Taylor expansion at the scores."""
    q, k, v, signal = qkvs
    wanted = [torch.zeros_like(x) for x in (q, k, v)]
    for (b, i, h), scores, pattern, keys, values, s, _ in rows(*qkvs, way):
        z = pattern @ values
        r_values = pattern[:, None] * values / z * (z * s) / 2  # of key j in z_d
        r_pattern = r_values.sum(1)
        r_scores = scores * (r_pattern - pattern * r_pattern.sum())
        products = SCALE * keys * q[b, i, h]  # of the dimension d in the score of key j
        r_products = products / scores[:, None] * r_scores[:, None] / 2
        wanted[0][b, i, h] += r_products.sum(0)
        wanted[1][b, : i + 1, h] += r_products
        wanted[2][b, : i + 1, h] += r_values
    got = attention(attnlrp("llama"), *qkvs, way)
    for x, rho, relevance in zip((q, k, v), got, wanted):
        torch.testing.assert_close(x * rho, relevance)


@pytest.mark.parametrize("way", WAYS)
def test_cp_lrp_of_attention(way, qkvs):
    """The pattern is constant: v as without a rule, q and k nothing."""
    got, plain = (attention(rules, *qkvs, way) for rules in (cp_lrp("llama"), Rules()))
    assert not got[0].any() and not got[1].any() and plain[0].any()
    torch.testing.assert_close(got[2:], plain[2:])


@pytest.mark.parametrize("family", TABLE_4)
def test_the_other_rows(family):
    paper = TABLE_4[family]
    assert gim(family) == HalfProducts(ln=True, half=paper.half, temperature=2.0)
    assert attnlrp(family) == HalfProducts(ln=paper.ln, identity=paper.identity, half=paper.half)
    assert cp_lrp(family) == Rules(ln=paper.ln, identity=paper.identity, half=paper.half, ah=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_bit_identical(name, dtype, load, pair):
    model = load(name, dtype)
    for rules, names in itertools.product((gim, attnlrp, cp_lrp), ((), ("pattern",))):
        plain, _ = relp.record(model, pair[0], names)
        stream, _ = relp.record(model, pair[0], names, rules(model.config.family), grad=True)
        assert torch.equal(stream, plain)


# ---------------------------------------------------------------------------------------------------------------------
# AtP*

KINDS = ["head_q", "head_k", "q", "k", "mlp_out"]


def saturated(model, factor):
    """Weights of q and k so many times larger: nearly all of a query's weight is on one key."""
    for block in model.blocks:
        for linear in (block.attn.q, block.attn.k):
            linear.weight.mul_(factor)
    return model


@pytest.mark.parametrize("factor", [1, 10])
@pytest.mark.parametrize("name", FAMILIES)
def test_qk_fix(name, factor, load, pair):
    """The pattern is that of a run with this q, or this k, patched; times the pattern's gradient. Others are AtP's."""
    model, original = saturated(load(name), factor), pair[0]
    got = atp_star(model, *pair, KINDS)
    assert list(got) == KINDS
    acts, patch_acts, rho = relp.activations_and_rho(model, *pair, ("head_q", "head_k", "head_pattern"))
    for node, layer, pos in itertools.product("qk", range(model.config.n_layers), (0, 3, 8)):
        for head in range(acts[f"head_{node}", layer].shape[2]):
            pattern = []

            def hook(name, of_layer, x, node=node, layer=layer, pos=pos, head=head, pattern=pattern):
                if (name, of_layer) == (node, layer):
                    x = x.clone()
                    x[:, pos, head] = patch_acts[f"head_{node}", layer][:, pos, head]
                if (name, of_layer) == ("pattern", layer):
                    pattern.append(x)
                return x

            model(original, hook=hook)
            moved = pattern[0] - acts["head_pattern", layer]
            wanted = (moved * rho["head_pattern", layer]).sum((1, 2, 3))
            torch.testing.assert_close(got[f"head_{node}"][:, layer, pos, head], wanted, atol=1e-10, rtol=1e-8)
    for node in "qk":
        assert got[f"head_{node}"].abs().max() > 1e-4
        torch.testing.assert_close(got[node], got[f"head_{node}"].sum(-1))
    assert not torch.allclose(atp_star(model, *pair, ["q"], "prob_diff")["q"], got["q"])
    torch.testing.assert_close(got["mlp_out"], relp.attribute(model, *pair, ["mlp_out"])["mlp_out"])


@pytest.mark.parametrize("name", FAMILIES)
def test_saturated_attention_in_float32(name, load, pair):
    """As in float64, although weights are one minus almost one. Where the runs agree, scores are exactly 0."""
    got, exact = (atp_star(saturated(load(name, dtype), 10), *pair, KINDS) for dtype in (torch.float32, torch.float64))
    for kind in KINDS:
        assert (got[kind] - exact[kind]).abs().max() < 5e-3 * exact[kind].abs().max()
        assert not got[kind][:, :, :3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, load, pair):
    """Finite, in float32, and close to float64's."""
    for name in ("gpt2", "gemma2"):
        got, exact = (atp_star(load(name, d), *pair, KINDS) for d in (dtype, torch.float64))
        for kind in KINDS:
            assert got[kind].dtype == torch.float32 and got[kind].isfinite().all()
            assert relp.pearson(got[kind], exact[kind]) > (0.999 if dtype == torch.float16 else 0.95), kind


# ---------------------------------------------------------------------------------------------------------------------
# EAP-IG

NODES = ["resid_pre", "attn_out", "mlp_out", "q", "head", "head_k", "neuron"]


@pytest.mark.parametrize("name, metric", [*((name, "logit_diff") for name in FAMILIES), ("qwen2", "prob_diff")])
def test_eap_ig_by_hand(name, metric, load, pair):
    """One prompt by itself: at patch + k/3 (original - patch), k = 1 .. 3, the run goes on from the embedding."""
    model = load(name)
    got = method("eap-ig-3", "any").scores(model, *pair, NODES, metric)
    assert list(got) == NODES
    original, patch, answers = (x[1:2] for x in pair)
    (_, acts), (_, patch_acts) = (relp.record(model, tokens, NODES) for tokens in (original, patch))
    total = {key: 0 for key in acts}
    for k in (1, 2, 3):
        x = model.embed(patch) + k / 3 * (model.embed(original) - model.embed(patch))

        def hook(node, layer, value, x=x):
            return x if (node, layer) == ("resid_pre", 0) else value

        kept = {}

        def look(node, layer, value, hook=hook, kept=kept):
            kept[node, layer] = hook(node, layer, value).requires_grad_()
            return kept[node, layer].view_as(value)

        with torch.enable_grad():
            stream = model.stream(original, hook=look)
            relp.read_out(model, stream, answers, metric).sum().backward(inputs=list(kept.values()))
        for kind, layer in acts:
            grad = kept[relp.node_of(kind), layer].grad
            total[kind, layer] += (0 if grad is None else relp.by_part(grad, kind)) / 3
    for kind, layer in acts:
        wanted = ((patch_acts[kind, layer] - acts[kind, layer]) * total[kind, layer]).sum(-1)[0]
        torch.testing.assert_close(got[kind][1, layer], wanted if kind in relp.PARTS_OF else wanted[:, 0])


def test_many_points_carry_the_whole_effect(load, pair):
    """The embedding's scores add up to the difference of the two runs' metrics."""
    model, (original, patch, answers) = load("qwen2"), pair
    value, patch_value = (relp.logit_diff(model(tokens)[:, -1], answers) for tokens in (original, patch))
    scores = paths.eap_ig(model, *pair, ["resid_pre"], steps=60)["resid_pre"]
    effect = patch_value - value
    assert (scores[:, 0].sum(-1) - effect).abs().max() < 0.05 * effect.abs().max()


def test_the_embedding_itself(load, pair):
    """A run that begins with the prompt's own embedding is the prompt's run."""
    model, (original, _, answers) = load("gemma2"), pair
    acts, _, rho = relp.activations_and_rho(model, *pair, NODES)
    got = paths.activations_and_rho_from(model, original, model.embed(original)[:, :, None], answers, NODES)
    for one, other in zip(got, (acts, rho)):
        torch.testing.assert_close(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name, passes", [
    ("gim", (2, 1)), ("attnlrp", (2, 1)), ("cp-lrp", (2, 1)), ("atp*", (2, 1)), ("eap-ig-5", (7, 5)),
])  # fmt: skip
def test_passes(name, passes, load, pair, monkeypatch):
    model, forward, backward = load("gpt2"), [], []
    last, grad = model.blocks[-1].forward, torch.autograd.grad
    model.blocks[-1].forward = lambda *a: forward.append(1) or last(*a)
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backward.append(1) or grad(*a, **k))
    method(name, "gpt2").scores(model, *pair, ["mlp_out", "head"])
    assert (len(forward), len(backward)) == passes


def test_every_name():
    assert [method(name, "qwen2").name for name in NAMES] == list(NAMES)
    assert method("relp", "qwen2").lrp is True and method("relp", "qwen2", "ln,ah").label == "RelP, ln,ah"
    assert method("relp", "qwen2", "none").lrp == Rules()
    assert method("ln+ah", "any").lrp == Rules(ln=True, ah=True)
    assert method("twopoint", "any").lrp == twopoint.TwoPoint()
    assert method("ig", "any", steps=3).steps == 3 and method("eap-ig-7", "any").steps == 7
    assert method("ln+gamma=1e+2+ah", "any").lrp == Rules(ln=True, ah=True, gamma=100.0)
    assert parse_rules("ln,epsilon=1e-4") == Rules(ln=True, epsilon=1e-4)
    assert parse_rules("paper") is True and parse_rules("none") == Rules()


def test_a_family_without_rules_is_refused(monkeypatch):
    """None runs as AtP; a family that is registered later has its rivals too."""
    for name in ("gim", "attnlrp", "cp-lrp"):
        with pytest.raises(ValueError, match="no rules are known for the family 'mine': put them into models.TABLE_4"):
            method(name, "mine")
    monkeypatch.setitem(TABLE_4, "mine", Rules(ln=True, half=True))
    assert method("gim", "mine").lrp == HalfProducts(ln=True, half=True, temperature=2.0)
    assert method("cp-lrp", "mine").lrp == Rules(ln=True, half=True, ah=True)


@pytest.mark.parametrize("name, says", [
    ("gimm", f"unknown method 'gimm': choose from {', '.join(NAMES)}"),
    *((name, f"unknown method {name!r}: choose from") for name in ("eap-ig", "eap-ig-0", "eap-ig-x", "ln+mlp", "")),
    ("ln=1", "unknown rule 'ln=1': choose paper, none, or from ln, identity, half, ah, epsilon=X, gamma=X"),
    ("gamma=", "unknown rule 'gamma='"),
    ("gamma=x", "could not convert string to float: 'x'"),
    ("gamma=-1", "give epsilon or gamma, a number from 1e-12 to 1e12, got None and -1.0"),
    ("epsilon=1+gamma=1", "give epsilon or gamma"),
])  # fmt: skip
def test_bad_names(name, says):
    with pytest.raises(ValueError) as error:
        method(name, "gpt2")
    assert says in str(error.value) and "\n" not in str(error.value)
