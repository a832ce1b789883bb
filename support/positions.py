"""Which positions of different prompts mean the same, so that their scores can be averaged, drawn and named."""

from collections import Counter

import numpy as np

from tasks import ROLES, Pair


def overlay(pairs: list[Pair]) -> tuple[list[str], np.ndarray]:
    """Labels of the positions that are shown, and at [n, labels]: the position of each pair that is shown there, or -1.

    If the roles of all pairs occur, in order, in those of the longest prompt, the pairs are laid over each other by
    role (the IOI templates). Otherwise only the pairs of the most frequent length are shown, and a position is labelled
    with its token where that is the same in all of them. A label that several positions have gets their numbers.
    """
    axis = max((p.roles for p in pairs), key=len)
    places = [places_in(axis, p.roles) for p in pairs]
    if None in places:
        lengths = Counter(len(p.roles) for p in pairs)
        n = max(lengths, key=lambda length: (lengths[length], length))
        places = [range(n) if len(p.roles) == n else [] for p in pairs]
        axis = next(p.roles for p in pairs if len(p.roles) == n)
    at = -np.ones((len(pairs), len(axis)), int)
    for row, place in zip(at, places):
        row[list(place)] = range(len(place))
    labels = []
    for j, role in enumerate(axis):
        roles = {p.roles[k] for p, k in zip(pairs, at[:, j]) if k >= 0}
        labels.append(visible(role) if roles == {role} else f"pos {j}")
    return [f"{label}:{j}" if labels.count(label) > 1 else label for j, label in enumerate(labels)], at


def visible(text: str) -> str:
    """Characters that draw nothing, turn the text around or steer a terminal, as their code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def labels_of(pairs: list[Pair]) -> dict[str, list[str]]:
    """{group: the labels of its positions}."""
    groups = dict.fromkeys(p.group for p in pairs)
    return {group: overlay([p for p in pairs if p.group == group])[0] for group in groups}


def places_in(axis: tuple[str, ...], roles: tuple[str, ...]) -> list[int] | None:
    """Where the roles lie on the axis, in order; None if they do not all occur there."""
    rest = iter(range(len(axis)))
    found = [next((j for j in rest if axis[j] == role), None) for role in roles]
    return None if None in found else found


def laid_over(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The mean over the pairs of scores [n, layers, positions, ...] at the shown positions: [layers, labels, ...]."""
    placed = values[np.arange(len(at))[:, None], :, np.maximum(at, 0)]  # [n, labels, layers, ...]
    placed[at < 0] = np.nan
    return np.nanmean(placed, axis=0).swapaxes(0, 1)


def legend(labels: list[str]) -> str:
    """The meaning of those labels that are explained in tasks.ROLES; "" if there are none."""
    return "; ".join(f"{label}: {ROLES[label]}" for label in dict.fromkeys(labels) if label in ROLES)
