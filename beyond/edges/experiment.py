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
from beyond.edges.judging import Curve, Judge, areas, compared, curves, smallest
from beyond.edges.scoring import EdgeScores, score_edges, sizes
from models import Transformer
from support import results, statistics
from support.methods import AP, Method, main_method
from support.positions import overlay
from support.processes import say
from support.scoring import right as right_answers
from tasks import Pair


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
    audits: dict
    by_node: bool  # circuits of nodes, each with all its outgoing edges, instead of edges
    verify: int | None
    arguments: dict

    @property
    def seed(self) -> int:
        return self.arguments["seed"]


def evaluate(s: Setting, folder: Path) -> dict:
    """Scores, agreement with exact patching, circuits; files, tables, the picture. Returns what is in summary.json."""
    s = replace(s, model=ungrouped(s.model))
    graph, batch_size = Graph.of(s.model.config), s.arguments["batch_size"]
    longest = max(len(pair.original) for pair in (*s.pairs, *s.judged))
    size = sizes(batch_size, s.model.config, longest, s.device, by_position=False)[0]
    found_on = Judge(s.model, s.pairs, s.metric, s.device, size)
    judge = found_on if s.judged is s.pairs else Judge(s.model, s.judged, s.metric, s.device, size)

    # scores, and how well they agree with exact patching
    score = partial(score_edges, s.name, s.model, s.pairs, metric=s.metric, device=s.device, batch_size=batch_size)
    scores, costs = score(s.methods)
    weights = statistics.resamples([pair.group for pair in s.pairs], seed=s.seed)
    pcc, differences = agreement(scores, s.pairs, weights)
    if any(len(of.whole) < len(s.pairs) for of in scores.values()):
        say("  the scores of so many pairs do not fit into memory: only their means are kept, without intervals")

    # circuits
    values = torch.stack([found_on.whole, found_on.empty], dim=1)  # with no edge kept, this is the patch run
    right = right_answers(s.model, s.pairs, values, s.metric, s.device)
    ranked_by = {name: item_scores(name, of, graph, s.by_node, found_on) for name, of in scores.items()}
    shape, generator = next(iter(ranked_by.values())).shape, torch.Generator().manual_seed(s.seed)
    ranked_by["random"] = torch.randn(shape, generator=generator)
    of_judged = statistics.resamples([pair.group for pair in s.judged], seed=s.seed)
    found = {name: curves(judge, of, s.by_node, of_judged) for name, of in ranked_by.items()}
    each, area_differences = compared({name: areas(of) for name, of in found.items()})
    circuits, kept = {}, {}
    for name, of in scores.items():
        kept[name], n = smallest(found_on, ranked_by[name], s.by_node)
        circuits[name] = {"edges": int(kept[name].sum()), "items": n, "f": judge.f(kept[name])}
        circuits[name] |= how_stable(of, n, weights[1:201], kept[name], graph, s.by_node)

    main = main_method(list(scores))
    labels, _ = overlay(s.pairs)
    drawn = describe(kept[main], scores[main], graph, labels)
    summary = {
        "model": s.name,
        "task": "edges",
        "prompt_pairs": len(s.pairs),
        "judged_pairs": len(s.judged),
        "judged_on": s.judged_on,
        "level": "node" if s.by_node else "edge",
        "n_edges": int(graph.edges.sum()),
        "accuracy": {run: statistics.mean(x, weights) for run, x in zip(("original", "patch"), right.unbind(1))},
        "value": {run: statistics.mean(x, weights) for run, x in zip(("original", "patch"), values.unbind(1))},
        "pcc": pcc,
        "differences": differences,
        "cost": {name: vars(cost) for name, cost in costs.items()},
        "areas": each,
        "area_differences": area_differences,
        "shares": SHARES,
        "curves": {name: curves_json(of) for name, of in found.items()},
        "circuits": circuits,
        "drawn": {"method": main, "edges": drawn},
        "audit": s.audits,
        "arguments": s.arguments,
        "versions": results.versions(),
    }

    # files, tables, the picture
    arrays = files.arrays(graph, scores, labels) | results.prompt_arrays(s.pairs)
    arrays |= {f"judged_{name}": array for name, array in results.prompt_arrays(s.judged).items()}
    results.save(folder / "edges.npz", lambda file: np.savez_compressed(file, **arrays))
    results.save_json(folder / "summary.json", summary)
    for name, circuit in kept.items():
        content = files.circuit_json(s.model.config, files.in_matrix(graph, scores[name].mean), circuit)
        results.save_json(folder / f"circuit-{results.slug(name)}.json", content)
    written = {f"circuit-{results.slug(name)}.json" for name in kept}
    for file in folder.glob("*"):  # what an earlier run has left beside it
        if file.match("circuit-*.json") and file.name not in written or file.name in ("circuit.png", "verified.json"):
            file.unlink()
    of_methods = {m.name: m.label for m in s.methods} | {"random": "random order"}
    tables.print_agreement(summary, s.methods)
    tables.print_circuits(summary, of_methods)
    tables.print_circuit(drawn, of_methods[main])
    print_audits(s.methods, s.audits, s.arguments["audit"])
    if s.verify:
        verified = verify(s, scores, main, graph, score)
        results.save_json(folder / "verified.json", verified)
        tables.print_verified(verified, s.methods)
    if not s.arguments["no_plot"]:
        title = f"{s.name}: {len(drawn)} edges with f = {circuits[main]['f']:.2f}, found by {of_methods[main]}"
        results.save_figure(folder / "circuit.png", partial(figure.draw, title, drawn, graph))
    say(f"  written to {folder}/")
    return summary


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
    groups = [pair.group for pair in pairs]
    of_kinds = {"edges": ("whole", weights), "positions": ("by_position", weights[:201])}
    for kind, (name, weights) in of_kinds.items():
        of_methods = {method: getattr(of, name) for method, of in scores.items()}
        if "ap" not in of_methods or any(of is None for of in of_methods.values()):
            continue
        if len(of_methods["ap"]) < len(pairs):  # only the means have been kept
            groups, weights = [""], statistics.resamples([""])
        exact = of_methods.pop("ap")
        measures = {m: statistics.agreement(of, exact, groups, weights=weights) for m, of in of_methods.items()}
        pcc[kind] = {m: statistics.with_intervals(of) for m, of in measures.items()}
        differences[kind] = compared(measures)[1]
    return pcc, differences


