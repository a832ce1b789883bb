"""The files of a run: where they go, how they are written, and what an earlier run has left there."""

import hashlib
import io
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from models import Rules, first_line
from support.doubt import DOUBT_NEEDS
from support.processes import say
from support.prompts import prompt_arrays
from support.scoring import Scores
from support.statistics import Estimate
from tasks import Pair


def slug(name: str) -> str:
    """A model's name, repository or directory as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", Path(name).resolve().name if os.path.isdir(name) else name)


def folder_of(out: str, model: str, prompts: str | None, task: str, tasks: list[str]) -> Path:
    """The folder of a model's results: <model>-<task>, or <model>-<name of the prompts' file>; for edges, both.

    It is made if need be, and rid of what a killed process was writing there.
    """
    source = task
    if prompts:
        source = slug(Path(prompts).stem)
        if source in tasks:  # ioi.jsonl is not the task's own prompts
            source = slug(Path(prompts).name)
        source += "-edges" if task == "edges" else ""
    folder = Path(out) / f"{slug(model)}-{source}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(".*.*"):  # see save()
        if file.suffix[1:].isdecimal() and not is_running(int(file.suffix[1:])):
            file.unlink(missing_ok=True)
    return folder


def is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere the question would end it
        return True
    try:
        os.kill(process, 0)  # asks, and does nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is another user's
    return True


def check_writable(out: str) -> None:
    """ValueError if results cannot be written there: better asked now than after the work."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"cannot write results to {out}: {error.strerror}") from None


def save(path: Path, write: Callable) -> None:
    """write(file) into a new file that then takes the place of `path`: a reader finds the old or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, content: dict) -> None:
    text = json.dumps(without_nan(content), indent=1)
    save(path, lambda file: file.write(text.encode()))


def save_figure(path: Path, draw: Callable[[], Figure], dpi: int = 130) -> None:
    """Draw a figure into a file. One that cannot be drawn costs the figure only. ValueError if it cannot be written."""
    drawn = io.BytesIO()
    try:
        figure = draw()
        for text in figure.findobj(Text):
            text.set_parse_math(False)  # a $ in a name or a token is a $
        figure.savefig(drawn, format="png", dpi=dpi)
    except Exception as error:
        say(f"  {path} could not be drawn: {first_line(error)}")
        return
    save(path, lambda file: file.write(drawn.getbuffer()))


def without_nan(value: object) -> object:
    """JSON has no NaN: None in its place."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rules_json(rules: Rules) -> dict:
    """All rules that there are, whichever class they are of."""
    return {"temperature": None, "two_point": []} | {name: on for name, on in vars(rules).items() if name != "notes"}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# summary.json


@dataclass
class NodeReport:
    """What a run of the node experiment has found for one model; as_json() is summary.json."""

    model: str
    prompt_pairs: int
    metric: str
    accuracy: dict[str, Estimate]  # of the "original" and the "patch" run
    value: dict[str, Estimate]  # the metric's mean, likewise
    cells: dict[str, dict[str, int]]  # by node: how many there are, and in how many the two runs agree
    pcc: dict  # this and the next: see statistics.agreements
    differences: dict
    rules: dict  # RelP's
    audit: dict  # by method
    conservation: dict | None  # of RelP
    rounding: float  # how far rounding moves the metric: see scoring.rounding
    seconds: dict[str, float]  # by method
    arguments: dict
    versions: dict
    scores_npz: str = ""  # the fingerprint of the file beside it

    def as_json(self) -> dict:
        items = vars(self).items()
        return {self.metric if name == "value" else name: value for name, value in items if name != "metric"}


# ---------------------------------------------------------------------------------------------------------------------
# scores.npz


