"""Transformers that can propagate relevance: GPT-2, GPT-NeoX (Pythia), Qwen2, Gemma 2 and Llama, in plain PyTorch.

    model = from_pretrained("gpt2")                # or from_transformers(a model of transformers that is in memory)
    logits = model(tokens)                         # the plain forward pass
    logits = model(tokens, lrp=True)               # the same numbers; backward now follows the paper's LRP rules
    logits = model(tokens, hook=hook)              # every named node passes through hook(name, layer, value)

Read it from the top: the rules (Table 1 of the RelP paper), the pieces, one block per data flow, the transformer. The
second half reads the configurations, names and weights of Hugging Face checkpoints; support/ has more.

Shapes: b batch, t position, h head; d is d_model, or d_head after an h, as in [b, t, h, d]. tokens are ids, int64.
Numbers in brackets, such as [58], are the paper's references.
"""

import importlib
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Table 1: propagation rules. A rule changes no number of the forward pass. It tells autograd to treat a part of it as a
# constant, [.]_const. in the table. Run backward from the metric, autograd then returns LRP's propagation coefficient
# rho instead of the gradient.


def const(x: Tensor, on: bool) -> Tensor:
    """[x]_const. of Table 1."""
    return x.detach() if on else x


def backward_as(value: Tensor, passed: Tensor) -> Tensor:
    """Returns `value`, but its gradient is the gradient of `passed`."""
    return value.detach() + (passed - passed.detach()).to(value.dtype)


@dataclass(frozen=True)
class Rules:
    """Which rules of Table 1 are on in a forward pass. Rules() switches all off: the plain gradient.

    Each row of the table is a method, which the blocks below call. It returns the same value with and without its rule;
    only the gradient differs. A rule of your own is a subclass that overrides a method.
    """

    ln: bool = False
    identity: bool = False
    half: bool = False
    ah: bool = False
    epsilon: float | None = None
    gamma: float | None = None

    def norm(self, x: Tensor, eps: float) -> Tensor:
        """LN-rule for LayerNorm (whose x is centred before) and RMSNorm: x / [sqrt(eps + mean x^2)]_const.

        A norm does not see the size of x: without the rule, x . gradient is almost 0, and almost no relevance passes.
        """
        return x / const((eps + x.square().mean(-1, keepdim=True)).sqrt(), self.ln)

    def activation(self, x: Tensor, phi: Callable) -> Tensor:
        """Identity-rule for GELU and SiLU, which are both x * phi(x): x * [phi(x)]_const."""
        return x * const(phi(x), self.identity)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Linear layers add up contributions: y_j = sum_i z_ij + b_j with z_ij = x_i w_ji. x_i gets a share of R_j:

        0-rule        z_ij / y_j
        epsilon-rule  z_ij / (y_j + epsilon sign(y_j)), so that outputs near 0 pass less on
        gamma-rule    (z_ij + gamma z_ij^+) / y_gamma_j, for positive y_j: see y_gamma()

        Autograd carries rho_j = R_j / y_j. So the 0-rule is the plain gradient, and a rule with another denominator is
        the gradient of its numerators times [y_j / denominator]_const.
        """
        y = F.linear(x, weight, bias)
        if self.epsilon is not None:
            size = upcast(y).abs()
            return backward_as(y, y * (size / (size + self.epsilon)).detach())
        if self.gamma is not None:
            boosted = y_gamma(x, weight, bias, y, self.gamma)
            return backward_as(y, boosted * (y / torch.where(boosted == 0, 1, boosted)).detach())
        return y

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attend: "Attend") -> Tensor:
        """AH-rule for attention heads: sum_i [A_ij]_const v_i. A depends on q and k only, so q and k are made
        constant, and A with them.
        """
        return attend(const(q, self.ah), const(k, self.ah), v)

    def gate(self, a: Tensor, b: Tensor) -> Tensor:
        """Half-rule for multiplicative gates: 0.5 a*b + [0.5 a*b]_const. Else each factor gets all of a*b's share."""
        y = a * b
        return backward_as(y, 0.5 * y) if self.half else y

    def __post_init__(self):
        for name in ("ln", "identity", "half", "ah"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"rule {name} is True or False, got {getattr(self, name)!r}")
        for name in ("epsilon", "gamma"):
            if getattr(self, name) is not None:
                check_parameter(name, getattr(self, name))
        if self.epsilon is not None and self.gamma is not None:
            raise ValueError("epsilon and gamma are both rules for linear layers: choose one")


# Table 4: the rules of the paper's experiments (the 0-rule on linear layers, no AH-rule). Llama, which the paper leaves
# out, is built from the same parts as Qwen2. What has no rule in Table 1 keeps its plain gradient: the softmax if the
# AH-rule is off, and Gemma 2's two softcaps. Gemma 2's post-norms are RMSNorms and get the LN-rule. The rotation of
# queries and keys is linear in them and needs no rule.
TABLE_4 = {
    "gpt2": Rules(ln=True, identity=True),
    "gpt_neox": Rules(ln=True, identity=True),
    "qwen2": Rules(ln=True, identity=True, half=True),
    "gemma2": Rules(ln=True, identity=True, half=True),
    "llama": Rules(ln=True, identity=True, half=True),
}


def y_gamma(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, gamma: float) -> Tensor:
    """The gamma-rule's denominator: y_j, but each contribution with the same sign as y_j counts 1 + gamma times.

    Its gradient has the rule's numerators. The bias is one of the contributions. For inputs and outputs >= 0 it is
    LRP-gamma of [52]; [58] extends it to any sign; this is that form. Its size is at least that of y_j. An input of
    exactly 0 contributes nothing and gets rho 0, although a patch may change it.
    """
    x, weight = upcast(x), upcast(weight)  # half precision could overflow here
    bias = torch.zeros(len(weight)).to(weight) if bias is None else upcast(bias)
    # z = x w is positive if both are, or neither is
    x_positive, x_negative = x * (x > 0), x * (x < 0)
    w_positive_more = weight + gamma * weight.clamp(min=0)
    w_negative_more = weight + gamma * weight.clamp(max=0)
    b_positive_more, b_negative_more = bias + gamma * bias.clamp(min=0), bias + gamma * bias.clamp(max=0)
    positive_more = F.linear(x_positive, w_positive_more, b_positive_more) + F.linear(x_negative, w_negative_more)
    negative_more = F.linear(x_positive, w_negative_more, b_negative_more) + F.linear(x_negative, w_positive_more)
    return torch.where(y > 0, positive_more, negative_more)


