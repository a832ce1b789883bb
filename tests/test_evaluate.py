"""The command line: what it writes, that it is repeatable, and that bad input ends in one line and exit code 2.

The models are random and tiny, with a byte-level tokenizer written by hand; most runs are calls of evaluate.main.
"""

import errno
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hub import client

import evaluate
import models
import relp
import tasks

ROOT = Path(__file__).parents[1]
WORDS = [
    *[" " + w for w in ("and", "went", "to", "the", "gave", "a", "John", "Mary", "Tom", "Amy", "store", "park", "book", "ball", "has", "have")],
    "Then", "When", "After",
]  # fmt: skip
NODES = ["resid_pre", "attn_out", "mlp_out"]


def write_tokenizer(folder):
    """tokenizer.json in which each of WORDS is one token, built letter by letter from its beginning; "<|endoftext|>" comes last."""
    vocab, merges = list(models.BYTE_OF_CHAR), []
    for word in (w.replace(" ", "Ġ") for w in WORDS):
        for i in range(1, len(word)):
            if word[: i + 1] not in vocab:
                vocab.append(word[: i + 1])
                merges.append([word[:i], word[i]])
    vocab.append("<|endoftext|>")
    added = [{"id": len(vocab) - 1, "content": "<|endoftext|>", "special": True, "normalized": False}]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(vocab)}, "merges": merges}
    spec = {
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return len(vocab)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """{"gpt2": directory, "gemma2": directory}: random checkpoints with the tokenizer."""
    import transformers

    base = tmp_path_factory.mktemp("tiny")
    n_vocab = write_tokenizer(base) + 5  # padded beyond the tokenizer's, as published ones are
    ours = {
        "gpt2": transformers.GPT2Config(vocab_size=n_vocab, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=1),
        "gemma2": transformers.Gemma2Config(
            vocab_size=n_vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
            query_pre_attn_scalar=8, sliding_window=6, max_position_embeddings=40,
        ),
    }  # fmt: skip
    for name, config in ours.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.5)
        model.save_pretrained(base / name)
        shutil.copy(base / "tokenizer.json", base / name)
    return {name: base / name for name in ours}


@pytest.fixture
def run(tmp_path, capsys):
    """run(*arguments) -> (exit code, stdout, lines of stderr), results in tmp_path/out."""

    def call(*arguments):
        code = evaluate.main([*map(str, arguments), "--out", str(tmp_path / "out")])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


@pytest.fixture
def results(run, tmp_path):
    """results(model directory, *arguments) -> (summary.json, scores.npz) of a run that must succeed without a word on stderr."""

    def call(model, *arguments, folder=None):
        code, _, err = run("--model", model, "--no-plot", *arguments)
        assert (code, err) == (0, [])
        folder = tmp_path / "out" / (folder or f"{Path(model).name}-ioi")
        with np.load(folder / "scores.npz") as scores:
            return json.loads((folder / "summary.json").read_text()), dict(scores)

    return call


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


IDS = {"original": [5, 6, 7, 8], "patch": [5, 9, 7, 8], "original_answer": 1, "patch_answer": 2}
TEXT = {
    "clean_prefix": "Then John went",
    "patch_prefix": "Then Mary went",
    "clean_answer": " has",
    "patch_answer": " have",
}


# ---------------------------------------------------------------------------------------------------------
# A run and its files


def pearson(a, b):
    return np.corrcoef(a, b)[0, 1] if len(a) > 1 and a.std() > 0 and b.std() > 0 else np.nan


def pcc_by_hand(a, b, groups, keep):
    """The four numbers of a PCC as relp.agreement's docstring defines them, from padded arrays [n, layers, positions], over the cells in `keep`."""
    maps = []
    for group in dict.fromkeys(groups):
        rows = np.array([g == group for g in groups])
        there = keep[rows].any(0)
        maps.append([x[rows].mean(0)[there] for x in (a, b)])
    each = np.array([pearson(x[k], y[k]) for x, y, k in zip(a, b, keep)])
    return {
        "averaged": pearson(*(np.concatenate(m) for m in zip(*maps))),
        "pooled": pearson(a[keep], b[keep]),
        "per_prompt": np.nanmean(each),
        "per_prompt_std": np.nanstd(each),
    }


