"""Edges between components: who predicts exact edge patching, and whose circuits do the task?

python -m beyond.edges                              the four toy models
python -m beyond.edges --model gpt2 --verify 20     exact patching of the 20 edges with the largest scores only

Read evaluate_edges(). README.md in this folder explains it.
"""

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from beyond.edges import figure, files, tables
from beyond.edges.circuits import drawable, ranking
from beyond.edges.graph import Graph, ungrouped
from beyond.edges.judging import SHARES, Judge, areas, curve, smallest, stability
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from beyond.methods import method
from models import Transformer
from support import inspector, statistics
from support.commandline import load_model, parse, prompt_pairs, run
from support.options import PAIR, TOYS, common_parser, names, text, whole
from support.positions import laid_over, overlay
from support.processes import say, world
from support.prompts import split, tensors
from support.results import folder_of, replacing, save, save_figure, save_json, slug, versions
from support.scoring import AP, BAR, Method, by_batch, check_finite, main_method, two_runs
from support.statistics import estimate
from tasks import Pair

MOST = 24  # edges that an eye can take in
TEMPLATE = Path(__file__).with_name("circuit.html")
DEFAULT = ["atp", "relp", "twopoint", "eap-ig-5"]
N_RESAMPLES = 200  # of the pairs that circuits are found on, for their stability


