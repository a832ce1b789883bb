"""What is printed: the tables of summaries made by hand, of a whole run, the help, and nothing else."""
# ruff: noqa: F811 (fixtures that are imported)

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_evaluate import IDS, NODES, jsonl, results, run, tiny, written  # noqa: F401
from tqdm import tqdm

import evaluate
import tasks
from support import scoring, tables
from support.scoring import AP, Method
from support.tokenizer import load_tokenizer
from tasks import Pair

ROOT = Path(__file__).parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# The table of a summary


def method(name, label=None):
    return SimpleNamespace(name=name, label=label or name)


def estimate(value):
    return value, value - 0.01, value + 0.02


METHODS = [method("ap", "AP"), method("atp", "AtP"), method("relp", "RelP"), method("twopoint", "two-point")]


def summary_of(methods, nodes, right=1.0):
    """A summary in which every number is another one."""
    numbers = iter(0.2 + 0.0017 * i for i in range(10**6))
    others = [m.name for m in methods if m.name != "ap"]
    agreement, differences = {m: {} for m in others}, {}
    for m in others:
        for node in nodes:
            part = 12 if node in ("head", "neuron") else None
            error = {"error": -40 * next(numbers), "ap": 1.0, "layer": 10, "position": 2, "part": part, "group": "b"}
            agreement[m][node] = {name: estimate(next(numbers)) for name in ("averaged", "slope")}
            agreement[m][node] |= {"largest_error": error, "largest_effect": 20.25}
    for i, one in enumerate(others):
        for other in others[i + 1 :]:
            differences[f"{other} - {one}"] = {node: estimate(next(numbers)) for node in nodes}
    return {
        "model": "toy",
        "metric": "logit_diff",
        "accuracy": {"original": (right, 0, 1), "patch": (1.0, 1, 1)},
        "value": {"original": (8.954, 8, 9), "patch": (-8.775, -9, -8)},
        "labels": {"a": ["x", "y"], "b": ["BOS", "u", "S2"]},
        "agreement": agreement,
        "differences": differences,
        "seconds": {m.name: next(numbers) for m in methods},
    }


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


SENTENCES = [
    "Then, Mary and John went to the store. Mary gave a book to",
    "Then, John and Mary went to the store. John gave a book to",
]
ANSWERS = ["--answers", " John", " Mary"]


def numbers(text):
    return [float(x) for x in re.findall(r"[-+]?\d*\.\d+", text)]


def rows_of(lines, label):
    """What stands after the label, in each line that has it."""
    return [line[2 + len(label) :] for line in lines if line.startswith(f"  {label}  ")]


def test_the_table_has_the_numbers_of_the_summary(capsys):
    summary = summary_of(METHODS, NODES)
    tables.print_report(summary, METHODS, NODES, {"resid_pre": (0.111, 0.222), "mlp_out": (-0.333, 0.444)})
    lines = lines_of(capsys)
    assert lines[0] == (
        "  right on 100% of the original and 100% of the patch prompts; mean logit_diff +8.954 and -8.775"
    )
    assert lines[1].split() == ["PCC", "with", "AP", "seconds", *NODES] and max(map(len, lines)) <= 100
    for m in METHODS[1:]:
        of = summary["agreement"][m.name]
        pcc, slope, error = rows_of(lines, m.label)
        shown = [x for node in NODES for x in of[node]["averaged"]]
        assert numbers(pcc) == pytest.approx([round(summary["seconds"][m.name], 2), *shown], abs=6e-4)
        assert numbers(slope) == pytest.approx([x for node in NODES for x in of[node]["slope"]], abs=6e-4)
        errors = [f"{of[node]['largest_error']['error']:+#.3g} at S2, layer 10" for node in NODES]
        assert re.split("  +", error.strip()) == errors
    seconds, effect = rows_of(lines, "AP")
    assert numbers(seconds) == [round(summary["seconds"]["ap"], 2)] and effect.split() == ["20.2"] * 3
    for label, pair in (("RelP - AtP", "relp - atp"), ("two-point - RelP", "twopoint - relp")):
        shown = [x for node in NODES for x in summary["differences"][pair][node]]
        assert numbers(rows_of(lines, label)[0]) == pytest.approx(shown, abs=6e-4)
    assert not rows_of(lines, "two-point - AtP")  # with RelP there, the others are compared with it only
    assert [row.split() for label in ("AtP, paper", "RelP, paper") for row in rows_of(lines, label)] == [
        [".111", "-.333"],
        [".222", ".444"],
    ]
    assert lines[-1] == f"    (S2: {tasks.ROLES['S2']})"


