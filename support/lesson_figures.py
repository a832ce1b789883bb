"""Bars and curves for the course. Functions take numbers and labels and return a Figure."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from support.figures import COLORS

METHODS = {label: COLORS[name] for label, name in (("AP", "ap"), ("AtP", "atp"), ("RelP", "relp"))}
OTHERS = ("#222222", "#9aa0a6", "#1f6fb4", "#e08a1e", "#2a9d5c")  # told apart in grey and by the colour-blind


def bars(series: Mapping[str, Sequence[float]], labels: Sequence[str], ylabel: str = "", title: str = "") -> Figure:
    """Groups of bars, one for each label: series {name: a number for each label}. Each bar has its number on it."""
    check({name: len(values) for name, values in series.items()}, len(labels), "label")
    x, width = np.arange(len(labels)), 0.84 / max(1, len(series))
    figure, ax = axes(1.4 + len(labels) * max(0.9, 0.62 * len(series)), ylabel, title)
    for i, ((name, values), color) in enumerate(zip(series.items(), colors(series))):
        places = x + (i - (len(series) - 1) / 2) * width
        drawn = ax.bar(places, values, 0.9 * width, label=name, color=color)
        ax.bar_label(drawn, fmt="%.3g", fontsize=7, padding=1)
    ax.set_xticks(x, labels, fontsize=8)
    ax.margins(y=0.12)
    legend(figure, ax, len(series))
    return figure


def curves(
    x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str = "", ylabel: str = "", title: str = ""
) -> Figure:
    """Lines over x: series {name: a number for each x}."""
    check({name: len(values) for name, values in series.items()}, len(x), "x")
    figure, ax = axes(5.5, ylabel, title)
    for marker, color, (name, values) in zip(cycle("os^Dv"), colors(series), series.items()):
        ax.plot(x, values, f"{marker}-", markersize=4, label=name, color=color)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.grid(alpha=0.25)
    legend(figure, ax, len(series))
    return figure


def colors(names: Iterable[str]) -> list[str]:
    """A method has the colour that it has in all figures; the other names share the colours that are left."""
    names = list(names)
    left = cycle([color for color in OTHERS if color not in {METHODS.get(name) for name in names}])
    return [METHODS[name] if name in METHODS else next(left) for name in names]


def check(lengths: dict[str, int], wanted: int, what: str) -> None:
    if wrong := [f"{name!r} has {n}" for name, n in lengths.items() if n != wanted]:
        raise ValueError(f"every series needs one number per {what}, {wanted}: {wrong[0]}")


def axes(width: float, ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(max(5.0, width), 3.2), layout="constrained")
    ax = figure.subplots()
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.set_title(title, fontsize=10)
    return figure, ax


def legend(figure: Figure, ax: Axes, n: int) -> None:
    if n > 1:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, n), fontsize=8)