def item_scores(method: str, of: EdgeScores, graph: Graph, by_node: bool, judge: Judge) -> Tensor:
    """What circuits are chosen by: mean scores of edges [writers, readers], or of nodes [writers].

    A node's score is the sum over its outgoing edges, as those of AtP and RelP add up to it. For exact patching, it is
    the effect of patching all its outgoing edges at once.
    """
    if not by_node:
        return files.in_matrix(graph, of.mean)
    if method != AP.name:
        return files.in_matrix(graph, of.mean).sum(1)
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
    edges = zip(graph.edges.nonzero().tolist(), share.tolist(), kept[graph.edges].tolist())
    inclusion = {f"{graph.writers[w]}->{graph.readers[r]}": value for (w, r), value, is_kept in edges if is_kept}
    return {"overlap": overlap, "inclusion": inclusion}


def describe(kept: Tensor, of: EdgeScores, graph: Graph, roles: list[str]) -> list[dict]:
    """The edges of a circuit, the strongest first: where each matters most, if that is known."""
    numbers = kept[graph.edges].nonzero()[:, 0]
    numbers = numbers[of.mean[numbers].abs().argsort(descending=True, stable=True)]
    places, edges = graph.edges.nonzero().tolist(), []
    for i in numbers.tolist():
        (w, r), role = places[i], None
        if of.roles is not None:
            role = roles[int(np.abs(of.roles[:, i]).argmax())].strip()
        edge = f"{graph.writers[w]}->{graph.readers[r]}"
        edges.append({"edge": edge, "score": float(of.mean[i]), "role": role})
    return edges


def verify(s: Setting, scores: dict[str, EdgeScores], by: str, graph: Graph, score: Callable) -> dict:
    """Exact patching of the s.verify edges with the largest mean scores by one method."""
    size = scores[by].mean.abs()
    numbers = size.argsort(descending=True, stable=True)[: s.verify]
    chosen = torch.zeros(len(size), dtype=torch.bool)
    chosen[numbers] = True
    only = files.in_matrix(graph, chosen)
    exact, cost = score([AP], only=only)
    places, edges = graph.edges.nonzero().tolist(), []
    for i in numbers.tolist():
        w, r = places[i]
        of_edge = {name: float(of.mean[i]) for name, of in (scores | exact).items()}
        edges.append({"edge": f"{graph.writers[w]}->{graph.readers[r]}", "scores": of_edge})
    return {"ranked_by": by, "edges": edges, "of": len(size), "seconds": cost[AP.name].seconds}
