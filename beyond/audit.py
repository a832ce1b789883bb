"""The audit: are the rules in use those that were asked for?

The audit does not trust what the model says of itself, it looks at gradients only. A forward pass is cut into pieces:
norms, linear layers, the core of attention (from q, k and v to o) and of the MLP (from gate and up to down), the sum of
experts, a block's sum, the unembedding. A random signal c goes back through each piece, and is compared with what a
formula in gradients.py says. What counts as equal is measured: the formula is computed in float64, and once more in the
model's precision, with inputs and what is marked `rounded` changed by up to one rounding. As far as these two differ,
the model may too.
"""

import math
from collections import Counter
from dataclasses import fields
from itertools import combinations

import torch
from torch import Tensor, nn

from beyond.gradients import CLAIMS, CORES, KINDS, NO_RULE, SHOWN, leaf
from models import Transformer, upcast
from support.methods import Method


def audit(model: Transformer, tokens: Tensor, lrp=True, patch: Tensor | None = None) -> dict:
    """Which rules were applied to which modules, how many times, on prompts [batch, pos]; two-point rules need a patch.

    {"rules": {rule: {"requested": its value, "applied": {module kind: calls}}}, "no rule": [what keeps a derivative]}.
    A Half-rule without gates is applied to nothing: it is not applicable. Calls in which a rule changes no more than
    rounding does are under "unseen": a tiny epsilon, or attention of one token, or saturated attention. There it makes
    no difference whether the rule is on.

    ValueError, one line that names rules and modules: a module of unknown kind, or never called; a rule that meets no
    module, changes no gradient, gives another than it owes, or is on unasked; a forward pass that is not bit-identical.
    """
    rules = model.rules(lrp)
    two_runs = hasattr(rules, "two_runs")
    if two_runs and patch is None:
        raise ValueError("two-point rules are audited on prompts and their patch")
    a = Audit(model, rules)
    for m, name in a.names.items():
        if kind_of(m) not in (*KINDS, *NO_RULE):
            a.fault(f"no rule: nothing is known of {kind_of(m)}", name)
    for rule in a.on.keys() - CLAIMS.keys():
        a.fault("unknown to the audit:", rule)
    a.settle()
    with torch.no_grad():
        plain = a.run("plain", tokens, False)
        if not plain.isfinite().all():
            raise ValueError(f"logits are not finite in {model.embed_tokens.weight.dtype}: try float32")
        for m in a.parts:
            if m not in a.seen["plain"] and m not in a.idle:
                a.fault("no rule: never called,", a.names[m])
        a.settle()
        if two_runs:
            patch_rules, rules = rules.two_runs()
            a.run("patch", patch, patch_rules)
    with torch.enable_grad():
        logits, some = a.run("original", tokens, rules), tokens.unique()  # a few tokens stand for the vocabulary
        signal = torch.zeros_like(logits)
        signal[:, -1, some] = torch.randn(len(tokens), len(some), generator=a.random).to(logits)
        a.judge(model, [a.leaf[model.ln_f]], logits, signal)
    if not torch.equal(logits, plain):
        a.fault("the forward pass is changed in", "the logits")
    for rule in a.asked:
        met = a.applied[rule] or a.unseen[rule]
        if not met and (model.config.gated or not rule.startswith("half")):
            a.fault(f"{rule}: met no module of", " or ".join(SHOWN.get(kind, kind) for kind in CLAIMS[rule]))
    a.settle()
    return a.report()


