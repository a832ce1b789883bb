"""Circuits of Section 5.2: what is found and measured of them, and their statistics."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import relp
from relp import Key
from support.methods import main_method
from support.statistics import Estimate, agreement, estimate, resamples
from tasks import Pair

Circuit = dict[Key, Tensor]  # {(node, layer): bool [pos, units]}


class Variant(NamedTuple):
    """What circuits are made of."""

    label: str
    kind: str  # of unit
    ablated_errors: tuple[str, ...] = ()  # nodes whose SAE errors are never in a circuit, nor in its complement

    def without_errors(self, circuit: Circuit) -> Circuit:
        result = {key: kept.clone() for key, kept in circuit.items()}
        for (node, _), kept in result.items():
            kept[:, -1] &= node not in self.ablated_errors
        return result


RESIDUAL, SUBLAYERS = ("resid_pre", "resid_mid", "resid_post"), ("attn_out", "mlp_out", "z")
VARIANTS = {
    "features": Variant("features and errors", "features"),
    "no_errors": Variant("no errors", "features", RESIDUAL + SUBLAYERS),
    "no_sublayer_errors": Variant("no attention, MLP errors", "features", SUBLAYERS),
    "no_resid_errors": Variant("no residual errors", "features", RESIDUAL),
    "neurons": Variant("neurons: node dimensions", "dimensions"),
    "mlp_neurons": Variant("neurons: MLP hidden", "mlp_neurons"),
}
SIZES = (10, 30, 100, 300)  # of the circuits in the table
SIZES_OF_MEAN = np.geomspace(SIZES[0], SIZES[-1], 30)  # over which faithfulness is averaged
TARGET = 0.8  # the smallest circuit with this faithfulness is drawn

Unit = tuple[Key, int, int]  # ((node, layer), pos, number); the number n_features is the error


@dataclass
class Cost:
    """What a method needs: passes for one batch of pairs, seconds for all. An edited run of AP is one forward pass."""

    forward: float = 0.0
    backward: float = 0.0
    seconds: float = 0.0


@dataclass
class Found:
    """What the methods say of the units, on the discovery pairs."""

    scores: dict[str, dict[str, dict[Key, Tensor]]]  # {kind of unit: {method: {node: [pos, units]}}}, means over pairs
    cost: dict[str, Cost]  # by method
    agreement: dict  # with AP, if that is among the methods: see agreement_of_units


@dataclass
class Runs:
    """The circuits of one method at each threshold; these rise, and circuits shrink. Metrics: [thresholds, pairs]."""

    sizes: list[int]
    circuit: Tensor  # of the run that is left with the circuit
    complement: Tensor  # of the run that is left with all else
    empty: Tensor  # [pairs], of the run with all units at their means


@dataclass
class Chosen:
    """The smallest circuit of the main method that reaches TARGET, or else its largest."""

    method: str
    threshold: float
    size: int
    faithfulness: float
    units: list[Unit]  # in the layers that are judged, the strongest first


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
    chosen: Chosen | None = None
    strongest: list[dict] = field(default_factory=list)  # see strongest_units

    @property
    def features(self) -> dict[str, dict[Key, Tensor]]:
        """The methods' scores of features and errors."""
        return self.found.scores["features"]


def complement(circuit: Circuit) -> Circuit:
    return {key: ~kept for key, kept in circuit.items()}


def sum_positions(scores: dict) -> dict:
    """Found.scores with the sum over positions at every position: a unit is in a circuit everywhere or nowhere."""
    return {
        kind: {m: {key: x.sum(0, keepdim=True).expand_as(x) for key, x in of.items()} for m, of in of_methods.items()}
        for kind, of_methods in scores.items()
    }


