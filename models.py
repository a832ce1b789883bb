"""Transformers that can propagate relevance: GPT-2, GPT-NeoX (Pythia), Qwen2, Gemma 2 and Llama, in plain PyTorch.

    model = from_pretrained("gpt2")                # or from_transformers(a model of transformers that is in memory)
    logits = model(tokens, lrp=True)               # those of model(tokens); backward follows the paper's LRP rules
    logits = model(tokens, hook=hook)              # every named node passes through hook(name, layer, value)

Read it from the top: the rules (Table 1 of the RelP paper), the pieces, the block, the transformer. The second half
reads the configurations, names and weights of Hugging Face checkpoints; support/families.py has more families.

Shapes: b batch, t position, h head; d is d_model, or d_head after an h. [58] is number 58 of the paper's references.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# Table 1: propagation rules. A rule changes no number of the forward pass: it makes a part of it constant for autograd,
# [.]_const. in the table. Run backward from the metric, autograd then returns LRP's coefficient rho, not the gradient.


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
        epsilon-rule  z_ij / (y_j + epsilon sign(y_j)): outputs near 0 pass less on
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

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, c: "Config", p: "Pass") -> Tensor:
        """AH-rule for attention heads: z_j = sum_i [A_ij]_const v_i. A comes from q and k: they are made constant."""
        return attend(const(q, self.ah), const(k, self.ah), v, mask, c, p)

    def gate(self, a: Tensor, b: Tensor) -> Tensor:
        """Half-rule for multiplicative gates: 0.5 a*b + [0.5 a*b]_const. Else each factor gets all of a*b's share."""
        y = a * b
        return backward_as(y, 0.5 * y) if self.half else y

    def __post_init__(self):
        numbers = [x for x in (self.epsilon, self.gamma) if x is not None]
        if len(numbers) > 1 or not all(1e-12 <= x <= 1e12 for x in numbers):  # beyond, it would overflow or do nothing
            raise ValueError(f"give epsilon or gamma, a number from 1e-12 to 1e12, got {self.epsilon} and {self.gamma}")


# Table 4: the rules of the paper's experiments (the 0-rule on linear layers, no AH-rule). Llama, which the paper leaves
# out, has Qwen2's parts. What has no rule keeps its plain gradient: rotation, softcaps, the softmax without AH-rule.
TABLE_4 = dict.fromkeys(("gpt2", "gpt_neox"), Rules(ln=True, identity=True))
TABLE_4 |= dict.fromkeys(("qwen2", "gemma2", "llama"), Rules(ln=True, identity=True, half=True))


def y_gamma(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, gamma: float) -> Tensor:
    """The gamma-rule's denominator: y_j, but each contribution with the same sign as y_j counts 1 + gamma times.

    Its gradient has the rule's numerators; an input of 0 has none. This is the form of [58], for any sign.
    """
    x, weight = upcast(x), upcast(weight)  # half precision could overflow here
    bias = torch.zeros(len(weight)).to(weight) if bias is None else upcast(bias)
    x_pos, x_neg, w_pos, w_neg = F.relu(x), -F.relu(-x), weight.clamp(min=0), weight.clamp(max=0)
    positive = F.linear(x_pos, w_pos, bias.clamp(min=0)) + F.linear(x_neg, w_neg)
    negative = F.linear(x_pos, w_neg, bias.clamp(max=0)) + F.linear(x_neg, w_pos)
    return positive + negative + gamma * torch.where(y > 0, positive, negative)


# ---------------------------------------------------------------------------------------------------------------------
# The pieces. `c` is the model's Config (below), `p` the pass: the rules in force, and the hook that sees named nodes.

LRP = bool | Rules  # False: no rule; True: the family's in Table 4
Hook = Callable[[str, int, Tensor], Tensor]  # hook(name, layer, activation) -> activation