def test_without_relp_the_first_method_is_compared_with(capsys):
    methods = [method("ap"), method("m1"), method("m2"), method("m3")]
    tables.print_report(summary_of(methods, NODES), methods, NODES)
    text = capsys.readouterr().out
    assert "m2 - m1" in text and "m3 - m1" in text and "m3 - m2" not in text


def test_without_ap_there_are_seconds_only(capsys):
    summary = summary_of(METHODS[1:], NODES) | {"agreement": {}, "differences": {}}
    tables.print_report(summary, METHODS[1:], NODES)
    lines = lines_of(capsys)
    assert [line.split()[0] for line in lines[1:]] == ["seconds", "AtP", "RelP", "two-point"]


def test_a_model_that_does_not_do_the_task(capsys):
    for right, warned in ((0.74, True), (0.75, False)):
        tables.print_report(summary_of(METHODS, NODES, right), METHODS, NODES)
        assert ("WARNING: this model does not do the task" in capsys.readouterr().out) == warned


def test_many_methods_with_long_names_and_many_kinds_of_nodes(capsys):
    """At most 100 columns; nothing is left out, and every name can be told from the others."""
    rules = "RelP, ln+identity+half+ah+epsilon=1e-"
    methods = [method("ap", "AP"), method("relp", "RelP"), *(method(f"m{i}", f"{rules}{i}") for i in range(15))]
    nodes = ["resid_pre", "attn_out", "mlp_out", "head", "neuron", "head_pattern"]
    summary = summary_of(methods, nodes)
    summary["labels"]["b"][2] = "a token of many letters"
    tables.print_report(summary, methods, nodes)
    lines = lines_of(capsys)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for of in summary["agreement"].values():
        for node in nodes:
            assert tables.short(*of[node]["averaged"]) in text and tables.short(*of[node]["slope"]) in text
            part = {"head": ", head 12", "neuron": ", neuron 12"}.get(node, "")
            assert f"{of[node]['largest_error']['error']:+#.3g} at a to...ters, layer 10{part}" in text
    heads = [line.split()[3:] for line in lines if line.startswith("  PCC with AP")]
    assert sum(heads, []) == ["seconds", *nodes] and len(heads) > 1
    labels = [line[2:42].strip() for line in lines[2:19]]
    assert labels == ["AP", "RelP", *(f"{rules}{i}" for i in range(15))]

    tables.print_overview([summary, summary | {"model": "m" * 90}], methods[1:], nodes)
    lines = lines_of(capsys)
    assert max(map(len, lines)) <= 100
    shown = [number for line in lines if line.startswith("  toy ") for number in numbers(line)]
    wanted = [summary["agreement"][m.name][node]["averaged"][0] for node in nodes for m in methods[1:]]
    assert shown == pytest.approx(wanted, abs=6e-4)


def test_short():
    assert tables.short(0.932, 0.921, 0.945) == " .932 [.921 .945]"
    assert tables.short(-0.0884, -0.1, 10.02, sign="+") == "-.088 [-.100 +10.020]"
    assert tables.short(10.5) == " 10.500" and tables.short(0.5, float("nan"), float("nan")) == " .500"


def test_cut():
    assert tables.cut("a" * 40) == "a" * 40 and tables.cut("0123456789", 9) == "012...789"


