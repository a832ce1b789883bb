"""Two-point rules, ours: what Table 1 holds constant at the original run is taken between the two runs.

RelP linearises around the original run only, although the patch run has been computed as well. With its x' beside the
original run's x, rho can be right for the change from x to x' rather than for a small one:

    row             RelP                 two-point
    ln              x [1 / s]            x [mean of 1 / s and 1 / s']
    identity        x [phi(x)]           x [(y' - y) / (x' - x)], the secant of the activation function y
    half            half of each a*b     a [b] + [a'] b: a goes to its new value first, then b
    attention       no rule              the softmax's derivative at the mean of both runs' scores;
                                         pattern times values as the gate's product

It costs the same two forward passes and one backward pass. README.md in this folder says where it helps and where not.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from models import TABLE_4, Attend, Rules, backward_as

ROWS = ("ln", "identity", "half", "attention")


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
        """Rules for the patch run, which write down what they are given, and for the original run, which read it."""
        notes = Notes()
        return replace(self, notes=notes.write), replace(self, notes=notes.read)

    def patch_run(self, row: str, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """What this call was given in the patch run; None in the patch run itself, and if the row is not two-point."""
        if row not in self.two_point:
            return None
        if self.notes is None:
            raise ValueError("two-point rules need a patch run: call relp.attribute")
        return self.notes(inputs)

    def norm(self, x: Tensor, eps: float) -> Tensor:
        y, patch = super().norm(x, eps), self.patch_run("ln", x)
        if patch is None:
            return y
        scales = [1 / (eps + z.detach().square().mean(-1, keepdim=True)).sqrt() for z in (x, *patch)]
        return backward_as(y, x * mid(*scales))

    def activation(self, x: Tensor, phi: Callable) -> Tensor:
        y, patch = super().activation(x, phi), self.patch_run("identity", x)
        if patch is None:
            return y
        x_patch, here = patch[0], x.detach()
        dx = x_patch - here
        # If x' is close to x the quotient is made of rounding errors; then its limit, the derivative in the middle.
        near = dx.abs() < torch.finfo(x.dtype).eps ** (1 / 3)
        secant = (x_patch * phi(x_patch) - here * phi(here)) / torch.where(near, 1, dx)
        between = backward_as(mid(here, x_patch), x)
        return backward_as(y, torch.where(near, between * phi(between), x * secant))

    def gate(self, a: Tensor, b: Tensor) -> Tensor:
        y, patch = super().gate(a, b), self.patch_run("half", a)
        return y if patch is None else product(torch.mul, a, *patch, b)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        patch = self.patch_run("attention", q, k)
        if patch is None:
            return super().attention(q, k, v, attend)
        scores_patch = attend.scores(*patch)
        pattern_patch = attend.softmax(scores_patch).to(v.dtype)

        def softmax(scores: Tensor) -> Tensor:
            between = backward_as(mid(scores.detach(), scores_patch), scores)
            return backward_as(attend.softmax(scores), attend.softmax(between))

        def mix(pattern: Tensor, v: Tensor) -> Tensor:
            return product(attend.mix, pattern, pattern_patch, v)

        return super().attention(q, k, v, partial(attend.by_hand, softmax=softmax, mix=mix))


def mid(a: Tensor, b: Tensor) -> Tensor:
    return torch.lerp(a, b, 0.5)


def product(times: Callable, a: Tensor, a_patch: Tensor, b: Tensor) -> Tensor:
    """times(a, b); on the way back a [b] + [a'] b.

    The mean of both orders, a [mean of b and b'] + [mean of a and a'] b, is as exact. But where the patch run exchanges
    two values, their means are equal, and nothing is left for the pattern.
    """
    return backward_as(times(a, b), times(backward_as(a_patch, a), b))


class Notes(deque):
    """What the rules are given in the patch run, in the order of the calls: the original run makes the same ones."""

    def write(self, inputs: tuple[Tensor, ...]) -> None:
        self.append(tuple(x.detach() for x in inputs))

    def read(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self or [x.shape for x in self[0]] != [x.shape for x in inputs]:
            raise ValueError("the original run does not do what the patch run did: give both the same rules and shapes")
        return self.popleft()


# The two-point rules of each family: its rows in Table 4, and attention. Gemma 2's norms after attention and MLP are an
# exception: no one coefficient is right both for a small change of their input and for a whole replacement, and the LN-
# and Half-rule do better there. README.md in this folder has the figures.
TWO_POINT = {
    family: TwoPoint(**vars(rules), two_point=tuple(row for row in ROWS if row == "attention" or getattr(rules, row)))
    for family, rules in TABLE_4.items()
} | {"gemma2": TwoPoint(**vars(TABLE_4["gemma2"]), two_point=("identity", "attention"))}
