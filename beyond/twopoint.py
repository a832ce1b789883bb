"""Two-point rules, ours: what Table 1 holds constant at the original run is taken between the two runs.

RelP looks at the original run only, although the patch run has been computed as well. With its x' beside the original
run's x, rho can be right for the change from x to x' rather than for a small one:

    row             RelP                 two-point
    ln              x [1 / s]            x [mean of 1 / s and 1 / s']
    identity        x [phi(x)]           x [(y' - y) / (x' - x)], the secant of the activation function y = x phi(x)
    half            half of each a*b     a [mean of b and b'] + [a] b
    attention       no rule              the softmax's derivative at the mean of both runs' scores;
                                         pattern times values as the gate's product

It costs the same two forward passes and one backward pass; README.md in this folder says where it helps. This file is
also the example of a rule of one's own: a subclass of Rules, and nothing else has to know of it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import relp
from beyond import rivals
from models import Config, Pass, Rules, attend, attention_scores, backward_as
from relp import Key

QUERIES = 128  # that attention looks at together on the way back: what belongs to them stays in a processor's cache


@dataclass(frozen=True)
class TwoPoint(Rules):
    """The table above, whatever ln, identity, half and ah say; epsilon and gamma are as in Rules.

    notes    what the rules were given in the patch run, in the order of the calls; the original run makes the same ones
    reading  False in the patch run, which writes the notes; True in the original run
    """

    notes: deque | None = field(default=None, repr=False, compare=False)
    reading: bool = False

    def two_runs(self) -> tuple["TwoPoint", "TwoPoint"]:
        """Rules for the patch run, and rules for the original run, which comes after it."""
        writing = replace(self, notes=deque())
        return writing, replace(writing, reading=True)

    def patch_run(self, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """What this call was given in the patch run; None in the patch run itself."""
        if self.notes is None:
            raise ValueError("two-point rules need both runs: call beyond.twopoint.attribute()")
        if self.reading:
            return self.notes.popleft()
        self.notes.append(tuple(x.detach() for x in inputs))

    def norm(self, x: Tensor, eps: float) -> Tensor:
        scale = 1 / (eps + x.detach().square().mean(-1, keepdim=True)).sqrt()
        y, patch = super().norm(x, eps), self.patch_run(scale)
        return y if patch is None else backward_as(y, x * mid(scale, *patch))

    def activation(self, x: Tensor, phi: Callable) -> Tensor:
        y, patch = super().activation(x, phi), self.patch_run(x)
        return y if patch is None else backward_as(y, x * secant(x.detach(), *patch, phi))

    def gate(self, a: Tensor, b: Tensor) -> Tensor:
        patch = self.patch_run(b)
        return super().gate(a, b) if patch is None else product(torch.mul, a, b, *patch)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, c: Config, p: Pass) -> Tensor:
        patch = self.patch_run(q, k, v)
        if patch is None:
            return super().attention(q, k, v, mask, c, p)
        if p.wants("pattern"):
            return between_runs(q, k, v, *patch, mask, c, p)
        value = attend(q.detach(), k.detach(), v.detach(), mask, c, p)
        return backward_as(value, in_blocks(q, k, v, *patch, mask, c, p))


def mid(a: Tensor, b: Tensor) -> Tensor:
    return torch.lerp(a, b, 0.5)


def secant(x: Tensor, x_patch: Tensor, phi: Callable) -> Tensor:
    """(y' - y) / (x' - x) of the activation function y = x phi(x).

    Where x' is too close to x for that quotient, both are first moved apart around their middle, as far as is best for
    a derivative taken from two points: it is then right to about eps^(2/3), 2e-5 in float32.
    """
    middle = mid(x, x_patch)
    least = torch.finfo(x.dtype).eps ** (1 / 3) * middle.abs().clamp(min=1)
    half = torch.maximum((x_patch - x).abs() / 2, least)
    low, high = middle - half, middle + half
    return (high * phi(high) - low * phi(low)) / (high - low)


def product(times: Callable, a: Tensor, b: Tensor, b_patch: Tensor) -> Tensor:
    """times(a, b); on the way back a [mean of b and b'] + [a] b.

    If AP patches values, it leaves the pattern as it is: so the coefficient of b is this run's a. But whatever changes
    the pattern may change the values with it.
    """
    return backward_as(times(a, b), times(a, mid(b.detach(), b_patch)) + times(a.detach(), b))


def between_runs(
    q: Tensor, k: Tensor, v: Tensor, q_patch: Tensor, k_patch: Tensor, v_patch: Tensor, mask: Tensor, c: Config, p: Pass
) -> Tensor:
    """z of attention [b, t, h, d]; what the softmax and the product with v pass back is taken between the two runs."""

    def softmax(scores: Tensor) -> Tensor:
        return scores.masked_fill(mask, -torch.inf).softmax(-1)

    scores = attention_scores(q, k, c)
    between = backward_as(mid(scores.detach(), attention_scores(q_patch, k_patch, c)), scores)
    pattern = p.node("pattern", backward_as(softmax(scores), softmax(between)).to(v.dtype))
    return product(partial(torch.einsum, "bqhk,bkhd->bqhd"), pattern, v, v_patch)


def in_blocks(*inputs) -> Tensor:
    """between_runs() for some queries at a time, computed once more on the way back: so no pattern is kept."""
    *qkv_of_runs, mask, c, p = inputs
    blocks = []
    for start in range(0, len(mask), QUERIES):
        rows, keys = slice(start, start + QUERIES), slice(start + QUERIES)
        block = [x[:, part] for x, part in zip(qkv_of_runs, 2 * (rows, keys, keys))]
        blocks.append(checkpoint(between_runs, *block, mask[rows, :, keys], c, p, use_reentrant=False))
    return torch.cat(blocks, dim=1)


@torch.enable_grad()
def activations_and_rho(
    model, original: Tensor, patch: Tensor, targets: Tensor, nodes, metric=relp.logit_diff, lrp=TwoPoint()
) -> tuple[dict[Key, Tensor], dict[Key, Tensor], dict[Key, Tensor]]:
    """As relp.activations_and_rho(), under two-point rules. ValueError for mixtures of experts."""
    relp.check(model, original, patch, targets, nodes)
    if getattr(model.config, "mixture", None):
        raise ValueError("two-point rules do not fit mixtures of experts: the two runs may choose different experts")
    writing, reading = lrp.two_runs()
    with torch.no_grad():
        stream, patch_acts = relp.record(model, patch, nodes, writing)
        relp.read_out(model, stream, targets, metric, writing)  # for the last norm's note
    stream, acts = relp.record(model, original, nodes, reading, grad=True)
    rho = relp.coefficients(relp.read_out(model, stream, targets, metric, reading), acts)
    return {key: x.detach() for key, x in acts.items()}, patch_acts, rho


def attribute(model, original, patch, targets, nodes, metric=relp.logit_diff) -> dict[str, Tensor]:
    """The method `twopoint`: these rules, but AtP* for queries and keys, and for their heads.

    AP of a query leaves the values as they are, but the rule for pattern times values is made for the change of both.
    Arguments and result as in relp.attribute(). Nodes of both kinds cost the passes of both methods.
    """
    of_queries_and_keys = [name for name in nodes if relp.node_of(name) in ("q", "k")]
    others = [name for name in nodes if name not in of_queries_and_keys]
    result = {}
    if of_queries_and_keys:
        result |= rivals.atp_star(model, original, patch, targets, of_queries_and_keys, metric)
    if others:
        acts, patch_acts, rho = activations_and_rho(model, original, patch, targets, others, metric)
        scores = {key: (relp.difference(acts[key], patch_acts[key]) * rho[key]).sum(-1) for key in rho}
        result |= relp.by_node(scores, others)
    return {name: result[name] for name in nodes}
