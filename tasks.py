"""Prompt pairs: IOI (the paper's Table 2), subject-verb agreement (Table 3), and pairs read from JSON-lines files.

Activations of the patch prompt go into the run on the original prompt, so the two prompts of a pair must line up token
for token. What does not line up is refused here, with the prompt named.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Protocol

import torch


class Tokenizer(Protocol):
    """What a tokenizer must offer here."""

    bos_id: int | None
    n_vocab: int  # for pairs that are not from the templates

    def encode(self, text: str) -> list[int]: ...  # never adds a BOS

    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Pair:
    """Two prompts of equal length, and the next token that each calls for.

    It unpacks into relp's arguments: relp.attribute(model, *pair, nodes=["resid_pre"]).
    """

    original: tuple[int, ...]  # token ids, BOS included
    patch: tuple[int, ...]  # same length
    answers: tuple[int, int]  # (the original's answer, the patch's answer)
    roles: tuple[str, ...]  # one label per position, for figures
    group: str  # pairs of one group have the same length and, if not from a file, the same roles

    def __iter__(self) -> Iterator[torch.Tensor]:
        """original [1, pos], patch [1, pos] and answers [1, 2], on the CPU."""
        return (torch.tensor([ids]) for ids in (self.original, self.patch, self.answers))


# What the roles of the templates mean. A role that is not here is a word of the template itself.
ROLES = {
    "BOS": "the token before every prompt",
    "FIRST": "the first word",
    "B1": "the name that is said twice",
    "A": "the other name",
    "PLACE": "a place",
    "PUNCT": "comma or full stop after the place",
    "S2": "B1's second mention",
    "OBJECT": "a thing",
    "END": "the last word, which predicts",
    "N1": "the first noun",
    "N2": "the second noun",
    "V": "N2's verb",
    "P": "a preposition",
}

# ---------------------------------------------------------------------------------------------------------------------
# Words

# The most common ones first. All are single tokens in GPT-2 and Pythia; for another tokenizer, `ioi` drops those that
# are not. Objects begin with a consonant, since the templates say "a".
NAMES = """
John Mary James David Michael Robert William Richard Thomas Charles Daniel Matthew Anthony Mark Paul Steven Andrew
Kevin Brian George Edward Jason Ryan Jacob Eric Sarah Jennifer Elizabeth Jessica Anna Emily Laura Emma Lisa Amy
Rachel Kate Alice Jane Martin Peter Simon Adam Alex Tom Tim Jack Joe Sam Ben Dan Bob Bill Jim Mike Steve Chris Matt
Nick Greg Scott Jeff Josh Justin Aaron Nathan Patrick Sean Stephen Christopher Joseph Samuel Benjamin Jonathan
Nicholas Alexander Henry Frank Arthur Albert Walter Roger Ralph Carl Howard Harry Oliver Philip Douglas Gary Larry
Jerry Dennis Keith Alan Bruce Craig Ian Luke Max Leo Oscar Victor Vincent Louis Maria Susan Linda Karen Nancy Helen
Margaret Ruth Julia Julie Victoria Rebecca Michelle Amanda Melissa Stephanie Nicole Christine Katherine Heather Diana
Claire Charlotte Sophie Lucy Rose Marie Angela
""".split()

PLACES = """
store school park house office hospital library station restaurant church garden beach market bank museum hotel
theater airport farm zoo gym stadium factory bar cafe mall lake river island bridge castle temple studio shop garage
kitchen prison court palace forest village party camp clinic
""".split()

OBJECTS = """
book ball drink letter ring phone card gift key picture watch hat bottle computer ticket kiss
bag box cup knife lamp coat shirt map pen camera guitar flower basket cake sandwich coin candle necklace bone
snack toy bike blanket plate jacket mirror pencil
""".split()


def word_forms(text: str) -> list[tuple[str, ...]]:
    return [tuple(word.split("/")) for word in text.split()]


# Subject-verb agreement: each word as (with a singular subject, with a plural one). The toy models know the first 20
# nouns, 10 verbs and 5 prepositions. Here too, words that a tokenizer splits are dropped.
NOUNS = word_forms("""
athlete/athletes manager/managers secretary/secretaries teacher/teachers doctor/doctors student/students
builder/builders lawyer/lawyers nurse/nurses pilot/pilots author/authors painter/painters singer/singers
driver/drivers guard/guards car/cars table/tables tree/trees dog/dogs truck/trucks
actor/actors artist/artists banker/bankers boy/boys brother/brothers child/children customer/customers dancer/dancers
director/directors editor/editors engineer/engineers expert/experts farmer/farmers father/fathers friend/friends
girl/girls guest/guests hunter/hunters judge/judges king/kings leader/leaders man/men minister/ministers mother/mothers
neighbor/neighbors officer/officers owner/owners parent/parents player/players poet/poets president/presidents
priest/priests professor/professors reporter/reporters scientist/scientists senator/senators sister/sisters
soldier/soldiers tourist/tourists visitor/visitors woman/women worker/workers writer/writers
bird/birds boat/boats cat/cats chair/chairs horse/horses house/houses plane/planes ship/ships
""")
VERBS = word_forms("""
likes/like admires/admire hates/hate helps/help knows/know loves/love sees/see follows/follow calls/call trusts/trust
remembers/remember respects/respect wants/want needs/need watches/watch visits/visit supports/support protects/protect
describes/describe avoids/avoid chooses/choose teaches/teach understands/understand notices/notice ignores/ignore
encourages/encourage fears/fear misses/miss meets/meet hears/hear finds/find recommends/recommend prefers/prefer
recognizes/recognize recalls/recall attracts/attract accepts/accept contacts/contact believes/believe thanks/thank
""")
AUXILIARIES = word_forms("has/have is/are does/do")
PREPOSITIONS = [(word, word) for word in "near behind beside with by above below under around against".split()]

# ---------------------------------------------------------------------------------------------------------------------
# Filling templates


def bos_ids(tokenizer: Tokenizer, bos: bool) -> list[int]:
    if bos and tokenizer.bos_id is None:
        raise ValueError("this tokenizer has no BOS token; use bos=False (on the command line: --no-bos)")
    return [tokenizer.bos_id] if bos else []


def after(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on after other text."""
    # Some tokenizers, such as Llama 2's, put a space in front of what they encode, which is right for a prompt's start
    # only. Ours have encode_after for the rest; a tokenizer of your own may do without.
    return getattr(tokenizer, "encode_after", tokenizer.encode)(text)


