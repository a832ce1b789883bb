"""--verify: AP of only those nodes that a cheap method ranks highest, every number computed again another way.

And doubt, by which it may rank too: in the files and in the figure.
"""
# ruff: noqa: F811 (fixtures that are imported)

import json
import re

import numpy as np
import pytest
from test_evaluate import results, run, tiny  # noqa: F401
from test_grid import of_length, setting  # noqa: F401

import relp
from support.doubt import doubts
from support.figures import DOUBT, heatmaps
from support.methods import AP, ATP, Method
from support.positions import laid_over, overlay


@pytest.fixture
def verified(tiny, run, tmp_path):
    """verified(*arguments) -> (verified.json, what was printed) of a run on the tiny gpt2."""

    def call(*arguments, model="gpt2"):
        code, out, err = run("--model", tiny[model], "--no-plot", *arguments)
        assert (code, err) == (0, [])
        return json.loads((tmp_path / "out" / f"{model}-ioi" / "verified.json").read_text()), out

    return call


def averaged(values, pairs, layer, label, part=()):
    """The mean of scores [n, layers, positions, ...] at one place over the pairs that have this role."""
    _, at = overlay(pairs)
    own = [i for i in range(len(pairs)) if at[i, label] >= 0]
    return float(np.mean([values[(i, layer, at[i, label], *part)] for i in own]))


def scores_of(folder):
    with np.load(folder / "scores.npz") as file:
        return dict(file)


def test_verify(verified, setting, tmp_path):
    """The K largest averaged scores over all kinds of nodes, AP of these and no others, the next score as the bound."""
    nodes, folder = ["mlp_out", "head", "neuron"], tmp_path / "out" / "gpt2-ioi"
    arguments = ["--pairs", 6, "--nodes", ",".join(nodes), "--methods", "ap,atp,relp", "--verify", 9]
    found, out = verified(*arguments)
    scores = scores_of(folder)
    assert not any(key.startswith("ap_") for key in scores)
    model, pairs = setting("gpt2", 6)
    roles, _ = overlay(pairs)
    every = []
    for node in nodes:
        values = scores[f"relp_{node}"]
        for layer, label, *part in np.ndindex(values.shape[1], len(roles), *values.shape[3:]):
            every.append((averaged(values, pairs, layer, label, part), node, layer, label, *part))
    every.sort(key=lambda row: -abs(row[0]))
    assert found["ranked_by"] == "relp" and found["of"] == len(every) and len(found["nodes"]) == 9
    assert found["bound"] == pytest.approx(abs(every[9][0]), rel=1e-4)
    whole = {node: np.full(scores[f"relp_{node}"].shape, np.nan) for node in nodes}
    for rows, batch in of_length(pairs):
        for node, value in relp.activation_patching(model, *batch, nodes).items():
            whole[node][rows, :, : value.shape[2]] = value.numpy()
    by_atp = {node: scores[f"atp_{node}"] for node in nodes}
    for row, (score, node, layer, label, *part) in zip(found["nodes"], every):
        assert row["scores"]["relp"] == pytest.approx(score, rel=1e-4)
        assert (row["node"], row["layer"], row["position"]) == (node, layer, roles[label])
        assert row["part"] == (part[0] if part else None)
        ap, atp = (averaged(values[node], pairs, layer, label, part) for values in (whole, by_atp))
        assert row["scores"]["ap"] == pytest.approx(ap, abs=1e-4)
        assert row["scores"]["atp"] == pytest.approx(atp, abs=1e-5)
    assert "the 9 nodes of" in out and f"beyond {found['bound']:.3f}" in out
    verified("--pairs", 3, "--methods", "relp", "--verify", 9)
    relps = {key[5:] for key in scores_of(folder) if key.startswith("relp_")}
    assert relps == {"resid_pre", "attn_out", "mlp_out", "head", "neuron"}


def test_the_line_below_the_list(verified):
    """Correlation, slope and largest difference of the listed scores against AP's."""
    found, out = verified("--pairs", 4, "--methods", "atp,relp", "--verify", 7)
    score, ap = (np.array([row["scores"][m] for row in found["nodes"]]) for m in ("relp", "ap"))
    line = next(line for line in out.splitlines() if line.startswith("  over them: "))
    pattern = (
        r"  over them: correlation (\S+), slope (\S+), largest difference (\S+); no other node has a RelP score .*"
    )
    correlation, slope, largest = map(float, re.fullmatch(pattern, line).groups())
    assert correlation == pytest.approx(np.corrcoef(score, ap)[0, 1], abs=6e-4)
    assert slope == pytest.approx(np.linalg.lstsq(ap[:, None], score, rcond=None)[0][0], abs=6e-3)
    assert largest == pytest.approx(np.abs(score - ap).max(), abs=6e-4)
    rows = out[out.index("  node ") : out.index("  over them: ")].splitlines()
    assert rows[0].split() == ["node", "layer", "part", "position", "AP", "AtP", "RelP"]
    for line, row in zip(rows[1:], found["nodes"]):
        numbers = [float(x) for x in line.split()[-3:]]
        assert numbers == pytest.approx([row["scores"][m] for m in ("ap", "atp", "relp")], abs=6e-4)


