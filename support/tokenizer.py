"""Tokenizers of checkpoints: tiktoken for byte-level BPE, the library `tokenizers` for all others.

The ids are those of `transformers`, without special tokens around them.
"""

import json
import re
import unicodedata
from pathlib import Path

import regex  # tiktoken brings it
import tiktoken

from models import SHORT_NAMES, first_line, folder_of, read_json

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 first cuts out each digit. A run of spaces then ends at a digit as at the end of the text.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
# Byte-level vocabularies spell a byte as its character if one can see it, else as the next one from U+0100 on: "Ġ" is
# the space (`bytes_to_unicode` in GPT-2's encoder.py).
UNSEEN = [byte for byte in range(256) if byte == ord(" ") or not chr(byte).isprintable()]
BYTE_OF_CHAR = {chr(256 + UNSEEN.index(b) if b in UNSEEN else b): b for b in range(256)}
USED = {char for char, byte in BYTE_OF_CHAR.items() if byte not in (0xC0, 0xC1, *range(0xF5, 0x100))}  # by UTF-8
WELL_KNOWN_BOS = ("<|begin_of_text|>", "<|endoftext|>", "<bos>", "<s>")
MARK = "\U00010330"  # a Gothic letter: no token joins it to what follows


def load_tokenizer(name: "str | object") -> "ByteLevel | Library | OfTransformers":
    """The tokenizer of a model that from_pretrained knows by this name; or one of transformers, that is in memory.

    It has bos_id (of BOS, else of EOS, else None), n_vocab (1 + the largest id), encode, encode_after and decode.
    NoTokenizer if the checkpoint has none. ValueError if its file cannot be read.
    """
    if not isinstance(name, str):
        return OfTransformers(name)
    source = Path(SHORT_NAMES.get(name, name))
    if source.suffix in SPECS:
        file, (config, spec) = source.name, SPECS[source.suffix](name)
    else:
        folder = folder_of(name)
        config = read(folder / "tokenizer_config.json") or {}
        file, spec = "tokenizer.json", read(folder / "tokenizer.json")
        if spec is None:
            file, spec = "vocab.json or merges.txt", gpt2_spec(name, folder, config)
    try:
        parts = byte_level(spec)
        tokenizer = ByteLevel(spec, *parts) if parts else Library(spec)
        tokenizer.encode("Mary's  gave 123 caf\u00e9s,\n\n \u6771\u4eac \U0001f600")  # a trial
        tokenizer.n_vocab = 1 + max(tokenizer.id_of.values())
    except BaseException as error:  # both libraries are in Rust, whose panics are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{name}: {file} cannot be read: {type(error).__name__}: {first_line(error)}") from None
    named = [config.get("bos_token"), config.get("eos_token")]
    named = [token.get("content") if isinstance(token, dict) else token for token in named]
    if odd := [token for token in named if not isinstance(token, str | None)]:
        raise ValueError(f"{name}: tokenizer_config.json must give bos_token and eos_token as text, got {odd!r:.80}")
    known = [token for token in (*named, *WELL_KNOWN_BOS) if token in tokenizer.id_of]
    tokenizer.bos_id = tokenizer.id_of[known[0]] if known else None
    return tokenizer


SPECS = {}  # {the end of a file's name: a function that gives what tokenizer_config.json and tokenizer.json would say}


class NoTokenizer(ValueError):
    """A checkpoint has no tokenizer."""


def read(file: Path) -> dict | None:
    return read_json(file) if file.exists() else None


