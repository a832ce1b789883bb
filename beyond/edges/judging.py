"""Judging circuits on pairs: the curves of f over size, their areas, and the smallest circuit that does the task."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from beyond.edges.circuits import SHARES, TARGET, Circuits, area, best, faithfulness, ranking
from beyond.edges.graph import Graph
from beyond.edges.scoring import MOST
from support.memory import BatchSize
from support.prompts import batches, tensors
from support.statistics import estimate
from tasks import Pair

MEASURES = {  # name: (which curve, over the logarithm of the size?)
    "cpr": ("signed", False),
    "cmd": ("absolute", False),
    "cpr_log": ("signed", True),
    "cmd_log": ("absolute", True),
}


class Judge:
    """Runs circuits on prompt pairs of any lengths, each circuit once.

    What the writers have contributed in the patch runs is kept, if that is at most MOST numbers; otherwise it is
    computed each time. size: of a batch, which batch_size, if given, may halve.
    """

    def __init__(
        self,
        model,
        pairs: list[Pair],
        metric: Callable,
        device: torch.device,
        size: int,
        batch_size: BatchSize | None = None,
    ):
        self.model, self.pairs, self.metric, self.device, self.size = model, pairs, metric, device, size
        self.batch_size, self.graph = batch_size or BatchSize(str(size)), Graph.of(model.config)
        self.known, self.made = {}, {}
        n_tokens = sum(len(pair.original) for pair in pairs)
        self.keeps = n_tokens * len(self.graph.writers) * model.config.d_model <= MOST
        self.whole, self.empty = self(self.graph.edges), self(torch.zeros_like(self.graph.edges))

    def __call__(self, kept: Tensor) -> Tensor:
        """The metric of each pair [n], in float64."""
        key = kept.numpy().tobytes()
        if key not in self.known:
            values = torch.empty(len(self.pairs), dtype=torch.float64)
            for numbers in batches(self.pairs, self.size):
                for part, of_part in self.batch_size.in_parts(numbers, partial(self.run, kept), self.size):
                    values[part] = of_part.cpu().double()
            self.known[key] = values
        return self.known[key]

    def run(self, kept: Tensor, numbers: list[int], _: int) -> Tensor:
        """The metric of these pairs."""
        most = self.batch_size.most_prompts  # batches that were larger are of no use any more
        self.made = {numbers: made for numbers, made in self.made.items() if len(numbers) <= most}
        circuits = self.made.get(tuple(numbers))
        if circuits is None:
            tokens = tensors([self.pairs[i] for i in numbers], self.device)
            circuits = Circuits(self.model, *tokens, self.metric)
            if self.keeps:
                self.made[tuple(numbers)] = circuits
        return circuits(kept)

    def f(self, kept: Tensor) -> float:
        """f of one circuit: the ratio of the means over the pairs."""
        once = torch.ones(1, len(self.whole), dtype=torch.float64)
        return float(faithfulness(self(kept), self.whole, self.empty, once)["ratio_of_means"])


@dataclass
class Curve:
    """f of a method's circuits at SHARES, by one ranking of the items. Sizes are in edges, after pruning."""

    sizes: list[int]
    f: dict[str, Tensor]  # {"ratio_of_means" or "mean_of_ratios": [shares, weights]}


def curves(judge: Judge, scores: Tensor, by_node: bool, weights: Tensor) -> dict[str, Curve]:
    """{"signed" or "absolute": Curve} of one method's scores [writers, readers], or of writers.

    weights [W, pairs]: how often each judged pair counts.
    """
    result, items = {}, items_of(judge.graph, by_node)
    for name in ("signed", "absolute"):
        order = ranking(scores, items, name == "signed")
        kept = [best(order, int(share * len(order)), judge.graph, by_node) for share in SHARES]
        values = torch.stack([judge(circuit) for circuit in kept])
        f = faithfulness(values, judge.whole, judge.empty, weights)
        result[name] = Curve([int(circuit.sum()) for circuit in kept], f)
    return result


def items_of(graph: Graph, by_node: bool) -> Tensor:
    """What is ranked: edges, or writers."""
    return torch.ones(len(graph.writers), dtype=torch.bool) if by_node else graph.edges


def areas(curves: dict[str, Curve]) -> dict[str, Tensor]:
    """{measure: [W]}, and the same with _mean_of_ratios for the other way of averaging."""
    result = {}
    for measure, (which, log) in MEASURES.items():
        for average, f in curves[which].f.items():
            suffix = "" if average == "ratio_of_means" else f"_{average}"
            result[measure + suffix] = area((1 - f).abs() if measure.startswith("cmd") else f, log=log)
    return result


def differences_of(of_methods: dict[str, dict[str, Tensor]]) -> dict:
    """{"relp - atp": {measure: Estimate}} of every two methods, from {method: {measure: [W]}} on the same resamples."""
    return {
        f"{other} - {one}": {
            measure: estimate(of_methods[other][measure] - values) for measure, values in of_methods[one].items()
        }
        for one, other in itertools.combinations(of_methods, 2)
    }


def smallest(judge: Judge, scores: Tensor, by_node: bool) -> tuple[Tensor, int]:
    """The smallest circuit with f >= TARGET, found by bisection in the ranking by size; and of how many items it is.

    f does not always rise with the size: between the first of SHARES that reaches TARGET and the one before it, the
    circuit found is one whose next smaller neighbour falls short.
    """
    order = ranking(scores, items_of(judge.graph, by_node), signed=False)

    def circuit(n: int) -> Tensor:
        return best(order, n, judge.graph, by_node)

    too_few = 0
    for enough in (int(share * len(order)) for share in SHARES):
        if judge.f(circuit(enough)) >= TARGET:
            break
        too_few = enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if judge.f(circuit(middle)) >= TARGET:
            enough = middle
        else:
            too_few = middle
    return circuit(enough), enough
