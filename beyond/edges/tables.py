"""What is printed of an edge run."""

import math

from beyond.edges.circuits import TARGET
from support.methods import Method
from support.positions import legend
from support.tables import CAN_DO, NO_BEHAVIOUR, short

KINDS = {"edges": "whole edges", "positions": "edges x positions"}
AREAS = {"cpr": "CPR", "cmd": "CMD", "cpr_log": "CPR, log", "cmd_log": "CMD, log"}
WIDTH = 22


def print_agreement(summary: dict, methods: list[Method]) -> None:
    """How well the methods agree with exact patching, and what they cost."""
    original, patch = (summary["accuracy"][which].value for which in ("original", "patch"))
    metric = summary["arguments"]["metric"]
    print(
        f"  right on {original:.0%} of the original and {patch:.0%} of the patch prompts; "
        f"mean {metric} {summary['value']['original'].value:+.3f} and {summary['value']['patch'].value:+.3f}"
    )
    if min(original, patch) < CAN_DO:
        print(NO_BEHAVIOUR)
    pcc, differences = summary["pcc"], summary["differences"]
    kinds = list(pcc)
    row("PCC with exact patching" if kinds else "", [f" {KINDS[kind]}" for kind in kinds], "  passes   seconds")
    for name, label in (("ap", "AP, whole edges"), ("ap_positions", "AP, by position")):
        if name in summary["cost"]:
            cost = summary["cost"][name]
            row(label, [""] * len(kinds), f"{cost['forward']:8.0f}{cost['seconds']:10.2f}")
    labels = {m.name: m.label for m in methods if m.name != "ap"}
    for name, label in labels.items():
        cost = summary["cost"][name]
        cells = [short(pcc[kind][name]["averaged"], *pcc[kind][name]["interval"]["averaged"]) for kind in kinds]
        passes = f"{cost['forward']:.0f} / {cost['backward']:.0f}"
        row(label, cells, f"{passes:>8}{cost['seconds']:10.2f}")
    for pair in differences.get("edges", {}):
        names = pair.split(" - ")
        if "relp" in names or "relp" not in labels:  # with RelP there, the others are compared with it only
            cells = [short(*differences[kind][pair]["averaged"], sign="+") for kind in kinds]
            row(" - ".join(labels[name] for name in names), cells)


def print_circuits(summary: dict, labels: dict[str, str]) -> None:
    """How well the methods' circuits do the task. labels: {method: label}, exact patching and a random order too."""
    areas = summary["areas"]
    print(f"\n  circuits, a share of the {summary['level']}s, judged on {summary['judged_on']}:")
    row("", [f" {label}" for label in AREAS.values()], f"  edges     f  overlap   (f >= {TARGET})")
    for method, of in areas.items():
        cells = [short(*of[measure]) for measure in AREAS]
        found = summary["circuits"].get(method)
        numbers = [short(x) if math.isfinite(x) else "" for x in (found["f"], found["overlap"])] if found else []
        end = f"{found['edges']:7}{numbers[0]:>6}{numbers[1]:>9}" if found else ""
        row(labels[method], cells, end)
    for pair, of in summary["area_differences"].items():
        names = pair.split(" - ")
        if "relp" in names and "random" not in names:
            row(" - ".join(labels[name] for name in names), [short(*of[measure], sign="+") for measure in AREAS])


def row(label: str, cells: list[str], end: str = "") -> None:
    print((f"  {label:26} " + "".join(f"{cell:{WIDTH}} " for cell in cells) + end).rstrip())


def print_circuit(circuit: list[dict], label: str, most: int = 12) -> None:
    """The strongest edges of the circuit that is drawn: name, score, and the position at which they matter most."""
    print(f"\n  the strongest of the {len(circuit)} edges of {label}'s circuit, and where they matter most:")
    for edge in circuit[:most]:
        print(f"    {edge['edge']:24}{edge['score']:9.3f}  {edge['role'] or ''}".rstrip())
    if meanings := legend([edge["role"] or "" for edge in circuit[:most]]):
        print(f"    ({meanings})")


def print_verified(found: dict, methods: list[Method]) -> None:
    """A line per edge that was patched: see experiment.verify."""
    labels = {"ap": "AP"} | {m.name: m.label for m in methods}
    print(
        f"\n  the {len(found['edges'])} edges of {found['of']} with the largest {labels[found['ranked_by']]} scores; "
        f"exact patching of these took {found['seconds']:.2f} s"
    )
    print(f"  {'':26}" + "".join(f"{text:>{max(10, len(text) + 1)}}" for text in labels.values()))
    for edge in found["edges"]:
        numbers = "".join(f"{edge['scores'][m]:{max(10, len(text) + 1)}.3f}" for m, text in labels.items())
        print(f"  {edge['edge']:26}{numbers}")


def print_overview(summaries: list[dict], labels: dict[str, str]) -> None:
    """A line per model: the methods side by side. labels: of the methods that all models have."""
    each = max(11, *(2 + len(label) for label in labels.values()))
    first = max(20, 2 + max(len(s["model"]) for s in summaries))
    titles = {"edges": "PCC with exact patching, whole edges", "positions": "the same, edges x positions"}
    for kind, title in titles.items():
        if all(kind in s["pcc"] for s in summaries):
            shared = [m for m in labels if all(m in s["pcc"][kind] for s in summaries)]
            print(f"\n{title}\n{'':{first}}" + "".join(f"{labels[m]:>{each}}" for m in shared))
            for s in summaries:
                numbers = [s["pcc"][kind][m]["averaged"] for m in shared]
                print(f"{s['model']:{first}}" + "".join(f"{number:{each}.3f}" for number in numbers))
    for measure, title in (("cpr", "CPR (higher is better)"), ("cmd", "CMD (lower is better)")):
        print(f"\n{title}\n{'':{first}}" + "".join(f"{label:>{each}}" for label in labels.values()))
        for s in summaries:
            numbers = [s["areas"][m][measure].value for m in labels]
            print(f"{s['model']:{first}}" + "".join(f"{number:{each}.3f}" for number in numbers))