def one_token(tokenizer: Tokenizer, words: Sequence[str]) -> list[str]:
    """Those of `words` that are one token after a space. An unknown-word token does not decode to the word."""
    ids = {word: after(tokenizer, " " + word) for word in words}
    return [word for word in words if len(ids[word]) == 1 and tokenizer.decode(ids[word]).strip() == word]


def fill(tokenizer: Tokenizer, template: str, words: dict[str, str]) -> tuple[list[int], list[str]]:
    """Token ids and roles of a template whose slots are filled from `words` (slot name -> word).

    A role is the slot's name, or else the template's own word.
    """
    ids, roles, text = [], [], ""
    for piece in re.findall(r" ?\[\w+\]| ?\w+|[.,]", template):
        role = piece.strip(" []")
        if "[" in piece:
            piece = " " + words[role]
        tokens = after(tokenizer, piece) if text else tokenizer.encode(piece)
        ids += tokens
        roles += [role] * len(tokens)  # a template word of several tokens repeats its role
        text += piece
    if ids != tokenizer.encode(text):
        raise ValueError(
            f"this tokenizer encodes {text!r} differently from its words one by one, "
            "so that its positions cannot be given roles; use prompts from a file"
        )
    return ids, roles


# ---------------------------------------------------------------------------------------------------------------------
# Indirect object identification

# Table 2, without the final [A], which is the answer. B is named twice; S2 is its second mention.
TEMPLATES = (
    "Then, [B1] and [A] went to the [PLACE]. [S2] gave a [OBJECT] to",
    "When, [B1] and [A] went to the [PLACE]. [S2] gave a [OBJECT] to",
    "After [B1] and [A] went to the [PLACE], [S2] gave a [OBJECT] to",
)

# Words of the patch prompt for the three slots of names; b and a are the original's names. The answer becomes b.
CORRUPTIONS = {
    "swap": lambda b, a: {"B1": a, "A": b, "S2": a},  # the two names exchanged everywhere (Section 5.1)
    "s2": lambda b, a: {"B1": b, "A": a, "S2": a},  # only the second mention changed
}


