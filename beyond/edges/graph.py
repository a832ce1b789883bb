"""The graph of a transformer: who writes into the residual stream, and who reads it.

    writers   input (the embedding), each head a0.h0, a0.h1, ..., each MLP m0, ...
    readers   each head's query, key and value a0.h0<q>, a0.h0<k>, a0.h0<v>, each MLP m0, ..., and logits

The stream that a reader sees, before its own norm, is the sum of what all writers before it have written (and of
biases, which no prompt changes). So an edge, such as a0.h1->a2.h0<k>, is one term of that sum. Names and order are
those of EAP-IG's Graph (github.com/hannamw/EAP-IG, src/eap/graph.py).

Shapes: b batch, t position, h head, w writer, r reader; d is d_model, or d_head after an h.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models import Config, Linear, Nodes, Rules, Transformer, rotate, upcast
from relp import difference

KINDS = ("q", "k", "v")  # what a head reads
PLAIN = Rules()


@dataclass(frozen=True)
class Graph:
    """Names and numbers of writers and readers. Both are in the order of the layers; a reader sees the first writers.

    parallel  attention and MLP of a layer read the same stream (GPT-NeoX), so that the MLP does not see the heads
    """

    n_layers: int
    n_heads: int
    parallel: bool

    @staticmethod
    def of(c: Config) -> "Graph":
        return Graph(c.n_layers, c.n_heads, c.block == "parallel")

    @property
    def writers(self) -> list[str]:
        layers = range(self.n_layers)
        return ["input", *(name for layer in layers for name in [*self.heads_of(layer), f"m{layer}"])]

    @property
    def readers(self) -> list[str]:
        of_layers = [
            [*(f"{head}<{kind}>" for kind in KINDS for head in self.heads_of(layer)), f"m{layer}"]
            for layer in range(self.n_layers)
        ]
        return [*(name for of_layer in of_layers for name in of_layer), "logits"]

    def heads_of(self, layer: int) -> list[str]:
        return [f"a{layer}.h{head}" for head in range(self.n_heads)]

    def written(self, layer: int) -> slice:
        """The numbers of the layer's writers: its heads, then its MLP."""
        start = 1 + layer * (self.n_heads + 1)
        return slice(start, start + self.n_heads + 1)

    def read(self, layer: int, kind: str) -> slice:
        """The numbers of the layer's readers of one kind: q, k, v (one for each head) or mlp; logits has no layer."""
        if kind == "logits":
            return slice(self.n_layers * (3 * self.n_heads + 1), None)
        start = layer * (3 * self.n_heads + 1) + (*KINDS, "mlp").index(kind) * self.n_heads
        return slice(start, start + (1 if kind == "mlp" else self.n_heads))

    def seen(self, layer: int, kind: str) -> int:
        """How many writers these readers see: the first ones, up to their own layer."""
        if kind == "logits":
            return self.written(self.n_layers - 1).stop
        sees_heads = kind == "mlp" and not self.parallel
        return self.written(layer).start + (self.n_heads if sees_heads else 0)

    @property
    def places(self) -> list[tuple[int, str]]:
        """(layer, kind) of all groups of readers that see the same stream, in order."""
        of_layers = [(layer, kind) for layer in range(self.n_layers) for kind in (*KINDS, "mlp")]
        return [*of_layers, (self.n_layers, "logits")]

    @property
    def edges(self) -> Tensor:
        """bool [writers, readers]: True where there is an edge."""
        there = torch.zeros(len(self.writers), len(self.readers), dtype=torch.bool)
        for layer, kind in self.places:
            there[: self.seen(layer, kind), self.read(layer, kind)] = True
        return there


def stream_of(graph: Graph, layer: int, kind: str) -> tuple[str, int]:
    """The node that holds the stream which these readers see."""
    if kind == "logits":
        return "resid_post", graph.n_layers - 1
    return ("resid_mid" if kind == "mlp" and not graph.parallel else "resid_pre"), layer


def ungrouped(model: Transformer) -> Transformer:
    """The same function with a key and a value head of its own for each query head, so that each is a reader.

    All other weights are the model's own, not copies.
    """
    if not hasattr(model, "blocks"):
        raise ValueError(f"edges need a models.Transformer, got {type(model).__name__}")
    c = model.config
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


def written_by_heads(model: Transformer, layer: int, z: Tensor) -> Tensor:
    """What each head adds to the stream, [h, b, t, d_model], from the heads' outputs z [b, t, h, d].

    In float32 or better. Their sum is attn_out. A bias is divided among the heads. Where a norm follows attention
    (Gemma 2), it scales the sum of the heads by one number, and so each head's part of it by the same.
    """
    block, parts = model.blocks[layer], through_output_matrix(model, layer, z)
    if block.attn.o.bias is not None:
        parts = parts + upcast(block.attn.o.bias) / len(parts)
    if not hasattr(block, "ln1_post"):
        return parts
    post = block.ln1_post
    scale = (post.eps + parts.sum(0).square().mean(-1, keepdim=True)).rsqrt()
    return parts * scale * (post.offset + upcast(post.weight))


def through_output_matrix(model: Transformer, layer: int, z: Tensor) -> Tensor:
    """[b, t, h, d] -> [h, b, t, d_model]: each head's output through its part of the output matrix."""
    weight = upcast(model.blocks[layer].attn.o.weight).unflatten(1, z.shape[2:])
    return torch.einsum("bthe,dhe->hbtd", upcast(z), weight)


def change_of_heads(model: Transformer, layer: int, original: Tensor, patch: Tensor) -> Tensor:
    """What each head adds to the stream in the patch run minus what it adds in the original run, from z of both."""
    if hasattr(model.blocks[layer], "ln1_post"):
        return written_by_heads(model, layer, patch) - written_by_heads(model, layer, original)
    return through_output_matrix(model, layer, difference(original, patch))  # the bias cancels


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def by_head(model: Transformer, layer: int, kind: str) -> tuple[Tensor, Tensor | None]:
    """Weight [h, d, d_model] and bias [h, d] of a layer's projection to q, k or v; it has one head for each query."""
    linear: Linear = getattr(model.blocks[layer].attn, kind)
    shape = model.config.n_heads, model.config.d_head
    return linear.weight.unflatten(0, shape), None if linear.bias is None else linear.bias.unflatten(0, shape)


def read_heads(model: Transformer, layer: int, kind: str, streams: Tensor) -> Tensor:
    """q, k or v [b, t, h, d] of heads that read a stream each, [h, b, t, d_model]."""
    weight, bias = by_head(model, layer, kind)
    y = torch.einsum("hbtd,hed->bthe", model.blocks[layer].ln1(streams, PLAIN), weight)
    y = y if bias is None else y + bias
    return y if kind == "v" else rotate(y, 0, model.config)


def read_mlp(model: Transformer, layer: int, stream: Tensor) -> Tensor:
    """mlp_out [b, t, d_model] of the MLP that reads this stream."""
    block = model.blocks[layer]
    out = block.mlp(block.ln2(stream, PLAIN), PLAIN, Nodes(None, layer))
    return block.ln2_post(out, PLAIN) if hasattr(block, "ln2_post") else out
