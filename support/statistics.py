"""How well a method predicts activation patching (AP), and how sure that is.

Scores of all prompts are [prompt, layer, pos], maybe with parts after that, NaN beyond a prompt's length. groups[i] is
prompt i's template; positions have the same meaning within a template.

Every measure is a function of how often each prompt counts, weights [W, prompt]: once each for the number itself, as
often as it was drawn for a bootstrap resample. The same weights for two methods make their difference a paired one.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A number and the ends of its 95 % interval. In JSON it is a list of three."""

    value: float
    low: float
    high: float


def resamples(groups: list[str], B: int = 1000, seed: int = 0) -> Tensor:
    """Weights [1 + B, prompt]: every prompt once, then how often each was drawn in each of B bootstrap resamples.

    Prompts are drawn with replacement within each group, as many as it has (the design fixes how many a template has).
    Prompts that are the only ones of their group are drawn together, as one more group; a resample leaves the cells of
    an absent group out. One prompt in all says nothing about the spread: its resamples are 0, and every measure is NaN.
    """
    generator, weights = torch.Generator().manual_seed(seed), torch.zeros(B, len(groups), dtype=torch.float64)
    strata = [g if groups.count(g) > 1 else None for g in groups]
    for stratum in dict.fromkeys(strata if len(groups) > 1 else ()):
        rows = torch.tensor([i for i, other in enumerate(strata) if other == stratum])
        drawn = rows[torch.randint(len(rows), (B, len(rows)), generator=generator)]
        weights.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return torch.cat([torch.ones(1, len(groups), dtype=torch.float64), weights])


def estimate(values: Tensor) -> Estimate:
    """The first of `values` [1 + B], and the 2.5th and 97.5th percentile of the others, which are of the resamples.

    Undefined resamples (NaN) are left out. Where they are more than a twentieth, the interval is undefined too.
    """
    value, resampled = float(values[0]), values[1:]
    if resampled.isnan().double().mean() > 0.05:
        return Estimate(value, math.nan, math.nan)
    low, high = resampled.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Estimate(value, low, high)


def mean(values: Tensor, weights: Tensor) -> Estimate:
    """The mean of one value per prompt."""
    return estimate(weights @ values.double() / weights.sum(1))


