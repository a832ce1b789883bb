"""Plant a circuit: a small GPT-2 whose weights are set by hand, so that it is known which edges matter.

    python toy/plant.py                       writes toy/planted: the checkpoint, its tokenizer and 40 prompt pairs
    python toy/plant.py --judge edges.npz     how well the methods of an edge run have found the circuit

The task is to follow a chain of two links. "Ann Bob" is a link: it leads from Ann to Bob. In

    Ann Bob Dan Eve Bob Cid Eve Fay Ann  ->  Cid

Ann leads to Bob and Bob leads to Cid. toy/planted/README.md explains the model. CIRCUIT lists the edges that matter.
An edge goes from a writer (input, a head a{layer}.h{head}, an MLP m{layer}) to a reader (<q>, <k> or <v> of a head, an
MLP, the logits).
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is a folder of scripts, not a package
from checkpoint import to_checkpoint
from train import EOT, ROOT, TOKENIZER

from models import Config, Transformer
from tasks import Pair

# ---------------------------------------------------------------------------------------------------------------------
# The truth

CIRCUIT = [
    "input->a0.h0<v>",  # the word before this one ...
    "a0.h0->a1.h0<k>",  # ... is what the first step looks for
    "input->a1.h0<q>",  # the first step looks for the question
    "input->a1.h0<v>",  # and takes the word that it finds
    "a1.h0->m1",  # which m1 turns into the second question
    "a0.h0->a2.h0<k>",  # the second step looks at the words before, too
    "m1->a2.h0<q>",  # for the second question
    "input->a2.h0<v>",  # and takes the word that it finds
    "a2.h0->m2",  # which m2 turns into the answer
    "m2->logits",
]

# The circuit needs these edges too, but they carry positions. Both prompts of a pair have the same positions, so a
# patch changes nothing here, and no comparison of two prompts can find them.
POSITIONS = ["input->a0.h0<q>", "input->a0.h0<k>"]

# What a pair's two prompts differ in, and the part of the circuit that this change goes through.
AFTER_1 = ["a1.h0->m1", "m1->a2.h0<q>"]
AFTER_2 = ["a2.h0->m2", "m2->logits"]
PATHS = {
    "question": ["input->a1.h0<q>", *AFTER_1, *AFTER_2],  # the last word
    "from 1": ["input->a0.h0<v>", "a0.h0->a1.h0<k>", *AFTER_1, *AFTER_2],  # the words where the first links begin
    "to 1": ["input->a1.h0<v>", *AFTER_1, *AFTER_2],  # the words where the first links end
    "from 2": ["input->a0.h0<v>", "a0.h0->a2.h0<k>", *AFTER_2],  # the same for the second links
    "to 2": ["input->a2.h0<v>", *AFTER_2],
}

# The position of a word that changes places with the one two positions later, in the other link of the same step.
EXCHANGED = {"from 1": 1, "to 1": 2, "from 2": 5, "to 2": 6}

# ---------------------------------------------------------------------------------------------------------------------
# Words, positions and their codes

WORDS = """Ann Bob Cid Dan Eve Fay Gus Hal Ida Joe Kim Liz Mia
           Ned Oda Pam Quy Ron Sue Tom Uma Val Wes Xia Yan Zoe""".split()
BOS = len(WORDS)  # its token id; that of a word is its place in WORDS
LENGTH = 10  # BOS, four links of two words, the question
OPPOSITE = len(WORDS) // 2  # word i + OPPOSITE has the code of word i with the other sign


def codes(n: int) -> Tensor:
    """n - 1 vectors of length 1 at right angles to each other, whose entries sum to 0: [n - 1, n].

    They are cosines. As the sums are 0, LayerNorm subtracts nothing.
    """
    waves = [[math.cos(math.pi * k * (i + 0.5) / n) for i in range(n)] for k in range(1, n)]
    return torch.tensor(waves, dtype=torch.float64) * math.sqrt(2 / n)


# The residual stream in parts: name -> number of dimensions. Each part has one writer, but for `side`.
PARTS = {
    "word": 14,  # input: this word
    "place": 12,  # input: this position
    "before": 14,  # a0.h0: the word before
    "found_1": 14,  # a1.h0: where the first link leads
    "asked": 14,  # m1: the question of the second step
    "found_2": 14,  # a2.h0: where the second link leads
    "answer": 14,  # m2; the only part that the logits read
    "side": 14,  # all distractors; no part of the circuit reads it
    "level": 2,  # input: a large constant
}
STARTS = dict(zip(PARTS, [sum(list(PARTS.values())[:i]) for i in range(len(PARTS))]))
PART = {name: slice(STARTS[name], STARTS[name] + size) for name, size in PARTS.items()}

WORD_CODES = torch.cat([codes(14), -codes(14)])  # [word, 14]
PLACE_CODES = codes(12)[:LENGTH]  # [position, 12]

# ---------------------------------------------------------------------------------------------------------------------
# The weights

N_LAYERS, N_HEADS, D_MODEL, D_MLP = 3, 4, sum(PARTS.values()), 40
D_HEAD = D_MODEL // N_HEADS
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": len(WORDS) + 1,
    "n_embd": D_MODEL,
    "n_layer": N_LAYERS,
    "n_head": N_HEADS,
    "n_positions": LENGTH,
    "n_ctx": LENGTH,
    "n_inner": D_MLP,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": BOS,
    "torch_dtype": "float32",
}

LEVEL = 7.3  # as +7.3 and -7.3; it makes most of the stream's size, and LayerNorm divides by about 1 everywhere
GAP = 10.0  # attention score where a code meets itself; elsewhere it is 0
SHARPNESS = 12.0  # of the dictionaries' neurons
THRESHOLD = 0.6  # how much of a word's code must be there before its neuron fires
LOGIT = 5.0  # the answer's logit; those of most other words are 0
SIDE = 0.005  # about the size of what a distractor writes


def plant() -> Transformer:
    """The model, with all weights set."""
    model = Transformer(Config.from_hf(CONFIG)).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:  # norms and biases stay as they were made: 1 and 0
            parameter.zero_()

    model.embed_tokens.weight[:BOS, PART["word"]] = WORD_CODES.float()
    model.embed_positions.weight[:, PART["place"]] = PLACE_CODES.float()
    model.embed_positions.weight[:, PART["level"]] = torch.tensor([LEVEL, -LEVEL])
    model.unembed_tokens.weight[:BOS, PART["answer"]] = LOGIT * WORD_CODES.float()

    # The circuit. a0.h0: in a link, the second word looks at the first; all others look at BOS, whose word is 0.
    target = torch.tensor([i - 1 if i in (2, 4, 6, 8) else 0 for i in range(LENGTH)])
    look = PLACE_CODES[target].T @ PLACE_CODES  # this position's code -> that of the one to look at
    plant_head(model, "a0.h0", q="place", k="place", v="word", out="before", first=look)
    plant_head(model, "a1.h0", q="word", k="before", v="word", out="found_1")
    plant_head(model, "a2.h0", q="asked", k="before", v="word", out="found_2")
    plant_dictionary(model, "m1", "found_1", "asked")
    plant_dictionary(model, "m2", "found_2", "answer")

    # The distractors: three heads in each layer, m0, and the neurons of m1 and m2 that the circuit does not use
    rng = random.Random(0)
    for layer in range(N_LAYERS):
        for head in range(1, N_HEADS):
            distract_head(model, f"a{layer}.h{head}", rng)
        distract_mlp(model, f"m{layer}", 0 if layer == 0 else len(WORDS), rng)
    return model.eval()


def plant_head(model: Transformer, name: str, q: str, k: str, v: str, out: str, first: Tensor | None = None) -> None:
    """A head that looks where part k is what part q is at its own position, and copies part v from there to `out`.

    first: a matrix that part q goes through first, [its size, its size].
    """
    attn, rows = find_head(model, name)
    scale = math.sqrt(GAP * math.sqrt(D_HEAD))  # q and k have one each; scores are divided by sqrt(D_HEAD)
    attn.q.weight[rows[: PARTS[q]], PART[q]] = scale * (torch.eye(PARTS[q]) if first is None else first.float())
    attn.k.weight[rows[: PARTS[k]], PART[k]] = scale * torch.eye(PARTS[k])
    attn.v.weight[rows[: PARTS[v]], PART[v]] = torch.eye(PARTS[v])
    attn.o.weight[PART[out], rows[: PARTS[v]]] = torch.eye(PARTS[v])


def plant_dictionary(model: Transformer, name: str, reads: str, out: str) -> None:
    """An MLP with one neuron per word, which fires where the word's code is in one part and writes it to another."""
    mlp = model.blocks[int(name[1:])].mlp
    mlp.up.weight[:BOS, PART[reads]] = (SHARPNESS * WORD_CODES).float()
    mlp.up.bias[:BOS] = -SHARPNESS * THRESHOLD
    mlp.down.weight[PART[out], :BOS] = (WORD_CODES.T / (SHARPNESS * (1 - THRESHOLD))).float()


