"""Prompt pairs: aligned, labelled, reproducible; and whatever is not a pair is refused in one clear line."""

import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tasks
from support.tokenizer import Tokenizer
from tasks import AUXILIARIES, NAMES, NOUNS, OBJECTS, PLACES, PREPOSITIONS, VERBS, Pair, by_group, ioi, read_pairs

SHARED = Path(__file__).parents[2] / "shared"
ROLES = {
    "template 1": "BOS FIRST , B1 and A went to the PLACE PUNCT S2 gave a OBJECT END".split(),
    "template 2": "BOS FIRST , B1 and A went to the PLACE PUNCT S2 gave a OBJECT END".split(),
    "template 3": "BOS FIRST B1 and A went to the PLACE PUNCT S2 gave a OBJECT END".split(),
}


class Words:
    """One token per word (with its space) or mark. Ids are given out as words are met, or are those of `vocab`."""

    bos_id = 0

    def __init__(self, vocab=None, split=()):
        self.words = ["<bos>", "<unk>"] + (vocab or [])
        self.open, self.split = vocab is None, dict(split)

    @property
    def n_vocab(self):
        return len(self.words)

    def pieces(self, text):
        return [p for w in re.findall(r" ?\w+|[^\w]", text) for p in self.split.get(w, [w])]

    def encode(self, text):
        ids = []
        for piece in self.pieces(text):
            if piece not in self.words and self.open:
                self.words.append(piece)
            ids.append(self.words.index(piece) if piece in self.words else 1)
        return ids

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


class Real:
    """A tokenizer of `tokenizers` with the methods that tasks.py asks for."""

    def __init__(self, name):
        tokenizers = pytest.importorskip("tokenizers")
        folder = SHARED / "tokenizers" / name
        if not folder.is_dir():
            pytest.skip(f"the {name} tokenizer is not at {folder}")
        if name == "gpt2":
            self.t = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        else:
            self.t = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.bos_id, self.n_vocab = self.t.token_to_id("<|endoftext|>"), self.t.get_vocab_size()
        assert self.bos_id is not None

    def encode(self, text):
        return self.t.encode(text).ids

    def decode(self, ids):
        return self.t.decode(ids)


PREPEND = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
METASPACE = {"type": "Metaspace", "replacement": "▁", "split": False}
SPACE_IN_FRONT = {  # tokenizers that put a space in front of a text
    "Prepend": dict(normalizer={"type": "Sequence", "normalizers": PREPEND}, pre_tokenizer=None),
    "Metaspace, first": dict(pre_tokenizer=METASPACE | {"prepend_scheme": "first"}),
    "Metaspace, always": dict(pre_tokenizer=METASPACE | {"prepend_scheme": "always"}),
    "ByteLevel": {},
}


@cache
def space_in_front(kind):
    """A tokenizer in which each word is a token, as the one of `tokenizers` and as ours."""
    tokenizers = pytest.importorskip("tokenizers")
    words = NAMES + PLACES + OBJECTS + "Then When After The and went to the gave a that , .".split()
    words += [form for forms in NOUNS + VERBS + AUXILIARIES + PREPOSITIONS for form in forms]
    reference = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.ByteLevel if kind == "ByteLevel" else tokenizers.pre_tokenizers.Metaspace
    reference.pre_tokenizer = split()
    reference.train_from_iterator(words, tokenizers.trainers.BpeTrainer(show_progress=False))
    spec = json.loads(reference.to_str()) | SPACE_IN_FRONT[kind]
    if kind != "ByteLevel":
        vocab = spec["model"]["vocab"]
        spec["model"] |= {"byte_fallback": True, "vocab": vocab | {f"<0x{b:02X}>": len(vocab) + b for b in range(256)}}
    reference = tokenizers.Tokenizer.from_str(json.dumps(spec))
    reference.add_special_tokens(["<s>"])
    return reference, Tokenizer(json.loads(reference.to_str()), {})


