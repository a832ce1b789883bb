"""Train one of the toy models: a small language model of a made-up English that needs the paper's two tasks.

    python toy/train.py --family gpt2           # one model, written to toy/gpt2
    python toy/train.py --family all            # all of them, one folder each

The corpus teaches indirect object identification (IOI, paper, Table 2) and subject-verb agreement (Table 3). Two
things keep a model from solving them by a shortcut. Sentences have optional words, may follow any others and may be
interrupted by one, so that the answer cannot be found by counting positions. And one in eight pairs of names, of
nouns, and of place and gift is never combined in training: all accuracies are measured on those.
The corpus and the accuracy bar are the same for every model; attribution plays no part in them or in the budgets.
"""

import argparse
import json
import math
import random
import re
import sys
import time
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project is a folder of scripts, not a package
from checkpoint import to_checkpoint

import support.families  # noqa: F401 (Qwen3)
from models import Config, Transformer, from_pretrained
from tasks import NAMES, OBJECTS, PLACES

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# Words. Each is one token, with its space.


def first_words(words: list[str], n: int) -> list[str]:
    """The first `n` words that do not extend another one ("Steven" extends "Steve").

    The tokenizer below makes every beginning of a word a token. "Steve" would become a token that the model has
    never seen, and whoever asks "which names are one token?" would use it in a prompt.
    """
    return [w for w in words if not any(w != other and w.startswith(other) for other in words)][:n]


names, places, objects = first_words(NAMES, 40), first_words(PLACES, 16), first_words(OBJECTS, 16)
nouns = """athlete manager secretary teacher doctor student builder lawyer nurse pilot
           author painter singer driver guard car table tree dog truck""".split()
verbs = "like admire hate help know love see follow call trust".split()
adjectives = "fine new small big quiet good bad blue".split()
adverbs = "often really always usually never".split()  # "The managers often like ..."
manners = "quickly slowly finally kindly then".split()  # "Mary slowly went to ..."
times = ["in the morning", "at noon", "yesterday", "last week", "with the others"]
prepositions = ["near", "behind", "beside", "with", "by"]
openers = [  # each with what ends its clause
    ("Then,", "."),
    ("When,", "."),
    ("After", ","),
    ("When", ","),
    ("Yesterday,", "."),
    ("Later", ","),
    ("So", "."),
]
AUXILIARIES = [("has", "have"), ("is", "are"), ("does", "do")]  # (singular, plural)


def plural(noun: str) -> str:
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


NOUNS = [(noun, plural(noun)) for noun in nouns]
VERBS = [(verb + "s", verb) for verb in verbs]

EOT = "<|endoftext|>"
PIECE = re.compile(r"<\|endoftext\|>| ?[A-Za-z]+|[.,]")  # what GPT-2's pattern does to text of this language


def all_words() -> list[str]:
    """Every token that the corpus uses, without the punctuation (which consists of single bytes)."""
    inside = "and to the a went met at were was had gave handed sent thanked that not".split()
    inside += names + places + objects + adjectives + adverbs + manners + prepositions
    inside += [word for phrase in times for word in phrase.split()]
    inside += [form for pair in NOUNS + VERBS + AUXILIARIES for form in pair]
    initial = names + ["The"] + [opener.strip(",") for opener, _ in openers]
    inside += initial  # a sentence starts without a space only at the start of a text
    return sorted({" " + word for word in inside}) + sorted(set(initial))


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each of the 256 bytes, in the order of GPT-2's vocabulary ("Ġ" is the space)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def make_tokenizer() -> dict:
    """A byte-level BPE tokenizer.json (as a dict) in which every word of the language is one token.

    A word is built from its beginning: "Ġs", "Ġst", "Ġsto", "Ġstor", "Ġstore". In a word with a space only such
    merges apply, because they come first in `merges`; the words without a space all start with a capital letter, so
    that their merges apply nowhere but at the start of a word.
    """
    vocab, merges = list(byte_characters().values()), []
    seen = set(vocab)
    for word in all_words():  # those with a space come first
        word = word.replace(" ", "Ġ")
        for i in range(1, len(word)):
            if word[: i + 1] not in seen:
                seen.add(word[: i + 1])
                vocab.append(word[: i + 1])
                merges.append(f"{word[:i]} {word[i]}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {
        "id": len(vocab),
        "content": EOT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(vocab)} | {EOT: len(vocab)},
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": model,
    }


