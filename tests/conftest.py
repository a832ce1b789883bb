"""Tiny random checkpoints of every family, made with transformers and written to disk as a user's would be."""

import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads would only get in each other's way
sys.path.insert(0, str(Path(__file__).parents[1]))
from support import results, statistics  # noqa: E402

# What takes long and is not what most tests are about: those of intervals ask for as many resamples as they need.
statistics.resamples.__defaults__ = (100, 0)  # B, seed
results.save_figure.__defaults__ = (50,)  # dpi


def pytest_configure(config):
    config.addinivalue_line("markers", "hub: needs the Hugging Face Hub; skipped unless RELP_HUB=1")


VOCAB = 97
LLAMA = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
NEOX = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=5e4, factor=8.0, original_max_position_embeddings=16)

CHECKPOINTS = {  # name: (class of transformers' configuration, its fields)
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-gelu-inner": ("GPT2Config", {**GPT2, "activation_function": "gelu", "n_inner": 40}),
    "gpt2-untied": ("GPT2Config", {**GPT2, "tie_word_embeddings": False}),
    "neox": ("GPTNeoXConfig", NEOX),
    "neox-sequential": ("GPTNeoXConfig", {
        **NEOX, "use_parallel_residual": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
    }),
    "neox-tied-half-rotary": ("GPTNeoXConfig", {
        **NEOX, "tie_word_embeddings": True, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen2-mha-tied-window": ("Qwen2Config", {
        **LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    }),
    "gemma2": ("Gemma2Config", {
        **LLAMA, "head_dim": 12, "query_pre_attn_scalar": 7, "sliding_window": 4,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    }),
    "gemma2-mha-no-caps": ("Gemma2Config", {
        **LLAMA, "num_key_value_heads": 4, "head_dim": 8, "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": None, "final_logit_softcapping": None,
    }),
    "llama": ("LlamaConfig", LLAMA),
    "llama3": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True, "head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "llama-biased": ("LlamaConfig", {**LLAMA, "attention_bias": True, "mlp_bias": True}),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 12}),
    "qwen3-biased-window-yarn": ("Qwen3Config", {
        **LLAMA, "head_dim": 8, "attention_bias": True, "rope_parameters": {**YARN, "attention_factor": 1.3},
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    }),
    "gemma3": ("Gemma3TextConfig", {
        **LLAMA, "head_dim": 12, "query_pre_attn_scalar": 7, "sliding_window": 4, "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    }),
    "mistral": ("MistralConfig", {**LLAMA, "head_dim": 12, "sliding_window": 4}),
    "olmo2": ("Olmo2Config", {**LLAMA, "num_key_value_heads": 4, "attention_bias": True}),
    "olmo3": ("Olmo3Config", {
        **LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
        },
    }),
    "qwen3-moe": ("Qwen3MoeConfig", {
        **LLAMA, "head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 10,
        "mlp_only_layers": [1],
    }),
    "qwen3-moe-normed": ("Qwen3MoeConfig", {
        **LLAMA, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 10,
        "norm_topk_prob": True, "decoder_sparse_step": 2, "tie_word_embeddings": True, "use_sliding_window": True,
        "sliding_window": 4,
    }),
    "phi3": ("Phi3Config", {**LLAMA, "sliding_window": 4, "original_max_position_embeddings": 64}),
    "phi3-long": ("Phi3Config", {
        **LLAMA, "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 4.0], "long_factor": [1.0, 9.0, 30.0],
        },
    }),
}  # fmt: skip
FAMILIES = ["gpt2", "neox", "neox-sequential", "qwen2", "gemma2", "llama"]  # one checkpoint for each data flow
NEWER = ["qwen3", "gemma3", "olmo3", "qwen3-moe"]  # and for each one of support/families.py


def hf_model(name: str, **changes):
    """transformers' model with random weights, large enough that activations and softmax are far from linear."""
    import transformers

    kind, fields = CHECKPOINTS[name]
    config = getattr(transformers, kind)(**{**fields, **changes})
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.normal_(std=0.3 if p.ndim > 1 else 0.2)
            scale_of_norm = p.ndim == 1 and n.endswith("weight") and ("norm" in n or "ln_" in n)
            if scale_of_norm and "gemma" not in name:  # Gemma adds the 1 itself
                p.add_(1)
    return model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> (directory in Hugging Face layout, transformers' model), each made once."""
    made = {}

    def make(name):
        if name not in made:
            model, path = hf_model(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            made[name] = path, model
        return made[name]

    return make


@pytest.fixture
def tokens():
    return torch.randint(2, VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair():
    """original, patch [4, 9] and answers [4, 2]; one token differs in all pairs, a second one in two of them."""
    g = torch.Generator().manual_seed(2)
    original, answers = torch.randint(VOCAB, (4, 9), generator=g), torch.randint(VOCAB, (4, 2), generator=g)
    patch = original.clone()
    patch[:, 3] = (patch[:, 3] + 5) % VOCAB
    patch[:2, 6] = (patch[:2, 6] + 7) % VOCAB
    return original, patch, answers
