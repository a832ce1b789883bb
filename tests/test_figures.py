"""The figures: what they show is computed again here, and their texts lie where they can be read."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from test_tasks import Words

import tasks
from support import figures, inspector
from support.positions import legend, visible
from support.results import save_figure
from support.statistics import agreements, resamples
from support.tokenizer import load_tokenizer

AP, ATP, RELP = (
    SimpleNamespace(name=name, label=label) for name, label in (("ap", "AP"), ("atp", "AtP"), ("relp", "RelP"))
)


def pair(*tokens):
    return tasks.Pair(tokens, (99, *tokens[1:]), (1, 2), tuple(map(str, tokens)), f"length {len(tokens)}")


def draw(pairs, nodes, parts=(), methods=(AP, ATP, RELP), name="gpt2"):
    """Random scores of two layers, NaN beyond a prompt, and their figure."""
    rng, longest = np.random.default_rng(0), max(len(p.original) for p in pairs)
    scores = {(m.name, node): rng.normal(size=(len(pairs), 2, longest, *parts)) for m in methods for node in nodes}
    for values in scores.values():
        for of_pair, p in zip(values, pairs):
            of_pair[:, len(p.original) :] = np.nan
    return scores, figures.heatmaps(name, scores, list(methods), nodes, pairs, "logit_diff")


def image(ax):
    return np.asarray(ax.images[0].get_array())


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_a_heat_map_of_two_lengths_shows_the_many():
    pairs = [pair(5, 6, 7, 8, i) for i in range(20, 25)] + [pair(5, 6, 7, 8, 9, 10)]
    scores, figure = draw(pairs, ["resid_pre", "mlp_out"])
    assert "gpt2: change of logit_diff" in figure.get_suptitle() and "mean over 5 of 6" in figure.get_suptitle()
    assert figure.get_supxlabel() == ""  # these positions need no explanation
    maps = iter([ax for ax in figure.axes if ax.images])
    for node in ("resid_pre", "mlp_out"):  # row by row
        largest = np.abs(scores["ap", node][:5, :, :5].mean(0)).max()
        for method in ("ap", "atp", "relp"):
            ax = next(maps)
            assert image(ax) == pytest.approx(scores[method, node][:5, :, :5].mean(0))
            assert ax.images[0].get_clim() == pytest.approx((-largest, largest))  # AP's, for all of a row
    assert ticks(ax.xaxis) == ["5", "6", "7", "8", "pos 4"]  # below the last row
    assert next(maps, None) is None


def test_the_titles_have_the_numbers_of_the_table():
    pairs = tasks.ioi(Words(), 6)
    scores, figure = draw(pairs, ["resid_pre", "mlp_out"])
    groups = [p.group for p in pairs]
    of, _ = agreements(scores, ["resid_pre", "mlp_out"], ["atp", "relp"], groups, resamples(groups, B=2))
    titles = [ax.get_title() for ax in figure.axes if ax.images]
    for node in ("resid_pre", "mlp_out"):
        assert f"AP, {node}" in titles
        for m in (ATP, RELP):
            number = f"{of[m.name][node]['averaged'].value:.3f}".replace("0.", ".")
            assert f"{m.label}, {node}: PCC {number}" in titles
    assert figure.get_supxlabel().replace("\n", " ") == legend(list(pairs[0].roles))
    assert "PCC" not in draw(pairs, ["mlp_out"], methods=[ATP, RELP])[1].axes[0].get_title()


@pytest.mark.parametrize("node, axis, columns, what", [
    ("head", 2, list("0123"), "head, all positions"),
    ("neuron", 3, ["5", "6", "7"], "position, all neurons"),
])  # fmt: skip
def test_parts_are_summed(node, axis, columns, what):
    scores, figure = draw([pair(5, 6, 7)] * 2, [node], parts=(4,))
    *_, last = (ax for ax in figure.axes if ax.images)
    assert image(last) == pytest.approx(scores["relp", node].sum(axis).mean(0))
    assert ticks(last.xaxis) == columns and last.get_xlabel() == what


@pytest.mark.parametrize("methods", [1, 17])
def test_texts_lie_within_the_figure_and_apart(methods):
    """A narrow figure, of one kind of node, with long names; and a tall one."""
    more = [SimpleNamespace(name=f"m{i}", label=f"RelP, ln+identity+half+ah+epsilon=1e-{i}") for i in range(1, methods)]
    _, figure = draw([pair(5, 6, 7)] * 2, ["head"], (4,), [AP, *more], "results/of/a/model-with-a-long-name")
    FigureCanvasAgg(figure).draw()
    boxes = [
        text.get_window_extent() for text in (figure._suptitle, *(ax.title for ax in figure.axes)) if text.get_text()
    ]
    assert len(boxes) == 1 + methods
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in boxes)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_what_exceeds_the_scale_has_a_dot():
    pairs = [pair(5, 6, 7)] * 2
    scores, _ = draw(pairs, ["mlp_out"])
    scores["relp", "mlp_out"][:, 1, 2] = 9 * np.abs(scores["ap", "mlp_out"]).max()
    figure = figures.heatmaps("gpt2", scores, [AP, ATP, RELP], ["mlp_out"], pairs, "logit_diff")
    ap, _, relp = (ax for ax in figure.axes if ax.images)
    assert [list(map(tuple, line.get_xydata())) for line in (*ap.lines, *relp.lines)] == [[], [(2, 1)]]


def test_an_example_is_in_words():
    pairs = tasks.ioi(load_tokenizer("toy-gpt2"), 3)
    words = load_tokenizer("toy-gpt2").decode(list(pairs[0].original[1:]))
    assert f"for example “{words}”" in draw(pairs, ["mlp_out"], name="toy-gpt2")[1].get_supxlabel().replace("\n", " ")
    assert visible("a\n\u202eb é") == "a\\n\\u202eb é"


def test_dollars_are_no_mathematics(tmp_path):
    """In a model's name, and in tokens: matplotlib would refuse this formula."""
    pairs = [tasks.Pair((5, 6), (7, 6), (1, 2), ("$x_{$", "$$"), "length 2")]
    save_figure(tmp_path / "a.png", lambda: draw(pairs, ["mlp_out"], name="$x_{$")[1])
    assert (tmp_path / "a.png").exists()


