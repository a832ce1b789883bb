"""Prompt pairs for the paper's two tasks: indirect objects (Table 2) and subject-verb agreement (Table 3).

The patch run's activations go into the run on the original, so the two prompts of a pair line up token for token.
Pairs from a file are in support/prompts.py.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch


class Tokenizer(Protocol):
    """What a tokenizer must have, as those of support.tokenizer.load_tokenizer do. encode() never adds a BOS."""

    bos_id: int | None
    n_vocab: int
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


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

# Words, the most common ones first. All are one token in GPT-2 and Pythia. What a tokenizer splits is not used with it.
# Objects begin with a consonant, since the templates say "a".
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


def with_s(text: str) -> list[tuple[str, str]]:
    """Each word without and with a final s. What does not just add an s is written out, as in "man/men"."""
    return [tuple(word.split("/")) if "/" in word else (word, word + "s") for word in text.split()]


# Subject-verb agreement: (singular, plural). The toy models know the first 20 nouns, 10 verbs and 5 prepositions.
NOUNS = with_s("""
athlete manager secretary/secretaries teacher doctor student builder lawyer nurse pilot author painter singer driver
guard car table tree dog truck actor artist banker boy brother child/children customer dancer director editor engineer
expert farmer father friend girl guest hunter judge king leader man/men minister mother neighbor officer owner parent
player poet president priest professor reporter scientist senator sister soldier tourist visitor woman/women worker
writer bird boat cat chair horse house plane ship
""")
VERBS = with_s("""
like admire hate help know love see follow call trust remember respect want need watch/watches visit support protect
describe avoid choose teach/teaches understand notice ignore encourage fear miss/misses meet hear find recommend
prefer recognize recall attract accept contact believe thank
""")
VERBS = [(singular, plural) for plural, singular in VERBS]
AUXILIARIES = [("has", "have"), ("is", "are"), ("does", "do")]
PREPOSITIONS = [(word, word) for word in "near behind beside with by above below under around against".split()]

# ---------------------------------------------------------------------------------------------------------------------
# From text to tokens

Text = str | list[int]  # or token ids, which are used as they are and need no tokenizer


def bos_ids(tokenizer: Tokenizer, bos: bool) -> list[int]:
    if bos and tokenizer.bos_id is None:
        raise ValueError("this tokenizer has no BOS token; use bos=False (on the command line: --no-bos)")
    return [tokenizer.bos_id] if bos else []


def after(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text that goes on after other text: some tokenizers put a space before what they encode."""
    return getattr(tokenizer, "encode_after", tokenizer.encode)(text)


class Unaligned(ValueError):
    """The prompts have unequal length, or an answer is not one token, in this tokenizer."""


def labels(ids: Sequence[int], tokenizer: Tokenizer | None) -> list[str]:
    """One string per id. A model's vocabulary may be larger than its tokenizer's, which then cannot decode."""
    return [str(i) if tokenizer is None or i >= tokenizer.n_vocab else tokenizer.decode([i]) for i in ids]


def pair(
    tokenizer: Tokenizer, original: Text, patch: Text, original_answer: Text, patch_answer: Text, bos: bool = True
) -> Pair:
    """A pair of two texts and their answers, each one token and usually with its leading space.

    The roles are the original's tokens. bos: begin both texts with the tokenizer's BOS token.
    ValueError, which shows the tokens, if they are no pair; it is Unaligned if they might be one in another tokenizer.
    """
    if not isinstance(original, str | list) or type(original) is not type(patch):
        raise ValueError(f"original and patch must be both texts or both ids; got {original!r:.80}, {patch!r:.80}")
    start = bos_ids(tokenizer, bos) if isinstance(original, str) else []
    prompts = [tokenizer.encode(x) if isinstance(x, str) else x for x in (original, patch)]
    prompts = [ids[1:] if start and ids[:1] == start else ids for ids in prompts]  # a BOS that is there is not doubled
    answers = [after(tokenizer, x) if isinstance(x, str) else x for x in (original_answer, patch_answer)]

    def show(ids: list[int]) -> str:
        return f"{len(ids)} {'token' if len(ids) == 1 else 'tokens'} {labels(ids, tokenizer)!r:.300}"

    first, second = map(show, prompts)
    if len(prompts[0]) != len(prompts[1]):
        raise Unaligned(f"original and patch must have equally many tokens; original is {first}, patch is {second}")
    if prompts[0] == prompts[1]:
        raise ValueError(f"original and patch must differ; both are {first}")
    for name, answer in zip(("original_answer", "patch_answer"), answers):
        if len(answer) != 1:
            raise Unaligned(f"{name} must be one token (most words need their leading space); it is {show(answer)}")
    if answers[0] == answers[1]:
        raise ValueError(f"original_answer and patch_answer must differ; both are {show(answers[0])}")
    original, patch = (tuple(start + ids) for ids in prompts)
    roles = ["BOS"] * len(start) + labels(prompts[0], tokenizer)
    return Pair(original, patch, (*answers[0], *answers[1]), tuple(roles), f"length {len(roles)}")


