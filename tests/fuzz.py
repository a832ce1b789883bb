"""Random input of every kind, against two promises: right numbers, or one line and exit code 2. By hand:

    python tests/fuzz.py --cases 500 --seed 1      500 cases of each kind; what fails is named by its kind and number

pytest runs a few cases of each kind (tests/test_fuzz.py). A case is made from the seed and its number alone.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import evaluate
import models
import relp
from models import TABLE_4, Config, Rules, Transformer
from support.experts import RouterRules

TOY = Path(__file__).parents[1] / "toy"
LIMIT = 60  # seconds that a case may take
SHORT = ["--pairs", "2", "--methods", "atp,relp", "--nodes", "attn_out", "--no-plot"]

# ---------------------------------------------------------------------------------------------------------------------
# Right numbers


def random_config(rng: random.Random) -> dict:
    """A valid config.json of any family, with odd sizes."""
    family = rng.choice(list(TABLE_4))
    kv_heads, shared, d_head = rng.randint(1, 3), rng.randint(1, 3), 2 * rng.randint(1, 6)
    heads, layers = kv_heads * shared, rng.randint(1, 4)
    if family in ("gpt2", "gpt_neox"):
        kv_heads = heads
    width = heads * d_head if family in ("gpt2", "gpt_neox") else 2 * rng.randint(2, 20)
    if family == "gpt2":
        hf = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": 12}
        hf |= {
            "n_inner": rng.choice([None, rng.randint(1, 50)]),
            "activation_function": rng.choice(["gelu", "gelu_new"]),
        }
    else:
        hf = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
        hf |= {"intermediate_size": rng.randint(1, 50), "max_position_embeddings": 12}
        hf["tie_word_embeddings"] = rng.random() < 0.5
    if family == "gpt_neox":
        hf |= {"rotary_pct": rng.choice([0.5, 1.0]), "use_parallel_residual": rng.random() < 0.5}
    if family not in ("gpt2", "gpt_neox"):
        hf |= {"num_key_value_heads": kv_heads, "head_dim": d_head, "sliding_window": rng.randint(1, 8)}
        hf |= {"use_sliding_window": rng.random() < 0.5, "max_window_layers": rng.randint(0, layers)}
        hf |= {"sliding_window_pattern": rng.randint(1, 3), "original_max_position_embeddings": 12}
    if "gemma" in family:
        hf |= {"attn_logit_softcapping": rng.choice([None, 5.0]), "query_pre_attn_scalar": rng.randint(1, 30)}
    if "moe" in family:
        n = rng.randint(1, 5)
        hf |= {"num_experts": n, "num_experts_per_tok": rng.randint(1, n), "moe_intermediate_size": rng.randint(1, 9)}
        hf |= {"norm_topk_prob": rng.random() < 0.5, "decoder_sparse_step": rng.randint(1, 2)}
    return {"model_type": family, "vocab_size": rng.randint(5, 60), **hf}


def random_model(rng: random.Random, dtype: torch.dtype) -> tuple[dict, Transformer]:
    """A config.json, and its model with weights from tame to saturated."""
    torch.manual_seed(rng.randrange(2**31))
    hf = random_config(rng)
    model = Transformer(Config.from_hf(hf))
    scale = rng.choice([1, 5, 20])
    for p in model.parameters():
        p.data = (p.data + 0.02 * torch.randn_like(p)) * (scale if p.ndim > 1 else 1)
    return hf, model.to(dtype).requires_grad_(False).eval()


def random_tokens(rng: random.Random, model: Transformer) -> tuple:
    n, n_pos, vocab = rng.randint(1, 3), rng.randint(1, 9), model.config.n_vocab
    original, patch, answers = (torch.randint(vocab, shape) for shape in ((n, n_pos), (n, n_pos), (n, 2)))
    if rng.random() < 0.5:  # that differ at one position only
        kept = torch.arange(n_pos) != rng.randrange(n_pos)
        patch = torch.where(kept, original, patch)
    return original, patch, answers


def check_ap(rng: random.Random, folder: Path) -> None:
    """The resumed runs against Eq. 1, in float64, by way of a checkpoint."""
    hf, model = random_model(rng, torch.float64)
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(models.to_checkpoint(model), folder / "model.safetensors")
    again = models.from_pretrained(str(folder), dtype=torch.float64)
    original, patch, answers = random_tokens(rng, model)
    assert torch.equal(model(original), again(original)), "a saved checkpoint is another model"
    nodes = rng.sample([*model.nodes, *(part for part, node in relp.PARTS_OF.items() if node in model.nodes)], 3)
    wanted = relp.patch_one_by_one(model, original, patch, answers, nodes)
    got = relp.activation_patching(again, original, patch, answers, nodes, rows=rng.choice([1, 3, 32]))
    for node in nodes:
        scale = max(1.0, float(wanted[node].abs().max()))
        off = float((got[node] - wanted[node]).abs().max())
        assert off <= 1e-10 * scale, f"AP of {node} is off by {off:.2g}"


def random_rules(rng: random.Random, model: Transformer) -> Rules:
    linear = rng.choice([{}, {}, {"epsilon": 10 ** rng.uniform(-6, 1)}, {"gamma": 10 ** rng.uniform(-3, 1)}])
    flags = {name: rng.random() < 0.5 for name in ("ln", "identity", "half", "ah")}
    return Rules(**flags, **linear) if model.config.mixture is None else RouterRules(**flags, **linear, router=True)


def check_bits(rng: random.Random, folder: Path) -> None:
    """Logits are the same to the bit, whatever rules are on, in every dtype; the audit accepts the rules."""
    dtype = rng.choice([torch.float64, torch.float32, torch.bfloat16])
    _, model = random_model(rng, dtype)
    original, patch, _ = random_tokens(rng, model)
    rules = random_rules(rng, model)
    plain = model(original)
    assert torch.equal(plain, model(original, lrp=rules)), f"{rules} changes the logits in {dtype}"
    if plain.isfinite().all():
        evaluate.audit(model, original, rules, patch)


# ---------------------------------------------------------------------------------------------------------------------
# Exit 0, or one line and 2


def run(arguments: list[str]) -> None:
    """The command, in this process. AssertionError if it ends in another way than promised."""
    out, told = io.StringIO(), tempfile.TemporaryFile("w+")
    stderr, saved = sys.stderr, os.dup(2)
    sys.stderr.flush()
    os.dup2(told.fileno(), 2)  # not only Python's stderr: libraries write there too
    sys.stderr = os.fdopen(os.dup(2), "w", encoding="utf-8")
    try:
        with contextlib.redirect_stdout(out):
            code = evaluate.main(arguments)
    finally:
        sys.stderr.close()
        sys.stderr = stderr
        os.dup2(saved, 2)
        os.close(saved)
    told.seek(0)
    lines = told.read().splitlines()
    described = f"{' '.join(arguments)[:300]} -> {code}, {lines[:3]}"
    assert (code, len(lines)) in ((0, 0), (2, 1)), described
    assert not lines or len(lines[0]) < 2000, f"a line of {len(lines[0])} characters: {described}"


def odd_value(rng: random.Random) -> object:
    nested: object = 0
    for _ in range(rng.choice([3, 500])):
        nested = [nested]
    numbers = [0, 1, 2, -1, 7, 0.5, 1e-30, 10**5, 2**31, 2**63, 10**30, 10**400, 1e300, math.inf, math.nan]
    return rng.choice([*numbers, None, True, False, "", "x", "1", "\0", "y" * 5000, [], {}, [1, "a"], {"a": 1}, nested])


def mutated(rng: random.Random, content: dict) -> dict:
    """A JSON object with one value replaced, taken out, or made slightly wrong."""
    content = json.loads(json.dumps(content))
    place, key = content, rng.choice(list(content))
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    value = place[key]
    what = rng.random()
    if what < 0.15:
        del place[key]
    elif what < 0.35 and isinstance(value, int | float):
        place[key] = rng.choice([value + 1, value - 1, 2 * value, -value, value / 2])
    else:
        place[key] = odd_value(rng)
    return content


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes that are cut off, filled up, or in which some are wrong."""
    content = bytearray(content)
    what = rng.random()
    if what < 0.3:
        return bytes(content[: rng.randrange(len(content))])
    if what < 0.4:
        return bytes(content) + rng.randbytes(rng.randint(1, 100))
    start = rng.choice([0, rng.randrange(len(content)), max(0, len(content) - 400)])  # often the head, or the end
    for _ in range(rng.randint(1, 5)):
        content[min(len(content) - 1, start + rng.randrange(300))] = rng.randrange(256)
    return bytes(content)


