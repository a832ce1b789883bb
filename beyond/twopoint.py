"""Two-point rules, ours: what Table 1 holds constant at the original run is taken between the two runs.

RelP linearises around the original run only, although the patch run has been computed as well. With its x' beside the
original run's x, rho can be right for the change from x to x' rather than for a small one:

    row             RelP                 two-point
    ln              x [1 / s]            x [mean of 1 / s and 1 / s']
    identity        x [phi(x)]           x [(y' - y) / (x' - x)], the secant of the activation function y
    half            half of each a*b     a [mean of b and b'] + [a] b
    attention       no rule              the softmax's derivative at the mean of both runs' scores;
                                         pattern times values as the gate's product

It costs the same two forward passes and one backward pass. README.md in this folder says how these rules were chosen,
where they help and where not.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import relp
from beyond import atp_star
from models import TABLE_4, Attend, Nodes, Rules, backward_as, upcast

ROWS = ("ln", "identity", "half", "attention")
QUERIES = 128  # at a time, in the backward pass of attention: what belongs to them stays in a processor's cache


@dataclass(frozen=True)
class TwoPoint(Rules):
    """Rules of which the rows in `two_point` are taken between the two runs, even if the row's own flag is off."""

    two_point: tuple[str, ...] = ()
    # Notes.write in the patch run, Notes.read in the original run
    notes: Callable | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        super().__post_init__()
        if unknown := [row for row in self.two_point if row not in ROWS]:
            raise ValueError(f"no two-point rule for {unknown[0]!r}: choose from {', '.join(ROWS)}")

    def two_runs(self) -> tuple["TwoPoint", "TwoPoint"]:
        """Rules for the patch run, which write notes, and for the original run, which read them."""
        notes = Notes()
        return replace(self, notes=notes.write), replace(self, notes=notes.read)

    def patch_run(self, row: str, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """What this call noted in the patch run; None in the patch run itself, and if the row is not two-point."""
        if row not in self.two_point:
            return None
        if self.notes is None:
            raise ValueError("two-point rules need a patch run: call relp.attribute")
        return self.notes(inputs)

    def norm(self, x: Tensor, eps: float) -> Tensor:
        scale = 1 / (eps + x.detach().square().mean(-1, keepdim=True)).sqrt()
        y, patch = super().norm(x, eps), self.patch_run("ln", scale)
        return y if patch is None else backward_as(y, x * mid(scale, *patch))

    def activation(self, x: Tensor, phi: Callable) -> Tensor:
        y, patch = super().activation(x, phi), self.patch_run("identity", x)
        return y if patch is None else backward_as(y, x * secant(x.detach(), *patch, phi))

    def gate(self, a: Tensor, b: Tensor) -> Tensor:
        patch = self.patch_run("half", b)
        return super().gate(a, b) if patch is None else product(torch.mul, a, b, *patch)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        patch = self.patch_run("attention", q, k, v)
        if patch is None:
            return super().attention(q, k, v, attend)
        way = step_by_step if attend.node.wanted("pattern") else InBlocks.apply
        return super().attention(q, k, v, lambda q, k, v: way(attend, q, k, v, *patch))


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


def step_by_step(attend: Attend, q: Tensor, k: Tensor, v: Tensor, *patch: Tensor) -> Tensor:
    """attend(q, k, v) with the pattern formed, and what softmax and product pass back by the two-point rule."""
    q_patch, k_patch, v_patch = patch
    scores = attend.scores(q, k)
    between = backward_as(mid(scores.detach(), attend.scores(q_patch, k_patch)), scores)
    pattern = attend.node("pattern", backward_as(attend.softmax(scores), attend.softmax(between)).to(v.dtype))
    return product(attend.mix, pattern, v, v_patch)


class InBlocks(torch.autograd.Function):
    """attend(q, k, v) with the gradient of step_by_step(), which is computed in the backward pass, some queries at a
    time and without the keys after them: no pattern is kept or formed as a whole.
    """

    @staticmethod
    def forward(ctx, attend: Attend, *inputs: Tensor) -> Tensor:
        ctx.attend = replace(attend, node=Nodes(None, 0))  # the hook may keep the graph, which must not keep the hook
        ctx.save_for_backward(*inputs)
        return attend(*inputs[:3])

    @staticmethod
    def backward(ctx, dz: Tensor) -> tuple[Tensor | None, ...]:
        n_queries, _, n_keys = ctx.attend.mask.shape
        sums = [torch.zeros_like(upcast(x)) for x in ctx.saved_tensors[:3]]
        for start in range(0, n_queries, QUERIES):
            rows, keys = slice(start, start + QUERIES), slice(n_keys - n_queries + start + QUERIES)
            attend = replace(ctx.attend, mask=ctx.attend.mask[rows, :, keys])
            block = [x[:, part] for x, part in zip(ctx.saved_tensors, 2 * (rows, keys, keys))]
            qkv = [x.requires_grad_() for x in block[:3]]
            with torch.enable_grad():
                z = step_by_step(attend, *block)
            for total, part, gradient in zip(sums, (rows, keys, keys), torch.autograd.grad(z, qkv, dz[:, rows])):
                total[:, part] += gradient
        return None, *sums, None, None, None


class Notes(deque):
    """What the rules note in the patch run, in the order of the calls: the original run makes the same ones."""

    def write(self, inputs: tuple[Tensor, ...]) -> None:
        self.append(tuple(x.detach() for x in inputs))

    def read(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self or [x.shape for x in self[0]] != [x.shape for x in inputs]:
            raise ValueError("the original run does not do what the patch run did: give both the same rules and shapes")
        return self.popleft()


# The two-point rules of each family: its rows in Table 4, and attention.
TWO_POINT = {
    family: TwoPoint(**vars(rules), two_point=tuple(row for row in ROWS if row == "attention" or getattr(rules, row)))
    for family, rules in TABLE_4.items()
}


def attribute(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=relp.logit_diff
) -> dict[str, Tensor]:
    """The method `twopoint`: these rules, but AtP* for queries and keys, and for their heads.

    AP of a query leaves the values as they are, so that the rule for their product, which is made for the change of
    both, is the wrong one there. Arguments and result as in relp.attribute(). If nodes of both kinds are asked for, the
    price is that of both methods.
    """
    relp.check(model, original, patch, answers, nodes, metric)
    of_attention = [name for name in nodes if relp.node_of(name) in ("q", "k")]
    others, result = [name for name in nodes if name not in of_attention], {}
    if of_attention:
        result |= atp_star.attribute(model, original, patch, answers, of_attention, metric)
    if others:
        rules = TWO_POINT[model.config.family]
        result |= relp.attribute(model, original, patch, answers, others, metric, lrp=rules)
    return {name: result[name] for name in nodes}
