"""Bad input to the command: exit code 2 and one line on stderr that names what is wrong."""
# ruff: noqa: F811 (fixtures that are imported)

import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_evaluate import IDS, TEXT, jsonl, label, run, tiny  # noqa: F401
from test_hub import client

import evaluate
import models


@pytest.fixture
def refused(run, tmp_path):
    """refused(*arguments) -> the message of a run that must end in exit code 2 and one line."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 2 and len(err) == 1 and err[0].startswith("evaluate.py: error: "), err
        assert not list((tmp_path / "out").glob("*/s*.*"))  # no scores.npz, no summary.json
        return err[0]

    return call


@pytest.mark.parametrize("arguments, words", [
    (["--nodes", "resid_pre,resid_mud"], ["node", "resid_mud", "resid_mid"]),
    (["--nodes", ""], ["--nodes", "empty"]),
    (["--methods", "ap,lime"], ["method", "lime", "relp"]),
    (["--methods", "ln+epsilon=0"], ["epsilon", "0"]),
    (["--rules", "ln,magic"], ["rule", "magic", "identity"]),
    (["--rules", "epsilon"], ["epsilon=X"]),
    (["--rules", "epsilon=-1"], ["epsilon", "-1"]),
    (["--rules", "gamma=nan"], ["gamma", "nan"]),
    (["--rules", "epsilon=1,gamma=1"], ["epsilon", "gamma"]),
    (["--metric", "loss"], ["metric", "loss", "prob_diff"]),
    (["--corruption", "noise"], ["corruption", "noise", "s2"]),
    (["--dtype", "int8"], ["dtype", "int8", "bfloat16"]),
    (["--device", "abacus"], ["device", "abacus"]),
    (["--device", "cuda:99"], ["device", "cuda:99"]),
    (["--device", "meta"], ["device", "meta"]),
    (["--pairs", "0"], ["--pairs", "0"]),
    (["--pairs", "100000000"], ["100000000"]),
    (["--pairs", "abc"], ["--pairs", "abc"]),
    (["--seed", "1.5"], ["--seed", "1.5"]),
    (["--seed", "-1"], ["--seed", "-1"]),
    (["--batch-size", "0"], ["--batch-size", "0"]),
    (["--batch-size", "many"], ["--batch-size", "many"]),
    (["--batch-size", "9" * 30], ["--batch-size", "2147483647"]),
    (["--steps", "0"], ["--steps", "0"]),
    (["--task", "edges"], ["--task", "edges", "ioi", "sva"]),
    (["--prompts", "no-such-file.jsonl"], ["no-such-file.jsonl"]),
    (["--prompts", "."], ["directory"]),
    (["--prompts", ""], ["--prompts", "empty"]),
    (["--frobnicate"], ["--frobnicate"]),
    (["--pair", "3"], ["--pair"]),  # no abbreviations
    (["--shard"], ["--shard", "torchrun"]),
    (["--held-out", "5"], ["--held-out", "no meaning with --task ioi"]),
    (["--structures", "simple"], ["--structures", "no meaning with --task ioi"]),
    (["--task", "sva", "--corruption", "s2"], ["--corruption", "no meaning with --task sva"]),
    (["--task", "sva", "--shard"], ["--shard", "no meaning with --task sva"]),
    (["--task", "sva", "--metric", "kl"], ["kl", "no meaning with --task sva"]),
    (["--task", "sva", "--methods", "ap,atp*"], ["atp*", "no meaning with --task sva"]),
    (["--model", "toy-neox", "--task", "sva", "--structures", "simple,hard"], ["structure", "hard", "across_pp"]),
    (["--task", "sva", "--thresholds", "1e-4,1,1000000000000"], ["--thresholds", "up to 1000"]),
    (["--task", "sva", "--thresholds", "1,2"], ["--thresholds", "LOW,HIGH,COUNT"]),
    (["--task", "sva", "--saes", "x" * 5000], ["SAE"]),
    (["--task", "sva", "--nodes", "z"], ["--nodes", "none are known", "--saes"]),
    (["--prompts", "x.jsonl", "--corruption", "s2"], ["--corruption", "no meaning with own prompts"]),
    (["--task", "sva", "--prompts", "x.jsonl", "--structures", "simple"], ["--structures", "own prompts"]),
], ids=label)  # fmt: skip
def test_arguments(arguments, words, tiny, refused):
    message = refused("--model", tiny["gpt2"], *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("rows, words", [
    ([], ["none of its 0 lines"]),
    (["", "  "], ["none of its 2 lines"]),
    (["{"], ["line 1", "JSON"]),
    ([IDS, "[1]"], ["line 2", "object"]),
    ([IDS, {"original": [1]}], ["line 2", "patch"]),
    ([{**IDS, "patch": [5, 9]}], ["line 1", "equally many", "4 tokens", "2 tokens"]),
    ([{**TEXT, "patch_prefix": "Then Mary went to"}], ["line 1", "equally many", "' to'"]),
    ([{**TEXT, "clean_answer": "has"}], ["line 1", "original_answer", "one token", "3 tokens"]),
    ([{**IDS, "patch_answer": [1, 2]}], ["line 1", "must differ"]),
    ([{**IDS, "original": [5, 6, 7, 100000]}], ["line 1", "100000", "ends at 321"]),
    ([{**IDS, "patch_answer": -1}], ["line 1", "patch_answer", "-1"]),
    ([{**IDS, "original": [5, 6, 7, 1.5]}], ["line 1", "1.5"]),
    ([{**IDS, "original": [], "patch": []}], ["line 1", "original", "[]"]),
    ([{**IDS, "patch": IDS["original"]}], ["line 1", "differ"]),
    ([{**IDS, "patch_answer": 1}], ["line 1", "differ"]),
    ([{**IDS, "original": "Then"}], ["line 1", "both"]),
    ([{**IDS, "original": [5] * 41, "patch": [6] * 41}], ["41", "40"]),  # the context
    (["[" * 200_000], ["line 1", "not JSON"]),
    (['{"original": "' + "x" * 10**6 + '"}'], ["line 1", "patch"]),
    ([{**TEXT, "clean_prefix": "x " * 10**5 + "x"}], ["line 1", "equally many", "200001 tokens"]),
], ids=label)  # fmt: skip
def test_prompt_files(rows, words, tiny, refused, tmp_path):
    message = refused("--model", tiny["gpt2"], "--prompts", jsonl(tmp_path / "bad.jsonl", *rows))
    assert all(word in message for word in words), message


def test_long_names(refused):
    assert "unknown model 'xxxx" in refused("--model", "x" * 5000)
    assert "unknown model" in refused("--model", "a\0b")


def test_a_bug_of_ours_is_a_traceback(tiny, run, monkeypatch):
    monkeypatch.setitem(evaluate.EXPERIMENTS, "ioi", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--model", tiny["gpt2"])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory(error, tiny, refused, monkeypatch):
    def experiment(*_):
        raise error

    monkeypatch.setitem(evaluate.EXPERIMENTS, "ioi", experiment)
    assert "out of memory; try a smaller --batch-size" in refused("--model", tiny["gpt2"])


def test_text_without_a_tokenizer(tiny, refused, tmp_path):
    shutil.copytree(tiny["gpt2"], tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    assert "tokenizer" in refused("--model", tmp_path / "mute")
    assert "tokenizer" in refused("--model", tmp_path / "mute", "--prompts", jsonl(tmp_path / "text.jsonl", TEXT))


def test_two_models_with_one_name_do_not_overwrite_each_other(tiny, refused, tmp_path):
    for parent in ("first", "second"):
        shutil.copytree(tiny["gpt2"], tmp_path / parent / "model")
    both = [tmp_path / "first" / "model", tmp_path / "second" / "model"]
    message = refused("--model", *both, "--pairs", 3, "--no-plot")
    assert all(str(path) in message for path in both) and "one folder" in message


# ---------------------------------------------------------------------------------------------------------------------
# Bad checkpoints


@pytest.fixture
def broken(tiny, refused, tmp_path):
    """broken(change) -> the message about tmp_path/broken, a copy of the gpt2 checkpoint that change(folder) spoils."""

    def call(change):
        folder = tmp_path / "broken"
        shutil.copytree(tiny["gpt2"], folder)
        change(folder)
        message = refused("--model", folder, "--pairs", 3)
        assert "broken" in message
        return message

    return call


def config(**fields):
    def change(folder):
        old = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in old.items() if v is not ...}))

    return change


def tensors(change):
    return lambda folder: save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def content(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def weights(text):
    return content("model.safetensors", text)


def tokenizer(model, **fields):
    """A tokenizer.json with a byte-level BPE model of these fields."""
    spec = {"model": {"type": "BPE", "vocab": {"a": 0}, **model}, "pre_tokenizer": {"type": "ByteLevel"}, **fields}
    return content("tokenizer.json", json.dumps(spec))


def split_by(pattern):
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
    steps += [{"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def deep(n):
    spec = {"type": "NFC"}
    for _ in range(n):
        spec = {"type": "Sequence", "normalizers": [spec]}
    return spec


def no_tokenizer_json(**config):
    def change(folder):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text('{"a": 0}')
        (folder / "merges.txt").write_text("")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    return change


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(state):
    """Weights in pytorch_model.bin: the bytes as they are, anything else pickled."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        if isinstance(state, bytes):
            (folder / "pytorch_model.bin").write_bytes(state)
        else:
            torch.save(state, folder / "pytorch_model.bin")

    return change


