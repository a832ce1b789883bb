"""What the project's commands share: their options, and how they end.

beyond/grid.py is an example of a command.

common_parser(prog, description, without)   the common options, without those that have no meaning for this command
parse(parser, argv)                         the options: models one by one, the device joined with other processes
load(name, o)                               the model, and the prompt pairs that the options ask for
run(main)                                   the exit code: 0; 2 and one line for what the user can mend; 130 for Ctrl-C

What the user can mend is raised as a ValueError of one line, anywhere. Every other exception is a bug of ours and ends
in Python's own traceback, with exit code 1. An option's default is text as in the command line, or already a value.
"""

import argparse
import math
import os
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import numpy as np
import torch

import models
import relp
import support.experts  # noqa: F401 (newer families)
import support.gguf  # noqa: F401 (GGUF files)
import tasks
from support import processes, prompts, results
from support.processes import say
from support.scoring import OUT_OF_MEMORY, out_of_memory
from support.tokenizer import NoTokenizer, load_tokenizer

TOYS = ["toy-gpt2", "toy-neox", "toy-qwen2", "toy-gemma2"]
GROUPS = {  # one name for several models
    "toys": TOYS,
    "paper": [
        *("gpt2", "gpt2-medium", "gpt2-large", "pythia-70m"),
        *("pythia-410m", "qwen2-0.5b", "qwen2-7b", "gemma2-2b"),
    ],
}
NODES = "resid_pre,attn_out,mlp_out"  # residual stream, attention outputs and MLP outputs of Table 5
PAIR = ("original", "patch", "answers")
EPILOG = (
    "Models that need no network: toy-gpt2, toy-neox, toy-qwen2, toy-gemma2, toy-qwen3; a real one, smollm2-135m-q4. "
    "Methods: ap patches each node; atp has the gradient, relp the paper's rules, ig mean gradients; best is .6 relp "
    "+ .4 twopoint; twopoint, gim, attnlrp, cp-lrp, atp*, eap-ig-5: see beyond/README.md; ln+ah has these rules."
)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse itself would print the usage as well, and exit
        raise ValueError(message)


def common_parser(prog: str, description: str, without: Collection[str] = ()) -> Parser:
    """A parser of the common options, but for those named in `without`, such as "batch-size"."""
    shape = partial(argparse.HelpFormatter, max_help_position=26, width=110)
    usage = f"{prog} [options]"
    parser = Parser(
        prog=prog, usage=usage, description=description, epilog=EPILOG, allow_abbrev=False, formatter_class=shape
    )

    def add(name: str, metavar: str | None = None, **how) -> None:
        if name not in without:
            parser.add_argument(f"--{name}", **({"metavar": metavar} if metavar else {}), **how)

    known = f"short names, Hub repositories, folders, .gguf files, or {', '.join(GROUPS)} [toys]"
    add("model", "NAME", nargs="+", default=["toys"], help=known)
    add("original", "TEXT", help="one pair: the prompt, with --patch and --answers")
    add("patch", "TEXT", help="its patch prompt")
    add("answers", "TEXT", nargs=2, help="the original's answer, the patch prompt's answer")
    add("prompts", "FILE", type=text, help="prompt pairs of a JSON-lines file instead of the templates'")
    add("pairs", "N", type=whole, default=100, help="prompt pairs; with --prompts at most that many [100]")
    add("seed", "N", type=seed, default=0, help="of the choice of prompts, and of the resamples for intervals [0]")
    add("metric", "NAME", choices=list(relp.METRICS), default="logit_diff", help=f"of {', '.join(relp.METRICS)}")
    add("methods", "LIST", type=names, default="ap,atp,relp", help="such as ap,relp,ig,ln+ah [ap,atp,relp]")
    add("rules", "RULES", default="paper", help="RelP's: paper, none, or such as ln,identity,half,ah,epsilon=0.01")
    add("nodes", "LIST", type=names, default=NODES, help=f"such as head,neuron,z [{NODES}]")
    add("corruption", "NAME", choices=tasks.CORRUPTIONS, default="swap", help="swap both names, or s2 only [swap]")
    add("device", "DEVICE", type=device, default="auto", help="auto, cpu, cuda, cuda:1, ... [auto]")
    add("dtype", "TYPE", choices=list(DTYPES), default="float32", help=f"of {', '.join(DTYPES)} [float32]")
    add("batch-size", "N", type=batch_size, default="auto", help="prompts, or patched runs, at a time [auto]")
    add("out", "DIR", default="results", help="where the results go [results]")
    add("no-bos", action="store_true", help="put no BOS token before the prompts")
    return parser


def parse(parser: Parser, argv: list[str] | None = None) -> argparse.Namespace:
    """The options. Models are given one by one; the process has joined the others of torchrun."""
    o = parser.parse_args(argv)
    o.model = list(dict.fromkeys(name for given in o.model for name in GROUPS.get(given, [given])))
    folders = {}
    for name in o.model:
        if (other := folders.setdefault(results.slug(name), name)) != name:
            raise ValueError(f"{other} and {name} would write to one folder: give each an --out of its own")
    given = [getattr(o, name, None) is not None for name in PAIR]
    if any(given) and (not all(given) or o.prompts):
        raise ValueError("--original, --patch and --answers are given together, and without --prompts")
    results.check_writable(o.out)
    o.device = processes.join(o.device)
    return o


