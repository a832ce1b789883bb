"""The command line: what a run writes, that its numbers are right and repeatable, and that every option works.

The models are random and tiny, with a byte-level tokenizer written by hand; most runs are calls of evaluate.main.
What is printed is tested in test_tables.py, bad input in test_bad_input.py, folders and disks in test_output.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import models
import tasks
from support import commandline, options, processes, resume, statistics
from support.prompts import read_pairs
from support.tokenizer import BYTE_OF_CHAR, load_tokenizer

WORDS = [" " + word for word in "and went to the gave a John Mary Tom Amy store park book ball has have".split()]
WORDS += ["Then", "When", "After"]
ROOT = Path(__file__).parents[1]
NODES = ["resid_pre", "attn_out", "mlp_out"]


def write_tokenizer(folder):
    """tokenizer.json in which each of WORDS is one token, built letter by letter; "<|endoftext|>" comes last."""
    vocab, merges = list(BYTE_OF_CHAR), []
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
        "gpt2": transformers.GPT2Config(
            vocab_size=n_vocab, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=1
        ),
        "gemma2": transformers.Gemma2Config(
            vocab_size=n_vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, sliding_window=6, max_position_embeddings=40,
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
def run(tmp_path, capsys, monkeypatch):
    """run(*arguments) -> (exit code, stdout, lines of stderr), results in tmp_path/out."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    monkeypatch.setattr(processes, "own", False)  # a command sets it; here it comes back

    def call(*arguments):
        code = commandline.run(evaluate.main, [*map(str, arguments), "--out", str(tmp_path / "out")])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return call


@pytest.fixture
def results(run, tmp_path):
    """results(model directory, *arguments) -> (summary.json, scores.npz) of a run that must end well and quietly."""

    def call(model, *arguments, folder=None):
        code, _, err = run("--model", model, "--no-plot", *arguments)
        assert (code, err) == (0, [])
        return written(tmp_path / "out" / (folder or f"{Path(model).name}-ioi"))

    return call


def written(folder):
    """(summary.json, scores.npz) of a folder."""
    with np.load(folder / "scores.npz") as scores:
        return json.loads((folder / "summary.json").read_text()), dict(scores)


def label(value):
    """A test's name: the words of its message, in place of words17."""
    return " ".join(value) if isinstance(value, list) and all(isinstance(word, str) for word in value) else ""


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


# ---------------------------------------------------------------------------------------------------------------------
# A run and its files


def pearson(a, b):
    return np.corrcoef(a, b)[0, 1] if len(a) > 1 and a.std() > 0 and b.std() > 0 else np.nan


