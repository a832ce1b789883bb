"""The audit must pass what is right, and name what is not; relevance must be conserved where theory says so."""

import dataclasses
import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES

import evaluate
import models
import relp
from beyond import rivals, temperature, twopoint
from beyond.audit import audit
from beyond.conservation import conservation
from beyond.methods import TwoPointTemperature
from beyond.rivals import HalfProducts
from beyond.temperature import Temperature
from beyond.twopoint import ROWS, TWO_POINT, TwoPoint
from models import Rules, from_pretrained

ALL = Rules(True, True, True, True)
RULE_SETS = [
    True,
    ALL,
    False,
    Rules(epsilon=1.0),
    Rules(ln=True, gamma=0.5),
    TwoPoint(ah=True, epsilon=0.1, two_point=("ln", "identity", "half")),
    TwoPoint(epsilon=0.1, two_point=ROWS),
    *(Rules(**{rule: True}) for rule in ("ln", "identity", "half", "ah")),
    *(TwoPoint(two_point=(row,)) for row in ROWS),
    Temperature(ln=True, temperature=2.0),
    TwoPointTemperature(half=True, temperature=0.5, two_point=("identity",)),
    HalfProducts(identity=True, products=True),
    HalfProducts(half=True, temperature=2.0, products=True),
]


@pytest.fixture
def load(checkpoint):
    return lambda name, dtype=torch.float32: from_pretrained(str(checkpoint(name)[0]), dtype)


@pytest.fixture
def patch(tokens):
    patch = tokens.clone()
    patch[:, 1:4] = patch[:, 1:4].flip(1)
    return patch


def blames(model, tokens, rules, patch=None) -> str:
    """What the audit says; it must say something, in one line."""
    with pytest.raises(ValueError, match="^the rules in use are not those requested: .*$") as error:
        audit(model, tokens, rules, patch)
    return str(error.value).removeprefix("the rules in use are not those requested: ")


# ---------------------------------------------------------------------------------------------------------------------
# What is right passes


ALIKE = ("llama3", "mistral", "olmo2", "phi3", "phi3-long", "qwen3-biased-window-yarn")  # to others, for the audit


@pytest.mark.parametrize("name, dtype", [
    *((name, torch.float32) for name in CHECKPOINTS if name not in ALIKE and "moe" not in name),  # see test_experts.py
    *((name, dtype) for name in ("gpt2", "gemma3") for dtype in (torch.bfloat16, torch.float16, torch.float64)),
], ids=str)  # fmt: skip
def test_every_family_and_rule_passes_and_is_counted(name, dtype, load, tokens, patch):
    model = load(name, dtype)
    n, c = model.config.n_layers, model.config
    of_block = {"sandwich": 4, "qwen3": 4, "gemma3": 6, "olmo": 4}.get(c.block, 2)
    norm = {"LayerNorm" if c.layer_norm else "RMSNorm": n * of_block + 1}
    linear, half = {"Linear": n * (7 if c.gated else 6), "unembedding": 1}, {"MLP": n} if c.gated else {}
    calls = {
        **{"ln": norm, "identity": {"MLP": n}, "half": half, "ah": {"Attention": n}},
        **{"ln2": norm, "identity2": {"MLP": n}, "half2": half, "attention2": {"Attention": n}},
        **dict.fromkeys(("zero", "epsilon", "gamma"), linear),
        **dict.fromkeys(("temperature", "products"), {"Attention": n}),
    }
    for lrp in [*(RULE_SETS if name in FAMILIES else RULE_SETS[:6]), TWO_POINT[c.family]]:
        rules, report = model.rules(lrp), audit(model, tokens, lrp, patch)
        two_point = getattr(rules, "two_point", ())
        names = ("ln", "identity", "half", "ah", "epsilon", "gamma", "temperature", "products")
        asked = {rule for rule in names if getattr(rules, rule, None)} - set(two_point) | {
            f"{row}2" for row in two_point
        }
        asked |= set() if rules.epsilon or rules.gamma else {"zero"}
        assert report["rules"].keys() == asked
        for rule, row in report["rules"].items():
            assert row == {"requested": getattr(rules, rule, True), "applied": calls[rule]}, rule
        json.dumps(report)


@pytest.mark.parametrize("name, dtype", [
    *((name, torch.float32) for name in ("toy-gpt2", "toy-neox", "toy-qwen2", "toy-gemma2")),
    ("toy-neox", torch.float64), ("toy-gemma2", torch.bfloat16),
], ids=str)  # fmt: skip
def test_saturated_models_pass(name, dtype):
    """All weights times 3, or 10: attention looks at one key, and scores are sums of large numbers that cancel."""
    original, patch = torch.arange(24).view(2, 12) + 40, torch.arange(24).view(2, 12).flip(1) + 40
    for factor in (3, 10) if dtype == torch.float32 else (10,):
        model = from_pretrained(name, dtype)
        for p in model.parameters():
            p.mul_(factor)
        family = model.config.family
        for rules in (False, ALL, Rules(gamma=0.1), Rules(gamma=1e-6), Rules(epsilon=1e-9), TWO_POINT[family]):
            audit(model, original, rules, patch)