def check_ids(pairs, reference, ours):
    """Prompts have the ids of their text, and an answer adds its own to them."""
    for p in pairs:
        for prompt in (p.original, p.patch):
            assert prompt[0] == ours.bos_id and ours.decode(prompt[1:])[0] == " "
            text = ours.decode(prompt[1:])[1:]
            assert reference.encode(text).ids == list(prompt[1:])
            for answer in p.answers:
                assert reference.encode(text + ours.decode([answer])).ids == [*prompt[1:], answer]


@pytest.fixture(scope="module", params=["gpt2", "gpt-neox-20b"])
def real(request):
    return Real(request.param)


def filled(template, words):
    """A template's text with words in its slots."""
    return re.sub(r"\[(\w+)\]", lambda m: words[m[1]], template)


def slots(pair, prompt, tokenizer):
    """The word at each slot of a prompt."""
    return {
        role: tokenizer.decode([i]).strip()
        for role, i in zip(pair.roles, prompt)
        if role in ("B1", "A", "S2", "PLACE", "OBJECT")
    }


# ---------------------------------------------------------------------------------------------------------------------
# IOI


def test_word_lists():
    lists = {"names": NAMES, "places": PLACES, "objects": OBJECTS}
    assert [len(words) >= size for words, size in zip(lists.values(), (110, 40, 40))] == [True] * 3
    everything = NAMES + PLACES + OBJECTS
    assert len(set(everything)) == len(everything)
    assert all(re.fullmatch("[A-Z][a-z]+", w) for w in NAMES)
    assert all(re.fullmatch("[a-z]+", w) for w in PLACES + OBJECTS)
    assert not [w for w in OBJECTS if w[0] in "aeiou"]  # "gave a [OBJECT]"


def test_templates_are_table_2():
    table_2 = [
        "Then, [B] and [A] went to the [PLACE]. [B] gave a [OBJECT] to",
        "When, [B] and [A] went to the [PLACE]. [B] gave a [OBJECT] to",
        "After [B] and [A] went to the [PLACE], [B] gave a [OBJECT] to",
    ]
    assert [t.replace("B1", "B").replace("S2", "B") for t in tasks.TEMPLATES] == table_2


def test_swap_is_the_default_and_exchanges_the_names_everywhere():
    t = Words()
    for i, p in enumerate(ioi(t, 30)):
        o, q = slots(p, p.original, t), slots(p, p.patch, t)
        assert o["B1"] == o["S2"] != o["A"]
        assert q == {**o, "B1": o["A"], "A": o["B1"], "S2": o["A"]}
        assert t.decode(p.answers[:1]) == " " + o["A"] and t.decode(p.answers[1:]) == " " + o["B1"]
        assert t.decode(p.original) == "<bos>" + filled(tasks.TEMPLATES[i % 3], o)
        assert o["B1"] in NAMES and o["A"] in NAMES and o["PLACE"] in PLACES and o["OBJECT"] in OBJECTS
    assert ioi(t, 30) == ioi(t, 30, corruption="swap")


def test_s2_changes_the_second_mention_only():
    t = Words()
    for p in ioi(t, 30, corruption="s2"):
        o, q = slots(p, p.original, t), slots(p, p.patch, t)
        assert o["B1"] == o["S2"] and q == {**o, "S2": o["A"]}
        assert [r for r, x, y in zip(p.roles, p.original, p.patch) if x != y] == ["S2"]
        assert t.decode(p.answers[:1]) == " " + o["A"] and t.decode(p.answers[1:]) == " " + o["B1"]


