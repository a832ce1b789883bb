"""Several processes share one run (torchrun --nproc-per-node=N evaluate.py ...); how many threads a process has."""

import os

import torch
import torch.distributed as dist

from models import Transformer

own = False  # True in a command: then no caller has chosen a number of threads
THREADS = torch.get_num_threads()
SMALL = 512


def choose_threads(d_model: int) -> None:
    """One thread for small models, as many as before for others; a number in the environment wins.

    The threads of a small matrix product wait for each other most of the time, and they wait spinning: if another
    program wants the cores, that is several times slower than one thread. tests/README.md has the figures.
    """
    if own and not os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        torch.set_num_threads(1 if d_model < SMALL else THREADS)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Print, in one of the processes only."""
    if rank() == 0:
        print(text, flush=True)


def join(device: torch.device) -> torch.device:
    """Join the other processes if torchrun has started this one. Returns the device of this process."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def share(rows: list[int]) -> list[int]:
    """This process's part of a batch. All processes get equally many rows: a shorter part repeats its last row,
    because processes that share weights must make the same calls.
    """
    size = -(-len(rows) // world())
    mine = rows[rank() :: world()] or rows[:1]
    return mine + mine[-1:] * (size - len(mine))


def gathered(mine: object) -> list:
    """What every process has, in all of them."""
    everybody = [mine] * world()
    if world() > 1:
        try:
            dist.all_gather_object(everybody, mine)
        except RuntimeError:
            raise ValueError("another process has stopped") from None
    return everybody


def shard_weights(model: Transformer, device: torch.device) -> None:
    """Share a model's weights out over the processes (PyTorch's FSDP2): a unit per block, one for the rest.

    Every process keeps a part of each weight and gathers a block's just before it runs: all must make the same calls.
    The model comes whole, in main memory.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (world(),))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh)
    for method in ("embed", "unembed"):  # these are called without going through the model's forward
        register_fsdp_forward_method(model, method)