@pytest.mark.parametrize("rules", [Rules(gamma=g) for g in (1e-12, 1e-6, 0.01, 0.1, 1 / 3, 1e12)] + [
    Rules(ln=True, epsilon=e) for e in (1e-12, 1e-6, 0.1, 1e12)
], ids=str)  # fmt: skip
def test_every_value_in_float64(rules, load, tokens):
    for name in FAMILIES:
        audit(load(name, torch.float64), tokens, rules)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gamma_that_float32_rounds(name, load, tokens):
    """0.1 is another number in float32: in a float64 model, the formula must not be computed with that one."""
    row = audit(load(name, torch.float64), tokens, Rules(ln=True, gamma=0.1))["rules"]["gamma"]
    assert row["requested"] == 0.1 and row["applied"]["unembedding"] == 1 and "unseen" not in row


def test_what_has_no_rule_is_named(load, tokens, patch):
    def kept(name, lrp):
        return audit(load(name), tokens, lrp, patch)["no rule"]

    assert kept("gpt2", True) == ["softmax of attention"] and kept("llama", ALL) == []
    assert kept("gemma2", True) == ["softmax of attention", "softcap of attention", "softcap of the logits"]
    assert kept("gemma2", ALL) == ["softcap of the logits"]
    assert kept("qwen2", False) == ["scale of the norms", "activation", "gate", "softmax of attention"]
    assert kept("qwen2", TWO_POINT["qwen2"]) == []
    assert kept("qwen2", Temperature(temperature=2.0)) == ["scale of the norms", "activation", "gate"]


def test_two_point_rules_need_a_patch(load, tokens):
    with pytest.raises(ValueError, match="two-point rules are audited on prompts and their patch"):
        audit(load("llama"), tokens, TwoPoint(two_point=("ln",)))
    report = audit(load("llama"), tokens, TwoPoint(ln=True, two_point=("ln",)), tokens)  # one point, twice
    assert report["rules"]["ln2"] == {"requested": True, "applied": {}, "unseen": {"RMSNorm": 7}}


def test_it_leaves_nothing_behind(load, tokens):
    model = load("gemma2")
    logits = model(tokens, lrp=True)
    audit(model, tokens)
    activate = model.blocks[1].mlp.activate
    model.blocks[1].mlp.activate = lambda x, rules: activate(x, rules).detach()
    blames(model, tokens, Rules(ln=True))
    model.blocks[1].mlp.activate = activate
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(tokens, lrp=True), logits)


def test_an_epsilon_that_rounding_hides(load, tokens):
    row = audit(load("llama", torch.float64), tokens, Rules(epsilon=1e-9))["rules"]["epsilon"]
    assert row["applied"]["Linear"] == 21 and "unseen" not in row
    for dtype in (torch.float32, torch.bfloat16):
        row = audit(load("llama", dtype), tokens, Rules(epsilon=1e-9))["rules"]["epsilon"]
        assert row["applied"] == {} and row["unseen"] == {"Linear": 21, "unembedding": 1}
    row = audit(load("llama", torch.float16), tokens, Rules(epsilon=5e-5))["rules"]["epsilon"]
    assert row["applied"]["Linear"] + row["unseen"]["Linear"] == 21


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_one_token(name, load, tokens):
    """Attention has nothing to choose from: its softmax passes nothing on, with a rule and without."""
    audit(load(name), tokens[:, :1])
    for rules in (Rules(ah=True), TwoPoint(two_point=("attention",)), Temperature(temperature=2.0)):
        row = list(audit(load(name), tokens[:, :1], rules, tokens[:, 1:2])["rules"].values())[-2]
        assert row["applied"] == {} and row["unseen"]["Attention"] > 0


