"""What the command writes: folders that cannot be, a full disk, killed runs, and the results of earlier runs."""
# ruff: noqa: F811 (fixtures that are imported)

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from safetensors.torch import load_file, save_file
from test_evaluate import IDS, NODES, jsonl, results, run, same, tiny, written  # noqa: F401

import evaluate
import tasks
from support import figures
from support.methods import AP
from support.results import fingerprint
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


def test_output_folders_that_cannot_be(tiny, capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null", "/proc/results"):
        assert evaluate.main(["--model", str(tiny["gpt2"]), "--pairs", "3", "--out", str(out)]) == 2
        printed, err = capsys.readouterr()
        assert len(err.splitlines()) == 1 and err.startswith("evaluate.py: error:") and str(out) in err
        assert printed == ""  # before any work
    assert (tmp_path / "file").read_text() == "precious"


def test_a_models_folder_that_cannot_be(tiny, run, tmp_path):
    """The second model's folder is a file: the first one's results stay."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gemma2-ioi").write_text("precious")
    code, _, err = run("--model", tiny["gpt2"], tiny["gemma2"], "--pairs", 3, "--no-plot")
    assert code == 2 and len(err) == 1 and "gemma2-ioi" in err[0]
    assert sorted(p.name for p in (tmp_path / "out" / "gpt2-ioi").iterdir()) == ["scores.npz", "summary.json"]
    assert (tmp_path / "out" / "gemma2-ioi").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# Runs that cannot write, or are stopped


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file that takes 300 bytes and no more."""

    def write(self, data):
        if self.tell() + len(data) > 300:
            full_disk()
        return super().write(data)


CASES = [
    ("scores.npz", "open"),
    ("scores.npz", "write"),
    ("scores.npz", "replace"),
    ("summary.json", "write"),
    ("heatmaps.png", "write"),
    ("inspect.html", "write"),
]


@pytest.mark.parametrize("file, how", CASES)
def test_a_full_disk_leaves_the_old_files_whole(file, how, tiny, run, tmp_path, monkeypatch):
    arguments = ["--model", tiny["gpt2"], tiny["gemma2"], "--pairs", 3, "--nodes", "mlp_out"]
    arguments += [] if file.endswith(("png", "html")) else ["--no-plot"]
    assert run(*arguments)[0] == 0

    def files():
        """{path: content}. A failed run may keep its finished part (unfinished-*) for the next one, which takes it."""
        every = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in every if not path.name.startswith("unfinished-")}

    before = files()
    assert len(before) == (11 if file.endswith(("png", "html")) else 4)

    def replaced(source, target, replace=os.replace):
        return full_disk() if file in str(target) else replace(source, target)

    def opened(path, mode="r", *a, open=open, **k):
        if file not in str(path) or "w" not in mode:
            return open(path, mode, *a, **k)
        return full_disk() if how == "open" else FullDisk(path, "w")

    if how == "replace":
        monkeypatch.setattr(os, "replace", replaced)
    else:
        monkeypatch.setattr("builtins.open", opened)
    code, _, err = run(*arguments, "--seed", 1)
    assert code == 2 and len(err) == (1 if file in ("pcc.png", "inspect.html") else 2), err  # or one for each model
    assert all(line.startswith("evaluate.py: error:") and file in line and "No space left" in line for line in err)
    after = files()
    assert after.keys() == before.keys()  # no debris
    assert all(after[path] == before[path] for path in after if path.name == file)
    monkeypatch.undo()
    assert run(*arguments, "--seed", 1)[0] == 0
    assert not list((tmp_path / "out").rglob("unfinished-*")) and not list((tmp_path / "out").rglob(".*"))


