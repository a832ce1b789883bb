"""Circuits of edges: choosing the edges, and running the model with these only.

A circuit is a set of edges, kept [writers, readers]. In its run the reader v sees

    the sum over u of     u's contribution in this run, if u -> v is kept, else u's contribution in the patch run

A score is metric(patched) - metric(original): an edge that does something for the behaviour has a negative one.
"""

from collections.abc import Callable
from itertools import takewhile

import torch
from torch import Tensor

import relp
from beyond.edges.graph import (
    KINDS,
    PLAIN,
    Graph,
    mlp_out,
    read_heads,
    recorded,
    stream_of,
    written,
    written_by_heads,
)
from models import Transformer, causal_mask, upcast


def ranking(scores: Tensor, graph: Graph, signed: bool, paths: bool = False) -> Tensor:
    """The numbers of the edges, the best first: signed, the most negative score; else the score of the largest size.

    scores: float [writers, readers]. The numbers are those of the flat tensor. paths: an edge counts as much as the
    strongest path through it.
    """
    numbers = graph.edges.flatten().nonzero()[:, 0]
    good = -scores if signed else scores.abs()
    order = numbers[good.flatten()[numbers].argsort(descending=True, stable=True)]
    if paths:  # of the edges of one path, the stronger comes first
        of_paths = along_paths(good.clamp(min=0), graph).flatten()
        order = order[of_paths[order].argsort(descending=True, stable=True)]
    return order


def along_paths(strength: Tensor, graph: Graph) -> Tensor:
    """Of each edge, how strong the strongest path from input to logits through it is: as strong as its weakest edge.

    strength: float [writers, readers], 0 or more.
    """
    logits = len(graph.writers)
    numbers = {name: i for i, name in enumerate([*graph.writers, "logits"])}
    node = torch.tensor([numbers[name.partition("<")[0]] for name in graph.readers])  # whose reader it is
    strength = strength.double().where(graph.edges, 0)
    before, after = torch.zeros(2, logits + 1, dtype=torch.float64)  # of the strongest path to a node, and from it
    before[0] = after[logits] = torch.inf
    for i in range(1, logits):
        before[i] = torch.minimum(before[:logits, None], strength)[:, node == i].max()
    for i in reversed(range(logits)):
        after[i] = torch.minimum(strength[i], after[node]).max()
    return torch.minimum(strength, torch.minimum(before[:logits, None], after[node]))


def best(order: Tensor, n: int, graph: Graph) -> Tensor:
    """The circuit of the first n edges of a ranking, pruned."""
    kept = torch.zeros(graph.edges.numel(), dtype=torch.bool)
    kept[order[:n]] = True
    return pruned(kept.view_as(graph.edges), graph)


def drawable(order: Tensor, kept: Tensor, graph: Graph, most: int) -> Tensor:
    """A circuit; of one with more than `most` edges, the largest circuit of its ranking's first edges that has not."""
    if kept.sum() <= most:
        return kept
    *_, found = takewhile(lambda few: few.sum() <= most, (best(order, n, graph) for n in range(len(order))))
    return found


def pruned(kept: Tensor, graph: Graph) -> Tensor:
    """Without edges that lead nowhere or come from nowhere: each node but input and logits needs both kinds of edge.

    The circuit's run stays the same: a head whose inputs all carry the patch run's repeats the patch run. Where a norm
    follows attention, a head's part depends on all heads of its layer. So there, these heads count as one node.
    """

    def node(name: str) -> str:
        return name.partition("." if graph.post_norm else "<")[0]  # of the reader a0.h1<q>: a0, or a0.h1

    nodes = list(dict.fromkeys(node(name) for name in [*graph.writers, "logits"]))
    of_writers, of_readers = (
        torch.tensor([nodes.index(node(name)) for name in names]) for names in (graph.writers, graph.readers)
    )
    while True:
        has_input, has_output = torch.zeros(2, len(nodes), dtype=torch.bool)
        has_input[0] = has_output[-1] = True
        has_input[of_readers[kept.any(0)]] = True
        has_output[of_writers[kept.any(1)]] = True
        fewer = kept & has_input[of_writers, None] & has_output[of_readers]
        if torch.equal(fewer, kept):
            return kept
        kept = fewer


class Circuits:
    """Runs circuits on prompts of one length. What the patch run has contributed is recorded once.

    model  one in which each head has a key and a value of its own: see graph.ungrouped
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Transformer,
        original: Tensor,
        patch: Tensor,
        targets: Tensor,
        metric: str | Callable = relp.logit_diff,
    ):
        self.model, self.original, self.targets, self.metric = model, original, targets, metric
        self.graph = graph = Graph.of(model.config)
        _, acts = relp.record(model, patch, recorded(model, "head", "mlp_out"))
        places = [(layer, kind) for layer in range(graph.n_layers) for kind in ("heads", "mlp")]
        places.append((graph.n_layers, "logits"))
        self.streams = {place: upcast(acts[stream_of(graph, *place)]).squeeze(2) for place in places}
        self.parts = torch.cat(list(written(model, acts)))  # [w, b, t, d_model]

    @torch.no_grad()
    def __call__(self, kept: Tensor) -> Tensor:
        """The metric [b] of the run in which only the edges `kept` carry what this run computes.

        A component with no kept edge into it does what it does in the patch run: it is skipped.
        """
        model, graph, c = self.model, self.graph, self.model.config
        embedding, kept = model.embed(self.original), kept & graph.edges
        writers = []  # those that are not skipped,
        changes = torch.empty_like(self.parts)  # and what each contributes minus what it does in the patch run

        def write(numbers: list[int], contributions: Tensor) -> None:
            changes[len(writers) : len(writers) + len(numbers)] = contributions - self.parts[numbers]
            writers.extend(numbers)

        def edges_into(layer: int, kind: str) -> Tensor:
            return kept[writers, graph.readers_of(layer, kind)]

        def seen(layer: int, kind: str, edges: Tensor) -> Tensor:
            """What readers see, [r, b, t, d_model], from the edges into them."""
            of_circuit = edges.T.to(changes) @ changes[: len(writers)].flatten(1)
            return (self.streams[layer, kind] + of_circuit.view(-1, *changes.shape[1:])).to(embedding.dtype)

        write([0], upcast(embedding))
        for layer in range(graph.n_layers):
            *of_heads, of_mlp = range(*graph.writers_of(layer).indices(len(graph.writers)))
            edges = edges_into(layer, "heads").unflatten(1, (len(KINDS), -1))
            heads = edges.any(0).any(0)
            if graph.post_norm:  # what a head adds depends on all heads of its layer
                heads = heads.any().expand_as(heads)
            if heads.any():
                streams = seen(layer, "heads", edges[:, :, heads].flatten(1)).unflatten(0, (len(KINDS), -1))
                q, k, v = (read_heads(model, layer, kind, x, heads) for kind, x in zip(KINDS, streams))
                mask = causal_mask(0, q.shape[1], q.shape[1], c.windows[layer], q.device)
                z = PLAIN.rules.attention(q, k, v, mask, c, PLAIN)
                write([n for n, on in zip(of_heads, heads) if on], written_by_heads(model, layer, z, heads))
            edges = edges_into(layer, "mlp")
            if edges.any():
                write([of_mlp], upcast(mlp_out(model, layer, seen(layer, "mlp", edges)[0])))
        last = graph.n_layers, "logits"
        return relp.read_out(model, seen(*last, edges_into(*last))[0], self.targets, self.metric)
