"""What is printed: Table 5 of the paper, for one model and for several, and the circuits of Section 5.2.

Tables are at most WIDTH characters wide: columns that do not fit stand below the first ones.
"""

import csv
import math
import re
import sys
import textwrap
from io import StringIO
from typing import NamedTuple

import numpy as np

from support.circuits import MEASURES, SIZES, VARIANTS, Structure
from support.positions import laid_over, legend, overlay, visible
from support.scoring import main_method
from tasks import Pair

WIDTH = 100
CAN_DO = 0.75  # accuracy below which a model is said not to do the task
NO_BEHAVIOUR = "  WARNING: this model does not do the task, so there is no behaviour here for the methods to explain"


def short(value: float, *interval: float, sign: str = " ") -> str:
    """A number and its interval, as in " .932 [.921 .945]"; with sign "+", as in "+.088 [+.077 +.108]"."""

    def text(x: float, sign: str) -> str:
        return re.sub(r"\b0\.", ".", f"{x:{sign}.3f}")

    known = interval and all(map(math.isfinite, interval))  # a single prompt has none
    return text(value, sign) + (f" [{' '.join(text(x, sign.strip()) for x in interval)}]" if known else "")


def cut(text: str, length: int = 40) -> str:
    """Text of at most this length: what is too long loses its middle."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"


def print_columns(rows: list[tuple[str, list[str]]]) -> None:
    """Rows of a label and cells. A row without cells is a line of text."""
    n = max(len(cells) for _, cells in rows)
    rows = [(label, cells + [""] * (n - len(cells)) if cells else []) for label, cells in rows]
    first = 2 + max(len(label) for label, cells in rows if cells)
    widths = [2 + max(len(cells[j]) for _, cells in rows if cells) for j in range(n)]
    start = 0
    while start < n:
        end = start + 1
        while end < n and first + sum(widths[start : end + 1]) <= WIDTH:
            end += 1
        for label, cells in rows:
            line = "".join(f"{cell:{width}}" for cell, width in zip(cells[start:end], widths[start:end]))
            if line.strip() or not cells:
                print(f"  {label:{first}}{line}".rstrip())
        start = end


def print_text(text: str) -> None:
    print(textwrap.fill(text, WIDTH, initial_indent="    ", subsequent_indent="    "))


def print_task(accuracy: dict[str, float], metric: str, values: dict[str, float]) -> None:
    """Does the model do the task? accuracy and the metric's mean value, of the "original" and of the "patch" run."""
    print(
        f"  right on {accuracy['original']:.0%} of the original and {accuracy['patch']:.0%} of the patch prompts; "
        f"mean {metric} {values['original']:+.3f} and {values['patch']:+.3f}"
    )
    if min(accuracy.values()) < CAN_DO:
        print(NO_BEHAVIOUR)


# ---------------------------------------------------------------------------------------------------------------------
# Nodes


class Strongest(NamedTuple):
    """A node, or a part of one, and its score: the mean over the prompts."""

    node: str
    layer: int
    position: int
    label: str  # of the position
    part: int | None  # which head or neuron
    score: float


class Top(list):
    """Strongest nodes, which print as a table."""

    def __repr__(self) -> str:
        rows = []
        for node, layer, pos, label, part, score in self:
            name = node if part is None else f"{node} {part}"
            rows.append(f"{name:14} layer {layer:<3} position {pos:<3} {visible(label.strip()):12} {score:+9.3f}")
        return "\n".join(rows)


def top(scores: dict, labels: list[str], k: int = 10) -> Top:
    """The k nodes with the largest scores in size, of prompts of one length, {node: [batch, layer, pos, ...]}."""
    check_labels(scores, labels)
    means = {node: x.detach().double().mean(0).cpu().numpy() for node, x in scores.items()}
    return Top(strongest(means, labels, k))


def as_csv(scores: dict, methods: list, nodes: list[str], pairs: list) -> str:
    """The mean scores by role, a line for each node, layer and role, and of heads and neurons for each part."""
    labels, at = overlay(pairs)
    lines = csv.writer(text := StringIO(newline=""), lineterminator="\n")
    lines.writerow(["node", "layer", "role", "part", *(m.name for m in methods)])
    for node in nodes:
        maps = np.stack([laid_over(scores[m.name, node], at) for m in methods], axis=-1)
        for layer, column, *part in np.ndindex(maps.shape[:-1]):
            numbers = (f"{x:.6g}" for x in maps[(layer, column, *part)])
            lines.writerow([node, layer, labels[column].strip(), *(part or [""]), *numbers])
    return text.getvalue()


def check_labels(scores: dict, labels: list[str]) -> None:
    for node, values in scores.items():
        if values.ndim < 3 or values.shape[2] != len(labels):
            shape = list(values.shape)
            raise ValueError(f"scores of {node} must be [batch, layer, {len(labels)} labelled positions], got {shape}")


