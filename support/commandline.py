"""What the project's commands share: what they do with their options, and how they end.

beyond/grid.py is an example of a command. The options are in options.py.

parse(parser, argv)                         the options: models one by one, the device joined with other processes
load(name, o)                               the model, and the prompt pairs that the options ask for
run(main)                                   the exit code: 0; 2 and one line for what the user can mend; 130 for Ctrl-C

What the user can mend is raised as a ValueError of one line, anywhere. Every other exception is a bug of ours and ends
in Python's own traceback, with exit code 1.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import models
import relp
import support.experts  # noqa: F401 (newer families)
import support.gguf  # noqa: F401 (GGUF files)
import tasks
from support import processes, prompts, results
from support.options import GROUPS, PAIR, Parser
from support.processes import say
from support.scoring import OUT_OF_MEMORY, out_of_memory
from support.tokenizer import NoTokenizer, load_tokenizer


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
# What the options ask for


def load_model(name: str, o: argparse.Namespace) -> models.Transformer:
    """The model. ValueError if it does not have the nodes that are asked for."""
    shard = getattr(o, "shard", False)
    try:
        model = models.from_pretrained(name, getattr(torch, o.dtype), "cpu" if shard else o.device)
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