def test_top():
    g = torch.Generator().manual_seed(0)
    scores = {"mlp_out": torch.randn(3, 2, 4, generator=g), "head": torch.randn(3, 2, 4, 5, generator=g)}
    every = []
    for node, values in scores.items():
        mean = values.double().mean(0).numpy()
        for layer, pos, *part in np.ndindex(mean.shape):
            score = mean[(layer, pos, *part)]
            every.append((node, layer, pos, "abcd"[pos], part[0] if part else None, pytest.approx(score)))
    every.sort(key=lambda entry: -abs(entry[5].expected))
    assert tables.top(scores, list("abcd"), k=7) == every[:7]
    with pytest.raises(ValueError, match="4 labelled positions"):
        tables.top({"mlp_out": torch.ones(3, 2, 5)}, list("abcd"))


def test_peaks_are_the_strongest_layer_of_each_position_and_part():
    g = torch.Generator().manual_seed(0)
    means = {"mlp_out": torch.randn(3, 4, generator=g).numpy(), "head": torch.randn(3, 4, 5, generator=g).numpy()}
    means["mlp_out"][:, 1] = 0
    found = tables.peaks(means, list("abcd"), 100)
    assert len(found) == 3 + 4 * 5  # none where all is 0
    for node, layer, pos, label, part, score in found:
        column = means[node][:, pos] if part is None else means[node][:, pos, part]
        assert layer == np.abs(column).argmax() and score == pytest.approx(column[layer]) and label == "abcd"[pos]
    assert [abs(one.score) for one in found] == sorted((abs(one.score) for one in found), reverse=True)
    assert tables.peaks(means, list("abcd"), 4) == found[:4]


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_a_run_prints_its_summary(tiny, run, tmp_path):
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 5, "--no-plot")
    assert (code, err) == (0, [])
    summary, lines = json.loads((tmp_path / "out" / "gpt2-ioi" / "summary.json").read_text()), out.splitlines()
    for name, label in (("atp", "AtP"), ("relp", "RelP")):
        shown = [x for node in NODES for x in summary["agreement"][name][node]["averaged"]]
        assert numbers(rows_of(lines, label)[0])[1:] == pytest.approx(shown, abs=6e-4)
    assert max(map(len, lines)) <= 100 and "WARNING" in out  # a random model does not do the task


def test_a_single_pair_has_no_intervals(tiny, run, tmp_path):
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 1, "--no-plot")
    assert (code, err) == (0, [])
    summary, _ = written(tmp_path / "out" / "gpt2-ioi")
    estimates = [summary["agreement"][m][node]["averaged"] for m in ("atp", "relp") for node in NODES]
    estimates += [
        *summary["accuracy"].values(),
        *summary["value"].values(),
        *summary["differences"]["relp - atp"].values(),
    ]
    assert all(value is not None and (low, high) == (None, None) for value, low, high in estimates)
    assert "[" not in out and "nan" not in out and "RelP - AtP" in out


def test_without_ap_the_strongest_nodes_are_printed(tiny, run, tmp_path):
    """Ten peaks by the main method, computed again: the mean over those pairs whose template has the role."""
    nodes = ["mlp_out", "head"]
    given = ["--model", tiny["gpt2"], "--pairs", 5, "--no-plot", "--nodes", ",".join(nodes)]
    code, out, err = run(*given, "--methods", "atp,relp")
    assert (code, err) == (0, [])
    assert "add ap to --methods" in out and "PCC" not in out and "B1: the name that is said twice" in out
    _, scores = written(tmp_path / "out" / "gpt2-ioi")
    pairs = tasks.ioi(load_tokenizer(str(tiny["gpt2"])), 5)
    best = {}
    for node in nodes:
        for role in pairs[0].roles:  # each occurs once; template 3 lacks the comma
            own = [(i, pair.roles.index(role)) for i, pair in enumerate(pairs) if role in pair.roles]
            relp, atp = (np.mean([scores[f"{m}_{node}"][i, :, at] for i, at in own], axis=0) for m in ("relp", "atp"))
            for part in np.ndindex(relp.shape[1:]):
                layer = int(np.abs(relp[(slice(None), *part)]).argmax())
                name = f"{node} {part[0]}" if part else node
                best[f"{name}, layer {layer}, {role}"] = float(atp[(layer, *part)]), float(relp[(layer, *part)])
    order = sorted(best, key=lambda name: -abs(best[name][1]))
    head, *lines = out[out.index("  strongest, by RelP") :].splitlines()[:11]
    assert head.split()[-2:] == ["AtP", "RelP"]
    for line, name in zip(lines, order):
        assert line.strip().startswith(name), (line, name)
        assert numbers(line[2 + len(name) :]) == pytest.approx(best[name], abs=6e-4)


