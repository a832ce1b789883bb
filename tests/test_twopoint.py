"""The two-point rules: each against its formula, and what carries the patch run into the original run."""

import pytest
import torch
from conftest import FAMILIES, NEWER

import models
import relp
from beyond import rivals, twopoint
from beyond.methods import method
from beyond.twopoint import TwoPoint
from models import Pass, Rules, from_pretrained


@pytest.fixture
def load(checkpoint):
    return lambda name, dtype=torch.float64: from_pretrained(str(checkpoint(name)[0]), dtype)


@pytest.fixture
def xs():
    """x, x', and two more [5, 6]; the first row of x' is x's, the second next to it."""
    x, y, u, v = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind(0)
    y[0], y[1] = x[0], x[1] + 1e-9
    return x, y, u, v


def after(method, *patch):
    """The row `method` of the rules for the original run, after a patch run in which it got these inputs."""
    writing, reading = TwoPoint().two_runs()
    getattr(writing, method)(*patch)
    return getattr(reading, method)


def rho(f, x, signal):
    return torch.autograd.grad(f(x := x.clone().requires_grad_()), x, signal)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Each row by itself


def test_ln(xs):
    """x [mean of 1/s and 1/s']: nothing passes through the root."""
    x, y, _, signal = xs
    r0, r1 = ((z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for z in (x, y))
    norm = after("norm", y, 1e-5)
    torch.testing.assert_close(rho(lambda x: norm(x, 1e-5), x, signal), signal * (r0 + r1) / 2)


@pytest.mark.parametrize("act", models.PHI)
def test_identity(act, xs):
    """The secant carries the whole difference. Where the runs agree, it is the derivative."""
    x, y, _, _ = xs
    phi, activation = models.PHI[act], after("activation", y, models.PHI[act])
    slope = rho(lambda x: activation(x, phi), x, torch.ones_like(x))
    torch.testing.assert_close((slope * (y - x))[2:], (y * phi(y) - x * phi(x))[2:])
    torch.testing.assert_close(slope[:2], rho(lambda x: x * phi(x), x, torch.ones_like(x))[:2])
    assert (slope - phi(x))[:2].abs().max() > 0.1  # the Identity-rule's coefficient is another


@pytest.mark.parametrize("act", models.PHI)
def test_the_secant_has_no_jump(act):
    """In float32, as x' comes close to x: right to 2e-5 everywhere, also where the ends begin to be moved apart."""
    phi = models.PHI[act]
    x = torch.tensor([-3.0, -1, -0.3, 0, 0.5, 1, 4])[:, None]
    y = x + torch.logspace(-9, 0, 300)
    slope = twopoint.secant(x.expand_as(y), y, phi).double()
    x, y = x.double(), y.double()  # the very numbers; the exact secant is the mean derivative on the way
    points, exact = torch.linspace(0, 1, 2001, dtype=torch.float64), 0
    for share in (points[1:] + points[:-1]) / 2:
        z = x + share * (y - x)
        exact = exact + rho(lambda z: z * phi(z), z, torch.ones_like(z)) / 2000
    assert (slope - exact).abs().max() < 2.5e-5
    nothing = torch.zeros(1)
    assert twopoint.secant(nothing, nothing, phi) == phi(nothing)
    far = torch.tensor([-3e9, -300.0, 300.0, 3e9])
    torch.testing.assert_close(twopoint.secant(far, far.nextafter(-far), phi), (far > 0).float())


def test_gate(xs):
    """a [mean of b and b'] + [a] b. The a of the patch run does not matter."""
    a, _, b, b_patch = xs
    gate, leaves = after("gate", b, b_patch), (a.clone().requires_grad_(), b.clone().requires_grad_())
    value, signal = gate(*leaves), b_patch.cos()
    assert torch.equal(value, a * b)
    for got, wanted in zip(torch.autograd.grad(value, leaves, signal), (signal * (b + b_patch) / 2, signal * a)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["one block", "blocks", "pattern shown"])
def test_attention_by_hand(name, way, load, monkeypatch):
    """Written out: the softmax's derivative at the mean score, times the mean of both runs' values; then the values."""
    if way == "blocks":
        monkeypatch.setattr(twopoint, "QUERIES", 3)  # 3, 3 and 1 of 7
    model, g = load(name), torch.Generator().manual_seed(5)
    attn, c = model.blocks[1].attn, model.config
    x, x_patch, signal = torch.randn(3, 2, 7, c.d_model, dtype=torch.float64, generator=g)
    hook = (lambda name, layer, value: value) if way == "pattern shown" else None
    writing, reading = TwoPoint().two_runs()
    attn(x_patch, Pass(writing, hook))
    got = rho(lambda x: attn(x, Pass(reading, hook)), x, signal)
    assert not reading.notes

    def inputs(x):
        q, k, v = (getattr(attn, n)(x, Pass(Rules())).unflatten(-1, (-1, c.d_head)) for n in "qkv")
        return models.rotate(q, 0, attn.rotary), attn.repeat_kv(models.rotate(k, 0, attn.rotary)), attn.repeat_kv(v)

    def dots(q, k):
        return torch.einsum("bqhd,bkhd->bqhk", q, k) * c.attn_scale

    mask, cap = models.causal_mask(0, 7, 7, attn.window, "cpu"), c.attn_softcap
    (q1, k1, v1), x = inputs(x_patch), x.clone().requires_grad_()
    q, k, v = inputs(x)
    s0, s1 = (models.softcap(dots(*qk), cap) for qk in ((q.detach(), k.detach()), (q1, k1)))
    own, p = (s.masked_fill(mask, -torch.inf).softmax(-1) for s in (s0, (s0 + s1) / 2))
    moved = dots(q, k) * (1 if cap is None else 1 - (s0 / cap).square())  # its value is of no interest, its gradient is
    pattern = p * (moved - (p * moved).sum(-1, keepdim=True))
    z = torch.einsum("bqhk,bkhd->bqhd", pattern, (v.detach() + v1) / 2) + torch.einsum("bqhk,bkhd->bqhd", own, v)
    torch.testing.assert_close(got, torch.autograd.grad(attn.o(z.flatten(-2), Pass(Rules())), x, signal)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, *(name for name in NEWER if "moe" not in name)])
