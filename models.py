"""Transformers that can propagate relevance: GPT-2, GPT-NeoX (Pythia), Qwen2, Gemma 2 and Llama.

    model = from_pretrained("gpt2")
    logits = model(tokens)                         # the plain forward pass
    logits = model(tokens, lrp=True)               # the same numbers; backward now follows the LRP rules
    logits = model(tokens, hook=hook)              # every named node of the graph passes through hook(name, layer, value)

Read it from the top: the rules (Table 1 of the RelP paper), the pieces, one block per data flow, the
transformer, then the loading of Hugging Face checkpoints, sparse autoencoders and tokenizers, then an audit of the rules.

Shapes: b batch, t pos, h head, d d_model (or d_head behind an h). Every node is [batch, pos, ...].
"""

import io
import json
import math
import re
import unicodedata
import zipfile
from collections import Counter, deque
from dataclasses import dataclass, fields, replace
from functools import reduce
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------
# Table 1: propagation rules. A rule leaves the forward pass as it is and makes part of it a constant, so that
# autograd, run backward from the metric, returns LRP's propagation coefficient rho instead of the gradient.
#
# The two-point rules are its second column. The patch run is computed anyway: with its x' beside the original run's x,
# what is constant can be taken between the two runs instead of at the original one, so that rho is right for the
# change from x to x' rather than for a small one.

ROWS = ("ln", "identity", "half", "attention")


@dataclass(frozen=True)
class Rules:
    """Which rows of Table 1 are on for a forward pass. Rules() is none of them: the plain gradient."""

    ln: bool = False
    identity: bool = False
    half: bool = False
    ah: bool = False
    epsilon: float | None = None  # linear layers: the 0-rule, unless epsilon or gamma is given
    gamma: float | None = None
    temperature: float | None = None  # of the softmax on the way back, as in GIM (Edin et al. 2025); for comparison
    two_point: tuple[str, ...] = ()  # of ROWS: those that are taken from the second column, whatever is said above
    tape: "Tape | None" = None  # what they need of the patch run (see Tape)

    def __post_init__(self):
        if unknown := [row for row in self.two_point if row not in ROWS]:
            raise ValueError(f"no two-point rule for {unknown[0]!r}: choose from {', '.join(ROWS)}")

    def taped(self) -> "Rules":
        return replace(self, tape=Tape())


def const(x: Tensor, on: bool) -> Tensor:
    """[x]_const. of Table 1."""
    return x.detach() if on else x


def through(value: Tensor, passed: Tensor) -> Tensor:
    """The value of `value`, the gradient of `passed`."""
    return value.detach() + (passed - passed.detach())


def mid(x: Tensor, x_patch: Tensor) -> Tensor:
    """[(x + x') / 2]_const."""
    return torch.lerp(x.detach(), x_patch, 0.5)


def alone(x: Tensor) -> None:
    """The x' of a run that has no other beside it."""


def ln_rule(x: Tensor, eps: float, on: bool, twin=alone) -> Tensor:
    """LN-rule for LayerNorm (x centred before: that stays differentiable) and RMSNorm: x / [sqrt(eps + mean x^2)]_const.

    Two-point: x [mean of both runs' 1 / sqrt]_const.
    """
    size = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    y, size_patch = x / const(size, on), twin(size)
    return y if size_patch is None else through(y, x * mid(1 / size, 1 / size_patch))


def identity_rule(x: Tensor, gate, on: bool, twin=alone) -> Tensor:
    """Identity-rule for GELU and SiLU, both x * gate(x): x * [gate(x)]_const.

    Two-point: x * [(y' - y) / (x' - x)]_const., the secant; where the runs (nearly) agree, the Identity-rule.
    """
    x_patch = twin(x)
    g = const(gate(x), on or x_patch is not None)
    y = x * g
    y_patch = twin(y)
    if x_patch is None:
        return y
    dx = x_patch - x.detach()
    near = dx.abs() < torch.finfo(x.dtype).eps ** 0.5  # there the quotient would be made of rounding errors
    return through(y, x * torch.where(near, g, (y_patch - y.detach()) / torch.where(near, 1, dx)))


def half_rule(a: Tensor, b: Tensor, on: bool, twin=alone, product=torch.mul) -> Tensor:
    """Half-rule for multiplicative gates: 0.5 a*b + [0.5 a*b]_const.

    Two-point, and so for the product of pattern and values: a*[b]_const + [a']_const*b, a going first to its new value
    and then b. (The mean of both orders is as exact. But where the patch run exchanges two values, their means are equal,
    and nothing is left for the pattern.)
    """
    y, a_patch = product(a, b), twin(a)
    if a_patch is not None:
        return through(y, product(through(a_patch, a), b))
    return through(y, 0.5 * y) if on else y


def softmax_rule(scores: Tensor, hidden: Tensor, temperature: float | None = None, twin=alone) -> Tensor:
    """The attention pattern. Table 1 has no rule for it; at a temperature T, the derivative is that of the softmax of x / T.

    Two-point: the derivative at the mean of both runs' scores.
    """
    softmax = lambda x: x.masked_fill(hidden, -torch.inf).softmax(-1)
    pattern, scores_patch = softmax(scores), twin(scores)
    if scores_patch is not None:
        return through(pattern, softmax(through(mid(scores, scores_patch), scores)))
    return pattern if temperature is None else through(pattern, temperature * softmax(scores / temperature))


def ah_rule(pattern: Tensor, on: bool) -> Tensor:
    """AH-rule for attention heads: the pattern A in sum_i A_ij x_i is constant."""
    return const(pattern, on)


def linear_rule(x: Tensor, weight: Tensor, bias: Tensor | None, rules: Rules) -> Tensor:
    """Linear layers, y_j = sum_i z_ij + b_j with z_ij = x_i w_ji. R_i is the share of z_ij in y_j, times R_j:

    0-rule        z_ij / y_j: nothing to do, it is Gradient x Input.
    epsilon-rule  z_ij / (y_j + epsilon sign(y_j)): outputs near 0 pass less on.
    gamma-rule    contributions of the sign of y_j count 1 + gamma times: (z_ij + gamma z_ij^+) / (y_j + gamma sum_i z_ij^+)
                  where y_j > 0, with z_ij^- where y_j < 0 (b_j is one of the contributions). For inputs and outputs
                  >= 0 it is LRP-gamma of [52]; this form, of [58], keeps the denominator away from 0 for any sign.
    """
    y = F.linear(x, weight, bias)
    if rules.epsilon is not None:
        passed = y * (y.abs() / (y.abs() + rules.epsilon)).detach()
    elif rules.gamma is not None:
        boost = lambda w, **sign: None if w is None else w + rules.gamma * w.clamp(**sign)
        up, down = boost(weight, min=0), boost(weight, max=0)
        b_up, b_down = boost(bias, min=0), boost(bias, max=0)
        pos, neg = x * (x > 0), x * (x < 0)
        positive, negative = (
            F.linear(pos, up, b_up) + F.linear(neg, down),
            F.linear(pos, down, b_down) + F.linear(neg, up),
        )
        boosted = torch.where(y > 0, positive, negative)
        passed = boosted * (y / torch.where(boosted == 0, 1, boosted)).detach()  # |y| <= |boosted|
    else:
        return y
    return through(y, passed)


# Table 4: the rules of the paper's experiments (the 0-rule on linear layers, no AH-rule). Llama, which the paper
# leaves out, is built of Qwen2's pieces. No row of Table 1 names Gemma 2's two softcaps: they keep their derivative,
# as everything does that has no rule. Its post-norms are RMSNorms and get the LN-rule. The rotation of queries and
# keys is linear in them and needs no rule.
TABLE_4 = {
    "gpt2": Rules(ln=True, identity=True),
    "gpt_neox": Rules(ln=True, identity=True),
    "qwen2": Rules(ln=True, identity=True, half=True),
    "gemma2": Rules(ln=True, identity=True, half=True),
    "llama": Rules(ln=True, identity=True, half=True),
}

# The two-point rules of each family. Gemma 2's blocks end in a norm, which answers a small change with its tangent and a
# whole replacement with its chord. No one coefficient fits both, and the LN- and Half-rule do better there.
TWO_POINT = {
    family: replace(rules, two_point=tuple(row for row in ROWS if row == "attention" or getattr(rules, row)))
    for family, rules in TABLE_4.items()
} | {"gemma2": replace(TABLE_4["gemma2"], two_point=("identity", "attention"))}


# ---------------------------------------------------------------------------------------------------------
# The pieces. Each takes the Run that it is part of.


@dataclass
class Run:
    """One forward pass as a block sees it: the rules in force, and the hook that every named node passes through."""

    rules: Rules
    hook: object  # hook(name, layer, value) -> value, or None; it sees the names in its attribute `nodes`, without one all
    layer: int
    start: int = 0  # the stream's first row is this position; keys and values before it come from the hook
    last: bool = False  # only the last position's output is wanted

    def wants(self, name: str) -> bool:
        return self.hook is not None and name in getattr(self.hook, "nodes", (name,))

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return self.hook(name, self.layer, value) if self.wants(name) else value

    def twin(self, row: str):
        """A function that takes this run's x to the patch run's, for a row of Table 1 that looks at both; else `alone`."""
        if row not in self.rules.two_point:
            return alone
        if self.rules.tape is None:
            raise ValueError("two-point rules need a patch run: call relp.attribute")
        return self.rules.tape


class Tape(deque):
    """What the two-point rules need of the patch run: written there, read in the same order in the original run."""

    playing = False

    def __call__(self, x: Tensor) -> Tensor | None:
        if not self.playing:
            self.append(x.detach())
            return None  # nobody asks for the patch run's gradient
        if not self or self[0].shape != x.shape:
            raise ValueError("the original run does not do what the patch run did: give both the same rules and shapes")
        return self.popleft()