def test_weights_that_are_not_numbers(load, tokens):
    model = load("gpt2")
    model.blocks[1].mlp.up.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite in torch.float32"):
        audit(model, tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Fooled on purpose

DISABLED = {  # the method of Rules that works as in Rules(): (a request, the rules that are to blame)
    "norm": (ALL, {"ln"}),
    "activation": (ALL, {"identity"}),
    "gate": (ALL, {"half"}),
    "attention": (ALL, {"ah"}),
    "linear": (Rules(gamma=0.5), {"gamma"}),
    "const": (ALL, {"ln", "identity", "ah"}),  # no method: the function that makes constants
}


@pytest.mark.parametrize("name, factor", [*((name, 1) for name in FAMILIES), ("gpt2", 3), ("gemma2", 3)])
@pytest.mark.parametrize("off", DISABLED)
def test_a_disabled_rule_is_named(off, name, factor, load, tokens, monkeypatch):
    """In saturated models, too."""
    model, (rules, blamed) = load(name), DISABLED[off]
    for p in model.parameters():
        p.mul_(factor if p.ndim > 1 else 1)
    if off == "const":
        monkeypatch.setattr(models, "const", lambda x, on: x)
    else:
        method = getattr(Rules, off)
        monkeypatch.setattr(Rules, off, lambda self, *inputs: method(Rules(), *inputs))
    if off == "gate" and not model.config.gated:  # a rule that has nothing to do here is not missed
        assert audit(model, tokens, rules)["rules"]["half"]["applied"] == {}
        return
    found = dict(part.split(": changed no gradient in ") for part in blames(model, tokens, rules).split("; "))
    assert found.keys() == blamed
    where = {"ln": "ln1", "gamma": "attn.q", "ah": "attn"}
    for rule, names in found.items():
        assert all(f"blocks.{layer}.{where.get(rule, 'mlp')}" in names.split(", ") for layer in range(3))
        assert (rule == "ln") == ("ln_f" in names) and (rule == "gamma") == ("unembedding" in names)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_disabled_two_point_rule_is_named(name, row, load, tokens, patch, monkeypatch):
    """Whether the one-point rule is left in its place or nothing."""
    model, patch_run = load(name), TwoPoint.patch_run
    monkeypatch.setattr(TwoPoint, "patch_run", lambda self, of, *x: None if of == row else patch_run(self, of, *x))
    for rules in (TwoPoint(two_point=ROWS), TwoPoint(True, True, True, two_point=ROWS), TwoPoint(two_point=(row,))):
        if row == "half" and not model.config.gated:
            assert audit(model, tokens, rules, patch)["rules"]["half2"]["applied"] == {}
            continue
        says = blames(model, tokens, rules, patch)
        assert says.startswith(f"{row}2: changed no gradient in ") and ";" not in says


@pytest.mark.parametrize("name", FAMILIES)
def test_a_disabled_temperature_is_named(name, load, tokens, monkeypatch):
    monkeypatch.delattr(Temperature, "attention")
    says = blames(load(name), tokens, Temperature(ln=True, temperature=2.0))
    assert says == "temperature: changed no gradient in blocks.0.attn, blocks.1.attn, blocks.2.attn"


@pytest.mark.parametrize("name", FAMILIES)
def test_products_that_are_not_halved_are_named(name, load, tokens, monkeypatch):
    """Those of attention, or those of the gates."""
    model, rules = load(name), rivals.GIM[load(name).config.family]
    with monkeypatch.context() as m:
        m.setattr(rivals, "halved", lambda x: x)
        says = blames(model, tokens, rules)
    assert says == "products: changed no gradient in blocks.0.attn, blocks.1.attn, blocks.2.attn"
    monkeypatch.setattr(Rules, "gate", lambda self, a, b: a * b)
    if model.config.gated:
        assert blames(model, tokens, rules).startswith("half: changed no gradient in blocks.0.mlp, ")
    else:
        audit(model, tokens, rules)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rule_that_is_always_on_is_named(name, load, tokens, patch, monkeypatch):
    model = load(name)
    with monkeypatch.context() as m:
        m.setattr(models, "const", lambda x, on: x.detach())
        says = blames(model, tokens, False)
        assert all(f"{rule}: applied unasked in " in says for rule in ("ln", "identity", "ah"))
    # every row looks at the patch run, though it was not asked to
    monkeypatch.setattr(TwoPoint, "patch_run", lambda self, row, *inputs: self.notes(inputs))
    says = blames(model, tokens, TwoPoint(two_point=("attention",)), patch)
    assert says.startswith("no rule: not the gradient owed in blocks.0.ln1, ") and "blocks.0.mlp, " in says


@pytest.mark.parametrize("name", FAMILIES)
def test_one_module_of_one_layer_is_enough(name, load, tokens, patch):
    """The rest of the model follows the rules; the text names the one that does not, and no other."""

    def without(module, **off):
        forward = module.forward

        def other_rules(x, rules, *rest):
            known = {name: value for name, value in off.items() if hasattr(rules, name)}  # the plain pass has no rows
            return forward(x, dataclasses.replace(rules, **known), *rest)

        module.forward = other_rules

    for rules, part, off, says in [
        (ALL, "blocks.1.mlp", dict(identity=False), "identity: changed no gradient"),
        (ALL, "blocks.2.ln2", dict(ln=False), "ln: changed no gradient"),
        (ALL, "ln_f", dict(ln=False), "ln: changed no gradient"),
        (ALL, "blocks.0.attn", dict(ah=False), "ah: changed no gradient"),
        (Rules(epsilon=1e-3), "blocks.1.attn.k", dict(epsilon=None), "epsilon: changed no gradient"),
        (Rules(gamma=0.1), "blocks.1.mlp.up", dict(gamma=None), "gamma: changed no gradient"),
        (TwoPoint(two_point=("ln",)), "blocks.1.ln2", dict(two_point=()), "ln2: changed no gradient"),
        (Temperature(temperature=2.0), "blocks.1.attn", dict(temperature=None), "temperature: changed no gradient"),
        (HalfProducts(products=True), "blocks.1.attn", dict(products=False), "products: changed no gradient"),
        (Rules(identity=True), "blocks.1.ln1", dict(ln=True), "ln: applied unasked"),
        (Rules(), "blocks.2.attn", dict(ah=True), "ah: applied unasked"),
    ]:  # fmt: skip
        model = load(name)
        without(model.get_submodule(part), **off)
        assert blames(model, tokens, rules, patch) == f"{says} in {part}"

    model = load(name)  # a block that hands no rules on to its MLP
    forward = model.blocks[1].mlp.forward
    model.blocks[1].mlp.forward = lambda x, rules, node: forward(x, Rules(), node)
    says = blames(model, tokens, True)
    assert "identity: changed no gradient in blocks.1.mlp" in says
    assert ("half: changed no gradient in blocks.1.mlp" in says) == model.config.gated


def test_a_run_that_does_not_read_its_notes(load, tokens, patch):
    """One norm writes its notes in the patch run, and does not read them in the original run."""
    model = load("llama")
    norm = model.blocks[1].ln2
    norm.forward = lambda x, rules, forward=norm.forward: forward(x, Rules() if torch.is_grad_enabled() else rules)
    with pytest.raises(ValueError, match="the original run does not do what the patch run did"):
        audit(model, tokens, TwoPoint(two_point=ROWS), patch)


def test_activation_of_one_block(load, tokens):
    model = load("neox")
    model.blocks[2].mlp.activate = lambda x, rules: torch.nn.functional.gelu(x)
    assert "identity: changed no gradient in blocks.2.mlp" in blames(model, tokens, Rules(identity=True))


def half_const(x):
    return 0.5 * x + 0.5 * x.detach()


def only_gradient(x):
    """0, but with the gradient of x."""
    return x - x.detach()


# {mistake: (class, its method, a function of the right one that returns the wrong one, a request, what the audit says)}
WRONG = {
    "more-than-half": (
        Rules, "gate",
        lambda f: lambda self, a, b: f(self, a, b) + 0.1 * only_gradient(a * b) if self.half else f(self, a, b),
        Rules(half=True), "half: not the gradient",
    ),
    "half-of-one-factor": (
        Rules, "gate",
        lambda f: lambda self, a, b: f(Rules(), a, half_const(b)) if self.half else f(self, a, b),
        Rules(half=True), "half: not the gradient",
    ),
    "ln-of-the-mean": (
        Rules, "norm",
        lambda f: lambda self, x, eps: f(self, x, eps) + 0.2 * only_gradient(x),
        Rules(ln=True), "ln: not the gradient",
    ),
    "half-an-identity": (
        Rules, "activation",
        lambda f: lambda self, x, phi: x * (0.4 * phi(x) + 0.6 * phi(x).detach()),
        Rules(identity=True), "identity: not the gradient",
    ),
    "half-a-pattern": (
        Rules, "attention",
        lambda f: lambda self, q, k, v, attend: attend(half_const(q), half_const(k), v),
        Rules(ah=True), "ah: not the gradient",
    ),
    "values-as-well": (
        Rules, "attention",
        lambda f: lambda self, q, k, v, attend: f(self, q, k, half_const(v), attend),
        Rules(ah=True), "ah: not the gradient",
    ),
    "epsilon-too-large": (
        Rules, "linear",
        lambda f: lambda self, *x: f(Rules(epsilon=2 * self.epsilon) if self.epsilon else self, *x),
        Rules(epsilon=0.1), "epsilon: not the gradient",
    ),
    "middle-of-one-run": (
        twopoint, "mid",
        lambda f: lambda x, x_patch: f(x, f(x, x_patch)),
        TwoPoint(two_point=ROWS), "ln2: not the gradient",
    ),
    "secant-too-steep": (
        TwoPoint, "activation",
        lambda f: lambda self, x, phi: f(self, x, phi) + 0.3 * only_gradient(x),
        TwoPoint(two_point=ROWS), "identity2 + half2: not the gradient",
    ),
    "temperature-twice": (
        Temperature, "attention",
        lambda f: lambda self, *x: f(Temperature(temperature=2 * self.temperature), *x),
        Temperature(temperature=2.0), "temperature: not the gradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_rule_with_another_gradient_is_named(wrong, load, tokens, patch, monkeypatch):
    place, name, change, rules, says = WRONG[wrong]
    monkeypatch.setattr(place, name, change(getattr(place, name)))
    assert says in blames(load("qwen2"), tokens, rules, patch)


@pytest.mark.parametrize("method, flag", [("norm", "ln"), ("activation", "identity"), ("gate", "half")])
def test_one_ulp_is_enough(method, flag, load, tokens, monkeypatch):
    right = getattr(Rules, method)

    def next_larger(rules, *inputs):
        y = right(rules, *inputs)
        above = torch.nextafter(y, torch.full_like(y, torch.inf))
        return y + (above - y).detach() if getattr(rules, flag) else y

    monkeypatch.setattr(Rules, method, next_larger)
    part = "blocks.0.ln1" if flag == "ln" else "blocks.0.mlp"
    assert f"the forward pass is changed in {part}, " in blames(load("qwen2"), tokens, True)


def test_a_kind_that_it_does_not_know(load, tokens):
    class Dropout(torch.nn.Module):
        def forward(self, x, rules):
            return x

    model = load("gpt2")
    model.blocks[1].drop = Dropout()
    assert blames(model, tokens, True) == "no rule: nothing is known of Dropout blocks.1.drop"


def test_a_module_that_is_passed_by(load, tokens):
    model = load("llama")
    model.blocks[1].spare = model.blocks[1].ln2
    model.blocks[1].ln2 = model.blocks[0].ln2
    assert blames(model, tokens, True) == "no rule: never called, blocks.1.spare"


def test_a_rule_that_meets_no_module(load, tokens):
    class Straight(models.Linear):  # known to the audit, but no norm
        def __init__(self, d):
            super().__init__(d, d, False)
            self.weight = torch.nn.Parameter(torch.eye(d), requires_grad=False)

    model = load("llama")
    for block in model.blocks:
        block.ln1, block.ln2 = Straight(32), Straight(32)
    model.ln_f = Straight(32)
    assert "ln: met no module of LayerNorm or RMSNorm" in blames(model, tokens, Rules(ln=True, ah=True))


def test_a_cut_between_the_modules(load, tokens, monkeypatch):
    """Sums have no rule, and must pass on everything."""
    forward, block = models.SequentialBlock.forward, models.Transformer.block

    def leaky(self, x, rules, node, *rest):
        y = forward(self, x, rules, node, *rest)
        return y.detach() + only_gradient(x) if node.layer == 1 and rules.ln else y

    with monkeypatch.context() as m:
        m.setattr(models.SequentialBlock, "forward", leaky)
        assert blames(load("llama"), tokens, True) == "no rule: not the gradient owed in blocks.1"
    monkeypatch.setattr(models.Transformer, "block", lambda self, layer, x, *r: block(self, layer, x.detach(), *r))
    says = "no gradient passes what lies before blocks.1, blocks.2"
    assert blames(load("llama"), tokens, True) == says


def test_a_rule_that_it_does_not_know(load, tokens):
    @dataclasses.dataclass(frozen=True)
    class Own(Rules):
        own: bool = False

    assert blames(load("llama"), tokens, Own(ln=True, own=True)) == "unknown to the audit: own"
    assert audit(load("llama"), tokens, Own(ln=True))["rules"].keys() == {"ln", "zero"}


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes in the text of the source: copies of models.py and of the files with rules in beyond/, with one each

SOURCES = {"models": models, "twopoint": twopoint, "temperature": temperature, "rivals": rivals}
SOURCES = {name: Path(module.__file__).read_text(encoding="utf-8") for name, module in SOURCES.items()}
POINT = ("models", "Rules", {"ln": True, "identity": True, "half": True, "ah": True, "gamma": 0.3})
EPSILON = ("models", "Rules", {"epsilon": 0.1})
BOTH = ("twopoint", "TwoPoint", {"two_point": ROWS})
HOT = ("temperature", "Temperature", {"ln": True, "temperature": 2.0})
HALVED = ("rivals", "HalfProducts", {"half": True, "temperature": 2.0, "products": True})
MUTANTS = {  # (request, the file, in its text, instead, what the audit says)
    "const": (
        POINT, "models", "return x.detach() if on else x", "return x", "ln: changed no gradient",
    ),
    "backward_as": (
        POINT, "models", "return value.detach() +", "return value +", "gamma: not the gradient owed in blocks.0.attn.q",
    ),
    "identity": (
        POINT, "models", "x * const(phi(x), self.identity)", "x * phi(x)",
        "identity: changed no gradient in blocks.0.mlp, blocks.1.mlp, blocks.2.mlp",
    ),
    "ln": (
        POINT, "models", ".sqrt(), self.ln)", ".sqrt(), False)", "ln: changed no gradient in blocks.0.ln1",
    ),
    "half": (
        POINT, "models", "return backward_as(y, 0.5 * y) if self.half else y", "return y",
        "half: changed no gradient in blocks.0.mlp",
    ),
    "wrong half": (
        POINT, "models", "backward_as(y, 0.5 * y)", "backward_as(y, 0.25 * y)",
        "identity + half: not the gradient owed in blocks.0.mlp",
    ),
    "flag of the recipe": (  # of the module, on which nobody has set it
        POINT, "models", "return rules.activation(", "return getattr(self, 'rules', Rules()).activation(",
        "identity: changed no gradient in blocks.0.mlp",
    ),
    "ah": (
        POINT, "models", "attend(const(q, self.ah), const(k, self.ah), v)", "attend(const(q, self.ah), k, v)",
        "ah: not the gradient",
    ),
    "epsilon": (
        EPSILON, "models", "y * (size / (size + self.epsilon)).detach()", "y",
        "epsilon: changed no gradient in blocks.0.attn.q",
    ),
    "epsilon without the sign": (
        EPSILON, "models", "size = upcast(y).abs()", "size = upcast(y)",
        "epsilon: not the gradient owed in blocks.0.attn.q",
    ),
    "gamma": (
        POINT, "models", "if self.gamma is not None:\n            boosted", "if False:\n            boosted",
        "gamma: changed no gradient in blocks.0.attn.q",
    ),
    "gamma for positive outputs": (
        POINT, "models", "torch.where(y > 0, positive_more, negative_more)", "positive_more",
        "gamma: not the gradient owed in blocks.0.attn.q",
    ),
    "unembedding": (
        POINT, "models", "rules.linear(self.ln_f(x, rules), weight, None)", "F.linear(self.ln_f(x, rules), weight)",
        "gamma: changed no gradient in unembedding",
    ),
    "rules not passed on": (
        POINT, "models", "(x, self.rules(lrp), Nodes(hook, layer), start, last)",
        "(x, Rules(), Nodes(hook, layer), start, last)", "half: changed no gradient in blocks.0.mlp",
    ),
    "ln2": (
        BOTH, "twopoint", "backward_as(y, x * mid(scale, *patch))", "y",
        "ln2: changed no gradient in blocks.0.ln1",
    ),
    "ln2 at one point": (
        BOTH, "twopoint", "mid(scale, *patch)", "scale", "ln2: not the gradient owed in blocks.0.ln1",
    ),
    "identity2": (
        BOTH, "twopoint", "backward_as(y, x * secant(x.detach(), *patch, phi))", "y",
        "identity2: changed no gradient in blocks.0.mlp",
    ),
    "identity2 is identity": (
        BOTH, "twopoint", "secant(x.detach(), *patch, phi)", "phi(x.detach())",
        "identity2 + half2: not the gradient owed in blocks.0.mlp",
    ),
    "identity2 in the middle": (
        BOTH, "twopoint", "torch.maximum((x_patch - x).abs() / 2, least)", "least",
        "identity2 + half2: not the gradient owed in blocks.0.mlp",
    ),
    "half2": (
        BOTH, "twopoint", "product(torch.mul, a, b, *patch)", "a * b", "half2: changed no gradient in blocks.0.mlp",
    ),
    "half2 the other way round": (
        BOTH, "models", "rules.gate(self.activate(self.gate(x, rules), rules), self.up(x, rules))",
        "rules.gate(self.up(x, rules), self.activate(self.gate(x, rules), rules))",
        "identity2 + half2: not the gradient owed in blocks.0.mlp",
    ),
    "attention2": (
        BOTH, "twopoint", 'self.patch_run("attention", q, k, v)', "None",
        "attention2: changed no gradient in blocks.0.attn",
    ),
    "attention2 without the softmax": (
        BOTH, "twopoint", "backward_as(attend.softmax(scores), attend.softmax(between))", "attend.softmax(scores)",
        "attention2: not the gradient owed in blocks.0.attn",
    ),
    "attention2 without the values": (
        BOTH, "twopoint", "product(attend.mix, pattern, v, v_patch)", "attend.mix(pattern, v)",
        "attention2: not the gradient owed in blocks.0.attn",
    ),
    "attention2 and not in one kernel": (
        BOTH, "twopoint", "return attend(*inputs[:3])", "return step_by_step(attend, *inputs)",
        "the forward pass is changed in blocks.0.attn",
    ),
    "by hand, and then not used": (
        HOT, "models", "else backward_as(self.fused(q, k, v), z)", "else self.fused(q, k, v)",
        "temperature: changed no gradient in blocks.0.attn",
    ),
    "by hand, and not in one kernel": (
        HOT, "models", "else backward_as(self.fused(q, k, v), z)", "else z",
        "the forward pass is changed in blocks.0.attn",
    ),
    "two-point rows not passed on": (
        BOTH, "twopoint", "if row not in self.two_point:", "if True:", "ln2: changed no gradient in blocks.0.ln1",
    ),
    "temperature": (
        HOT, "temperature", "self.temperature * attend.softmax(scores / self.temperature)", "attend.softmax(scores)",
        "temperature: changed no gradient in blocks.0.attn",
    ),
    "temperature with its 1 / T": (
        HOT, "temperature", "self.temperature * attend.softmax(", "attend.softmax(",
        "temperature: not the gradient owed in blocks.0.attn",
    ),
    "temperature not passed on": (
        HOT, "models", "(softmax or self.softmax)(", "self.softmax(",
        "temperature: changed no gradient in blocks.0.attn",
    ),
    "products": (
        HALVED, "rivals", "if not self.products:", "if True:", "products: changed no gradient in blocks.0.attn",
    ),
    "products without the first": (
        HALVED, "rivals", "(halved(q), halved(k), v, attend)", "(q, k, v, attend)",
        "temperature + products: not the gradient owed in blocks.0.attn",
    ),
    "products without the second": (
        HALVED, "rivals", "return halved(super().attention(halved(q), halved(k), v, attend))",
        "return super().attention(halved(q), halved(k), v, attend)",
        "temperature + products: not the gradient owed in blocks.0.attn",
    ),
    "products by a third": (
        HALVED, "rivals", "0.5 * x", "x / 3", "temperature + products: not the gradient owed in blocks.0.attn",
    ),
    "products without the temperature": (
        HALVED, "temperature", "if self.temperature is None:", "if True:",
        "temperature: changed no gradient in blocks.0.attn",
    ),
}  # fmt: skip


@pytest.fixture
def copies(monkeypatch):
    """copies(file, before, after): the files again as modules, one of them with a piece of its text replaced."""

    def make(changed=None, before="", after=""):
        made = {}
        with monkeypatch.context() as m:
            for name, text in SOURCES.items():  # models first: the others import it
                if name == changed:
                    assert text.count(before) == 1
                    text = text.replace(before, after)
                made[name] = types.ModuleType(name)
                made[name].__file__ = models.__file__
                for known in (name, f"beyond.{name}"):  # the others find it, and dataclasses look their module up
                    m.setitem(sys.modules, known, made[name])
                exec(compile(text, f"copy of {name}", "exec"), made[name].__dict__)
        assert issubclass(made["twopoint"].TwoPoint, made["models"].Rules) and made["models"].Rules is not Rules
        return made

    return make


@pytest.mark.parametrize("request_, kinds", [
    (POINT, {"ln": "RMSNorm", "identity": "MLP", "half": "MLP", "ah": "Attention", "gamma": "unembedding"}),
    (EPSILON, {"epsilon": "Linear"}),
    (BOTH, {"ln2": "RMSNorm", "identity2": "MLP", "half2": "MLP", "attention2": "Attention"}),
    (HOT, {"ln": "RMSNorm", "temperature": "Attention"}),
    (HALVED, {"half": "MLP", "temperature": "Attention", "products": "Attention"}),
])  # fmt: skip
def test_a_copy_of_the_code_passes(request_, kinds, copies, checkpoint, tokens, patch):
    made, (file, kind, fields) = copies(), request_
    model = made["models"].from_pretrained(str(checkpoint("qwen2")[0]))
    rules = audit(model, tokens, getattr(made[file], kind)(**fields), patch)["rules"]
    for rule, module in kinds.items():
        assert rules[rule]["applied"][module] == {"RMSNorm": 7, "unembedding": 1, "Linear": 21}.get(module, 3)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_copy_of_the_code_with_a_rule_off(mutant, copies, checkpoint, tokens, patch):
    (file, kind, fields), *mistake, says = MUTANTS[mutant]
    made = copies(*mistake)
    model = made["models"].from_pretrained(str(checkpoint("qwen2")[0]))
    assert says in blames(model, tokens, getattr(made[file], kind)(**fields), patch)


# ---------------------------------------------------------------------------------------------------------------------
# Conservation


def lost(report):
    """What is lost in each block, to all kinds together."""
    return torch.tensor(list(report["lost"].values())).sum(0)


@pytest.fixture
def conserve(load, tokens):
    def run(name, lrp, biased=True, metric=relp.logit_diff):
        model = load(name, torch.float64)
        for n, p in model.named_parameters():
            if n.endswith("bias") and not biased:
                p.zero_()
        return conservation(model, tokens, tokens[:, :2], metric, lrp)

    return run


@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "gemma2-mha-no-caps", "gpt2", "neox", "neox-sequential"])
def test_all_is_kept_where_theory_says_so(name, gamma, conserve):
    """All rules, and no bias or softcap: every layer holds the metric, and no module takes from it."""
    report = conserve(name, Rules(True, True, True, True, gamma=gamma), biased=False)
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(report["kept"], dtype=one.dtype), one, atol=1e-10, rtol=0)
    assert max(abs(x) for losses in report["lost"].values() for x in losses) < 1e-10


