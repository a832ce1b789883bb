"""AP is slow: its finished parts are kept in files, so that a run that was stopped can continue."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models import Config
from support.processes import gathered, rank, say, world
from support.results import Earlier, read_npz, save
from support.scoring import Batch, patch_all


class KeptPatching:
    """AP of all nodes for scoring.score_pairs: finished positions of a batch are kept in `folder` and taken from there.

    what     all that AP's numbers depend on beside the batch, in a form that JSON can hold: positions that were
             kept with another `what` are not taken. The metric's values on the batch stand for the weights.
    earlier  a finished run whose AP is taken as it is, if it was of the same model

    seconds_before is the time that went into what was taken.
    """

    def __init__(self, folder: Path, what: list, earlier: Earlier | None = None):
        self.folder, self.what, self.earlier = folder, what, earlier
        self.files, self.seconds_before = [], 0.0

    def __call__(self, model, batch: Batch, nodes: list[str], metric: Callable, **how) -> dict:
        finished = self.earlier.of_method("ap", nodes) if self.earlier else {}
        layers = {array.shape[1] for array in finished.values()}
        if layers == {model.config.n_layers} and self.earlier.same_model(
            batch.values.cpu().numpy(), batch.pair_numbers
        ):
            self.seconds_before = self.earlier.seconds("ap")
            n_pos = batch.tokens[0].shape[1]
            return {node: torch.from_numpy(a[batch.pair_numbers][:, :, :n_pos]) for (_, node), a in finished.items()}
        what = [x.tolist() for x in (*batch.tokens, batch.values)] + [self.what, torch.__version__]
        name = f"unfinished-{rank()}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.npz"
        path = self.folder / name
        if not self.files:
            drop_others(self.folder, path)
        self.files.append(path)
        pieces = Pieces(path, batch, {node: n_parts(node, model.config) for node in nodes}, model.config.n_layers)
        self.seconds_before += pieces.seconds_before
        if how["lockstep"]:  # all processes go on from the first position that one of them has not finished
            for pos in sorted(pieces)[min(gathered(len(pieces))) :]:
                del pieces[pos]
        return patch_all(model, batch, nodes, metric, pieces=pieces, **how)

    def remove(self) -> None:
        """Remove the files, when all that they hold is in the results."""
        for path in self.files:
            path.unlink(missing_ok=True)


def drop_others(folder: Path, mine: Path) -> None:
    """Remove what an unfinished run has kept that this one cannot go on with, and say so.

    mine: the file of this run's first batch. If it exists, the others are of this run's next batches.
    """
    others = [] if mine.exists() else list(folder.glob(f"unfinished-{rank()}-*.npz"))
    if rank() == 0:  # also those of processes that this run does not have
        ranks = {
            file: re.fullmatch(r"unfinished-(\d+)-\w+\.npz", file.name) for file in folder.glob("unfinished-*.npz")
        }
        others += [file for file, found in ranks.items() if found and int(found[1]) >= world()]
    if others:
        say("  an unfinished run of other arguments or another version is dropped: AP starts afresh")
    for file in others:
        file.unlink()


def n_parts(name: str, c: Config) -> int:
    """How many parts of a node AP patches at one position: 1 of a whole node."""
    parts = {"head": c.n_heads, "head_q": c.n_heads, "head_k": c.n_kv_heads, "head_v": c.n_kv_heads}
    return (parts | {"head_pattern": c.n_heads, "neuron": c.d_mlp}).get(name, 1)


class Pieces(dict):
    """AP's finished positions of one batch, {pos: {(node, layer): effects}}. A position is written when it is set.

    What a file holds is taken only if it is exactly what this run would have written. parts: how many a node has.
    """

    def __init__(self, path: Path, batch: Batch, parts: dict[str, int], n_layers: int):
        super().__init__()
        self.path, self.seconds_before, self.began = path, 0.0, time.perf_counter()
        if not path.exists():
            return
        (n_prompts, n_pos), device = batch.tokens[0].shape, batch.tokens[0].device
        like = batch.values.cpu().numpy()
        arrays = read_npz(path)
        seconds, finished = arrays.pop("seconds", np.array(None)), {}
        for pos in range(n_pos):
            names = {(node, layer): f"{pos}-{node}-{layer}" for node in parts for layer in range(n_layers)}
            if arrays.keys() >= set(names.values()):
                finished[pos] = {key: arrays.pop(name) for key, name in names.items()}
        right = not arrays and seconds.shape == () and seconds.dtype == float and 0 <= seconds < np.inf
        for of_pos in finished.values():
            for (node, _), effects in of_pos.items():
                right &= effects.shape == (n_prompts, parts[node]) and effects.dtype == like.dtype
                right = right and bool(np.isfinite(effects).all())
        if not right or list(finished) != list(range(len(finished))):
            say("  an unfinished run was kept in a damaged file: AP starts afresh")
            return
        for pos, of_pos in finished.items():
            super().__setitem__(pos, {key: torch.from_numpy(effects).to(device) for key, effects in of_pos.items()})
        self.seconds_before = float(seconds)
        say(f"  AP goes on with an unfinished run: {len(self)} positions of this batch are done")

    def __setitem__(self, pos: int, effects: dict) -> None:
        super().__setitem__(pos, effects)
        arrays = {
            f"{pos}-{node}-{layer}": value.cpu().numpy()
            for pos, of_pos in self.items()
            for (node, layer), value in of_pos.items()
        }
        seconds = self.seconds_before + time.perf_counter() - self.began
        save(self.path, lambda file: np.savez(file, seconds=seconds, **arrays))