def upcast(x: Tensor) -> Tensor:
    """float32 or better: norms, softmax, activations and softcaps are computed in it whatever the model's dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gelu_tanh_gate(x: Tensor) -> Tensor:
    """(1 + tanh u) / 2 = sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    c = 2 * math.sqrt(2 / math.pi)
    return torch.sigmoid(x * (c + c * 0.044715 * x.square()))


GATES = {  # act(x) = x * gate(x)
    "gelu": torch.special.ndtr,  # Phi, the normal distribution function
    "gelu_new": gelu_tanh_gate,
    "gelu_fast": gelu_tanh_gate,
    "gelu_pytorch_tanh": gelu_tanh_gate,
    "silu": torch.sigmoid,
    "swish": torch.sigmoid,
}


class Linear(nn.Module):
    def __init__(self, d_in: int, d_out: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor, run: Run) -> Tensor:
        return linear_rule(x, self.weight, self.bias, run.rules)


class LayerNorm(nn.Module):
    def __init__(self, c: "Config"):
        super().__init__()
        self.eps = c.eps
        self.weight = nn.Parameter(torch.ones(c.d_model))
        self.bias = nn.Parameter(torch.zeros(c.d_model))

    def forward(self, x: Tensor, run: Run) -> Tensor:
        h = upcast(x)
        h = h - h.mean(-1, keepdim=True)
        return (ln_rule(h, self.eps, run.rules.ln, run.twin("ln")) * self.weight + self.bias).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, c: "Config"):
        super().__init__()
        self.eps, self.offset = c.eps, c.norm_offset
        self.weight = nn.Parameter(torch.ones(c.d_model) - self.offset)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        # Gemma stores w and scales by 1 + w: added here, since 1 + w would lose digits of w in low precision
        normed = ln_rule(upcast(x), self.eps, run.rules.ln, run.twin("ln"))
        return (normed * (self.offset + upcast(self.weight))).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: "Config", layer: int):
        super().__init__()
        self.c, self.window = c, c.windows[layer]
        self.q = Linear(c.d_model, c.n_heads * c.d_head, c.qkv_bias)
        self.k = Linear(c.d_model, c.n_kv_heads * c.d_head, c.qkv_bias)
        self.v = Linear(c.d_model, c.n_kv_heads * c.d_head, c.qkv_bias)
        self.o = Linear(c.n_heads * c.d_head, c.d_model, c.out_bias)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        c, heads = self.c, lambda y: y.unflatten(-1, (-1, self.c.d_head))
        queries = x[:, -1:] if run.last else x
        first = run.start + x.shape[1] - queries.shape[1]  # position of the first query
        q = run("q", rotate(heads(self.q(queries, run)), first, c))  # [b, t, n_heads, d_head], rotated
        k = run("k", rotate(heads(self.k(x, run)), run.start, c))  # [b, t, n_kv_heads, d_head], rotated
        v = run("v", heads(self.v(x, run)))
        if c.n_kv_heads < c.n_heads:
            k, v = (y.repeat_interleave(c.n_heads // c.n_kv_heads, dim=2) for y in (k, v))
        hidden = unseen(first, q.shape[1], k.shape[1], self.window, x.device)
        kernel, twin = None, run.twin("attention")
        if c.attn_softcap is None and not run.wants("pattern"):  # one kernel; the pattern is constant where q and k are
            by_head = lambda y: y.transpose(1, 2)  # [b, h, t, d_head] and back
            qkv = by_head(ah_rule(q, run.rules.ah)), by_head(ah_rule(k, run.rules.ah)), by_head(v)
            z = kernel = by_head(F.scaled_dot_product_attention(*qkv, ~hidden.squeeze(1), scale=c.attn_scale))
        if kernel is None or twin is not alone or run.rules.temperature is not None:
            mix = lambda pattern, v: torch.einsum("bqhk,bkhd->bqhd", pattern, v)
            pattern = softmax_rule(self.scores(q, k), hidden, run.rules.temperature, twin).to(x.dtype)
            pattern = run("pattern", ah_rule(pattern, run.rules.ah))  # [b, query, h, key]
            z = half_rule(pattern, v, False, twin, mix)
            z = z if kernel is None else through(kernel, z)  # the same logits to the last bit
        return self.o(run("z", z).flatten(-2), run)  # z [b, t, n_heads, d_head]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[b, query, h, key] of q and k [b, t, n_heads, d_head]; no key is hidden yet."""
        return softcap(upcast(torch.einsum("bqhd,bkhd->bqhk", q, k)) * self.c.attn_scale, self.c.attn_softcap)


def unseen(first: int, n_queries: int, n_keys: int, window: int | None, device) -> Tensor:
    """True where a query (at positions from `first`) must not see a key: [query, 1, key]."""
    query = first + torch.arange(n_queries, device=device)[:, None, None]
    key = torch.arange(n_keys, device=device)
    return (key > query) if window is None else (key > query) | (key <= query - window)


def rotate(x: Tensor, first: int, c: "Config") -> Tensor:
    """Rotary position embedding of the first rotary_dim dimensions; x is [b, t, h, d_head], its rows at positions from `first`."""
    if c.rotary_dim == 0:
        return x
    half, dtype = c.rotary_dim // 2, torch.promote_types(x.dtype, torch.float32)
    position = torch.arange(first, first + x.shape[1], device=x.device, dtype=dtype)
    angle = torch.outer(position, torch.tensor(c.rotary_freqs, device=x.device, dtype=dtype))[:, None]  # [t, 1, half]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], dim=-1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


class MLP(nn.Module):
    def __init__(self, c: "Config"):
        super().__init__()
        self.act = GATES[c.act]
        self.gate = Linear(c.d_model, c.d_mlp, c.mlp_bias) if c.gated else None
        self.up = Linear(c.d_model, c.d_mlp, c.mlp_bias)
        self.down = Linear(c.d_mlp, c.d_model, c.mlp_bias)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        if self.gate is None:
            hidden = self.activate(self.up(x, run), run)
        else:
            gate, up = self.activate(self.gate(x, run), run), self.up(x, run)
            hidden = half_rule(gate, up, run.rules.half, run.twin("half"))
        return self.down(run("mlp_hidden", hidden), run)

    def activate(self, x: Tensor, run: Run) -> Tensor:
        return identity_rule(upcast(x), self.act, run.rules.identity, run.twin("identity")).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------
# The blocks: one per data flow. attn_out and mlp_out are what is added to the residual stream. x[:, -n:] drops the
# positions whose output nobody wants (run.last); otherwise it is x.


class SequentialBlock(nn.Module):
    """GPT-2, Qwen2, Llama, and NeoX without use_parallel_residual: attention, then MLP, each on the normed stream."""

    nodes = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_hidden", "mlp_out", "resid_post")

    def __init__(self, c: "Config", layer: int):
        super().__init__()
        norm = LayerNorm if c.layer_norm else RMSNorm
        self.ln1, self.attn, self.ln2, self.mlp = norm(c), Attention(c, layer), norm(c), MLP(c)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        x = run("resid_pre", x)
        attn_out = run("attn_out", self.attn(self.ln1(x, run), run))
        x = run("resid_mid", x[:, -attn_out.shape[1] :] + attn_out)
        mlp_out = run("mlp_out", self.mlp(self.ln2(x, run), run))
        return run("resid_post", x + mlp_out)


class ParallelBlock(SequentialBlock):
    """GPT-NeoX (Pythia): attention and MLP read the same stream; there is no resid_mid."""

    nodes = tuple(n for n in SequentialBlock.nodes if n != "resid_mid")

    def forward(self, x: Tensor, run: Run) -> Tensor:
        x = run("resid_pre", x)
        attn_out = run("attn_out", self.attn(self.ln1(x, run), run))
        x = x[:, -attn_out.shape[1] :]
        mlp_out = run("mlp_out", self.mlp(self.ln2(x, run), run))
        return run("resid_post", x + attn_out + mlp_out)


class SandwichBlock(SequentialBlock):
    """Gemma 2: a norm before and one behind attention and MLP; attn_out and mlp_out are taken behind the second."""

    def __init__(self, c: "Config", layer: int):
        super().__init__(c, layer)
        self.ln1_post, self.ln2_post = RMSNorm(c), RMSNorm(c)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        x = run("resid_pre", x)
        attn_out = run("attn_out", self.ln1_post(self.attn(self.ln1(x, run), run), run))
        x = run("resid_mid", x[:, -attn_out.shape[1] :] + attn_out)
        mlp_out = run("mlp_out", self.ln2_post(self.mlp(self.ln2(x, run), run), run))
        return run("resid_post", x + mlp_out)


BLOCKS = {"sequential": SequentialBlock, "parallel": ParallelBlock, "sandwich": SandwichBlock}


class Transformer(nn.Module):
    """tokens [batch, pos] -> logits [batch, pos, vocab].

    lrp   False: the plain gradient. True: the paper's rules for this family (Table 4). Rules(...): those (two-point
          rules through relp.attribute). The logits are bit-identical in every case; only what backward returns differs.
    hook  hook(name, layer, value) -> value sees every named node in turn (`nodes` lists them) and returns what the
          pass goes on with: the same to look, another to intervene. It lives for this call alone.
          A hook that sees the pattern has attention form it, which rounds otherwise than the one kernel does.
    """

    def __init__(self, config: "Config"):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.n_vocab, c.d_model)
        self.embed_positions = None if c.rotary_dim else nn.Embedding(c.n_ctx, c.d_model)
        self.blocks = nn.ModuleList(BLOCKS[c.block](c, layer) for layer in range(c.n_layers))
        self.ln_f = LayerNorm(c) if c.layer_norm else RMSNorm(c)
        self.unembed_tokens = None if c.tied else Linear(c.d_model, c.n_vocab, bias=False)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names that the hook of a forward pass meets, in the order of a block's data flow."""
        return self.blocks[0].nodes

    def forward(self, tokens: Tensor, lrp: bool | Rules = False, hook=None) -> Tensor:
        return self.unembed(self.stream(tokens, lrp, hook), lrp)

    def stream(self, tokens: Tensor, lrp: bool | Rules = False, hook=None) -> Tensor:
        """The residual stream behind the last block: [batch, pos, d_model]."""
        x = self.embed(tokens)
        for layer in range(self.config.n_layers):
            x = self.block(layer, x, lrp, hook)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"tokens must have the shape [batch, pos] with at least one position, got {list(tokens.shape)}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < c.n_vocab:
            raise ValueError(f"token ids must lie in 0..{c.n_vocab - 1}, got {int(tokens.min())}..{int(tokens.max())}")
        if tokens.shape[1] > c.n_ctx:
            raise ValueError(f"prompts of {tokens.shape[1]} tokens exceed this model's context of {c.n_ctx}")
        x = self.embed_tokens(tokens)
        if c.embed_scale != 1:
            x = x * torch.tensor(c.embed_scale, dtype=x.dtype)  # rounded to the model's dtype, as Gemma was trained
        return x if self.embed_positions is None else x + self.embed_positions.weight[: tokens.shape[1]]

    def block(
        self, layer: int, x: Tensor, lrp: bool | Rules = False, hook=None, start: int = 0, last: bool = False
    ) -> Tensor:
        """One block on the stream x [batch, pos, d_model]; with it a run can be resumed in the middle.

        start  x holds the positions from `start` on, and the hook puts the keys and values of those before in
               front of what it is given at "k" and "v".
        last   return the last position alone, [batch, 1, d_model], and compute no other where that is possible.
        """
        return self.blocks[layer](x, Run(self.rules(lrp), hook, layer, start, last))

    def unembed(self, x: Tensor, lrp: bool | Rules = False, columns: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] of the stream x [..., d_model]; of the token ids in `columns` alone where given."""
        run = Run(self.rules(lrp), None, self.config.n_layers)
        weight = (self.unembed_tokens or self.embed_tokens).weight
        weight = weight if columns is None else weight[columns]
        return softcap(upcast(linear_rule(self.ln_f(x, run), weight, None, run.rules)), self.config.logit_softcap)

    def rules(self, lrp: bool | Rules) -> Rules:
        return lrp if isinstance(lrp, Rules) else TABLE_4[self.config.family] if lrp else Rules()


# ---------------------------------------------------------------------------------------------------------
# Configurations: one function per family from the fields of config.json, with the defaults of transformers.


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
    rotary_freqs: tuple[float, ...] = ()  # radians per position, one for each rotated pair
    layer_norm: bool = False  # else RMSNorm
    norm_offset: float = 0.0
    gated: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.rotary_freqs)

    def check(self) -> None:
        """ValueError where a value, as config.json gave it, cannot be."""
        of = f"config.json of a {self.family} model gives"
        number = lambda x: isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) and x > 0
        size = lambda x: number(x) and isinstance(x, int)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not size(value):
                raise ValueError(f"{of} {field.name} = {value!r}: a positive whole number is needed")
            optional = field.name in ("attn_softcap", "logit_softcap")
            if (optional and value is not None or field.name in ("eps", "attn_scale")) and not number(value):
                raise ValueError(f"{of} {field.name} = {value!r}: a positive number is needed")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{of} {field.name} = {value!r}: true or false is needed")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{of} {self.n_heads} heads for {self.n_kv_heads} key-value heads: not a multiple")
        if len(self.windows) != self.n_layers or not all(w is None or size(w) for w in self.windows):
            raise ValueError(f"{of} the attention windows {list(self.windows)} for {self.n_layers} layers")
        rotated = (
            all(isinstance(f, float) and math.isfinite(f) for f in self.rotary_freqs) and self.rotary_dim <= self.d_head
        )
        if not rotated or (self.rotary_dim == 0) != (self.family == "gpt2"):
            raise ValueError(f"{of} rotary frequencies that cannot be for heads of {self.d_head} dimensions")
        if self.act not in list(GATES):
            raise ValueError(f"activation {self.act!r} is not supported: this project knows {', '.join(GATES)}")

    @staticmethod
    def from_hf(c: dict) -> "Config":
        """The fields of a Hugging Face config.json, as transformers 4 or 5 writes it. ValueError where it is not one of ours."""
        family = c.get("model_type")
        if not isinstance(family, str) or family not in CONFIGS:
            raise ValueError(f"model_type {family!r} is not supported: this project knows {', '.join(CONFIGS)}")
        try:
            config = Config(family=family, **CONFIGS[family](c))
        except KeyError as error:
            raise ValueError(f"config.json of a {family} model lacks the field {error}") from None
        except (TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"config.json of a {family} model has a field of the wrong type: {error}") from None
        config.check()
        return config


def gpt2_config(c: dict) -> dict:
    ours = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for field, wanted in ours.items():
        if c.get(field, wanted) != wanted:
            raise ValueError(f"gpt2 with {field}={c[field]} is not supported")
    d, heads = c["n_embd"], c["n_head"]
    return dict(
        n_layers=c["n_layer"], d_model=d, n_heads=heads, n_kv_heads=heads, d_head=d // heads, d_mlp=c.get("n_inner") or 4 * d,
        n_vocab=c["vocab_size"], n_ctx=c["n_positions"], eps=c.get("layer_norm_epsilon", 1e-5), act=c.get("activation_function", "gelu_new"),
        block="sequential", layer_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, tied=c.get("tie_word_embeddings", True),
        attn_scale=(d // heads) ** -0.5, windows=(None,) * c["n_layer"],
    )  # fmt: skip


def gpt_neox_config(c: dict) -> dict:
    d, heads, bias = c["hidden_size"], c["num_attention_heads"], c.get("attention_bias", True)
    return dict(
        n_layers=c["num_hidden_layers"], d_model=d, n_heads=heads, n_kv_heads=heads, d_head=d // heads, d_mlp=c["intermediate_size"],
        n_vocab=c["vocab_size"], n_ctx=c["max_position_embeddings"], eps=c.get("layer_norm_eps", 1e-5), act=c.get("hidden_act", "gelu"),
        block="parallel" if c.get("use_parallel_residual", True) else "sequential",
        layer_norm=True, qkv_bias=bias, out_bias=bias, mlp_bias=True, tied=c.get("tie_word_embeddings", False),
        attn_scale=(d // heads) ** -0.5, windows=(None,) * c["num_hidden_layers"],
        rotary_freqs=rotary_freqs(c, d // heads, c.get("rotary_pct", 0.25), c.get("rotary_emb_base", 10000.0)),
    )  # fmt: skip


def llama_config(c: dict) -> dict:
    d, heads = c["hidden_size"], c["num_attention_heads"]
    d_head = c.get("head_dim") or d // heads
    return dict(
        n_layers=c["num_hidden_layers"], d_model=d, n_heads=heads, n_kv_heads=c.get("num_key_value_heads") or heads, d_head=d_head,
        d_mlp=c["intermediate_size"], n_vocab=c["vocab_size"], n_ctx=c.get("max_position_embeddings", 2048),
        eps=c.get("rms_norm_eps", 1e-6), act=c.get("hidden_act", "silu"), block="sequential", gated=True,
        qkv_bias=c.get("attention_bias", False), out_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False), attn_scale=d_head**-0.5, windows=(None,) * c["num_hidden_layers"],
        rotary_freqs=rotary_freqs(c, d_head),
    )  # fmt: skip


def qwen2_config(c: dict) -> dict:
    n, first = c["num_hidden_layers"], c.get("max_window_layers", 28)
    window = c.get("sliding_window") if c.get("use_sliding_window", False) else None
    kinds = c.get("layer_types") or ["sliding_attention" if layer >= first else "full_attention" for layer in range(n)]
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return {**llama_config(c), "qkv_bias": True, "out_bias": False, "mlp_bias": False, "windows": windows}


def gemma2_config(c: dict) -> dict:
    n, d_head = c["num_hidden_layers"], c.get("head_dim", 256)
    kinds = c.get("layer_types") or ["full_attention" if layer % 2 else "sliding_attention" for layer in range(n)]
    return {
        **llama_config({**c, "head_dim": d_head}),
        "block": "sandwich", "norm_offset": 1.0, "mlp_bias": False, "tied": c.get("tie_word_embeddings", True),
        "act": c.get("hidden_activation") or c.get("hidden_act") or "gelu_pytorch_tanh",
        "attn_scale": c.get("query_pre_attn_scalar", 256) ** -0.5, "embed_scale": c["hidden_size"] ** 0.5,
        "windows": tuple(c.get("sliding_window", 4096) if kind == "sliding_attention" else None for kind in kinds),
        "attn_softcap": c.get("attn_logit_softcapping", 50.0), "logit_softcap": c.get("final_logit_softcapping", 30.0),
    }  # fmt: skip


CONFIGS = {
    "gpt2": gpt2_config,
    "gpt_neox": gpt_neox_config,
    "qwen2": qwen2_config,
    "gemma2": gemma2_config,
    "llama": llama_config,
}


def rotary_freqs(c: dict, d_head: int, fraction: float = 1.0, theta: float = 10000.0) -> tuple[float, ...]:
    """Radians per position of each rotated pair. transformers 5 has them in rope_parameters, 4 in rope_scaling and rope_theta."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or c.get("rope_theta") or theta
    dim = int(d_head * rope.get("partial_rotary_factor", fraction))
    freqs = [theta ** (-i / dim) for i in range(0, dim, 2)]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        freqs = [f / rope["factor"] for f in freqs]
    elif kind == "llama3":  # low frequencies are slowed by `factor`, high ones kept, those between blended
        low, high, context = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        keep = [min(max((context * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0) for f in freqs]
        freqs = [k * f + (1 - k) * f / rope["factor"] for f, k in zip(freqs, keep)]
    elif kind != "default":
        raise ValueError(f"rope_type {kind!r} is not supported: this project knows default, linear and llama3")
    return tuple(freqs)


# ---------------------------------------------------------------------------------------------------------
# Checkpoints: one literal table per family, {their module: our module, or several and a fix-up}; "{}" is the layer. Each
# line stands for the weight and, where ours has one, the bias.


@dataclass(frozen=True)
class FixUp:
    """How a checkpoint stores a tensor: load(theirs, n, config) gives our n tensors, save(ours, config) theirs."""

    load: object
    save: object


def turned(x: Tensor) -> Tensor:
    return x.T if x.ndim == 2 else x


AS_IT_IS = FixUp(lambda x, n, c: x.chunk(n), lambda xs, c: torch.cat(xs))
# GPT-2's Conv1D keeps its weights as [d_in, d_out]; its q, k, v stand one behind the other
CONV1D = FixUp(lambda x, n, c: turned(x).chunk(n), lambda xs, c: turned(torch.cat(xs)))
# GPT-NeoX's q, k, v are interleaved by head: [head, (q, k, v), d_head]
INTERLEAVED = FixUp(
    lambda x, n, c: x.unflatten(0, (c.n_heads, n, c.d_head)).transpose(0, 1).flatten(1, 2).unbind(0),
    lambda xs, c: torch.stack([x.unflatten(0, (c.n_heads, c.d_head)) for x in xs], 1).flatten(0, 2),
)

GPT2_NAMES = {
    "transformer.wte": "embed_tokens",
    "transformer.wpe": "embed_positions",
    "transformer.h.{}.ln_1": "blocks.{}.ln1",
    "transformer.h.{}.attn.c_attn": ("blocks.{}.attn.q", "blocks.{}.attn.k", "blocks.{}.attn.v", CONV1D),
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
    "gpt_neox.layers.{}.attention.query_key_value": (
        "blocks.{}.attn.q",
        "blocks.{}.attn.k",
        "blocks.{}.attn.v",
        INTERLEAVED,
    ),
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
GEMMA2_NAMES = {  # Llama's, but for the norms: what Llama calls post_attention is the norm before the MLP, here the one behind attention
    **LLAMA_NAMES,
    "model.layers.{}.post_attention_layernorm": "blocks.{}.ln1_post",
    "model.layers.{}.pre_feedforward_layernorm": "blocks.{}.ln2",
    "model.layers.{}.post_feedforward_layernorm": "blocks.{}.ln2_post",
}
NAMES = {
    "gpt2": GPT2_NAMES,
    "gpt_neox": GPT_NEOX_NAMES,
    "qwen2": LLAMA_NAMES,
    "gemma2": GEMMA2_NAMES,
    "llama": LLAMA_NAMES,
}

# masks and frequencies that old checkpoints keep as buffers; a copy of the embedding where the two are tied
BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|(^|\.)rotary_emb\.inv_freq$")
UNEMBEDDING = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


def layout(model: Transformer) -> dict[str, tuple[list[str], FixUp]]:
    """{tensor name in a checkpoint: (our parameters, fix-up)} for this model."""
    ours = model.state_dict().keys()
    table = {}
    for theirs, entry in NAMES[model.config.family].items():
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
    **{f"toy-{kind}": str(Path(__file__).parent / "toy" / kind) for kind in ("gpt2", "neox", "qwen2", "gemma2")},
}


def from_pretrained(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", shard: bool = False
) -> Transformer:
    """A model from a short name (SHORT_NAMES), a Hub repository "owner/name" or a local directory in Hugging Face layout.

    Its weights need no gradient and keep the checkpoint's values: nothing is folded or centred. ValueError, in one line,
    for an unknown name, no network, a gated or missing repository, a family that is not ours, a corrupt file, and
    tensors that are missing, unexpected or of the wrong shape.

    shard: every process of torch.distributed keeps a part of each weight and gathers a block's just before it runs
    (PyTorch's FSDP2). All of them must then make the same calls.
    """
    config = Config.from_hf(read_json(fetch(name, "config.json")))
    with torch.device("meta"):
        model = Transformer(config)
    if shard:
        shard_weights(model, torch.device(device).type)
    load_weights(model, weight_files(name), dtype, device)
    return model.requires_grad_(False).eval()


def load_weights(model: Transformer, files: list[Path], dtype: torch.dtype, device) -> None:
    """Fill a model on the meta device tensor by tensor, strictly: every tensor it needs once, none that it does not know."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    table, c = layout(model), model.config
    ours, values = dict(model.named_parameters()), {}
    missing, unexpected = dict(table), []
    prefix = next(iter(table)).split(".")[0] + "."  # published GPT-2 checkpoints leave out "transformer."
    for file in files:
        for theirs, tensor in read_tensors(file):
            name = theirs if theirs in table else prefix + theirs
            if name not in table:
                if not BUFFERS.search(theirs) and not (c.tied and UNEMBEDDING.search(theirs)):
                    unexpected.append(theirs)
                continue
            names, fix = table[name]
            wanted = fix.save([ours[n] for n in names], c).shape
            if tensor.shape != wanted:
                raise ValueError(
                    f"{file}: {theirs} has the shape {list(tensor.shape)}, config.json asks for {list(wanted)}"
                )
            for n, piece in zip(names, fix.load(tensor, len(names), c)):
                values[n] = torch.empty(piece.shape, dtype=dtype, device=device).copy_(piece)
                if isinstance(ours[n], DTensor):
                    values[n] = distribute_tensor(
                        values[n], ours[n].device_mesh, ours[n].placements, src_data_rank=None
                    )
            missing.pop(name, None)
    for what, them in (("lacks", list(missing)), ("has unexpected", unexpected)):
        if them:
            raise ValueError(
                f"the checkpoint {files[0].parent} {what} {len(them)} tensors: {', '.join(them[:4])}{', ...' * (len(them) > 4)}"
            )
    model.load_state_dict(values, assign=True)


def shard_weights(model: Transformer, device: str) -> None:
    """Share the weights out over the processes: a unit per block, one for the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    for method in ("embed", "unembed"):  # these are called without going through the model's forward
        register_fsdp_forward_method(model, method)


def read_tensors(file: Path):
    """Yields (name, tensor) of a safetensors file, or of a pytorch_model.bin without running the code it may hold."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                sizes = {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
            # The file is mapped into memory anew for each tensor, the largest first: when most weights are in their
            # place, little is mapped beside them.
            for name in sorted(sizes, key=sizes.get, reverse=True):
                with safe_open(file, framework="pt") as tensors:
                    yield name, tensors.get_tensor(name)
        else:  # published ones from before torch 1.6 are no zip archives, which alone can be mapped
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            if not isinstance(content, dict) or not all(
                isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
            ):
                raise RuntimeError("not a dictionary of named tensors")
            yield from content.items()
    except Exception as error:  # a damaged pickle can run into anything
        raise ValueError(f"{file} is corrupt, cut off, or holds more than tensors: {first_line(error)}") from None


def weight_files(name: str) -> list[Path]:
    """The checkpoint's weights: one file, or the shards that an index names; safetensors before pickles."""
    absent = []
    for file in ("model.safetensors", "pytorch_model.bin"):
        try:
            return [fetch(name, file)]
        except (MissingFile, Unreachable) as error:
            absent.append(error)
        try:
            index = fetch(name, file + ".index.json")
        except (MissingFile, Unreachable) as error:
            absent.append(error)
            continue
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index} has no weight_map that names the shards")
        return [fetch(name, shard) for shard in sorted(set(shards.values()))]
    for error in absent:
        if isinstance(error, Unreachable):
            raise error
    raise ValueError(f"{name} has no weights (model.safetensors or pytorch_model.bin, whole or sharded)")


class MissingFile(ValueError):
    """A checkpoint has no such file."""


class Unreachable(ValueError):
    """A file of a repository is not in the cache and could not be asked for: whether there is one is not known."""


def fetch(name: str, file: str) -> Path:
    """The path of one file of a checkpoint, downloaded where the name is a repository. MissingFile, or ValueError for all else."""
    name = SHORT_NAMES.get(name, name)
    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise MissingFile(f"{name} has no file {file}")
        return Path(name) / file
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(
            f"unknown model {name!r}: give one of {', '.join(SHORT_NAMES)}, a Hub repository owner/name, or a directory"
        )
    from huggingface_hub import _CACHED_NO_EXIST, errors, hf_hub_download, try_to_load_from_cache

    if (
        try_to_load_from_cache(name, file) is _CACHED_NO_EXIST
    ):  # at the commit in use; asking again takes long without a network
        raise MissingFile(f"the repository {name} has no file {file}")
    try:
        return Path(hf_hub_download(name, file))
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no directory here and no repository on the Hub, or a private one: `hf auth login` opens your own"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise Unreachable(
            f"{file} of {name} is not in the cache and the Hub cannot be reached: check the network, or give a directory"
        ) from None
    except errors.EntryNotFoundError:
        raise MissingFile(f"the repository {name} has no file {file}") from None
    except (
        Exception
    ) as error:  # OSError, or one of the HTTP library's own (httpx or httpx2: huggingface_hub's version decides)
        raise ValueError(f"downloading {file} of {name} failed: {first_line(error)}") from None


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a JSON object was expected, not a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from None
    return content


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


# ---------------------------------------------------------------------------------------------------------
# Sparse autoencoders: dictionaries of directions, of which few at a time make up a node's activation.


@dataclass
class SAE:
    """The sparse autoencoder of one node: x [..., d] -> features f [..., n_features], f >= 0 -> x_hat [..., d].

    threshold  None: f = ReLU(pre). Else a JumpReLU: f = pre where pre > threshold, otherwise 0 (Rajamanoharan et al. 2024).
    centred    b_dec is taken off x before it is encoded (dictionary_learning does so, Gemma Scope does not, SAELens either way).

    d is d_model, and for z n_heads * d_head: the node [batch, pos, n_heads, d_head] as z.flatten(-2). The weights need no
    gradient; one can be taken with respect to x. x should have their dtype.
    """

    W_enc: Tensor  # [d, n_features]
    b_enc: Tensor  # [n_features]
    W_dec: Tensor  # [n_features, d]: row i is the direction that feature i writes
    b_dec: Tensor  # [d]
    threshold: Tensor | None = None  # [n_features]
    centred: bool = True

    def encode(self, x: Tensor) -> Tensor:
        pre = F.linear(x - self.b_dec if self.centred else x, self.W_enc.T, self.b_enc)
        return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec

    def error(self, x: Tensor) -> Tensor:
        """What the features leave out: x = decode(encode(x)) + error(x)."""
        return x - self.decode(self.encode(x))


TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
DICTIONARY = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "bias"}
DICTIONARY_NODES = {"embed": "resid_pre", "attn_out": "attn_out", "mlp_out": "mlp_out", "resid_out": "resid_post"}
SAELENS = {  # what may stand in these fields of cfg.json, if they are there at all: the rest is another function of x
    "architecture": ("standard", "jumprelu"), "activation_fn_str": ("relu",), "activation_fn": ("relu",),
    "normalize_activations": ("none",), "finetuning_scaling_factor": (), "hook_name_out": (),
}  # fmt: skip
# Gemma Scope (Lieberum et al. 2024): the stream behind the block; the MLP's output behind its post-norm, as our mlp_out
# is; attention on the heads' outputs before the output matrix, concatenated.
SCOPE_NODES = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}
AE_PT = re.compile(r"/(embed|(attn_out|mlp_out|resid_out)_layer(\d+))/[^/]+/ae\.pt$")
PARAMS_NPZ = re.compile(r"/layer_(\d+)/width_(\d+)([km])/average_l0_(\d+)/params\.npz$")
HOOK = re.compile(r"blocks\.(\d+)\.(?:hook_(resid_pre|resid_mid|attn_out|mlp_out|resid_post)|attn\.hook_(z))")


