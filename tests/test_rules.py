"""Table 1: each rule against its formula by hand, what the rules must leave as it is, and what they must conserve."""

import dataclasses
import itertools
import math

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES
from torch.nn.functional import gelu, linear, silu

import models
import relp
from models import Rules, from_pretrained


def rho(f, x):
    """What backward returns for f(x) under a random relevance signal: the coefficients of its input; and the signal."""
    x = x.clone().requires_grad_()
    y = f(x)
    signal = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    return torch.autograd.grad(y, x, signal)[0], signal


@pytest.fixture
def x():
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x[0, 0] = 0  # no rule may divide by an activation
    return x


@pytest.fixture
def weight():
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def bias(request):
    return torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) if request.param else None


@pytest.mark.parametrize("centre", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_ln_rule(centre, x):
    def norm(x, rules):
        return rules.norm(x - x.mean(-1, keepdim=True) if centre else x, 1e-5)

    got, s = rho(lambda x: norm(x, Rules(ln=True)), x)
    mean = x.mean(-1, keepdim=True) if centre else 0
    scale = ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    wanted = s * scale
    if centre:
        wanted = wanted - wanted.mean(-1, keepdim=True)  # the mean is subtracted on the way back as well
    torch.testing.assert_close(got, wanted)
    plain, _ = rho(lambda x: norm(x, Rules()), x)
    assert (plain - wanted).abs().max() > 0.01


ACTIVATIONS = {"gelu": gelu, "silu": silu, "swish": silu}  # PyTorch's own; the others are GELU's approximation by tanh


@pytest.mark.parametrize("act", models.PHI)
def test_identity_rule(act, x):
    def reference(x):
        return ACTIVATIONS[act](x) if act in ACTIVATIONS else gelu(x, approximate="tanh")

    phi = models.PHI[act]
    torch.testing.assert_close(Rules(identity=True).activation(x, phi), reference(x), atol=1e-12, rtol=1e-9)
    got, s = rho(lambda x: Rules(identity=True).activation(x, phi), x)
    wanted = torch.where(x == 0, 0.5, reference(x) / x) * s
    torch.testing.assert_close(got, wanted)
    plain, _ = rho(lambda x: Rules().activation(x, phi), x)
    torch.testing.assert_close(plain, rho(reference, x)[0])


@pytest.mark.parametrize("name", ["llama", "gemma2"], ids=["one kernel", "by hand"])
def test_ah_rule_keeps_the_values_and_drops_the_pattern(name, checkpoint):
    model, g = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64), torch.Generator().manual_seed(5)
    c = model.config
    mask, p = models.causal_mask(0, 6, 6, None, "cpu"), models.Pass(Rules())
    q, k, v, signal = (x.requires_grad_() for x in torch.randn(4, 2, 6, c.n_heads, c.d_head, generator=g).double())
    pattern = models.attention_scores(q, k, c).masked_fill(mask, -torch.inf).softmax(-1)
    for rules in (Rules(), Rules(ah=True)):
        z = rules.attention(q, k, v, mask, c, p)
        torch.testing.assert_close(z, torch.einsum("bqhk,bkhd->bqhd", pattern, v))
        of_q, of_k, of_v = torch.autograd.grad(z, (q, k, v), signal, allow_unused=True)
        torch.testing.assert_close(of_v, torch.einsum("bqhk,bqhd->bkhd", pattern, signal))
        assert (of_q is None and of_k is None) if rules.ah else min(of_q.abs().max(), of_k.abs().max()) > 0.01