MEASURES = {
    *("averaged", "pooled", "per_prompt", "per_prompt_std"),
    *("spearman", "sign", "recall", "slope", "false_negative"),
}


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("source", ["ioi", "file"])
def test_files_hold_what_they_say(name, source, tiny, results, tmp_path):
    """Every number of summary.json, computed again from the arrays and the model."""
    prompts = jsonl(tmp_path / "mixed.jsonl", TEXT, {**TEXT, "clean_prefix": "When Tom went to", "patch_prefix": "When Amy went to"}, {**TEXT, "clean_prefix": "After Tom went to the park", "patch_prefix": "After Amy went to the store"}, TEXT)  # fmt: skip
    n, arguments = (7, ["--n", 7]) if source == "ioi" else (4, ["--prompts", prompts])
    summary, scores = results(tiny[name], *arguments, folder=f"{name}-{'ioi' if source == 'ioi' else 'mixed'}")
    model, tokenizer = models.from_pretrained(str(tiny[name])), models.load_tokenizer(str(tiny[name]))
    pairs = tasks.ioi(tokenizer, n) if source == "ioi" else tasks.read_pairs(prompts, tokenizer)
    groups, lengths = [p.group for p in pairs], [len(p.original) for p in pairs]
    assert source == "ioi" or len(set(lengths)) == 3

    # the arrays
    assert scores.keys() == {f"{m}_{node}" for m in ("ap", "atp", "relp") for node in NODES} | {
        "lengths",
        "original_tokens",
        "patch_tokens",
        "answers",
        "values",
    }
    shape = (n, model.config.n_layers, max(lengths))
    assert scores["lengths"].tolist() == lengths and scores["answers"].tolist() == [list(p.answers) for p in pairs]
    for key in ("original", "patch"):
        rows = scores[f"{key}_tokens"]
        assert rows.shape == (n, max(lengths)) and np.issubdtype(rows.dtype, np.integer)
        assert [tuple(row[:length]) for row, length in zip(rows, lengths)] == [getattr(p, key) for p in pairs]
        assert rows[:, 0].tolist() == [tokenizer.bos_id] * n
    padding = np.broadcast_to(np.arange(max(lengths)) >= np.array(lengths)[:, None, None], shape)
    for key in scores.keys() - {"lengths", "original_tokens", "patch_tokens", "answers", "values"}:
        assert scores[key].shape == shape and np.array_equal(np.isnan(scores[key]), padding), key
        assert np.abs(scores[key][~padding]).max() > 0

    # the model on the task
    def logit_diff(key, i):
        right, wrong = pairs[i].answers
        logits = model(torch.tensor([getattr(pairs[i], key)]))[0, -1]
        return float(logits[right] - logits[wrong])

    original, patch = (np.array([logit_diff(key, i) for i in range(n)]) for key in ("original", "patch"))
    assert summary["prompt_pairs"] == n and summary["model"] == str(tiny[name])
    assert scores["values"] == pytest.approx(np.stack([original, patch], axis=1), abs=1e-4)
    counts = relp.resamples(groups).numpy()
    for run, value, right in (("original", original, original > 0), ("patch", patch, patch < 0)):
        for got, x in ((summary["accuracy"][run], right), (summary["logit_diff"][run], value)):
            assert got == pytest.approx([x.mean(), *np.quantile(counts @ x / n, [0.025, 0.975])], abs=1e-4)

    # whatever is patched in front of the first layer at once is the patch run; here one position differs in the files, so one patch is all
    if source == "file":
        for i in (0, 1, 3):
            assert scores["ap_resid_pre"][i, 0, :4][
                np.array(pairs[i].original[:4]) != pairs[i].patch[:4]
            ] == pytest.approx(patch[i] - original[i], abs=1e-4)

    # the correlations
    same_before = [next(j for j, (x, y) in enumerate(zip(p.original, p.patch)) if x != y) for p in pairs]
    for node in NODES:
        changed = np.broadcast_to(np.arange(max(lengths)) >= np.array(same_before)[:, None, None], shape) & ~padding
        if node == "resid_pre":  # in front of the first layer, only where the tokens themselves differ
            changed = changed.copy()
            changed[:, 0] &= scores["original_tokens"] != scores["patch_tokens"]
        assert summary["cells"][node] == {"all": int((~padding).sum()), "unchanged": int((~padding & ~changed).sum())}
        for method in ("ap", "atp", "relp"):
            assert (scores[f"{method}_{node}"][~padding & ~changed] == 0).all()
        for method in ("atp", "relp"):
            got = summary["pcc"][method][node]
            arrays = [scores[f"{m}_{node}"].astype(float) for m in (method, "ap")]
            for part, keep in ((got, ~padding), (got["changed_cells"], changed)):
                by_hand = pcc_by_hand(*arrays, groups, keep)
                assert {measure: part[measure] for measure in by_hand} == pytest.approx(by_hand, abs=1e-5)
                assert part["interval"].keys() == part.keys() - {"interval", "changed_cells"} == MEASURES
            maps = relp.agreement(*map(torch.tensor, arrays), groups, weights=relp.resamples(groups))
            for measure, values in maps.items():
                assert got["interval"][measure] == pytest.approx(relp.interval(values), abs=1e-9)
        of_node = {method: summary["pcc"][method][node] for method in ("atp", "relp")}
        assert summary["differences"].keys() == {"relp - atp"}
        for measure, (value, low, high) in summary["differences"]["relp - atp"][node].items():
            assert value == of_node["relp"][measure] - of_node["atp"][measure] and low <= high