def load_saes(
    source: str, model, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", nodes=None
) -> dict[tuple[str, int], SAE]:
    """{(node, layer): SAE} of a directory, a zip archive, or a Hub repository "owner/name" (its only zip included), in three layouts:

    dictionary_learning  .../{embed,attn_out_layer3,mlp_out_layer3,resid_out_layer3}/10_32768/ae.pt (Marks et al. 2024;
                         repository saprmarks/pythia-70m-deduped-saes). embed is resid_pre of layer 0.
    SAELens              folders of any name with cfg.json and sae_weights.safetensors; cfg's hook_name says which node.
    Gemma Scope          .../gemma-scope-2b-pt-{res,mlp,att}/layer_3/width_16k/average_l0_59/params.npz. Of several for one
                         layer, the narrowest and of these the one with an L0 nearest 100 (SAELens' "canonical" choice).

    nodes  the names that are wanted: each must have an SAE in every layer (resid_pre: in layer 0). None: whatever is there.

    Nothing is unpickled but tensors, and of an archive only what is wanted is read. ValueError, in one line, for no SAEs
    or two of one node, a missing layer, another model's layer or width, and files that are damaged or of another kind.
    """
    names, read = sae_files(SHORT_NAMES.get(source, str(source)))
    saes = {}
    for (node, layer), file, cfg in find_saes(names, read):
        if nodes is not None and node not in nodes:
            continue
        if node not in model.nodes:
            raise ValueError(
                f"{file} is an SAE of {node}, which this model does not have: its nodes are {', '.join(model.nodes)}"
            )
        if layer >= model.config.n_layers:
            raise ValueError(
                f"{file} is an SAE of {node} in layer {layer}, but the model's layers are 0..{model.config.n_layers - 1}"
            )
        if (node, layer) in saes:
            raise ValueError(
                f"{file} is a second SAE of {node} in layer {layer}: give a directory that has one of each"
            )
        c = model.config
        saes[node, layer] = read_sae(file, read, cfg, c.n_heads * c.d_head if node == "z" else c.d_model, dtype, device)
    for node in nodes or ():
        wanted = range(1 if node == "resid_pre" else model.config.n_layers)
        if missing := [layer for layer in wanted if (node, layer) not in saes]:
            raise ValueError(
                f"{source} has no SAE of {node} in layer {missing[0]}"
                + f" (nor in {', '.join(map(str, missing[1:]))})" * (len(missing) > 1)
            )
    if not saes:
        raise ValueError(
            f"{source} has no SAEs: ae.pt (dictionary_learning), cfg.json with sae_weights.safetensors (SAELens) or params.npz (Gemma Scope) in their published folders"
        )
    return dict(sorted(saes.items(), key=lambda item: (item[0][1], model.nodes.index(item[0][0]))))