def test_a_killed_run_leaves_the_old_files_whole(tiny, run, tmp_path, monkeypatch):
    """An interrupt in the middle of a write: the file of the run before is still there, and no half one."""
    arguments = ["--model", tiny["gpt2"], "--pairs", 3, "--no-plot"]
    assert run(*arguments)[0] == 0
    folder = tmp_path / "out" / "gpt2-ioi"
    before = (folder / "scores.npz").read_bytes()

    def interrupted(file, **arrays):
        file.write(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(*arguments, "--seed", 1)
    assert (folder / "scores.npz").read_bytes() == before
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_damaged_unfinished_file_is_no_obstacle(tiny, run, results, tmp_path, monkeypatch):
    """A stopped run leaves its finished part for the next one. If that file is damaged, the next one starts afresh."""
    arguments = ["--pairs", 3, "--nodes", "resid_pre"]
    _, wanted = results(tiny["gpt2"], *arguments)
    with monkeypatch.context() as m:
        m.setattr(np, "savez_compressed", full_disk)
        assert run("--model", tiny["gpt2"], *arguments, "--no-plot")[0] == 2
    left = list((tmp_path / "out").rglob("unfinished-*"))
    assert left
    for file in left:
        file.write_bytes(file.read_bytes()[:100])
    same(results(tiny["gpt2"], *arguments)[1], wanted)


# ---------------------------------------------------------------------------------------------------------------------
# The results of an earlier run in the same folder


@pytest.fixture
def into(tiny, run, tmp_path):
    """into(*arguments) -> (summary.json, scores.npz, the lines about earlier results) of a run that must end well."""

    def call(*arguments, model=tiny["gpt2"], pairs=6):
        code, out, err = run("--model", model, "--pairs", pairs, "--no-plot", *arguments)
        assert (code, err) == (0, [])
        lines = [line for line in out.splitlines() if line.startswith(f"  {tmp_path}/out/") and " holds " in line]
        return *written(tmp_path / "out" / f"{model.name}-ioi"), lines

    return call


def methods_in(scores):
    found = {key.removesuffix(f"_{node}") for key in scores for node in NODES if key.endswith(f"_{node}")}
    return found - {"doubt"}  # of two methods


def test_a_method_is_added_to_those_of_an_earlier_run(tiny, into, run, tmp_path, monkeypatch):
    """AP and RelP first, the two-point rules later: files, table and figure have all three, as if run together."""
    before_summary, before, _ = into("--methods", "ap,relp")
    drawn = []

    def heatmaps(title, scores, methods, nodes, *rest):
        drawn.append(([method.name for method in methods], scores))
        return draw(title, scores, methods, nodes, *rest)

    draw = figures.heatmaps
    monkeypatch.setattr(figures, "heatmaps", heatmaps)
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 6, "--methods", "twopoint")
    assert (code, err) == (0, []) and " holds " not in out
    summary, scores = written(tmp_path / "out" / "gpt2-ioi")
    assert methods_in(scores) == {"ap", "relp", "twopoint"}
    same({key: scores[key] for key in before}, before)
    assert drawn[0][0] == ["ap", "relp", "twopoint"] and drawn[0][1].keys() == {
        (method, node) for method in ("ap", "relp", "twopoint") for node in NODES
    }
    for what in ("ap", "relp"):
        assert summary["seconds"][what] == before_summary["seconds"][what]
    assert summary["pcc"]["relp"] == before_summary["pcc"]["relp"]
    assert summary["audit"]["relp"] == before_summary["audit"]["relp"] and "twopoint" in summary["audit"]
    assert summary["conservation"] == before_summary["conservation"] is not None

    # the numbers and the table of one run with all three
    shutil.rmtree(tmp_path / "out")
    _, at_once, _ = run("--model", tiny["gpt2"], "--pairs", 6, "--methods", "ap,relp,twopoint", "--no-plot")
    together, wanted = written(tmp_path / "out" / "gpt2-ioi")
    same(scores, wanted)
    assert summary["pcc"] == together["pcc"] and summary["differences"] == together["differences"]

    def table(text):  # without the seconds
        rows = text[text.index("  PCC with AP") : text.index("  written to")].splitlines()
        return [line[:90].rstrip() for line in rows if not line.startswith("  AP ")]

    assert table(out) == table(at_once) and any(line.startswith("  two-point - RelP") for line in table(out))