PAIR = ["--original", "the cat and the dog saw", "--patch", "the cat and the fox saw", "--answers", " it", " them"]


def test_one_pair(run, tmp_path, monkeypatch):
    """Its prompt with an effect below each word that has one, ten nodes by all methods, and the page."""
    code, out, err = run("--model", "toy-gpt2", "--original", *SENTENCES[:1], "--patch", *SENTENCES[1:], *ANSWERS)
    assert (code, err) == (0, [])
    folder = tmp_path / "out" / "toy-gpt2-ioi-pair"
    assert (folder / "inspect.html").exists() and (folder / "heatmaps.png").exists()
    _, scores = written(folder)
    words, effects = out[out.index("  BOS") :].splitlines()[:2]
    shown = [float(x) for x in effects.split()]
    every = np.concatenate([scores[f"ap_{node}"][0] for node in ("resid_pre", "attn_out", "mlp_out")])  # [any, pos]
    wanted = [every[np.abs(every[:, pos]).argmax(), pos] for pos in range(every.shape[1])]
    assert words.split() == ["BOS", *SENTENCES[0].replace(",", " ,").replace(".", " .").split()]
    assert shown == pytest.approx([x for x in wanted if x], abs=6e-3)
    assert "strongest, by AP" in out and "\033" not in out