def agreement(
    scores: Tensor, ap: Tensor, groups: list[str], cells: Tensor | None = None, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """How well a method's scores s predict AP's a, as {measure: [W]}; W is 1 without weights. All in float64.

    Three Pearson correlations (PCC; Section 5.1 of the paper leaves open which); NaN where one side is constant:

    averaged         of the averaged maps: per group the mean over its prompts (as in Figure 2), groups concatenated
    pooled           over all cells of all prompts at once
    per_prompt       the mean over prompts of each prompt's own; per_prompt_std is their spread over prompts

    The others are of the averaged maps, as `averaged` is. In parentheses what a perfect method has:

    spearman         PCC of the cells' ranks, equal values sharing their mean rank: is the order right? (1)
    sign             of the cells that matter, |a| >= 10 % of the largest |a|, the share where s has a's sign (1)
    recall           of AP's top 10 cells by |a|, the share in the method's top 10 by |s|; see `top` for ties (1)
    slope            sum(a s) / sum(a a), the least-squares line through 0: is the size right, or only the shape? (1)
    false_negative   the largest |a| where the method says zero, |s| <= 1 % of the largest |s|, as a share of the
                     largest |a| (0)

    cells, shaped like the scores and bool: only these cells count; in an averaged map, those that are True in a drawn
    prompt.
    """
    weights = (torch.ones(1, len(ap)) if weights is None else weights).double()
    padding = ap.flatten(1).isnan()
    there = ~padding if cells is None else ~padding & cells.flatten(1)
    s, a = (x.double().flatten(1).masked_fill(padding, 0) for x in (scores, ap))
    rows = [[i for i, other in enumerate(groups) if other == g] for g in dict.fromkeys(groups)]

    def of_averages(w: Tensor) -> dict[str, Tensor]:
        def total(x: Tensor) -> Tensor:  # [w, cells of all groups]
            return torch.cat([w[:, r] @ x[r].double() for r in rows], dim=1)

        keep, drawn = (total(there) > 0) & (total(padding) == 0), total(~padding)
        return of_maps(total(s) / drawn, total(a) / drawn, keep)

    parts = [of_averages(w) for w in weights.split(max(1, 2**22 // (len(rows) * s.shape[1])))]  # 32 MB a map
    sums = moments(s, a, there)
    each = correlation(sums)
    w = weights * ~each.isnan()
    average, square = (w @ x.nan_to_num() / w.sum(1) for x in (each, each * each))
    return {
        **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        "pooled": correlation(weights @ sums),
        "per_prompt": average,
        "per_prompt_std": (square - average * average).clamp(min=0).sqrt(),
    }


def of_maps(s: Tensor, a: Tensor, keep: Tensor, k: int = 10) -> dict[str, Tensor]:
    """The measures of the averaged maps s and a [W, cell], over the cells in keep; `agreement` defines them."""
    pcc = correlation(moments(s, a, keep))
    order = (ranks(x.masked_fill(~keep, math.inf)) for x in (s, a))  # what is left out comes last: no rank changes
    spearman = correlation(moments(*order, keep)).where(~pcc.isnan(), torch.nan)  # a constant's order is rounding
    s, a = s.masked_fill(~keep, 0), a.masked_fill(~keep, 0)
    most_s, most_a = (x.abs().amax(1, keepdim=True) for x in (s, a))
    return {
        "averaged": pcc,
        "spearman": spearman,
        "sign": share(s.sign() == a.sign(), (a.abs() >= 0.1 * most_a) & (a != 0)),
        "recall": share(top(s.abs(), k), top(a.abs(), k)),
        "slope": (a * s).sum(1) / (a * a).sum(1),
        "false_negative": a.abs().masked_fill(s.abs() > 0.01 * most_s, 0).amax(1) / most_a[:, 0],
    }


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Of the cells of each row that are in `whole`, the share that is in `part` as well."""
    return (part & whole).double().sum(1) / whole.double().sum(1)


def top(size: Tensor, k: int) -> Tensor:
    """Which cells of each row are among the k largest. Zeros never are, nor are ties for which there is no room."""
    return size > (size.topk(k + 1).values[:, -1:] if k < size.shape[1] else 0)


def ranks(x: Tensor) -> Tensor:
    """Each value's rank in its row, from 1; equal values share the mean of their ranks: 5 7 7 9 have 1 2.5 2.5 4."""
    ordered, at = x.sort()
    i, new = torch.arange(x.shape[1]), torch.ones_like(x, dtype=torch.bool)  # new: not the value before it again
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(new, i, 0).cummax(1).values  # of the run of equal values that a value belongs to
    last = torch.where(new.roll(-1, 1), i, x.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(x).scatter(1, at, (first + last).to(x.dtype) / 2 + 1)


def moments(a: Tensor, b: Tensor, there: Tensor) -> Tensor:
    """What a correlation is made of: sums over the last axis, where there is True. Those of several prompts add up."""
    a, b = a.masked_fill(~there, 0), b.masked_fill(~there, 0)
    return torch.stack([x.sum(-1) for x in (there.double(), a, b, a * a, b * b, a * b)], dim=-1)


def correlation(sums: Tensor) -> Tensor:
    """Pearson correlation from moments [..., 6]; NaN where one side is constant (to the rounding of the sums)."""
    n, a, b, aa, bb, ab = sums.unbind(-1)
    var_a, var_b = aa - a * a / n, bb - b * b / n
    varies = (var_a > 1e-12 * aa) & (var_b > 1e-12 * bb)
    return torch.where(varies, (ab - a * b / n) / (var_a.sqrt() * var_b.sqrt()), torch.nan)


def agreements(scores: dict, differs: dict, nodes: list[str], methods: list[str], weights: Tensor, groups: list[str]):
    """How well each of the methods predicts AP, and how each two of them differ, with their intervals.

    scores: {(method, node): [n, layers, positions, ...]}, those of "ap" among them; differs: {node: the same, 1 where
    the two runs differ}. Returns two dictionaries. The first, {method: {node: ...}}, holds agreement()'s measures,
    "interval": {measure: (low, high)}, "changed_cells": the same without the cells where the two runs agree, and
    "by_layer", see there. The second is {"relp - atp": {node: {measure: Estimate}}} for each two methods, on the same
    resamples of the prompts: an interval without 0 says that they differ.
    """
    each, differences = {method: {} for method in methods}, {}
    for node in nodes:
        ap, changed, values = torch.tensor(scores["ap", node]), torch.tensor(differs[node]) == 1, {}
        for method in methods:
            pair = torch.tensor(scores[method, node]), ap
            values[method] = agreement(*pair, groups, weights=weights)
            each[method][node] = with_intervals(values[method]) | {
                "changed_cells": with_intervals(agreement(*pair, groups, changed, weights)),
                "by_layer": by_layer(*pair),
            }
        for one, other in itertools.combinations(methods, 2):
            differences.setdefault(f"{other} - {one}", {})[node] = {
                measure: estimate(values[other][measure] - value) for measure, value in values[one].items()
            }
    return each, differences


def by_layer(scores: Tensor, ap: Tensor) -> dict[str, list[float]]:
    """Over all prompts, for each layer: the slope as in agreement(), and the layer's share of AP's squared effects."""
    s, a = (x.nan_to_num().double().transpose(0, 1).flatten(1) for x in (scores, ap))
    squares = (a * a).sum(1)
    return {"slope": ((a * s).sum(1) / squares).tolist(), "share": (squares / squares.sum()).tolist()}


def with_intervals(measures: dict[str, Tensor]) -> dict:
    """{measure: value, ..., "interval": {measure: (low, high)}}"""
    estimates = {measure: estimate(values) for measure, values in measures.items()}
    intervals = {measure: (e.low, e.high) for measure, e in estimates.items()}
    return {measure: e.value for measure, e in estimates.items()} | {"interval": intervals}
