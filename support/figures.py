"""Figures 1, 2 and 3 of the paper. Every function returns a matplotlib Figure.

Sizes and places are in inches. Nothing is laid out by matplotlib itself: its layout engines take most of the time.
"""

import textwrap
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import relp
from support.circuits import MEASURES, VARIANTS, Structure, at_sizes, curve, resamples_of_prompts
from support.positions import laid_over, legend, overlay, visible
from support.statistics import agreement
from support.tables import check_labels, cut, short
from support.tokenizer import load_tokenizer
from tasks import Pair

COLORS = {
    "ap": "#222222",
    "atp": "#7a8087",
    "atp*": "#5f6368",
    "relp": "#1f6fb4",
    "twopoint": "#1f8a4c",
    "best": "#8a3fa0",
    "ig": "#c26a00",
}
CELL = 0.19  # the width and the height of a cell in a heat map
BESIDES = 4  # heat maps in a line


def lines(text: str, width: float) -> str:
    """Text in lines that fit a width."""
    return textwrap.fill(text, int(13 * width))


def place(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """New axes with their lower left corner at x, y."""
    w, h = figure.get_size_inches()
    return figure.add_axes((x / w, y / h, width / w, height / h))


def headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=10, y=1 - 0.1 / figure.get_figheight(), va="top")


# ---------------------------------------------------------------------------------------------------------------------
# Nodes


class Row(NamedTuple):
    """Heat maps of one kind of node, beside each other."""

    titles: list[str]
    maps: list[np.ndarray]  # [layers, ticks]
    largest: float  # the colours are those of scores from -largest (blue) to largest (red); a dot: beyond these
    ticks: list[str]
    what: str = ""  # they are
    exact: np.ndarray | None = None  # [layers, ticks]: cells of the first map that have a black dot


def heatmaps(
    name: str, scores: dict, methods: list, nodes: list[str], pairs: list[Pair], metric: str, exact: dict | None = None
) -> Figure:
    """Figure 2: mean scores over layer and position; a row for each kind of node, a column for each method, AP first.

    scores: {(method, node): [n, layers, positions, ...]}. methods: scoring.Methods. Heads are shown by layer and head,
    the sum over positions; neurons by layer and position, the sum over neurons. AP sets a row's colours.
    exact {node: bool}: the first method is AP here, and an estimate elsewhere; a dot says so for most of the pairs.
    """
    labels, at = overlay(pairs)
    rows = []
    for node in nodes:
        maps, ticks, what = [laid_over(scores[method.name, node], at) for method in methods], labels, "position"
        dots = None if exact is None else laid_over(exact[node].astype(float), at)
        if node.startswith("head"):
            maps, dots = [values.sum(1) for values in maps], None if dots is None else dots.max(1)
            ticks, what = [str(i) for i in range(maps[0].shape[1])], "head, all positions"
        elif node in relp.PARTS_OF:
            maps, what = [values.sum(-1) for values in maps], "position, all neurons"
            dots = None if dots is None else dots.max(-1)
        largest = np.abs(maps[:1] if methods[0].name == "ap" else maps).max()
        ends = [f", {node}{pcc(scores, method.name, node, pairs)}" for method in methods]
        room = int(16 * width_of(ticks))  # letters
        titles = [cut(method.label, max(9, room - len(end))) + end for method, end in zip(methods, ends)]
        rows.append(Row(titles, maps, largest, ticks, what, None if dots is None else dots > 0.5))
    shown = (at >= 0).any(1)
    title = f"{name}: change of {metric} when a node is patched, mean over {shown.sum()} of {len(pairs)} prompt pairs"
    notes = [legend(labels), *example(name, pairs[int(shown.argmax())])]
    if exact:
        notes.append("a black dot: AP was run there; elsewhere the first column is an estimate")
    return draw_maps(title, rows, [note for note in notes if note])


def example(name: str, pair: Pair) -> list[str]:
    """The pair in words; [] without a tokenizer."""
    try:
        tokenizer = load_tokenizer(name)
    except ValueError:
        return []
    skip = int(pair.roles[0] == "BOS")
    texts = [visible(tokenizer.decode(list(ids[skip:]))) for ids in (pair.original, pair.patch)]
    return [f"for example “{texts[0]}”, and from the patch prompt “{texts[1]}”"]


def pcc(scores: dict, method: str, node: str, pairs: list[Pair]) -> str:
    """ ": PCC .932", the number in the table; "" without AP, and for AP itself."""
    if method == "ap" or ("ap", node) not in scores:
        return ""
    both = (torch.as_tensor(scores[name, node]) for name in (method, "ap"))
    return f": PCC {short(float(agreement(*both, [p.group for p in pairs])['averaged'])).strip()}"


