"""The shipped models do what the README says, and the README says what its commands print."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import relp
from models import from_pretrained, load_saes, load_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "toy"))
import train  # noqa: E402

TOYS = ["gpt2", "neox", "qwen2", "gemma2"]


@pytest.mark.parametrize("toy", TOYS)
def test_accuracy_on_held_out_combinations(toy):
    accuracy = train.accuracies(from_pretrained(f"toy-{toy}"), train.held_out_prompts(200, seed=777))
    assert train.passes(accuracy), accuracy
    assert train.passes(json.loads((ROOT / "toy" / toy / "training.json").read_text())["accuracy"])


@pytest.mark.parametrize("toy", TOYS)
def test_transformers_can_open_them(toy):
    import transformers

    text = "Then, Mary and John went to the store. Mary gave a book to"
    theirs = transformers.AutoTokenizer.from_pretrained(ROOT / "toy" / toy)
    tokenizer = load_tokenizer(f"toy-{toy}")
    assert (
        tokenizer.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        and len(tokenizer.encode(text)) == 15
    )
    tokens = torch.tensor([[tokenizer.bos_id] + tokenizer.encode(text)])
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "toy" / toy, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(f"toy-{toy}")(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def test_the_saes_explain_what_the_readme_says():
    """On rows of the corpus that they have not seen: variance explained, features at work, and the model's loss with all spliced in."""
    import random

    import torch.nn.functional as F

    model = from_pretrained("toy-neox")
    saes, rows = load_saes(str(ROOT / "toy" / "saes" / "neox"), model), train.training_rows(random.Random(99), 64, 24)
    _, acts = relp.record(model, rows, {name for name, _ in saes})
    for key, sae in saes.items():
        x = acts[key][:, 1:]  # behind the BOS, whose activations are always the same
        f = sae.encode(x)
        assert 8 < (f > 0).sum(-1).float().mean() < 24, key
        assert sae.error(x).square().sum() / (x - x.mean((0, 1))).square().sum() < 0.06, key
    spliced = lambda name, layer, x: (
        saes[name, layer].decode(saes[name, layer].encode(x)) if (name, layer) in saes else x
    )
    loss = lambda logits: F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert loss(model(rows, hook=spliced)) < loss(model(rows)) + 0.4


def test_a_model_can_be_trained(tmp_path):
    """The script runs as documented; three steps are enough to see that it learns and that what it saves can be read."""
    record = train.train("qwen2", 0, 3, 4e-3, tmp_path)
    assert not record["passes"] and record["steps"] == 3
    model = from_pretrained(str(tmp_path))
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.long))).all()


def test_training_prompts_hold_out_what_is_tested():
    """No held-out pair of names meets in the corpus."""
    import random

    rng, pairs = random.Random(5), set()
    for _ in range(3000):
        pairs |= {
            tuple(found) for found in re.findall(r"(\w+) and (\w+)", train.ioi(rng)) if set(found) <= set(train.names)
        }
    assert len(pairs) > 500
    for a, b in pairs:
        assert (train.names.index(a) + train.names.index(b)) % 8 != 0


def test_the_first_command_of_the_readme(tmp_path):
    """`python evaluate.py` prints the table that the README shows: the same correlations and accuracies."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--out", tmp_path], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""
    overview = lambda text: [
        (m[1], [float(x) for x in m[2].split()]) for m in re.finditer(r"^ *(toy-\w+) +((?:-?[\d.]+ *){6})$", text, re.M)
    ]
    shown, printed = overview(README), overview(result.stdout)
    assert [name for name, _ in printed] == ["toy-gpt2", "toy-neox", "toy-qwen2", "toy-gemma2"]
    assert shown == [(name, pytest.approx(values, abs=0.002)) for name, values in printed]
    for name in ("pcc.png", "toy-gpt2-ioi/heatmaps.png", "toy-gemma2-ioi/summary.json", "toy-qwen2-ioi/scores.npz"):
        assert (tmp_path / name).stat().st_size > 1000


def test_the_code_in_the_readme_runs():
    namespace = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(code.replace('"toy/saes', f'"{ROOT}/toy/saes'), namespace)
    assert namespace["scores"]["resid_pre"].shape == (1, 4, 16)
    features = namespace["features"]
    assert len(features) == 13 and features["resid_post", 2].shape == (100, 7, 513)


def test_the_options_in_the_readme_exist():
    help_text = subprocess.run([sys.executable, ROOT / "evaluate.py", "--help"], capture_output=True, text=True).stdout
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {
        "--nproc-per-node",
        "--family",
        "--grow",
        "--repeats",
        "--seed",
    }:
        assert option in help_text, option
