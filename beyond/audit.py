"""Are the rules in use those that were asked for? The audit looks at gradients only.

    python -m beyond.audit --model toy-gpt2 --methods relp,gim,ln+ah

A forward pass in float64 is cut into pieces: norms, linear layers, the core of attention (from q, k and v to o) and of
the MLP (from gate and up to down), the unembedding. A random signal goes back through each piece, and what arrives is
compared with a formula written by hand. If the two differ, the audit looks for the rule that explains it: the formula
with this rule switched on or off fits.
"""

import sys
from collections import Counter
from itertools import combinations
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from beyond.methods import FLAGS, method
from beyond.rivals import HalfProducts
from models import Transformer, causal_mask, rotate, softcap
from support.commandline import load, parse, run
from support.options import common_parser
from support.processes import say
from support.prompts import batches, tensors

SAME = 1e-7  # two gradients are the same if they differ by a smaller part than this


def audit(model: Transformer, tokens: Tensor, lrp=True) -> dict[str, Counter]:
    """{rule that is on: {kind of module: in how many calls it matters}}, on prompts [batch, pos]. The model: float64.

    ValueError, one line that names rules and modules, if a gradient is not the one owed.
    """
    pieces = Pieces(model.rules(lrp))
    parts = [m for block in model.blocks for m in block.modules() if m is not block] + [model.ln_f]
    if unknown := {type(m).__name__ for m in parts if kind_of(m) not in PIECES}:
        raise ValueError(f"the audit has no formula for {', '.join(sorted(unknown))}")
    hooks = [m.register_forward_pre_hook(pieces.before) for m in parts]
    hooks += [m.register_forward_hook(pieces.after) for m in parts]
    try:
        with torch.enable_grad():
            logits = model(tokens, lrp)
            pieces.judge(model, [pieces.left[model.ln_f]], logits)
    finally:
        for h in hooks:
            h.remove()
    if pieces.faults:
        names = {m: name or "unembedding" for name, m in model.named_modules()}
        found = [f"{what} {', '.join(names[m] for m in where)}" for what, where in pieces.faults.items()]
        raise ValueError(f"the rules in use are not those requested: {'; '.join(found)}")
    return pieces.applied


class Pieces:
    """A forward pass that hooks cut into pieces, each of which is judged as soon as it is computed."""

    def __init__(self, rules):
        off = vars(type(rules)())
        self.on = {rule: value for rule, value in vars(rules).items() if value != off[rule]}
        self.on |= {"products": True} if isinstance(rules, HalfProducts) else {}
        self.applied, self.faults = {rule: Counter() for rule in self.on}, {}
        self.entered, self.left = {}, {}  # a module's input, with its graph; its output, cut off from the graph
        self.random = torch.Generator().manual_seed(0)

    def before(self, m: nn.Module, args: tuple) -> tuple:
        x, p = args
        self.entered[m] = x
        return x.detach().requires_grad_(), p

    def after(self, m: nn.Module, args: tuple, y: Tensor) -> Tensor:
        match kind_of(m):
            case "Attention":
                into = [getattr(m, f"{name}_norm", None) or getattr(m, name) for name in "qkv"]
                self.judge(m, [self.left[part] for part in into], self.entered[m.o])
            case "MLP":
                self.judge(m, [self.left[part] for part in (m.gate, m.up) if part is not None], self.entered[m.down])
            case _:
                self.judge(m, [args[0]], y)
        self.left[m] = y.detach().requires_grad_()
        return self.left[m]

    def judge(self, m: nn.Module, x: list[Tensor], y: Tensor) -> None:
        """Compare a piece's gradients with those owed, by the rules that are on and by others."""
        kind, formula, rules = kind_of(m), *PIECES[kind_of(m)]
        rules = [rule for rule in rules if rule in self.on or rule in FLAGS]
        if kind == "MLP" and m.gate is None:
            rules.remove("half")
        c = torch.randn(y.shape, generator=self.random, dtype=y.dtype).to(y.device)
        if kind in ("Linear", "Transformer"):
            c[:, :-1] = 0  # one position stands for all: the gamma-rule's formula takes its time
        got = torch.autograd.grad(y, x, c, materialize_grads=True) if y.requires_grad else [0 * z for z in x]
        owed = {}  # if some of the rules that are on were off, or some that are off were on
        for n in range(len(rules) + 1):
            for switched in combinations(rules, n):
                on = {rule: self.on.get(rule, True) for rule in self.on.keys() ^ {*switched}}
                owed[switched] = formula(m, [z.detach() for z in x], y.detach(), c, on)
        right, on = owed[()], [rule for rule in rules if rule in self.on]
        same = SAME * distance(right, [0 * z for z in right])
        for rule in on:
            self.applied[rule][kind] += distance(right, owed[rule,]) > same
        fits = [switched for switched in owed if distance(got, owed[switched]) <= same]  # with the fewest first
        if fits:
            found = [f"{rule}: {'changed no gradient' if rule in on else 'applied unasked'} in" for rule in fits[0]]
        else:
            found = [f"{' + '.join(on) or 'no rule'}: not the gradient owed in"]
        for fault in found:
            self.faults.setdefault(fault, []).append(m)


def kind_of(m: nn.Module) -> str:
    """The class that PIECES knows m by, else its own."""
    names = [c.__name__ for c in type(m).__mro__]
    return next((name for name in names if name in PIECES), names[0])


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return float(torch.cat([(p - q).flatten() for p, q in zip(a, b)]).norm())


# ---------------------------------------------------------------------------------------------------------------------
# The gradients owed: of a module m with inputs x and output y, under the signal c that goes back, one per input.
# `on` has the rules {name: value}, and "products" for the half products of rivals.py.


