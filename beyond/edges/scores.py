"""Edge scores by AtP, RelP, any other rules, and EAP-IG: the passes of the node scores, and products.

    edge(u -> v) = (u(x_patch) - u(x_original)) . rho_v              at every position, or summed over the positions

u(x) is what the writer u adds to the residual stream on prompt x. rho_v is the coefficient of the stream as the reader
v sees it: v's own coefficient, carried back through v's projection and norm under the rules that are on. With all rules
off this is EAP (Syed et al. 2023, arXiv 2310.10348).

Two sums are exact, on any model and under any rules, because rho is linear in what it is carried back from. s is the
stream that v sees:

    the sum of edge(u -> v) over u is (s(x_patch) - s(x_original)) . rho_v
    the sum of edge(u -> v) over v is u's own score, (u(x_patch) - u(x_original)) . rho of the stream after u

u's own score is the node's: of resid_pre in layer 0 for the input, of mlp_out, and of `head`. If a norm or a rule
stands between a head's z and the stream (Gemma 2's norm after attention; the epsilon- and gamma-rule on the output
matrix), `head`'s score depends on that and the edges' sum does not. There the sum over the heads is attn_out's score.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import relp
from beyond import paths, twopoint
from beyond.edges.graph import KINDS, Graph, by_head, changes, finished, recorded, stream_of, ungrouped
from models import Pass, Rules, Transformer, upcast
from relp import Key


def attribute_edges(
    model: Transformer,
    original: Tensor,
    patch: Tensor,
    targets: Tensor,
    metric: str | Callable = relp.logit_diff,
    lrp: bool | Rules = False,
    steps: int | None = None,
    by_position: bool = False,
) -> Tensor:
    """The score of every edge [b, writers, readers], 0 where there is none; by_position: [b, t, writers, readers].

    Arguments as relp.attribute takes them, but for steps: with it, EAP-IG-inputs (Hanna et al. 2024, arXiv 2403.17806).
    The embedding takes the values patch + k/steps (original - patch), k = 1 .. steps; an edge's score is the mean of
    its AtP scores there, always with the same difference u(x_patch) - u(x_original). ValueError if they do not fit.
    """
    model = ungrouped(model)
    names = recorded(model, "head_q", "head_k", "head_v", "head", "mlp_out")
    if steps is None:
        both_runs = twopoint if isinstance(lrp, twopoint.TwoPoint) else relp
        acts, patch_acts, rho = both_runs.activations_and_rho(model, original, patch, targets, names, metric, lrp=lrp)
        return products(model, changes(model, acts, patch_acts), acts, patch_acts, rho, lrp, by_position)
    if steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps}")
    if lrp is not False:
        raise ValueError("EAP-IG averages plain gradients: give steps or lrp, not both")
    relp.check(model, original, patch, targets, names)
    acts, patch_acts = (relp.record(model, tokens, names)[1] for tokens in (original, patch))
    change, total = changes(model, acts, patch_acts), 0
    for k in range(1, steps + 1):
        embedding = torch.lerp(patch_acts["resid_pre", 0], acts["resid_pre", 0], k / steps)
        there, rho = paths.activations_and_rho_from(model, original, embedding, targets, names, metric)
        total = total + products(model, change, there, patch_acts, rho, lrp, by_position)
    return total / steps


def products(
    model: Transformer,
    change: Tensor,
    acts: dict[Key, Tensor],
    patch_acts: dict[Key, Tensor],
    rho: dict[Key, Tensor],
    lrp: bool | Rules,
    by_position: bool,
) -> Tensor:
    """The scores, from the writers' changes [w, b, t, d_model] and the coefficients in the run of `acts`."""
    graph = Graph.of(model.config)
    shape = change.shape[1:3] if by_position else change.shape[1:2]
    result = change.new_zeros(*shape, len(graph.writers), len(graph.readers))
    for readers, n_seen, of_readers in rho_of_readers(model, acts, patch_acts, rho, lrp):
        result[..., :n_seen, readers] = multiply(change[:n_seen], of_readers, by_position)
    return result


def multiply(change: Tensor, rho: Tensor, by_position: bool) -> Tensor:
    """[w, b, t, d] and [r, b, t, d] -> [b, w, r] or, by position, [b, t, w, r]. Flat: so no tensor is copied."""
    if not by_position:
        return torch.einsum("wbk,rbk->bwr", change.flatten(2), rho.flatten(2))
    of_positions = torch.einsum("wkd,rkd->kwr", change.flatten(1, 2), rho.flatten(1, 2))
    return of_positions.unflatten(0, change.shape[1:3])


def rho_of_readers(
    model: Transformer, acts: dict, patch_acts: dict, rho: dict, lrp: bool | Rules
) -> Iterator[tuple[slice, int, Tensor]]:
    """Readers that see the same writers: their numbers, how many writers, and rho_v [r, b, t, d_model].

    Those of one layer are made at a time: there are three times as many as changes of the writers.
    """
    graph = Graph.of(model.config)

    def rho_of_stream(name: str, layer: int) -> Tensor:
        return upcast(rho[name, layer]).movedim(2, 0)  # [1, b, t, d_model]

    for layer in range(graph.n_layers):
        of_heads = carried_back(model, layer, acts, patch_acts, rho, lrp)
        # the MLP's is the rest: rho of its stream = rho after the block + its own
        of_mlp = rho_of_stream(*stream_of(graph, layer, "mlp")) - rho_of_stream("resid_post", layer)
        if graph.parallel:  # the heads see the same stream
            of_mlp = of_mlp - of_heads.sum(0)
        yield graph.readers_of(layer, "heads"), graph.n_seen(layer, "heads"), of_heads
        yield graph.readers_of(layer, "mlp"), graph.n_seen(layer, "mlp"), of_mlp
    last = graph.n_layers, "logits"
    yield graph.readers_of(*last), graph.n_seen(*last), rho_of_stream(*stream_of(graph, *last))


def carried_back(model: Transformer, layer: int, acts: dict, patch_acts: dict, rho: dict, lrp: bool | Rules) -> Tensor:
    """rho of the stream as each head's q, k and v see it: [3 h, b, t, d_model].

    The coefficients of q, k and v go back through the head's own rows of the projection, and through the norm.
    """
    key, rules = ("resid_pre", layer), model.rules(lrp)
    if isinstance(rules, twopoint.TwoPoint):
        for_patch, rules = rules.two_runs()
        with torch.no_grad():
            read_by_rules(model, layer, patch_acts[key].squeeze(2), for_patch)
    with torch.enable_grad():
        stream = acts[key].squeeze(2).detach().requires_grad_()
        read = read_by_rules(model, layer, stream, rules)
    of_heads = [r for kind in KINDS for r in rho[f"head_{kind}", layer].unbind(2)]
    back = [torch.autograd.grad(y, stream, r, retain_graph=True)[0] for y, r in zip(read, of_heads)]
    return upcast(torch.stack(back))


def read_by_rules(model: Transformer, layer: int, stream: Tensor, rules: Rules) -> list[Tensor]:
    """q, k and v [b, t, d] of each head, so that autograd can go back to the stream from each by itself."""
    block, p = model.blocks[layer], Pass(rules, layer=layer)
    normed, read = block.ln1(stream, p), []
    for kind in KINDS:
        weight, bias = by_head(model, layer, kind)
        for of_head in zip(weight, bias):
            y = rules.linear(normed, *of_head)
            read.append(finished(kind, y.unsqueeze(2), 0, block.attn, p).squeeze(2))
    return read