def strongest(means: dict[str, np.ndarray], labels: list[str], k: int) -> list[Strongest]:
    """The k largest of mean scores {node: [layer, pos, ...]}."""
    found = []
    for node, values in means.items():
        for index in np.argsort(-abs(values), axis=None, kind="stable")[:k]:
            layer, pos, *part = (int(i) for i in np.unravel_index(index, values.shape))
            score = float(values.flat[index])
            found.append(Strongest(node, layer, pos, labels[pos], part[0] if part else None, score))
    return sorted(found, key=lambda entry: -abs(entry.score))[:k]


def peaks(means: dict[str, np.ndarray], labels: list[str], k: int) -> list[Strongest]:
    """The k largest, but of each node, position and part only the layer where it is strongest."""
    only = {}
    for node, values in means.items():
        layers = np.abs(values).argmax(0)[None]
        only[node] = np.zeros_like(values)
        np.put_along_axis(only[node], layers, np.take_along_axis(values, layers, 0), 0)
    return [one for one in strongest(only, labels, k) if one.score]


def print_report(summary: dict, methods: list, nodes: list[str], paper: dict | None = None) -> None:
    """One model's table: a row for each method, a column for each kind of node.

    summary: what is in summary.json. methods: scoring.Methods. paper: the paper's own numbers {node: (AtP, RelP)}, if
    they are of the same experiment.
    """
    accuracy, values = ({run: x[0] for run, x in summary[what].items()} for what in ("accuracy", "value"))
    print_task(accuracy, summary["metric"], values)
    labels, agreement = {m.name: cut(m.label) for m in methods}, summary["agreement"]
    rows = [("PCC with AP" if agreement else "", ["seconds", *(f" {node}" for node in nodes if agreement)])]
    for method, label in labels.items():
        cells = [short(*agreement[method][node]["averaged"]) for node in nodes] if method in agreement else []
        rows.append((label, [f"{summary['seconds'][method]:7.2f}", *cells]))
    if agreement:
        main = main_method(list(agreement))
        for pair, of_nodes in summary["differences"].items():
            if main in pair.split(" - "):  # the others are compared with it only
                label = " - ".join(cut(labels[method], 18) for method in pair.split(" - "))
                rows.append((label, ["", *(short(*of_nodes[node], sign="+") for node in nodes)]))
        for i, label in enumerate(("AtP, paper", "RelP, paper") if paper else ()):
            rows.append((label, ["", *(short(paper[node][i]) if node in paper else "" for node in nodes)]))
        rows.append(("slope of the scores against AP: 1 is the right size, .5 is half of it", []))
        for method, of in agreement.items():
            rows.append((labels[method], ["", *(short(*of[node]["slope"]) for node in nodes)]))
        rows.append(("largest error (score - AP) of the mean scores, and AP's largest effect", []))
        for method, of in agreement.items():
            rows.append((labels[method], ["", *(error_at(of[node]["largest_error"], node, summary) for node in nodes)]))
        rows.append((labels["ap"], ["", *(f" {agreement[main][node]['largest_effect']:#.3g}" for node in nodes)]))
    print_columns(rows)
    errors = [of[node]["largest_error"] for of in agreement.values() for node in nodes]
    if meanings := legend([summary["labels"][error["group"]][error["position"]] for error in errors]):
        print_text(f"({meanings})")


def error_at(found: dict, node: str, summary: dict) -> str:
    """As in "+14.1 at B1, layer 0"."""
    position = cut(summary["labels"][found["group"]][found["position"]].strip(), 12)
    kind = "neuron" if node == "neuron" else "head"
    part = "" if found["part"] is None else f", {kind} {found['part']}"
    return f"{found['error']:+#.3g} at {position}, layer {found['layer']}{part}"


def print_strongest(scores: dict, methods: list, nodes: list[str], pairs: list[Pair]) -> None:
    """The ten largest peaks by AP, or without it by the main method; of a single pair the prompt too."""
    labels, at = overlay(pairs)
    by = "ap" if "ap" in {m.name for m in methods} else main_method([m.name for m in methods])
    maps = {key: laid_over(x, at) for key, x in scores.items()}
    if len(pairs) == 1:
        print("  below each word: the largest effect there")
        print_prompt(pairs[0], strongest_at_positions({node: maps[by, node] for node in nodes}))
    rows = [(f"strongest, by {next(m.label for m in methods if m.name == by)}", [f" {cut(m.label)}" for m in methods])]
    for node, layer, pos, label, part, _ in peaks({node: maps[by, node] for node in nodes}, labels, 10):
        i = (layer, pos) if part is None else (layer, pos, part)
        name = node if part is None else f"{node} {part}"
        rows.append((f"{name}, layer {layer}, {label.strip()}", [f"{maps[m.name, node][i]: .3f}" for m in methods]))
    print_columns(rows)
    if legend(labels):
        print_text(f"({legend(labels)})")
    if by != "ap":
        print("  activation patching tells how far these can be trusted: add ap to --methods")