def test_summary_says_how_it_was_made(tiny, results):
    summary, _ = results(tiny["gpt2"], "--n", 3, "--seed", 5, "--corruption", "s2", "--rules", "ln,epsilon=0.5")
    assert (
        summary["arguments"]["seed"] == 5
        and summary["arguments"]["corruption"] == "s2"
        and summary["arguments"]["n"] == 3
    )
    assert summary["rules"] == {
        "ln": True,
        "identity": False,
        "half": False,
        "ah": False,
        "epsilon": 0.5,
        "gamma": None,
        "temperature": None,
        "two_point": [],
    }
    assert summary["versions"]["torch"] == torch.__version__ and {"python", "numpy"} <= summary["versions"].keys()
    assert summary["seconds"].keys() == {"ap", "atp", "relp"} and all(s > 0 for s in summary["seconds"].values())


def test_json_is_strict_where_a_correlation_is_undefined(tiny, run, tmp_path):
    """One pair of one position: nothing to correlate. NaN is no JSON."""
    prompts = jsonl(tmp_path / "one.jsonl", {**IDS, "original": [5], "patch": [9]})
    code, out, err = run("--model", tiny["gpt2"], "--prompts", prompts, "--nodes", "resid_pre")  # with its figure
    assert (code, err) == (0, []), err
    text = (tmp_path / "out" / "gpt2-one" / "summary.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in summary.json"))


def test_figures(tiny, run, tmp_path):
    arguments = ["--n", 4, "--nodes", "resid_pre,mlp_out"]
    code, out, err = run("--model", tiny["gpt2"], tiny["gemma2"], *arguments)
    assert (code, err) == (0, [])
    pictures = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    each = [f"{name}-ioi/{picture}.png" for name in ("gemma2", "gpt2") for picture in ("conservation", "heatmaps")]
    assert pictures == [*each, "pcc.png"]
    for picture in pictures:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    overview = out[out.rindex("PCC with AP") :]  # behind the models' own tables, the paper's Table 5
    assert all(word in overview for word in ("gpt2", "gemma2", "resid_pre", "mlp_out", "AtP", "RelP"))

    shutil.rmtree(tmp_path / "out")
    assert run("--model", tiny["gpt2"], tiny["gemma2"], *arguments, "--no-plot")[0] == 0
    assert {path.name for path in (tmp_path / "out").rglob("*.*")} == {"scores.npz", "summary.json"}


def test_table_shows_the_numbers_of_the_summary(tiny, run, tmp_path):
    code, out, _ = run("--model", tiny["gpt2"], "--n", 5, "--no-plot")
    summary = json.loads((tmp_path / "out" / "gpt2-ioi" / "summary.json").read_text())
    rows = {line[:20].strip(): line[20:] for line in out.splitlines()}
    numbers = lambda label: [float(x) for x in re.findall(r"[-+]?\d*\.\d+", rows[label])]
    assert rows["PCC with AP"].split() == [*NODES, "seconds"]
    for method, label in (("atp", "AtP"), ("relp", "RelP")):
        of_nodes = summary["pcc"][method].values()
        shown = [x for of in of_nodes for x in (of["averaged"], *of["interval"]["averaged"])]
        assert numbers(label)[:9] == pytest.approx(shown, abs=6e-4)
    shown = [x for of in summary["differences"]["relp - atp"].values() for x in of["averaged"]]
    assert numbers("RelP - AtP") == pytest.approx(shown, abs=6e-4)
    for label, measure in (("rank correlation", "spearman"), ("slope", "slope"), ("worst miss", "false_negative")):
        shown = [summary["pcc"][method][node][measure] for node in NODES for method in ("atp", "relp")]
        assert numbers(label) == pytest.approx(shown, abs=6e-4)
    assert max(len(line) for line in out.splitlines() if line[:20].strip() in rows and "[" in line) <= 120
    assert "WARNING" in out  # a random model does not do the task


@pytest.mark.parametrize("arguments", [
    ["--methods", "ap", "--nodes", "mlp_out"], ["--methods", "relp", "--nodes", "mlp_out"], ["--methods", "relp,ap", "--nodes", "z,q"],
    *[[*option, "--no-plot"] for option in (
        ["--nodes", "resid_post,z,q,resid_mid,mlp_hidden"], ["--metric", "prob_diff"], ["--metric", "logprob_diff"], ["--corruption", "s2"], ["--dtype", "float64"],
        ["--dtype", "bfloat16"], ["--rules", "ln,ah,gamma=0.5"], ["--batch-size", "3"], ["--device", "cpu"],
    )],
], ids=" ".join)  # fmt: skip
def test_options(arguments, tiny, run, tmp_path):
    code, out, err = run("--model", tiny["gemma2"], "--n", 4, *arguments)
    assert (code, err) == (0, [])
    given = dict(zip(arguments[::2], arguments[1::2]))
    methods, nodes = (
        given.get(flag, default).split(",")
        for flag, default in (("--methods", "ap,atp,relp"), ("--nodes", ",".join(NODES)))
    )
    folder = tmp_path / "out" / "gemma2-ioi"
    with np.load(folder / "scores.npz") as scores:
        assert {f"{m}_{node}" for m in methods for node in nodes} == {
            key for key in scores if key.split("_")[0] in ("ap", "atp", "relp")
        }
        assert scores[f"{methods[0]}_{nodes[0]}"].dtype == (
            np.float64 if given.get("--dtype") == "float64" else np.float32
        )
    assert (folder / "heatmaps.png").exists() == ("--no-plot" not in arguments)
    assert given.get("--metric", "logit_diff") in json.loads((folder / "summary.json").read_text())