TOKENIZER = make_tokenizer()
VOCAB = {token.replace("Ġ", " "): i for token, i in TOKENIZER["model"]["vocab"].items()}
assert not {" " + word for word in NAMES + PLACES + OBJECTS} & VOCAB.keys() - set(all_words()), "an unlearned token"


def encode(text: str) -> list[int]:
    """Token ids of a text of this language (a word that it does not have is a KeyError)."""
    return [VOCAB[piece] for piece in PIECE.findall(text)]


# ---------------------------------------------------------------------------------------------------------------------
# Corpus


def pair(rng: random.Random, first: list, second: list, held_out: bool = False) -> tuple:
    """One word of each list, of different index if it is one list; 1 combination in 8 is held out."""
    while True:
        i, j = rng.randrange(len(first)), rng.randrange(len(second))
        if ((i + j) % 8 == 0) == held_out and not (first is second and i == j):  # symmetric: (B, A) goes with (A, B)
            return first[i], second[j]


def maybe(rng: random.Random, words: list[str], p: float = 0.2) -> str:
    """A filler word (with its space) or nothing."""
    return " " + rng.choice(words) if rng.random() < p else ""


def distractor(rng: random.Random, exclude: Collection[str] = ()) -> str:
    """A sentence about somebody else: its name is also mentioned once, and is never the answer."""
    name = rng.choice([n for n in names if n not in exclude])
    ends = [
        f"was at the{maybe(rng, adjectives)} {rng.choice(places)}",
        f"had a{maybe(rng, adjectives)} {rng.choice(objects)}",
        f"was {rng.choice(adjectives)}",
    ]
    end = rng.choice(ends)
    return f"{name}{maybe(rng, manners)} {end}{maybe(rng, times)}."


def ioi(rng: random.Random) -> str:
    """The paper's templates, both name orders, with fillers: "Then, Mary and John went to ..." """
    (a, b), (place, obj) = pair(rng, names, names), pair(rng, places, objects)
    x, y = rng.sample([a, b], 2)
    opener, stop = rng.choice(openers)
    verb = rng.choice(["went to", "went to", "were at"])
    who = f"{x} met {y} at" if rng.random() < 0.15 else f"{x} and {y}{maybe(rng, manners)} {verb}"
    text = f"{opener} {who} the{maybe(rng, adjectives)} {place}{maybe(rng, times)}{stop}"
    if stop == "." and rng.random() < 0.15:
        text += " " + distractor(rng, (a, b))
    gave = rng.choice(["gave", "gave", "handed", "sent"])
    text += f" {b}{maybe(rng, manners)} {gave} a{maybe(rng, adjectives)} {obj} to {a}{maybe(rng, times)}."
    # more practice in naming the other one of the two: the models discover the task sooner
    after = ["", f" {a}{maybe(rng, manners)} thanked {b}.", f" {a} gave a {obj} to {b}."]
    return text + rng.choice(after)


def subject(rng: random.Random, kind: str, number: int, other: int, held_out: bool = False, filler: float = 0.2) -> str:
    """A sentence up to its verb.

    kind    simple, within_rc, across_rc or across_pp
    number  of the first noun, 0 singular and 1 plural; other: of the second noun
    filler  how probable each optional word is
    """
    first, second = pair(rng, NOUNS, NOUNS, held_out)
    text = f"The{maybe(rng, adjectives, filler)} {first[number]}"
    the_other = f"the{maybe(rng, adjectives, filler)} {second[other]}"
    if kind == "across_pp":
        text += f" {rng.choice(prepositions)} {the_other}"
    if kind in ("within_rc", "across_rc"):
        text += f" that {the_other}{maybe(rng, adverbs, filler)}"
    if kind == "across_rc":
        text += f" {rng.choice(VERBS)[other]}"
    return text + maybe(rng, adverbs, filler)


def agreement(rng: random.Random) -> str:
    """A sentence whose verb agrees with its subject, whatever noun comes between them."""
    number, other = rng.randrange(2), rng.randrange(2)
    has, is_, does = (forms[number] for forms in AUXILIARIES)
    verb, base = rng.choice(VERBS)[number], rng.choice(VERBS)[1]
    predicates = [
        f"{verb} {rng.choice(names)}",
        f"{has} a{maybe(rng, adjectives)} {rng.choice(objects)}",
        f"{is_} {rng.choice(adjectives)}",
        f"{does} not {base} {rng.choice(names)}",
    ]
    predicate = rng.choice(predicates)
    kind = rng.choice(["simple", "across_rc", "across_rc", "across_pp"])
    return f"{subject(rng, kind, number, other)} {predicate}{maybe(rng, times)}."