@pytest.mark.parametrize("gamma", [None, 0.3])
@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2", "llama-biased"])
def test_biases_are_all_that_is_missing(name, gamma, conserve):
    report = conserve(name, Rules(True, True, True, True, gamma=gamma))
    assert max(abs(x) for x in report["lost"]["biases"]) > 1e-3
    for kind in report["lost"].keys() - {"biases"}:
        assert max(map(abs, report["lost"][kind])) < 1e-10, kind
    kept = torch.tensor([*report["kept"], 1.0], dtype=torch.float64)
    torch.testing.assert_close(kept[:-1] + torch.tensor(report["lost"]["biases"]), kept[1:], atol=1e-6, rtol=0)


OFF = {"ln": {"LayerNorm", "RMSNorm"}, "identity": {"MLP"}, "half": {"MLP"}, "ah": {"Attention"}}
SETS_OFF = [off for n in (1, 2, 4) for off in itertools.combinations(OFF, n)]


@pytest.mark.parametrize("off", SETS_OFF, ids="-".join)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_loss_is_laid_at_the_right_door(name, off, conserve, load):
    """The kinds whose rule is off, biases and softcaps lose relevance, all others none; and the books balance."""
    if not load(name).config.gated:
        off = tuple(rule for rule in off if rule != "half")
    report = conserve(name, dataclasses.replace(ALL, **dict.fromkeys(off, False)))
    size = {kind: max(map(abs, losses)) for kind, losses in report["lost"].items()}
    may = {"biases"}.union(*(OFF[rule] for rule in off)) | ({"unembedding"} if name == "gemma2" else set())
    for kind in size:
        assert kind in may or size[kind] < 1e-9, (kind, size)
    for rule in off:
        assert max(size[kind] for kind in OFF[rule] & size.keys()) > 1e-8, (rule, size)
    kept = torch.tensor([*report["kept"], 1.0])
    torch.testing.assert_close(kept[:-1] + lost(report), kept[1:], atol=1e-5, rtol=1e-5)


