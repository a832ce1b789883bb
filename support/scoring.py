"""The loop that scores all prompt pairs with all methods, batch by batch."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import relp
from support.memory import BatchSize
from support.methods import AP, Method
from support.processes import gathered, rank, share, world
from support.progress import BAR
from support.prompts import batches, tensors
from tasks import Pair


@dataclass
class Batch:
    """Prompt pairs of one length."""

    pair_numbers: list[int]  # which of the pairs these are
    tokens: tuple[Tensor, Tensor, Tensor]  # original, patch [batch, pos], answers [batch, 2]
    values: Tensor  # the metric of both runs [batch, 2]
    differs: dict[str, Tensor]  # {node: bool [batch, layers, positions, ...]}, True where the two runs differ

    def part(self, here: slice) -> "Batch":
        tokens, differs = tuple(x[here] for x in self.tokens), {node: x[here] for node, x in self.differs.items()}
        return Batch(self.pair_numbers[here], tokens, self.values[here], differs)


@dataclass
class Scores:
    """What all methods say of n pairs: NaN beyond a prompt's length."""

    scores: dict[tuple[str, str], np.ndarray]  # {(method, node): [n, layers, positions, ...]}
    differs: dict[str, np.ndarray]  # {node: the same, 1 where the two runs differ and 0 elsewhere}
    values: np.ndarray  # the metric of both runs [n, 2]
    seconds: dict[str, float]  # by method


def joined(parts: Iterable[tuple[Sequence, dict]]) -> dict:
    """{key: tensor [batch, ...]} of a whole batch, from (part, {key: tensor}) of its parts."""
    results = [result for _, result in parts]
    return {key: torch.cat([result[key] for result in results]) for key in results[0]}


def on_a_few(compute: Callable, model, pairs: list[Pair], device: torch.device, batch_size: BatchSize) -> object:
    """compute(original, patch, answers) of up to four pairs of one length; of fewer if these do not fit in memory."""
    few = next(batches(pairs, 4))
    prompts, _ = batch_size.chosen(model, len(pairs[few[0]].original), device)
    parts = batch_size.in_parts(few, lambda part, _: compute(*tensors([pairs[i] for i in part], device)), prompts)
    return next(parts)[1]


def patch_all(
    model,
    batch: Batch,
    nodes: list[str],
    metric: Callable,
    batch_size: BatchSize,
    rows: int,
    pieces: dict | None = None,
    **how,
) -> dict:
    """AP of every node, layer and position. Positions that are finished stay so if the next one runs out of memory."""
    pieces = {} if pieces is None else pieces
    patch = partial(relp.activation_patching, model, *batch.tokens, nodes, metric, pieces=pieces, **how)
    while True:
        fits, scores = batch_size.attempt(partial(patch, rows=rows))
        if fits:
            return scores
        if not pieces or rows == 1:  # too many prompts, perhaps: score_pairs() tries fewer
            raise MemoryError
        batch_size.say(f"{rows} patched runs")
        rows = batch_size.most_runs = rows // 2