def test_a_smaller_batch_is_still_the_same_model(into):
    """Rounding depends on how many prompts go through the model together."""
    _, before, _ = into("--methods", "ap,relp")
    _, scores, lines = into("--methods", "atp", "--batch-size", 1)
    assert lines == [] and methods_in(scores) == {"ap", "atp", "relp"}
    same({key: scores[key] for key in before if key != "values"}, {k: v for k, v in before.items() if k != "values"})


def test_a_method_that_is_run_again_is_replaced(into):
    _, before, _ = into("--methods", "ap,atp,relp")
    summary, scores, lines = into("--methods", "atp,relp", "--rules", "none")
    assert methods_in(scores) == {"ap", "atp", "relp"} and len(lines) == 1 and "relp with other rules" in lines[0]
    for node in NODES:
        np.testing.assert_array_equal(scores[f"relp_{node}"], scores[f"atp_{node}"])
        assert not np.array_equal(scores[f"relp_{node}"], before[f"relp_{node}"])
        np.testing.assert_array_equal(scores[f"ap_{node}"], before[f"ap_{node}"])
    assert summary["pcc"]["relp"] == summary["pcc"]["atp"]


@pytest.mark.parametrize("arguments, words", [
    (["--seed", 1], "a run on other prompts"),
    (["--corruption", "s2"], "a run on other prompts"),
    (["--no-bos"], "a run on other prompts"),
    (["--metric", "prob_diff"], "a run with another metric"),
    (["--dtype", "float64"], "a run with another dtype"),
])  # fmt: skip
def test_results_of_another_run_are_replaced_with_a_word(arguments, words, into):
    into("--methods", "ap,relp")
    summary, scores, lines = into("--methods", "atp", *arguments)
    assert len(lines) == 1 and words in lines[0] and "this run replaces them" in lines[0]
    assert methods_in(scores) == {"atp"} and summary["pcc"] == {} and summary["seconds"].keys() == {"atp"}


def test_more_pairs_are_other_prompts(into):
    into("--methods", "ap,relp")
    _, scores, lines = into("--methods", "atp", pairs=7)
    assert len(lines) == 1 and "other prompts" in lines[0] and methods_in(scores) == {"atp"}


def test_results_of_other_weights_are_replaced_with_a_word(tiny, into, tmp_path):
    """A model in another folder of the same name, and a model that has changed in its folder."""
    _, before, _ = into("--methods", "ap,relp")
    weights = load_file(tiny["gpt2"] / "model.safetensors")
    weights["transformer.h.1.mlp.c_proj.weight"] *= 1.01
    shutil.copytree(tiny["gpt2"], tmp_path / "gpt2")
    save_file(weights, tmp_path / "gpt2" / "model.safetensors")
    _, scores, lines = into("--methods", "atp", model=tmp_path / "gpt2")
    assert len(lines) == 1 and "other weights" in lines[0] and "this run replaces them" in lines[0]
    assert methods_in(scores) == {"atp"}
    assert np.abs(scores["values"] - before["values"]).max() < 0.1 * np.abs(before["values"]).max()  # nearly the same


def test_scores_of_ig_with_other_steps_are_dropped(into):
    into("--methods", "ap,ig", "--steps", 2)
    _, scores, lines = into("--methods", "atp", "--steps", 2)
    assert lines == [] and methods_in(scores) == {"ap", "atp", "ig"}
    summary, scores, lines = into("--methods", "ap,atp")
    assert len(lines) == 1 and "ig with other steps" in lines[0] and "drops" in lines[0]
    assert methods_in(scores) == {"ap", "atp"} and summary["pcc"].keys() == {"atp"}
    summary, scores, lines = into("--methods", "relp", "--steps", 2)  # the first run's number, but its scores are gone
    assert lines == [] and methods_in(scores) == {"ap", "atp", "relp"} and summary["pcc"].keys() == {"atp", "relp"}


