"""More families, made of the pieces of models.py: Qwen3, Gemma 3, Mistral, OLMo 2 and 3, Phi-3.

When this file is imported, the tables of models.py know these families too. What is new in their data flow:

    Qwen3     q = rotate(norm of each head(W_q ln1(x)))    x + attn,         then x + mlp(ln2(x))
    Gemma 3   the same                                     x + post(attn),   then x + post(mlp(ln2(x)))
    OLMo      q = rotate(norm(W_q x))                      x + post(attn),   then x + post(mlp(x))

and k like q. In Gemma 3 and OLMo 3, layers with a window rotate differently from those without. Mistral and Phi-3 are
Llama with a window in every layer. Llama 3, SmolLM2 and Qwen2.5 are Llama and Qwen2: here they have short names only.

Their rules are ours: the paper has none of them. The LN-rule is on for every RMSNorm, also those on queries and keys;
toy/README.md has the figures behind that.
"""

import math
import re
from dataclasses import replace
from functools import partial

from torch import Tensor

from models import (
    BLOCKS,
    COLUMNS,
    FAMILIES,
    ROPES,
    SHORT_NAMES,
    TABLE_4,
    TIDY,
    Attention,
    Block,
    Config,
    Norm,
    Pass,
    Rotary,
    Rules,
    gemma2_config,
    llama_like,
    rotary_of,
)

# ---------------------------------------------------------------------------------------------------------------------
# Data flow


class QueryKeyNorm(Norm):
    """A norm on queries or keys. Rules of one's own that have an attribute `qk` have these rules here."""

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        return super().forward(x, replace(p, rules=getattr(p.rules, "qk", p.rules)))


class HeadNorm(QueryKeyNorm):
    """The RMSNorm of each head of x [b, t, h * d_head] by itself; the heads share one weight [d_head]."""

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, len(self.weight))), p).flatten(-2)


class NormedAttention(Attention):
    """Queries and keys are normed before they are rotated: in Qwen3 and Gemma 3, each head by itself."""

    def __init__(self, c: Config, layer: int):
        super().__init__(c, layer)
        self.q_norm, self.k_norm = HeadNorm(c, c.d_head), HeadNorm(c, c.d_head)


class OlmoAttention(Attention):
    """All heads are normed as one vector."""

    def __init__(self, c: Config, layer: int):
        super().__init__(c, layer)
        self.q_norm, self.k_norm = QueryKeyNorm(c, c.n_heads * c.d_head), QueryKeyNorm(c, c.n_kv_heads * c.d_head)


class OlmoBlock(Block):
    """The stream is normed after attention and MLP, and not before."""

    def __init__(self, c: Config, layer: int):
        super().__init__(c, layer, OlmoAttention)
        self.ln1 = self.ln2 = None


NORMED = partial(Block, attention=NormedAttention)
BLOCKS |= {"qwen3": NORMED, "gemma3_text": NORMED, "olmo2": OlmoBlock, "olmo3": OlmoBlock}


# ---------------------------------------------------------------------------------------------------------------------
# How rotation is stretched to long contexts: functions of the frequencies, their base theta, the fields of
# rope_parameters, from which each takes out what it reads, and those of config.json.


def linear(freqs: list[float], theta: float, rope: dict, hf: dict) -> Rotary:
    factor = rope.pop("factor")
    return Rotary(tuple(f / factor for f in freqs))


