"""Circuits: mean ablation against its definition, the statistics recomputed by hand, and the command --task sva.

The command runs on the toy GPT-NeoX model and its SAEs, with few prompts.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCAB
from test_evaluate import jsonl, label, run  # noqa: F401, the fixture
from test_saes import random_sae, write_saelens

import evaluate
import models
import relp
import tasks
from beyond.methods import method as method_of
from support import circuit_figures, circuits
from support.prompts import read_pairs, split
from support.results import without_nan
from support.saes import load_saes
from support.statistics import estimate, resamples
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
SAES = ROOT / "toy" / "saes" / "neox"

# ---------------------------------------------------------------------------------------------------------------------
# Mean ablation, on random models of every kind


def encode(sae, x):
    """f, written again from its definition."""
    if isinstance(sae, relp.Neurons):
        return x
    pre = (x - sae.b_dec if sae.centred else x) @ sae.W_enc + sae.b_enc
    return torch.where(pre > (0 if sae.threshold is None else sae.threshold), pre.clamp(min=0), 0)


def decode(sae, f):
    return f if isinstance(sae, relp.Neurons) else f @ sae.W_dec + sae.b_dec


def ablated(model, tokens, answers, saes, means, circuit, metric=relp.logit_diff):
    """run_circuit step by step: encode, put means in outside of the circuit, decode, add the error or its mean."""

    def hook(name, layer, x):
        if (name, layer) not in saes:
            return x
        sae, keep = saes[name, layer], circuit[name, layer]
        flat = x.reshape(*x.shape[:2], -1)
        f = encode(sae, flat)
        at_mean = means[name, layer][1] - getattr(sae, "b_dec", 0)  # the rest is the error and b_dec
        error = torch.where(keep[:, -1:], flat - decode(sae, f), at_mean)
        return (decode(sae, torch.where(keep[:, :-1], f, means[name, layer][0])) + error).reshape(x.shape)

    with torch.no_grad():
        return metric(model(tokens, hook=hook)[:, -1], answers)


def units_of(model, kind):
    """{(name, layer): SAE or Neurons} on nodes of several widths."""
    c = model.config
    if kind == "neurons":
        widths = {("mlp_hidden", i): c.d_mlp for i in range(c.n_layers)} | {("attn_out", 1): c.d_model}
        return {key: relp.Neurons(torch.eye(n, dtype=torch.float64)) for key, n in widths.items()}
    keys = [("resid_pre", 0), ("mlp_out", 0), ("z", 1), ("attn_out", 1), ("resid_post", 1), ("mlp_out", 2)]
    made = {}
    for i, key in enumerate(keys):
        d = c.n_heads * c.d_head if key[0] == "z" else c.d_model
        made[key] = random_sae(i, d, jump=kind == "jump", centred=i % 2 == 0)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", *["threshold"] * (kind == "jump")):
            setattr(made[key], name, getattr(made[key], name).double() * 0.3)
    return made


def filled(means, value):
    """A circuit of all units, of none, or (a number between) of that share of them, drawn at random."""
    g = torch.Generator().manual_seed(3)
    return {
        key: torch.rand(len(features), features.shape[1] + 1, generator=g) < value
        for key, (features, _) in means.items()
    }


@pytest.fixture(scope="module", autouse=True)
def all_resamples():
    """As many as users get: intervals are computed by hand here."""
    few, resamples.__defaults__ = resamples.__defaults__, (1000, 0)
    yield
    resamples.__defaults__ = few


@pytest.fixture
def prompts():
    g = torch.Generator().manual_seed(2)
    original, patch = torch.randint(VOCAB, (4, 7), generator=g), torch.randint(VOCAB, (5, 7), generator=g)
    return original, patch, torch.randint(VOCAB, (4, 2), generator=g)


@pytest.mark.parametrize("kind", ["relu", "jump", "neurons"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2", "gemma2"])
def test_circuits_are_their_definition(name, kind, checkpoint, prompts):
    model = models.from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    original, patch, answers = prompts
    saes = units_of(model, kind)
    means = relp.unit_means(model, patch, saes)

    def run_circuit(circuit):
        return relp.run_circuit(model, original, answers, saes, means, circuit)

    full = relp.compare(model, original, original, answers, ())[0]
    whole, empty = (run_circuit(filled(means, value)) for value in (1, 0))
    assert torch.equal(whole, full)  # exactly, so that the faithfulness of everything is 1
    assert relp.faithfulness(whole, full, empty) == 1 and relp.faithfulness(empty, full, empty) == 0

    # nothing but means: features and errors add up to the node's own mean, whatever the SAE
    _, acts = relp.record(model, patch, {node for node, _ in saes})

    def at_mean(node, layer, x):
        return acts[node, layer].mean(0).expand_as(x) if (node, layer) in saes else x

    with torch.no_grad():
        wanted = relp.logit_diff(model(original, hook=at_mean)[:, -1], answers)
    torch.testing.assert_close(empty, wanted, atol=1e-12, rtol=1e-12)

    for share in (0.05, 0.5, 0.95):
        circuit = filled(means, share)
        got = run_circuit(circuit)
        wanted = ablated(model, original, answers, saes, means, circuit)
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
        assert (got - full).abs().max() > 1e-3 and (got - empty).abs().max() > 1e-3
    if kind != "neurons":  # only errors, only features
        for part in (slice(-1, None), slice(0, -1)):
            circuit = filled(means, 0)
            for keep in circuit.values():
                keep[:, part] = True
            got = run_circuit(circuit)
            wanted = ablated(model, original, answers, saes, means, circuit)
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=1e-12)
            assert (got - full).abs().max() > 1e-3 and (got - empty).abs().max() > 1e-3


def test_another_metric(checkpoint, prompts):
    model = models.from_pretrained(str(checkpoint("gemma2")[0]), dtype=torch.float64)
    original, patch, answers = prompts
    saes = units_of(model, "jump")
    means = relp.unit_means(model, patch, saes)
    case = model, original, answers, saes, means, filled(means, 0.5), relp.prob_diff
    torch.testing.assert_close(relp.run_circuit(*case), ablated(*case), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["relu", "jump", "neurons"])
def test_means_of_units(kind, checkpoint, prompts):
    """Prompt by prompt; features are averaged after the nonlinearity, and nothing over positions."""
    model = models.from_pretrained(str(checkpoint("gemma2")[0]), dtype=torch.float64)
    patch, saes = prompts[1], units_of(model, kind)
    got = relp.unit_means(model, patch, saes)
    assert got.keys() == saes.keys()
    for (node, layer), sae in saes.items():
        each = [relp.record(model, row[None], {node})[1][node, layer][0].flatten(1) for row in patch]
        features = sum(encode(sae, x) for x in each) / len(each)
        error = sum(x - decode(sae, encode(sae, x)) for x in each) / len(each)
        wanted = features, error + getattr(sae, "b_dec", 0)
        torch.testing.assert_close(got[node, layer], wanted, atol=1e-12, rtol=1e-12)
        if kind != "neurons":
            assert 0 < (features == 0).sum() < features.numel() and error.abs().max() > 0.1
            assert (encode(sae, sum(each) / len(each)) - features).abs().max() > 1e-3
        else:
            assert (error == 0).all()


def test_faithfulness_is_a_ratio_of_means():
    full, empty = torch.tensor([1.0, 7.0]), torch.tensor([-3.0, -1.0])  # means 4 and -2
    circuits = torch.tensor([[1.0, 1.0], [4.0, 4.0], [-2.0, -2.0], [5.0, 9.0], [-6.0, -4.0]])
    assert relp.faithfulness(circuits, full, empty).tolist() == pytest.approx([0.5, 1, 0, 1.5, -0.5])
    assert relp.faithfulness(full, full, empty) == 1 and relp.faithfulness(empty, full, empty) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def pair(original, patch, answers=(1, 2)):
    return tasks.Pair(original, patch, answers, ("a", "b"), "group")


def test_pairs_of_the_same_prompts_are_drawn_together():
    a, b, c, d, e = ((i, i + 1) for i in range(5))
    pairs = [pair(a, b), pair(b, a, (2, 1)), pair(c, d), pair(a, b, (3, 4)), pair(a, e)]
    weights = circuits.resamples_of_prompts(pairs, seed=1)
    assert weights.shape == (1001, 5) and (weights[0] == 1).all()
    assert torch.equal(weights[:, 0], weights[:, 1]) and torch.equal(weights[:, 0], weights[:, 3])
    families = weights[:, [0, 2, 4]]  # three draws out of three families, with replacement
    assert (families.sum(1) == 3).all() and set(families.unique().tolist()) == {0, 1, 2, 3}
    assert families[1:].mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.1)
    assert families[1:].var(0).tolist() == pytest.approx([2 / 3] * 3, abs=0.1)  # binomial: 3 x 1/3 x 2/3
    assert torch.equal(weights, circuits.resamples_of_prompts(pairs, seed=1))
    assert not torch.equal(weights, circuits.resamples_of_prompts(pairs, seed=2))


def test_curves_at_other_sizes():
    values = torch.tensor([[1.0, 10.0], [0.5, 6.0], [0.0, -2.0]], dtype=torch.float64)
    got = circuits.at_sizes(values, [30, 10, 0], [0, 4, 10, 20, 30, 300])
    low, high = math.log(5) / math.log(11), (math.log(21) - math.log(11)) / (math.log(31) - math.log(11))
    wanted = [[0, -2], [0.5 * low, -2 + 8 * low], [0.5, 6], [0.5 + 0.5 * high, 6 + 4 * high], [1, 10], [1, 10]]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))
    repeated = values[[0, 1, 1, 2, 2]]  # thresholds that keep the same units
    assert torch.equal(circuits.at_sizes(repeated, [30, 10, 10, 0, 0], [0, 4, 10, 20, 30, 300]), got)
    assert circuits.at_sizes(values[:1], [30], [1, 100]).tolist() == [[1, 10], [1, 10]]


def test_an_interval_is_of_the_resamples_only():
    values = torch.cat([torch.tensor([500.0]), torch.arange(1001).flip(0)]).double()
    assert estimate(values) == pytest.approx([500, 25, 975])
    assert estimate(torch.tensor([math.nan, 1.0, 1.0]))[1:] == (1, 1)


def test_json_has_no_nan_in_lists_either():
    nan, inf = math.nan, math.inf
    assert without_nan({"a": [1.0, nan, [inf, "x"]], "b": {"c": [{"d": -inf}]}}) == {
        "a": [1.0, None, [None, "x"]],
        "b": {"c": [{"d": None}]},
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command, in a process of its own

METHODS = {"atp": {}, "relp": {"lrp": True}, "ig": {"steps": 10}}
STRUCTURE = "within_rc"


def read(folder, structure=STRUCTURE):
    files = (folder / f"circuit-{structure}.json", folder / "summary.json")
    return [json.loads(file.read_text(), parse_constant=pytest.fail) for file in files]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(stdout, folder of the results) of the small command, started where no other file of the project is."""
    where = tmp_path_factory.mktemp("command")
    arguments = f"--task sva --pairs 20 --held-out 10 --structures {STRUCTURE} --methods atp,relp,ig --top 4".split()
    done = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", *arguments],
        cwd=where,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in where.iterdir()] == ["results"]
    return done.stdout, where / "results" / "toy-neox-sva"


