"""More families, made of the pieces of models.py: Qwen3, Gemma 3, Mistral, OLMo 2 and 3, Phi-3.

If this file exists, models.py imports it, and its tables then know these families too. What is new in their data flow:

    Qwen3     q = rotate(norm of each head(W_q ln1(x)))    x + attn,         then x + mlp(ln2(x))
    Gemma 3   the same                                     x + post(attn),   then x + post(mlp(ln2(x)))
    OLMo      q = rotate(norm(W_q x))                      x + post(attn),   then x + post(mlp(x))

and k like q. In Gemma 3 and OLMo 3, layers with a window rotate differently from those without. Mistral and Phi-3 are
Llama with a window in every layer. Llama 3, SmolLM2 and Qwen2.5 are Llama and Qwen2: here they have short names only.

Their rules are ours: the paper has none of them. The LN-rule is on for every RMSNorm, also those on queries and keys;
toy/README.md has the figures behind that.
"""

import math

from torch import Tensor, nn

from models import (
    AS_IT_IS,
    BLOCKS,
    FAMILIES,
    GEMMA2_NAMES,
    LLAMA_NAMES,
    QKV,
    ROPES,
    SHORT_NAMES,
    TABLE_4,
    Attention,
    Config,
    FixUp,
    RMSNorm,
    Rotary,
    Rules,
    SandwichBlock,
    SequentialBlock,
    gemma2_config,
    is_size,
    layer_types,
    llama_config,
    quote,
    qwen2_config,
)

# ---------------------------------------------------------------------------------------------------------------------
# Data flow


class HeadNorm(RMSNorm):
    """The RMSNorm of each head of x [b, t, h * d_head] by itself; the heads share one weight [d_head]."""

    def forward(self, x: Tensor, rules: Rules) -> Tensor:
        return super().forward(x.unflatten(-1, (-1, len(self.weight))), rules).flatten(-2)


class NormedAttention(Attention):
    """Queries and keys are normed before they are rotated: in Qwen3 and Gemma 3, each head by itself."""

    def __init__(self, c: Config, layer: int):
        super().__init__(c, layer)
        self.q_norm, self.k_norm = self.norm(c, c.n_heads), self.norm(c, c.n_kv_heads)

    def norm(self, c: Config, n_heads: int) -> RMSNorm:
        return HeadNorm(c, c.d_head)

    def project(self, name: str, x: Tensor, rules: Rules) -> Tensor:
        y = super().project(name, x, rules)
        return y if name == "v" else getattr(self, f"{name}_norm")(y, rules)


class OlmoAttention(NormedAttention):
    """All heads are normed as one vector."""

    def norm(self, c: Config, n_heads: int) -> RMSNorm:
        return RMSNorm(c, n_heads * c.d_head)


class Qwen3Block(SequentialBlock):
    attention = NormedAttention


class Gemma3Block(SandwichBlock):
    attention = NormedAttention


class OlmoBlock(SandwichBlock):
    """The stream is normed after attention and MLP, and not before."""

    attention = OlmoAttention

    def __init__(self, c: Config, layer: int):
        super().__init__(c, layer)
        self.ln1 = self.ln2 = NoNorm()


class NoNorm(nn.Module):
    def forward(self, x: Tensor, rules: Rules) -> Tensor:
        return x


BLOCKS |= {"qwen3": Qwen3Block, "gemma3": Gemma3Block, "olmo": OlmoBlock}


# ---------------------------------------------------------------------------------------------------------------------
# How rotation is stretched to long contexts


