"""Tokenizers: byte-pair encodings (BPE) as a checkpoint's tokenizer.json describes them, merged by tiktoken."""

import re
import unicodedata
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import regex  # tiktoken brings it
import tiktoken

from models import MissingFile, fetch, first_line, quote, read_json


def load_tokenizer(name: str) -> "Tokenizer":
    """The tokenizer of a model that from_pretrained knows by this name. MissingFile where the checkpoint has none."""
    files = {}
    for file in ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        if "tokenizer.json" not in files:  # it says all that the other two do
            try:
                files[file] = fetch(name, file)
            except MissingFile:
                pass
    if not files.keys() & {"tokenizer.json", "vocab.json"}:
        raise MissingFile(f"{name} has no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    return Tokenizer.from_files(files)


GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM2 first cuts out each digit. A run of spaces then ends at a digit as at the end of the text.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
WHITE = r"[^\S\x1c-\x1f]*"  # what lstrip and rstrip take; Python's \s has these four control characters too
WELL_KNOWN_BOS = ("<|begin_of_text|>", "<|endoftext|>", "<bos>", "<s>")

# Byte-level vocabularies spell every byte as one visible character: itself if it is one, else the next unused one
# from U+0100 on, so that "Ġ" is the space (`bytes_to_unicode` of GPT-2's encoder.py).
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_OF_CHAR = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}

# What a tokenizer is tried on when it is loaded.
TRIAL = (
    "".join(map(chr, range(9, 127)))
    + " Mary's  gave 123 caf\u00e9s\n\n \u6771\u4eac \u0421\u0430\u0448\u0430 \U0001f600 \t"
)