def pcc_by_hand(a, b, groups):
    """The numbers of a PCC as statistics.agreement's docstring defines them, from arrays [n, layers, positions]."""
    maps, there = [], ~np.isnan(a)
    for group in dict.fromkeys(groups):
        rows = np.array([g == group for g in groups])
        maps.append([x[rows].mean(0)[there[rows].all(0)] for x in (a, b)])
    each = np.array([pearson(x[k], y[k]) for x, y, k in zip(a, b, there)])
    return {
        "averaged": pearson(*(np.concatenate(m) for m in zip(*maps))),
        "pooled": pearson(a[there], b[there]),
        "per_prompt": np.nanmean(each),
    }


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
@pytest.mark.parametrize("source", ["ioi", "file"])
def test_files_hold_what_they_say(name, source, tiny, results, tmp_path):
    """Every number of summary.json, computed again from the arrays and the model."""
    longer = {**TEXT, "clean_prefix": "When Tom went to", "patch_prefix": "When Amy went to"}
    long = {**TEXT, "clean_prefix": "After Tom went to the park", "patch_prefix": "After Amy went to the store"}
    prompts = jsonl(tmp_path / "mixed.jsonl", TEXT, longer, long, TEXT)
    n, arguments = (7, ["--pairs", 7]) if source == "ioi" else (4, ["--prompts", prompts])
    summary, scores = results(tiny[name], *arguments, folder=f"{name}-ioi{'' if source == 'ioi' else '-mixed'}")
    model, tokenizer = models.from_pretrained(str(tiny[name])), load_tokenizer(str(tiny[name]))
    pairs = tasks.ioi(tokenizer, n) if source == "ioi" else read_pairs(prompts, tokenizer)
    groups, lengths = [p.group for p in pairs], [len(p.original) for p in pairs]
    assert source == "ioi" or len(set(lengths)) == 3

    # the arrays
    beside = {"lengths", "original_tokens", "patch_tokens", "answers", "values"}
    assert scores.keys() == {f"{m}_{node}" for m in ("ap", "atp", "relp") for node in NODES} | beside
    shape = (n, model.config.n_layers, max(lengths))
    assert scores["lengths"].tolist() == lengths and scores["answers"].tolist() == [list(p.answers) for p in pairs]
    for key in ("original", "patch"):
        rows = scores[f"{key}_tokens"]
        assert rows.shape == (n, max(lengths)) and np.issubdtype(rows.dtype, np.integer)
        assert [tuple(row[:length]) for row, length in zip(rows, lengths)] == [getattr(p, key) for p in pairs]
        assert rows[:, 0].tolist() == [tokenizer.bos_id] * n
    padding = np.broadcast_to(np.arange(max(lengths)) >= np.array(lengths)[:, None, None], shape)
    for key in scores.keys() - beside:
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
    weights = statistics.resamples(groups)
    counts = weights[1:].numpy()  # of each prompt in the resamples
    for run, value, right in (("original", original, original > 0), ("patch", patch, patch < 0)):
        for got, x in ((summary["accuracy"][run], right), (summary["value"][run], value)):
            assert got == pytest.approx([x.mean(), *np.quantile(counts @ x / n, [0.025, 0.975])], abs=1e-4)

    # All positions patched at once before the first layer are the patch run. In these pairs only one position differs.
    if source == "file":
        for i in (0, 1, 3):
            differs = np.array(pairs[i].original[:4]) != pairs[i].patch[:4]
            assert differs.sum() == 1
            assert scores["ap_resid_pre"][i, 0, :4][differs] == pytest.approx(patch[i] - original[i], abs=1e-4)

    # the correlations
    for node in NODES:
        for method in ("atp", "relp"):
            got = summary["agreement"][method][node]
            arrays = [scores[f"{m}_{node}"].astype(float) for m in (method, "ap")]
            for measure, value in pcc_by_hand(*arrays, groups).items():
                assert got[measure][0] == pytest.approx(value, abs=1e-5)
            measures = statistics.agreement(*map(torch.tensor, arrays), groups, weights)
            for measure, values in measures.items():
                assert got[measure] == pytest.approx([*statistics.estimate(values)], abs=1e-9, nan_ok=True)
        relp, atp = (summary["agreement"][method][node]["averaged"] for method in ("relp", "atp"))
        value, low, high = summary["differences"]["relp - atp"][node]
        assert value == pytest.approx(relp[0] - atp[0], abs=1e-12) and low <= high


def test_summary_says_how_it_was_made(tiny, results):
    summary, _ = results(tiny["gpt2"], "--pairs", 3, "--seed", 5, "--corruption", "s2", "--rules", "ln,epsilon=0.5")
    given = {"task": "ioi", "seed": 5, "corruption": "s2", "pairs": 3, "rules": "ln,epsilon=0.5"}
    assert given.items() <= summary["arguments"].items()
    versions = summary["versions"]
    assert versions["torch"] == torch.__version__ and {"python", "numpy"} <= versions.keys()
    assert re.fullmatch("[0-9a-f]{12}", versions["source"])
    assert (
        summary["metric"] == "logit_diff"
        and summary["seconds"].keys() == {"ap", "atp", "relp"}
        and all(s > 0 for s in summary["seconds"].values())
    )


def test_json_is_strict_where_a_correlation_is_undefined(tiny, run, tmp_path):
    """One pair of one position: nothing to correlate. NaN is no JSON."""
    prompts = jsonl(tmp_path / "one.jsonl", {**IDS, "original": [5], "patch": [9]})
    code, out, err = run("--model", tiny["gpt2"], "--prompts", prompts, "--nodes", "resid_pre")  # with its figure
    assert (code, err) == (0, []), err
    text = (tmp_path / "out" / "gpt2-ioi-one" / "summary.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in summary.json"))


def test_figures(tiny, run, tmp_path):
    arguments = ["--model", tiny["gpt2"], tiny["gemma2"], "--pairs", 4, "--nodes", "resid_pre,mlp_out"]
    code, out, err = run(*arguments)
    assert (code, err) == (0, [])
    pictures = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert pictures == ["gemma2-ioi/heatmaps.png", "gpt2-ioi/heatmaps.png", "pcc.png"]
    for picture in pictures:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "gemma2-ioi" / "inspect.html").exists()
    overview = out[out.rindex("written to") :]  # after the models' own tables, the paper's Table 5
    assert all(word in overview for word in ("PCC with AP", "resid_pre", "mlp_out", "AtP", "RelP"))

    assert run(*arguments, "--no-plot")[0] == 0  # what an earlier run has drawn of a model goes
    assert {path.name for path in (tmp_path / "out").glob("*/*")} >= {"scores.npz", "summary.json"}
    assert not list((tmp_path / "out").glob("*/*.png"))


