"""Which positions of different prompts are shown together: support.positions."""

import numpy as np
import pytest
from test_tasks import Words

import tasks
from support.positions import labels_of, laid_over, legend, overlay
from support.prompts import read_pairs


def pair(*original, patch=99, roles=None):
    """A pair of token ids whose first token differs."""
    group = f"length {len(original)}"
    return tasks.Pair(original, (patch, *original[1:]), (1, 2), roles or tuple(map(str, original)), group)


MIXED = [pair(5, 6, 7, 8, 9, i) for i in range(20, 25)] + [pair(5, 6, 7, 8, 9, 10, 11)]  # five of 6 tokens, one of 7


def test_the_most_frequent_length_is_shown():
    for pairs in (MIXED, MIXED[::-1]):
        labels, at = overlay(pairs)
        assert labels == ["5", "6", "7", "8", "9", "pos 5"]
        assert at.tolist() == [list(range(6)) if len(p.roles) == 6 else [-1] * 6 for p in pairs]


def test_of_two_lengths_that_are_equally_frequent_the_longer_is_shown():
    labels, at = overlay([pair(5, 6), pair(7, 8, 9)])
    assert labels == ["7", "8", "9"] and at.tolist() == [[-1, -1, -1], [0, 1, 2]]


def test_a_position_is_labelled_with_its_token_if_that_is_the_same_everywhere():
    labels, at = overlay([pair(5, 6, 7), pair(5, 8, 7), pair(4, 6, 7)])
    assert labels == ["pos 0", "pos 1", "7"] and (at == [0, 1, 2]).all()


def test_each_group_has_labels_of_its_own():
    pairs = [pair(5, 6, 7), pair(8, 9), pair(5, 6, 4)]
    assert labels_of(pairs) == {"length 3": ["5", "6", "pos 2"], "length 2": ["8", "9"]}
    ioi = tasks.ioi(Words(), 6)
    assert labels_of(ioi) == {p.group: list(p.roles) for p in ioi}


def test_prompts_from_a_file_are_labelled_with_their_words(tmp_path):
    line = '{"original": "The cat", "patch": "The cats", "original_answer": " is", "patch_answer": " are"}\n'
    path = tmp_path / "pairs.jsonl"
    path.write_text(line + line.replace("cat", "dog"))
    pairs = read_pairs(path, Words())
    assert overlay(pairs)[0] == ["BOS", "The", "pos 2"] and overlay(pairs[:1])[0] == ["BOS", "The", " cat"]


def test_prompts_that_are_the_beginning_of_the_longest_are_laid_over_it():
    """Their roles all occur in its roles, in order."""
    labels, at = overlay([pair(5, 6, 7), pair(5, 7)])
    assert labels == ["5", "6", "7"] and at.tolist() == [[0, 1, 2], [0, -1, 1]]


def test_templates_are_laid_over_each_other_by_role():
    pairs = tasks.ioi(Words(), 6)
    labels, at = overlay(pairs)
    assert labels == list(pairs[0].roles) and len(pairs[2].roles) == len(labels) - 1
    for p, row in zip(pairs, at):
        shown = {labels[j]: p.roles[i] for j, i in enumerate(row) if i >= 0}
        assert all(label == role for label, role in shown.items()) and len(shown) == len(p.roles)
        assert sorted(i for i in row if i >= 0) == list(range(len(p.roles)))  # each position once
    assert at[2].tolist() == [0, 1, -1, *range(2, 15)]  # "After [B1]" has no comma


def test_a_mean_is_of_the_pairs_that_have_the_position():
    pairs = [pair(5, 6, 7), pair(5, 7), pair(5, 7)]
    values = np.full((3, 2, 3), np.nan)  # [pair, layer, position]
    values[0], values[1, :, :2], values[2, :, :2] = (
        [[1, 2, 3], [4, 5, 6]],
        [[10, 30], [40, 60]],
        [[100, 300], [400, 600]],
    )
    by_hand = [[(1 + 10 + 100) / 3, 2, (3 + 30 + 300) / 3], [(4 + 40 + 400) / 3, 5, (6 + 60 + 600) / 3]]
    _, at = overlay(pairs)
    assert laid_over(values, at) == pytest.approx(np.array(by_hand))
    parts = laid_over(np.stack([values, -values], axis=-1), at)  # [pair, layer, position, part]
    assert parts.shape == (2, 3, 2) and parts[..., 1] == pytest.approx(-np.array(by_hand))


def test_the_legend_explains_what_is_not_a_word():
    ioi, sva = tasks.ioi(Words(), 1)[0].roles, [tasks.sva(Words(), s, 4, 4)[0][0].roles for s in tasks.SVA]
    text = legend(list(ioi))
    for label in ("B1", "FIRST", "PUNCT", "A", "S2", "END", "BOS"):
        assert f"{label}: {tasks.ROLES[label]}" in text
    assert text.count("B1: ") == 1 and "went" not in text and "a: " not in text
    assert legend(["5", "pos 2", " cat"]) == ""
    for role in {role for roles in (ioi, *sva) for role in roles}:  # each role that is no word of its template
        words = " ".join([*tasks.TEMPLATES, *(template for template, *_ in tasks.SVA.values())])
        assert role in tasks.ROLES or role in words.replace("[", "<").replace(",", " , ").split(), role


def test_a_label_that_several_positions_have_gets_their_numbers():
    labels, _ = overlay([pair(5, 6, 7, 6, 8, 6)])
    assert labels == ["5", "6:1", "7", "6:3", "8", "6:5"]


def test_labels_are_text():
    """Tokens can hold what steers a terminal, or draws nothing."""
    labels, _ = overlay([pair(5, 6, roles=("\033[2J", "a\u202e\u2060b é"))])
    assert labels == ["\\x1b[2J", "a\\u202e\\u2060b é"]
