"""What is printed of an edge run."""

from beyond.edges.judging import TARGET
from support.positions import legend
from support.scoring import Method
from support.tables import CAN_DO, NO_BEHAVIOUR, short


def print_summary(summary: dict, methods: list[Method]) -> None:
    """One model's tables. Intervals of what is over the logarithm are in summary.json only."""
    labels = {m.name: m.label for m in methods} | {"random": "random order"}
    original, patch = (summary["accuracy"][run].value for run in ("original", "patch"))
    means = [summary["value"][run].value for run in ("original", "patch")]
    print(
        f"  right on {original:.0%} of the original and {patch:.0%} of the patch prompts; "
        f"mean {summary['metric']} {means[0]:+.3f} and {means[1]:+.3f}"
    )
    if min(original, patch) < CAN_DO:
        print(NO_BEHAVIOUR)

    agreement, patched = summary["agreement"], summary["patched_edges"]
    if 0 < patched < summary["n_edges"]:
        print(f"  exact patching of {patched} edges drawn at random")
    row("", *([" PCC with exact patching", " slope"] if agreement else ["", ""]), "   passes   seconds")
    for name, cost in summary["cost"].items():
        of = agreement.get(name)
        cells = (short(*of["averaged"]), short(*of["slope"])) if of else ("", "")
        passes = f"{cost['forward']:.0f} / {cost['backward']:.0f}"
        row(labels[name], *cells, f"{passes:>9}{cost['seconds']:10.2f}")
    for label, of in with_relp(summary["differences"], labels):
        row(label, short(*of["averaged"], sign="+"), "", "")

    print(f"\n  circuits, judged on {summary['judged_on']}; edges, f: of the smallest with f >= {TARGET}")
    row("", " CPR", " CMD", " CPR,log CMD,log  edges     f overlap")
    for name, of in summary["areas"].items():
        end = f"{short(of['cpr_log'].value):8}{short(of['cmd_log'].value):8}"
        if found := summary["circuits"].get(name):
            end += f"{found['edges']:6}{short(found['f']):>6}{short(found['overlap']):>8}"
        row(labels[name], short(*of["cpr"]), short(*of["cmd"]), end)
    for label, of in with_relp(summary["area_differences"], labels):
        end = f"{short(of['cpr_log'].value, sign='+'):8}{short(of['cmd_log'].value, sign='+'):8}"
        row(label, short(*of["cpr"], sign="+"), short(*of["cmd"], sign="+"), end)

    name, edges = summary["drawn"]["method"], summary["drawn"]["edges"][:12]
    n = summary["circuits"][name]["edges"]
    print(f"\n  the strongest of the {n} edges of {labels[name]}'s circuit, and where they matter most:")
    for edge in edges:
        print(f"    {edge['edge']:24}{edge['score']:9.3f}  {edge['role']}")
    if meanings := legend([edge["role"] for edge in edges]):
        print(f"    ({meanings})")
    if summary["verified"]:
        print_verified(summary["verified"], labels)


def row(label: str, one: str, other: str, end: str) -> None:
    print(f"  {label:23}{one:21}{other:21}{end}".rstrip())


def with_relp(differences: dict, labels: dict[str, str]) -> list[tuple[str, dict]]:
    """Those between RelP and another method, with their label."""
    pairs = [(*name.split(" - "), of) for name, of in differences.items()]
    return [(f"{labels[a]} - {labels[b]}", of) for a, b, of in pairs if "relp" in (a, b) and "random" not in (a, b)]


def print_verified(verified: dict, labels: dict[str, str]) -> None:
    """A line per edge that was patched: see __main__.verify."""
    by, n = labels[verified["ranked_by"]], len(verified["edges"])
    print(
        f"\n  the {n} of {verified['of']} edges with the largest {by} scores; "
        f"exact patching took {verified['seconds']:.2f} s"
    )
    columns = {m: labels.get(m, "AP") for m in verified["edges"][0]["scores"]}
    print(f"  {'':26}" + "".join(f"{label:>{max(10, len(label) + 1)}}" for label in columns.values()))
    for edge in verified["edges"]:
        numbers = [f"{edge['scores'][m]:{max(10, len(label) + 1)}.3f}" for m, label in columns.items()]
        print(f"  {edge['edge']:26}" + "".join(numbers))
