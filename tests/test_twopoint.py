"""The two-point rules: each against its formula and against what it must take to what, the tape, and what they cost."""

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES, VOCAB

import models
import relp
from models import ROWS, TWO_POINT, Rules, from_pretrained


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(2)
    original, answers = torch.randint(VOCAB, (4, 9), generator=g), torch.randint(VOCAB, (4, 2), generator=g)
    patch = original.clone()
    patch[:, 3] = (patch[:, 3] + 5) % VOCAB
    patch[:2, 6] = (patch[:2, 6] + 7) % VOCAB
    return original, patch, answers


@pytest.fixture
def xs():
    """x, x' and two more; some numbers of x' are x's or next to them."""
    x, y, u, v = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).unbind(0)
    y[0], y[1] = x[0], x[1] + 1e-9
    return x, y, u, v


def carried(rule, inputs, patch):
    """The value of rule(*inputs), and what its linear map makes of patch - inputs (its gradient, forward)."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = rule(*inputs)
    basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    rows = torch.autograd.grad(out, inputs, basis, is_grads_batched=True)
    return out.detach(), sum((r * (p - x)).flatten(1).sum(1) for r, p, x in zip(rows, patch, inputs)).view(out.shape).detach()


class Identity(torch.nn.Module):
    def forward(self, x, run):
        return x


def hidden(scores):
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)


# rule(x...) with the patch run's values bound; the function that it is a rule for
PIECES = {
    "RMSNorm": (lambda *p: lambda x: models.ln_rule(x, 1e-5, False, *p), lambda x: models.ln_rule(x, 1e-5, False), 1),
    **{
        act: (lambda *p, g=gate: lambda x: models.identity_rule(x, g, False, *p), lambda x, g=gate: x * g(x), 1)
        for act, gate in models.GATES.items()
    },
    "gate": (lambda *p: lambda x, g: models.half_rule(x, g, False, p[0]), torch.mul, 2),
    "matrix product": (
        lambda *p: lambda x, g: models.half_rule(x, g, False, p[0], product=lambda a, b: a @ b.T),
        lambda a, b: a @ b.T,
        2,
    ),
    "softmax": (lambda *p: lambda x: models.softmax_rule(x, *p), lambda x: x.softmax(-1), 1),
    "hidden keys": (
        lambda *p: lambda x: models.softmax_rule(hidden(x[:, :5]), hidden(p[0][:, :5])),
        lambda x: hidden(x[:, :5]).softmax(-1),
        1,
    ),
    "peaked softmax": (
        lambda *p: lambda x: models.softmax_rule(200 * x, 200 * p[0]),
        lambda x: (200 * x).softmax(-1),
        1,
    ),
}


@pytest.mark.parametrize("piece", PIECES)
def test_each_rule_carries_the_whole_difference(piece, xs):
    rule, f, n = PIECES[piece]
    inputs, patch = (xs[0], xs[2])[:n], (xs[1], xs[3])[:n]
    value, got = carried(rule(*patch), inputs, patch)
    assert torch.equal(value, f(*inputs))
    torch.testing.assert_close(got, f(*patch) - f(*inputs), atol=1e-10, rtol=1e-9)
    _, tangent = carried(f, inputs, patch)
    assert (tangent - got).abs().max() > 1e-2  # the gradient does not


@pytest.mark.parametrize("piece", PIECES)
def test_where_the_runs_agree_it_is_the_gradient(piece, xs):
    rule, f, n = PIECES[piece]
    inputs, direction = (xs[0], xs[2])[:n], [x + d for x, d in zip((xs[0], xs[2])[:n], xs[2:])]
    _, got = carried(rule(*inputs), inputs, direction)
    _, wanted = carried(f, inputs, direction)
    torch.testing.assert_close(got, wanted, atol=1e-8, rtol=1e-8)


def test_formulas(xs):
    """Each rule's gradient against its formula by hand, for a random signal."""
    x, y, u, signal = xs
    rho = lambda f, x: torch.autograd.grad(f(x := x.clone().requires_grad_()), x, signal)[0]
    r0, r1 = ((z.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for z in (x, y))
    m = (x + y) / 2
    c = 2 * r0**2 * r1**2 / (r0 + r1) / x.shape[-1]
    wanted = signal * (r0 + r1) / 2 - m * c * (m * signal).sum(-1, keepdim=True)
    torch.testing.assert_close(rho(lambda x: models.ln_rule(x, 1e-5, False, y), x), wanted)
    torch.testing.assert_close(rho(lambda x: models.half_rule(x, u, False, y), x), signal * u)
    torch.testing.assert_close(rho(lambda u: models.half_rule(x, u, False, y), u), signal * y)
    z = y.roll(1, 0)  # nowhere near x
    gelu = torch.nn.functional.gelu
    got = rho(lambda x: models.identity_rule(x, models.GATES["gelu"], False, z), x)
    torch.testing.assert_close(got, signal * (gelu(z) - gelu(x)) / (z - x), atol=1e-9, rtol=1e-7)
    a, b = x.softmax(-1), z.softmax(-1)
    mean = (b - a) / (b.log() - a.log())
    jacobian = torch.diag_embed(mean) - mean[..., None] * mean[..., None, :] / mean.sum(-1)[..., None, None]
    got = rho(lambda x: models.softmax_rule(x, z), x)
    torch.testing.assert_close(got, (jacobian @ signal[..., None]).squeeze(-1), atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_bit_identical(name, dtype, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=dtype)
    original, patch, answers = pair
    with torch.no_grad():
        plain = [model(tokens) for tokens in (original, patch)]
    for rules in (TWO_POINT, *(Rules(True, True, True, two_point=(row,)) for row in ROWS), Rules(ah=True, two_point=ROWS)):
        rules = rules.taped()
        with torch.no_grad():
            assert torch.equal(model(patch, rules), plain[1])
        rules.tape.playing = True
        stream, _ = relp.record(model, original, (), rules, grad=True)
        assert torch.equal(model.unembed(stream, rules), plain[0]), rules
        assert not rules.tape


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_stream_carries_the_whole_difference(name, checkpoint, pair):
    """At every layer, the scores of the residual stream sum to the difference of the two runs' metrics. A tape that is
    read out of step, or a piece without its rule, breaks this; so does the gradient, and so do RelP's rules."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    first, last, _ = relp.compare(model, *pair, ["resid_pre"])

    def gap(lrp, nodes=("resid_pre",)):
        scores = relp.attribute(model, *pair, nodes, lrp=lrp)["resid_pre"]
        return float(((scores.sum(-1) - (last - first)[:, None]) / (last - first).abs().max()).abs().max())

    assert gap(TWO_POINT) < 1e-8
    assert gap(TWO_POINT, ("resid_pre", "pattern")) < 1e-8  # attention that shows its pattern
    c = model.config
    at_work = {"ln", "identity", "attention"} | ({"half"} if c.gated else set()) | ({"softcap"} if c.logit_softcap else set())
    for row in ROWS:
        without = gap(Rules(two_point=tuple(r for r in ROWS if r != row)))
        assert without > 1e-3 if row in at_work else without < 1e-8
    assert gap(False) > 1e-3 and gap(True) > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_runs_give_the_gradient(name, checkpoint, pair):
    """Every two-point rule is then the derivative: rho is AtP's, not RelP's."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    original, _, answers = pair
    keys = ("resid_pre", "attn_out", "mlp_out")
    wanted = relp.coefficients(model, original, answers, keys)[1]
    _, rules = relp.run_patch(model, original, answers, keys, lrp=TWO_POINT)
    got = relp.coefficients(model, original, answers, keys, lrp=rules)[1]
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key], atol=1e-6, rtol=1e-6)