class Tokenizer:
    """Text to token ids and back: a checkpoint's own Hugging Face files, with tiktoken doing the merging.

    Reads the two kinds of byte-pair encoding (BPE) that the model families here come with:

    - byte-level (GPT-2, GPT-NeoX, Llama 3, Qwen2 to 3, OLMo 2 and 3, SmolLM2, Mistral Nemo and Small): a pattern
      splits the text, and each piece starts as its bytes;
    - SentencePiece-style (Gemma, Llama 1 and 2, Mistral 7B, Phi-3): the text stays whole, with "▁" for " ", and starts
      as its characters; one that is not in the vocabulary is given as its bytes, spelled like "<0xE2>" ("byte
      fallback"). Most of these put one more "▁" in front.

    The ids are those of the `tokenizers` package with `add_special_tokens=False`. One difference is left: it ranks
    the pair of tokens to be merged, tiktoken the bytes of the result. They agree where the merges leave each token
    only one way to come about, as BPE training does, or where the file lists all ways, as Gemma, Llama, Mistral
    and Phi-3 do.

    bos_id: id of the BOS token, or else of the EOS token, or else None. n_vocab: 1 + the largest id.
    """

    def __init__(self, spec: dict, config: dict):
        """`spec`: the content of tokenizer.json. `config`: that of tokenizer_config.json, or {}."""
        model, added = spec.get("model"), spec.get("added_tokens") or []
        if not isinstance(model, dict) or not model.get("vocab"):
            raise ValueError("there is no model with a vocabulary in it")
        kind = model.get("type", "BPE")  # GPT-2's and NeoX's files name none
        odd = any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        if kind != "BPE" or "merges" not in model or odd:
            raise ValueError(f"model {kind} is not supported: only BPE is, with merges, no dropout, prefix or suffix")
        self.normalize = normalizer(spec.get("normalizer"))
        self.normalize_after = normalizer(spec.get("normalizer"), prepend=False)
        pattern, byte_level, self.mark_spaces = splitter(spec.get("pre_tokenizer"), model.get("byte_fallback"))
        pieces = ranked_pieces(model, byte_level, skip={t["content"] for t in added})
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.ids_of_rank = list(pieces.values())

        # Added tokens are cut out whole: most from the text as it is, the "normalized" ones from the normalized text.
        as_is = {t["content"]: t for t in added if not t.get("normalized")}
        normalized = {self.normalize(t["content"]): t for t in added if t.get("normalized")}
        self.cut_as_is, self.cut_normalized = cutter(as_is), cutter(normalized)
        self.added_id = {content: t["id"] for content, t in {**normalized, **as_is}.items()}

        id_of = model["vocab"] | {t["content"]: t["id"] for t in added}
        if odd := [i for i in id_of.values() if type(i) is not int or not 0 <= i < 2**31]:
            raise ValueError(f"{quote(odd[0])} is no token id")
        self.n_vocab = 1 + max(id_of.values())
        self.bytes_of_id = {i: token_bytes(token, byte_level) for token, i in model["vocab"].items()}
        self.bytes_of_id |= {t["id"]: t["content"].encode() for t in added}
        self.space = " " if byte_level else "▁"
        named = [config.get("bos_token"), config.get("eos_token")]
        named = [token.get("content") if isinstance(token, dict) else token for token in named]
        self.bos_id = next((id_of[token] for token in (*named, *WELL_KNOWN_BOS) if token in id_of), None)
        text = self.normalize(TRIAL)
        if any(not found.group() for found in regex.finditer(pattern, text, timeout=5)):
            raise ValueError(f"the pattern {quote(pattern)} matches empty text")
        self.ranks_of(text)

    @classmethod
    def from_files(cls, files: dict[str, Path]) -> "Tokenizer":
        """The tokenizer of a checkpoint: of its tokenizer.json or, as GPT-2 can do without, vocab.json and merges.txt.

        files: name -> path of those that exist; tokenizer_config.json, which says what BOS and EOS are, is optional.
        Raises ValueError, naming the file, if one is missing, malformed, or describes a tokenizer of another kind.
        """
        config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
        if "tokenizer.json" in files:
            path = files["tokenizer.json"]
            spec = read_json(path)
        elif "vocab.json" in files and "merges.txt" in files:
            path = f"{files['vocab.json']} and merges.txt"
            owner = str(config.get("tokenizer_class") or "GPT2Tokenizer")
            if not owner.startswith("GPT2"):  # others share the two files' format, but not GPT-2's pattern
                raise ValueError(f"{path}: a {owner} needs tokenizer.json too; only GPT-2's does not")
            vocab = read_json(files["vocab.json"])
            lines = files["merges.txt"].read_text(encoding="utf-8", errors="replace").split("\n")
            model = {"vocab": vocab, "merges": [m for m in lines if m and not m.startswith("#version")]}
            added = [{"content": t, "id": vocab[t]} for t in ("<|endoftext|>",) if t in vocab]
            spec = {"model": model, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": added}
        else:
            raise ValueError(f"no tokenizer.json, and no vocab.json with merges.txt, among {sorted(files)}")
        try:
            return cls(spec, config)
        except ValueError as error:
            raise ValueError(f"{path}: {first_line(error)}") from None
        except Exception as error:
            raise ValueError(f"{path} is malformed: {type(error).__name__}: {first_line(error)}") from None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Added tokens in it, such as "<|endoftext|>", are recognized; no BOS is put in front."""
        return self.ids_of(text, goes_on=False)

    def encode_after(self, text: str) -> list[int]:
        """The ids of a text that goes on after other text: like encode(), but with no "▁" or " " put in front.

        encode("We met") + encode_after(" Mary") == encode("We met Mary"), if no token reaches across.
        """
        return self.ids_of(text, goes_on=True)

    def ids_of(self, text: str, goes_on: bool) -> list[int]:
        ids = []
        for i, part in enumerate(self.cut_as_is.split(text)):
            if i % 2:  # the added tokens are the odd parts
                ids.append(self.id_of_added(part))
                continue
            normalize = self.normalize_after if goes_on and i == 0 else self.normalize
            for j, piece in enumerate(self.cut_normalized.split(normalize(part))):
                if j % 2:
                    ids.append(self.id_of_added(piece))
                elif piece:
                    ids += self.merge(self.mark_spaces(piece, i == j == 0, goes_on))
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, for people to read: "�" for a part of a character or an id without a token.

        Nothing is tidied away: what Llama 2 puts in front of a text is shown as the space that it stands for.
        """
        text = b"".join(self.bytes_of_id.get(i, b"\xff") for i in ids).decode("utf-8", errors="replace")
        return text.replace(self.space, " ")

    def id_of_added(self, found: str) -> int:
        return self.added_id[found if found in self.added_id else found.strip()]  # strip: see lstrip, rstrip below

    def merge(self, text: str) -> list[int]:
        ranks = self.ranks_of(text)
        ids = [i for rank in ranks for i in self.ids_of_rank[rank]]
        if len(ids) < len(ranks):
            raise ValueError(f"the vocabulary has no token for some byte of {quote(text)}")
        return ids

    def ranks_of(self, text: str) -> list[int]:
        ranks = self.bpe.encode_ordinary(text)
        if self.bpe.decode_bytes(ranks) != text.encode():
            raise ValueError(f"the tokenizer's pattern leaves out a part of {quote(text)}")
        return ranks


def normalizer(spec: dict | None, prepend: bool = True) -> Callable[[str], str]:
    """The function str -> str that a tokenizer.json's "normalizer" describes. prepend: with its steps Prepend?"""
    match spec:
        case None:
            return lambda text: text
        case {"type": "NFC"}:  # é as one character rather than e and an accent
            return lambda text: unicodedata.normalize("NFC", text)
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return lambda text: text.replace(old, new)
        case {"type": "Prepend", "prepend": str(prefix)}:
            return lambda text: prefix + text if text and prepend else text
        case {"type": "Sequence", "normalizers": specs}:
            steps = [normalizer(s, prepend) for s in specs]
            return lambda text: reduce(lambda t, step: step(t), steps, text)
    raise ValueError(
        f"normalizer {quote(spec, 300)} is not supported: only NFC, Replace (of a string), Prepend and Sequence are"
    )


def splitter(spec: dict | None, byte_fallback: bool) -> tuple[str, bool, Callable[[str, bool, bool], str]]:
    """The (regular expression of a piece, is it byte-level?, what to do with the spaces) of a "pre_tokenizer"."""
    whole, as_it_is = r"[\s\S]+", spaces(" ", "never")
    match spec:
        case {"type": "ByteLevel"}:
            scheme = "always" if spec.get("add_prefix_space", False) else "never"
            return GPT2_PATTERN if spec.get("use_regex", True) else whole, True, spaces(" ", scheme)
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        } if (behavior, invert) in (("Isolated", False), ("Removed", True)):
            # What the pattern does not match becomes a piece too or, in OLMo 2, is dropped. Their patterns match all
            # text, so the two are one; a pattern that leaves something out is refused (ranks_of).
            return pattern, True, as_it_is
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False} as byte_level,
            ],
        } if byte_level.get("use_regex", True):
            return DIGITS_PATTERN, True, as_it_is
        case None if byte_fallback:
            return whole, False, as_it_is
        case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"} if byte_fallback:
            return r"[^ ]* |[^ ]+", False, as_it_is  # Gemma: splits nothing, as its normalizer leaves no space
        case {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first" | "always" | "never" as scheme,
            "split": False,
        } if byte_fallback:
            return whole, False, spaces("▁", scheme)
    raise ValueError(
        f"pre_tokenizer {quote(spec, 300)} with byte_fallback {bool(byte_fallback)} is not supported: only ByteLevel, "
        "Split by a pattern + ByteLevel, Digits one by one + ByteLevel and, with byte_fallback, none, Split at ' ' or "
        'Metaspace with "▁" and without split are'
    )


