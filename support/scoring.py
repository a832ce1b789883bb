"""The loop that scores all prompt pairs with all methods, batch by batch."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import relp
from models import Config
from support.methods import Method
from support.processes import gathered, rank, share, world
from support.progress import BAR
from tasks import Pair


@dataclass
class Batch:
    """Prompt pairs of one length."""

    pair_numbers: list[int]  # which of the pairs these are
    tokens: tuple[Tensor, Tensor, Tensor]  # original, patch [batch, pos], answers [batch, 2]
    values: Tensor  # the metric of both runs [batch, 2]
    differs: dict[str, Tensor]  # {node: bool [batch, layers, positions, ...]}, True where the two runs differ


@dataclass
class Scores:
    """What all methods say of n pairs: NaN beyond a prompt's length."""

    scores: dict[tuple[str, str], np.ndarray]  # {(method, node): [n, layers, positions, ...]}
    differs: dict[str, np.ndarray]  # {node: the same, 1 where the two runs differ and 0 elsewhere}
    values: np.ndarray  # the metric of both runs [n, 2]
    seconds: dict[str, float]  # by method


def tensors(pairs: list[Pair], device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """original, patch and answers of pairs of one length."""
    parts = ([getattr(p, part) for p in pairs] for part in ("original", "patch", "answers"))
    return tuple(torch.tensor(part, device=device) for part in parts)


def batches(pairs: list[Pair], size: int) -> Iterator[list[int]]:
    """Lists of at most `size` pair numbers whose prompts have one length."""
    lengths = [len(p.original) for p in pairs]
    for length in dict.fromkeys(lengths):
        numbers = [i for i, other in enumerate(lengths) if other == length]
        yield from (numbers[i : i + size] for i in range(0, len(numbers), size))


def batch_sizes(given: str, c: Config, length: int, device: torch.device) -> tuple[int, int]:
    """How many prompts, and how many patched runs, go through the model together.

    auto: as many as fit, with their graph, into a quarter of a GPU's free memory, or into 2 GiB on a CPU. Of patched
    runs, few are fastest on a CPU: those that stay in its cache.
    """
    if given != "auto":
        return int(given), int(given)
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 2**31
    per_token = 4 * (20 * c.d_model + 8 * c.d_mlp + 4 * c.n_heads * length)  # bytes of one layer's activations
    runs = max(1, memory // (per_token * length))
    fastest = max(1, (2**16 if device.type == "cuda" else 2**9) // length)
    return max(1, runs // c.n_layers), min(runs, fastest)


def patch_all(model, batch: Batch, nodes: list[str], metric: Callable, **how) -> dict:
    """AP of every node, layer and position."""
    return relp.activation_patching(model, *batch.tokens, nodes, metric, **how)


def score_pairs(
    title: str,
    model,
    pairs: list[Pair],
    methods: list[Method],
    nodes: list[str],
    metric: Callable,
    device: torch.device,
    batch_size: str = "auto",
    lockstep: bool = False,
    run_ap: Callable = patch_all,
) -> Scores:
    """The methods on every pair; each process takes its share of a batch. ValueError if a score is not finite.

    run_ap  the function that does AP, if that is among the methods: patch_all() or another with its arguments
    """
    longest = max(len(p.original) for p in pairs)
    mine = batch_sizes(batch_size, model.config, longest, device)
    prompts, runs = map(min, zip(*gathered(mine)))  # GPUs may have unequal memory, and batches must be equal
    parts, seconds = [], {method.name: 0.0 for method in methods}
    off = None if rank() == 0 else True  # None: on in a terminal only
    with tqdm(total=len(pairs), leave=False, disable=off, delay=2, bar_format=BAR) as bar:
        for numbers in batches(pairs, prompts * world()):
            mine, done = share(numbers), bar.n
            tokens = tensors([pairs[i] for i in mine], device)
            value, patch_value, differs = relp.compare(model, *tokens, nodes, metric)
            batch = Batch(mine, tokens, torch.stack([value, patch_value], dim=1), differs)
            results = {("differs", node): where.float() for node, where in differs.items()}

            def progress(part, done=done, numbers=numbers):
                bar.update(done + part * len(numbers) - bar.n)

            for method in methods:
                bar.set_description_str(f"{title} {method.label}")
                began = time.perf_counter()
                if method.name == "ap":
                    scores = run_ap(model, batch, nodes, metric, rows=runs, lockstep=lockstep, progress=progress)
                else:
                    scores = method.scores(model, *tokens, nodes, metric)
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


def right(model, pairs: list[Pair], values: Tensor, metric: Callable, device: torch.device) -> Tensor:
    """Does each run, the original and the patch run, prefer its own answer? bool [n, 2]; values: the metric of both.

    Every metric but kl says so by its sign.
    """
    if metric is relp.kl:
        values = torch.empty_like(values)
        for numbers in batches(pairs, 64):
            tokens = tensors([pairs[i] for i in numbers], device)
            values[numbers] = torch.stack(relp.compare(model, *tokens, ())[:2], dim=1).to(values)
    return torch.stack([values[:, 0] > 0, values[:, 1] < 0], dim=1)


@torch.no_grad()
def rounding(model, tokens: Tensor, answers: Tensor, metric: Callable) -> float:
    """How far the metric moves, on average, if each layer's stream is off by one rounding of the model's dtype."""
    eps, generator = torch.finfo(model.embed_tokens.weight.dtype).eps, torch.Generator().manual_seed(0)

    def hook(name, layer, x):
        error = eps * (torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5).to(x.device)
        return (x.double() * (1 + error)).to(x.dtype)

    hook.nodes = ("resid_post",)
    values = [relp.read_out(model, model.stream(tokens, hook=h), answers, metric) for h in (None, hook)]
    return float((values[0] - values[1]).abs().mean())


def drowned(scores: dict[str, np.ndarray], error: float) -> list[str]:
    """Those of the nodes {node: scores [n, ...]} whose scores, where they are not 0, vary by less than ten errors."""
    there = {node: of_node[(of_node != 0) & ~np.isnan(of_node)] for node, of_node in scores.items()}
    return [node for node, values in there.items() if values.size and values.std() < 10 * error]


def check_finite(title: str, values: list[Tensor], model) -> None:
    if not all(value.isfinite().all() for value in values):
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        raise ValueError(f"{title}: scores that are not finite in {dtype}; try --dtype float32")