# ---------------------------------------------------------------------------------------------------------------------
# The pieces. `c` is the model's Config (below), `rules` are those in force, and `node` makes a named activation visible
# from outside.

LRP = bool | Rules  # False: no rule; True: the family's in Table 4
Hook = Callable[[str, int, Tensor], Tensor]  # hook(name, layer, activation) -> activation


class Nodes:
    """The named nodes of one layer: x = node("q", x) shows x to the hook and goes on with what the hook returns."""

    def __init__(self, hook: Hook | None, layer: int):
        self.hook, self.layer = hook, layer

    def wanted(self, name: str) -> bool:
        """Does the hook want to see this node? If it has an attribute `nodes`, it wants those; otherwise all."""
        return self.hook is not None and (not hasattr(self.hook, "nodes") or name in self.hook.nodes)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return self.hook(name, self.layer, x) if self.wanted(name) else x


def upcast(x: Tensor) -> Tensor:
    """float32 or better: norms, softmax, activations and softcaps are computed in it whatever the model's dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gelu_tanh_phi(x: Tensor) -> Tensor:
    """(1 + tanh u) / 2 = sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    c = 2 * math.sqrt(2 / math.pi)
    return torch.sigmoid(x * (c + c * 0.044715 * x.square()))


PHI = {  # the activation functions: act(x) = x * phi(x)
    "gelu": torch.special.ndtr,  # Phi, the normal distribution function
    "gelu_new": gelu_tanh_phi,
    "gelu_fast": gelu_tanh_phi,
    "gelu_pytorch_tanh": gelu_tanh_phi,
    "silu": torch.sigmoid,
    "swish": torch.sigmoid,
}


def drawn(std: float, *shape: int) -> nn.Parameter:
    """Normal numbers to start from. On the meta device nothing is drawn: torch would load its compiler for that."""
    x = torch.empty(shape)
    return nn.Parameter(x if x.is_meta else x.normal_(std=std))


class Linear(nn.Module):
    def __init__(self, d_in: int, d_out: int, bias: bool):
        super().__init__()
        self.weight = drawn(0.02, d_out, d_in)
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor, rules: Rules) -> Tensor:
        return rules.linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, c: "Config"):
        super().__init__()
        self.eps = c.eps
        self.weight = nn.Parameter(torch.ones(c.d_model))
        self.bias = nn.Parameter(torch.zeros(c.d_model))

    def forward(self, x: Tensor, rules: Rules) -> Tensor:
        h = upcast(x)
        h = h - h.mean(-1, keepdim=True)
        return (rules.norm(h, self.eps) * self.weight + self.bias).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, c: "Config", size: int | None = None):
        super().__init__()
        self.eps, self.offset = c.eps, c.norm_offset
        self.weight = nn.Parameter(torch.full([size or c.d_model], 1 - self.offset))

    def forward(self, x: Tensor, rules: Rules) -> Tensor:
        # Gemma stores w and scales by 1 + w: added here, since 1 + w would lose digits of w in low precision
        return (rules.norm(upcast(x), self.eps) * (self.offset + upcast(self.weight))).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: "Config", layer: int):
        super().__init__()
        self.c, self.window, self.rotary = c, c.windows[layer], c.rotary[layer] if c.rotary else None
        self.q = Linear(c.d_model, c.n_heads * c.d_head, c.qkv_bias)
        self.k = Linear(c.d_model, c.n_kv_heads * c.d_head, c.qkv_bias)
        self.v = Linear(c.d_model, c.n_kv_heads * c.d_head, c.qkv_bias)
        self.o = Linear(c.n_heads * c.d_head, c.d_model, c.out_bias)

    def forward(self, x: Tensor, rules: Rules, node: Nodes, start: int = 0, last: bool = False) -> Tensor:
        """start and last serve to resume a run in the middle (see Transformer.block); usually x holds all positions.

        With start > 0, k and v come back from the hook with the earlier positions in front. With last, only the last
        position is a query.
        """
        queries = x[:, -1:] if last else x
        first = start + x.shape[1] - queries.shape[1]  # position of the first query
        q = node("q", rotate(self.split_heads(self.project("q", queries, rules)), first, self.rotary))
        k = node("k", rotate(self.split_heads(self.project("k", x, rules)), start, self.rotary))
        v = node("v", self.split_heads(self.project("v", x, rules)))
        mask = causal_mask(first, q.shape[1], k.shape[1], self.window, x.device)  # k has all positions by now
        z = node("z", rules.attention(q, self.repeat_kv(k), self.repeat_kv(v), Attend(self.c, mask, node)))
        return self.o(z.flatten(-2), rules)

    def project(self, name: str, x: Tensor, rules: Rules) -> Tensor:
        """q, k or v [b, t, h * d_head] of what attention reads, x [b, t, d_model]."""
        return getattr(self, name)(x, rules)

    def split_heads(self, x: Tensor) -> Tensor:
        """[b, t, h * d_head] -> [b, t, h, d_head]"""
        return x.unflatten(-1, (-1, self.c.d_head))

    def repeat_kv(self, x: Tensor) -> Tensor:
        """[b, t, n_kv_heads, d_head] -> [b, t, n_heads, d_head]: several query heads may share a key and value head."""
        n = self.c.n_heads // self.c.n_kv_heads
        return x if n == 1 else x.repeat_interleave(n, dim=2)