def test_heatmap():
    g = torch.Generator().manual_seed(0)
    scores = {"mlp_out": torch.randn(3, 2, 4, generator=g), "head": torch.randn(3, 2, 4, 5, generator=g)}
    figure = figures.heatmap(scores, list("abcd"), "RelP")
    one, other, _ = figure.axes  # and the colour bar
    wanted = scores["mlp_out"].mean(0), scores["head"].mean(0).sum(-1)
    largest = max(float(values.abs().max()) for values in wanted)
    for ax, values, node in zip((one, other), wanted, scores):
        assert image(ax) == pytest.approx(values.numpy(), abs=1e-6) and ax.get_title() == node
        assert ax.images[0].get_clim() == pytest.approx((-largest, largest)) and ticks(ax.xaxis) == list("abcd")
    assert figure.get_suptitle() == "RelP"
    with pytest.raises(ValueError, match="no scores"):
        figures.heatmap({}, [])
    with pytest.raises(ValueError, match="4 labelled positions"):
        figures.heatmap({"mlp_out": torch.ones(3, 2, 5)}, list("abcd"))


def test_correlations():
    of_models = {
        "one": {"atp": {"z": {"averaged": (0.5, 0.4, 0.55)}}, "relp": {"z": {"averaged": (0.9, 0.85, 0.92)}}},
        "other": {"atp": {"z": {"averaged": (0.7, 0.71, 0.8)}}, "relp": {"z": {"averaged": (0.6, np.nan, np.nan)}}},
    }
    figure = figures.correlations(of_models, [ATP, RELP], ["z"])
    (ax,) = figure.axes
    (atp, of_atp), (relp, of_relp) = [(box.lines[0], box.lines[2][0].get_segments()) for box in ax.containers]
    assert atp.get_xdata() == pytest.approx([0.5, 0.3]) and relp.get_xdata() == pytest.approx([0.1, 0.4])
    assert to_hex(atp.get_color()) == figures.COLORS["atp"] and to_hex(relp.get_color()) == figures.COLORS["relp"]
    assert [atp.get_ydata() > relp.get_ydata()][0].all()  # a model's methods from the top down
    ends = [x[:, 0].tolist() for x in (*of_atp, *of_relp) if len(x) and np.isfinite(x).all()]
    assert ends == [pytest.approx(x) for x in ([0.45, 0.6], [0.2, 0.3], [0.08, 0.15])]
    assert ticks(ax.yaxis) == ["one", "other"] and "in 1 of 2\ncases" in figure.get_suptitle()


@pytest.mark.parametrize("name", figures.COLORS)
def test_a_methods_colour_is_seen_on_white(name):
    """A contrast of 3, as WCAG asks of what is drawn."""
    parts = [int(figures.COLORS[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    assert 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) >= 3
    assert figures.COLORS[name] in (inspector.TEMPLATE.read_text() + "#222222#5f6368#7a8087")