def ioi(tokenizer: Tokenizer, n: int = 100, seed: int = 0, corruption: str = "swap", bos: bool = True) -> list[Pair]:
    """`n` different pairs for indirect object identification (paper, Section 5.1 and Table 2).

    Original: "Then, B and A went to the PLACE. B gave a OBJECT to", answer " A"; the patch's answer is " B".
    Pair i uses template i % 3 and belongs to the group "template 1", "template 2" or "template 3". All
    pairs of a group have the same roles: BOS, FIRST (the first word), B1, A, PLACE, PUNCT (the mark after it), S2 (the
    second mention of B), OBJECT, END (the last position); each other token of the template is its own role. Words are
    drawn by random.Random(seed), from those that the tokenizer keeps as one token.

    corruption: "swap" exchanges the names everywhere in the patch prompt; "s2" changes the second mention only.
    bos: begin each prompt with the tokenizer's BOS token.
    ValueError if n < 1 or larger than the words allow, on an unknown corruption, if bos is asked of a tokenizer
    without one, or if the tokenizer splits or merges the words so that no pair can be made.
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {corruption!r}; allowed: {', '.join(CORRUPTIONS)}")
    start = bos_ids(tokenizer, bos)
    names, places, objects = (one_token(tokenizer, words) for words in (NAMES, PLACES, OBJECTS))
    if len(names) < 2 or not places or not objects:
        raise ValueError(
            "IOI needs two names, a place and an object that are one token each after a space; this "
            f"tokenizer keeps {len(names)} of {len(NAMES)} names, {len(places)} of {len(PLACES)} places "
            f"and {len(objects)} of {len(OBJECTS)} objects"
        )
    most = len(TEMPLATES) * len(names) * (len(names) - 1) * len(places) * len(objects)
    if not 1 <= n <= most:
        raise ValueError(f"n must be from 1 to {most}, the number of different IOI pairs; got {n}")

    rng = random.Random(seed)
    pairs, seen = [], set()
    while len(pairs) < n:
        t = len(pairs) % len(TEMPLATES)
        b, a = rng.sample(names, 2)
        rest = {"PLACE": rng.choice(places), "OBJECT": rng.choice(objects)}
        draw = (t, b, a, *rest.values())
        if draw in seen:
            continue
        seen.add(draw)
        original, roles = fill(tokenizer, TEMPLATES[t], {"B1": b, "A": a, "S2": b, **rest})
        patch, _ = fill(tokenizer, TEMPLATES[t], {**CORRUPTIONS[corruption](b, a), **rest})
        answers = after(tokenizer, " " + a) + after(tokenizer, " " + b)
        # the first word, the mark after the place and the last word play one role in all templates
        roles = ["BOS"] * len(start) + ["FIRST" if role == roles[0] else role for role in roles]
        roles[roles.index("PLACE") + 1], roles[-1] = "PUNCT", "END"
        pairs.append(
            Pair(tuple(start + original), tuple(start + patch), tuple(answers), tuple(roles), f"template {t + 1}")
        )
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Subject-verb agreement

# structure: (template, the noun that the answer agrees with, the words that the answer is drawn from). [V] agrees with
# [N2]. The answers are as in Table 3; the simple structure, which has few prompts, takes both kinds.
SVA = {
    "simple": ("The [N1]", "N1", AUXILIARIES + VERBS),
    "within_rc": ("The [N1] that the [N2]", "N2", VERBS),
    "across_rc": ("The [N1] that the [N2] [V]", "N1", AUXILIARIES),
    "across_pp": ("The [N1] [P] the [N2]", "N1", AUXILIARIES),
}
SVA_STRUCTURES = tuple(SVA)


def check_sizes(n: int, n_held_out: int) -> None:
    for name, value in (("n", n), ("n_held_out", n_held_out)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def sva(
    tokenizer: Tokenizer, structure: str, n: int = 300, n_held_out: int = 100, seed: int = 0, bos: bool = True
) -> tuple[list[Pair], list[Pair]]:
    """`n` and `n_held_out` pairs for subject-verb agreement (paper, Section 5.2, Table 3 and Appendix A.2).

    structure, original, patch and the answers of both, for example:
    "simple"     "The athlete"                          "The athletes"                          has / have
    "within_rc"  "The athlete that the managers"        "The athlete that the manager"          like / likes
    "across_rc"  "The athlete that the managers like"   "The athletes that the managers like"   does / do
    "across_pp"  "The secretaries near the cars"        "The secretary near the cars"           have / has

    The two prompts differ in the number of the noun that the answer agrees with, and in nothing else; which of them
    is the original, and the number of the other noun, are random. The answers are a verb's two forms within a
    relative clause, an auxiliary's across a clause or phrase (both as in Table 3), and either kind's for "simple",
    which is not in the paper but in the data of [44].
    Words are drawn by random.Random(seed), from those of which the tokenizer keeps both forms as one token.

    All pairs have the group `structure` and the same roles: BOS, The, N1, that, the, N2, V (the verb of N2), P (the
    preposition). The last position, from which the answer is predicted, is a content word and has its own role.
    bos: begin each prompt with the tokenizer's BOS token.
    Returns (discovery, held_out). No prompt of one is a prompt of the other, neither as original nor
    as patch. Within each, all pairs differ, and prompts are used again (the other way round, or with other answers)
    only where there are too few: "simple" has two prompts per noun. With the toy models' words (20 nouns, 10 verbs,
    3 auxiliaries) these make 20 x 2 x 13 = 520 pairs, and the default 300 and 100 are of 15 and 5 nouns.
    ValueError on an unknown structure, a size below 1, more pairs than the words allow, or if bos is asked of
    a tokenizer without one.
    """
    if structure not in SVA:
        raise ValueError(f"unknown structure {structure!r}; allowed: {', '.join(SVA)}")
    check_sizes(n, n_held_out)
    start = bos_ids(tokenizer, bos)
    template, agrees_with, answers = SVA[structure]

    def kept(words: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        return [word for word in words if len(one_token(tokenizer, word)) == len(word)]

    lists = {"N1": NOUNS, "N2": NOUNS, "V": VERBS, "P": PREPOSITIONS}
    slots = {slot: kept(lists[slot]) for slot in re.findall(r"\[(\w+)\]", template)}
    answers = [[after(tokenizer, " " + form)[0] for form in word] for word in kept(answers)]

    # A scene fixes every word, and the number of the other noun. Its two prompts differ only in the number of the noun
    # that the answer agrees with; so two scenes have no prompt in common.
    other_numbers = (0, 1) if "N2" in slots else (0,)
    scenes = [
        scene for scene in product(other_numbers, *slots.values()) if len(set(scene)) == len(scene)
    ]  # N1 is not N2
    rng = random.Random(seed)
    pairs = []
    for other_number, *words in rng.sample(scenes, min(len(scenes), n + n_held_out)):
        prompts = []
        for number in 0, 1:
            filled = {slot: word[number if slot == agrees_with else other_number] for slot, word in zip(slots, words)}
            ids, roles = fill(tokenizer, template, filled)
            prompts.append(tuple(start + ids))
        roles = tuple(["BOS"] * len(start) + roles)
        for singular, plural in answers:
            pairs.append(Pair(*prompts, (singular, plural), roles, structure))
            pairs.append(Pair(*reversed(prompts), (plural, singular), roles, structure))
    try:
        return split(pairs, n, n_held_out, seed)
    except ValueError as error:
        counts = [f"{len(words)} words for {slot}" for slot, words in [*slots.items(), ("the answer", answers)]]
        raise ValueError(
            f"structure {structure!r}: {error}; with both forms one token each, this tokenizer leaves "
            f"{', '.join(counts)}"
        ) from None


def split(pairs: list[Pair], n: int, n_held_out: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """`n` pairs to find a circuit with and `n_held_out` to judge it by, without a common prompt.

    A prompt counts whether it is the original or the patch. Pairs that share one, directly or through others, are
    a family and stay on one side.

    1. Families are sorted, the largest first; those of one size are in an order drawn by random.Random(seed).
    2. Each goes to the side that is filled less, as a share of its size.
    3. A side takes one pair of each of its families, then a second of each, and so on, until it has its size.

    ValueError if a size is below 1, or if there are too few pairs, with the sizes that there are enough for.
    """
    check_sizes(n, n_held_out)
    pairs = list(dict.fromkeys(pairs))
    random.Random(seed).shuffle(pairs)
    family_of = {}  # prompt -> list of pairs
    for pair in pairs:
        family = family_of.setdefault(pair.original, [])
        joined = family_of.setdefault(pair.patch, family)
        if joined is not family:
            family += joined
            family_of.update((prompt, family) for p in joined for prompt in (p.original, p.patch))
        family.append(pair)

    sizes, sides, filled = (n, n_held_out), ([], []), [0, 0]
    families = {id(family): family for family in family_of.values()}.values()
    for family in sorted(families, key=len, reverse=True):  # the small ones last: they even it out
        side = min((0, 1), key=lambda i: filled[i] / sizes[i])
        sides[side].append(family)
        filled[side] += len(family)
    if any(have < size for have, size in zip(filled, sizes)):
        enough = " and ".join(str(min(have, size)) for have, size in zip(filled, sizes))
        raise ValueError(
            f"{n} pairs and {n_held_out} held out are too many; there are enough for {enough} "
            "different ones that share no prompt"
        )
    taken = ([pair for turn in zip_longest(*side) for pair in turn if pair] for side in sides)
    return tuple(pairs[:size] for pairs, size in zip(taken, sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Pairs from a file, or from strings

# Fields of a line: our name, and the name in the feature-circuits data (their "clean" is our original).
FIELDS = {
    "original": "clean_prefix",
    "patch": "patch_prefix",
    "original_answer": "clean_answer",
    "patch_answer": "patch_answer",
}


def labels(ids: list[int], tokenizer: Tokenizer | None) -> list[str]:
    """One string per id. A model's vocabulary may be padded beyond its tokenizer's, which then cannot decode."""
    return [str(i) if tokenizer is None or i >= tokenizer.n_vocab else tokenizer.decode([i]) for i in ids]


def show(ids: list[int], tokenizer: Tokenizer | None) -> str:
    return f"{len(ids)} {'token' if len(ids) == 1 else 'tokens'} {quote(labels(ids, tokenizer))}"


def quote(value: object, most: int = 300) -> str:
    """What was given, for an error's one line."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


