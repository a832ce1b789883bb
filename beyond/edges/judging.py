"""How well circuits do the task, judged as in MIB's circuit track (arXiv 2504.13151).

With m(circuit) for the metric of a circuit's run, m(model) for all edges and m(empty) for none,

    f = (m(circuit) - m(empty)) / (m(model) - m(empty))                       of the means over the pairs

    CPR   the area under f over the share of edges that is kept, with edges ranked by what they do for the behaviour
    CMD   the area under |1 - f|, with edges ranked by the size of their score

both by trapezoids over the shares of SHARES; and once more over the logarithm of the share, divided by its range.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import relp
from beyond.edges.circuits import Circuits, best, ranking
from beyond.edges.graph import Graph
from models import Transformer
from support.prompts import batches, tensors
from support.scoring import two_runs
from tasks import Pair

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TARGET = 0.8  # the smallest circuit with this f is written down and drawn
MOST = 2**28  # numbers that the judge keeps of the patch runs: 1 GiB in float32
MEASURES = {  # name: (are edges ranked with their sign? is the area over the logarithm of the share?)
    "cpr": (True, False),
    "cmd": (False, False),
    "cpr_log": (True, True),
    "cmd_log": (False, True),
}


class Judge:
    """Runs circuits on prompt pairs of any lengths, each circuit once.

    model  one in which each head has a key and a value of its own: see graph.ungrouped
    size   how many pairs are run together
    paths  circuits are chosen along paths: see circuits.ranking
    """

    def __init__(
        self, model: Transformer, pairs: list[Pair], metric: str | Callable, device, size: int = 32, paths: bool = False
    ):
        self.model, self.pairs, self.metric, self.device, self.paths = model, pairs, metric, device, paths
        self.graph, self.batches = Graph.of(model.config), list(batches(pairs, size))
        n_tokens = sum(len(pair.original) for pair in pairs)
        self.keeps = n_tokens * len(self.graph.writers) * model.config.d_model <= MOST
        self.made, self.known = {}, {}  # {batch: Circuits} and {circuit: the metric of each pair}
        self.whole, self.empty = self(self.graph.edges), self(torch.zeros_like(self.graph.edges))

    def __call__(self, kept: Tensor) -> Tensor:
        """The metric of each pair [n], in float64."""
        key = kept.numpy().tobytes()
        if key not in self.known:
            self.known[key] = torch.empty(len(self.pairs), dtype=torch.float64)
            for i, numbers in enumerate(self.batches):
                self.known[key][numbers] = self.circuits_of(i)(kept).cpu().double()
        return self.known[key]

    def circuits_of(self, i: int) -> Circuits:
        """What runs circuits on one of the batches; it is kept if memory allows."""
        if i in self.made:
            return self.made[i]
        original, patch, answers = tensors([self.pairs[n] for n in self.batches[i]], self.device)
        targets = two_runs(self.model, original, patch, answers, self.metric)["targets"]
        made = Circuits(self.model, original, patch, targets, self.metric)
        if self.keeps:
            self.made[i] = made
        return made

    def f(self, kept: Tensor, weights: Tensor | None = None) -> Tensor:
        """f of one circuit: a number, or [W] for weights [W, pairs] that say how often each pair counts."""
        weights = torch.ones(len(self.pairs), dtype=torch.float64) if weights is None else weights
        return relp.faithfulness(*(x * weights for x in (self(kept), self.whole, self.empty)))


def curve(judge: Judge, scores: Tensor, signed: bool, weights: Tensor) -> tuple[list[int], Tensor]:
    """By one ranking of the edges: the sizes of the circuits at SHARES, after pruning, and their f [shares, W]."""
    order = ranking(scores, judge.graph, signed, judge.paths)
    circuits = [best(order, int(share * len(order)), judge.graph) for share in SHARES]
    return [int(kept.sum()) for kept in circuits], torch.stack([judge.f(kept, weights) for kept in circuits])


def areas(signed: Tensor, absolute: Tensor) -> dict[str, Tensor]:
    """{measure of MEASURES: [W]}, from f [shares, W] of both rankings."""
    return {
        name: area(signed if with_sign else (1 - absolute).abs(), log) for name, (with_sign, log) in MEASURES.items()
    }


def area(f: Tensor, log: bool = False) -> Tensor:
    """The area under f [shares, ...] by trapezoids; with log, over the logarithm of the share, divided by its range."""
    x = torch.tensor(np.log(SHARES) if log else SHARES, dtype=f.dtype)
    under = torch.trapezoid(f, x, dim=0)
    return under / (x[-1] - x[0]) if log else under


def smallest(judge: Judge, scores: Tensor) -> tuple[Tensor, int]:
    """The smallest circuit with f >= TARGET, found by bisection in the ranking by size; its edges before pruning.

    f does not always rise with the size: between the first of SHARES that reaches TARGET and the one before it, the
    circuit found is one whose next smaller neighbour falls short.
    """
    order = ranking(scores, judge.graph, signed=False, paths=judge.paths)

    def reaches(n: int) -> bool:
        return bool(judge.f(best(order, n, judge.graph)) >= TARGET)

    too_few = 0
    for enough in (int(share * len(order)) for share in SHARES):
        if reaches(enough):
            break
        too_few = enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if reaches(middle):
            enough = middle
        else:
            too_few = middle
    return best(order, enough, judge.graph), enough


def stability(scores: Tensor, n: int, weights: Tensor, graph: Graph, paths: bool = False) -> tuple[Tensor, float]:
    """How much a circuit depends on the pairs that it was found on: no run of the model is needed.

    scores [pairs, edges]; weights [W, pairs]: how often each pair counts in each resample. In every resample, the first
    n edges of the ranking by size form a circuit. Returns in which share of the circuits each edge is [edges], and the
    mean over all pairs of circuits of their Jaccard overlap. The circuits are not pruned.
    """
    chosen = []
    for mean in weights @ scores.to(weights.dtype):
        kept = torch.zeros(graph.edges.numel(), dtype=weights.dtype)
        kept[ranking(graph.in_matrix(mean), graph, signed=False, paths=paths)[:n]] = 1
        chosen.append(kept.view_as(graph.edges)[graph.edges])
    chosen = torch.stack(chosen)
    shared = chosen @ chosen.T
    overlaps = shared / (2 * n - shared)
    others = ~torch.eye(len(chosen), dtype=torch.bool)
    return chosen.mean(0), float(overlaps[others].mean())