def test_scores_of_relp_with_other_rules_are_dropped(into):
    """They are not taken for those of the rules that the new run names."""
    into("--methods", "ap,relp,ln")
    summary, scores, lines = into("--methods", "ap,atp", "--rules", "ln")
    assert len(lines) == 1 and "relp with other rules" in lines[0] and "drops" in lines[0]
    assert methods_in(scores) == {"ap", "atp", "ln"}  # a set of rules in a method's own name stays
    assert summary["pcc"].keys() == {"atp", "ln"} and summary["conservation"] is None
    assert summary["audit"].keys() == {"ln"}


def test_rules_of_a_run_that_could_not_end(into, run, tiny, monkeypatch):
    """It has written scores.npz, and not summary.json, which still has the rules of the run before."""
    into("--methods", "ap,relp")
    with monkeypatch.context() as m:
        m.setattr(evaluate.results, "save_json", full_disk)
        assert run("--model", tiny["gpt2"], "--pairs", 6, "--no-plot", "--methods", "relp", "--rules", "none")[0] == 2
    summary, scores, _ = into("--methods", "atp")
    for node in NODES:  # RelP's scores without rules must not be shown as those of the paper's
        assert f"relp_{node}" not in scores or not np.array_equal(scores[f"relp_{node}"], scores[f"atp_{node}"])
    assert "relp" not in summary["pcc"] or summary["pcc"]["relp"] != summary["pcc"]["atp"]


def test_another_choice_of_nodes_keeps_what_is_there(into):
    _, before, _ = into("--methods", "ap,relp", "--nodes", "resid_pre,mlp_out")
    summary, scores, lines = into("--methods", "atp", "--nodes", "mlp_out")
    assert lines == [] and summary["pcc"].keys() == {"atp", "relp"} and summary["pcc"]["relp"].keys() == {"mlp_out"}
    same({key: scores[key] for key in before}, before)
    summary, scores, lines = into("--methods", "atp", "--nodes", "attn_out")  # no method has these but this one
    assert lines == [] and summary["seconds"].keys() == {"atp"} and summary["pcc"] == {}
    same({key: scores[key] for key in before}, before)
    summary, scores, lines = into("--methods", "twopoint", "--nodes", "resid_pre")
    assert (
        summary["pcc"].keys() == {"relp", "twopoint"} and summary["seconds"]["ap"] is None
    )  # of a summary that is gone


def test_a_prompts_file_named_like_a_task(tiny, run, into, tmp_path):
    """Its results do not go where those of the templates are."""
    into("--methods", "ap,relp")
    folder = tmp_path / "out" / "gpt2-ioi"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("ioi", "sva"):
        prompts = jsonl(tmp_path / f"{name}.jsonl", IDS)
        code, out, err = run("--model", tiny["gpt2"], "--prompts", prompts, "--methods", "ap,relp", "--no-plot")
        assert (code, err) == (0, []) and " holds " not in out
        assert written(tmp_path / "out" / f"gpt2-{name}.jsonl")[1]["original_tokens"].tolist() == [[5, 6, 7, 8]]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_damaged_earlier_results_are_no_obstacle(into, tmp_path):
    """scores.npz with wrong bytes, or cut: what can be read is used, and nothing else happens."""
    _, before, _ = into("--methods", "ap,relp", "--nodes", "mlp_out")
    path, rng = tmp_path / "out" / "gpt2-ioi" / "scores.npz", random.Random(0)
    whole, kept = path.read_bytes(), 0
    for i in range(30):
        damaged = bytearray(whole)
        if i % 5 == 0:
            del damaged[rng.randrange(len(whole)) :]
        else:  # the directory at the end, or anywhere
            for _ in range(rng.choice([1, 3])):
                at = rng.randrange(-800, 0) if i % 2 else rng.randrange(len(whole))
                damaged[at] = rng.randrange(256)
        path.write_bytes(damaged)
        _, scores, _ = into("--methods", "atp", "--nodes", "mlp_out")
        assert "atp_mlp_out" in scores
        kept += "ap_mlp_out" in scores
        assert "ap_mlp_out" not in scores or np.array_equal(scores["ap_mlp_out"], before["ap_mlp_out"], equal_nan=True)
    assert 0 < kept < 30  # a wrong byte may lie where it does not matter


