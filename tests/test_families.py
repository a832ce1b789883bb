"""The newer families: published configurations, how they rotate, models that also see images, what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import LLAMA, YARN
from safetensors.torch import load_file, save_file

import models
from beyond.edges.scores import attribute_edges
from models import Config, Pass, Rules, from_pretrained, from_transformers

# What the Hub has as config.json, without the fields that say nothing of the computation
PUBLISHED = {
    "Qwen/Qwen3-0.6B": dict(
        model_type="qwen3", attention_bias=False, attention_dropout=0.0, head_dim=128, hidden_act="silu",
        hidden_size=1024, intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28,
        num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None,
        rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936,
    ),
    "google/gemma-3-1b-pt": dict(
        model_type="gemma3_text", attention_bias=False, attn_logit_softcapping=None, cache_implementation="hybrid",
        final_logit_softcapping=None, head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152,
        intermediate_size=6912, max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26,
        num_key_value_heads=1, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000,
        rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, vocab_size=262144,
    ),
    "google/gemma-3-4b-pt": dict(
        model_type="gemma3", boi_token_index=255999, mm_tokens_per_image=256, vision_config=dict(
            model_type="siglip_vision_model", hidden_size=1152, num_hidden_layers=27,
        ),
        text_config=dict(
            model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
            rope_scaling=dict(factor=8.0, rope_type="linear"), sliding_window=1024,
        ),
    ),
    "mistralai/Mistral-7B-v0.1": dict(
        model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
        max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False, vocab_size=32000,
    ),
    "mistralai/Mistral-Nemo-Base-2407": dict(
        model_type="mistral", head_dim=128, hidden_act="silu", hidden_size=5120, intermediate_size=14336,
        max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8,
        rms_norm_eps=1e-05, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False, vocab_size=131072,
    ),
    "allenai/OLMo-2-1124-7B": dict(
        model_type="olmo2", attention_bias=False, hidden_act="silu", hidden_size=4096, intermediate_size=11008,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000, tie_word_embeddings=False, vocab_size=100352,
    ),
    "allenai/Olmo-3-1025-7B": dict(
        model_type="olmo3", attention_bias=False, hidden_act="silu", hidden_size=4096, intermediate_size=11008,
        layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8, max_position_embeddings=65536,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-06, rope_theta=500000,
        rope_scaling=dict(
            attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0, factor=8.0,
            original_max_position_embeddings=8192, rope_type="yarn",
        ),
        sliding_window=4096, tie_word_embeddings=False, vocab_size=100278,
    ),
    "meta-llama/Llama-3.2-1B": dict(
        model_type="llama", attention_bias=False, head_dim=64, hidden_act="silu", hidden_size=2048,
        intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
        num_hidden_layers=16, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=500000.0, vocab_size=128256,
        rope_scaling=dict(
            factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
            rope_type="llama3",
        ),
        tie_word_embeddings=True,
    ),
    "HuggingFaceTB/SmolLM2-135M": dict(
        model_type="llama", attention_bias=False, hidden_act="silu", hidden_size=576, intermediate_size=1536,
        is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, num_attention_heads=9,
        num_hidden_layers=30, num_key_value_heads=3, rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None,
        rope_theta=100000, tie_word_embeddings=True, vocab_size=49152,
    ),
    "Qwen/Qwen2.5-0.5B": dict(
        model_type="qwen2", hidden_act="silu", hidden_size=896, intermediate_size=4864, max_position_embeddings=32768,
        max_window_layers=24, num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2, rms_norm_eps=1e-06,
        rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, use_mrope=False,
        use_sliding_window=False, vocab_size=151936,
    ),
    "microsoft/Phi-3-mini-4k-instruct": dict(
        model_type="phi3", attention_bias=False, hidden_act="silu", hidden_size=3072, intermediate_size=8192,
        max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        original_max_position_embeddings=4096, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0,
        sliding_window=2047, tie_word_embeddings=False, vocab_size=32064,
    ),
    "microsoft/Phi-3-mini-128k-instruct": dict(
        model_type="phi3", attention_bias=False, hidden_act="silu", hidden_size=3072, intermediate_size=8192,
        max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        original_max_position_embeddings=4096, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=262144,
        rope_scaling=dict(
            type="longrope", short_factor=[1 + 0.01 * i for i in range(48)],  # made up; the Hub's are as many
            long_factor=[1 + 0.5 * i for i in range(48)],
        ),
        tie_word_embeddings=False, vocab_size=32064,
    ),
}  # fmt: skip
ROTARY = {
    "qwen3": "Qwen3", "gemma3_text": "Gemma3", "mistral": "Mistral", "olmo2": "Olmo2", "olmo3": "Olmo3",
    "llama": "Llama", "qwen2": "Qwen2", "phi3": "Phi3",
}  # fmt: skip


def rotary_embedding(theirs):
    kind = theirs.model_type
    module = getattr(transformers.models, kind.removesuffix("_text"))
    modeling = __import__(f"{module.__name__}.modeling_{kind.removesuffix('_text')}", fromlist=["x"])
    return getattr(modeling, f"{ROTARY[kind]}RotaryEmbedding")(theirs)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    """Sizes, windows and rotation are those that transformers makes of the same config.json."""
    hf = PUBLISHED[name]
    ours, theirs = Config.from_hf(hf), transformers.AutoConfig.for_model(**hf)
    theirs = getattr(theirs, "text_config", theirs)
    assert ours.family == theirs.model_type
    assert (ours.n_layers, ours.d_model, ours.d_mlp, ours.n_vocab, ours.n_heads, ours.n_kv_heads) == (
        theirs.num_hidden_layers, theirs.hidden_size, theirs.intermediate_size, theirs.vocab_size,
        theirs.num_attention_heads, theirs.num_key_value_heads,
    )  # fmt: skip
    assert ours.d_head == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.eps, ours.tied) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    types, window = getattr(theirs, "layer_types", None), getattr(theirs, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * ours.n_layers
    assert ours.windows == tuple(window if one == "sliding_attention" else None for one in types)
    rotary = rotary_embedding(theirs)
    for one, layer in zip(types, ours.rotary, strict=True):
        by_type = f"{one}_" if hasattr(rotary, f"{one}_inv_freq") else ""
        torch.testing.assert_close(torch.tensor(layer.freqs), getattr(rotary, f"{by_type}inv_freq"), rtol=2e-6, atol=0)
        assert layer.scale == pytest.approx(getattr(rotary, f"{by_type}attention_scaling"))


@pytest.mark.parametrize("name, short", [
    ("Qwen/Qwen3-0.6B", "qwen3-0.6b"), ("google/gemma-3-1b-pt", "gemma3-1b"), ("google/gemma-3-4b-pt", "gemma3-4b"),
    ("allenai/OLMo-2-1124-7B", "olmo2-7b"), ("allenai/Olmo-3-1025-7B", "olmo3-7b"),
    ("meta-llama/Llama-3.2-1B", "llama3.2-1b"), ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
    ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"), ("microsoft/Phi-3-mini-4k-instruct", "phi3-mini"),
])  # fmt: skip
def test_short_names(name, short):
    assert models.SHORT_NAMES[short] == name


def test_yarns_own_scale_and_untruncated_bounds():
    """Without attention_factor what is rotated grows with the logarithm of the factor; truncate may be off."""
    for more in ({}, {"truncate": False, "beta_fast": 4, "beta_slow": 0.5}):
        hf = PUBLISHED["Qwen/Qwen3-0.6B"] | {"rope_scaling": YARN | {"rope_theta": 1e6} | more}
        ours = Config.from_hf(hf).rotary[0]
        theirs = rotary_embedding(transformers.Qwen3Config(**{k: v for k, v in hf.items() if k != "model_type"}))
        torch.testing.assert_close(torch.tensor(ours.freqs), theirs.inv_freq, rtol=2e-6, atol=0)
        assert ours.scale == pytest.approx(theirs.attention_scaling) and ours.scale > 1.2


@pytest.mark.parametrize("name, change, without", [
    ("qwen3", {"rope_theta": 10000.0}, ["rope_parameters", "layer_types"]),
    (
        "gemma3",
        {"rope_theta": 1e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e3,
         "sliding_window_pattern": 2},
        ["rope_parameters", "layer_types", "tie_word_embeddings", "attn_logit_softcapping", "final_logit_softcapping"],
    ),
    (
        "olmo3", {"rope_theta": 5e4, "rope_scaling": {k: v for k, v in YARN.items() if k != "rope_theta"}},
        ["rope_parameters"],
    ),
    ("mistral", {"rope_theta": 10000.0}, ["rope_parameters"]),
    (
        "phi3-long",
        {"rope_theta": 1e4, "partial_rotary_factor": 0.75,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 4.0], "long_factor": [1.0, 9.0, 30.0]}},
        ["rope_parameters"],
    ),
])  # fmt: skip
def test_configurations_as_transformers_4_wrote_them(name, change, without, checkpoint, tokens, tmp_path):
    path = tmp_path / name
    shutil.copytree(checkpoint(name)[0], path)
    fields = json.loads((path / "config.json").read_text())
    fields = {k: v for k, v in fields.items() if k not in without} | change
    (path / "config.json").write_text(json.dumps(fields))
    assert torch.equal(from_pretrained(str(path))(tokens), from_pretrained(str(checkpoint(name)[0]))(tokens))


@pytest.fixture(scope="module")
def sees_images(tmp_path_factory):
    """A Gemma 3 that reads images as well, and where it is saved."""
    text = dict(
        LLAMA, head_dim=12, query_pre_attn_scalar=7, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision | dict(patch_size=14))
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    path = tmp_path_factory.mktemp("sees")
    model.save_pretrained(path)
    return model, path


def test_the_text_part_of_a_model_that_sees_images(sees_images, tokens, tmp_path):
    """As it is saved, as the Hub has it (language_model.model. ...), and in memory."""
    model, path = sees_images
    names = load_file(path / "model.safetensors").keys()
    assert any("vision_tower" in name for name in names) and any("language_model" in name for name in names)
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
    ours = from_pretrained(str(path))
    assert ours.config.family == "gemma3_text" and wanted.std() > 0.01
    torch.testing.assert_close(ours(tokens), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(from_transformers(model)(tokens), wanted, atol=1e-4, rtol=0)
    for saved, other in (("language_model.model.", "model.language_model."), ("model.vision", "vision")):
        saved, other = (saved, other) if any(name.startswith(saved) for name in names) else (other, saved)
        renamed = {name.replace(saved, other): x for name, x in load_file(path / "model.safetensors").items()}
        shutil.copy(path / "config.json", tmp_path)
        save_file(renamed, tmp_path / "model.safetensors")
        assert renamed.keys() != names and torch.equal(from_pretrained(str(tmp_path))(tokens), ours(tokens))


def test_head_norms_obey_the_ln_rule(checkpoint):
    """Each head's queries are divided by their own size, which the LN-rule holds constant."""
    norm = from_pretrained(str(checkpoint("qwen3")[0]), dtype=torch.float64).blocks[1].attn.q_norm
    x = torch.randn(2, 5, 4 * 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    signal = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    heads = x.detach().unflatten(-1, (4, 12))
    size = (heads.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(norm(x, Pass(Rules())), (heads / size * norm.weight).flatten(-2))
    for rules in (Rules(), Rules(ln=True)):
        got = torch.autograd.grad(norm(x, Pass(rules)), x, signal)[0].unflatten(-1, (4, 12))
        g = signal.unflatten(-1, (4, 12)) * norm.weight
        owed = g / size if rules.ln else g / size - heads * (g * heads).mean(-1, keepdim=True) / size**3
        torch.testing.assert_close(got, owed)


@pytest.mark.parametrize("name, change, message", [
    ("google/gemma-3-1b-pt", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("google/gemma-3-1b-pt", {"sliding_window_pattern": 0}, "one of a wrong type: ZeroDivisionError"),
    ("google/gemma-3-4b-pt", {"text_config": {"model_type": "gemma9"}}, "model_type 'gemma9' is not supported"),
    ("microsoft/Phi-3-mini-128k-instruct", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
     "short_factor in config.json has 1 numbers for 48 frequencies"),
    ("microsoft/Phi-3-mini-128k-instruct", {"rope_scaling": {"type": "longrope", "short_factor": [0.0] * 48}},
     "phi3 model .* one of a wrong type: ZeroDivisionError"),
    ("allenai/Olmo-3-1025-7B", {"rope_scaling": {"rope_type": "yarn"}}, "lacks a field.*'factor'"),
    ("Qwen/Qwen3-0.6B", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale = 1.0, which"),
    ("Qwen/Qwen3-0.6B", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "knows default, linear"),
    ("Qwen/Qwen3-0.6B", {"rope_scaling": YARN | {"original_max_position_embeddings": -5}}, "embeddings = -5"),
    ("Qwen/Qwen3-0.6B", {"layer_types": ["chunked_attention"] * 28}, "KeyError.'chunked_attention'"),
    ("Qwen/Qwen3-0.6B", {"model_type": "qwen9"}, "this project knows gpt2, gpt_neox, qwen2, gemma2, llama, qwen3"),
    ("mistralai/Mistral-7B-v0.1", {"sliding_window": "4096"}, "wrong type"),
])  # fmt: skip
def test_what_is_not_ours_is_refused_in_one_line(name, change, message):
    with pytest.raises(ValueError, match=message) as error:
        Config.from_hf(PUBLISHED[name] | change)
    assert "\n" not in str(error.value)


def test_prompts_beyond_the_original_context_of_longrope(checkpoint):
    """There Phi-3 takes other frequencies, for all positions."""
    model = from_pretrained(str(checkpoint("phi3-long")[0]))
    with pytest.raises(ValueError, match="prompts of 17 tokens exceed this model's context of 16"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_edges_where_one_norm_ties_all_heads_are_refused(checkpoint, pair):
    model = from_pretrained(str(checkpoint("olmo3")[0]))
    with pytest.raises(ValueError, match="edges of olmo3 models are not supported"):
        attribute_edges(model, *pair)


def test_models_knows_the_four_originals_by_itself(tmp_path):
    """A copy of models.py without support/ loads them, and names those that it knows."""
    import subprocess
    import sys

    shutil.copy(models.__file__, tmp_path)
    code = """
import models
assert list(models.FAMILIES) == ["gpt2", "gpt_neox", "qwen2", "gemma2", "llama"], models.FAMILIES
assert models.FAMILIES.keys() == models.TABLE_4.keys()
try:
    models.Config.from_hf({"model_type": "qwen3"})
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    known = "gpt2, gpt_neox, qwen2, gemma2, llama; import support.families for more"
    assert run.stdout == f"model_type 'qwen3' is not supported: this project knows {known}\n", run.stderr


def test_every_family_has_rules():
    assert models.FAMILIES.keys() - {"gemma3"} == models.TABLE_4.keys() and len(models.FAMILIES) == 13  # its text has