def heatmap(scores: dict, labels: list[str], title: str = "") -> Figure:
    """A map for each node of scores {node: [batch, layer, pos]}, of prompts of one length, as relp's functions return.

    Shown is the mean over the prompts; of heads, neurons and the like, the sum over them. All maps have one scale.
    labels: of the positions, such as the roles of a tasks.Pair.
    """
    if not scores:
        raise ValueError("there are no scores to draw")
    check_labels(scores, labels)
    maps = {node: x.detach().cpu().double().mean(0).numpy() for node, x in scores.items()}
    maps = {node: values.sum(-1) if node in relp.PARTS_OF else values for node, values in maps.items()}
    largest = max(np.abs(values).max() for values in maps.values())
    return draw_maps(title, [Row([*maps], [*maps.values()], largest, labels)])


def width_of(ticks: list[str]) -> float:
    return max(1.9, CELL * len(ticks))


def draw_maps(title: str, rows: list[Row], notes: list[str] = ()) -> Figure:
    """Rows of heat maps, all of one size; a row of many goes on in the next line. Below the last line are the notes."""
    parts = [(row, k) for row in rows for k in range(0, len(row.maps), BESIDES)]
    width, height = max(width_of(row.ticks) for row in rows), max(0.5, min(2.6, CELL * len(rows[0].maps[0])))
    total = 0.6 + min(BESIDES, max(len(row.maps) for row in rows)) * (width + 0.2) + 0.6
    title, notes = lines(title, total), [line for note in notes for line in lines(note, 1.25 * total).split("\n")]
    following = [row.ticks for row, _ in parts[1:]] + [[]]
    below = [0.1 if row.ticks == ticks else 0.85 for (row, _), ticks in zip(parts, following)]  # for names of ticks
    y = len(notes) * 0.14 + sum(below) + len(parts) * (height + 0.26)
    figure = Figure(figsize=(total, y + 0.25 + 0.17 * title.count("\n")))
    headline(figure, title)
    for (row, start), room in zip(parts, below):
        y -= height + 0.26
        largest = row.largest or 1.0
        for i, values in enumerate(row.maps[start : start + BESIDES]):
            ax = place(figure, 0.6 + i * (width + 0.2), y, width, height)
            image = ax.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", origin="lower")
            for cells, colour in ((np.abs(values) > 1.0001 * largest, "white"), (row.exact, "black")):
                if cells is not None and (colour == "white" or start + i == 0):
                    ax.plot(*cells.nonzero()[::-1], ".", color=colour, markersize=2.5)
            ax.set_title(row.titles[start + i], fontsize=8, pad=3, y=1)  # with y, no free place is looked for
            ax.tick_params(labelsize=7)
            ax.set_xticks([])
            if i == 0:
                ax.yaxis.get_major_locator().set_params(integer=True, nbins=5)
                ax.set_ylabel("layer", fontsize=8)
            else:
                ax.set_yticks([])
            if room > 0.1:
                ax.set_xticks(range(len(row.ticks)), row.ticks, rotation=90)
                ax.set_xlabel(row.what, fontsize=8)
        bar = place(figure, 0.6 + (i + 1) * (width + 0.2) - 0.1, y, 0.1, height)
        extend = "both" if np.abs(row.maps).max() > largest else "neither"
        figure.colorbar(image, cax=bar, extend=extend).ax.tick_params(labelsize=7)
        y -= room
    figure.supxlabel("\n".join(notes), fontsize=7, x=0.01, y=0.05 / figure.get_figheight(), ha="left", va="bottom")
    return figure


