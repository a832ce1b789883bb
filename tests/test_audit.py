"""The audit passes what is right and names what is not; relevance is conserved where theory says so."""

import math

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES

import models
from beyond import audit as command
from beyond import conservation as bars
from beyond.audit import audit
from beyond.conservation import conservation
from beyond.rivals import HalfProducts
from beyond.twopoint import TwoPoint
from models import Pass, Rules, from_pretrained

ALL = Rules(True, True, True, True)
RULE_SETS = [
    *(False, True, ALL, Rules(epsilon=0.5), Rules(ln=True, gamma=0.5)),
    *(Rules(**{rule: True}) for rule in ("ln", "identity", "half", "ah")),
    *(HalfProducts(identity=True), HalfProducts(ln=True, half=True, temperature=2.0)),
]


@pytest.fixture
def load(checkpoint):
    return lambda name: from_pretrained(str(checkpoint(name)[0]), torch.float64)


def blames(model, tokens, rules) -> str:
    with pytest.raises(ValueError, match="^the rules in use are not those requested: .*$") as error:
        audit(model, tokens, rules)
    return str(error.value).removeprefix("the rules in use are not those requested: ")


# ---------------------------------------------------------------------------------------------------------------------
# What is right passes


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "moe" not in name])
def test_every_family_and_rule_passes_and_is_counted(name, load, tokens):
    model = load(name)
    n, n_norms = model.config.n_layers, sum(hasattr(m, "eps") for m in model.modules())
    linear = {"Linear": n * (7 if model.config.gated else 6), "Transformer": 1}
    calls = {
        **{"ln": {"Norm": n_norms}, "identity": {"MLP": n}, "ah": {"Attention": n}},
        **{"half": {"MLP": n} if model.config.gated else {}, "epsilon": linear, "gamma": linear},
        **{"temperature": {"Attention": n}, "products": {"Attention": n}},
    }
    for lrp in RULE_SETS:
        asked = {rule for rule, value in vars(model.rules(lrp)).items() if value is True or value in (0.5, 2.0)}
        asked |= {"products"} if isinstance(lrp, HalfProducts) else set()
        assert audit(model, tokens, lrp) == {rule: calls[rule] for rule in asked}


def test_saturated_models_pass(load, tokens):
    """All weights times 10: attention looks at one key, and scores are sums of large numbers that cancel."""
    for name in ("gpt2", "gemma2"):
        model = load(name)
        for p in model.parameters():
            p.mul_(10)
        for rules in (False, ALL, Rules(gamma=0.1), Rules(gamma=1e-6), Rules(epsilon=1e-4)):
            audit(model, tokens, rules)


def test_where_a_rule_does_not_matter(load, tokens):
    """A prompt of one token has nothing to choose from; a model without gates has nothing to halve."""
    assert audit(load("llama"), tokens[:, :1], Rules(ah=True)) == {"ah": {"Attention": 0}}
    assert audit(load("gpt2"), tokens, Rules(half=True)) == {"half": {}}


