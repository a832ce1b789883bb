"""The measures of support.statistics.agreement by their definitions, and the bootstrap by resampling."""

import math

import numpy as np
import pytest
import torch

import relp
from support import statistics
from support.statistics import Estimate, agreement, estimate, ranks, resamples, top

MEASURES = {
    *("averaged", "pooled", "per_prompt", "per_prompt_std"),
    *("spearman", "sign", "recall", "slope", "false_negative"),
}


def corr(x, y):
    x, y = np.asarray(x), np.asarray(y)
    varied = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
    return float(np.corrcoef(x, y)[0, 1]) if varied else math.nan


def rank(x):
    """1 + how many are smaller, and half of how many others are equal."""
    return [sum(other < value for other in x) + (sum(other == value for other in x) + 1) / 2 for value in x]


def by_hand(scores, ap, groups, cells=None):
    """Every measure as its docstring defines it: lists, one cell after the other."""
    scores, ap = scores.double().numpy(), ap.double().numpy()
    use = ~np.isnan(ap) if cells is None else ~np.isnan(ap) & cells.numpy()
    s, a = [], []
    for group in dict.fromkeys(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        for at in np.ndindex(ap.shape[1:]):
            if any(use[i][at] for i in rows) and not any(np.isnan(ap[i][at]) for i in rows):
                s.append(sum(scores[i][at] for i in rows) / len(rows))
                a.append(sum(ap[i][at] for i in rows) / len(rows))
    n, most_s, most_a = range(len(a)), max(map(abs, s)), max(map(abs, a))
    matter = [i for i in n if a[i] and abs(a[i]) >= 0.1 * most_a]

    def ten_largest(x):
        return [i for i in n if x[i] and sum(abs(other) >= abs(x[i]) for other in x) <= 10]

    each = [corr(x[k], y[k]) for x, y, k in zip(scores, ap, use) if k.any()]
    each = [r for r in each if not math.isnan(r)]
    return {
        "averaged": corr(s, a),
        "pooled": corr(scores[use], ap[use]),
        "per_prompt": np.mean(each),
        "per_prompt_std": np.std(each),
        "spearman": corr(rank(s), rank(a)),
        "sign": sum(np.sign(s[i]) == np.sign(a[i]) for i in matter) / len(matter),
        "recall": sum(i in ten_largest(s) for i in ten_largest(a)) / len(ten_largest(a)),
        "slope": sum(x * y for x, y in zip(s, a)) / sum(y * y for y in a),
        "false_negative": max([abs(a[i]) for i in n if abs(s[i]) <= 0.01 * most_s], default=0) / most_a,
    }


def draw(seed=0, n=9, shape=(3, 5)):
    """Scores and AP of n prompts in groups of one, of three and of the others, the last group shorter; zeros first."""
    g = torch.Generator().manual_seed(seed)
    ap, noise = torch.randn(2, n, *shape, generator=g, dtype=torch.float64)
    scores = 0.5 * ap + 0.4 * noise
    groups = ["one"] + ["three"] * 3 + ["many"] * (n - 4)
    for x in (scores, ap):
        x[:, :, 0] = 0  # nothing has changed yet: ties
        x[4:, :, 4:] = torch.nan  # beyond the prompt
        x[5, :, 3:] = torch.nan  # and one is shorter than its group: the averaged map ends with it
    scores[:, 1, 2] = 0  # a node that the method misses
    scores[:, 2, 3] = -ap[:, 2, 3]
    order = torch.randperm(n, generator=g).tolist()
    return scores[order], ap[order], [groups[i] for i in order]


def changed(ap):
    """A mask that is True in some prompts of a group only."""
    cells = torch.rand(ap.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return cells | (ap.abs() > 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("masked", [False, True])
def test_measures_are_their_definitions(seed, masked):
    scores, ap, groups = draw(seed)
    cells = changed(ap) if masked else None
    got = agreement(scores.float(), ap.float(), groups, cells)
    assert got.keys() == MEASURES and all(x.shape == (1,) and x.dtype == torch.float64 for x in got.values())
    wanted = by_hand(scores.float(), ap.float(), groups, cells)
    assert {name: float(x) for name, x in got.items()} == pytest.approx(wanted, abs=1e-9)
    assert 0 < wanted["recall"] < 1 and 0 < wanted["sign"] < 1 and wanted["false_negative"] > 0  # nothing is trivial


@pytest.mark.parametrize("masked", [False, True])
def test_a_resample_is_the_drawn_prompts(masked):
    """Weights give what the prompts give when they are written out as often as they were drawn, in all measures."""
    scores, ap, groups = draw(3)
    cells = changed(ap) if masked else None
    weights = resamples(groups, B=60)
    got = agreement(scores, ap, groups, cells, weights)
    assert all(x.shape == (61,) for x in got.values())
    for b, w in enumerate(weights):
        rows = [i for i, times in enumerate(w.int().tolist()) for _ in range(times)]
        wanted = by_hand(scores[rows], ap[rows], [groups[i] for i in rows], None if cells is None else cells[rows])
        assert {name: float(x[b]) for name, x in got.items()} == pytest.approx(wanted, abs=1e-9, nan_ok=True)
    assert all(len(x.unique()) > 3 for x in got.values())


def test_resamples():
    groups = ["a"] * 6 + ["b"] + ["a"] * 2 + ["c"] * 4 + ["d"]
    whole = resamples(groups, B=4000, seed=1)
    assert whole.shape == (4001, 14) and whole.dtype == torch.float64
    assert (whole[0] == 1).all()  # the first row: every prompt once, which gives the number itself
    weights = whole[1:]
    group = np.array(groups)
    for name, size in (("a", 8), ("c", 4)):  # as many as there are, in every resample
        assert (weights[:, group == name].sum(1) == size).all()
    of_one_prompt = weights[:, (group == "b") | (group == "d")]
    assert (of_one_prompt.sum(1) == 2).all()  # the two stand in for each other
    assert set(weights[:, 6].tolist()) == {0, 1, 2}
    assert (weights.mean(0) - 1).abs().max() < 0.06  # nobody is preferred ...
    assert weights[:, 0].var() == pytest.approx(7 / 8, abs=0.08)  # ... and the spread is the multinomial's
    assert torch.equal(whole, resamples(groups, B=4000, seed=1))
    assert not torch.equal(whole, resamples(groups, B=4000, seed=2))
    state = torch.random.get_rng_state()
    resamples(groups, B=1000)
    assert torch.equal(state, torch.random.get_rng_state())  # and nobody else's random numbers change


def test_the_first_row_gives_the_number_itself():
    scores, ap, groups = draw(2)
    once, with_resamples = agreement(scores, ap, groups), agreement(scores, ap, groups, weights=resamples(groups, B=20))
    for name in MEASURES:
        torch.testing.assert_close(with_resamples[name][:1], once[name], rtol=1e-12, atol=1e-12)


def interval(values):
    """The ends of the interval of values whose first is the number itself."""
    return estimate(values)[1:]


def test_intervals():
    resampled = torch.randperm(1001).double()
    values = torch.cat([torch.tensor([500.5]).double(), resampled])
    assert isinstance(estimate(values), Estimate)
    assert estimate(values) == pytest.approx((500.5, 25, 975))
    far = torch.cat([torch.tensor([1e6]).double(), resampled])  # the number itself is none of the resamples
    assert estimate(far) == pytest.approx((1e6, 25, 975))
    some, many = values.clone(), values.clone()
    some[1:51], many[1:52] = torch.nan, torch.nan
    assert estimate(some) == pytest.approx((500.5, *np.percentile(some[51:], [2.5, 97.5])))
    assert estimate(many).value == 500.5 and all(math.isnan(x) for x in interval(many))


def test_means():
    """The mean of one value per prompt, of booleans too, and its interval over the resamples."""
    values, groups = torch.tensor([1.0, 2.0, 4.0, 9.0, 3.0]), ["a", "a", "a", "b", "b"]
    weights = resamples(groups, B=500)
    drawn = [(values.double() * w).sum() / len(values) for w in weights[1:]]
    wanted = (3.8, *np.percentile(drawn, [2.5, 97.5]))
    assert statistics.mean(values, weights) == pytest.approx(wanted, abs=1e-12)
    assert wanted[1] < 3 and wanted[2] > 4.5
    accuracy = statistics.mean(values > 2, weights)
    assert accuracy.value == pytest.approx(0.6) and 0 <= accuracy.low < 0.6 < accuracy.high <= 1


def test_a_single_prompt_has_no_intervals():
    """It says nothing about the spread: every interval is NaN, that of an accuracy too, and the numbers are there."""
    scores, ap, _ = draw(0)
    weights = resamples(["g"], B=1000)
    assert weights.shape == (1001, 1) and (weights[0] == 1).all() and (weights[1:] == 0).all()
    got = agreement(scores[:1], ap[:1], ["g"], weights=weights)
    assert got.keys() == MEASURES
    estimates = [estimate(x) for x in got.values()]
    estimates += [statistics.mean(torch.tensor([x]), weights) for x in (2.5, True)]
    for value, low, high in estimates:
        assert math.isfinite(value) and math.isnan(low) and math.isnan(high)
    assert [e.value for e in estimates[-2:]] == [2.5, 1]
    # and so the difference of two methods has none
    other = agreement(scores[:1] * 2 + ap[:1], ap[:1], ["g"], weights=weights)
    for name in MEASURES:
        assert all(math.isnan(x) for x in interval(other[name] - got[name]))


def test_interval_by_resampling():
    """The stratified percentile interval, from another random generator."""
    scores, ap, groups = draw(4, n=30)
    low, high = interval(agreement(scores, ap, groups, weights=resamples(groups, B=1000))["averaged"])
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
    weights = resamples(groups, B=1000)
    one, other = (agreement(s, ap, groups, weights=weights) for s in (scores, scores + 0.01 * ap))
    for measure in ("averaged", "pooled", "per_prompt"):
        low, high = interval(other[measure] - one[measure])
        of_one = interval(one[measure])
        assert 0 < low < high and high - low < 0.2 * (of_one[1] - of_one[0])
    assert interval(other["slope"] - one["slope"]) == pytest.approx((0.01, 0.01))
    assert estimate(other["slope"] - one["slope"]).value == pytest.approx(0.01)


def test_coverage():
    """95 % intervals hold the truth in about 95 % of experiments (those of the mean per-prompt PCC and the slope)."""
    g, cells, experiments = torch.Generator().manual_seed(0), 40, 150
    held = {"per_prompt": 0, "slope": 0}
    ap_map = torch.randn(1, 1, cells, generator=g, dtype=torch.float64)

    def experiment(n):
        gain = 0.5 + torch.rand(n, 1, 1, generator=g, dtype=torch.float64)
        return gain * ap_map + 0.5 * torch.randn(n, 1, cells, generator=g, dtype=torch.float64), ap_map.expand(n, 1, -1)

    truth = {name: float(x) for name, x in agreement(*experiment(20000), ["g"] * 20000).items() if name in held}
    for i in range(experiments):
        values = agreement(*experiment(40), ["g"] * 40, weights=resamples(["g"] * 40, B=300, seed=i))
        for name in held:
            low, high = interval(values[name])
            held[name] += low <= truth[name] <= high
    assert all(0.87 <= times / experiments <= 0.995 for times in held.values()), held


def test_ties():
    rows = torch.tensor([[3.0, 1, 3, 0, 1, 1], [2, 2, 2, 2, 2, 2]])
    assert ranks(rows).tolist() == [[5.5, 3, 5.5, 1, 3, 3], [3.5] * 6]

    def one(*x):
        return torch.tensor(x, dtype=torch.float64).reshape(1, 1, -1)

    got = float(agreement(one(1, 2, 2, 0), one(1, 2, 3, 0), ["g"])["spearman"])
    assert got == pytest.approx(corr([2, 3.5, 3.5, 1], [2, 3, 4, 1]))
    # where more cells tie than there is room for, they are not found: a constant says nothing
    size = torch.tensor([[5.0, 4, 4, 3, 0, 0]])
    assert top(size, 2).tolist() == [[True, False, False, False, False, False]]
    assert top(size, 3).tolist() == [[True, True, True, False, False, False]]
    for k in (4, 5, 6, 10):  # zeros are never large
        assert top(size, k).tolist() == [[True, True, True, True, False, False]]


def test_what_each_measure_sees():
    """The same shape at a third of the size; a sign turned; a node missed."""
    ap = torch.arange(-20.0, 30).reshape(1, 2, 25)

    def value(s):
        return {name: float(x) for name, x in agreement(s, ap, ["g"]).items()}

    perfect = value(ap)
    for name in ("averaged", "spearman", "sign", "recall", "slope"):
        assert perfect[name] == pytest.approx(1, abs=1e-12)
    assert perfect["false_negative"] == pytest.approx(0, abs=1e-12)
    third = value(ap / 3)
    assert third.pop("slope") == pytest.approx(1 / 3)
    assert third == pytest.approx({name: perfect[name] for name in third}, abs=1e-7)
    opposite = value(-ap)
    assert (opposite["sign"], opposite["recall"]) == (0, 1) and opposite["slope"] == pytest.approx(-1)
    missed = ap.clone()
    missed[0, 1, 23] = 0.2  # 28 of at most 29; 0.2 is less than 1 % of 29
    assert value(missed)["false_negative"] == pytest.approx(28 / 29)
    assert value(missed)["recall"] == pytest.approx(8 / 9)  # 21 to 29: for 20 and -20 there is one place
    silent = value(ap * 0)
    assert (silent["sign"], silent["recall"], silent["slope"], silent["false_negative"]) == (0, 0, 0, 1)


def test_parts():
    """Heads and neurons have an axis more: cells like any others."""
    scores, ap, groups = draw(2, shape=(3, 5, 4))
    cells = changed(ap)
    got = agreement(scores, ap, groups, cells, resamples(groups, B=5))
    flat = [x.transpose(2, 3).flatten(1, 2) for x in (scores, ap, cells)]  # [prompt, layer * part, pos]
    wanted = agreement(*flat[:2], groups, flat[2], resamples(groups, B=5))
    for name in MEASURES:
        torch.testing.assert_close(got[name], wanted[name])
    whole = {name: float(x) for name, x in agreement(scores, ap, groups).items()}
    assert whole == pytest.approx(by_hand(scores, ap, groups))


def test_many_cells_go_in_pieces(monkeypatch):
    """More cells than are held at once: the same numbers."""
    scores, ap, groups = draw(1)
    weights, sizes, of_maps = resamples(groups, B=50), [], statistics.of_maps
    whole = agreement(scores, ap, groups, weights=weights)

    def counted(s, *rest):
        sizes.append(len(s))
        return of_maps(s, *rest)

    monkeypatch.setattr(statistics, "of_maps", counted)
    factor = 2000  # the cells are repeated, which leaves the averaged maps' correlations as they are
    repeated = agreement(*(x.repeat(1, factor, 1) for x in (scores, ap)), groups, weights=weights)
    assert sum(sizes) == 51 and len(sizes) > 1
    for name in ("averaged", "pooled", "per_prompt", "sign", "slope", "false_negative"):
        torch.testing.assert_close(repeated[name], whole[name])


def test_degenerate_input():
    def undefined(x):
        return all(math.isnan(value) for value in x)

    scores, ap, groups = draw(0)
    # a constant method: nothing to correlate, and still a slope
    got = agreement(torch.full_like(ap, 0.1), ap, groups, weights=resamples(groups, B=7))
    for name in ("averaged", "pooled", "per_prompt", "per_prompt_std", "spearman"):
        assert undefined(got[name]) and undefined(estimate(got[name])), name
    assert not undefined(got["slope"])
    assert float(agreement(torch.full_like(ap, 0.5), ap, groups)["recall"]) == 0
    # AP that finds nothing
    got = agreement(scores, ap * 0, groups)
    assert all(undefined(x) for x in got.values())
    # one prompt: numbers, and no intervals
    got = agreement(scores[:1], ap[:1], groups[:1])
    assert not any(undefined(got[name]) for name in MEASURES) and got["per_prompt_std"] == 0
    got = agreement(scores[:1], ap[:1], groups[:1], weights=resamples(groups[:1], B=7))
    assert all(undefined(interval(x)) for x in got.values())
    # one cell, and none
    got = agreement(scores[:, :1, 1:2], ap[:, :1, 1:2], ["g"] * len(ap))
    assert undefined(got["averaged"]) and not undefined(got["slope"])
    got = agreement(scores, ap, groups, cells=torch.zeros_like(ap, dtype=torch.bool))
    assert all(undefined(x) for x in got.values())


def test_pearson_is_the_correlation_of_the_measures():
    """relp.pearson, which relp.py has for itself, and the correlation from moments are one number."""
    a, b = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0)).double()
    sums = statistics.moments(a, b, torch.ones_like(a, dtype=torch.bool))
    for row, (x, y) in enumerate(zip(a, b)):
        assert relp.pearson(x, y) == pytest.approx(float(statistics.correlation(sums)[row]), abs=1e-12)