def one_token(tokenizer: Tokenizer, words: Sequence[str]) -> list[str]:
    """Those of `words` that are one token after a space. An unknown-word token does not decode to the word."""
    ids = {word: after(tokenizer, " " + word) for word in words}
    return [word for word in words if len(ids[word]) == 1 and tokenizer.decode(ids[word]).strip() == word]


def fill(tokenizer: Tokenizer, template: str, words: dict[str, str], bos: bool) -> tuple[tuple, tuple]:
    """Ids and roles of a prompt. Slots: [ROLE], filled from `words`, and [ROLE=word]. Another word is its own role."""
    ids, roles, text = [], [], ""
    for piece in re.findall(r" ?\[.+?\]| ?\w+|[.,]", template):
        role, _, word = piece.strip(" []").partition("=")
        if "[" in piece:
            piece = piece[: piece.index("[")] + (word or words[role])
        tokens = after(tokenizer, piece) if text else tokenizer.encode(piece)
        ids += tokens
        roles += [role] * len(tokens)
        text += piece
    if ids != tokenizer.encode(text):
        raise ValueError(f"this tokenizer encodes {text!r} differently from its words; use prompts from a file")
    start = bos_ids(tokenizer, bos)
    return tuple(start + ids), tuple(["BOS"] * len(start) + roles)


# ---------------------------------------------------------------------------------------------------------------------
# Indirect object identification

# Table 2, without the final [A], which is the answer. Its [B] is B1 here, and S2 the second time.
TEMPLATES = (
    "[FIRST=Then], [B1] and [A] went to the [PLACE][PUNCT=.] [S2] gave a [OBJECT] [END=to]",
    "[FIRST=When], [B1] and [A] went to the [PLACE][PUNCT=.] [S2] gave a [OBJECT] [END=to]",
    "[FIRST=After] [B1] and [A] went to the [PLACE][PUNCT=,] [S2] gave a [OBJECT] [END=to]",
)

# Where the names in the patch prompt come from. "S2": "A" says: at S2, the patch prompt has the original's word at A.
CORRUPTIONS = {
    "swap": {"B1": "A", "A": "B1", "S2": "A"},  # the two names exchanged everywhere (Section 5.1)
    "s2": {"S2": "A"},  # only the second mention changed
}