@pytest.mark.parametrize("methods, by", [
    ("atp,relp", "relp"),
    ("twopoint,relp", "relp"),
    ("relp,ln,twopoint,atp", "relp"),
    ("twopoint,atp", "twopoint"),
    ("ig,twopoint", "ig"),
    ("ap,atp", "atp"),
    ("ln+ah", "ln+ah"),
])  # fmt: skip
def test_the_method_that_ranks(methods, by, verified):
    """RelP if it is given, or else the first."""
    found, out = verified("--pairs", 3, "--nodes", "mlp_out", "--methods", methods, "--verify", 3)
    assert found["ranked_by"] == by
    sizes = [abs(row["scores"][by]) for row in found["nodes"]]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= found["bound"] > 0
    assert found["nodes"][0]["scores"].keys() == {"ap", *methods.split(",")}


def test_an_earlier_relp_does_not_rank(tiny, run, verified):
    """What is asked for ranks; scores of an earlier run stand beside it."""
    given = ["--pairs", 3, "--nodes", "mlp_out"]
    assert run("--model", tiny["gpt2"], "--no-plot", *given, "--methods", "relp")[0] == 0
    found, out = verified(*given, "--methods", "atp", "--verify", 3)
    assert found["ranked_by"] == "atp" and "largest AtP scores" in out
    assert found["nodes"][0]["scores"].keys() == {"ap", "atp", "relp"}
    sizes = [abs(row["scores"]["atp"]) for row in found["nodes"]]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= found["bound"] > 0


def test_an_earlier_ap_stays(tiny, run, verified, setting, tmp_path):
    """AP of the listed nodes is computed all the same, and agrees with it; the table has the earlier AP."""
    given, folder = ["--pairs", 4, "--nodes", "mlp_out"], tmp_path / "out" / "gpt2-ioi"
    assert run("--model", tiny["gpt2"], "--no-plot", *given, "--methods", "ap")[0] == 0
    before = scores_of(folder)["ap_mlp_out"]
    found, out = verified(*given, "--methods", "relp", "--verify", 5)
    np.testing.assert_array_equal(scores_of(folder)["ap_mlp_out"], before)
    _, pairs = setting("gpt2", 4)
    roles, _ = overlay(pairs)
    for row in found["nodes"]:
        wanted = averaged(before, pairs, row["layer"], roles.index(row["position"]))
        assert row["scores"]["ap"] == pytest.approx(wanted, abs=1e-4)
    assert "PCC with AP" in out and found["seconds"] > 0