def evaluate_edges(name: str, o: argparse.Namespace) -> None:
    """The experiment on one model: scores, agreement with exact patching, circuits; files, tables, the picture."""
    # the model, the pairs to score edges and to find circuits on, and those to judge the circuits by
    model = ungrouped(load_model(name, o))
    graph, methods = Graph.of(model.config), [method(m, model.config.family, o.rules) for m in o.methods]
    pairs, judged, judged_on = choose_pairs(name, model, o)
    say(f"\n{name}: {len(graph.names)} edges, {len(pairs)} prompt pairs to find circuits on, judged on {judged_on}")

    # the scores of all edges, and how well they agree with exact patching: of all, or of some drawn at random
    patched = at_random(graph, o.sample, o.seed)
    found, cost = score_edges(name, model, pairs, methods, o, patched)
    values, right, exact = found.pop("values"), found.pop("right"), found.pop("ap", None)
    groups = [pair.group for pair in pairs]
    weights = statistics.resamples(groups, seed=o.seed)
    means = {m: graph.in_matrix(scores.double().mean(0)) for m, scores in found.items()}
    agreement, scored = {}, found
    if exact is not None:
        some = patched[graph.edges]
        agreement = {m: statistics.agreement(x[:, some], exact[:, some], groups, weights) for m, x in found.items()}
        scored = {"ap": exact.where(some, torch.nan), **found}
        if not o.sample:
            means = {"ap": graph.in_matrix(exact.double().mean(0)), **means}

    # circuits: of all sizes, judged on the judged pairs; and the smallest that does the task on the others
    size = o.batch_size or pairs_at_once(model, pairs + judged)
    found_on = Judge(model, pairs, o.metric, o.device, size, o.paths)
    judge = found_on if judged is pairs else Judge(model, judged, o.metric, o.device, size, o.paths)
    of_judged = statistics.resamples([pair.group for pair in judged], seed=o.seed)
    random = {"random": torch.randn(graph.edges.shape, generator=torch.Generator().manual_seed(o.seed))}
    curves, of_areas, kept, circuits = {}, {}, {}, {}
    for m, scores in (means | random).items():
        say(f"  running the circuits of {m}")
        curves[m] = {which: curve(judge, scores, which == "signed", of_judged) for which in ("signed", "absolute")}
        of_areas[m] = areas(*(f for _, f in curves[m].values()))
        if m in means:
            kept[m], n = smallest(found_on, scores)
            inclusion, overlap = stability(scored[m], n, weights[1 : 1 + N_RESAMPLES], graph, o.paths)
            inclusion = dict(zip(graph.names_of(kept[m]), graph.in_matrix(inclusion)[kept[m]].tolist()))
            f = float(judge.f(kept[m]))
            circuits[m] = {"edges": int(kept[m].sum()), "f": f, "overlap": overlap, "inclusion": inclusion}

    # a part of one circuit edge by edge, and the edges that are verified
    main = methods[o.methods.index(main_method(o.methods))]
    order = ranking(means[main.name], graph, signed=False, paths=o.paths)
    shown = drawable(order, kept[main.name], graph, MOST)
    edges = describe(model, pairs, shown, means, main, o)
    verified = verify(name, model, pairs, means, main, o) if o.verify else None

    summary = {
        "model": name,
        "task": "edges",
        "prompt_pairs": len(pairs),
        "judged_pairs": len(judged),
        "judged_on": judged_on,
        "n_edges": len(graph.names),
        "patched_edges": int(patched.sum()) if exact is not None else 0,
        "metric": o.metric,
        "accuracy": {run: statistics.mean(x, weights) for run, x in zip(("original", "patch"), right.unbind(1))},
        "value": {run: statistics.mean(x, weights) for run, x in zip(("original", "patch"), values.unbind(1))},
        "agreement": estimates(agreement),
        "differences": estimates(differences(agreement)),
        "cost": cost,
        "areas": estimates(of_areas),
        "area_differences": estimates(differences(of_areas)),
        "shares": SHARES,
        "curves": {
            m: {which: {"edges": sizes, "f": f[:, 0].tolist()} for which, (sizes, f) in of.items()}
            for m, of in curves.items()
        },
        "circuits": circuits,
        "drawn": {"method": main.name, "f": float(judge.f(shown)), "edges": edges},
        "verified": verified,
        "arguments": vars(o),
        "versions": versions(),
    }

    # table, files, picture, page
    tables.print_summary(summary, methods)
    folder, tokenizer = folder_of(o.out, name, "edges", o.prompts), inspector.tokenizer_of(name)
    arrays = files.arrays(graph, scored, pairs, judged)
    with replacing(folder, "circuit*", "inspect.html") as new:
        save(new / "edges.npz", lambda file: np.savez_compressed(file, **arrays))
        save_json(new / "summary.json", summary)
        save_json(new / "graph.json", files.neuronpedia_json(name, graph, edges, pairs, tokenizer, o.metric))
        for m in kept:
            save_json(new / f"circuit-{slug(m)}.json", files.circuit_json(model.config, means[m], kept[m]))
        if not o.no_plot:
            n, f = circuits[main.name]["edges"], summary["drawn"]["f"]
            some = f"{len(edges)} of the {n} edges" if len(edges) < n else f"the {n} edges"
            title = f"{name}: {some} of {main.label}'s circuit do {f:.0%} of the task"
            save_figure(new / "circuit.png", partial(figure.draw, title, edges, graph))
            page = files.page(title, edges, graph, {m.name: m.label for m in methods}, o.metric)
            inspector.write(new / "inspect.html", page, summary, TEMPLATE)
    inspector.finish(folder)


def choose_pairs(name: str, model: Transformer, o: argparse.Namespace) -> tuple[list[Pair], list[Pair], str]:
    """Pairs to score edges and to find circuits on, pairs to judge circuits by, and these in words."""
    if o.judge:
        judged = prompt_pairs(name, model, o, sys.maxsize, o.judge)
        return prompt_pairs(name, model, o, o.pairs, o.prompts), judged, f"{len(judged)} pairs of {o.judge}"
    words = f"{o.held_out} held-out pairs"
    if not o.prompts:
        pairs = prompt_pairs(name, model, o, o.pairs + o.held_out, None)
        return pairs[: o.pairs], pairs[o.pairs :], words
    if o.held_out:
        return *split(prompt_pairs(name, model, o, sys.maxsize, o.prompts), o.pairs, o.held_out, o.seed), words
    pairs = prompt_pairs(name, model, o, o.pairs, o.prompts)
    return pairs, pairs, "the same pairs"


def at_random(graph: Graph, n: int | None, seed: int) -> Tensor:
    """bool [writers, readers]: n edges drawn at random, all if n is None or there are no more."""
    numbers = torch.randperm(len(graph.names), generator=torch.Generator().manual_seed(seed))
    return graph.in_matrix(numbers < (n or len(numbers)))


