"""Subject-verb agreement: the structures of Table 3, in two lists without a common prompt."""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest
from test_tasks import SPACE_IN_FRONT, Real, Words, check_ids, space_in_front

import tasks
from support.tokenizer import load_tokenizer
from tasks import AUXILIARIES, NOUNS, PREPOSITIONS, SVA, VERBS, sva

ROOT = Path(tasks.__file__).parent
ROLES = {
    "simple": "BOS The N1".split(),
    "within_rc": "BOS The N1 that the N2".split(),
    "across_rc": "BOS The N1 that the N2 V".split(),
    "across_pp": "BOS The N1 P the N2".split(),
}
SINGULAR, PLURAL = ({forms[i]: forms for forms in NOUNS + VERBS + AUXILIARIES} for i in (0, 1))


def words_of(pair, prompt, tokenizer):
    return {role: tokenizer.decode([i]).strip() for role, i in zip(pair.roles, prompt)}


def number(word):
    return 0 if word in SINGULAR else 1


def prompts(pairs):
    return {prompt for pair in pairs for prompt in (pair.original, pair.patch)}


def check(pairs, structure, tokenizer):
    """Everything that holds for each pair of a structure."""
    controller, other = ("N2", "N1") if structure == "within_rc" else ("N1", "N2")
    kinds = {"simple": AUXILIARIES + VERBS, "within_rc": VERBS}.get(structure, AUXILIARIES)
    for p in pairs:
        assert p.group == structure and list(p.roles) == ROLES[structure]
        assert len(p.original) == len(p.patch) == len(p.roles)
        o, q = words_of(p, p.original, tokenizer), words_of(p, p.patch, tokenizer)
        assert [role for role in o if o[role] != q[role]] == [controller]
        nouns = [next(forms for forms in NOUNS if o[role] in forms) for role in ("N1", "N2") if role in o]
        assert len(set(nouns)) == len(nouns)
        assert {o[controller], q[controller]} in [set(forms) for forms in NOUNS]  # one noun's two forms
        forms = tuple(tokenizer.decode([i]).strip() for i in p.answers)
        assert (forms if number(o[controller]) == 0 else forms[::-1]) in kinds  # each answer fits its own prompt
        if "V" in o:
            assert number(o["V"]) == number(o[other])
        if "P" in o:
            assert (o["P"],) * 2 in PREPOSITIONS


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_word_lists():
    assert len(NOUNS) >= 40 and len(VERBS) >= 20
    nouns, verbs = ([form for forms in words for form in forms] for words in (NOUNS, VERBS + AUXILIARIES))
    assert len(set(nouns)) == len(nouns) and len(set(verbs)) == len(verbs)
    assert all(re.fullmatch("[a-z]+", word) for word in nouns + verbs)
    irregular = {"man": "men", "woman": "women", "child": "children", "secretary": "secretaries"}
    for one, many in NOUNS:
        assert many == irregular.get(one, one + "s")
    for third, base in VERBS:
        assert third == base + ("es" if base.endswith(("ch", "ss")) else "s")


def test_the_lists_begin_with_the_words_of_the_toy_models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "toy")  # train.py imports its neighbours
    spec = importlib.util.spec_from_file_location("toy_train", ROOT / "toy" / "train.py")
    if not Path(spec.origin).exists():
        pytest.skip(f"no {spec.origin}")
    toy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toy)
    assert NOUNS[:20] == toy.NOUNS and VERBS[:10] == toy.VERBS and AUXILIARIES == toy.AUXILIARIES
    assert [word for word, _ in PREPOSITIONS[:5]] == toy.prepositions


