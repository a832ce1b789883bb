"""More prompt pairs, as files of JSON lines beside this one. What differs between the two prompts:

    agreement    one noun's number, in the four structures of tasks.sva         "The lawyer near the doctors" is / are
    facts        one country                            "The capital of France is the city of" Paris / Rome
    languages    one country                            "People who live in France usually speak" French / Italian
    opposites    one word                               "The opposite of hot is" cold / small
    exchange     two countries, exchanged               "My friend lives in Italy, but I live in France. ..."
    pronouns     one noun                               "My mother was late because" she / he
    greater      one digit, or two                      "The war lasted from the year 1773 to the year 17" 9 / 3
    names-...    two names exchanged at three places, one other name, or two other names; IOI in other words

python -m beyond.prompts.make

writes those pairs that have equally many tokens and answers of one token in SmolLM2's tokenizer. The model itself is
not run: no pair is chosen by what a model or a method makes of it.
"""

import json
import random
from collections.abc import Iterator
from functools import partial
from itertools import permutations, product
from pathlib import Path

import support.gguf  # noqa: F401 (SmolLM2)
import tasks
from support.tokenizer import load_tokenizer

N = 48  # pairs of a task
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "England": "London", "Greece": "Athens", "Egypt": "Cairo", "Turkey": "Ankara",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Cuba": "Havana", "Peru": "Lima", "India": "Delhi", "Norway": "Oslo",
    "Austria": "Vienna", "Poland": "Warsaw", "Sweden": "Stockholm", "Thailand": "Bangkok", "Iraq": "Baghdad",
}  # fmt: skip
LANGUAGES = {
    "France": "French", "Italy": "Italian", "Spain": "Spanish", "Germany": "German", "Japan": "Japanese",
    "China": "Chinese", "Russia": "Russian", "Greece": "Greek", "Portugal": "Portuguese", "England": "English",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "old": "young", "rich": "poor", "fast": "slow", "good": "bad", "long": "short",
    "dark": "light", "hard": "soft", "high": "low",
}  # fmt: skip
WOMEN = "Mary Anna Sarah Emma Laura Alice Jane Susan Lisa Julia Maria Helen Ruth Kate Linda Karen".split()
MEN = "John Tom Peter David Paul Mark James Robert George Henry Frank Jack Adam Daniel Kevin Brian".split()
NAMES = WOMEN + MEN
FAMILY = (("mother", "father"), ("sister", "brother"), ("daughter", "son"), ("wife", "husband"), ("aunt", "uncle"))
WHOSE = ("My", "Your", "His", "Our")
BECAUSE = ("is tired because", "went home early because", "called the doctor because", "was very happy because")
SCENES = (
    "{twice} and {once} were at a party, and {twice} told a secret to",
    "While {twice} and {once} were cooking, {twice} handed the salt to",
    "{twice} had a long talk with {once}. In the end {twice} said goodbye to",
)
EVENTS = ("war", "trial", "journey", "siege", "festival", "reign", "voyage", "project")
Line = tuple[str, str, str, str]  # original, patch, and the answer of each


def facts(rng: random.Random) -> Iterator[Line]:
    for a, b in shuffled(permutations(CAPITALS, 2), rng):
        prompts = (f"The capital of {country} is the city of" for country in (a, b))
        yield *prompts, f" {CAPITALS[a]}", f" {CAPITALS[b]}"


def languages(rng: random.Random) -> Iterator[Line]:
    for a, b in shuffled(permutations(LANGUAGES, 2), rng):
        prompts = (f"People who live in {country} usually speak" for country in (a, b))
        yield *prompts, f" {LANGUAGES[a]}", f" {LANGUAGES[b]}"


def opposites(rng: random.Random) -> Iterator[Line]:
    for a, b in shuffled(permutations(OPPOSITES, 2), rng):
        yield f"The opposite of {a} is", f"The opposite of {b} is", f" {OPPOSITES[a]}", f" {OPPOSITES[b]}"