# ---------------------------------------------------------------------------------------------------------------------
# Readers of an option's text


def text(given: str) -> str:
    if not given:
        raise ArgumentTypeError("must not be empty")
    return given


def names(given: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(text(given).split(",")))


def number(given: str, low: int, high: int) -> int:
    try:
        value = int(given)
    except ValueError:
        raise ArgumentTypeError(f"a whole number is needed, got {given!r}") from None
    if not low <= value <= high:
        raise ArgumentTypeError(f"must be from {low} to {high}, got {given}")
    return value


def whole(given: str) -> int:
    return number(given, 1, 2**31 - 1)


def seed(given: str) -> int:
    return number(given, 0, 2**63 - 1)


def batch_size(given: str) -> int | None:
    """None for auto."""
    return None if given == "auto" else whole(given)


def thresholds(given: str) -> list[float]:
    """LOW,HIGH,COUNT as thresholds spaced evenly in their logarithm, rising."""
    try:
        low, high, count = given.split(",")
        low, high, count = float(low), float(high), int(count)
    except ValueError:
        low = 0
    if not (0 < low <= high < math.inf and 0 < count <= 1000):
        raise ArgumentTypeError(f"must be LOW,HIGH,COUNT with 0 < LOW <= HIGH and COUNT up to 1000, got {given!r}")
    return np.geomspace(low, high, count).tolist()


def device(given: str) -> torch.device:
    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(given)
        torch.zeros(1, device=found).item()  # the meta device can make a tensor, and cannot read it
    except Exception as error:  # each kind of device fails in its own way
        raise ArgumentTypeError(f"{given!r} cannot be used here: {models.first_line(error)}") from None
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What the options ask for


def load_model(name: str, o: argparse.Namespace) -> models.Transformer:
    """The model. ValueError if it does not have the nodes that are asked for."""
    shard = getattr(o, "shard", False)
    try:
        model = models.from_pretrained(name, DTYPES[o.dtype], "cpu" if shard else o.device)
    except ValueError as error:
        raise ValueError(f"{name:.80}: {error}") from None  # it may be one of several
    if shard:
        processes.shard_weights(model, o.device)
    processes.choose_threads(model.config.d_model)
    known = [node for node in [*model.nodes, *relp.PARTS_OF] if relp.node_of(node) in model.nodes]
    for node in getattr(o, "nodes", None) or []:
        if node not in known:
            raise ValueError(f"{name} has no node {node!r}: choose from {', '.join(known)}")
    return model


def load(name: str, o: argparse.Namespace) -> tuple[models.Transformer, list[tasks.Pair]]:
    """The model, and its IOI pairs or those of --prompts; says so."""
    model = load_model(name, o)
    if getattr(o, "original", None):
        pairs = [prompts.pair_of(load_tokenizer(name), o.original, o.patch, *o.answers, not o.no_bos)]
    else:
        pairs = prompt_pairs(name, model, o, o.pairs, o.prompts)
    c, s = model.config, "s" * (len(pairs) > 1)
    say(f"\n{name}: {c.n_layers} layers, {len(pairs)} prompt pair{s}, {o.dtype} on {o.device}")
    return model, pairs


def prompt_pairs(
    name: str, model: models.Transformer, o: argparse.Namespace, n: int, file: str | None
) -> list[tasks.Pair]:
    """The first n pairs of a file, or n of the IOI templates. A file of token ids needs no tokenizer."""
    try:
        tokenizer = load_tokenizer(name)
    except NoTokenizer:
        if not file:
            raise
        tokenizer = None
    if file:
        return prompts.read_pairs(file, tokenizer, not o.no_bos, model.config.n_vocab)[:n]
    return tasks.ioi(tokenizer, n, o.seed, o.corruption, not o.no_bos)


# ---------------------------------------------------------------------------------------------------------------------


def run(main: Callable, argv: list[str] | None = None) -> int:
    """main(argv) as a command: its exit code. What the user can mend is one line on stderr."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no word of the Hub's retries; a failure is our error
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:  # libraries warn of what ends in our own error, or in nothing
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):  # what the terminal has no letters for is written as \u....
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    processes.own = True
    try:
        main(argv)
    except KeyboardInterrupt:
        return complain("stopped; finished AP is kept under --out: the same command goes on from there", 130)
    except Exception as error:
        if out_of_memory(error):
            return complain(OUT_OF_MEMORY)
        if not isinstance(error, (ValueError, OSError)):
            raise
        return complain(models.first_line(error))
    processes.leave()
    return 0


def complain(message: str, code: int = 2) -> int:
    command = Path(sys.argv[0])
    name = f"beyond.{command.parent.name}" if command.name == "__main__.py" else command.name
    print(f"{name}: error: {message}", file=sys.stderr)
    return code
