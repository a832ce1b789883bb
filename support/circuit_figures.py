"""The paper's Figure 3, and a picture of each circuit. Functions return a matplotlib Figure."""

import numpy as np
import torch
from matplotlib.figure import Figure

from support.circuits import VARIANTS, Structure, at_sizes, curve, resamples_of_prompts
from support.figures import COLORS

ORDER = ["resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]  # of nodes within a layer, upward
PER_CELL = 8  # units of one node and position; of more, the strongest are drawn


def faithfulness(
    title: str, structures: dict[str, Structure], labels: dict[str, str], metric: str, seed: int
) -> Figure:
    """A column per kind of circuit; faint lines are structures, bold ones their mean with its 95 % band."""
    weights = {name: resamples_of_prompts(s.held_out, seed) for name, s in structures.items()}
    figure = Figure(figsize=(2.3 + 2.6 * len(VARIANTS), 6), layout="constrained")
    axes = figure.subplots(2, len(VARIANTS), sharex="col", sharey=True)
    for row, (measure, which) in zip(axes, (("faithfulness", "circuit"), ("completeness", "complement"))):
        row[0].set_ylabel(measure)
        for ax, variant in zip(row, VARIANTS):
            for method in next(iter(structures.values())).runs[variant]:
                color, curves = COLORS.get(method), []
                sizes = {name: s.runs[variant][method].sizes for name, s in structures.items()}
                ends = max(min(n) for n in sizes.values()), min(max(n) for n in sizes.values())
                grid = np.geomspace(max(1, ends[0]), max(2, ends[1]), 40)
                for name, s in structures.items():
                    values = curve(s, variant, method, which, weights[name])
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
    for ax, (label, *_) in zip(axes[0], VARIANTS.values()):
        ax.set_title(label, fontsize=10)
    for ax in axes[1]:
        ax.set_xlabel("units in the circuit")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    what = f"circuits of subject-verb agreement, held-out pairs, {metric}; bold: mean of the structures"
    figure.suptitle(f"{title}: {what}")
    return figure


def circuits(title: str, structures: dict[str, Structure], labels: dict[str, str]) -> Figure:
    """Each structure's chosen circuit: layers upward, positions across; a unit's area is its score."""
    nodes = {key for s in structures.values() for of_method in s.features.values() for key in of_method}
    nodes = sorted(nodes, key=lambda key: (key[1], ORDER.index(key[0])))
    columns = min(2, len(structures))
    rows = -(-len(structures) // columns)
    figure = Figure(figsize=(8 * columns, (1.2 + 0.4 * len(nodes)) * rows), layout="constrained")
    for ax, (name, s) in zip(figure.subplots(rows, columns, squeeze=False).flat, structures.items()):
        draw_units(ax, nodes, s)
        size = f"{s.chosen.size} units from layer {s.first_layer} on"
        ax.set_title(f"{name}: {size}, faithfulness {s.chosen.faithfulness:.2f}", fontsize=10)
    method = next(iter(structures.values())).chosen.method
    figure.suptitle(
        f"{title}: SAE features (their numbers) and errors (squares), area by {labels[method]} score;\n"
        "blue carries the original's answer, red speaks against it",
        fontsize=10,
    )
    return figure


def draw_units(ax, nodes: list, s: Structure) -> None:
    scores = s.features[s.chosen.method]
    largest = max((abs(float(scores[key][pos, i])) for key, pos, i in s.chosen.units), default=1.0)
    cells = {}  # (node, pos) -> its units, the strongest first
    for key, pos, i in s.chosen.units:
        cells.setdefault((key, pos), []).append(i)
    widths = [1] * len(s.roles)
    for (_, pos), units in cells.items():
        widths[pos] = max(widths[pos], min(len(units), PER_CELL) + (len(units) > PER_CELL))
    edges = np.concatenate([[0], np.cumsum(widths)])
    for (key, pos), units in cells.items():
        y, x = nodes.index(key), edges[pos] + 0.5
        for i in units[:PER_CELL]:
            value, error = float(scores[key][pos, i]), i == scores[key].shape[1] - 1
            color, marker = "#d6604d" if value > 0 else "#4393c3", "s" if error else "o"
            ax.scatter(x, y, s=25 + 550 * abs(value) / largest, marker=marker, color=color, linewidths=0)
            ax.annotate("err" if error else str(i), (x, y), ha="center", va="center", fontsize=6)
            x += 1
        if len(units) > PER_CELL:
            ax.annotate(f"+{len(units) - PER_CELL}", (x, y), ha="center", va="center", fontsize=7)
    ax.set_xticks((edges[:-1] + edges[1:]) / 2, s.roles)
    ax.set_yticks(range(len(nodes)), [f"{layer} {node}" for node, layer in nodes], fontsize=8)
    ax.set_xlim(0, edges[-1])
    ax.set_ylim(-0.7, len(nodes) - 0.3)
    ax.grid(axis="y", linewidth=0.3)
    for x in edges[1:-1]:
        ax.axvline(x, color="grey", linewidth=0.4)