def exchange(rng: random.Random) -> Iterator[Line]:
    for a, b in shuffled(permutations(CAPITALS, 2), rng):
        text = "My friend lives in {}, but I live in {}. The capital of my country is the city of"
        yield text.format(b, a), text.format(a, b), f" {CAPITALS[a]}", f" {CAPITALS[b]}"


def pronouns(rng: random.Random) -> Iterator[Line]:
    for whose, because, nouns in shuffled(product(WHOSE, BECAUSE, FAMILY), rng):
        lines = [(f"{whose} {noun} {because}", answer) for noun, answer in zip(nouns, (" she", " he"))]
        (original, answer), (patch, other) = rng.sample(lines, 2)
        yield original, patch, answer, other


def greater(rng: random.Random) -> Iterator[Line]:
    """The war ends after it began. Decades: late in the original, early in the patch prompt. Answers: high and low."""
    for i in range(10**6):
        event, century = rng.choice(EVENTS), rng.choice((16, 17, 18))
        early, late, low, high = rng.choice((0, 1)), rng.choice((6, 7)), rng.choice((2, 3, 4)), rng.choice((8, 9))
        digit = rng.randrange(10)
        other = digit if i % 2 else rng.randrange(10)
        original, patch = (
            f"The {event} lasted from the year {century}{decade}{year} to the year {century}"
            for decade, year in ((late, digit), (early, other))
        )
        yield original, patch, str(high), str(low)


def names(twice: int, once: int, rng: random.Random) -> Iterator[Line]:
    """The name that is said once is right: the original says name 1 twice, and name 0 once.

    twice, once  which of the four names the patch prompt has at these places
    """
    for scene in scenes(rng):
        four = rng.sample(NAMES, 4)
        prompts = (scene.format(twice=four[i], once=four[j]) for i, j in ((1, 0), (twice, once)))
        yield *prompts, f" {four[0]}", f" {four[once]}"


def scenes(rng: random.Random) -> Iterator[str]:
    """The scenes in turn: the files are cut short where they are long enough."""
    for _ in range(100):
        yield from SCENES


def shuffled(items, rng: random.Random) -> list:
    items = list(items)
    return rng.sample(items, len(items))


def agreement(tokenizer) -> list[Line]:
    lines = []
    for structure in tasks.SVA:
        pairs, _ = tasks.sva(tokenizer, structure, N // len(tasks.SVA), 0, bos=False)
        for pair in pairs:
            texts = (pair.original, pair.patch, *([answer] for answer in pair.answers))
            lines.append(tuple(tokenizer.decode(list(ids)) for ids in texts))
    return lines


def aligned(lines: Iterator[Line], tokenizer) -> list[Line]:
    """The first N different lines that are a pair in this tokenizer."""
    kept = {}
    for line in lines:
        try:
            tasks.pair(tokenizer, *line)
        except ValueError:
            continue
        kept[line] = None
        if len(kept) == N:
            break
    return list(kept)


def every_task(tokenizer) -> dict[str, list[Line]]:
    """{name of the file: its pairs}"""
    made = {
        "facts": facts,
        "exchange": exchange,
        "pronouns": pronouns,
        "greater": greater,
        "names-swap": partial(names, 0, 1),  # the two are exchanged at all three places
        "names-other": partial(names, 1, 2),  # the one that is said once is another
        "names-all": partial(names, 3, 2),  # both are others
        "languages": languages,
        "opposites": opposites,
    }
    lines = {
        "agreement": iter(agreement(tokenizer)),
        **{name: make(rng=random.Random(0)) for name, make in made.items()},
    }
    return {name: aligned(of_task, tokenizer) for name, of_task in lines.items()}


def main() -> None:
    keys = ("original", "patch", "original_answer", "patch_answer")
    for name, lines in every_task(load_tokenizer("smollm2-135m-q4")).items():
        path = Path(__file__).with_name(f"{name}.jsonl")
        path.write_text("".join(json.dumps(dict(zip(keys, line))) + "\n" for line in lines))


if __name__ == "__main__":
    main()