@dataclass
class Pass:
    """What travels through a layer in one forward pass. Transformer.block sets start and last, for resumed runs."""

    rules: Rules
    hook: Hook | None = None
    layer: int = 0
    start: int = 0  # the position of the first token of x
    last: bool = False  # only the last position is a query

    def wants(self, name: str) -> bool:
        """Does the hook want to see this node? If it has an attribute `nodes`, it wants those; otherwise all."""
        return self.hook is not None and (not hasattr(self.hook, "nodes") or name in self.hook.nodes)

    def node(self, name: str, x: Tensor) -> Tensor:
        """Shows x to the hook. The pass goes on with what the hook returns."""
        return self.hook(name, self.layer, x) if self.wants(name) else x


def upcast(x: Tensor) -> Tensor:
    """float32 or better: norms, softmax, activations and softcaps are computed in it whatever the model's dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gelu_tanh_phi(x: Tensor) -> Tensor:
    """(1 + tanh u) / 2 = sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3)."""
    c = 2 * math.sqrt(2 / math.pi)
    return torch.sigmoid(x * (c + c * 0.044715 * x.square()))


PHI = {  # the activation functions: act(x) = x * phi(x)
    "gelu": torch.special.ndtr,  # Phi, the normal distribution function
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), gelu_tanh_phi),
    **dict.fromkeys(("silu", "swish"), torch.sigmoid),
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

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        return p.rules.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm, which centres x and has a bias; else RMSNorm. Gemma stores w and scales by 1 + w: offset is the 1."""

    def __init__(self, c: "Config", size: int | None = None):
        super().__init__()
        self.eps, self.offset, self.centred = c.eps, c.norm_offset, c.layer_norm
        self.weight = nn.Parameter(torch.full([size or c.d_model], 1 - self.offset))
        self.bias = nn.Parameter(torch.zeros(c.d_model)) if c.layer_norm else None

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        h = upcast(x)
        h = h - h.mean(-1, keepdim=True) if self.centred else h
        h = p.rules.norm(h, self.eps) * (self.offset + upcast(self.weight))
        return (h if self.bias is None else h + self.bias).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: "Config", layer: int):
        super().__init__()
        self.c, self.window, self.rotary = c, c.windows[layer], c.rotary[layer] if c.rotary else None
        self.q = Linear(c.d_model, c.n_heads * c.d_head, c.qkv_bias)
        self.k = Linear(c.d_model, c.n_kv_heads * c.d_head, c.qkv_bias)
        self.v = Linear(c.d_model, c.n_kv_heads * c.d_head, c.qkv_bias)
        self.o = Linear(c.n_heads * c.d_head, c.d_model, c.out_bias)
        self.q_norm = self.k_norm = None  # norms that some newer families have

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        queries = x[:, -1:] if p.last else x
        first = p.start + x.shape[1] - queries.shape[1]  # position of the first query
        heads = (-1, self.c.d_head)  # [b, t, h * d_head] -> [b, t, h, d_head]
        q = p.node("q", rotate(normed(self.q_norm, self.q(queries, p), p).unflatten(-1, heads), first, self.rotary))
        k = p.node("k", rotate(normed(self.k_norm, self.k(x, p), p).unflatten(-1, heads), p.start, self.rotary))
        v = p.node("v", self.v(x, p).unflatten(-1, heads))
        mask = causal_mask(first, q.shape[1], k.shape[1], self.window, x.device)  # k has all positions by now
        z = p.node("z", p.rules.attention(q, self.repeat_kv(k), self.repeat_kv(v), mask, self.c, p))
        return self.o(z.flatten(-2), p)

    def repeat_kv(self, x: Tensor) -> Tensor:
        """[b, t, n_kv_heads, d_head] -> [b, t, n_heads, d_head]: several query heads may share a key and value head."""
        n = self.c.n_heads // self.c.n_kv_heads
        return x if n == 1 else x.repeat_interleave(n, dim=2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, c: "Config", p: Pass) -> Tensor:
    """z_j = sum_i A_ij v_i with the pattern A = softmax(scores(q, k)), [b, query, h, key]; the others are [b, t, h, d].
    If the hook wants no pattern, and scores are not capped, one kernel of PyTorch's does it all.
    """
    if p.wants("pattern") or c.attn_softcap is not None:
        pattern = attention_scores(q, k, c).masked_fill(mask, -torch.inf).softmax(-1)
        return torch.einsum("bqhk,bkhd->bqhd", p.node("pattern", pattern.to(v.dtype)), v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [b, h, t, d]
    return F.scaled_dot_product_attention(q, k, v, ~mask.squeeze(1), scale=c.attn_scale).transpose(1, 2)


def attention_scores(q: Tensor, k: Tensor, c: "Config") -> Tensor:
    return softcap(upcast(torch.einsum("bqhd,bkhd->bqhk", q, k)) * c.attn_scale, c.attn_softcap)


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

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        up = self.up(x, p)
        active = up if self.gate is None else self.gate(x, p)
        hidden = p.rules.activation(upcast(active), self.phi).to(x.dtype)
        hidden = hidden if self.gate is None else p.rules.gate(hidden, up)
        return self.down(p.node("mlp_hidden", hidden), p)


# ---------------------------------------------------------------------------------------------------------------------
# The block. Its nodes, in the order in which a hook sees them, each [batch, pos, ...]:
#
#     resid_pre                       the residual stream before the block                    [b, t, d_model]
#     q, k, v                         queries and keys (rotated) and values     [b, t, n_heads or n_kv_heads, d_head]
#     pattern                         attention weights                                       [b, query, n_heads, key]
#     z                               the heads' outputs                                      [b, t, n_heads, d_head]
#     attn_out                        what attention adds to the stream (after the post-norm)         [b, t, d_model]
#     resid_mid                       the stream between attention and MLP; not in parallel blocks    [b, t, d_model]
#     mlp_hidden                      the MLP's neurons, after activation and gate; not in mixtures    [b, t, d_mlp]
#     mlp_out                         what the MLP adds to the stream (after the post-norm)   [b, t, d_model]
#     resid_post                      the stream after the block                              [b, t, d_model]

NODES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_hidden", "mlp_out", "resid_post")


class Block(nn.Module):
    """Attention and MLP, each on the normed stream. In parallel blocks (Pythia) both read the block's input."""

    def __init__(self, c: "Config", layer: int, attention: type[Attention] = Attention):
        super().__init__()
        self.parallel = c.parallel
        self.ln1, self.attn, self.post1 = Norm(c), attention(c, layer), Norm(c) if c.post_norm else None
        self.ln2, self.mlp, self.post2 = Norm(c), MLP(c), Norm(c) if c.post_norm else None
        self.nodes = tuple(name for name in NODES if name != "resid_mid" or not c.parallel)

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        x = p.node("resid_pre", x)
        attn_out = p.node("attn_out", normed(self.post1, self.attn(normed(self.ln1, x, p), p), p))
        x = x[:, -attn_out.shape[1] :]  # the positions that attention has returned: all, or with p.last the last one
        mid = x if self.parallel else p.node("resid_mid", x + attn_out)
        mlp_out = p.node("mlp_out", normed(self.post2, self.mlp(normed(self.ln2, mid, p), p), p))
        return p.node("resid_post", (x + attn_out if self.parallel else mid) + mlp_out)


def normed(norm: nn.Module | None, x: Tensor, p: Pass) -> Tensor:
    return x if norm is None else norm(x, p)


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


class Transformer(nn.Module):
    """tokens [batch, pos] -> logits [batch, pos, vocab].

    lrp   False: the plain gradient. True: the family's rules (TABLE_4). Rules(...): exactly these. The logits are the
          same to the bit in every case; only what backward returns differs.
    hook  hook(name, layer, x) -> x is called with every node (see the list above) and returns what the pass goes on
          with: x itself to observe, another tensor to intervene. Pass.wants says which nodes a hook wants.
    """

    def __init__(self, config: "Config"):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(drawn(1.0, c.n_vocab, c.d_model), freeze=False)
        positions = None if c.rotary else drawn(1.0, c.n_ctx, c.d_model)
        self.embed_positions = None if c.rotary else nn.Embedding.from_pretrained(positions, freeze=False)
        self.blocks = nn.ModuleList(BLOCKS.get(c.family, Block)(c, layer) for layer in range(c.n_layers))
        self.ln_f = Norm(c)
        self.unembed_tokens = None if c.tied else Linear(c.d_model, c.n_vocab, bias=False)
        self.nodes = self.blocks[0].nodes  # their names, in the order in which a hook sees them

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

    def block(self, layer: int, x: Tensor, lrp: LRP = False, hook: Hook | None = None, start=0, last=False) -> Tensor:
        """One block on the stream x [batch, pos, d_model]; with it a run can be resumed in the middle.

        start  x holds the positions from `start` on. At "k" and "v" the hook gets the keys and values of these, and
               must return them with those of the positions 0 to start - 1 in front.
        last   return the last position only, [batch, 1, d_model]; keys and values are still of all positions.
        """
        return self.blocks[layer](x, Pass(self.rules(lrp), hook, layer, start, last))

    def unembed(self, x: Tensor, lrp: LRP = False, columns: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] of the stream x [..., d_model]; if `columns` are given, of these token ids only."""
        p = Pass(self.rules(lrp))
        weight = self.embed_tokens.weight if self.config.tied else self.unembed_tokens.weight
        if columns is not None:
            self.check_ids(columns)
            weight = weight[columns]
        return softcap(upcast(p.rules.linear(self.ln_f(x, p), weight, None)), self.config.logit_softcap)

    def rules(self, lrp: LRP) -> Rules:
        if isinstance(lrp, Rules):
            return lrp
        if not isinstance(lrp, bool):
            raise ValueError(f"lrp must be True (the paper's rules), False (none) or Rules(...), got {lrp!r}")
        return TABLE_4[self.config.family] if lrp else Rules()


# ---------------------------------------------------------------------------------------------------------------------
# The method ends here; the rest loads Hugging Face checkpoints. First config.json: a function per family takes out the
# fields that it knows, or transformers' defaults. What is left over is refused: ignored, it could change a number.


@dataclass(frozen=True)
class Config:  # what a Transformer is built from, the same fields for every family
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
    tied: bool
    attn_scale: float
    windows: tuple[int | None, ...]  # per layer: how many positions attention looks back, itself included
    rotary: tuple[Rotary, ...] = ()  # per layer; without any, positions are embedded
    layer_norm: bool = False  # else RMSNorm
    norm_offset: float = 0.0
    parallel: bool = False
    post_norm: bool = False
    gated: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None

    @staticmethod
    def from_hf(hf: dict) -> "Config":
        """From the content of a config.json, as transformers 4 or 5 writes it. ValueError if it is not one of ours."""
        family, rest = hf.get("model_type"), dict(hf)
        of = f"config.json of a {family} model"
        check_known("model_type", family, FAMILIES)
        try:
            config = FAMILIES[family][0](rest)
        except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{of} lacks a field, or has one of a wrong type: {error!r}") from None
        refuse_rest(of, rest)
        check_known("activation", config.act, PHI)
        for name, value in vars(config).items():
            hint = Config.__annotations__.get(name)
            if not isinstance(value, KINDS.get(hint, object)) or (hint is int and value < 1):
                raise ValueError(f"{of} gives {name} = {value!r:.80}")
        return config


KINDS = {int: int, bool: bool, float: int | float, float | None: int | float | None}
HARMLESS = re.compile(  # fields that change no number: names, tokens, training, how transformers computes
    r"_?name_or_path|model_type|architectures|auto_map|transformers.*|(torch_)?dtype|.*_token_(id|index)|.*cache.*|.*_tp"
    r"|initializer_range|.*dropout.*|.*_pdrop|summary_.*|task_.*|return_dict|id2label|label2id|n_ctx|is_llama_config"
    r"|tokenizer_class|reorder_and_upcast_attn"
)


def refuse_rest(of: str, fields: dict) -> None:
    """ValueError if one of these fields, which nobody has read, could change a number."""
    for name, value in fields.items():
        harmless = value if name == "is_causal" else not value or HARMLESS.fullmatch(name)
        if not harmless:
            raise ValueError(f"{of} gives {name} = {value!r:.80}, which is not supported")


def check_known(what: str, name: object, table: dict) -> None:
    if not isinstance(name, str) or name not in table:
        more = "" if "qwen3" in FAMILIES else "; import support.families for more"
        raise ValueError(f"{what} {name!r:.80} is not supported: this project knows {', '.join(table)}{more}")


def gpt2_config(hf: dict) -> Config:
    layers, d, heads = hf.pop("n_layer"), hf.pop("n_embd"), hf.pop("n_head")
    return Config(
        family="gpt2", n_layers=layers, d_model=d, n_heads=heads, n_kv_heads=heads, d_head=d // heads,
        d_mlp=hf.pop("n_inner", None) or 4 * d, n_vocab=hf.pop("vocab_size"), n_ctx=hf.pop("n_positions"),
        eps=hf.pop("layer_norm_epsilon", 1e-5), act=hf.pop("activation_function", "gelu_new"),
        tied=hf.pop("tie_word_embeddings", True), windows=(None,) * layers, layer_norm=True, qkv_bias=True,
        attn_scale=(d // heads) ** -0.5 if hf.pop("scale_attn_weights", True) else 1.0, out_bias=True, mlp_bias=True,
    )  # fmt: skip


def llama_like(
    hf: dict, family: str, n_ctx=2048, d_head=0, kv_heads=0, theta=1e4, fraction=1.0, window=None, full=None, **own
) -> Config:
    """Llama, with defaults that differ, and with the fields of Config in which another family is not like it."""
    layers, d, heads = hf.pop("num_hidden_layers"), hf.pop("hidden_size"), hf.pop("num_attention_heads")
    d_head = hf.pop("head_dim", d_head or None)
    d_head = d // heads if d_head is None else d_head
    config = dict(
        family=family, n_layers=layers, d_model=d, n_heads=heads, d_head=d_head, attn_scale=d_head**-0.5, gated=True,
        windows=windows_of(hf, layers, window, full),
        rotary=(rotary_of(hf, d_head, theta, fraction),) * layers, n_ctx=hf.pop("max_position_embeddings", n_ctx),
        n_kv_heads=hf.pop("num_key_value_heads", kv_heads) or heads, d_mlp=hf.pop("intermediate_size"),
        n_vocab=hf.pop("vocab_size"), tied=hf.pop("tie_word_embeddings", False),
        eps=hf.pop("rms_norm_eps", 1e-6), act=hf.pop("hidden_act", "silu"),
    )  # fmt: skip
    return Config(**config | own)


def gpt_neox_config(hf: dict) -> Config:
    bias = hf.pop("attention_bias", True)
    return llama_like(
        hf, "gpt_neox", theta=hf.pop("rotary_emb_base", 1e4), fraction=hf.pop("rotary_pct", 0.25), gated=False,
        eps=hf.pop("layer_norm_eps", 1e-5), act=hf.pop("hidden_act", "gelu"), layer_norm=True,
        parallel=hf.pop("use_parallel_residual", True), qkv_bias=bias, out_bias=bias, mlp_bias=True,
    )  # fmt: skip


def llama_config(hf: dict) -> Config:
    bias = hf.pop("attention_bias", False)
    return llama_like(hf, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=hf.pop("mlp_bias", False))


def qwen2_config(hf: dict) -> Config:
    window, first = hf.pop("sliding_window", 4096), hf.pop("max_window_layers", 28)
    window = window if hf.pop("use_sliding_window", False) else None
    slides = {"window": window, "full": lambda layer: layer < first}
    return llama_like(hf, "qwen2", n_ctx=32768, kv_heads=32, qkv_bias=True, **slides)


def gemma2_config(hf: dict) -> Config:
    window, bias = hf.pop("sliding_window", 4096), hf.pop("attention_bias", False)
    return llama_like(
        hf, "gemma2", n_ctx=8192, d_head=256, kv_heads=4, window=window, full=lambda layer: layer % 2 == 1,
        qkv_bias=bias, out_bias=bias, post_norm=True, norm_offset=1.0, embed_scale=hf["hidden_size"] ** 0.5,
        act=hf.pop("hidden_activation", "gelu_pytorch_tanh"), tied=hf.pop("tie_word_embeddings", True),
        attn_scale=hf.pop("query_pre_attn_scalar", 256) ** -0.5, attn_softcap=hf.pop("attn_logit_softcapping", 50.0),
        logit_softcap=hf.pop("final_logit_softcapping", 30.0),
    )  # fmt: skip


def windows_of(hf: dict, layers: int, window: int | None, full: Callable | None) -> tuple[int | None, ...]:
    """Each layer's window: as layer_types says, or else in all layers that are not full."""
    kinds = {"full_attention": None, "sliding_attention": window}
    default = ["sliding_attention" if full and not full(layer) else "full_attention" for layer in range(layers)]
    types = hf.pop("layer_types", None) or default
    if window is not None and window < 1:
        raise ValueError(f"config.json gives sliding_window = {window}")
    return tuple(kinds[one] for one in types)


def rotary_of(hf: dict, d_head: int, theta: float, fraction: float) -> Rotary:
    """transformers 5 writes rope_parameters; 4 rope_theta, and rope_scaling where the rotation is stretched."""
    scaling, parameters = hf.pop("rope_scaling", None), hf.pop("rope_parameters", None)
    rope = {"rope_theta": hf.pop("rope_theta", theta), "partial_rotary_factor": fraction}
    rope |= scaling or parameters or {}
    theta, dim = rope.pop("rope_theta"), int(d_head * rope.pop("partial_rotary_factor"))
    freqs = [theta ** (-i / dim) for i in range(0, dim, 2)]
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    check_known("rope_type", kind, ROPES)
    rotary = ROPES[kind](freqs, theta, rope, hf)
    refuse_rest("rope_parameters in config.json", rope)
    return rotary


ROPES = {"default": lambda freqs, *_: Rotary(tuple(freqs))}  # support/families.py has more


# ---------------------------------------------------------------------------------------------------------------------
# Names and weights. Our modules, and theirs without the model's prefix; a name that begins with a dot is in each layer.

NAMES = """
ours             gpt2          gpt_neox                    llama                      gemma2
embed_tokens     wte           embed_in                    embed_tokens               embed_tokens
embed_positions  wpe           -                           -                          -
.ln1             .ln_1         .input_layernorm            .input_layernorm           .input_layernorm
.attn.q          .attn.c_attn  .attention.query_key_value  .self_attn.q_proj          .self_attn.q_proj
.attn.k          .attn.c_attn  .attention.query_key_value  .self_attn.k_proj          .self_attn.k_proj
.attn.v          .attn.c_attn  .attention.query_key_value  .self_attn.v_proj          .self_attn.v_proj
.attn.o          .attn.c_proj  .attention.dense            .self_attn.o_proj          .self_attn.o_proj
.post1           -             -                           -                          .post_attention_layernorm
.ln2             .ln_2         .post_attention_layernorm   .post_attention_layernorm  .pre_feedforward_layernorm
.mlp.gate        -             -                           .mlp.gate_proj             .mlp.gate_proj
.mlp.up          .mlp.c_fc     .mlp.dense_h_to_4h          .mlp.up_proj               .mlp.up_proj
.mlp.down        .mlp.c_proj   .mlp.dense_4h_to_h          .mlp.down_proj             .mlp.down_proj
.post2           -             -                           -                          .post_feedforward_layernorm
ln_f             ln_f          final_layer_norm            norm                       norm
unembed_tokens   lm_head       embed_out                   lm_head                    lm_head
"""
TABLE = [line.split() for line in NAMES.strip().splitlines()]
COLUMNS = {family: {} for family in TABLE[0][1:]}  # {family: {their module: ours, one or several}}
for ours, *row in TABLE[1:]:
    for family, theirs in zip(COLUMNS, row):
        COLUMNS[family].setdefault(theirs, []).append(ours)
COLUMNS["gpt_neox"]["lm_head"] = ["unembed_tokens"]  # its name in memory
FAMILIES = {  # model_type in config.json: (how it is read, names)
    "gpt2": (gpt2_config, COLUMNS["gpt2"]),
    "gpt_neox": (gpt_neox_config, COLUMNS["gpt_neox"]),
    "qwen2": (qwen2_config, COLUMNS["llama"]),
    "gemma2": (gemma2_config, COLUMNS["gemma2"]),
    "llama": (llama_config, COLUMNS["llama"]),
}
BLOCKS, TIDY = {}, {}  # {family: a subclass of Block, or what is done to its tensors first}, where they differ
READERS = {}  # {the end of a file's name: a function like read_checkpoint()}: support/gguf.py has one
PREFIX = re.compile(r"^((transformer|gpt_neox|model|language_model|_orig_mod)\.)+")  # of the whole model's names
NOT_OURS = re.compile(r"\batt(n|ention)\.(masked_)?bias$|rotary_emb\.inv_freq$")  # buffers of old checkpoints


def renamed(tensors: dict[str, Tensor], c: Config) -> dict[str, Tensor]:
    """The same tensors under our names; what is none of ours keeps its own."""
    names, result = FAMILIES[c.family][1], {}
    for theirs, x in tensors.items():
        module, _, kind = PREFIX.sub("", theirs).rpartition(".")
        in_layer = re.fullmatch(r"(?:h|layers)\.(\d+)(\..+)", module)
        layer, module = in_layer.groups() if in_layer else (None, module)
        if module in names:
            pieces = split(x, len(names[module]), c) if in_layer else [x]
            for ours, piece in zip(names[module], pieces):
                result[f"blocks.{layer}{ours}.{kind}" if in_layer else f"{ours}.{kind}"] = piece
        elif not NOT_OURS.search(theirs):
            result[theirs] = x
    return result


def split(x: Tensor, n: int, c: Config) -> tuple[Tensor, ...]:
    """The tensors of n of our modules, which are one in a layer of a checkpoint: of q, k, v, or of gate and up."""
    if c.family == "gpt_neox" and n == 3:  # those of each head stand together: [head * (q, k, v) * d_head, ...]
        return x.unflatten(0, (c.n_heads, n, c.d_head)).transpose(0, 1).flatten(1, 2).unbind(0)
    x = x.t() if c.family == "gpt2" else x  # its weights are [d_in, d_out]
    return x.split([heads * c.d_head for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads)]) if n == 3 else x.chunk(n)


