"""Rank, then verify: AP of those nodes only that a cheap method, or doubt, ranks highest, over all kinds of nodes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import relp
from support.doubt import DOUBT_NEEDS, doubts
from support.methods import Method
from support.positions import laid_over, legend, overlay
from support.scoring import Batch, Scores, patch_all
from tasks import Pair


@dataclass
class Verified:
    """What is written to verified.json. A node is a kind, a layer, a position (by its role) and maybe a part."""

    ranked_by: str  # the method, or doubt
    nodes: list[dict]  # the K first: node, layer, position, part, scores {method: its mean over the prompts}, doubt
    of: int  # how many nodes there are
    bound: float  # the largest score, in size, or doubt of the others
    seconds: float  # of AP


def verify(scores: Scores, pairs: list[Pair], nodes: list[str], methods: list[str], by: str, k: int, score) -> Verified:
    """AP of the k nodes with the largest averaged scores by the method `by`, or with the largest doubt.

    methods: names of those that `scores` has; by: one of them, or "doubt". score(run_ap=f) -> Scores scores the pairs
    by AP, which f does: see scoring.score_pairs.
    """
    labels, at = overlay(pairs)
    maps = {(m, node): laid_over(scores.scores[m, node], at) for m in methods for node in nodes}
    sizes = doubts(maps) if by == "doubt" else {node: np.abs(maps[by, node]) for node in nodes}
    ranking = [(node, index) for node in nodes for index in np.ndindex(sizes[node].shape)]
    size = np.concatenate([sizes[node].ravel() for node in nodes])
    order = np.argsort(-size, kind="stable")
    cells = {node: np.zeros(scores.scores[methods[0], node].shape, bool) for node in nodes}
    for i in order[:k]:
        node, (layer, label, *part) = ranking[i]
        rows = np.flatnonzero(at[:, label] >= 0)
        cells[node][(rows, layer, at[rows, label], *part)] = True
    exact = score(run_ap=patch_cells(cells))
    rows = []
    for i in order[:k]:
        node, index = ranking[i]
        layer, label, *part = index
        values = {m: float(maps[m, node][index]) for m in methods}
        values["ap"] = float(laid_over(exact.scores["ap", node], at)[index])
        place = {"node": node, "layer": layer, "position": labels[label], "part": part[0] if part else None}
        rows.append(place | {"scores": values} | ({"doubt": float(size[i])} if by == "doubt" else {}))
    bound = float(size[order[k]]) if k < len(order) else 0.0
    return Verified(by, rows, len(order), bound, exact.seconds["ap"])


def patch_cells(cells: dict[str, np.ndarray]) -> Callable:
    """AP of these cells only, {node: bool [n, layers, positions, ...]}, for scoring.score_pairs."""

    def patch(model, batch: Batch, nodes: list[str], metric: Callable, **how) -> dict:
        original = batch.tokens[0]
        chosen = {
            node: torch.from_numpy(of_node[batch.pair_numbers][:, :, : original.shape[1]]).to(original.device)
            for node, of_node in cells.items()
        }
        return patch_all(model, batch, nodes, metric, cells=chosen, **how)

    return patch


def print_verified(found: Verified, methods: list[Method]) -> None:
    """A line per node, and how well the ranking method's scores (RelP's, if doubt ranks) of these agree with AP's."""
    labels = {"ap": "AP"} | {method.name: method.label for method in methods}
    by_doubt = found.ranked_by == "doubt"
    main, other = DOUBT_NEEDS if by_doubt else (found.ranked_by, None)
    label = labels[main]
    largest = f"doubt, |{label} - {labels[other]}|" if by_doubt else f"{label} scores"
    print(
        f"\n  the {len(found.nodes)} nodes of {found.of} with the largest {largest}; "
        f"AP of only these took {found.seconds:.2f} s"
    )
    columns = "".join(f"{text:>{max(10, len(text) + 1)}}" for text in [*labels.values(), *["doubt"] * by_doubt])
    print(f"  {'node':14}{'layer':>6}{'part':>6}  {'position':10}{columns}")
    for row in found.nodes:
        numbers = "".join(f"{row['scores'][m]:{max(10, len(text) + 1)}.3f}" for m, text in labels.items())
        numbers += f"{row['doubt']:10.3f}" if by_doubt else ""
        part = "" if row["part"] is None else row["part"]
        print(f"  {row['node']:14}{row['layer']:>6}{part:>6}  {row['position'].strip():10}{numbers}")
    roles = legend([row["position"] for row in found.nodes])
    if roles:
        print(f"  ({roles})")
    score, ap = (torch.tensor([row["scores"][m] for row in found.nodes]) for m in (main, "ap"))
    slope = float((score * ap).sum() / (ap * ap).sum())
    what = "doubt" if by_doubt else f"{label} score"
    print(
        f"  over them: correlation {relp.pearson(score, ap):.3f}, slope {slope:.2f}, "
        f"largest difference {(score - ap).abs().max():.3f}; no other node has a {what} beyond {found.bound:.3f}"
    )
