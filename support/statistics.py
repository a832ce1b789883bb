"""How well a method's scores predict activation patching (AP), and how sure that is.

Scores of all prompts are [prompt, layer, position], maybe with parts (heads, neurons) after that, and NaN beyond a
prompt's length. groups[i] is the group of prompt i. Prompts of one group have one length, and their positions mean the
same: the averaged map of a group is the mean over its prompts, as in Figure 2 of the paper.

Every measure is a function of how often each prompt counts, weights [W, prompt]. Each prompt counts once for the number
itself, and as often as it was drawn for a bootstrap resample. Two methods get the same weights, so their difference is
a paired one.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A number and the ends of its 95 % interval. In JSON it is a list of three."""

    value: float
    low: float
    high: float


def resamples(groups: list[str], B: int = 1000, seed: int = 0) -> Tensor:
    """Weights [1 + B, prompt]: every prompt once, then how often each was drawn in each of B bootstrap resamples.

    Prompts are drawn with replacement within each group, as many as it has. Prompts that are the only ones of their
    group are drawn together, as one more group; a resample can then lack a group. One prompt in all says nothing about
    the spread: its resamples are 0, and every interval is NaN.
    """
    generator, weights = torch.Generator().manual_seed(seed), torch.zeros(B, len(groups), dtype=torch.float64)
    strata = [g if groups.count(g) > 1 else None for g in groups]
    for rows in rows_of(strata).values() if len(groups) > 1 else ():
        drawn = rows[torch.randint(len(rows), (B, len(rows)), generator=generator)]
        weights.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return torch.cat([torch.ones(1, len(groups)), weights])


def rows_of(groups: list) -> dict[str, Tensor]:
    """{group: the numbers of its prompts}, groups in order of appearance."""
    return {g: torch.tensor([i for i, other in enumerate(groups) if other == g]) for g in dict.fromkeys(groups)}


def estimate(values: Tensor) -> Estimate:
    """The first of `values` [1 + B], and the 2.5th and 97.5th percentile of the others, which are of the resamples.

    Undefined resamples (NaN) are left out. If more than a twentieth are undefined, the interval is undefined too.
    """
    value, resampled = float(values[0]), values[1:]
    if resampled.isnan().double().mean() > 0.05:
        return Estimate(value, math.nan, math.nan)
    return Estimate(value, *np.nanquantile(resampled.numpy(), [0.025, 0.975]).tolist())


def mean(values: Tensor, weights: Tensor) -> Estimate:
    """The mean of one value per prompt."""
    return estimate(weights @ values.double() / weights.sum(1))


def agreement(scores: Tensor, ap: Tensor, groups: list[str], weights: Tensor | None = None) -> dict[str, Tensor]:
    """How well a method's scores s predict AP's a, as {measure: [W]}. Without weights, W is 1.

    averaged    Pearson's correlation (PCC) over all cells of the averaged maps, those of all groups together
    pooled      PCC over all cells of all prompts at once
    per_prompt  the mean over prompts of each prompt's own PCC
    slope       sum(a s) / sum(a a) of the averaged maps: 1 is the right size, 0.5 is half of it

    The paper (Section 5.1) leaves open which PCC it uses. A PCC is NaN if one side is constant.
    """
    weights = torch.ones(1, len(ap), dtype=torch.float64) if weights is None else weights
    s, a = (x.double().flatten(1) for x in (scores, ap))
    of_maps = 0
    for rows in rows_of(groups).values():
        cells = ~a[rows].isnan().any(0)
        of_maps = of_maps + moments_of_means(s[rows][:, cells], a[rows][:, cells], weights[:, rows])
    each = moments(s, a)
    own = correlation(each)
    defined = (~own.isnan()).double()
    return {
        "averaged": correlation(of_maps),
        "pooled": correlation(weights @ each),
        "per_prompt": (weights @ own.nan_to_num()) / (weights @ defined),
        "slope": of_maps[:, 5] / of_maps[:, 4],
    }


def moments(s: Tensor, a: Tensor) -> Tensor:
    """What a correlation is made of, [..., 6]: n, sum s, sum a, sum s s, sum a a, sum s a over the last axis.

    Cells where a is NaN are left out. Moments of several prompts add up to those of all their cells.
    """
    there = ~a.isnan()
    s, a = s.where(there, 0), a.where(there, 0)
    return torch.stack([x.sum(-1) for x in (there, s, a, s * s, a * a, s * a)], dim=-1)