def training_rows(rng: random.Random, n_rows: int, length: int) -> torch.Tensor:
    """Token ids [n_rows, length]: a BOS and then as many sentences as fit (the last one is cut)."""
    rows = []
    for _ in range(n_rows):
        row = [VOCAB[EOT]]
        while len(row) < length:
            sentence = rng.choices([ioi, agreement, distractor], [5, 4, 1])[0](rng)
            row += encode(sentence if len(row) == 1 else " " + sentence)
        rows.append(row[:length])
    return torch.tensor(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Accuracy on what was held out

TEMPLATES = {
    "1": "Then, {} and {} went to the {}. {} gave a {} to",
    "2": "When, {} and {} went to the {}. {} gave a {} to",
    "3": "After {} and {} went to the {}, {} gave a {} to",
}


def held_out_prompts(n: int, seed: int = 12345) -> dict[str, list[tuple]]:
    """{test: list of (token ids, right token, wrong tokens)}, `n` prompts each, the same for every model.

    IOI: the right name must beat all the other names. Agreement: the right form must beat the other form, for a
    verb or auxiliary drawn for each prompt ("within_rc": a verb).
    """
    rng, tests = random.Random(seed), {}
    for template, text in TEMPLATES.items():
        for order in "BA", "AB":
            tests[f"ioi_{template}_{order}"] = examples = []
            for _ in range(n):
                (a, b), (place, obj) = pair(rng, names, names, True), pair(rng, places, objects, True)
                x, y = (b, a) if order == "BA" else (a, b)
                wrong = [VOCAB[" " + name] for name in names if name != a]
                examples.append((encode(EOT + text.format(x, y, place, b, obj)), VOCAB[" " + a], wrong))
    for kind in "simple", "within_rc", "across_rc", "across_pp":
        tests[f"agreement_{kind}"] = examples = []
        for _ in range(n):
            number, other = rng.randrange(2), rng.randrange(2)
            forms = rng.choice(VERBS if kind == "within_rc" else VERBS + 3 * AUXILIARIES)
            agrees = other if kind == "within_rc" else number
            ids = encode(EOT + subject(rng, kind, number, other, held_out=True, filler=0))
            examples.append((ids, VOCAB[" " + forms[agrees]], [VOCAB[" " + forms[1 - agrees]]]))
    return tests


@torch.no_grad()
def accuracies(model: Transformer, tests: dict[str, list[tuple]]) -> dict[str, float]:
    """{test: fraction right}. The prompts of a test have one length, so that they make one batch."""
    result = {}
    for name, examples in tests.items():
        ids, right, wrong = (torch.tensor(column) for column in zip(*examples))
        logits = model(ids)[:, -1]  # [prompt, vocab]
        best_wrong = logits.gather(1, wrong).amax(1)
        result[name] = (logits.gather(1, right[:, None])[:, 0] > best_wrong).float().mean().item()
    return result


def passes(accuracy: dict[str, float]) -> bool:
    """The bar, fixed before any training: IOI > 97 % for every template and order, every agreement type > 95 %."""
    return all(value > (0.97 if name.startswith("ioi") else 0.95) for name, value in accuracy.items())


# ---------------------------------------------------------------------------------------------------------------------
# Models and training

CONTEXT = 64  # tokens in a long training row, and the number of positions that GPT-2 learns
# A step takes short rows, where only two names compete and copying them is easy to discover, or long ones, where a
# sentence can stand anywhere and follow any other.
ROWS = [(96, 24), (96, 24), (32, CONTEXT)]  # (rows, tokens in each)
SHARED = {
    "vocab_size": len(VOCAB),
    "bos_token_id": VOCAB[EOT],
    "eos_token_id": VOCAB[EOT],
    "torch_dtype": "float16",
    "initializer_range": 0.02,
}
LLAMA_LIKE = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 344,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
}
CONFIGS = {  # config.json of each model, with the field names of the library `transformers`
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": CONTEXT,
        "n_ctx": CONTEXT,
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    "neox": {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": CONTEXT,
        "use_parallel_residual": True,
        "attention_bias": True,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    | LLAMA_LIKE,
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
    }
    | LLAMA_LIKE,
    "gemma2": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 32,
        "sliding_window": 12,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention_bias": False,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    | LLAMA_LIKE,
}


