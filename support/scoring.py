"""The methods, and the loop that scores all prompt pairs with them, batch by batch."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import relp
from models import Rules, Transformer
from support import resume
from support.processes import gathered, rank, share, world
from support.prompts import batches, tensors
from support.results import Store
from support.try_out import try_out
from tasks import Pair

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
LIKELY = 5  # next tokens of each run that are written down
OUT_OF_MEMORY = "out of memory; try a smaller --batch-size, shorter prompts, or --dtype bfloat16"


@dataclass(frozen=True)
class Method:
    """One way of scoring nodes.

    name       in the command and in the files
    label      in tables and figures
    lrp        the rules that are on, as relp.attribute takes them
    steps      of Integrated Gradients
    attribute  a function (model, original, patch, targets, nodes, metric) -> scores to use instead of relp.attribute
    rho        likewise, instead of relp.activations_and_rho, for features; None where a method has none for these
    mean_of    ((weight, Method), ...): this one is their weighted mean
    """

    name: str
    label: str
    lrp: bool | Rules = False
    steps: int | None = None
    attribute: Callable | None = None
    rho: Callable | None = None
    mean_of: tuple[tuple[float, "Method"], ...] = ()

    def scores(self, model, original, patch, targets, nodes, metric=relp.logit_diff) -> dict[str, Tensor]:
        """{node: [batch, layer, pos, ...]}"""
        if self.mean_of:
            each = [(w, m.scores(model, original, patch, targets, nodes, metric)) for w, m in self.mean_of]
            return {node: sum(w * scores[node] for w, scores in each) for node in nodes}
        if self.attribute:
            return self.attribute(model, original, patch, targets, nodes, metric)
        return relp.attribute(model, original, patch, targets, nodes, metric, self.lrp, self.steps)

    def activations_and_rho(self, model, original, patch, targets, nodes, metric=relp.logit_diff) -> tuple:
        if self.mean_of:
            each = [(w, m.activations_and_rho(model, original, patch, targets, nodes, metric)) for w, m in self.mean_of]
            acts, patch_acts, _ = each[0][1]
            return acts, patch_acts, {key: sum(w * rho[key] for w, (*_, rho) in each) for key in acts}
        if self.rho:
            return self.rho(model, original, patch, targets, nodes, metric)
        return relp.activations_and_rho(model, original, patch, targets, nodes, metric, self.lrp, self.steps)

    def passes(self, n_nodes: int) -> tuple[int, int]:
        """Forward and backward passes for one pair, n_nodes in all layers; of AP only those of the two runs."""
        if self.mean_of:
            return tuple(map(sum, zip(*(m.passes(n_nodes) for _, m in self.mean_of))))
        if self.steps:  # IG moves each node by itself
            return 2 + self.steps * n_nodes, self.steps * n_nodes
        return 2, 0 if self.attribute and not self.rho else 1


AP = Method("ap", "AP", attribute=resume.activation_patching)
ATP = Method("atp", "AtP")


def main_method(names: list[str]) -> str:
    """The method that others are compared with: RelP, or else the first that is not AP."""
    return "relp" if "relp" in names else next((name for name in names if name != "ap"), "ap")


# ---------------------------------------------------------------------------------------------------------------------
# All pairs, all methods


@dataclass
class Scores:
    """What all methods say of n pairs: NaN beyond a prompt's length."""

    scores: dict[tuple[str, str], np.ndarray]  # {(method, node): [n, layers, positions, ...]}
    values: np.ndarray  # the metric of the original and the patch run [n, 2]
    right: np.ndarray  # does each run prefer its own answer? [n, 2]
    likely: np.ndarray  # the LIKELY likeliest next tokens of the original run, then those of the patch run [n, ...]
    chances: np.ndarray  # their probabilities
    seconds: dict[str, float]  # by method; AP's include those of the runs that it is taken from


