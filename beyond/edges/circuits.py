"""Circuits of edges, and how they are judged, as in MIB's circuit track (arXiv 2504.13151).

A circuit is a set of edges, kept [writers, readers]. In its run the reader v sees

    the sum over u of     u's contribution in this run, if u -> v is kept, else u's contribution in the patch run

and m(circuit) is the metric of that run. With m(model) for all edges and m(empty) for none,

    f = (m(circuit) - m(empty)) / (m(model) - m(empty))

    CPR   the area under f over the share of edges that is kept, with edges ranked by what they do for the behaviour
    CMD   the area under |1 - f|, with edges ranked by the size of their score

both by trapezoids over the shares of SHARES. A score here is metric(patched) - metric(original): an edge that does
something for the behaviour has a negative one.
"""

import numpy as np
import torch
from torch import Tensor

import relp
from beyond.edges.graph import KINDS, PLAIN, Graph, contributions, mlp_out, read_heads, stream_of, written_by_heads
from models import Attend, Nodes, Transformer, causal_mask, upcast

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
TARGET = 0.8  # the smallest circuit with this f is written down and drawn


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the edges


def ranking(scores: Tensor, items: Tensor, signed: bool) -> Tensor:
    """The numbers of the items, the best first: those that do most for the behaviour, or (signed=False) at all.

    scores: float [...]; items: bool, the same shape, True for what is ranked. The numbers are those of the flat tensor.
    """
    numbers = items.flatten().nonzero()[:, 0]
    values = scores.flatten()[numbers]
    good = -values if signed else values.abs()
    return numbers[good.argsort(descending=True, stable=True)]


def best(order: Tensor, n: int, graph: Graph, by_node: bool) -> Tensor:
    """The circuit of the first n items of a ranking of edges, or of writers, which keep all their edges; pruned."""
    edges = graph.edges
    chosen = torch.zeros(len(edges) if by_node else edges.numel(), dtype=torch.bool)
    chosen[order[:n]] = True
    return pruned(edges & (chosen[:, None] if by_node else chosen.view_as(edges)), graph)


def pruned(kept: Tensor, graph: Graph) -> Tensor:
    """Without edges that lead nowhere or come from nowhere: each node but input and logits needs both kinds of edge.

    f does not change: a head whose inputs all carry the patch run's repeats the patch run.
    """
    nodes = [*graph.writers, "logits"]
    of_readers = torch.tensor([nodes.index(reader.partition("<")[0]) for reader in graph.readers])
    while True:
        has_input, has_output = torch.zeros(2, len(nodes), dtype=torch.bool)
        has_input[0] = has_output[-1] = True
        has_input[of_readers[kept.any(0)]] = True
        has_output[:-1] |= kept.any(1)
        fewer = kept & has_input[:-1, None] & has_output[of_readers]
        if torch.equal(fewer, kept):
            return kept
        kept = fewer


# ---------------------------------------------------------------------------------------------------------------------
# Running them


class Circuits:
    """Runs circuits on pairs of one length. What the patch run has contributed is recorded once.

    model  one in which each head has a key and a value of its own: see graph.ungrouped
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, original: Tensor, patch: Tensor, answers: Tensor, metric=relp.logit_diff):
        self.model, self.graph, self.metric = model, Graph.of(model.config), metric
        self.original = original
        nodes = {"resid_pre", "resid_mid", "resid_post", "z", "mlp_out"} & {*model.nodes}
        stream, acts = relp.record(model, patch, nodes)
        self.answers = relp.targets(model, stream, answers, metric)
        graph = self.graph
        self.streams = {place: upcast(acts[stream_of(graph, *place)]) for place in graph.places}
        self.parts = contributions(model, acts)  # [w, b, t, d_model]

    @torch.no_grad()
    def __call__(self, kept: Tensor) -> Tensor:
        """The metric [b] of the run in which only the edges `kept` carry what this run computes."""
        model, graph, c = self.model, self.graph, self.model.config
        embedding = model.embed(self.original)
        kept, n_pos = kept.to(self.parts), embedding.shape[1]
        changes = torch.zeros_like(self.parts)  # what this run contributes minus what the patch run did
        changes[0] = upcast(embedding) - self.parts[0]

        def seen(layer: int, kind: str) -> Tensor:  # [r, b, t, d_model]
            n = graph.n_seen(layer, kind)
            of_circuit = torch.einsum("wr,wbtd->rbtd", kept[:n, graph.readers_of(layer, kind)], changes[:n])
            return (self.streams[layer, kind] + of_circuit).to(embedding.dtype)

        for layer in range(graph.n_layers):
            q, k, v = (read_heads(model, layer, kind, seen(layer, kind)) for kind in KINDS)
            mask = causal_mask(0, n_pos, n_pos, c.windows[layer], q.device)
            z = PLAIN.attention(q, k, v, Attend(c, mask, Nodes(None, layer)))
            writers = graph.writers_of(layer)
            heads, mlp = slice(writers.start, writers.stop - 1), writers.stop - 1
            changes[heads] = written_by_heads(model, layer, z) - self.parts[heads]
            changes[mlp] = upcast(mlp_out(model, layer, seen(layer, "mlp")[0])) - self.parts[mlp]
        return relp.read_out(model, seen(graph.n_layers, "logits")[0], self.answers, self.metric)


# ---------------------------------------------------------------------------------------------------------------------
# Judging them


def area(f: Tensor, shares=SHARES, log: bool = False) -> Tensor:
    """The area under f [shares, ...] by trapezoids; with log, over the logarithm of the share, divided by its range."""
    x = torch.tensor(np.log(shares) if log else shares, dtype=f.dtype)
    of_areas = torch.trapezoid(f, x, dim=0)
    return of_areas / (x[-1] - x[0]) if log else of_areas


def faithfulness(circuit: Tensor, whole: Tensor, empty: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """f [..., W] from the metric [..., n] of three runs, and how often each pair counts, weights [W, n].

    Both ways of averaging: the ratio of the means over the pairs, which MIB uses, and the mean of the pairs' ratios.
    """
    each = (circuit - empty) / (whole - empty)
    return {
        "ratio_of_means": relp.faithfulness(*(x.unsqueeze(-2) * weights for x in (circuit, whole, empty))),
        "mean_of_ratios": each @ weights.T / weights.sum(1),
    }


def stability(scores: Tensor, n: int, weights: Tensor) -> tuple[Tensor, float]:
    """How much a circuit depends on the pairs that it was found on: no run of the model is needed.

    scores [pairs, items]; weights [W, pairs]: how often each pair counts in each resample. In every resample, the n
    items with the largest mean scores in size form a circuit. Returns in which share of the circuits each item is
    [items], and the mean over all pairs of circuits of their Jaccard overlap. The circuits are not pruned.
    """
    sizes = (weights @ scores.to(weights.dtype)).abs()
    chosen = torch.zeros_like(sizes).scatter(1, sizes.topk(n).indices, 1)
    shared = chosen @ chosen.T
    overlaps = shared / (2 * n - shared)
    others = ~torch.eye(len(chosen), dtype=torch.bool)
    return chosen.mean(0), float(overlaps[others].mean())