SUMMARIES = ["", "{", "[]", "5", "{}", '{"arguments": 5}', '{"arguments": {"task": "sva"}}']


@pytest.mark.parametrize("text", SUMMARIES)
def test_scores_without_a_summary_are_of_an_unknown_run(text, into, tmp_path):
    """With which rules RelP's scores were made is not known: they are dropped. AP's do not depend on an option."""
    _, before, _ = into("--methods", "ap,relp")
    path = tmp_path / "out" / "gpt2-ioi" / "summary.json"
    path.write_text(text)
    summary, scores, lines = into("--methods", "atp")
    assert len(lines) == 1 and "relp with unknown rules: this run drops them" in lines[0]
    assert methods_in(scores) == {"ap", "atp"} and summary["seconds"]["ap"] is None
    for node in NODES:
        np.testing.assert_array_equal(scores[f"ap_{node}"], before[f"ap_{node}"])
    path.unlink()
    assert methods_in(into("--methods", "relp")[1]) == {"ap", "atp", "relp"}


def test_an_unreadable_part_of_a_summary(into, tmp_path):
    into("--methods", "ap,relp")
    path = tmp_path / "out" / "gpt2-ioi" / "summary.json"
    parts = [
        ("seconds", ...),
        ("audit", ...),
        ("conservation", ...),
        ("seconds", 5),
        ("seconds", {"ap": "x"}),
        ("audit", []),
    ]
    for part, value in parts:
        summary = json.loads(path.read_text())
        summary[part] = value
        path.write_text(json.dumps({key: value for key, value in summary.items() if value is not ...}))
        _, scores, lines = into("--methods", "atp")
        assert lines == [] and methods_in(scores) == {"ap", "atp", "relp"}