def test_half_rule(x):
    g = torch.randn_like(x)
    for rules, share in ((Rules(half=True), 0.5), (Rules(), 1)):
        got, s = rho(lambda x, rules=rules: rules.gate(x, g), x)
        torch.testing.assert_close(got, share * g * s)
        got, s = rho(lambda x, rules=rules: rules.gate(g, x), x)
        torch.testing.assert_close(got, share * g * s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_rule_is_exact_down_to_the_smallest_numbers(dtype):
    # subnormal: half of an odd one is not representable
    tiny = torch.arange(1, 9) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert torch.equal(Rules(half=True).gate(tiny.to(dtype), torch.ones(8, dtype=dtype)), tiny.to(dtype))


def test_epsilon_rule(x, weight, bias):
    eps = 0.3
    got, s = rho(lambda x: Rules(epsilon=eps).linear(x, weight, bias), x)
    y = linear(x, weight, bias)
    torch.testing.assert_close(x * got, torch.einsum("bi,ji,bj->bi", x, weight, y * s / (y + eps * y.sign())))


def test_gamma_rule(x, weight, bias):
    gamma = 0.25
    got, s = rho(lambda x: Rules(gamma=gamma).linear(x, weight, bias), x)
    wanted = torch.zeros_like(x)
    for n, j in itertools.product(range(len(x)), range(len(weight))):
        # R_i = (share of contribution i in y_j) R_j, one by one
        z = torch.cat([x[n] * weight[j], x.new_zeros(1) if bias is None else bias[j : j + 1]])
        y = z.sum()
        z = z + gamma * (z.clamp(min=0) if y > 0 else z.clamp(max=0))
        wanted[n] += z[:-1] / z.sum() * y * s[n, j]
    torch.testing.assert_close(x * got, wanted)


def test_gamma_rule_is_montavons_where_everything_is_positive(x, weight):
    x, gamma = x.abs(), 0.25
    rules = Rules(gamma=gamma)
    _, s = rho(lambda x: rules.linear(x, weight, None), x)
    y, boosted = x @ weight.T, weight + gamma * weight.clamp(min=0)
    wanted = x * ((y * s / (x @ boosted.T) * (y > 0)) @ boosted)
    only_positive, _ = rho(lambda x: rules.linear(x, weight, None) * (x @ weight.T > 0), x)
    torch.testing.assert_close(x * only_positive, wanted)


@pytest.mark.parametrize("gamma", [0.5, 100.0])
def test_gamma_rule_in_half_precision_does_not_overflow(gamma):
    """float16 holds y and its contributions, but not the boosted sum: value and gradient are right all the same."""
    x, bias = 300 * torch.ones(1, 4), torch.tensor([0.0, 30000, 10])
    weight = torch.tensor([[50.0, 50, 50, 50], [100, -50, 100, -50], [-50, -50, -50, -50]])
    largest, y = torch.finfo(torch.float16).max, linear(x, weight, bias)
    assert (y.abs() > 59000).all() and (y.abs() < largest).all()
    boosted = models.y_gamma(x.half(), weight.half(), bias.half(), y.half(), gamma)
    assert boosted.isfinite().all() and (boosted.abs() > largest).all()
    for output in range(3):
        got = {}
        for dtype in (torch.float16, torch.float64):
            leaf, w, b = x.to(dtype).requires_grad_(), weight.to(dtype), bias.to(dtype)
            value = Rules(gamma=gamma).linear(leaf, w, b)
            assert value.dtype == dtype and torch.equal(value, linear(leaf, w, b)) and value.isfinite().all()
            got[dtype] = torch.autograd.grad(value[0, output], leaf)[0].double()
        torch.testing.assert_close(got[torch.float16], got[torch.float64], atol=0.05, rtol=1e-3)


def test_gamma_rule_with_logits_near_the_end_of_float16(checkpoint, tokens):
    """A whole model whose logits reach 60000: under the gamma-rule they are finite, and the same to the last bit."""
    model = from_pretrained(str(checkpoint("llama")[0]), dtype=torch.float16)
    model.unembed_tokens.weight.mul_(6e4 / float(model(tokens).abs().max()))
    plain, largest = model(tokens), torch.finfo(torch.float16).max
    assert plain.isfinite().all() and plain.abs().max() > 59000
    assert plain.abs().max() * (1 + 0.5) > largest  # the boosted sum is larger still
    for rules in (Rules(gamma=0.5), Rules(True, True, True, True, gamma=10.0)):
        stream, acts = relp.record(model, tokens, ("resid_pre",), rules, grad=True)
        logits = model.unembed(stream, rules)
        assert torch.equal(logits, plain)
        # 1e-4: gradients of logits as large as these need not fit float16 themselves
        for grad in torch.autograd.grad((1e-4 * logits[:, -1, :4]).sum(), list(acts.values())):
            assert grad.isfinite().all() and grad.abs().max() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Sets of rules: what is one, and what is refused


@pytest.mark.parametrize("value", [0, 0.0, -1, math.nan, math.inf, -math.inf, 1e-13, 1e13, False], ids=repr)
@pytest.mark.parametrize("name", ["epsilon", "gamma"])
def test_numbers_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match="^give epsilon or gamma, a number from 1e-12 to 1e12, got "):
        Rules(**{name: value})
    with pytest.raises(ValueError, match="epsilon or gamma"):
        dataclasses.replace(Rules(ln=True), **{name: value})