class Audit:
    """One audit() at work.

    on        {rule: its value}, all that are on; asked: those to be judged, so not ln if ln2 takes its place
    applied   {rule: calls by module kind}; unseen: those in which the rule changes no more than rounding does
    seen      by run, what a module got and gave: (a piece's inputs, the module's input, its output)
    entered   a module's input in this run, with its graph; leaf: its output, cut off from the graph
    idle      parts of experts that no position has chosen
    """

    def __init__(self, model: Transformer, rules):
        self.model, self.faults, self.random = model, {}, torch.Generator().manual_seed(0)
        two_point = getattr(rules, "two_point", ())
        on = {f.name: getattr(rules, f.name) for f in fields(rules) if f.name not in ("two_point", "notes")}
        on = {rule: value for rule, value in on.items() if value not in (False, None)}
        on |= {f"{row}2": True for row in two_point}
        self.on = on if "epsilon" in on or "gamma" in on else {**on, "zero": True}
        self.asked = [rule for rule in self.on if f"{rule}2" not in on]
        self.applied, self.unseen = ({rule: Counter() for rule in self.asked} for _ in range(2))
        self.parts = [m for part in (*model.blocks, model.ln_f) for m in part.modules() if kind_of(m) in KINDS]
        self.names = {m: name or "unembedding" for name, m in model.named_modules()}
        self.seen, self.entered, self.leaf, self.idle = {"patch": {}}, {}, {}, set()

    def fault(self, what: str, where: str) -> None:
        self.faults.setdefault(what, []).append(where)

    def settle(self) -> None:
        if self.faults:
            found = "; ".join(f"{what} {', '.join(names)}" for what, names in self.faults.items())
            raise ValueError(f"the rules in use are not those requested: {found}")

    def run(self, name: str, tokens: Tensor, rules) -> Tensor:
        """The logits of a pass that hooks cut into pieces."""
        self.now, self.seen[name] = name, {}
        hooks = [m.register_forward_pre_hook(self.before) for m in self.parts]
        hooks += [m.register_forward_hook(self.after) for m in self.parts]
        try:
            return self.model.unembed(self.model.stream(tokens, rules), rules)
        finally:
            for h in hooks:
                h.remove()

    def before(self, m: nn.Module, args: tuple) -> tuple:
        if self.now == "original" and m is not self.model.blocks[0] and not args[0].requires_grad:
            self.fault("no gradient passes what lies before", self.names[m])
        self.entered[m] = args[0]
        return leaf(args[0]), *args[1:]

    def after(self, m: nn.Module, args: tuple, y: Tensor) -> Tensor:
        kind, x, out = kind_of(m), [args[0]], y
        if kind in CORES:
            *into, last = (getattr(m, f"{name}_norm", getattr(m, name)) for name in CORES[kind])
            x, out = [self.leaf[linear] for linear in into if linear is not None], self.entered[last]
        elif kind == "Experts":
            called = [expert for expert in m.experts if expert in self.seen[self.now]]
            self.idle |= {part for expert in m.experts if expert not in called for part in expert.modules()}
            _, chosen = m.choose(self.leaf[m.router])
            chosen = torch.zeros_like(self.leaf[m.router]).scatter(-1, chosen, 1)
            x = [self.leaf[m.router], leaf(chosen), *(self.leaf[expert] for expert in called)]
        elif kind == "SequentialBlock":
            x += [self.leaf[part] for part in (getattr(m, "ln1_post", m.attn), getattr(m, "ln2_post", m.mlp))]
        self.seen[self.now][m] = [x.detach() for x in x], args[0].detach(), y.detach()
        if self.now == "original":
            self.judge(m, x, out, torch.randn(out.shape, generator=self.random).to(out))
            plain = self.seen["plain"].get(m)  # None: an expert that only a wrong forward pass has chosen
            if plain and torch.equal(args[0], plain[1]) and not torch.equal(y, plain[2]):
                self.fault("the forward pass is changed in", self.names[m])
        self.leaf[m] = leaf(y)
        return self.leaf[m]

    def judge(self, m: nn.Module, x: list[Tensor], y: Tensor, c: Tensor) -> None:
        """Compare a piece's gradients under the signal c with those expected, and with those under other rules."""
        kind, name = kind_of(m), self.names[m]
        rounding, smallest = torch.finfo(x[0].dtype).eps, torch.finfo(x[0].dtype).tiny
        if kind == "Linear":
            c[:, :-1] = 0  # one position stands for all: the gamma-rule's formula takes its time
        got = torch.autograd.grad(y, x, c, materialize_grads=True) if y.requires_grad else [x * 0 for x in x]
        x2 = self.seen["patch"][m][0] if m in self.seen["patch"] else x
        inputs = [[t.detach() for t in xs] for xs in (x, x2)]
        rules = [r for r in CLAIMS if kind in CLAIMS[r] and not (r.startswith("half") and m.gate is None)]
        mine = [r for r in rules if r in self.asked]
        one_point = [r for r in ("ln", "identity", "half", "ah", "router") if r in rules]
        others = [r for r in one_point if not {r, f"{r}2"} & self.on.keys()]
        # The expected gradient if some of the rules that are on were off, or some that are off were on. The combination
        # that fits best tells which rule is wrong; of those that fit alike, the one with the fewest switched.
        switchable, expected = mine + others, {}
        for n in range(len(switchable) + 1):
            for switched in combinations(switchable, n):
                expected[switched] = self.owed(m, *inputs, y.detach(), c, switched)
        best = min(expected, key=lambda switched: distance(got, expected[switched]))
        error = [0.0] * len(got)
        for _ in range(4):  # one draw of roundings may happen to be small: only a fault in all four draws counts
            for s in dict.fromkeys([(), best]):
                rough = self.rough(m, *inputs, y.detach(), c, s)
                error = [max(e, distance([w], [v])) for e, w, v in zip(error, expected[s], rough)]
            visible, faults = self.verdict(got, expected, best, mine, error, rounding, smallest)
            if not faults:
                break
        for rule in mine:
            (self.applied if rule in visible else self.unseen)[rule][SHOWN.get(kind, kind)] += 1
        for fault in faults:
            self.fault(fault, name)

    def verdict(self, got, expected, best, mine, error, rounding, smallest) -> tuple[list[str], list[str]]:
        """The rules that change more than rounding does, and the faults. error: of each gradient, by rounding."""
        right = expected[()]
        size = distance(right, [torch.zeros_like(w) for w in right])
        n = max(1, sum(int(w.count_nonzero()) for w in right))  # the norm of n rounding errors grows with the root of n
        precision = torch.finfo(upcast(got[0]).dtype).eps
        noise = 4 * math.hypot(*error) + 8 * size * max(rounding / n**0.5, precision)
        visible = [s[0] for s in expected if len(s) == 1 and (s[0] == "zero" or distance(right, expected[s]) > noise)]
        for g, w, e in zip(got, expected[best], error):
            allowed = rounding**0.5 * float(w.norm()) + 8 * (e + rounding * size) + smallest * n**0.5
            if not distance([g], [w]) <= allowed:
                return visible, [f"{' + '.join(mine) or 'no rule'}: not the gradient owed in"]
        seen = [r for r in best if r in visible]
        return visible, [f"{r}: {'changed no gradient' if r in mine else 'applied unasked'} in" for r in seen]

    def owed(self, m, x, x2, y, c, switched, rounded=torch.Tensor.double) -> list[Tensor]:
        """The gradients expected of m if the rules `switched` were on instead of off, or off instead of on."""
        on = {r: self.on.get(r) for r in self.on.keys() ^ {*switched}}
        x, x2 = ([rounded(t) for t in xs] for xs in (x, x2))
        return KINDS[kind_of(m)](m, x, x2, rounded(y), c.to(x[0].dtype), on, rounded)

    def rough(self, m, x, x2, y, c, switched) -> list[Tensor]:
        """owed() in the precision that the model computes in, from numbers that are changed by up to one rounding."""
        dtype, eps = upcast(c).dtype, torch.finfo(c.dtype).eps

        def rounded(t: Tensor) -> Tensor:
            error = 2 * torch.rand(t.shape, generator=self.random, dtype=torch.float64).to(t.device) - 1
            return (t.double() * (1 + eps * error)).to(dtype)

        return self.owed(m, x, x2, y, c, switched, rounded)

    def report(self) -> dict:
        rows = {}
        for rule in self.asked:
            rows[rule] = {"requested": self.on[rule], "applied": dict(self.applied[rule])}
            if self.unseen[rule]:
                rows[rule]["unseen"] = dict(self.unseen[rule])
        c, on = self.model.config, self.on.keys()
        keeps = [
            ("scale of the norms", not on & {"ln", "ln2"}),
            ("activation", not on & {"identity", "identity2"}),
            ("gate", c.gated and not on & {"half", "half2"}),
            ("router", c.mixture is not None and "router" not in on),
            ("softmax of attention", not on & {"ah", "attention2", "temperature"}),
            ("softcap of attention", c.attn_softcap is not None and "ah" not in on),
            ("softcap of the logits", c.logit_softcap is not None),
        ]
        return {"rules": rows, "no rule": [what for what, does in keeps if does]}