def test_against_relevance_by_layer_and_gradients_of_the_biases(load, tokens):
    """The report of GPT-2 under the paper's rules, from nodes and parameters instead of modules."""
    model, answers = load("gpt2", torch.float64), tokens[:, :2]
    report = conservation(model, tokens, answers)
    biases = {n: p.requires_grad_() for n, p in model.named_parameters() if n.endswith("bias")}
    names = ("resid_pre", "q", "k", "v", "z")
    stream, acts = relp.record(model, tokens, names, True, grad=True)
    value = relp.read_out(model, stream, answers, lrp=True).sum()
    nodes = dict(zip([*acts, *biases], [*acts.values(), *biases.values()]))
    held = {
        key: float((x * rho).sum().detach() / value.detach())
        for (key, x), rho in zip(nodes.items(), torch.autograd.grad(value, list(nodes.values())))
    }
    assert report["metric"] == pytest.approx(float(value.detach()) / 3) and report["prompts"] == 3
    for layer in range(3):
        assert report["kept"][layer] == pytest.approx(held["resid_pre", layer])
        by_bias = sum(h for key, h in held.items() if str(key).startswith(f"blocks.{layer}."))
        assert report["lost"]["biases"][layer] == pytest.approx(by_bias)
        softmax = held["z", layer] - held["q", layer] - held["k", layer] - held["v", layer]
        assert report["lost"]["Attention"][layer] == pytest.approx(softmax)
    assert report["lost"]["biases"][3] == pytest.approx(held["ln_f.bias"])