@dataclass
class Attend:
    """The attention function of one layer in one pass: attend(q, k, v) is z, z_j = sum_i A_ij v_i.

    The pattern A = softmax(scores(q, k)) is [b, query, h, key]; q, k, v and z are [b, t, h, d]. Attention makes this
    object and Rules.attention calls it.
    """

    c: "Config"
    mask: Tensor  # [query, 1, key]: True where a query must not see a key
    node: Nodes

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.by_hand(q, k, v) if self.needs_pattern else self.fused(q, k, v)

    @property
    def needs_pattern(self) -> bool:
        """Must the pattern be formed? If a hook wants it, or scores are capped, which the fused kernel cannot do."""
        return self.node.wanted("pattern") or self.c.attn_softcap is not None

    def fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z in one kernel of PyTorch's, which is fast and never forms the pattern."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, h, t, d]
        mask = ~self.mask.squeeze(1)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=self.c.attn_scale).transpose(1, 2)

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor, softmax=None, mix=None) -> Tensor:
        """z step by step, where the pattern is needed, and for rules with a softmax or a mix of their own."""
        pattern = self.node("pattern", (softmax or self.softmax)(self.scores(q, k)).to(v.dtype))
        z = (mix or self.mix)(pattern, v)
        return z if self.needs_pattern else backward_as(self.fused(q, k, v), z)  # the rules change no number

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return softcap(upcast(torch.einsum("bqhd,bkhd->bqhk", q, k)) * self.c.attn_scale, self.c.attn_softcap)

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.mask, -torch.inf).softmax(-1)

    def mix(self, pattern: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bqhk,bkhd->bqhd", pattern, v)


def causal_mask(first: int, n_queries: int, n_keys: int, window: int | None, device) -> Tensor:
    """[query, 1, key]: True where a query must not see a key. Queries start at position `first`, keys at 0."""
    query = first + torch.arange(n_queries, device=device)[:, None, None]
    key = torch.arange(n_keys, device=device)
    return (key > query) if window is None else (key > query) | (key <= query - window)


class Rotary(NamedTuple):  # of one layer
    freqs: tuple[float, ...]  # radians per position, one for each rotated pair of dimensions
    scale: float = 1.0  # of what is rotated


def rotate(x: Tensor, first: int, rotary: Rotary | None) -> Tensor:
    """x [b, t, h, d_head], its first 2 * len(freqs) dimensions rotated, at positions from `first`."""
    if rotary is None:
        return x
    half, dtype = len(rotary.freqs), torch.promote_types(x.dtype, torch.float32)
    position = torch.arange(first, first + x.shape[1], device=x.device, dtype=dtype)
    angle = torch.outer(position, torch.tensor(rotary.freqs, device=x.device, dtype=dtype))[:, None]  # [t, 1, half]
    cos, sin = (angle.cos() * rotary.scale).to(x.dtype), (angle.sin() * rotary.scale).to(x.dtype)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


class MLP(nn.Module):
    def __init__(self, c: "Config"):
        super().__init__()
        self.phi = PHI[c.act]
        self.gate = Linear(c.d_model, c.d_mlp, c.mlp_bias) if c.gated else None
        self.up = Linear(c.d_model, c.d_mlp, c.mlp_bias)
        self.down = Linear(c.d_mlp, c.d_model, c.mlp_bias)

    def forward(self, x: Tensor, rules: Rules, node: Nodes) -> Tensor:
        if self.gate is None:
            hidden = self.activate(self.up(x, rules), rules)
        else:
            hidden = rules.gate(self.activate(self.gate(x, rules), rules), self.up(x, rules))
        return self.down(node("mlp_hidden", hidden), rules)

    def activate(self, x: Tensor, rules: Rules) -> Tensor:
        return rules.activation(upcast(x), self.phi).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The blocks: one per data flow. Their nodes, in the order in which a hook sees them, each [batch, pos, ...]:
#
#     resid_pre                       the residual stream before the block                    [b, t, d_model]
#     q, k, v                         queries and keys (rotated) and values     [b, t, n_heads or n_kv_heads, d_head]
#     pattern                         attention weights                                       [b, query, n_heads, key]
#     z                               the heads' outputs                                      [b, t, n_heads, d_head]
#     attn_out                        what attention adds to the stream (after the post-norm)         [b, t, d_model]
#     resid_mid                       the stream between attention and MLP                    [b, t, d_model]
#     mlp_hidden                      the MLP's neurons, after activation and gate; not in mixtures    [b, t, d_mlp]
#     mlp_out                         what the MLP adds to the stream (after the post-norm)   [b, t, d_model]
#     resid_post                      the stream after the block                              [b, t, d_model]
#
# x[:, -attn_out.shape[1] :] is the stream at the positions that attention returned: all, or with `last` the last one.


class SequentialBlock(nn.Module):
    """GPT-2, Qwen2, Llama, and NeoX without use_parallel_residual: attention, then MLP, each on the normed stream."""

    nodes = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_hidden", "mlp_out", "resid_post")
    attention = Attention

    def __init__(self, c: "Config", layer: int):
        super().__init__()
        norm = LayerNorm if c.layer_norm else RMSNorm
        self.ln1, self.attn, self.ln2, self.mlp = norm(c), self.attention(c, layer), norm(c), MLP(c)

    def forward(self, x: Tensor, rules: Rules, node: Nodes, start: int = 0, last: bool = False) -> Tensor:
        x = node("resid_pre", x)
        attn_out = node("attn_out", self.attn(self.ln1(x, rules), rules, node, start, last))
        x = node("resid_mid", x[:, -attn_out.shape[1] :] + attn_out)
        mlp_out = node("mlp_out", self.mlp(self.ln2(x, rules), rules, node))
        return node("resid_post", x + mlp_out)


class ParallelBlock(SequentialBlock):
    """GPT-NeoX (Pythia): attention and MLP read the same stream; there is no resid_mid."""

    nodes = tuple(n for n in SequentialBlock.nodes if n != "resid_mid")

    def forward(self, x: Tensor, rules: Rules, node: Nodes, start: int = 0, last: bool = False) -> Tensor:
        x = node("resid_pre", x)
        attn_out = node("attn_out", self.attn(self.ln1(x, rules), rules, node, start, last))
        x = x[:, -attn_out.shape[1] :]
        mlp_out = node("mlp_out", self.mlp(self.ln2(x, rules), rules, node))
        return node("resid_post", x + attn_out + mlp_out)


class SandwichBlock(SequentialBlock):
    """Gemma 2 and 3: a norm before and one after attention and MLP; attn_out and mlp_out are taken after the second."""

    def __init__(self, c: "Config", layer: int):
        super().__init__(c, layer)
        self.ln1_post, self.ln2_post = RMSNorm(c), RMSNorm(c)

    def forward(self, x: Tensor, rules: Rules, node: Nodes, start: int = 0, last: bool = False) -> Tensor:
        x = node("resid_pre", x)
        attn = self.attn(self.ln1(x, rules), rules, node, start, last)
        attn_out = node("attn_out", self.ln1_post(attn, rules))
        x = node("resid_mid", x[:, -attn_out.shape[1] :] + attn_out)
        mlp = self.mlp(self.ln2(x, rules), rules, node)
        mlp_out = node("mlp_out", self.ln2_post(mlp, rules))
        return node("resid_post", x + mlp_out)


BLOCKS = {"sequential": SequentialBlock, "parallel": ParallelBlock, "sandwich": SandwichBlock}


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class Transformer(nn.Module):
    """tokens [batch, pos] -> logits [batch, pos, vocab].

    lrp   False: the plain gradient. True: the family's rules (TABLE_4). Rules(...): exactly these. The
          logits are bit-identical in every case; only what backward returns differs.
    hook  hook(name, layer, x) -> x is called with every node (see the list above) and returns what the pass goes on
          with: x itself to observe, another tensor to intervene. It lives for this call only. A hook that needs some
          nodes only names them in its attribute `nodes`. If "pattern" is wanted, attention is computed step by step
          instead of in one fused kernel; results then differ by rounding.
    """

    def __init__(self, config: "Config"):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(drawn(1.0, c.n_vocab, c.d_model), freeze=False)
        positions = None if c.rotary else drawn(1.0, c.n_ctx, c.d_model)
        self.embed_positions = None if c.rotary else nn.Embedding.from_pretrained(positions, freeze=False)
        self.blocks = nn.ModuleList(BLOCKS[c.block](c, layer) for layer in range(c.n_layers))
        self.ln_f = LayerNorm(c) if c.layer_norm else RMSNorm(c)
        self.unembed_tokens = None if c.tied else Linear(c.d_model, c.n_vocab, bias=False)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the nodes, in the order in which a hook sees them."""
        return self.blocks[0].nodes

    def forward(self, tokens: Tensor, lrp: LRP = False, hook: Hook | None = None) -> Tensor:
        return self.unembed(self.stream(tokens, lrp, hook), lrp)

    def stream(self, tokens: Tensor, lrp: LRP = False, hook: Hook | None = None) -> Tensor:
        """The residual stream after the last block: [batch, pos, d_model]."""
        x = self.embed(tokens)
        for layer in range(self.config.n_layers):
            x = self.block(layer, x, lrp, hook)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be [batch, pos] with at least one position, got {list(tokens.shape)}")
        self.check_ids(tokens)
        if tokens.shape[1] > c.n_ctx:
            raise ValueError(f"prompts of {tokens.shape[1]} tokens exceed this model's context of {c.n_ctx}")
        x = self.embed_tokens(tokens)
        if c.embed_scale != 1:
            x = x * torch.tensor(c.embed_scale, dtype=x.dtype)  # rounded to the model's dtype, as Gemma was trained
        return x if self.embed_positions is None else x + self.embed_positions.weight[: tokens.shape[1]]

    def check_ids(self, ids: Tensor) -> None:
        n = self.config.n_vocab
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n:
            raise ValueError(f"token ids must lie in 0..{n - 1}, got {int(ids.min())}..{int(ids.max())}")

    def block(
        self, layer: int, x: Tensor, lrp: LRP = False, hook: Hook | None = None, start: int = 0, last: bool = False
    ) -> Tensor:
        """One block on the stream x [batch, pos, d_model]; with it a run can be resumed in the middle.

        start  x holds the positions from `start` on. At "k" and "v" the hook gets the keys and values of these, and
               must return them with those of the positions 0 to start - 1 in front.
        last   return the last position only, [batch, 1, d_model]. Keys and values of all positions are still computed.
        """
        return self.blocks[layer](x, self.rules(lrp), Nodes(hook, layer), start, last)

    def unembed(self, x: Tensor, lrp: LRP = False, columns: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] of the stream x [..., d_model]; if `columns` are given, of these token ids only."""
        rules = self.rules(lrp)
        weight = self.embed_tokens.weight if self.config.tied else self.unembed_tokens.weight
        if columns is not None:
            self.check_ids(columns)
            weight = weight[columns]
        return softcap(upcast(rules.linear(self.ln_f(x, rules), weight, None)), self.config.logit_softcap)

    def rules(self, lrp: LRP) -> Rules:
        """The rules that `lrp` stands for."""
        if isinstance(lrp, Rules):
            return lrp
        if not isinstance(lrp, bool):
            raise ValueError(f"lrp must be True (the paper's rules), False (none) or Rules(...), got {lrp!r}")
        return TABLE_4[self.config.family] if lrp else Rules()


# ---------------------------------------------------------------------------------------------------------------------
# The method ends here; the rest reads Hugging Face checkpoints. First configurations: one function per family from the
# fields of config.json, with the defaults of transformers.


@dataclass(frozen=True)
class Config:
    """What a Transformer is built from, the same fields for every family."""

    family: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    n_vocab: int
    n_ctx: int
    eps: float
    act: str
    block: str  # a key of BLOCKS
    tied: bool
    attn_scale: float
    windows: tuple[int | None, ...]  # per layer: how many positions attention looks back, itself included
    rotary: tuple[Rotary, ...] = ()  # per layer; without any, positions are embedded
    layer_norm: bool = False  # else RMSNorm
    norm_offset: float = 0.0
    gated: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    mixture: tuple | None = None  # of experts: see support/experts.py

    def check(self) -> None:
        """ValueError if config.json gives a value that is impossible."""
        of = f"config.json of a {self.family} model gives"
        hints = get_type_hints(Config)
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if hints[name] is int and not is_size(value):
                raise ValueError(f"{of} {name} = {quote(value)}: a positive whole number is needed")
            if hints[name] is bool and not isinstance(value, bool):
                raise ValueError(f"{of} {name} = {quote(value)}: true or false is needed")
            optional = name in ("attn_softcap", "logit_softcap") and value is None
            if name in ("eps", "attn_scale", "attn_softcap", "logit_softcap") and not optional:
                if not is_positive(value) or value > 1e9:
                    raise ValueError(f"{of} {name} = {quote(value)}: a positive number is needed, up to 1e9")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{of} {self.n_heads} heads for {self.n_kv_heads} key-value heads: not a multiple")
        if len(self.windows) != self.n_layers or not all(w is None or is_size(w) for w in self.windows):
            raise ValueError(f"{of} the attention windows {quote(list(self.windows))} for {self.n_layers} layers")
        for rotary in self.rotary:
            finite = all(isinstance(x, float) and math.isfinite(x) for x in (*rotary.freqs, rotary.scale))
            if not finite or not 0 < 2 * len(rotary.freqs) <= self.d_head:
                raise ValueError(f"{of} rotary frequencies that cannot be for heads of {self.d_head} dimensions")
        if not isinstance(self.act, str) or self.act not in PHI:
            raise ValueError(f"activation {self.act!r} is not supported: this project knows {', '.join(PHI)}")

    @staticmethod
    def from_hf(hf: dict) -> "Config":
        """From a config.json, as transformers 4 or 5 writes it. ValueError if it is not one of ours."""
        if isinstance(hf.get("text_config"), dict):  # of a model that also sees: its text part
            hf = hf["text_config"]
        family = hf.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(f"model_type {quote(family)} is not supported: this project knows {', '.join(FAMILIES)}")
        for field, most in MOST.items():
            if isinstance(hf.get(field), (int, float)) and hf[field] > most:
                raise ValueError(f"config.json of a {family} model gives {field} = {quote(hf[field])}: above {most}")
        try:
            config = Config(family=family, **FAMILIES[family][0](hf))
        except KeyError as error:
            raise ValueError(f"config.json of a {family} model lacks the field {error}") from None
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"config.json of a {family} model has a field of the wrong type: {error}") from None
        config.check()
        return config


