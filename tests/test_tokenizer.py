"""support.tokenizer against the library `tokenizers`, id for id, and which of the two libraries does the work.

GPT-2's and GPT-NeoX's published files are used where they lie beside the repository. The other kinds (those in KINDS)
are trained here, small, on made-up text of the same sort as they are then compared on.
"""

import json
import random
import re
import sys
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference

from support.tokenizer import ByteLevel, Library, NoTokenizer, load_tokenizer

PUBLISHED = Path(__file__).parents[2] / "shared" / "tokenizers"
CONTRACTION, REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
END = "<|endoftext|>"

FRAGMENTS = (
    """
When Mary and John went to the store§, John gave a drink to§The keys that the man near the cabinet holds§are§is§haha
don't§I'LL§we've§they'd§she's§IT'S§o'clock§'tis§rock'n'roll§naïve café§def f(x, *, y=0):§return {'a': [1, 2]}§banana
if (a<=b && !c) { i++; }§// comment§/* x */§#include <stdio.h>§https://example.org/a?b=c&d=%20e§snake_case§CamelCase
Привет, мир§сегодня§你好，世界§今天天气很好§日本語のテスト§مرحبا بالعالم§नमस्ते दुनिया§क्षत्रिय§สวัสดีชาวโลก§한국어§שלום
Ελληνικά
😀§👩‍👩‍👧‍👦§🏳️‍🌈§👍🏽§🇫🇷§❤️§∑∂√∞§≠§½§٣٤٥§Ⅷ§１２３§0§7§42§1984§123456789§3.14159§1,000,000§$5.00§50%§…§—§“quoted”§'§"
e\u0301§n\u0303o§a\u030a§\u1112\u1161\u11ab§o\u0302\u0301§A\u030a\u212b§\u0e33§ﬁ§ſ'ſ§K'ſ§\u200b§\u00a0§\u3000§\u2028§\x85
\x00§\x7f§\ufeff§aaaa
\U00010348§\U0001f9ff§▁§a▁b§<0x0A>§<0xE2>§<|endoftext|>§<|padding|>§<bos>§<s>§<|im_start|>user§<unk>§zqx§ qzqzq§qzqzqs
<|user|>§<think>§[INST]§<table>
""".strip("\n")
    .replace("\n", "§")
    .split("§")
)
ASSIGNED = [c for c in range(0x20000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")]
TRICKY = "§ §  §\n§ \n\n §▁§▁ ▁§7§ 7§  7§x  12   3 §3.5\n\n 10§½²Ⅷ§a\t\t8 \u3000 9§ 😀 é 日本".split("§")
TRICKY += [a + b + c for a in ("", " ", "a ") for b in ("<s>", "[INST]", "<|user|>") for c in ("", " ", " b", "\n \n7")]
GAPS = [" "] * 8 + ["", "", "  ", "   ", "\n", "\n\n", "\t", "\t\t", " \n", "\r\n", "\n    "]


@cache
def made_up_lines(n: int, seed: int) -> list[str]:
    """Lines of fragments, words of random letters, random characters of all scripts, and runs of up to 40 spaces."""
    rng = random.Random(seed)
    lines = []
    for _ in range(n):
        line = rng.choice(["", "", "", " ", "\n"])
        for _ in range(rng.randint(1, 8)):
            word = "".join(rng.choices("etaoinshrdluETAOé", k=rng.randint(1, 9)))
            strange = "".join(map(chr, rng.choices(ASSIGNED, k=rng.randint(1, 3))))
            line += rng.choice([word, word, strange, *rng.choices(FRAGMENTS, k=5)])
            line += rng.choice(GAPS + [" " * rng.randint(2, 40)])
        lines.append(line)
    return lines


def differences(reference: Reference, ours: ByteLevel | Library, lines: list[str]) -> list[tuple]:
    expected = reference.encode_batch(lines, add_special_tokens=False)
    return [(x, e.ids, ours.encode(x)) for x, e in zip(lines, expected) if e.ids != ours.encode(x)]


def save(directory: Path, **contents) -> str:
    """Writes `name=content` as name.json; returns what load_tokenizer takes."""
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return str(directory)


def both(spec: dict, directory: Path) -> tuple[Reference, ByteLevel | Library]:
    return Reference.from_str(json.dumps(spec)), load_tokenizer(save(directory, tokenizer=spec))


# ---------------------------------------------------------------------------------------------------------------------
# The published tokenizers


@pytest.fixture(scope="module", params=["gpt2", "gpt-neox-20b"])
def published(request):
    folder = PUBLISHED / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    if request.param == "gpt2":
        reference = Reference(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        reference.add_special_tokens([END])
    else:
        reference = Reference.from_file(str(folder / "tokenizer.json"))
    return reference, load_tokenizer(str(folder))


def test_published_tokenizers_give_the_same_ids(published):
    assert isinstance(published[1], ByteLevel)
    assert not differences(*published, made_up_lines(4000, seed=1))


def test_published_tokenizers_agree_on_each_entry_of_their_vocabulary(published):
    reference, ours = published
    texts = [ours.decode([i]) for i in range(ours.n_vocab)]
    assert not differences(reference, ours, texts + [f"a{text}b" for text in texts])
    assert reference.get_vocab_size() == ours.n_vocab and ours.bos_id == reference.token_to_id(END)


def test_published_gpt2_by_heart():
    if not (PUBLISHED / "gpt2").is_dir():
        pytest.skip(f"{PUBLISHED / 'gpt2'} is not there")
    ours = load_tokenizer(str(PUBLISHED / "gpt2"))
    assert ours.encode("Hello world" + END) == [15496, 995, 50256] and ours.bos_id == 50256 and ours.n_vocab == 50257
    assert [ours.decode([i]) for i in (15496, 995, 50256, 126)] == ["Hello", " world", END, "�"]


# ---------------------------------------------------------------------------------------------------------------------
# Small tokenizers of each kind, as the dict that their tokenizer.json holds

GPT2_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False)


def isolate(pattern: str, behavior="isolated", invert=False):
    """The pre-tokenizer of Qwen2 and Llama 3. OLMo 2's removes what is not matched ("removed" and invert)."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level])


def train(pre_tokenizer, normalizer=None, **options) -> dict:
    """The spec of a BPE tokenizer trained on made-up text without "<...>", "[INST]" and "zq", which must be unknown."""
    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizer
    if normalizer:
        reference.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, **options)
    reference.train_from_iterator((re.sub(r"<\S*>|\[INST\]|zq", "", x) for x in made_up_lines(1500, seed=2)), trainer)
    return json.loads(reference.to_str())


def train_byte_level(pre_tokenizer, normalizer=None) -> dict:
    return train(pre_tokenizer, normalizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def number(spec: dict, tokens: list[str], special: tuple[str, ...]) -> dict:
    """Gives the tokens ids in random order, which say nothing about the order of merges, and then the special ones."""
    tokens = tokens[:]
    random.Random(3).shuffle(tokens)
    spec["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    spec["added_tokens"] = [added_token(token, len(tokens) + i) for i, token in enumerate(special)]
    return spec


def step(kind: str, **fields) -> dict:
    return {"type": kind, **fields}


def added_token(content: str, i: int, special=True, **flags) -> dict:
    off = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=i, content=content, special=special) | off | flags


def all_pairs(tokens: list[str]) -> list[tuple[str, str]]:
    """Every pair that makes a token, in the order in which `transformers` lists them when it converts a vocabulary."""
    rank = {token: i for i, token in enumerate(tokens)}
    pairs = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in rank and t[i:] in rank]
    return sorted(pairs, key=lambda p: (rank[p[0] + p[1]], rank[p[0]], rank[p[1]]))


def smollm2_kind() -> dict:
    spec = train_byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_SPLIT]))
    spec["model"]["merges"].append(["1", "9"])  # nothing may be merged to "19", as each digit is a piece
    return number(spec, [*spec["model"]["vocab"], "19"], (END, "<|im_start|>"))


def olmo2_kind() -> dict:
    spec = train_byte_level(isolate(LLAMA3_PATTERN, "removed", invert=True))
    return number(spec, [*spec["model"]["vocab"]], (END, "<|im_start|>"))


def qwen2_kind() -> dict:
    """Qwen2's, 2.5's and 3's, of which the last two have added tokens that are not special."""
    spec = train_byte_level(isolate(QWEN2_PATTERN), normalizers.NFC())
    number(spec, [*spec["model"]["vocab"], "zqx", "Ġzqx"], (END, "<|im_start|>", "<think>"))  # no merge leads to zqx
    spec["added_tokens"][-1]["special"] = False
    return spec


def llama3_kind(pairs: bool, pattern=LLAMA3_PATTERN) -> dict:
    spec = train_byte_level(isolate(pattern))
    tokens = [*spec["model"]["vocab"], "Ġqzqzq"]  # no two tokens make this one
    if pairs:
        spec["model"]["merges"] = all_pairs(tokens)
    spec["model"]["ignore_merges"] = True
    return number(spec, tokens, ("<|begin_of_text|>", "<|end_of_text|>"))


def tekken_kind() -> dict:
    """Mistral Nemo's and Small's: the special tokens are in the vocabulary too, before all others."""
    spec = llama3_kind(pairs=True, pattern=TEKKEN_PATTERN)
    special = ("<unk>", "<s>", "</s>", "[INST]")
    spec["added_tokens"] = [added_token(token, i) for i, token in enumerate(special)]
    tokens = [*special, *spec["model"]["vocab"]]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    return spec


def gemma_kind() -> dict:
    """Gemma's. Characters outside the 150 commonest are not in it."""
    word_starts = pre_tokenizers.Split("▁", "merged_with_next")
    spec = train(word_starts, normalizers.Replace(" ", "▁"), limit_alphabet=150)
    spec["model"] |= dict(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokens = [*spec["model"]["vocab"], *(f"<0x{b:02X}>" for b in range(256)), "<unk>"]
    number(spec, tokens, ("<bos>", "<eos>", "<s>", "<|user|>", "[INST]", "<table>"))
    spec["pre_tokenizer"] = step("Split", pattern={"String": " "}, behavior="MergedWithPrevious", invert=False)
    spec["added_tokens"].append(added_token("<unk>", spec["model"]["vocab"]["<unk>"]))
    return spec


def llama2_kind() -> dict:
    """Llama 2's, that of Mistral 7B v0.1, and Phi-3's: the text starts with "▁"."""
    steps = [step("Prepend", prepend="▁"), step("Replace", pattern={"String": " "}, content="▁")]
    return gemma_kind() | {"normalizer": step("Sequence", normalizers=steps), "pre_tokenizer": None}


def metaspace_kind(scheme="first") -> dict:
    """That of Mistral 7B v0.3, and what `transformers` now saves for Llama 2 and Phi-3."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return llama2_kind() | {"normalizer": None, "pre_tokenizer": metaspace}


KINDS = {
    "gpt2": lambda: number(spec := train_byte_level(GPT2_SPLIT), [*spec["model"]["vocab"]], (END,)),
    "smollm2": smollm2_kind,
    "olmo2": olmo2_kind,
    "qwen2": qwen2_kind,
    "llama3": lambda: llama3_kind(pairs=True),
    "llama3, merges as trained": lambda: llama3_kind(pairs=False),
    "tekken": tekken_kind,
    "gemma": gemma_kind,
    "llama2": llama2_kind,
    "mistral 7B v0.3": metaspace_kind,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    return request.param, *both(KINDS[request.param](), tmp_path_factory.mktemp("kind"))


def test_each_kind_gives_the_same_ids(kind):
    name, reference, ours = kind
    assert isinstance(ours, Library if name in ("gemma", "llama2", "mistral 7B v0.3") else ByteLevel)
    lines = made_up_lines(2500, seed=4) + TRICKY
    assert not differences(reference, ours, lines)
    found = {i for line in lines for i in ours.encode(line)}
    assert len(found) > 0.45 * ours.n_vocab  # the comparison is of the vocabulary at large, not of a few tokens


def test_each_kind_agrees_on_each_entry_of_its_vocabulary(kind):
    _, reference, ours = kind
    assert reference.get_vocab_size() == ours.n_vocab
    texts = [ours.decode([i]) for i in range(ours.n_vocab)]
    assert not differences(reference, ours, texts + [f"a{text}b" for text in texts])


def test_decode_undoes_encode(kind):
    name, _, ours = kind
    for line in made_up_lines(300, seed=5):
        text = unicodedata.normalize("NFC", line) if name == "qwen2" else line
        if name == "gemma":
            text = text.replace("▁", " ")
        if name not in ("llama2", "mistral 7B v0.3"):  # which put a space in front
            assert ours.decode(ours.encode(line)) == text
    assert ours.decode([]) == "" and ours.encode("") == []
    assert isinstance(ours.decode([ours.n_vocab + 7]), str)  # a row that only pads the embedding


ICE = "\U0001f9ca"  # in no vocabulary here, so that no token reaches from it into what follows


def test_encode_after_puts_nothing_in_front(kind):
    name, reference, ours = kind
    for line in made_up_lines(200, seed=9) + TRICKY + ["", ",", "a", " a", "  a"]:
        if name in ("llama2", "mistral 7B v0.3"):
            whole = reference.encode(ICE + line, add_special_tokens=False).ids
            assert ours.encode(ICE) + ours.encode_after(line) == whole
        else:
            assert ours.encode_after(line) == ours.encode(line)


def test_entries_no_merge_leads_to(tmp_path):
    for spec, text, whole in ((qwen2_kind(), " zqx", False), (llama3_kind(pairs=True), " qzqzq", True)):
        reference, ours = both(spec, tmp_path)
        assert (len(ours.encode(text)) == 1) == whole and len(ours.encode(text + "s")) > 1
        assert not differences(reference, ours, [text, text + "s", text[1:], "a" + text, text * 2])


@pytest.mark.parametrize("scheme", ["first", "always", "never", "none", "Prepend"])
def test_what_is_put_in_front(scheme, tmp_path):
    spec = llama2_kind() if scheme == "Prepend" else metaspace_kind(scheme)
    if scheme == "none":
        spec["pre_tokenizer"] = None
    for token in spec["added_tokens"]:  # one that takes the spaces before it, and one that is cut out afterwards
        token["lstrip"], token["normalized"] = token["content"] == "<s>", token["content"] == "[INST]"
    reference, ours = both(spec, tmp_path)
    lines = made_up_lines(500, seed=8) + TRICKY
    assert not differences(reference, ours, lines)
    assert not [x for x in lines if ours.encode(ICE) + ours.encode_after(x) != reference.encode(ICE + x).ids]
    starts = [ours.decode(ours.encode(text)) for text in ("a", " a", "<|user|>a", "<|user|> a")]
    expected = {"first": [" a", " a", "<|user|>a", "<|user|> a"], "always": [" a", " a", "<|user|> a", "<|user|> a"]}
    expected["Prepend"] = [" a", "  a", "<|user|> a", "<|user|>  a"]
    assert starts == expected.get(scheme, ["a", " a", "<|user|>a", "<|user|> a"])


# ---------------------------------------------------------------------------------------------------------------------
# Added tokens, BOS, files


def test_vocab_and_merges_equal_tokenizer_json(tmp_path):
    spec = train_byte_level(GPT2_SPLIT)
    number(spec, [*spec["model"]["vocab"], END], ())
    spec["added_tokens"] = [added_token(END, spec["model"]["vocab"][END])]
    reference, one_file = both(spec, tmp_path)
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in spec["model"]["merges"]) + "\n"
    )
    (tmp_path / "tokenizer.json").unlink()
    two_files, lines = load_tokenizer(save(tmp_path, vocab=spec["model"]["vocab"])), made_up_lines(500, seed=7)
    assert not differences(reference, two_files, lines) and isinstance(two_files, ByteLevel)
    assert [one_file.encode(x) for x in lines] == [two_files.encode(x) for x in lines]
    assert one_file.bos_id == two_files.bos_id == spec["model"]["vocab"][END] and one_file.n_vocab == two_files.n_vocab
    save(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(ValueError, match="a Qwen2Tokenizer needs tokenizer.json"):
        load_tokenizer(str(tmp_path))


ALPHABET = pre_tokenizers.ByteLevel.alphabet()
BYTES = {"type": "BPE", "vocab": {char: i for i, char in enumerate(ALPHABET)}, "merges": []}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def plain(*special: str, **changes) -> dict:
    """The smallest byte-level spec, whose special tokens have the ids from 300 on."""
    added = [added_token(token, 300 + i) for i, token in enumerate(special)]
    return {"model": BYTES, "pre_tokenizer": BYTE_LEVEL, "added_tokens": added} | changes


@pytest.mark.parametrize("special, config, bos", [
    (["<x>", "<y>"], {"bos_token": "<y>", "eos_token": "<x>"}, 301),
    (["<x>", "<y>"], {"bos_token": {"content": "<y>", "lstrip": False}}, 301),
    (["<x>", "<y>"], {"bos_token": None, "eos_token": {"content": "<x>"}}, 300),  # Qwen2 has no BOS
    (["<s>", "<y>"], {"eos_token": "<y>"}, 301),
    (["<s>", "<y>"], {"bos_token": "<not a token>", "eos_token": None}, 300),
    (["<x>", "<|endoftext|>"], None, 301),
    (["<eos>", "<bos>"], {}, 301),
    (["<s>", "</s>"], None, 300),
    (["<|end_of_text|>", "<|begin_of_text|>"], None, 301),
    (["<x>"], {"bos_token": None}, None),
])  # fmt: skip
def test_bos(special, config, bos, tmp_path):
    files = {} if config is None else {"tokenizer_config": config}
    ours = load_tokenizer(save(tmp_path, tokenizer=plain(*special), **files))
    assert ours.bos_id == bos and ours.n_vocab == 300 + len(special)
    assert ours.encode("a" + special[-1]) == [BYTES["vocab"]["a"], 299 + len(special)]  # and no BOS before it


def split_by(pattern: str, behavior="Isolated", invert=False) -> dict:
    split = step("Split", pattern={"Regex": pattern}, behavior=behavior, invert=invert)
    return step("Sequence", pretokenizers=[split, BYTE_LEVEL | {"use_regex": False}])


@pytest.mark.parametrize("changes", [
    {"model": BYTES | {"vocab": {char: i for i, char in enumerate(ALPHABET) if char != "!"}}},
    {"model": BYTES | {"end_of_word_suffix": "</w>"}},
    {"model": BYTES | {"vocab": BYTES["vocab"] | {"ab": 256}, "ignore_merges": True}},  # no merge makes it, two could
    {"normalizer": step("Lowercase")},
    {"pre_tokenizer": None},
    {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}},
    {"pre_tokenizer": split_by("\\s", "Removed")},
    {"pre_tokenizer": split_by("a", "MergedWithNext")},
    {"pre_tokenizer": split_by("a*")},  # it matches empty text, at which tiktoken panics
    *({"added_tokens": [added_token("<s>", 300, **{flag: True})]} for flag in ("lstrip", "rstrip", "single_word")),
    {"normalizer": step("NFC"), "added_tokens": [added_token("e", 300, normalized=True)]},
])  # fmt: skip
def test_what_tiktoken_does_otherwise_is_left_to_the_library(changes, tmp_path):
    assert isinstance(both(plain(), tmp_path)[1], ByteLevel)
    reference, ours = both(plain(**changes), tmp_path)
    assert isinstance(ours, Library) and not differences(
        reference, ours, made_up_lines(300, seed=6) + ["a <s> b", "a<s>b", "ab", " abc! e\u0301"]
    )


def test_no_special_tokens_no_truncation(tmp_path):
    spec = llama2_kind()
    reference, _ = both(spec, tmp_path)
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    spec["post_processor"] = step(
        "TemplateProcessing", single=[bos, {"Sequence": {"id": "A", "type_id": 0}}], pair=[],
        special_tokens={"<bos>": {"id": "<bos>", "ids": [reference.token_to_id("<bos>")], "tokens": ["<bos>"]}},
    )  # fmt: skip
    assert not differences(reference, load_tokenizer(save(tmp_path, tokenizer=spec)), ["one two three four"])


def test_a_pattern_that_leaves_something_out_is_refused(tmp_path):
    spec = plain(pre_tokenizer=split_by(r"[^\u2603]+"))
    ours = load_tokenizer(save(tmp_path, tokenizer=spec))
    with pytest.raises(ValueError, match="pattern leaves out a part of 'a☃'"):
        ours.encode("a☃")


@pytest.mark.parametrize("contents, message", [
    ("{", "cannot be read: Expecting"),
    ([1], "cannot be read: cannot convert"),
    ({"model": 1}, "tokenizer.json cannot be read: AttributeError"),
    (plain(model=BYTES | {"vocab": {"a": 0}, "merges": ["a b"]}), "tokenizer.json cannot be read: Exception: .*vocab"),
    (plain(model=BYTES | {"merges": ["a b"]}), "tokenizer.json cannot be read: KeyError: 'ab'"),
    (plain(model=BYTES | {"merges": 3}), "tokenizer.json cannot be read: TypeError"),
    (plain(model=BYTES | {"vocab": BYTES["vocab"] | {"a": 2**40}}), "tokenizer.json cannot be read: Exception"),
    (plain(model=BYTES | {"vocab": BYTES["vocab"] | {"a": -1}}), "tokenizer.json cannot be read: Exception"),
    (plain(added_tokens=[{}]), "tokenizer.json cannot be read: KeyError"),
    (plain(pre_tokenizer=split_by("(")), "tokenizer.json cannot be read: error: missing"),
    (plain(model={"type": "New"}), "tokenizer.json cannot be read: "),
])  # fmt: skip
def test_a_damaged_file_is_one_clear_line(contents, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(save(tmp_path, tokenizer=contents))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_panic_in_rust_is_one_clear_line(tmp_path, monkeypatch):
    class PanicException(BaseException):  # as that of pyo3
        pass

    def panics(self, text):
        raise PanicException("slice index starts at 3\nbut ends at 0")

    monkeypatch.setattr(ByteLevel, "encode", panics)
    with pytest.raises(ValueError, match="tokenizer.json cannot be read: PanicException: slice index starts at 3$"):
        load_tokenizer(save(tmp_path, tokenizer=plain()))


def test_missing_files(tmp_path):
    with pytest.raises(NoTokenizer, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(NoTokenizer, match="merges.txt"):
        load_tokenizer(save(tmp_path, vocab={"a": 0}))
    (tmp_path / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="vocab.json or merges.txt cannot be read"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer_config.json: cannot be read"):
        load_tokenizer(save(tmp_path, tokenizer=plain(), tokenizer_config="{"))


def test_the_library_is_named_if_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="tokenizer.json cannot be read: .*tokenizers"):
        load_tokenizer(save(tmp_path, tokenizer=llama2_kind()))
    assert load_tokenizer(save(tmp_path, tokenizer=plain(), tokenizer_config={})).encode("a")


def test_a_tokenizer_of_transformers(tmp_path):
    """One that is in memory is taken where ours are, and adds no special tokens."""
    import transformers

    import tasks

    ours = load_tokenizer("toy-gpt2")
    folder = Path(tasks.__file__).parent / "toy" / "gpt2"
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token=END)
    adapted = load_tokenizer(theirs)
    assert adapted.bos_id == ours.bos_id and tasks.ioi(adapted, 12) == tasks.ioi(ours, 12)
    ids = ours.encode("Then, Mary and John")
    assert adapted.decode(ids) == ours.decode(ids) and adapted.encode_after(" Mary") == ours.encode_after(" Mary")
