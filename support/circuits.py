"""Circuits of SAE features (Section 5.2 of the paper): what is found and measured of them, and their statistics."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import relp
from relp import Key
from support.scoring import main_method
from support.statistics import agreement, estimate, rank_correlation, resamples
from tasks import Pair

Unit = tuple[Key, int, int]  # ((node, layer), pos, number); the number n_features is the SAE's error


class Variant(NamedTuple):
    """What circuits are made of."""

    label: str
    kind: str  # of unit
    errors: bool = True  # False: SAE errors are never in a circuit, nor in its complement


VARIANTS = {
    "features": Variant("features and errors", "features"),
    "no_errors": Variant("features, no errors", "features", errors=False),
    "neurons": Variant("neurons: node dimensions", "dimensions"),
    "mlp_neurons": Variant("neurons: MLP hidden", "mlp_neurons"),
}
SIZES = [10, 30, 100, 300]  # of the circuits in the table
SIZES_OF_MEAN = np.geomspace(10, 300, 30)  # over which faithfulness is averaged
MEASURES = {"faithfulness": "circuit", "completeness": "complement"}  # {measure: what is left in the run}
TARGET = 0.8  # the smallest circuit with this faithfulness is named


class Found(NamedTuple):
    """What the methods say of the units, on the discovery pairs."""

    scores: dict[str, dict[str, dict[Key, Tensor]]]  # {kind of unit: {method: {node: [pos, units]}}}, means over pairs
    cost: dict[str, dict[str, float]]  # {method: {"forward" and "backward": passes for a pair, "seconds": for all}}
    agreement: dict  # with AP, if that is among the methods: see agreement_of_units


class Runs(NamedTuple):
    """The circuits of one method at each threshold; these rise, and circuits shrink. Metrics: [thresholds, pairs]."""

    sizes: list[int]
    circuit: Tensor  # of the run that is left with the circuit
    complement: Tensor  # of the run that is left with all else
    empty: Tensor  # [pairs], of the run with all units at their means


@dataclass
class Structure:
    """All that is known of the circuits of one structure."""

    held_out: list[Pair]
    roles: list[str]  # of the positions
    found: Found
    accuracy: dict[str, float]  # on the held-out pairs, of the "original" and the "patch" run
    discovery: dict[str, float]  # the metric's mean on the discovery pairs, likewise
    total_effect: float  # how far these two are apart
    thresholds: list[float]
    full: Tensor  # [pairs], the metric of the whole model
    first_layer: int  # that is judged
    runs: dict[str, dict[str, Runs]]  # {variant: {method: ...}}
    chosen: dict = field(default_factory=dict)  # see choose
    strongest: list[dict] = field(default_factory=list)  # see strongest_units

    @property
    def features(self) -> dict[str, dict[Key, Tensor]]:
        """The methods' scores of the first kind of unit: features and errors, or without SAEs neurons."""
        return next(iter(self.found.scores.values()))

    @property
    def main(self) -> str:
        """The method whose units are listed."""
        return main_method(list(self.features))


def resamples_of_prompts(pairs: list[Pair], seed: int) -> Tensor:
    """Weights [1 + B, pair], as statistics.resamples. Pairs of the same two prompts are drawn together, as one."""
    prompts = [frozenset((p.original, p.patch)) for p in pairs]
    distinct = list(dict.fromkeys(prompts))
    return resamples([""] * len(distinct), seed=seed)[:, [distinct.index(both) for both in prompts]]


def curve(s: Structure, variant: str, method: str, measure: str, weights: Tensor) -> Tensor:
    """Faithfulness or completeness of a method's circuits at each threshold: [thresholds, weights]."""
    runs = s.runs[variant][method]
    left = getattr(runs, MEASURES[measure])
    return relp.faithfulness(left[:, None] * weights, s.full * weights, runs.empty * weights)


def curves(s: Structure, weights: Tensor) -> dict:
    """{variant: {method: {"sizes", "faithfulness", "completeness"}}}; Estimates, one for each threshold."""
    result = {variant: {} for variant in s.runs}
    for variant, of_methods in s.runs.items():
        for method, runs in of_methods.items():
            of = {m: [estimate(x) for x in curve(s, variant, method, m, weights)] for m in MEASURES}
            result[variant][method] = {"sizes": runs.sizes, **of}
    return result


def at_sizes(values: Tensor, sizes: list[int], wanted) -> Tensor:
    """A curve's values [thresholds, ...] at other sizes, linear in log(1 + size); outside its ends, the nearest one."""
    order = np.unique(sizes, return_index=True)[1]
    x, units = np.log1p(np.array(sizes)[order]), np.eye(len(order))
    matrix = np.stack([np.interp(np.log1p(wanted), x, unit) for unit in units], axis=1)
    return torch.tensor(matrix) @ values[order]