def find_saes(names: list[str], read):
    """Yields ((node, layer), file, SAELens' cfg or {}) for each SAE among the files."""
    scope = {}
    for name in names:
        if match := AE_PT.search(name):
            kind, layer = (match[2], int(match[3])) if match[2] else ("embed", 0)
            yield (DICTIONARY_NODES[kind], layer), name, {}
        elif name.endswith("/cfg.json"):
            cfg = read(name, json.load)
            cfg = cfg if isinstance(cfg, dict) else {}
            cfg |= (
                metadata if isinstance(metadata := cfg.get("metadata"), dict) else {}
            )  # newer SAELens keeps hook_name there
            if not isinstance(hook := cfg.get("hook_name"), str):
                raise ValueError(f"{name} has no hook_name that says where the SAE belongs")
            match = HOOK.fullmatch(hook)
            yield (
                (match[2] or match[3], int(match[1])) if match else (hook, 0),
                name.removesuffix("cfg.json") + "sae_weights.safetensors",
                cfg,
            )
        elif match := PARAMS_NPZ.search(name):
            kind = re.findall(r"[/_-](res|mlp|att)(?=[/_-])", name[: match.start() + 1])
            if not kind:
                raise ValueError(f"{name}: no folder above it says res, mlp or att, as gemma-scope-2b-pt-res does")
            choice = int(match[2]) * {"k": 1, "m": 1000}[match[3]], abs(int(match[4]) - 100), name
            key = SCOPE_NODES[kind[-1]], int(match[1])
            scope[key] = min(scope.get(key, choice), choice)
    for key, (*_, name) in scope.items():
        yield key, name, {}


