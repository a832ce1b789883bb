"""Every family against transformers, and the loading of checkpoints as they are found in the wild."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES, LLAMA3_ROPE, NEWER
from safetensors.torch import load_file, save_file

import relp
import support.families  # noqa: F401
from models import SHORT_NAMES, Config, Pass, Rules, Transformer, filled, from_pretrained, from_transformers
from toy.checkpoint import to_checkpoint


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_agree_with_transformers(name, checkpoint, tokens):
    path, hf = checkpoint(name)
    with torch.no_grad():
        wanted, got = hf(tokens).logits, from_pretrained(str(path))(tokens)
    assert wanted.std() > 0.5  # far from a trivial model
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_bfloat16_stays_close(name, checkpoint, tokens):
    path, hf = checkpoint(name)
    with torch.no_grad():
        wanted, got = hf(tokens).logits, from_pretrained(str(path), dtype=torch.bfloat16)(tokens)
    assert got.dtype == torch.float32
    assert (got - wanted).abs().mean() < 0.05 * wanted.std()


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_a_run_can_be_resumed_in_the_middle(name, checkpoint, tokens):
    """block() from a position on, with the earlier keys and values from the hook, is the rest of the run.

    With `last` it is the last position of that.
    """
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    kept = {}

    def keep(node, layer, value):
        kept[node, layer] = value
        return value

    stream = model.stream(tokens, hook=keep)
    for start in (0, 4, 10):

        def past(node, layer, value, start=start):
            return torch.cat([kept[node, layer][:, :start], value], 1) if node in ("k", "v") else value

        x = kept["resid_pre", 1][:, start:]
        for layer in (1, 2):
            last = model.block(layer, x, hook=past, start=start, last=True)
            x = model.block(layer, x, hook=past, start=start)
            torch.testing.assert_close(last, x[:, -1:])
        torch.testing.assert_close(x, stream[:, start:])


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_every_node_passes_through_the_hook(name, checkpoint, tokens):
    """What the hook returns is what the pass goes on with, for each named node; [batch, pos, ...] throughout."""
    model = from_pretrained(str(checkpoint(name)[0]))
    plain, seen = model(tokens), []

    def look(node, layer, value):
        assert value.shape[:2] == tokens.shape
        seen.append((layer, node))
        return value

    torch.testing.assert_close(model(tokens, hook=look), plain)
    assert seen == [(layer, node) for layer in range(model.config.n_layers) for node in model.nodes]
    assert ("resid_mid" in model.nodes) == (name != "neox")
    for key in itertools.product(model.nodes, range(model.config.n_layers)):

        def flip(node, layer, value, key=key):
            return value.flip(-1) if (node, layer) == key else value

        assert (model(tokens, hook=flip) - plain).abs().max() > 1e-4, key


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_attn_out_and_mlp_out_are_what_is_added_to_the_stream(name, checkpoint, tokens):
    model, kept = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64), {}
    model(tokens, hook=lambda node, layer, value: kept.setdefault((node, layer), value))
    for layer in range(model.config.n_layers):
        total = kept["resid_pre", layer] + kept["attn_out", layer] + kept["mlp_out", layer]
        torch.testing.assert_close(kept["resid_post", layer], total)


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2-mha-tied-window", "qwen2", "llama"])
def test_attention_in_one_kernel_gives_the_same_results(name, checkpoint, tokens):
    """Where nobody wants the pattern it is never formed: the same logits, and the same scores under every rule."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    with_pattern = model(tokens, hook=lambda name, layer, value: value)
    torch.testing.assert_close(model(tokens), with_pattern, atol=1e-11, rtol=1e-11)
    patch, answers = tokens.roll(1, 0), tokens[:, :2]
    for rules in (False, True, Rules(ah=True), Rules(True, True, True, True, gamma=0.1)):
        fused = relp.attribute(model, tokens, patch, answers, ("resid_pre", "z"), lrp=rules)
        plain = relp.attribute(model, tokens, patch, answers, ("resid_pre", "z", "pattern"), lrp=rules)
        for node in fused:
            torch.testing.assert_close(fused[node], plain[node], atol=1e-11, rtol=1e-11)