def test_epsilon_and_gamma_together_are_refused():
    with pytest.raises(ValueError, match="epsilon or gamma"):
        Rules(epsilon=0.1, gamma=0.1)
    with pytest.raises(ValueError, match="epsilon or gamma"):
        dataclasses.replace(Rules(ln=True, epsilon=0.1), gamma=0.1)
    assert Rules(gamma=1).gamma == 1 and Rules(epsilon=1e-9).epsilon == 1e-9  # whole and small numbers are numbers


@pytest.mark.parametrize("lrp", ["none", "paper", "", None, 0, 1, 0.5, {"ln": True}, ("ln",), Rules], ids=repr)
def test_what_is_neither_a_bool_nor_rules_is_refused(lrp, checkpoint, pair):
    """Nothing is guessed: as a condition, "none" would have been true, and 0 false."""
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    stream = model.stream(pair[0])
    for call in (
        lambda: model(pair[0], lrp=lrp),
        lambda: model.stream(pair[0], lrp),
        lambda: model.unembed(stream, lrp),
        lambda: model.block(0, stream, lrp),
        lambda: relp.attribute(model, *pair, ["mlp_out"], lrp=lrp),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == f"lrp must be True (the paper's rules), False (none) or Rules(...), got {lrp!r}"


ALL_RULES = [Rules(*bits) for bits in itertools.product([False, True], repeat=4)] + [
    Rules(True, True, True, True, epsilon=0.1),
    Rules(ln=True, gamma=0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_are_bit_identical_under_every_rule_set(name, dtype, checkpoint, tokens):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=dtype)
    with torch.no_grad():
        plain = model(tokens)
    assert plain.isfinite().all()
    for rules in [True, *ALL_RULES]:
        stream, _ = relp.record(model, tokens, (), rules, grad=True)
        assert torch.equal(model.unembed(stream, rules), plain), rules


def test_paper_rules_are_table_4(checkpoint):
    paper = {name: from_pretrained(str(checkpoint(name)[0])).rules(True) for name in FAMILIES}
    assert paper["gpt2"] == paper["neox"] == Rules(ln=True, identity=True)
    assert paper["qwen2"] == paper["gemma2"] == paper["llama"] == Rules(ln=True, identity=True, half=True)


class HalfGate(Rules):
    """Rules of a reader's own: both factors of a gate get half, whatever is said of the Half-rule."""

    def gate(self, a, b):
        y = super().gate(a, b)
        return y if self.half else models.backward_as(y, 0.5 * y)


class NoActivation(Rules):
    """The same: nothing passes through the activation function."""

    def activation(self, x, phi):
        return super().activation(x, phi).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*FAMILIES, "qwen3"])
