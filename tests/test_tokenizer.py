"""support.tokenizer.Tokenizer against the `tokenizers` package, id for id.

GPT-2's and GPT-NeoX's published files are used where they lie beside the repository. The other kinds (those in KINDS)
are trained here, small, on made-up text of the same sort as they are then compared on.
"""

import json
import random
import re
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Reference

from support.tokenizer import Tokenizer

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


def differences(reference: Reference, ours: Tokenizer, lines: list[str]) -> list[tuple]:
    expected = reference.encode_batch(lines, add_special_tokens=False)
    return [(x, e.ids, ours.encode(x)) for x, e in zip(lines, expected) if e.ids != ours.encode(x)]


def save(directory: Path, **contents) -> dict[str, Path]:
    """Writes `name=content` as name.json; returns what `from_files` takes."""
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return {f"{name}.json": directory / f"{name}.json" for name in contents}


def both(spec: dict, directory: Path) -> tuple[Reference, Tokenizer]:
    return Reference.from_str(json.dumps(spec)), Tokenizer.from_files(save(directory, tokenizer=spec))


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
    return reference, Tokenizer.from_files({p.name: p for p in folder.iterdir()})


def test_published_tokenizers_give_the_same_ids(published):
    assert not differences(*published, made_up_lines(4000, seed=1))


def test_published_tokenizers_agree_on_each_entry_of_their_vocabulary(published):
    reference, ours = published
    texts = [ours.decode([i]) for i in range(ours.n_vocab)]
    assert not differences(reference, ours, texts + [f"a{text}b" for text in texts])
    assert reference.get_vocab_size() == ours.n_vocab and ours.bos_id == reference.token_to_id(END)


def test_published_gpt2_by_heart():
    if not (PUBLISHED / "gpt2").is_dir():
        pytest.skip(f"{PUBLISHED / 'gpt2'} is not there")
    ours = Tokenizer.from_files({p.name: p for p in (PUBLISHED / "gpt2").iterdir()})
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


def added_token(content: str, i: int, special=True, **flags) -> dict:
    off = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=i, content=content, special=special) | off | flags