def test_foreign_arrays_beside_the_scores(into, tmp_path):
    """An array that is of no method, or of another shape, is not taken for scores."""
    _, before, _ = into("--methods", "ap,relp")
    path = tmp_path / "out" / "gpt2-ioi" / "scores.npz"
    mine = {f"mine_{node}": before[f"ap_{node}"] for node in NODES}
    flat = {f"ig_{node}": before[f"ap_{node}"][:, :1] for node in NODES}
    np.savez(path, **before, **mine, **flat)
    beside = path.with_name("summary.json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"scores_npz": fingerprint(path)}))
    summary, scores, _ = into("--methods", "atp")
    assert summary["pcc"].keys() == {"atp", "relp"} and summary["seconds"].keys() == {"ap", "atp", "relp"}
    same({key: scores[key] for key in (*before, *mine)}, before | mine)


def test_figures_of_replaced_results_go(tiny, run, tmp_path):
    """What an earlier run on other prompts has drawn and found does not stay beside the new scores."""
    folder, arguments = tmp_path / "out" / "gpt2-ioi", ["--model", tiny["gpt2"], "--pairs", 3, "--nodes", "mlp_out"]
    assert run(*arguments, "--methods", "relp", "--verify", 2)[0] == 0
    derived = {"heatmaps.png", "conservation.png", "verified.json"}
    assert derived <= {path.name for path in folder.iterdir()}
    assert run(*arguments, "--methods", "atp", "--no-plot")[0] == 0  # the same prompts: nothing is replaced
    assert derived <= {path.name for path in folder.iterdir()}
    assert run(*arguments, "--seed", 1, "--no-plot")[0] == 0
    assert not derived & {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------------------------
# What is kept, what is drawn


def test_dollars_are_no_mathematics(tiny, run, tmp_path):
    """In tokens, in a model's name; and braces that mathematics would not like."""
    named = tmp_path / "$x_{$"
    shutil.copytree(tiny["gpt2"], named)
    row = {"original": [5, 6, 7], "patch": [5, 9, 7], "original_answer": 1, "patch_answer": 2}
    prompts = tmp_path / "pairs.jsonl"
    text = {"original": "$$ a $x_{$", "patch": "$$ b $x_{$", "original_answer": 1, "patch_answer": 2}
    for line in (row, text):
        prompts.write_text(json.dumps(line))
        code, out, err = run("--model", named, "--prompts", prompts)
        assert (code, err) == (0, []) and "could not be drawn" not in out
    assert list(tmp_path.glob("out/*/heatmaps.png"))


@pytest.mark.parametrize("node, shape", [("head", (3, 2, 16, 4)), ("mlp_out", (3, 2, 16))])
def test_the_title_fits(node, shape):
    """A figure of heads is narrow, and the model's name may be long."""
    pairs = tasks.ioi(load_tokenizer("toy-gpt2"), 3)
    name = "results/of/a/model-with-a-long-name"
    figure = figures.heatmaps(name, {("ap", node): np.ones(shape)}, [AP], [node], pairs, "logit_diff")
    FigureCanvasAgg(figure).draw()
    title = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text().startswith("results"))[0]
    box = title.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_a_figure_that_fails_costs_the_figure(tiny, run, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no such colour\nand more")

    monkeypatch.setattr(figures, "heatmaps", fail)
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 3)
    assert (code, err) == (0, [])
    (line,) = [line for line in out.splitlines() if "could not be drawn" in line]
    assert "heatmaps.png could not be drawn: no such colour" in line
    folder = tmp_path / "out" / "gpt2-ioi"
    assert "PCC with AP" in out and (folder / "conservation.png").exists()


def test_figures_go_with_the_scores_they_show(into, run, tiny, tmp_path):
    folder = tmp_path / "out" / "gpt2-ioi"
    run("--model", tiny["gpt2"], "--pairs", 3, "--out", tmp_path / "out")
    assert (folder / "heatmaps.png").exists() and (folder / "conservation.png").exists()
    run(
        "--model",
        tiny["gpt2"],
        "--pairs",
        3,
        "--out",
        tmp_path / "out",
        "--methods",
        "atp",
        "--rules",
        "ln",
        "--no-plot",
    )
    assert not (folder / "heatmaps.png").exists() and not (folder / "conservation.png").exists()


def test_verify_leaves_what_summary_has(into):
    """It asks for other nodes, of which AP has none: what was said of the usual ones stays."""
    summary, scores, _ = into("--methods", "ap,atp,relp")
    later, _, _ = into("--verify", "5", "--methods", "relp")
    assert later["pcc"]["atp"] == summary["pcc"]["atp"] and later["seconds"]["ap"] == summary["seconds"]["ap"]
    assert later["pcc"]["relp"]["mlp_out"] == summary["pcc"]["relp"]["mlp_out"]
    assert later["differences"] == summary["differences"]


def changed(arrays, rng):
    key = rng.choice([name for name in arrays if name != "seconds"])
    array = arrays[key]
    return rng.choice(
        [
            arrays | {key: array.astype(complex)},
            arrays | {key: array.astype(np.float64)},
            arrays | {key: array[:1]},
            arrays | {key: array * np.nan},
            arrays | {"seconds": np.zeros(3)},
            arrays | {"seconds": np.array("long")},
            arrays | {"seconds": np.array(-1.0)},
            arrays | {"more": array},
            {name: value for name, value in arrays.items() if name != key},
        ]
    )


def test_kept_files_are_taken_only_as_they_were_written(tiny, run, tmp_path, monkeypatch):
    """Valid archives of other contents are dropped with one line; the numbers are those of a whole run."""
    argv = ["--model", tiny["gpt2"], "--pairs", "4", "--no-plot"]
    run(*argv)
    whole = dict(np.load(tmp_path / "out" / "gpt2-ioi" / "scores.npz"))
    shutil.rmtree(tmp_path / "out")
    folder, rng = tmp_path / "out" / "gpt2-ioi", random.Random(0)
    fuzz.stop_early([*map(str, argv), "--out", str(tmp_path / "out")])
    (file,) = folder.glob("unfinished-*.npz")
    kept = dict(np.load(file))
    for _ in range(12):
        file.write_bytes(b"")
        with open(file, "wb") as opened:
            np.savez(opened, **changed(kept, rng))
        code, out, err = run(*argv)
        assert (code, err) == (0, []) and "damaged file: AP starts afresh" in out
        scores = np.load(folder / "scores.npz")
        assert all(np.array_equal(scores[key], whole[key], equal_nan=True) for key in whole)
    file.write_bytes(b"")
    with open(file, "wb") as opened:
        np.savez(opened, **kept)
    assert "AP goes on with an unfinished run" in run(*argv)[1]


@pytest.mark.parametrize(
    "part", [{"pcc": {"relp": 1}}, {"pcc": [1]}, {"seconds": {"ap": {}}}, {"differences": {"x": 1}}]
)
def test_verify_beside_an_odd_summary(part, into, tmp_path):
    into("--methods", "ap,relp")
    file = tmp_path / "out" / "gpt2-ioi" / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | part))
    into("--verify", "3", "--methods", "relp")


