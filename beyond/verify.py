"""AP at a part of its price: it is run on the cells where a cheap score is largest, and estimated elsewhere.

python -m beyond.verify --model toy-gpt2 --share 0.05

A cell is a node at a layer and a position of one pair, where the two runs differ. AP is run on that share of all cells,
over all kinds of nodes together, where the largest of |AtP|, |RelP| and |two-point| is largest. Elsewhere stands what
the method `best` says.
"""

import argparse
import sys
from functools import partial

import numpy as np

from beyond.methods import method
from models import Transformer
from support import figures, inspector, resume, tables
from support.commandline import load, parse, run
from support.options import common_parser
from support.positions import laid_over, overlay
from support.processes import gathered, rank
from support.prompts import tensors
from support.results import folder_of, replacing, save, save_figure, save_json, versions
from support.scoring import Method, Scores, by_batch, joined, score_pairs, two_runs
from tasks import Pair

CHEAP = ("atp", "relp", "twopoint")
VERIFIED = Method("verified", "AP in part")


def verify(title: str, model: Transformer, pairs: list[Pair], o: argparse.Namespace) -> tuple[Scores, dict]:
    """The scores, "verified" among the methods; and which cells are exact, {node: bool [n, layers, positions, ...]}."""
    methods, best = [method(name, model.config.family) for name in CHEAP], method("best", model.config.family)
    found = score_pairs(title, model, pairs, methods, o.nodes, o.metric, o.batch_size)
    scores = found.scores
    strength = {node: np.max([abs(scores[m, node]) for m in CHEAP], axis=0) for node in o.nodes}
    every = np.concatenate([x[x > 0] for x in strength.values()])  # where all are 0, the runs agree
    n = max(1, round(o.share * len(every)))
    least = np.sort(every)[-n]
    exact = {node: x >= least for node, x in strength.items()}
    truth = patch_cells(model, pairs, exact, o)
    for node in o.nodes:
        estimate = sum(weight * scores[m.name, node] for weight, m in best.mean_of)
        scores["verified", node] = np.where(exact[node], truth[node], estimate)
    return found, exact


def patch_cells(model: Transformer, pairs: list[Pair], cells: dict[str, np.ndarray], o: argparse.Namespace) -> dict:
    """AP of these cells only, {node: bool [n, layers, positions, ...]}: {node: the same shape}, 0 elsewhere."""

    def patch(numbers: list[int], rows: int) -> dict[str, np.ndarray]:
        original, patch, answers = tensors([pairs[i] for i in numbers], o.device)
        targets = two_runs(model, original, patch, answers, o.metric)["targets"]
        here = {node: original.new_tensor(x[numbers, :, : original.shape[1]]).bool() for node, x in cells.items()}
        effects = resume.activation_patching(model, original, patch, targets, o.nodes, o.metric, here, rows)
        return {node: x.cpu().numpy() for node, x in effects.items()}

    longest = max(len(pair.original) for pair in pairs)
    everybody = gathered(list(by_batch(model, pairs, patch, o.batch_size)))
    return joined([part for mine in everybody for part in mine], len(pairs), longest)


def price(cells: dict[str, np.ndarray], pairs: list[Pair]) -> int:
    """What AP of these cells costs, in tokens times blocks: an edited run goes from its cell to the end."""
    total = 0
    for x in cells.values():
        at = np.argwhere(x)  # pair, layer, position, ...
        lengths = np.array([len(pair.original) for pair in pairs])[at[:, 0]]
        total += int(((x.shape[1] - at[:, 1]) * (lengths - at[:, 2])).sum())
    return total