def kind_of(m: nn.Module) -> str:
    """The class that the audit knows m by, else its own. By name, so that a copy of models.py is audited as well."""
    names = [c.__name__ for c in type(m).__mro__]
    return next((name for name in names if name in (*KINDS, *NO_RULE)), names[0])


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    found = math.hypot(*(float((p.double() - q.double()).norm()) for p, q in zip(a, b)))
    return math.inf if math.isnan(found) else found


def print_audits(methods: list[Method], reports: dict[str, dict], whole: bool) -> None:
    """A line for every rule and module kind; if not whole, only for rules that have nothing to do."""
    for method in methods:
        report = reports.get(method.name)
        if report and whole:
            print(f"  audit of {method.label} (without a rule: {', '.join(report['no rule']) or 'nothing'})")
        for rule, of in report["rules"].items() if report else ():
            name = rule if isinstance(of["requested"], bool) else f"{rule}={of['requested']:g}"
            if not of["applied"] and "unseen" in of:
                print(f"    {name:20}changes no gradient by more than rounding: {method.label} is the same without it")
            elif not of["applied"]:
                print(f"    {name:20}is not applicable: {method.label} meets no gate here")
            for what, end in (("applied", ""), ("unseen", "   by less than rounding")) if whole else ():
                for kind, calls in of.get(what, {}).items():
                    print(f"    {name:20}{kind:12}{calls:4}{end}")