def distract_head(model: Transformer, name: str, rng: random.Random) -> None:
    """A head that reads everything but the level, at random, and writes to `side`."""
    attn, rows = find_head(model, name)
    for linear in attn.q, attn.k, attn.v:
        linear.weight[rows] = random_reading(rng, len(rows))
    attn.o.weight[:, rows] = random_writing(rng, len(rows))


def distract_mlp(model: Transformer, name: str, first: int, rng: random.Random) -> None:
    """The same with an MLP's neurons from `first` on."""
    mlp = model.blocks[int(name[1:])].mlp
    mlp.up.weight[first:] = random_reading(rng, D_MLP - first)
    mlp.down.weight[:, first:] = random_writing(rng, D_MLP - first)


def find_head(model: Transformer, name: str) -> tuple[torch.nn.Module, list[int]]:
    """(attention of its layer, the head's rows in q, k and v, which are its columns in o)"""
    layer, head = int(name[1]), int(name[-1])
    return model.blocks[layer].attn, list(range(head * D_HEAD, (head + 1) * D_HEAD))


def signs(rng: random.Random, rows: int, columns: int) -> Tensor:
    return torch.tensor([[1.0 if rng.random() < 0.5 else -1.0 for _ in range(columns)] for _ in range(rows)])


def random_reading(rng: random.Random, rows: int) -> Tensor:
    """Weights [rows, D_MODEL]. `side` is small, so its weights are large: distractors hear each other well."""
    weight = 0.5 * signs(rng, rows, D_MODEL)
    weight[:, PART["side"]] /= SIDE
    weight[:, PART["level"]] = 0
    return weight


