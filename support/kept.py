"""AP is slow: its finished parts are kept in files, so that a run that was stopped can continue."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

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
        self.files, self.seconds_before, self.dropped = [], 0.0, False

    def __call__(self, model, batch: Batch, nodes: list[str], metric: Callable, **how) -> dict:
        finished = self.earlier.of_method("ap", nodes) if self.earlier else {}
        values, layers = batch.values.cpu().numpy(), {array.shape[1] for array in finished.values()}
        if layers == {model.config.n_layers} and self.earlier.same_model(values, batch.pair_numbers):
            self.seconds_before = self.earlier.seconds("ap")
            n_pos = batch.tokens[0].shape[1]
            return {node: torch.from_numpy(a[batch.pair_numbers][:, :, :n_pos]) for (_, node), a in finished.items()}
        what = [x.tolist() for x in (*batch.tokens, batch.values)] + [self.what, torch.__version__]
        name = f"unfinished-{rank()}-{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}.npz"
        path = self.folder / name
        self.files.append(path)
        pieces = Pieces(path, batch, partial(self.settle, path))
        self.seconds_before += pieces.seconds_before
        if how["lockstep"]:  # all processes go on from the first position that one of them has not finished
            for pos in sorted(pieces)[min(gathered(len(pieces))) :]:
                del pieces[pos]
        return patch_all(model, batch, nodes, metric, pieces=pieces, **how)

    def settle(self, path: Path) -> None:
        """Drop what this run cannot go on with. That is decided by its first batch that has not run out of memory."""
        if not self.dropped:
            drop_others(self.folder, path)
        self.dropped = True

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


class Pieces(dict):
    """AP's finished positions of one batch, {pos: {(node, layer): effects}}. A position is written when it is set.

    What a file holds is taken only if it is exactly what this run would have written. before_use() is called before
    anything is taken or written.
    """

    def __init__(self, path: Path, batch: Batch, before_use: Callable):
        super().__init__()
        self.path, self.seconds_before, self.began, self.before_use = path, 0.0, time.perf_counter(), before_use
        if not path.exists():
            return
        before_use()
        arrays, finished = read_npz(path), {}
        seconds = arrays.pop("seconds", np.array(None))
        # of a position: {(node, layer): bool [batch, parts]}, with a single part where the whole node is patched
        like = {
            (node, layer): of_layer[:, 0].reshape(len(of_layer), -1)
            for node, differs in batch.differs.items()
            for layer, of_layer in enumerate(differs.unbind(1))
        }
        for pos in range(batch.tokens[0].shape[1]):
            names = {key: f"{pos}-{key[0]}-{key[1]}" for key in like}
            if arrays.keys() >= set(names.values()):
                finished[pos] = {key: arrays.pop(name) for key, name in names.items()}
        dtype = batch.values.cpu().numpy().dtype
        valid = not arrays and seconds.shape == () and seconds.dtype == float and 0 <= seconds < np.inf
        for of_pos in finished.values():
            for key, effects in of_pos.items():
                right = effects.shape == like[key].shape and effects.dtype == dtype
                valid = valid and right and bool(np.isfinite(effects).all())
        if not valid or list(finished) != list(range(len(finished))):
            say("  an unfinished run was kept in a damaged file: AP starts afresh")
            return
        for pos, of_pos in finished.items():
            effects = {key: torch.from_numpy(array).to(batch.values.device) for key, array in of_pos.items()}
            super().__setitem__(pos, effects)
        self.seconds_before = float(seconds)
        say(f"  AP goes on with an unfinished run: {len(self)} positions of this batch are done")

    def __setitem__(self, pos: int, effects: dict) -> None:
        self.before_use()
        super().__setitem__(pos, effects)
        arrays = {
            f"{pos}-{node}-{layer}": value.cpu().numpy()
            for pos, of_pos in self.items()
            for (node, layer), value in of_pos.items()
        }
        seconds = self.seconds_before + time.perf_counter() - self.began
        save(self.path, lambda file: np.savez(file, seconds=seconds, **arrays))
