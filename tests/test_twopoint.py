"""The two-point rules: each against its formula, the notes that carry the patch run, and what they cost."""

import dataclasses
import gc
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES

import models
import relp
from beyond import atp_star, twopoint
from beyond.methods import TwoPointTemperature, method, parse_rules
from beyond.temperature import Temperature
from beyond.twopoint import ROWS, TWO_POINT, TwoPoint
from models import TABLE_4, Rules, from_pretrained


@pytest.fixture
def xs():
    """x, x', and two more [5, 6]; the first row of x' is x's, the second next to it."""
    x, y, u, v = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind(0)
    y[0], y[1] = x[0], x[1] + 1e-9
    return x, y, u, v


def two_runs(rule, *patch, rules=None):
    """The rules for the original run of `rule`, a function of them and its inputs, when its patch run got these."""
    patch_rules, rules = (rules or TwoPoint(two_point=ROWS)).two_runs()
    rule(patch_rules, *patch)
    return rules


def notes(rules):
    """The Notes that rules of one of the two runs write or read."""
    return rules.notes.__self__


def rho(f, x, signal):
    return torch.autograd.grad(f(x := x.clone().requires_grad_()), x, signal)[0]


def look(name, layer, value):
    return value


def attend(n, hook=None, softcap=None):
    """Attention over n positions without a scale: in one kernel, if neither hook nor softcap wants the pattern."""
    mask = models.causal_mask(0, n, n, None, "cpu")
    return models.Attend(SimpleNamespace(attn_scale=1.0, attn_softcap=softcap), mask, models.Nodes(hook, 0))


# the three ways in which attention is computed; this softcap is so large that it caps nothing
WAYS = {"kernel": attend(6), "pattern shown": attend(6, look), "softcap": attend(6, softcap=1e9)}


@pytest.fixture(params=WAYS)
def attention(request):
    """A function of rules and scores [query, key] that returns their pattern: keys and values are unit vectors."""
    unit = torch.eye(6, dtype=torch.float64)[None, :, None]
    return lambda rules, scores: rules.attention(scores[None, :, None], unit, unit, WAYS[request.param])[0, :, 0]


def norm(rules, x):
    return rules.norm(x, 1e-5)


def heads(rules, q, k, v, hook=None):
    return rules.attention(*(x.unflatten(-1, (2, -1))[None] for x in (q, k, v)), attend(len(q), hook))