def test_a_plain_run_does_not_load_matplotlib(tiny, tmp_path):
    """Only a figure needs it."""
    code = "import sys, evaluate; evaluate.main(sys.argv[1:]); assert 'matplotlib' not in sys.modules"
    arguments = ["--model", tiny["gpt2"], "--pairs", "2", "--no-plot", "--out", tmp_path]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


OPTIONS = """
--methods ap --nodes mlp_out
--methods relp --nodes mlp_out
--methods relp,ap --nodes z,q
--nodes resid_post,z,q,resid_mid,mlp_hidden --no-plot
--metric prob_diff --no-plot
--metric logprob_diff --no-plot
--metric kl --no-plot
--methods ap,ig,gim,ln+ah --steps 2 --no-plot
--corruption s2 --no-plot
--dtype float64 --no-plot
--dtype bfloat16 --no-plot
--rules ln,ah,gamma=0.5 --no-plot
--batch-size 3 --no-plot
--device cpu --no-plot
"""


@pytest.mark.parametrize("arguments", OPTIONS.strip().splitlines())
def test_options(arguments, tiny, run, tmp_path):
    arguments = arguments.split()
    code, out, err = run("--model", tiny["gemma2"], "--pairs", 4, *arguments)
    assert (code, err) == (0, [])
    given = dict(zip(arguments[::2], arguments[1::2]))
    methods = given.get("--methods", "ap,atp,relp").split(",")
    nodes = given.get("--nodes", ",".join(NODES)).split(",")
    folder = tmp_path / "out" / "gemma2-ioi"
    with np.load(folder / "scores.npz") as scores:
        there = {key for key in scores if key.split("_")[0] in methods}
        assert there == {f"{m}_{node}" for m in methods for node in nodes}
        wanted = np.float64 if given.get("--dtype") == "float64" else np.float32
        assert scores[f"{methods[0]}_{nodes[0]}"].dtype == wanted
    assert (folder / "heatmaps.png").exists() == ("--no-plot" not in arguments)
    assert json.loads((folder / "summary.json").read_text())["metric"] == given.get("--metric", "logit_diff")


# ---------------------------------------------------------------------------------------------------------------------
# The numbers


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key], b[key], err_msg=key, **(tolerance or {"rtol": 0, "atol": 0}))


def test_the_same_command_gives_the_same_scores(tiny, results):
    runs = [results(tiny["gemma2"], "--pairs", 6, "--seed", seed)[1] for seed in (1, 1, 2)]
    same(runs[0], runs[1])
    assert not np.array_equal(runs[0]["original_tokens"], runs[2]["original_tokens"])


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_batch_size_does_not_matter(name, tiny, results):
    auto, *others = (results(tiny[name], "--pairs", 8, "--batch-size", size)[1] for size in ("auto", 1, 3))
    for other in others:
        same(auto, other, atol=1e-5, rtol=1e-4)


def test_dtypes_agree(tiny, results):
    arguments = [tiny["gemma2"], "--pairs", 6, "--dtype"]
    single, double, half = (results(*arguments, dtype)[1] for dtype in ("float32", "float64", "bfloat16"))
    same(single, double, atol=1e-4, rtol=1e-3)
    for key in ("ap_resid_pre", "relp_resid_pre"):
        there = ~np.isnan(single[key])
        assert np.array_equal(there, ~np.isnan(half[key])) and pearson(single[key][there], half[key][there]) > 0.9


def test_without_rules_relp_is_atp(tiny, results):
    _, scores = results(tiny["gemma2"], "--pairs", 6, "--rules", "none")
    _, paper = results(tiny["gemma2"], "--pairs", 6)
    for node in NODES:
        np.testing.assert_array_equal(scores[f"relp_{node}"], scores[f"atp_{node}"])
        np.testing.assert_array_equal(scores[f"atp_{node}"], paper[f"atp_{node}"])
        assert not np.allclose(paper[f"relp_{node}"], paper[f"atp_{node}"], atol=1e-3)


def test_naming_the_papers_rules_is_the_default(tiny, results):
    _, named = results(tiny["gemma2"], "--pairs", 4, "--rules", "ln,identity,half")
    same(named, results(tiny["gemma2"], "--pairs", 4)[1])


def test_no_bos(tiny, results):
    _, with_bos = results(tiny["gpt2"], "--pairs", 4)
    _, without = results(tiny["gpt2"], "--pairs", 4, "--no-bos")
    assert np.array_equal(without["original_tokens"], with_bos["original_tokens"][:, 1:])
    assert np.array_equal(without["lengths"], with_bos["lengths"] - 1)
    assert without["ap_resid_pre"].shape[2] == with_bos["ap_resid_pre"].shape[2] - 1


# ---------------------------------------------------------------------------------------------------------------------
# Prompts from a file


