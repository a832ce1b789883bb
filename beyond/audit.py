"""The audit: are the rules in use those that were asked for?

The audit does not trust what the model says of itself, it looks at gradients only. A forward pass is cut into pieces:
norms, linear layers, the core of attention (from q, k and v to o) and of the MLP (from gate and up to down), the sum of
experts, a block's sum, the unembedding. A random signal c goes back through each piece, and is compared with what a
formula says that is written here by hand and calls no rule. What counts as equal is measured: the formula is computed
in float64, and once more in the model's precision, with inputs and what is marked `rounded` changed by up to one
rounding. As far as these two differ, the model may too.
"""

import math
from collections import Counter
from dataclasses import fields
from itertools import combinations

import torch
from torch import Tensor, nn

from models import Linear, Transformer, causal_mask, rotate, softcap, upcast
from support.methods import Method

# ---------------------------------------------------------------------------------------------------------------------
# The gradient expected of each piece. A formula takes the module m, its inputs x in this run and x2 in the patch run
# (without one, again x), output y, signal c, and the rules that are on {name: value}, named as the command does
# (ln2: the two-point LN-rule). It returns one gradient per input. What goes through `rounded` on the way is what the
# model rounds before something of the same size is subtracted.


def norm_gradient(m, x, x2, y, c, on, rounded):
    """c w / s; two-point, the mean of both runs' 1 / s. Without a rule also - h mean(c w h) / s^3 by the scale."""

    def centred(x):
        return x if hasattr(m, "offset") else x - rounded(x.mean(-1, keepdim=True))  # an RMSNorm has an offset

    def groups(x):  # the stream is one; queries and keys may be one for each head
        return x.unflatten(-1, (-1, len(m.weight)))

    def size(h):
        return (h.square().mean(-1, keepdim=True) + m.eps).sqrt()

    x, x2, c = (groups(x) for x in (x[0], x2[0], c))
    h, h2, g = centred(x), centred(x2), c * (m.weight.to(c) + getattr(m, "offset", 0))
    if "ln2" in on:
        return [centred(g * (1 / size(h) + 1 / size(h2)) / 2).flatten(-2)]
    through_scale = 0 if "ln" in on else h * (g * h).mean(-1, keepdim=True) / size(h) ** 3
    return [centred(rounded(g / size(h)) - through_scale).flatten(-2)]


def mlp_gradient(m, x, x2, y, c, on, rounded):
    """c act'(a); under a rule c phi(a) or c times the secant. With a gate also times the other factor."""

    def act(a):
        return a * m.phi(a)

    def derivative(a, d=1e-5):
        return (act(a + d) - act(a - d)) / (2 * d)  # differences see through a detach

    a, a2 = x[0].cpu().double(), x2[0].cpu().double()
    if "identity2" in on:
        equal = (a2 - a).abs() < 1e-7  # in float64 the quotient is good down to here
        slope = torch.where(equal, derivative(a), (act(a2) - act(a)) / torch.where(equal, 1, a2 - a))
    else:
        slope = m.phi(a) if "identity" in on else derivative(a)
    if m.gate is None:
        return [c * slope.to(c)]
    b, share = ((x[1] + x2[1]) / 2, 1) if "half2" in on else (x[1], 0.5 if "half" in on else 1)
    return [share * c * b * slope.to(c), share * c * act(a).to(c)]


def attention_gradient(m, x, x2, y, c, on, rounded):
    """dP = c v, dS = P (dP - P . dP), dq = dS k, dk = dS q, dv = P c.

    Two-point: P in dS is that at the mean of both runs' scores, and v in dP the mean of both runs' values. At a
    temperature T, P in dS is that of the scores / T. With products: dP and dv are halved, and so are, once more, dq and
    dk.
    """

    def heads(x):
        q, k, v = (m.split_heads(x) for x in x)
        return rotate(q, 0, m.rotary), m.repeat_kv(rotate(k, 0, m.rotary)), m.repeat_kv(v)

    def scores(q, k):
        return softcap(rounded(torch.einsum("bqhd,bkhd->bqhk", q, k) * m.c.attn_scale), m.c.attn_softcap)

    leaves = [leaf(x) for x in x]
    q, k, v = heads(leaves)
    q2, k2, v2 = heads(x2) if "attention2" in on else (q, k, v)
    s, s2 = scores(q, k), scores(q2, k2)
    mask = causal_mask(0, q.shape[1], q.shape[1], m.window, q.device)
    middle = s / on["temperature"] if "temperature" in on else (s + s2) / 2
    middle, own = (s.masked_fill(mask, -torch.inf) for s in (middle, s))
    weights = middle.softmax(-1)
    # kernels that keep no pattern compute it anew, by the logarithm of the sum, whose rounding is no longer evened out
    logs = [s.logsumexp(-1, keepdim=True) for s in (middle, own)]
    pattern, of_values = ((s - log + (log - rounded(log))).exp() for s, log in zip((middle, own), logs))
    share = 0.5 if "products" in on else 1
    c = share * m.split_heads(c)
    d = rounded(torch.einsum("bqhd,bkhd->bqhk", c, (v + v2) / 2))
    d = pattern * (d - rounded((weights * d).sum(-1, keepdim=True))) * m.c.attn_scale * ("ah" not in on)
    d = d if m.c.attn_softcap is None else d * (1 - (s / m.c.attn_softcap).square())
    into = [("bqhk,bkhd->bqhd", share * d, k), ("bqhk,bqhd->bkhd", share * d, q), ("bqhk,bqhd->bkhd", of_values, c)]
    owed = [torch.einsum(*product).detach() for product in into]
    return torch.autograd.grad((q, k, v), leaves, owed)  # back through the rotation and the shared heads