def one_shard_of_two(folder):
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    some = {name: x for name, x in whole.items() if "h.1" not in name}
    save_file(some, folder / "model-00001-of-00002.safetensors")


WTE = "transformer.wte.weight"


@pytest.mark.parametrize("change, words", [
    (lambda folder: shutil.rmtree(folder), ["unknown model"]),
    (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    (lambda folder: (folder / "model.safetensors").unlink(), ["no weights"]),
    (config(model_type="bert"), ["bert", "gpt2", "llama", "qwen3"]),
    (config(model_type=...), ["model_type"]),
    (config(model_type=["gpt2"]), ["model_type"]),
    (config(n_head=...), ["n_head"]),
    (config(n_head=0), ["zero"]),
    (config(n_head=3), ["config.json"]),
    (config(n_head="two"), ["type"]),
    (config(n_layer=0), ["n_layers = 0"]),
    (config(n_layer=2.5), ["type"]),
    (config(n_layer=3), ["Missing", "blocks.2"]),
    (config(n_layer=1), ["Unexpected", "blocks.1"]),
    (config(activation_function="mish"), ["mish", "gelu_new"]),
    (config(layer_norm_epsilon="small"), ["eps = 'small'"]),
    (config(tie_word_embeddings="no"), ["tied = 'no'"]),
    (config(vocab_size=100), ["embed_tokens.weight", "[100, 16]"]),
    (config(scale_attn_by_inverse_layer_idx=True), ["scale_attn_by_inverse_layer_idx", "not supported"]),
    (content("config.json", "{not json"), ["config.json", "line 1 column 2"]),
    (content("config.json", "[]"), ["model_type"]),
    (content("config.json", b"\xff\xfe{"), ["config.json"]),
    (content("config.json", ""), ["config.json"]),
    (cut, ["model.safetensors", "corrupt"]),
    (weights(b""), ["model.safetensors", "corrupt"]),
    (weights(b"\xff" * 1000), ["model.safetensors", "corrupt"]),
    (weights("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), ["model.safetensors", "corrupt"]),
    (one_shard_of_two, ["Missing", "blocks.1"]),
    (tensors(lambda t: {k: v for k, v in t.items() if k != WTE}), ["Missing", "embed_tokens.weight"]),
    (tensors(lambda t: t | {"transformer.extra": torch.ones(1)}), ["Unexpected", "transformer.extra"]),
    (tensors(lambda t: t | {WTE: torch.ones(3, 16)}), ["embed_tokens.weight", "[3, 16]"]),
    (tensors(lambda t: t | {WTE: torch.full_like(t[WTE], torch.nan)}), ["not finite"]),
    (tensors(lambda t: t | {WTE: t[WTE].to(torch.int8)}), ["embed_tokens.weight", "quantized"]),
    (pickled([torch.ones(2)]), ["weights"]),
    (pickled({WTE: "a string"}), ["weights"]),
    (pickled({"model": {WTE: torch.ones(2)}}), ["weights"]),
    (pickled(b""), ["pytorch_model.bin", "corrupt"]),
    (pickled(b"PK\x03\x04" * 50), ["pytorch_model.bin", "corrupt"]),
    (pickled(b"<html></html>"), ["pytorch_model.bin", "corrupt"]),
    (content("tokenizer.json", "{}"), ["tokenizer.json"]),
    (content("tokenizer.json", "oops"), ["tokenizer.json"]),
    (content("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}'), ["cannot be read"]),
    (tokenizer({}), ["tokenizer.json"]),
    (tokenizer({"vocab": [1], "merges": []}), ["tokenizer.json"]),
    (tokenizer({"merges": [3]}), ["tokenizer.json"]),
    (tokenizer({"merges": []}, added_tokens=[{}]), ["tokenizer.json"]),
    (tokenizer({"merges": []}, pre_tokenizer=split_by("")), ["tokenizer.json"]),
    (tokenizer({"merges": []}, pre_tokenizer=split_by("\\p{L}*")), ["tokenizer.json"]),
    (tokenizer({"merges": []}, pre_tokenizer=split_by("\\p{L}+")), ["tokenizer.json"]),
    (tokenizer({"merges": []}, pre_tokenizer=split_by("(")), ["tokenizer.json"]),
    (tokenizer({"merges": []}, normalizer={"type": "Prepend", "prepend": 5}), ["tokenizer.json"]),
    (tokenizer({"merges": []}, normalizer=deep(400)), ["tokenizer.json"]),
    (tokenizer({"merges": [], "vocab": {"a": 0.5}}), ["tokenizer.json", "0.5"]),
    (no_tokenizer_json(tokenizer_class=5), ["a 5 needs tokenizer.json"]),
    (content("tokenizer_config.json", "oops"), ["tokenizer_config.json"]),
    (content("tokenizer_config.json", '{"bos_token": ["a"]}'), ["tokenizer_config.json", "bos_token", "['a']"]),
], ids=label)  # fmt: skip
def test_checkpoints(change, words, broken):
    message = broken(change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("fields", [
    {"num_key_value_heads": 3}, {"layer_types": ["full_attention"]}, {"rope_parameters": "fast"}, {"head_dim": 7},
    {"sliding_window": "wide"}, {"query_pre_attn_scalar": 0}, {"rope_parameters": {"rope_type": "linear"}},
    {"rope_parameters": {"rope_theta": "big"}}, {"attn_logit_softcapping": "x"}, {"num_hidden_layers": None},
    {"layer_types": ["full_attention", "chunked_attention"]},
], ids=str)  # fmt: skip
def test_configurations(fields, tiny, refused, tmp_path):
    shutil.copytree(tiny["gemma2"], tmp_path / "broken")
    config(**fields)(tmp_path / "broken")
    refused("--model", tmp_path / "broken", "--pairs", 3)


def test_ids_that_the_model_does_not_have(tiny, refused, tmp_path):
    """A tokenizer that is larger than the model's vocabulary, as when special tokens were added."""
    shutil.copytree(tiny["gpt2"], tmp_path / "small")
    config(vocab_size=270)(tmp_path / "small")
    tensors(lambda t: t | {WTE: t[WTE][:270].clone()})(tmp_path / "small")
    assert "token ids must lie in 0..269" in refused("--model", tmp_path / "small", "--pairs", 3)


def test_pickles(tiny, run, refused, tmp_path):
    """Weights in pytorch_model.bin are read, in the zip and in the older format; code in it is not run."""
    for kind, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        folder = tmp_path / kind
        shutil.copytree(tiny["gpt2"], folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
        (folder / "model.safetensors").unlink()
        code, _, err = run("--model", folder, "--pairs", 3, "--no-plot", "--methods", "atp")
        assert (code, err) == (0, []), kind
    shutil.rmtree(tmp_path / "out")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "zip" / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused("--model", tmp_path / "zip")
    torch.save({"x": Evil()}, tmp_path / "zip" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "pytorch_model.bin" in refused("--model", tmp_path / "zip")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_damaged_weights(kind, tiny, tmp_path):
    """A file with a few wrong bytes, or cut anywhere, loads (only numbers have changed) or ends in one line."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny["gpt2"], folder)
    file = folder / "model.safetensors"
    if kind != "safetensors":
        torch.save(load_file(file), folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
        file.unlink()
        file = folder / "pytorch_model.bin"
    whole, rng, refusals = file.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(whole)) :]
        else:  # in the header or the directory, at the file's two ends
            for _ in range(rng.choice([1, 3, 30])):
                damaged[rng.randrange(-3000, 3000)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            models.from_pretrained(str(folder))
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert refusals > 30


def test_no_network(refused, monkeypatch, tmp_path):
    with client(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache"):  # the discard port: closed
        assert "openai-community/gpt2 cannot be downloaded" in refused("--model", "gpt2")
    assert "'gpt5'" in refused("--model", "gpt5")