@pytest.fixture(scope="module")
def toy():
    """model, its SAEs, its tokenizer"""
    model = models.from_pretrained("toy-neox")
    return model, load_saes(str(SAES), model), load_tokenizer("toy-neox")


def tensors(pairs):
    return [torch.tensor([getattr(p, part) for p in pairs]) for part in ("original", "patch", "answers")]


@pytest.fixture(scope="module")
def averages(toy):
    """{method: {(name, layer): [pos, units]}}: relp's scores averaged over the command's discovery pairs."""
    model, saes, tokenizer = toy
    pairs = tensors(tasks.sva(tokenizer, STRUCTURE, 20, 10, seed=0)[0])
    return {
        method: {key: v.mean(0) for key, v in relp.attribute_features(model, *pairs, saes, **options).items()}
        for method, options in METHODS.items()
    }


def test_files(command):
    _, folder = command
    assert {p.name for p in folder.iterdir()} == {
        "summary.json",
        f"circuit-{STRUCTURE}.json",
        "faithfulness.png",
        "circuits.png",
    }
    for picture in folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


def test_the_units_of_a_file_are_those_that_score(command, toy, averages):
    circuit, _ = read(command[1])
    lowest, listed = circuit["thresholds"][0], {}
    for unit in circuit["nodes"]:
        key, pos, i = (unit["node"], unit["layer"]), unit["position"], unit["unit"]
        listed[key, pos, -1 if i == "error" else i] = unit["scores"]
        assert unit["role"] == circuit["roles"][pos]
    assert len(listed) == len(circuit["nodes"]) > 300
    for (key, pos, i), scores in listed.items():
        wanted = {method: float(of_method[key][pos, i]) for method, of_method in averages.items()}
        assert scores == pytest.approx(wanted, abs=1e-5, rel=1e-4)
    strengths = [abs(scores["relp"]) for scores in listed.values()]
    assert strengths == sorted(strengths, reverse=True) and strengths[-1] > lowest
    strong = sum(int((v.abs() > lowest).sum()) for v in averages["relp"].values())
    assert abs(strong - len(listed)) <= 2  # rounding at the threshold
    assert any(i == -1 for *_, i in listed) and {layer for ((_, layer), *_) in listed} == {0, 1, 2, 3}

    assert circuit["structure"] == STRUCTURE and circuit["roles"] == "BOS The N1 that the N2".split()
    original, patch, _ = relp.compare(toy[0], *tensors(tasks.sva(toy[2], STRUCTURE, 20, 10)[0]), ())
    assert circuit["total_effect"] == pytest.approx(abs(float(original.mean() - patch.mean())), rel=1e-5)
    assert circuit["thresholds"] == pytest.approx(circuit["total_effect"] * np.geomspace(1e-4, 1, 15))
    assert circuit["first_layer_judged"] == 1  # a third of four layers


# Which nodes' errors each variant does without: said here again, rather than taken from circuits.VARIANTS
REMOVED_ERRORS = {
    "features": [],
    "no_errors": ["attn_out", "mlp_out", "resid_pre", "resid_post"],
    "no_sublayer_errors": ["attn_out", "mlp_out"],
    "no_resid_errors": ["resid_pre", "resid_post"],
}


def circuit_at(scores, threshold, variant, complement=False):
    chosen = {key: (v.abs() > threshold) ^ complement for key, v in scores.items() if key[1] >= 1}
    for (node, _), c in chosen.items():
        c[:, -1] &= node not in REMOVED_ERRORS[variant]
    return chosen


@pytest.fixture(scope="module")
def raw(command, toy, averages):
    """raw(variant, method) -> sizes, and the metric of each held-out pair.

    The metric: full [n], empty [n], of the circuits and of their complements [thresholds, n].
    """
    (model, saes, tokenizer), kept = toy, {}
    thresholds = read(command[1])[0]["thresholds"]
    original, patch, answers = tensors(tasks.sva(tokenizer, STRUCTURE, 20, 10)[1])
    judged = {key: sae for key, sae in saes.items() if key[1] >= 1}
    means = relp.unit_means(model, patch, judged)
    nothing = {key: torch.zeros(original.shape[1], len(sae.W_dec) + 1, dtype=torch.bool) for key, sae in judged.items()}

    def run_circuit(circuit):
        return ablated(model, original, answers, judged, means, circuit).double()

    def runs(variant, method):
        if (variant, method) not in kept:
            inside = [circuit_at(averages[method], t, variant) for t in thresholds]
            outside = [circuit_at(averages[method], t, variant, complement=True) for t in thresholds]
            kept[variant, method] = (
                [sum(int(c.sum()) for c in circuit.values()) for circuit in inside],
                relp.logit_diff(model(original)[:, -1], answers).detach().double(),
                run_circuit(nothing),
                torch.stack([run_circuit(c) for c in inside]),
                torch.stack([run_circuit(c) for c in outside]),
            )
        return kept[variant, method]

    return runs


CASES = [("features", method) for method in METHODS]
CASES += [(variant, "relp") for variant in ("no_errors", "no_sublayer_errors", "no_resid_errors")]


@pytest.mark.parametrize("variant, method", CASES)
def test_faithfulness_and_completeness_by_hand(variant, method, command, raw):
    """Sizes and curves of the file, from a circuit's definition and runs in which the means are put in step by step."""
    circuit, summary = read(command[1])
    got = circuit["circuits"][variant][method]
    sizes, full, empty, inside, outside = raw(variant, method)
    assert got["sizes"] == pytest.approx(sizes, abs=1)  # a score may round to either side of a threshold
    assert sizes[0] > 200 and got["sizes"] == sorted(got["sizes"], reverse=True)
    scale = full.mean() - empty.mean()
    for name, runs in (("faithfulness", inside), ("completeness", outside)):
        wanted = ((runs.mean(1) - empty.mean()) / scale).tolist()
        assert got[name] == pytest.approx(wanted, abs=2e-3)
        curves = summary["structures"][STRUCTURE]["curves"][variant][method]
        assert [value for value, *_ in curves[name]] == pytest.approx(got[name])
        assert all(low <= high for _, low, high in curves[name])
    if got["sizes"][-1] == 0:
        assert got["faithfulness"][-1] == 0 and (variant != "features" or got["completeness"][-1] == 1)


def test_averages_differences_and_intervals_by_hand(command, raw, toy):
    _, summary = read(command[1])
    weights = circuits.resamples_of_prompts(tasks.sva(toy[2], STRUCTURE, 20, 10)[1], seed=0).numpy()

    def mean_over_sizes(method, of, grid):
        sizes, full, empty, *both = raw("features", method)
        curves = []
        for w in weights:  # the mean of the resampled pairs; their number cancels
            of_full, of_empty, of_runs = (runs.numpy() @ w for runs in (full, empty, both[of]))
            y = (of_runs - of_empty) / (of_full - of_empty)
            curves.append(np.interp(np.log1p(grid), np.log1p(sizes[::-1]), y[::-1]))
        return np.array(curves)

    def interval(values):
        return [values[0], *np.quantile(values[1:], [0.025, 0.975])]

    for of, name in enumerate(("faithfulness", "completeness")):
        mean = {m: mean_over_sizes(m, of, np.geomspace(10, 300, 30)).mean(1) for m in METHODS}
        for method in METHODS:
            got = summary[name]["features"][method]
            assert got["mean"] == pytest.approx(interval(mean[method]), abs=2e-3)
            at = mean_over_sizes(method, of, np.array([10, 30, 100, 300]))
            for j, size in enumerate(("10", "30", "100", "300")):
                assert got["sizes"][size] == pytest.approx(interval(at[:, j]), abs=1e-2)
        assert summary["differences"]["features"].keys() == {"relp - atp", "relp - ig"}
        for other in ("atp", "ig"):
            got = summary["differences"]["features"][f"relp - {other}"][name]
            assert got == pytest.approx(interval(mean["relp"] - mean[other]), abs=2e-3)
            assert got[0] != 0


def test_neuron_circuits_by_hand(command, toy):
    """Sizes from the scores' definition: (x_patch - x_original) times rho, dimension by dimension."""
    circuit, _ = read(command[1])
    model, saes, tokenizer = toy
    discovery = tensors(tasks.sva(tokenizer, STRUCTURE, 20, 10)[0])
    for variant, keys in (("neurons", list(saes)), ("mlp_neurons", [("mlp_hidden", i) for i in range(4)])):
        runs = relp.propagate(model, *discovery, keys, lrp=True)
        scores = {key: ((after - before) * rho).mean(0) for key, (before, after, rho) in runs.items() if key[1] >= 1}
        sizes = [sum(int((v.abs() > t).sum()) for v in scores.values()) for t in circuit["thresholds"]]
        got = circuit["circuits"][variant]["relp"]
        assert got["sizes"] == pytest.approx(sizes, abs=2) and got["sizes"][0] > 300
        assert got["faithfulness"][0] == pytest.approx(1, abs=0.05)


def test_costs(command):
    _, summary = read(command[1])
    cost = summary["structures"][STRUCTURE]["cost"]
    assert {m: (c["forward"], c["backward"]) for m, c in cost.items()} == {
        "atp": (2, 1),
        "relp": (2, 1),
        "ig": (2 + 10 * 13, 10 * 13),
    }
    assert all(c["seconds"] > 0 for c in cost.values()) and cost["ig"]["seconds"] > cost["relp"]["seconds"]


def test_strongest_units_and_what_they_fire_on(command, toy):
    circuit, _ = read(command[1])
    model, saes, tokenizer = toy
    assert len(circuit["strongest"]) == 4
    for unit, same in zip(circuit["strongest"], circuit["nodes"]):
        fires = dict(unit.pop("fires_most_on"))
        assert unit == same
        key, fired = (unit["node"], unit["layer"]), {}
        for p in tasks.sva(tokenizer, STRUCTURE, 20, 10)[1]:
            for prompt in (p.original, p.patch):
                x = relp.record(model, torch.tensor([prompt]), {unit["node"]})[1][key]
                f = encode(saes[key], x)[0, unit["position"]]
                fired[tokenizer.decode(list(prompt[1:]))] = float(f[unit["unit"]])
        most = sorted(fired, key=fired.get, reverse=True)[:3]
        assert fires == pytest.approx({text: fired[text] for text in most if fired[text] > 0}, rel=1e-4)


def test_the_circuit_that_is_drawn(command):
    """The smallest of the main method that reaches a faithfulness of 0.8."""
    circuit, _ = read(command[1])
    drawn, relp_circuits = circuit["drawn"], circuit["circuits"]["features"]["relp"]
    faithful = relp_circuits["faithfulness"]
    k = max(k for k, f in enumerate(faithful) if f >= 0.8)
    assert drawn == {
        "method": "relp",
        "threshold": circuit["thresholds"][k],
        "size": relp_circuits["sizes"][k],
        "faithfulness": faithful[k],
    }


def test_tables_show_the_numbers_of_the_summary(command):
    out, folder = command
    circuit, summary = read(folder)
    lines = out.splitlines()
    for variant, (title, *_) in circuits.VARIANTS.items():
        first = next(i for i, line in enumerate(lines) if line.startswith(f"  {title}  "))
        for line, method in zip(lines[first:], METHODS):
            assert line[28:36].strip() == method_of(method).label
            left, right = line[36:].split("|")
            numbers = [float(x) for x in left.replace("[", " ").replace("]", " ").split()]
            faithful, complete = (summary[name][variant][method] for name in ("faithfulness", "completeness"))
            at = [value for value, *_ in faithful["sizes"].values()]
            assert numbers == pytest.approx([*at, *faithful["mean"]], abs=6e-3)
            at = [value for value, *_ in complete["sizes"].values()]
            assert [float(x) for x in right.split()] == pytest.approx(at, abs=6e-3)
    head = next(line for line in lines if "units from layer 1 on, found by RelP" in line)
    assert f"{circuit['drawn']['size']} units" in head and f"{circuit['drawn']['faithfulness']:.2f}" in head
    rows = lines[lines.index(head) + 2 :][:4]
    for row, unit in zip(rows, circuit["strongest"]):
        wanted = [str(unit["layer"]), unit["node"], str(unit["unit"]), unit["role"]]
        assert row.split()[:7] == wanted + [f"{s:.3f}" for s in unit["scores"].values()]
    assert "WARNING" not in out


