"""The audit must pass what is right, and name what is not; relevance must be conserved where theory says so."""

import dataclasses
import itertools
import json
import types
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES

import evaluate
import models
import relp
from models import ROWS, TWO_POINT, Rules, audit, from_pretrained

ALL = Rules(True, True, True, True)
RULE_SETS = [
    True,
    ALL,
    False,
    Rules(epsilon=1.0),
    Rules(ln=True, gamma=0.5),
    Rules(ah=True, epsilon=0.1, two_point=ROWS),
    *(Rules(**{rule: True}) for rule in ("ln", "identity", "half", "ah")),
    *(Rules(two_point=(row,)) for row in ROWS),
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


# ---------------------------------------------------------------------------------------------------------
# What is right passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_family_and_rule_passes_and_is_counted(name, dtype, load, tokens, patch):
    model = load(name, dtype)
    n, c = model.config.n_layers, model.config
    norm = {"LayerNorm" if c.layer_norm else "RMSNorm": n * (4 if c.block == "sandwich" else 2) + 1}
    linear, half = {"Linear": n * (7 if c.gated else 6), "unembedding": 1}, {"MLP": n} if c.gated else {}
    calls = {
        **{"ln": norm, "identity": {"MLP": n}, "half": half, "ah": {"Attention": n}},
        **{"ln2": norm, "identity2": {"MLP": n}, "half2": half, "attention2": {"Attention": n}},
        **dict.fromkeys(("zero", "epsilon", "gamma"), linear),
    }
    for lrp in [*RULE_SETS, TWO_POINT[c.family]]:
        rules, report = model.rules(lrp), audit(model, tokens, lrp, patch)
        flags = {rule for rule in ("ln", "identity", "half", "ah", "epsilon", "gamma") if getattr(rules, rule)}
        asked = flags - set(rules.two_point) | {f"{row}2" for row in rules.two_point}
        asked |= set() if rules.epsilon or rules.gamma else {"zero"}
        assert report["rules"].keys() == asked
        for rule, row in report["rules"].items():
            assert row == {"requested": getattr(rules, rule, True), "applied": calls[rule]}, rule
        json.dumps(report)


def test_what_has_no_rule_is_named(load, tokens, patch):
    kept = lambda name, lrp: audit(load(name), tokens, lrp, patch)["no rule"]
    assert kept("gpt2", True) == ["softmax of attention"] and kept("llama", ALL) == []
    assert kept("gemma2", True) == ["softmax of attention", "softcap of attention", "softcap of the logits"]
    assert kept("gemma2", ALL) == ["softcap of the logits"]
    assert kept("qwen2", False) == ["scale of the norms", "activation", "gate", "softmax of attention"]
    assert kept("qwen2", TWO_POINT["qwen2"]) == []


def test_two_point_rules_need_a_patch(load, tokens):
    with pytest.raises(ValueError, match="two-point rules are audited on prompts and their patch"):
        audit(load("llama"), tokens, Rules(two_point=("ln",)))
    says = blames(load("llama"), tokens, Rules(ln=True, two_point=("ln",)), tokens)  # of one point twice
    assert says == "ln2: changed no gradient beyond rounding in LayerNorm or RMSNorm"


def test_it_leaves_nothing_behind(load, tokens):
    model = load("gemma2")
    logits = model(tokens, lrp=True)
    audit(model, tokens)
    activate = model.blocks[1].mlp.activate
    model.blocks[1].mlp.activate = lambda x, run: activate(x, run).detach()
    blames(model, tokens, Rules(ln=True))
    model.blocks[1].mlp.activate = activate
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(tokens, lrp=True), logits)


def test_an_epsilon_that_rounding_hides(load, tokens):
    audit(load("llama", torch.float64), tokens, Rules(epsilon=1e-9))
    for dtype in (torch.float32, torch.bfloat16):
        says = blames(load("llama", dtype), tokens, Rules(epsilon=1e-9))
        assert says == "epsilon: changed no gradient beyond rounding in Linear or unembedding"
    row = audit(load("llama", torch.float16), tokens, Rules(epsilon=5e-5))["rules"]["epsilon"]
    assert row["applied"]["Linear"] + row["unseen"]["Linear"] == 21


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_one_token(name, load, tokens):
    """Attention has nothing to choose from: its softmax passes nothing on, with a rule and without."""
    audit(load(name), tokens[:, :1])
    says = blames(load(name), tokens[:, :1], Rules(ah=True))
    assert says == "ah: changed no gradient beyond rounding in Attention"