MEASURE_LOADING = """
import sys, torch, models, safetensors, torch.distributed.tensor
from pathlib import Path

def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

before = peak()
model = models.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's memory")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_needs_little_more_memory_than_the_weights(dtype, tmp_path):
    hf = dict(model_type="gpt2", n_embd=1024, n_layer=4, n_head=4, n_positions=64, vocab_size=15000)
    model = Transformer(Config.from_hf(hf))
    (tmp_path / "config.json").write_text(json.dumps(hf))
    save_file(to_checkpoint(model), tmp_path / "model.safetensors")
    del model
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE_LOADING, tmp_path, dtype],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    peak, weights = map(int, measured.stdout.split())
    assert weights > 1.2e8
    file = (tmp_path / "model.safetensors").stat().st_size  # which is mapped: its pages count, and can be given back
    assert peak < 1.15 * weights + file + 5e7, (peak / weights, measured.stderr)  # 5e7: what Python imports on the way


def test_nothing_stays_attached_after_an_exception(checkpoint, tokens):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    plain = model(tokens)

    def broken(node, layer, value):
        if (node, layer) == ("mlp_out", 1):
            raise RuntimeError("broken hook")
        return value * 0

    with pytest.raises(RuntimeError, match="broken hook"):
        model(tokens, hook=broken)
    assert torch.equal(model(tokens), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_dtype_and_gradients(checkpoint):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = from_pretrained(str(checkpoint("qwen2")[0]), dtype=dtype)
        assert all(p.dtype == dtype and not p.requires_grad for p in model.parameters())
    assert not model.training


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints in the wild


@pytest.fixture
def copied(checkpoint, tmp_path):
    """copied(name, config={changed fields}, tensors=function of the tensors) -> a folder: that checkpoint, changed."""

    def copy(name, config=None, tensors=None, without=()):
        path = tmp_path / name
        shutil.copytree(checkpoint(name)[0], path)
        fields = json.loads((path / "config.json").read_text())
        fields = {k: v for k, v in fields.items() if k not in without} | (config or {})
        (path / "config.json").write_text(json.dumps(fields))
        if tensors:
            save_file(tensors(load_file(path / "model.safetensors")), path / "model.safetensors")
        return path

    return copy


def same_logits(path, other, tokens):
    return torch.equal(from_pretrained(str(path))(tokens), from_pretrained(str(other))(tokens))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_to_checkpoint_is_the_inverse_of_loading(name, checkpoint):
    path, _ = checkpoint(name)
    stored, ours = load_file(path / "model.safetensors"), to_checkpoint(from_pretrained(str(path)))
    assert stored.keys() == ours.keys()
    assert all(torch.equal(stored[k], ours[k]) for k in stored)


@pytest.mark.parametrize("name, config, without", [
    ("gpt2", {"torch_dtype": "float32"}, ["dtype", "n_inner", "tie_word_embeddings"]),
    ("neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000, "torch_dtype": "float16"}, ["rope_parameters", "dtype"]),
    ("neox-sequential", {"rotary_pct": 1.0, "rotary_emb_base": 500}, ["rope_parameters"]),
    ("qwen2", {"rope_theta": 10000.0}, ["rope_parameters", "layer_types"]),
    ("qwen2-mha-tied-window", {"rope_theta": 10000.0}, ["rope_parameters", "layer_types"]),
    (
        "gemma2", {"rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh"},
        ["rope_parameters", "layer_types", "tie_word_embeddings", "hidden_activation"],
    ),
    (
        "llama3", {"rope_theta": 5e4, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
        ["rope_parameters"],
    ),
])  # fmt: skip
def test_configurations_as_transformers_4_wrote_them(name, config, without, checkpoint, copied, tokens):
    assert same_logits(copied(name, config, without=without), checkpoint(name)[0], tokens)


def test_rope_scaling_matters(checkpoint, copied, tokens):
    assert not same_logits(
        copied("llama3", {"rope_parameters": {**LLAMA3_ROPE, "factor": 2.0}}), checkpoint("llama3")[0], tokens
    )


def test_rope_scaling_wins_beside_rope_parameters(copied, tokens):
    """As in transformers, whatever the other says."""
    from transformers import AutoModelForCausalLM

    path = copied("llama3", {"rope_scaling": {**LLAMA3_ROPE, "factor": 2.0}})
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(path)(tokens).logits
    torch.testing.assert_close(from_pretrained(str(path))(tokens), wanted, atol=1e-4, rtol=0)


def old_gpt2(tensors):
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    return {k.removeprefix("transformer."): v for k, v in tensors.items()} | masks


def old_neox(tensors):
    buffers = {
        "bias": torch.ones(1, 1, 64, 64),
        "masked_bias": torch.tensor(-1e9),
        "rotary_emb.inv_freq": torch.ones(4),
    }
    return tensors | {f"gpt_neox.layers.1.attention.{k}": v for k, v in buffers.items()}


@pytest.mark.parametrize("name, change", [
    ("gpt2", old_gpt2),
    ("gpt2", lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()}),  # a copy
    ("neox", old_neox),
    ("llama", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
])  # fmt: skip
def test_old_buffers_and_prefixes(name, change, checkpoint, copied, tokens):
    assert same_logits(copied(name, tensors=change), checkpoint(name)[0], tokens)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_sharded_and_pickled_checkpoints(name, checkpoint, tokens, tmp_path):
    path, hf = checkpoint(name)
    hf.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert same_logits(tmp_path / "shards", path, tokens)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(path / "config.json", pickled)
    torch.save(hf.state_dict(), pickled / "pytorch_model.bin")
    assert same_logits(pickled, path, tokens)
    (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-00001-of-00001.bin")
    assert same_logits(pickled, path, tokens)


def test_an_unembedding_of_its_own_is_used_though_config_json_ties_it(copied, tokens):
    """As in transformers."""
    from transformers import AutoModelForCausalLM

    path = copied("gpt2", tensors=lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].flip(0).clone()})
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(path)(tokens).logits
    torch.testing.assert_close(from_pretrained(str(path))(tokens), wanted, atol=1e-4, rtol=0)


def test_shards_of_an_earlier_save_are_not_mixed_in(checkpoint, tmp_path):
    path, hf = checkpoint("llama")
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    shutil.copy(path / "model.safetensors", tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="model-.*safetensors .*multiple values for keyword argument 'model"):
        from_pretrained(str(tmp_path))


LAYER = "model.layers."


@pytest.mark.parametrize("message, change", [
    (
        "Missing key.* \"blocks.1.mlp.up.weight\"",
        lambda t: {k: v for k, v in t.items() if k != LAYER + "1.mlp.up_proj.weight"},
    ),
    ("Unexpected key.* \"model.layers.0.extra\"", lambda t: t | {LAYER + "0.extra": torch.ones(1)}),
    ("size mismatch for ln_f.weight: .*31.*32", lambda t: t | {"model.norm.weight": torch.ones(31)}),
    ("Unexpected key.* \"blocks.3.mlp.up.weight\"", lambda t: t | {LAYER + "3.mlp.up_proj.weight": torch.ones(1)}),
    (
        "Unexpected key.* \"blocks.0.attn.q.bias\"",
        lambda t: t | {LAYER + "0.self_attn.q_proj.bias": torch.ones(32)},
    ),
    ("blocks.0.mlp.up.weight holds no float", lambda t: t | {LAYER + "0.mlp.up_proj.weight": torch.ones(9).char()}),
])  # fmt: skip
def test_what_does_not_fit_is_named(message, change, copied):
    with pytest.raises(ValueError, match=message) as error:
        from_pretrained(str(copied("llama", tensors=change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, config, message", [
    ("gpt2", {"model_type": "bert"}, "'bert' is not supported"),
    ("gpt2", {"activation_function": "mish"}, "'mish' is not supported"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx = True, which is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' is not supported"),
    ("llama", {"hidden_size": "32"}, "d_model = '32'"),
    ("llama", {"intermediate_size": "48"}, "d_mlp = '48'"),
    ("gpt2", {"n_layer": 0}, "n_layers = 0"),
    ("llama", {"num_key_value_heads": 3}, "do not fit config.json: .*size mismatch"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"tie_word_embeddings": "no"}, "tied = 'no'"),
    ("llama", {"head_dim": 0}, "wrong type"),
    ("llama", {"rope_theta": 0, "rope_parameters": None}, "wrong type"),
    ("qwen2", {"is_causal": False}, "is_causal = False"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
])  # fmt: skip
def test_configurations_that_are_not_ours(name, config, message, copied):
    with pytest.raises(ValueError, match=message):
        from_pretrained(str(copied(name, config)))


def test_a_missing_field_is_named(copied):
    with pytest.raises(ValueError, match="lacks a field.*'n_layer'"):
        from_pretrained(str(copied("gpt2", without=["n_layer"])))


def test_a_pickle_with_code_in_it_is_not_run(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    shutil.copy(checkpoint("gpt2")[0] / "config.json", tmp_path)
    torch.save({"x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin is corrupt, cut off, or holds more than tensors"):
        from_pretrained(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_short_names_cover_the_papers_models():
    papers = "gpt2 gpt2-medium gpt2-large gpt2-xl pythia-70m pythia-410m qwen2-0.5b qwen2-7b gemma2-2b"
    assert set(papers.split()) < SHORT_NAMES.keys()


def test_gemmas_embedding_is_scaled_in_the_models_dtype(checkpoint, tokens):
    """sqrt(32) is rounded to bfloat16 before it is multiplied, as Gemma was trained."""
    model = from_pretrained(str(checkpoint("gemma2")[0]), dtype=torch.bfloat16)
    embedded = model.embed_tokens(tokens)
    scale = torch.tensor(math.sqrt(model.config.d_model)).bfloat16()
    assert torch.equal(model.embed(tokens), embedded * scale)
    assert not torch.equal(embedded * scale, (embedded.float() * math.sqrt(model.config.d_model)).bfloat16())


def test_gemmas_norm_adds_one_in_float32(checkpoint):
    """1 + w in bfloat16 would lose the last digits of w: the result is off by its own rounding only."""
    norm = from_pretrained(str(checkpoint("gemma2")[0]), dtype=torch.bfloat16).ln_f
    torch.manual_seed(0)
    x = torch.randn(50, 32).bfloat16()
    norm.weight.copy_(0.01 * torch.randn(32))
    h, w = x.double(), norm.weight.double()
    exact = h / (h.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (1 + w)
    assert ((norm(x, Pass(Rules())) - exact) / exact).abs().max() < 1.01 * 2**-8


def test_the_rope_of_llama_3():
    """At its published parameters, frequencies of all three kinds occur: slowed, kept, and between."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    rope |= dict(original_max_position_embeddings=8192, rope_theta=500000.0)
    sizes = dict(hidden_size=256, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8, vocab_size=10)
    theirs = LlamaConfig(**sizes, rope_parameters=rope)
    ours = Config.from_hf({**theirs.to_dict(), "model_type": "llama"})
    torch.testing.assert_close(torch.tensor(ours.rotary[0].freqs), LlamaRotaryEmbedding(theirs).inv_freq)


def test_loading_does_not_start_the_compiler():
    """It would take torch a second, as soon as something is drawn or joined on the meta device."""
    code = """
import sys, models
before = "torch._dynamo" in sys.modules
for toy in ("gpt2", "neox", "gemma2"):
    models.from_pretrained(f"toy-{toy}")
assert ("torch._dynamo" in sys.modules) == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(relp.__file__).parent, check=True)


def test_a_compiled_model_is_the_model(checkpoint, tokens):
    """torch.compile puts _orig_mod in front of every name."""
    _, theirs = checkpoint("llama")
    tensors = {f"_orig_mod.{name}": x for name, x in theirs.state_dict().items()}
    found = filled(Config.from_hf(theirs.config.to_dict()), tensors, torch.float32, "cpu")
    assert torch.equal(found(tokens), from_transformers(theirs)(tokens))