LEARNING_RATE = 4e-3
STEPS = dict.fromkeys(CONFIGS, 1000) | {"gpt2": 800}
# The weight in the loss of a name that its row has mentioned before: what IOI asks for, one token in twelve. With
# rotary positions the models discover the task without help. GPT-2 starts without any notion of distance: with the
# weight 1 it was still at chance after 1000 steps.
REPEATED = dict.fromkeys(CONFIGS, 1.0) | {"gpt2": 5.0}


def initialise(model: Transformer) -> None:
    """Normal weights of variance 1 / d_model, smaller ones where a matrix writes into the residual stream, as in GPT-2.

    With GPT-2's own 0.02, a model of this width would have uniform attention for a long time. Norms and biases stay as
    they were made.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = model.config.d_model**-0.5
            if name.endswith((".o.weight", ".down.weight")):
                std /= math.sqrt(2 * model.config.n_layers)
            torch.nn.init.normal_(parameter, std=std)


def loss_weights(rows: torch.Tensor, repeated: float) -> torch.Tensor:
    """Weights [row, pos] of the tokens in the loss: `repeated` for a name that the row has mentioned before, else 1."""
    again = (rows[:, :, None] == rows[:, None, :]).tril(-1).any(-1)
    is_name = torch.isin(rows, torch.tensor([VOCAB[" " + name] for name in names]))
    return torch.where(again & is_name, repeated, 1.0)


def rate(step: int, steps: int) -> float:
    """The learning rate's share of its maximum: linear warm-up over 100 steps, then a cosine down to 10 %."""
    return min((step + 1) / 100, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def train(family: str, seed: int, steps: int, out: Path) -> dict:
    """Train, save in Hugging Face layout, reload what was saved and measure it; returns the training record.

    The same seed gives the same model on the same machine with the same number of threads (OMP_NUM_THREADS).
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    started = time.time()
    config = SHARED | CONFIGS[family]
    model = Transformer(Config.from_hf(config))
    initialise(model)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{family}, seed {seed}: {n_parameters:,} parameters, {len(VOCAB)} tokens", flush=True)

    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    quick_tests = held_out_prompts(50)
    for step in range(1, steps + 1):
        rows = training_rows(rng, *rng.choice(ROWS))
        losses = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        weights = loss_weights(rows, REPEATED[family])[:, 1:].flatten()
        loss = (weights * losses).sum() / weights.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            line, accuracy = f"step {step:5d}  loss {loss.item():.3f}", accuracies(model, quick_tests)
            for task in "ioi", "agreement":
                values = [value for name, value in accuracy.items() if name.startswith(task)]
                line += f"  {task} {sum(values) / len(values):.3f} (worst {min(values):.2f})"
            print(f"{line}  {time.time() - started:.0f} s", flush=True)

    save(model, config, out)
    accuracy = accuracies(from_pretrained(str(out)), held_out_prompts(500))
    record = {
        "family": family,
        "seed": seed,
        "steps": steps,
        "lr": LEARNING_RATE,
        "passes": passes(accuracy),
        "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        "parameters": n_parameters,
        "minutes": round((time.time() - started) / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["accuracy"]))
    print(f"{family}, seed {seed}: {'passes' if record['passes'] else 'BELOW'} the bar; saved in {out}", flush=True)
    return record


def save(model: Transformer, config: dict, out: Path) -> None:
    """config.json, model.safetensors (fp16) and the tokenizer's two files."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half() for name, tensor in to_checkpoint(model).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOT,
        "eos_token": EOT,
        "unk_token": EOT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (out / "tokenizer.json").write_text(json.dumps(TOKENIZER, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=[*CONFIGS, "all"], required=True, help="which model")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the corpus (default: 0)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: 1000; gpt2 800)")
    parser.add_argument("--out", type=Path, default=ROOT / "toy", help="a folder; the model goes to OUT/FAMILY")
    args = parser.parse_args()
    for family in CONFIGS if args.family == "all" else [args.family]:
        train(family, args.seed, args.steps or STEPS[family], args.out / family)


if __name__ == "__main__":
    main()
