"""The graph of a transformer: who writes into the residual stream, and who reads it.

    writers   input (the embedding), each head a0.h0, a0.h1, ..., each MLP m0, ...
    readers   each head's query, key and value a0.h0<q>, a0.h0<k>, a0.h0<v>, each MLP m0, ..., and logits

The stream that a reader sees, before its own norm, is the sum of what all writers before it have written (and of
biases, which no prompt changes). So an edge, such as a0.h1->a2.h0<k>, is one term of that sum. Names and order are
those of EAP-IG's Graph (github.com/hannamw/EAP-IG, src/eap/graph.py).

Shapes: b batch, t position, h head, w writer, r reader; d is d_model, or d_head after an h. A set of edges is a bool
tensor [writers, readers] on the CPU. Recorded activations have relp's one shape, {(name, layer): [b, t, part, hidden]}.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from models import Attention, Config, Pass, Rules, Transformer, rotate, upcast
from relp import Key, difference, node_of

KINDS = ("q", "k", "v")  # what a head reads
STREAMS = ("resid_pre", "resid_mid", "resid_post")
PLAIN = Pass(Rules())


@dataclass(frozen=True)
class Graph:
    """Names and numbers of writers and readers. Both are in the order of the layers; a reader sees the first writers.

    parallel   attention and MLP of a layer read the same stream (GPT-NeoX), so that the MLP does not see the heads
    post_norm  a norm follows attention (Gemma 2 and 3), so that each head's part depends on the other heads' outputs
    """

    n_layers: int
    n_heads: int
    parallel: bool = False
    post_norm: bool = False

    @staticmethod
    def of(c: Config) -> "Graph":
        return Graph(c.n_layers, c.n_heads, c.parallel, c.post_norm)

    @cached_property
    def writers(self) -> list[str]:
        layers = range(self.n_layers)
        return ["input", *(name for layer in layers for name in [*self.heads_of(layer), f"m{layer}"])]

    @cached_property
    def readers(self) -> list[str]:
        of_layers = [
            [*(f"{head}<{kind}>" for kind in KINDS for head in self.heads_of(layer)), f"m{layer}"]
            for layer in range(self.n_layers)
        ]
        return [*(name for of_layer in of_layers for name in of_layer), "logits"]

    def heads_of(self, layer: int) -> list[str]:
        return [f"a{layer}.h{head}" for head in range(self.n_heads)]

    def writers_of(self, layer: int) -> slice:
        """The numbers of the layer's writers: its heads, then its MLP."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads + 1)

    def readers_of(self, layer: int, kind: str) -> slice:
        """The numbers of the layer's readers of one kind: q, k, v (one for each head), heads (these three), or mlp.

        logits has no layer.
        """
        if kind == "logits":
            return slice(self.n_layers * (3 * self.n_heads + 1), None)
        if kind == "heads":
            return slice(self.readers_of(layer, "q").start, self.readers_of(layer, "v").stop)
        start = layer * (3 * self.n_heads + 1) + (*KINDS, "mlp").index(kind) * self.n_heads
        return slice(start, start + (1 if kind == "mlp" else self.n_heads))

    def n_seen(self, layer: int, kind: str) -> int:
        """How many writers these readers see: the first ones, up to their own layer."""
        if kind == "logits":
            return len(self.writers)
        sees_heads = kind == "mlp" and not self.parallel
        return self.writers_of(layer).start + (self.n_heads if sees_heads else 0)

    @property
    def places(self) -> list[tuple[int, str]]:
        """(layer, kind) of all groups of readers, in order; those of a group see the same writers."""
        of_layers = [(layer, kind) for layer in range(self.n_layers) for kind in (*KINDS, "mlp")]
        return [*of_layers, (self.n_layers, "logits")]

    @cached_property
    def edges(self) -> Tensor:
        """bool [writers, readers]: True where there is an edge."""
        there = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for layer, kind in self.places:
            there[: self.n_seen(layer, kind), self.readers_of(layer, kind)] = True
        return there

    def names_of(self, edges: Tensor) -> list[str]:
        """The names of these edges, such as a0.h1->m2, in the order of edges.nonzero()."""
        writers, readers = self.writers, self.readers
        return [f"{writers[w]}->{readers[r]}" for w, r in edges.nonzero().tolist()]

    @cached_property
    def names(self) -> list[str]:
        """The names of all edges."""
        return self.names_of(self.edges)

    def in_matrix(self, values: Tensor) -> Tensor:
        """Values of all edges, in the order of their names, as [writers, readers]: 0 where there is no edge."""
        result = torch.zeros(self.edges.shape, dtype=values.dtype)
        result[self.edges] = values
        return result


def stream_of(graph: Graph, layer: int, kind: str) -> Key:
    """The node that holds the stream which these readers see."""
    if kind == "logits":
        return "resid_post", graph.n_layers - 1
    return ("resid_mid" if kind == "mlp" and not graph.parallel else "resid_pre"), layer


def recorded(model: Transformer, *names: str) -> list[str]:
    """Those of the names that the model has: the streams, and the others that are given."""
    return [name for name in (*STREAMS, *names) if node_of(name) in model.nodes]