@dataclass
class Earlier:
    """What a run on the same prompts has left in a folder: the arrays of scores.npz, and summary.json.

    Arrays of a method are dropped if that run had another value of the option that the method depends on.

    eps      rounding of the dtype that both runs have
    dropped  the methods whose arrays were dropped
    """

    arrays: dict[str, np.ndarray]
    summary: dict
    eps: float
    dropped: set[str]

    def of_method(self, method: str, nodes: list[str]) -> dict[tuple[str, str], np.ndarray]:
        """{(method, node): scores}, if they are there for all of these nodes."""
        arrays = {(method, node): self.arrays.get(f"{method}_{node}") for node in nodes}
        return arrays if all(self.fits(array) for array in arrays.values()) else {}

    def fits(self, scores: np.ndarray | None) -> bool:
        """Are these scores what a run on these prompts writes: NaN beyond a prompt's length, and nowhere else?"""
        lengths, values = self.arrays["lengths"], self.arrays.get("values")
        if scores is None or values is None or scores.dtype != values.dtype or scores.ndim < 3:
            return False
        if scores.shape[0] != len(lengths) or scores.shape[2] != lengths.max():
            return False
        beyond = np.arange(lengths.max()) >= lengths[:, None]  # [n, positions]
        return bool((np.isfinite(scores.swapaxes(1, 2)).reshape(*beyond.shape, -1).all(-1) == ~beyond).all())

    def said(self, what: str, method: str) -> object:
        """What summary.json has under `what` for a method, or None."""
        return self.dictionary(what).get(method)

    def dictionary(self, what: str) -> dict:
        """What summary.json has under `what`, or {} if that is no dictionary."""
        found = self.summary.get(what)
        return found if isinstance(found, dict) else {}

    def seconds(self, method: str) -> float:
        seconds = self.said("seconds", method)
        return seconds if isinstance(seconds, float) else math.nan

    def same_model(self, values: np.ndarray, pair_numbers: list[int] | slice = slice(None)) -> bool:
        """Was that run of the same weights and metric? The metric's values tell: other weights change them.

        They may differ by rounding: of another batch size, say.
        """
        theirs = self.arrays.get("values")
        whole = len(self.arrays["lengths"]), 2
        if theirs is None or theirs.dtype != values.dtype or theirs.shape != whole:
            return False
        off = np.abs(theirs[pair_numbers] - values).max()
        return bool(off <= self.eps**0.5 * np.abs(values).max())

    def add_to(self, scores: Scores, is_method: Callable) -> list[str]:
        """Add the methods that this earlier run has scored on all of these nodes, and the new one has not.

        is_method(name): is there a method of this name? Returns the names of those that were added.
        """
        nodes, there, added = list(scores.differs), {name for name, _ in scores.scores}, []
        for method in dict.fromkeys(key.partition("_")[0] for key in self.arrays):
            arrays = self.of_method(method, nodes)
            fit = all(array.shape == scores.differs[node].shape for (_, node), array in arrays.items())
            if arrays and fit and method not in there and is_method(method):
                scores.scores |= arrays
                scores.seconds[method] = self.seconds(method)
                added.append(method)
        return added

    def completed(self, report: NodeReport) -> NodeReport:
        """The report of a new run without AP, with what the earlier run has found of the agreement with AP."""
        kept = {
            what: {
                methods: found
                for methods, found in self.dictionary(what).items()
                if not self.dropped & set(methods.split(" - "))
            }
            for what in ("pcc", "differences")
        }
        seconds = {method: self.seconds(method) for method in self.dictionary("seconds") if method not in self.dropped}
        return replace(report, **kept, seconds=seconds | report.seconds)


# The option that a method's scores depend on; for the others, the name says all.
DEPENDS_ON = {"relp": "rules", "ig": "steps"}


def earlier_run(folder: Path, pairs: list[Pair], arguments: dict) -> Earlier | None:
    """The run that has written into this folder, if it was on the same prompts. Says what the new run will replace.

    arguments: of the new run, as summary.json will have them.
    """
    arrays, summary = read_npz(folder / "scores.npz"), read_summary(folder / "summary.json")
    if not arrays:
        return None
    if not all(np.array_equal(arrays.get(key), value) for key, value in prompt_arrays(pairs).items()):
        say(f"  {folder} holds the results of a run on other prompts: this run replaces them")
        return None
    if summary.get("scores_npz") != fingerprint(folder / "scores.npz"):
        summary = {}  # the two files are of different runs: one of them could not be written
    given = summary.get("arguments")
    given = given if isinstance(given, dict) else {}
    for option in ("dtype", "metric"):
        if given.get(option, arguments[option]) != arguments[option]:
            say(f"  {folder} holds the results of a run with another {option}: this run replaces them")
            return None
    dropped = set()
    for method, option in DEPENDS_ON.items():
        of_method = [key for key in arrays if key.partition("_")[0] == method]
        if of_method and given.get(option) != arguments[option]:
            unknown_or_other = "other" if option in given else "unknown"
            say(f"  {folder} holds scores of {method} with {unknown_or_other} {option}: this run drops them")
            dropped.add(method)
            for key in of_method:
                del arrays[key]
    if dropped & set(DOUBT_NEEDS):
        arrays = {key: array for key, array in arrays.items() if not key.startswith("doubt_")}
    eps = torch.finfo(getattr(torch, arguments["dtype"])).eps
    return Earlier(arrays, summary, eps, dropped)


def if_same_model(earlier: Earlier | None, scores: Scores, folder: Path) -> Earlier | None:
    """The earlier run, if it was of the same model. Says so if it was not."""
    if earlier is None or earlier.same_model(scores.values):
        return earlier
    say(f"  {folder} holds the results of a run of other weights: this run replaces them")
    return None


def fingerprint(path: Path) -> str:
    """By which summary.json names the scores.npz that it belongs to."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def remove_stale(folder: Path, since: float) -> None:
    """Remove figures and the like that show scores which are not in scores.npz: those older than the time `since`."""
    for name in ("heatmaps.png", "conservation.png", "grid.json", "verified.json"):
        if (folder / name).exists() and (folder / name).stat().st_mtime < since:
            (folder / name).unlink()


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file, or nothing if there is none that can be read."""
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception:  # a damaged file can run into anything
        return {}


def read_summary(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
