"""The edge scores of many prompt pairs by several methods: the loop over batches, and what is kept of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from beyond.edges.graph import Graph
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from models import Config, Transformer
from support.circuits import Cost, Counted
from support.methods import AP, Method
from support.positions import overlay
from support.progress import BAR
from support.scoring import batch_sizes, batches, check_finite, tensors
from tasks import Pair

MOST = 2**28  # numbers of one kind that are kept, 1 GiB in float32; if there are more, only their means are


@dataclass
class EdgeScores:
    """A method's scores of the edges; these are in the order of graph.edges.nonzero().

    whole        [pairs, edges]: for AP, all positions are patched at once; for others, the sum over the positions
    by_position  [pairs, t, edges], NaN beyond a prompt's length; None if that were too many numbers
    roles        [roles, edges]: the mean over the pairs at the positions of one role; None if not known by position
    """

    whole: Tensor
    by_position: Tensor | None
    roles: np.ndarray | None

    @property
    def mean(self) -> Tensor:
        return self.whole.double().mean(0)


@dataclass
class Kept:
    """What is collected of one method while the batches go by."""

    whole: list[Tensor] = field(default_factory=list)
    by_position: list[Tensor] = field(default_factory=list)
    roles: np.ndarray | None = None


def score_edges(
    title: str,
    model: Transformer,
    pairs: list[Pair],
    methods: list[Method],
    metric: Callable,
    device: torch.device,
    batch_size: str,
    only: Tensor | None = None,
) -> tuple[dict[str, EdgeScores], dict[str, Cost]]:
    """The methods on every pair, and what each has cost; its passes are those of one batch, AP's those of one pair.

    model  one in which each head has a key and a value of its own: see graph.ungrouped
    only   bool [writers, readers]: exact patching of these edges only
    """
    graph = Graph.of(model.config)
    there, n = graph.edges.to(device), int(graph.edges.sum())
    longest = max(len(p.original) for p in pairs)
    labels, at = overlay(pairs)
    fits = longest * there.numel() <= MOST  # the scores of one pair by position
    each = len(pairs) * n <= MOST
    each_position = each and len(pairs) * n * longest <= MOST
    size, rows = sizes(batch_size, model.config, longest, device, fits)
    every = list(batches(pairs, size))
    kept, costs = {m.name: Kept() for m in methods}, {}
    with tqdm(total=len(pairs), leave=False, disable=None, delay=2, bar_format=BAR) as bar:
        for numbers in every:
            tokens, done = tensors([pairs[i] for i in numbers], device), bar.n

            def progress(part, done=done, numbers=numbers):
                bar.update(done + part * len(numbers) - bar.n)

            for m in methods:
                bar.set_description_str(f"{title} {m.label}")
                if m is AP:
                    how = {"only": only, "rows": rows, "progress": progress}
                    whole, by_position = patch_batch(model, tokens, metric, fits and only is None, costs, how)
                else:
                    whole, by_position = score_batch(model, tokens, m, metric, fits, costs)
                check_finite(title, [whole], model)
                keep(kept[m.name], whole[:, there].cpu(), each)
                if by_position is not None:
                    keep_positions(kept[m.name], by_position[..., there].cpu(), at[numbers], longest, each_position)
            bar.update(done + len(numbers) - bar.n)
    for name, cost in costs.items():  # sums over the batches so far
        part = len(pairs) if name.startswith("ap") else len(every)
        cost.forward, cost.backward = cost.forward / part, cost.backward / part
    order = torch.tensor([i for numbers in every for i in numbers]).argsort()
    counts = (at >= 0).sum(0)[:, None]
    result = {}
    for name, of in kept.items():
        whole = torch.cat(of.whole)[order] if each else sum(of.whole) / len(pairs)
        by_position = torch.cat(of.by_position)[order] if of.by_position else None
        result[name] = EdgeScores(whole, by_position, None if of.roles is None else of.roles / counts)
    return result, costs


def patch_batch(model, tokens, metric, positions: bool, costs: dict[str, Cost], how: dict):
    """Exact patching at all positions together and, if asked, at each: [b, writers, readers], [b, t, ...] or None."""
    results = []
    for name, by_position in (("ap", False), ("ap_positions", True))[: 1 + positions]:
        began, cost = time.perf_counter(), costs.setdefault(name, Cost())
        scores, runs = patch_edges(model, *tokens, metric, by_position=by_position, **how)
        cost.forward += runs
        cost.seconds += time.perf_counter() - began
        results.append(scores)
    return results if positions else (*results, None)


def score_batch(model, tokens, m: Method, metric, positions: bool, costs: dict[str, Cost]):
    """A method's scores, summed over the positions and, if they fit into memory, at each: as patch_batch()."""
    began, cost, counted = time.perf_counter(), costs.setdefault(m.name, Cost()), Counted(model)
    scores = attribute_edges(counted, *tokens, metric, m.lrp or False, m.steps, by_position=positions)
    cost.forward += counted.forward
    cost.backward += counted.backward
    cost.seconds += time.perf_counter() - began
    return (scores.sum(1), scores) if positions else (scores, None)


def keep(kept: Kept, whole: Tensor, each: bool) -> None:
    kept.whole = [*kept.whole, whole] if each else [sum(kept.whole) + whole.double().sum(0, keepdim=True)]


def keep_positions(kept: Kept, scores: Tensor, at: np.ndarray, longest: int, each: bool) -> None:
    """scores: [b, t, edges]; at: [b, roles], the position of each role in each of these pairs, or -1."""
    if each:
        padding = (0, 0, 0, longest - scores.shape[1])
        kept.by_position.append(torch.nn.functional.pad(scores, padding, value=torch.nan))
    placed = scores.numpy()[np.arange(len(at))[:, None], np.maximum(at, 0)]  # [b, roles, edges]
    placed = np.where(at[..., None] >= 0, placed, 0).sum(0, dtype=np.float64)
    kept.roles = placed if kept.roles is None else kept.roles + placed


def sizes(given: str, c: Config, length: int, device: torch.device, by_position: bool) -> tuple[int, int]:
    """How many pairs, and how many edited runs, go through the model together.

    auto: fewer pairs than for nodes, so that the streams of a layer's readers, and the scores, fit into memory too. On
    a CPU few are also fastest.
    """
    prompts, rows = batch_sizes(given, c, length, device)
    if given != "auto":
        return prompts, rows
    graph = Graph.of(c)
    streams = (3 * c.n_heads + 1) * length * c.d_model
    scores = len(graph.writers) * len(graph.readers) * (length if by_position else 1)
    most = min(2**29 // (10 * streams + 2 * scores), prompts if device.type == "cuda" else 2**23 // streams)
    return max(1, min(prompts, most)), rows