def score_pairs(
    title: str,
    model: Transformer,
    pairs: list[Pair],
    methods: list[Method],
    nodes: list[str],
    metric: str | Callable = "logit_diff",
    batch_size: int | None = None,
    out: str | None = None,
    shard: bool = False,
) -> Scores:
    """The methods on every pair. ValueError if a score is not finite.

    out    the folder of AP's store; None: AP is not kept, nor is it for a metric that is a function
    shard  the processes share the weights as well, and must make the same calls
    """
    device, longest = model.embed_tokens.weight.device, max(len(pair.original) for pair in pairs)
    store = Store(out, model, nodes, metric) if out and AP in methods and isinstance(metric, str) else None
    seconds = {method.name: 0.0 for method in methods}
    off = None if rank() == 0 else True  # None: on in a terminal only
    bar = tqdm(total=len(pairs) * len(methods), leave=False, disable=off, delay=2, bar_format=BAR)

    original, patch, answers = tensors(pairs[:1], device)
    first = two_runs(model, original, patch, answers, metric)
    targets = first.pop("targets")
    check_finite(title, first, model)
    for lrp in dict.fromkeys(m.lrp != Rules() and m.lrp for m in methods if m is AP or not m.attribute):
        try_out(model, original, patch, targets, nodes, metric, lrp)

    def score(numbers: list[int], rows: int) -> dict:
        """{what: [batch, ...]} of one batch: "values", "right", and (method, node)."""
        here = [pairs[i] for i in numbers]
        original, patch, answers = tensors(here, device)
        result = two_runs(model, original, patch, answers, metric)
        targets = result.pop("targets")
        for method in methods:
            bar.set_description_str(f"{title} {method.label}")
            began, done = time.perf_counter(), bar.n
            if method is AP:

                def progress(fraction, done=done):
                    bar.update(done + fraction * len(here) * world() - bar.n)

                scores, earlier = patch_pairs(model, here, targets, nodes, metric, rows, store, shard, progress)
                seconds["ap"] += earlier
            else:
                scores = method.scores(model, original, patch, targets, nodes, metric)
            result |= {(method.name, node): scores[node].cpu() for node in nodes}
            seconds[method.name] += time.perf_counter() - began
            bar.update(done + len(here) * world() - bar.n)
        check_finite(title, result, model)
        return {what: value.cpu().numpy() for what, value in result.items()}

    with bar:
        mine = list(by_batch(model, pairs, score, batch_size))

    everybody = gathered((mine, seconds))
    whole = joined([part for parts, _ in everybody for part in parts], len(pairs), longest)
    seconds = {name: max(of_one[name] for _, of_one in everybody) for name in seconds}
    of_runs = {what: whole.pop(what) for what in ("values", "right", "likely", "chances")}
    return Scores(scores=whole, seconds=seconds, **of_runs)


def joined(parts: list[tuple[list[int], dict]], n: int, longest: int) -> dict:
    """All batches in one array, {what: [n, ...]}, from (pair numbers, {what: [batch, ...]}) of each."""
    whole = {}
    for numbers, result in parts:
        for what, part in result.items():
            if part.ndim > 2:  # [batch, layer, pos, ...]
                shape = (n, part.shape[1], longest, *part.shape[3:])
                whole.setdefault(what, np.full(shape, np.nan, part.dtype))[numbers, :, : part.shape[2]] = part
            else:
                whole.setdefault(what, np.zeros((n, part.shape[1]), part.dtype))[numbers] = part
    return whole


@torch.no_grad()
def two_runs(model: Transformer, original: Tensor, patch: Tensor, answers: Tensor, metric: str | Callable) -> dict:
    """Of the original and the patch run, [batch, 2]: the metric's "values", and is its own answer preferred ("right")?

    "targets": what the metric compares the logits with: for kl the patch run's logits, else the answers. "likely" and
    "chances": see Scores.
    """
    logits = [model.unembed(model.stream(tokens)[:, -1]) for tokens in (original, patch)]
    metric = relp.METRICS.get(metric, metric)
    targets = logits[1] if metric is relp.kl else answers
    prefers = [relp.logit_diff(x, answers) for x in logits]
    first = torch.stack(logits, dim=1).float().softmax(-1).topk(min(LIKELY, logits[0].shape[-1]))
    return {
        "values": torch.stack([metric(x, targets) for x in logits], dim=1),
        "right": torch.stack([prefers[0] > 0, prefers[1] < 0], dim=1).float(),
        "likely": first.indices.flatten(1),
        "chances": first.values.flatten(1),
        "targets": targets,
    }