def spaces(mark: str, scheme: str) -> Callable[[str, bool, bool], str]:
    """The function (text, begins, goes_on) -> text with `mark` for " ", and by `scheme` one in front.

    A text is what lies between two added tokens. begins: does the input begin with it? goes_on: does the input go on
    after other text? scheme: "always", "never", or "first" for the input's beginning only.
    """

    def marked(text: str, begins: bool, goes_on: bool) -> str:
        text = text.replace(" ", mark)
        due = (scheme != "never" and not goes_on) if begins else scheme == "always"
        return mark + text if due and not text.startswith(mark) else text

    return marked


def cutter(added: dict[str, dict]) -> re.Pattern:
    """A pattern whose `split` gives the text between added tokens (even parts) and the added tokens (odd parts)."""
    branches = []
    for content, flags in sorted(added.items(), key=lambda item: -len(item[0])):  # the longest one wins
        if flags.get("single_word"):
            raise ValueError(f"added token {content!r} with the flag single_word is not supported")
        before, after = (WHITE if flags.get(side) else "" for side in ("lstrip", "rstrip"))
        branches.append(before + re.escape(content) + after)
    return re.compile("(" + ("|".join(branches) or "(?!)") + ")")  # (?!) never matches


def token_bytes(token: str, byte_level: bool) -> bytes:
    """The bytes that a token of the vocabulary spells."""
    if byte_level:
        return bytes(BYTE_OF_CHAR[c] for c in token) if set(token) <= BYTE_OF_CHAR.keys() else token.encode()
    return bytes([int(token[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.encode()


def ranked_pieces(model: dict, byte_level: bool, skip: set[str]) -> dict[bytes, list[int]]:
    """All that tiktoken may merge to -> its ids, in the order of tiktoken's ranks: the lowest is merged first.

    That is the order of the merges, which need not be that of the ids. An entry of the vocabulary that no merge makes
    is left out, so that nothing is merged to it; one that several pairs make has the place of the first.
    """
    vocab = model["vocab"]
    if byte_level:  # the bytes that UTF-8 never uses may be missing
        pieces = {bytes([b]): [vocab[c]] if c in vocab else [] for c, b in BYTE_OF_CHAR.items()}
    else:
        byte_ids = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
        if None in byte_ids:
            raise ValueError("byte_fallback is on, but the vocabulary lacks some of the tokens <0x00> to <0xFF>")
        pieces = {bytes([b]): [byte_ids[b]] for b in range(256)}
        # Next the characters, which tiktoken must put together from bytes: "▁" is E2 96 81, so E2 96 has a rank too.
        # If it is left over, as the start of a character that is not in the vocabulary, it stands for two bytes.
        for char in (token.encode() for token in vocab if len(token) == 1):
            for end in range(2, len(char)):
                pieces.setdefault(char[:end], [byte_ids[b] for b in char[:end]])
            pieces[char] = [vocab[char.decode()]]
    for merge in model["merges"]:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(f"merge {merge!r} does not join two tokens of the vocabulary to a third")
        pieces.setdefault(b"".join(token_bytes(part, byte_level) for part in pair), [vocab["".join(pair)]])
    if model.get("ignore_merges"):
        # Llama 3: a piece that is in the vocabulary is one token, even if no merges lead to it. tiktoken does so with
        # all that has a rank, but merges to it as well, so there must be no two tokens that make it.
        unmerged = {token_bytes(token, byte_level): token for token in vocab if token not in skip}
        unmerged = {piece: token for piece, token in unmerged.items() if piece not in pieces}
        for piece, token in unmerged.items():
            if any(piece[:k] in pieces and piece[k:] in pieces for k in range(1, len(piece))):
                raise ValueError(f"ignore_merges is on, but no merge makes {token!r}, though two tokens could")
        pieces |= {piece: [vocab[token]] for piece, token in unmerged.items()}
    return pieces