def score_pairs(
    title: str,
    model,
    pairs: list[Pair],
    methods: list[Method],
    nodes: list[str],
    metric: Callable,
    device: torch.device,
    batch_size: BatchSize,
    lockstep: bool = False,
    run_ap: Callable = patch_all,
) -> Scores:
    """The methods on every pair; each process takes its share of a batch. ValueError if a score is not finite.

    run_ap  the function that does AP, if that is among the methods: patch_all() or another with its arguments
    """
    longest = max(len(p.original) for p in pairs)
    prompts, runs = batch_size.chosen(model, longest, device)
    parts, seconds = [], {method.name: 0.0 for method in methods}
    off = None if rank() == 0 else True  # None: on in a terminal only
    with tqdm(total=len(pairs), leave=False, disable=off, delay=2, bar_format=BAR) as bar:
        for numbers in batches(pairs, prompts * world()):
            mine, done = share(numbers), bar.n
            tokens, rows = tensors([pairs[i] for i in mine], device), range(len(mine))

            def compared(part, _, tokens=tokens):
                here = (x[part.start : part.stop] for x in tokens)
                value, patch_value, differs = relp.compare(model, *here, nodes, metric)
                return {"values": torch.stack([value, patch_value], dim=1)} | differs

            differs = joined(batch_size.in_parts(rows, compared, prompts))
            batch = Batch(mine, tokens, differs.pop("values"), differs)
            results = {("differs", node): where.float() for node, where in differs.items()}

            def scored(part, runs, method, batch=batch, done=done, numbers=numbers):
                here = batch.part(slice(part.start, part.stop))
                if method is not AP:
                    return method.scores(model, *here.tokens, nodes, metric)

                def progress(fraction):
                    rows_done = part.start + fraction * len(part)
                    bar.update(done + rows_done * len(numbers) / len(batch.pair_numbers) - bar.n)

                how = {"rows": runs, "batch_size": batch_size, "lockstep": lockstep, "progress": progress}
                return run_ap(model, here, nodes, metric, **how)

            for method in methods:
                bar.set_description_str(f"{title} {method.label}")
                began = time.perf_counter()
                compute, n_runs = partial(scored, method=method), runs if method is AP else 1
                scores = joined(batch_size.in_parts(rows, compute, prompts, n_runs))
                results |= {(method.name, node): value.cpu() for node, value in scores.items()}
                seconds[method.name] += time.perf_counter() - began
            check_finite(title, [batch.values, *results.values()], model)
            values = batch.values.cpu().numpy()
            parts.append((mine, values, {key: value.cpu().numpy() for key, value in results.items()}))
            bar.update(done + len(numbers) - bar.n)

    values, whole = np.empty((len(pairs), 2), parts[0][1].dtype), {}
    for theirs, their_seconds in gathered((parts, seconds)):
        seconds = {name: max(seconds[name], their_seconds[name]) for name in seconds}
        for numbers, value, results in theirs:
            values[numbers] = value
            for key, result in results.items():
                shape = len(pairs), result.shape[1], longest, *result.shape[3:]
                array = whole.setdefault(key, np.full(shape, np.nan, result.dtype))
                array[numbers, :, : result.shape[2]] = result
    differs = {node: whole.pop(("differs", node)) for node in nodes}
    return Scores(whole, differs, values, seconds)


def right(
    model, pairs: list[Pair], values: Tensor, metric: Callable, device: torch.device, batch_size: BatchSize
) -> Tensor:
    """Does each run, the original and the patch run, prefer its own answer? bool [n, 2]; values: the metric of both.

    Every metric but kl says so by its sign.
    """
    if metric is relp.kl:
        values, longest = torch.empty_like(values), max(len(p.original) for p in pairs)
        prompts, _ = batch_size.chosen(model, longest, device)

        def logit_diffs(part, _):
            return torch.stack(relp.compare(model, *tensors([pairs[i] for i in part], device), ())[:2], dim=1)

        for numbers in batches(pairs, min(64, prompts)):
            for part, of_part in batch_size.in_parts(numbers, logit_diffs, prompts):
                values[part] = of_part.to(values)
    return torch.stack([values[:, 0] > 0, values[:, 1] < 0], dim=1)


@torch.no_grad()
def rounding(model, original: Tensor, patch: Tensor, answers: Tensor, metric: Callable) -> float:
    """How far the metric moves, on average, if each layer's stream is off by one rounding of the model's dtype."""
    eps, generator = torch.finfo(model.embed_tokens.weight.dtype).eps, torch.Generator().manual_seed(0)

    def hook(name, layer, x):
        error = eps * (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5).to(x.device)
        return (x.double() * (1 + error)).to(x.dtype)

    hook.nodes = ("resid_post",)
    answers = relp.targets(model, model.stream(patch), answers, metric)
    values = [relp.read_out(model, model.stream(original, hook=h), answers, metric) for h in (None, hook)]
    return float((values[0] - values[1]).abs().mean())


def drowned(scores: dict[str, np.ndarray], error: float) -> list[str]:
    """Those of the nodes {node: scores [n, ...]} whose scores, where they are not 0, vary by less than ten errors."""
    there = {node: of_node[(of_node != 0) & ~np.isnan(of_node)] for node, of_node in scores.items()}
    return [node for node, values in there.items() if values.size and values.std() < 10 * error]


def check_finite(title: str, values: list[Tensor], model) -> None:
    if not all(value.isfinite().all() for value in values):
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        raise ValueError(f"{title}: scores that are not finite in {dtype}; try --dtype float32")