def gpt2_spec(name: str, folder: Path, config: dict) -> dict:
    """What a tokenizer.json would say, from GPT-2's vocab.json and merges.txt."""
    vocab, merges = read(folder / "vocab.json"), folder / "merges.txt"
    if vocab is None or not merges.exists():
        raise NoTokenizer(f"{name} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    owner = str(config.get("tokenizer_class") or "GPT2Tokenizer")
    if not owner.startswith("GPT2"):  # others share the two files' format, but not GPT-2's pattern
        raise ValueError(f"{name}: a {owner} needs tokenizer.json; vocab.json and merges.txt say too little")
    lines = merges.read_text(encoding="utf-8", errors="replace").split("\n")
    model = {"vocab": vocab, "merges": [line for line in lines if line and not line.startswith("#version")]}
    added = [{"content": token, "id": vocab[token]} for token in ("<|endoftext|>",) if token in vocab]
    return {"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": added}


def byte_level(spec: dict) -> tuple[str, dict[bytes, int]] | None:
    """How tiktoken does what this tokenizer.json says: its pattern, and {piece: id}, first merged first. None: not."""
    model, added = spec["model"], spec.get("added_tokens") or []
    odd = [model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")]
    odd += [token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word")]
    if spec.get("normalizer"):  # NFC leaves spaces alone, such as those of GPT-NeoX's added tokens
        odd += [spec["normalizer"] != {"type": "NFC"}]
        odd += [token.get("normalized") and not token["content"].isspace() for token in added]
    vocab, ids = model["vocab"], {token["content"]: token["id"] for token in added}
    if any(odd) or model.get("type", "BPE") != "BPE" or not USED <= set(vocab):
        return None
    if any(type(i) is not int or not 0 <= i < 2**32 for i in [*vocab.values(), *ids.values()]):
        return None

    step = spec.get("pre_tokenizer") or {}
    *first, last = step.get("pretokenizers") or [step]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    match first, last.get("use_regex", True):
        case [], True:
            pattern = GPT2_PATTERN
        case [{"type": "Digits", "individual_digits": True}], True:
            pattern = DIGITS_PATTERN
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}], False:
            # What the pattern does not match is a piece too or, in OLMo 2, is dropped. But it matches all text.
            if (behavior, invert) not in (("Isolated", False), ("Removed", True)):
                return None
        case _:
            return None
    if regex.match(pattern, ""):  # tiktoken would panic
        return None

    pieces = {bytes([byte]): vocab[char] for char, byte in BYTE_OF_CHAR.items() if char in vocab}
    for merge in model["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        pieces.setdefault(spelled(token), vocab[token])
    if model.get("ignore_merges"):  # Llama 3: text that is in the vocabulary is one token, even if no merge makes it
        whole = {spelled(token): i for token, i in vocab.items() if token not in ids and spelled(token) not in pieces}
        if any(piece[:k] in pieces and piece[k:] in pieces for piece in whole for k in range(1, len(piece))):
            return None  # tiktoken would merge to it
        pieces |= whole
    return pattern, pieces


def spelled(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    return bytes(BYTE_OF_CHAR[c] for c in token) if set(token) <= BYTE_OF_CHAR.keys() else token.encode()


class ByteLevel:
    """A byte-level BPE (GPT-2, NeoX, Qwen, Llama 3, SmolLM): a pattern splits the text, and tiktoken merges bytes.

    tiktoken ranks what a merge makes, the file the pair that is merged. The two agree where a token has one way to come
    about, as after BPE training, or where the file lists all ways.
    """

    def __init__(self, spec: dict, pattern: str, pieces: dict[bytes, int]):
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.id_of_rank = list(pieces.values())
        self.nfc = bool(spec.get("normalizer"))
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
        self.id_of = spec["model"]["vocab"] | added
        self.bytes_of = {i: spelled(token) for token, i in self.id_of.items()}
        self.bytes_of |= {i: token.encode() for token, i in added.items()}
        longest_first = map(re.escape, sorted(added, key=len, reverse=True))
        self.cut = re.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) never matches

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Added tokens in it, such as "<|endoftext|>", are recognized; no BOS is put in front."""
        ids = []
        for i, part in enumerate(self.cut.split(text)):
            if i % 2:  # the added tokens are the odd parts
                ids.append(self.id_of[part])
                continue
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            ranks = self.bpe.encode_ordinary(part)
            if self.bpe.decode_bytes(ranks) != part.encode():
                raise ValueError(f"the tokenizer's pattern leaves out a part of {part!r:.80}")
            ids += [self.id_of_rank[rank] for rank in ranks]
        return ids

    encode_after = encode

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, with "�" for a part of a character and for an id without a token."""
        return b"".join(self.bytes_of.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")


class Library:
    """Any other tokenizer (Gemma, Llama 2, Mistral, Phi-3, ...)."""

    def __init__(self, spec: dict):
        from tokenizers import Tokenizer, decoders

        self.tokenizer = Tokenizer.from_str(json.dumps(spec | {"truncation": None, "padding": None}))
        self.id_of = self.tokenizer.get_vocab()
        # The file's own decoder may drop a space at the start.
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        byte_level = "ByteLevel" in json.dumps(spec.get("pre_tokenizer"))
        self.tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Sequence(steps)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_after(self, text: str) -> list[int]:
        """The ids of a text that goes on after other text: without the space that some put in front of all text."""
        return self.encode(MARK + text)[len(self.encode(MARK)) :]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class OfTransformers:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer):
        self.tokenizer, self.n_vocab = tokenizer, len(tokenizer)
        self.bos_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    encode_after = Library.encode_after

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)