def toy(folder: Path, but: str, kind: str = "gpt2") -> Path:
    """A copy of a toy model in `folder`, without the file `but`."""
    copied = folder / "model"
    copied.mkdir()
    for file in (TOY / kind).iterdir():
        if file.name != but:
            (copied / file.name).symlink_to(file)
    return copied


def check_json(rng: random.Random, folder: Path, name: str) -> None:
    kind = rng.choice(["gpt2", "neox", "qwen2", "gemma2"])
    copied = toy(folder, but=name, kind=kind)
    content = mutated(rng, json.loads((TOY / kind / name).read_text()))
    (copied / name).write_text(json.dumps(content))
    run(["--model", str(copied), *SHORT, "--out", str(folder / "out")])


def check_config(rng: random.Random, folder: Path) -> None:
    check_json(rng, folder, "config.json")


def check_tokenizer(rng: random.Random, folder: Path) -> None:
    check_json(rng, folder, "tokenizer.json")


def check_weights(rng: random.Random, folder: Path) -> None:
    copied = toy(folder, but="model.safetensors")
    (copied / "model.safetensors").write_bytes(damaged(rng, (TOY / "gpt2" / "model.safetensors").read_bytes()))
    run(["--model", str(copied), *SHORT, "--out", str(folder / "out")])