class Unaligned(ValueError):
    """A pair whose prompts have unequal length, or whose answer is not one token, in this tokenizer."""


def token_ids(name: str, value: object, tokenizer: Tokenizer | None, n_vocab: int | None) -> list[int]:
    """The token ids of one field; `name` is for the error."""
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(
                f"{name} is the string {quote(value)}, which needs a tokenizer; without one, give token ids"
            )
        value = after(tokenizer, value) if "answer" in name else tokenizer.encode(value)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a string or token ids; got {quote(value)}")
    for i in value:
        if type(i) is not int or i < 0 or (n_vocab is not None and i >= n_vocab):  # a bool is no id
            allowed = "0 or more" if n_vocab is None else f"from 0 to {n_vocab - 1}"
            raise ValueError(f"{name}: a token id must be an integer, {allowed}; got {quote(i)} in {quote(value)}")
    if not value:
        raise ValueError(f"{name} is empty; it needs at least one token")
    return value


def parse_line(line: bytes, tokenizer: Tokenizer | None, bos: bool, n_vocab: int | None) -> Pair:
    """One line of a file. The ValueError does not name file and line, which `read_pairs` adds."""
    try:
        record = json.loads(line.decode("utf-8-sig"))  # -sig: a byte-order mark is no part of the JSON
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object; got {quote(record)}")
    values = {}
    for ours, theirs in FIELDS.items():
        key = ours if ours in record else theirs
        if key not in record:
            raise ValueError(f"no field {ours!r}" + (f" (or {theirs!r})" if theirs != ours else ""))
        values[ours] = record[key]
        if "answer" in ours and type(record[key]) is int:
            values[ours] = [record[key]]
    return make_pair(values, tokenizer, bos, n_vocab)