def test_the_prompt_in_a_terminal(monkeypatch, capsys):
    """Blue is negative, red positive, and no word can steer the terminal; long prompts go on in the next line."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    roles = (" a", " \033[31mb", *(f" word{i}" for i in range(20)))
    pair = tasks.Pair(tuple(range(22)), (9, *range(1, 22)), (1, 2), roles, "g")
    tables.print_prompt(pair, np.array([-1.0, 0.5, *[0.0] * 20]))
    lines = capsys.readouterr().out.splitlines()
    assert "\033[30;48;2;0;0;255m a   \033[0m" in lines[0] and "\\x1b[31mb" in lines[0] and "\033[31m" not in lines[0]
    assert "\033[30;48;2;255;128;128m" in lines[0] and len(lines) == 4
    assert all(len(re.sub("\033\\[[0-9;]*m", "", line)) <= 100 for line in lines)


@pytest.mark.parametrize("arguments, says", [
    (["--original", "a"], "--original, --patch and --answers are given together, and without --prompts"),
    (["--answers", "a", "b"], "are given together"),
    ([*PAIR, "--prompts", "x.jsonl"], "without --prompts"),
    ([*PAIR, "--task", "sva"], "--original has no meaning with --task sva"),
    ([*PAIR, "--corruption", "s2"], "--corruption has no meaning with own prompts"),
])  # fmt: skip
def test_one_pair_that_cannot_be(arguments, says, run):
    code, _, err = run("--model", "toy-gpt2", *arguments)
    assert code == 2 and says in err[0] and len(err) == 1


@pytest.mark.parametrize("arguments, shown", [
    ([], True),
    (["--metric", "prob_diff"], False),
    (["--corruption", "s2"], False),
    (["--rules", "ln"], False),
    (["--no-bos"], False),
    (["--methods", "relp"], False),
    (["--prompts", "pairs.jsonl"], False),
])  # fmt: skip
def test_the_papers_numbers_stand_beside_the_same_experiment_only(arguments, shown, tiny, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "pairs.jsonl", IDS, {**IDS, "original": [5, 6, 7, 10]})
    monkeypatch.setitem(evaluate.TABLE_5, str(tiny["gpt2"]), {"resid_pre": (0.111, 0.222)})
    code, out, err = run("--model", tiny["gpt2"], tiny["gemma2"], "--pairs", 3, "--no-plot", *arguments)
    assert (code, err) == (0, [])
    rows = [line.split() for line in out.splitlines() if ", paper" in line]
    assert rows == ([["AtP,", "paper", ".111"], ["RelP,", "paper", ".222"]] if shown else [])  # gpt2's, once


# ---------------------------------------------------------------------------------------------------------------------
# Everything else that is printed


def test_scores_as_csv():
    """The mean by role: two pairs, one of which is longer; heads have a line each."""
    roles = [("a", "b"), ("a", "b", "c,")]
    pairs = [Pair((1,) * len(r), (2,) * len(r), (3, 4), r, str(i)) for i, r in enumerate(roles)]
    whole = np.array([[[1.0, 2, np.nan]], [[3, 4, 5]]])  # [pair, layer, position]
    scores = {(m, node): x * factor for node, x in (("mlp_out", whole), ("head", whole[..., None] * [1, 10]))
              for m, factor in (("ap", 1), ("relp", -2))}  # fmt: skip
    text = tables.as_csv(scores, [AP, Method("relp", "RelP")], ["mlp_out", "head"], pairs)
    lines = list(csv.DictReader(io.StringIO(text)))
    found = [(line["node"], line["role"], line["part"], float(line["ap"]), float(line["relp"])) for line in lines]
    assert found[:3] == [("mlp_out", "a", "", 2, -4), ("mlp_out", "b", "", 3, -6), ("mlp_out", "c,", "", 5, -10)]
    assert found[3:5] == [("head", "a", "0", 2, -4), ("head", "a", "1", 20, -40)] and len(found) == 9
    assert {line["layer"] for line in lines} == {"0"}


def start(*arguments):
    env = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_help_is_one_screen_and_needs_no_torch(tmp_path, monkeypatch):
    for package in ("torch", "numpy"):
        (tmp_path / f"{package}.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "imported" in start().stderr  # the trap works
    done = start("--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and done.stderr == "" and len(lines) <= 60
    assert all(f"--{name}" in done.stdout for name in ("model", "task", "methods", "nodes", "rules", "saes", "out"))


def test_a_process_writes_nothing_but_its_tables(tiny, tmp_path):
    """No progress bar and no warning on stderr if that is no terminal. A bad model costs one line and the exit code."""
    done = start("--model", tiny["gpt2"], tmp_path / "nowhere", "--pairs", 4, "--no-plot", "--out", tmp_path / "out")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr
    assert "PCC with AP" in done.stdout and "Traceback" not in done.stdout and "\r" not in done.stdout


def test_the_progress_bar(tiny, run, monkeypatch):
    """It says the model and the method, and it moves while AP runs."""
    screen = io.StringIO()

    def shown(*args, **options):
        return tqdm(*args, **options | {"file": screen, "disable": False, "delay": 0, "mininterval": 0})

    monkeypatch.setattr(scoring, "tqdm", shown)
    assert run("--model", tiny["gpt2"], "--pairs", 6, "--no-plot", "--methods", "ap,relp")[0] == 0
    parts = re.split(r"[\r\n]+", screen.getvalue())
    texts = {part.partition("%")[0] for part in parts if "AP" in part or "RelP" in part}
    name = re.escape(str(tiny["gpt2"]))
    assert len(texts) > 3 and all(re.fullmatch(rf"{name} (AP|RelP): +\d+", text) for text in texts), texts
    assert any(re.fullmatch(rf"{name} AP: +[1-9]\d", text) for text in texts)
