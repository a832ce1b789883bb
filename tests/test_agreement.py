"""support.statistics: its measures by their definitions, written out cell by cell, and the bootstrap by resampling."""

import math
import time

import numpy as np
import pytest
import torch

import relp
from support import statistics
from support.statistics import Estimate, agreement, agreements, estimate, ranks, resamples

MEASURES = {"averaged", "pooled", "per_prompt", "slope"}


def corr(x, y):
    x, y = np.asarray(x), np.asarray(y)
    varied = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(np.corrcoef(x, y)[0, 1]) if varied else math.nan


def averaged_by_hand(scores, ap, groups):
    """The cells of the averaged maps: lists of a method's scores, of AP's, and of where they are."""
    s, a, where = [], [], []
    for group in dict.fromkeys(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        for at in np.ndindex(ap.shape[1:]):
            if not any(np.isnan(ap[i][at]) for i in rows):
                s.append(sum(scores[i][at] for i in rows) / len(rows))
                a.append(sum(ap[i][at] for i in rows) / len(rows))
                where.append((group, *at))
    return s, a, where


def by_hand(scores, ap, groups):
    scores, ap = scores.double().numpy(), ap.double().numpy()
    s, a, _ = averaged_by_hand(scores, ap, groups)
    there = ~np.isnan(ap)
    each = [corr(x[k], y[k]) for x, y, k in zip(scores, ap, there)]
    return {
        "averaged": corr(s, a),
        "pooled": corr(scores[there], ap[there]),
        "per_prompt": np.mean([r for r in each if not math.isnan(r)]),
        "slope": sum(x * y for x, y in zip(s, a)) / sum(y * y for y in a),
    }


def rank_by_hand(x):
    """1 + how many are smaller, and half of how many others are equal."""
    return [sum(other < value for other in x) + (sum(other == value for other in x) + 1) / 2 for value in x]


def draw(seed=0, n=9, shape=(3, 5)):
    """Scores and AP of n prompts in groups of one, of three and of the others, which are shorter; zeros first."""
    g = torch.Generator().manual_seed(seed)
    ap, noise = torch.randn(2, n, *shape, generator=g, dtype=torch.float64)
    scores = 0.5 * ap + 0.4 * noise + 0.3
    groups = ["one"] + ["three"] * 3 + ["many"] * (n - 4)
    for x in (scores, ap):
        x[:, :, 0] = 0  # nothing has changed yet: ties
        x[4:, :, 4:] = torch.nan  # beyond the prompt
    order = torch.randperm(n, generator=g).tolist()
    return scores[order], ap[order], [groups[i] for i in order]


@pytest.mark.parametrize("shape", [(3, 5), (2, 5, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_measures_are_their_definitions(seed, shape):
    scores, ap, groups = draw(seed, shape=shape)
    got = agreement(scores.float(), ap.float(), groups)
    assert got.keys() == MEASURES and all(x.shape == (1,) and x.dtype == torch.float64 for x in got.values())
    wanted = by_hand(scores.float(), ap.float(), groups)
    assert {name: float(x) for name, x in got.items()} == pytest.approx(wanted, abs=1e-12)


def test_a_resample_is_the_drawn_prompts():
    """Weights give what the prompts give when they are written out as often as they were drawn."""
    scores, ap, groups = draw(3)
    groups[groups.index("three")] = "another"  # two groups of one prompt: a resample may lack one of them
    weights = resamples(groups, B=60)
    got = agreement(scores, ap, groups, weights)
    lacking = 0
    for b, w in enumerate(weights):
        rows = [i for i, times in enumerate(w.int().tolist()) for _ in range(times)]
        lacking += len({groups[i] for i in rows}) < 4
        wanted = by_hand(scores[rows], ap[rows], [groups[i] for i in rows])
        assert {name: float(x[b]) for name, x in got.items()} == pytest.approx(wanted, abs=1e-12)
    assert lacking > 5 and all(x.shape == (61,) and len(x.unique()) > 3 for x in got.values())


def test_small_differences_of_large_scores():
    """Sums of squares lose digits: not more than the definition does, computed in the same precision."""
    scores, ap, groups = draw(1, n=30)
    got = agreement(scores + 1000, ap + 1000, groups, resamples(groups, B=5))
    wanted = agreement(scores, ap, groups, resamples(groups, B=5))
    for name in ("averaged", "pooled", "per_prompt"):
        torch.testing.assert_close(got[name], wanted[name], atol=1e-7, rtol=0)


def test_the_unit_of_the_metric_does_not_matter():
    scores, ap, groups = draw(1)
    wanted = agreement(scores, ap, groups)
    for unit in (1e-9, 1e9):
        got = agreement(scores * unit, ap * unit, groups)
        assert {name: float(x) for name, x in got.items()} == pytest.approx({k: float(x) for k, x in wanted.items()})


def test_a_prompt_that_is_shorter_than_its_group():
    """The averaged map ends with it."""
    scores, ap, groups = draw(1)
    short = groups.index("many")
    for x in (scores, ap):
        x[short, :, 3:] = torch.nan
    got = {name: float(x) for name, x in agreement(scores, ap, groups).items()}
    assert got == pytest.approx(by_hand(scores, ap, groups), abs=1e-12)


def test_resamples():
    groups = ["a"] * 6 + ["b"] + ["a"] * 2 + ["c"] * 2 + ["d"]
    whole = resamples(groups, B=4000, seed=1)
    assert whole.shape == (4001, 12) and whole.dtype == torch.float64
    assert (whole[0] == 1).all()  # the first row: every prompt once, which gives the number itself
    weights = whole[1:]
    group = np.array(groups)
    for name, size in (("a", 8), ("c", 2)):  # as many as there are, in every resample
        assert (weights[:, group == name].sum(1) == size).all()
    of_one_prompt = weights[:, (group == "b") | (group == "d")]
    assert (of_one_prompt.sum(1) == 2).all()  # the two stand in for each other
    assert set(weights[:, 6].tolist()) == {0, 1, 2}
    assert (weights.mean(0) - 1).abs().max() < 0.06  # nobody is preferred ...
    assert weights[:, 0].var() == pytest.approx(7 / 8, abs=0.08)  # ... and the spread is the multinomial's
    assert (resamples(["a", "b"], B=100).sum(1) == 2).all()
    assert torch.equal(whole, resamples(groups, B=4000, seed=1))
    assert not torch.equal(whole, resamples(groups, B=4000, seed=2))
    state = torch.random.get_rng_state()
    resamples(groups, B=1000)
    assert torch.equal(state, torch.random.get_rng_state())  # and nobody else's random numbers change


def test_estimates():
    resampled = torch.randperm(1001).double()
    values = torch.cat([torch.tensor([1e6]).double(), resampled])  # the number itself is none of the resamples
    assert isinstance(estimate(values), Estimate) and estimate(values) == pytest.approx((1e6, 25, 975))
    some, many = values[:1001].clone(), values[:1001].clone()
    some[1:51], many[1:52] = torch.nan, torch.nan  # a twentieth of the resamples, and one more
    assert estimate(some) == pytest.approx((1e6, *np.percentile(some[51:], [2.5, 97.5])))
    value, low, high = estimate(many)
    assert value == 1e6 and math.isnan(low) and math.isnan(high)


def test_means():
    """The mean of one value per prompt, of booleans too, and its interval over the resamples."""
    values, groups = torch.tensor([1.0, 2.0, 4.0, 9.0, 3.0]), ["a", "a", "a", "b", "b"]
    weights = resamples(groups, B=500)
    drawn = [(values.double() * w).sum() / len(values) for w in weights[1:]]
    assert statistics.mean(values, weights) == pytest.approx((3.8, *np.percentile(drawn, [2.5, 97.5])), abs=1e-12)
    accuracy = statistics.mean(values > 2, weights)
    assert accuracy.value == pytest.approx(0.6) and 0 <= accuracy.low < 0.6 < accuracy.high <= 1


def test_a_single_prompt_has_no_intervals():
    """It says nothing about the spread: every interval is NaN, and the numbers are there."""
    scores, ap, _ = draw(0)
    weights = resamples(["g"], B=1000)
    assert weights.shape == (1001, 1) and (weights[0] == 1).all() and (weights[1:] == 0).all()
    both = {("ap", "z"): ap[:1], ("one", "z"): scores[:1], ("other", "z"): scores[:1] * 2 + ap[:1]}
    of, differences = agreements(both, ["z"], ["one", "other"], ["g"], weights)
    estimates = [of["one"]["z"][name] for name in MEASURES] + [differences["other - one"]["z"]]
    for value, low, high in [*estimates, statistics.mean(torch.tensor([True]), weights)]:
        assert math.isfinite(value) and math.isnan(low) and math.isnan(high)


def test_interval_by_resampling():
    """The stratified percentile interval, from another random generator."""
    scores, ap, groups = draw(4, n=30)
    _, low, high = estimate(agreement(scores, ap, groups, resamples(groups, B=1000))["averaged"])
    rng, values = np.random.default_rng(0), []
    strata = [[i for i, g in enumerate(groups) if g == group] for group in dict.fromkeys(groups)]
    for _ in range(400):
        drawn = [rng.choice(rows, len(rows)) for rows in strata]
        maps = [torch.cat([x[rows].mean(0).flatten() for rows in drawn]) for x in (scores, ap)]
        values.append(corr(*(x[~x.isnan()] for x in maps)))
    width = high - low
    assert np.percentile(values, [2.5, 97.5]) == pytest.approx([low, high], abs=0.2 * width) and width > 0.01


def test_differences_are_paired():
    """Two methods that are wrong alike: prompts move both, and not the difference."""
    scores, ap, groups = draw(0, n=40)
    both = {("ap", "z"): ap, ("one", "z"): scores, ("other", "z"): scores + 0.01 * ap}
    of, differences = agreements(both, ["z"], ["one", "other"], groups, resamples(groups, B=1000))
    assert list(differences) == ["other - one"]
    value, low, high = differences["other - one"]["z"]
    one, other = (of[method]["z"]["averaged"] for method in ("one", "other"))
    assert value == pytest.approx(other.value - one.value) and 0 < low < value < high
    assert high - low < 0.2 * (one.high - one.low)


def test_agreements():
    """Every method and node, as agreement() has it; the rank correlation and the largest error by hand."""
    nodes, methods, given = ["resid_pre", "head"], ["m1", "m2", "m3"], {}
    for i, node in enumerate(nodes):
        for j, method in enumerate(methods):
            given[method, node], ap, groups = draw(7, shape=(3, 5) if node == "resid_pre" else (3, 5, 4))
            given[method, node] = (given[method, node] + (i + j) * torch.sin(ap * 9)).float().numpy()
        given["ap", node] = ap.float().numpy()
    given["m3", "resid_pre"] *= -1
    weights = resamples(groups, B=50)
    of, differences = agreements(given, nodes, methods, groups, weights)
    assert list(of) == methods and list(differences) == ["m2 - m1", "m3 - m1", "m3 - m2"]
    for node in nodes:
        ap, averaged = given["ap", node], {}
        for method in methods:
            got, own = of[method][node], agreement(torch.tensor(given[method, node]), torch.tensor(ap), groups, weights)
            averaged[method] = own["averaged"]
            assert {name: got[name] for name in MEASURES} == {name: estimate(x) for name, x in own.items()}
            s, a, where = averaged_by_hand(given[method, node].astype(float), ap.astype(float), groups)
            assert got["rank"] == pytest.approx(corr(rank_by_hand(s), rank_by_hand(a)), abs=1e-12)
            assert got["largest_effect"] == pytest.approx(max(map(abs, a)))
            worst = max(range(len(s)), key=lambda i: abs(s[i] - a[i]))
            group, layer, position, *part = where[worst]
            cell = {"layer": layer, "position": position, "part": part[0] if part else None, "group": group}
            numbers = {"error": s[worst] - a[worst], "ap": a[worst]}
            assert got["largest_error"] == {**{k: pytest.approx(v, abs=1e-12) for k, v in numbers.items()}, **cell}
        for pair, difference in differences.items():
            other, one = pair.split(" - ")
            assert difference[node] == pytest.approx(estimate(averaged[other] - averaged[one]), abs=1e-12)
    errors = [of[method][node]["largest_error"]["error"] for method in methods for node in nodes]
    assert min(errors) < 0 < max(errors)


def test_the_largest_effect_may_be_negative():
    ap = torch.tensor([[[1.0, -3.0]]])
    of, _ = agreements({("ap", "z"): ap, ("m", "z"): ap * 0}, ["z"], ["m"], ["g"], resamples(["g"]))
    assert of["m"]["z"]["largest_effect"] == 3 and of["m"]["z"]["largest_error"]["error"] == 3


def test_ties():
    assert ranks(torch.tensor([3.0, 1, 3, 0, 1, 1])).tolist() == [5.5, 3, 5.5, 1, 3, 3]
    assert ranks(torch.tensor([5.0, 7, 7, 9])).tolist() == [1, 2.5, 2.5, 4]


def test_a_constant_has_no_correlation():
    scores, ap, groups = draw(0)
    scores[ap.isnan()] = 0.5
    weights = resamples(groups, B=7)
    constant = torch.full_like(ap, 0.1)
    for of in (agreement(constant, ap, groups, weights), agreement(scores, constant, groups, weights)):
        assert not of.pop("slope").isnan().any()
        assert all(x.isnan().all() for x in of.values())
    assert math.isnan(statistics.rank_correlation(constant, ap, groups))
    assert all(x.isnan().all() for x in agreement(scores, ap * 0, groups, weights).values())  # AP finds nothing
    some = scores.clone()
    some[0] = 0.1  # one prompt says nothing: the mean is of the others
    own = [corr(x[~y.isnan()], y[~y.isnan()]) for x, y in zip(some, ap)]
    assert math.isnan(own[0]) and float(agreement(some, ap, groups)["per_prompt"]) == pytest.approx(np.mean(own[1:]))


def test_many_methods_take_a_moment():
    """16 methods, 100 pairs, 30 layers, 3 kinds of node, 1000 resamples: a second or two. 10 are for a busy machine."""
    g, nodes, methods = torch.Generator().manual_seed(0), ["a", "b", "c"], [f"m{i}" for i in range(16)]
    groups = [f"template {i % 3}" for i in range(100)]
    given = {(m, node): torch.randn(100, 30, 15, generator=g).numpy() for m in ("ap", *methods) for node in nodes}
    began = time.perf_counter()
    of, differences = agreements(given, nodes, methods, groups, resamples(groups, B=1000))
    assert time.perf_counter() - began < 10
    assert len(of) == 16 and len(differences) == 120


def test_moments():
    s, a = torch.tensor([1.0, 2.0, 9.0]).double(), torch.tensor([3.0, 4.0, torch.nan]).double()
    assert statistics.moments(s, a).tolist() == [2, 3, 7, 5, 25, 11]
    means = statistics.moments_of_means(
        torch.stack([s[:2], 3 * s[:2]]), torch.stack([a[:2], a[:2]]), torch.ones(1, 2).double()
    )
    assert means.tolist() == [[2, 6, 7, 20, 25, 22]]


def test_pearson_is_the_correlation_of_the_measures():
    """relp.pearson, which relp.py has for itself, and the correlation from moments are one number."""
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).double()
    got = float(statistics.correlation(statistics.moments(a, b)))
    assert relp.pearson(a, b) == pytest.approx(got, abs=1e-12)