# No model comes near these. Larger sizes would cost time and memory before they can be checked against the weights.
MOST = {"n_layer": 10**4, "num_hidden_layers": 10**4, "n_embd": 10**6, "hidden_size": 10**6, "head_dim": 10**6}


def is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def is_size(value: object) -> bool:
    return isinstance(value, int) and is_positive(value) and value < 2**63


def check_parameter(rule: str, value: object) -> None:
    """ValueError if a rule's number makes no sense."""
    if not is_positive(value):
        raise ValueError(f"rule {rule} must be a positive number, got {quote(value)}")
    if not 1e-12 <= value <= 1e12:  # beyond, it would overflow, or do nothing
        raise ValueError(f"rule {rule} must be between 1e-12 and 1e12, got {quote(value)}")


def quote(value: object, most: int = 80) -> str:
    """What was given, for an error's one line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def gpt2_config(hf: dict) -> dict:
    supported = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for field, wanted in supported.items():
        if hf.get(field, wanted) != wanted:
            raise ValueError(f"gpt2 with {field}={hf[field]} is not supported")
    d, heads, layers = hf["n_embd"], hf["n_head"], hf["n_layer"]
    return dict(
        n_layers=layers, d_model=d, n_heads=heads, n_kv_heads=heads, d_head=d // heads,
        d_mlp=hf.get("n_inner") or 4 * d, n_vocab=hf["vocab_size"], n_ctx=hf["n_positions"],
        eps=hf.get("layer_norm_epsilon", 1e-5), act=hf.get("activation_function", "gelu_new"),
        block="sequential", layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True,
        tied=hf.get("tie_word_embeddings", True), attn_scale=(d // heads) ** -0.5, windows=(None,) * layers,
    )  # fmt: skip


def llama_config(hf: dict, types: list[str] | None = None) -> dict:
    d, heads, layers = hf["hidden_size"], hf["num_attention_heads"], hf["num_hidden_layers"]
    d_head, bias = hf.get("head_dim") or d // heads, hf.get("attention_bias", False)
    types = types or ["full_attention"] * layers
    rotary = {one: rotary_of(hf, d_head, one) for one in set(types)}
    return dict(
        n_layers=layers, d_model=d, n_heads=heads, n_kv_heads=hf.get("num_key_value_heads") or heads, d_head=d_head,
        d_mlp=hf["intermediate_size"], n_vocab=hf["vocab_size"], n_ctx=hf.get("max_position_embeddings", 2048),
        eps=hf.get("rms_norm_eps", 1e-6), act=hf.get("hidden_act", "silu"), block="sequential", gated=True,
        qkv_bias=bias, out_bias=bias, mlp_bias=hf.get("mlp_bias", False),
        tied=hf.get("tie_word_embeddings", False), attn_scale=d_head**-0.5,
        windows=tuple(hf.get("sliding_window") if one == "sliding_attention" else None for one in types),
        rotary=tuple(rotary[one] for one in types),
    )  # fmt: skip


def gpt_neox_config(hf: dict) -> dict:
    rope = {"rope_theta": hf.get("rotary_emb_base", 10000.0), "partial_rotary_factor": hf.get("rotary_pct", 0.25)}
    own = {"attention_bias": True, "hidden_act": "gelu"}
    return {
        **llama_config({**rope, **own, **hf, "num_key_value_heads": None, "head_dim": None}),
        "block": "parallel" if hf.get("use_parallel_residual", True) else "sequential",
        "gated": False, "mlp_bias": True, "layer_norm": True, "eps": hf.get("layer_norm_eps", 1e-5),
    }  # fmt: skip


def qwen2_config(hf: dict) -> dict:
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
    types = layer_types(hf, lambda layer: layer < hf.get("max_window_layers", 28))
    return {
        **llama_config({**hf, "sliding_window": window}, types), "qkv_bias": True, "out_bias": False, "mlp_bias": False,
    }  # fmt: skip


def gemma2_config(hf: dict) -> dict:
    hf = {"head_dim": 256, "sliding_window": 4096, **hf}
    return {
        **llama_config(hf, layer_types(hf, lambda layer: layer % 2 == 1)),
        "block": "sandwich", "norm_offset": 1.0, "mlp_bias": False, "tied": hf.get("tie_word_embeddings", True),
        "act": hf.get("hidden_activation") or hf.get("hidden_act") or "gelu_pytorch_tanh",
        "attn_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5, "embed_scale": hf["hidden_size"] ** 0.5,
        "attn_softcap": hf.get("attn_logit_softcapping", 50.0),
        "logit_softcap": hf.get("final_logit_softcapping", 30.0),
    }  # fmt: skip


def layer_types(hf: dict, is_full: Callable[[int], bool]) -> list[str]:
    """Each layer's kind of attention: from config.json, or else full attention where is_full(layer)."""
    known, layers = ("full_attention", "sliding_attention"), range(hf["num_hidden_layers"])
    types = hf.get("layer_types") or [known[0] if is_full(layer) else known[1] for layer in layers]
    if unknown := [one for one in types if one not in known]:
        raise ValueError(f"layer_types has {quote(unknown[0])}: this project knows {' and '.join(known)}")
    return types


