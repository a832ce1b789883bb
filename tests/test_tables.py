"""What the command prints: the help, the tables, the progress bar, and nothing else."""
# ruff: noqa: F811 (fixtures that are imported)

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from test_evaluate import IDS, NODES, jsonl, results, run, tiny, written  # noqa: F401
from tqdm import tqdm

import evaluate
import tasks
from support import scoring
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own


def start(*arguments):
    env = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "evaluate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_help_is_one_screen():
    run = start("--help")
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and run.stderr == "" and len(lines) <= 45 and "example: python evaluate.py" in run.stdout
    text = " ".join(run.stdout.split())
    defaults = "[ioi: toys; sva: toy-neox; edges: toys] [ioi: 100; sva: 300; edges: 100, or all]"
    defaults += " [ioi: resid_pre,attn_out,mlp_out; sva: auto] [ioi: ap,atp,relp; sva: auto; edges: auto]"
    defaults += " [swap] [logit_diff] [paper] [auto] [float32] [results]"
    for default in re.findall(r"\[.*?\]", defaults):
        assert default in text, default
    options = {field.name for task in evaluate.TASKS.values() for field in fields(task)}
    assert len(options) > 25 and all(f" --{name.replace('_', '-')} " in text for name in options)


def test_a_process_writes_nothing_but_its_tables(tiny, tmp_path):
    """No progress bar and no warning on stderr if that is no terminal. A bad model costs one line and the exit code."""
    given = ["--model", tiny["gpt2"], tmp_path / "nowhere", tiny["gemma2"], "--pairs", 4, "--nodes", "mlp_out"]
    run = start(*given, "--out", tmp_path / "out")
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith("evaluate.py: error:") and "nowhere" in run.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "gpt2-ioi",
        "gemma2-ioi",
        "pcc.png",
        "slopes.png",
        "inspect.html",
    }
    assert "Traceback" not in run.stdout and "\r" not in run.stdout


def test_the_progress_bar(tiny, run, monkeypatch):
    """NAME AP:  18%|###   | 00:03<00:12, with one colon."""
    screen = io.StringIO()

    def shown(*args, **options):
        return tqdm(*args, **options | {"file": screen, "disable": False, "delay": 0, "mininterval": 0})

    monkeypatch.setattr(scoring, "tqdm", shown)
    assert run("--model", tiny["gpt2"], "--pairs", 6, "--no-plot", "--methods", "ap,relp")[0] == 0
    parts = re.split(r"[\r\n]+", screen.getvalue())
    texts = {part.partition("%")[0] for part in parts if "AP" in part or "RelP" in part}
    name = re.escape(str(tiny["gpt2"]))
    assert len(texts) > 5 and all(re.fullmatch(rf"{name} (AP|RelP): +\d+", text) for text in texts), texts
    assert any(re.fullmatch(rf"{name} AP: +[1-9]\d", text) for text in texts)  # it moves while AP runs


# ---------------------------------------------------------------------------------------------------------------------
# The table of a model


def table(out):
    """{label: the rest of the line} of the last table."""
    lines = out[out.rindex("  PCC with AP") :].splitlines()
    return {line[:20].strip(): line[20:] for line in lines}


def numbers(text):
    return [float(x) for x in re.findall(r"[-+]?\d*\.\d+", text)]