# ---------------------------------------------------------------------------------------------------------
# The numbers


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], err_msg=key, **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_same_command_gives_the_same_scores(tiny, results):
    runs = [results(tiny["gemma2"], "--n", 6, "--seed", seed)[1] for seed in (1, 1, 2)]
    same(runs[0], runs[1])
    assert not np.array_equal(runs[0]["original_tokens"], runs[2]["original_tokens"])


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_batch_size_does_not_matter(name, tiny, results):
    auto, *others = (results(tiny[name], "--n", 8, *size)[1] for size in ([], ["--batch-size", 1], ["--batch-size", 3]))
    for other in others:
        same(auto, other, atol=1e-5, rtol=1e-4)


def test_dtypes_agree(tiny, results):
    arguments = [tiny["gemma2"], "--n", 6, "--dtype"]
    single, double, half = (results(*arguments, dtype)[1] for dtype in ("float32", "float64", "bfloat16"))
    same(single, double, atol=1e-4, rtol=1e-3)
    for key in ("ap_resid_pre", "relp_resid_pre"):
        there = ~np.isnan(single[key])
        assert np.array_equal(there, ~np.isnan(half[key])) and pearson(single[key][there], half[key][there]) > 0.9


def test_without_rules_relp_is_atp(tiny, results):
    _, scores = results(tiny["gemma2"], "--n", 6, "--rules", "none")
    _, paper = results(tiny["gemma2"], "--n", 6)
    for node in NODES:
        np.testing.assert_array_equal(scores[f"relp_{node}"], scores[f"atp_{node}"])
        np.testing.assert_array_equal(scores[f"atp_{node}"], paper[f"atp_{node}"])
        assert not np.allclose(paper[f"relp_{node}"], paper[f"atp_{node}"], atol=1e-3)


def test_naming_the_papers_rules_is_the_default(tiny, results):
    same(results(tiny["gemma2"], "--n", 4, "--rules", "ln,identity,half")[1], results(tiny["gemma2"], "--n", 4)[1])


def test_no_bos(tiny, results):
    _, with_bos = results(tiny["gpt2"], "--n", 4)
    _, without = results(tiny["gpt2"], "--n", 4, "--no-bos")
    assert np.array_equal(without["original_tokens"], with_bos["original_tokens"][:, 1:])
    assert np.array_equal(without["lengths"], with_bos["lengths"] - 1)
    assert without["ap_resid_pre"].shape[2] == with_bos["ap_resid_pre"].shape[2] - 1


# ---------------------------------------------------------------------------------------------------------
# Prompts from a file


def test_ids_need_no_tokenizer_and_get_no_bos(tiny, results, tmp_path):
    mute = tmp_path / "mute"
    shutil.copytree(tiny["gpt2"], mute)
    (mute / "tokenizer.json").unlink()
    prompts = jsonl(tmp_path / "ids.jsonl", IDS, {**IDS, "original": [3, 4], "patch": [2, 4]}, IDS)
    _, scores = results(mute, "--prompts", prompts, folder="mute-ids")
    assert scores["original_tokens"][:, :2].tolist() == [[5, 6], [3, 4], [5, 6]] and scores["lengths"].tolist() == [
        4,
        2,
        4,
    ]
    assert np.isnan(scores["ap_resid_pre"][1, :, 2:]).all()
    np.testing.assert_array_equal(scores["relp_mlp_out"][0], scores["relp_mlp_out"][2])
    _, with_tokenizer = results(tiny["gpt2"], "--prompts", prompts, folder="gpt2-ids")
    same(scores, with_tokenizer)


def test_n_takes_the_first_pairs_of_a_file(tiny, results, tmp_path):
    prompts = jsonl(tmp_path / "many.jsonl", *[{**IDS, "original": [5, 6, 7, i]} for i in range(20, 30)])
    summary, scores = results(tiny["gpt2"], "--prompts", prompts, "--n", 3, folder="gpt2-many")
    assert scores["original_tokens"][:, 3].tolist() == [20, 21, 22] and summary["prompt_pairs"] == 3


# ---------------------------------------------------------------------------------------------------------
# In a process of its own


def start(*arguments):
    env = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "evaluate.py", *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_is_one_screen():
    run = start("--help")
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and run.stderr == "" and len(lines) <= 45 and "example: python evaluate.py" in run.stdout
    text = " ".join(run.stdout.split())
    for default in (
        "[ioi: toys; sva: toy-neox]",
        "[ioi: 100; sva: 300]",
        "[swap]",
        "[logit_diff]",
        "[ioi: resid_pre,attn_out,mlp_out; sva: auto]",
        "[paper]",
        "[auto]",
        "[float32]",
        "[results]",
    ):
        assert default in text, default