SHORT_NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
SHORT_NAMES |= {name: f"EleutherAI/{name}" for name in ("pythia-70m", "pythia-70m-deduped", "pythia-410m")}
SHORT_NAMES |= {"qwen2-0.5b": "Qwen/Qwen2-0.5B", "qwen2-7b": "Qwen/Qwen2-7B", "gemma2-2b": "google/gemma-2-2b"}
TOYS = sorted(Path(__file__).parent.glob("toy/*/config.json"))  # beside this file; a copy of it elsewhere has none
SHORT_NAMES |= {f"toy-{config.parent.name}": str(config.parent) for config in TOYS}


def from_pretrained(name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Transformer:
    """A model from a short name (SHORT_NAMES), a Hub repository "owner/name" or "owner/name@revision", or a directory.

    Its weights need no gradient and keep the checkpoint's values: nothing is folded or centred. ValueError, in one
    line, for what cannot be downloaded, a family that is not ours, a corrupt file, and weights that do not fit.
    """
    hf, tensors = READERS.get(Path(SHORT_NAMES.get(name, name)).suffix, read_checkpoint)(name)
    return filled(Config.from_hf(hf), tensors, dtype, device)


def from_transformers(hf_model: nn.Module) -> Transformer:
    """Our copy of a model of Hugging Face transformers that is in memory. No file is read; errors as above."""
    some = next(hf_model.parameters())
    return filled(Config.from_hf(hf_model.config.to_dict()), hf_model.state_dict(), some.dtype, some.device)


def filled(c: Config, tensors: dict[str, Tensor], dtype: torch.dtype, device) -> Transformer:
    """A model with a checkpoint's tensors."""
    try:
        values = renamed(TIDY.get(c.family, dict)(tensors), c)
        if c.tied and (head := values.pop("unembed_tokens.weight", None)) is not None:
            c = replace(c, tied=torch.equal(head, values["embed_tokens.weight"]))
            values |= {} if c.tied else {"unembed_tokens.weight": head}  # one of its own is used, as in transformers
        for name, x in values.items():
            if not x.is_floating_point():
                raise ValueError(f"{name} holds no floating-point numbers: quantized checkpoints are not supported")
            values[name] = torch.empty(x.shape, dtype=dtype, device=device).copy_(x)
        with torch.device("meta"):
            model = Transformer(c)
        model.load_state_dict(values, assign=True)
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the weights do not fit config.json: {' '.join(str(error).split())}") from None
    return model.requires_grad_(False).eval()


def folder_of(name: str) -> Path:
    """The directory of a checkpoint. If the name is that of a repository, its files are downloaded first."""
    source = SHORT_NAMES.get(name, name)
    if os.path.isdir(source):  # False, and no error, for an impossible name
        return Path(source)
    source, _, revision = source.partition("@")
    source = SHORT_NAMES.get(source, source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        known = ", ".join(difflib.get_close_matches(name, SHORT_NAMES, 4, 0.5) or SHORT_NAMES)
        raise ValueError(f"unknown model {name!r:.80}: give one of {known}, a Hub repository, or a directory")
    from huggingface_hub import snapshot_download

    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            wanted = ["config.json", "tokenizer*.json", "vocab.json", "merges.txt", weights]
            folder = Path(snapshot_download(source, revision=revision or None, allow_patterns=wanted))
            if any(folder.glob(weights)):
                break
    except Exception as error:  # each kind of failure has an error of its own, which says what to do
        raise ValueError(f"{source} cannot be downloaded: {' '.join(str(error).split())}") from None
    return folder


def read_checkpoint(name: str) -> tuple[dict, dict[str, Tensor]]:
    """config.json and all tensors; safetensors are mapped, not read. A pickle's code is never run."""
    from safetensors.torch import load_file

    folder = folder_of(name)
    hf = read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():  # transformers would add the adapter
        raise ValueError(f"{folder} has an adapter (LoRA): merge it into the weights first")
    names = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
    files, tensors = next((files for name in names if (files := sorted(folder.glob(name)))), []), {}
    if not files:
        raise ValueError(f"{folder} has no weights: {', '.join(names)}")
    for file in files:
        try:
            found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
            tensors = dict(**tensors, **found)  # TypeError if two files have the same tensor
        except Exception as error:  # damaged files can run into anything
            raise ValueError(f"{file} is corrupt, cut off, or holds more than tensors: {first_line(error)}") from None
    return hf, tensors


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError if it is not one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