def rotary_of(hf: dict, d_head: int, layer_type: str) -> Rotary:
    """How layers of one type rotate. transformers 4 has rope_scaling, 5 rope_parameters, or those of each type."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    outside = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "original_max_position_embeddings")
    rope = {name: hf[name] for name in outside if name in hf} | (rope[layer_type] if "full_attention" in rope else rope)
    if not is_size(d_head) or d_head > MOST["head_dim"]:
        raise ValueError(f"config.json has heads of {quote(d_head)} dimensions")
    fraction = rope.get("partial_rotary_factor", 1.0)
    if not 0 < fraction <= 1:
        raise ValueError(f"config.json has heads of which {quote(fraction)} is rotated: a share up to 1 is needed")
    dim = int(d_head * fraction)
    freqs = [(rope.get("rope_theta") or 10000.0) ** (-i / dim) for i in range(0, dim, 2)]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPES:
        raise ValueError(f"rope_type {quote(kind)} is not supported: this project knows {', '.join(ROPES)}")
    return ROPES[kind](freqs, rope)


def llama3(freqs: list[float], rope: dict) -> Rotary:
    """Low frequencies are slowed by `factor`, high ones kept, those between blended."""
    low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    keep = [min(max((context * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0) for f in freqs]
    return Rotary(tuple(k * f + (1 - k) * f / rope["factor"] for f, k in zip(freqs, keep)))


ROPES = {  # rope_type: its function of the frequencies and the parameters
    "default": lambda freqs, rope: Rotary(tuple(freqs)),
    "linear": lambda freqs, rope: Rotary(tuple(f / rope["factor"] for f in freqs)),
    "llama3": llama3,
}


# ---------------------------------------------------------------------------------------------------------------------
# Names: one literal table per family, {their module: our module, or several and a fix-up}; "{}" is the layer. Each line
# stands for the weight and, if our module has one, the bias.


@dataclass(frozen=True)
class FixUp:
    """How a checkpoint stores a tensor: load(theirs, n, config) gives our n tensors, save(ours, config) theirs."""

    load: Callable
    save: Callable
    flipped: bool = False  # their matrices are [d_in, d_out]


def load_interleaved(x: Tensor, n: int, c: Config) -> tuple[Tensor, ...]:
    """[head * (q, k, v) * d_head, ...] -> three of [head * d_head, ...]"""
    return x.unflatten(0, (c.n_heads, n, c.d_head)).transpose(0, 1).flatten(1, 2).unbind(0)


def save_interleaved(xs: list[Tensor], c: Config) -> Tensor:
    return torch.stack([x.unflatten(0, (c.n_heads, c.d_head)) for x in xs], 1).flatten(0, 2)


AS_IT_IS = FixUp(lambda x, n, c: x.chunk(n), lambda xs, c: torch.cat(xs))
# GPT-2's Conv1D keeps its weights as [d_in, d_out]; its q, k, v stand one after the other
CONV1D = FixUp(lambda x, n, c: x.t().chunk(n), lambda xs, c: torch.cat(xs).t(), flipped=True)
INTERLEAVED = FixUp(load_interleaved, save_interleaved)  # GPT-NeoX: q, k and v of each head stand together
QKV = ("blocks.{}.attn.q", "blocks.{}.attn.k", "blocks.{}.attn.v")

GPT2_NAMES = {
    "transformer.wte": "embed_tokens",
    "transformer.wpe": "embed_positions",
    "transformer.h.{}.ln_1": "blocks.{}.ln1",
    "transformer.h.{}.attn.c_attn": (*QKV, CONV1D),
    "transformer.h.{}.attn.c_proj": ("blocks.{}.attn.o", CONV1D),
    "transformer.h.{}.ln_2": "blocks.{}.ln2",
    "transformer.h.{}.mlp.c_fc": ("blocks.{}.mlp.up", CONV1D),
    "transformer.h.{}.mlp.c_proj": ("blocks.{}.mlp.down", CONV1D),
    "transformer.ln_f": "ln_f",
    "lm_head": "unembed_tokens",
}
GPT_NEOX_NAMES = {
    "gpt_neox.embed_in": "embed_tokens",
    "gpt_neox.layers.{}.input_layernorm": "blocks.{}.ln1",
    "gpt_neox.layers.{}.attention.query_key_value": (*QKV, INTERLEAVED),
    "gpt_neox.layers.{}.attention.dense": "blocks.{}.attn.o",
    "gpt_neox.layers.{}.post_attention_layernorm": "blocks.{}.ln2",
    "gpt_neox.layers.{}.mlp.dense_h_to_4h": "blocks.{}.mlp.up",
    "gpt_neox.layers.{}.mlp.dense_4h_to_h": "blocks.{}.mlp.down",
    "gpt_neox.final_layer_norm": "ln_f",
    "embed_out": "unembed_tokens",
}
LLAMA_NAMES = {
    "model.embed_tokens": "embed_tokens",
    "model.layers.{}.input_layernorm": "blocks.{}.ln1",
    "model.layers.{}.self_attn.q_proj": "blocks.{}.attn.q",
    "model.layers.{}.self_attn.k_proj": "blocks.{}.attn.k",
    "model.layers.{}.self_attn.v_proj": "blocks.{}.attn.v",
    "model.layers.{}.self_attn.o_proj": "blocks.{}.attn.o",
    "model.layers.{}.post_attention_layernorm": "blocks.{}.ln2",
    "model.layers.{}.mlp.gate_proj": "blocks.{}.mlp.gate",
    "model.layers.{}.mlp.up_proj": "blocks.{}.mlp.up",
    "model.layers.{}.mlp.down_proj": "blocks.{}.mlp.down",
    "model.norm": "ln_f",
    "lm_head": "unembed_tokens",
}
# Llama's except for the norms: Llama calls the norm before the MLP "post_attention"; here this is one after attention
GEMMA2_NAMES = {
    **LLAMA_NAMES,
    "model.layers.{}.post_attention_layernorm": "blocks.{}.ln1_post",
    "model.layers.{}.pre_feedforward_layernorm": "blocks.{}.ln2",
    "model.layers.{}.post_feedforward_layernorm": "blocks.{}.ln2_post",
}
FAMILIES = {  # model_type in config.json: (the fields of Config from the content of config.json, names)
    "gpt2": (gpt2_config, GPT2_NAMES),
    "gpt_neox": (gpt_neox_config, GPT_NEOX_NAMES),
    "qwen2": (qwen2_config, LLAMA_NAMES),
    "gemma2": (gemma2_config, GEMMA2_NAMES),
    "llama": (llama_config, LLAMA_NAMES),
}

# {family: what turns the state_dict of a module of transformers into that of files}
IN_MEMORY = {"gpt_neox": lambda x: {n.replace("lm_head", "embed_out"): tensor for n, tensor in x.items()}}
# masks and frequencies that old checkpoints keep as buffers, and what reads images
NOT_OURS = re.compile(r"\batt(n|ention)\.(masked_)?bias$|rotary_emb\.inv_freq$|vision_tower\.|multi_modal_projector\.")
UNEMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")  # a copy of the embedding, if the two are tied


def layout(model: Transformer) -> dict[str, tuple[list[str], FixUp]]:
    """{tensor name in a checkpoint: (our parameters, fix-up)} for this model."""
    ours = model.state_dict().keys()
    table = {}
    for theirs, entry in FAMILIES[model.config.family][1].items():
        *modules, fix = (entry, AS_IT_IS) if isinstance(entry, str) else entry
        for layer in range(model.config.n_layers if "{}" in theirs else 1):
            for kind in ("weight", "bias"):
                names = [f"{module.format(layer)}.{kind}" for module in modules]
                if names[0] in ours:
                    table[f"{theirs.format(layer)}.{kind}"] = (names, fix)
    return table


def to_checkpoint(model: Transformer) -> dict[str, Tensor]:
    """The weights under the names and in the layout of transformers, for safetensors' save_file."""
    ours = model.state_dict()
    return {
        theirs: fix.save([ours[n] for n in names], model.config).contiguous()
        for theirs, (names, fix) in layout(model).items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Weights: where a checkpoint's files are, and how they become a model.

SHORT_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "pythia-70m": "EleutherAI/pythia-70m",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    "pythia-410m": "EleutherAI/pythia-410m",
    "qwen2-0.5b": "Qwen/Qwen2-0.5B",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "gemma2-2b": "google/gemma-2-2b",
}
TOYS = Path(__file__).parent / "toy"  # the small models beside this file; a copy of it elsewhere has none
SHORT_NAMES |= {f"toy-{config.parent.name}": str(config.parent) for config in sorted(TOYS.glob("*/config.json"))}