def summary_of(model: Transformer, pairs: list[Pair], scores: dict, exact: dict, o: argparse.Namespace) -> dict:
    """What summary.json holds: of each kind of node the cells and what was left out; the price in FLOPs."""
    differ = {node: sum(abs(np.nan_to_num(scores[m, node])) for m in CHEAP) > 0 for node in exact}
    kinds = {
        node: {
            "cells": int(differ[node].sum()),
            "exact": int(x.sum()),
            "largest_effect": float(abs(scores["verified", node][x]).max(initial=0)),
            "largest_estimate_left": float(np.nanmax(np.where(x, 0, abs(scores["verified", node])))),
        }
        for node, x in exact.items()
    }
    flops = 2 * sum(weight.numel() for weight in model.blocks[0].parameters())  # of a token in a block
    passes = len(CHEAP) * (2 + 2)  # two runs forward; one backward, which costs two
    cheap = passes * sum(len(pair.original) for pair in pairs) * model.config.n_layers
    prices = {"ap_of_exact": price(exact, pairs), "cheap_methods": cheap, "ap_of_all": price(differ, pairs)}
    flop = {what: flops * n for what, n in prices.items()}
    return {"nodes": kinds, "flop": flop, "arguments": vars(o), "versions": versions()}


def print_verified(summary: dict, scores: dict, exact: dict, pairs: list[Pair]) -> None:
    flop = summary["flop"]
    parts = [f"{flop[what] / flop['ap_of_all']:.1%}" for what in ("ap_of_exact", "cheap_methods")]
    print(f"  AP of all cells costs {flop['ap_of_all'] / 1e12:.3g} TFLOP; AP of the exact ones {parts[0]} of that,")
    print(f"  the cheap methods {parts[1]}")
    rows = [("", ["cells", "exact", "largest effect", "largest estimate left"])]
    rows += [(node, [f"{x:.5g}" for x in of.values()]) for node, of in summary["nodes"].items()]
    tables.print_columns(rows)
    labels, at = overlay(pairs)
    maps = {key: laid_over(x, at) for key, x in scores.items()}
    rows = [("the strongest", ["exact", " AP in part", *CHEAP])]
    found = tables.peaks({node: maps["verified", node] for node in exact}, labels, 10)
    for node, layer, pos, label, part, score in found:
        i = (layer, pos) if part is None else (layer, pos, part)
        numbers = [f"{x: .3f}" for x in (score, *(maps[m, node][i] for m in CHEAP))]
        name = node if part is None else f"{node} {part}"
        pairs_with_ap = f"{laid_over(exact[node].astype(float), at)[i]:.0%}"
        rows.append((f"{name}, layer {layer}, {label.strip()}", [pairs_with_ap, *numbers]))
    tables.print_columns(rows)


def share(given: str) -> float:
    value = float(given)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {given}")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = common_parser("python -m beyond.verify", __doc__.splitlines()[0], without=["methods", "rules"])
    parser.add_argument("--share", type=share, default=0.05, metavar="X", help="of the cells, for AP [0.05]")
    o = parse(parser, argv)
    for name in o.model:
        model, pairs = load(name, o)
        folder = folder_of(o.out, name, "verified", "pair" if o.original else o.prompts)
        found, exact = verify(name, model, pairs, o)
        scores = found.scores
        if rank() > 0:
            continue
        summary = summary_of(model, pairs, scores, exact, o)
        print_verified(summary, scores, exact, pairs)
        arrays = {f"{m}_{node}": x for (m, node), x in scores.items()} | {f"exact_{n}": x for n, x in exact.items()}
        with replacing(folder) as new:
            save(new / "scores.npz", partial(np.savez_compressed, **arrays))
            save_json(new / "summary.json", summary)
            methods = [VERIFIED, *(method(m, model.config.family) for m in CHEAP)]
            maps = partial(figures.heatmaps, name, scores, methods, o.nodes, pairs, o.metric, exact)
            save_figure(new / "heatmaps.png", maps)
            page = inspector.of_nodes(name, found, methods, o.nodes, pairs, o.metric, exact)
            inspector.write(new / "inspect.html", page, summary)
        inspector.finish(folder)


if __name__ == "__main__":
    sys.exit(run(main))