def test_conservation_is_not_defined_between_two_runs(load, tokens):
    with pytest.raises(ValueError, match=r"with rules that look at two runs, not x . rho is conserved"):
        conservation(load("gpt2"), tokens, tokens[:, :2], lrp=TWO_POINT["gpt2"])


def test_conservation_leaves_nothing_behind(load, tokens):
    model = load("gpt2")
    for answers in (tokens[:, :2], tokens[:, :2] + 10**6):
        try:
            conservation(model, tokens, answers)
        except ValueError:
            assert answers.max() > 10**6
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("options", [[], ["--audit"]])
def test_every_run_records_it(options, tmp_path, capsys):
    arguments = f"--model toy-gpt2 --pairs 5 --methods relp,twopoint,ln+ah --rules ln,identity,half --out {tmp_path}"
    assert evaluate.main([*arguments.split(), *options]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "toy-gpt2-ioi" / "summary.json").read_text())
    assert summary["audit"].keys() == {"relp", "twopoint", "ln+ah"}
    assert summary["audit"]["relp"]["rules"]["ln"] == {"requested": True, "applied": {"LayerNorm": 9}}
    assert summary["audit"]["twopoint"]["rules"]["attention2"]["applied"] == {"Attention": 4}
    assert summary["conservation"]["kept"][-1] == pytest.approx(1, abs=0.1)
    assert (tmp_path / "toy-gpt2-ioi" / "conservation.png").stat().st_size > 5000
    rows = [line.split() for line in out.splitlines()]
    assert [row[:4] for row in rows].count(["half", "is", "not", "applicable:"]) == 1
    assert (["ln", "LayerNorm", "9"] in rows) == (["zero", "Linear", "24"] in rows) == bool(options)


def test_a_run_stops_where_a_rule_is_off(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Rules, "activation", lambda self, x, phi: x * phi(x))
    assert evaluate.main(["--model", "toy-neox", "--pairs", "3", "--methods", "relp", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "identity: changed no gradient in blocks.0.mlp, blocks.1.mlp" in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("summary.json"))