def test_weights_that_are_not_numbers(load, tokens):
    model = load("gpt2")
    model.blocks[1].mlp.up.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite in torch.float32"):
        audit(model, tokens)


# ---------------------------------------------------------------------------------------------------------
# Fooled on purpose

ALONE = models.alone
DISABLED = {  # the function of models.py in place of which another is put: (that one, request, the rules blamed)
    "ln_rule": (lambda f: lambda x, eps, on, twin: f(x, eps, False), ALL, {"ln"}),
    "identity_rule": (lambda f: lambda x, gate, on, twin: f(x, gate, False), ALL, {"identity"}),
    "half_rule": (lambda f: lambda a, b, on, *rest: f(a, b, False, *rest), ALL, {"half"}),
    "ah_rule": (lambda f: lambda pattern, on: pattern, ALL, {"ah"}),
    "linear_rule": (lambda f: lambda x, w, b, r: torch.nn.functional.linear(x, w, b), Rules(gamma=0.5), {"gamma"}),
    "const": (lambda f: lambda x, on: x, ALL, {"ln", "identity", "ah"}),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("function", DISABLED)
def test_a_disabled_rule_is_named(function, name, load, tokens, monkeypatch):
    model = load(name)
    change, rules, blamed = DISABLED[function]
    if function == "half_rule" and not model.config.gated:
        pytest.skip("no gate")
    monkeypatch.setattr(models, function, change(getattr(models, function)))
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
    model, twin = load(name), models.Run.twin
    if row == "half" and not model.config.gated:
        pytest.skip("no gate")
    monkeypatch.setattr(models.Run, "twin", lambda run, of: ALONE if of == row else twin(run, of))
    for rules in (Rules(two_point=ROWS), Rules(True, True, True, two_point=ROWS), Rules(two_point=(row,))):
        says = blames(model, tokens, rules, patch)
        assert says.startswith(f"{row}2: changed no gradient in ") and ";" not in says


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rule_that_is_always_on_is_named(name, load, tokens, patch, monkeypatch):
    model = load(name)
    with monkeypatch.context() as m:
        m.setattr(models, "const", lambda x, on: x.detach())
        says = blames(model, tokens, False)
        assert all(f"{rule}: applied unasked in " in says for rule in ("ln", "identity", "ah"))
    twin = models.Run.twin  # the tape, though these rows were not asked for
    monkeypatch.setattr(
        models.Run, "twin", lambda run, of: run.rules.tape if run.rules.tape is not None else twin(run, of)
    )
    says = blames(model, tokens, Rules(two_point=("attention",)), patch)
    assert says.startswith("no rule: not the gradient owed in blocks.0.ln1, ") and "blocks.0.mlp, " in says


@pytest.mark.parametrize("name", FAMILIES)
def test_one_module_of_one_layer_is_enough(name, load, tokens, patch):
    """The rest of the model follows the rules; the text names the one that does not, and no other."""

    def without(module, **rules):
        forward = module.forward
        module.forward = lambda x, run: forward(
            x, dataclasses.replace(run, rules=dataclasses.replace(run.rules, **rules))
        )

    for rules, part, off, says in [
        (ALL, "blocks.1.mlp", dict(identity=False), "identity: changed no gradient"),
        (ALL, "blocks.2.ln2", dict(ln=False), "ln: changed no gradient"),
        (ALL, "ln_f", dict(ln=False), "ln: changed no gradient"),
        (ALL, "blocks.0.attn", dict(ah=False), "ah: changed no gradient"),
        (Rules(epsilon=1e-3), "blocks.1.attn.k", dict(epsilon=None), "epsilon: changed no gradient"),
        (Rules(gamma=0.1), "blocks.1.mlp.up", dict(gamma=None), "gamma: changed no gradient"),
        (Rules(two_point=("ln",)), "blocks.1.ln2", dict(two_point=()), None),
        (Rules(identity=True), "blocks.1.ln1", dict(ln=True), "ln: applied unasked"),
        (Rules(), "blocks.2.attn", dict(ah=True), "ah: applied unasked"),
    ]:  # fmt: skip
        model = load(name)
        without(model.get_submodule(part), **off)
        if says is None:  # the tape and its reader come apart
            with pytest.raises(ValueError):
                audit(model, tokens, rules, patch)
        else:
            assert blames(model, tokens, rules, patch) == f"{says} in {part}"

    model = load(name)  # a block that hands no rules on to its MLP
    run_to = model.blocks[1].mlp.forward
    model.blocks[1].mlp.forward = lambda x, run: run_to(x, models.Run(Rules(), run.hook, run.layer))
    says = blames(model, tokens, True)
    assert "identity: changed no gradient in blocks.1.mlp" in says
    assert ("half: changed no gradient in blocks.1.mlp" in says) == model.config.gated


def test_activation_of_one_block(load, tokens):
    model = load("neox")
    model.blocks[2].mlp.activate = lambda x, run: torch.nn.functional.gelu(x)
    assert "identity: changed no gradient in blocks.2.mlp" in blames(model, tokens, Rules(identity=True))


WRONG = {  # (function, its replacement, request, what the audit says)
    "half-of-one": ("half_rule", lambda f: lambda a, b, on, *r: f(a, b, on, *r) + 0.1 * (a * b - (a * b).detach()) if on else f(a, b, on, *r), Rules(half=True), "half: not the gradient"),
    "half-of-one-factor": ("half_rule", lambda f: lambda a, b, on, *r: f(a, 0.5 * b + 0.5 * b.detach(), False) if on else f(a, b, on, *r), Rules(half=True), "half: "),
    "ln-of-the-mean": ("ln_rule", lambda f: lambda x, eps, on, *r: f(x, eps, on, *r) * 1 + 0.2 * (x - x.detach()), Rules(ln=True), "ln: not the gradient"),
    "half-an-identity": ("identity_rule", lambda f: lambda x, g, on, *r: x * (0.4 * g(x) + 0.6 * g(x).detach()), Rules(identity=True), "identity: "),
    "values-as-well": ("ah_rule", lambda f: lambda x, on: 0.5 * x + 0.5 * x.detach(), Rules(ah=True), "ah: "),
    "epsilon-too-large": ("linear_rule", lambda f: lambda x, w, b, r: f(x, w, b, r.epsilon and Rules(epsilon=2 * r.epsilon) or r), Rules(epsilon=0.1), "epsilon: not the gradient"),
    "middle-of-one-run": ("mid", lambda f: lambda x, x_patch: f(x, f(x, x_patch)), Rules(two_point=ROWS), "2: not the gradient"),
    "secant-too-steep": ("identity_rule", lambda f: lambda x, g, on, twin: f(x, g, on, twin) + 0.3 * (x - x.detach()), Rules(two_point=ROWS), "identity2 + half2: not the gradient"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_rule_with_another_gradient_is_named(wrong, load, tokens, patch, monkeypatch):
    function, change, rules, says = WRONG[wrong]
    monkeypatch.setattr(models, function, change(getattr(models, function)))
    assert says in blames(load("qwen2"), tokens, rules, patch)


@pytest.mark.parametrize("function", ["ln_rule", "identity_rule", "half_rule"])
def test_one_ulp_is_enough(function, load, tokens, monkeypatch):
    rule = getattr(models, function)
    up = lambda y: y + (torch.nextafter(y, torch.full_like(y, torch.inf)) - y).detach()  # the next larger number
    monkeypatch.setattr(models, function, lambda x, g, on, *r: up(rule(x, g, on, *r)) if on else rule(x, g, on, *r))
    part = "blocks.0.ln1" if function == "ln_rule" else "blocks.0.mlp"
    assert f"the forward pass is changed in {part}, " in blames(load("qwen2"), tokens, True)


def test_a_kind_that_it_does_not_know(load, tokens):
    class Dropout(torch.nn.Module):
        def forward(self, x, run):
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
    class NoNorm(models.Linear):  # known to the audit, but no norm
        def __init__(self, d):
            super().__init__(d, d, False)
            self.weight = torch.nn.Parameter(torch.eye(d), requires_grad=False)

    model = load("llama")
    for block in model.blocks:
        block.ln1, block.ln2 = NoNorm(32), NoNorm(32)
    model.ln_f = NoNorm(32)
    assert "ln: met no module of LayerNorm or RMSNorm" in blames(model, tokens, Rules(ln=True, ah=True))


def test_a_cut_between_the_modules(load, tokens, monkeypatch):
    """Sums have no rule, and must pass on everything."""
    forward, block = models.SequentialBlock.forward, models.Transformer.block

    def leaky(self, x, run):
        y = forward(self, x, run)
        return y.detach() + (x - x.detach()) if run.layer == 1 and run.rules.ln else y

    with monkeypatch.context() as m:
        m.setattr(models.SequentialBlock, "forward", leaky)
        assert blames(load("llama"), tokens, True) == "no rule: not the gradient owed in blocks.1"
    monkeypatch.setattr(models.Transformer, "block", lambda self, layer, x, *r: block(self, layer, x.detach(), *r))
    says = "no gradient passes what lies ahead of blocks.1, blocks.2"
    assert blames(load("llama"), tokens, True) == says


SOURCE = Path(models.__file__).read_text()
POINT, BOTH = Rules(True, True, True, True, gamma=0.3), Rules(two_point=ROWS)
MUTANTS = {  # (request, in the text of models.py, instead, what the audit says)
    "const": (POINT, "return x.detach() if on else x", "return x", "ln: changed no gradient"),
    "identity": (POINT, "const(gate(x), on or x_patch is not None)", "gate(x)", "identity: changed no gradient in blocks.0.mlp, blocks.1.mlp, blocks.2.mlp"),
    "ln": (POINT, "x / const(size, on)", "x / size", "ln: changed no gradient in blocks.0.ln1"),
    "half": (POINT, "return through(y, 0.5 * y) if on else y", "return y", "half: changed no gradient in blocks.0.mlp"),
    "wrong half": (POINT, "through(y, 0.5 * y)", "through(y, 0.25 * y)", "identity + half: not the gradient owed in blocks.0.mlp"),
    "flag of the recipe": (POINT, "run.rules.identity, run", "getattr(self, 'identity', False), run", "identity: changed no gradient in blocks.0.mlp"),
    "ah": (POINT, "by_head(ah_rule(k, run.rules.ah))", "by_head(k)", "ah: not the gradient"),
    "epsilon": (Rules(epsilon=0.1), "(y.abs() / (y.abs() + rules.epsilon)).detach()", "1", "epsilon: changed no gradient in blocks.0.attn.q"),
    "gamma": (POINT, "elif rules.gamma is not None:", "elif False:", "gamma: changed no gradient in blocks.0.attn.q"),
    "unembedding": (POINT, "linear_rule(self.ln_f(x, run), weight, None, run.rules)", "F.linear(self.ln_f(x, run), weight)", "gamma: changed no gradient in unembedding"),
    "rules not passed on": (POINT, "self.rules(lrp), hook, layer", "Rules(), hook, layer", "half: changed no gradient in blocks.0.mlp"),
    "ln2": (BOTH, "return y if size_patch is None else through(y, x * mid(1 / size, 1 / size_patch))", "return y", "ln2: changed no gradient in blocks.0.ln1"),
    "ln2 at one point": (BOTH, "mid(1 / size, 1 / size_patch)", "(1 / size).detach()", "ln2: not the gradient owed in blocks.0.ln1"),
    "identity2": (BOTH, "return through(y, x * torch.where(near, g", "return through(y, x * gate(x) if True else torch.where(near, g", "identity2: changed no gradient in blocks.0.mlp"),
    "identity2 is identity": (BOTH, "near = dx.abs() < torch.finfo(x.dtype).eps ** 0.5", "near = dx.abs() < 1e9", "identity2 + half2: not the gradient owed in blocks.0.mlp"),
    "half2": (BOTH, "half_rule(gate, up, run.rules.half, run.twin(\"half\"))", "half_rule(gate, up, run.rules.half)", "half2: changed no gradient in blocks.0.mlp"),
    "half2 the other way round": (BOTH, "half_rule(gate, up, run", "half_rule(up, gate, run", "identity2 + half2: not the gradient owed in blocks.0.mlp"),
    "attention2": (BOTH, "kernel, twin = None, run.twin(\"attention\")", "kernel, twin = None, alone", "attention2: changed no gradient in blocks.0.attn"),
    "attention2 without the softmax": (BOTH, "softmax(through(mid(scores, scores_patch), scores))", "softmax(scores)", "attention2: not the gradient owed in blocks.0.attn"),
    "temperature": (Rules(ln=True, temperature=2.0), "temperature * softmax(scores / temperature)", "softmax(scores)", "temperature: changed no gradient in blocks.0.attn"),
    "temperature with its 1 / T": (Rules(ln=True, temperature=2.0), "temperature * softmax(scores / temperature)", "softmax(scores / temperature)", "temperature: not the gradient owed in blocks.0.attn"),
    "attention2 without the values": (BOTH, "half_rule(pattern, v, False, twin, mix)", "mix(pattern, v)", "attention2: not the gradient owed in blocks.0.attn"),
    "two-point rows not passed on": (BOTH, "if row not in self.rules.two_point:", "if True:", "ln2: changed no gradient in blocks.0.ln1"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_copy_of_the_code_with_a_rule_off(mutant, checkpoint, tokens, patch):
    rules, before, after, says = MUTANTS.get(mutant, (POINT, "", "", None))
    assert SOURCE.count(before) == 1 or mutant is None
    copy = types.ModuleType("copy_of_models")
    copy.__file__ = models.__file__
    with pytest.MonkeyPatch.context() as m:
        m.setitem(__import__("sys").modules, copy.__name__, copy)  # dataclasses look their module up
        exec(compile(SOURCE.replace(before, after) if mutant else SOURCE, "copy_of_models", "exec"), copy.__dict__)
    model = copy.from_pretrained(str(checkpoint("qwen2")[0]))
    rules = copy.Rules(**{f.name: getattr(rules, f.name) for f in dataclasses.fields(rules)})
    for check in (audit, copy.audit):
        if mutant is None:
            assert check(model, tokens, rules, patch)["rules"]["ln"]["applied"] == {"RMSNorm": 7}
        else:
            with pytest.raises(ValueError) as error:
                check(model, tokens, rules, patch)
            assert says in str(error.value)


# ---------------------------------------------------------------------------------------------------------
# Conservation


def lost(report, *kinds):
    """What is lost in each block to these kinds together (all that there are, if none is named)."""
    return torch.tensor([report["lost"][k] for k in report["lost"] if not kinds or k in kinds]).sum(0)


@pytest.fixture
def conserve(load, tokens):
    def run(name, lrp, biased=True, metric=relp.logit_diff):
        model = load(name, torch.float64)
        for n, p in model.named_parameters():
            if n.endswith("bias") and not biased:
                p.zero_()
        return relp.conservation(model, tokens, tokens[:, :2], metric, lrp)

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
    report = relp.conservation(model, tokens, answers)
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


def test_conservation_leaves_nothing_behind(load, tokens):
    model = load("gpt2")
    for answers in (tokens[:, :2], tokens[:, :2] + 10**6):
        try:
            relp.conservation(model, tokens, answers)
        except (RuntimeError, IndexError):
            assert answers.max() > 10**6
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("options", [[], ["--audit"]])
def test_every_run_records_it(options, tmp_path, capsys):
    arguments = f"--model toy-gpt2 --n 5 --methods relp,twopoint,ln+ah --rules ln,identity,half --out {tmp_path}"
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
    monkeypatch.setattr(models, "identity_rule", lambda x, gate, on, twin: x * gate(x))
    assert evaluate.main(["--model", "toy-neox", "--n", "3", "--methods", "relp", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "identity: changed no gradient in blocks.0.mlp, blocks.1.mlp" in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("summary.json"))