RULES = {  # rule(rules, inputs...), and how many inputs it has
    "norm": (norm, 1),
    **{act: (lambda rules, x, phi=phi: rules.activation(x, phi), 1) for act, phi in models.PHI.items()},
    "gate": (lambda rules, a, b: rules.gate(a, b), 2),
    "attention": (heads, 3),
    "attention, pattern shown": (lambda rules, q, k, v: heads(rules, q, k, v, look), 3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_value_is_the_original_runs_and_the_notes_are_used_up(name, dtype, xs):
    rule, n = RULES[name]
    xs = [x.to(dtype) for x in xs]
    inputs, patch = (xs[0], xs[2], xs[3])[:n], (xs[1], xs[3], xs[2])[:n]
    plain, plain_patch = rule(Rules(), *inputs), rule(Rules(), *patch)
    patch_rules, rules = TwoPoint(two_point=ROWS).two_runs()
    assert notes(patch_rules) is notes(rules) and not notes(rules)
    assert torch.equal(rule(patch_rules, *patch), plain_patch)
    assert len(notes(rules)) == 1
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = rule(rules, *leaves)
    assert torch.equal(value, plain) and value.dtype == dtype
    assert not notes(rules)
    assert all(grad.any() for grad in torch.autograd.grad(value.cos().sum(), leaves))


def test_ln(xs):
    """x [mean of 1/s and 1/s']: nothing passes through the root."""
    x, y, _, signal = xs
    r0, r1 = ((z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for z in (x, y))
    for ln in (False, True):
        rules = two_runs(norm, y, rules=TwoPoint(ln=ln, two_point=("ln",)))
        torch.testing.assert_close(rho(lambda x, rules=rules: norm(rules, x), x, signal), signal * (r0 + r1) / 2)


def derivative(f, x):
    return rho(f, x, torch.ones_like(x))


@pytest.mark.parametrize("act", models.PHI)
def test_identity(act, xs):
    """The secant carries the whole difference; where the runs agree, it is the derivative up to its own error."""
    x, y, _, signal = xs
    phi, rule = models.PHI[act], RULES[act][0]
    for identity in (False, True):
        rules = two_runs(rule, y, rules=TwoPoint(identity=identity, two_point=("identity",)))
        slope = rho(lambda x, rules=rules: rule(rules, x), x, signal) / signal
        torch.testing.assert_close(slope[:2], derivative(lambda x: x * phi(x), x)[:2])
        assert (slope - phi(x))[:2].abs().max() > 0.1  # the Identity-rule's coefficient is another
        torch.testing.assert_close((slope * (y - x))[2:], (y * phi(y) - x * phi(x))[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("act", models.PHI)
def test_identity_is_continuous_in_the_difference_of_the_runs(act, dtype):
    """The coefficient as x' comes close to x: the mean derivative on the way, and at last the derivative in x.

    Before, it was the Identity-rule's phi(x) where x' is very close: for GELU in x = -1 that is 0.159 next to -0.083.
    """
    phi, eps, rule = models.PHI[act], torch.finfo(dtype).eps, RULES[act][0]
    threshold = 2 * eps ** (1 / 3)  # where the ends of the secant are no longer moved apart, if |x| is at most 1
    sizes = [0.0, *torch.logspace(-12, 0, 400, dtype=torch.float64).tolist(), *(threshold * r for r in (0.999, 1.001))]
    x = torch.tensor([-3.0, -1, -0.3, 0, 0.5, 1, 4], dtype=dtype)[:, None]
    y = x + torch.tensor([sign * size for sign in (1, -1) for size in sorted(sizes)], dtype=dtype)
    x = x.expand_as(y).contiguous()
    rules = two_runs(rule, y, rules=TwoPoint(two_point=("identity",)))
    slope = rho(lambda x: rule(rules, x), x, torch.ones_like(x)).double()

    def act_slope(x):
        return derivative(lambda x: x * phi(x), x)

    x, dx = x.double(), y.double() - x.double()
    near = dx.abs() < threshold
    assert near.any(1).all() and (~near).any(1).all()  # the differences span the threshold
    # (act(x') - act(x)) / (x' - x) is the mean of act' on the way, without the quotient's rounding errors
    points, weights = np.polynomial.legendre.leggauss(24)
    exact = sum(w / 2 * act_slope(x + dx * (1 + p) / 2) for p, w in zip(points, weights))
    worst = eps ** (2 / 3)  # 2.4e-5 in float32
    assert (slope - exact).abs().max() < worst
    same = dx == 0
    assert same.sum() >= 2 * len(x) and (slope - act_slope(x))[same].abs().max() < worst
    order = dx.argsort(-1)
    steps = slope.gather(-1, order).diff().abs() - exact.gather(-1, order).diff().abs()
    assert steps.max() < 2 * worst  # no jump from one difference to the next
    if act == "gelu":
        at = x == -1
        assert (slope[at & near] + 0.0833).abs().max() < 3 * threshold and abs(float(phi(x)[at][0]) - 0.1587) < 1e-4


@pytest.mark.parametrize("act", models.PHI)
def test_identity_far_from_zero(act):
    """There the smallest difference that a number can show is large, and the function is x or 0."""
    x = torch.tensor([-3e9, -1e5, -300.0, 300.0, 1e5, 3e9])
    for y in (x, x.nextafter(-x), x * 1.5):
        slope = two_runs(RULES[act][0], y, rules=TwoPoint(two_point=("identity",)))
        slope = rho(lambda x, rules=slope: RULES[act][0](rules, x), x, torch.ones(6))
        torch.testing.assert_close(slope, (x > 0).float())


def test_products_take_the_mean_of_the_second_factor(xs):
    """a [mean of b and b'] + [a] b, elementwise and for matrices."""
    a, _, b, b_patch = xs

    def gate(a, b):
        return two_runs(RULES["gate"][0], b, b_patch).gate(a, b)

    def matrix_product(a, b):
        return twopoint.product(matmul, a, b, b_patch)

    def matmul(a, b):
        return a @ b.T

    mean = (b + b_patch) / 2
    for rule, product in ((gate, torch.mul), (matrix_product, matmul)):
        signal, leaves = product(a, b_patch).cos(), (a.clone().requires_grad_(), b.clone().requires_grad_())
        value = rule(*leaves)
        assert torch.equal(value, product(a, b))
        wanted = (signal * mean, signal * a) if rule is gate else (signal @ mean, signal.T @ a)
        for one, other in zip(torch.autograd.grad(value, leaves, signal), wanted):
            torch.testing.assert_close(one, other)


MASK = torch.ones(6, 6).triu(1).bool()


def test_softmax_derivative_at_the_mean_score(attention):
    g = torch.Generator().manual_seed(4)
    scores, patch, signal = 3 * torch.randn(3, 6, 6, dtype=torch.float64, generator=g)
    p = ((scores + patch) / 2).masked_fill(MASK, -torch.inf).softmax(-1)
    wanted = p * (signal - (p * signal).sum(-1, keepdim=True))
    rules = two_runs(attention, patch)
    got = rho(lambda s: attention(rules, s), scores, signal)
    torch.testing.assert_close(got, wanted)
    assert (got - rho(lambda s: attention(Rules(), s), scores, signal)).abs().max() > 0.01


def test_softmax_temperature(attention):
    """Not a two-point rule, but beside it: the derivative of the softmax of x / T (as GIM has it, without 1 / T)."""
    scores, signal = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    p = (scores / 3).masked_fill(MASK, -torch.inf).softmax(-1)
    rules = Temperature(temperature=3.0)
    got = rho(lambda s: attention(rules, s), scores, signal)
    torch.testing.assert_close(got, p * (signal - (p * signal).sum(-1, keepdim=True)))
    assert torch.equal(attention(rules, scores), attention(Rules(), scores))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, "gemma3", "olmo3"])
def test_logits_are_bit_identical(name, dtype, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=dtype)
    original, patch, answers = pair
    with torch.no_grad():
        plain = [model(tokens) for tokens in (original, patch)]
    for rules in (
        TWO_POINT[model.config.family],
        *(TwoPoint(True, True, True, two_point=(row,)) for row in ROWS),
        TwoPoint(ah=True, two_point=ROWS),
        TwoPoint(gamma=0.1, two_point=ROWS),
        TwoPointTemperature(temperature=2.0, two_point=("ln", "identity", "half")),
    ):
        patch_rules, rules = rules.two_runs()
        with torch.no_grad():
            assert torch.equal(model(patch, patch_rules), plain[1])
        assert bool(notes(rules)) == (model.config.gated or rules.two_point != ("half",))
        stream, _ = relp.record(model, original, (), rules, grad=True)
        assert torch.equal(model.unembed(stream, rules), plain[0]), rules
        assert not notes(rules)
    for rules in (Temperature(temperature=2.0), Temperature(True, True, True, True, temperature=0.5)):
        stream, _ = relp.record(model, original, (), rules, grad=True)
        assert torch.equal(model.unembed(stream, rules), plain[0]), rules


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("way", ["one block", "blocks", "pattern shown"])
def test_attention_by_hand(name, way, checkpoint, monkeypatch):
    """Attention written out: the softmax at the mean score, times the mean of both runs' values; then the values."""
    shown = way == "pattern shown"
    if way == "blocks":
        monkeypatch.setattr(twopoint, "QUERIES", 3)  # 3, 3 and 1 of 7
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    attn, c, g = model.blocks[1].attn, model.config, torch.Generator().manual_seed(5)
    x, x_patch, signal = torch.randn(3, 2, 7, c.d_model, dtype=torch.float64, generator=g)
    node = models.Nodes(look if shown else None, 1)
    assert node.wanted("pattern") == shown
    patch_rules, rules = TwoPoint(two_point=("attention",)).two_runs()
    with torch.no_grad():
        attn(x_patch, patch_rules, node)
    got = rho(lambda x: attn(x, rules, node), x, signal)
    assert not notes(rules)

    shared = c.n_heads // c.n_kv_heads

    def inputs(x):
        q, k, v = (getattr(attn, n)(x, Rules()).unflatten(-1, (-1, c.d_head)) for n in "qkv")
        k = models.rotate(k, 0, attn.rotary)
        return models.rotate(q, 0, attn.rotary), k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)

    mask = models.causal_mask(0, 7, 7, attn.window, "cpu")

    def dots(q, k):
        return torch.einsum("bqhd,bkhd->bqhk", q, k) * c.attn_scale

    def scores(q, k):
        return models.softcap(dots(q, k), c.attn_softcap)

    def softmax(s):
        return s.masked_fill(mask, -torch.inf).softmax(-1)

    def mix(pattern, v):
        return torch.einsum("bqhk,bkhd->bqhd", pattern, v)

    (q1, k1, v1), x = inputs(x_patch), x.clone().requires_grad_()
    q, k, v = inputs(x)
    s0, s1 = scores(q, k).detach(), scores(q1, k1).detach()
    by_parts = dots(q, k)  # the value is of no interest, its gradient is
    cap = 1 if c.attn_softcap is None else 1 - (s0 / c.attn_softcap).square()
    p = softmax((s0 + s1) / 2)
    moved = cap * by_parts
    pattern = p * (moved - (p * moved).sum(-1, keepdim=True))
    z = mix(pattern, (v.detach() + v1) / 2) + mix(softmax(s0), v)
    wanted = torch.autograd.grad(attn.o(z.flatten(-2), Rules()), x, signal)[0]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_blocks_of_queries_are_the_whole(dtype, monkeypatch):
    """Also if the queries are the last ones only, and in half precision, where the blocks' sums are not rounded."""
    g = torch.Generator().manual_seed(6)
    q, k, v, q_patch, k_patch, signal = torch.randn(6, 2, 9, 3, 4, generator=g, dtype=torch.float64).to(dtype)
    for first, window in ((0, None), (0, 4), (4, None), (8, None)):
        mask = models.causal_mask(first, 9 - first, 9, window, "cpu")
        attend = models.Attend(SimpleNamespace(attn_scale=0.5, attn_softcap=None), mask, models.Nodes(None, 0))
        values, gradients = [], []
        for queries in (128, 1, 4):
            monkeypatch.setattr(twopoint, "QUERIES", queries)
            rules = TwoPoint(two_point=("attention",)).two_runs()
            rules[0].attention(q_patch[:, first:], k_patch, v, attend)
            leaves = [x.clone().requires_grad_() for x in (q[:, first:], k, v)]
            values.append(rules[1].attention(*leaves, attend))
            gradients.append(torch.autograd.grad(values[-1], leaves, signal[:, first:]))
            assert torch.equal(values[-1], attend(*leaves))
        for other in gradients[1:]:
            for one, two in zip(gradients[0], other):
                assert one.dtype == two.dtype == dtype and one.any()
                torch.testing.assert_close(one, two, atol=1e-12 if dtype == torch.float64 else 0.02, rtol=0.02)


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2-mha-tied-window"])
def test_patterns_of_one_layer_at_a_time(name, checkpoint, monkeypatch):
    """What autograd keeps that has two axes of positions: nothing in the forward pass, and on the way back no more at
    once than one layer needs, and nothing if the queries come in blocks.
    """
    model, n = from_pretrained(str(checkpoint(name)[0])), 33
    c, g = model.config, torch.Generator().manual_seed(7)
    original, patch = torch.randint(c.n_vocab, (2, 2, n), generator=g)
    kept, most, total = weakref.WeakSet(), 0, 0

    class Kept:
        def __init__(self, x):
            self.x = x.detach()  # x itself might hold the graph that holds this
            self.patterns = x.numel() / (2 * c.n_heads * n * n) if list(x.shape).count(n) > 1 else 0

    def pack(x):
        nonlocal most, total
        holder = Kept(x)
        kept.add(holder)
        most, total = max(most, sum(k.patterns for k in kept)), total + holder.patterns
        return holder

    def measured(rules):
        nonlocal most, total
        most, total = 0, 0
        patch_rules, rules = rules.two_runs()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.x):
            with torch.no_grad():
                model(patch, patch_rules)
            stream, acts = relp.record(model, original, ("resid_pre",), rules, grad=True)
            value = model.unembed(stream, rules)[:, -1].cos().sum()
            assert total == 0
            torch.autograd.grad(value, list(acts.values()))
        return most, total

    most_at_once, in_all = measured(TWO_POINT[c.family])
    assert 1 <= most_at_once <= in_all / c.n_layers < in_all
    monkeypatch.setattr(twopoint, "QUERIES", 8)
    assert measured(TWO_POINT[c.family]) == (0, 0)


def test_nothing_is_kept_when_the_scores_are_there(checkpoint, pair):
    """The graph must not hold the hook that holds the graph: neither would ever be freed."""
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    patch_rules, rules = TWO_POINT["gpt2"].two_runs()
    model.stream(pair[1], patch_rules)
    stream, acts = relp.record(model, pair[0], ("q", "z"), rules, grad=True)
    z = weakref.ref(acts["z", 1])
    assert z() is not None
    del stream, acts
    gc.collect()
    assert z() is None


@pytest.mark.parametrize("name", FAMILIES)
def test_notes_out_of_step_would_show(name, checkpoint, pair):
    """Whole models: the patch run's notes matter, each prompt's are its own; equal runs give the LN-rule's scores."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    original, _, answers = pair
    nodes, rules = ("resid_pre", "attn_out", "mlp_out"), TWO_POINT[model.config.family]
    got = relp.attribute(model, *pair, nodes, lrp=rules)
    single = [relp.attribute(model, *(x[i : i + 1] for x in pair), nodes, lrp=rules) for i in range(4)]
    for node in nodes:
        torch.testing.assert_close(got[node], torch.cat([s[node] for s in single]))
        assert (got[node] - relp.attribute(model, *pair, nodes, lrp=True)[node]).abs().max() > 1e-4
    keys = {(node, layer) for node in nodes for layer in range(model.config.n_layers)}
    terms = relp.propagate(model, original, original, answers, keys, lrp=TwoPoint(two_point=ROWS))
    # with x' = x the secant is the derivative, and so are the softmax's and the products' coefficients
    wanted = relp.coefficients(model, original, answers, nodes, lrp=Rules(ln=True))[1]
    assert terms.keys() == wanted.keys() == keys
    for key in keys:
        torch.testing.assert_close(terms[key].rho, wanted[key])
        assert torch.equal(terms[key].original, terms[key].patch)


def test_rules_of_a_family():
    """The rows that the family has in Table 4, and attention."""
    assert TWO_POINT.keys() == TABLE_4.keys()
    for family, paper in TABLE_4.items():
        rules, rows = TWO_POINT[family], ROWS if paper.half else ("ln", "identity", "attention")
        assert rules.two_point == rows and rules.notes is None
        assert notes(rules.two_runs()[0]) is not notes(rules.two_runs()[0])
        assert all(run == rules for run in rules.two_runs())  # the notes make no other rules of them
        assert Rules(**{f.name: getattr(rules, f.name) for f in dataclasses.fields(Rules)}) == paper


def test_two_forward_passes_and_one_backward(checkpoint, pair, monkeypatch):
    model, calls, backward = from_pretrained(str(checkpoint("gpt2")[0])), [], []
    block, grad = type(model).block, torch.autograd.grad
    monkeypatch.setattr(type(model), "block", lambda self, *a, **k: calls.append(a[0]) or block(self, *a, **k))
    monkeypatch.setattr(torch.autograd, "grad", lambda y, *a, **k: backward.append(y.ndim) or grad(y, *a, **k))
    relp.attribute(model, *pair, ["resid_pre", "mlp_out"], lrp=TWO_POINT["gpt2"])
    assert len(calls) == 2 * model.config.n_layers
    # from the metric once; within it, each layer's attention from z
    assert backward == [0] + model.config.n_layers * [4]


def test_features_sum_to_the_node(checkpoint, pair):
    model = from_pretrained(str(checkpoint("qwen2")[0]), dtype=torch.float64)

    class Halves:  # an autoencoder that leaves half of x as the error
        W_dec = 0.5 * torch.eye(model.config.d_model, dtype=torch.float64)
        encode = staticmethod(lambda x: x)

    scores = relp.attribute_features(model, *pair, {("mlp_out", 1): Halves()}, lrp=TWO_POINT["qwen2"])["mlp_out", 1]
    wanted = relp.attribute(model, *pair, ["mlp_out"], lrp=TWO_POINT["qwen2"])["mlp_out"][:, 1]
    torch.testing.assert_close(scores.sum(-1), wanted)
    torch.testing.assert_close(scores[..., -1], scores[..., :-1].sum(-1))


def test_notes_notice_and_rules_without_them_are_refused(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    original, patch, answers = pair
    for tokens in (original[:, :-1], original[:2]):  # other shapes
        patch_rules, rules = TWO_POINT["gpt2"].two_runs()
        model(patch, patch_rules)
        with pytest.raises(ValueError, match="does not do what the patch run did"):
            relp.coefficients(model, tokens, answers[: len(tokens)], ("mlp_out",), lrp=rules)
    patch_rules, rules = TwoPoint(two_point=ROWS).two_runs()
    model.stream(patch, patch_rules)  # the final norm was never called
    with pytest.raises(ValueError, match="does not do what the patch run did"):
        model(original, rules)
    with pytest.raises(ValueError, match="need a patch run: call relp.attribute"):
        model(original, lrp=TWO_POINT["gpt2"])
    with pytest.raises(ValueError, match="no two-point rule for 'attn': choose from ln, identity, half, attention"):
        TwoPoint(two_point=("attn",))
    with pytest.raises(ValueError, match="epsilon and gamma are both rules for linear layers"):
        TwoPoint(epsilon=0.1, gamma=0.1, two_point=("ln",))


# ---------------------------------------------------------------------------------------------------------------------
# Temperature


@pytest.mark.parametrize("name", FAMILIES)
def test_temperature_reaches_only_q_and_k(name, checkpoint, pair):
    """In the whole model: as without it at T = 1, and otherwise where the pattern is not constant."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)

    def rho(**rules):
        return relp.coefficients(model, pair[0], pair[2], ("q", "z"), lrp=Temperature(**rules))[1]

    plain, one, two, ah = rho(), rho(temperature=1.0), rho(temperature=2.0), rho(temperature=2.0, ah=True)
    last = model.config.n_layers - 1
    for key in plain:
        torch.testing.assert_close(one[key], plain[key])
        if key[0] == "q":
            assert (two[key] - plain[key]).abs().max() > 1e-6 and (ah[key] == 0).all()
    torch.testing.assert_close(two["z", last], plain["z", last])


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "x", True], ids=repr)
@pytest.mark.parametrize("rules", [Temperature, TwoPointTemperature])
def test_a_temperature_that_is_no_positive_number_is_refused(rules, value):
    with pytest.raises(ValueError, match="^rule temperature must be a positive number, got "):
        rules(temperature=value)