def test_a_process_writes_nothing_but_its_tables(tiny, tmp_path):
    """No progress bar and no warning on stderr when it is no terminal; bad input in the same run costs one line and the exit code."""
    run = start(
        "--model",
        tiny["gpt2"],
        tmp_path / "nowhere",
        tiny["gemma2"],
        "--n",
        "4",
        "--nodes",
        "mlp_out",
        "--out",
        tmp_path / "out",
    )
    assert run.returncode == 2
    assert (
        len(run.stderr.splitlines()) == 1 and run.stderr.startswith("evaluate.py: error:") and "nowhere" in run.stderr
    )
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"gpt2-ioi", "gemma2-ioi", "pcc.png"}
    assert "Traceback" not in run.stdout and "\r" not in run.stdout


def label(value):
    """A test's name: the words of its message, in place of words17."""
    return " ".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else ""


# ---------------------------------------------------------------------------------------------------------
# Bad input: exit code 2 and one line on stderr that names what is wrong


@pytest.fixture
def refused(run, tmp_path):
    """refused(*arguments) -> the message of a run that must end in exit code 2 and one line."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 2 and len(err) == 1 and err[0].startswith("evaluate.py: error: "), err
        assert not list((tmp_path / "out").rglob("s*.*"))  # no scores.npz, no summary.json
        return err[0]

    return call


@pytest.mark.parametrize("arguments, words", [
    (["--nodes", "resid_pre,resid_mud"], ["node", "resid_mud", "resid_mid"]),
    (["--nodes", ""], ["node", "''"]),
    (["--nodes", "mlp"], ["node", "'mlp'"]),
    (["--methods", "ap,lime"], ["method", "lime", "relp"]),
    (["--rules", "ln,magic"], ["rule", "magic", "identity"]),
    (["--rules", "epsilon"], ["epsilon", "number"]),
    (["--rules", "epsilon=-1"], ["epsilon", "-1"]),
    (["--rules", "gamma=nan"], ["gamma", "nan"]),
    (["--rules", "epsilon=1,gamma=1"], ["epsilon", "gamma"]),
    (["--rules", "ln=2"], ["ln=2"]),
    (["--rules", "paper,ah"], ["paper"]),
    (["--metric", "loss"], ["metric", "loss", "prob_diff"]),
    (["--corruption", "noise"], ["corruption", "noise", "s2"]),
    (["--dtype", "int8"], ["dtype", "int8", "bfloat16"]),
    (["--device", "abacus"], ["device", "abacus"]),
    (["--device", "cuda:99"], ["device", "cuda:99"]),
    (["--device", "meta"], ["device", "meta"]),
    (["--n", "0"], ["--n", "0"]),
    (["--n", "-3"], ["--n", "-3"]),
    (["--n", "100000000"], ["n must be", "100000000"]),
    (["--n", "abc"], ["--n", "abc"]),
    (["--seed", "1.5"], ["--seed", "1.5"]),
    (["--batch-size", "0"], ["--batch-size", "0"]),
    (["--batch-size", "many"], ["--batch-size", "many"]),
    (["--task", "sums"], ["task", "sums", "ioi", "sva"]),
    (["--prompts", "no-such-file.jsonl"], ["no-such-file.jsonl"]),
    (["--prompts", "."], ["directory"]),
    (["--frobnicate"], ["--frobnicate"]),
], ids=label)  # fmt: skip
def test_arguments(arguments, words, tiny, refused):
    message = refused("--model", tiny["gpt2"], *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("rows, words", [
    ([], ["no pairs"]),
    (["", "  "], ["no pairs"]),
    (["{"], ["line 1", "JSON"]),
    ([IDS, "[1]"], ["line 2", "object"]),
    ([IDS, {"original": [1]}], ["line 2", "patch"]),
    ([{**IDS, "patch": [5, 9]}], ["line 1", "equally many", "4 tokens", "2 tokens"]),
    ([{**TEXT, "patch_prefix": "Then Mary went to"}], ["line 1", "equally many", "' to'"]),
    ([{**TEXT, "clean_answer": "has"}], ["line 1", "original_answer", "one token", "3 tokens"]),
    ([{**IDS, "patch_answer": [1, 2]}], ["line 1", "patch_answer", "2 tokens"]),
    ([{**IDS, "original": [5, 6, 7, 100000]}], ["line 1", "original", "100000"]),
    ([{**IDS, "patch_answer": -1}], ["line 1", "patch_answer", "-1"]),
    ([{**IDS, "original": [5, 6, 7, 1.5]}], ["line 1", "1.5"]),
    ([{**IDS, "original": [], "patch": []}], ["line 1", "empty"]),
    ([{**IDS, "patch": IDS["original"]}], ["line 1", "differ"]),
    ([{**IDS, "patch_answer": 1}], ["line 1", "differ"]),
    ([{**IDS, "original": "Then"}], ["line 1", "both"]),
    ([{**IDS, "original": [5] * 41, "patch": [6] * 41}], ["41", "40"]),  # the context
], ids=label)  # fmt: skip
def test_prompt_files(rows, words, tiny, refused, tmp_path):
    message = refused("--model", tiny["gpt2"], "--prompts", jsonl(tmp_path / "bad.jsonl", *rows))
    assert all(word in message for word in words), message


def test_text_without_a_tokenizer(tiny, refused, tmp_path):
    shutil.copytree(tiny["gpt2"], tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    assert "tokenizer" in refused("--model", tmp_path / "mute")
    assert "tokenizer" in refused("--model", tmp_path / "mute", "--prompts", jsonl(tmp_path / "text.jsonl", TEXT))


def test_one_mistake_is_one_line_however_many_models(tiny, refused, tmp_path):
    both = ["--model", tiny["gpt2"], tiny["gemma2"]]
    assert "missing.jsonl" in refused(*both, "--prompts", tmp_path / "missing.jsonl")
    assert "line 1" in refused(*both, "--prompts", jsonl(tmp_path / "bad.jsonl", "{"))
    assert "n must be" in refused(*both, "--n", "100000000")


def test_two_models_with_one_name_do_not_overwrite_each_other(tiny, run, tmp_path):
    for parent in ("first", "second"):
        shutil.copytree(tiny["gpt2"], tmp_path / parent / "model")
    code, _, err = run("--model", tmp_path / "first/model", tmp_path / "second/model", "--n", 3, "--no-plot")
    assert len(list((tmp_path / "out").rglob("scores.npz"))) == 2 or (
        code == 2 and len(err) == 1 and "first" in err[0] and "second" in err[0]
    )


# ---------------------------------------------------------------------------------------------------------
# Bad checkpoints


@pytest.fixture
def broken(tiny, refused, tmp_path):
    """broken(change) -> the message about a copy of the gpt2 checkpoint in tmp_path/broken that change(folder) has spoilt."""

    def call(change):
        folder = tmp_path / "broken"
        shutil.copytree(tiny["gpt2"], folder)
        change(folder)
        message = refused("--model", folder, "--n", 3)
        assert "broken" in message
        return message

    return call


def config(**fields):
    def change(folder):
        old = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({k: v for k, v in old.items() if v is not ...}))

    return change


def tensors(change):
    return lambda folder: save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def content(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(state):
    def change(folder):
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")

    return change


def index(text):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


WTE = "transformer.wte.weight"


@pytest.mark.parametrize("change, words", [
    (lambda folder: shutil.rmtree(folder), ["unknown model"]),
    (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    (lambda folder: (folder / "model.safetensors").unlink(), ["no weights"]),
    (config(model_type="bert"), ["bert", "gpt2", "llama"]),
    (config(model_type=...), ["model_type"]),
    (config(model_type=["gpt2"]), ["model_type"]),
    (config(n_head=...), ["n_head"]),
    (config(n_head=0), ["zero"]),
    (config(n_head=3), ["config.json"]),
    (config(n_head="two"), ["type"]),
    (config(n_layer=0), ["n_layers = 0"]),
    (config(n_layer=-1), ["n_layers = -1"]),
    (config(n_layer=2.5), ["type"]),
    (config(n_layer=3), ["lacks", "transformer.h.2"]),
    (config(n_layer=1), ["unexpected", "transformer.h.1"]),
    (config(n_embd=-16), ["d_model = -16"]),
    (config(activation_function="mish"), ["mish", "gelu_new"]),
    (config(activation_function=["gelu"]), ["activation"]),
    (config(layer_norm_epsilon="small"), ["eps = 'small'"]),
    (config(tie_word_embeddings="no"), ["tied = 'no'"]),
    (config(vocab_size=100), [WTE, "100"]),
    (content("config.json", "{not json"), ["config.json", "line 1 column 2"]),
    (content("config.json", "[]"), ["config.json", "object"]),
    (content("config.json", b"\xff\xfe{"), ["config.json"]),
    (content("config.json", ""), ["config.json"]),
    (content("config.json", "[" * 100_000), ["config.json"]),
    (cut, ["model.safetensors", "corrupt"]),
    (content("model.safetensors", b""), ["model.safetensors", "corrupt"]),
    (content("model.safetensors", b"\xff" * 1000), ["model.safetensors", "corrupt"]),
    (content("model.safetensors", "<html>not found</html>"), ["model.safetensors", "corrupt"]),
    (content("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"), ["model.safetensors", "corrupt"]),
    (tensors(lambda t: {k: v for k, v in t.items() if k != WTE}), ["lacks", WTE]),
    (tensors(lambda t: t | {"transformer.extra": torch.ones(1)}), ["unexpected", "transformer.extra"]),
    (tensors(lambda t: t | {WTE: torch.ones(3, 16)}), [WTE, "[3, 16]"]),
    (tensors(lambda t: t | {WTE: torch.full_like(t[WTE], torch.nan)}), ["not finite"]),
    (index("{}"), ["weight_map"]),
    (index("no json"), ["index.json"]),
    (index('{"weight_map": {"a": "gone.safetensors"}}'), ["gone.safetensors"]),
    (index('{"weight_map": {"a": 1}}'), ["index.json"]),
    (index('{"weight_map": {"a": ["b"]}}'), ["index.json"]),
    (index('{"weight_map": {}}'), ["index.json"]),
    (pickled([torch.ones(2)]), ["pytorch_model.bin"]),
    (pickled({WTE: "a string"}), ["pytorch_model.bin"]),
    (pickled({7: torch.ones(2)}), ["pytorch_model.bin"]),
    (pickled({"model": {WTE: torch.ones(2)}}), ["pytorch_model.bin"]),
    (lambda folder: [(folder / "model.safetensors").unlink(), (folder / "pytorch_model.bin").write_bytes(b"")], ["pytorch_model.bin"]),
    (lambda folder: [(folder / "model.safetensors").unlink(), (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" * 50)], ["pytorch_model.bin"]),
    (lambda folder: [(folder / "model.safetensors").unlink(), (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")], ["pytorch_model.bin"]),
    (lambda folder: [(folder / "model.safetensors").unlink(), (folder / "pytorch_model.bin").write_bytes(b"<html></html>")], ["pytorch_model.bin"]),
    (content("tokenizer.json", "{}"), ["tokenizer.json"]),
    (content("tokenizer.json", "oops"), ["tokenizer.json"]),
    (content("tokenizer.json", '{"model": {"type": "WordPiece", "vocab": {"a": 0}}}'), ["tokenizer.json", "WordPiece"]),
    (content("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}}, "pre_tokenizer": {"type": "ByteLevel"}}'), ["tokenizer.json"]),
    (content("tokenizer.json", '{"model": {"type": "BPE", "vocab": [1], "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}'), ["tokenizer.json"]),
    (content("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [3]}, "pre_tokenizer": {"type": "ByteLevel"}}'), ["tokenizer.json"]),
    (content("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": [{}]}'), ["tokenizer.json"]),
    (content("tokenizer_config.json", "oops"), ["tokenizer_config.json"]),
    (content("tokenizer_config.json", '{"bos_token": ["a"]}'), ["tokenizer"]),
], ids=label)  # fmt: skip
def test_checkpoints(change, words, broken):
    message = broken(change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name, fields", [
    ("gemma2", {"num_key_value_heads": 3}), ("gemma2", {"layer_types": ["full_attention"]}), ("gemma2", {"rope_parameters": "fast"}),
    ("gemma2", {"sliding_window": "wide"}), ("gemma2", {"query_pre_attn_scalar": 0}), ("gemma2", {"rope_parameters": {"rope_type": "linear"}}),
    ("gemma2", {"rope_parameters": {"rope_theta": "big"}}), ("gemma2", {"head_dim": 7}), ("gemma2", {"attn_logit_softcapping": "x"}),
    ("gemma2", {"hidden_size": 10**12}), ("gemma2", {"num_hidden_layers": None}),
])  # fmt: skip
def test_configurations(name, fields, tiny, refused, tmp_path):
    shutil.copytree(tiny[name], tmp_path / "broken")
    config(**fields)(tmp_path / "broken")
    refused("--model", tmp_path / "broken", "--n", 3)


def test_ids_that_the_model_does_not_have(tiny, broken):
    """A tokenizer that is larger than the model's vocabulary, as when special tokens were added."""

    def shrink(folder):
        config(vocab_size=270)(folder)
        tensors(lambda t: t | {WTE: t[WTE][:270].clone()})(folder)

    assert "token ids must lie in 0..269" in broken(shrink)


