"""The options that the commands share, and those of evaluate.py.

Nothing slow is imported here, so that `python evaluate.py --help` answers at once: what reads an option's text imports
torch itself if it needs it. An option's default is text as in the command line, or already a value.

common_parser(prog, description, without)   the common options, without those that have no meaning for this command
evaluate_parser()                           these and those of evaluate.py
"""

import argparse
import math
from argparse import ArgumentTypeError
from collections.abc import Collection
from functools import partial

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
OFFLINE = (
    "Models that need no network: toy-gpt2, toy-neox, toy-qwen2, toy-gemma2, toy-qwen3; a real one, smollm2-135m-q4."
)
METHODS = (
    " Methods: ap patches each node; atp has the gradient, relp the paper's rules, ig mean gradients; best is .6 relp "
    "+ .4 twopoint; twopoint, gim, attnlrp, cp-lrp, atp*, eap-ig-5: see beyond/README.md; ln+ah has just these rules."
)
DTYPES = ("float32", "float64", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse itself would print the usage as well, and exit
        raise ValueError(message)


def common_parser(prog: str, description: str, without: Collection[str] = ()) -> Parser:
    """A parser of the common options, but for those named in `without`, such as "batch-size"."""
    formatter = partial(argparse.HelpFormatter, max_help_position=26, width=110)
    texts = {"description": description, "epilog": OFFLINE + ("" if "methods" in without else METHODS)}
    parser = Parser(prog, f"{prog} [options]", **texts, allow_abbrev=False, formatter_class=formatter)

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
    add(
        "metric", "NAME", type=metric, default="logit_diff", help="logit_diff, prob_diff, logprob_diff, kl [logit_diff]"
    )
    add("methods", "LIST", type=names, default="ap,atp,relp", help="such as ap,relp,ig,ln+ah [ap,atp,relp]")
    add("rules", "RULES", default="paper", help="RelP's: paper, none, or such as ln,identity,half,ah,epsilon=0.01")
    add("nodes", "LIST", type=names, default=NODES, help=f"such as head,neuron,z [{NODES}]")
    add("corruption", "NAME", type=corruption, default="swap", help="swap both names, or s2 only [swap]")
    add("device", "DEVICE", type=device, default="auto", help="auto, cpu, cuda, cuda:1, ... [auto]")
    add("dtype", "TYPE", choices=DTYPES, default="float32", help=f"of {', '.join(DTYPES)} [float32]")
    add("batch-size", "N", type=batch_size, default="auto", help="prompts, or patched runs, at a time [auto]")
    add("out", "DIR", default="results", help="where the results go [results]")
    add("no-bos", action="store_true", help="put no BOS token before the prompts")
    return parser


def evaluate_parser() -> Parser:
    """The parser of evaluate.py."""
    parser = common_parser("python evaluate.py", "Compare AtP and RelP with activation patching (AP).")
    parser.epilog += " --task sva has toy-neox and 300 pairs by default."
    add = parser.add_argument
    add("--task", choices=["ioi", "sva"], default="ioi", help="ioi: indirect objects; sva: circuits of features [ioi]")
    add("--steps", type=whole, default=10, metavar="N", help="of Integrated Gradients [10]")
    add("--no-plot", action="store_true", help="draw nothing")
    add("--shard", action="store_true", help="ioi: under torchrun, share the weights out as well")
    add("--structures", type=names, metavar="LIST", help="sva: of simple,within_rc,across_rc,across_pp")
    add("--held-out", type=whole, metavar="N", help="sva: prompt pairs to judge circuits by [100]")
    add("--saes", metavar="SOURCE", help="sva: sparse autoencoders, a directory, zip or Hub repository")
    add("--thresholds", type=thresholds, metavar="LOW,HIGH,COUNT", help="sva: T_N, shares of the effect [1e-4,1,15]")
    add("--top", type=whole, metavar="K", help="sva: how many of the strongest units are listed [10]")
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Readers of an option's text


def text(given: str) -> str:
    if not given:
        raise ArgumentTypeError("must not be empty")
    return given


def names(given: str) -> list[str]:
    """Names separated by commas, each once."""
    return list(dict.fromkeys(text(given).split(",")))


def metric(given: str) -> str:
    import relp

    return one_of(relp.METRICS, given)


def corruption(given: str) -> str:
    import tasks

    return one_of(tasks.CORRUPTIONS, given)


def one_of(known: Collection[str], given: str) -> str:
    if given not in known:
        raise ArgumentTypeError(f"{given!r} is unknown: choose from {', '.join(known)}")
    return given


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
    return [low * (high / low) ** (i / max(1, count - 1)) for i in range(count)]


def device(given: str):
    import torch

    from models import first_line

    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(given)
        torch.zeros(1, device=found).item()  # the meta device can make a tensor, and cannot read it
    except Exception as error:  # each kind of device fails in its own way
        raise ArgumentTypeError(f"{given!r} cannot be used here: {first_line(error)}") from None
    return found
