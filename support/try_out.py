"""Does a model, a metric, a set of rules do what relp.py takes for granted? A few small passes say so, in one line.

This file imports relp and torch only: it can be copied along with relp.py.
"""

import torch
from torch import Tensor

import relp


@torch.enable_grad()
def try_out(model, original: Tensor, patch: Tensor, targets: Tensor, nodes, metric=relp.logit_diff, lrp=False) -> None:
    """Tries the first prompt. Arguments as in relp.attribute(). ValueError if something is wrong."""
    first, other, of_first = original[:1], patch[:1], targets[:1]
    relp.check(model, first, other, of_first, nodes)
    stream, acts = relp.record(model, first, nodes, grad=True)
    value = relp.read_out(model, stream, of_first, metric)
    if not value.requires_grad:
        raise ValueError("the metric passes back no gradient: it must be computed from the logits by torch")
    rho = relp.coefficients(value, acts)
    try_metric(model, stream.detach(), other, of_first, metric, value.detach())
    if lrp:
        try_rules(model, first, of_first, nodes, metric, lrp, value.detach(), rho)
    if hasattr(model, "block") and {"resid_pre", "k", "v"} <= {*model.nodes}:
        try_block(model, first, stream.detach())


@torch.no_grad()
def try_metric(model, stream: Tensor, patch: Tensor, targets: Tensor, metric, alone: Tensor) -> None:
    """A prompt's value must be the same by itself and beside another prompt."""
    both = torch.cat([stream, model.stream(patch)])
    beside = relp.read_out(model, both, targets.expand(2, *targets.shape[1:]).contiguous(), metric)[:1]
    if not close(beside, alone):
        raise ValueError(
            f"the metric of a prompt depends on the others: {alone.item():.4g} becomes {beside.item():.4g}"
        )


def try_rules(model, tokens: Tensor, targets: Tensor, nodes, metric, lrp, value: Tensor, rho: dict) -> None:
    stream, acts = relp.record(model, tokens, nodes, lrp, grad=True)
    under_rules = relp.read_out(model, stream, targets, metric, lrp)
    if not close(under_rules, value):
        raise ValueError(f"values change under the rules: {value.item():.6g} becomes {under_rules.item():.6g}")
    of_rules = relp.coefficients(under_rules, acts)
    if any(x.any() for x in rho.values()) and all(torch.equal(of_rules[key], rho[key]) for key in rho):
        raise ValueError("the rules change no coefficient: with this model, RelP's scores would be AtP's")


@torch.no_grad()
def try_block(model, original: Tensor, final: Tensor) -> None:
    """The embedding in the middle is edited: the run that is resumed there must end as the whole run does."""
    _, acts = relp.record(model, original, {"resid_pre", "head_k", "head_v"})
    pos = original.shape[1] // 2
    x = acts["resid_pre", 0].squeeze(2)[:, pos:].clone()
    x[:, 0] = x[:, 0].flip(-1)

    def write(name, layer, y):
        if layer == 0:
            y = y.clone()
            y[:, pos] = x[:, 0]
        return y

    def join(name, layer, y):
        return torch.cat([acts[f"head_{name}", layer][:, :pos], y], dim=1)

    write.nodes, join.nodes = {"resid_pre"}, {"k", "v"}
    whole, run = model.stream(original, hook=write), x
    for layer in range(model.config.n_layers):
        last = model.block(layer, run, hook=join, start=pos, last=True)
        run = model.block(layer, run, hook=join, start=pos)
    same = close(whole[:, :pos], final[:, :pos]) and close(run, whole[:, pos:]) and close(last, whole[:, -1:])
    if not same:
        raise ValueError(
            "block() does not resume an edited run: use relp.activation_patching, which runs the whole model"
        )


def close(x: Tensor, y: Tensor) -> bool:
    """Equal but for rounding."""
    rounding = torch.finfo(y.dtype).eps ** 0.5
    return x.shape == y.shape and (not y.numel() or bool((x - y).abs().max() <= rounding * y.abs().max().clamp(min=1)))