def ioi(tokenizer: Tokenizer, n: int = 100, seed: int = 0, corruption: str = "swap", bos: bool = True) -> list[Pair]:
    """`n` different pairs for indirect object identification (paper, Section 5.1 and Table 2).

    The original's answer is " A"; the patch's is " B". Pair i uses template i % 3; its group is "template 1", 2 or 3.
    corruption: a key of CORRUPTIONS. bos: begin each prompt with the tokenizer's BOS token.
    ValueError on an unknown corruption, or if this tokenizer's words do not make `n` pairs.
    """
    if corruption not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {corruption!r}; allowed: {', '.join(CORRUPTIONS)}")
    names, places, objects = (one_token(tokenizer, words) for words in (NAMES, PLACES, OBJECTS))
    most = len(TEMPLATES) * len(names) * (len(names) - 1) * len(places) * len(objects)
    if not 1 <= n <= most:
        raise ValueError(f"n must be from 1 to {most}, as many as this tokenizer's one-token words make; got {n}")
    rng = random.Random(seed)
    pairs = {}  # a set that keeps its order
    while len(pairs) < n:
        i = len(pairs) % len(TEMPLATES)
        b, a = rng.sample(names, 2)
        words = {"B1": b, "A": a, "S2": b, "PLACE": rng.choice(places), "OBJECT": rng.choice(objects)}
        changed = {slot: words[source] for slot, source in CORRUPTIONS[corruption].items()}
        original, roles = fill(tokenizer, TEMPLATES[i], words, bos)
        patch, _ = fill(tokenizer, TEMPLATES[i], words | changed, bos)
        answers = after(tokenizer, " " + a) + after(tokenizer, " " + b)
        pairs[Pair(original, patch, tuple(answers), roles, f"template {i + 1}")] = None
    return list(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Subject-verb agreement

# structure: (template, the noun that the answer agrees with, the words that the answer is drawn from). [V] agrees with
# [N2]. The answers are as in Table 3. "simple" is not in the paper, but in the data of [44].
SVA = {
    "simple": ("The [N1]", "N1", AUXILIARIES + VERBS),
    "within_rc": ("The [N1] that the [N2]", "N2", VERBS),
    "across_rc": ("The [N1] that the [N2] [V]", "N1", AUXILIARIES),
    "across_pp": ("The [N1] [P] the [N2]", "N1", AUXILIARIES),
}


def sva(
    tokenizer: Tokenizer, structure: str, n: int = 300, n_held_out: int = 100, seed: int = 0, bos: bool = True
) -> tuple[list[Pair], list[Pair]]:
    """`n` pairs, and `n_held_out` others, for subject-verb agreement (paper, Section 5.2, Table 3, Appendix A.2).

    structure    original                               patch                                   answers
    "simple"     "The athlete"                          "The athletes"                          has / have
    "within_rc"  "The athlete that the managers"        "The athlete that the manager"          like / likes
    "across_rc"  "The athlete that the managers like"   "The athletes that the managers like"   does / do
    "across_pp"  "The secretaries near the cars"        "The secretary near the cars"           have / has

    The prompts of a pair differ only in the number of the noun that the answer agrees with. Which one is the original
    is random. All pairs differ. No prompt is both in a pair of the first list and in one of the second.
    ValueError on an unknown structure, or if this tokenizer's words do not make so many pairs.
    """
    if structure not in SVA:
        raise ValueError(f"unknown structure {structure!r}; allowed: {', '.join(SVA)}")
    if n < 1 or n_held_out < 0:
        raise ValueError(f"n must be at least 1, n_held_out at least 0; got {n} and {n_held_out}")
    template, subject, answers = SVA[structure]
    lists = {"N1": NOUNS, "N2": NOUNS, "V": VERBS, "P": PREPOSITIONS, "answer": answers}
    for slot, words in lists.items():
        lists[slot] = [forms for forms in words if one_token(tokenizer, forms) == list(forms)]
    answers = [tuple(after(tokenizer, " " + form)[0] for form in forms) for forms in lists["answer"]]
    slots = re.findall(r"\[(\w+)\]", template)

    # A scene fixes all words, and the number of the other noun. So two scenes share no prompt.
    other_numbers = (0, 1) if "N2" in slots else (0,)
    scenes = product(other_numbers, *(lists[slot] for slot in slots))
    scenes = [scene for scene in scenes if len(set(scene)) == len(scene)]  # N1 is not N2
    each = max(1, 2 * len(answers))  # pairs of a scene: either prompt is the original

    rng = random.Random(seed)
    scenes = rng.sample(scenes, min(len(scenes), n + n_held_out))
    cut = max(-(-n // each), len(scenes) * n // (n + n_held_out))  # in proportion, but enough for n

    def pairs_of(other_number: int, *words: tuple[str, str]) -> list[Pair]:
        prompts = []
        for number in 0, 1:
            forms = {slot: word[number if slot == subject else other_number] for slot, word in zip(slots, words)}
            prompt, roles = fill(tokenizer, template, forms, bos)
            prompts.append(prompt)
        pairs = [Pair(*prompts, ids, roles, structure) for ids in answers]
        pairs += [Pair(*reversed(prompts), ids[::-1], roles, structure) for ids in answers]
        return rng.sample(pairs, len(pairs))

    sides = []
    for part, size in (scenes[:cut], n), (scenes[cut:], n_held_out):
        turns = zip(*(pairs_of(*scene) for scene in part))  # one pair of each scene, then a second of each, ...
        pairs = [pair for turn in turns for pair in turn][:size]
        if len(pairs) < size:
            few = f"{len(scenes)} scenes and {len(answers)} answers"
            raise ValueError(f"{structure}: {n} + {n_held_out} pairs are too many for this tokenizer's {few}")
        sides.append(pairs)
    return tuple(sides)