def yarn(freqs: list[float], rope: dict) -> Rotary:
    """Frequencies that turn less than beta_slow times in the original context are slowed by `factor`; those that turn
    more than beta_fast times are kept; between, blended. Queries and keys grow by a scale. (arXiv 2309.00071)
    """
    n, context, factor = len(freqs), original_context(rope), rope["factor"]
    theta = rope.get("rope_theta") or 10000.0

    def index(turns: float) -> float:
        """Where among the frequencies the one is, or would be, that makes so many turns in the original context."""
        return n * math.log(context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = index(rope.get("beta_fast") or 32), index(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * n - 1)
    slowed = [min(max((i - first) / (last - first or 0.001), 0.0), 1.0) for i in range(n)]
    scale = rope.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        raise ValueError("rope_type yarn with mscale_all_dim is not supported")
    return Rotary(tuple((1 - s) * f + s * f / factor for f, s in zip(freqs, slowed)), float(scale))


def longrope(freqs: list[float], rope: dict) -> Rotary:
    """Phi-3's frequencies for prompts up to the original context, each divided by a factor of its own.

    Longer prompts would take others for all positions; phi3_config() leaves them out. (arXiv 2402.13753)
    """
    factors, context = rope["short_factor"], original_context(rope)
    if len(factors) != len(freqs):
        raise ValueError(f"short_factor in config.json has {len(factors)} numbers for {len(freqs)} frequencies")
    stretch = rope.get("factor") or rope["max_position_embeddings"] / context
    scale = rope.get("attention_factor") or math.sqrt(1 + max(0.0, math.log(stretch)) / math.log(context))
    return Rotary(tuple(f / factor for f, factor in zip(freqs, factors)), float(scale))


def original_context(rope: dict) -> int:
    """How many positions the model was first trained with."""
    context = rope.get("original_max_position_embeddings") or rope["max_position_embeddings"]
    if not is_size(context) or context < 2:
        raise ValueError(f"config.json gives original_max_position_embeddings = {quote(context)}")
    return context


ROPES |= {"yarn": yarn, "longrope": longrope, "su": longrope}


def ropes_by_type(hf: dict, local_theta: float) -> dict:
    """rope_parameters as transformers 5 writes them for two types of layers; 4 stretches the full layers only."""
    given = hf.get("rope_parameters") or {}
    if given and "full_attention" not in given:
        raise ValueError("rope_parameters in config.json must have full_attention and sliding_attention")
    full = {"rope_theta": hf["rope_theta"], **(hf.get("rope_scaling") or {}), **given.get("full_attention", {})}
    local = {"rope_theta": local_theta, **given.get("sliding_attention", {})}
    return {"full_attention": full, "sliding_attention": local}


# ---------------------------------------------------------------------------------------------------------------------
# Configurations and names. Defaults are those of transformers.


def qwen3_config(hf: dict) -> dict:
    bias = hf.get("attention_bias", False)
    return {**qwen2_config({"head_dim": 128, **hf}), "block": "qwen3", "qkv_bias": bias, "out_bias": bias}


def mistral_config(hf: dict) -> dict:
    """Llama with a window in every layer."""
    hf = {"sliding_window": 4096, "num_key_value_heads": 8, **hf, "attention_bias": False, "mlp_bias": False}
    return llama_config(hf, ["sliding_attention"] * hf["num_hidden_layers"])


def phi3_config(hf: dict) -> dict:
    hf = {"rms_norm_eps": 1e-5, "sliding_window": None, "num_key_value_heads": None, **hf}
    return {**mistral_config(hf), "n_ctx": hf.get("original_max_position_embeddings", 4096)}


def gemma3_config(hf: dict) -> dict:
    hf = {**GEMMA3_DEFAULTS, **hf}
    if hf.get("use_bidirectional_attention"):
        raise ValueError("gemma3_text with use_bidirectional_attention is not supported: attention must be causal")
    every = hf.get("sliding_window_pattern", 6)
    types = layer_types(hf, lambda layer: (layer + 1) % every == 0)
    ropes = ropes_by_type(hf, hf["rope_local_base_freq"])
    return {**gemma2_config({**hf, "layer_types": types, "rope_parameters": ropes}), "block": "gemma3"}


# Published configurations leave out what has its default
GEMMA3_DEFAULTS = dict(
    vocab_size=262208, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=131072, rope_theta=1e6, rope_local_base_freq=1e4,
    attn_logit_softcapping=None, final_logit_softcapping=None,
)  # fmt: skip


def olmo2_config(hf: dict, types: list[str] | None = None) -> dict:
    return {**llama_config({"rms_norm_eps": 1e-5, **hf}, types), "block": "olmo", "mlp_bias": False}


def olmo3_config(hf: dict) -> dict:
    hf = {"sliding_window": 4096, "rope_theta": 5e5, **hf}
    types = layer_types(hf, lambda layer: layer % 4 == 3)
    return olmo2_config({**hf, "rope_parameters": ropes_by_type(hf, hf["rope_theta"])}, types)


def load_stacked(x: Tensor, n: int, c: Config) -> tuple[Tensor, ...]:
    return x.split([heads * c.d_head for heads in (c.n_heads, c.n_kv_heads, c.n_kv_heads)])


NORMS_OF_QK = {
    "model.layers.{}.self_attn.q_norm": "blocks.{}.attn.q_norm",
    "model.layers.{}.self_attn.k_norm": "blocks.{}.attn.k_norm",
}
FUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
PHI3_NAMES = {theirs: ours for theirs, ours in LLAMA_NAMES.items() if not theirs.endswith(FUSED)} | {
    "model.layers.{}.self_attn.qkv_proj": (*QKV, FixUp(load_stacked, AS_IT_IS.save)),
    "model.layers.{}.mlp.gate_up_proj": ("blocks.{}.mlp.gate", "blocks.{}.mlp.up", AS_IT_IS),
}  # fmt: skip
FAMILIES |= {  # OLMo has fewer norms than Gemma: lines for modules that a model does not have stand for nothing
    "qwen3": (qwen3_config, LLAMA_NAMES | NORMS_OF_QK),
    "gemma3_text": (gemma3_config, GEMMA2_NAMES | NORMS_OF_QK),
    "mistral": (mistral_config, LLAMA_NAMES),
    "olmo2": (olmo2_config, GEMMA2_NAMES | NORMS_OF_QK),
    "olmo3": (olmo3_config, GEMMA2_NAMES | NORMS_OF_QK),
    "phi3": (phi3_config, PHI3_NAMES),
}
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
