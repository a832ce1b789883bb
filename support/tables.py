"""What is printed of the node experiment: the paper's Table 5, for one model and for several."""

import math
import re
from typing import NamedTuple

import numpy as np

from support.methods import Method
from support.positions import laid_over, legend, overlay
from support.results import NodeReport
from tasks import Pair

MEASURES = {  # of statistics.agreement, shown below the table; all are in summary.json
    "spearman": "rank correlation",
    "sign": "right sign",
    "recall": "AP's top 10",
    "slope": "slope",
    "false_negative": "worst miss / max",
}


CAN_DO = 0.75  # accuracy below which a model is said not to do the task
NO_BEHAVIOUR = "  WARNING: this model does not do the task, so there is no behaviour here for the methods to explain"


def short(value: float, *interval: float, sign: str = " ") -> str:
    """A number and its interval, as in " .932 [.921 .945]"; with sign "+", as in "+.088 [+.077 +.108]"."""

    def text(x: float, sign: str) -> str:
        return re.sub(r"\b0\.", ".", f"{x:{sign}.3f}")

    known = interval and all(map(math.isfinite, interval))  # a single prompt has none
    return text(value, sign) + (f" [{' '.join(text(x, sign.strip()) for x in interval)}]" if known else "")


class Strongest(NamedTuple):
    """A node, or a part of one, and its score: the mean over the prompts."""

    node: str
    layer: int
    position: int
    label: str  # of the position
    part: int | None  # which head or neuron
    score: float


def top(scores: dict, labels: list[str], k: int = 10) -> list[Strongest]:
    """The k nodes with the largest scores in size, of prompts of one length, {node: [batch, layer, pos, ...]}."""
    found = []
    for node, values in scores.items():
        values = values.detach().double().mean(0).cpu()
        if values.ndim < 2 or values.shape[1] != len(labels):
            shape = list(scores[node].shape)
            raise ValueError(f"scores of {node} must be [batch, layer, {len(labels)} labelled positions], got {shape}")
        strongest = values.flatten().abs().argsort(descending=True, stable=True)[:k]
        for index in strongest.tolist():
            layer, pos, *part = (int(i) for i in np.unravel_index(index, values.shape))
            score = float(values.flatten()[index])
            found.append(Strongest(node, layer, pos, labels[pos], part[0] if part else None, score))
    return sorted(found, key=lambda entry: -abs(entry.score))[:k]


def print_report(report: NodeReport, methods: list[Method], nodes: list[str], paper: dict | None) -> None:
    """One model's table. paper: the paper's own numbers {node: (AtP, RelP)}, where they are of the same experiment."""
    original, patch = report.accuracy["original"].value, report.accuracy["patch"].value
    print(
        f"  right on {original:.0%} of the original and {patch:.0%} of the patch prompts; "
        f"mean {report.metric} {report.value['original'].value:+.3f} and {report.value['patch'].value:+.3f}"
    )
    if min(original, patch) < CAN_DO:
        print(NO_BEHAVIOUR)
    labels = {method.name: method.label for method in methods}
    width = max(23, 8 * len(report.pcc) + 1)
    first = max(18, 1 + len(" - RelP") + max(map(len, labels.values())))

    def row(label, cells, end=""):
        print((f"  {label:{first}}" + "".join(f"{c:{width}}" for c in cells) + end).rstrip())

    row("PCC with AP" if report.pcc else "", [f" {node}" for node in nodes], f"{'seconds':>8}")
    for name, label in labels.items():
        cells = [""] * len(nodes)
        if name in report.pcc:
            cells = [short(of["averaged"], *of["interval"]["averaged"]) for of in report.pcc[name].values()]
        seconds = report.seconds[name]  # NaN: unknown, of an earlier run
        row(label, cells, f"{seconds:8.2f}" if seconds == seconds else "")
    for pair, of_nodes in report.differences.items():
        names = pair.split(" - ")
        if "relp" in names or "relp" not in labels:  # with RelP there, the others are compared with it only
            cells = [short(*of["averaged"], sign="+") for of in of_nodes.values()]
            row(" - ".join(labels[name] for name in names), cells)
    if paper and report.pcc:
        for i, label in enumerate(("AtP, paper", "RelP, paper")):
            row(label, [short(paper[node][i]) if node in paper else "" for node in nodes])
    if report.pcc:
        print(f"  further, {' / '.join(labels[name] for name in report.pcc)}:")
        for measure, label in MEASURES.items():
            each = [[short(of[node][measure]).strip() for of in report.pcc.values()] for node in nodes]
            row(label, [f" {' / '.join(values)}" for values in each])


def print_strongest(scores: dict, methods: list[Method], nodes: list[str], pairs: list[Pair], k: int = 5) -> None:
    """The nodes with the largest averaged scores, by each method: what there is to see where AP was not run."""
    labels, at = overlay(pairs)
    for method in methods:
        ranked = []
        for node in nodes:
            values = laid_over(scores[method.name, node], at)
            ranked += [(float(values[index]), node, *index) for index in np.ndindex(values.shape)]
        ranked.sort(key=lambda entry: -abs(entry[0]))
        print(f"  the strongest nodes by {method.label}, mean over the prompts:")
        for value, node, layer, position, *part in ranked[:k]:
            print(f"    {node + str(part or ''):18} layer {layer:<3} {labels[position].strip():10} {value:9.3f}")
    if legend(labels):
        print(f"    ({legend(labels)})")
    print("  activation patching tells how far these can be trusted: add ap to --methods, or --verify 10")


def print_overview(reports: list[NodeReport], methods: list[Method], nodes: list[str]) -> None:
    """The paper's Table 5: a line per model, the methods side by side for each node kind."""
    each = max(10, *(2 + len(m.label) for m in methods))
    width, first = each * len(methods), max(20, 2 + max(len(r.model) for r in reports))
    print(f"\n{'PCC with AP':{first}}" + "".join(f"{node:>{width}}" for node in nodes))
    print(" " * first + "".join(f"{m.label:>{each}}" for m in methods) * len(nodes))
    for r in reports:
        numbers = [r.pcc[m.name][node]["averaged"] for node in nodes for m in methods]
        print(f"{r.model:{first}}" + "".join(f"{number:{each}.3f}" for number in numbers))