def from_pretrained(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    shard: Callable[[Transformer], None] | None = None,
) -> Transformer:
    """A model from a short name (SHORT_NAMES), a Hub repository "owner/name", or a directory in Hugging Face layout.

    Its weights need no gradient and keep the checkpoint's values: nothing is folded or centred. ValueError, in one
    line, for an unknown name, no network, a gated or missing repository, a family that is not ours, a corrupt file,
    and tensors that are missing, unexpected, given twice or of the wrong shape.

    shard: called with the model while it has no weights yet, to share these out over several processes.
    """
    config = Config.from_hf(read_json(fetch(name, "config.json")))
    files = weight_files(name)
    shapes = {file: tensor_shapes(file) for file in files}
    check_sizes(config, shapes)
    with torch.device("meta"):
        model = Transformer(config)
    if shard:
        shard(model)
    load_weights(model, match(model, shapes), dtype, device)
    return model.requires_grad_(False).eval()


def from_transformers(hf_model: nn.Module) -> Transformer:
    """Our copy of a model of Hugging Face transformers that is in memory. No file is read.

    It has that model's weights, and the dtype and device of its first one. ValueError as from_pretrained: for a family
    that is not ours, and for weights that do not fit the configuration or are no ordinary floating-point numbers.
    """
    if not hasattr(hf_model, "config") or not isinstance(hf_model, nn.Module):
        raise ValueError(f"a model of transformers is needed, got {quote(hf_model)}: from_pretrained takes a name")
    tensors, source = hf_model.state_dict(), Path("in memory", "weights")
    with torch.device("meta"):
        model = Transformer(Config.from_hf(hf_model.config.to_dict()))
    tensors = IN_MEMORY.get(model.config.family, dict)(tensors)
    matched = match(model, {source: {name: list(tensor.shape) for name, tensor in tensors.items()}})
    if wrong := [name for name in matched[source] if not is_ordinary(tensors[name])]:
        raise ValueError(f"{wrong[0]} is no tensor of ordinary floating-point numbers, or is not in memory")
    if model.config.tied:
        head, embedding = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
        if head is not None and not torch.equal(head.weight, embedding.weight):
            raise ValueError("the configuration ties the unembedding to the embedding, but their weights differ")
    some = next(hf_model.parameters())
    load_weights(model, matched, some.dtype, some.device, lambda _, names: ((name, tensors[name]) for name in names))
    return model.requires_grad_(False).eval()


