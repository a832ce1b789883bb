"""The grid: every subset of the rules, with every rule for linear layers, and how well each predicts AP."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from beyond.methods import FLAGS, method
from models import Transformer
from support.processes import rank
from support.statistics import Estimate, agreement, estimate
from support.tables import short

LINEAR = ["", "epsilon=0.01", "epsilon=0.1", "gamma=0.1", "gamma=0.5"]  # rules for linear layers; "" is the 0-rule
WIDTHS = (22, 30, 24)  # of the columns of what a rule adds
SHOWN = 10  # sets of rules that are printed, beside those that have a name


@dataclass
class Grid:
    """What the grid has found; written to grid.json. A set's score is the mean of its PCC over the kinds of nodes.

    rules    {set of rules: {node: {averaged, pooled, per_prompt: Estimate}, "mean": Estimate}}
    effects  {rule: {"alone", "beside the paper's others", "on average": Estimate}}: what it adds to that mean
    """

    rules: dict[str, dict]
    effects: dict[str, dict[str, Estimate]]
    paper: str  # the paper's set for this model


def name_of(rules) -> str:
    """The name of a set of rules, in the order of FLAGS and LINEAR."""
    return "+".join(rule for rule in (*FLAGS, *LINEAR) if rule and rule in rules) or "none"


def grid(model: Transformer, ap: dict, nodes: list[str], groups: list[str], weights: Tensor, score, title="") -> Grid:
    """All sets of rules against AP's scores {node: [n, layers, positions]} of the same pairs.

    score(methods) -> Scores scores the pairs: see scoring.score_pairs. weights: see statistics.resamples.
    """
    has_place = {"half": model.config.gated, "router": model.config.mixture is not None}
    flags = [flag for flag in FLAGS if has_place.get(flag, True)]
    subsets = [[f for i, f in enumerate(flags) if code >> i & 1] for code in range(2 ** len(flags))]
    names = [name_of([*subset, linear]) for subset in subsets for linear in LINEAR]
    table, means = {}, {}
    for name in tqdm(names, title, leave=False, disable=None if rank() == 0 else True):
        scores = score([method(name)]).scores
        of_nodes = {
            node: agreement(torch.tensor(scores[name, node]), torch.tensor(ap[node]), groups, weights=weights)
            for node in nodes
        }
        means[name] = torch.stack([of["averaged"] for of in of_nodes.values()]).mean(0)
        table[name] = {
            node: {what: estimate(of[what]) for what in ("averaged", "pooled", "per_prompt")}
            for node, of in of_nodes.items()
        }
        table[name]["mean"] = estimate(means[name])
    paper = [flag for flag in flags if getattr(model.rules(True), flag, False)]
    effects = {}
    for flag in flags:
        others = [subset for subset in subsets if flag not in subset]
        gains = [means[name_of([*subset, flag])] - means[name_of(subset)] for subset in others]
        beside = means[name_of({*paper, flag})] - means[name_of({*paper} - {flag})]
        effects[flag] = {
            "alone": estimate(means[flag] - means["none"]),
            "beside the paper's others": estimate(beside),
            "on average": estimate(torch.stack(gains).mean(0)),
        }
    return Grid(table, effects, name_of(paper))


def print_grid(found: Grid, nodes: list[str]) -> None:
    """The best sets and those that have a name, sorted; what each rule adds. All sets are in grid.json."""
    marks = {
        found.paper: "the paper's",
        "ln": "what the recipe of the paper's code computes",
        "none": "the gradient, AtP",
    }
    order = sorted(found.rules, key=lambda name: -found.rules[name]["mean"].value)
    shown = [name for i, name in enumerate(order) if i < SHOWN or name in marks]
    title = f"PCC with AP, {len(shown)} of {len(order)} sets"
    print(f"\n  {title:34}" + "".join(f"{node:>12}" for node in nodes) + f"{'mean':>9}")
    for name in shown:
        numbers = "".join(f"{found.rules[name][node]['averaged'].value:12.3f}" for node in nodes)
        mean = short(*found.rules[name]["mean"])
        print(f"  {name:34}{numbers}{mean:>22}  {marks.get(name, '')}".rstrip())
    heads = zip(("by itself", "beside the paper's others", "on average"), WIDTHS)
    print(f"\n  {'what a rule adds to the mean':34}" + "".join(f"{head:>{width}}" for head, width in heads))
    for flag, of in found.effects.items():
        print(f"  {flag:34}" + "".join(f"{short(*of[what], sign='+'):>{w}}" for what, w in zip(of, WIDTHS)))
    best = max(found.effects, key=lambda flag: found.effects[flag]["alone"].value)
    whole = found.rules[found.paper]["mean"].value - found.rules["none"]["mean"].value
    gain = found.effects[best]["alone"].value
    print(f"  {best} by itself makes {gain:+.3f} of the {whole:+.3f} that the paper's set gains over the gradient")
