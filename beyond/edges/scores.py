"""Edge scores by AtP, RelP, any other rules, and EAP-IG: two forward passes, one backward pass, and products.

    edge(u -> v) = (u(x_patch) - u(x_original)) . rho_v              at every position, or summed over the positions

u(x) is what the writer u adds to the residual stream. rho_v is the coefficient of the stream as the reader v sees it:
v's own coefficient, carried back through v's projection and norm under the rules that are on. With all rules off this
is EAP (Syed et al. 2023, arXiv 2310.10348).

Two sums are exact, on any model and under any rules, because rho is linear in what it is carried back from:

    the sum of edge(u -> v) over v is u's own score, (u(x_patch) - u(x_original)) . rho of the stream after u;
    the sum of edge(u -> v) over u is (x_patch - x_original) . rho_v, for the stream x that v sees.

u's own score is the node's: of resid_pre in layer 0 for the input, of mlp_out, and of `head`. Where a norm or a rule
stands between a head's z and the stream (Gemma 2's norm after attention; the epsilon- and gamma-rule on the output
matrix), `head`'s score depends on that and the edges' sum does not; there the sum over the heads is attn_out's score.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import relp
from beyond.edges.graph import KINDS, Graph, by_head, stream_of, ungrouped, written
from models import Rules, Transformer, rotate, upcast
from relp import Terms

NODES = ("resid_pre", "resid_mid", "resid_post", *KINDS, "z", "mlp_out")  # all that edge scores are made of


def attribute_edges(
    model: Transformer,
    original: Tensor,
    patch: Tensor,
    answers: Tensor,
    metric: Callable = relp.logit_diff,
    lrp: bool | Rules = False,
    steps: int | None = None,
    by_position: bool = False,
) -> Tensor:
    """The score of every edge [b, writers, readers], 0 where there is none; by_position: [b, t, writers, readers].

    Arguments as relp.attribute takes them, but for steps: with it, EAP-IG-inputs (Hanna et al. 2024, arXiv 2403.17806).
    The embedding takes the values original + k/steps (patch - original), k = 0 .. steps - 1; an edge's score is the
    mean of its AtP scores there, always with the same difference u(x_patch) - u(x_original).
    ValueError if the arguments do not fit.
    """
    model = ungrouped(model)
    graph, nodes = Graph.of(model.config), [name for name in NODES if name in model.nodes]
    relp.check(model, original, patch, answers, nodes, metric)
    if steps is None:
        keys = [(name, layer) for name in nodes for layer in range(graph.n_layers)]
        terms = relp.propagate(model, original, patch, answers, keys, metric, lrp)
        return Products(model, terms, lrp).edges(terms, by_position)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps!r}")
    if lrp is not False:
        raise ValueError("EAP-IG averages plain gradients: give steps or lrp, not both")
    ends = [relp.record(model, tokens, nodes)[1] for tokens in (original, patch)]
    terms = {key: Terms(*(acts[key] for acts in ends), None) for key in ends[0]}
    products, total = Products(model, terms, lrp), 0
    for k in range(steps):
        embedding = torch.lerp(*(acts["resid_pre", 0] for acts in ends), k / steps)
        way = relp.coefficients(model, original, answers, nodes, metric, replace={("resid_pre", 0): embedding})
        at = {key: Terms(way[0][key].detach(), terms[key].patch, way[1][key]) for key in terms}
        total = total + products.edges(at, by_position)
    return total / steps


class Products:
    """The products of all writers' differences with all readers' coefficients, a layer of each at a time.

    No difference and no coefficient is kept for each head of the model: those of a layer are made from z, and from q, k
    and v, where they are needed.

    terms  the two runs between which the writers' differences are taken
    lrp    the rules under which the readers' coefficients are carried back to the stream
    """

    def __init__(self, model: Transformer, terms: dict, lrp: bool | Rules):
        self.model, self.terms, self.lrp, self.graph = model, terms, lrp, Graph.of(model.config)

    def edges(self, at: dict, by_position: bool) -> Tensor:
        """at: the activations of the run on which the coefficients were taken, and these."""
        graph, (n_prompts, n_pos) = self.graph, at["resid_pre", 0].original.shape[:2]
        shape = (n_prompts, n_pos) if by_position else (n_prompts,)
        product = "btwd,rbtd->btwr" if by_position else "btwd,rbtd->bwr"
        result = None
        for readers, seen, rho in self.readers(at):
            if result is None:
                result = rho.new_zeros(*shape, len(graph.writers), len(graph.readers))
            for writers, change in self.changes(seen):
                result[..., writers, readers] = torch.einsum(product, change, rho)
        return result

    def changes(self, n: int) -> Iterator[tuple[slice, Tensor]]:
        """The first n writers, by layer: their numbers, and u(x_patch) - u(x_original) [b, t, w, d_model]."""
        yield slice(0, 1), relp.difference(*self.terms["resid_pre", 0][:2]).unsqueeze(2)
        runs = [{key: x[i] for key, x in self.terms.items()} for i in (0, 1)]
        for layer in range(self.graph.n_layers):
            writers = self.graph.written(layer)
            if writers.start >= n:
                return
            change = relp.difference(*(written(self.model, acts, layer) for acts in runs))
            writers = slice(writers.start, min(writers.stop, n))
            yield writers, change[:, :, : writers.stop - writers.start]

    def readers(self, at: dict) -> Iterator[tuple[slice, int, Tensor]]:
        """Readers that see the same writers: their numbers, how many writers, and rho_v [r, b, t, d_model]."""
        graph = self.graph

        def rho(key):
            return upcast(at[key].rho)

        for layer in range(graph.n_layers):
            of_heads = carried_back(self.model, layer, at, self.lrp)
            heads = slice(graph.read(layer, "q").start, graph.read(layer, "v").stop)
            yield heads, graph.seen(layer, "q"), of_heads
            # what the stream passes on goes to the block's end, or to the MLP, or with parallel blocks to the heads
            of_mlp = rho(stream_of(graph, layer, "mlp")) - rho(("resid_post", layer))
            if graph.parallel:
                of_mlp = of_mlp - of_heads.sum(0)
            yield graph.read(layer, "mlp"), graph.seen(layer, "mlp"), of_mlp.unsqueeze(0)
        layer = graph.n_layers
        of_logits = rho(stream_of(graph, layer, "logits")).unsqueeze(0)
        yield graph.read(layer, "logits"), graph.seen(layer, "logits"), of_logits


def carried_back(model: Transformer, layer: int, at: dict, lrp: bool | Rules) -> Tensor:
    """rho of the stream as each head's q, k and v see it: [3 h, b, t, d_model].

    The coefficients of q, k and v go back through the head's own rows of the projection, and through the norm.
    """
    x = at["resid_pre", layer]
    rules = model.rules(lrp)
    if hasattr(rules, "two_runs"):
        for_patch, rules = rules.two_runs()
        with torch.no_grad():
            read_by_rules(model, layer, x.patch, for_patch)
    stream = x.original.detach().requires_grad_()
    normed, copies, read = read_by_rules(model, layer, stream, rules)
    rho = torch.autograd.grad(read, copies, [at[kind, layer].rho for kind in KINDS])
    of_stream = torch.autograd.grad(normed, stream, torch.stack(rho), is_grads_batched=True)[0]
    return upcast(of_stream)


def read_by_rules(
    model: Transformer, layer: int, stream: Tensor, rules: Rules
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The normed stream; what each head's q, k and v read, which is that; and q, k, v [b, t, h, d].

    Autograd can go back from q, k and v to what was read, and from the normed stream to the stream.
    """
    normed = model.blocks[layer].ln1(stream, rules)
    copies, read = [], []  # copies in name only: they share their numbers
    for kind in KINDS:
        weight, bias = by_head(model, layer, kind)
        of_heads = [normed.detach().requires_grad_() for _ in weight]
        biases = [None] * len(weight) if bias is None else bias
        y = torch.stack([rules.linear(*head) for head in zip(of_heads, weight, biases)], dim=2)
        read.append(y if kind == "v" else rotate(y, 0, model.config))
        copies += of_heads
    return normed, copies, read