def test_pickles(tiny, run, refused, tmp_path):
    """Weights in pytorch_model.bin are read, in the zip and in the older format; code in it is not run."""
    for kind, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        folder = tmp_path / kind
        shutil.copytree(tiny["gpt2"], folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin", **options)
        (folder / "model.safetensors").unlink()
        code, _, err = run("--model", folder, "--n", 3, "--no-plot", "--methods", "atp")
        assert (code, err) == (0, []), kind
    shutil.rmtree(tmp_path / "out")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Evil()}, tmp_path / "zip" / "pytorch_model.bin")
    assert "pytorch_model.bin" in refused("--model", tmp_path / "zip")
    torch.save({"x": Evil()}, tmp_path / "zip" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "pytorch_model.bin" in refused("--model", tmp_path / "zip")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_damaged_weights(kind, tiny, tmp_path):
    """A file with a few wrong bytes, or cut anywhere, loads (numbers only have changed) or ends in one line; nothing else."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny["gpt2"], folder)
    file = folder / "model.safetensors"
    if kind != "safetensors":
        torch.save(load_file(file), folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
        file.unlink()
        file = folder / "pytorch_model.bin"
    whole, rng, refusals = file.read_bytes(), random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(whole)) :]
        else:  # in the header or the directory, at the file's two ends
            for _ in range(rng.choice([1, 3, 30])):
                damaged[rng.randrange(-3000, 3000)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            models.from_pretrained(str(folder))
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error) and "damaged" in str(error)
    assert refusals > 30


def test_no_network(refused, monkeypatch, tmp_path):
    with client(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache"):  # the discard port: closed
        assert "openai-community/gpt2" in (message := refused("--model", "gpt2")) and "network" in message
    assert "'gpt5'" in refused("--model", "gpt5")


# ---------------------------------------------------------------------------------------------------------
# Writing


def test_output_folders_that_cannot_be(tiny, capsys, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null", "/proc/results"):
        assert evaluate.main(["--model", str(tiny["gpt2"]), "--n", "3", "--out", str(out)]) == 2
        printed, err = capsys.readouterr()
        assert (
            len(err.splitlines()) == 1 and err.startswith("evaluate.py: error:") and str(out) in err and printed == ""
        )  # before any work
    assert (tmp_path / "file").read_text() == "precious"


def test_a_models_folder_that_cannot_be(tiny, run, tmp_path):
    """The second model's folder is a file: the first one's results stay."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gemma2-ioi").write_text("precious")
    code, _, err = run("--model", tiny["gpt2"], tiny["gemma2"], "--n", 3, "--no-plot")
    assert code == 2 and len(err) == 1 and "gemma2-ioi" in err[0]
    assert sorted(p.name for p in (tmp_path / "out" / "gpt2-ioi").iterdir()) == ["scores.npz", "summary.json"]
    assert (tmp_path / "out" / "gemma2-ioi").read_text() == "precious"