def read_sae(file: str, read, cfg: dict, d: int, dtype: torch.dtype, device) -> SAE:
    """One SAE, its tensors checked against each other and against the width d of its node."""
    import numpy as np
    import safetensors.torch

    if file.endswith(".pt"):
        theirs, table = read(file, lambda f: dict(torch.load(f, map_location="cpu", weights_only=True))), DICTIONARY
    elif file.endswith(".npz"):
        theirs, table = (
            read(file, lambda f: {k: torch.from_numpy(v) for k, v in np.load(f, allow_pickle=False).items()}),
            {},
        )
    else:
        theirs, table = read(file, lambda f: safetensors.torch.load(f.read())), {}
        for field, allowed in SAELENS.items():
            if (value := cfg.get(field)) and value not in allowed:
                raise ValueError(
                    f"{file}: an SAE with {field} {value!r} in its cfg.json is not supported"
                    + f", only {' and '.join(allowed)}" * bool(allowed)
                )
    jump = file.endswith(".npz") or cfg.get("architecture") == "jumprelu" or "threshold" in theirs
    ours, n = {}, None
    for name in TENSORS + ("threshold",) * jump:
        x = theirs.get(table.get(name, name))
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(
                f"{file} has no tensor {table.get(name, name)} of floating-point numbers; it has {', '.join(map(str, theirs)) or 'nothing'}"
            )
        x = x.T if x.ndim == 2 and table else x
        n = n or (x.shape[-1] if x.ndim else 0)  # W_enc comes first
        shape = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)}.get(name, (n,))
        if x.shape != shape:
            flip = slice(None, None, -1 if table else 1)
            raise ValueError(
                f"{file}: {table.get(name, name)} has the shape {list(x.shape)[flip]}, for this model {list(shape)[flip]} is expected"
            )
        ours[name] = x.to(device, dtype).contiguous()
        if not ours[name].isfinite().all():
            raise ValueError(
                f"{file}: {table.get(name, name)} has values that are not finite, or too large for {dtype}"
            )
    return SAE(
        **ours, centred=bool(table) or bool(cfg.get("apply_b_dec_to_input", bool(cfg)))
    )  # SAELens' default is True


