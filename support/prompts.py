"""Prompt pairs from files of JSON lines, split into two sets, and as the tensors of a batch."""

import csv
import io
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tasks
from models import first_line
from tasks import Pair, Tokenizer, Unaligned

# Fields of a line: our name, and the names in the data of feature-circuits and EAP-IG (their "clean" is our original).
FIELDS = {
    "original": ("clean_prefix", "clean"),
    "patch": ("patch_prefix", "corrupted"),
    "original_answer": ("clean_answer", "correct_idx"),
    "patch_answer": ("patch_answer", "incorrect_idx"),
}


def read_pairs(
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    bos: bool = True,
    n_vocab: int | None = None,
    skip_unaligned: bool = False,
) -> list[Pair]:
    """Prompt pairs from a file: JSON lines as in feature-circuits, a JSON array, or a CSV table as in EAP-IG.

    A line is an object with the FIELDS, under any name; other fields and blank lines are skipped. A prompt is a text
    or a list of token ids; an answer is a text, an id, or a list of these, a set whose mean counts. A text needs
    `tokenizer` and, with `bos`, begins with its BOS. Ids are used as they are.
    n_vocab: the size of the model's vocabulary, if ids are to be checked against it.
    skip_unaligned: leave out what is no pair only in this tokenizer (see tasks.Unaligned), instead of refusing it.
    A pair's group is "length N", where N counts the BOS. Its roles are the original's tokens.
    ValueError, with file and line, for what is no pair.
    """
    try:
        lines = lines_of(Path(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            pair = pair_of(tokenizer, *fields(line, tokenizer), bos)
            largest = max(*pair.original, *pair.patch, int(answers_of([pair]).max()))
            if n_vocab is not None and largest >= n_vocab:
                raise ValueError(f"token id {largest} is too large; the model's vocabulary ends at {n_vocab - 1}")
            pairs.append(pair)
        except ValueError as error:
            if not (skip_unaligned and isinstance(error, Unaligned)):
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not pairs:
        raise ValueError(f"{path}: none of its {len(lines)} lines is a prompt pair in this tokenizer")
    return pairs


def pair_of(tokenizer: Tokenizer | None, original, patch, original_answer, patch_answer, bos: bool = True) -> Pair:
    """As tasks.pair(), but an answer can be a list of texts or of ids; in the pair it is then a tuple of ids."""
    firsts, seconds = as_set(original_answer), as_set(patch_answer)
    check_answers(tokenizer, original, patch, *firsts, *seconds)
    grid = [[tasks.pair(tokenizer, original, patch, a, b, bos) for b in seconds] for a in firsts]
    if len(firsts) == len(seconds) == 1:
        return grid[0][0]
    answers = tuple(row[0].answers[0] for row in grid), tuple(pair.answers[1] for pair in grid[0])
    return replace(grid[0][0], answers=answers)


def as_set(answer: str | int | list) -> list:
    """Texts, or ids as tasks.pair() takes them."""
    answers = answer if isinstance(answer, list) else [answer]
    return [[x] if type(x) is int else x for x in answers]


def lines_of(path: Path) -> list[bytes]:
    """The lines of a file of JSON lines. A JSON array or a CSV table is turned into such lines: one for each row."""
    content = path.read_bytes()
    if path.suffix == ".csv":
        table = csv.DictReader(io.StringIO(content.decode("utf-8-sig", errors="replace")))
        rows = [{name: x for name, x in row.items() if name and x} for row in table]
        for row in rows:
            row |= {name: int(row[name]) for name in ("correct_idx", "incorrect_idx") if row.get(name, "").isdecimal()}
    else:
        try:
            rows = json.loads(content)
        except (ValueError, RecursionError):
            rows = None
        if not isinstance(rows, list):
            return content.splitlines()  # bytes: str.splitlines also splits at U+2028
    return [json.dumps(row).encode() for row in rows]


def check_answers(tokenizer: Tokenizer | None, original: str | list, patch: str | list, *answers: str | list) -> None:
    """ValueError for the usual slips with spaces: a word's token begins with the space before it."""
    if not isinstance(original, str):
        return
    if original.endswith(" ") or isinstance(patch, str) and patch.endswith(" "):
        raise ValueError("a prompt ends in a space, which belongs to the answer: ' Paul'")
    for answer in answers:
        if isinstance(answer, str) and answer[:1].isalpha():
            alone, spaced = (tasks.after(tokenizer, text) for text in (answer, " " + answer))
            if len(alone) == len(spaced) == 1 and alone != spaced:
                raise ValueError(f"the answer {answer!r} has no space in front: did you mean {' ' + answer!r}?")


def fields(line: bytes, tokenizer: Tokenizer | None) -> list[str | list[int]]:
    """The values of the FIELDS in one line of a file: texts, or lists of ids."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {first_line(error)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object; got {record!r:.80}")
    values = []
    for ours, theirs in FIELDS.items():
        known = [name for name in (ours, *theirs) if name in record]
        if not known:
            raise ValueError(f"no field {ours!r} (or {', '.join(name for name in theirs if name != ours)})")
        value = record[known[0]]
        if isinstance(value, str) and tokenizer is None:
            raise ValueError(f"{ours} is the text {value!r:.80}, which needs a tokenizer; without one, give token ids")
        if type(value) is int and "answer" in ours:
            value = [value]
        is_ids = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)  # a bool is no id
        texts = isinstance(value, list) and value and all(isinstance(i, str) and i for i in value)
        is_set = "answer" in ours and texts
        if is_set and tokenizer is None:
            raise ValueError(f"{ours} has texts, which need a tokenizer; without one, give token ids")
        if not value or not (is_ids or is_set or isinstance(value, str)):
            raise ValueError(f"{ours} must be a text or token ids, integers of 0 or more; got {value!r:.80}")
        values.append(value)
    return values


def by_group(pairs: list[Pair]) -> dict[str, list[int]]:
    """The numbers of the pairs by group; groups in order of appearance."""
    groups = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.group, []).append(i)
    return groups


def largest_group(pairs: list[Pair], n: int = 1) -> list[Pair]:
    """The pairs of the largest group, in order. ValueError if they are fewer than `n`."""
    groups = by_group(pairs).values()
    numbers = max(groups, key=len, default=[])
    if len(numbers) < n:
        raise ValueError(f"{n} pairs of one length are needed; the largest group of {len(pairs)} has {len(numbers)}")
    return [pairs[i] for i in numbers]


def split(pairs: list[Pair], n: int, n_held_out: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """`n` pairs to find a circuit with and `n_held_out` to judge it by, without a common prompt.

    Pairs that share a prompt, directly or through others, are a family and stay on one side. ValueError if too few.
    """
    pairs = list(dict.fromkeys(pairs))
    random.Random(seed).shuffle(pairs)
    leads_to = {}  # a prompt -> another one of its family, or itself

    def head(prompt: tuple[int, ...]) -> tuple[int, ...]:
        while leads_to.setdefault(prompt, prompt) != prompt:
            prompt = leads_to[prompt]
        return prompt

    for pair in pairs:
        leads_to[head(pair.original)] = head(pair.patch)
    families = {}
    for pair in pairs:
        families.setdefault(head(pair.original), []).append(pair)

    sides, lacking = ([], []), [n, n_held_out]
    for family in sorted(families.values(), key=len, reverse=True):  # the small ones last: they fill the gaps
        i = 0 if lacking[0] >= lacking[1] else 1
        sides[i].append(family)
        lacking[i] -= len(family)
    if max(lacking) > 0:
        found = f"{n - lacking[0]} and {n_held_out - lacking[1]} different ones that share no prompt"
        raise ValueError(f"{n} pairs and {n_held_out} held out are too many; there are {found}")
    # One pair of each family, then a second one of each, and so on.
    turns = ([pair for turn in zip_longest(*side) for pair in turn if pair] for side in sides)
    return tuple(pairs[:size] for pairs, size in zip(turns, (n, n_held_out)))


def tensors(pairs: list[Pair], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """original [batch, pos], patch [batch, pos] and answers_of() of pairs of one length."""
    prompts = (torch.tensor([getattr(pair, part) for pair in pairs], device=device) for part in ("original", "patch"))
    return *prompts, answers_of(pairs).to(device)


def answers_of(pairs: list[Pair]) -> Tensor:
    """[n, 2]; if some are sets of answers [n, 2, the largest set's size], padded with -1."""
    rows = [[x if isinstance(x, tuple) else (x,) for x in pair.answers] for pair in pairs]
    size = max(len(x) for row in rows for x in row)
    padded = torch.tensor([[[*x, *[-1] * (size - len(x))] for x in row] for row in rows])
    return padded.squeeze(-1) if size == 1 else padded


def batches(pairs: list[Pair], size: int) -> Iterator[list[int]]:
    """Lists of at most `size` pair numbers whose prompts have one length."""
    lengths = [len(pair.original) for pair in pairs]
    for length in dict.fromkeys(lengths):
        numbers = [i for i, other in enumerate(lengths) if other == length]
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def prompt_arrays(pairs: list[Pair]) -> dict[str, np.ndarray]:
    """The pairs as they are in scores.npz. Token ids are padded with -1."""
    longest = max(len(pair.original) for pair in pairs)

    def padded(rows: list[tuple[int, ...]]) -> np.ndarray:
        return np.array([[*row, *[-1] * (longest - len(row))] for row in rows])

    return {
        "lengths": np.array([len(pair.original) for pair in pairs]),
        "original_tokens": padded([pair.original for pair in pairs]),
        "patch_tokens": padded([pair.patch for pair in pairs]),
        "answers": answers_of(pairs).numpy(),
    }