def random_writing(rng: random.Random, columns: int) -> Tensor:
    """Weights [D_MODEL, columns]: each number goes to two dimensions of `side`, as +x and -x, so that the sum is 0."""
    half = signs(rng, PARTS["side"] // 2, columns) * SIDE / math.sqrt(columns * PARTS["side"])
    weight = torch.zeros(D_MODEL, columns)
    weight[PART["side"]] = torch.cat([half, -half])
    return weight


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def pairs(n: int = 40, seed: int = 0) -> list[Pair]:
    """`n` different pairs for the planted model. Pair i is changed as the i-th of PATHS says, which is its group.

    Original: two chains a -> b -> c and d -> e -> f. Both first links come first, then both second ones, each time in
    random order, then the question a; the answer is c. In the patch, two words change places (`question`: the
    question is d), and the answer is f. Roles: BOS, F1 and T1 (the first link's from and to), ..., F4, T4, END.
    No prompt has two words with opposite codes.
    """
    rng, found = random.Random(seed), []
    roles = ("BOS", *(f"{end}{link}" for link in (1, 2, 3, 4) for end in "FT"), "END")
    while len(found) < n:
        change = list(PATHS)[len(found) % len(PATHS)]
        chosen = rng.sample(range(OPPOSITE), 6)
        a, b, c, d, e, f = (word + rng.choice((0, OPPOSITE)) for word in chosen)
        first, second = rng.sample([(a, b), (d, e)], 2), rng.sample([(b, c), (e, f)], 2)
        prompt = [BOS, *first[0], *first[1], *second[0], *second[1], a]
        pair = Pair(tuple(prompt), tuple(changed(prompt, change, d)), (c, f), roles, change)
        if pair not in found:
            found.append(pair)
    return found


def changed(prompt: list[int], change: str, d: int) -> list[int]:
    """The patch prompt. d: where the other chain begins."""
    if change == "question":
        return [*prompt[:-1], d]
    patch, i = list(prompt), EXCHANGED[change]
    patch[i], patch[i + 2] = patch[i + 2], patch[i]
    return patch


def text(ids: tuple[int, ...]) -> str:
    return " ".join(WORDS[i] for i in ids if i != BOS)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def tokenizer() -> dict:
    """A tokenizer.json in which each word, with the space before it, is one token. There are no others but BOS."""
    byte_level = {**TOKENIZER["pre_tokenizer"], "add_prefix_space": True}  # "Ann" is read as " Ann"
    vocab = {f"Ġ{word}": i for i, word in enumerate(WORDS)} | {EOT: BOS}
    return {
        **TOKENIZER,
        "added_tokens": [{**TOKENIZER["added_tokens"][0], "id": BOS}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        # without merges: a piece of text that is in the vocabulary is a token
        "model": {**TOKENIZER["model"], "vocab": vocab, "merges": [], "ignore_merges": True},
    }


def save(out: Path) -> None:
    """config.json, model.safetensors (float32), the tokenizer's two files, and pairs.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(to_checkpoint(plant()), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "add_prefix_space": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": LENGTH,
    }
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n", encoding="utf-8")
    content = json.dumps(tokenizer(), indent=1, ensure_ascii=False)
    (out / "tokenizer.json").write_text(content + "\n", encoding="utf-8")
    lines = []
    for pair in pairs():
        c, f = (f" {WORDS[answer]}" for answer in pair.answers)
        line = {"original": text(pair.original), "patch": text(pair.patch), "original_answer": c, "patch_answer": f}
        lines.append(json.dumps({**line, "change": pair.group}) + "\n")
    (out / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Has a method found the circuit?


def judge(path: Path) -> dict[str, tuple[float, float]]:
    """{method: (AUROC, precision)} from the edges.npz of `python -m beyond.edges`, edges ranked by |mean score|.

    AUROC is the probability that an edge of the circuit has a larger score than another edge; a tie counts half.
    Precision is the share of circuit edges among the ten edges with the largest scores.
    """
    with np.load(path) as file:
        arrays = dict(file)
    readers, writers = arrays["readers"].tolist(), arrays["writers"].tolist()
    names = np.array([[f"{writer}->{reader}" for reader in readers] for writer in writers])
    if len(writers) != 1 + N_LAYERS * (N_HEADS + 1) or not np.isin(CIRCUIT, names).all():
        raise ValueError("it is of another model")
    found = {}
    for method, scores in arrays.items():
        if scores.shape[1:] != names.shape or scores.dtype.kind != "f":
            continue
        size = np.abs(scores.mean(0))
        there = ~np.isnan(size)
        size, in_circuit = size[there], np.isin(names[there], CIRCUIT)
        ours, others = size[in_circuit][:, None], size[~in_circuit]
        auroc = (ours > others).mean() + 0.5 * (ours == others).mean()
        first = np.argsort(-size, kind="stable")[: len(CIRCUIT)]
        found[method] = float(auroc), float(in_circuit[first].mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "toy" / "planted", help="folder (default: toy/planted)")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="an edges.npz: write nothing")
    given = parser.parse_args()
    if not given.judge:
        return save(given.out)
    try:
        found = judge(given.judge)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{given.judge} is not an edges.npz of this model: {error}")
    for method, (auroc, precision) in found.items():
        print(f"{method:12} AUROC {auroc:.3f}   precision at {len(CIRCUIT)} {precision:.2f}")


if __name__ == "__main__":
    main()
