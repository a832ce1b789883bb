"""Edge scores by AtP, RelP, any other rules, and EAP-IG: two forward passes, one backward pass, and products.

    edge(u -> v) = (u(x_patch) - u(x_original)) . rho_v              at every position, or summed over the positions

u(x) is what the writer u adds to the residual stream on prompt x. rho_v is the coefficient of the stream as the reader
v sees it: v's own coefficient, carried back through v's projection and norm under the rules that are on. With all rules
off this is EAP (Syed et al. 2023, arXiv 2310.10348).

Two sums are exact, on any model and under any rules, because rho is linear in what it is carried back from. s is the
stream that v sees:

    the sum of edge(u -> v) over u is (s(x_patch) - s(x_original)) . rho_v
    the sum of edge(u -> v) over v is u's own score, (u(x_patch) - u(x_original)) . rho of the stream after u

u's own score is the node's: of resid_pre in layer 0 for the input, of mlp_out, and of `head`. Where a norm or a rule
stands between a head's z and the stream (Gemma 2's norm after attention; the epsilon- and gamma-rule on the output
matrix), `head`'s score depends on that and the edges' sum does not; there the sum over the heads is attn_out's score.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import relp
from beyond.edges.graph import KINDS, Graph, by_head, changes, finished, stream_of, ungrouped
from models import Rules, Transformer, upcast
from relp import Terms

NODES = ("resid_pre", "resid_mid", "resid_post", *KINDS, "z", "mlp_out")  # all that edge scores are made of


def attribute_edges(
    model: Transformer,
    original: Tensor,
    patch: Tensor,
    answers: Tensor,
    metric: str | Callable = relp.logit_diff,
    lrp: bool | Rules = False,
    steps: int | None = None,
    by_position: bool = False,
) -> Tensor:
    """The score of every edge [b, writers, readers], 0 where there is none; by_position: [b, t, writers, readers].

    Arguments as relp.attribute takes them, but for steps: with it, EAP-IG-inputs (Hanna et al. 2024, arXiv 2403.17806).
    The embedding takes the values patch + k/steps (original - patch), k = 1 .. steps; an edge's score is the mean of
    its AtP scores there, always with the same difference u(x_patch) - u(x_original).
    ValueError if the arguments do not fit.
    """
    model = ungrouped(model)
    graph, nodes = Graph.of(model.config), [name for name in NODES if name in model.nodes]
    relp.check(model, original, patch, answers, nodes, metric)
    if steps is None:
        keys = [(name, layer) for name in nodes for layer in range(graph.n_layers)]
        terms = relp.propagate(model, original, patch, answers, keys, metric, lrp)
        runs = ({key: getattr(x, run) for key, x in terms.items()} for run in ("original", "patch"))
        return Products(model, *runs, lrp).edges(terms, by_position)
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps!r}")
    if lrp is not False:
        raise ValueError("EAP-IG averages plain gradients: give steps or lrp, not both")
    _, acts = relp.record(model, original, nodes)
    patch_stream, patch_acts = relp.record(model, patch, nodes)
    answers = relp.targets(model, patch_stream, answers, metric)
    products, total = Products(model, acts, patch_acts, lrp), 0
    for k in range(1, steps + 1):
        embedding = torch.lerp(patch_acts["resid_pre", 0], acts["resid_pre", 0], k / steps)
        on_the_way = {("resid_pre", 0): embedding}
        there, rho = relp.coefficients(model, original, answers, nodes, metric, replace=on_the_way)
        terms = {key: Terms(there[key].detach(), patch_acts[key], rho[key]) for key in there}
        total = total + products.edges(terms, by_position)
    return total / steps


class Products:
    """The products of all writers' changes between two recorded runs with all readers' coefficients.

    The changes are kept: a stream for each writer, which is less than the backward pass needed before. There are three
    times as many coefficients; those of one layer are made at a time.

    lrp  the rules under which the readers' coefficients are carried back to the stream
    """

    def __init__(self, model: Transformer, original: dict, patch: dict, lrp: bool | Rules):
        self.model, self.lrp, self.graph = model, lrp, Graph.of(model.config)
        self.changes = changes(model, original, patch)  # [w, b, t, d_model]

    def edges(self, terms: dict, by_position: bool) -> Tensor:
        """The scores, for coefficients that were taken on the run which is the `original` of these terms."""
        graph, (n_prompts, n_pos) = self.graph, self.changes.shape[1:3]
        shape = (n_prompts, n_pos) if by_position else (n_prompts,)
        result = self.changes.new_zeros(*shape, len(graph.writers), len(graph.readers))
        for readers, n_seen, rho in self.readers(terms):
            result[..., :n_seen, readers] = multiply(self.changes[:n_seen], rho, by_position)
        return result

    def readers(self, terms: dict) -> Iterator[tuple[slice, int, Tensor]]:
        """Readers that see the same writers: their numbers, how many writers, and rho_v [r, b, t, d_model]."""
        graph = self.graph

        def rho(node: str, layer: int) -> Tensor:
            return upcast(terms[node, layer].rho)

        for layer in range(graph.n_layers):
            of_heads = carried_back(self.model, layer, terms, self.lrp)
            # the MLP's is the rest: rho of its stream = rho after the block + its own
            of_mlp = rho(*stream_of(graph, layer, "mlp")) - rho("resid_post", layer)
            if graph.parallel:  # the heads see the same stream
                of_mlp = of_mlp - of_heads.sum(0)
            heads = slice(graph.readers_of(layer, "q").start, graph.readers_of(layer, "v").stop)
            yield heads, graph.n_seen(layer, "q"), of_heads
            yield graph.readers_of(layer, "mlp"), graph.n_seen(layer, "mlp"), of_mlp.unsqueeze(0)
        last = graph.n_layers, "logits"
        yield graph.readers_of(*last), graph.n_seen(*last), rho(*stream_of(graph, *last)).unsqueeze(0)


def multiply(change: Tensor, rho: Tensor, by_position: bool) -> Tensor:
    """[w, b, t, d] and [r, b, t, d] -> [b, w, r] or, by position, [b, t, w, r]. Flat: so no tensor is copied."""
    if not by_position:
        return torch.einsum("wbk,rbk->bwr", change.flatten(2), rho.flatten(2))
    products = torch.einsum("wkd,rkd->kwr", change.flatten(1, 2), rho.flatten(1, 2))
    return products.unflatten(0, change.shape[1:3])


def carried_back(model: Transformer, layer: int, terms: dict, lrp: bool | Rules) -> Tensor:
    """rho of the stream as each head's q, k and v see it: [3 h, b, t, d_model].

    The coefficients of q, k and v go back through the head's own rows of the projection, and through the norm.
    """
    x = terms["resid_pre", layer]
    rules = model.rules(lrp)
    if hasattr(rules, "two_runs"):
        for_patch, rules = rules.two_runs()
        with torch.no_grad():
            read_by_rules(model, layer, x.patch, for_patch)
    stream = x.original.detach().requires_grad_()
    read = read_by_rules(model, layer, stream, rules)
    rho = [of_head for kind in KINDS for of_head in terms[kind, layer].rho.unbind(2)]
    back = [torch.autograd.grad(y, stream, r, retain_graph=True)[0] for y, r in zip(read, rho)]
    return upcast(torch.stack(back))


def read_by_rules(model: Transformer, layer: int, stream: Tensor, rules: Rules) -> list[Tensor]:
    """q, k and v [b, t, d] of each head, so that autograd can go back to the stream from each by itself."""
    block, read = model.blocks[layer], []
    normed = block.ln1(stream, rules)
    for kind in KINDS:
        weight, bias = by_head(model, layer, kind)
        for of_head in zip(weight, bias):
            y = rules.linear(normed, *of_head)
            read.append(finished(kind, y.unsqueeze(2), 0, block.attn, rules).squeeze(2))
    return read