def ungrouped(model: Transformer) -> Transformer:
    """The same function with a key and a value head of its own for each query head, so that each is a reader.

    All other weights are the model's own, not copies.
    """
    if not isinstance(model, Transformer):
        raise ValueError(f"edges need a models.Transformer, got {type(model).__name__}")
    c = model.config
    if model.blocks[0].ln1 is None:
        raise ValueError(f"edges of {c.family} models are not supported: one norm is of the queries of all heads")
    if c.n_kv_heads == c.n_heads:
        return model
    weights = model.state_dict()
    for name in weights:
        if ".attn.k." in name or ".attn.v." in name:
            by_head = weights[name].unflatten(0, (c.n_kv_heads, c.d_head))
            weights[name] = by_head.repeat_interleave(c.n_heads // c.n_kv_heads, dim=0).flatten(0, 1)
    with torch.device("meta"):
        result = Transformer(replace(c, n_kv_heads=c.n_heads))
    result.load_state_dict(weights, assign=True)
    return result.requires_grad_(False).train(model.training)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def written_by_heads(model: Transformer, layer: int, z: Tensor, heads: Tensor | slice = slice(None)) -> Tensor:
    """What these heads add to the stream, [h, b, t, d_model], from their outputs z [b, t, h, d].

    In float32 or better. The output matrix's bias belongs to no head: no prompt changes it. Where a norm follows
    attention (Gemma 2 and 3), all heads are needed: it scales their sum by one number, and so each head's part by the
    same; there the bias is shared out among the heads.
    """
    attn, post = model.blocks[layer].attn, model.blocks[layer].post1
    weight = upcast(attn.o.weight).unflatten(1, (-1, z.shape[3]))[:, heads]
    parts = torch.einsum("bthe,dhe->hbtd", upcast(z), weight)
    if post is None:
        return parts
    if attn.o.bias is not None:  # it goes through the norm as well: each head gets a share of it
        parts = parts + upcast(attn.o.bias) / len(parts)
    scale = (post.eps + parts.sum(0).square().mean(-1, keepdim=True)).rsqrt()
    return parts * scale * (post.offset + upcast(post.weight))


def written(model: Transformer, acts: dict[Key, Tensor]) -> Iterator[Tensor]:
    """What the writers add to the stream in a recorded run, group by group in their order: each [n, b, t, d_model].

    Needs resid_pre, head and mlp_out.
    """
    yield upcast(acts["resid_pre", 0]).movedim(2, 0)
    for layer in range(model.config.n_layers):
        yield written_by_heads(model, layer, acts["head", layer])
        yield upcast(acts["mlp_out", layer]).movedim(2, 0)


def changes(model: Transformer, original: dict[Key, Tensor], patch: dict[Key, Tensor]) -> Tensor:
    """u(x_patch) - u(x_original) of every writer u, [w, b, t, d_model], from the two recorded runs."""
    of_groups = zip(written(model, original), written(model, patch))
    return torch.cat([difference(before, after) for before, after in of_groups])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def by_head(model: Transformer, layer: int, kind: str) -> tuple[Tensor, Tensor]:
    """Weight [h, d, d_model] and bias [h, d] of the projection to q, k or v of an ungrouped model."""
    linear, shape = getattr(model.blocks[layer].attn, kind), (model.config.n_heads, model.config.d_head)
    bias = linear.weight.new_zeros(shape) if linear.bias is None else linear.bias.unflatten(0, shape)
    return linear.weight.unflatten(0, shape), bias


def finished(kind: str, y: Tensor, first: int, attn: Attention, p: Pass = PLAIN) -> Tensor:
    """q, k or v [n, t, h, d] from what the projection returns, at positions from `first` on."""
    if kind == "v":
        return y
    norm = getattr(attn, f"{kind}_norm", None)  # Qwen3's and Gemma 3's: of each head by itself
    return rotate(y if norm is None else norm(y, p), first, attn.rotary)


def read_heads(model: Transformer, layer: int, kind: str, streams: Tensor, heads: Tensor) -> Tensor:
    """q, k or v [b, t, h, d] of these heads, each of which reads a stream of its own: [h, b, t, d_model]."""
    block, (weight, bias) = model.blocks[layer], by_head(model, layer, kind)
    y = torch.einsum("hbtm,hdm->bthd", block.ln1(streams, PLAIN), weight[heads]) + bias[heads]
    return finished(kind, y, 0, block.attn)


def read_head(model: Transformer, layer: int, kind: str, streams: Tensor, heads: Tensor, first: int) -> Tensor:
    """q, k or v [n, t, d] of one head for each stream [n, t, d_model], at positions from `first` on; heads [n]."""
    block, (weight, bias) = model.blocks[layer], by_head(model, layer, kind)
    y = torch.einsum("ntm,ndm->ntd", block.ln1(streams, PLAIN), weight[heads]) + bias[heads].unsqueeze(1)
    return finished(kind, y.unsqueeze(2), first, block.attn).squeeze(2)


def mlp_out(model: Transformer, layer: int, stream: Tensor) -> Tensor:
    """[b, t, d_model]: mlp_out of the MLP that reads this stream."""
    block = model.blocks[layer]
    out = block.mlp(block.ln2(stream, PLAIN), PLAIN)
    return out if block.post2 is None else block.post2(out, PLAIN)