def all_pairs(tokens: list[str], rank: dict[str, int], by_length: bool) -> list[tuple[str, str]]:
    """Every pair that makes a token, in the order in which `transformers` lists them when it converts a vocabulary."""
    pairs = [(t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in rank and t[i:] in rank]
    if by_length:  # SentencePiece, with scores
        return sorted(pairs, key=lambda p: (rank[p[0] + p[1]], -len(p[0]), -len(p[1])))
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
        spec["model"]["merges"] = all_pairs(tokens, {t: i for i, t in enumerate(tokens)}, by_length=False)
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


def sentencepiece_kind(order: str) -> dict:
    """Gemma's, or Llama 2's, whose text starts with "▁". Characters outside the 150 commonest are not in it."""
    word_starts = pre_tokenizers.Split("▁", "merged_with_next")
    spec = train(word_starts, normalizers.Replace(" ", "▁"), limit_alphabet=150)
    tokens, merges = [*spec["model"]["vocab"]], spec["model"]["merges"]
    if order != "trained":  # as in Gemma's file: runs that no training made, and every pair of every token
        runs = [c * n for c in "▁\n" for n in range(2, 32)]
        tokens = [*runs, *(t for t in tokens if t not in runs)]
        rank = {t: max(0, i - len(runs)) if order == "by length" else i for i, t in enumerate(tokens)}
        merges = all_pairs(tokens, rank, by_length=order == "by length")
    spec["model"] |= dict(byte_fallback=True, fuse_unk=True, unk_token="<unk>", merges=[" ".join(m) for m in merges])
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    number(spec, [*tokens, *byte_tokens, "<unk>"], ("<bos>", "<eos>", "<s>", "<|user|>", "[INST]", "<table>"))
    if order != "trained":  # as in Gemma's file
        spec["model"]["vocab"]["\t"] = spec["model"]["vocab"]["<0x09>"]
    spec["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    spec["added_tokens"].append(added_token("<unk>", spec["model"]["vocab"]["<unk>"]))
    return spec


def gemma3_kind() -> dict:
    """In Gemma 3's file, runs of newlines and of "▁" are added tokens too, and merges are lists."""
    spec = sentencepiece_kind("by id")
    vocab = spec["model"]["vocab"]
    runs = [token for token in vocab if set(token) in ({"\n"}, {"▁"}) and token != "▁"]
    assert "\n" in runs and "▁▁" in runs
    spec["added_tokens"] += [added_token(run, vocab[run], special=False) for run in runs]
    spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
    return spec


def llama2_kind() -> dict:
    """Llama 2's, and that of Mistral 7B v0.1."""
    spec = sentencepiece_kind("by id")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = [{"type": "Prepend", "prepend": "▁"}, replace]
    spec |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
    spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
    return spec


def phi3_kind() -> dict:
    spec = llama2_kind()
    for token in spec["added_tokens"]:
        token["rstrip"] = token["content"] in ("<|user|>", "<eos>")
    return spec


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
    "gemma, merges as trained": lambda: sentencepiece_kind("trained"),
    "gemma, all pairs by length": lambda: sentencepiece_kind("by length"),
    "gemma, all pairs by id": lambda: sentencepiece_kind("by id"),
    "gemma3": gemma3_kind,
    "llama2": llama2_kind,
    "phi3": phi3_kind,
    "mistral 7B v0.3": metaspace_kind,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    return request.param, *both(KINDS[request.param](), tmp_path_factory.mktemp("kind"))


def test_each_kind_gives_the_same_ids(kind):
    _, reference, ours = kind
    lines = made_up_lines(2500, seed=4) + TRICKY
    assert not differences(reference, ours, lines)
    found = {i for line in lines for i in ours.encode(line)}
    assert len(found) > 0.45 * ours.n_vocab  # the comparison is of the vocabulary at large, not of a few tokens


def test_each_kind_agrees_on_each_entry_of_its_vocabulary(kind):
    _, reference, ours = kind
    assert reference.get_vocab_size() in (ours.n_vocab, ours.n_vocab + 1)  # Gemma's "\t" has the id of another token
    texts = [ours.decode([i]) for i in range(ours.n_vocab)]
    assert not differences(reference, ours, texts + [f"a{text}b" for text in texts])


def test_decode_undoes_encode(kind):
    name, _, ours = kind
    for line in made_up_lines(300, seed=5):
        text = unicodedata.normalize("NFC", line) if name == "qwen2" else line
        if "gemma" in name:
            text = text.replace("▁", " ")
        if name not in ("llama2", "phi3", "mistral 7B v0.3"):  # which put a space in front
            assert ours.decode(ours.encode(line)) == text
    assert ours.decode([]) == "" and ours.encode("") == []
    assert isinstance(ours.decode([ours.n_vocab + 7]), str)  # a row that only pads the embedding


ICE = "\U0001f9ca"  # in no vocabulary here, so that no token reaches from it into what follows


def test_encode_after_puts_nothing_in_front(kind):
    name, reference, ours = kind
    for line in made_up_lines(200, seed=9) + TRICKY + ["", ",", "a", " a", "  a"]:
        if name in ("llama2", "phi3", "mistral 7B v0.3"):
            whole = reference.encode(ICE + line, add_special_tokens=False).ids
            assert ours.encode(ICE) + ours.encode_after(line) == whole
        else:
            assert ours.encode_after(line) == ours.encode(line)


def test_entries_no_merge_leads_to(tmp_path):
    for spec, text, whole in ((qwen2_kind(), " zqx", False), (llama3_kind(pairs=True), " qzqzq", True)):
        reference, ours = both(spec, tmp_path)
        assert (len(ours.encode(text)) == 1) == whole and len(ours.encode(text + "s")) > 1
        assert not differences(reference, ours, [text, text + "s", text[1:], "a" + text, text * 2])


def test_unknown_characters_fall_back_to_bytes(tmp_path):
    _, ours = both(sentencepiece_kind("trained"), tmp_path)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    for char in "▂\U0001f9ca§":  # the first shares its first two bytes with "▁"
        ids = ours.encode("a" + char)
        assert ids[1:] == [vocab[f"<0x{b:02X}>"] for b in char.encode()]
        assert ours.decode(ids) == "a" + char and "�" in ours.decode(ids[:-1])


@pytest.mark.parametrize("scheme", ["first", "always", "never", "none", "Prepend"])
def test_what_metaspace_puts_in_front(scheme, tmp_path):
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


def test_smollm2_cuts_out_each_digit(tmp_path):
    spec = smollm2_kind()
    del spec["pre_tokenizer"]["pretokenizers"][1]["use_regex"]  # it is true where nothing is said
    _, ours = both(spec, tmp_path)
    pieces = [ours.decode([i]) for i in ours.encode("in  1984  a½")]
    assert pieces == ["in", "  ", "1", "9", "8", "4", " ", " a", "½"]


# ---------------------------------------------------------------------------------------------------------------------
# Added tokens, BOS, files


@pytest.mark.parametrize("prefix_space", [False, True])
def test_flags_of_added_tokens_and_prefix_space(prefix_space, tmp_path):
    spec = train_byte_level(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space), normalizers.NFC())
    number(spec, [*spec["model"]["vocab"]], ())
    flags = {
        "<0>": {}, "<1>": {"lstrip": True}, "<2>": {"rstrip": True}, "<3>": {"lstrip": True, "rstrip": True},
        "<0><1>": {}, "word": {}, "n": {}, "#!": {"special": False},
        "words": {"normalized": True}, "<4>": {"normalized": True, "lstrip": True}, "<0>.": {"normalized": True},
        "e\u0301t": {"normalized": True}, "o\u0301": {},
    }  # fmt: skip
    vocab = spec["model"]["vocab"]  # "n" is in it; `tokenizers` wants the ids of the others to follow on
    ids = {token: len(vocab) + i for i, token in enumerate(token for token in flags if token not in vocab)} | vocab
    spec["added_tokens"] = [added_token(token, ids[token], **flags[token]) for token in flags]
    reference, ours = both(spec, tmp_path)
    rng = random.Random(6)
    bits = [*flags, *flags, " ", " ", "    ", "\n", "\x1c", "\x85", "_", "#", ".", "a", "é", "\u00e9t", "ó", "wor", "1"]
    lines = ["".join(rng.choices(bits, k=rng.randint(1, 9))) for _ in range(3000)]
    assert not differences(reference, ours, lines + [""])
    for line in lines:
        if line[0] != "1":  # a number that begins with 9 would be one piece
            assert ours.encode("9") + ours.encode_after(line) == reference.encode("9" + line).ids


def test_vocab_and_merges_equal_tokenizer_json(tmp_path):
    spec = train_byte_level(GPT2_SPLIT)
    number(spec, [*spec["model"]["vocab"], END], ())
    spec["added_tokens"] = [added_token(END, spec["model"]["vocab"][END])]
    reference, one_file = both(spec, tmp_path)
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in spec["model"]["merges"]) + "\n"
    )
    two = save(tmp_path, vocab=spec["model"]["vocab"]) | {"merges.txt": tmp_path / "merges.txt"}
    two_files, lines = Tokenizer.from_files(two), made_up_lines(500, seed=7)
    assert not differences(reference, two_files, lines)
    assert [one_file.encode(x) for x in lines] == [two_files.encode(x) for x in lines]
    assert one_file.bos_id == two_files.bos_id == spec["model"]["vocab"][END] and one_file.n_vocab == two_files.n_vocab
    with pytest.raises(ValueError, match="vocab.json and merges.txt: a Qwen2Tokenizer needs"):
        Tokenizer.from_files(two | save(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"}))


LETTERS = {"vocab": {chr(c): c - 33 for c in range(33, 127)}, "merges": []}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}


def plain(*special: str, **changes) -> dict:
    """The smallest byte-level spec, whose special tokens have the ids from 100 on."""
    added = [added_token(token, 100 + i) for i, token in enumerate(special)]
    return {"model": LETTERS, "pre_tokenizer": BYTE_LEVEL, "added_tokens": added} | changes


@pytest.mark.parametrize("special, config, bos", [
    (["<x>", "<y>"], {"bos_token": "<y>", "eos_token": "<x>"}, 101),
    (["<x>", "<y>"], {"bos_token": {"content": "<y>", "lstrip": False}}, 101),
    (["<x>", "<y>"], {"bos_token": None, "eos_token": {"content": "<x>"}}, 100),  # Qwen2 has no BOS
    (["<s>", "<y>"], {"eos_token": "<y>"}, 101),
    (["<s>", "<y>"], {"bos_token": "<not a token>"}, 100),
    (["<x>", "<|endoftext|>"], None, 101),
    (["<eos>", "<bos>"], {}, 101),
    (["<s>", "</s>"], None, 100),
    (["<|end_of_text|>", "<|begin_of_text|>"], None, 101),
    (["<x>"], {"bos_token": None}, None),
])  # fmt: skip
def test_bos(special, config, bos, tmp_path):
    files = save(tmp_path, tokenizer=plain(*special), **({} if config is None else {"tokenizer_config": config}))
    ours = Tokenizer.from_files(files)
    assert ours.bos_id == bos and ours.n_vocab == 100 + len(special)
    assert ours.encode("ab" + special[-1]) == [64, 65, 99 + len(special)]  # and no BOS before it


FALLBACK = {"vocab": {"a": 0}, "merges": [], "byte_fallback": True}
SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
ALL_BYTES = {"vocab": {f"<0x{b:02X}>": b for b in range(256)}, "merges": [], "byte_fallback": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": [*steps]}


@pytest.mark.parametrize("contents, message", [
    ("{", "tokenizer.json: cannot be read: Expecting"),
    ([1], "tokenizer.json: cannot be read: a JSON object was expected, not a list"),
    ({}, "tokenizer.json: there is no model with a vocabulary"),
    (plain(model={"type": "BPE", "merges": []}), "tokenizer.json: there is no model with a vocabulary"),
    (plain(model={"vocab": {"a": 0}}), "model BPE is not supported: only BPE is, with merges"),
    (plain(model={"type": "BPE", "vocab": {"a": 0}}), "model BPE is not supported: only BPE is, with merges"),
    (plain(model={"type": "WordPiece", "vocab": {"a": 0}}), "model WordPiece is not supported: only BPE"),
    (plain(model={"type": "Unigram", "vocab": [["a", 0.0]]}), "model Unigram is not supported: only BPE"),
    (plain(model={"type": "WordLevel", "vocab": {"a": 0}}), "model WordLevel is not supported: only BPE"),
    (plain(model=LETTERS | {"end_of_word_suffix": "</w>"}), "model BPE is not supported: .* suffix"),
    (plain(model=LETTERS | {"merges": ["a b"]}), "merge 'a b' does not join two tokens"),
    (plain(model=LETTERS | {"merges": ["a b c"]}), "tokenizer.json: merge 'a b c' does not join two tokens"),
    (plain(model=FALLBACK, pre_tokenizer=None), "lacks some of the tokens <0x00> to <0xFF>"),
    (plain(model=LETTERS | {"vocab": LETTERS["vocab"] | {"ab": 94}, "ignore_merges": True}), "no merge makes 'ab'"),
    (plain(pre_tokenizer=None), "pre_tokenizer None .* is not supported: only ByteLevel"),
    (plain(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer .*Metaspace.* is not supported"),
    (plain(pre_tokenizer=METASPACE), "Metaspace.* with byte_fallback False is not supported"),
    (plain(model=ALL_BYTES, pre_tokenizer=METASPACE | {"split": True}), "Metaspace.* is not supported.* without split"),
    (plain(model=ALL_BYTES, pre_tokenizer=METASPACE | {"replacement": "_"}), "Metaspace.* is not supported"),
    (plain(model=ALL_BYTES, pre_tokenizer=METASPACE | {"prepend_scheme": "last"}), "Metaspace.* is not supported"),
    (plain(pre_tokenizer=sequence(DIGITS, BYTE_LEVEL | {"use_regex": False})), "Digits.* is not supported"),
    (plain(pre_tokenizer=sequence(DIGITS | {"individual_digits": False}, BYTE_LEVEL)), "Digits.* is not supported"),
    (plain(pre_tokenizer=sequence(SPLIT, BYTE_LEVEL | {"use_regex": False})), "Removed.* is not supported"),
    (plain(pre_tokenizer=sequence(SPLIT | {"invert": True}, BYTE_LEVEL | {"use_regex": False})),
     "the tokenizer's pattern leaves out a part"),
    (plain(added_tokens=[added_token("a", 64, single_word=True)]), "added token 'a' .*single_word.* is not supported"),
    (plain(normalizer={"type": "Lowercase"}), "normalizer .*Lowercase.* is not supported: only NFC"),
])  # fmt: skip
def test_what_it_cannot_read_is_one_clear_line(contents, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_files(save(tmp_path, tokenizer=contents))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_bytes(tmp_path):
    with pytest.raises(
        ValueError, match=r"no tokenizer.json, and no vocab.json with merges.txt, among \['vocab.json'\]"
    ):
        Tokenizer.from_files(save(tmp_path, vocab={"a": 0}))
    with pytest.raises(ValueError, match="tokenizer.json: cannot be read: .*No such file"):
        Tokenizer.from_files({"tokenizer.json": tmp_path / "tokenizer.json"})
    (tmp_path / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="merges.txt: merge .* does not join two tokens"):
        Tokenizer.from_files({name: tmp_path / name for name in ("vocab.json", "merges.txt")})
    with pytest.raises(ValueError, match="tokenizer_config.json: cannot be read"):
        Tokenizer.from_files(save(tmp_path, tokenizer=plain(), tokenizer_config="{"))
    with pytest.raises(ValueError, match="no token for some byte of 'é'"):
        Tokenizer.from_files(save(tmp_path, tokenizer=plain())).encode("é")
