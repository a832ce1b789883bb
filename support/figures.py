"""The paper's Figure 2 (heat maps of one model) and Figure 1 (correlations of several). Functions return a Figure."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

import relp
from support.doubt import DOUBT_NEEDS, doubts
from support.methods import Method
from support.positions import laid_over, legend, overlay
from tasks import Pair

COLORS = {
    "ap": "#222222",
    "atp": "#9aa0a6",
    "atp*": "#5f6368",
    "relp": "#1f6fb4",
    "twopoint": "#2a9d5c",
    "ig": "#e08a1e",
}
DOUBT = "Purples"  # from white


def heatmaps(
    title: str, scores: dict, methods: list[Method], nodes: list[str], pairs: list[Pair], metric: str
) -> Figure:
    """Mean scores over layer and position: a row per method, AP first; a column per node kind. Last the row of doubt.

    scores: {(method, node): [n, layers, positions, ...]}. Heads are shown by layer and head, the sum over positions;
    neurons by layer and position, the sum over neurons.
    """
    labels, at = overlay(pairs)
    kinds, n_layers = {}, next(iter(scores.values())).shape[1]
    for node in nodes:
        maps = [laid_over(scores[method.name, node], at) for method in methods]
        ticks, what = labels, "position"
        if node.startswith("head"):
            maps = [values.sum(1) for values in maps]
            ticks, what = range(maps[0].shape[1]), "head, all positions"
        elif node in relp.PARTS_OF:
            maps, what = [values.sum(-1) for values in maps], "position, all neurons"
        kinds[node] = maps, ticks, what
    widths = [1.2 + 0.22 * len(ticks) for _, ticks, _ in kinds.values()]
    label_of = {method.name: method.label for method in methods}
    has_doubt = set(DOUBT_NEEDS) <= label_of.keys()
    n_rows = len(methods) + has_doubt
    figure = Figure(figsize=(1.2 + sum(widths), 1.4 + n_rows * (0.7 + 0.16 * n_layers)), layout="constrained")
    axes = figure.subplots(n_rows, len(kinds), squeeze=False, sharex="col", sharey=True, width_ratios=widths)
    for column, (node, (maps, ticks, what)) in zip(axes.T, kinds.items()):
        scale = maps[:1] if methods[0].name == "ap" else maps  # AP sets the scale: what exceeds it is wrong
        largest = np.abs(scale).max() or 1.0
        for ax, method, values in zip(column, methods, maps):
            image = draw_map(ax, values, largest, f"{method.label}, {node}")
        figure.colorbar(image, ax=column[: len(methods)], extend="both", shrink=0.8)
        if has_doubt:
            doubt = doubts({(method.name, node): values for method, values in zip(methods, maps)})[node]
            one, other = (label_of[name] for name in DOUBT_NEEDS)
            image = draw_map(column[-1], doubt, doubt.max() or 1.0, f"doubt: |{one} - {other}|, {node}", DOUBT)
            figure.colorbar(image, ax=column[-1])
        for ax in column:
            ax.set_xticks(range(len(ticks)), ticks, rotation=90 if ticks is labels else 0, fontsize=7)
        column[-1].set_xlabel(what)
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    shown = int((at >= 0).any(1).sum())
    title += f": change of {metric} when a node is patched, mean over {shown} of {len(pairs)} prompt pairs"
    # A figure of one kind of node is narrow. matplotlib's own wrapping would read a $ in a model's name as mathematics.
    figure.suptitle(textwrap.fill(title, int(14 * figure.get_figwidth())), fontsize=10)
    if legend(labels) and any(ticks is labels for _, ticks, _ in kinds.values()):
        figure.supxlabel(legend(labels), fontsize=7, x=0.01, ha="left", wrap=True)
    return figure


def heatmap(scores: dict, labels: list[str], title: str = "") -> Figure:
    """A map per node of scores {node: [batch, layer, pos]}, of prompts of one length, as relp's functions return them.

    Shown is the mean over the prompts; of heads, neurons and the like, the sum over them. All maps have one scale.
    labels: of the positions, such as the roles of a tasks.Pair.
    """
    if not scores:
        raise ValueError("there are no scores to draw")
    maps = {node: x.detach().cpu().double().mean(0).numpy() for node, x in scores.items()}
    maps = {node: values.sum(-1) if node in relp.PARTS_OF else values for node, values in maps.items()}
    if wrong := [node for node, values in maps.items() if values.ndim != 2 or values.shape[1] != len(labels)]:
        shape = list(scores[wrong[0]].shape)
        raise ValueError(f"scores of {wrong[0]} must be [batch, layer, {len(labels)} labelled positions], got {shape}")
    largest = max(np.abs(values).max() for values in maps.values()) or 1.0
    n_layers = max(len(values) for values in maps.values())
    size = 1.5 + len(maps) * (1.2 + 0.24 * len(labels)), 1.6 + 0.2 * n_layers
    figure = Figure(figsize=size, layout="constrained")
    for ax, (node, values) in zip(figure.subplots(1, len(maps), squeeze=False, sharey=True)[0], maps.items()):
        image = draw_map(ax, values, largest, node)
        ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    figure.axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_map(ax: Axes, values: np.ndarray, largest: float, title: str, cmap: str = "RdBu_r") -> AxesImage:
    """Scores [layers, positions] from -largest (blue) to largest (red). In DOUBT's colours, doubt from 0 to largest."""
    least = 0 if cmap == DOUBT else -largest
    image = ax.imshow(values, cmap=cmap, vmin=least, vmax=largest, aspect="auto", origin="lower")
    ax.set_title(title, fontsize=9)
    ax.yaxis.get_major_locator().set_params(integer=True)
    return image