def test_values_of_another_shape(into, tmp_path):
    """They tell whose weights the scores are of: without them, the scores are not taken."""
    into("--methods", "ap,relp")
    file = tmp_path / "out" / "gpt2-ioi" / "scores.npz"
    whole = dict(np.load(file))
    for values in (whole["values"][:1], whole["values"][0, 0], whole["values"].astype("U8")):
        np.savez_compressed(file, **whole | {"values": values})
        _, scores, _ = into("--methods", "ap,relp", "--grid")
        assert np.array_equal(scores["ap_mlp_out"], whole["ap_mlp_out"], equal_nan=True)


def test_what_another_number_of_processes_has_kept_goes(tiny, run, tmp_path):
    folder = tmp_path / "out" / "gpt2-ioi"
    folder.mkdir(parents=True)
    for rank in (0, 1, 7):
        (folder / f"unfinished-{rank}-abc.npz").write_bytes(b"")
    argv = ["--model", tiny["gpt2"], "--pairs", "3", "--no-plot"]
    run(*argv, "--methods", "atp")
    assert len(list(folder.glob("unfinished-*"))) == 3  # this run has no use for them
    assert "an unfinished run of other arguments or another version is dropped" in run(*argv)[1]
    assert not list(folder.glob("unfinished-*"))


def test_what_a_killed_process_was_writing_goes(tiny, run, tmp_path):
    folder = tmp_path / "out" / "gpt2-ioi"
    folder.mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mine, gone = folder / f".scores.npz.{os.getppid()}", folder / f".scores.npz.{int(done.stdout)}"
    for file in (mine, gone):
        file.write_bytes(b"")
    run("--model", tiny["gpt2"], "--pairs", "3", "--no-plot", "--methods", "atp")
    assert mine.exists() and not gone.exists()


def test_grid_takes_only_whole_scores(tiny, run, tmp_path):
    """AP of an earlier run, of another shape or not finite, is computed again."""
    argv = ["--model", tiny["gpt2"], "--pairs", "3", "--no-plot", "--methods", "ap,relp"]
    run(*argv)
    file = tmp_path / "out" / "gpt2-ioi" / "scores.npz"
    whole = dict(np.load(file))
    for change in (
        lambda a: a[:, :1],
        lambda a: a[:, :, :-1],
        lambda a: a.astype(complex),
        lambda a: a * np.nan,
        lambda a: a[:2],
    ):
        np.savez_compressed(file, **{k: change(v) if k == "ap_mlp_out" else v for k, v in whole.items()})
        code, _, err = run(*argv, "--grid")
        assert (code, err) == (0, [])
        assert np.array_equal(np.load(file)["ap_mlp_out"], whole["ap_mlp_out"], equal_nan=True)


def test_a_terminal_without_our_letters(tmp_path):
    command = [
        sys.executable,
        ROOT / "evaluate.py",
        "--model",
        "toy-gpt2",
        "--pairs",
        "2",
        "--methods",
        "atp",
        "--no-plot",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--out", tmp_path / "übung"], capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and b"\\xfcbung" in done.stdout