def llama3(freqs: list[float], theta: float, rope: dict, hf: dict) -> Rotary:
    """Low frequencies are slowed by `factor`, high ones kept, those between blended."""
    low, high, factor = rope.pop("low_freq_factor"), rope.pop("high_freq_factor"), rope.pop("factor")
    context = original_context(rope, hf)
    keep = [min(max((context * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0) for f in freqs]
    return Rotary(tuple(k * f + (1 - k) * f / factor for f, k in zip(freqs, keep)))


def yarn(freqs: list[float], theta: float, rope: dict, hf: dict) -> Rotary:
    """Frequencies that turn less than beta_slow times in the original context are slowed by `factor`; those that turn
    more than beta_fast times are kept; between, blended. Queries and keys grow by a scale. (arXiv 2309.00071)
    """
    n, context, factor = len(freqs), original_context(rope, hf), rope.pop("factor")

    def index(turns: float) -> float:
        """Where among the frequencies the one is, or would be, that makes so many turns in the original context."""
        return n * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = index(rope.pop("beta_fast", None) or 32), index(rope.pop("beta_slow", None) or 1)
    if rope.pop("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n - 1)
    slowed = [min(max((i - first) / (last - first or 0.001), 0.0), 1.0) for i in range(n)]
    scale = rope.pop("attention_factor", None) or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    return Rotary(tuple((1 - s) * f + s * f / factor for f, s in zip(freqs, slowed)), float(scale))


def longrope(freqs: list[float], theta: float, rope: dict, hf: dict) -> Rotary:
    """Phi-3's frequencies for prompts up to the original context, each divided by a factor of its own.

    Longer prompts would take others for all positions; phi3_config() leaves them out. (arXiv 2402.13753)
    """
    factors, context = rope.pop("short_factor"), original_context(rope, hf)
    rope.pop("long_factor", None)
    if len(factors) != len(freqs):
        raise ValueError(f"short_factor in config.json has {len(factors)} numbers for {len(freqs)} frequencies")
    stretch = rope.pop("factor", None) or hf["max_position_embeddings"] / context
    scale = rope.pop("attention_factor", None) or math.sqrt(1 + max(0.0, math.log(stretch)) / math.log(context))
    return Rotary(tuple(f / factor for f, factor in zip(freqs, factors)), float(scale))


def original_context(rope: dict, hf: dict) -> int:
    """How many positions the model was first trained with. What stands outside of the rope's fields wins."""
    inner = rope.pop("original_max_position_embeddings", None)
    context = hf.get("original_max_position_embeddings") or inner or hf["max_position_embeddings"]
    if context < 2:
        raise ValueError(f"config.json gives original_max_position_embeddings = {context}")
    return context


ROPES |= {"linear": linear, "llama3": llama3, "yarn": yarn, "longrope": longrope, "su": longrope}


def ropes_by_type(hf: dict) -> dict:
    """What config.json says of each type of layer. transformers 4 stretches those without a window only."""
    given, scaling = hf.pop("rope_parameters", None) or {}, hf.pop("rope_scaling", None)
    flat = {} if given.keys() & {"full_attention", "sliding_attention"} else given
    full = {**flat, **(given.get("full_attention") or {}), **(scaling or {})}
    return {"full": full, "sliding": {} if flat else given.get("sliding_attention") or {}}


def rotated_by_type(c: Config, hf: dict, ropes: dict, theta: float, local_theta: float) -> Config:
    full, sliding = (
        {"rope_parameters": rope, "max_position_embeddings": hf.get("max_position_embeddings", 2048)}
        for rope in (ropes["full"], ropes["sliding"])
    )
    full, sliding = rotary_of(full, c.d_head, theta, 1.0), rotary_of(sliding, c.d_head, local_theta, 1.0)
    return replace(c, rotary=tuple(full if window is None else sliding for window in c.windows))


def text_of(hf: dict) -> dict:
    """The configuration of the text part of a model that also sees; nothing else of it is read."""
    text = dict(hf["text_config"])
    hf.clear()
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Configurations and names. Defaults are those of transformers.


def qwen3_config(hf: dict, family: str = "qwen3", d_head: int = 128, kv_heads: int = 32) -> Config:
    bias, first = hf.pop("attention_bias", False), hf.pop("max_window_layers", 28)
    window, slides = hf.pop("sliding_window", 4096), hf.pop("use_sliding_window", False)
    return llama_like(
        hf, family, n_ctx=32768, d_head=d_head, kv_heads=kv_heads, window=window if slides else None,
        full=lambda layer: layer < first, qkv_bias=bias, out_bias=bias,
    )  # fmt: skip


def mistral_config(hf: dict) -> Config:
    """Llama with a window in every layer."""
    return llama_like(hf, "mistral", kv_heads=8, window=hf.pop("sliding_window", 4096), full=lambda layer: False)


def phi3_config(hf: dict) -> Config:
    n_ctx = hf.get("original_max_position_embeddings", 4096)
    config = llama_like(
        hf, "phi3", window=hf.pop("sliding_window", None), full=lambda layer: False,
        fraction=hf.pop("partial_rotary_factor", 1.0), eps=hf.pop("rms_norm_eps", 1e-5),
    )  # fmt: skip
    hf.pop("original_max_position_embeddings", None)
    return replace(config, n_ctx=n_ctx)


def gemma3_config(hf: dict) -> Config:
    hf |= {**GEMMA3_DEFAULTS, **hf}
    whole = dict(hf)
    every = hf.pop("sliding_window_pattern", hf.pop("_sliding_window_pattern", 6))
    bidirectional = hf.pop("use_bidirectional_attention", None)
    if bidirectional or hf.pop("attn_logit_softcapping", None):
        raise ValueError("gemma3_text with use_bidirectional_attention or attn_logit_softcapping is not supported")
    hf["layer_types"] = hf.get("layer_types") or [
        "sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(hf["num_hidden_layers"])
    ]
    thetas = hf.pop("rope_theta", 1e6), hf.pop("rope_local_base_freq", 1e4)
    ropes = ropes_by_type(hf)
    hf |= {"attn_logit_softcapping": None, "final_logit_softcapping": hf.get("final_logit_softcapping")}
    config = replace(gemma2_config(hf), family="gemma3_text")
    return rotated_by_type(config, whole, ropes, *thetas)


# Published configurations leave out what has its default
GEMMA3_DEFAULTS = dict(
    vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    max_position_embeddings=131072,
)  # fmt: skip


def olmo2_config(hf: dict, family: str = "olmo2", **windows) -> Config:
    bias, eps = hf.pop("attention_bias", False), hf.pop("rms_norm_eps", 1e-5)
    return llama_like(hf, family, eps=eps, qkv_bias=bias, out_bias=bias, post_norm=True, **windows)


def olmo3_config(hf: dict) -> Config:
    whole = dict(hf)
    theta, ropes, window = hf.pop("rope_theta", 5e5), ropes_by_type(hf), hf.pop("sliding_window", 4096)
    config = olmo2_config(hf, "olmo3", window=window, full=lambda layer: layer % 4 == 3)
    return rotated_by_type(config, whole, ropes, theta, theta)


QK_NORMS = {".self_attn.q_norm": [".attn.q_norm"], ".self_attn.k_norm": [".attn.k_norm"]}
FUSED = {".self_attn.qkv_proj": [".attn.q", ".attn.k", ".attn.v"], ".mlp.gate_up_proj": [".mlp.gate", ".mlp.up"]}
LLAMA, GEMMA = COLUMNS["llama"], COLUMNS["gemma2"]
FAMILIES |= {
    "qwen3": (qwen3_config, LLAMA | QK_NORMS),
    "gemma3_text": (gemma3_config, GEMMA | QK_NORMS),
    "gemma3": (lambda hf: Config.from_hf({"model_type": "gemma3_text"} | text_of(hf)), {}),  # it also sees
    "mistral": (mistral_config, LLAMA),
    "olmo2": (olmo2_config, GEMMA | QK_NORMS),
    "olmo3": (olmo3_config, GEMMA | QK_NORMS),
    "phi3": (phi3_config, LLAMA | FUSED),
}
VISION = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")  # of a Gemma 3 that also sees
TIDY["gemma3_text"] = lambda tensors: {name: x for name, x in tensors.items() if not VISION.search(name)}
TABLE_4 |= dict.fromkeys(
    ("qwen3", "gemma3_text", "mistral", "olmo2", "olmo3", "phi3"), Rules(ln=True, identity=True, half=True)
)
SHORT_NAMES |= {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma3-270m": "google/gemma-3-270m",
    "gemma3-1b": "google/gemma-3-1b-pt",
    "gemma3-4b": "google/gemma-3-4b-pt",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "olmo2-1b": "allenai/OLMo-2-0425-1B",
    "olmo2-7b": "allenai/OLMo-2-1124-7B",
    "olmo3-7b": "allenai/Olmo-3-1025-7B",
    "phi3-mini": "microsoft/Phi-3-mini-4k-instruct",
}