Shapes = dict[Path, dict[str, list[int]]]  # {file: {name of a tensor: its shape}}


def check_sizes(c: Config, shapes: Shapes) -> None:
    """ValueError if config.json asks for more than the checkpoint has, before anything of that size is built."""
    every = [math.prod(shape) for of_file in shapes.values() for shape in of_file.values()]
    sizes = {"d_model": c.d_model, "d_mlp": c.d_mlp, "vocabulary": c.n_vocab, "heads * d_head": c.n_heads * c.d_head}
    sizes |= {} if c.rotary else {"positions": c.n_ctx}
    for name, size in sizes.items():
        if size > sum(every):
            raise ValueError(f"config.json gives {name} = {size}, but the checkpoint has only {sum(every)} numbers")
    if c.n_layers > len(every):
        raise ValueError(f"config.json gives {c.n_layers} layers, but the checkpoint has only {len(every)} tensors")


def match(model: Transformer, shapes: Shapes) -> dict[Path, dict[str, tuple[list[str], FixUp]]]:
    """{file: {tensor name: (our parameters, fix-up)}}, strictly: every tensor that the model needs, in the right shape.

    ValueError if a tensor is missing, unexpected, given twice, or of another shape.
    """
    table, c, ours = layout(model), model.config, dict(model.named_parameters())
    prefix = next(iter(table)).split(".")[0] + "."  # published GPT-2 checkpoints leave it out
    found, unexpected, twice, result = set(), [], [], {}
    for file, of_file in shapes.items():
        result[file] = {}
        for theirs, shape in of_file.items():
            name = theirs.replace("language_model.", "")  # the text part of a model that also sees
            name = name if name in table else prefix + name
            if name not in table:
                if not NOT_OURS.search(theirs) and not (c.tied and UNEMBEDDING.search(theirs)):
                    unexpected.append(theirs)
                continue
            if name in found:
                twice.append(theirs)
            found.add(name)
            names, fix = result[file][theirs] = table[name]
            wanted = [sum(len(ours[n]) for n in names), *ours[names[0]].shape[1:]]  # ours, one after the other
            wanted = wanted[::-1] if fix.flipped else wanted
            if shape != wanted:
                raise ValueError(f"{file}: {theirs} has the shape {shape}, config.json asks for {wanted}")
    missing = [name for name in table if name not in found]
    for what, them in (("lacks", missing), ("has unexpected", unexpected), ("gives twice", twice)):
        if them:
            some = ", ".join(them[:4]) + ", ..." * (len(them) > 4)
            raise ValueError(f"the checkpoint {next(iter(shapes)).parent} {what} {len(them)} tensors: {some}")
    return result