def check_prompts(rng: random.Random, folder: Path) -> None:
    words = [" John", " Mary", "$$", "$x_{$", "é", "\u2028", "", " went", "\0", "<|endoftext|>", "A", "\n", "}" * 50]
    lines = []
    for _ in range(rng.randint(0, 4)):
        text = rng.choice(["Mary met John.", "".join(rng.choices(words, k=rng.randint(0, 6)))])
        line = {"original": text, "patch": text + rng.choice([" a", " b", ""])}
        if rng.random() < 0.5:
            line["patch"] = text.replace("Mary", "John")
        if rng.random() < 0.3:
            n = rng.randint(1, 4)
            line |= {"original": rng.choices(range(300), k=n), "patch": rng.choices(range(300), k=n)}
        line |= {
            "original_answer": rng.choice([" John", " John", *words]),
            "patch_answer": rng.choice([" Mary", " John", 5, [7], odd_value(rng)]),
        }
        lines.append(json.dumps(mutated(rng, line) if rng.random() < 0.3 else line))
    content = "\n".join(lines).encode()
    file = folder / "prompts.jsonl"
    file.write_bytes(damaged(rng, content) if content and rng.random() < 0.3 else content)
    plot = [argument for argument in SHORT if argument != "--no-plot" or rng.random() < 0.5]
    run(["--model", "toy-gpt2", "--prompts", str(file), *plot, "--out", str(folder / "out")])