def test_table_shows_the_numbers_of_the_summary(tiny, run, tmp_path):
    code, out, _ = run("--model", tiny["gpt2"], "--pairs", 5, "--no-plot")
    summary = json.loads((tmp_path / "out" / "gpt2-ioi" / "summary.json").read_text())
    rows = table(out)
    assert rows["PCC with AP"].split() == [*NODES, "seconds"]
    for method, label in (("atp", "AtP"), ("relp", "RelP")):
        of_nodes = summary["pcc"][method].values()
        shown = [x for of in of_nodes for x in (of["averaged"], *of["interval"]["averaged"])]
        assert numbers(rows[label])[:9] == pytest.approx(shown, abs=6e-4)
        assert numbers(rows[label])[9] == pytest.approx(summary["seconds"][method], abs=6e-3)
    shown = [x for of in summary["differences"]["relp - atp"].values() for x in of["averaged"]]
    assert numbers(rows["RelP - AtP"]) == pytest.approx(shown, abs=6e-4)
    further = {"rank correlation": "spearman", "right sign": "sign", "AP's top 10": "recall", "slope": "slope"}
    for label, measure in (further | {"worst miss / max": "false_negative"}).items():
        shown = [summary["pcc"][method][node][measure] for node in NODES for method in ("atp", "relp")]
        assert numbers(rows[label]) == pytest.approx(shown, abs=6e-4)
    assert max(len(line) for line in out.splitlines() if "[" in line) <= 120
    assert "WARNING" in out  # a random model does not do the task


def test_a_single_pair_has_no_intervals(tiny, run, tmp_path):
    code, out, err = run("--model", tiny["gpt2"], "--pairs", 1, "--no-plot")
    assert (code, err) == (0, [])
    summary, _ = written(tmp_path / "out" / "gpt2-ioi")
    estimates = [*summary["accuracy"].values(), *summary["logit_diff"].values()]
    estimates += [x for of in summary["differences"]["relp - atp"].values() for x in of.values()]
    for method in ("atp", "relp"):
        for of in summary["pcc"][method].values():
            for part in (of, of["changed_cells"]):
                assert part["interval"].keys() == part.keys() - {"interval", "changed_cells", "by_layer"}
                estimates += [(part[measure], *ends) for measure, ends in part["interval"].items()]
    assert len(estimates) == 4 + 3 * 9 + 2 * 3 * 2 * 9
    assert all(value is not None and (low, high) == (None, None) for value, low, high in estimates)
    assert "[" not in out and "nan" not in out and numbers(table(out)["RelP - AtP"])


def test_numbers_of_prompts_are_numbers_of_pairs(tiny, run):
    for pairs in (1, 2):
        assert f"{pairs} prompt pair{'s' * (pairs > 1)}," in run("--model", tiny["gpt2"], "--pairs", pairs)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Without activation patching


HINT = "activation patching tells how far these can be trusted: add ap to --methods"


def test_without_ap_the_strongest_nodes_are_printed(tiny, run, tmp_path):
    """Each method's five, computed again: the mean over those pairs whose template has the role."""
    nodes = ["mlp_out", "head"]
    given = ["--model", tiny["gpt2"], "--pairs", 5, "--no-plot", "--nodes", ",".join(nodes)]
    code, out, err = run(*given, "--methods", "twopoint,ig")
    assert (code, err) == (0, []) and out.count("the strongest nodes by") == 2 and HINT in out
    assert "PCC" not in out and "B1: the name that is said twice" in out
    _, scores = written(tmp_path / "out" / "gpt2-ioi")
    pairs = tasks.ioi(load_tokenizer(str(tiny["gpt2"])), 5)
    for method, label in (("twopoint", "two-point"), ("ig", "IG")):
        every = []
        for node in nodes:
            values = scores[f"{method}_{node}"]
            for role in pairs[0].roles:  # each occurs once; template 3 lacks the comma
                own = [values[i, :, pair.roles.index(role)] for i, pair in enumerate(pairs) if role in pair.roles]
                mean = np.mean(own, axis=0)  # [layer] or [layer, head]
                every += [(float(mean[at]), node, *at, role) for at in np.ndindex(mean.shape)]
        every.sort(key=lambda entry: -abs(entry[0]))
        lines = out[out.index(f"the strongest nodes by {label},") :].splitlines()[1:6]
        for line, (value, node, layer, *part, role) in zip(lines, every):
            shown = re.fullmatch(r" +(\w+)(\[\d+\])? +layer (\d+) +(\S+) +(-?\d+\.\d+)", line)
            assert shown, line
            assert shown.groups()[:4] == (node, str(part) if part else None, str(layer), role)
            assert float(shown[5]) == pytest.approx(value, abs=6e-4)