def load_weights(model: Transformer, matched: dict, dtype: torch.dtype, device, read: Callable | None = None) -> None:
    """Fill a model on the meta device, tensor by tensor, from the files of match().

    read(file, names) yields (name, tensor); the default is read_tensors().
    """
    ours, values = dict(model.named_parameters()), {}
    for file, of_file in matched.items():
        for theirs, tensor in (read or read_tensors)(file, list(of_file)):
            names, fix = of_file[theirs]
            for n, piece in zip(names, fix.load(tensor, len(names), model.config)):
                value = torch.empty(piece.shape, dtype=dtype, device=device).copy_(piece)
                if hasattr(ours[n], "device_mesh"):  # shared out over several processes
                    share = torch.distributed.tensor.distribute_tensor
                    value = share(value, ours[n].device_mesh, ours[n].placements, src_data_rank=None)
                values[n] = value
    model.load_state_dict(values, assign=True)


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """The names and shapes of a file's tensors, the largest first, without reading them."""
    from safetensors import safe_open

    with corruption_of(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        else:
            shapes = {name: list(tensor.shape) for name, tensor in unpickled(file).items()}
    return dict(sorted(shapes.items(), key=lambda item: -math.prod(item[1])))


def read_tensors(file: Path, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """These tensors of a safetensors file, or of a pytorch_model.bin without running the code it may hold."""
    from safetensors import safe_open

    content = None
    for name in names:
        with corruption_of(file):
            if file.suffix == ".safetensors":
                # Opened anew for each tensor, the largest first: so little is mapped when most weights are loaded.
                with safe_open(file, framework="pt") as tensors:
                    tensor = tensors.get_tensor(name)
            else:
                content = unpickled(file) if content is None else content
                tensor = content[name]
            if not is_ordinary(tensor):
                raise ValueError(f"{name} is no tensor of ordinary floating-point numbers")
        yield name, tensor


def unpickled(file: Path) -> dict[str, Tensor]:
    # only zip archives can be mapped, which torch writes since 1.6
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
    if not named or not all(isinstance(value, Tensor) and not value.is_nested for value in content.values()):
        raise ValueError("not a dictionary of named tensors")
    return content


def is_ordinary(x: Tensor) -> bool:
    """Floating-point numbers that are there: neither integers nor quantized, sparse, nested or on the meta device."""
    return x.is_floating_point() and x.layout == torch.strided and not (x.is_nested or x.is_meta)


@contextmanager
def corruption_of(file: Path) -> Iterator[None]:
    """Any error while a file is read becomes a ValueError that names the file: damaged ones can run into anything."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file} is corrupt, cut off, or holds more than tensors: {first_line(error)}") from None


def weight_files(name: str) -> list[Path]:
    """The checkpoint's weights: one file, or the shards that an index names; safetensors before pickles."""
    absent = ValueError(f"{name} has no weights (model.safetensors or pytorch_model.bin, whole or sharded)")
    for file, sharded in itertools.product(("model.safetensors", "pytorch_model.bin"), (False, True)):
        try:
            found = fetch(name, file + ".index.json" * sharded)
        except (MissingFile, Unreachable) as error:
            absent = error if isinstance(error, Unreachable) else absent
            continue
        if not sharded:
            return [found]
        shards = read_json(found).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{found} has no weight_map that names the shards")
        if outside := [shard for shard in shards.values() if Path(shard).is_absolute() or ".." in Path(shard).parts]:
            raise ValueError(f"{found} names a shard outside of the checkpoint's folder: {quote(outside[0])}")
        return [fetch(name, shard) for shard in sorted(set(shards.values()))]
    raise absent


class MissingFile(ValueError):
    """A checkpoint has no such file."""


class Unreachable(ValueError):
    """A file of a repository is not in the cache, and the Hub could not be asked whether it has one."""


REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def fetch(name: str, file: str) -> Path:
    """The path of one file of a checkpoint; it is downloaded if the name is that of a repository.

    MissingFile if the checkpoint has no such file, Unreachable if that is not known, ValueError for all else.
    """
    source = SHORT_NAMES.get(name, name)
    if os.path.isdir(source):  # False, and no error, for an impossible name
        if not (Path(source) / file).is_file():
            raise MissingFile(f"{source} has no file {file}")
        return Path(source) / file
    if not REPOSITORY.fullmatch(source):
        known = ", ".join(SHORT_NAMES)
        reason = f"unknown model {quote(name)}: give one of {known}, a Hub repository owner/name, or a directory"
        raise ValueError(reason)
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache

    # Asked before at the commit in use, and there was none: asking again takes long without a network.
    if try_to_load_from_cache(source, file) is _CACHED_NO_EXIST:
        raise MissingFile(f"the repository {source} has no file {file}")
    try:
        return Path(hf_hub_download(source, file))
    except errors.GatedRepoError:
        reason = f"{source} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        raise ValueError(reason) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(no_repository(source)) from None
    except errors.LocalEntryNotFoundError:
        reason = f"{file} of {source} is not in the cache and the Hub cannot be reached"
        raise Unreachable(f"{reason}: check the network, or give a directory") from None
    except errors.EntryNotFoundError:
        raise MissingFile(f"the repository {source} has no file {file}") from None
    except Exception as error:  # OSError, or one of the HTTP library that huggingface_hub's version uses
        raise ValueError(f"downloading {file} of {source} failed: {first_line(error)}") from None


def no_repository(name: str) -> str:
    login = "if it is private, log in with `hf auth login`"
    return f"{name} is neither a directory here nor a repository on the Hub; {login}"


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a JSON object was expected, not a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from None
    return content


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# More families add themselves. A copy of this file elsewhere does without them.
if __name__ == "models" and (Path(__file__).parent / "support" / "experts.py").is_file():
    importlib.import_module("support.experts")  # and with it support.families
