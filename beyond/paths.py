"""Gradients at points between the two runs, for comparison: expected gradients, and EAP-IG for nodes.

    score(node) = (node(x_patch) - node(x_original)) . mean of the metric's gradient at several points

At a point, one activation is replaced by original + share (patch - original), at all positions together. What follows
is computed from it, with the original prompt. All nodes' gradients are taken at the same points, by one forward and one
backward pass per point; two forward passes more are for the difference.

    method                 what is moved                              share                   points
    expected gradients     the embedding                              random                  1 by default
    EAP-IG, inputs         the embedding                              0, 1/m .. (m - 1)/m     m
    EAP-IG, activations    each component in turn, and no other       the same                m for each component

Integrated Gradients, relp.integrated(), moves each node itself and takes its gradient there: the same shares as EAP-IG,
but m points for every node and layer that is scored.
"""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor

import relp
from models import upcast
from relp import Key

EMBEDDING = ("resid_pre", 0)

Point = tuple[Key, Tensor]  # an activation, and how far it is moved from the original to the patch run: [batch]


def expected_gradients(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=relp.logit_diff, draws: int = 1
) -> dict[str, Tensor]:
    """Expected gradients (Erion et al. 2021, arXiv 1906.10670): the share is drawn from 0 to 1, anew for each pair.

    E[(x' - x) . gradient at x + share (x' - x)], estimated from this number of draws. Theirs draws the baseline x' too;
    here it is the patch prompt. Arguments and result as in relp.attribute().
    """
    points = [(EMBEDDING, share) for share in shares(original, patch, draws)]
    return attribute(model, original, patch, answers, nodes, metric, points)


def shares(original: Tensor, patch: Tensor, draws: int) -> Tensor:
    """[draws, batch], uniform from 0 to 1. A pair's tokens are its seed: the other pairs of a batch do not matter."""
    seeds = [zlib.crc32(repr(pair).encode()) for pair in zip(original.tolist(), patch.tolist())]
    of_pairs = [torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(of_pairs, dim=1)


def eap_ig_inputs(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=relp.logit_diff, steps: int = 5
) -> dict[str, Tensor]:
    """EAP-IG-inputs (Hanna et al. 2024, arXiv 2403.17806): the embedding at `steps` points, the original among them.

    What edges/scores.py has for edges. Arguments and result as in relp.attribute().
    """
    return attribute(model, original, patch, answers, nodes, metric, way(EMBEDDING, original, steps))


def eap_ig_activations(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=relp.logit_diff, steps: int = 5
) -> dict[str, Tensor]:
    """EAP-IG-activations as its code computes it (github.com/hannamw/EAP-IG, get_scores_ig_activations).

    The components, which are the embedding and each layer's heads and MLP, are moved in turn. A node's gradient is the
    mean over all these points, whichever component is moved. With the node's own points only it would be Integrated
    Gradients, relp.integrated(), at the very same values. Arguments and result as in relp.attribute().
    """
    components = [EMBEDDING, *((name, layer) for layer in range(model.config.n_layers) for name in ("z", "mlp_out"))]
    points = [point for component in components for point in way(component, original, steps)]
    return attribute(model, original, patch, answers, nodes, metric, points)


def way(key: Key, original: Tensor, steps: int) -> list[Point]:
    """EAP-IG's points, patch + k/m (original - patch) with k = 1 .. m, counted from the original's side."""
    return [(key, torch.full((len(original),), k / steps, dtype=torch.float64)) for k in range(steps)]


def attribute(
    model,
    original: Tensor,
    patch: Tensor,
    answers: Tensor,
    nodes,
    metric: str | Callable,
    points: list[Point],
) -> dict[str, Tensor]:
    """relp.attribute() with rho the mean of the plain gradients at these points."""
    relp.check(model, original, patch, answers, nodes, metric)
    moved = {name for (name, _), _ in points}
    relp.check(model, original, patch, answers, moved, metric)
    names = {*nodes, *moved}
    _, acts = relp.record(model, original, names)
    patch_stream, patch_acts = relp.record(model, patch, names)
    answers = relp.targets(model, patch_stream, answers, metric)
    total = {key: torch.zeros_like(upcast(x)) for key, x in acts.items()}
    for key, share in points:
        there = {key: between(acts[key], patch_acts[key], share)}
        for of, rho in relp.coefficients(model, original, answers, names, metric, replace=there)[1].items():
            total[of] += rho
    terms = {key: relp.Terms(acts[key], patch_acts[key], rho / len(points)) for key, rho in total.items()}
    return relp.by_layer(model, nodes, lambda name, key: relp.by_part(terms[key].products(), name).sum(-1))


def between(original: Tensor, patch: Tensor, share: Tensor) -> Tensor:
    """original + share (patch - original), with a share [batch] for each prompt."""
    start, end = upcast(original), upcast(patch)
    return torch.lerp(start, end, share.to(start).view(-1, *[1] * (start.ndim - 1))).to(original.dtype)