def sae_files(source: str):
    """The paths of all files in a source, and read(path, parse): parse applied to the opened file, errors in one line."""
    path = Path(source)
    if path.is_dir():
        root, names, opened = (
            path.resolve().as_posix(),
            sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()),
            lambda name: (path / name).open("rb"),
        )
    elif path.is_file():
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no zip archive, or a damaged one: {first_line(error)}") from None
        root, names, opened = (
            path.resolve().as_posix(),
            archive.namelist(),
            lambda name: io.BytesIO(archive.read(name)),
        )  # only what is read is unpacked
    else:
        root, names, opened = source, repository_files(source), lambda name: fetch(source, name).open("rb")
    zips = [name for name in names if name.endswith(".zip")]
    if len(zips) == 1 and not any(name.endswith(("ae.pt", "cfg.json", "params.npz")) for name in names):
        return sae_files(str(path / zips[0] if path.is_dir() else fetch(source, zips[0])))

    def read(name, parse):
        try:
            with opened(name[len(root) + 1 :]) as file:
                return parse(file)
        except Exception as error:  # a damaged file can run into anything
            raise ValueError(f"{name} cannot be read: {first_line(error)}") from None

    return [f"{root}/{name}" for name in names], read


def repository_files(name: str) -> list[str]:
    """The files of a Hub repository; where the Hub cannot be asked, those that are in the cache."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise ValueError(
            f"there are no SAEs at {name!r}: give a directory, a zip archive, or a Hub repository owner/name"
        )
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        return sorted(HfApi().list_repo_files(name))
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name} is no directory here and no repository on the Hub, or a private one: `hf auth login` opens your own"
        ) from None
    except Exception as error:
        try:
            cached = Path(snapshot_download(name, local_files_only=True))
        except Exception:
            raise ValueError(
                f"the files of {name} are not in the cache and the Hub cannot be asked: {first_line(error)}"
            ) from None
        return sorted(p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.is_file())


# ---------------------------------------------------------------------------------------------------------
# Tokenizers: byte-pair encodings as tokenizer.json describes them, merged by tiktoken.


def load_tokenizer(name: str) -> "Tokenizer":
    """The tokenizer of a model that from_pretrained knows by this name. MissingFile where the checkpoint has none."""
    files = {}
    for file in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        if "tokenizer.json" not in files:  # it says all that the other two do
            try:
                files[file] = fetch(name, file)
            except MissingFile:
                pass
    if not files.keys() & {"tokenizer.json", "vocab.json"}:
        raise MissingFile(f"{name} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    return Tokenizer.from_files(files)


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WELL_KNOWN_BOS = ("<|begin_of_text|>", "<|endoftext|>", "<bos>", "<s>")

# Byte-level vocabularies spell every byte as one visible character: itself if it is one, else the next unused one
# from U+0100 on, so that "Ġ" is the space (`bytes_to_unicode` of GPT-2's encoder.py).
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _VISIBLE]
BYTE_OF_CHAR = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


class Tokenizer:
    """Text to token ids and back: a checkpoint's own Hugging Face files, with tiktoken doing the merging.

    Reads the two kinds of byte-pair encoding (BPE) that the model families here come with:

    - byte-level (GPT-2, GPT-NeoX, Llama 3, Qwen2): a pattern splits the text, and each piece starts as its bytes;
    - SentencePiece-style (Gemma, Llama 1 and 2): the text stays whole, with "▁" for " ", and starts as its
      characters; one that is not in the vocabulary is given as its bytes, spelled like "<0xE2>" ("byte fallback").

    The ids are those of the `tokenizers` package with `add_special_tokens=False`. One difference is left: it ranks
    the pair of tokens to be merged, tiktoken the bytes of the result. They agree where the merges leave each token
    only one way to come about, as BPE training does, or where the file lists all ways, as Gemma and Llama 3 do.

    bos_id: id of the BOS token, or else of the EOS token, or else None. n_vocab: 1 + the largest id.
    """

    def __init__(self, spec: dict, config: dict):
        """`spec`: the content of tokenizer.json. `config`: that of tokenizer_config.json, or {}."""
        import tiktoken

        model, added = spec.get("model"), spec.get("added_tokens") or []
        if not isinstance(model, dict) or not model.get("vocab"):
            raise ValueError("there is no model with a vocabulary in it")
        kind = model.get("type", "BPE")  # GPT-2's and NeoX's files name none
        odd = any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        if kind != "BPE" or "merges" not in model or odd:
            raise ValueError(f"model {kind} is not supported: only BPE is, with merges, no dropout, prefix or suffix")
        self.normalize = _normalizer(spec.get("normalizer"))
        pattern, byte_level, self.prefix_space = _splitter(spec.get("pre_tokenizer"), model.get("byte_fallback"))
        pieces = _ranked_pieces(model, byte_level, skip={t["content"] for t in added})
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.ids_of_rank = list(pieces.values())

        # Added tokens are cut out whole: most from the text as it is, the "normalized" ones from the normalized text.
        as_is = {t["content"]: t for t in added if not t.get("normalized")}
        normalized = {self.normalize(t["content"]): t for t in added if t.get("normalized")}
        self.cut_as_is, self.cut_normalized = _cutter(as_is), _cutter(normalized)
        self.added_id = {content: t["id"] for content, t in {**normalized, **as_is}.items()}

        id_of = model["vocab"] | {t["content"]: t["id"] for t in added}
        self.n_vocab = 1 + max(id_of.values())
        self.bytes_of_id = {i: _token_bytes(token, byte_level) for token, i in model["vocab"].items()}
        self.bytes_of_id |= {t["id"]: t["content"].encode() for t in added}
        self.space = " " if byte_level else "▁"
        named = [config.get("bos_token"), config.get("eos_token")]
        named = [token.get("content") if isinstance(token, dict) else token for token in named]
        self.bos_id = next((id_of[token] for token in (*named, *WELL_KNOWN_BOS) if token in id_of), None)

    @classmethod
    def from_files(cls, files: dict[str, Path]) -> "Tokenizer":
        """The tokenizer of a checkpoint: of its tokenizer.json or, as GPT-2 can do without, vocab.json and merges.txt.

        files: name -> path of those that exist; tokenizer_config.json, which says what BOS and EOS are, is optional.
        Raises ValueError, naming the file, if one is missing, malformed, or describes a tokenizer of another kind.
        """
        config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
        if "tokenizer.json" in files:
            path = files["tokenizer.json"]
            spec = read_json(path)
        elif "vocab.json" in files and "merges.txt" in files:
            path = f"{files['vocab.json']} and merges.txt"
            owner = config.get("tokenizer_class") or "GPT2Tokenizer"
            if not owner.startswith("GPT2"):  # others share the two files' format, but not GPT-2's pattern
                raise ValueError(f"{path}: a {owner} needs tokenizer.json too; only GPT-2's does not")
            vocab, lines = (
                read_json(files["vocab.json"]),
                files["merges.txt"].read_text(encoding="utf-8", errors="replace").split("\n"),
            )
            model = {"vocab": vocab, "merges": [m for m in lines if m and not m.startswith("#version")]}
            added = [{"content": t, "id": vocab[t]} for t in ("<|endoftext|>",) if t in vocab]
            spec = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": added}
        else:
            raise ValueError(f"no tokenizer.json, and no vocab.json with merges.txt, among {sorted(files)}")
        try:
            return cls(spec, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is malformed: {type(error).__name__}: {first_line(error)}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Added tokens in it, such as "<|endoftext|>", are recognized; no BOS is put in front."""
        ids = []
        for i, part in enumerate(self.cut_as_is.split(text)):
            if i % 2:  # the added tokens are the odd parts
                ids.append(self._id_of_added(part))
                continue
            for j, piece in enumerate(self.cut_normalized.split(self.normalize(part))):
                ids += [self._id_of_added(piece)] if j % 2 else self._merge(piece)
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, for people to read: "�" for a part of a character or an id without a token.

        Nothing is tidied away: what Llama 2's normalizer puts in front is shown as the space that it stands for.
        """
        text = b"".join(self.bytes_of_id.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")
        return text.replace(self.space, " ")

    def _id_of_added(self, found: str) -> int:
        return self.added_id[found if found in self.added_id else found.strip()]  # strip: see lstrip, rstrip below

    def _merge(self, text: str) -> list[int]:
        if self.prefix_space and text and not text.startswith(" "):
            text = " " + text
        ranks = self.bpe.encode_ordinary(text)
        assert self.bpe.decode_bytes(ranks) == text.encode(), f"the pattern leaves out a part of {text!r}"
        ids = [i for rank in ranks for i in self.ids_of_rank[rank]]
        if len(ids) < len(ranks):
            raise ValueError(f"the vocabulary has no token for some byte of {text!r}")
        return ids


def _normalizer(spec: dict | None):
    """The function str -> str that a tokenizer.json's "normalizer" describes."""
    match spec:
        case None:
            return lambda text: text
        case {"type": "NFC"}:  # é as one character rather than e and an accent
            return lambda text: unicodedata.normalize("NFC", text)
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return lambda text: text.replace(old, new)
        case {"type": "Prepend", "prepend": prefix}:
            return lambda text: prefix + text if text else text
        case {"type": "Sequence", "normalizers": specs}:
            steps = [_normalizer(s) for s in specs]
            return lambda text: reduce(lambda t, step: step(t), steps, text)
    raise ValueError(f"normalizer {spec} is not supported: only NFC, Replace (of a string), Prepend and Sequence are")


def _splitter(spec: dict | None, byte_fallback: bool) -> tuple[str, bool, bool]:
    """The (regular expression of a piece, is it byte-level?, put a space in front?) of a "pre_tokenizer"."""
    whole = r"[\s\S]+"
    match spec:
        case {"type": "ByteLevel"}:
            return GPT2_PATTERN if spec.get("use_regex", True) else whole, True, spec.get("add_prefix_space", False)
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        }:
            return pattern, True, False
        case None if byte_fallback:
            return whole, False, False
        case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"} if byte_fallback:
            return r"[^ ]* |[^ ]+", False, False  # Gemma: splits nothing, as its normalizer leaves no space
    raise ValueError(
        f"pre_tokenizer {spec} with byte_fallback {bool(byte_fallback)} is not supported: only ByteLevel, "
        'Split by a pattern + ByteLevel and, with byte_fallback, none or Split at " " are'
    )


