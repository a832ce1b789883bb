"""`python -m beyond.edges` as a user sees it: its files, its circuits judged again from these files alone, bad input.

What scores, exact patching and circuits are is tested in test_edges.py.
"""

import io
import json
import math
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.patches import PathPatch

import models
import tasks
from beyond.edges import figure, layout
from beyond.edges.__main__ import main
from beyond.edges.circuits import Circuits, best, drawable, ranking
from beyond.edges.graph import Graph, ungrouped
from beyond.edges.judging import SHARES
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from support import statistics
from support.commandline import run as run_command
from support.positions import overlay
from support.prompts import read_pairs, tensors
from support.results import save_figure
from support.tokenizer import load_tokenizer

METHODS = {"relp": {"lrp": True}, "eap-ig-2": {"steps": 2}}
IDS = {"original": [5, 6, 7, 8], "patch": [5, 9, 7, 8], "original_answer": 1, "patch_answer": 2}


class Run:
    """What a run has printed and written. Circuits are sets of names of edges."""

    def __init__(self, folder, out):
        (self.folder,) = (path for path in folder.iterdir() if path.is_dir())
        self.out, self.summary = out, self.json("summary.json")
        with np.load(self.folder / "edges.npz") as file:
            self.arrays = dict(file)
        self.writers, self.readers = self.arrays["writers"].tolist(), self.arrays["readers"].tolist()

    def json(self, name):
        text = (self.folder / name).read_text()
        return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in {name}"))

    def means(self, method):
        """{edge: mean score}"""
        mean = self.arrays[method].astype(float).mean(0)
        return {
            f"{u}->{v}": mean[i, j]
            for i, u in enumerate(self.writers)
            for j, v in enumerate(self.readers)
            if not np.isnan(mean[i, j])
        }

    def circuit(self, method):
        """The edges of its file."""
        edges = self.json(f"circuit-{method}.json")["edges"]
        return {name for name, of in edges.items() if of["in_graph"]}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(*arguments) -> Run; it must end well and quietly."""

    def call(*arguments, out=None):
        folder, printed = out or tmp_path_factory.mktemp("edges"), io.StringIO()
        with redirect_stdout(printed):
            main([*map(str, arguments), "--out", str(folder)])
        return Run(folder, printed.getvalue())

    return call


@pytest.fixture(scope="module")
def toy(command):
    return command("--model", "toy-gpt2", "--pairs", 4, "--held-out", 3, "--methods", "ap,relp,eap-ig-2")


def rows(n, lengths=(6,), seed=0):
    """n lines of token ids, of these lengths by turns."""
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        original = torch.randint(2, 97, (lengths[i % len(lengths)],), generator=g)
        patch = original.clone()
        patch[1::3] = (patch[1::3] + 5) % 97
        yield dict(zip(IDS, (original.tolist(), patch.tolist(), *torch.randperm(97, generator=g)[:2].tolist())))


def jsonl(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def check_scores(found, model, pairs):
    """Every array again, pair by pair, and the correlation with exact patching."""
    graph = Graph.of(model.config)
    there = graph.edges.numpy()
    assert (found.writers, found.readers) == (graph.writers, graph.readers)
    for method in ("ap", *METHODS):
        scores = found.arrays[method]
        assert np.array_equal(~np.isnan(scores), np.broadcast_to(there, (len(pairs), *there.shape)))
        for i, pair in enumerate(pairs):
            batch = tensors([pair], "cpu")
            if method == "ap":
                wanted, _ = patch_edges(model, *batch)
            else:
                wanted = attribute_edges(model, *batch, **METHODS[method])
            np.testing.assert_allclose(scores[i][there], wanted[0].numpy()[there], atol=1e-4)
        if method != "ap":
            pooled = np.corrcoef(*(x[:, there].astype(float).ravel() for x in (scores, found.arrays["ap"])))[0, 1]
            assert found.summary["agreement"][method]["pooled"][0] == pytest.approx(pooled, abs=1e-5)


def test_files(toy):
    tokenizer = load_tokenizer("toy-gpt2")
    pairs = tasks.ioi(tokenizer, 7)
    check_scores(toy, models.from_pretrained("toy-gpt2"), pairs[:4])
    files = {"edges.npz", "summary.json", "graph.json", "circuit.png", "inspect.html"}
    files |= {f"circuit-{m}.json" for m in ("ap", *METHODS)}
    assert {path.name for path in toy.folder.iterdir()} == files and toy.folder.name == "toy-gpt2-edges"
    assert (toy.folder / "circuit.png").read_bytes().startswith(b"\x89PNG")
    judged = [tuple(i for i in row if i >= 0) for row in toy.arrays["judged_original_tokens"].tolist()]
    assert judged == [tuple(pair.original) for pair in pairs[4:]]
    summary = toy.summary
    assert (summary["prompt_pairs"], summary["judged_pairs"], summary["judged_on"]) == (4, 3, "3 held-out pairs")
    passes = {m: (cost["forward"], cost["backward"]) for m, cost in summary["cost"].items()}
    assert passes == {"ap": (summary["n_edges"], 0), "relp": (2, 1), "eap-ig-2": (4, 2)}
    assert all(cost["seconds"] > 0 for cost in summary["cost"].values())
    for edge, shown in zip(summary["drawn"]["edges"], re.findall(r"^    (\S+->\S+)", toy.out, re.M)):
        assert edge["edge"] == shown


def test_the_graph_for_neuronpedias_viewer(toy):
    """The fields that it reads; a link for every two components, the sum of their edges times -1."""
    graph, drawn = toy.json("graph.json"), toy.summary["drawn"]["edges"]
    assert graph["metadata"].keys() == {"slug", "scan", "prompt_tokens", "prompt", "info"} and graph["qParams"] == {}
    names = {node["node_id"]: node["node_id"].partition("@")[0] for node in graph["nodes"]}
    assert set(names.values()) == {node for edge in drawn for node in ends(edge["edge"])}
    sums = {}
    for edge in drawn:
        sums[ends(edge["edge"])] = sums.get(ends(edge["edge"]), 0) - edge["score"]
    links = {(names[link["source"]], names[link["target"]]): link["weight"] for link in graph["links"]}
    assert links == pytest.approx(sums)
    roles = dict(zip(tasks.ioi(load_tokenizer("toy-gpt2"), 4)[0].roles, range(99)))
    strongest = {ends(edge["edge"])[0]: edge["role"] for edge in reversed(drawn)}
    for node in graph["nodes"]:
        name, tokens = names[node["node_id"]], graph["metadata"]["prompt_tokens"]
        kinds = {"input": ("embedding", "E"), "logits": ("logit", "4"), "m": ("mlp", name[1:])}
        wanted = kinds.get(name) or kinds.get(name[0]) or ("attention head", name[1])
        assert (node["feature_type"], node["layer"]) == wanted and node["jsNodeId"] == node["node_id"]
        assert repr(tokens[node["ctx_idx"]]) in node["clerp"]
        if name in strongest and len(tokens) == len(roles):
            assert node["ctx_idx"] == roles[strongest[name]]


def test_the_drawn_edges_and_where_they_matter(toy):
    means, pairs = toy.means("relp"), tasks.ioi(load_tokenizer("toy-gpt2"), 4)
    drawn = toy.summary["drawn"]["edges"]
    names = sorted(toy.circuit("relp"), key=lambda name: -abs(means[name]))
    assert len(drawn) <= 24 < len(names) + 5 and [edge["edge"] for edge in drawn][:15] == names[:15]
    assert {edge["edge"] for edge in drawn} == pruned(edge["edge"] for edge in drawn) <= set(names)
    assert toy.summary["drawn"]["f"] == pytest.approx(Metric(toy, models.from_pretrained("toy-gpt2"), "judged_").f(
        {edge["edge"] for edge in drawn}, np.ones(3)), abs=1e-4)  # fmt: skip
    labels, at = overlay(pairs)
    model, sums = models.from_pretrained("toy-gpt2"), np.zeros((len(labels), len(toy.writers), len(toy.readers)))
    for pair, places in zip(pairs, at):
        scores = attribute_edges(model, *tensors([pair], "cpu"), lrp=True, by_position=True)[0].numpy()
        sums[places >= 0] += scores[places[places >= 0]]
    means_at = sums / (at >= 0).sum(0)[:, None, None]
    for edge in drawn:
        writer, reader = edge["edge"].split("->")
        here = abs(means_at[:, toy.writers.index(writer), toy.readers.index(reader)])
        assert edge["score"] == pytest.approx(means[edge["edge"]]) and edge["role"] == labels[here.argmax()].strip()


# ---------------------------------------------------------------------------------------------------------------------
# Circuits, judged again by MIB's formulas from the files


def ends(edge):
    writer, reader = edge.split("->")
    return writer, reader.partition("<")[0]


def pruned(edges):
    """Again and again without nodes that lack an edge in or an edge out; input needs none in, logits none out."""
    kept = set(edges)
    while True:
        have_in, have_out = {ends(edge)[1] for edge in kept}, {ends(edge)[0] for edge in kept}
        alive = {node for node in have_out if node == "input" or node in have_in} | {"logits"}
        fewer = {edge for edge in kept if alive.issuperset(ends(edge))}
        if fewer == kept:
            return kept
        kept = fewer


class Metric:
    """The metric of circuits on the pairs of an edges.npz."""

    def __init__(self, found, model, prefix):
        names = ("original_tokens", "patch_tokens", "answers")
        arrays = [torch.tensor(found.arrays[prefix + name]) for name in names]
        self.lengths = found.arrays[prefix + "lengths"].tolist()
        self.runs = [
            Circuits(ungrouped(model), arrays[0][[i], :n], arrays[1][[i], :n], arrays[2][[i]])
            for i, n in enumerate(self.lengths)
        ]
        self.graph = Graph.of(model.config)

    def __call__(self, edges):
        kept = self.graph.in_matrix(torch.tensor([name in edges for name in self.graph.names]))
        return np.array([float(run(kept)) for run in self.runs])

    def f(self, edges, counts):
        m, whole, empty = self(edges), self(self.graph.names), self([])
        return (counts @ (m - empty)) / (counts @ (whole - empty))


def check_circuits(found, model, groups):
    """Curves, areas with intervals, and the smallest circuit of each method."""
    metric, on_scored = Metric(found, model, "judged_"), Metric(found, model, "")
    counts = statistics.resamples(groups, seed=0).numpy()
    once = np.ones(len(on_scored.runs))
    for method in ("ap", *METHODS):
        means = found.means(method)
        for measure, which, order in (
            ("cpr", "signed", sorted(means, key=means.get)),
            ("cmd", "absolute", sorted(means, key=lambda name: -abs(means[name]))),
        ):
            circuits = [pruned(order[: int(share * len(order))]) for share in SHARES]
            f = np.array([metric.f(circuit, counts) for circuit in circuits])
            curve = found.summary["curves"][method][which]
            assert curve["edges"] == [len(circuit) for circuit in circuits]
            assert curve["f"] == pytest.approx(f[:, 0], abs=1e-4)
            heights = f if which == "signed" else abs(1 - f)
            for name, x in ((measure, np.array(SHARES)), (f"{measure}_log", np.log(SHARES) / np.log(1000))):
                area = sum((x[i + 1] - x[i]) * (heights[i] + heights[i + 1]) / 2 for i in range(len(x) - 1))
                wanted = [area[0], *np.quantile(area[1:], [0.025, 0.975])]
                assert found.summary["areas"][method][name] == pytest.approx(wanted, abs=1e-4)
        kept, of = found.circuit(method), found.summary["circuits"][method]
        assert kept == pruned(kept) and of["edges"] == len(kept) and of["inclusion"].keys() == kept
        assert on_scored.f(kept, once) >= 0.8 > on_scored.f(pruned(order[: order.index(last(order, kept))]), once)
        assert of["f"] == pytest.approx(metric.f(kept, np.ones(len(metric.runs))), abs=1e-4)
    one, other = (found.summary["areas"][method]["cpr"][0] for method in METHODS)
    assert found.summary["area_differences"]["eap-ig-2 - relp"]["cpr"][0] == pytest.approx(other - one)


def last(order, kept):
    """The edge of a ranking that completes a circuit: with those before it, pruning leaves the circuit."""
    return next(name for i, name in enumerate(order) if pruned(order[: i + 1]) == kept)


def test_circuits(toy):
    pairs = tasks.ioi(load_tokenizer("toy-gpt2"), 7)
    check_circuits(toy, models.from_pretrained("toy-gpt2"), [pair.group for pair in pairs[4:]])


# ---------------------------------------------------------------------------------------------------------------------
# Options


def test_unequal_lengths_shared_keys_and_a_file_to_judge_by(command, checkpoint, tmp_path):
    """Llama: four query heads share two keys and values; each has readers of its own."""
    path, prompts = checkpoint("llama")[0], jsonl(tmp_path / "mixed.jsonl", *rows(3, (4, 3)))
    judge = jsonl(tmp_path / "judge.jsonl", *rows(2, (5, 2), seed=1))
    how = ["--model", path, "--prompts", prompts, "--methods", "ap,relp,eap-ig-2", "--no-plot"]
    found = command(*how, "--judge", judge, "--batch-size", 1)
    check_scores(found, models.from_pretrained(str(path)), read_pairs(prompts))
    one, other = (found.arrays["ap"][0, 0, found.readers.index(f"a0.h{head}<k>")] for head in (0, 1))
    assert one != other and not (found.folder / "circuit.png").exists()
    assert found.summary["judged_on"] == f"2 pairs of {judge}" and found.summary["judged_pairs"] == 2
    same = command(*how, "--pairs", 2)
    assert (same.summary["prompt_pairs"], same.summary["judged_on"]) == (2, "the same pairs")
    np.testing.assert_allclose(same.arrays["relp"], found.arrays["relp"][:2], atol=1e-5)


def test_best_is_a_mean_of_edges_by_both(command, checkpoint, tmp_path):
    folder, _ = checkpoint("qwen2")
    file = jsonl(tmp_path / "few.jsonl", *rows(3))
    run = command("--model", folder, "--prompts", file, "--methods", "relp,twopoint,best", "--no-plot", "--no-bos")
    of_relp, two, best = (run.arrays[m] for m in ("relp", "twopoint", "best"))
    np.testing.assert_allclose(best, 0.6 * of_relp + 0.4 * two, atol=1e-5, equal_nan=True)
    passes = {m: (cost["forward"], cost["backward"]) for m, cost in run.summary["cost"].items()}
    assert passes == {"relp": (2, 1), "twopoint": (2, 1), "best": (4, 2)}


def test_verify(command):
    """Exact patching of the K edges with the largest mean scores, and of no others."""
    given = ["--pairs", 3, "--held-out", 3, "--methods", "ap,atp,relp", "--verify", 5, "--no-plot"]
    found = command("--model", "toy-gemma2", *given)
    verified, means = found.summary["verified"], {m: found.means(m) for m in ("atp", "relp")}
    assert "ap" not in found.arrays and not found.summary["agreement"] and verified["ranked_by"] == "relp"
    wanted = sorted(means["relp"], key=lambda name: -abs(means["relp"][name]))[:5]
    assert [row["edge"] for row in verified["edges"]] == wanted and verified["of"] == len(means["relp"])
    model, pairs = models.from_pretrained("toy-gemma2"), tasks.ioi(load_tokenizer("toy-gemma2"), 3)
    exact = sum(patch_edges(model, *tensors([pair], "cpu"))[0][0] for pair in pairs) / 3
    for row in verified["edges"]:
        writer, reader = row["edge"].split("->")
        effect = float(exact[found.writers.index(writer), found.readers.index(reader)])
        wanted = {"ap": effect, **{m: of[row["edge"]] for m, of in means.items()}}
        assert row["scores"] == pytest.approx(wanted, abs=1e-4) and f"  {row['edge']} " in found.out


def test_a_sample_of_edges_is_patched_and_compared(command):
    """Drawn by the seed; the others have no exact score, and no circuit is found by it."""
    given = ["--model", "toy-qwen2", "--pairs", 3, "--held-out", 2, "--methods", "relp,ap", "--sample", 40, "--no-plot"]
    found, other = command(*given), command(*given, "--seed", 1)
    exact, there = found.arrays["ap"], ~np.isnan(found.arrays["ap"])
    assert there[0].sum() == 40 and (there == there[0]).all() and found.summary["patched_edges"] == 40
    assert not np.array_equal(there[0], ~np.isnan(other.arrays["ap"][0]))
    assert "exact patching of 40 edges drawn at random" in found.out and "ap" not in found.summary["circuits"]
    model, pairs = models.from_pretrained("toy-qwen2"), tasks.ioi(load_tokenizer("toy-qwen2"), 3)
    wanted = np.stack([patch_edges(model, *tensors([pair], "cpu"))[0][0].numpy() for pair in pairs])
    np.testing.assert_allclose(exact[there], wanted[there], atol=1e-4)
    pooled = np.corrcoef(found.arrays["relp"][there], exact[there])[0, 1]
    assert found.summary["agreement"]["relp"]["pooled"][0] == pytest.approx(pooled, abs=1e-5)


def test_circuits_along_paths(command):
    """Without pruning, nearly all edges that a share asks for are there; edge by edge, many lead nowhere."""
    given = ["--model", "toy-qwen2", "--pairs", 4, "--held-out", 2, "--methods", "relp", "--no-plot"]
    found, plain = command(*given, "--paths"), command(*given)
    n = [int(share * found.summary["n_edges"]) for share in SHARES]
    sizes, fewer = (of.summary["curves"]["relp"]["absolute"]["edges"] for of in (found, plain))
    assert all(n - 8 <= size <= n for n, size in zip(n, sizes)) and sum(fewer) < sum(sizes)
    graph = Graph.of(models.from_pretrained("toy-qwen2").config)
    scores = graph.in_matrix(torch.tensor([found.means("relp")[name] for name in graph.names]))
    order, kept = ranking(scores, graph, signed=False, paths=True), found.circuit("relp")
    assert kept in [set(graph.names_of(best(order, n, graph))) for n in range(len(order))] and len(kept) > 3
    assert found.summary["circuits"]["relp"]["inclusion"].keys() == kept


def test_held_out_pairs_of_a_file(command, checkpoint, tmp_path):
    file = jsonl(tmp_path / "some.jsonl", *rows(6))
    how = ["--model", checkpoint("gpt2")[0], "--prompts", file, "--methods", "relp", "--no-plot"]
    found = command(*how, "--pairs", 4, "--held-out", 2)
    sides = [{tuple(row) for row in found.arrays[f"{side}original_tokens"].tolist()} for side in ("", "judged_")]
    assert [len(side) for side in sides] == [4, 2] and not sides[0] & sides[1]
    assert found.summary["judged_on"] == "2 held-out pairs"


def test_bfloat16_and_the_same_seed(command, checkpoint, tmp_path):
    prompts = jsonl(tmp_path / "ids.jsonl", *rows(2, (4,)))
    how = ["--model", checkpoint("gemma2")[0], "--prompts", prompts, "--no-plot", "--methods", "ap,relp"]
    half, single, again = command(*how, "--dtype", "bfloat16"), command(*how), command(*how)
    for method in ("ap", "relp"):
        scores, wanted = (np.array(list(found.means(method).values())) for found in (half, single))
        assert np.isfinite(scores).all() and np.corrcoef(scores, wanted)[0, 1] > 0.95
        assert math.isfinite(half.summary["areas"][method]["cpr"][0])
        np.testing.assert_array_equal(single.arrays[method], again.arrays[method])
    assert single.summary["areas"] == again.summary["areas"]


def test_a_single_pair(command, checkpoint, tmp_path):
    """All is there but for intervals: one pair says nothing about the spread."""
    prompts = jsonl(tmp_path / "one.jsonl", IDS)
    found = command("--model", checkpoint("gpt2")[0], "--prompts", prompts, "--methods", "ap,relp")
    for method in ("ap", "relp"):
        value, *interval = found.summary["areas"][method]["cpr"]
        assert math.isfinite(value) and interval == [None, None] and found.circuit(method)
    assert "[" not in found.out and (found.folder / "circuit.png").exists()


def test_files_of_an_earlier_run_go(command, checkpoint, tmp_path):
    prompts = jsonl(tmp_path / "ids.jsonl", *rows(2))
    how = ["--model", checkpoint("gpt2")[0], "--prompts", prompts, "--methods"]
    command(*how, "atp,relp", out=tmp_path / "out")
    found = command(*how, "ln+ah", "--no-plot", out=tmp_path / "out")
    files = {"edges.npz", "summary.json", "graph.json", "circuit-ln-ah.json"}  # no picture, and no page
    assert {path.name for path in found.folder.iterdir()} == files


def test_exact_patching_is_the_default_for_toys_only(monkeypatch):
    asked = []
    monkeypatch.setattr("beyond.edges.__main__.evaluate_edges", lambda name, o: asked.append(o.methods))
    for model in ("toys", "gpt2"):
        main(["--model", model])
    assert asked == 4 * [["ap", "atp", "relp", "twopoint", "eap-ig-5"]] + [["atp", "relp", "twopoint", "eap-ig-5"]]


@pytest.mark.parametrize("arguments, words", [
    (["--methods", "ap"], ["method", "besides ap"]),
    (["--methods", "relp,atp*"], ["atp*", "edges"]),
    (["--methods", "ig"], ["ig", "edges"]),
    (["--methods", "eap-ig-0"], ["eap-ig-0"]),
    (["--nodes", "mlp_out"], ["--nodes"]),
    (["--verify", "0"], ["--verify"]),
    (["--judge", "no-such-file.jsonl"], ["no-such-file.jsonl"]),
    (["--judge", ""], ["--judge"]),
    (["--prompts", "ids.jsonl", "--held-out", "3"], ["3 held out are too many"]),
    (["--judge", "ids.jsonl", "--held-out", "3"], ["--judge", "--held-out"]),
    (["--verify", "3", "--sample", "3"], ["--verify", "--sample"]),
    (["--prompts", "ids.jsonl", "--judge", "bad.jsonl"], ["line 2", "differ"]),
], ids=lambda value: " ".join(value))  # fmt: skip
def test_bad_input_is_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "ids.jsonl", IDS)
    jsonl(tmp_path / "bad.jsonl", IDS, {**IDS, "patch": IDS["original"]})  # nothing to explain
    code = run_command(main, ["--model", "toy-gpt2", "--pairs", "2", *arguments])
    out, err = capsys.readouterr()
    assert code == 2 and len(err.splitlines()) == 1 and not list(tmp_path.rglob("*.npz"))
    assert all(word in err for word in words), err


# ---------------------------------------------------------------------------------------------------------------------
# The picture, and the README


@pytest.mark.parametrize("n", [0, 1, 24])
def test_the_picture(n, tmp_path, capsys):
    graph = Graph(3, 4)
    edges = [{"edge": e, "score": (-1) ** i * (n - i), "role": f"${i}"} for i, e in enumerate(graph.names[:n])]
    drawn = figure.draw("cash $ and $carry", edges, graph)
    save_figure(tmp_path / "circuit.png", lambda: drawn)
    assert capsys.readouterr().out == "" and (tmp_path / "circuit.png").read_bytes().startswith(b"\x89PNG")
    (ax,), nodes = drawn.axes, {node for edge in edges for node in ends(edge["edge"])}
    texts = [f"{edge['role']}\n{edge['score']:.3g}".replace("-", "−") for edge in edges]
    assert drawn.get_suptitle() == "cash $ and $carry"
    assert sorted(text.get_text() for text in ax.texts) == sorted([*nodes, *texts])
    lines = [patch for patch in ax.patches if isinstance(patch, PathPatch)][::-1]  # the strongest is drawn last
    widths = [line.get_linewidth() for line in lines]
    assert len(lines) == len(edges) and widths == sorted(widths, reverse=True)
    for edge, line in zip(edges, lines):
        kind = re.search(r"(q|k|v|m|logits)(\d*|>)$", edge["edge"])[1]
        assert same_color(line.get_edgecolor()[:3], figure.COLORS["mlp" if kind == "m" else kind])
        assert (line.get_linestyle() in ("--", "dashed")) == (edge["score"] > 0)
    shown = {text.get_text() for text in drawn.legends[0].get_texts()}
    kinds = {figure.ends(edge["edge"])[2] for edge in edges}
    assert shown == {figure.LABELS[kind] for kind in kinds} | ({figure.AGAINST} if n else set())


@pytest.mark.parametrize("seed", range(3))
def test_no_line_behind_a_box_and_no_label_on_another(seed):
    """Thirty layers, 24 edges at random: all lines run upwards, beside the boxes that they do not join."""
    graph, g = Graph(30, 9), torch.Generator().manual_seed(seed)
    names = [graph.names[i] for i in torch.randint(len(graph.names), (24,), generator=g)]
    names += ["input->logits", "a3.h1->m3", "m3->a9.h0<q>", "m3->a9.h0<k>", "m3->a9.h0<v>"]
    drawn = layout.layout(names := list(dict.fromkeys(names)), graph)
    assert drawn.boxes.keys() == {node for name in names for node in ends(name)}
    half = layout.WIDTH / 2, layout.HEIGHT / 2
    for name, points in zip(names, drawn.points):
        y = [y for _, y in points]
        assert y == sorted(y) and points[0][1] == drawn.boxes[ends(name)[0]][1] + half[1]
        assert points[-1][1] == drawn.boxes[ends(name)[1]][1] - half[1]
        line = figure.curve(points).interpolated(1).to_polygons(closed_only=False)[0]
        for node, (x, y) in drawn.boxes.items():
            if node not in ends(name):
                inside = (abs(line[:, 0] - x) < half[0] + layout.GAP / 2) & (abs(line[:, 1] - y) < half[1])
                assert not inside.any(), (name, node)
    places = [(x, y, layout.LABEL) for x, y in drawn.labels]
    places += [(x, y, layout.WIDTH) for x, y in drawn.boxes.values()]
    for i, (x, y, width) in enumerate(places):
        for x2, y2, width2 in places[:i]:
            assert abs(y - y2) > 0.3 or abs(x - x2) >= (width + width2) / 2 - 1e-6


def test_a_circuit_that_is_too_large_is_drawn_in_part():
    """The largest of the ranking's pruned circuits with at most so many edges: not simply its first edges."""
    graph, g = Graph(4, 3), torch.Generator().manual_seed(0)
    scores = torch.randn(graph.edges.shape, generator=g)
    order = ranking(scores, graph, signed=False)
    kept = best(order, 150, graph)
    assert torch.equal(drawable(order, kept, graph, int(kept.sum())), kept)
    few = drawable(order, kept, graph, 24)
    sizes = [int(best(order, n, graph).sum()) for n in range(150)]
    first = next(n for n, size in enumerate(sizes) if size > 24)
    assert 0 < few.sum() == max(sizes[:first]) <= 24 and not (few & ~kept).any()
    assert set(graph.names_of(few)) == pruned(graph.names_of(few))


def test_the_code_in_the_readme_runs():
    readme = (Path(models.__file__).parent / "beyond" / "edges" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    namespace = {}
    exec(code, namespace)
    assert namespace["scores"].shape == namespace["exact"].shape == (1, 21, 53) and namespace["n_runs"] == 479