def test_with_ap_of_an_earlier_run_the_table_is_printed(tiny, run):
    given = ["--model", tiny["gpt2"], "--pairs", 5, "--no-plot"]
    assert HINT not in run(*given, "--methods", "ap")[1]
    code, out, err = run(*given, "--methods", "twopoint")
    assert (code, err) == (0, []) and "strongest" not in out and HINT not in out
    assert len(numbers(table(out)["two-point"])) == 3 * 3 + 1 and len(numbers(table(out)["AP"])) == 1
    out = run(*given, "--methods", "twopoint", "--seed", 1)[1]  # other prompts: that AP does not count
    assert HINT in out and "PCC" not in out


def test_the_list_that_verify_prints_is_enough(tiny, run):
    out = run("--model", tiny["gpt2"], "--pairs", 3, "--no-plot", "--methods", "relp", "--verify", 3)[1]
    assert HINT not in out and "strongest" not in out and "the 3 nodes of" in out


# ---------------------------------------------------------------------------------------------------------------------
# The paper's own numbers, and names of what is not the paper's


@pytest.mark.parametrize("arguments, shown", [
    ([], True),
    (["--methods", "ap,ln"], True),
    (["--metric", "prob_diff"], False),
    (["--corruption", "s2"], False),
    (["--rules", "ln"], False),
    (["--rules", "none"], False),
    (["--methods", "relp"], False),
    (["--methods", "ap"], False),
    (["--prompts", "pairs.jsonl"], False),
])  # fmt: skip
def test_the_papers_numbers_stand_beside_the_same_experiment_only(arguments, shown, tiny, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "pairs.jsonl", IDS, {**IDS, "original": [5, 6, 7, 10]})
    paper = {"resid_pre": (0.111, 0.222), "mlp_out": (-0.333, 0.444)}
    monkeypatch.setitem(evaluate.TABLE_5, str(tiny["gpt2"]), paper)
    code, out, err = run("--model", tiny["gpt2"], tiny["gemma2"], "--pairs", 3, "--no-plot", *arguments)
    assert (code, err) == (0, [])
    rows = [line.split() for line in out.splitlines() if ", paper" in line]
    wanted = [["AtP,", "paper", ".111", "-.333"], ["RelP,", "paper", ".222", ".444"]]
    assert rows == (wanted if shown else [])  # once: Table 5 has no gemma2 of this name


def test_the_papers_rows_stay_when_ap_is_of_an_earlier_run(tiny, run, monkeypatch):
    monkeypatch.setitem(evaluate.TABLE_5, str(tiny["gpt2"]), {"resid_pre": (0.111, 0.222)})
    given = ["--model", tiny["gpt2"], "--pairs", 3, "--no-plot"]
    run(*given, "--methods", "ap,relp")
    assert "RelP, paper" in run(*given, "--methods", "twopoint")[1]


@pytest.mark.parametrize("rules, label", [("paper", "RelP"), ("ln", "RelP, ln"), ("none", "RelP, none")])
def test_relp_is_labelled_with_its_rules(rules, label, tiny, run):
    code, out, err = run("--model", tiny["gpt2"], tiny["gemma2"], "--pairs", 3, "--no-plot", "--rules", rules)
    assert (code, err) == (0, [])
    lines = [re.split(r"  +", line.strip()) for line in out.splitlines()]
    rows = [line[0] for line in lines if line[0].startswith("RelP")]
    assert rows == 2 * [label, f"{label} - AtP"]
    overview = out[out.rindex("PCC with AP") :].splitlines()[1]  # over all models
    assert re.split(r"  +", overview.strip()) == 3 * ["AtP", label]
