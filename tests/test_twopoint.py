"""The two-point rules: each against its formula, the tape that carries the patch run, and what they cost."""

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES

import models
import relp
from models import ROWS, TABLE_4, TWO_POINT, Rules, from_pretrained


@pytest.fixture
def xs():
    """x, x', and two more [5, 6]; the first row of x' is x's, the second next to it."""
    x, y, u, v = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind(0)
    y[0], y[1] = x[0], x[1] + 1e-9
    return x, y, u, v


def given(*patch):
    """A twin that returns these, one after the other: the patch run's side of one piece."""
    tape = models.Tape(patch)
    tape.playing = True
    return tape


def of_patch(rule, *patch):
    """What a piece's patch run leaves on the tape."""
    tape = models.Tape()
    rule(*patch, tape)
    return given(*tape)


def rho(f, x, signal):
    return torch.autograd.grad(f(x := x.clone().requires_grad_()), x, signal)[0]


HIDDEN = torch.ones(6, 6).triu(1).bool()
RULES = {  # rule(inputs..., twin), and the function that it is a rule for
    "RMSNorm": (lambda x, twin=models.alone: models.ln_rule(x, 1e-5, False, twin), 1),
    **{act: (lambda x, twin=models.alone, g=gate: models.identity_rule(x, g, False, twin), 1) for act, gate in models.GATES.items()},
    "gate": (lambda a, b, twin=models.alone: models.half_rule(a, b, False, twin), 2),
    "matrix product": (lambda a, b, twin=models.alone: models.half_rule(a, b, False, twin, lambda a, b: a @ b.T), 2),
    "softmax": (lambda x, twin=models.alone: models.softmax_rule(x @ x.detach().T, HIDDEN[:5, :5], None, twin), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_value_is_the_original_runs_and_the_tape_is_used_up(name, xs):
    rule, n = RULES[name]
    inputs, patch = (xs[0], xs[2])[:n], (xs[1], xs[3])[:n]
    twin = of_patch(rule, *patch)
    assert len(twin) > 0
    assert torch.equal(rule(*(x.clone().requires_grad_() for x in inputs), twin), rule(*inputs))
    assert len(twin) == 0


def test_ln(xs):
    """x [mean of 1/s and 1/s']: nothing passes through the root."""
    x, y, _, signal = xs
    r0, r1 = ((z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for z in (x, y))
    rule = RULES["RMSNorm"][0]
    for ln in (False, True):
        got = rho(lambda x: models.ln_rule(x, 1e-5, ln, of_patch(rule, y)), x, signal)
        torch.testing.assert_close(got, signal * (r0 + r1) / 2)


@pytest.mark.parametrize("act", models.GATES)
def test_identity(act, xs):
    """The secant carries the whole difference; where the runs agree, it is the Identity-rule's coefficient."""
    x, y, _, signal = xs
    gate, rule = models.GATES[act], RULES[act][0]
    for on in (False, True):
        slope = rho(lambda x: models.identity_rule(x, gate, on, of_patch(rule, y)), x, signal) / signal
        torch.testing.assert_close(slope[:2], gate(x)[:2])
        torch.testing.assert_close((slope * (y - x))[2:], (y * gate(y) - x * gate(x))[2:])


def test_products_go_first_a_then_b(xs):
    """[b] da + [a'] db carries the whole difference, elementwise and for matrices."""
    a, a_patch, b, b_patch = xs
    for name, product in (("gate", torch.mul), ("matrix product", lambda a, b: a @ b.T)):
        rule, signal = RULES[name][0], product(a_patch, b_patch).cos()
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        got = torch.autograd.grad(rule(*leaves, given(a_patch)), leaves, signal)
        wanted = (signal * b, signal * a_patch) if name == "gate" else (signal @ b, signal.T @ a_patch)
        for one, other in zip(got, wanted):
            torch.testing.assert_close(one, other)
        change = (got[0] * (a_patch - a)).sum() + (got[1] * (b_patch - b)).sum()
        torch.testing.assert_close(change, (signal * (product(a_patch, b_patch) - product(a, b))).sum())


def test_softmax_derivative_at_the_mean_score(xs):
    g = torch.Generator().manual_seed(4)
    scores, patch, signal = 3 * torch.randn(3, 6, 6, dtype=torch.float64, generator=g)
    p = ((scores + patch) / 2).masked_fill(HIDDEN, -torch.inf).softmax(-1)
    wanted = p * (signal - (p * signal).sum(-1, keepdim=True))
    got = rho(lambda s: models.softmax_rule(s, HIDDEN, None, given(patch)), scores, signal)
    torch.testing.assert_close(got, wanted)
    assert (got - rho(lambda s: models.softmax_rule(s, HIDDEN), scores, signal)).abs().max() > 0.01


def test_softmax_temperature(xs):
    """Not a two-point rule, but beside it: the derivative of the softmax of x / T (as GIM has it, without 1 / T)."""
    scores, signal = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    p = (scores / 3).masked_fill(HIDDEN, -torch.inf).softmax(-1)
    got = rho(lambda s: models.softmax_rule(s, HIDDEN, 3.0), scores, signal)
    torch.testing.assert_close(got, p * (signal - (p * signal).sum(-1, keepdim=True)))
    assert torch.equal(models.softmax_rule(scores, HIDDEN, 3.0), models.softmax_rule(scores, HIDDEN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_bit_identical(name, dtype, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=dtype)
    original, patch, answers = pair
    with torch.no_grad():
        plain = [model(tokens) for tokens in (original, patch)]
    alone = (Rules(True, True, True, two_point=(row,)) for row in ROWS)
    for rules in (TWO_POINT[model.config.family], *alone, Rules(ah=True, two_point=ROWS), Rules(temperature=2.0)):
        rules = rules.taped()
        with torch.no_grad():
            assert torch.equal(model(patch, rules), plain[1])
        rules.tape.playing = True
        stream, _ = relp.record(model, original, (), rules, grad=True)
        assert torch.equal(model.unembed(stream, rules), plain[0]), rules
        assert not rules.tape


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shown", [False, True], ids=["kernel", "pattern shown"])
def test_attention_by_hand(name, shown, checkpoint):
    """Attention written out: the softmax at the mean score; the pattern goes first, then v."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    attn, c, g = model.blocks[1].attn, model.config, torch.Generator().manual_seed(5)
    x, x_patch, signal = torch.randn(3, 2, 7, c.d_model, dtype=torch.float64, generator=g)
    hook = lambda name, layer, value: value
    hook.nodes = ("pattern",) if shown else ()
    rules = Rules(two_point=("attention",)).taped()
    run = models.Run(rules, hook, 1)
    with torch.no_grad():
        attn(x_patch, run)
    rules.tape.playing = True
    got = rho(lambda x: attn(x, run), x, signal)

    plain, end = models.Run(Rules(), None, 1), c.n_heads // c.n_kv_heads

    def inputs(x):
        q, k, v = (getattr(attn, n)(x, plain).unflatten(-1, (-1, c.d_head)) for n in "qkv")
        k, v = (models.rotate(k, 0, c), v)
        return models.rotate(q, 0, c), k.repeat_interleave(end, 2), v.repeat_interleave(end, 2)

    hidden = models.unseen(0, 7, 7, attn.window, "cpu")
    dots = lambda q, k: torch.einsum("bqhd,bkhd->bqhk", q, k) * c.attn_scale
    scores = lambda q, k: models.softcap(dots(q, k), c.attn_softcap)
    softmax = lambda s: s.masked_fill(hidden, -torch.inf).softmax(-1)
    (q1, k1, _), x = inputs(x_patch), x.clone().requires_grad_()
    q, k, v = inputs(x)
    s0, s1 = scores(q, k).detach(), scores(q1, k1).detach()
    by_parts = dots(q, k)  # the value is of no interest, its gradient is
    cap = 1 if c.attn_softcap is None else 1 - (s0 / c.attn_softcap).square()
    p = softmax((s0 + s1) / 2)
    moved = cap * by_parts
    pattern = p * (moved - (p * moved).sum(-1, keepdim=True))
    mix = lambda pattern, v: torch.einsum("bqhk,bkhd->bqhd", pattern, v)
    z = mix(pattern, v.detach()) + mix(softmax(s1).detach(), v)
    wanted = torch.autograd.grad(attn.o(z.flatten(-2), plain), x, signal)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tape_out_of_step_would_show(name, checkpoint, pair):
    """Whole models: the patch run on the tape matters, in each prompt its own, and equal runs give LN, Identity and the gradient."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    original, patch, answers = pair
    nodes, rules = ("resid_pre", "attn_out", "mlp_out"), TWO_POINT[model.config.family]
    got = relp.attribute(model, *pair, nodes, lrp=rules)
    single = [relp.attribute(model, *(x[i : i + 1] for x in pair), nodes, lrp=rules) for i in range(4)]
    for node in nodes:
        torch.testing.assert_close(got[node], torch.cat([s[node] for s in single]))
        assert (got[node] - relp.attribute(model, *pair, nodes, lrp=True)[node]).abs().max() > 1e-4
    _, same = relp.run_patch(model, original, answers, nodes, lrp=Rules(two_point=ROWS))
    rho = relp.coefficients(model, original, answers, nodes, lrp=same)[1]
    wanted = relp.coefficients(model, original, answers, nodes, lrp=Rules(ln=True, identity=True))[1]
    for key in wanted:
        torch.testing.assert_close(rho[key], wanted[key])


def test_rules_of_a_family():
    """The rows that the family has in Table 4, and attention; but Gemma 2's norms and gates as in RelP."""
    assert TWO_POINT.keys() == TABLE_4.keys()
    for family, rows in {
        "gpt2": ("ln", "identity", "attention"),
        "qwen2": ROWS,
        "gemma2": ("identity", "attention"),
    }.items():
        rules, paper = TWO_POINT[family], TABLE_4[family]
        assert rules.two_point == rows and rules.taped().tape is not rules.taped().tape
        assert (rules.ln, rules.identity, rules.half) == (paper.ln, paper.identity, paper.half)


def test_two_forward_passes_and_one_backward(checkpoint, pair, monkeypatch):
    model, calls, backward = from_pretrained(str(checkpoint("gpt2")[0])), [], []
    block, grad = type(model).block, torch.autograd.grad
    monkeypatch.setattr(type(model), "block", lambda self, *a, **k: calls.append(a[0]) or block(self, *a, **k))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backward.append(1) or grad(*a, **k))
    relp.attribute(model, *pair, ["resid_pre", "mlp_out"], lrp=TWO_POINT["gpt2"])
    assert len(calls) == 2 * model.config.n_layers and len(backward) == 1


def test_features_sum_to_the_node(checkpoint, pair):
    model = from_pretrained(str(checkpoint("qwen2")[0]), dtype=torch.float64)

    class Halves:  # an autoencoder that leaves half of x as the error
        W_dec = 0.5 * torch.eye(model.config.d_model, dtype=torch.float64)
        encode = staticmethod(lambda x: x)
        error = staticmethod(lambda x: 0.5 * x)

    scores = relp.attribute_features(model, *pair, {("mlp_out", 1): Halves()}, lrp=TWO_POINT["qwen2"])["mlp_out", 1]
    wanted = relp.attribute(model, *pair, ["mlp_out"], lrp=TWO_POINT["qwen2"])["mlp_out"][:, 1]
    torch.testing.assert_close(scores.sum(-1), wanted)
    torch.testing.assert_close(scores[..., -1], scores[..., :-1].sum(-1))


def test_the_tape_notices_and_rules_without_one_are_refused(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    original, patch, answers = pair
    _, rules = relp.run_patch(model, patch, answers, (), lrp=TWO_POINT["gpt2"])
    with pytest.raises(ValueError, match="does not do what the patch run did"):
        relp.coefficients(model, original[:, :-1], answers, ("mlp_out",), lrp=rules)
    with pytest.raises(ValueError, match="need a patch run"):
        model(original, lrp=TWO_POINT["gpt2"])
    with pytest.raises(ValueError, match="no two-point rule for 'attn'"):
        Rules(two_point=("attn",))


@pytest.mark.parametrize("name", FAMILIES)
def test_temperature_reaches_q_and_k_alone(name, checkpoint, pair):
    """In the whole model: as without it at T = 1, and otherwise where the pattern is not constant."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    rho = lambda **rules: relp.coefficients(model, pair[0], pair[2], ("q", "z"), lrp=Rules(**rules))[1]
    plain, one, two, ah = rho(), rho(temperature=1.0), rho(temperature=2.0), rho(temperature=2.0, ah=True)
    last = model.config.n_layers - 1
    for key in plain:
        torch.testing.assert_close(one[key], plain[key])
        if key[0] == "q":
            assert (two[key] - plain[key]).abs().max() > 1e-6 and (ah[key] == 0).all()
    torch.testing.assert_close(two["z", last], plain["z", last])