def test_temperature_together_with_two_point_attention_is_refused():
    """Both say what the softmax passes back."""
    says = "temperature and attention2 both say what the softmax passes back: choose one"
    with pytest.raises(ValueError, match=says):
        TwoPointTemperature(temperature=2.0, two_point=("attention",))
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TwoPointTemperature(temperature=2.0, two_point=("ln",)), two_point=ROWS)
    for text in ("temperature=2,attention2", "attention2,temperature=2", "ln,temperature=2,identity2,attention2"):
        with pytest.raises(ValueError, match=says):
            parse_rules(text)
    assert parse_rules("temperature=2,ln2") == TwoPointTemperature(temperature=2.0, two_point=("ln",))
    assert parse_rules("attention2") == TwoPoint(two_point=("attention",))
    assert parse_rules("temperature=2") == Temperature(temperature=2.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_temperature_beside_two_point_rows(name, checkpoint, pair):
    """Each does its part: with no row the scores are the temperature's, at T = 1 the rows'; else they are others."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)

    def scores(rules):
        return relp.attribute(model, *pair, ["resid_pre"], lrp=rules)["resid_pre"]

    hot, rows = scores(Temperature(temperature=2.0)), scores(TwoPoint(two_point=("ln", "identity")))
    torch.testing.assert_close(scores(TwoPointTemperature(temperature=2.0)), hot)
    torch.testing.assert_close(scores(TwoPointTemperature(temperature=1.0, two_point=("ln", "identity"))), rows)
    both = scores(TwoPointTemperature(temperature=2.0, two_point=("ln", "identity")))
    assert min((both - hot).abs().max(), (both - rows).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["neox", "qwen2"])
def test_the_method_has_atp_star_for_queries_and_keys(name, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    family, nodes = model.config.family, ["head_q", "resid_pre", "k", "v"]
    got = method("twopoint", family).scores(model, *pair, nodes, relp.logit_diff)
    assert list(got) == nodes
    by_rule = relp.attribute(model, *pair, ["resid_pre", "v"], lrp=TWO_POINT[family])
    for node, wanted in (by_rule | atp_star.attribute(model, *pair, ["head_q", "k"])).items():
        assert torch.equal(got[node], wanted) and wanted.any()
    only = method("twopoint", family).scores(model, *pair, ["mlp_out"], relp.logit_diff)
    assert torch.equal(only["mlp_out"], relp.attribute(model, *pair, ["mlp_out"], lrp=TWO_POINT[family])["mlp_out"])