def pair(
    tokenizer: Tokenizer, original: str, patch: str, original_answer: str, patch_answer: str, bos: bool = True
) -> Pair:
    """A pair of two strings and their answers, each one token and usually with its leading space.

    tokenizer: one of support.tokenizer.load_tokenizer. The roles are the original's tokens. bos: begin both prompts
    with the tokenizer's BOS token. ValueError, which shows the tokens, if the two prompts do not have equally many or
    are equal, if an answer is not one token, or if the answers are equal.
    """
    if not hasattr(tokenizer, "n_vocab"):
        raise ValueError(f"a tokenizer of support.tokenizer.load_tokenizer is needed, got {type(tokenizer).__name__}")
    values = dict(zip(FIELDS, (original, patch, original_answer, patch_answer)))
    return make_pair(values, tokenizer, bos, tokenizer.n_vocab)


def make_pair(values: dict, tokenizer: Tokenizer | None, bos: bool, n_vocab: int | None) -> Pair:
    """The pair of these values, {field: text or token ids}."""
    if isinstance(values["original"], str) != isinstance(values["patch"], str):
        raise ValueError(
            "original and patch must be both strings or both lists of token ids; got "
            f"{quote(values['original'])} and {quote(values['patch'])}"
        )

    original, patch, *answers = (token_ids(name, value, tokenizer, n_vocab) for name, value in values.items())
    if len(original) != len(patch):
        raise Unaligned(
            "original and patch must have equally many tokens; original is "
            f"{show(original, tokenizer)}, patch is {show(patch, tokenizer)}"
        )
    if original == patch:
        raise ValueError(f"original and patch must differ; both are {show(original, tokenizer)}")
    for name, answer in zip(("original_answer", "patch_answer"), answers):
        if len(answer) != 1:
            raise Unaligned(
                f"{name} must be one token (most words need their leading space); it is {show(answer, tokenizer)}"
            )
    if answers[0] == answers[1]:
        raise ValueError(f"original_answer and patch_answer must differ; both are {show(answers[0], tokenizer)}")

    start = bos_ids(tokenizer, bos) if isinstance(values["original"], str) else []
    roles = ["BOS"] * len(start) + labels(original, tokenizer)
    return Pair(
        tuple(start + original),
        tuple(start + patch),
        (answers[0][0], answers[1][0]),
        tuple(roles),
        f"length {len(roles)}",
    )


