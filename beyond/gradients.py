"""The gradient that the audit expects of each piece of a forward pass: formulas by hand, which call no rule.

A formula takes the module m, its inputs x in this run and x2 in the patch run (without one, again x), output y, signal
c, and the rules that are on {name: value}, named as the command does (ln2: the two-point LN-rule). It returns one
gradient per input. What goes through `rounded` on the way is what the model rounds before something of the same size is
subtracted.
"""

import torch
from torch import Tensor, nn

from models import Linear, causal_mask, rotate, softcap


def leaf(x: Tensor) -> Tensor:
    """x cut off from what it was made of; a gradient can be taken with respect to it."""
    return x.detach().requires_grad_()


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