def slopes(pcc: dict[str, dict], methods: list[Method], nodes: list[str]) -> Figure:
    """The slope of each layer's scores against AP's: a row per node kind, a column per model, a line per method.

    The larger a point, the larger its layer's share of the effects. Slopes beyond the axis stand at its end.
    """
    size = 1.2 + 1.9 * len(pcc), 0.8 + 1.6 * len(nodes)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(nodes), len(pcc), squeeze=False, sharex="col", sharey=True)
    for row, node in zip(axes, nodes):
        for ax, of in zip(row, pcc.values()):
            ax.axhline(1, color="black", linewidth=0.6)
            for method in methods:
                by_layer = of[method.name][node]["by_layer"]
                x, y = range(len(by_layer["slope"])), np.clip(by_layer["slope"], -0.5, 2)
                color = COLORS.get(method.name)
                ax.plot(x, y, linewidth=1, color=color, label=method.label)
                ax.scatter(x, y, 4 + 60 * np.array(by_layer["share"]), color=color)
            ax.set_ylim(-0.6, 2.1)
            ax.xaxis.get_major_locator().set_params(integer=True)
        row[0].set_ylabel(f"{node}\nslope against AP", fontsize=8)
    for ax, model in zip(axes[0], pcc):
        ax.set_title(model, fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel("layer", fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def correlations(pcc: dict[str, dict], methods: list[Method], nodes: list[str]) -> Figure:
    """PCC with AP as bars with 95 % intervals: a panel per node kind, the methods side by side for each model.

    pcc: {model: {method: {node: ...}}}, see statistics.agreements.
    """
    figure = Figure(figsize=(1.5 + len(nodes) * (1 + 0.5 * len(pcc)), 3.4), layout="constrained")
    x = np.arange(len(pcc))
    for ax, node in zip(figure.subplots(1, len(nodes), sharey=True, squeeze=False)[0], nodes):
        for i, method in enumerate(methods):
            of_models = [of[method.name][node] for of in pcc.values()]
            heights = np.array([of["averaged"] for of in of_models])
            ends = np.array([of["interval"]["averaged"] for of in of_models]).T
            ax.bar(
                x + (i - (len(methods) - 1) / 2) * 0.8 / len(methods),
                heights,
                0.76 / len(methods),
                label=method.label,
                color=COLORS.get(method.name),
                yerr=np.maximum(0, [heights - ends[0], ends[1] - heights]),  # percentiles may leave the value outside
                error_kw={"linewidth": 0.8},
            )
        ax.set_title(node, fontsize=10)
        ax.set_xticks(x, list(pcc), rotation=35, ha="right", fontsize=8)
        ax.axhline(0, color="black", linewidth=0.6)
    figure.axes[0].set_ylabel("PCC with activation patching")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure
