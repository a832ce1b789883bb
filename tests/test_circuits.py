"""Circuits: mean ablation against its definition, the statistics recomputed by hand, and what --task sva writes.

The command runs on the toy GPT-NeoX model and its SAEs, with few prompts.
"""
# ruff: noqa: F811 (fixtures that are imported)

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCAB
from test_evaluate import jsonl, run  # noqa: F401, the fixture
from test_saes import random_sae

import models
import relp
import tasks
from beyond import twopoint
from support import circuits, figures, tables
from support.circuits import Found, Runs, Structure
from support.prompts import read_pairs, split, tensors
from support.results import without_nan
from support.saes import load_saes
from support.statistics import resamples
from support.tokenizer import load_tokenizer

SAES = Path(__file__).parents[1] / "toy" / "saes" / "neox"

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

    full = relp.read_out(model, model.stream(original), answers).detach()
    whole, empty = (run_circuit(filled(means, value)) for value in (1, 0))
    assert torch.equal(whole, full)  # exactly, so that the faithfulness of everything is 1
    assert relp.faithfulness(whole, full, empty) == 1 and relp.faithfulness(empty, full, empty) == 0

    # nothing but means: features and errors add up to the node's own mean, whatever the SAE
    _, acts = relp.record(model, patch, {node for node, _ in saes})

    def at_mean(node, layer, x):
        return acts[node, layer].mean(0).view(x.shape[1:]).expand_as(x) if (node, layer) in saes else x

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


def test_json_has_no_nan_in_lists_either():
    nan, inf = math.nan, math.inf
    assert without_nan({"a": [1.0, nan, [inf, "x"]], "b": {"c": [{"d": -inf}]}}) == {
        "a": [1.0, None, [None, "x"]],
        "b": {"c": [{"d": None}]},
    }


METHODS = ["ap", "atp", "relp", "ig"]


@pytest.fixture
def structures():
    """Two structures with random runs and scores; the sizes of circuits repeat, and end at 0."""
    g, made = torch.Generator().manual_seed(0), {}
    for name, first in (("one", 1), ("other", 0)):
        pairs = [pair((i // 2, 9), (i // 2, 8)) for i in range(12)]  # each of six pairs twice
        full, empty = (torch.randn(12, generator=g, dtype=torch.float64) for _ in range(2))
        runs = {}
        for variant in circuits.VARIANTS:
            of = runs[variant] = {}
            for i, method in enumerate(METHODS):
                values = (torch.rand(6, 12, generator=g, dtype=torch.float64) * 5 for _ in range(2))
                of[method] = Runs([400 + i, 120, 30, 30, 4, 0], *values, empty - 5)
        shapes = {("attn_out", 0): (2, 7), ("mlp_out", 1): (2, 5), ("resid_post", 1): (2, 40)}
        scores = {m: {key: torch.rand(shape, generator=g) - 0.5 for key, shape in shapes.items()} for m in METHODS}
        cost = {m: {"forward": 2 + i, "backward": i, "seconds": 0.5 * i} for i, m in enumerate(METHODS)}
        each = {
            m: {key: x + 0.2 * torch.rand(12, *x.shape, generator=g) for key, x in of.items()}
            for m, of in scores.items()
        }
        s = made[name] = Structure(
            held_out=pairs,
            roles=["N1", "V"],
            found=Found({"features": scores}, cost, circuits.agreement_of_units(each, pairs, 0)),
            accuracy={"original": 1.0, "patch": 0.9},
            discovery={"original": 2.5, "patch": -1.5},
            total_effect=4.0,
            thresholds=[0.01, 0.1, 0.2, 0.3, 0.4, 0.45],
            full=full + 5,
            first_layer=first,
            runs=runs,
        )
        s.chosen = circuits.choose(s)
        units = circuits.ranked(s.features[s.main])[:4]
        s.strongest = [circuits.describe(unit, s) | {"fires_most_on": [["The dogs", 3.25]]} for unit in units]
    return made


def ratio(runs, full, empty, w):
    """Faithfulness of one circuit for one resample; the number of pairs cancels."""
    of_run, of_full, of_empty = (float((x * w).sum()) for x in (runs, full, empty))
    return (of_run - of_empty) / (of_full - of_empty)


def test_averages_differences_and_intervals_by_hand(structures):
    summary = circuits.summarise(structures, seed=3)
    weights = {name: circuits.resamples_of_prompts(s.held_out, 3)[:40] for name, s in structures.items()}
    measures = {"faithfulness": "circuit", "completeness": "complement"}

    def curves(s, name, variant, method, measure):  # [weights, thresholds]
        runs = s.runs[variant][method]
        left = getattr(runs, measures[measure])
        return np.array([[ratio(x, s.full, runs.empty, w) for x in left] for w in weights[name]])

    for variant in circuits.VARIANTS:
        for measure in measures:
            of_methods = {}
            for method in METHODS:
                each = []
                for name, s in structures.items():
                    values = curves(s, name, variant, method, measure)
                    got = summary["structures"][name]["curves"][variant][method]
                    assert got["sizes"] == s.runs[variant][method].sizes
                    assert [e.value for e in got[measure]] == pytest.approx(values[0])
                    x = np.log1p(np.array(got["sizes"])[[5, 4, 2, 1, 0]])  # equal sizes are one circuit
                    grid = np.log1p([*np.geomspace(10, 300, 30), 10, 30, 100, 300])
                    each.append([np.interp(grid, x, row[[5, 4, 2, 1, 0]]) for row in values])
                of_methods[method] = np.mean(each, axis=0)
                got = summary[measure][variant][method]
                assert got["mean"].value == pytest.approx(of_methods[method][0, :30].mean())
                at = [got["sizes"][size].value for size in (10, 30, 100, 300)]
                assert at == pytest.approx(of_methods[method][0, 30:])
            for other in ("atp", "ig"):
                got = summary["differences"][variant][f"relp - {other}"][measure]
                assert got.value == pytest.approx(float((of_methods["relp"] - of_methods[other])[0, :30].mean()))
                assert got.low < got.value < got.high
            assert summary["differences"][variant].keys() == {"relp - atp", "relp - ig"}

    # intervals, of the same resamples
    s = structures["one"]
    weights = {"one": circuits.resamples_of_prompts(s.held_out, 3)}
    values = curves(s, "one", "features", "atp", "faithfulness")[:, 1]
    got = summary["structures"]["one"]["curves"]["features"]["atp"]["faithfulness"][1]
    assert got == pytest.approx((values[0], *np.quantile(values[1:], [0.025, 0.975])))


def test_agreement_with_ap_by_hand(structures):
    """Over the units that some method scores."""
    g, pairs = torch.Generator().manual_seed(1), structures["one"].held_out
    scores = {m: {("z", i): torch.randn(12, 2, 3, generator=g) for i in range(2)} for m in ("ap", "relp", "atp")}
    for of in scores.values():
        of["z", 1][:, 0] = 0  # no method scores these three units
    scores["relp"]["z", 0][:, 1] = 0  # AP does score these
    got = circuits.agreement_of_units(scores, pairs, 0)
    keep = [0, 1, 2, 3, 4, 5, 9, 10, 11]
    flat = {m: torch.cat([x.flatten(1) for x in of.values()], 1)[:, keep].mean(0) for m, of in scores.items()}
    assert got.keys() == {"relp", "atp"}
    for method, of in got.items():
        s, a = flat[method].double(), flat["ap"].double()
        assert (
            of["averaged"].value == pytest.approx(np.corrcoef(s, a)[0, 1]) and of["averaged"].low < of["averaged"].high
        )
        assert of["slope"].value == pytest.approx(float(s @ a / (a @ a)))
    ranks = [[sorted(x).index(v) for v in x] for x in (flat["atp"].tolist(), flat["ap"].tolist())]
    assert got["atp"]["rank"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_the_circuit_that_is_drawn(structures):
    """The smallest of the main method that reaches a faithfulness of 0.8, with its units in the judged layers."""
    s = structures["one"]
    runs = s.runs["features"]["relp"]
    target = float(runs.empty.mean() + 0.9 * (s.full.mean() - runs.empty.mean()))
    for faithful, k in (([1, 1, 1, 0, 1, 0], 4), ([1, 1, 0, 0, 0, 0], 1), ([0] * 6, 0)):
        rows = torch.tensor([[target if yes else 0.0] * 12 for yes in faithful], dtype=torch.float64)
        s.runs["features"]["relp"] = runs._replace(circuit=rows)
        chosen = circuits.choose(s)
        threshold = s.thresholds[k]
        assert (chosen["method"], chosen["threshold"], chosen["size"]) == ("relp", threshold, runs.sizes[k])
        assert chosen["faithfulness"] == pytest.approx(0.9 if faithful[k] else chosen["faithfulness"])
    del s.found.scores["features"]["relp"]
    assert s.main == "atp"


# ---------------------------------------------------------------------------------------------------------------------
# Tables and figures

LABELS = {"ap": "AP", "atp": "AtP", "relp": "RelP", "ig": "IG"}


def numbers(text):
    return [float(x) for x in text.replace("[", " ").replace("]", " ").split()]


def test_tables_show_the_numbers_of_the_summary(structures, capsys):
    s, summary = structures["one"], circuits.summarise(structures, 0)
    tables.print_structure("one", s, LABELS, "logit_diff")
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    assert "right on 100% of the original and 90% of the patch prompts; mean logit_diff +2.500 and -1.500" in text
    assert (
        f"{s.chosen['size']} units from layer 1 on have a" in text
        and "strongest by RelP:" in text
        and "WARNING" not in text
    )
    rows = [line for line in lines if "'The dogs' 3.2" in line]
    for row, unit in zip(rows, s.strongest, strict=True):
        assert row.split()[:4] == [str(unit["layer"]), unit["node"], str(unit["unit"]), unit["role"]]
        assert row.split()[4:8] == [f"{x:.3f}" for x in unit["scores"].values()]

    methods = [SimpleNamespace(name=name, label=label) for name, label in LABELS.items()]
    tables.print_circuits(summary, methods)
    lines = capsys.readouterr().out.splitlines()
    costs = [line for line in lines if line.startswith("  RelP  ")][0]
    of = [structure["agreement"]["relp"] for structure in summary["structures"].values()]
    wanted = [np.mean([x["averaged"].value for x in of]), np.mean([x["rank"] for x in of])]
    assert numbers(costs[6:]) == pytest.approx([4, 2, 1.0, *wanted, np.mean([x["slope"].value for x in of])], abs=6e-4)
    for measure in circuits.MEASURES:
        first = next(i for i, line in enumerate(lines) if line.startswith(f"  {measure}, circuits"))
        rest = iter(lines[first + 1 :])
        for variant, (title, *_) in circuits.VARIANTS.items():
            assert next(rest) == f"  {title}"
            for method, label in LABELS.items():
                row, got = next(rest), summary[measure][variant][method]
                assert row.startswith(f"  {label}  ")
                wanted = [*(round(x.value, 2) for x in got["sizes"].values()), *got["mean"]]
                assert numbers(row[6:]) == pytest.approx(wanted, abs=6e-4)
            for other in ("atp", "ig"):
                row, got = next(rest), summary["differences"][variant][f"relp - {other}"][measure]
                assert row.startswith(f"  RelP - {LABELS[other]}  ")
                assert numbers(row[12:]) == pytest.approx(list(got), abs=6e-4)


def test_tables_with_long_names_are_not_wide(structures, capsys):
    labels = {name: f"{label}, ln+identity+half+ah+epsilon=1e-4" for name, label in LABELS.items()}
    structures["one"].strongest[0]["fires_most_on"] = [["The lawyers " * 9, 3.0]]
    tables.print_structure("one", structures["one"], labels, "logit_diff")
    methods = [SimpleNamespace(name=name, label=label) for name, label in labels.items()]
    tables.print_circuits(circuits.summarise(structures, 0), methods)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_faithfulness_figure(structures):
    summary = circuits.summarise(structures, 0)
    figure = figures.faithfulness("toy", structures, LABELS, "logit_diff", 0, summary)
    *panels, leads = figure.axes
    variant = next(iter(circuits.VARIANTS))
    for ax, measure in zip(panels, circuits.MEASURES, strict=True):
        assert ax.get_title() == f"{measure}: {circuits.VARIANTS[variant].label}"
        faint = iter([line for line in ax.lines if line.get_alpha() == 0.25])
        bold = iter([line for line in ax.lines if line.get_linewidth() == 2])
        for method in METHODS:
            each = []
            for s in structures.values():
                values = circuits.curve(s, variant, method, measure, torch.ones(1, 12, dtype=torch.float64))
                assert next(faint).get_ydata() == pytest.approx(values[:, 0].numpy())
                each.append((values, s.runs[variant][method].sizes))
            line = next(bold)
            mean = np.mean([circuits.at_sizes(*of, line.get_xdata())[:, 0].numpy() for of in each], axis=0)
            assert line.get_ydata() == pytest.approx(mean) and line.get_color() == figures.COLORS[method]
    shown = [
        (name.get_text(), box.lines[0].get_xdata()[0]) for name, box in zip(leads.get_yticklabels(), leads.containers)
    ]
    wanted = [
        (f"{circuits.VARIANTS[v].label}: {LABELS[other]}", of["faithfulness"].value)
        for v, pairs in summary["differences"].items()
        for other, of in ((pair.removeprefix("relp - "), of) for pair, of in pairs.items())
    ]
    assert shown == [(name, pytest.approx(value)) for name, value in wanted] and len(shown) == 8


# ---------------------------------------------------------------------------------------------------------------------
# The command

OPTIONS = {"atp": {}, "relp": {"lrp": True}, "ig": {"steps": 10}}
STRUCTURE = "within_rc"


def read(folder, structure=STRUCTURE):
    files = (folder / f"circuit-{structure}.json", folder / "summary.json")
    return [json.loads(file.read_text(), parse_constant=pytest.fail) for file in files]


@pytest.fixture(scope="module")
def toy():
    """model, its SAEs, its tokenizer"""
    model = models.from_pretrained("toy-neox")
    return model, load_saes(str(SAES), model), load_tokenizer("toy-neox")


@pytest.fixture
def quick(run, tmp_path):
    """quick(*arguments) -> (circuit-<structure>.json, summary.json) of a run that ends well."""

    def call(*arguments, structure=STRUCTURE):
        base = ["--pairs", 20, "--held-out", 10, "--thresholds", "1e-3,1,9", "--no-plot"]
        base += [] if "--prompts" in arguments else ["--structures", structure]
        code, _, err = run("--task", "sva", *base, *arguments)
        assert (code, err) == (0, [])
        (folder,) = (tmp_path / "out").glob("toy-neox-*")
        return read(folder, structure)

    return call


def circuit_at(scores, threshold, variant, complement=False):
    """{key: bool [pos, units]} of the judged layers; errors are in neither part if the variant has none."""
    chosen = {key: (v.abs() > threshold) ^ complement for key, v in scores.items() if key[1] >= 1}
    for c in chosen.values():
        c[:, -1] &= variant == "features"
    return chosen


def test_circuits_by_hand(quick, toy):
    """Units, sizes and curves of the files, from the definitions; the units' texts; what the methods cost."""
    circuit, summary = quick("--methods", "atp,relp,ig", "--top", 4)
    (model, saes, tokenizer), structure = toy, summary["structures"][STRUCTURE]
    discovery, held_out = tasks.sva(tokenizer, STRUCTURE, 20, 10)
    of_methods = {
        method: {k: v.mean(0) for k, v in relp.attribute_features(model, *tensors(discovery), saes, **options).items()}
        for method, options in OPTIONS.items()
    }

    # the units of the file
    lowest, listed = circuit["thresholds"][0], {}
    for unit in circuit["nodes"]:
        listed[(unit["node"], unit["layer"]), unit["position"], unit["unit"]] = unit["scores"]
        assert unit["role"] == circuit["roles"][unit["position"]]
    assert len(listed) == len(circuit["nodes"]) > 100
    for (key, pos, i), scores in listed.items():
        wanted = {m: float(of[key][pos, -1 if i == "error" else i]) for m, of in of_methods.items()}
        assert scores == pytest.approx(wanted, abs=1e-5, rel=1e-4)
    strengths = [abs(scores["relp"]) for scores in listed.values()]
    assert strengths == sorted(strengths, reverse=True) and strengths[-1] > lowest
    strong = sum(int((v.abs() > lowest).sum()) for v in of_methods["relp"].values())
    assert abs(strong - len(listed)) <= 2  # rounding at the threshold
    values = [float(relp.logit_diff(model(x)[:, -1], tensors(discovery)[2]).mean()) for x in tensors(discovery)[:2]]
    assert circuit["total_effect"] == pytest.approx(abs(values[0] - values[1]), rel=1e-5)
    assert circuit["thresholds"] == pytest.approx(circuit["total_effect"] * np.geomspace(1e-3, 1, 9))
    assert circuit["first_layer_judged"] == 1  # a third of four layers

    # sizes and curves
    original, patch, answers = tensors(held_out)
    judged = {key: sae for key, sae in saes.items() if key[1] >= 1}
    means = relp.unit_means(model, patch, judged)
    full = relp.logit_diff(model(original)[:, -1], answers).detach()
    empty = ablated(model, original, answers, judged, means, filled(means, 0))
    for variant in ("features", "no_errors"):
        got = structure["curves"][variant]["relp"]
        for k, threshold in enumerate(circuit["thresholds"]):
            inside, outside = (circuit_at(of_methods["relp"], threshold, variant, part) for part in (False, True))
            assert got["sizes"][k] == pytest.approx(sum(int(c.sum()) for c in inside.values()), abs=1)
            for measure, of in (("faithfulness", inside), ("completeness", outside)):
                value = ablated(model, original, answers, judged, means, of)
                wanted = float((value.mean() - empty.mean()) / (full.mean() - empty.mean()))
                assert got[measure][k][0] == pytest.approx(wanted, abs=2e-3)
    drawn, of_relp = circuit["smallest_faithful"], structure["curves"]["features"]["relp"]
    k = max(k for k, (value, *_) in enumerate(of_relp["faithfulness"]) if value >= 0.8)
    assert (drawn["method"], drawn["size"]) == ("relp", of_relp["sizes"][k])

    # the strongest units, and what they fire on
    assert [{k: v for k, v in unit.items() if k != "fires_most_on"} for unit in circuit["strongest"]] == circuit[
        "nodes"
    ][:4]
    for unit in circuit["strongest"]:
        key, fired = (unit["node"], unit["layer"]), {}
        for prompt in {prompt for p in held_out for prompt in (p.original, p.patch)}:
            x = relp.record(model, torch.tensor([prompt]), {unit["node"]})[1][key].flatten(2)
            f = encode(saes[key], x)[0, unit["position"]]
            fired[tokenizer.decode(list(prompt[1:]))] = float(f[unit["unit"]])
        most = sorted(fired, key=fired.get, reverse=True)[:3]
        assert dict(unit["fires_most_on"]) == pytest.approx({text: fired[text] for text in most}, rel=1e-4)

    assert (structure["cost"]["relp"]["forward"], structure["cost"]["relp"]["backward"]) == (2, 1)
    assert structure["cost"]["ig"]["backward"] >= 10 * len(saes) and structure["agreement"] == {}


def test_neuron_circuits_by_hand(quick, toy):
    """Sizes from the scores' definition: (x_patch - x_original) times rho, dimension by dimension."""
    circuit, summary = quick("--methods", "relp")
    model, saes, tokenizer = toy
    discovery = tensors(tasks.sva(tokenizer, STRUCTURE, 20, 10)[0])
    for variant, keys in (("neurons", list(saes)), ("mlp_neurons", [("mlp_hidden", i) for i in range(4)])):
        acts, patch_acts, rho = relp.activations_and_rho(model, *discovery, {node for node, _ in keys}, lrp=True)
        scores = [((patch_acts[key] - acts[key]) * rho[key]).mean(0) for key in keys if key[1] >= 1]
        sizes = [sum(int((v.abs() > t).sum()) for v in scores) for t in circuit["thresholds"]]
        got = summary["structures"][STRUCTURE]["curves"][variant]["relp"]
        assert got["sizes"] == pytest.approx(sizes, abs=2) and got["sizes"][0] > 100


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
    file = jsonl(tmp_path / "nouns.jsonl", *rows)
    circuit, summary = quick("--prompts", file, "--pairs", 10, "--held-out", 4, "--methods", "relp", structure="nouns")
    assert circuit["structure"] == "nouns" and list(summary["structures"]) == ["nouns"]
    assert [r.strip() for r in circuit["roles"][1:]] == ["The", "pos 2", "near", "the", "pos 5"]
    model, saes, tokenizer = toy
    discovery, _ = split(read_pairs(good, tokenizer), 10, 4, 0)
    scores = relp.attribute_features(model, *tensors(discovery), saes, lrp=True)
    assert circuit["nodes"]
    for u in circuit["nodes"]:
        wanted = scores[u["node"], u["layer"]].mean(0)[u["position"], -1 if u["unit"] == "error" else u["unit"]]
        assert u["scores"]["relp"] == pytest.approx(float(wanted), abs=1e-5, rel=1e-3)


def test_ap_of_features(quick, toy):
    """AP's scores are those of the plain loop: a run for each unit with that unit as in the patch run."""
    arguments = ["--methods", "ap,relp", "--nodes", "mlp_out", "--pairs", 3, "--held-out", 3]
    circuit, summary = quick(*arguments, structure="simple")
    model, saes, tokenizer = toy
    original, patch, answers = tensors(tasks.sva(tokenizer, "simple", 3, 3)[0])
    (_, acts), (_, patch_acts) = (relp.record(model, tokens, {"mlp_out"}) for tokens in (original, patch))
    base = relp.logit_diff(model(original)[:, -1], answers).detach()
    strongest = sorted(circuit["nodes"], key=lambda u: -abs(u["scores"]["ap"]))
    for u in strongest[:5] + strongest[-5:]:
        key, pos = (u["node"], u["layer"]), u["position"]
        sae, x, y = saes[key], acts[key].flatten(2)[:, pos], patch_acts[key].flatten(2)[:, pos]
        if u["unit"] == "error":
            move = sae.error(y) - sae.error(x)
        else:
            move = (sae.encode(y) - sae.encode(x))[:, u["unit"], None] * sae.W_dec[u["unit"]]

        def hook(name, layer, value, key=key, pos=pos, move=move):
            if (name, layer) == key:
                value = value.clone()
                value[:, pos] += move
            return value

        with torch.no_grad():
            wanted = (relp.logit_diff(model(original, hook=hook)[:, -1], answers) - base).mean()
        assert u["scores"]["ap"] == pytest.approx(float(wanted), abs=1e-4, rel=1e-3)
    of = summary["structures"]["simple"]
    assert of["cost"]["ap"]["forward"] > 50 and of["agreement"]["relp"]["averaged"][0] > 0.3
    assert not of["curves"]["neurons"].keys() & {"ap"}  # AP scores features only


def test_without_saes_units_are_neurons(run, tmp_path):
    """Scores of MLP neurons, AP's and two-point's among them; the listed one is what a hook finds by hand."""
    given = [
        "--model",
        "toy-qwen2",
        "--pairs",
        4,
        "--held-out",
        4,
        "--thresholds",
        "1e-3,1,3",
        "--structures",
        "simple",
    ]
    code, out, err = run("--task", "sva", *given, "--methods", "ap,relp,twopoint", "--no-plot")
    assert (code, err) == (0, []) and "units are neurons only; --saes names some" in out
    circuit, summary = read(tmp_path / "out" / "toy-qwen2-sva", "simple")
    assert summary["faithfulness"].keys() == {"neurons", "mlp_neurons"}
    drawn, of = circuit["smallest_faithful"], summary["structures"]["simple"]["curves"]["mlp_neurons"]["relp"]
    k = summary["structures"]["simple"]["thresholds"].index(drawn["threshold"])
    assert drawn["method"] == "relp" and drawn["size"] == of["sizes"][k]

    model, tokenizer = models.from_pretrained("toy-qwen2"), load_tokenizer("toy-qwen2")
    discovery, _ = tasks.sva(tokenizer, "simple", 4, 4)
    original, patch, targets = tensors(discovery)
    first = circuit["strongest"][0]
    assert first["node"] == "mlp_hidden" and first["scores"].keys() == {"ap", "relp", "twopoint"}
    acts = relp.record(model, patch, {"mlp_hidden"})[1]["mlp_hidden", first["layer"]].squeeze(2)

    def hook(name, layer, x):
        if (name, layer) != ("mlp_hidden", first["layer"]):
            return x
        x = x.clone()
        x[:, first["position"], first["unit"]] = acts[:, first["position"], first["unit"]]
        return x

    value = relp.logit_diff(model(original, hook=hook)[:, -1], targets) - relp.logit_diff(
        model(original)[:, -1], targets
    )
    assert first["scores"]["ap"] == pytest.approx(float(value.mean()), rel=1e-4)
    found = twopoint.activations_and_rho(model, original, patch, targets, {"mlp_hidden"})
    acts, patch_acts, rho = (of["mlp_hidden", first["layer"]].squeeze(2) for of in found)
    by_hand = ((patch_acts - acts) * rho).mean(0)[first["position"], first["unit"]]
    assert first["scores"]["twopoint"] == pytest.approx(float(by_hand), rel=1e-4)


def test_best_is_a_mean_of_the_scores_of_units(toy, run, tmp_path):
    given = [
        "--task",
        "sva",
        "--pairs",
        4,
        "--held-out",
        4,
        "--structures",
        "simple",
        "--thresholds",
        "1e-3,1,2",
        "--no-plot",
    ]
    code, _, err = run(*given, "--methods", "relp,twopoint,best")
    assert (code, err) == (0, [])
    circuit, summary = read(tmp_path / "out" / "toy-neox-sva", "simple")
    scores = [unit["scores"] for unit in circuit["nodes"]]
    assert len(scores) > 20
    for of in scores:
        assert of["best"] == pytest.approx(0.6 * of["relp"] + 0.4 * of["twopoint"], abs=1e-5)
    cost = summary["structures"]["simple"]["cost"]["best"]
    assert (cost["forward"], cost["backward"]) == (4, 2)
