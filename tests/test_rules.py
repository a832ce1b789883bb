"""Table 1: each rule against its formula by hand, what the rules must leave alone, and what they must conserve."""

import itertools

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES

import models
import relp
from models import Rules, from_pretrained


def rho(f, x):
    """What backward returns for f(x): the propagation coefficients of its input under a random relevance signal, and that signal."""
    x = x.clone().requires_grad_()
    y = f(x)
    signal = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    return torch.autograd.grad(y, x, signal)[0], signal


@pytest.fixture
def x():
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x[0, 0] = 0  # no rule may divide by an activation
    return x


def test_ln_rule(x):
    for centre in (False, True):  # RMSNorm, LayerNorm

        def norm(x, on=True):
            return models.ln_rule(x - x.mean(-1, keepdim=True) if centre else x, 1e-5, on)

        got, s = rho(norm, x)
        mean = x.mean(-1, keepdim=True) if centre else 0
        scale = ((x - mean).pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
        wanted = s * scale
        if centre:
            wanted = wanted - wanted.mean(-1, keepdim=True)  # the mean is subtracted on the way back as well
        torch.testing.assert_close(got, wanted)
        plain, _ = rho(lambda x: norm(x, on=False), x)
        assert (plain - wanted).abs().max() > 0.01


@pytest.mark.parametrize("act", models.GATES)
def test_identity_rule(act, x):
    gate = models.GATES[act]
    reference = {
        "gelu": torch.nn.functional.gelu,
        "silu": torch.nn.functional.silu,
        "swish": torch.nn.functional.silu,
    }.get(act, lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
    torch.testing.assert_close(models.identity_rule(x, gate, True), reference(x), atol=1e-12, rtol=1e-9)
    got, s = rho(lambda x: models.identity_rule(x, gate, True), x)
    wanted = torch.where(x == 0, 0.5, reference(x) / x) * s
    torch.testing.assert_close(got, wanted)
    plain, _ = rho(lambda x: models.identity_rule(x, gate, False), x)
    torch.testing.assert_close(plain, rho(reference, x)[0])


def test_ah_rule_keeps_the_values_and_drops_the_pattern(x):
    pattern = x.softmax(-1)
    value = torch.randn(6, 3, dtype=torch.float64)
    got, s = rho(lambda v: models.ah_rule(pattern, True) @ v, value)
    torch.testing.assert_close(got, pattern.T @ s)
    assert not models.ah_rule(pattern.requires_grad_(), True).requires_grad


def test_half_rule(x):
    g = torch.randn_like(x)
    got, s = rho(lambda x: models.half_rule(x, g, True), x)
    torch.testing.assert_close(got, 0.5 * g * s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_rule_is_exact_down_to_the_smallest_numbers(dtype):
    tiny = (
        torch.arange(1, 9) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )  # subnormal: half of an odd one is not representable
    assert torch.equal(models.half_rule(tiny.to(dtype), torch.ones(8, dtype=dtype), True), tiny.to(dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_epsilon_rule(x, bias):
    w, b, eps = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if bias else None, 0.3
    got, s = rho(lambda x: models.linear_rule(x, w, b, Rules(epsilon=eps)), x)
    y = torch.nn.functional.linear(x, w, b)
    torch.testing.assert_close(x * got, torch.einsum("bi,ji,bj->bi", x, w, y * s / (y + eps * y.sign())))


@pytest.mark.parametrize("bias", [False, True])
def test_gamma_rule(x, bias):
    w, b, gamma = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if bias else None, 0.25
    got, s = rho(lambda x: models.linear_rule(x, w, b, Rules(gamma=gamma)), x)
    wanted = torch.zeros_like(x)
    for n, j in itertools.product(
        range(len(x)), range(len(w))
    ):  # R_i = (share of contribution i in y_j) R_j, one by one
        z = torch.cat([x[n] * w[j], b[j : j + 1] if bias else x.new_zeros(1)])
        y = z.sum()
        z = z + gamma * (z.clamp(min=0) if y > 0 else z.clamp(max=0))
        wanted[n] += z[:-1] / z.sum() * y * s[n, j]
    torch.testing.assert_close(x * got, wanted)


def test_gamma_rule_is_montavons_where_everything_is_positive(x):
    x, w, gamma = x.abs(), torch.randn(5, 6, dtype=torch.float64), 0.25
    got, s = rho(lambda x: models.linear_rule(x, w, None, Rules(gamma=gamma)), x)
    y, boosted = x @ w.T, w + gamma * w.clamp(min=0)
    wanted = x * ((y * s / (x @ boosted.T) * (y > 0)) @ boosted)
    only_positive, _ = rho(lambda x: models.linear_rule(x, w, None, Rules(gamma=gamma)) * (x @ w.T > 0), x)
    torch.testing.assert_close(x * only_positive, wanted)


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
    """With all rules, and no bias to keep a share, every layer's relevances sum to the metric. Without AH they do not."""
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
