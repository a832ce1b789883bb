"""IOI pairs and pairs of one's own: aligned, labelled, reproducible; what is no pair is refused in one line."""

import json
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tasks
from support.prompts import by_group
from support.tokenizer import load_tokenizer
from tasks import AUXILIARIES, NAMES, NOUNS, OBJECTS, PLACES, PREPOSITIONS, VERBS, Pair, Unaligned, ioi, pair

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
    with tempfile.TemporaryDirectory() as folder:
        reference.save(f"{folder}/tokenizer.json")
        return reference, load_tokenizer(folder)


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
    return re.sub(r"\[(\w+)=?(.*?)\]", lambda m: m[2] or words[m[1]], template)


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
    slots = {"B1": "[B]", "A": "[A]", "S2": "[B]", "PLACE": "[PLACE]", "OBJECT": "[OBJECT]"}
    assert [filled(t, slots) for t in tasks.TEMPLATES] == table_2


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
    assert ioi(t) == ioi(t, 100, 0, "swap", True)


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
    for n in most + 1, 0, -1:
        with pytest.raises(ValueError, match=rf"n must be from 1 to {most}, .*got {n}$"):
            ioi(t, n)


@pytest.mark.parametrize("names, places, objects", [(1, 5, 5), (5, 0, 5), (5, 5, 0)])
def test_too_few_words(names, places, objects):
    t = closed(NAMES[:names], PLACES[:places], OBJECTS[:objects])  # the other words are all one "unknown" token
    with pytest.raises(ValueError, match="from 1 to 0, as many as this tokenizer's one-token words make"):
        ioi(t, 3)


def test_words_that_are_not_one_token_are_left_out():
    t = Words(split={" " + w: [" " + w[0], w[1:]] for w in NAMES[5:] + PLACES[1:] + OBJECTS[1:]})
    pairs = ioi(t, 3 * 5 * 4)
    used = [slots(p, p.original, t) for p in pairs]
    assert {u["A"] for u in used} == set(NAMES[:5]) == {u["B1"] for u in used}
    assert {u["PLACE"] for u in used} == {PLACES[0]} and {u["OBJECT"] for u in used} == {OBJECTS[0]}


def test_unknown_corruption():
    with pytest.raises(ValueError, match="'abc'.*swap, s2"):
        ioi(Words(), 3, corruption="abc")


def test_a_template_word_of_several_tokens_repeats_its_role():
    p = ioi(Words(split={"Then": ["Th", "en"], " went": [" we", "nt"]}), 1)[0]
    assert list(p.roles) == "BOS FIRST FIRST , B1 and A went went to the PLACE PUNCT S2 gave a OBJECT END".split()
    assert len(p.roles) == len(p.original) == len(p.patch)


def test_a_tokenizer_that_merges_words_is_refused():
    class Merging(Words):
        def pieces(self, text):
            return [p for w in re.findall(r" went to| ?\w+|[^\w]", text) for p in [w]]

    with pytest.raises(ValueError, match="encodes 'Then, .*differently from its words"):
        ioi(Merging(), 3)


# ---------------------------------------------------------------------------------------------------------------------
# A pair of one's own

TEXTS = ("The cat", "The cats", " is", " are")


def test_a_pair_of_texts():
    t = Words()
    p = pair(t, *TEXTS)
    the, cat, cats, one, many = (t.encode(w)[0] for w in ("The", " cat", " cats", " is", " are"))
    assert p == Pair((0, the, cat), (0, the, cats), (one, many), ("BOS", "The", " cat"), "length 3")
    assert pair(t, *TEXTS, bos=False) == Pair((the, cat), (the, cats), (one, many), ("The", " cat"), "length 2")
    assert [x.tolist() for x in p] == [[[0, the, cat]], [[0, the, cats]], [[one, many]]]


def test_a_pair_of_ids_is_used_as_given():
    ids = [5, 6], [5, 7], [8], [9]
    assert pair(None, *ids) == Pair((5, 6), (5, 7), (8, 9), ("5", "6"), "length 2")
    few = Words([" a", " b", " c", " d", " e"])  # ids 0 to 6; the model's vocabulary may be larger
    assert pair(few, [5, 8], [5, 7], [8], [9]).roles == (" d", "8")


@pytest.mark.parametrize("kind", SPACE_IN_FRONT)
@pytest.mark.parametrize("answers", [(" is", " are"), (".", ",")])
def test_a_pair_where_a_space_is_put_in_front(kind, answers):
    reference, ours = space_in_front(kind)
    p = pair(ours, "The cat", "The cats", *answers)
    check_ids([p], reference, ours)
    assert p.roles == ("BOS", " The", " cat") and tuple(ours.decode([a]) for a in p.answers) == answers


@pytest.mark.parametrize("texts, error, says", [
    (("The cat", "The big cats", " is", " are"), Unaligned,
     "equally many tokens; original is 2 tokens ['The', ' cat'], patch is 3 tokens ['The', ' big', ' cats']"),
    (("The cat", "The cats", " is not", " are"), Unaligned, "original_answer must be one token"),
    (("The cat", "The cats", " is", " are not"), Unaligned, "it is 2 tokens [' are', ' not']"),
    (("The cat", "The cats", " is", ""), Unaligned, "patch_answer must be one token"),
    (("The cat", "The cat", " is", " are"), ValueError, "patch must differ; both are 2 tokens ['The', ' cat']"),
    (("", "", " is", " are"), ValueError, "must differ; both are 0 tokens"),
    (("The cat", "The cats", " is", " is"), ValueError, "patch_answer must differ; both are 1 token [' is']"),
])  # fmt: skip
def test_what_is_no_pair_is_refused_with_its_tokens(texts, error, says):
    with pytest.raises(ValueError) as e:
        pair(Words(), *texts)
    assert type(e.value) is error and says in str(e.value) and "\n" not in str(e.value)