def test_ids_need_no_tokenizer_and_get_no_bos(tiny, results, tmp_path):
    mute = tmp_path / "mute"
    shutil.copytree(tiny["gpt2"], mute)
    (mute / "tokenizer.json").unlink()
    prompts = jsonl(tmp_path / "ids.jsonl", IDS, {**IDS, "original": [3, 4], "patch": [2, 4]}, IDS)
    _, scores = results(mute, "--prompts", prompts, folder="mute-ioi-ids")
    assert scores["original_tokens"][:, :2].tolist() == [[5, 6], [3, 4], [5, 6]]
    assert scores["lengths"].tolist() == [4, 2, 4]
    assert np.isnan(scores["ap_resid_pre"][1, :, 2:]).all()
    np.testing.assert_array_equal(scores["relp_mlp_out"][0], scores["relp_mlp_out"][2])
    _, with_tokenizer = results(tiny["gpt2"], "--prompts", prompts, folder="gpt2-ioi-ids")
    same(scores, with_tokenizer)


def test_pairs_takes_the_first_pairs_of_a_file(tiny, results, tmp_path):
    prompts = jsonl(tmp_path / "many.jsonl", *[{**IDS, "original": [5, 6, 7, i]} for i in range(20, 30)])
    summary, scores = results(tiny["gpt2"], "--prompts", prompts, "--pairs", 3, folder="gpt2-ioi-many")
    assert scores["original_tokens"][:, 3].tolist() == [20, 21, 22] and summary["prompt_pairs"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Runs after each other, and several models


def test_ap_is_run_once(tiny, results, run, monkeypatch, tmp_path):
    """Given again, with another method or another batch size, a command takes AP from the store."""
    summary, scores = results(tiny["gpt2"], "--pairs", 5)
    monkeypatch.setattr(resume, "activation_patching", None)  # is not called
    again, same_scores = results(tiny["gpt2"], "--pairs", 5)
    same(scores, same_scores)
    assert again["agreement"] == summary["agreement"]
    _, other = results(tiny["gpt2"], "--pairs", 5, "--methods", "ap,gim", "--batch-size", 2)
    assert {key.split("_")[0] for key in other if key.endswith("mlp_out")} == {"ap", "gim"}  # nothing of earlier runs
    np.testing.assert_array_equal(other["ap_mlp_out"], scores["ap_mlp_out"])
    with pytest.raises(TypeError):  # other prompts are not in the store
        run("--model", tiny["gpt2"], "--pairs", 5, "--seed", 1, "--no-plot")


def test_a_model_that_fails_leaves_those_before_it(tiny, run, tmp_path):
    code, out, err = run("--model", tiny["gpt2"], tiny["gemma2"], tmp_path / "none", "--pairs", 3)
    assert code == 2 and len(err) == 1 and "none" in err[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"gpt2-ioi", "gemma2-ioi", "pcc.png"}
    assert "PCC with AP" in out[out.rindex("written to") :]  # the overview of those two


def test_the_papers_models_are_those_of_table_5():
    assert options.GROUPS["paper"] == [*evaluate.TABLE_5]


# ---------------------------------------------------------------------------------------------------------------------
# --task sva

SVA = ["--task", "sva", "--pairs", "6", "--held-out", "4", "--thresholds", "1e-3,1e-1,3", "--top", "3"]


def test_circuits(run, tmp_path):
    code, out, err = run(*SVA, "--structures", "simple,across_pp", "--methods", "atp,relp")
    assert (code, err) == (0, []), err
    folder = tmp_path / "out" / "toy-neox-sva"
    names = {"circuit-simple.json", "circuit-across_pp.json", "summary.json", "faithfulness.png"}
    assert {path.name for path in folder.iterdir()} == names
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["structures"].keys() == {"simple", "across_pp"}
    assert summary["arguments"]["methods"] == ["atp", "relp"] and summary["arguments"]["pairs"] == 6
    assert "simple" in out and "across_pp" in out and "faithfulness" in out

    # a second run replaces what is there
    code, _, err = run(*SVA, "--structures", "simple", "--methods", "relp", "--no-plot")
    assert (code, err) == (0, [])
    assert {path.name for path in folder.iterdir()} == {"circuit-simple.json", "summary.json"}


def test_circuits_without_a_unit(run, tmp_path):
    """Above the highest score a circuit is empty: that is no error."""
    code, out, err = run(*SVA, "--structures", "simple", "--thresholds", "100,200,2", "--methods", "relp")
    assert (code, err) == (0, [])


def test_the_methods_of_circuits(run, tmp_path):
    """All four on a toy."""
    assert run(*SVA, "--structures", "simple", "--nodes", "mlp_out", "--no-plot")[0] == 0
    summary = json.loads((tmp_path / "out" / "toy-neox-sva" / "summary.json").read_text())
    assert summary["arguments"]["methods"] == ["ap", "atp", "relp", "ig"]