# ---------------------------------------------------------------------------------------------------------------------
# Its options, with few pairs and nothing drawn


BASE = ["--pairs", 6, "--held-out", 4, "--structures", "across_pp", "--methods", "relp", "--thresholds", "1e-3,1,5"]


@pytest.fixture
def quick(run, tmp_path):  # noqa: F811
    """quick(*arguments) -> (circuit-across_pp.json, summary.json) of a run that succeeds without a word on stderr."""

    def call(*arguments, folder="toy-neox-sva", structure="across_pp"):
        base = [a for a in BASE if "--prompts" not in arguments or a not in ("--structures", "across_pp")]
        code, _, err = run("--task", "sva", *base, "--no-plot", *arguments)
        assert (code, err) == (0, [])
        assert not list((tmp_path / "out").rglob("*.png"))
        return read(tmp_path / "out" / folder, structure)

    return call


def without_time(summary):
    for structure in summary["structures"].values():
        for cost in structure["cost"].values():
            del cost["seconds"]
    return {key: value for key, value in summary.items() if key != "arguments"}


def units(circuit):
    return {(u["node"], u["layer"], u["position"], u["unit"]): u["scores"]["relp"] for u in circuit["nodes"]}


def test_the_same_command_gives_the_same_numbers(quick):
    runs = [quick("--seed", seed) for seed in (1, 1, 2)]
    assert runs[0][0] == runs[1][0] and without_time(runs[0][1]) == without_time(runs[1][1])
    assert runs[0][0]["total_effect"] != runs[2][0]["total_effect"]


def test_batch_size_does_not_matter(quick):
    (one, a), (other, b) = quick(), quick("--batch-size", 4)
    assert units(one) == pytest.approx(units(other), abs=1e-5, rel=1e-4)
    costs = [summary["structures"]["across_pp"]["cost"]["relp"] for summary in (a, b)]
    assert costs[0]["forward"] == costs[1]["forward"]


def test_positions_summed(quick):
    """A unit's score is the sum over positions, and it is in at all of them or at none. --top lists it once."""
    apart, _ = quick("--thresholds", "1e-9,1,9")
    circuit, _ = quick("--sum-positions", "--top", 5)
    n_pos, sums = len(apart["roles"]), {}
    for (node, layer, _, i), score in units(apart).items():
        sums[node, layer, i] = sums.get((node, layer, i), 0) + score
    got, lowest = units(circuit), circuit["thresholds"][0]
    assert {(node, layer, i) for node, layer, _, i in got} == {u for u, score in sums.items() if abs(score) > lowest}
    assert len(got) == n_pos * len({(node, layer, i) for node, layer, _, i in got})
    for (node, layer, _, i), score in got.items():
        assert score == pytest.approx(sums[node, layer, i], abs=1e-4, rel=1e-3)
    assert all(size % n_pos == 0 for size in circuit["circuits"]["features"]["relp"]["sizes"])
    listed = [(u["node"], u["layer"], u["unit"]) for u in circuit["strongest"]]
    assert listed == sorted(sums, key=lambda u: -abs(sums[u]))[:5] and len(set(listed)) == 5
    assert all(u["role"] == "all" and u["fires_most_on"] for u in circuit["strongest"])


@pytest.mark.parametrize("of", ["held-out", "discovery"])
def test_means(of, quick, toy):
    """Units are ablated to their means over the patch prompts of the held-out or of the discovery pairs."""
    circuit, _ = quick("--means", of)
    model, saes, tokenizer = toy
    discovery, held_out = (tensors(pairs) for pairs in tasks.sva(tokenizer, "across_pp", 6, 4))
    scores = relp.attribute_features(model, *discovery, saes, lrp=True)
    scores = {key: v.mean(0) for key, v in scores.items()}
    judged = {key: sae for key, sae in saes.items() if key[1] >= 1}
    original, patch, answers = held_out
    means = relp.unit_means(model, patch if of == "held-out" else discovery[1], judged)
    chosen = circuit_at(scores, circuit["thresholds"][1], "features")
    full = relp.logit_diff(model(original)[:, -1], answers)
    runs = [ablated(model, original, answers, judged, means, c) for c in (chosen, filled(means, 0))]
    wanted = float(relp.faithfulness(runs[0], full, runs[1]))
    assert circuit["circuits"]["features"]["relp"]["faithfulness"][1] == pytest.approx(wanted, abs=2e-3)


def test_metric_and_thresholds(quick, toy):
    logits, _ = quick()
    circuit, summary = quick("--metric", "prob_diff", "--thresholds", "0.003,0.3,3")
    model, saes, tokenizer = toy
    discovery = tensors(tasks.sva(tokenizer, "across_pp", 6, 4)[0])
    original, patch, _ = relp.compare(model, *discovery, (), relp.prob_diff)
    effect = abs(float(original.mean() - patch.mean()))
    assert circuit["total_effect"] == pytest.approx(effect, rel=1e-5) and effect < 2 < logits["total_effect"]
    assert circuit["thresholds"] == pytest.approx([0.003 * effect, 0.03 * effect, 0.3 * effect])
    assert logits["thresholds"] == pytest.approx(logits["total_effect"] * np.geomspace(1e-3, 1, 5))
    assert len(circuit["circuits"]["features"]["relp"]["sizes"]) == 3
    scores = relp.attribute_features(model, *discovery, saes, relp.prob_diff, lrp=True)
    for (node, layer, pos, i), score in units(circuit).items():
        wanted = scores[node, layer].mean(0)[pos, -1 if i == "error" else i]
        assert score == pytest.approx(float(wanted), abs=1e-6, rel=1e-3)
    found = summary["structures"]["across_pp"]["discovery"]
    assert found["original"] == pytest.approx(float(original.mean()), rel=1e-5)