def test_a_subclass_of_rules_is_enough(name, dtype, checkpoint, pair):
    """What it says is done: scores change in the layers whose gradient it changes, and logits do not at all."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=dtype)
    gated, last = model.config.gated, model.config.n_layers - 1
    with torch.no_grad():
        plain = model(pair[0])
    for mine, others in ((HalfGate, {}), (HalfGate, {"ln": True}), (NoActivation, {}), (NoActivation, {"half": True})):
        stream, _ = relp.record(model, pair[0], (), mine(**others), grad=True)
        assert torch.equal(model.unembed(stream, mine(**others)), plain)
        got, table_1 = (
            relp.attribute(model, *pair, ["resid_pre", "mlp_hidden"], lrp=rules(**others)) for rules in (mine, Rules)
        )
        for layer in range(model.config.n_layers):
            changed = not torch.equal(got["resid_pre"][:, layer], table_1["resid_pre"][:, layer])
            assert changed == (gated or mine is NoActivation), (mine, others, layer)
        # after the last layer's neurons comes no activation and no gate
        assert torch.equal(got["mlp_hidden"][:, last], table_1["mlp_hidden"][:, last])
    if gated:  # HalfGate is the Half-rule under another name
        half, own = (relp.attribute(model, *pair, ["resid_pre"], lrp=rules) for rules in (Rules(half=True), HalfGate()))
        assert torch.equal(half["resid_pre"], own["resid_pre"])


# ---------------------------------------------------------------------------------------------------------------------
# Conservation


def relevance_by_layer(model, tokens, answers, rules):
    """Sum over positions and dimensions of x . rho at each layer's resid_pre, per prompt; and the metric."""
    stream, acts = relp.record(model, tokens, ("resid_pre",), rules, grad=True)
    value = relp.read_out(model, stream, answers, lrp=rules)
    rho = torch.autograd.grad(value.sum(), list(acts.values()))
    return torch.stack([(x * r).flatten(1).sum(1) for x, r in zip(acts.values(), rho)], dim=1).detach(), value.detach()


@pytest.mark.parametrize(
    "rules", [Rules(True, True, True, True), Rules(True, True, True, True, gamma=0.3)], ids=["0-rule", "gamma"]
)
@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "gemma2-mha-no-caps", "gpt2", "neox", "neox-sequential"])
def test_relevance_is_conserved(name, rules, checkpoint, tokens):
    """With all rules and no bias to keep a share, a layer's relevances sum to the metric; without AH they do not."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    for n, p in model.named_parameters():
        if n.endswith("bias"):
            p.zero_()
    answers = tokens[:, :2]
    relevance, value = relevance_by_layer(model, tokens, answers, rules)
    torch.testing.assert_close(relevance, value[:, None].expand_as(relevance), atol=1e-10, rtol=1e-10)
    relevance, value = relevance_by_layer(model, tokens, answers, Rules(True, True, True, ah=False))
    assert (relevance[:, 0] - value).abs().max() > 1e-3


def test_epsilon_rule_absorbs_relevance(checkpoint, tokens):
    model = from_pretrained(str(checkpoint("llama")[0]), dtype=torch.float64)
    losses = []
    for eps in (1e-9, 1e-1):
        relevance, value = relevance_by_layer(model, tokens, tokens[:, :2], Rules(True, True, True, True, epsilon=eps))
        losses.append((relevance[:, 0] - value).abs().max())
    assert losses[0] < 1e-5 < losses[1]


class PlainQueries(Rules):
    """The LN-rule, but not on the norms of queries and keys."""

    qk = Rules()


@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_norms_on_queries_and_keys_can_have_rules_of_their_own(name, checkpoint, tokens):
    """Then the gradient is that of a model whose qk norms have no rule; logits stay."""
    model = from_pretrained(str(checkpoint(name)[0])).requires_grad_(True)

    def gradient(rules):
        model.zero_grad()
        logits = model(tokens, rules)
        logits[:, -1, 3].sum().backward()
        return logits, model.embed_tokens.weight.grad.clone()

    (plain, by_all), (logits, found) = gradient(Rules(ln=True)), gradient(PlainQueries(ln=True))
    assert torch.equal(plain, logits) and not torch.allclose(found, by_all, rtol=1e-3)
    for block in model.blocks:  # by hand: these norms are called without rules
        for norm in (block.attn.q_norm, block.attn.k_norm):
            norm.forward = lambda x, p, norm=norm: type(norm).forward(norm, x, models.Pass(Rules()))
    torch.testing.assert_close(gradient(Rules(ln=True))[1], found)