class Counted:
    """A model that counts forward passes (a stream computed), backward passes (a gradient's end) and rows read out."""

    def __init__(self, model):
        self.model, self.forward, self.backward, self.rows_read = model, 0, 0, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def stream(self, *args, **kwargs) -> Tensor:
        self.forward += 1
        stream = self.model.stream(*args, **kwargs)
        if stream.requires_grad:
            stream.register_hook(self.count_backward)
        return stream

    def count_backward(self, gradient: Tensor) -> None:
        self.backward += 1

    def unembed(self, x: Tensor, *args, **kwargs) -> Tensor:
        self.rows_read += len(x)
        return self.model.unembed(x, *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def resamples_of_prompts(pairs: list[Pair], seed: int) -> Tensor:
    """Weights [1 + B, pair], as statistics.resamples.

    Pairs made of the same two prompts are drawn together: as evidence they are one.
    """
    families = {}
    family = [families.setdefault(frozenset((p.original, p.patch)), len(families)) for p in pairs]
    return resamples([""] * len(families), seed=seed)[:, family]


def curve(s: Structure, variant: str, method: str, which: str, weights: Tensor) -> Tensor:
    """Faithfulness (which: "circuit") or completeness ("complement") at each threshold: [thresholds, weights]."""
    runs = s.runs[variant][method]
    return relp.faithfulness(getattr(runs, which)[:, None] * weights, s.full * weights, runs.empty * weights)


def at_sizes(values: Tensor, sizes: list[int], wanted) -> Tensor:
    """A curve's values [thresholds, ...] at other sizes, linear in log(1 + size); outside its ends, the nearest one."""
    order = np.unique(sizes, return_index=True)[1]
    x, units = np.log1p(np.array(sizes)[order]), np.eye(len(order))
    matrix = np.stack([np.interp(np.log1p(wanted), x, unit) for unit in units], axis=1)
    return torch.tensor(matrix) @ values[order]


def summarise(structures: dict[str, Structure], seed: int) -> dict:
    """What goes into summary.json: every structure, and the averages over them with their intervals."""
    weights = {name: resamples_of_prompts(s.held_out, seed) for name, s in structures.items()}

    def averaged(variant: str, method: str, which: str, sizes) -> Tensor:  # [sizes, weights]
        each = [
            at_sizes(curve(s, variant, method, which, weights[name]), s.runs[variant][method].sizes, sizes)
            for name, s in structures.items()
        ]
        return torch.stack(each).mean(0)

    result = {measure: {variant: {} for variant in VARIANTS} for measure in ("faithfulness", "completeness")}
    result["differences"] = {}
    for variant in VARIANTS:
        means = {}
        for method in next(iter(structures.values())).runs[variant]:
            for measure, which in (("faithfulness", "circuit"), ("completeness", "complement")):
                means[measure, method] = averaged(variant, method, which, SIZES_OF_MEAN).mean(0)
                at = averaged(variant, method, which, SIZES)
                result[measure][variant][method] = {
                    "sizes": {size: estimate(values) for size, values in zip(SIZES, at)},
                    "mean": estimate(means[measure, method]),
                }
        for (measure, method), values in means.items():
            if method not in ("ap", "relp") and (measure, "relp") in means:
                of = result["differences"].setdefault(variant, {}).setdefault(f"relp - {method}", {})
                of[measure] = estimate(means[measure, "relp"] - values)
    result["structures"] = {name: summary_of(s, weights[name]) for name, s in structures.items()}
    return result


def summary_of(s: Structure, weights: Tensor) -> dict:
    def estimates(variant: str, method: str, which: str) -> list[Estimate]:
        return [estimate(values) for values in curve(s, variant, method, which, weights)]

    return {
        "accuracy": s.accuracy,
        "discovery": s.discovery,
        "total_effect": s.total_effect,
        "thresholds": s.thresholds,
        "cost": {method: vars(cost) for method, cost in s.found.cost.items()},
        "agreement": s.found.agreement,
        "first_layer": s.first_layer,
        "curves": curves(s, estimates),
    }


def curves(s: Structure, values: Callable) -> dict:
    """{variant: {method: sizes, faithfulness, completeness}}, with values(variant, method, which) of the latter two."""
    return {
        variant: {
            method: {
                "sizes": runs.sizes,
                "faithfulness": values(variant, method, "circuit"),
                "completeness": values(variant, method, "complement"),
            }
            for method, runs in of_methods.items()
        }
        for variant, of_methods in s.runs.items()
    }


def agreement_of_units(scores: dict, pairs: list[Pair], seed: int) -> dict:
    """{method: {node or "all": {measure: Estimate}}}: agreement with AP over the units that some method scores.

    scores: {method: {(name, layer): [pair, pos, units]}} of the discovery pairs.
    """
    weights, nodes, result = resamples_of_prompts(pairs, seed), dict.fromkeys(name for name, _ in scores["ap"]), {}
    for node in ("all", *nodes):
        of_node = {
            method: torch.cat([v.flatten(1) for (name, _), v in values.items() if node in ("all", name)], dim=1)
            for method, values in scores.items()
        }
        scored = sum((v != 0).any(0) for v in of_node.values()) > 0  # by one of the methods at least
        for method in (name for name in scores if name != "ap"):
            pair = of_node[method][:, scored], of_node["ap"][:, scored]
            measures = agreement(*pair, [""] * len(pairs), weights=weights)
            result.setdefault(method, {})[node] = {name: estimate(values) for name, values in measures.items()}
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Reading a circuit


def ranked(scores: dict[Key, Tensor]) -> list[Unit]:
    """All units with a score, the strongest first."""
    units = [(key, *at) for key, value in scores.items() for at in value.nonzero().tolist()]
    strength = torch.cat([value[value != 0].abs() for value in scores.values()])
    return [units[i] for i in strength.argsort(descending=True, stable=True).tolist()]


def above(scores: dict[Key, Tensor], threshold: float) -> list[Unit]:
    return [unit for unit in ranked(scores) if abs(scores[unit[0]][unit[1:]]) > threshold]


def choose(s: Structure) -> Chosen:
    method = main_method(list(s.features))
    runs = s.runs["features"][method]
    faithful = relp.faithfulness(runs.circuit, s.full, runs.empty).tolist()
    best = max((k for k, f in enumerate(faithful) if f >= TARGET), default=0)  # the highest such threshold
    judged = {key: scores for key, scores in s.features[method].items() if key[1] >= s.first_layer}
    threshold = s.thresholds[best]
    return Chosen(method, threshold, runs.sizes[best], faithful[best], above(judged, threshold))


def describe(unit: Unit, scores: dict[str, dict[Key, Tensor]], roles: list[str]) -> dict:
    """A unit in the files: where it is, and every method's score."""
    key, pos, i = unit
    error = next(iter(scores.values()))[key].shape[1] - 1
    return {
        "layer": key[1],
        "node": key[0],
        "unit": "error" if i == error else i,
        "position": pos,
        "role": roles[pos],
        "scores": {method: float(of_method[key][pos, i]) for method, of_method in scores.items()},
    }


def strongest_units(s: Structure, model, tokens: Tensor, tokenizer, saes: dict, k: int, all_positions: bool) -> list:
    """The k strongest units of the main method, and the prompts [n, pos] on which they fire most.

    all_positions: a unit is the same at all positions, and is listed once.
    """
    skip = s.held_out[0].roles[0] == "BOS"
    _, acts = relp.record(model, tokens, {name for name, _ in saes})
    units, listed = ranked(s.features[main_method(list(s.features))]), []
    if all_positions:
        units = [unit for unit in units if unit[1] == 0]
    for unit in units[:k]:
        key, pos, i = unit
        sae, x = saes[key], acts[key].flatten(2)[:, slice(None) if all_positions else [pos]]
        fires = (sae.encode(x)[..., i] if i < len(sae.W_dec) else sae.error(x).norm(dim=-1)).amax(1)
        most = [(tokens[j, skip:].tolist(), float(v)) for v, j in zip(*fires.topk(min(3, len(fires)))) if v > 0]
        where = {"position": "all", "role": "all"} if all_positions else {}
        prompts = [[tokenizer.decode(ids), value] for ids, value in most]
        listed.append(describe(unit, s.features, s.roles) | where | {"fires_most_on": prompts})
    return listed


def circuit_json(name: str, s: Structure) -> dict:
    """One structure's circuits as a file that others can read: the curves, and all units above the lowest threshold."""
    once = torch.ones(1, len(s.full), dtype=torch.float64)

    def values(variant: str, method: str, which: str) -> list[float]:
        return curve(s, variant, method, which, once)[:, 0].tolist()

    return {
        "structure": name,
        "roles": s.roles,
        "total_effect": s.total_effect,
        "thresholds": s.thresholds,
        "first_layer_judged": s.first_layer,
        "circuits": curves(s, values),
        "drawn": {key: value for key, value in vars(s.chosen).items() if key != "units"},
        "strongest": s.strongest,
        "nodes": [describe(unit, s.features, s.roles) for unit in above(s.features[s.chosen.method], s.thresholds[0])],
    }