def test_nodes(quick):
    circuit, _ = quick("--nodes", "attn_out,mlp_out")
    assert {u["node"] for u in circuit["nodes"]} == {"attn_out", "mlp_out"}
    assert circuit["circuits"]["no_errors"] == circuit["circuits"]["no_sublayer_errors"]
    assert circuit["circuits"]["no_resid_errors"] == circuit["circuits"]["features"]


def test_what_is_run(quick, monkeypatch):
    """Every circuit that is run: nested, its complement the rest, no layer of the first third, the variant's errors."""
    ran, run_circuit = [], relp.run_circuit

    def noted(model, tokens, answers, saes, means, circuit, metric):
        ran.append(circuit)
        return run_circuit(model, tokens, answers, saes, means, circuit, metric)

    monkeypatch.setattr(relp, "run_circuit", noted)
    circuit, _ = quick()
    n_layers, ran = 4, iter(ran)
    for variant, of in circuit["circuits"].items():
        sizes = of["relp"]["sizes"]
        assert len(set(sizes)) >= 3 and sizes[0] > 20
        assert not any(c.any() for c in next(ran).values())  # everything ablated
        larger = None
        for size in dict.fromkeys(sizes):  # circuits of equal size are equal, and run once
            now, rest = next(ran), next(ran)
            assert {layer for _, layer in now} == set(range(1, n_layers)) and now.keys() == rest.keys()
            nodes = {"mlp_hidden"} if variant == "mlp_neurons" else {"attn_out", "mlp_out", "resid_post"}
            assert {node for node, _ in now} == nodes
            assert sum(int(c.sum()) for c in now.values()) == size
            for (node, layer), c in now.items():
                assert (c[:, :-1] ^ rest[node, layer][:, :-1]).all()  # each feature is in one of the two
                assert larger is None or not (c & ~larger[node, layer]).any()
                removed = "neurons" not in variant and node in REMOVED_ERRORS[variant]
                either = c[:, -1] ^ rest[node, layer][:, -1]
                assert not (c[:, -1] | rest[node, layer][:, -1]).any() if removed else either.all()
            larger = now
    assert next(ran, None) is None


def test_prompts_from_a_file(quick, toy, tmp_path):
    """Lines as feature-circuits has them. What this tokenizer does not align is skipped; the larger group is taken."""
    nouns, rows = tasks.NOUNS[:20], []
    for (one, many), (other, _) in zip(nouns, nouns[1:] + nouns[:1]):
        texts = f"The {one} near the {other}", f"The {many} near the {other}"
        for (clean, patch), (right, wrong) in ((texts, (" has", " have")), (texts[::-1], (" have", " has"))):
            row = {"clean_prefix": clean, "patch_prefix": patch, "clean_answer": right, "patch_answer": wrong}
            rows.append({**row, "case": "x"})
    good = jsonl(tmp_path / "good.jsonl", *rows)
    rows[3:3] = [
        {**rows[0], "clean_prefix": "The zebra near the car"},  # not a word of the toy's
        {**rows[0], "clean_answer": " remembers"},
        {**rows[0], "clean_prefix": "The athlete", "patch_prefix": "The athletes"},  # another length
    ]
    # without --structures, which a file has no use for
    arguments = ["--prompts", jsonl(tmp_path / "nouns.jsonl", *rows), "--pairs", 10]
    circuit, summary = quick(*arguments, folder="toy-neox-nouns", structure="nouns")
    assert circuit["structure"] == "nouns" and list(summary["structures"]) == ["nouns"]
    # words where they do not change
    assert [r.strip() for r in circuit["roles"][1:]] == ["The", "pos 2", "near", "the", "pos 5"]
    model, saes, tokenizer = toy
    discovery, _ = split(read_pairs(good, tokenizer), 10, 4, 0)
    scores = relp.attribute_features(model, *tensors(discovery), saes, lrp=True)
    assert units(circuit)
    for (node, layer, pos, i), score in units(circuit).items():
        wanted = scores[node, layer].mean(0)[pos, -1 if i == "error" else i]
        assert score == pytest.approx(float(wanted), abs=1e-5, rel=1e-3)


def test_figures_of_several_structures(run, tmp_path):  # noqa: F811
    arguments = ["--structures", "simple,within_rc,across_pp", "--nodes", "attn_out"]
    code, out, err = run("--task", "sva", *BASE, *arguments)
    folder = tmp_path / "out" / "toy-neox-sva"
    assert (code, err) == (0, []) and len(list(folder.glob("circuit-*.json"))) == 3
    assert {p.name for p in folder.glob("*.png")} == {"faithfulness.png", "circuits.png"}
    # the averages are over the structures
    _, summary = read(folder, "simple")
    grid, means = np.geomspace(10, 300, 30), []
    for structure in summary["structures"].values():
        c = structure["curves"]["features"]["relp"]
        sizes, values = np.array(c["sizes"])[::-1], np.array(c["faithfulness"])[::-1, 0]
        means.append(np.interp(np.log1p(grid), np.log1p(sizes), values).mean())
    assert summary["faithfulness"]["features"]["relp"]["mean"][0] == pytest.approx(np.mean(means), abs=1e-9)
    assert len(set(means)) == 3