def norm_gradient(m, x, y, c, on):
    """c w / s. Without the LN-rule also - h mean(c w h) / s^3, by the scale s."""

    def centred(x):
        return x - x.mean(-1, keepdim=True) if m.centred else x

    x, c = (z.unflatten(-1, (-1, len(m.weight))) for z in (x[0], c))  # queries and keys may be normed head by head
    h, g = centred(x), c * (m.weight + m.offset)
    s = (h.square().mean(-1, keepdim=True) + m.eps).sqrt()
    by_scale = 0 if "ln" in on else h * (g * h).mean(-1, keepdim=True) / s**3
    return [centred(g / s - by_scale).flatten(-2)]


def mlp_gradient(m, x, y, c, on):
    """c act'(a), or c phi(a) under the Identity-rule; with a gate times the other factor, half under the Half-rule."""

    def act(a):
        return a * m.phi(a)

    a, d = x[0], 1e-5
    slope = m.phi(a) if "identity" in on else (act(a + d) - act(a - d)) / (2 * d)  # differences see through a detach
    if m.gate is None:
        return [c * slope]
    share = 0.5 if "half" in on else 1
    return [share * c * x[1] * slope, share * c * act(a)]


def attention_gradient(m, x, y, c, on):
    """dP = c v, dS = P (dP - P . dP), dq = dS k, dk = dS q, dv = P c. Under the AH-rule dS is 0.

    At a temperature T, P in dS is that of the scores / T. Half products halve dP and dv, and once more dq and dk.
    """
    leaves = [z.detach().requires_grad_() for z in x]
    heads = (-1, m.c.d_head)
    q, k, v = (z.unflatten(-1, heads) for z in leaves)
    q, k, v = rotate(q, 0, m.rotary), m.repeat_kv(rotate(k, 0, m.rotary)), m.repeat_kv(v)
    s = softcap(torch.einsum("bqhd,bkhd->bqhk", q, k) * m.c.attn_scale, m.c.attn_softcap)
    mask = causal_mask(0, q.shape[1], q.shape[1], m.window, q.device)
    pattern, smooth = ((s / t).masked_fill(mask, -torch.inf).softmax(-1) for t in (1, on.get("temperature", 1)))
    share = 0.5 if "products" in on else 1
    c = share * c.unflatten(-1, heads)
    d = torch.einsum("bqhd,bkhd->bqhk", c, v)
    d = 0 * d if "ah" in on else smooth * (d - (smooth * d).sum(-1, keepdim=True)) * share * m.c.attn_scale
    d = d if m.c.attn_softcap is None else d * (1 - (s / m.c.attn_softcap).square())
    into = [("bqhk,bkhd->bqhd", d, k), ("bqhk,bqhd->bkhd", d, q), ("bqhk,bqhd->bkhd", pattern, c)]
    owed = [torch.einsum(*product).detach() for product in into]
    return torch.autograd.grad((q, k, v), leaves, owed)  # back through the rotation and the shared heads


def linear_gradient(m, x, y, c, on):
    """c W; epsilon-rule: y / (y + epsilon sign y) of it; gamma-rule: y is divided as z_ij + gamma z_ij^(sign of y)."""
    x, weight, bias = x[0], m.weight, 0 * m.weight[:, 0] if m.bias is None else m.bias
    if "epsilon" in on:
        return [(c * y.abs() / (y.abs() + on["epsilon"])) @ weight]
    if "gamma" not in on:
        return [c @ weight]

    def boosted(z, y):
        return z + on["gamma"] * z.where(z * y > 0, 0)

    gradient = torch.zeros_like(x)
    for i in map(tuple, c.any(-1).nonzero().tolist()):  # the positions that the signal reaches
        z = boosted(weight * x[i], y[i][:, None])  # [output, input]
        total = z.sum(1) + boosted(bias, y[i])
        of_inputs = (c[i] * y[i] / torch.where(total == 0, 1, total)) @ z
        gradient[i] = of_inputs / torch.where(x[i] == 0, 1, x[i])
    return [gradient]


def unembedding_gradient(m, x, y, c, on):
    """A linear layer's, and the derivative of the softcap after it."""
    weight, cap = (m.embed_tokens if m.config.tied else m.unembed_tokens).weight, m.config.logit_softcap
    c = c if cap is None else c * (1 - (y / cap).square())
    return linear_gradient(SimpleNamespace(weight=weight, bias=None), x, x[0] @ weight.T, c, on)


PIECES = {  # kind of module: the formula, and the rules that change it
    "Norm": (norm_gradient, ["ln"]),
    "Linear": (linear_gradient, ["epsilon", "gamma"]),
    "Attention": (attention_gradient, ["ah", "temperature", "products"]),
    "MLP": (mlp_gradient, ["identity", "half"]),
    "Transformer": (unembedding_gradient, ["epsilon", "gamma"]),
}


def main(argv: list[str] | None = None) -> None:
    without = ["nodes", "dtype", "metric", "batch-size"]
    o = parse(common_parser("python -m beyond.audit", __doc__.splitlines()[0], without), argv)
    o.dtype = "float64"
    for name in o.model:
        model, pairs = load(name, o)
        original, _, _ = tensors([pairs[i] for i in next(batches(pairs, 4))], o.device)
        for m in [method(m, model.config.family, o.rules) for m in o.methods]:
            if m.lrp is not False:
                for rule, calls in audit(model, original, m.lrp).items():
                    where = ", ".join(f"{n} x {kind}" for kind, n in calls.items())
                    say(f"  {m.label:20} {rule:12} {where or 'met no module'}")


if __name__ == "__main__":
    sys.exit(run(main))