def full_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file that takes 300 bytes and no more."""

    def write(self, data):
        if self.tell() + len(data) > 300:
            full_disk()
        return super().write(data)


@pytest.mark.parametrize(
    "file, how",
    [
        ("scores.npz", "open"),
        ("scores.npz", "write"),
        ("scores.npz", "replace"),
        ("summary.json", "write"),
        ("heatmaps.png", "write"),
        ("pcc.png", "write"),
    ],
)
def test_a_full_disk_leaves_the_old_files_whole(file, how, tiny, run, tmp_path, monkeypatch):
    arguments = [
        "--model",
        tiny["gpt2"],
        tiny["gemma2"],
        "--n",
        3,
        "--nodes",
        "mlp_out",
        *([] if file.endswith("png") else ["--no-plot"]),
    ]
    assert run(*arguments)[0] == 0
    # a failed run may keep the finished part of its work (unfinished-*) for the next one, which takes it away in the end
    files = lambda: {
        path: path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and not path.name.startswith("unfinished-")
    }
    before = files()
    assert len(before) == (9 if file.endswith("png") else 4)

    if how == "replace":
        monkeypatch.setattr(
            os,
            "replace",
            lambda source, target, replace=os.replace: full_disk() if file in str(target) else replace(source, target),
        )
    else:
        opened = {"open": lambda path: full_disk(), "write": lambda path: FullDisk(path, "w")}[how]
        monkeypatch.setattr(
            "builtins.open",
            lambda path, *a, open=open, **k: (
                opened(path) if file in str(path) and "r" not in a else open(path, *a, **k)
            ),
        )
    code, _, err = run(*arguments, "--seed", 1)
    assert code == 2 and all(
        line.startswith("evaluate.py: error:") and file in line and "No space left" in line for line in err
    ), err
    assert len(err) == (1 if file == "pcc.png" else 2)  # one for each model
    after = files()
    assert after.keys() == before.keys()  # no debris
    assert all(after[path] == before[path] for path in after if path.name == file)
    monkeypatch.undo()
    assert run(*arguments, "--seed", 1)[0] == 0
    assert not list((tmp_path / "out").rglob("unfinished-*")) and not list((tmp_path / "out").rglob(".*"))


def test_a_killed_run_leaves_the_old_files_whole(tiny, run, tmp_path, monkeypatch):
    """An interrupt in the middle of a write: the file of the run before is still there, and no half one."""
    arguments = ["--model", tiny["gpt2"], "--n", 3, "--no-plot"]
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
    """A run that is stopped leaves its finished part for the next one; if that file is damaged, the next one starts afresh."""
    arguments = ["--n", 3, "--nodes", "resid_pre"]
    _, wanted = results(tiny["gpt2"], *arguments)
    with monkeypatch.context() as m:
        m.setattr(np, "savez_compressed", lambda *a, **k: full_disk())
        assert run("--model", tiny["gpt2"], *arguments, "--no-plot")[0] == 2
    left = list((tmp_path / "out").rglob("unfinished-*"))
    assert left
    for file in left:
        file.write_bytes(file.read_bytes()[:100])
    same(results(tiny["gpt2"], *arguments)[1], wanted)