def linear_gradient(m, x, x2, y, c, on, rounded):
    """c W; the epsilon-rule passes y / (y + epsilon sign y) of it.

    The gamma-rule divides y among the inputs as z_ij + gamma z_ij^(sign of y).
    """
    x, weight, bias = x[0], m.weight.to(c), torch.zeros(1).to(c) if m.bias is None else m.bias.to(c)
    if "epsilon" in on:
        return [rounded(c * y.abs() / (y.abs() + on["epsilon"])) @ weight]
    if "gamma" not in on:
        return [c @ weight]

    def times(z, y):
        return 1 + on["gamma"] * (z * y > 0).to(z)

    gradient, whole = torch.zeros_like(x), rounded(x) @ weight.T + bias  # y, whose rounding is another one than total's
    for i in map(tuple, c.any(-1).nonzero().tolist()):  # the positions that the signal reaches
        boosted = weight * times(x[i] * weight, y[i][:, None])
        total = boosted @ x[i] + bias * times(bias, y[i])
        gradient[i] = rounded(c[i] * whole[i] / torch.where(total == 0, 1, total)) @ boosted * (x[i] != 0)
    return [gradient]


def unembedding_gradient(m, x, x2, y, c, on, rounded):
    """A linear layer's, and the derivative of the softcap after it. Tokens without a signal are left out."""
    used, cap, layer = c.flatten(0, -2).any(0), m.config.logit_softcap, Linear(1, 1, False)
    weight = (m.embed_tokens if m.config.tied else m.unembed_tokens).weight
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # shared out over several processes
    layer.weight = nn.Parameter(weight[used].to(c), requires_grad=False)
    c = c[..., used] if cap is None else c[..., used] * (1 - (y[..., used] / cap).square())
    return linear_gradient(layer, x, x2, x[0] @ layer.weight.T, c, on, rounded)


def experts_gradient(m, x, x2, y, c, on, rounded):
    """w_e c to the expert e; to the router's output, through the softmax p, dS_e = p_e (c . y_e - sum_j w_j c . y_j).

    w is p where an expert is chosen, else 0, as is c . y_e. If w is normed, p is w: the softmax of the chosen alone.
    """
    logits, chosen, *of_experts = x
    chosen = chosen.round()
    p = logits.softmax(-1)
    w = p * chosen
    if m.mixture.normed:
        p = w = w / w.sum(-1, keepdim=True)
    d, owed = torch.zeros_like(logits), []
    for e, y_e in zip(chosen.flatten(0, 1).any(0).nonzero().flatten(), of_experts):
        at = chosen[..., e].bool()
        d[at, e] = (c[at] * y_e[0]).sum(-1)
        owed.append((w[at, e][:, None] * c[at])[None])
    d = p * (d - rounded((w * d).sum(-1, keepdim=True))) * ("router" not in on)
    return [d, torch.zeros_like(chosen), *owed]  # the choice has no gradient


def sum_gradient(m, x, x2, y, c, on, rounded):
    """A block adds what attention and MLP put out to the stream: all three get c."""
    return [c] * len(x)


NORMS = {"LayerNorm": norm_gradient, "RMSNorm": norm_gradient}
LINEARS = {"Linear": linear_gradient, "Transformer": unembedding_gradient}
CLAIMS = {  # rule: {module kind that it is for: the gradient owed}; zero is the 0-rule
    **{"ln": NORMS, "identity": {"MLP": mlp_gradient}, "half": {"MLP": mlp_gradient}},
    "router": {"Experts": experts_gradient},
    **{"ln2": NORMS, "identity2": {"MLP": mlp_gradient}, "half2": {"MLP": mlp_gradient}},
    **{rule: {"Attention": attention_gradient} for rule in ("ah", "attention2", "temperature", "products")},
    **{"zero": LINEARS, "epsilon": LINEARS, "gamma": LINEARS},
}
KINDS = {kind: owed for claim in CLAIMS.values() for kind, owed in claim.items()} | {"SequentialBlock": sum_gradient}
CORES = {"Attention": ("q", "k", "v", "o"), "MLP": ("gate", "up", "down")}  # from the first ones to the last
SHOWN = {"Transformer": "unembedding"}
NO_RULE = ("Embedding", "ModuleList", "NoNorm")


# ---------------------------------------------------------------------------------------------------------------------
# The audit


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


def leaf(x: Tensor) -> Tensor:
    """x cut off from what it was made of; a gradient can be taken with respect to it."""
    return x.detach().requires_grad_()


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