def score_edges(
    title: str,
    model: Transformer,
    pairs: list[Pair],
    methods: list[Method],
    o: argparse.Namespace,
    only: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict]:
    """{method: [pairs, edges]} with "values" and "right" [pairs, 2] of scoring.two_runs(); and what each has cost.

    Edges are in the order of Graph.names. Exact patching is of whole edges, all positions at once, and its cost is the
    mean over the pairs; other scores are sums over the positions. only: patch these edges, bool [writers, readers]
    """
    there, found = Graph.of(model.config).edges, {}
    cost = {}
    for m in methods:
        times = len(m.mean_of) or 1
        cost[m.name] = {"forward": times * (2 + (m.steps or 0)), "backward": times * (m.steps or 1), "seconds": 0.0}
    if AP in methods:
        cost["ap"] |= {"forward": 0, "backward": 0}
    bar = tqdm(total=len(pairs) * len(methods), leave=False, disable=None, delay=2, bar_format=BAR)

    def score(numbers: list[int], rows: int) -> dict[str, Tensor]:
        original, patch, answers = tensors([pairs[i] for i in numbers], o.device)
        runs = two_runs(model, original, patch, answers, o.metric)
        result, targets = {what: runs[what] for what in ("values", "right")}, runs["targets"]
        for m in methods:
            bar.set_description_str(f"{title} {m.label}")
            began = time.perf_counter()
            if m is AP:
                scores, runs = patch_edges(model, original, patch, targets, o.metric, only=only, rows=rows)
                cost["ap"]["forward"] += runs / len(pairs)
            else:
                scores = scores_by(m, model, original, patch, targets, o.metric)
            result[m.name] = scores[:, there]
            cost[m.name]["seconds"] += time.perf_counter() - began
            bar.update(len(numbers))
        check_finite(title, result, model)
        return result

    with bar:
        for numbers, result in by_batch(model, pairs, score, o.batch_size, pairs_at_once(model, pairs)):
            for what, of_batch in result.items():
                whole = found.setdefault(what, torch.empty(len(pairs), *of_batch.shape[1:], dtype=of_batch.dtype))
                whole[numbers] = of_batch.cpu()
    return found, cost


def scores_by(m: Method, *inputs, by_position: bool = False) -> Tensor:
    """attribute_edges() by one method."""
    if m.mean_of:
        return sum(weight * scores_by(part, *inputs, by_position=by_position) for weight, part in m.mean_of)
    return attribute_edges(*inputs, m.lrp, m.steps, by_position)


