"""Rank, then verify: AP of only those nodes that a cheap method ranks highest, over several kinds of nodes together.

python -m beyond.verify --model toy-gpt2 --methods relp,atp --top 12
"""

import argparse
import sys

import numpy as np
import torch

from beyond.methods import method
from models import Transformer
from support import resume
from support.commandline import common_parser, load, names, parse, run, whole
from support.positions import laid_over, legend, overlay
from support.processes import gathered, say
from support.prompts import tensors
from support.results import folder_of, save_json
from support.scoring import AP, Method, by_batch, joined, score_pairs, two_runs
from tasks import Pair


def verify(title: str, model: Transformer, pairs: list[Pair], methods: list[Method], o: argparse.Namespace) -> dict:
    """AP of the o.top nodes with the largest scores, in size, by the first of the methods; scores are means over pairs.

    {"by": its name, "nodes": [{node, layer, position: its role, part: [] or [which], scores {method, "ap"}}, ...],
     "of": how many nodes there are, "bound": the size of the largest score of the others}
    """
    labels, at = overlay(pairs)
    scores = score_pairs(title, model, pairs, methods, o.nodes, o.metric, o.batch_size).scores
    maps = {key: laid_over(x, at) for key, x in scores.items()}  # [layers, labels, ...]
    by = methods[0].name
    ranking = [(abs(maps[by, node][i]), node, i) for node in o.nodes for i in np.ndindex(maps[by, node].shape)]
    ranking.sort(key=lambda entry: -entry[0])
    cells = {node: np.zeros(scores[by, node].shape, bool) for node in o.nodes}
    for _, node, (layer, label, *part) in ranking[: o.top]:
        rows = np.flatnonzero(at[:, label] >= 0)
        cells[node][(rows, layer, at[rows, label], *part)] = True
    maps |= {("ap", node): laid_over(x, at) for node, x in patch_cells(model, pairs, cells, o).items()}
    found = []
    for _, node, (layer, label, *part) in ranking[: o.top]:
        values = {m.name: float(maps[m.name, node][(layer, label, *part)]) for m in (AP, *methods)}
        found.append({"node": node, "layer": layer, "position": labels[label], "part": part, "scores": values})
    bound = float(ranking[o.top][0]) if o.top < len(ranking) else 0.0
    return {"by": by, "nodes": found, "of": len(ranking), "bound": bound}


def patch_cells(model: Transformer, pairs: list[Pair], cells: dict[str, np.ndarray], o: argparse.Namespace) -> dict:
    """AP of these cells only, {node: bool [n, layers, positions, ...]}: {node: the same shape}, 0 elsewhere."""

    def patch(numbers: list[int], rows: int) -> dict[str, np.ndarray]:
        original, patch, answers = tensors([pairs[i] for i in numbers], o.device)
        targets = two_runs(model, original, patch, answers, o.metric)["targets"]
        here = {node: torch.tensor(x[numbers, :, : original.shape[1]], device=o.device) for node, x in cells.items()}
        effects = resume.activation_patching(model, original, patch, targets, o.nodes, o.metric, here, rows)
        return {node: x.cpu().numpy() for node, x in effects.items()}

    longest = max(len(pair.original) for pair in pairs)
    everybody = gathered(list(by_batch(model, pairs, patch, o.batch_size)))
    return joined([part for mine in everybody for part in mine], len(pairs), longest)


def print_verified(found: dict, methods: list[Method]) -> None:
    nodes, by = found["nodes"], methods[0].label
    say(f"  the {len(nodes)} nodes of {found['of']} with the largest {by} scores, and AP of only these")
    say(f"  {'node':14}{'layer':>6}{'part':>6}  {'position':10}" + "".join(f"{m.label:>12}" for m in (AP, *methods)))
    for row in nodes:
        numbers = "".join(f"{row['scores'][m.name]:12.3f}" for m in (AP, *methods))
        part = "".join(map(str, row["part"]))
        say(f"  {row['node']:14}{row['layer']:>6}{part:>6}  {row['position'].strip():10}{numbers}")
    if roles := legend([row["position"] for row in nodes]):
        say(f"  ({roles})")
    error = max(abs(row["scores"][found["by"]] - row["scores"]["ap"]) for row in nodes)
    say(f"  largest difference to AP: {error:.3f}; no other node has a {by} score beyond {found['bound']:.3f}")


def main(argv: list[str] | None = None) -> None:
    parser = common_parser("python -m beyond.verify", __doc__.splitlines()[0], without=["methods", "nodes"])
    parser.add_argument("--methods", type=names, default="relp,atp", metavar="LIST", help="the first ranks [relp,atp]")
    nodes = "all ranked together [head,mlp_out]"  # of these two, none is a part of another
    parser.add_argument("--nodes", type=names, default="head,mlp_out", metavar="LIST", help=nodes)
    parser.add_argument("--top", type=whole, default=10, metavar="K", help="how many nodes AP is run on [10]")
    o = parse(parser, argv)
    if "ap" in o.methods:
        raise ValueError("--methods: AP is what verifies; name the method that ranks first, such as relp,atp")
    for name in o.model:
        model, pairs = load(name, o)
        methods = [method(m, model.config.family, o.rules) for m in o.methods]
        found = verify(name, model, pairs, methods, o)
        folder = folder_of(o.out, name, "ioi", o.prompts)
        save_json(folder / "verified.json", found)
        print_verified(found, methods)
        say(f"  written to {folder}/")


if __name__ == "__main__":
    sys.exit(run(main))
