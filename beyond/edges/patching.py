"""Exact edge patching: what edge scores predict.

In the original run, the reader v alone sees the stream with u's contribution replaced by the patch run's:

    c(u -> v) = metric(original run | v sees x + u(x_patch) - u(x_original)) - metric(original run)

at one position, or at all positions together. Only v's output changes at first. So this is activation patching of v
with a value that v computes from the stream it sees, and the run is resumed from there as in relp.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import relp
from beyond.edges.graph import KINDS, PLAIN, Graph, by_head, change_of_heads, read_mlp, stream_of, ungrouped
from models import Transformer, rotate
from relp import Edit


@torch.no_grad()
def patch_edges(
    model: Transformer,
    original: Tensor,
    patch: Tensor,
    answers: Tensor,
    metric: Callable = relp.logit_diff,
    by_position: bool = False,
    only: Tensor | None = None,
    rows: int = 32,
    progress: Callable | None = None,
) -> tuple[Tensor, int]:
    """Exact edge patching of every edge, [b, writers, readers] or, by position, [b, t, writers, readers].

    Arguments as relp.activation_patching takes them. only: bool [writers, readers], patch these edges only. Also
    returns how many runs it took: an edge whose writer does the same in both runs needs none, and its score is 0.
    """
    model = ungrouped(model)
    graph, nodes = Graph.of(model.config), {*KINDS, "z", "mlp_out", "resid_mid", "resid_post"} & {*model.nodes}
    relp.check(model, original, patch, answers, nodes, metric)
    run = relp.record_original(model, original, relp.targets(model, patch, answers, metric), nodes, metric)
    _, patch_acts = relp.record(model, patch, {*nodes, "resid_pre"})
    changes = [patch_acts["resid_pre", 0] - run.acts["resid_pre", 0]]
    for layer in range(graph.n_layers):
        changes += change_of_heads(model, layer, run.acts["z", layer], patch_acts["z", layer])
        changes.append(relp.difference(run.acts["mlp_out", layer], patch_acts["mlp_out", layer]))
    differs = torch.stack([change != 0 for change in changes], dim=2).any(-1)  # [b, t, w]
    if not by_position:  # one run from the first such position on
        differs &= differs.cumsum(1) == 1
    chosen = graph.edges if only is None else only & graph.edges

    def edit(layer: int, kind: str, writer: int) -> Edit:
        stream, change = run.acts[stream_of(graph, layer, kind)], changes[writer]
        of_readers = chosen[writer, graph.read(layer, kind)].to(differs.device)

        def new(prompts: Tensor, pos: int, parts: Tensor) -> Tensor:
            here = slice(pos, pos + 1 if by_position else None)
            seen = stream[prompts, here] + change[prompts, here].to(stream.dtype)
            if kind == "logits":
                return seen
            if kind == "mlp":
                return read_mlp(model, layer, seen)
            y = run.acts[kind, layer][prompts, here]  # a copy, in which the other heads stay
            y[range(len(y)), :, parts] = read_head(model, layer, kind, seen, parts, pos)
            return y

        node, at = {"logits": "resid_pre", "mlp": "mlp_out"}.get(kind, kind), layer
        return Edit(node, at, differs[:, :, writer, None] & of_readers, new, to_end=not by_position)

    edits = {
        (layer, kind, writer): edit(layer, kind, writer)
        for layer, kind in graph.places
        for writer in range(graph.seen(layer, kind))
        if chosen[writer, graph.read(layer, kind)].any()
    }
    found = relp.effects(run, edits, rows, progress=progress)
    scores = run.value.new_zeros(*original.shape, len(graph.writers), len(graph.readers))
    for (layer, kind, writer), effects in found.items():
        scores[:, :, writer, graph.read(layer, kind)] = effects
    runs = sum(int(relp.to_run(run, e, pos, False).sum()) for e in edits.values() for pos in range(run.n_pos))
    return scores if by_position else scores.sum(1), runs


def read_head(model: Transformer, layer: int, kind: str, stream: Tensor, heads: Tensor, first: int) -> Tensor:
    """q, k or v [n, t, d] of one head for each stream [n, t, d_model], at positions from `first` on."""
    weight, bias = by_head(model, layer, kind)
    y = torch.einsum("ntd,ned->nte", model.blocks[layer].ln1(stream, PLAIN), weight[heads])
    y = y if bias is None else y + bias[heads].unsqueeze(1)
    return y if kind == "v" else rotate(y.unsqueeze(2), first, model.config).squeeze(2)