def pairs_at_once(model: Transformer, pairs: list[Pair]) -> int:
    """How many fit and are fast: the streams that the readers of one layer see are at most 2^23 numbers (2^26)."""
    streams = (3 * model.config.n_heads + 1) * max(len(pair.original) for pair in pairs) * model.config.d_model
    return max(1, (2**26 if model.embed_tokens.weight.is_cuda else 2**23) // streams)


def describe(model: Transformer, pairs: list[Pair], kept: Tensor, means: dict, m: Method, o) -> list[dict]:
    """The edges of a circuit by one method, the strongest first: each with the role of the position at which it matters
    most, and with its score by every method.
    """
    labels, at = overlay(pairs)
    scores = np.full((len(pairs), 1, max(len(pair.original) for pair in pairs), int(kept.sum())), np.nan)

    def score(numbers: list[int], _: int) -> Tensor:
        original, patch, answers = tensors([pairs[i] for i in numbers], o.device)
        targets = two_runs(model, original, patch, answers, o.metric)["targets"]
        by_position = scores_by(m, model, original, patch, targets, o.metric, by_position=True)
        return by_position[:, :, kept].cpu()

    for numbers, of_batch in by_batch(model, pairs, score, o.batch_size, pairs_at_once(model, pairs)):
        scores[numbers, 0, : of_batch.shape[1]] = of_batch.numpy()
    roles = [labels[i].strip() for i in np.abs(laid_over(scores, at)[0]).argmax(0)]
    every = zip(*(of[kept].tolist() for of in means.values()))
    edges = [
        {"edge": name, "score": (scores := dict(zip(means, of)))[m.name], "role": role, "scores": scores}
        for name, of, role in zip(Graph.of(model.config).names_of(kept), every, roles)
    ]
    return sorted(edges, key=lambda edge: -abs(edge["score"]))


def verify(title: str, model: Transformer, pairs: list[Pair], means: dict, by: Method, o: argparse.Namespace) -> dict:
    """Exact patching of the o.verify edges with the largest mean scores by one method, the largest first."""
    graph = Graph.of(model.config)
    only = torch.zeros(means[by.name].numel(), dtype=torch.bool)
    only[ranking(means[by.name], graph, signed=False)[: o.verify]] = True
    only = only.view_as(graph.edges)
    exact, cost = score_edges(title, model, pairs, [AP], o, only)
    means = {"ap": graph.in_matrix(exact["ap"].double().mean(0)), **means}
    scores = {m: of[only].tolist() for m, of in means.items()}
    edges = [
        {"edge": name, "scores": {m: of[i] for m, of in scores.items()}} for i, name in enumerate(graph.names_of(only))
    ]
    edges.sort(key=lambda edge: -abs(edge["scores"][by.name]))
    return {"ranked_by": by.name, "edges": edges, "of": len(graph.names), "seconds": cost["ap"]["seconds"]}


def differences(of_methods: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """{"relp - atp": {measure: [W]}} of every two methods, from {method: {measure: [W]}} on the same resamples."""
    return {
        f"{other} - {one}": {measure: of_methods[other][measure] - x for measure, x in of_methods[one].items()}
        for one, other in itertools.combinations(of_methods, 2)
    }


def estimates(of_methods: dict[str, dict[str, Tensor]]) -> dict:
    return {name: {measure: estimate(values) for measure, values in of.items()} for name, of in of_methods.items()}


def main(argv: list[str] | None = None) -> None:
    parser = common_parser("python -m beyond.edges", __doc__.splitlines()[0], without=["nodes", "methods", *PAIR])
    parser.add_argument("--methods", type=names, metavar="LIST", help=f"[{','.join(DEFAULT)}, and ap for the toys]")
    parser.add_argument("--held-out", type=whole, metavar="N", help="other pairs to judge circuits by [templates: 100]")
    parser.add_argument("--judge", type=text, metavar="FILE", help="pairs to judge circuits by, as in --prompts")
    parser.add_argument("--verify", type=whole, metavar="K", help="exact patching of the K edges of largest score")
    parser.add_argument("--paths", action="store_true", help="choose circuits along paths, not edge by edge")
    parser.add_argument("--sample", type=whole, metavar="K", help="exact patching of K edges drawn at random")
    parser.add_argument("--no-plot", action="store_true", help="draw nothing")
    o = parse(parser, argv)
    if world() > 1:
        raise ValueError("beyond.edges is one process: start it without torchrun")
    if o.held_out and o.judge:
        raise ValueError("pairs to judge circuits by are either --held-out or --judge")
    if o.verify and o.sample:
        raise ValueError("the edges that are patched are either those of --verify or those of --sample")
    if not o.prompts and not o.judge:
        o.held_out = o.held_out or 100
    if o.methods is None:  # exact patching of every edge is for small models
        o.methods = ["ap"] * all(name in [*TOYS, "toy-planted"] for name in o.model) + DEFAULT
    if o.verify or o.sample:
        o.methods = ["ap"] * bool(o.sample) + [m for m in o.methods if m != "ap"]
    if o.methods in ([], ["ap"]):
        raise ValueError("--methods needs one besides ap, such as --methods ap,relp")
    if unfit := [m for m in o.methods if m in ("ig", "atp*")]:
        raise ValueError(f"method {unfit[0]} has no scores of edges: choose from ap, {', '.join(DEFAULT)}, ...")
    for name in o.model:
        evaluate_edges(name, o)


if __name__ == "__main__":
    sys.exit(run(main))