def _cutter(added: dict[str, dict]) -> re.Pattern:
    """A pattern whose `split` gives the text between added tokens (even parts) and the added tokens (odd parts)."""
    branches = []
    for content, flags in sorted(added.items(), key=lambda item: -len(item[0])):  # the longest one wins
        if flags.get("single_word"):
            raise ValueError(f"added token {content!r} with the flag single_word is not supported")
        branches.append(r"\s*" * flags.get("lstrip", False) + re.escape(content) + r"\s*" * flags.get("rstrip", False))
    return re.compile("(" + ("|".join(branches) or "(?!)") + ")")  # (?!) never matches


def _token_bytes(token: str, byte_level: bool) -> bytes:
    """The bytes that a token of the vocabulary spells."""
    if byte_level:
        return bytes(BYTE_OF_CHAR[c] for c in token) if set(token) <= BYTE_OF_CHAR.keys() else token.encode()
    return bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.encode()


def _ranked_pieces(model: dict, byte_level: bool, skip: set[str]) -> dict[bytes, list[int]]:
    """All that tiktoken may merge to -> its ids, in the order of tiktoken's ranks: the lowest is merged first.

    That is the order of the merges, which need not be that of the ids. An entry of the vocabulary that no merge makes
    is left out, so that nothing is merged to it; one that several pairs make has the place of the first.
    """
    vocab = model["vocab"]
    if byte_level:  # the bytes that UTF-8 never uses may be missing
        pieces = {bytes([b]): [vocab[c]] if c in vocab else [] for c, b in BYTE_OF_CHAR.items()}
    else:
        byte_ids = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
        if None in byte_ids:
            raise ValueError("byte_fallback is on, but the vocabulary lacks some of the tokens <0x00> to <0xFF>")
        pieces = {bytes([b]): [byte_ids[b]] for b in range(256)}
        # Next the characters, which tiktoken must put together from bytes: "▁" is E2 96 81, so E2 96 gets a rank too.
        # Where it stays alone, being the start of a character that is not in the vocabulary, it stands for two bytes.
        for char in (token.encode() for token in vocab if len(token) == 1):
            for end in range(2, len(char)):
                pieces.setdefault(char[:end], [byte_ids[b] for b in char[:end]])
            pieces[char] = [vocab[char.decode()]]
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"merge {merge!r} does not join two tokens of the vocabulary to a third")
        pieces.setdefault(b"".join(_token_bytes(part, byte_level) for part in pair), [vocab["".join(pair)]])
    if model.get("ignore_merges"):
        # Llama 3: a piece that is in the vocabulary is one token, even if no merges lead to it. tiktoken does so with
        # all that has a rank, but merges to it as well, so there must be no two tokens that make it.
        unmerged = {_token_bytes(token, byte_level): token for token in vocab if token not in skip}
        unmerged = {piece: token for piece, token in unmerged.items() if piece not in pieces}
        for piece, token in unmerged.items():
            if any(piece[:k] in pieces and piece[k:] in pieces for k in range(1, len(piece))):
                raise ValueError(f"ignore_merges is on, but no merge makes {token!r}, though two tokens could")
        pieces |= {piece: [vocab[token]] for piece, token in unmerged.items()}
    return pieces


# ---------------------------------------------------------------------------------------------------------
# The audit: are the rules in use those that were asked for? No word of the model's counts, only the gradients that come
# out. A forward pass is cut into pieces: norms, linear layers, the core of attention (from q, k and v to o) and of the MLP
# (from gate and up to down), a block's sum, the unembedding. A random signal c goes back through each piece, and must
# arrive as a formula says that is written here by hand and calls no rule.
#
# A formula takes the module, its inputs x in this run and x2 in the patch run (the same without one), output y, signal c
# and the rules that are on, as the command names them (ln2: the two-point LN-rule). It returns one gradient per input.


def norm_gradient(m, x, x2, y, c, on):
    """c w / s; two-point, the mean of both runs' 1 / s; without a rule - h mean(c w h) / s^3 too, through the scale."""
    centred = lambda x: x if hasattr(m, "offset") else x - x.mean(-1, keepdim=True)  # an RMSNorm has an offset
    size = lambda h: (h.square().mean(-1, keepdim=True) + m.eps).sqrt()
    h, h2, g = centred(x[0]), centred(x2[0]), c * (upcast(m.weight) + getattr(m, "offset", 0))
    if "ln2" in on:
        return [centred(g * (1 / size(h) + 1 / size(h2)) / 2)]
    return [centred(g / size(h) - ("ln" not in on) * h * (g * h).mean(-1, keepdim=True) / size(h) ** 3)]


def mlp_gradient(m, x, x2, y, c, on):
    """c act'(a), under a rule c gate(a) or c times the secant; times the other factor, and half of it, where there is one."""
    act, a, a2, d = lambda x: x * m.act(x), x[0].cpu().double(), x2[0].cpu().double(), 1e-5
    slope = (act(a + d) - act(a - d)) / (2 * d)  # by differences, which see through a detach
    if "identity" in on or "identity2" in on:
        slope = m.act(a)
    if "identity2" in on:
        near = (a2 - a).abs() < torch.finfo(c.dtype).eps ** 0.5
        slope = torch.where(near, slope, (act(a2) - act(a)) / torch.where(near, 1, a2 - a))
    if m.gate is None:
        return [c * slope.to(c)]
    first, share = (act(a2), 1) if "half2" in on else (act(a), 0.5 if "half" in on else 1)
    return [share * c * x[1] * slope.to(c), share * c * first.to(c)]