def moments_of_means(s: Tensor, a: Tensor, weights: Tensor) -> Tensor:
    """moments() of the weighted means of s and a [prompt, cell] over the prompts: [W, 6] for weights [W, prompt].

    With p = weights / their sum, a mean map is p s, and the sum over its cells of products is (p s) . (p a) =
    p (s a^T) p^T. The matrix s a^T [prompt, prompt] is the same for all resamples: no resample's map is ever formed.
    """
    drawn = weights.sum(1)
    p = weights / drawn.clamp(min=1).unsqueeze(1)  # a group of which no prompt was drawn adds nothing

    def products(x: Tensor, y: Tensor) -> Tensor:
        return (p @ (x @ y.T) * p).sum(1)

    n = s.shape[1] * (drawn > 0)
    return torch.stack([n, p @ s.sum(1), p @ a.sum(1), products(s, s), products(a, a), products(s, a)], dim=-1)


def correlation(sums: Tensor) -> Tensor:
    """Pearson's correlation from moments [..., 6]; NaN if one side is constant (to the rounding of the sums)."""
    n, s, a, ss, aa, sa = sums.unbind(-1)
    var_s, var_a = ss - s * s / n, aa - a * a / n
    varies = (var_s > 1e-12 * ss) & (var_a > 1e-12 * aa)
    return torch.where(varies, (sa - s * a / n) / (var_s.sqrt() * var_a.sqrt()), torch.nan)


def averaged_maps(values: Tensor, groups: list[str]) -> dict[str, Tensor]:
    """{group: the mean over its prompts [layer, position, ...]}, NaN beyond their length."""
    return {group: values[rows].double().mean(0) for group, rows in rows_of(groups).items()}


def rank_correlation(scores: Tensor, ap: Tensor, groups: list[str]) -> float:
    """Spearman's correlation over all cells of the averaged maps: is the order right?"""
    s, a = (torch.cat([x.flatten() for x in averaged_maps(values, groups).values()]) for values in (scores, ap))
    there = ~a.isnan()
    if correlation(moments(s, a)).isnan():  # the order of a constant's cells is only rounding
        return math.nan
    return float(correlation(moments(ranks(s[there]), ranks(a[there]))))


def ranks(x: Tensor) -> Tensor:
    """Each value's rank, from 1; equal values share the mean of their ranks: 5 7 7 9 have 1 2.5 2.5 4."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # the rank of the last of the equal values
    return (last - (counts - 1) / 2)[which]


def largest_error(scores: Tensor, ap: Tensor, groups: list[str]) -> dict:
    """Where in the averaged maps a method is wrong most: error (score - AP), AP there, and the cell.

    "position" counts within the prompts of the "group". "part" is the head or neuron, None if nodes have no parts.
    """
    found = []
    truth = averaged_maps(ap, groups)
    for group, of_method in averaged_maps(scores, groups).items():
        error = (of_method - truth[group]).nan_to_num()
        at = np.unravel_index(int(error.abs().argmax()), error.shape)
        layer, position, *part = map(int, at)
        cell = {"layer": layer, "position": position, "part": part[0] if part else None, "group": group}
        found.append({"error": float(error[at]), "ap": float(truth[group][at]), **cell})
    return max(found, key=lambda one: abs(one["error"]))


def agreements(scores: dict, nodes: list[str], methods: list[str], groups: list[str], weights: Tensor):
    """How well each of the methods predicts AP, and how each two of them differ: (agreement, differences).

    scores: {(method, node): array [n, layers, positions, ...]}, those of "ap" among them. agreement {method: {node:
    ...}} has the measures of agreement() as Estimates, "rank" (see rank_correlation), "largest_error" (see there) and
    "largest_effect", the largest |AP| of the averaged maps. differences {"relp - atp": {node: Estimate}} are those of
    the averaged PCC, for each two methods: an interval without 0 says that they differ.
    """
    result, differences = {method: {} for method in methods}, {}
    for node in nodes:
        ap, pcc = torch.as_tensor(scores["ap", node]), {}
        effect = max(float(x.nan_to_num().abs().max()) for x in averaged_maps(ap, groups).values())
        for method in methods:
            of_method = torch.as_tensor(scores[method, node])
            measures = agreement(of_method, ap, groups, weights)
            pcc[method] = measures["averaged"]
            result[method][node] = {measure: estimate(values) for measure, values in measures.items()}
            result[method][node] |= {
                "rank": rank_correlation(of_method, ap, groups),
                "largest_error": largest_error(of_method, ap, groups),
                "largest_effect": effect,
            }
        for one, other in itertools.combinations(methods, 2):
            differences.setdefault(f"{other} - {one}", {})[node] = estimate(pcc[other] - pcc[one])
    return result, differences
