"""What the lessons share: showing a picture, checking an answer, and drawing bars and curves."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models import first_line
from support.figures import COLORS

FOLDER = "COURSE_PICTURES"  # the environment variable with the folder into which the script writes its pictures
OTHERS = ("#c26a00", "#1f8a4c", "#7b3fa0", "#5f6368")  # told apart in grey and by the colour-blind
shown = 0


def show(figure: Figure) -> None:
    """Shows the figure in a notebook. In a script, writes it into the folder COURSE_PICTURES if there is one."""
    global shown
    shown += 1
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import Image, display

        file = BytesIO()
        figure.savefig(file, format="png", dpi=90, metadata={"Software": None})
        display(Image(file.getvalue()))
    elif os.environ.get(FOLDER):
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"picture-{shown:02}.png", dpi=90)


def check(answer, is_right: Callable, right: str, hint: str) -> None:
    """Says in a sentence whether is_right(answer). None is no answer yet; an error in is_right is a wrong answer."""
    if answer is None:
        print("No answer yet. (If you have written a function: does it `return` something?)")
        return
    try:
        verdict = bool(is_right(answer))
    except Exception as error:  # whatever a student's answer may raise
        verdict, hint = False, f"{hint} (Your answer is {answer!r:.60}, a {type(answer).__name__}: {first_line(error)})"
    print(f"Right. {right}" if verdict else f"Wrong. {hint}")


def bars(series: Mapping[str, Sequence[float]], labels: Sequence[str], ylabel: str = "", title: str = "") -> Figure:
    """Groups of bars, one for each label: series {name: a number for each label}. Each bar has its number on it."""
    figure, ax = axes(1.4 + len(labels) * max(0.9, 0.62 * len(series)), ylabel, title)
    largest = max(abs(value) for values in series.values() for value in values)
    width = 0.84 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [x + (i - (len(series) - 1) / 2) * width for x in range(len(labels))]
        drawn = ax.bar(places, values, 0.9 * width, label=name, color=color(name, i))
        ax.bar_label(drawn, fmt="%.3f" if largest <= 1 else "%.2f", fontsize=7, padding=1)
    ax.set_xticks(range(len(labels)), labels)
    ax.margins(y=0.12)
    legend(figure, ax, len(series))
    return figure


def curves(
    x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str = "", ylabel: str = "", title: str = ""
) -> Figure:
    """Lines over x: series {name: a number for each x}."""
    figure, ax = axes(5.5, ylabel, title)
    for i, (marker, (name, values)) in enumerate(zip(cycle("os^Dv"), series.items())):
        ax.plot(x, values, f"{marker}-", markersize=4, label=name, color=color(name, i))
    ax.set_xlabel(xlabel, fontsize=9)
    ax.grid(alpha=0.25)
    legend(figure, ax, len(series))
    return figure


def color(name: str, i: int) -> str:
    """A method has the colour that it has in all figures, the i-th series another one."""
    return COLORS.get(name.lower()) or OTHERS[i % len(OTHERS)]


def axes(width: float, ylabel: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(max(5.0, width), 3.2), layout="constrained")
    ax = figure.subplots()
    ax.axhline(0, color="black", linewidth=0.6)
    ax.tick_params(labelsize=8)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.set_title(title, fontsize=10)
    return figure, ax


def legend(figure: Figure, ax: Axes, n: int) -> None:
    if n > 1:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, n), fontsize=8)
