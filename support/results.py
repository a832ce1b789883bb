"""The files of a run: where they go, how they are written, and the store of AP's scores."""

import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models
import relp
from support import experts, families, resume
from support.processes import gathered, rank, say
from tasks import Pair

LOCKS = {}  # {a folder of results: its open file}, of this process


def slug(name: str) -> str:
    """A model's name, repository or directory as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", Path(name).resolve().name if os.path.isdir(name) else name)


def folder_of(out: str, model: str, task: str, prompts: str | None = None) -> Path:
    """The folder of a model's results, <model>-<task>, or with a file of prompts <model>-<task>-<file>. It is made.

    It is this process's until that ends. ValueError if another run has it.
    """
    name = "-".join([slug(model), task, *([slug(Path(prompts).stem)] if prompts else [])])
    folder = Path(out) / name
    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0 and folder.resolve() not in LOCKS:
        opened = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is writing to {folder}: wait for its end, or give another --out") from None
        LOCKS[folder.resolve()] = opened
    return folder


def check_writable(out: str) -> None:
    """ValueError if results cannot be written there: better asked now than after the work."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"cannot write results to {out}: {error.strerror}") from None


def save(path: Path, write: Callable) -> None:
    """write(file) into a new file that then takes the place of `path`: a reader finds the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # another run may write the same file now
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(folder: Path, *stale: str) -> Iterator[Path]:
    """An empty folder to write results into. When all is written, they take their places in `folder`.

    If the run fails before, an earlier run's files are all still there. If not, those that this run has not replaced go
    where their names match a pattern in `stale`.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as new:
        yield Path(new)
        names = os.listdir(new)
        for name in names:
            os.replace(Path(new) / name, folder / name)
    for path in [path for pattern in stale for path in folder.glob(pattern) if path.name not in names]:
        path.unlink()


def save_json(path: Path, content: dict) -> None:
    text = json.dumps(without_nan(content), indent=1, default=str)
    save(path, lambda file: file.write(text.encode()))


def without_nan(value: object) -> object:
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_figure(path: Path, draw: Callable, dpi: int = 130) -> None:
    """Write the matplotlib Figure that draw() returns. One that cannot be drawn costs the figure only."""
    import matplotlib  # only a figure needs it

    drawn = io.BytesIO()
    try:
        with matplotlib.rc_context({"text.parse_math": False}):  # a $ in a name or a token is a $
            draw().savefig(drawn, format="png", dpi=dpi)
    except Exception as error:
        say(f"  {path.name} could not be drawn: {models.first_line(error)}")
        return
    save(path, lambda file: file.write(drawn.getbuffer()))


def versions() -> dict[str, str]:
    """The source is that of a forward pass and of AP: two runs with the same twelve letters computed alike."""
    packages = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return packages | {"source": SOURCE[:12]}


# ---------------------------------------------------------------------------------------------------------------------
# AP's store


class Store:
    """AP's scores of single pairs, in files <out>/ap/<hash>.npz. The hash is of all that determines the scores.

    So a run that was stopped goes on, the same AP is never computed twice, and what is found is never out of date. The
    batch size changes rounding only, and is not in the hash.
    """

    def __init__(self, out: str, model: models.Transformer, nodes: list[str], metric: str):
        weight = model.embed_tokens.weight
        self.folder, self.nodes = Path(out) / "ap", sorted(nodes)
        self.what = [
            weights_digest(model),
            repr(model.config),
            self.nodes,
            metric,
            device_name(weight.device),
            torch.__version__,
            SOURCE,
        ]

    def path(self, pair: Pair) -> Path:
        what = json.dumps([*self.what, pair.original, pair.patch, pair.answers])
        return self.folder / f"{digest(what.encode())}.npz"

    def get(self, pair: Pair) -> dict[str, Tensor] | None:
        """{node: [layer, pos, ...], "seconds": []}; None if there is no such file, or a damaged one."""
        try:
            with np.load(self.path(pair)) as file:
                found = {key: torch.from_numpy(array) for key, array in file.items()}
        except Exception:  # a damaged file can run into anything
            return None
        return found if found.keys() == {*self.nodes, "seconds"} else None

    def put(self, pair: Pair, scores: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {key: value.numpy() for key, value in scores.items()}
        save(self.path(pair), lambda file: np.savez_compressed(file, **arrays))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def weights_digest(model: models.Transformer) -> str:
    """Of every tensor its name, shape and dtype, and a checksum of all its bytes: an edit of one number counts."""
    what = hashlib.sha256()
    for name, x in model.state_dict().items():
        mine = (x.to_local() if hasattr(x, "to_local") else x).cpu().flatten()  # processes may share the weights
        checksum = zlib.crc32(mine.view(torch.uint8).numpy())
        what.update(f"{name} {list(x.shape)} {x.dtype} {checksum}\n".encode())
    return " ".join(sorted(set(gathered(what.hexdigest()))))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def source_digest() -> str:
    """Of the files that make up a forward pass and AP."""
    return digest(b"".join(Path(m.__file__).read_bytes() for m in (models, relp, resume, families, experts)))


SOURCE = source_digest()  # as this process has read them: whoever edits a file in the meantime does not change the run