def strongest_at_positions(maps: dict[str, np.ndarray]) -> np.ndarray:
    """Of each position the largest score in size, of all layers, nodes and parts [layer, pos, ...]."""
    flat = np.concatenate([np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in maps.values()], axis=1)
    return flat[np.arange(len(flat)), np.abs(flat).argmax(1)]


def print_prompt(pair: Pair, effects: np.ndarray) -> None:
    """The original prompt, the effects below its words; in a terminal also in colour: blue negative, red positive."""
    words = [visible(role) for role in pair.roles]
    numbers = [f"{x:+.2f}" if x else "" for x in effects]
    widths = [max(map(len, both)) for both in zip(words, numbers)]
    largest, start = np.abs(effects).max() or 1, 0
    while start < len(words):
        end = start + 1
        while end < len(words) and 2 + sum(widths[start : end + 1]) + end - start <= WIDTH:
            end += 1
        shown = range(start, end)
        colours = [colour(effects[j] / largest) if sys.stdout.isatty() else ("", "") for j in shown]
        print("  " + " ".join(f"{on}{words[j]:{widths[j]}}{off}" for j, (on, off) in zip(shown, colours)).rstrip())
        print("  " + " ".join(f"{numbers[j]:{widths[j]}}" for j in shown).rstrip())
        start = end


def colour(share: float) -> tuple[str, str]:
    """What a terminal is told before and after a word with this share of the largest effect."""
    pale = round(255 * (1 - abs(share)))
    r, g, b = (255, pale, pale) if share > 0 else (pale, pale, 255)
    return f"\033[30;48;2;{r};{g};{b}m", "\033[0m"


def print_overview(reports: list[dict], methods: list, nodes: list[str]) -> None:
    """The paper's Table 5: a row for each model, a column for each kind of node and method. reports: summaries."""
    columns = [(node, method) for node in nodes for method in methods]
    rows = [("", [f" {node}" for node, _ in columns]), ("PCC with AP", [f" {cut(m.label, 20)}" for _, m in columns])]
    for summary in reports:
        numbers = [summary["agreement"][method.name][node]["averaged"][0] for node, method in columns]
        rows.append((cut(summary["model"]), [short(number) for number in numbers]))
    print()
    print_columns(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Circuits


def print_structure(name: str, s: Structure, labels: dict[str, str], metric: str) -> None:
    """One structure: does the model do the task, and the strongest units. labels: {method: label}."""
    print(f"\n  {name} (held-out pairs; the mean is of the discovery pairs)")
    print_task(s.accuracy, metric, s.discovery)
    size, faithful = s.chosen["size"], s.chosen["faithfulness"]
    print(f"  {size} units from layer {s.first_layer} on have a faithfulness of {faithful:.2f}")
    print(f"  the strongest by {cut(labels[s.main])}:")
    rows = [("layer, node, unit, position", [*(cut(labels[m]) for m in s.features), "fires most on"])]
    for unit in s.strongest:
        numbers = [f"{score:6.3f}" for score in unit["scores"].values()]
        prompts = ", ".join(f"{text.strip()!r} {value:.1f}" for text, value in unit["fires_most_on"][:1])
        place = f"{unit['layer']} {unit['node']} {unit['unit']} {unit['role'].strip()}"
        rows.append((cut(place), [*numbers, cut(prompts, 50)]))
    print_columns(rows)
    if legend(s.roles):
        print_text(f"({legend(s.roles)})")


def print_circuits(summary: dict, methods: list) -> None:
    """The averages over all structures: what the methods cost, and how faithful and complete their circuits are."""
    labels = {method.name: cut(method.label) for method in methods}
    structures = list(summary["structures"].values())
    costs = {"forward": "7.0f", "backward": "8.0f", "seconds": "7.2f"}
    rows = [("mean of the structures", [*costs, " PCC with AP", " rank", " slope"])]
    for method, label in labels.items():
        numbers = [f"{np.mean([s['cost'][method][what] for s in structures]):{form}}" for what, form in costs.items()]
        agreements = [s["agreement"][method] for s in structures if method in s["agreement"]]
        if agreements:
            each = [(of["averaged"][0], of["rank"], of["slope"][0]) for of in agreements]
            numbers += [short(value) for value in np.mean(each, axis=0)]
        rows.append((label, numbers))
    print()
    print_columns(rows)
    for measure in MEASURES:
        heads = [*(f"{n:>5}" for n in SIZES), f" mean, {SIZES[0]} to {SIZES[-1]}"]
        rows = [(f"{measure}, circuits of so many units", heads)]
        for variant in summary[measure]:
            rows.append((VARIANTS[variant].label, []))
            for method, of in summary[measure][variant].items():
                rows.append((labels[method], [*(f"{of['sizes'][n][0]:5.2f}" for n in SIZES), short(*of["mean"])]))
            for pair, of in summary["differences"].get(variant, {}).items():
                label = " - ".join(cut(labels[method], 18) for method in pair.split(" - "))
                rows.append((label, [*[""] * len(SIZES), short(*of[measure], sign="+")]))
        print()
        print_columns(rows)
