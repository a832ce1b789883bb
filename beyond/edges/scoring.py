"""The edge scores of many prompt pairs by several methods: the loop over batches, and what is kept of them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from beyond.edges.graph import Graph
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from models import Transformer
from support.circuits import Cost, Counted
from support.memory import BatchSize
from support.methods import AP, Method
from support.positions import overlay
from support.progress import BAR
from support.prompts import batches, tensors
from support.scoring import check_finite
from tasks import Pair

MOST = 2**28  # numbers of one kind that are kept, 1 GiB in float32; if there are more, only their means are


@dataclass
class EdgeScores:
    """A method's scores of the edges, which are in the order of graph.names.

    whole        [pairs, edges]: for AP, all positions are patched at once; for others, the sum over the positions. If
                 there are too many numbers, the mean over the pairs, [1, edges]
    by_position  [pairs, t, edges], NaN beyond a prompt's length; None if these are too many, or not known
    roles        [roles, edges]: the mean over the pairs at the positions of one role; None if not known by position
    """

    whole: Tensor
    by_position: Tensor | None
    roles: np.ndarray | None

    @property
    def mean(self) -> Tensor:
        return self.whole.double().mean(0)


class Collected:
    """What is collected of one method's scores while the batches go by.

    at  [pairs, roles]: the position of each role in each pair, or -1
    """

    def __init__(self, n_edges: int, longest: int, at: np.ndarray):
        self.n_edges, self.longest, self.at = n_edges, longest, at
        self.whole = self.by_position = self.roles = None

    def add(self, numbers: list[int], whole: Tensor, by_position: Tensor | None) -> None:
        """The scores of these pairs: [b, edges] and, if they are known by position, [b, t, edges]."""
        n = len(self.at)
        if self.whole is None:
            keeps = n * self.n_edges <= MOST
            self.whole = whole.new_zeros(n, self.n_edges) if keeps else whole.new_zeros(1, self.n_edges).double()
            if by_position is not None:
                self.roles = np.zeros((self.at.shape[1], self.n_edges))
                if n * self.n_edges * self.longest <= MOST:
                    self.by_position = whole.new_full((n, self.longest, self.n_edges), torch.nan)
        if len(self.whole) == n:
            self.whole[numbers] = whole
        else:
            self.whole += whole.double().sum(0) / n
        if self.by_position is not None:
            self.by_position[numbers, : by_position.shape[1]] = by_position
        if self.roles is not None:
            at = self.at[numbers]
            placed = by_position.numpy()[np.arange(len(at))[:, None], np.maximum(at, 0)]  # [b, roles, edges]
            self.roles += np.where(at[..., None] >= 0, placed, 0).sum(0, dtype=np.float64)

    def scores(self) -> EdgeScores:
        counts = (self.at >= 0).sum(0)[:, None]
        return EdgeScores(self.whole, self.by_position, None if self.roles is None else self.roles / counts)


def score_edges(
    title: str,
    model: Transformer,
    pairs: list[Pair],
    methods: list[Method],
    metric: Callable,
    device: torch.device,
    batch_size: BatchSize,
    only: Tensor | None = None,
) -> tuple[dict[str, EdgeScores], dict[str, Cost]]:
    """The methods on every pair, and what each has cost; its passes are those of one batch, AP's those of one pair.

    model  one in which each head has a key and a value of its own: see graph.ungrouped
    only   bool [writers, readers]: exact patching of these edges only, and of whole edges only
    """
    there, longest = Graph.of(model.config).edges.to(device), max(len(p.original) for p in pairs)
    positions = longest * there.numel() <= MOST and only is None  # else one pair's scores by position do not fit
    size, rows = sizes(batch_size, model, longest, device, positions)
    collected = {m.name: Collected(int(there.sum()), longest, overlay(pairs)[1]) for m in methods}
    costs = {}
    with tqdm(total=len(pairs), leave=False, disable=None, delay=2, bar_format=BAR) as bar:
        for numbers in batches(pairs, size):
            done = bar.n

            def scored(part, runs, m, numbers=numbers, done=done):
                tokens = tensors([pairs[i] for i in part], device)
                if m is not AP:
                    return score_batch(model, tokens, m, metric, positions, costs)

                def progress(fraction):
                    bar.update(done + numbers.index(part[0]) + fraction * len(part) - bar.n)

                how = {"only": only, "rows": runs, "progress": progress}
                return patch_batch(model, tokens, metric, positions, costs, how)

            for m in methods:
                bar.set_description_str(f"{title} {m.label}")
                compute, n_runs = partial(scored, m=m), rows if m is AP else 1
                for part, (whole, by_position) in batch_size.in_parts(numbers, compute, size, n_runs):
                    check_finite(title, [whole], model)
                    by_position = by_position[..., there].cpu() if positions else None
                    collected[m.name].add(part, whole[:, there].cpu(), by_position)
            bar.update(done + len(numbers) - bar.n)
    for cost in costs.values():  # sums over the pairs so far
        cost.forward, cost.backward = cost.forward / len(pairs), cost.backward / len(pairs)
    return {name: of.scores() for name, of in collected.items()}, costs


def patch_batch(
    model, tokens, metric, positions: bool, costs: dict[str, Cost], how: dict
) -> tuple[Tensor, Tensor | None]:
    """Exact patching of whole edges, [b, writers, readers], and, if asked, by position, [b, t, writers, readers]."""

    found, spent = {}, {}
    for name in ("ap", "ap_positions")[: 1 + positions]:
        began = time.perf_counter()
        found[name], runs = patch_edges(model, *tokens, metric, by_position=name == "ap_positions", **how)
        spent[name] = runs, time.perf_counter() - began
    for name, (runs, seconds) in spent.items():  # here, since either may have run out of memory
        cost = costs.setdefault(name, Cost())
        cost.forward += runs
        cost.seconds += seconds
    return found["ap"], found.get("ap_positions")


def score_batch(
    model, tokens, m: Method, metric, positions: bool, costs: dict[str, Cost]
) -> tuple[Tensor, Tensor | None]:
    """A method's scores, summed over the positions and, if asked, by position: shapes as in patch_batch()."""
    began, cost, counted = time.perf_counter(), costs.setdefault(m.name, Cost()), Counted(model)
    scores = attribute_edges(counted, *tokens, metric, by_position=positions, **m.options)
    cost.forward += counted.forward * len(tokens[0])
    cost.backward += counted.backward * len(tokens[0])
    cost.seconds += time.perf_counter() - began
    return (scores.sum(1), scores) if positions else (scores, None)


def sizes(
    batch_size: BatchSize, model: Transformer, length: int, device: torch.device, by_position: bool
) -> tuple[int, int]:
    """How many pairs, and how many edited runs, go through the model together.

    auto: fewer pairs than for nodes, so that the streams of a layer's readers, some ten times, and the scores, twice,
    are at most 2^29 numbers (2 GiB in float32). On a CPU few are also fastest: their streams are at most 2^23 numbers.
    """
    prompts, rows = batch_size.chosen(model, length, device)
    if batch_size.given != "auto":
        return prompts, rows
    c, graph = model.config, Graph.of(model.config)
    streams = (3 * c.n_heads + 1) * length * c.d_model
    scores = len(graph.writers) * len(graph.readers) * (length if by_position else 1)
    most = min(2**29 // (10 * streams + 2 * scores), prompts if device.type == "cuda" else 2**23 // streams)
    return max(1, min(prompts, most)), rows
