"""Which rule does what? Every subset of the rules, with every rule for linear layers, and how well it predicts AP.

python -m beyond.grid --model toy-qwen2
"""

import sys
from itertools import combinations

import torch

from beyond.methods import FLAGS, method
from models import Transformer
from support.commandline import load, parse, run
from support.options import common_parser
from support.processes import say
from support.results import folder_of, save_json
from support.scoring import AP, score_pairs
from support.statistics import Estimate, agreement, estimate, resamples
from tasks import Pair

LINEAR = ["", "epsilon=0.01", "epsilon=0.1", "gamma=0.1", "gamma=0.5"]  # rules for linear layers; "" is the 0-rule


def name_of(rules: set[str]) -> str:
    """The method's name: the rules in the order of FLAGS and LINEAR. No rule at all is AtP."""
    return "+".join(rule for rule in (*FLAGS, *LINEAR) if rule and rule in rules) or "atp"


def grid(title: str, model: Transformer, pairs: list[Pair], nodes: list[str], seed: int = 0, **how) -> dict:
    """All sets of rules against AP. A set's score is the mean of its PCC over the kinds of nodes.

    {"sets": {name: {node: PCC, "mean": their mean}},
     "effects": {rule: {"alone", "beside": what it adds to that mean by itself, and beside the paper's other rules}},
     "paper": the paper's set for this model, "recipe": the set that the recipe of the paper's code computes}

    Numbers are Estimates. how: further arguments of scoring.score_pairs.
    """
    flags = [flag for flag in FLAGS if flag != "half" or model.config.gated]
    subsets = [{*subset} for n in range(len(flags) + 1) for subset in combinations(flags, n)]
    methods = [method(name_of(subset | {linear}), model.config.family) for subset in subsets for linear in LINEAR]
    scores = score_pairs(title, model, pairs, [AP, *methods], nodes, **how).scores
    groups = [pair.group for pair in pairs]
    weights, pcc = resamples(groups, seed=seed), {}
    for m in methods:
        of_nodes = pcc[m.name] = {}
        for node in nodes:
            one, ap = (torch.tensor(scores[name, node]) for name in (m.name, "ap"))
            of_nodes[node] = agreement(one, ap, groups, weights)["averaged"]
        of_nodes["mean"] = torch.stack(list(of_nodes.values())).mean(0)

    def gain(flag: str, others: set[str]) -> Estimate:
        return estimate(pcc[name_of(others | {flag})]["mean"] - pcc[name_of(others)]["mean"])

    paper = {flag for flag in flags if getattr(model.rules(True), flag)}
    return {
        "sets": {name: {what: estimate(x) for what, x in of_set.items()} for name, of_set in pcc.items()},
        "effects": {flag: {"alone": gain(flag, set()), "beside": gain(flag, paper - {flag})} for flag in flags},
        "paper": name_of(paper),
        "recipe": name_of({"ln", "half"} & {*flags}),
    }


def print_grid(found: dict, nodes: list[str]) -> None:
    """The best ten sets and those that have a name, sorted; what each rule adds. All sets are in grid.json."""
    marks = {found["recipe"]: "what the recipe of the paper's code computes", "atp": "no rule: the gradient"}
    marks[found["paper"]] = "the paper's"
    order = sorted(found["sets"], key=lambda name: -found["sets"][name]["mean"].value)
    shown = [name for i, name in enumerate(order) if i < 10 or name in marks]
    title = f"PCC with AP, {len(shown)} of {len(order)} sets"
    say(f"  {title:30}" + "".join(f"{node:>11}" for node in nodes) + "   mean")
    for name in shown:
        of_set = found["sets"][name]
        numbers = "".join(f"{of_set[node].value:11.3f}" for node in nodes)
        say(f"  {name:30}{numbers}   {with_interval(of_set['mean'])}  {marks.get(name, '')}".rstrip())
    say(f"\n  {'what a rule adds to the mean':30}   {'by itself':28}beside the paper's others")
    for flag, gains in found["effects"].items():
        say(f"  {flag:30}   {with_interval(gains['alone'], '+'):28}{with_interval(gains['beside'], '+')}")


def with_interval(x: Estimate, sign: str = "") -> str:
    return f"{x.value:{sign}.3f} [{x.low:{sign}.3f} {x.high:{sign}.3f}]"


def main(argv: list[str] | None = None) -> None:
    o = parse(common_parser("python -m beyond.grid", __doc__.splitlines()[0], ["methods", "rules"]), argv)
    for name in o.model:
        model, pairs = load(name, o)
        found = grid(name, model, pairs, o.nodes, o.seed, metric=o.metric, batch_size=o.batch_size, out=o.out)
        folder = folder_of(o.out, name, "ioi", "pair" if o.original else o.prompts)
        save_json(folder / "grid.json", found)
        print_grid(found, o.nodes)
        say(f"  written to {folder}/")


if __name__ == "__main__":
    sys.exit(run(main))
