"""The shipped models do what the README says, and the README says what its commands print."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "toy"))
import train

import relp
import tasks
from models import Config, Transformer, from_pretrained
from support.saes import load_saes
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

TOYS = ["gpt2", "neox", "qwen2", "gemma2"]
ALL = [*TOYS, "qwen3", "qwen3-moe", *(f"deep-{toy}" for toy in TOYS)]


@pytest.mark.parametrize("toy", ALL)
def test_accuracy_on_held_out_combinations(toy):
    accuracy = train.accuracies(from_pretrained(f"toy-{toy}"), train.held_out_prompts(100, seed=777))
    assert train.passes(accuracy), accuracy
    assert train.passes(json.loads((ROOT / "toy" / toy / "training.json").read_text())["accuracy"])


@pytest.mark.parametrize("toy", ALL)
def test_transformers_can_open_them(toy):
    import transformers

    text = "Then, Mary and John went to the store. Mary gave a book to"
    theirs = transformers.AutoTokenizer.from_pretrained(ROOT / "toy" / toy)
    tokenizer = load_tokenizer(f"toy-{toy}")
    ids = tokenizer.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"] and len(ids) == 15
    tokens = torch.tensor([[tokenizer.bos_id] + ids])
    hf = transformers.AutoModelForCausalLM.from_pretrained(
        ROOT / "toy" / toy, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(f"toy-{toy}")(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def test_the_saes_explain_what_the_readme_says():
    """On rows of the corpus that they have not seen.

    The variance that they explain, the features at work, and the model's loss with all of them spliced in.
    """
    import random

    import torch.nn.functional as F

    model = from_pretrained("toy-neox")
    saes, rows = load_saes(str(ROOT / "toy" / "saes" / "neox"), model), train.training_rows(random.Random(99), 64, 24)
    _, acts = relp.record(model, rows, {name for name, _ in saes})
    for key, sae in saes.items():
        x = acts[key][:, 1:]  # after the BOS, whose activations are always the same
        f = sae.encode(x)
        assert 8 < (f > 0).sum(-1).float().mean() < 24, key
        assert sae.error(x).square().sum() / (x - x.mean((0, 1))).square().sum() < 0.06, key

    def spliced(name, layer, x):
        return saes[name, layer].decode(saes[name, layer].encode(x)) if (name, layer) in saes else x

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    assert loss(model(rows, hook=spliced)) < loss(model(rows)) + 0.4


def test_a_model_can_be_trained(tmp_path):
    """The script runs as documented; three steps are enough to see that what it saves can be read."""
    record = train.train("qwen2", 0, replace(train.RECIPES["qwen2"], steps=3), tmp_path)
    assert not record["passes"] and record["steps"] == 3
    model = from_pretrained(str(tmp_path))
    assert torch.isfinite(model(torch.zeros(1, 5, dtype=torch.long))).all()


@pytest.mark.parametrize("family", train.CONFIGS)
def test_deep_models(family):
    """Twice the layers, of the same kinds in turn; embeddings as small as in real models."""
    config, deep = (Config.from_hf(train.config_of(family, n)) for n in (4, train.DEEP.n_layers))
    assert deep.n_layers == 8 and deep.windows == 2 * config.windows
    model = Transformer(deep)
    train.initialise(model, train.DEEP.embedding_std)
    model.requires_grad_(False)
    assert model.embed_tokens.weight.std() == pytest.approx(0.02, rel=0.01)
    mlp = getattr(model.blocks[0].mlp, "experts", [model.blocks[0].mlp])[0]
    assert mlp.up.weight.std() == pytest.approx(128**-0.5, rel=0.02)
    assert mlp.down.weight.std() == pytest.approx(128**-0.5 / 4, rel=0.02)


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
    """`python evaluate.py` prints the correlations that the README shows: as its output, and in a table below."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--out", tmp_path], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""

    def overview(text):
        found = re.finditer(r"^ *(toy-\w+) +((?:-?[\d.]+ *){6})$", text, re.M)
        return [(m[1], [float(x) for x in m[2].split()]) for m in found]

    printed = overview(result.stdout)
    assert [name for name, _ in printed] == ["toy-gpt2", "toy-neox", "toy-qwen2", "toy-gemma2"]
    wanted = [(name, pytest.approx(values, abs=0.002)) for name, values in printed]
    assert overview(README) == wanted
    assert overview(README.replace("|", " ")) == 2 * wanted
    for name in ("pcc.png", "toy-gpt2-ioi/heatmaps.png", "toy-gemma2-ioi/summary.json", "toy-qwen2-ioi/scores.npz"):
        assert (tmp_path / name).stat().st_size > 1000


def test_the_code_in_the_readme_runs():
    """Its blocks one after the other: RelP's scores and a forward pass with a hook, then a rule of one's own."""
    namespace, scores = {}, []
    for code in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(code, namespace)
        scores.append(namespace["scores"])
    by_relp, by_another_rule = scores
    assert by_relp["resid_pre"].shape == by_relp["mlp_out"].shape == by_another_rule["mlp_out"].shape == (1, 4, 16)
    assert not torch.allclose(by_relp["mlp_out"], by_another_rule["mlp_out"], atol=1e-3)
    model, tokens = namespace["model"], namespace["original"]
    assert namespace["logits"].shape == model(tokens).shape and not torch.equal(namespace["logits"], model(tokens))


def test_features_of_the_shipped_saes():
    model, tokenizer = from_pretrained("toy-neox"), load_tokenizer("toy-neox")
    saes = load_saes(str(ROOT / "toy" / "saes" / "neox"), model)
    pairs, _ = tasks.sva(tokenizer, "across_rc", n=100)  # "The athlete that the managers like" -> does
    batch = (torch.tensor([getattr(p, part) for p in pairs]) for part in ("original", "patch", "answers"))
    features = relp.attribute_features(model, *batch, saes, lrp=True)
    assert len(features) == 13 and features["resid_post", 2].shape == (100, 7, 513)


HELP = {"README.md": ["evaluate.py"], "toy/README.md": ["evaluate.py", "toy/train.py", "toy/train_saes.py"]}
HELP |= {"support/README.md": ["evaluate.py"], "beyond/README.md": ["evaluate.py", "tests/benchmark.py"]}
HELP |= {f"{folder}/README.md": ["evaluate.py", "toy/plant.py"] for folder in ("beyond/edges", "toy/planted")}
HELP |= {"tests/README.md": ["evaluate.py", "tests/benchmark.py", "tests/fuzz.py"]}


@cache
def help_of(script):
    command = [sys.executable, ROOT / script, "--help"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("readme", HELP)
def test_the_options_in_the_readmes_exist(readme):
    """Each is an option of the project's command, or of another script that this README is about."""

    def options(text):
        return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))

    known = {"--nproc-per-node"}  # torchrun's
    for script in HELP[readme]:
        known |= options(help_of(script))
    assert len(known) > 20 and options((ROOT / readme).read_text(encoding="utf-8")) <= known
