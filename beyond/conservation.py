"""Conservation: how much of the metric's relevance is left at each layer, and what the rest was lost to."""

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import relp


def conservation(model, tokens: Tensor, answers: Tensor, metric=relp.logit_diff, lrp=True) -> dict:
    """What the stream keeps of the metric's relevance, and what each block loses, as fractions of the metric.

    A tensor x holds the relevance x . rho. On the way back through a module relevance is lost:

        held(output) - held(input) = the bias's b . rho(b) + what the modules within it lose + its own loss

    Attention's own loss is the softmax's (negative: q and k get relevance too), MLP's that of activation and gate,
    Linear's the epsilon-rule's. A block's own is called "residual".

        {"prompts": .., "metric": mean over them, "kept": [layer + 1], "lost": {kind: [layer + 1]}}

    kept[l] + all lost[..][l] = kept[l + 1]; the last entries are the final stream, and what lies between it and the
    metric. ValueError for rules that look at two runs.
    """
    if hasattr(lrp, "two_runs"):
        raise ValueError("with rules that look at two runs, not x . rho is conserved but (x_patch - x) . rho")
    parts, entered, left = [*model.blocks, model.ln_f], {}, {}
    modules = [m for part in parts for m in part.modules()]
    biases = {m: m.bias for m in modules if getattr(m, "bias", None) is not None}
    if any(hasattr(b, "full_tensor") for b in biases.values()):
        raise ValueError("conservation is for models whose weights are not shared out over several processes")

    def before(m, args):
        x = args[0]  # several modules may read one tensor; a view gives each reader a gradient of its own
        entered[m] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return entered[m], *args[1:]

    def after(m, args, y):
        left[m] = y

    hooks = [m.register_forward_pre_hook(before) for m in modules]
    hooks += [m.register_forward_hook(after) for m in modules]
    needed = {b: b.requires_grad for b in biases.values()}
    try:
        for b in needed:
            b.requires_grad_()
        with torch.enable_grad():
            value = relp.read_out(model, model.stream(tokens, lrp), answers, metric, lrp).sum()
            nodes = [*entered.values(), *left.values(), *biases.values()]
            rho = torch.autograd.grad(value, nodes, materialize_grads=True)
    finally:
        for h in hooks:
            h.remove()
        for b, needed_before in needed.items():
            b.requires_grad_(needed_before)
    value = float(value.detach()) or math.nan  # there are no fractions of 0
    held = [float((x.detach().cpu().double() * r.cpu().double()).sum()) / value for x, r in zip(nodes, rho)]
    at_entry = dict(zip(entered, held[: len(entered)]))
    at_exit = dict(zip(left, held[len(entered) : len(entered) + len(left)]))
    at_bias = dict(zip(biases, held[len(entered) + len(left) :]))

    lost = {}
    for layer, part in enumerate(parts):
        for m in filter(entered.__contains__, part.modules()):
            within = sum(at_exit[child] - at_entry[child] for child in called_within(m, entered))
            bias = at_bias.get(m, 0.0)
            own = "residual" if m in parts[:-1] else type(m).__name__
            for kind, loss in ((own, at_exit[m] - at_entry[m] - bias - within), ("biases", bias)):
                lost.setdefault(kind, [0.0] * len(parts))[layer] += loss
    lost["unembedding"] = [0.0] * (len(parts) - 1) + [1 - at_exit[model.ln_f]]
    kept = [at_entry[part] for part in parts]
    return {"prompts": len(tokens), "metric": value / len(tokens), "kept": kept, "lost": lost}


def called_within(m, entered: dict) -> list:
    """The modules that m has called. A list of experts is not called itself, and some of these may not be either."""
    return [x for child in m.children() for x in ([child] if child in entered else called_within(child, entered))]


KINDS = ["kept", "Attention", "biases", "MLP", "LayerNorm", "RMSNorm", "Linear", "unembedding", "residual"]


def draw(title: str, report: dict) -> Figure:
    """A bar per layer that adds up to the metric: what the stream there keeps of it, and what was lost after it."""
    lost = {kind: np.cumsum(losses[::-1])[::-1] for kind, losses in report["lost"].items()}  # backward from the metric
    parts = {"kept": np.array(report["kept"])} | {k: lost[k] for k in sorted(lost) if np.abs(lost[k]).max() > 1e-3}
    figure = Figure(figsize=(4.8 + 0.35 * len(report["kept"]), 3.4), layout="constrained")
    ax, up, down = figure.subplots(), 0, 0
    for label, heights in parts.items():  # one colour for a kind in all figures
        bottom, color = np.where(heights > 0, up, down), f"C{KINDS.index(label) if label in KINDS else len(KINDS)}"
        name = "kept in the stream" if label == "kept" else f"lost to {label}"
        ax.bar(range(len(heights)), heights, 0.8, bottom, label=name, color=color)
        up, down = up + np.maximum(heights, 0), down + np.minimum(heights, 0)
    ax.axhline(1, color="black", linewidth=0.6, linestyle="--")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(heights)), [*range(len(heights) - 1), "end"], fontsize=8)
    ax.set_xlabel("residual stream before layer")
    ax.set_ylabel("fraction of the metric")
    ax.set_title(f"{title}: relevance, {report['prompts']} prompts", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, title="a negative loss is a gain", title_fontsize=8)
    return figure