def test_the_units_that_are_drawn(run, monkeypatch):  # noqa: F811
    """Exactly those that the chosen circuit counts, so none in the layers that are not judged."""
    drawn, draw = [], circuit_figures.circuits

    def noted(title, structures, labels):
        drawn.append((structures, draw(title, structures, labels)))
        return drawn[0][1]

    monkeypatch.setattr(circuit_figures, "circuits", noted)
    code, _, err = run("--task", "sva", *BASE, "--structures", "simple,across_pp")
    assert (code, err) == (0, [])
    (structures, figure), *others = drawn
    assert list(structures) == ["simple", "across_pp"] and not others
    for (name, s), ax in zip(structures.items(), figure.axes):
        scores, threshold = s.features["relp"], s.chosen.threshold
        strong = {
            (key, pos, i): abs(score)
            for key, of_node in scores.items()
            for pos, row in enumerate(of_node.tolist())
            for i, score in enumerate(row)
            if abs(score) > threshold
        }
        judged = {unit: size for unit, size in strong.items() if unit[0][1] >= 1}
        assert s.first_layer == 1 and 20 < len(judged) < len(strong)  # there are some in layer 0
        assert set(s.chosen.units) == judged.keys() and len(s.chosen.units) == len(judged) == s.chosen.size
        sizes = [judged[unit] for unit in s.chosen.units]
        assert sizes == sorted(sizes, reverse=True)

        # what the figure shows: of each node and position the first few, and how many more there are
        cells, wanted, more = {}, Counter(), []
        for key, pos, i in s.chosen.units:
            cells.setdefault((key, pos), []).append("err" if i == scores[key].shape[1] - 1 else str(i))
        for ((node, layer), _), units_there in cells.items():
            shown = units_there[: circuit_figures.PER_CELL]
            wanted.update((f"{layer} {node}", text) for text in shown)
            more += [f"+{len(units_there) - len(shown)}"] * (len(units_there) > len(shown))
        rows = [text.get_text() for text in ax.get_yticklabels()]
        texts = [(rows[round(text.xy[1])], text.get_text()) for text in ax.texts]
        assert Counter(text for text in texts if text[1][0] != "+") == wanted
        assert sorted(text for _, text in texts if text[0] == "+") == sorted(more)
        assert len(ax.collections) + sum(int(text) for text in more) == s.chosen.size
        assert f"{name}: {s.chosen.size} units from layer 1 on" in ax.get_title()


# ---------------------------------------------------------------------------------------------------------------------
# AP of features


def test_ap_of_features(quick, toy):
    """AP's scores are relp.patch_features' averages; its cost, the edited runs; the agreement with it, by hand."""
    circuit, summary = quick("--methods", "ap,relp", "--nodes", "mlp_out", "--thresholds", "1e-4,1,5", "--pairs", 4)
    model, saes, tokenizer = toy
    saes = {key: sae for key, sae in saes.items() if key[0] == "mlp_out"}
    discovery = tensors(tasks.sva(tokenizer, "across_pp", 4, 4)[0])
    each = relp.patch_features(model, *discovery, saes)
    ap = {key: v.mean(0) for key, v in each.items()}
    relps = {key: v.mean(0) for key, v in relp.attribute_features(model, *discovery, saes, lrp=True).items()}
    assert len(circuit["nodes"]) > 50
    for u in circuit["nodes"]:
        key, at = (u["node"], u["layer"]), (u["position"], -1 if u["unit"] == "error" else u["unit"])
        wanted = {"ap": float(ap[key][at]), "relp": float(relps[key][at])}
        assert u["scores"] == pytest.approx(wanted, abs=1e-5, rel=1e-3)

    # an edited run for every feature, and error, that differs; none at the last layer's positions that are not read
    _, acts = relp.record(model, discovery[0], {"mlp_out"})
    _, patch_acts = relp.record(model, discovery[1], {"mlp_out"})
    edited, last = 0, model.config.n_layers - 1
    for (_, layer), sae in saes.items():
        x, y = acts["mlp_out", layer], patch_acts["mlp_out", layer]
        cells = torch.cat([sae.encode(x) != sae.encode(y), (sae.error(x) != sae.error(y)).any(-1, keepdim=True)], -1)
        edited += int((cells[:, -1:] if layer == last else cells).sum())
    cost = summary["structures"]["across_pp"]["cost"]
    assert edited > 500
    assert cost["ap"]["forward"] == pytest.approx(2 + edited / 4) and cost["ap"]["backward"] == 0
    assert (cost["relp"]["forward"], cost["relp"]["backward"]) == (2, 1)

    a, b = (torch.cat([v.flatten() for v in scores.values()]) for scores in (relps, ap))
    there = (a != 0) | (b != 0)
    got = summary["structures"]["across_pp"]["agreement"]["relp"]
    value, low, high = got["all"]["averaged"]
    assert value == pytest.approx(np.corrcoef(a[there], b[there])[0, 1], abs=1e-4) and low <= high
    assert got["mlp_out"] == got["all"]
    assert 0 < int((~there).sum())  # or else it would not matter


def test_ap_by_itself(quick):
    """It scores features only, so that there are no circuits of neurons; everything else is there."""
    circuit, summary = quick("--methods", "ap", "--nodes", "mlp_out", "--pairs", 2)
    assert circuit["drawn"]["method"] == "ap" and list(circuit["circuits"]["features"]) == ["ap"]
    assert not circuit["circuits"]["neurons"] and not summary["faithfulness"]["mlp_neurons"]
    assert summary["differences"] == {} and summary["structures"]["across_pp"]["agreement"] == {}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: exit code 2 and one line on stderr that names what is wrong


@pytest.fixture
def refused(run, tmp_path):  # noqa: F811
    """refused(*arguments) -> the message of a run that must end in exit code 2 and one line, with no file written."""

    def call(*arguments):
        code, _, err = run(*arguments)
        assert code == 2 and len(err) == 1 and err[0].startswith("evaluate.py: error: "), err
        assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
        return err[0]

    return call