def read_pairs(
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    bos: bool = True,
    n_vocab: int | None = None,
    skip_unaligned: bool = False,
) -> list[Pair]:
    """Prompt pairs from a file of JSON lines, such as the subject-verb agreement data of feature-circuits.

    Each line is an object with the fields `original, patch, original_answer, patch_answer`, or under their
    feature-circuits names `clean_prefix, patch_prefix, clean_answer, patch_answer`. Other fields and blank lines
    are skipped. A prompt is a string or a list of token ids; an answer is a string, one id, or a list of one id.
    Strings are encoded as they stand (an answer with its leading space) and need `tokenizer`; with `bos`, string
    prompts begin with its BOS. Prompts of ids are used as given, without a BOS.

    n_vocab: if given, the size of the model's vocabulary, against which every id is checked.
    skip_unaligned: leave out lines whose prompts have unequal length, or whose answers are not one token, in this
    tokenizer (the feature-circuits files were made for others), instead of refusing them.
    A pair's group is "length N", N counting the BOS; its roles are the original's tokens,
    decoded where there is a tokenizer, so that they differ within a group.
    ValueError, with file and line, for whatever is not such a pair: prompts of unequal length or equal
    prompts, answers that are equal or not one token, ids out of range, a missing field, text that is not JSON.
    """
    try:
        lines = Path(path).read_bytes().splitlines()  # bytes: str.splitlines also splits at U+2028
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    pairs, unaligned = [], 0
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                pairs.append(parse_line(line, tokenizer, bos, n_vocab))
            except ValueError as error:
                if skip_unaligned and isinstance(error, Unaligned):
                    unaligned += 1
                    continue
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not pairs and unaligned:
        raise ValueError(f"{path}: no pairs; this tokenizer aligns none of its {unaligned} lines")
    if not pairs:
        raise ValueError(f"{path}: no pairs; each line must be a JSON object with the fields {', '.join(FIELDS)}")
    return pairs


def by_group(pairs: list[Pair]) -> dict[str, list[int]]:
    """The indices of `pairs` by group; groups in order of appearance."""
    groups = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(pair.group, []).append(i)
    return groups


def largest_group(pairs: list[Pair], n: int = 1) -> list[Pair]:
    """The pairs of the largest group, in order: all of one length, as averages by position need.

    ValueError if they are fewer than the `n` that are needed.
    """
    groups = by_group(pairs)
    name = max(groups, key=lambda group: len(groups[group]), default="none")
    largest = groups.get(name, [])
    if len(largest) < n:
        raise ValueError(
            f"{n} pairs of one length are needed; of {len(pairs)} pairs, the largest group ({name}) has {len(largest)}"
        )
    return [pairs[i] for i in largest]
