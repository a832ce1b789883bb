"""The shipped models do what the README says, and the README says what its commands print."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "toy"))
import train
import train_saes

import relp
from models import Config, Transformer, from_pretrained
from support.saes import load_saes
from support.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]

TOYS = ["gpt2", "neox", "qwen2", "gemma2", "qwen3"]


@pytest.mark.parametrize("toy", TOYS)
def test_accuracy_on_held_out_combinations(toy):
    accuracy = train.accuracies(from_pretrained(f"toy-{toy}"), train.held_out_prompts(100, seed=777))
    assert train.passes(accuracy), accuracy
    assert train.passes(json.loads((ROOT / "toy" / toy / "training.json").read_text())["accuracy"])


@pytest.mark.parametrize("toy", TOYS)
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
        x = acts[key][:, 1:, 0]  # after the BOS, whose activations are always the same
        f = sae.encode(x)
        assert 8 < (f > 0).sum(-1).float().mean() < 24, key
        assert sae.error(x).square().sum() / (x - x.mean((0, 1))).square().sum() < 0.06, key

    def spliced(name, layer, x):
        return saes[name, layer].decode(saes[name, layer].encode(x)) if (name, layer) in saes else x

    def loss(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())

    assert loss(model(rows, hook=spliced)) < loss(model(rows)) + 0.4


@pytest.mark.parametrize("toy", TOYS)
def test_a_checkpoint_is_written_like_the_one_that_is_here(toy, tmp_path):
    config = train.SHARED | train.CONFIGS[toy]
    train.save(Transformer(Config.from_hf(config)), config, tmp_path)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / file).read_bytes() == (ROOT / "toy" / toy / file).read_bytes()
    new, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path, ROOT / "toy" / toy))
    assert new.keys() == ours.keys()
    assert all(new[name].shape == x.shape and new[name].dtype == x.dtype for name, x in ours.items())


def test_a_model_can_be_trained(tmp_path):
    """Three steps are enough to see that what is saved can be read: its accuracies are those of chance."""
    record = train.train("qwen2", 0, 3, tmp_path)
    shipped = json.loads((ROOT / "toy" / "qwen2" / "training.json").read_text())
    assert not record["passes"] and record["steps"] == 3 and record["parameters"] == shipped["parameters"]
    assert json.loads((tmp_path / "training.json").read_text()) == record
    assert torch.isfinite(from_pretrained(str(tmp_path))(torch.zeros(1, 5, dtype=torch.long))).all()


def test_repeated_names_count_more():
    rows = torch.tensor([train.encode(train.EOT + "Then, Mary and John went to the store. Mary gave a book to John.")])
    weights = train.loss_weights(rows, 5.0)
    assert rows[weights == 5].tolist() == train.encode(" Mary John") and weights.sum() == rows.numel() + 2 * 4


def test_autoencoders_are_trained_and_saved(tmp_path, monkeypatch):
    """Thirty steps explain nine tenths, in the mean of the nodes. The files are read as those that are here are."""
    monkeypatch.setattr(train_saes, "ROWS", [(8, 24)])
    monkeypatch.setattr(train_saes, "N_FEATURES", 64)
    model = from_pretrained("toy-neox")
    weights = train_saes.train(model, 0, 30)
    keys = list(train_saes.activations(model, torch.zeros(1, 3, dtype=torch.long)))
    train_saes.save(weights, keys, tmp_path)
    saes = load_saes(str(tmp_path), model)
    assert saes.keys() == set(keys) == load_saes(str(ROOT / "toy" / "saes" / "neox"), model).keys()
    _, quality = train_saes.measure(model, saes, seed=1, batches=1)
    assert quality.keys() == set(keys) and all(q["loss_recovered"] > 0.5 for q in quality.values())
    assert 0.9 < sum(q["fve"] for q in quality.values()) / len(keys) < 1


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
    """`python evaluate.py` prints what toy/README.md shows, but for the seconds, which have two decimals."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, ROOT / "evaluate.py", "--out", tmp_path], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == ""
    printed = list(map(words_and_numbers, result.stdout.splitlines()))
    text = (ROOT / "toy" / "README.md").read_text(encoding="utf-8")
    shown = [block for block in re.findall(r"(?:^ {4}.*\n)+", text, re.M) if "100 prompt pairs" in block]
    assert len(shown) == 1
    for line in "".join(shown).splitlines():
        words, numbers = words_and_numbers(line)
        same = [pytest.approx(other, abs=0.002) for text, other in printed if text == words]
        assert numbers in same or "written to" in line, line
    for name in ("pcc.png", "toy-gpt2-ioi/heatmaps.png", "toy-gemma2-ioi/summary.json", "toy-qwen2-ioi/scores.npz"):
        assert (tmp_path / name).stat().st_size > 1000


def words_and_numbers(line):
    """A line's text, and its numbers with three decimals."""
    number = r"[-+]?\d*\.\d{3}"
    text = re.sub(r"\d+\.\d\d(?!\d)", "seconds", re.sub(number, "number", line))
    return " ".join(text.split()), [float(x) for x in re.findall(number, line)]


@pytest.mark.parametrize("readme", ["README.md", "support/README.md"])
def test_the_code_in_the_readmes_runs(readme, monkeypatch):
    """The blocks of a README one after the other. What they call scores and features are numbers, not all of them 0."""
    monkeypatch.chdir(ROOT)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text(encoding="utf-8"), re.S)
    for code in blocks:
        exec(code, namespace)
        found = namespace["scores" if "scores" in code else "features"]
        assert all(torch.isfinite(x).all() and x.any() for x in found.values()), code
    assert blocks


COMMANDS = [
    "evaluate.py",
    *(f"-m beyond.{name}" for name in ("edges", "grid", "verify", "audit", "conservation")),
    *(f"toy/{name}.py" for name in ("train", "train_saes", "plant")),
    *("tests/benchmark.py", "course/build.py"),
]
READMES = ["README.md", "CONTRIBUTING.md", *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("[!.]*/**/*.md"))]


HELPS = """
import runpy, sys
sys.path[:0] = ["", "toy"]
for command in sys.argv[1:]:
    print(f"of {command}", flush=True)
    *module, name = command.split()
    sys.argv = [name, "--help"]
    try:
        if module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""


@cache
def all_options():
    """{command: the options in its --help}, from one process: most of the time goes into loading torch."""
    run = [sys.executable, "-c", HELPS, *COMMANDS]
    text = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    helps = re.split(r"^of (.+)$", text, flags=re.M)
    assert helps[1::2] == COMMANDS and all("--help" in help for help in helps[2::2])
    return dict(zip(COMMANDS, map(options, helps[2::2])))


def options(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


@pytest.mark.parametrize("readme", READMES)
def test_the_options_in_the_readmes_exist(readme):
    """In a command those of this command, anywhere else those of some command."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    for line in re.findall(r"^ {4}.*\b(?:python|torchrun)\b.*$", text, re.M):
        for command in COMMANDS:
            if command in line:
                given = options(line.split(command)[1])
                assert given <= all_options()[command], line
    of_others = {"--nproc-per-node", "--check", "--no-deps"}  # torchrun's, ruff's and pip's
    known = set().union(*all_options().values()) | of_others
    assert options(text) <= known