def test_of_the_other_words_the_toy_tokenizer_keeps_none():
    """It makes every beginning of a word a token, also those that the models never saw; none may be in a prompt."""
    if not (ROOT / "toy" / "neox").is_dir():
        pytest.skip("no toy model")
    tokenizer = load_tokenizer("toy-neox")
    for words, known in ((NOUNS, 20), (VERBS, 10), (AUXILIARIES, 3), (PREPOSITIONS, 5)):
        assert [forms for forms in words if len(tasks.one_token(tokenizer, forms)) == 2] == words[:known]
    for structure in SVA:  # the default sizes
        for pairs in sva(tokenizer, structure):
            check(pairs, structure, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize("structure", SVA)
def test_structures(structure):
    t = Words()
    discovery, held_out = sva(t, structure)
    assert len(set(discovery)) == len(discovery) == 300 and len(set(held_out)) == len(held_out) == 100
    check(discovery + held_out, structure, t)
    assert not prompts(discovery) & prompts(held_out)


def test_text_of_each_structure():
    t = Words()
    patterns = {
        "simple": r"The \w+",
        "within_rc": r"The \w+ that the \w+",
        "across_rc": r"The \w+ that the \w+ \w+",
        "across_pp": r"The \w+ \w+ the \w+",
    }
    assert patterns.keys() == SVA.keys()
    for structure, pattern in patterns.items():
        for p in sva(t, structure, 20, 5)[0]:
            assert re.fullmatch("<bos>" + pattern, t.decode(p.original))


@pytest.mark.parametrize("structure", SVA)
def test_no_shortcut(structure):
    """Which number comes first, and the other noun's, is a coin toss, and one says nothing about the other."""
    t = Words()
    controller, other = ("N2", "N1") if structure == "within_rc" else ("N1", "N2")
    counts = Counter()
    for p in sva(t, structure)[0]:
        o = words_of(p, p.original, t)
        counts[number(o[controller]), number(o[other]) if other in o else 0] += 1
    assert len(counts) == (2 if structure == "simple" else 4)
    assert all(abs(count - 300 / len(counts)) < 0.3 * 300 / len(counts) for count in counts.values())


@pytest.mark.parametrize("structure", [*SVA][1:])
def test_prompts_are_not_used_twice_where_there_are_enough(structure):
    discovery, held_out = sva(Words(), structure)
    assert len(prompts(discovery)) == 600 and len(prompts(held_out)) == 200


def test_the_simple_structure_uses_each_prompt_about_equally_often():
    discovery, held_out = sva(Words(), "simple", 300, 100)
    for pairs in (discovery, held_out):
        counts = Counter(frozenset((p.original, p.patch)) for p in pairs)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert len(prompts(discovery + held_out)) == 2 * len(NOUNS)


def test_seeded():
    t = Words()
    for structure in SVA:
        first, again, other = (sva(t, structure, 20, 10, seed) for seed in (1, 1, 2))
        assert first == again and first[0] != other[0] and first[1] != other[1]
        assert sva(t, structure) == sva(t, structure, 300, 100, 0, True)


def test_without_bos():
    t = Words()
    for with_bos, without in zip(*(sum(sva(t, "across_rc", 6, 3, bos=bos), []) for bos in (True, False))):
        assert without.roles == with_bos.roles[1:] and "BOS" not in without.roles
        assert (without.original, without.patch) == (with_bos.original[1:], with_bos.patch[1:])
        assert without.answers == with_bos.answers
    t.bos_id = None
    with pytest.raises(ValueError, match="no BOS.*--no-bos"):
        sva(t, "simple", 3, 1)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
@pytest.mark.parametrize("structure", SVA)
def test_real_tokenizers(name, structure):
    real = Real(name)
    for pairs in sva(real, structure):
        check(pairs, structure, real)
        for p in pairs:
            assert p.original[0] == p.patch[0] == real.bos_id
            assert list(p.original[1:]) == real.encode(real.decode(p.original[1:]))
    for words in (NOUNS, VERBS, AUXILIARIES, PREPOSITIONS):
        assert sum(len(tasks.one_token(real, forms)) == 2 for forms in words) >= 0.9 * len(words)


@pytest.mark.parametrize("kind", SPACE_IN_FRONT)
def test_tokenizers_that_put_a_space_in_front(kind):
    reference, ours = space_in_front(kind)
    for structure in SVA:
        for pairs in sva(ours, structure, 20, 10):
            check(pairs, structure, ours)
            check_ids(pairs, reference, ours)


# ---------------------------------------------------------------------------------------------------------------------
# Few words


def closed(nouns, verbs, prepositions=0):
    """A tokenizer that knows only these words (and the templates')."""
    words = NOUNS[:nouns] + VERBS[:verbs] + AUXILIARIES + [forms[:1] for forms in PREPOSITIONS[:prepositions]]
    return Words(["The", " that", " the"] + [" " + form for forms in words for form in forms])


def test_a_word_needs_both_forms():
    one_form_of_each = [forms[len(forms[0]) % 2] for forms in NOUNS[4:] + VERBS[2:]]
    t = Words(split={" " + form: [" " + form[0], form[1:]] for form in one_form_of_each})
    used = {word for p in sum(sva(t, "within_rc", 12, 4), []) for word in words_of(p, p.original, t).values()}
    assert used <= {form for forms in NOUNS[:4] for form in forms} | {"The", "that", "the", "<bos>"}


@pytest.mark.parametrize(
    "structure, nouns, verbs, each, scenes",
    [
        ("simple", 4, 2, 2 * (3 + 2), 4),
        ("within_rc", 3, 2, 2 * 2, 3 * 2 * 2),
        ("across_rc", 3, 2, 2 * 3, 3 * 2 * 2 * 2),
        ("across_pp", 3, 2, 2 * 3, 3 * 2 * 2 * 2),
    ],
)
def test_all_pairs_that_the_words_allow_and_no_more(structure, nouns, verbs, each, scenes):
    t = closed(nouns, verbs, 2)
    most = each * (scenes - 1)
    discovery, held_out = sva(t, structure, most, 1)
    check(discovery + held_out, structure, t)
    assert len(set(discovery)) == most and not prompts(discovery) & prompts(held_out)
    assert len(sva(t, structure, most, each)[1]) == each  # both sides full
    for n, held_out in (most + 1, 1), (most, each + 1), (1, most + 1), (each + 1, most - each + 1):
        with pytest.raises(ValueError, match=rf"^{structure}: {n} \+ {held_out} pairs are too many .* {scenes} scenes"):
            sva(t, structure, n, held_out)
    for k in range(1, scenes):  # the first list needs k scenes, also where its share of all pairs is that of fewer
        n, held_out = k * each - each + 1, (scenes - k) * each
        assert [len(set(pairs)) for pairs in sva(t, structure, n, held_out)] == [n, held_out]


@pytest.mark.parametrize(
    "structure, nouns, verbs, prepositions",
    [
        ("simple", 1, 3, 0),
        ("simple", 0, 3, 3),
        ("within_rc", 1, 3, 3),
        ("within_rc", 5, 0, 3),
        ("across_rc", 5, 0, 3),
        ("across_pp", 5, 5, 0),
    ],
)
def test_too_few_words(structure, nouns, verbs, prepositions):
    with pytest.raises(ValueError, match=rf"^{structure}: 3 \+ 1 pairs are too many for this tokenizer's . scenes"):
        sva(closed(nouns, verbs, prepositions), structure, 3, 1)


@pytest.mark.parametrize("sizes", [(0, 5), (-1, 5), (5, -1)])
def test_sizes(sizes):
    with pytest.raises(ValueError, match=f"n must be at least 1, n_held_out at least 0; got {sizes[0]} and {sizes[1]}"):
        sva(Words(), "simple", *sizes)
    assert sva(Words(), "simple", 5, 0)[1] == []


def test_unknown_structure():
    with pytest.raises(ValueError, match="'abc'.*simple, within_rc, across_rc, across_pp"):
        sva(Words(), "abc")
