"""How well do AtP and RelP predict activation patching? The paper's Table 5, Figure 1 and Figure 2 from one command.

python evaluate.py                     the four toy models that come with the project, no download
python evaluate.py --model gpt2        the real GPT-2 small, from the Hugging Face Hub
"""

import argparse
import dataclasses
import hashlib
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
PATCHABLE = list(models.SequentialBlock.nodes)
LABELS = {"ap": "AP", "atp": "AtP", "relp": "RelP"}
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(
        prog="evaluate.py",
        usage="python evaluate.py [options]",
        description="Compare AtP and RelP with activation patching on prompt pairs; print the table, draw the maps, save the numbers.",
        epilog="example: python evaluate.py --model gpt2 pythia-70m --n 50 --corruption s2 --rules ln,identity,epsilon=1e-4",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument(
        "--model",
        nargs="+",
        default=TOYS,
        metavar="NAME",
        help="short name, Hub repository or directory; 'paper' is the eight of Table 5",
    )
    p.add_argument("--task", choices=["ioi"], default="ioi", help="prompt pairs from the paper's templates")
    p.add_argument("--prompts", metavar="FILE", help="prompt pairs from a JSON-lines file instead")
    p.add_argument("--n", type=int, default=100, help="prompt pairs (with --prompts: at most that many)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of prompts")
    p.add_argument(
        "--corruption", default="swap", metavar="swap|s2", help="exchange both names, or the second mention alone"
    )
    p.add_argument("--metric", default="logit_diff", metavar="|".join(relp.METRICS), help="what is patched for")
    p.add_argument("--nodes", default=",".join(NODES), metavar="LIST", help=f"of {', '.join(PATCHABLE)}")
    p.add_argument("--methods", default=",".join(LABELS), metavar="LIST", help="of ap,atp,relp")
    p.add_argument(
        "--rules", default="paper", metavar="RULES", help="paper, none, or of ln,identity,half,ah,epsilon=X,gamma=X"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--dtype", default="float32", metavar="|".join(DTYPES), help="of weights and activations")
    p.add_argument(
        "--batch-size", default="auto", metavar="N", help="prompts, or patched runs, that go through the model together"
    )
    p.add_argument(
        "--shard", action="store_true", help="under torchrun: share the weights out over the processes as well"
    )
    p.add_argument("--out", default="results", metavar="DIR", help="where the results go")
    p.add_argument("--no-bos", action="store_true", help="put no BOS token in front of the prompts")
    p.add_argument("--no-plot", action="store_true", help="draw nothing")
    args = p.parse_args(argv)
    args.model = [name for given in args.model for name in (TABLE_5 if given == "paper" else [given])]
    args.model, taken = list(dict.fromkeys(args.model)), {}
    for name in args.model:
        if taken.setdefault(slug(name), name) != name:
            raise ValueError(
                f"{taken[slug(name)]} and {name} would write to one folder, {slug(name)}: give them different names, or run them apart"
            )
    args.nodes = choices("node", args.nodes, PATCHABLE)
    args.methods = choices("method", args.methods, LABELS)
    args.rules = parse_rules(args.rules)
    choices("metric", args.metric, relp.METRICS, single=True)
    choices("dtype", args.dtype, DTYPES, single=True)
    choices("corruption", args.corruption, tasks.CORRUPTIONS, single=True)
    if args.n < 1:
        raise ValueError(f"--n must be at least 1, got {args.n}")
    if args.batch_size != "auto" and not re.fullmatch("[1-9][0-9]*", args.batch_size):
        raise ValueError(f"--batch-size must be auto or a positive whole number, got {args.batch_size!r}")
    args.device = join(parse_device(args.device))
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
        elif name in ("epsilon", "gamma"):
            try:
                fields[name] = float(value)
            except ValueError:
                raise ValueError(f"rule {name} needs a number, as in {name}=0.01, got {item!r}") from None
            if not 0 < fields[name] < math.inf:
                raise ValueError(f"rule {name} needs a positive number, got {item!r}")
        else:
            raise ValueError(
                f"unknown rule {item!r}: choose paper, none, or from ln, identity, half, ah, epsilon=X, gamma=X"
            )
    if "epsilon" in fields and "gamma" in fields:
        raise ValueError("epsilon and gamma are both rules for linear layers: choose one")
    return models.Rules(**fields)


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
    if absent := [node for node in args.nodes if node not in model.nodes]:
        raise ValueError(
            f"{name} has no node {absent[0]!r}: choose from {', '.join(n for n in PATCHABLE if n in model.nodes)}"
        )
    pairs = prompt_pairs(name, model, args)
    say(
        f"\n{name}: {model.config.n_layers} layers, {len(pairs)} prompt pairs, {args.dtype} on {args.device}, ready after {time.perf_counter() - began:.1f} s"
    )
    folder = Path(args.out) / f"{slug(name)}-{slug(Path(args.prompts).stem) if args.prompts else args.task}"
    folder.mkdir(parents=True, exist_ok=True)
    scores, differs, values, seconds = score(name, model, pairs, args, folder)

    summary = {
        "model": name,
        "prompt_pairs": len(pairs),
        "accuracy": {"original": float((values[:, 0] > 0).mean()), "patch": float((values[:, 1] < 0).mean())},
        args.metric: {"original": float(values[:, 0].mean()), "patch": float(values[:, 1].mean())},
        "cells": {
            node: {"all": int((~np.isnan(differs[node])).sum()), "unchanged": int((differs[node] == 0).sum())}
            for node in args.nodes
        },
        "pcc": correlations(scores, differs, [p.group for p in pairs], args),
        "rules": dataclasses.asdict(model.rules(args.rules)),
        "seconds": seconds,
        "arguments": {
            key: str(value) if isinstance(value, (torch.device, models.Rules)) else value
            for key, value in vars(args).items()
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    if rank() == 0:
        arrays = {f"{method}_{node}": value for (method, node), value in scores.items()}
        save(folder / "scores.npz", lambda file: np.savez_compressed(file, **arrays, **prompt_arrays(pairs)))
        save(folder / "summary.json", lambda file: file.write(json.dumps(without_nan(summary), indent=1).encode()))
        if not args.no_plot:
            save(folder / "heatmaps.png", lambda file: draw_heatmaps(file, name, scores, pairs, args))
        print_table(name, summary, args)
        print(f"  written to {folder}/")
    for file in folder.glob(f"unfinished-{rank()}-*.npz"):
        file.unlink()
    return summary


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
    name: str, model, pairs: list[tasks.Pair], args: argparse.Namespace, folder: Path
) -> tuple[dict, dict, np.ndarray, dict]:
    """Every method on every pair, batch by batch; each process takes its share of a batch.

    Returns {(method, node): [n, layers, positions]} with NaN beyond a prompt's length, {node: the same, 1 where the two
    runs differ and 0 elsewhere}, the metric of both runs [n, 2], and {method: seconds}.
    """
    metric, longest = relp.METRICS[args.metric], max(len(p.original) for p in pairs)
    prompts, runs = batch_sizes(args.batch_size, model.config, longest, args.device)
    parts, begun, seconds = [], [], dict.fromkeys(args.methods, 0.0)
    with tqdm(
        total=len(pairs),
        desc=name,
        leave=False,
        disable=None if rank() == 0 else True,
        delay=2,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    ) as bar:
        for rows in batches(pairs, prompts * world()):
            mine, done = share(rows), bar.n
            batch = [
                torch.tensor([getattr(pairs[i], part) for i in mine], device=args.device)
                for part in ("original", "patch", "answers")
            ]
            *values, differs = relp.compare(model, *batch, args.nodes, metric)
            values, results = (
                torch.stack(values, dim=1),
                {("differs", node): where.float() for node, where in differs.items()},
            )
            for method in args.methods:
                bar.set_description(f"{name} {LABELS[method]}")
                began = time.perf_counter()
                if method == "ap":
                    pieces = Pieces.of(folder, begun, batch, values, args, runs)
                    begun.append(pieces.path)
                    scores = relp.activation_patching(
                        model,
                        *batch,
                        args.nodes,
                        metric,
                        rows=runs,
                        pieces=pieces,
                        progress=lambda part: bar.update(done + part * len(rows) - bar.n),
                        lockstep=args.shard,
                    )
                    seconds["ap"] += pieces.seconds_before
                else:
                    scores = relp.attribute(
                        model, *batch, args.nodes, metric, lrp=args.rules if method == "relp" else False
                    )
                results |= {(method, node): value.cpu() for node, value in scores.items()}
                seconds[method] += time.perf_counter() - began
            if not all(value.isfinite().all() for value in results.values()):
                raise ValueError(f"{name}: scores that are not finite in {args.dtype}; try --dtype float32")
            parts.append((mine, values.cpu().numpy(), {key: value.cpu().numpy() for key, value in results.items()}))
            bar.update(done + len(rows) - bar.n)

    values, scores = np.empty((len(pairs), 2)), {}
    for theirs, their_seconds in gathered((parts, seconds)):
        seconds = {method: max(seconds[method], their_seconds[method]) for method in seconds}
        for rows, value, results in theirs:
            values[rows] = value
            for key, result in results.items():
                whole = scores.setdefault(
                    key, np.full((len(pairs), model.config.n_layers, longest), np.nan, result.dtype)
                )
                whole[rows, :, : result.shape[2]] = result
    return (
        {key: scores[key] for key in scores if key[0] != "differs"},
        {node: scores["differs", node] for node in args.nodes},
        values,
        seconds,
    )


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


def correlations(scores: dict, differs: dict, groups: list[str], args: argparse.Namespace) -> dict:
    """{method: {node: relp.pcc with AP, and under "changed_cells" the same without the cells where the runs agree}}"""
    if "ap" not in args.methods:
        return {}
    result = {}
    for method in args.methods:
        for node in args.nodes if method != "ap" else ():
            pair = torch.tensor(scores[method, node]), torch.tensor(scores["ap", node])
            result.setdefault(method, {})[node] = {
                **relp.pcc(*pair, groups),
                "changed_cells": relp.pcc(*pair, groups, cells=torch.tensor(differs[node]) == 1),
            }
    return result


# ---------------------------------------------------------------------------------------------------------
# Output: the table, the files, the figures


def print_table(name: str, summary: dict, args: argparse.Namespace) -> None:
    accuracy, mean = summary["accuracy"], summary[args.metric]
    print(
        f"  right on {accuracy['original']:.0%} of the original and {accuracy['patch']:.0%} of the patch prompts; mean {args.metric} {mean['original']:+.3f} and {mean['patch']:+.3f}"
    )
    if min(accuracy.values()) < 0.75:
        print("  WARNING: this model does not do the task, so there is no behaviour here for the methods to explain")
    print(
        f"  {'PCC with AP' if summary['pcc'] else '':16}"
        + "".join(f"{node:>12}" for node in args.nodes)
        + f"{'seconds':>12}"
    )
    for method in args.methods:
        cells = [
            f"{summary['pcc'][method][node]['averaged']:12.3f}" if method in summary["pcc"] else f"{'':12}"
            for node in args.nodes
        ]
        print(f"  {LABELS[method]:16}" + "".join(cells) + f"{summary['seconds'][method]:12.2f}")
    if name in TABLE_5 and not args.prompts:
        for i, label in enumerate(("AtP, paper", "RelP, paper")):
            print(
                f"  {label:16}"
                + "".join(
                    f"{TABLE_5[name][node][i]:12.3f}" if node in TABLE_5[name] else " " * 12 for node in args.nodes
                )
            )


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


def draw_heatmaps(file, name: str, scores: dict, pairs: list[tasks.Pair], args: argparse.Namespace) -> None:
    """The paper's Figure 2: mean scores over layer and position; a row per method, a column per node kind."""
    from matplotlib.figure import Figure

    labels, at = overlay(pairs)

    def laid_over(values):
        maps = np.take_along_axis(
            values, np.broadcast_to(np.maximum(at, 0)[:, None], (len(pairs), values.shape[1], len(labels))), axis=2
        )
        return np.nanmean(np.where(at[:, None] >= 0, maps, np.nan), axis=0)

    order = [m for m in LABELS if m in args.methods]
    n_layers = next(iter(scores.values())).shape[1]
    figure = Figure(
        figsize=(1.2 + len(args.nodes) * (1.2 + 0.22 * len(labels)), 1.2 + len(order) * (0.7 + 0.16 * n_layers)),
        layout="constrained",
    )
    axes = figure.subplots(len(order), len(args.nodes), squeeze=False, sharex=True, sharey=True)
    for column, node in enumerate(args.nodes):
        maps = [laid_over(scores[method, node]) for method in order]
        top = np.abs(maps[0] if order[0] == "ap" else maps).max() or 1.0  # AP sets the scale: what exceeds it is wrong
        for ax, method, values in zip(axes[:, column], order, maps):
            image = ax.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", origin="lower")
            ax.set_title(f"{LABELS[method]}, {node}", fontsize=9)
            ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            ax.yaxis.get_major_locator().set_params(integer=True)
        axes[-1, column].set_xlabel("position")
        figure.colorbar(image, ax=axes[:, column], extend="both", shrink=0.8)
    for ax in axes[:, 0]:
        ax.set_ylabel("layer")
    shown = int((at[:, 0] >= 0).sum())
    figure.suptitle(
        f"{name}: change of {args.metric} when a node is patched, mean over {shown} of {len(pairs)} prompt pairs",
        fontsize=10,
    )
    figure.savefig(file, format="png", dpi=130)


def draw_pcc(file, summaries: list[dict], args: argparse.Namespace) -> None:
    """The paper's Figure 1: PCC with AP, a panel per node kind, bars for AtP and RelP side by side for each model."""
    from matplotlib.figure import Figure

    methods = [m for m in args.methods if m != "ap"]
    figure = Figure(figsize=(1.5 + len(args.nodes) * (1 + 0.5 * len(summaries)), 3.4), layout="constrained")
    for ax, node in zip(figure.subplots(1, len(args.nodes), sharey=True, squeeze=False)[0], args.nodes):
        for i, method in enumerate(methods):
            heights = [s["pcc"][method][node]["averaged"] for s in summaries]
            ax.bar(
                np.arange(len(summaries)) + (i - (len(methods) - 1) / 2) * 0.4,
                heights,
                0.38,
                label=LABELS[method],
                color={"atp": "#9aa0a6", "relp": "#1f6fb4"}[method],
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
    width = 10 * len(methods)
    print(f"\n{'PCC with AP':20}" + "".join(f"{node:>{width}}" for node in args.nodes))
    print(" " * 20 + "".join(f"{LABELS[m]:>10}" for m in methods) * len(args.nodes))
    for s in summaries:
        print(
            f"{s['model']:20}"
            + "".join(f"{s['pcc'][m][node]['averaged']:10.3f}" for node in args.nodes for m in methods)
        )


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
            summaries.append(evaluate(name, args))
        except torch.OutOfMemoryError:
            code = complain(ValueError(f"{name}: out of memory; try a smaller --batch-size, or --dtype bfloat16"))
        except (ValueError, OSError) as error:
            code, text = 2, models.first_line(error)
            if text not in said:  # a mistake in the prompts is said once, not once per model
                complain(ValueError(text if name in text else f"{name}: {text}"))
            said.add(text)
        if code and world() > 1:
            return code  # the other processes may be waiting for this one: torchrun ends them
    if len(summaries) > 1 and summaries[0]["pcc"] and rank() == 0:
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
        print("evaluate.py: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
