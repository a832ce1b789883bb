"""Exact edge patching: what edge scores predict.

In the original run, only the reader v sees the stream with u's contribution replaced by the patch run's:

    c(u -> v) = metric(original run | v sees s + u(x_patch) - u(x_original)) - metric(original run)

where s is the stream at v in the original run, at one position or at all positions together. Only v's output changes at
first. So this is activation patching of v with a value that v computes from the stream it sees, and the run is resumed
from there as in support/resume.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import relp
from beyond.edges.graph import Graph, changes, mlp_out, read_head, recorded, stream_of, ungrouped
from models import Transformer
from support.resume import Edit, effects, record_original, to_run


@torch.no_grad()
def patch_edges(
    model: Transformer,
    original: Tensor,
    patch: Tensor,
    targets: Tensor,
    metric: str | Callable = relp.logit_diff,
    by_position: bool = False,
    only: Tensor | None = None,
    rows: int = 32,
    progress: Callable | None = None,
) -> tuple[Tensor, int]:
    """Exact edge patching of every edge, [b, writers, readers] or, by position, [b, t, writers, readers].

    Arguments as resume.activation_patching takes them. only: bool [writers, readers], patch these edges only. Also
    returns how many runs it took: an edge whose writer does the same in both runs needs none, and its score is 0.
    """
    model = ungrouped(model)
    graph, names = Graph.of(model.config), recorded(model, "head_q", "head", "mlp_out")
    relp.check(model, original, patch, targets, names)
    run = record_original(model, original, targets, names, metric)
    _, patch_acts = relp.record(model, patch, names)
    change = changes(model, run.acts, patch_acts)  # [w, b, t, d_model]
    differs = (change != 0).any(-1)
    if not by_position:  # one run for all positions: it starts at the first that differs
        differs &= differs.cumsum(-1) == 1
    chosen = graph.edges if only is None else only & graph.edges

    def edit(layer: int, kind: str, writer: int) -> Edit:
        stream, of_readers = run.acts[stream_of(graph, layer, kind)], chosen[writer, graph.readers_of(layer, kind)]

        def new(prompts: Tensor, pos: int, parts: Tensor) -> Tensor:
            here = slice(pos, pos + 1 if by_position else None)
            seen = stream[prompts, here].squeeze(2) + change[writer, prompts, here].to(stream.dtype)
            if kind == "logits":
                return seen.unsqueeze(2)
            if kind == "mlp":
                return mlp_out(model, layer, seen).unsqueeze(2)
            y = run.acts[f"head_{kind}", layer][prompts, here]  # a copy, in which the other heads stay
            y[range(len(y)), :, parts] = read_head(model, layer, kind, seen, parts, pos)
            return y

        # what v's output is: for logits the final stream, which an Edit calls resid_pre of the layer after the last
        node = {"logits": "resid_pre", "mlp": "mlp_out"}.get(kind, kind)
        cells = differs[writer].unsqueeze(-1) & of_readers.to(differs.device)
        return Edit(node, layer, cells, new, to_end=not by_position)

    edits = {
        (layer, kind, writer): edit(layer, kind, writer)
        for layer, kind in graph.places
        for writer in range(graph.n_seen(layer, kind))
        if chosen[writer, graph.readers_of(layer, kind)].any()
    }
    scores = run.value.new_zeros(*original.shape, len(graph.writers), len(graph.readers))
    for (layer, kind, writer), of_edit in effects(run, edits, rows, progress).items():
        scores[:, :, writer, graph.readers_of(layer, kind)] = of_edit
    runs = sum(int(to_run(run, e, pos).sum()) for e in edits.values() for pos in range(run.n_pos))
    return scores if by_position else scores.sum(1), runs