def summarise(structures: dict[str, Structure], seed: int) -> dict:
    """What goes into summary.json: every structure, and the averages over them with their intervals."""
    weights = {name: resamples_of_prompts(s.held_out, seed) for name, s in structures.items()}

    def averaged(variant: str, method: str, measure: str, sizes) -> Tensor:  # [sizes, weights]
        each = []
        for name, s in structures.items():
            values = curve(s, variant, method, measure, weights[name])
            each.append(at_sizes(values, s.runs[variant][method].sizes, sizes))
        return torch.stack(each).mean(0)

    variants = next(iter(structures.values())).runs
    result = {measure: {variant: {} for variant in variants} for measure in MEASURES} | {"differences": {}}
    for variant in variants:
        for measure in MEASURES:
            means = {}
            for method in next(iter(structures.values())).runs[variant]:
                means[method] = averaged(variant, method, measure, SIZES_OF_MEAN).mean(0)
                sizes = dict(zip(SIZES, map(estimate, averaged(variant, method, measure, SIZES))))
                result[measure][variant][method] = {"sizes": sizes, "mean": estimate(means[method])}
            for method, values in means.items():
                if "relp" in means and method not in ("ap", "relp"):
                    of = result["differences"].setdefault(variant, {}).setdefault(f"relp - {method}", {})
                    of[measure] = estimate(means["relp"] - values)
    fields = ("accuracy", "discovery", "total_effect", "thresholds", "first_layer")
    result["structures"] = {
        name: {field: getattr(s, field) for field in fields}
        | {"cost": s.found.cost, "agreement": s.found.agreement, "curves": curves(s, weights[name])}
        for name, s in structures.items()
    }
    return result


def agreement_of_units(scores: dict, pairs: list[Pair], seed: int) -> dict:
    """{method: measures}: agreement with AP over the units that some method scores.

    scores: {method: {(node, layer): [pair, pos, units]}} of the discovery pairs. Measures are those of
    statistics.agreement, as Estimates, and "rank", a number.
    """
    weights, groups, result = resamples_of_prompts(pairs, seed), [""] * len(pairs), {}
    flat = {method: torch.cat([v.flatten(1) for v in values.values()], dim=1) for method, values in scores.items()}
    scored = sum((values != 0).any(0) for values in flat.values()) > 0
    ap = flat.pop("ap")[:, scored]
    for method, values in flat.items():
        measures = agreement(values[:, scored], ap, groups, weights)
        result[method] = {name: estimate(x) for name, x in measures.items()}
        result[method]["rank"] = rank_correlation(values[:, scored], ap, groups)
    return result


def ranked(scores: dict[Key, Tensor], threshold: float = 0) -> list[Unit]:
    """All units whose score exceeds the threshold in size, the strongest first."""
    strong = {key: value.abs().where(value.abs() > threshold, 0) for key, value in scores.items()}
    units = [(key, *at) for key, value in strong.items() for at in value.nonzero().tolist()]
    strength = torch.cat([value[value != 0] for value in strong.values()])
    return [units[i] for i in strength.argsort(descending=True, stable=True).tolist()]


def choose(s: Structure) -> dict:
    """The smallest circuit of the main method that reaches TARGET. If none does, its largest.

    {"method", "threshold", "size", "faithfulness"}
    """
    first = next(iter(s.found.scores))  # kind of unit
    runs = next(of for name, of in s.runs.items() if VARIANTS[name].kind == first)[s.main]
    faithful = relp.faithfulness(runs.circuit, s.full, runs.empty).tolist()
    best = max((k for k, f in enumerate(faithful) if f >= TARGET), default=0)  # the highest such threshold
    chosen = {"method": s.main, "threshold": s.thresholds[best], "size": runs.sizes[best]}
    return chosen | {"faithfulness": faithful[best]}


def describe(unit: Unit, s: Structure) -> dict:
    """A unit in the files: where it is, and every method's score."""
    (node, layer), pos, i = unit
    scores = {method: float(of_method[node, layer][pos, i]) for method, of_method in s.features.items()}
    error = s.features[s.main][node, layer].shape[1] - 1
    name = "error" if i == error else i
    return {"layer": layer, "node": node, "unit": name, "position": pos, "role": s.roles[pos], "scores": scores}


def strongest_units(s: Structure, model, tokens: Tensor, tokenizer, units: dict, k: int) -> list[dict]:
    """The k strongest units of the main method, and those of the prompts [n, pos] on which they fire most."""
    skip, saes = s.held_out[0].roles[0] == "BOS", next(iter(units.values()))
    _, acts = relp.record(model, tokens, {name for name, _ in saes})
    listed = []
    for key, pos, i in ranked(s.features[s.main])[:k]:
        sae, x = saes[key], acts[key].flatten(2)[:, pos]
        fires = sae.encode(x)[:, i] if i < len(sae.W_dec) else sae.error(x).norm(dim=-1)
        most = [(tokens[j, skip:].tolist(), float(v)) for v, j in zip(*fires.topk(min(3, len(fires)))) if v > 0]
        prompts = [[tokenizer.decode(ids), value] for ids, value in most]
        listed.append(describe((key, pos, i), s) | {"fires_most_on": prompts})
    return listed


def circuit_json(name: str, s: Structure) -> dict:
    """One structure's circuits as a file that others can read: its curves, and all units above the lowest threshold."""
    return {
        "structure": name,
        "roles": s.roles,
        "total_effect": s.total_effect,
        "thresholds": s.thresholds,
        "first_layer_judged": s.first_layer,
        "smallest_faithful": s.chosen,
        "strongest": s.strongest,
        "nodes": [describe(unit, s) for unit in ranked(s.features[s.main], s.thresholds[0])],
    }