@pytest.mark.parametrize("corruption", ["swap", "s2"])
def test_real_tokenizers_align(real, corruption):
    for i, p in enumerate(ioi(real, 60, corruption=corruption)):
        assert p.group == f"template {i % 3 + 1}" and list(p.roles) == ROLES[p.group]
        assert len(p.original) == len(p.patch) == len(p.roles)
        assert p.original[0] == p.patch[0] == real.bos_id and real.bos_id not in p.original[1:]
        for prompt in (p.original, p.patch):
            text = filled(tasks.TEMPLATES[i % 3], slots(p, prompt, real))
            assert list(prompt[1:]) == real.encode(text)
        o = slots(p, p.original, real)
        assert [real.decode([a]) for a in p.answers] == [" " + o["A"], " " + o["B1"]]


def test_most_words_survive_in_real_tokenizers(real):
    for words in (NAMES, PLACES, OBJECTS):
        assert len(tasks.one_token(real, words)) >= 0.8 * len(words)
    assert ioi(real, 2000)[1999].group == "template 2"  # thousands of prompts


@pytest.mark.parametrize("kind", SPACE_IN_FRONT)
def test_tokenizers_that_put_a_space_in_front(kind):
    reference, ours = space_in_front(kind)
    assert ours.encode("Mary") == ours.encode_after(" Mary") != ours.encode_after("Mary")
    assert all(tasks.one_token(ours, words) == words for words in (NAMES, PLACES, OBJECTS))
    pairs = ioi(ours, 30)
    check_ids(pairs, reference, ours)
    for i, p in enumerate(pairs):
        o = slots(p, p.original, ours)
        assert list(p.roles) == ROLES[p.group]
        assert ours.decode(p.original[1:]) == " " + filled(tasks.TEMPLATES[i % 3], o)
        assert [ours.decode([a]) for a in p.answers] == [" " + o["A"], " " + o["B1"]]


def test_without_bos():
    t = Words()
    for with_bos, without in zip(ioi(t, 6), ioi(t, 6, bos=False)):
        assert without.roles == with_bos.roles[1:] and "BOS" not in without.roles
        assert without.original == with_bos.original[1:] and without.patch == with_bos.patch[1:]
        assert without.answers == with_bos.answers and without.group == with_bos.group


def test_bos_of_a_tokenizer_without_one():
    t = Words()
    t.bos_id = None
    with pytest.raises(ValueError, match="no BOS.*--no-bos"):
        ioi(t, 3)
    assert len(ioi(t, 3, bos=False)) == 3


def test_deterministic_distinct_and_spread():
    t = Words()
    pairs = ioi(t, 100, seed=1)
    assert pairs == ioi(t, 100, seed=1) != ioi(t, 100, seed=2)
    assert len({p.original for p in pairs}) == 100
    assert {g: len(v) for g, v in by_group(pairs).items()} == {"template 1": 34, "template 2": 33, "template 3": 33}
    assert by_group(pairs)["template 2"][:3] == [1, 4, 7]
    assert pairs[:10] == ioi(t, 10, seed=1)  # more pairs continue the same sample


def closed(names, places, objects):
    """A tokenizer that knows only these words (and the templates')."""
    words = [" " + w for w in names + places + objects]
    return Words(["Then", "When", "After", ",", ".", " and", " went", " to", " the", " gave", " a"] + words)


