"""How many prompts and patched runs go through the model together, and what is done where they do not fit in memory."""

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

import relp
from models import Transformer
from support.methods import AP, Method
from support.processes import gathered, rank, world

MESSAGES = (  # of errors that have no type of their own
    "can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
NO_SMALLER = "out of memory with one prompt and one patched run at a time; try shorter prompts or --dtype bfloat16"
TOGETHER = "out of memory; processes that share weights cannot halve a batch on the way: give a --batch-size that fits"


def out_of_memory(error: Exception) -> bool:
    typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return typed or any(message in str(error) for message in MESSAGES)


class BatchSize:
    """What --batch-size says. There is one per model: what has not fitted once is not tried again, and is said once.

    given     a number, of prompts and of patched runs; or "auto": as many as should fit, and half as many, again and
              again, if they run out of memory
    lockstep  processes that share weights make the same calls: none can halve its batches by itself
    """

    def __init__(self, given: str = "auto", lockstep: bool = False):
        self.given, self.lockstep, self.said = given, lockstep, False
        self.most_prompts = self.most_runs = sys.maxsize  # as far as is known

    def chosen(self, model: Transformer, length: int, device: torch.device) -> tuple[int, int]:
        """How many prompts of this length, and how many patched runs; the same in all processes.

        auto: as many as fit, with their graph, into a quarter of a GPU's free memory, or into 2 GiB on a CPU. Of
        patched runs, few are fastest on a CPU: those that stay in its cache.
        """
        if self.given != "auto":
            return int(self.given), int(self.given)
        c, on_gpu = model.config, device.type == "cuda"
        memory = free_memory(model, device) // 4 if on_gpu else 2**31
        # bytes of one layer's activations; a pattern's: both runs', rho and a copy, or what of it else is in the graph
        per_token = max(4, number_size(model)) * (20 * c.d_model + 8 * c.d_mlp + 4 * c.n_heads * length)
        runs = max(1, memory // (per_token * length))
        fastest = max(1, (2**16 if on_gpu else 2**9) // length)
        mine = max(1, runs // c.n_layers), min(runs, fastest)
        return tuple(map(min, zip(*gathered(mine))))  # GPUs may have unequal memory, and batches must be equal

    def in_parts(self, numbers: Sequence, compute: Callable, prompts: int, runs: int = 1) -> Iterator[tuple]:
        """(part, compute(part, runs)) for parts of the numbers, in their order, that make up all of them.

        A part has up to `prompts` numbers. One that does not fit into memory is tried again with half as many, and
        half of the runs; those after it are no larger. ValueError if not even one number with one run fits.
        """
        while numbers:
            part, n_runs = numbers[: min(prompts, self.most_prompts)], min(runs, self.most_runs)
            fits, result = self.attempt(partial(compute, part, n_runs))
            if fits:
                yield part, result
                numbers, result = numbers[len(part) :], None
            elif len(part) == n_runs == 1:
                raise ValueError(NO_SMALLER)
            else:
                self.say(f"{len(part)} prompts" if len(part) > 1 else f"{n_runs} patched runs")
                self.most_prompts = max(1, len(part) // 2)
                self.most_runs = max(1, n_runs // 2) if runs > 1 else self.most_runs

    def attempt(self, compute: Callable) -> tuple[bool, object]:
        """(True, compute()), or if that runs out of memory (False, None). The error itself if nothing can be halved."""
        try:
            return True, compute()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if self.given == "auto" and self.lockstep:
                raise ValueError(TOGETHER) from None
            if self.given == "1":
                raise ValueError(NO_SMALLER) from None
            if self.given != "auto":
                raise
        # the error is gone by now, and with it the tensors of the functions that it has come through
        gc.collect()
        torch.cuda.empty_cache()  # nothing where no GPU is in use
        return False, None

    def say(self, what: str) -> None:
        """That these did not fit: once, in each process to which it happens."""
        process = f"process {rank()}: " if world() > 1 else ""
        if not self.said:
            print(f"  {process}out of memory with {what} at a time: half as many from here on, or fewer", flush=True)
        self.said = True


# ---------------------------------------------------------------------------------------------------------------------
# Attention patterns as nodes: [batch, pos, n_heads, pos] for every layer


def number_size(model: Transformer) -> int:
    """Bytes per number of the activations. Of half precision 3: norms, softmax and sums are computed in float32."""
    return max(3, model.embed_tokens.weight.element_size())


def memory_of_patterns(model: Transformer, methods: list[Method], length: int) -> int:
    """Bytes that one pair of prompts needs at most, beside the weights, if the pattern is a node. Some 20 % too many.

    Of every layer, the patterns of both runs are kept, and for a gradient rho and the graph; of one layer at a time,
    some six more are at work. The audit of rules keeps the graph, and works on one module at a time in float64. All
    factors are measured: tests/test_memory.py has the numbers.
    """
    c, size, pattern = model.config, number_size(model), model.config.n_heads * length  # of one position
    if all(m is AP for m in methods):
        per_layer = 6 * c.d_model + 2 * pattern
    else:
        graph = 20 * c.d_model + 8 * c.d_mlp if c.gated else 12 * c.d_model + 5 * c.d_mlp
        per_layer = graph + (5 if any(m.steps for m in methods) else 3) * pattern
    scores, audit = c.n_layers * per_layer + 6 * pattern, 0
    if any(m.lrp is not None for m in methods):
        audit = c.n_layers * (20 * c.d_model + 8 * c.d_mlp) + 28 * pattern + 30 * c.d_mlp + 8 * c.n_vocab
    return length * max(size * scores, max(4, size) * audit)


def free_memory(model: Transformer, device: torch.device) -> float:
    """Bytes that activations can have: what is free on the GPU; on a CPU all of the machine's but for the weights."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch itself
        return torch.cuda.mem_get_info(device)[0] + unused
    if not hasattr(os, "sysconf"):  # Windows
        return float("inf")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - weights


def check_patterns(model: Transformer, nodes: list[str], methods: list[Method], length: int, device) -> None:
    """ValueError if patterns are needed as nodes, and those of one pair of this length do not fit in memory."""
    kept = [f"node {node}" for node in nodes if relp.node_of(node) == "pattern"]
    if any(relp.node_of(node) in ("q", "k") for node in nodes):  # AtP* of these computes patterns
        kept += [f"method {m.name}" for m in methods if m.name in ("atp*", "twopoint")]
    if not kept:
        return
    needed, there = memory_of_patterns(model, methods, length), free_memory(model, device)
    if needed > there:
        raise ValueError(
            f"{kept[0]} of one pair of {length} tokens needs some {needed / 2**30:.1f} GiB beside the weights, and "
            f"there are {there / 2**30:.1f} GiB: leave it out, or give shorter prompts"
        )
