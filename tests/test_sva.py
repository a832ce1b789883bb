"""Subject-verb agreement: the structures of Table 3, splits without a common prompt, and what files need for both."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from test_tasks import SPACE_IN_FRONT, Real, Words, check_ids, space_in_front

import tasks
from support.tokenizer import load_tokenizer
from tasks import AUXILIARIES, NOUNS, PREPOSITIONS, SVA_STRUCTURES, VERBS, Pair, largest_group, read_pairs, split, sva

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


def test_the_lists_begin_with_the_words_of_the_toy_models():
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
    for structure in SVA_STRUCTURES:  # the default sizes
        for pairs in sva(tokenizer, structure):
            check(pairs, structure, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


@pytest.mark.parametrize("structure", SVA_STRUCTURES)
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
    assert tuple(patterns) == SVA_STRUCTURES
    for structure, pattern in patterns.items():
        for p in sva(t, structure, 20, 5)[0]:
            assert re.fullmatch("<bos>" + pattern, t.decode(p.original))


@pytest.mark.parametrize("structure", SVA_STRUCTURES)
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


@pytest.mark.parametrize("structure", SVA_STRUCTURES[1:])
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
    for structure in SVA_STRUCTURES:
        first, again, other = (sva(t, structure, 20, 10, seed) for seed in (1, 1, 2))
        assert first == again and first[0] != other[0] and first[1] != other[1]


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
@pytest.mark.parametrize("structure", SVA_STRUCTURES)
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
    for structure in SVA_STRUCTURES:
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
    with pytest.raises(ValueError, match=f"'{structure}'.*{most + 1} pairs and 1 held.*enough for {most} and 1 ") as e:
        sva(t, structure, most + 1, 1)
    assert "\n" not in str(e.value) and f"{nouns} words for N1" in str(e.value)
    with pytest.raises(ValueError) as e:
        sva(t, structure, most, each + 1)
    enough = [int(size) for size in re.search(r"enough for (\d+) and (\d+)", str(e.value)).groups()]
    assert [len(side) for side in sva(t, structure, *enough)] == enough  # what the error promises


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
    with pytest.raises(ValueError, match="too many; there are enough for . and 0") as e:
        sva(closed(nouns, verbs, prepositions), structure, 3, 1)
    assert "\n" not in str(e.value) and f"{nouns} words for N1" in str(e.value)


@pytest.mark.parametrize("n, n_held_out, name", [(0, 5, "n"), (-1, 5, "n"), (5, 0, "n_held_out")])
def test_sizes_below_one(n, n_held_out, name):
    for call in (lambda: sva(Words(), "simple", n, n_held_out), lambda: split([], n, n_held_out)):
        with pytest.raises(ValueError, match=f"^{name} must be at least 1; got {min(n, n_held_out)}"):
            call()


def test_unknown_structure():
    with pytest.raises(ValueError, match="'abc'.*simple, within_rc, across_rc, across_pp"):
        sva(Words(), "abc")


# ---------------------------------------------------------------------------------------------------------------------
# Splitting any pairs, such as a file's


def pair(original, patch, answers=(8, 9)):
    return Pair((original,), (patch,), answers, ("x",), "length 1")


def test_split_keeps_pairs_with_a_common_prompt_together():
    chain = [pair(1, 2), pair(3, 4), pair(4, 2), pair(2, 1)]  # 1-2-4-3
    single = [pair(5, 6), pair(7, 8)]
    for seed in range(20):
        a, b = split(chain + single + single, 4, 2, seed)  # what is given twice counts once
        assert sorted(map(len, (a, b))) == [2, 4] and not prompts(a) & prompts(b)
        assert set(a) == set(chain) or set(b) <= set(chain)


def test_split_in_proportion_each_family_in_turn():
    pairs = [pair(2 * i, 2 * i + 1, (100, 101 + k)) for i in range(40) for k in range(5)]
    for sizes in ((30, 10), (10, 30), (150, 50), (1, 1)):
        sides = split(pairs, *sizes)
        assert [len(set(side)) for side in sides] == list(sizes) and not prompts(sides[0]) & prompts(sides[1])
        for side in sides:
            families = Counter(p.original for p in side).values()
            assert max(families) - min(families) <= 1
    assert [len(prompts(side)) for side in split(pairs, 150, 50)] == [60, 20]
    assert split(pairs, 30, 10, 1) == split(pairs, 30, 10, 1) != split(pairs, 30, 10, 2)


def test_split_of_too_few():
    with pytest.raises(ValueError, match="5 pairs and 1 held out are too many; there are enough for 1 and 1 "):
        split([pair(1, 2), pair(3, 4)], 5, 1)
    with pytest.raises(ValueError, match="enough for 0 and 0 "):
        split([], 5, 1)


def test_largest_group():
    def of(length, i):
        return Pair((i,) * length, (i + 1,) * length, (8, 9), ("x",) * length, f"length {length}")

    pairs = [of(3, 0), of(2, 1), of(3, 2), of(2, 3), of(2, 4)]
    assert largest_group(pairs) == largest_group(pairs, 3) == [pairs[1], pairs[3], pairs[4]]
    with pytest.raises(ValueError, match=r"4 pairs of one length are needed; of 5 pairs, .*\(length 2\) has 3"):
        largest_group(pairs, 4)
    with pytest.raises(ValueError, match="of 0 pairs"):
        largest_group([])


def write(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


LINE = dict(clean_prefix="The cat", patch_prefix="The cats", clean_answer=" is", patch_answer=" are")


@pytest.mark.parametrize(
    "change", [dict(patch_prefix="The big cats"), dict(clean_answer=" is not"), dict(patch_answer=" are not")]
)
def test_unaligned_lines_are_skipped_if_asked(tmp_path, change):
    path = write(tmp_path / "pairs.jsonl", LINE, {**LINE, **change}, LINE)
    with pytest.raises(ValueError, match="line 2: "):
        read_pairs(path, Words())
    assert len(read_pairs(path, Words(), skip_unaligned=True)) == 2
    with pytest.raises(ValueError, match="no pairs; this tokenizer aligns none of its 2 lines"):
        read_pairs(write(path, {**LINE, **change}, {**LINE, **change}), Words(), skip_unaligned=True)


@pytest.mark.parametrize(
    "change", [dict(patch_prefix="The cat"), dict(clean_answer=" are"), dict(clean_prefix=""), dict(patch_answer=None)]
)
def test_other_mistakes_are_never_skipped(tmp_path, change):
    with pytest.raises(ValueError, match="line 2: "):
        read_pairs(write(tmp_path / "pairs.jsonl", LINE, {**LINE, **change}), Words(), skip_unaligned=True)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
def test_feature_circuits_files(name):
    real, folder = Real(name), ROOT.parent / "shared" / "prompts"
    if not folder.is_dir():
        pytest.skip(f"the feature-circuits data is not at {folder}")
    pairs = read_pairs(folder / "sva_nounpp_test.jsonl", real, skip_unaligned=True)
    assert 300 < len(pairs) < 480  # some lines are not aligned
    discovery, held_out = split(largest_group(pairs, 300), 225, 75)
    assert len({len(p.original) for p in discovery + held_out}) == 1
    assert not prompts(discovery) & prompts(held_out)