def test_more_nodes_than_there_are(verified):
    found, out = verified("--pairs", 2, "--nodes", "mlp_out", "--methods", "relp", "--verify", 1000)
    assert len(found["nodes"]) == found["of"] == 2 * 16 and found["bound"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Doubt


@pytest.mark.parametrize("methods", ["atp,relp", "relp,twopoint,atp"])
def test_verify_by_doubt(methods, verified, setting, tmp_path):
    """AP of exactly those K nodes whose averaged RelP and AtP differ most; the line below is of RelP's scores."""
    nodes, given = ["mlp_out", "head"], ["--methods", methods, "--verify", "doubt:8"]
    found, out = verified("--pairs", 5, "--nodes", ",".join(nodes), *given)
    scores, (_, pairs) = scores_of(tmp_path / "out" / "gpt2-ioi"), setting("gpt2", 5)
    roles, at = overlay(pairs)
    every = []
    for node in nodes:
        one, other = (laid_over(scores[f"{m}_{node}"], at).astype(float) for m in ("relp", "atp"))
        for layer, label, *part in np.ndindex(one.shape):
            place = (layer, label, *part)
            size = abs(one[place] - other[place])
            every.append((size, node, layer, roles[label], part[0] if part else None))
    every.sort(key=lambda row: -row[0])
    assert found["ranked_by"] == "doubt" and found["of"] == len(every)
    places = [(row["node"], row["layer"], row["position"], row["part"]) for row in found["nodes"]]
    assert places == [row[1:] for row in every[:8]]
    assert [row["doubt"] for row in found["nodes"]] == pytest.approx([row[0] for row in every[:8]], rel=1e-3)
    assert found["bound"] == pytest.approx(every[8][0], rel=1e-3)
    assert "the 8 nodes of" in out and "with the largest doubt, |RelP - AtP|; AP of only these" in out
    head, *lines = out[out.index("  node ") : out.index("  over them: ")].splitlines()
    assert head.split()[-1] == "doubt" and head.split()[4] == "AP"
    for line, row in zip(lines, found["nodes"]):
        assert float(line.split()[-1]) == pytest.approx(row["doubt"], abs=6e-4)
    score, ap = (np.array([row["scores"][m] for row in found["nodes"]]) for m in ("relp", "ap"))
    assert f"largest difference {np.abs(score - ap).max():.3f}; no other node has a doubt beyond" in out
    assert not any(key.startswith("ap_") for key in scores)
    by_size, _ = verified("--pairs", 5, "--nodes", ",".join(nodes), "--methods", methods, "--verify", 8)
    assert by_size["ranked_by"] == "relp" and "doubt" not in by_size["nodes"][0]


def test_ap_of_a_doubtful_node_is_ap(verified, tiny, results, setting):
    found, _ = verified("--pairs", 4, "--nodes", "mlp_out", "--methods", "atp,relp", "--verify", "doubt:6")
    _, scores = results(tiny["gpt2"], "--pairs", 4, "--nodes", "mlp_out", "--methods", "ap")
    _, pairs = setting("gpt2", 4)
    roles, _ = overlay(pairs)
    for row in found["nodes"]:
        wanted = averaged(scores["ap_mlp_out"], pairs, row["layer"], roles.index(row["position"]))
        assert row["scores"]["ap"] == pytest.approx(wanted, abs=1e-4)


def test_doubt_in_the_file(tiny, results):
    """Of every pair and cell, if both methods are there: of one run, or of two."""
    given = [tiny["gpt2"], "--pairs", 4, "--nodes", "mlp_out,head"]

    def doubts_of(*arguments):
        _, scores = results(*given, *arguments)
        return scores, {key for key in scores if key.startswith("doubt_")}

    assert doubts_of("--methods", "atp")[1] == set()
    both = {"doubt_mlp_out", "doubt_head"}
    scores, names = doubts_of("--methods", "relp")  # added to AtP's
    assert names == both
    for node in ("mlp_out", "head"):
        wanted = np.abs(scores[f"relp_{node}"] - scores[f"atp_{node}"])
        np.testing.assert_array_equal(scores[f"doubt_{node}"], wanted)
        assert scores[f"doubt_{node}"].dtype == np.float32 and np.nanmax(wanted) > 0 and np.isnan(wanted).any()
    assert doubts_of("--methods", "ap")[1] == both
    assert doubts_of("--methods", "atp", "--rules", "ln")[1] == set()  # RelP's scores of other rules are dropped
    scores, names = doubts_of("--methods", "relp", "--rules", "none")
    assert names == both and np.nanmax(scores["doubt_head"]) == 0


def test_doubt_is_of_what_both_have_scored():
    one = np.array([[1.0, -2.0, np.nan]])
    scores = {("relp", "z"): one, ("atp", "z"): -one, ("relp", "q"): one, ("atp", "k"): one, ("ap", "z"): one}
    found = doubts(scores)
    assert found.keys() == {"z"} and found["z"].tolist()[0][:2] == [2, 4] and np.isnan(found["z"][0, 2])


def test_the_figures_row_of_doubt(setting):
    """The last row, if both methods are there: the difference of the two maps above it, from 0 to its largest."""
    _, pairs = setting("gpt2", 5)
    rng, longest = np.random.default_rng(0), max(len(pair.original) for pair in pairs)
    relp_, nodes = Method("relp", "RelP"), {"mlp_out": (), "head": (3,)}
    shape = len(pairs), 2, longest
    scores = {(m.name, n): rng.normal(size=(*shape, *parts)) for m in (AP, ATP, relp_) for n, parts in nodes.items()}
    for methods, has_doubt in (([AP, ATP, relp_], True), ([AP, relp_], False), ([ATP, relp_], True)):
        figure = heatmaps("gpt2", scores, methods, list(nodes), pairs, "logit_diff")
        axes = [ax for ax in figure.axes if ax.images and ax.get_title()]
        assert len(axes) == 2 * (len(methods) + has_doubt)
        assert ["doubt" in ax.get_title() for ax in axes] == [False] * 2 * len(methods) + [True, True] * has_doubt
        assert len(figure.axes) == len(axes) + 2 + 2 * has_doubt  # and the colour bars
        for ax, node in zip(axes[2 * len(methods) :], nodes):
            maps = {m: laid_over(scores[m, node], overlay(pairs)[1]) for m in ("relp", "atp")}
            maps = {m: values.sum(1) if node == "head" else values for m, values in maps.items()}
            (image,) = ax.images
            assert np.asarray(image.get_array()) == pytest.approx(np.abs(maps["relp"] - maps["atp"]))
            assert ax.get_title() == f"doubt: |RelP - AtP|, {node}" and image.get_cmap().name == DOUBT
            assert image.get_clim() == pytest.approx((0, np.abs(maps["relp"] - maps["atp"]).max()))