def test_linear_pieces_are_no_business_of_theirs(checkpoint, pair):
    """A stack of linear layers: AtP, RelP and the two-point rules agree, under the same tape."""
    model = from_pretrained(str(checkpoint("gpt2")[0]), dtype=torch.float64)
    for block in model.blocks:  # nothing but the embedding reaches the final norm
        for layer in (block.attn.o, block.mlp.down):
            layer.weight.data.zero_(), layer.bias.data.zero_()
    model.ln_f = Identity()
    scores = [relp.attribute(model, *pair, ["resid_pre"], lrp=lrp)["resid_pre"] for lrp in (False, True, TWO_POINT)]
    first, last, _ = relp.compare(model, *pair, ["resid_pre"])
    for s in scores:
        torch.testing.assert_close(s, scores[0])
        torch.testing.assert_close(s.sum(-1), (last - first)[:, None].expand(-1, s.shape[1]))


def test_two_forward_passes_and_one_backward(checkpoint, pair, monkeypatch):
    model, calls, backward = from_pretrained(str(checkpoint("gpt2")[0])), [], []
    block, grad = type(model).block, torch.autograd.grad
    monkeypatch.setattr(type(model), "block", lambda self, *a, **k: calls.append(a[0]) or block(self, *a, **k))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: backward.append(1) or grad(*a, **k))
    relp.attribute(model, *pair, ["resid_pre", "mlp_out"], lrp=TWO_POINT)
    assert len(calls) == 2 * model.config.n_layers and len(backward) == 1


def test_features_sum_to_the_node(checkpoint, pair):
    model = from_pretrained(str(checkpoint("qwen2")[0]), dtype=torch.float64)

    class Halves:  # an autoencoder that leaves half of x as the error
        W_dec = 0.5 * torch.eye(model.config.d_model, dtype=torch.float64)
        encode = staticmethod(lambda x: x)
        error = staticmethod(lambda x: 0.5 * x)

    scores = relp.attribute_features(model, *pair, {("mlp_out", 1): Halves()}, lrp=TWO_POINT)["mlp_out", 1]
    wanted = relp.attribute(model, *pair, ["mlp_out"], lrp=TWO_POINT)["mlp_out"][:, 1]
    torch.testing.assert_close(scores.sum(-1), wanted)


def test_the_tape_notices_and_rules_without_one_are_refused(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    original, patch, answers = pair
    _, rules = relp.run_patch(model, patch, answers, (), lrp=TWO_POINT)
    with pytest.raises(ValueError, match="does not do what the patch run did"):
        relp.coefficients(model, original[:, :-1], answers, ("mlp_out",), lrp=rules)
    with pytest.raises(ValueError, match="need a patch run"):
        model(original, lrp=TWO_POINT)
    with pytest.raises(ValueError, match="no two-point rule for 'attn'"):
        Rules(two_point=("attn",))
