"""What is printed of the circuits of Section 5.2."""

from support.circuits import SIZES, VARIANTS, Structure
from support.methods import Method
from support.positions import legend
from support.tables import CAN_DO, NO_BEHAVIOUR


def print_structure(name: str, s: Structure, labels: dict[str, str], metric: str) -> None:
    """One structure: does the model do the task, and the strongest units. labels: {method: label}."""
    print(
        f"\n  {name}: right on {s.accuracy['original']:.0%} of the original and {s.accuracy['patch']:.0%} of the patch "
        f"prompts held out; mean {metric} of the discovery pairs {s.discovery['original']:+.3f} and "
        f"{s.discovery['patch']:+.3f}"
    )
    if min(s.accuracy.values()) < CAN_DO:
        print(NO_BEHAVIOUR)
    print(
        f"  {s.chosen.size} units from layer {s.first_layer} on, found by {labels[s.chosen.method]}, have a "
        f"faithfulness of {s.chosen.faithfulness:.2f}; the strongest, and the prompts on which they fire most:"
    )
    widths = {m: max(9, len(labels[m]) + 2) for m in s.features}
    heads = "".join(f"{labels[m]:>{width}}" for m, width in widths.items())
    print(f"    {'layer node':18}{'unit':>6}  {'position':10}{heads}")
    for u in s.strongest:
        numbers = "".join(f"{u['scores'][m]:{width}.3f}" for m, width in widths.items())
        prompts = ", ".join(f"{text.strip()!r} {value:.1f}" for text, value in u["fires_most_on"][:2])
        print(f"    {u['layer']:>5} {u['node']:12}{u['unit']:>6}  {u['role'].strip():10}{numbers}  {prompts}")
    if legend(s.roles):
        print(f"    ({legend(s.roles)})")


def print_circuits(summary: dict, methods: list[Method]) -> None:
    """The averages over all structures: what the methods cost, and how faithful and complete their circuits are."""
    labels = {method.name: method.label for method in methods}
    structures = list(summary["structures"].values())

    def average(values) -> float:
        return sum(values) / len(structures)

    heads = ("forward", "backward", "seconds", "PCC, AP", "Spearman", "slope")
    print(f"\n  {'mean of the structures':26}" + "".join(f"{head:>10}" for head in heads))
    for name, label in labels.items():
        costs = [average(s["cost"][name][what] for s in structures) for what in heads[:3]]
        line = f"  {label:26}{costs[0]:10.0f}{costs[1]:10.0f}{costs[2]:10.2f}"
        if name != "ap" and "ap" in labels:
            for measure in ("averaged", "spearman", "slope"):
                line += f"{average(s['agreement'][name]['all'][measure].value for s in structures):10.3f}"
        print(line)
    columns, width = "".join(f"{n:>6}" for n in SIZES), max(8, *map(len, labels.values()))
    print(f"\n  {'':{26 + width}}{'faithfulness':>24}{'':23} |{'completeness':>24}")
    print(f"  {'circuits of so many units':{26 + width}}{columns}{'mean':>9}{'95 %':>9}{'':5} |{columns}")
    for variant, (title, *_) in VARIANTS.items():
        faithful, complete = (summary[measure][variant] for measure in ("faithfulness", "completeness"))
        for method in faithful:
            value, low, high = faithful[method]["mean"]
            at = ["".join(f"{of[method]['sizes'][n].value:6.2f}" for n in SIZES) for of in (faithful, complete)]
            print(f"  {title:26}{labels[method]:{width}}{at[0]}{value:9.3f} [{low:.3f} {high:.3f}] |{at[1]}")
            title = ""
        for other, of in summary["differences"].get(variant, {}).items():
            value, low, high = of["faithfulness"]
            name = "RelP - " + labels[other.split()[-1]]
            print(f"  {'':26}{name:{24 + width}}{value:+9.3f} [{low:+.3f} {high:+.3f}]")