def test_it_leaves_nothing_behind(load, tokens, monkeypatch):
    model = load("gemma2")
    audit(model, tokens)
    monkeypatch.setattr(Rules, "activation", lambda self, x, phi: (x * phi(x)).detach())
    blames(model, tokens, True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_what_cannot_be_audited(load, tokens):
    with pytest.raises(ValueError, match="two-point rules need both runs"):
        audit(load("gpt2"), tokens, TwoPoint())
    with pytest.raises(ValueError, match="the audit has no formula for Experts"):
        audit(load("qwen3-moe"), tokens)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is named

DISABLED = {  # the method of Rules that works as in Rules(): (a request, the rule to blame, where in a layer)
    "norm": (ALL, "ln", "ln1"),
    "activation": (ALL, "identity", "mlp"),
    "gate": (ALL, "half", "mlp"),
    "attention": (ALL, "ah", "attn"),
    "linear": (Rules(gamma=0.5), "gamma", "attn.q"),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("off", DISABLED)
def test_a_disabled_rule_is_named(off, name, load, tokens, monkeypatch):
    model, (rules, rule, where), method = load(name), DISABLED[off], getattr(Rules, off)
    monkeypatch.setattr(Rules, off, lambda self, *inputs: method(Rules(), *inputs))
    if off == "gate" and not model.config.gated:  # a rule that has nothing to do here is not missed
        assert audit(model, tokens, rules)["half"] == {}
        return
    says = blames(model, tokens, rules)
    assert says.startswith(f"{rule}: changed no gradient in ") and ";" not in says
    assert all(f"blocks.{layer}.{where}" in says for layer in range(3))
    assert ("ln_f" in says, "unembedding" in says) == (rule == "ln", rule == "gamma")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rule_that_is_always_on_is_named(name, load, tokens, monkeypatch):
    monkeypatch.setattr(models, "const", lambda x, on: x.detach())
    says = blames(load(name), tokens, False)
    assert all(f"{rule}: applied unasked in " in says for rule in ("ln", "identity", "ah"))


@pytest.mark.parametrize("part, rules, off, says", [
    ("blocks.1.mlp", ALL, Rules(True, False, True, True), "identity: changed no gradient"),
    ("blocks.2.ln2", ALL, Rules(), "ln: changed no gradient"),
    ("ln_f", ALL, Rules(), "ln: changed no gradient"),
    ("blocks.0.attn", ALL, Rules(True, True, True, False), "ah: changed no gradient"),
    ("blocks.1.attn.k", Rules(epsilon=1e-3), Rules(), "epsilon: changed no gradient"),
    ("blocks.1.mlp.up", Rules(gamma=0.1), Rules(), "gamma: changed no gradient"),
    ("blocks.1.attn", HalfProducts(temperature=2.0), HalfProducts(), "temperature: changed no gradient"),
    ("blocks.1.attn", HalfProducts(), Rules(), "products: changed no gradient"),
    ("blocks.1.ln1", Rules(identity=True), Rules(ln=True), "ln: applied unasked"),
    ("blocks.2.attn", Rules(), Rules(ah=True), "ah: applied unasked"),
])  # fmt: skip
def test_one_module_of_one_layer_is_enough(part, rules, off, says, load, tokens):
    """The rest of the model follows the rules; the text names the one that does not, and no other."""
    model = load("qwen2")
    module = model.get_submodule(part)
    forward = module.forward
    module.forward = lambda x, p: forward(x, Pass(off, p.hook, p.layer))
    assert blames(model, tokens, rules) == f"{says} in {part}"


def only_gradient(x):
    """0, but with the gradient of x."""
    return x - x.detach()


def half_const(x):
    return 0.5 * x + 0.5 * x.detach()


WRONG = {  # mistake: (method of Rules, what makes a wrong one of the right one, a request, the rule named)
    "more than half": (
        "gate", lambda f: lambda self, a, b: f(self, a, b) + 0.1 * only_gradient(a * b), Rules(half=True), "half",
    ),
    "half of one factor": ("gate", lambda f: lambda self, a, b: a * half_const(b), Rules(half=True), "half"),
    "ln of the mean": (
        "norm", lambda f: lambda self, x, eps: f(self, x, eps) + 0.2 * only_gradient(x), Rules(ln=True), "ln",
    ),
    "half an identity": (
        "activation", lambda f: lambda self, x, phi: x * (0.4 * phi(x) + 0.6 * phi(x).detach()), Rules(identity=True),
        "identity",
    ),
    "half a pattern": (
        "attention", lambda f: lambda self, q, k, *rest: f(Rules(), half_const(q), half_const(k), *rest),
        Rules(ah=True), "ah",
    ),
    "values as well": (
        "attention", lambda f: lambda self, q, k, v, *rest: f(self, q, k, half_const(v), *rest), Rules(ah=True), "ah",
    ),
    "epsilon too large": (
        "linear", lambda f: lambda self, *x: f(Rules(epsilon=2 * self.epsilon), *x), Rules(epsilon=0.1), "epsilon",
    ),
    "gamma too large": (
        "linear", lambda f: lambda self, *x: f(Rules(gamma=2 * self.gamma), *x), Rules(gamma=0.1), "gamma",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_rule_with_another_gradient_is_named(wrong, load, tokens, monkeypatch):
    method, change, rules, rule = WRONG[wrong]
    model = load("qwen2")
    monkeypatch.setattr(Rules, method, change(getattr(Rules, method)))
    assert blames(model, tokens, rules).startswith(f"{rule}: not the gradient owed in ")


# ---------------------------------------------------------------------------------------------------------------------
# Conservation


@pytest.fixture
def conserve(load, tokens):
    def run(name, lrp, biased=False):
        model = load(name)
        for n, p in model.named_parameters():
            if n.endswith("bias") and not biased:
                p.zero_()
        return conservation(model, tokens, tokens[:, :2], lrp=lrp)

    return run


@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2-mha-no-caps", "gpt2", "neox", "neox-sequential"])
def test_all_is_kept_where_theory_says_so(name, gamma, conserve):
    """All rules, and no bias or softcap: every layer holds the whole metric."""
    found = conserve(name, Rules(True, True, True, True, gamma=gamma))
    assert found["kept"] == pytest.approx([1] * 4, abs=1e-10)
    assert found["softmax"] == pytest.approx([0] * 4, abs=1e-10) and found["rest"] == pytest.approx([0] * 4, abs=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_loss_is_laid_at_the_right_door(name, conserve):
    """Without the AH-rule the softmax loses, and nothing else; without the others, the rest; and the books balance."""
    soft, rest = conserve(name, Rules(True, True, True)), conserve(name, Rules(ah=True))
    for found in (soft, rest):
        for layer, after in enumerate([*found["kept"][1:], 1.0]):
            before = found["kept"][layer] + found["softmax"][layer] + found["rest"][layer]
            assert before == pytest.approx(after, abs=1e-6 * max(1, abs(after)))
    assert max(map(abs, soft["softmax"])) > 1e-3 and max(map(abs, rest["rest"])) > 1e-3
    assert rest["softmax"] == pytest.approx([0] * 4, abs=1e-9)
    if name != "gemma2":  # whose softcaps lose as well
        assert soft["rest"] == pytest.approx([0] * 4, abs=1e-9)
        assert conserve(name, ALL, biased=True)["softmax"] == pytest.approx([0] * 4, abs=1e-9)


def test_there_are_no_fractions_of_nothing(load, tokens):
    found = conservation(load("gpt2"), tokens, tokens[:, [0, 0]])
    assert all(math.isnan(x) for x in found["kept"])


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def test_the_audits_command(tmp_path, capsys, monkeypatch):
    given = ["--model", "toy-gpt2", "--pairs", "3", "--out", str(tmp_path)]
    command.main([*given, "--methods", "ap,atp,relp,gim,gamma=0.1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["RelP", "ln", "9", "x", "Norm"] in rows and ["GIM", "products", "4", "x", "Attention"] in rows
    assert ["gamma=0.1", "gamma", "24", "x", "Linear,", "1", "x", "Transformer"] in rows
    monkeypatch.setattr(Rules, "activation", lambda self, x, phi: x * phi(x))
    with pytest.raises(ValueError, match="identity: changed no gradient in blocks.0.mlp, blocks.1.mlp"):
        command.main([*given, "--methods", "relp"])


def test_conservations_command(tmp_path, capsys):
    bars.main(["--model", "toy-gpt2", "--pairs", "3", "--rules", "ln,identity", "--out", str(tmp_path)])
    *_, head, zero, one, two, three, end = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["layer", "kept"] and zero.split()[0] == "0" and end.split()[0] == "end"
    assert float(end.split()[1]) == pytest.approx(1, abs=0.1)