def check_finite(title: str, values: dict, model: Transformer) -> None:
    if not all(value.isfinite().all() for value in values.values()):
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        advice = "are all weights finite?" if dtype in ("float32", "float64") else "try --dtype float32"
        raise ValueError(f"{title}: scores that are not finite in {dtype}; {advice}")


# ---------------------------------------------------------------------------------------------------------------------
# AP


def patch_pairs(
    model: Transformer,
    pairs: list[Pair],
    targets: Tensor,
    nodes: list[str],
    metric: str | Callable,
    rows: int,
    store: Store | None = None,
    shard: bool = False,
    progress: Callable | None = None,
) -> tuple[dict[str, Tensor], float]:
    """AP's scores of pairs of one length, and the seconds that it took earlier to find those in the store."""
    known = [store.get(pair) if store else None for pair in pairs]
    new = [i for i, found in enumerate(known) if found is None]
    if shard and any(gathered(len(new))):
        new = range(len(pairs))
    earlier = sum(float(found["seconds"]) for i, found in enumerate(known) if i not in new)
    if new:
        began = time.perf_counter()
        original, patch, _ = tensors([pairs[i] for i in new], targets.device)
        run = patch_every_cell if shard else resume.activation_patching
        scores = run(model, original, patch, targets[new], nodes, metric, rows=rows, progress=progress)
        seconds = torch.tensor((time.perf_counter() - began) / len(new))
        for j, i in enumerate(new):
            known[i] = {node: x[j].cpu() for node, x in scores.items()} | {"seconds": seconds}
            if store:
                store.put(pairs[i], known[i])
    return {node: torch.stack([found[node] for found in known]) for node in nodes}, earlier


def patch_every_cell(
    model: Transformer, original: Tensor, patch: Tensor, targets: Tensor, nodes, metric, **how
) -> dict:
    """AP as resume.activation_patching() finds it, but also run where the two runs agree, so that no call depends on
    the prompts: processes that share weights must make the same calls.
    """
    acts, patch_acts = (relp.record(model, tokens, nodes)[1] for tokens in (original, patch))
    changed = relp.by_node({key: resume.changed(acts[key], patch_acts[key]) for key in acts}, nodes)
    cells = {node: torch.ones_like(x) for node, x in changed.items()}
    scores = resume.activation_patching(model, original, patch, targets, nodes, metric, cells=cells, **how)
    return {node: x.where(changed[node], 0) for node, x in scores.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Batches that fit into memory


def by_batch(
    model: Transformer, pairs: list[Pair], compute: Callable, batch_size: int | None = None, most: int = sys.maxsize
) -> Iterator[tuple[list[int], object]]:
    """(pair numbers, compute(pair numbers, rows)) for batches of pairs of one length; each process gets its share.

    batch_size  pairs, and patched runs (rows), that go through the model together. None: as many as should fit, up to
                `most` pairs
    """
    size, rows = (batch_size, batch_size) if batch_size else auto_size(model, max(len(p.original) for p in pairs))
    for numbers in batches(pairs, min(size, most) * world()):
        mine = share(numbers)
        yield mine, compute(mine, rows)


def auto_size(model: Transformer, length: int) -> tuple[int, int]:
    """How many prompts of this length, and how many patched runs, fit: the same numbers in all processes.

    As many as fit, with their graph, into a quarter of a GPU's free memory, or into 2 GiB on a CPU. Of patched runs few
    are fastest on a CPU: those that stay in its cache.
    """
    c, weight = model.config, model.embed_tokens.weight
    memory, fastest = 2**31, 2**9
    if weight.is_cuda:
        unused = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)  # by PyTorch
        memory, fastest = (torch.cuda.mem_get_info(weight.device)[0] + unused) // 4, 2**16
    per_token = max(4, weight.element_size()) * (20 * c.d_model + 8 * c.d_mlp + 4 * c.n_heads * length)  # of one layer
    runs = max(1, memory // (per_token * length))
    mine = max(1, runs // c.n_layers), min(runs, max(1, fastest // length))
    return tuple(map(min, zip(*gathered(mine))))


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