def correlations(of_models: dict[str, dict], methods: list, nodes: list[str]) -> Figure:
    """Figure 1: what PCC with AP lacks of 1, with 95 % intervals, a panel for each kind of node, a line for each model.

    of_models: {model: {method: {node: ...}}}, see statistics.agreements. methods: scoring.Methods.
    """
    height, width = 0.25 + 0.12 * len(methods), 2.9
    total = 1.6 + len(nodes) * (width + 0.15)
    figure = Figure(figsize=(total, height * len(of_models) + 1.6))
    y = np.arange(len(of_models))[::-1]
    for k, node in enumerate(nodes):
        ax = place(figure, 1.5 + k * (width + 0.15), 0.85, width, height * len(of_models))
        for i, method in enumerate(methods):
            value, low, high = np.array([of[method.name][node]["averaged"] for of in of_models.values()]).T
            ends = np.maximum(0, [high - value, value - low])  # percentiles may leave the value outside
            at, color = y + ((len(methods) - 1) / 2 - i) * 0.8 / len(methods), COLORS.get(method.name)
            ax.errorbar(
                1 - value, at, xerr=ends, fmt="o", markersize=4, linewidth=1, color=color, label=cut(method.label)
            )
        ax.set_title(node, fontsize=9)
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.tick_params(labelsize=8)
        ax.grid(axis="x", linewidth=0.3)
        ax.set_ylim(-0.6, len(y) - 0.4)
        ax.set_yticks(y, [cut(model, 20) for model in of_models] if k == 0 else [""] * len(y))
        ax.set_xlabel("1 - PCC with activation patching: further left is better", fontsize=7)
    figure.legend(*ax.get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8)
    if {"atp", "relp"} <= {method.name for method in methods}:
        pairs = [[of[m][node]["averaged"][0] for m in ("relp", "atp")] for of in of_models.values() for node in nodes]
        better = sum(one > other for one, other in pairs)
        claim = f"RelP predicts activation patching better than AtP in {better} of {len(pairs)} cases"
        headline(figure, lines(claim, total))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Circuits


def faithfulness(
    title: str, structures: dict[str, Structure], labels: dict[str, str], metric: str, seed: int, summary: dict
) -> Figure:
    """Figure 3: faithfulness and completeness by size for the first kind of circuit, and RelP's lead for all kinds.

    Faint lines are structures, bold ones their mean with its 95 % band. The lead is the difference of the means over
    sizes. labels: {method: label}. summary: see circuits.summarise.
    """
    weights = {name: resamples_of_prompts(s.held_out, seed) for name, s in structures.items()}
    runs = next(iter(structures.values())).runs
    figure = Figure(figsize=(13.2, 4.2))
    first, n = next(iter(runs)), len(MEASURES)
    for panel, measure in enumerate(MEASURES):
        ax = place(figure, 0.6 + 4.1 * panel, 0.95, 3.7, 2.6)
        for method in runs[first]:
            color, curves = COLORS.get(method), []
            sizes = {name: s.runs[first][method].sizes for name, s in structures.items()}
            ends = max(min(n) for n in sizes.values()), min(max(n) for n in sizes.values())
            grid = np.geomspace(max(1, ends[0]), max(2, ends[1]), 40)
            for name, s in structures.items():
                values = curve(s, first, method, measure, weights[name])
                ax.plot(np.maximum(sizes[name], 0.7), values[:, 0], color=color, alpha=0.25, linewidth=0.8)
                curves.append(at_sizes(values, sizes[name], grid))
            mean = torch.stack(curves).mean(0)
            low, high = mean[:, 1:].quantile(torch.tensor([0.025, 0.975], dtype=mean.dtype), dim=1)
            ax.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0)
            ax.plot(grid, mean[:, 0], color=color, linewidth=2, label=labels[method])
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.axhline(1 if measure == "faithfulness" else 0, color="black", linewidth=0.5, linestyle=":")
        ax.set_ylim(-0.25, 1.15)
        ax.set_title(f"{measure}: {VARIANTS[first].label}", fontsize=9)
        ax.set_xlabel("units in the circuit", fontsize=8)
    figure.legend(*ax.get_legend_handles_labels(), loc="lower left", ncols=6, fontsize=8)
    leads = [(variant, pair, of) for variant, pairs in summary["differences"].items() for pair, of in pairs.items()]
    ax = place(figure, 2.15 + 4.1 * n, 0.95, 2.7, 2.6)
    for y, (_, pair, of) in enumerate(leads):
        value, low, high = of["faithfulness"]
        ends = np.maximum(0, [[value - low], [high - value]])
        ax.errorbar(value, -y, xerr=ends, fmt="o", markersize=4, color=COLORS.get(pair.removeprefix("relp - ")))
    names = [f"{VARIANTS[v].label}: {cut(labels[pair.removeprefix('relp - ')], 14)}" for v, pair, _ in leads]
    ax.set_yticks([-y for y in range(len(leads))], names, fontsize=7)
    ax.axvline(0, color="black", linewidth=0.6)
    ax.set_title("mean faithfulness, RelP minus", fontsize=9)
    ax.tick_params(axis="x", labelsize=8)
    headline(figure, lines(f"{title}: circuits on held-out pairs, {metric}; bold: mean of the structures", 12))
    return figure