def check_kept(rng: random.Random, folder: Path) -> None:
    """Files that an earlier run has left: they are taken if they are whole, or dropped."""
    argv = ["--model", "toy-gpt2", "--pairs", "2", "--nodes", "attn_out", "--no-plot", "--out", str(folder)]
    run(argv)
    results = folder / "toy-gpt2-ioi"
    whole = dict(np.load(results / "scores.npz"))
    file = results / rng.choice(["scores.npz", "summary.json", "unfinished"])
    if file.name == "unfinished":
        stop_early(argv)
        file = next(results.glob("unfinished-*.npz"))
    if rng.random() < 0.5 or file.suffix == ".json":
        file.write_bytes(damaged(rng, file.read_bytes()))
    else:
        arrays = dict(np.load(file))
        key = rng.choice(list(arrays))
        shapes = [(), (0,), (3,), (2, 4, 7)]
        odd = [np.zeros(rng.choice(shapes)), arrays[key].astype(complex), np.array("x"), arrays[key] * np.nan, None]
        value = rng.choice(odd)
        arrays |= {key: value}
        if value is None:
            del arrays[key]
        with open(file, "wb") as opened:
            np.savez(opened, **arrays)
    further = rng.choice([[], ["--methods", "atp"], ["--grid"]])
    run([*argv, *further])
    again = dict(np.load(results / "scores.npz"))
    for key in again.keys() & whole.keys():
        if key.startswith("ap_") and "--methods" in further:
            continue  # AP is not of this run: what the file has of it stays
        if file.suffix == ".json" or not key.startswith("ap_"):
            assert np.array_equal(again[key], whole[key], equal_nan=True), f"{key} changed"
        else:
            np.testing.assert_allclose(again[key], whole[key], atol=1e-4)


def stop_early(argv: list[str]) -> None:
    """A run that is stopped in AP after two positions."""
    effects_at, calls = relp.effects_at, []

    def stopping(*args, **named):
        calls.append(0)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return effects_at(*args, **named)

    relp.effects_at = stopping
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(KeyboardInterrupt):
            evaluate.main(argv)
    finally:
        relp.effects_at = effects_at


def check_options(rng: random.Random, folder: Path) -> None:
    values = ["", "x", "0", "1", "2", "-1", "1e9", "nan", "99999999999999999999", "ln", "ln+ah", "epsilon=0", "$x_{$"]
    values += ["ln,gamma=1e-3", "ln+epsilon=1e99", "atp,relp", "attn_out", "1e-4,1,3", "1e-4,1,99999999999", "é" * 3000]
    options = ["--task", "--model", "--prompts", "--pairs", "--seed", "--metric", "--nodes", "--methods", "--steps"]
    options += ["--rules", "--device", "--dtype", "--batch-size", "--corruption", "--verify", "--structures", "--saes"]
    options += ["--thresholds", "--means", "--top", "--held-out", "--grid", "--audit", "--no-bos", "--shard"]
    given = []
    for option in rng.sample(options, rng.randint(1, 2)):
        given += [option] if option in ("--grid", "--audit", "--no-bos", "--shard") else [option, rng.choice(values)]
    model = [] if "--model" in given else ["--model", "toy-gpt2"]
    rest = [] if "sva" in given else ["--nodes", "attn_out"] if "--nodes" not in given else []
    pairs = [] if "--pairs" in given else ["--pairs", "2"]
    run([*model, *pairs, *rest, *given, "--no-plot", "--out", str(folder / "out")])


KINDS = {
    "ap": check_ap,
    "bits": check_bits,
    "config": check_config,
    "tokenizer": check_tokenizer,
    "weights": check_weights,
    "prompts": check_prompts,
    "kept": check_kept,
    "options": check_options,
}


class TooLong(BaseException):  # no Exception: what catches all of these must not catch this one
    """A case has taken too long."""


def check(kind: str, number: int, seed: int = 0) -> None:
    """One case. AssertionError, or whatever comes up, if a promise is broken."""

    def too_long(*_):
        raise TooLong(f"takes more than {LIMIT} s")

    rng, folder = random.Random(f"{kind} {number} {seed}"), Path(tempfile.mkdtemp())
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        KINDS[kind](rng, folder)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100, help="of each kind [100]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    o, failed = parser.parse_args(), 0
    for kind in o.kinds:
        for number in range(o.cases):
            try:
                check(kind, number, o.seed)
            except (Exception, TooLong) as error:
                failed += 1
                print(f"{kind} {number} (seed {o.seed}): {type(error).__name__}: {str(error)[:600]}", flush=True)
        print(f"{kind}: {o.cases} cases", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
