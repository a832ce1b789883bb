"""`python evaluate.py --task edges`: who predicts exact edge patching, and whose circuits do the task."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from beyond.audit import print_audits
from beyond.edges import figure, files, tables
from beyond.edges.circuits import SHARES, stability
from beyond.edges.graph import Graph, ungrouped
from beyond.edges.judging import Curve, Judge, areas, curves, differences_of, smallest
from beyond.edges.scoring import EdgeScores, score_edges, sizes
from models import Transformer
from support import inspector, results, statistics
from support.memory import BatchSize
from support.methods import AP, Method, main_method
from support.positions import overlay
from support.processes import say
from support.prompts import prompt_arrays
from support.scoring import right as right_answers
from support.statistics import estimate
from tasks import Pair

N_RESAMPLES = 200  # where 1000 would take long: of edges by position, and of circuits


@dataclass
class Setting:
    """What an edge run is given. arguments: of the command, for summary.json."""

    name: str  # the model's
    model: Transformer
    pairs: list[Pair]  # that are scored, and that circuits are found on
    judged: list[Pair]  # that circuits are judged on
    judged_on: str  # these in words
    methods: list[Method]
    metric: Callable
    device: torch.device
    batch_size: BatchSize
    audits: dict
    by_node: bool  # circuits of nodes, each with all its outgoing edges, instead of edges
    verify: int | None
    arguments: dict
    shown: list  # what inspect.html will show is added here

    @property
    def seed(self) -> int:
        return self.arguments["seed"]


@dataclass
class Found:
    """What a run has found."""

    graph: Graph
    roles: list[str]
    scores: dict[str, EdgeScores]  # by method
    kept: dict[str, Tensor]  # by method: its smallest circuit
    main: str  # the method whose circuit is drawn
    drawn: list[dict]  # that circuit: see describe()
    verified: dict | None
    summary: dict  # what is in summary.json


def evaluate(s: Setting, folder: Path) -> dict:
    """Scores, agreement with exact patching, circuits; files, tables, the picture. Returns what is in summary.json."""
    found = measure(replace(s, model=ungrouped(s.model)))
    write(s, found, folder)
    labels = {m.name: m.label for m in s.methods} | {"random": "random order, one draw"}
    tables.print_agreement(found.summary, s.methods)
    tables.print_circuits(found.summary, labels)
    tables.print_circuit(found.drawn, labels[found.main])
    print_audits(s.methods, s.audits, s.arguments["audit"])
    if found.verified:
        tables.print_verified(found.verified, s.methods)
    if not s.arguments["no_plot"]:
        f = found.summary["circuits"][found.main]["f"]
        title = f"{s.name}: {len(found.drawn)} edges with f = {f:.2f}, found by {labels[found.main]}"
        results.save_figure(folder / "circuit.png", partial(figure.draw, title, found.drawn, found.graph))
        means = [found.summary["value"][run].value for run in ("original", "patch")]
        of_run = s.name, found.graph, found.scores, s.methods, s.pairs, s.arguments["metric"], means
        inspector.collect(s.shown, partial(inspector.of_edges, *of_run))
    say(f"  written to {folder}/")
    return found.summary


def measure(s: Setting) -> Found:
    """All that is computed. The model: one in which each head has a key and a value of its own."""
    graph = Graph.of(s.model.config)
    longest = max(len(pair.original) for pair in (*s.pairs, *s.judged))
    size = sizes(s.batch_size, s.model, longest, s.device, by_position=False)[0]
    found_on = Judge(s.model, s.pairs, s.metric, s.device, size, s.batch_size)
    judge = found_on if s.judged is s.pairs else Judge(s.model, s.judged, s.metric, s.device, size, s.batch_size)

    # scores, and how well they agree with exact patching
    score = partial(score_edges, s.name, s.model, s.pairs, metric=s.metric, device=s.device, batch_size=s.batch_size)
    scores, costs = score(s.methods)
    weights = statistics.resamples([pair.group for pair in s.pairs], seed=s.seed)
    pcc, differences = agreement(scores, s.pairs, weights)
    if any(len(of.whole) < len(s.pairs) for of in scores.values()):
        say("  the scores of so many pairs do not fit into memory: only their means are kept, without intervals")
    values = torch.stack([found_on.whole, found_on.empty], dim=1)  # with no edge kept, this is the patch run
    right = right_answers(s.model, s.pairs, values, s.metric, s.device, s.batch_size)

    # circuits: found on the pairs, judged on the others
    ranked_by = {name: item_scores(name, of, graph, s.by_node, found_on) for name, of in scores.items()}
    shape, generator = next(iter(ranked_by.values())).shape, torch.Generator().manual_seed(s.seed)
    random = {"random": torch.randn(shape, generator=generator)}
    of_judged = statistics.resamples([pair.group for pair in s.judged], seed=s.seed)
    of_curves = {name: curves(judge, of, s.by_node, of_judged) for name, of in (ranked_by | random).items()}
    of_areas = {name: areas(of) for name, of in of_curves.items()}
    circuits, kept = {}, {}
    for name, of in scores.items():
        kept[name], n = smallest(found_on, ranked_by[name], s.by_node)
        circuits[name] = {"edges": int(kept[name].sum()), "items": n, "f": judge.f(kept[name])}
        circuits[name] |= how_stable(of, n, weights[1 : 1 + N_RESAMPLES], kept[name], graph, s.by_node)
    main, roles = main_method(list(scores)), overlay(s.pairs)[0]
    drawn = describe(kept[main], scores[main], graph, roles)
    runs = ("original", "patch")
    summary = {
        "model": s.name,
        "task": "edges",
        "prompt_pairs": len(s.pairs),
        "judged_pairs": len(s.judged),
        "judged_on": s.judged_on,
        "level": "node" if s.by_node else "edge",
        "n_edges": int(graph.edges.sum()),
        "accuracy": {run: statistics.mean(x, weights) for run, x in zip(runs, right.unbind(1))},
        "value": {run: statistics.mean(x, weights) for run, x in zip(runs, values.unbind(1))},
        "pcc": pcc,
        "differences": differences,
        "cost": {name: vars(cost) for name, cost in costs.items()},
        "areas": {name: {what: estimate(x) for what, x in of.items()} for name, of in of_areas.items()},
        "area_differences": differences_of(of_areas),
        "shares": SHARES,
        "curves": {name: curves_json(of) for name, of in of_curves.items()},
        "circuits": circuits,
        "drawn": {"method": main, "edges": drawn},
        "audit": s.audits,
        "arguments": s.arguments,
        "versions": results.versions(),
    }
    verified = verify(s, scores, main, graph, score) if s.verify else None
    return Found(graph, roles, scores, kept, main, drawn, verified, summary)


def write(s: Setting, found: Found, folder: Path) -> None:
    """All files but the picture; what an earlier run has left beside them is removed."""
    arrays = files.arrays(found.graph, found.scores, found.roles) | prompt_arrays(s.pairs)
    arrays |= {f"judged_{name}": array for name, array in prompt_arrays(s.judged).items()}
    results.save(folder / "edges.npz", lambda file: np.savez_compressed(file, **arrays))
    tokenizer = inspector.tokenizer_of(s.name)
    content = files.neuronpedia_json(s.name, found.graph, found.drawn, s.pairs, tokenizer, s.arguments["metric"])
    results.save_json(folder / "graph.json", content)
    results.save_json(folder / "summary.json", found.summary)
    circuits = {f"circuit-{results.slug(name)}.json": name for name in found.kept}
    for file, name in circuits.items():
        scores = found.graph.in_matrix(found.scores[name].mean)
        results.save_json(folder / file, files.circuit_json(s.model.config, scores, found.kept[name]))
    for file in folder.glob("*"):
        if file.match("circuit-*.json") and file.name not in circuits or file.name in ("circuit.png", "verified.json"):
            file.unlink()
    if found.verified:
        results.save_json(folder / "verified.json", found.verified)


def curves_json(of: dict[str, Curve]) -> dict:
    """{"signed" or "absolute": edges at each of SHARES, and f there by both averages}."""
    return {
        which: {"edges": curve.sizes} | {average: f[:, 0].tolist() for average, f in curve.f.items()}
        for which, curve in of.items()
    }


def agreement(scores: dict[str, EdgeScores], pairs: list[Pair], weights: Tensor) -> tuple[dict, dict]:
    """{kind: {method: measures}} and {kind: {"relp - atp": {measure: Estimate}}}: see statistics.agreement.

    kind: edges as wholes, and edges by position (with a fifth of the resamples: there are many more numbers).
    """
    pcc, differences = {}, {}
    for kind, name in (("edges", "whole"), ("positions", "by_position")):
        of_methods = {method: getattr(of, name) for method, of in scores.items()}
        if "ap" not in of_methods or any(of is None for of in of_methods.values()):
            continue
        exact, groups, counts = of_methods.pop("ap"), [pair.group for pair in pairs], weights
        if kind == "positions":
            counts = weights[: 1 + N_RESAMPLES]
        if len(exact) < len(pairs):  # only the means have been kept
            groups, counts = [""], statistics.resamples([""])
        measures = {m: statistics.agreement(of, exact, groups, weights=counts) for m, of in of_methods.items()}
        pcc[kind] = {m: statistics.with_intervals(of) for m, of in measures.items()}
        differences[kind] = differences_of(measures)
    return pcc, differences


def item_scores(method: str, of: EdgeScores, graph: Graph, by_node: bool, judge: Judge) -> Tensor:
    """What circuits are chosen by: mean scores of edges [writers, readers], or of nodes [writers].

    A node's score is the sum over its outgoing edges, as those of AtP and RelP add up to it. For exact patching, it is
    the effect of patching all its outgoing edges at once.
    """
    if not by_node:
        return graph.in_matrix(of.mean)
    if method != AP.name:
        return graph.in_matrix(of.mean).sum(1)
    effects = []
    for writer in range(len(graph.writers)):
        others = graph.edges.clone()
        others[writer] = False
        effects.append((judge(others) - judge.whole).mean())
    return torch.stack(effects)


def how_stable(of: EdgeScores, n: int, weights: Tensor, kept: Tensor, graph: Graph, by_node: bool) -> dict:
    """How much a circuit of n items depends on the pairs that it was found on: see circuits.stability."""
    if by_node or len(of.whole) < 2:
        return {"overlap": float("nan"), "inclusion": {}}
    share, overlap = stability(of.whole, n, weights)
    edges = zip(graph.names, share.tolist(), kept[graph.edges].tolist())
    return {"overlap": overlap, "inclusion": {name: value for name, value, is_kept in edges if is_kept}}


def describe(kept: Tensor, of: EdgeScores, graph: Graph, roles: list[str]) -> list[dict]:
    """The edges of a circuit, the strongest first: where each matters most, if that is known."""
    numbers = kept[graph.edges].nonzero()[:, 0]
    numbers = numbers[of.mean[numbers].abs().argsort(descending=True, stable=True)]
    names, mean, edges = graph.names, of.mean.tolist(), []
    for i in numbers.tolist():
        role = None if of.roles is None else roles[int(np.abs(of.roles[:, i]).argmax())].strip()
        edges.append({"edge": names[i], "score": mean[i], "role": role})
    return edges


def verify(s: Setting, scores: dict[str, EdgeScores], by: str, graph: Graph, score: Callable) -> dict:
    """Exact patching of the s.verify edges with the largest mean scores by one method."""
    size = scores[by].mean.abs()
    numbers = size.argsort(descending=True, stable=True)[: s.verify]
    chosen = torch.zeros(len(size), dtype=torch.bool)
    chosen[numbers] = True
    only = graph.in_matrix(chosen)
    exact, cost = score([AP], only=only)
    names, means = graph.names, {name: of.mean.tolist() for name, of in (scores | exact).items()}
    edges = [{"edge": names[i], "scores": {m: mean[i] for m, mean in means.items()}} for i in numbers.tolist()]
    return {"ranked_by": by, "edges": edges, "of": len(size), "seconds": cost[AP.name].seconds}
