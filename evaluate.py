"""How well do AtP and RelP predict activation patching? The paper's Table 5, Figure 1 and Figure 2 from one command.

python evaluate.py                     the four toy models that come with the project, no download
python evaluate.py --model gpt2        the real GPT-2 small, from the Hugging Face Hub
python evaluate.py --task sva          circuits of SAE features (Section 5.2, Figure 3) on the toy GPT-NeoX model
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import models
import relp
import tasks

TOYS = ["toy-gpt2", "toy-neox", "toy-qwen2", "toy-gemma2"]
NODES = ["resid_pre", "attn_out", "mlp_out"]  # residual stream, attention outputs and MLP outputs of Table 5
PATCHABLE = [*models.SequentialBlock.nodes, *relp.PARTS_OF]
MEASURES = {  # of relp.agreement, shown below the table; all are in summary.json
    "spearman": "rank correlation",
    "sign": "right sign",
    "recall": "AP's top 10",
    "slope": "slope",
    "false_negative": "worst miss",
}
LABELS = {"ap": "AP", "atp": "AtP", "atp*": "AtP*", "relp": "RelP", "twopoint": "two-point", "ig": "IG"}
SAES = {  # of a model, where none are named
    "toy-neox": str(Path(__file__).parent / "toy" / "saes" / "neox"),
    "pythia-70m-deduped": "saprmarks/pythia-70m-deduped-saes",
    "EleutherAI/pythia-70m-deduped": "saprmarks/pythia-70m-deduped-saes",
}
COLORS = {
    "ap": "#222222",
    "atp": "#9aa0a6",
    "atp*": "#5f6368",
    "relp": "#1f6fb4",
    "twopoint": "#2a9d5c",
    "ig": "#e08a1e",
}
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

TABLE_5 = {  # paper, Appendix B: PCC with AP of AtP and RelP, on 100 IOI prompts
    "gpt2": {"resid_pre": (0.753, 0.968), "attn_out": (0.979, 0.962), "mlp_out": (0.195, 0.992)},
    "gpt2-medium": {"resid_pre": (0.671, 0.884), "attn_out": (0.961, 0.982), "mlp_out": (0.551, 0.993)},
    "gpt2-large": {"resid_pre": (0.740, 0.853), "attn_out": (0.461, 0.965), "mlp_out": (0.006, 0.956)},
    "pythia-70m": {"resid_pre": (0.728, 0.898), "attn_out": (0.981, 0.986), "mlp_out": (0.507, 0.967)},
    "pythia-410m": {"resid_pre": (0.695, 0.874), "attn_out": (0.879, 0.903), "mlp_out": (0.501, 0.948)},
    "qwen2-0.5b": {"resid_pre": (0.684, 0.922), "attn_out": (0.933, 0.965), "mlp_out": (0.717, 0.981)},
    "qwen2-7b": {"resid_pre": (0.230, 0.549), "attn_out": (0.395, 0.569), "mlp_out": (0.471, 0.622)},
    "gemma2-2b": {"resid_pre": (0.391, 0.769), "attn_out": (0.942, 0.956), "mlp_out": (0.910, 0.952)},
}


# ---------------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, like every other error here
        raise ValueError(message)


# name, what it takes (None: it is a switch), help, default ({task: default} where a task has its own, or none)
OPTIONS = [
    ("task", "ioi|sva", "indirect objects (Table 5), or circuits of subject-verb agreement (Figure 3)", "ioi"),
    ("model", "NAME", "short names, Hub repositories, directories; toys: the four shipped; paper: Table 5's", {"ioi": ["toys"], "sva": ["toy-neox"]}),
    ("prompts", "FILE", "prompt pairs from a JSON-lines file instead of the templates", None),
    ("n", "N", "prompt pairs (with --prompts: at most that many)", {"ioi": 100, "sva": 300}),
    ("seed", "N", "of the choice of prompts", 0),
    ("corruption", "swap|s2", "exchange both names, or the second mention alone", {"ioi": "swap"}),
    ("metric", "|".join(relp.METRICS), "what is patched for", "logit_diff"),
    ("nodes", "LIST", f"of {','.join(PATCHABLE)}", {"ioi": ",".join(NODES), "sva": "auto"}),
    ("methods", "LIST", "of ap,atp,atp*,relp,twopoint,ig and sets of rules, such as ln+ah", {"ioi": "ap,atp,relp", "sva": "auto"}),
    ("steps", "N", "of Integrated Gradients", 10),
    ("rules", "RULES", "paper, none, or of ln,identity,half,ah,epsilon=X,gamma=X,temperature=X; two-point: ln2,identity2,half2,attention2", "paper"),
    ("grid", None, "every subset of the rules, and how well each predicts AP", {"ioi": False}),
    ("verify", "K", "AP of the K nodes alone that a method ranks highest; heads and neurons among them", {"ioi": None}),
    ("structures", "LIST", f"of {','.join(tasks.SVA_STRUCTURES)}", {"sva": ",".join(tasks.SVA_STRUCTURES)}),
    ("held-out", "N", "prompt pairs to judge circuits by", {"sva": 100}),
    ("saes", "SOURCE", "sparse autoencoders: a directory, zip or Hub repository", {"sva": "auto"}),
    ("thresholds", "LOW,HIGH,COUNT", "T_N, as shares of the total effect", {"sva": "1e-4,1,15"}),
    ("means", "held-out|discovery", "the patch prompts whose means units are ablated to", {"sva": "held-out"}),
    ("sum-positions", None, "score a unit over all positions together", {"sva": False}),
    ("top", "K", "how many of the strongest units to list", {"sva": 10}),
    ("device", "DEVICE", "auto, cpu, cuda, cuda:1, ...", "auto"),
    ("dtype", "|".join(DTYPES), "of weights and activations", "float32"),
    ("batch-size", "SIZE", "prompts, or patched runs, that go through the model together", "auto"),
    ("shard", None, "under torchrun: share the weights out over the processes as well", {"ioi": False}),
    ("out", "DIR", "where the results go", "results"),
    ("no-bos", None, "put no BOS token in front of the prompts", False),
    ("audit", None, "print which rule was applied to which modules; summary.json has it always", False),
    ("no-plot", None, "draw nothing", False),
]  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(
        prog="evaluate.py",
        usage="python evaluate.py [options]",
        description="Compare AtP and RelP with activation patching: print the tables, draw the figures, save the numbers.",
        epilog="example: python evaluate.py --model gpt2 pythia-70m --n 50 --corruption s2 --rules ln,identity,epsilon=1e-4",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    for name, takes, text, default in OPTIONS:
        of_task = default if isinstance(default, dict) else {"": default}
        shown = [(task, " ".join(value) if isinstance(value, list) else value) for task, value in of_task.items()]
        shown = [(task, value) for task, value in shown if value is not None and value is not False]
        shown = [f"{task}: {value}" if len(of_task) > 1 else str(value) for task, value in shown]
        if "" not in of_task and len(of_task) == 1:
            text = f"{next(iter(of_task))} only; {text}"
        kind = {"metavar": takes, "type": int if takes in ("N", "K") else str} if takes else {"action": "store_true"}
        kind |= {"nargs": "+"} if name == "model" else {}
        p.add_argument(f"--{name}", default=None, help=text + (f" [{'; '.join(shown)}]" if shown else ""), **kind)
    args = p.parse_args(argv)
    args.task = choices("task", args.task or "ioi", ("ioi", "sva"), single=True)[0]
    for option in ("structures", "corruption"):
        if args.prompts and getattr(args, option) is not None:
            raise ValueError(f"--{option} is one of the templates': it has no meaning with --prompts")
    if args.verify and args.nodes is None:
        args.nodes = ",".join([*NODES, "head", "neuron"])
    for name, _, _, default in OPTIONS:
        key = name.replace("-", "_")
        if isinstance(default, dict):
            if args.task not in default and getattr(args, key) is not None:
                raise ValueError(f"--{name} has no meaning with --task {args.task}")
            default = default.get(args.task)
        if getattr(args, key) is None:
            setattr(args, key, default)
    several = {"toys": TOYS, "paper": list(TABLE_5)}
    args.model = [name for given in args.model for name in several.get(given, [given])]
    args.model, taken = list(dict.fromkeys(args.model)), {}
    for name in args.model:
        if taken.setdefault(slug(name), name) != name:
            raise ValueError(
                f"{taken[slug(name)]} and {name} would write to one folder, {slug(name)}: give them different names, or run them apart"
            )
    args.nodes = None if args.nodes == "auto" else choices("node", args.nodes, PATCHABLE)
    if args.methods == "auto":  # AP of every feature is for small models
        args.methods = "ap,atp,relp,ig" if set(args.model) <= set(TOYS) else "atp,relp,ig"
    args.methods = list(dict.fromkeys(args.methods.split(",")))
    for method in args.methods:
        try:
            method in LABELS or parse_rules(method.replace("+", ","))
        except ValueError:
            raise ValueError(
                f"unknown method {method!r}: choose from {', '.join(LABELS)}, or rules joined by +, such as ln+ah"
            ) from None
    args.rules = parse_rules(args.rules)
    choices("metric", args.metric, relp.METRICS, single=True)
    choices("dtype", args.dtype, DTYPES, single=True)
    if args.task == "sva" and "atp*" in args.methods:
        raise ValueError("AtP*'s fix is one of q and k: it has no meaning with --task sva")
    if args.verify:
        args.methods = [method for method in args.methods if method != "ap"]
        if not args.methods:
            raise ValueError("--verify needs a method to rank the nodes by, such as --methods relp")
    if args.grid:
        args.methods = list(dict.fromkeys(["ap", "atp", "relp", *args.methods]))
    if args.grid and args.verify:
        raise ValueError("--grid needs AP of all nodes, --verify spares it: choose one")
    if args.task == "ioi":
        choices("corruption", args.corruption, tasks.CORRUPTIONS, single=True)
    else:
        args.structures = choices("structure", args.structures, tasks.SVA_STRUCTURES)
        choices("choice of means", args.means, ("held-out", "discovery"), single=True)
        args.thresholds = parse_thresholds(args.thresholds)
    for name, _, _, default in OPTIONS:
        value = getattr(args, name.replace("-", "_"))
        if type(value) is int and name != "seed" and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if args.batch_size != "auto" and not re.fullmatch("[1-9][0-9]*", args.batch_size):
        raise ValueError(f"--batch-size must be auto or a positive whole number, got {args.batch_size!r}")
    args.device = join(parse_device(args.device))
    if args.task == "sva" and world() > 1:
        raise ValueError("--task sva runs in one process")
    if args.shard and world() == 1:
        raise ValueError("--shard needs several processes: torchrun --nproc-per-node=N evaluate.py --shard ...")
    return args


def choices(what: str, given: str, allowed, single: bool = False) -> list[str]:
    names = [given] if single else list(dict.fromkeys(given.split(",")))
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"unknown {what} {unknown[0]!r}: choose from {', '.join(allowed)}")
    return names


def parse_rules(text: str) -> bool | models.Rules:
    """True for 'paper', Rules() for 'none', else the rules that are named."""
    if text in ("paper", "none"):
        return True if text == "paper" else models.Rules()
    fields = {}
    for item in text.split(","):
        name, given, value = item.partition("=")
        if name in ("ln", "identity", "half", "ah") and not given:
            fields[name] = True
        elif name.removesuffix("2") in models.ROWS and name.endswith("2") and not given:
            fields["two_point"] = (*fields.get("two_point", ()), name.removesuffix("2"))
        elif name in ("epsilon", "gamma", "temperature"):
            try:
                fields[name] = float(value)
            except ValueError:
                raise ValueError(f"rule {name} needs a number, as in {name}=0.01, got {item!r}") from None
            if not 0 < fields[name] < math.inf:
                raise ValueError(f"rule {name} needs a positive number, got {item!r}")
        else:
            raise ValueError(
                f"unknown rule {item!r}: choose paper, none, or from ln, identity, half, ah, epsilon=X, gamma=X, temperature=X, "
                + ", ".join(f"{row}2" for row in models.ROWS)
            )
    if "epsilon" in fields and "gamma" in fields:
        raise ValueError("epsilon and gamma are both rules for linear layers: choose one")
    return models.Rules(**fields)


def parse_thresholds(text: str) -> list[float]:
    """LOW,HIGH,COUNT as thresholds spaced evenly in their logarithm, rising."""
    try:
        low, high, count = text.split(",")
        low, high, count = float(low), float(high), int(count)
        if not (0 < low <= high < math.inf and count > 0):
            raise ValueError
    except ValueError:
        raise ValueError(f"--thresholds must be LOW,HIGH,COUNT with 0 < LOW <= HIGH, got {text!r}") from None
    return [float(t) for t in np.geomspace(low, high, count)]


def parse_device(text: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text)
        torch.zeros(1, device=device).item()  # the meta device can do the first, not the second
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {text!r} cannot be used here: {models.first_line(error)}") from None
    return device


# ---------------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc-per-node=N evaluate.py ...


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def join(device: torch.device) -> torch.device:
    """Join the other processes where torchrun has started this one. Returns the device of this process."""
    if "LOCAL_RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def share(rows: list[int]) -> list[int]:
    """This process's part of a batch; the same number for all, since processes that share weights must make the same calls."""
    size = -(-len(rows) // world())
    mine = rows[rank() :: world()] or rows[:1]
    return mine + mine[-1:] * (size - len(mine))


def gathered(mine) -> list:
    """What every process has, in all of them."""
    everybody = [mine] * world()
    if world() > 1:
        try:
            dist.all_gather_object(everybody, mine)
        except RuntimeError:
            raise ValueError("another process has stopped") from None
    return everybody


# ---------------------------------------------------------------------------------------------------------
# One model: prompts, scores, correlations


def evaluate(name: str, args: argparse.Namespace) -> dict:
    """Run the methods on one model, print its table, write its files. Returns what went into summary.json."""
    began = time.perf_counter()
    model = models.from_pretrained(name, DTYPES[args.dtype], args.device, args.shard)
    there = [node for node in PATCHABLE if relp.PARTS_OF.get(node, node) in model.nodes]
    if absent := [node for node in args.nodes if node not in there]:
        raise ValueError(f"{name} has no node {absent[0]!r}: choose from {', '.join(there)}")
    pairs = prompt_pairs(name, model, args)
    say(
        f"\n{name}: {model.config.n_layers} layers, {len(pairs)} prompt pairs, {args.dtype} on {args.device}, ready after {time.perf_counter() - began:.1f} s"
    )
    folder = Path(args.out) / f"{slug(name)}-{slug(Path(args.prompts).stem) if args.prompts else args.task}"
    folder.mkdir(parents=True, exist_ok=True)
    audited, conserved = audit(model, pairs, args)
    scores, differs, values, seconds = score(name, model, pairs, args, folder, args.methods)
    groups = [p.group for p in pairs]
    pcc, differences = correlations(scores, differs, groups, args)
    counts = torch.cat([torch.ones(1, len(pairs)), relp.resamples(groups, seed=args.seed)])
    mean = lambda x: estimate((counts @ torch.tensor(x).double()) / len(pairs))
    summary = {
        "model": name,
        "prompt_pairs": len(pairs),
        "accuracy": {"original": mean(values[:, 0] > 0), "patch": mean(values[:, 1] < 0)},
        args.metric: {"original": mean(values[:, 0]), "patch": mean(values[:, 1])},
        "cells": {
            node: {"all": int((~np.isnan(differs[node])).sum()), "unchanged": int((differs[node] == 0).sum())}
            for node in args.nodes
        },
        "pcc": pcc,
        "differences": differences,
        "rules": {rule: on for rule, on in dataclasses.asdict(model.rules(args.rules)).items() if rule != "tape"},
        "audit": audited,
        "conservation": conserved,
        "seconds": seconds,
        **circumstances(args),
    }
    if rank() == 0:
        arrays = {f"{method}_{node}": value for (method, node), value in scores.items()}
        save(
            folder / "scores.npz",
            lambda file: np.savez_compressed(file, **arrays, values=values, **prompt_arrays(pairs)),
        )
        save(folder / "summary.json", lambda file: file.write(json.dumps(without_nan(summary), indent=1).encode()))
        if not args.no_plot:
            save(folder / "heatmaps.png", lambda file: draw_heatmaps(file, name, scores, pairs, args))
            if conserved:
                save(folder / "conservation.png", lambda file: draw_conservation(file, name, conserved))
        print_table(name, summary, args)
        print_audit(audited, args.audit)
    if args.grid:
        grid(name, model, pairs, scores, args, folder)
    if args.verify:
        verify(name, model, pairs, scores, args, folder)
    if rank() == 0:
        print(f"  written to {folder}/")
    for file in folder.glob(f"unfinished-{rank()}-*.npz"):
        file.unlink()
    return summary


def circumstances(args: argparse.Namespace) -> dict:
    plain = lambda value: str(value) if isinstance(value, (torch.device, models.Rules)) else value
    return {
        "arguments": {key: plain(value) for key, value in vars(args).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def in_order(methods: list[str]) -> list[str]:
    """As LABELS has them, sets of rules last."""
    return sorted(methods, key=lambda method: [*LABELS, method].index(method))


def label_of(method: str) -> str:
    return LABELS.get(method, method)


def method_options(method: str, model, args: argparse.Namespace) -> dict:
    """What relp's functions are told so that they follow this method."""
    two_point = models.TWO_POINT[model.config.family]
    known = {
        "atp": {},
        "atp*": {},
        "relp": {"lrp": args.rules},
        "twopoint": {"lrp": two_point},
        "ig": {"steps": args.steps},
    }
    return known[method] if method in known else {"lrp": parse_rules(method.replace("+", ","))}


def audit(model, pairs: list[tasks.Pair], args: argparse.Namespace) -> tuple[dict, dict | None]:
    """models.audit's report for each method that has rules, and relp.conservation's of RelP, on up to four prompts of one length."""
    original, patch, answers = tensors([pairs[i] for i in next(batches(pairs, 4))], args.device)
    rules = {method: method_options(method, model, args).get("lrp") for method in args.methods if method != "ap"}
    reports = {method: models.audit(model, original, lrp, patch) for method, lrp in rules.items() if lrp is not None}
    if "relp" not in reports or model.rules(rules["relp"]).two_point:
        return reports, None
    return reports, relp.conservation(model, original, answers, relp.METRICS[args.metric], rules["relp"])


def prompt_pairs(name: str, model, args: argparse.Namespace) -> list[tasks.Pair]:
    try:
        tokenizer = models.load_tokenizer(name)
    except models.MissingFile:  # prompts of token ids need none
        if not args.prompts:
            raise
        tokenizer = None
    if args.prompts:
        pairs = tasks.read_pairs(args.prompts, tokenizer, not args.no_bos, model.config.n_vocab)[: args.n]
    else:
        pairs = tasks.ioi(tokenizer, args.n, args.seed, args.corruption, not args.no_bos)
    return pairs


def score(
    name: str, model, pairs: list[tasks.Pair], args: argparse.Namespace, folder: Path, methods: list[str], cells=None
) -> tuple[dict, dict, np.ndarray, dict]:
    """The methods on every pair, batch by batch; each process takes its share of a batch.

    Returns {(method, node): [n, layers, positions, ...]} with NaN beyond a prompt's length, {node: the same, 1 where the
    two runs differ and 0 elsewhere}, the metric of both runs [n, 2], and {method: seconds}. cells, {node: bool [n, layers,
    positions, ...]}: those that AP patches, 0 elsewhere; without it all.
    """
    metric, longest = relp.METRICS[args.metric], max(len(p.original) for p in pairs)
    prompts, runs = batch_sizes(args.batch_size, model.config, longest, args.device)
    parts, begun, seconds = [], [], dict.fromkeys(methods, 0.0)
    earlier = earlier_ap(folder, pairs, args) if args.grid and "ap" in methods else lambda *_: None
    off = None if rank() == 0 else True
    with tqdm(total=len(pairs), desc=name, leave=False, disable=off, delay=2, bar_format=BAR) as bar:
        for rows in batches(pairs, prompts * world()):
            mine, done = share(rows), bar.n
            batch = tensors([pairs[i] for i in mine], args.device)
            *values, differs = relp.compare(model, *batch, args.nodes, metric)
            values = torch.stack(values, dim=1)
            results = {("differs", node): where.float() for node, where in differs.items()}
            for method in methods:
                bar.set_description(f"{name} {label_of(method)}")
                began = time.perf_counter()
                if method == "atp*":
                    scores = relp.attribute_star(model, *batch, args.nodes, metric)
                elif method != "ap":
                    scores = relp.attribute(model, *batch, args.nodes, metric, **method_options(method, model, args))
                elif not (scores := earlier(mine, values.cpu().numpy(), batch[0].shape[1])):
                    how = {"rows": runs, "lockstep": args.shard}
                    how["progress"] = lambda part: bar.update(done + part * len(rows) - bar.n)
                    if cells is None:
                        pieces = how["pieces"] = Pieces.of(folder, begun, batch, values, args, runs)
                        begun.append(pieces.path)
                        seconds["ap"] += pieces.seconds_before
                    else:
                        chosen = lambda of_node: torch.from_numpy(of_node[mine][:, :, : batch[0].shape[1]]).to(
                            args.device
                        )
                        how["cells"] = {node: chosen(of_node) for node, of_node in cells.items()}
                    scores = relp.activation_patching(model, *batch, args.nodes, metric, **how)
                results |= {(method, node): value.cpu() for node, value in scores.items()}
                seconds[method] += time.perf_counter() - began
            if not all(value.isfinite().all() for value in results.values()):
                raise ValueError(f"{name}: scores that are not finite in {args.dtype}; try --dtype float32")
            parts.append((mine, values.cpu().numpy(), {key: value.cpu().numpy() for key, value in results.items()}))
            bar.update(done + len(rows) - bar.n)

    values, scores = np.empty((len(pairs), 2), parts[0][1].dtype), {}
    for theirs, their_seconds in gathered((parts, seconds)):
        seconds = {method: max(seconds[method], their_seconds[method]) for method in seconds}
        for rows, value, results in theirs:
            values[rows] = value
            for key, result in results.items():
                shape = len(pairs), result.shape[1], longest, *result.shape[3:]
                whole = scores.setdefault(key, np.full(shape, np.nan, result.dtype))
                whole[rows, :, : result.shape[2]] = result
    differs = {node: scores.pop(("differs", node)) for node in args.nodes}
    return scores, differs, values, seconds


def earlier_ap(folder: Path, pairs: list[tasks.Pair], args: argparse.Namespace):
    """A function (rows, values, length) -> AP's scores of these pairs as an earlier run left them, or None.

    They are taken from scores.npz if that is of the same prompts and nodes, and if the metric's values, which come from
    runs through all weights, are the same to the bit.
    """
    try:
        with np.load(folder / "scores.npz") as file:
            arrays = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        arrays = {}
    same = all(np.array_equal(arrays.get(key), value) for key, value in prompt_arrays(pairs).items())

    def take(rows, values, length):
        if (
            not same
            or not np.array_equal(arrays["values"][rows], values)
            or any(f"ap_{n}" not in arrays for n in args.nodes)
        ):
            return None
        return {node: torch.from_numpy(arrays[f"ap_{node}"][rows][:, :, :length]) for node in args.nodes}

    return take


class Pieces(dict):
    """AP's finished positions of one batch, {pos: {(node, layer): effects}}, kept in a file as they come for a run that is stopped and started again."""

    @classmethod
    def of(
        cls,
        folder: Path,
        begun: list[Path],
        batch: list[torch.Tensor],
        values: torch.Tensor,
        args: argparse.Namespace,
        runs: int,
    ) -> "Pieces":
        """Those of an unfinished run of the same model on the same prompts: the same in all that its numbers depend on.

        The metric's values on the batch stand for the weights: they come from a run through all of them. begun: the
        files of this run's batches so far.
        """
        what = [x.tolist() for x in (*batch, values)] + [
            args.nodes,
            args.metric,
            args.dtype,
            str(args.device),
            runs,
            torch.__version__,
        ]
        path = folder / f"unfinished-{rank()}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.npz"
        others = [file for file in folder.glob(f"unfinished-{rank()}-*.npz") if file not in begun]
        if others and path not in others:
            say("  an unfinished run with other arguments is dropped: AP starts afresh")
            for file in others:
                file.unlink()
        pieces = cls(path, args.device)
        if args.shard:  # all processes go on from the same position
            for pos in sorted(pieces)[min(gathered(len(pieces))) :]:
                del pieces[pos]
        return pieces

    def __init__(self, path: Path, device):
        self.path, self.seconds_before, self.began = path, 0.0, time.perf_counter()
        if path.exists():
            try:
                with np.load(path) as file:
                    self.seconds_before = float(file["seconds"])
                    for key in file.keys() - {"seconds"}:
                        pos, node, layer = key.split("-")
                        self.setdefault(int(pos), {})[node, int(layer)] = torch.from_numpy(file[key]).to(device)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                self.clear()
                say("  an unfinished run was kept in a damaged file: AP starts afresh")
                return
            say(f"  AP goes on with an unfinished run: {len(self)} positions of this batch are done")

    def __setitem__(self, pos: int, effects: dict[tuple, torch.Tensor]) -> None:
        super().__setitem__(pos, effects)
        arrays = {
            f"{pos}-{node}-{layer}": value.cpu().numpy()
            for pos, effects in self.items()
            for (node, layer), value in effects.items()
        }
        save(
            self.path,
            lambda file: np.savez(file, seconds=self.seconds_before + time.perf_counter() - self.began, **arrays),
        )


def batches(pairs: list[tasks.Pair], size: int):
    """Lists of at most `size` pair numbers whose prompts have one length."""
    lengths = [len(p.original) for p in pairs]
    for length in dict.fromkeys(lengths):
        rows = [i for i, other in enumerate(lengths) if other == length]
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def batch_sizes(given: str, c: models.Config, length: int, device: torch.device) -> tuple[int, int]:
    """(prompts, patched runs) that go through the model together; auto: as many as keep a batch's graph within the memory."""
    if given != "auto":
        return int(given), int(given)
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**31
    per_token = 4 * (20 * c.d_model + 8 * c.d_mlp + 4 * c.n_heads * length)  # bytes of one layer's activations
    runs = max(1, memory // (per_token * length))
    return max(1, runs // c.n_layers), min(
        runs, max(1, (2**16 if device.type == "cuda" else 2**9) // length)
    )  # on a CPU what stays in the cache is fastest


def correlations(scores: dict, differs: dict, groups: list[str], args: argparse.Namespace) -> tuple[dict, dict]:
    """How well the methods predict AP, each number with the interval that holds 95 % of the bootstrap over prompts.

    {method: {node: {measure: value, ..., "interval": {measure: (low, high), ...}, "changed_cells": {the same without the
    cells where the two runs agree}}}}, relp.agreement's measures, and {"relp - atp": {node: {measure: (difference, low,
    high)}}} for each two methods, on the same resamples of the prompts: an interval without 0 says that they differ.
    """
    if "ap" not in args.methods:
        return {}, {}
    methods = in_order([method for method in args.methods if method != "ap"])
    weights = torch.cat(
        [torch.ones(1, len(groups)), relp.resamples(groups, seed=args.seed)]
    )  # the prompts as they are come first
    told = lambda values: {
        **{measure: float(value[0]) for measure, value in values.items()},
        "interval": {measure: relp.interval(value[1:]) for measure, value in values.items()},
    }
    result, differences = {method: {} for method in methods}, {}
    for node in args.nodes:
        ap, changed, values = torch.tensor(scores["ap", node]), torch.tensor(differs[node]) == 1, {}
        for method in methods:
            pair = torch.tensor(scores[method, node]), ap
            values[method] = relp.agreement(*pair, groups, weights=weights)
            result[method][node] = {
                **told(values[method]),
                "changed_cells": told(relp.agreement(*pair, groups, changed, weights)),
            }
        for one, other in itertools.combinations(methods, 2):
            gains = {measure: values[other][measure] - value for measure, value in values[one].items()}
            differences.setdefault(f"{other} - {one}", {})[node] = {
                measure: (float(gain[0]), *relp.interval(gain[1:])) for measure, gain in gains.items()
            }
    return result, differences


# ---------------------------------------------------------------------------------------------------------
# Rank, then verify; and the grid of rules


def main_method(methods) -> str:
    """The method that others are compared with."""
    return "relp" if "relp" in methods else next((m for m in methods if m != "ap"), "ap")


def verify(name: str, model, pairs: list[tasks.Pair], scores: dict, args: argparse.Namespace, folder: Path) -> None:
    """AP of those nodes alone whose averaged scores by the main method are the K largest, over all kinds of nodes.

    A node is a kind, a layer, a position (by its role, as in the figure) and maybe a part. Written to verified.json.
    """
    (roles, at), method = overlay(pairs), "twopoint" if "twopoint" in args.methods else main_method(args.methods)
    maps = {(m, node): laid_over(values, at) for (m, node), values in scores.items()}
    ranking = [(node, index) for node in args.nodes for index in np.ndindex(maps[method, node].shape)]
    size = np.concatenate([np.abs(maps[method, node]).ravel() for node in args.nodes])
    order = np.argsort(-size, kind="stable")
    cells = {node: np.zeros(scores[method, node].shape, bool) for node in args.nodes}
    for i in order[: args.verify]:
        node, (layer, label, *part) = ranking[i]
        rows = np.flatnonzero(at[:, label] >= 0)
        cells[node][(rows, layer, at[rows, label], *part)] = True
    exact, _, _, seconds = score(name, model, pairs, args, folder, ["ap"], cells)
    rows = []
    for i in order[: args.verify]:
        node, (layer, label, *part) = ranking[i]
        index = layer, label, *part
        of = {m: float(maps[m, node][index]) for m in args.methods}
        of["ap"] = float(laid_over(exact["ap", node], at)[index])
        rows.append(
            {"node": node, "layer": layer, "position": roles[label], "part": part[0] if part else None, "scores": of}
        )
    bound = float(size[order[args.verify]]) if args.verify < len(order) else 0.0
    found = {"ranked_by": method, "nodes": rows, "of": len(order), "bound": bound, "seconds": seconds["ap"]}
    if rank() > 0:
        return
    save(folder / "verified.json", lambda file: file.write(json.dumps(without_nan(found), indent=1).encode()))
    print(
        f"\n  the {len(rows)} nodes of {len(order)} with the largest {label_of(method)} scores; AP of these alone took {seconds['ap']:.2f} s"
    )
    print(
        f"  {'node':14}{'layer':>6}{'part':>6}  {'position':10}"
        + "".join(f"{label_of(m):>10}" for m in ("ap", *args.methods))
    )
    for row in rows:
        numbers = "".join(f"{row['scores'][m]:10.3f}" for m in ("ap", *args.methods))
        print(
            f"  {row['node']:14}{row['layer']:>6}{'' if row['part'] is None else row['part']:>6}  {row['position'].strip():10}{numbers}"
        )
    a, b = (torch.tensor([row["scores"][m] for row in rows]) for m in ("ap", method))
    print(
        f"  correlation over them {float(relp.pearson(a, b)):.3f}; largest difference {(a - b).abs().max():.3f}; "
        f"no other node has a {label_of(method)} score beyond {bound:.3f}"
    )


LINEAR = ["", "epsilon=0.01", "epsilon=0.1", "gamma=0.1", "gamma=0.5"]  # rules for linear layers; "" is the 0-rule


def grid(name: str, model, pairs: list[tasks.Pair], scores: dict, args: argparse.Namespace, folder: Path) -> None:
    """Every subset of the rules with every rule for linear layers: PCC with AP, sorted; what each rule contributes.

    The score of a set is the mean over the node kinds of the PCC of the averaged maps. Written to grid.json.
    """
    flags = ["ln", "identity", *(["half"] if model.config.gated else []), "ah"]
    subsets = [[f for i, f in enumerate(flags) if code >> i & 1] for code in range(2 ** len(flags))]
    join_up = lambda rules: "+".join(rule for rule in (*flags, *LINEAR) if rule and rule in rules) or "none"
    groups = [p.group for p in pairs]
    weights = torch.cat([torch.ones(1, len(pairs)), relp.resamples(groups, seed=args.seed)])
    table, means = {}, {}
    for label in tqdm(
        [join_up([*subset, linear]) for subset in subsets for linear in LINEAR], name, leave=False, disable=None
    ):
        values, *_ = score(name, model, pairs, args, folder, [label])
        if rank() > 0:
            continue
        pair = lambda node: (torch.tensor(values[label, node]), torch.tensor(scores["ap", node]))
        of_nodes = {node: relp.agreement(*pair(node), groups, weights=weights) for node in args.nodes}
        means[label] = torch.stack([of["averaged"] for of in of_nodes.values()]).mean(0)
        table[label] = {
            node: {what: estimate(of[what]) for what in ("averaged", "pooled", "per_prompt")} for node, of in of_nodes.items()
        } | {"mean": estimate(means[label])}  # fmt: skip
    if rank() > 0:
        return
    paper = [f for f in flags if getattr(model.rules(True), f)]
    marks = {
        join_up(paper): "the paper's",
        "ln": "LN alone: what the reference recipe computes",
        "none": "the gradient, AtP",
    }
    effects = {}
    for flag in flags:
        others = [subset for subset in subsets if flag not in subset]
        effects[flag] = {
            "alone": estimate(means[flag] - means["none"]),
            "beside the paper's others": estimate(means[join_up({*paper, flag})] - means[join_up({*paper} - {flag})]),
            "on average": estimate(
                torch.stack([means[join_up([*subset, flag])] - means[join_up(subset)] for subset in others]).mean(0)
            ),
        }
    found = {"rules": table, "effects": effects, "paper": join_up(paper)}
    save(folder / "grid.json", lambda file: file.write(json.dumps(without_nan(found), indent=1).encode()))
    print(f"\n  {'PCC with AP by rules':34}" + "".join(f"{node:>12}" for node in args.nodes) + f"{'mean':>9}")
    for label in sorted(table, key=lambda label: -table[label]["mean"][0]):
        numbers = "".join(f"{table[label][node]['averaged'][0]:12.3f}" for node in args.nodes)
        print(f"  {label:34}{numbers}{short(*table[label]['mean']):>22}  {marks.get(label, '')}".rstrip())
    print(f"\n  {'what a rule adds to the mean':34}{'alone':>22}{'to the others of the paper':>30}{'on average':>24}")
    for flag, of in effects.items():
        print(
            f"  {flag:34}" + "".join(f"{short(*of[what], sign='+'):>{width}}" for what, width in zip(of, (22, 30, 24)))
        )
    best = max(effects, key=lambda flag: effects[flag]["alone"][0])
    value = effects[best]["alone"][0]
    whole = table[join_up(paper)]["mean"][0] - table["none"]["mean"][0]
    print(f"  {best} alone makes {value:+.3f} of the {whole:+.3f} that the paper's set gains over the gradient")


# ---------------------------------------------------------------------------------------------------------
# Output: the table, the files, the figures


def print_table(name: str, summary: dict, args: argparse.Namespace) -> None:
    accuracy, mean = ([summary[what][run][0] for run in ("original", "patch")] for what in ("accuracy", args.metric))
    print(
        f"  right on {accuracy[0]:.0%} of the original and {accuracy[1]:.0%} of the patch prompts; "
        f"mean {args.metric} {mean[0]:+.3f} and {mean[1]:+.3f}"
    )
    if min(accuracy) < 0.75:
        print("  WARNING: this model does not do the task, so there is no behaviour here for the methods to explain")
    width = max(23, 8 * len(summary["pcc"]) + 1)
    row = lambda label, cells, end="": print((f"  {label:18}" + "".join(f"{c:{width}}" for c in cells) + end).rstrip())
    row("PCC with AP" if summary["pcc"] else "", [f" {node}" for node in args.nodes], f"{'seconds':>8}")
    for method in args.methods:
        cells = [""] * len(args.nodes)
        if method in summary["pcc"]:
            cells = [short(of["averaged"], *of["interval"]["averaged"]) for of in summary["pcc"][method].values()]
        row(label_of(method), cells, f"{summary['seconds'][method]:8.2f}")
    for pair, of_nodes in summary["differences"].items():
        if "relp" in pair.split(" - ") or "relp" not in args.methods:
            label = " - ".join(label_of(method) for method in pair.split(" - "))
            row(label, [short(*of["averaged"], sign="+") for of in of_nodes.values()])
    if name in TABLE_5 and not args.prompts:
        for i, label in enumerate(("AtP, paper", "RelP, paper")):
            row(label, [short(TABLE_5[name][node][i]) if node in TABLE_5[name] else "" for node in args.nodes])
    if summary["pcc"]:
        print(f"  further, {' / '.join(label_of(m) for m in summary['pcc'])}:")
        for measure, label in MEASURES.items():
            each = [[short(of[node][measure]).strip() for of in summary["pcc"].values()] for node in args.nodes]
            row(label, [f" {' / '.join(values)}" for values in each])


def print_audit(reports: dict, whole: bool) -> None:
    """Per method, a line for every rule and module kind; if not whole, those alone that say of a rule that it has nothing to do."""
    for method, report in reports.items():
        if whole:
            print(f"  audit of {label_of(method)} (without a rule: {', '.join(report['no rule']) or 'nothing'})")
        for rule, of in report["rules"].items():
            label = rule if isinstance(of["requested"], bool) else f"{rule}={of['requested']:g}"
            if not of["applied"]:
                print(f"    {label:20}is not applicable: {label_of(method)} meets no gate here")
            for what, end in (("applied", ""), ("unseen", "   by less than rounding")) if whole else ():
                for kind, calls in of.get(what, {}).items():
                    print(f"    {label:20}{kind:12}{calls:4}{end}")


def short(value: float, *interval: float, sign: str = " ") -> str:
    """A number and its interval, as in " .932 [.921 .945]"; with sign "+", as in "+.088 [+.077 +.108]"."""
    text = lambda x, sign: re.sub(r"\b0\.", ".", f"{x:{sign}.3f}")
    known = interval and all(map(math.isfinite, interval))  # a single prompt has none
    return text(value, sign) + (f" [{' '.join(text(x, sign.strip()) for x in interval)}]" if known else "")


def save(path: Path, write) -> None:
    """write(file) into a new file that then takes the place of `path`: a reader finds the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def slug(name: str) -> str:
    """A model's name, repository or directory as the name of a folder."""
    path = Path(name)
    return re.sub(r"[^\w.-]+", "-", path.resolve().name if path.is_dir() else name)


def without_nan(value):
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prompt_arrays(pairs: list[tasks.Pair]) -> dict[str, np.ndarray]:
    """The prompts in the order of the scores; token ids padded with -1."""
    lengths = np.array([len(p.original) for p in pairs])
    pad = lambda rows: np.array([list(row) + [-1] * (lengths.max() - len(row)) for row in rows])
    return {
        "lengths": lengths,
        "original_tokens": pad([p.original for p in pairs]),
        "patch_tokens": pad([p.patch for p in pairs]),
        "answers": np.array([p.answers for p in pairs]),
    }


def overlay(pairs: list[tasks.Pair]) -> tuple[list[str], np.ndarray]:
    """Labels of the figure's positions, and each pair's positions there [n, labels], -1 where it has none.

    Pairs whose roles all occur, in order, in the longest prompt's are laid over each other by role (the IOI templates);
    otherwise the longest prompts alone are shown, a position labelled with its token where that is the same in all.
    """
    axis = list(max((p.roles for p in pairs), key=len))
    at = -np.ones((len(pairs), len(axis)), int)
    for i, pair in enumerate(pairs):
        rest = iter(range(len(axis)))
        found = [next((j for j in rest if axis[j] == role), None) for role in pair.roles]
        if None not in found:
            at[i, found] = range(len(found))
        elif len(pair.roles) == len(axis):
            at[i] = range(len(axis))
    return [
        role if all(p.roles[k] == role for p, k in zip(pairs, at[:, j]) if k >= 0) else str(j)
        for j, role in enumerate(axis)
    ], at


def laid_over(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The mean over the pairs of scores [n, layers, positions, ...] at the figure's positions: [layers, labels, ...]."""
    placed = values[np.arange(len(at))[:, None], :, np.maximum(at, 0)]  # [n, labels, layers, ...]
    placed[at < 0] = np.nan
    return np.nanmean(placed, axis=0).swapaxes(0, 1)


def draw_heatmaps(file, name: str, scores: dict, pairs: list[tasks.Pair], args: argparse.Namespace) -> None:
    """The paper's Figure 2: mean scores over layer and position; a row per method, a column per node kind.

    Heads are shown by layer and head, the sum over positions; neurons by layer and position, the sum over neurons.
    """
    from matplotlib.figure import Figure

    labels, at = overlay(pairs)
    order = in_order(args.methods)
    kinds, n_layers = {}, next(iter(scores.values())).shape[1]
    for node in args.nodes:
        maps = [laid_over(scores[method, node], at) for method in order]
        ticks, what = labels, "position"
        if node.startswith("head"):
            maps = [values.sum(1) for values in maps]
            ticks, what = range(maps[0].shape[1]), "head, all positions"
        elif node in relp.PARTS_OF:
            maps, what = [values.sum(-1) for values in maps], "position, all neurons"
        kinds[node] = maps, ticks, what
    widths = [1.2 + 0.22 * len(ticks) for _, ticks, _ in kinds.values()]
    figure = Figure(figsize=(1.2 + sum(widths), 1.2 + len(order) * (0.7 + 0.16 * n_layers)), layout="constrained")
    axes = figure.subplots(len(order), len(kinds), squeeze=False, sharex="col", sharey=True, width_ratios=widths)
    for column, (node, (maps, ticks, what)) in zip(axes.T, kinds.items()):
        top = np.abs(maps[0] if order[0] == "ap" else maps).max() or 1.0  # AP sets the scale: what exceeds it is wrong
        for ax, method, values in zip(column, order, maps):
            image = ax.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", origin="lower")
            ax.set_title(f"{label_of(method)}, {node}", fontsize=9)
            ax.set_xticks(range(len(ticks)), ticks, rotation=90 if ticks is labels else 0, fontsize=7)
            ax.yaxis.get_major_locator().set_params(integer=True)
        column[-1].set_xlabel(what)
        figure.colorbar(image, ax=column, extend="both", shrink=0.8)
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    shown = int((at[:, 0] >= 0).sum())
    figure.suptitle(
        f"{name}: change of {args.metric} when a node is patched, mean over {shown} of {len(pairs)} prompt pairs",
        fontsize=10,
    )
    figure.savefig(file, format="png", dpi=130)


def draw_conservation(file, name: str, report: dict) -> None:
    """A bar per layer that adds up to the metric: what the stream there keeps of it, and what was lost on the way, to what."""
    from matplotlib.figure import Figure

    lost = {kind: np.cumsum(losses[::-1])[::-1] for kind, losses in report["lost"].items()}  # backward from the metric
    parts = {"kept": np.array(report["kept"])} | {k: lost[k] for k in sorted(lost) if np.abs(lost[k]).max() > 1e-3}
    figure = Figure(figsize=(4.4 + 0.35 * len(report["kept"]), 3.4), layout="constrained")
    ax, up, down = figure.subplots(), 0, 0
    kinds = ["kept", "Attention", "biases", "MLP", "LayerNorm", "RMSNorm", "Linear", "unembedding", "residual"]
    for label, heights in parts.items():  # one colour for a kind in all figures
        bottom, color = np.where(heights > 0, up, down), f"C{kinds.index(label)}"
        ax.bar(range(len(heights)), heights, 0.8, bottom, label="lost to " * (label != "kept") + label, color=color)
        up, down = up + np.maximum(heights, 0), down + np.minimum(heights, 0)
    ax.axhline(1, color="black", linewidth=0.6, linestyle="--")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks(range(len(heights)), [*range(len(heights) - 1), "end"], fontsize=8)
    ax.set_xlabel("residual stream ahead of layer")
    ax.set_ylabel("fraction of the metric")
    ax.set_title(f"{name}: relevance, {report['prompts']} prompts", fontsize=10)
    figure.legend(loc="outside right upper", fontsize=8, title="(lost below 0: gained)", title_fontsize=8)
    figure.savefig(file, format="png", dpi=130)


def draw_pcc(file, summaries: list[dict], args: argparse.Namespace) -> None:
    """The paper's Figure 1: PCC with AP, a panel per node kind, the methods side by side for each model, with 95 % intervals."""
    from matplotlib.figure import Figure

    methods = [m for m in args.methods if m != "ap"]
    figure = Figure(figsize=(1.5 + len(args.nodes) * (1 + 0.5 * len(summaries)), 3.4), layout="constrained")
    for ax, node in zip(figure.subplots(1, len(args.nodes), sharey=True, squeeze=False)[0], args.nodes):
        for i, method in enumerate(methods):
            heights = np.array([s["pcc"][method][node]["averaged"] for s in summaries])
            ends = np.array([s["pcc"][method][node]["interval"]["averaged"] for s in summaries]).T
            ax.bar(
                np.arange(len(summaries)) + (i - (len(methods) - 1) / 2) * 0.8 / len(methods),
                heights,
                0.76 / len(methods),
                label=label_of(method),
                color=COLORS.get(method),
                yerr=np.maximum(0, [heights - ends[0], ends[1] - heights]),  # percentiles may leave the value outside
                error_kw={"linewidth": 0.8},
            )
        ax.set_title(node, fontsize=10)
        ax.set_xticks(range(len(summaries)), [s["model"] for s in summaries], rotation=35, ha="right", fontsize=8)
        ax.axhline(0, color="black", linewidth=0.6)
    figure.axes[0].set_ylabel("PCC with activation patching")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(file, format="png", dpi=130)


def print_overview(summaries: list[dict], args: argparse.Namespace) -> None:
    """The paper's Table 5: a line per model, AtP beside RelP for each node kind."""
    methods = [m for m in args.methods if m != "ap"]
    each = max(10, *(2 + len(label_of(m)) for m in methods))
    width = each * len(methods)
    print(f"\n{'PCC with AP':20}" + "".join(f"{node:>{width}}" for node in args.nodes))
    print(" " * 20 + "".join(f"{label_of(m):>{each}}" for m in methods) * len(args.nodes))
    for s in summaries:
        print(
            f"{s['model']:20}"
            + "".join(f"{s['pcc'][m][node]['averaged']:{each}.3f}" for node in args.nodes for m in methods)
        )


# ---------------------------------------------------------------------------------------------------------
# Circuits of subject-verb agreement: the paper's Section 5.2 and Figure 3

# What circuits are made of: (label, kind of unit, the nodes whose SAE errors are ablated whatever their score)
VARIANTS = {
    "features": ("features and errors", "features", ()),
    "no_errors": ("no errors", "features", ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")),
    "no_sublayer_errors": ("no attention, MLP errors", "features", ("attn_out", "mlp_out", "z")),
    "no_resid_errors": ("no residual errors", "features", ("resid_pre", "resid_mid", "resid_post")),
    "neurons": ("neurons: node dimensions", "neurons", ()),
    "mlp_neurons": ("neurons: MLP hidden", "mlp_neurons", ()),
}
SIZES = (10, 30, 100, 300)  # of the circuits in the table
GRID = np.geomspace(SIZES[0], SIZES[-1], 30)  # over which faithfulness is averaged, and its mean drawn
TARGET = 0.8  # the smallest circuit with this faithfulness is drawn
PER_CELL = 8  # units of one node and position; of more, the strongest are drawn


class Counted:
    """A model that counts: passes forward, where a stream is computed; backward, where a gradient comes to its end; read-outs."""

    def __init__(self, model):
        self.model, self.forward, self.backward, self.read = model, 0, 0, 0

    def __getattr__(self, name):
        return getattr(self.model, name)

    def stream(self, *args, **kwargs):
        self.forward += 1
        stream = self.model.stream(*args, **kwargs)
        if stream.requires_grad:
            stream.register_hook(self.count_backward)
        return stream

    def count_backward(self, gradient):
        self.backward += 1

    def unembed(self, x, *args, **kwargs):
        self.read += len(x)
        return self.model.unembed(x, *args, **kwargs)


def evaluate_circuits(name: str, args: argparse.Namespace) -> dict:
    """Find circuits on the discovery pairs, judge them on the held-out ones, print the tables, draw and write. Returns the summary."""
    began = time.perf_counter()
    dtype, device = DTYPES[args.dtype], args.device
    model, tokenizer = models.from_pretrained(name, dtype, device), models.load_tokenizer(name)
    if not (source := SAES.get(name) if args.saes == "auto" else args.saes):
        raise ValueError(f"no sparse autoencoders are known for {name}: name some with --saes")
    saes = models.load_saes(source, model, dtype, device, args.nodes)
    first = first_judged(model)
    if not any(layer >= first for _, layer in saes):
        raise ValueError(f"{source} has no SAE in the layers that are judged, {first} to {model.config.n_layers - 1}")
    identity = lambda n: relp.Neurons(torch.eye(n, dtype=dtype, device=device))
    units = {
        "features": saes,
        "neurons": {key: identity(sae.W_dec.shape[1]) for key, sae in saes.items()},
        "mlp_neurons": {("mlp_hidden", i): identity(model.config.d_mlp) for i in range(model.config.n_layers)},
    }
    structures = agreement_pairs(tokenizer, model, args)
    say(
        f"\n{name}: {len(saes)} SAEs of {max(len(sae.W_dec) for sae in saes.values())} features, {args.n} discovery and "
        f"{args.held_out} held-out pairs, {args.dtype} on {device}, ready after {time.perf_counter() - began:.1f} s"
    )
    folder = Path(args.out) / f"{slug(name)}-{slug(Path(args.prompts).stem) if args.prompts else args.task}"
    folder.mkdir(parents=True, exist_ok=True)

    audited, _ = audit(model, next(iter(structures.values()))[0], args)
    found = {}
    for structure, (discovery, held_out) in structures.items():
        scores, costs, agreement = unit_scores(f"{name} {structure}", model, discovery, units, args)
        of = found[structure] = judge(structure, model, discovery, held_out, units, scores, args)
        of |= {"cost": costs, "agreement": agreement, "chosen": chosen_circuit(of)}
        of["strongest"] = strongest_units(model, held_out, tokenizer, saes, scores["features"], of["roles"], args)
        print_structure(structure, found[structure], args)
        save(
            folder / f"circuit-{structure}.json",
            lambda file: file.write(
                json.dumps(without_nan(circuit_json(structure, found[structure])), indent=1).encode()
            ),
        )
    for file in folder.glob("circuit-*.json"):  # of structures that an earlier run had
        if file.stem.removeprefix("circuit-") not in found:
            file.unlink()
    about = {"model": name, "task": args.task, "saes": source, "audit": audited}
    summary = {**about, **summarise(found, args), **circumstances(args)}
    save(folder / "summary.json", lambda file: file.write(json.dumps(without_nan(summary), indent=1).encode()))
    print_circuits(summary, args)
    print_audit(audited, args.audit)
    if not args.no_plot:
        save(folder / "faithfulness.png", lambda file: draw_faithfulness(file, name, found, args))
        save(folder / "circuits.png", lambda file: draw_circuits(file, name, found, args))
    print(f"  written to {folder}/")
    return summary


def first_judged(model) -> int:
    """The layer from which on circuits are judged: the first third is left out (Appendix A.2)."""
    return model.config.n_layers // 3


def agreement_pairs(tokenizer, model, args: argparse.Namespace) -> dict[str, tuple[list, list]]:
    """{structure: (discovery pairs, held-out pairs)}, from the templates or from a file (then of its largest group)."""
    if not args.prompts:
        return {s: tasks.sva(tokenizer, s, args.n, args.held_out, args.seed, not args.no_bos) for s in args.structures}
    pairs = tasks.read_pairs(args.prompts, tokenizer, not args.no_bos, model.config.n_vocab, skip_unaligned=True)
    pairs = tasks.largest_group(pairs, args.n + args.held_out)
    return {slug(Path(args.prompts).stem): tasks.split(pairs, args.n, args.held_out, args.seed)}


def tensors(pairs: list[tasks.Pair], device) -> list[torch.Tensor]:
    return [torch.tensor([getattr(p, part) for p in pairs], device=device) for part in ("original", "patch", "answers")]


def unit_scores(
    title: str, model, pairs: list[tasks.Pair], units: dict, args: argparse.Namespace
) -> tuple[dict, dict, dict]:
    """Every method's scores of every unit, averaged over the pairs: {kind: {method: {(name, layer): [pos, units]}}}.

    AP's are of features and errors alone. Next, what these cost: {method: {"forward", "backward", "seconds"}}, passes for
    one batch of pairs; an edited run of AP counts as one. Last, how well the methods agree with AP, if that is among them.
    """
    metric, length, saes = relp.METRICS[args.metric], len(pairs[0].original), units["features"]
    size, runs = batch_sizes(args.batch_size, model.config, length, args.device)
    size = max(1, min(size, 2**27 // (length * sum(len(sae.W_dec) for sae in saes.values()))))
    every = list(batches(pairs, size))
    scores, costs, of_pairs = {kind: {} for kind in units}, {}, {method: {} for method in args.methods}
    with tqdm(
        total=len(every) * len(args.methods), desc=title, leave=False, disable=None, delay=2, bar_format=BAR
    ) as bar:
        for method in args.methods:
            bar.set_description(f"{title} {label_of(method)}")
            cost = costs[method] = {"forward": 0.0, "backward": 0.0, "seconds": 0.0}
            for rows in every:
                batch, done = tensors([pairs[i] for i in rows], args.device), bar.n
                counted, began, parts = Counted(model), time.perf_counter(), {}
                if method == "ap":
                    progress = lambda part: bar.update(done + part - bar.n)
                    parts["features"] = relp.patch_features(counted, *batch, saes, metric, rows=runs, progress=progress)
                    counted.forward += counted.read / len(rows) - 1  # all read-outs but one are edited runs'
                else:
                    passes = relp.propagate(counted, *batch, saes, metric, **method_options(method, model, args))
                    parts["features"] = relp.divide(passes, saes)
                cost["seconds"] += time.perf_counter() - began
                cost["forward"] += counted.forward / len(every)
                cost["backward"] += counted.backward / len(every)
                if method != "ap":  # in passes of their own, so that what is counted are the features'
                    parts["neurons"] = relp.divide(passes, units["neurons"])
                    passes = relp.propagate(
                        model, *batch, units["mlp_neurons"], metric, **method_options(method, model, args)
                    )
                    parts["mlp_neurons"] = relp.divide(passes, units["mlp_neurons"])
                for kind, values in parts.items():
                    total = scores[kind].setdefault(method, {})
                    for key, value in values.items():
                        if not value.isfinite().all():
                            raise ValueError(
                                f"{title}: scores that are not finite in {args.dtype}; try --dtype float32"
                            )
                        total[key] = total.get(key, 0) + value.sum(0) / len(pairs)
                        if kind == "features" and "ap" in args.methods:
                            of_pairs[method].setdefault(key, []).append(value.cpu())
                bar.update(done + 1 - bar.n)
    if args.sum_positions:
        alike = lambda value: value.sum(0, keepdim=True).expand_as(value)
        scores = {k: {m: {key: alike(v) for key, v in s.items()} for m, s in of.items()} for k, of in scores.items()}
    of_pairs = {method: {key: torch.cat(v) for key, v in values.items()} for method, values in of_pairs.items()}
    return scores, costs, agreement_of_units(of_pairs, pairs, args.seed) if "ap" in args.methods else {}


def judge(
    structure: str, model, discovery: list, held_out: list, units: dict, scores: dict, args: argparse.Namespace
) -> dict:
    """The circuits at every threshold, run on the held-out pairs.

    T_N is a share of the total effect, |mean metric(original) - mean metric(patch)| on the discovery pairs, the same for
    all methods. Layers ahead of first_judged are left as they are, and not counted.
    """
    metric, first = relp.METRICS[args.metric], first_judged(model)
    values = [x.mean().item() for x in relp.compare(model, *tensors(discovery, args.device), (), metric)[:2]]
    original, patch, answers = tensors(held_out, args.device)
    full, full_patch, _ = relp.compare(model, original, patch, answers, (), metric)
    effect = abs(values[0] - values[1])
    thresholds = [share * effect for share in args.thresholds]
    of_means = patch if args.means == "held-out" else tensors(discovery, args.device)[1]
    curves = {}
    for variant, (_, kind, removed) in VARIANTS.items():
        judged = {key: sae for key, sae in units[kind].items() if key[1] >= first}
        means = relp.unit_means(model, of_means, judged)
        run = lambda circuit: relp.run_circuit(model, original, answers, judged, means, circuit, metric).cpu().double()

        def without_removed(circuit):
            for name, layer in circuit:
                circuit[name, layer][:, -1] &= name not in removed
            return circuit

        blank = lambda sae: torch.zeros(original.shape[1], len(sae.W_dec) + 1, dtype=torch.bool, device=args.device)
        empty, curves[variant] = run({key: blank(sae) for key, sae in judged.items()}), {}
        for method, of_method in scores[kind].items():
            sizes, circuits, complements = [], [], []
            for threshold in thresholds:
                circuit = without_removed({key: of_method[key].abs() > threshold for key in judged})
                size = sum(int(c.sum()) for c in circuit.values())
                if not sizes or size != sizes[-1]:  # circuits are nested: of equal size, equal
                    now = run(circuit), run(without_removed({key: ~c for key, c in circuit.items()}))
                sizes.append(size), circuits.append(now[0]), complements.append(now[1])
            if not sizes[0] and variant == "features":
                raise ValueError(
                    f"{structure}: no unit's {label_of(method)} score exceeds the lowest threshold, {thresholds[0]:.3g} "
                    f"({args.thresholds[0]:.3g} of the total effect): choose lower --thresholds"
                )
            curves[variant][method] = {
                "sizes": sizes, "circuit": torch.stack(circuits), "complement": torch.stack(complements), "empty": empty,
            }  # fmt: skip
    return {
        "pairs": held_out,
        "accuracy": {"original": float((full > 0).double().mean()), "patch": float((full_patch < 0).double().mean())},
        "discovery": {"original": values[0], "patch": values[1]},
        "total_effect": effect,
        "thresholds": thresholds,
        "full": full.cpu().double(),
        "curves": curves,
        "roles": overlay(held_out)[0],
        "scores": {m: {key: value.cpu() for key, value in s.items()} for m, s in scores["features"].items()},
        "first_layer": first,
    }


# Statistics of the circuits


def resamples(pairs: list[tasks.Pair], seed: int) -> torch.Tensor:
    """Weights [1 + B, n] of the pairs: first all alike, then how often each one is in a bootstrap resample.

    Pairs made of the same two prompts are drawn together: as evidence they are one.
    """
    families = {}
    family = [families.setdefault(frozenset((p.original, p.patch)), len(families)) for p in pairs]
    drawn = relp.resamples([""] * len(families), seed=seed)[:, family]
    return torch.cat([torch.ones(1, len(pairs), dtype=drawn.dtype), drawn])


def curve(found: dict, variant: str, method: str, which: str, weights: torch.Tensor) -> torch.Tensor:
    """Faithfulness (which: "circuit") or completeness ("complement") at each threshold: [thresholds, weights]."""
    c = found["curves"][variant][method]
    return relp.faithfulness(c[which][:, None] * weights, found["full"] * weights, c["empty"] * weights)


def at_sizes(values: torch.Tensor, sizes: list[int], wanted) -> torch.Tensor:
    """A curve's values [thresholds, ...] at other circuit sizes, linear in log(1 + size); beyond its ends, those of its ends."""
    order = np.unique(sizes, return_index=True)[1]
    x, units = np.log1p(np.array(sizes)[order]), np.eye(len(order))
    matrix = np.stack([np.interp(np.log1p(wanted), x, unit) for unit in units], axis=1)
    return torch.tensor(matrix) @ values[order]


def estimate(values: torch.Tensor) -> list[float]:
    """[value, low, high]: the first of `values`, and the 95 % interval of the others."""
    return [float(values[0]), *relp.interval(values[1:])]


def summarise(found: dict, args: argparse.Namespace) -> dict:
    """What goes into summary.json: every structure, and the averages over them with their intervals."""
    weights = {s: resamples(f["pairs"], args.seed) for s, f in found.items()}

    def averaged(variant, method, which, sizes):  # [sizes, resamples]
        of = [
            at_sizes(curve(f, variant, method, which, weights[s]), f["curves"][variant][method]["sizes"], sizes)
            for s, f in found.items()
        ]
        return torch.stack(of).mean(0)

    result = {name: {variant: {} for variant in VARIANTS} for name in ("faithfulness", "completeness")}
    result["differences"] = {}
    for variant in VARIANTS:
        means = {}
        for method in next(iter(found.values()))["curves"][variant]:
            for name, which in (("faithfulness", "circuit"), ("completeness", "complement")):
                means[name, method] = averaged(variant, method, which, GRID).mean(0)
                result[name][variant][method] = {
                    "sizes": {n: estimate(v) for n, v in zip(SIZES, averaged(variant, method, which, SIZES))},
                    "mean": estimate(means[name, method]),
                }
        for (name, method), values in means.items():
            if method not in ("ap", "relp") and (name, "relp") in means:
                of = result["differences"].setdefault(variant, {}).setdefault(f"relp - {method}", {})
                of[name] = estimate(means[name, "relp"] - values)
    result["structures"] = {
        s: {
            key: f[key] for key in ("accuracy", "discovery", "total_effect", "thresholds", "cost", "agreement", "first_layer")
        } | {
            "curves": {
                variant: {
                    method: {
                        "sizes": c["sizes"],
                        "faithfulness": [estimate(v) for v in curve(f, variant, method, "circuit", weights[s])],
                        "completeness": [estimate(v) for v in curve(f, variant, method, "complement", weights[s])],
                    }
                    for method, c in of.items()
                }
                for variant, of in f["curves"].items()
            }
        }
        for s, f in found.items()
    }  # fmt: skip
    return result


def agreement_of_units(scores: dict, pairs: list[tasks.Pair], seed: int) -> dict:
    """{method: {node or "all": {measure: [value, low, high]}}}: relp.agreement with AP over the units that some method scores.

    scores: {method: {(name, layer): [pair, pos, units]}} of the discovery pairs.
    """
    weights, nodes, result = resamples(pairs, seed), dict.fromkeys(name for name, _ in scores["ap"]), {}
    for node in ("all", *nodes):
        of_node = {
            method: torch.cat([v.flatten(1) for (name, _), v in values.items() if node in ("all", name)], dim=1)
            for method, values in scores.items()
        }
        scored = sum((v != 0).any(0) for v in of_node.values()) > 0
        for method in scores.keys() - {"ap"}:
            pair = of_node[method][:, scored], of_node["ap"][:, scored]
            measures = relp.agreement(*pair, [""] * len(pairs), weights=weights)
            result.setdefault(method, {})[node] = {name: estimate(values) for name, values in measures.items()}
    return result


# Reading a circuit


def strongest_units(
    model, held_out: list[tasks.Pair], tokenizer, saes: dict, scores: dict, roles: list[str], args: argparse.Namespace
) -> list[dict]:
    """The --top K units of the main method: where they are, what each method scores, and the prompts on which they fire most."""
    skip = held_out[0].roles[0] == "BOS"
    tokens = torch.cat(tensors(held_out, args.device)[:2]).unique(dim=0)
    _, acts = relp.record(model, tokens, {name for name, _ in saes})
    units, listed = ranked(scores[main_method(scores)]), []
    if args.sum_positions:  # a unit is the same at all positions: it is listed once
        units = [unit for unit in units if unit[1] == 0]
    for key, pos, i in units[: args.top]:
        sae, x = saes[key], acts[key].flatten(2)[:, slice(None) if args.sum_positions else [pos]]
        fires = (sae.encode(x)[..., i] if i < len(sae.W_dec) else sae.error(x).norm(dim=-1)).amax(1)
        most = [(float(v), tokens[j, skip:].tolist()) for v, j in zip(*fires.topk(min(3, len(fires)))) if v > 0]
        unit = describe(key, pos, i, scores, roles) | ({"position": "all", "role": "all"} if args.sum_positions else {})
        listed.append(unit | {"fires_most_on": [[tokenizer.decode(ids), value] for value, ids in most]})
    return listed


def ranked(scores: dict) -> list[tuple]:
    """(key, pos, unit) of all units with a score, the strongest first."""
    units = [(key, *at) for key, value in scores.items() for at in value.nonzero().tolist()]
    strength = torch.cat([value[value != 0].abs() for value in scores.values()])
    return [units[i] for i in strength.argsort(descending=True, stable=True).tolist()]


def describe(key: tuple, pos: int, i: int, scores: dict, roles: list[str]) -> dict:
    last = next(iter(scores.values()))[key].shape[1] - 1
    return {
        "layer": key[1],
        "node": key[0],
        "unit": "error" if i == last else i,
        "position": pos,
        "role": roles[pos],
        "scores": {method: float(of_method[key][pos, i]) for method, of_method in scores.items()},
    }


def chosen_circuit(found: dict) -> dict:
    """The smallest circuit of the main method that reaches TARGET, or else its largest: size, threshold, faithfulness, units."""
    method = main_method(found["scores"])
    of_method, c = found["scores"][method], found["curves"]["features"][method]
    faithful = relp.faithfulness(c["circuit"], found["full"], c["empty"]).tolist()
    best = max((k for k, f in enumerate(faithful) if f >= TARGET), default=0)
    threshold = found["thresholds"][best]
    units = [unit for unit in ranked(of_method) if abs(of_method[unit[0]][unit[1:]]) > threshold]
    return {
        "method": method,
        "threshold": threshold,
        "size": c["sizes"][best],
        "faithfulness": faithful[best],
        "units": units,
    }


def circuit_json(structure: str, found: dict) -> dict:
    """One structure's circuits as a file that others can read: the curves, and all units above the lowest threshold."""
    scores, chosen = found["scores"], found["chosen"]
    main, everything = scores[chosen["method"]], torch.ones(1, len(found["full"]), dtype=torch.float64)
    shown = [u for u in ranked(main) if abs(main[u[0]][u[1:]]) > found["thresholds"][0]]
    return {
        "structure": structure,
        "roles": found["roles"],
        "total_effect": found["total_effect"],
        "thresholds": found["thresholds"],
        "first_layer_judged": found["first_layer"],
        "circuits": {
            variant: {
                method: {
                    "sizes": c["sizes"],
                    "faithfulness": curve(found, variant, method, "circuit", everything)[:, 0].tolist(),
                    "completeness": curve(found, variant, method, "complement", everything)[:, 0].tolist(),
                }
                for method, c in of.items()
            }
            for variant, of in found["curves"].items()
        },
        "drawn": {key: chosen[key] for key in ("method", "threshold", "size", "faithfulness")},
        "strongest": found["strongest"],
        "nodes": [describe(*unit, scores, found["roles"]) for unit in shown],
    }


def print_structure(structure: str, found: dict, args: argparse.Namespace) -> None:
    accuracy, mean, chosen = found["accuracy"], found["discovery"], found["chosen"]
    print(
        f"\n  {structure}: right on {accuracy['original']:.0%} of the original and {accuracy['patch']:.0%} of the patch prompts held out; "
        f"mean {args.metric} {mean['original']:+.3f} and {mean['patch']:+.3f}"
    )
    if min(accuracy.values()) < 0.75:
        print("  WARNING: this model does not do the task, so there is no behaviour here for the methods to explain")
    print(
        f"  {chosen['size']} units from layer {found['first_layer']} on, found by {label_of(chosen['method'])}, have a faithfulness of {chosen['faithfulness']:.2f}; "
        f"the strongest, and the prompts on which they fire most:"
    )
    methods = list(found["scores"])
    print(f"    {'layer node':18}{'unit':>6}  {'position':10}" + "".join(f"{label_of(m):>9}" for m in methods))
    for u in found["strongest"]:
        numbers = "".join(f"{u['scores'][m]:9.3f}" for m in methods)
        prompts = ", ".join(f"{text.strip()!r} {value:.1f}" for text, value in u["fires_most_on"][:2])
        print(f"    {u['layer']:>5} {u['node']:12}{u['unit']:>6}  {u['role'].strip():10}{numbers}  {prompts}")


def print_circuits(summary: dict, args: argparse.Namespace) -> None:
    structures = list(summary["structures"].values())
    average = lambda values: sum(values) / len(structures)
    print(
        f"\n  {'mean of the structures':26}{'forward':>10}{'backward':>10}{'seconds':>10}{'PCC, AP':>10}{'Spearman':>10}{'slope':>10}"
    )
    for method in args.methods:
        costs = [average(s["cost"][method][what] for s in structures) for what in ("forward", "backward", "seconds")]
        line = f"  {label_of(method):26}" + "{:10.0f}{:10.0f}{:10.2f}".format(*costs)
        if method != "ap" and "ap" in args.methods:
            for measure in ("averaged", "spearman", "slope"):
                line += f"{average(s['agreement'][method]['all'][measure][0] for s in structures):10.3f}"
        print(line)
    columns = "".join(f"{n:>6}" for n in SIZES)
    print(f"\n  {'':34}{'faithfulness':>24}{'':23} |{'completeness':>24}")
    print(f"  {'circuits of so many units':34}{columns}{'mean':>9}{'95 %':>9}{'':5} |{columns}")
    for variant, (label, *_) in VARIANTS.items():
        faithful, complete = (summary[name][variant] for name in ("faithfulness", "completeness"))
        for method in faithful:
            value, low, high = faithful[method]["mean"]
            at = ["".join(f"{of[method]['sizes'][n][0]:6.2f}" for n in SIZES) for of in (faithful, complete)]
            print(f"  {label:26}{label_of(method):8}{at[0]}{value:9.3f} [{low:.3f} {high:.3f}] |{at[1]}")
            label = ""
        for other, of in summary["differences"].get(variant, {}).items():
            value, low, high = of["faithfulness"]
            print(f"  {'':26}{'RelP - ' + label_of(other.split()[-1]):32}{value:+9.3f} [{low:+.3f} {high:+.3f}]")


def draw_faithfulness(file, name: str, found: dict, args: argparse.Namespace) -> None:
    """The paper's Figure 3: a column per kind of circuit; faint lines are structures, bold their mean with its 95 % band."""
    from matplotlib.figure import Figure

    weights = {s: resamples(f["pairs"], args.seed) for s, f in found.items()}
    figure = Figure(figsize=(2.3 + 2.6 * len(VARIANTS), 6), layout="constrained")
    axes = figure.subplots(2, len(VARIANTS), sharex="col", sharey=True)
    for i, (title, which) in enumerate((("faithfulness", "circuit"), ("completeness", "complement"))):
        axes[i, 0].set_ylabel(title)
        for ax, (variant, (label, *_)) in zip(axes[i], VARIANTS.items()):
            for method in next(iter(found.values()))["curves"][variant]:
                sizes = {s: f["curves"][variant][method]["sizes"] for s, f in found.items()}
                ends = max(min(n) for n in sizes.values()), min(max(n) for n in sizes.values())
                grid, curves = np.geomspace(max(1, ends[0]), max(2, ends[1]), 40), []
                for s, f in found.items():
                    values = curve(f, variant, method, which, weights[s])
                    ax.plot(
                        np.maximum(sizes[s], 0.7), values[:, 0], color=COLORS.get(method), alpha=0.25, linewidth=0.8
                    )
                    curves.append(at_sizes(values, sizes[s], grid))
                mean = torch.stack(curves).mean(0)
                low, high = mean[:, 1:].quantile(torch.tensor([0.025, 0.975], dtype=mean.dtype), dim=1)
                ax.fill_between(grid, low, high, color=COLORS.get(method), alpha=0.15, linewidth=0)
                ax.plot(grid, mean[:, 0], color=COLORS.get(method), linewidth=2, label=label_of(method))
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter("{x:g}")
            ax.axhline(1 - i, color="black", linewidth=0.5, linestyle=":")
            ax.set_ylim(-0.25, 1.15)
            if i == 0:
                ax.set_title(label, fontsize=10)
            else:
                ax.set_xlabel("units in the circuit")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(
        f"{name}: circuits of subject-verb agreement, held-out pairs, {args.metric}; bold: mean of the structures"
    )
    figure.savefig(file, format="png", dpi=110)


def draw_circuits(file, name: str, found: dict, args: argparse.Namespace) -> None:
    """A picture of each structure's circuit: layers upward, positions across, a unit's area as its score, its number on it."""
    from matplotlib.figure import Figure

    nodes = list(dict.fromkeys(key for f in found.values() for of_method in f["scores"].values() for key in of_method))
    order = ["resid_pre", "z", "attn_out", "resid_mid", "mlp_out", "resid_post"]
    nodes.sort(key=lambda key: (key[1], order.index(key[0])))
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(8 * columns, (1.2 + 0.4 * len(nodes)) * rows), layout="constrained")
    for ax, (structure, f) in zip(figure.subplots(rows, columns, squeeze=False).flat, found.items()):
        chosen, positions = f["chosen"], range(len(f["roles"]))
        scores = f["scores"][chosen["method"]]
        top = max((abs(float(scores[key][pos, i])) for key, pos, i in chosen["units"]), default=1.0)
        cells = {}  # (node, pos) -> its units, the strongest first
        for key, pos, i in chosen["units"]:
            cells.setdefault((key, pos), []).append(i)
        widths = [
            max([1, *(min(len(u), PER_CELL) + (len(u) > PER_CELL) for (_, p), u in cells.items() if p == pos)])
            for pos in positions
        ]
        edges = np.concatenate([[0], np.cumsum(widths)])
        for (key, pos), units in cells.items():
            y, x = nodes.index(key), edges[pos] + 0.5
            for i in units[:PER_CELL]:
                value, error = float(scores[key][pos, i]), i == scores[key].shape[1] - 1
                color, marker = "#d6604d" if value > 0 else "#4393c3", "s" if error else "o"
                ax.scatter(x, y, s=25 + 550 * abs(value) / top, marker=marker, color=color, linewidths=0)
                ax.annotate("err" if error else str(i), (x, y), ha="center", va="center", fontsize=6)
                x += 1
            if len(units) > PER_CELL:
                ax.annotate(f"+{len(units) - PER_CELL}", (x, y), ha="center", va="center", fontsize=7)
        ax.set_xticks((edges[:-1] + edges[1:]) / 2, f["roles"])
        ax.set_yticks(range(len(nodes)), [f"{layer} {node}" for node, layer in nodes], fontsize=8)
        ax.set_xlim(0, edges[-1])
        ax.set_ylim(-0.7, len(nodes) - 0.3)
        ax.grid(axis="y", linewidth=0.3)
        for x in edges[1:-1]:
            ax.axvline(x, color="grey", linewidth=0.4)
        size = f"{chosen['size']} units from layer {f['first_layer']} on"
        ax.set_title(f"{structure}: {size}, faithfulness {chosen['faithfulness']:.2f}", fontsize=10)
    figure.suptitle(
        f"{name}: SAE features (their numbers) and errors (squares), area by {label_of(chosen['method'])} score;\n"
        "blue carries the original's answer, red speaks against it",
        fontsize=10,
    )
    figure.savefig(file, format="png", dpi=110)


# ---------------------------------------------------------------------------------------------------------


def complain(error: BaseException) -> int:
    print(f"evaluate.py: error: {models.first_line(error)}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 behind one line on stderr. A model that fails does not stop those after it."""
    os.environ.setdefault(
        "HF_HUB_VERBOSITY", "error"
    )  # the Hub's retries are not news: what fails in the end is reported
    try:
        args = parse(argv)
    except ValueError as error:
        return complain(error)
    try:  # can results be written? better asked now than behind the work
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        return complain(ValueError(f"cannot write results to {args.out}: {error.strerror}"))
    summaries, code, said = [], 0, set()
    for name in args.model:
        try:
            summaries.append({"ioi": evaluate, "sva": evaluate_circuits}[args.task](name, args))
        except torch.OutOfMemoryError:
            code = complain(ValueError(f"{name}: out of memory; try a smaller --batch-size, or --dtype bfloat16"))
        except (ValueError, OSError) as error:
            code, text = 2, models.first_line(error)
            if text not in said:  # a mistake in the prompts is said once, not once per model
                complain(ValueError(text if name in text else f"{name}: {text}"))
            said.add(text)
        if code and world() > 1:
            return code  # the other processes may be waiting for this one: torchrun ends them
    if len(summaries) > 1 and summaries[0].get("pcc") and rank() == 0:
        print_overview(summaries, args)
        if not args.no_plot:
            try:
                save(Path(args.out) / "pcc.png", lambda file: draw_pcc(file, summaries, args))
            except ValueError as error:
                code = complain(error)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(
            "evaluate.py: stopped; AP of --task ioi goes on from here when the command is given again", file=sys.stderr
        )
        sys.exit(130)