def attention_gradient(m, x, x2, y, c, on):
    """dP = c v, dS = P (dP - P . dP), dq = dS k, dk = dS q, dv = P c; two-point, P in dS is that at both runs' mean scores,
    and in dv the patch run's; at a temperature T, P in dS is that of the scores / T."""

    def heads(x):
        q, k, v = (x.unflatten(-1, (-1, m.c.d_head)) for x in x)
        k, v = (x.repeat_interleave(m.c.n_heads // m.c.n_kv_heads, dim=2) for x in (k, v))
        return rotate(q, 0, m.c), rotate(k, 0, m.c), v

    leaves = [cut(x) for x in x]
    q, k, v = heads(leaves)
    q2, k2, _ = heads(x2)
    scores = lambda q, k: softcap(torch.einsum("bqhd,bkhd->bqhk", q, k) * m.c.attn_scale, m.c.attn_softcap)
    s, s2 = scores(q, k), scores(q2, k2) if "attention2" in on else scores(q, k)
    hidden = unseen(0, q.shape[1], q.shape[1], m.window, q.device)
    middle = s / on["temperature"] if "temperature" in on else (s + s2) / 2
    pattern, pattern2 = (s.masked_fill(hidden, -torch.inf).softmax(-1) for s in (middle, s2))
    c = c.unflatten(-1, (-1, m.c.d_head))
    d = torch.einsum("bqhd,bkhd->bqhk", c, v)
    d = pattern * (d - (pattern * d).sum(-1, keepdim=True)) * m.c.attn_scale * ("ah" not in on)
    d = d if m.c.attn_softcap is None else d * (1 - (s / m.c.attn_softcap).square())
    into = [("bqhk,bkhd->bqhd", d, k), ("bqhk,bqhd->bkhd", d, q), ("bqhk,bqhd->bkhd", pattern2, c)]
    owed = [torch.einsum(*product).detach() for product in into]
    return torch.autograd.grad((q, k, v), leaves, owed)  # back through the rotation and the shared heads


def linear_gradient(m, x, x2, y, c, on):
    """c W; the epsilon-rule passes y / (y + epsilon sign y) of it; the gamma-rule divides y among z_ij + gamma z_ij^(sign of y)."""
    x, weight, bias = x[0], upcast(m.weight), 0 if m.bias is None else upcast(m.bias)
    if "epsilon" in on or "gamma" not in on:
        return [(c * y.abs() / (y.abs() + on["epsilon"]) if "epsilon" in on else c) @ weight]
    gradient, more = torch.zeros_like(x), lambda z, y: 1 + on["gamma"] * (z * y > 0)
    for i in map(tuple, c.any(-1).nonzero().tolist()):  # the positions that the signal reaches
        boosted = weight * more(x[i] * weight, y[i][:, None])
        total = boosted @ x[i] + bias * more(bias, y[i])
        gradient[i] = (c[i] * y[i] / torch.where(total == 0, 1, total)) @ boosted * (x[i] != 0)
    return [gradient]


def unembedding_gradient(m, x, x2, y, c, on):
    """A linear layer's, and the derivative of the softcap behind it. Tokens that the signal does not reach are left out."""
    used, cap, layer = c.flatten(0, -2).any(0), m.config.logit_softcap, Linear(1, 1, False)
    weight = (m.unembed_tokens or m.embed_tokens).weight
    weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # shared out over several processes
    layer.weight = nn.Parameter(upcast(weight[used]), requires_grad=False)
    c = c[..., used] if cap is None else c[..., used] * (1 - (y[..., used] / cap).square())
    return linear_gradient(layer, x, x2, x[0] @ layer.weight.T, c, on)


def sum_gradient(m, x, x2, y, c, on):
    """A block adds what attention and MLP put out to the stream: all three get c."""
    return [c] * len(x)


NORMS = {"LayerNorm": norm_gradient, "RMSNorm": norm_gradient}
LINEARS = {"Linear": linear_gradient, "Transformer": unembedding_gradient}
CLAIMS = {  # rule: {module kind that it is for: the gradient owed}; zero is the 0-rule
    **{"ln": NORMS, "identity": {"MLP": mlp_gradient}, "half": {"MLP": mlp_gradient}},
    **{"ln2": NORMS, "identity2": {"MLP": mlp_gradient}, "half2": {"MLP": mlp_gradient}},
    **{rule: {"Attention": attention_gradient} for rule in ("ah", "attention2", "temperature")},
    **{"zero": LINEARS, "epsilon": LINEARS, "gamma": LINEARS},
}
KINDS = {kind: owed for claim in CLAIMS.values() for kind, owed in claim.items()} | {"SequentialBlock": sum_gradient}
CORES = {"Attention": ("q", "k", "v", "o"), "MLP": ("gate", "up", "down")}  # lie between these and the last of these
SHOWN = {"Transformer": "unembedding"}


def kind_of(m: nn.Module) -> str:
    """The class that the audit knows m by, else its own. By name, so that a copy of this file is audited as well."""
    names = [c.__name__ for c in type(m).__mro__]
    return next((name for name in names if name in KINDS or name in ("Embedding", "ModuleList")), names[0])


def cut(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


class Audit:
    """One audit() at work. A rule's name is the command's: ln2 is the two-point LN-rule; zero, the 0-rule."""

    def __init__(self, model, rules):
        self.model, self.faults, self.random = model, {}, torch.Generator().manual_seed(0)
        on = {f.name: getattr(rules, f.name) for f in fields(rules) if f.name not in ("two_point", "tape")}
        on = {rule: x for rule, x in on.items() if x not in (False, None)}
        on |= {f"{row}2": True for row in rules.two_point}
        self.on = on if "epsilon" in on or "gamma" in on else {**on, "zero": True}
        self.asked = [rule for rule in self.on if f"{rule}2" not in on]
        self.applied, self.unseen = ({rule: Counter() for rule in self.asked} for _ in range(2))
        self.parts = [m for part in (*model.blocks, model.ln_f) for m in part.modules() if kind_of(m) in KINDS]
        self.names = {m: name or "unembedding" for name, m in model.named_modules()}
        self.seen, self.came, self.leaf = {"patch": {}}, {}, {}  # seen: by run, a module's inputs; as it came; output

    def fault(self, what, where):
        self.faults.setdefault(what, []).append(where)

    def settle(self):
        if self.faults:
            found = "; ".join(f"{what} {', '.join(names)}" for what, names in self.faults.items())
            raise ValueError(f"the rules in use are not those requested: {found}")

    def run(self, name, tokens, rules) -> Tensor:
        """The logits of a pass that hooks cut into pieces."""
        self.now, self.seen[name] = name, {}
        hooks = [m.register_forward_pre_hook(self.before) for m in self.parts]
        hooks += [m.register_forward_hook(self.after) for m in self.parts]
        try:
            return self.model.unembed(self.model.stream(tokens, rules), rules)
        finally:
            for h in hooks:
                h.remove()

    def before(self, m, args):
        if self.now == "original" and m is not self.model.blocks[0] and not args[0].requires_grad:
            self.fault("no gradient passes what lies ahead of", self.names[m])
        self.came[m] = args[0]
        return cut(args[0]), *args[1:]

    def after(self, m, args, y):
        kind, x, out = kind_of(m), [args[0]], y
        if kind in CORES:
            *into, last = (getattr(m, name) for name in CORES[kind])
            x, out = [self.leaf[linear] for linear in into if linear is not None], self.came[last]
        elif kind == "SequentialBlock":
            x += [self.leaf[part] for part in (getattr(m, "ln1_post", m.attn), getattr(m, "ln2_post", m.mlp))]
        self.seen[self.now][m] = [x.detach() for x in x], args[0].detach(), y.detach()
        if self.now == "original":
            self.compare(m, x, out, torch.randn(out.shape, generator=self.random).to(out))
            _, x_plain, y_plain = self.seen["plain"][m]
            if torch.equal(args[0], x_plain) and not torch.equal(y, y_plain):
                self.fault("the forward pass is changed in", self.names[m])
        self.leaf[m] = cut(y)
        return self.leaf[m]

    def compare(self, m, x, y, c):
        """The gradients of a piece under the signal c, with those owed, and with those owed under one rule less, or more."""
        kind, name, rounding = kind_of(m), self.names[m], torch.finfo(x[0].dtype).eps
        if kind == "Linear":
            c[:, :-1] = 0  # one position stands for all: the gamma-rule's formula takes its time
        got = torch.autograd.grad(y, x, c, materialize_grads=True) if y.requires_grad else [x * 0 for x in x]
        x2 = self.seen["patch"][m][0] if m in self.seen["patch"] else x
        values = *([upcast(x.detach()) for x in xs] for xs in (x, x2)), upcast(y.detach()), upcast(c)
        rules = [r for r in CLAIMS if kind in CLAIMS[r] and not (r.startswith("half") and m.gate is None)]
        mine = [r for r in rules if r in self.asked]
        may = mine + [r for r in ("ln", "identity", "half", "ah") if r in rules and not {r, f"{r}2"} & self.on.keys()]
        owed = {
            switched: KINDS[kind](m, *values, {r: self.on.get(r) for r in self.on.keys() ^ {*switched}})
            for n in range(len(may) + 1)
            for switched in combinations(may, n)
        }
        distance = lambda a, b: math.hypot(*(float((upcast(p) - q).norm()) for p, q in zip(a, b)))
        wrong = min(owed, key=lambda switched: distance(got, owed[switched]))  # of those that fit alike, the fewest
        size, n = distance(owed[()], [torch.zeros_like(w) for w in owed[()]]), sum(w.numel() for w in owed[()])
        # errors of n numbers partly cancel
        noise = 8 * size * max(rounding / n**0.5, torch.finfo(values[-1].dtype).eps)
        visible = [r for r in may if r == "zero" or distance(owed[()], owed[r,]) > noise]
        for rule in mine:
            (self.applied if rule in visible else self.unseen)[rule][SHOWN.get(kind, kind)] += 1
        close = lambda g, w: distance([g], [w]) <= rounding**0.5 * float(w.norm()) + 8 * rounding * size
        if not all(map(close, got, owed[wrong])):
            self.fault(f"{' + '.join(mine) or 'no rule'}: not the gradient owed in", name)
            return
        for rule in [r for r in wrong if r in visible]:
            self.fault(f"{rule}: {'changed no gradient' if rule in mine else 'applied unasked'} in", name)

    def report(self) -> dict:
        def row(rule):
            unseen = {"unseen": dict(self.unseen[rule])} if self.unseen[rule] else {}
            return {"requested": self.on[rule], "applied": dict(self.applied[rule])} | unseen

        c, on = self.model.config, lambda *rules: any(rule in self.on for rule in rules)
        keeps = [
            ("scale of the norms", not on("ln", "ln2")),
            ("activation", not on("identity", "identity2")),
            ("gate", c.gated and not on("half", "half2")),
            ("softmax of attention", not on("ah", "attention2", "temperature")),
            ("softcap of attention", c.attn_softcap is not None and not on("ah")),
            ("softcap of the logits", c.logit_softcap is not None),
        ]
        return {"rules": {rule: row(rule) for rule in self.asked}, "no rule": [what for what, does in keeps if does]}


def audit(model: Transformer, tokens: Tensor, lrp: bool | Rules = True, patch: Tensor | None = None) -> dict:
    """Which rules were applied to which modules, how many times, on prompts [batch, pos]; two-point rules need their patch.

    {"rules": {rule: {"requested": its value, "applied": {module kind: calls}}}, "no rule": [what keeps its derivative]}.
    A Half-rule without gates is applied to nothing: it is not applicable. Calls in which a rule changes no more than
    rounding does, as a tiny epsilon may, are under "unseen" instead.

    ValueError, one line that names rules and modules: a module of unknown kind, or never called; a rule that meets no
    module, changes no gradient, gives another than it owes, or is on unasked; a forward pass that is not bit-identical.
    """
    rules = model.rules(lrp)
    if rules.two_point and patch is None:
        raise ValueError("two-point rules are audited on prompts and their patch")
    a = Audit(model, rules)
    for m, name in a.names.items():
        if kind_of(m) not in (*KINDS, "Embedding", "ModuleList"):
            a.fault(f"no rule: nothing is known of {kind_of(m)}", name)
    for rule in a.on.keys() - CLAIMS.keys():
        a.fault("unknown to the audit:", rule)
    a.settle()
    with torch.no_grad():
        plain = a.run("plain", tokens, type(rules)())
        if not plain.isfinite().all():
            raise ValueError(f"logits are not finite in {model.embed_tokens.weight.dtype}: try float32")
        for m in a.parts:
            if m not in a.seen["plain"]:
                a.fault("no rule: never called,", a.names[m])
        a.settle()
        if rules.two_point:
            rules = rules.taped()
            a.run("patch", patch, rules)
            rules.tape.playing = True
    with torch.enable_grad():
        logits, some = a.run("original", tokens, rules), tokens.unique()  # a few tokens stand for the vocabulary
        signal = torch.zeros_like(logits)
        signal[:, -1, some] = torch.randn(len(tokens), len(some), generator=a.random).to(logits)
        a.compare(model, [a.leaf[model.ln_f]], logits, signal)
    if not torch.equal(logits, plain):
        a.fault("the forward pass is changed in", "the logits")
    for rule in a.asked:
        if not a.applied[rule] and (model.config.gated or not rule.startswith("half")):
            found = "changed no gradient beyond rounding in" if a.unseen[rule] else "met no module of"
            a.fault(f"{rule}: {found}", " or ".join(SHOWN.get(kind, kind) for kind in CLAIMS[rule]))
    a.settle()
    return a.report()