def test_logits_are_bit_identical(name, dtype, load, pair):
    model = load(name, dtype)
    original, patch, _ = pair
    for rules in (TwoPoint(), TwoPoint(gamma=0.1)):
        for names in ((), ("pattern",)):
            writing, reading = rules.two_runs()
            for tokens, lrp in ((patch, writing), (original, reading)):
                stream, _ = relp.record(model, tokens, names, lrp, grad=True)
                plain, _ = relp.record(model, tokens, names)
                assert torch.equal(model.unembed(stream, lrp), model.unembed(plain))
            assert not reading.notes  # all are read


@pytest.mark.parametrize("name", FAMILIES)
def test_notes_of_one_prompt_are_its_own(name, load, pair):
    """Prompts of a batch do not mix. Equal runs give the LN-rule's scores: secants become derivatives."""
    model, nodes = load(name), ["resid_pre", "attn_out", "mlp_out"]
    got = twopoint.attribute(model, *pair, nodes)
    single = [twopoint.attribute(model, *(x[i : i + 1] for x in pair), nodes) for i in range(4)]
    by_relp = relp.attribute(model, *pair, nodes, lrp=True)
    for node in nodes:
        torch.testing.assert_close(got[node], torch.cat([s[node] for s in single]))
        assert (got[node] - by_relp[node]).abs().max() > 1e-4
    original, _, answers = pair
    acts, patch_acts, found = twopoint.activations_and_rho(model, original, original, answers, nodes)
    _, _, wanted = relp.activations_and_rho(model, original, original, answers, nodes, lrp=Rules(ln=True))
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])
        assert torch.equal(acts[key], patch_acts[key]) and not acts[key].requires_grad


def test_queries_and_keys_have_atp_star(load, pair):
    model, nodes = load("qwen2"), ["head_q", "resid_pre", "k", "v"]
    got = twopoint.attribute(model, *pair, nodes, "prob_diff")
    assert list(got) == nodes
    by_rule = twopoint.attribute(model, *pair, ["resid_pre", "v"], "prob_diff")
    assert not torch.allclose(by_rule["v"], twopoint.attribute(model, *pair, ["v"])["v"])
    for node, wanted in (by_rule | rivals.atp_star(model, *pair, ["head_q", "k"], "prob_diff")).items():
        assert torch.equal(got[node], wanted) and wanted.any()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_patterns_coefficient(name, load, pair, monkeypatch):
    """The pattern is a node too: rho_A = rho_z . mean of both runs' values. It is shown once, as a whole."""
    monkeypatch.setattr(twopoint, "QUERIES", 4)
    model = load(name)
    nodes = ["head_pattern", "head", "head_v"]
    acts, patch_acts, rho = twopoint.activations_and_rho(model, *pair, nodes)
    for layer in range(model.config.n_layers):
        v = model.blocks[layer].attn.repeat_kv((acts["head_v", layer] + patch_acts["head_v", layer]) / 2)
        wanted = torch.einsum("bqhd,bkhd->bqhk", rho["head", layer], v)
        torch.testing.assert_close(rho["head_pattern", layer], wanted)


def test_no_pattern_is_kept(load):
    """What autograd keeps in the forward pass has no two axes of positions: memory grows with the length only."""
    model, n, kept = load("gpt2", torch.float32), 33, []
    original, patch = torch.randint(97, (2, 2, n), generator=torch.Generator().manual_seed(7))
    writing, reading = TwoPoint().two_runs()
    model(patch, writing)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(list(x.shape)) or x, lambda x: x):
        relp.record(model, original, ("resid_pre",), reading, grad=True)
    assert kept and not [shape for shape in kept if shape.count(n) > 1 and len(shape) == 4]  # but the mask has them


def test_two_forward_passes_and_one_backward(load, pair, monkeypatch):
    model, calls, backward = load("gpt2"), [], []
    stream, coefficients = type(model).stream, relp.coefficients
    monkeypatch.setattr(type(model), "stream", lambda *a, **k: calls.append(1) or stream(*a, **k))
    monkeypatch.setattr(relp, "coefficients", lambda *a: backward.append(1) or coefficients(*a))
    twopoint.attribute(model, *pair, ["resid_pre", "mlp_out"])
    assert (len(calls), len(backward)) == (2, 1)


def test_what_cannot_be(load, pair):
    with pytest.raises(ValueError, match="two-point rules need both runs: call beyond.twopoint.attribute"):
        load("gpt2")(pair[0], lrp=TwoPoint())
    with pytest.raises(ValueError, match="two-point rules do not fit mixtures of experts"):
        twopoint.attribute(load("qwen3-moe"), *pair, ["mlp_out"])
    with pytest.raises(ValueError, match="unknown node 'mlp'"):
        twopoint.attribute(load("gpt2"), *pair, ["mlp"])


def test_best_is_six_tenths_relp_and_four_tenths_two_point(load, pair):
    model = load("qwen2")
    nodes = ["resid_pre", "head", "neuron", "q"]
    found = method("best", "qwen2").scores(model, *pair, nodes)
    of_relp, two = relp.attribute(model, *pair, nodes, lrp=True), twopoint.attribute(model, *pair, nodes)
    for node in nodes:
        torch.testing.assert_close(found[node], 0.6 * of_relp[node] + 0.4 * two[node])