def test_all_pairs_that_the_words_allow_and_no_more():
    t = closed(NAMES[:3], PLACES[:2], OBJECTS[:1])
    most = 3 * 3 * 2 * 2 * 1
    pairs = ioi(t, most)
    assert len({(p.original, p.patch) for p in pairs}) == most
    assert {len(v) for v in by_group(pairs).values()} == {most // 3}
    with pytest.raises(ValueError, match=rf"1 to {most}\b.*got {most + 1}"):
        ioi(t, most + 1)


def test_words_that_are_not_one_token_are_left_out():
    t = Words(split={" " + w: [" " + w[0], w[1:]] for w in NAMES[5:] + PLACES[1:] + OBJECTS[1:]})
    pairs = ioi(t, 3 * 5 * 4)
    used = [slots(p, p.original, t) for p in pairs]
    assert {u["A"] for u in used} == set(NAMES[:5]) == {u["B1"] for u in used}
    assert {u["PLACE"] for u in used} == {PLACES[0]} and {u["OBJECT"] for u in used} == {OBJECTS[0]}


@pytest.mark.parametrize("names, places, objects", [(1, 5, 5), (0, 5, 5), (5, 0, 5), (5, 5, 0)])
def test_too_few_words(names, places, objects):
    t = closed(NAMES[:names], PLACES[:places], OBJECTS[:objects])  # the other words are all one "unknown" token
    with pytest.raises(ValueError) as e:
        ioi(t, 3)
    assert "two names" in str(e.value) and "\n" not in str(e.value)
    for few, words in ((names, NAMES), (places, PLACES), (objects, OBJECTS)):
        assert f"{few} of {len(words)}" in str(e.value)


@pytest.mark.parametrize("n", [0, -1])
def test_n_below_one(n):
    with pytest.raises(ValueError, match=rf"n must be from 1.*got {n}"):
        ioi(Words(), n)


def test_unknown_corruption():
    with pytest.raises(ValueError, match="'abc'.*swap, s2"):
        ioi(Words(), 3, corruption="abc")


def test_a_template_word_of_several_tokens_repeats_its_role():
    p = ioi(Words(split={"Then": ["Th", "en"], " to": [" t", "o"]}), 1)[0]
    assert list(p.roles) == "BOS FIRST FIRST , B1 and A went to to the PLACE PUNCT S2 gave a OBJECT to END".split()
    assert len(p.roles) == len(p.original) == len(p.patch)


def test_a_tokenizer_that_merges_words_is_refused():
    class Merging(Words):
        def pieces(self, text):
            return [p for w in re.findall(r" went to| ?\w+|[^\w]", text) for p in [w]]

    with pytest.raises(ValueError, match="encodes 'Then, .*differently from its words"):
        ioi(Merging(), 3)


# ---------------------------------------------------------------------------------------------------------------------
# Files

LINE = dict(original="The cat", patch="The cats", original_answer=" is", patch_answer=" are")
IDS = dict(original=[5, 6], patch=[5, 7], original_answer=8, patch_answer=[9])


@pytest.fixture
def write(tmp_path):
    def write(*lines):
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(b"\n".join(x if type(x) is bytes else json.dumps(x).encode() for x in lines))
        return path

    return write


def refused(path, *args, **kwargs):
    """The one-line error of read_pairs, which must name the file."""
    with pytest.raises(ValueError) as e:
        read_pairs(path, *args, **kwargs)
    message = str(e.value)
    assert "\n" not in message and str(path) in message
    return message


def test_strings(write):
    t = Words()
    (p,) = read_pairs(write(LINE), t)
    the, cat, cats, yes, no = (t.encode(w)[0] for w in ("The", " cat", " cats", " is", " are"))
    assert p == Pair((0, the, cat), (0, the, cats), (yes, no), ("BOS", "The", " cat"), "length 3")
    (p,) = read_pairs(write(LINE), t, bos=False)
    assert p == Pair((the, cat), (the, cats), (yes, no), ("The", " cat"), "length 2")


def test_feature_circuits_names_and_extra_fields(write):
    theirs = dict(
        clean_prefix="The cat", patch_prefix="The cats", clean_answer=" is", patch_answer=" are", case="singular"
    )
    t = Words()
    assert read_pairs(write(theirs), t) == read_pairs(write({**LINE, "note": None}), t)


def test_ids_are_used_as_given(write):
    want = Pair((5, 6), (5, 7), (8, 9), ("5", "6"), "length 2")
    assert read_pairs(write(IDS)) == [want]
    t = Words([" a", " b", " c", " d", " e"])  # ids 0..6; the model's vocabulary may be larger
    (p,) = read_pairs(write(IDS), t, n_vocab=10)
    assert p == Pair((5, 6), (5, 7), (8, 9), (" d", " e"), "length 2")
    (p,) = read_pairs(write({**IDS, "original": [5, 8]}), t, n_vocab=10)
    assert p.roles == (" d", "8")
    (p,) = read_pairs(write({**IDS, "original_answer": " a"}), t)
    assert p.answers == (2, 9)


def test_groups_blank_lines_and_byte_order_mark(write):
    long = {**IDS, "original": [1, 2, 3], "patch": [1, 2, 4]}
    bom = b"\xef\xbb\xbf" + json.dumps(IDS).encode()
    pairs = read_pairs(write(bom, b"", long, b"  \t\r", IDS))
    assert by_group(pairs) == {"length 2": [0, 2], "length 3": [1]}


def test_text_that_holds_a_line_separator(write):
    line = json.dumps({**LINE, "note": "a\u2028b\x85c"}, ensure_ascii=False).encode()
    assert len(read_pairs(write(line, LINE), Words())) == 2


@pytest.mark.parametrize("kind", SPACE_IN_FRONT)
@pytest.mark.parametrize("answers", [(" is", " are"), (".", ",")])
def test_strings_where_a_space_is_put_in_front(kind, answers, write):
    reference, ours = space_in_front(kind)
    (p,) = read_pairs(write({**LINE, "original_answer": answers[0], "patch_answer": answers[1]}), ours)
    check_ids([p], reference, ours)
    assert p == tasks.pair(ours, "The cat", "The cats", *answers) and p.roles == ("BOS", " The", " cat")
    assert tuple(ours.decode([a]) for a in p.answers) == answers


@pytest.mark.parametrize(
    "change, parts",
    [
        (
            dict(patch="The big cats"),
            ["equally many tokens", "2 tokens ['The', ' cat']", "3 tokens ['The', ' big', ' cats']"],
        ),
        (dict(patch="The cat"), ["must differ", "2 tokens ['The', ' cat']"]),
        (dict(original_answer=" is not"), ["original_answer must be one token", "2 tokens [' is', ' not']"]),
        (dict(patch_answer=" are not"), ["patch_answer must be one token", "2 tokens [' are', ' not']"]),
        (dict(original_answer=" are"), ["must differ", "1 token [' are']"]),
        (dict(original=""), ["original is empty"]),
        (dict(original="", patch=""), ["original is empty"]),
        (dict(patch=[5, 7]), ["both strings or both lists", "'The cat'", "[5, 7]"]),
        (dict(original=None, patch=None), ["original must be a string or token ids", "None"]),
        (dict(patch_answer=True), ["patch_answer must be a string or token ids", "True"]),
        (dict(patch_answer=""), ["patch_answer is empty"]),
    ],
)
def test_string_pairs_refused(write, change, parts):
    message = refused(write(LINE, b"", {**LINE, **change}), Words())
    for part in ["line 3:", *parts]:
        assert part in message


@pytest.mark.parametrize(
    "change, parts",
    [
        (dict(patch=[5, 7, 7]), ["2 tokens ['5', '6']", "3 tokens ['5', '7', '7']"]),
        (dict(patch=[5, 6]), ["must differ"]),
        (dict(original=[]), ["original is empty"]),
        (dict(patch_answer=8), ["patch_answer must differ"]),
        (dict(patch_answer=[8, 9]), ["patch_answer must be one token", "2 tokens"]),
        (dict(original=[5, True]), ["original", "integer, from 0 to 9", "True"]),
        (dict(original=[5, 6.0]), ["integer", "6.0"]),
        (dict(original=[5, "a"]), ["integer", "'a'"]),
        (dict(patch=[5, 10]), ["patch", "from 0 to 9", "got 10"]),
        (dict(patch=[5, -1]), ["patch", "from 0 to 9", "got -1"]),
        (dict(original_answer=10), ["original_answer", "from 0 to 9", "got 10"]),
        (dict(original=5), ["original must be a string or token ids; got 5"]),
        (dict(original_answer=" is"), ["original_answer", "' is'", "needs a tokenizer"]),
    ],
)
def test_id_pairs_refused(write, change, parts):
    message = refused(write(IDS, {**IDS, **change}), n_vocab=10)
    for part in ["line 2:", *parts]:
        assert part in message


def test_the_range_of_ids(write):
    assert read_pairs(write({**IDS, "patch": [0, 9]}), n_vocab=10)[0].patch == (0, 9)
    assert read_pairs(write({**IDS, "patch": [5, 10**6]}))[0].patch == (5, 10**6)  # nothing to check against
    assert "0 or more" in refused(write({**IDS, "patch": [5, -1]}))
    assert "from 0 to 3" in refused(write(LINE), Words(), n_vocab=4)  # a tokenizer of another model


def test_strings_need_a_tokenizer_and_bos_a_bos(write):
    assert "needs a tokenizer" in refused(write(LINE))
    t = Words()
    t.bos_id = None
    assert "--no-bos" in refused(write(LINE), t)
    assert read_pairs(write(LINE), t, bos=False) and read_pairs(write(IDS), t)


@pytest.mark.parametrize(
    "field, theirs",
    [
        ("original", "clean_prefix"),
        ("patch", "patch_prefix"),
        ("original_answer", "clean_answer"),
        ("patch_answer", ""),
    ],
)
def test_missing_fields(write, field, theirs):
    message = refused(write(LINE, {k: v for k, v in LINE.items() if k != field}), Words())
    assert f"line 2: no field '{field}'" in message and theirs in message


@pytest.mark.parametrize(
    "line, part",
    [
        (b'{"original": ', "not JSON"),
        (b"The cat", "not JSON"),
        (b"[1, 2]", "must be a JSON object; got [1, 2]"),
        (b"3", "must be a JSON object; got 3"),
        (b'{"original": "\xff"}', "not UTF-8"),
    ],
)
def test_lines_that_are_no_objects(write, line, part):
    message = refused(write(IDS, line))
    assert "line 2: " + part in message


def test_files_without_pairs(write, tmp_path):
    assert "no pairs" in refused(write(b"")) and "patch_answer" in refused(write(b"\n \n"))
    assert "cannot be read" in refused(tmp_path)
    assert "cannot be read" in refused(tmp_path / "none.jsonl")
    assert read_pairs(str(write(IDS)))  # a path may be a string


@pytest.mark.parametrize("name", ["sva_simple_test", "sva_nounpp_test"])
def test_subject_verb_agreement_files(real, name, tmp_path):
    source = SHARED / "prompts" / f"{name}.jsonl"
    if not source.exists():
        pytest.skip(f"the feature-circuits data is not at {source}")
    lines = source.read_text(encoding="utf-8").splitlines()

    def length(text):
        return len(real.encode(text))

    good, bad = [], []
    for line in lines:
        d = json.loads(line)
        one = length(d["clean_answer"]) == length(d["patch_answer"]) == 1
        (good if one and length(d["clean_prefix"]) == length(d["patch_prefix"]) else bad).append(line)
    path = tmp_path / "aligned.jsonl"
    path.write_text("\n".join(good), encoding="utf-8")
    pairs = read_pairs(path, real)
    assert len(pairs) == len(good) > 50
    for line, p in zip(good, pairs):
        d = json.loads(line)
        assert "".join(p.roles[1:]) == d["clean_prefix"] == real.decode(p.original[1:])
        assert real.decode(p.patch[1:]) == d["patch_prefix"] and p.group == f"length {len(p.original)}"
        assert [real.decode([a]) for a in p.answers] == [d["clean_answer"], d["patch_answer"]]
    if bad:
        assert f"line {lines.index(bad[0]) + 1}: " in refused(source, real)
    else:
        assert read_pairs(source, real) == pairs