@pytest.mark.parametrize("arguments, words", [
    (["--corruption", "s2"], ["--corruption", "no meaning", "sva"]),
    (["--structures", "across_river"], ["structure", "across_river", "across_rc"]),
    (["--structures", ""], ["structure", "''"]),
    (["--means", "median"], ["means", "median", "held-out", "discovery"]),
    (["--held-out", "0"], ["--held-out", "0"]),
    (["--pairs", "0"], ["--pairs", "0"]),
    (["--top", "0"], ["--top", "0"]),
    (["--pairs", "100000"], ["within_rc", "100000", "760 scenes"]),
    (["--held-out", "100000"], ["within_rc", "100000"]),
    (["--thresholds", "1,2"], ["--thresholds", "LOW,HIGH,COUNT", "'1,2'"]),
    (["--thresholds", "0,1,3"], ["--thresholds", "0,1,3"]),
    (["--thresholds", "2,1,3"], ["--thresholds", "2,1,3"]),
    (["--thresholds", "1,inf,3"], ["--thresholds", "1,inf,3"]),
    (["--thresholds", "nan,1,3"], ["--thresholds", "nan,1,3"]),
    (["--thresholds", "0.1,1,0"], ["--thresholds", "0.1,1,0"]),
    (["--thresholds", "0.1,1,2.5"], ["--thresholds", "2.5"]),
    (["--thresholds", "1e6,1e7,3"], ["within_rc", "RelP", "lower --thresholds", "1e+06"]),
    (["--nodes", "z"], ["z", "layer 0", "no SAE"]),
    (["--nodes", "resid_pre"], ["no SAE", "1 to 3"]),
    (["--nodes", "resid_mud"], ["node", "resid_mud"]),
    (["--saes", "no/such/folder"], ["no/such/folder"]),
    (["--model", "toy-gpt2"], ["toy-gpt2", "--saes"]),
    (["--prompts", "missing.jsonl"], ["--structures", "no meaning with --prompts"]),
], ids=label)  # fmt: skip
def test_arguments(arguments, words, refused):
    few = ["--pairs", 2, "--held-out", 2, "--structures", "within_rc", "--methods", "relp"]
    message = refused("--task", "sva", *few, *arguments)
    assert all(word in message for word in words), message


OF_SVA = {"structures": "simple", "held-out": "5", "saes": "x", "means": "discovery", "thresholds": "1,2,3", "top": "3"}


@pytest.mark.parametrize("option, value", [*OF_SVA.items(), ("sum-positions", None)])
def test_options_of_the_other_task(option, value, refused):
    message = refused("--task", "ioi", f"--{option}", *[value] * (value is not None))
    assert f"--{option} has no meaning with --task ioi" in message


@pytest.mark.parametrize("kind", ["width", "layer", "corrupt", "empty"])
def test_saes_that_do_not_fit(kind, refused, tmp_path):
    folder = tmp_path / "saes"
    if kind == "width":
        write_saelens(folder, ("mlp_out", 1), random_sae(0, d=32))
        words = ["W_enc", "32", "128"]
    elif kind == "layer":
        write_saelens(folder, ("mlp_out", 7), random_sae(0, d=128))
        words = ["layer 7", "0..3"]
    elif kind == "corrupt":
        shutil.copytree(SAES, folder)
        file = folder / "blocks.2.hook_mlp_out" / "sae_weights.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        words = ["blocks.2.hook_mlp_out", "sae_weights.safetensors"]
    else:
        folder.mkdir()
        words = ["saes", "no SAEs"]
    message = refused("--task", "sva", "--pairs", 2, "--held-out", 2, "--saes", folder)
    assert all(word in message for word in words), message


ROW = {"clean_prefix": "The athlete", "patch_prefix": "The athletes", "clean_answer": " has", "patch_answer": " have"}


EVERY_ANSWER = [
    {**ROW, "clean_answer": f" {a}", "patch_answer": f" {b}"} for a, b in tasks.AUXILIARIES + tasks.VERBS[:5]
]


@pytest.mark.parametrize("rows, words", [
    ([ROW, {**ROW, "clean_prefix": "The zebra"}, {**ROW, "clean_answer": " xylophones"}], ["4 pairs", "has 1"]),
    ([{**ROW, "clean_prefix": "The zebra"}], ["none of its 1 lines"]),
    ([ROW, {"clean_prefix": "The"}], ["line 2", "patch"]),
    (EVERY_ANSWER, ["too many", "share no prompt"]),
], ids=["aligned", "none aligned", "fields", "one family"])  # fmt: skip
def test_prompt_files(rows, words, refused, tmp_path):
    file = jsonl(tmp_path / "bad.jsonl", *rows)
    message = refused("--task", "sva", "--prompts", file, "--pairs", 2, "--held-out", 2, "--methods", "relp")
    assert all(word in message for word in words), message


def test_output_folders_that_cannot_be(capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert evaluate.main(["--task", "sva", "--out", str(tmp_path / "file")]) == 2
    printed, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "cannot write" in err and printed == ""
    assert (tmp_path / "file").read_text() == "precious"


def test_tables_with_long_names_stay_in_their_columns(run):  # noqa: F811
    few = ["--structures", "simple", "--pairs", 3, "--held-out", 3, "--thresholds", "1e-3,1e-1,2", "--no-plot"]
    code, out, err = run("--task", "sva", "--methods", "ap,relp,twopoint,ln+identity", *few)
    assert (code, err) == (0, [])
    lines = out.splitlines()
    (head,) = (line for line in lines if "layer node" in line)
    assert head.split()[-4:] == ["AP", "RelP", "two-point", "ln+identity"]
    (first,) = (i for i, line in enumerate(lines) if "circuits of so many units" in line)
    rows = [line for line in lines[first:] if "[" in line]
    assert len(rows) > 20 and len({line.index("[") for line in rows}) == 1
    assert any(line[28:].startswith("ln+identity ") for line in rows)
