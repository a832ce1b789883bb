"""A command line from dataclasses: a field is an option, with its default, its help, and how its text is read."""

import argparse
import math
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import Field, field

import numpy as np
import torch

from models import first_line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # one line, like every other error here
        raise ValueError(message)


def option(default: object, takes: str | None, text: str, read: Callable | None = None, shown: str = "") -> object:
    """A field of a dataclass of options.

    takes  what stands for its value in the help; None: it is a switch
    read   makes a value of the text; ValueError if that cannot be
    shown  the default as the help shows it, if not as it is
    """
    metadata = {"takes": takes, "text": text, "read": read, "shown": shown or show(default)}
    return field(default_factory=lambda: copy(default), metadata=metadata)


def show(default: object) -> str:
    if isinstance(default, list):
        return ",".join(default)
    return "" if default is None or default is False else str(default)


def instead(options: type, name: str, default: object, shown: str = "") -> object:
    """The option of this name that `options` has, with another default."""
    metadata = {**options.__dataclass_fields__[name].metadata, "shown": shown or show(default)}
    return field(default_factory=lambda: copy(default), metadata=metadata)


def names(what: str, allowed: Collection[str], text: str) -> list[str]:
    given = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in given if name not in allowed]:
        raise ValueError(f"unknown {what} {unknown[0]!r}: choose from {', '.join(allowed)}")
    return given


def one_name(what: str, allowed: Collection[str], text: str) -> str:
    if text not in allowed:
        raise ValueError(f"unknown {what} {text!r}: choose from {', '.join(allowed)}")
    return text


def by_family(names: Collection[str]) -> str:
    """Short names of models, grouped by what comes before the first "-": that is given once."""
    groups = {}
    for name in names:
        family, dash, size = name.partition("-")
        groups.setdefault(family, []).append(dash + size)
    return "; ".join(family + " ".join(sizes) for family, sizes in groups.items())


def read_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a whole number is needed, got {text!r}") from None


def whole(text: str) -> int:
    number = read_int(text)
    if number < 1:
        raise ValueError(f"must be at least 1, got {number}")
    if number >= 2**31:
        raise ValueError(f"must be at most {2**31 - 1}, got {number}")
    return number


def read_seed(text: str) -> int:
    number = read_int(text)
    if not -(2**63) <= number < 2**64:  # what torch's generators take
        raise ValueError(f"must be from -2^63 to 2^64 - 1, got {text}")
    return number


def read_batch_size(text: str) -> str:
    return text if text == "auto" else str(whole(text))


def read_verify(text: str) -> int | str:
    """K as a number, or doubt:K as text."""
    k = text.removeprefix("doubt:")
    try:
        int(k)
    except ValueError:
        raise ValueError(f"K or doubt:K is needed, K a whole number, got {text!r}") from None
    return whole(k) if k == text else f"doubt:{whole(k)}"


def not_empty(what: str, text: str) -> str:
    if not text:
        raise ValueError(f"{what} is needed, got {text!r}")
    return text


def read_thresholds(text: str) -> list[float]:
    """LOW,HIGH,COUNT as thresholds spaced evenly in their logarithm, rising."""
    try:
        low, high, count = text.split(",")
        low, high, count = float(low), float(high), int(count)
        if not (0 < low <= high < math.inf and 0 < count <= 1000):
            raise ValueError
    except ValueError:
        raise ValueError(f"must be LOW,HIGH,COUNT with 0 < LOW <= HIGH and COUNT up to 1000, got {text!r}") from None
    return [float(t) for t in np.geomspace(low, high, count)]


def usable_device(text: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if text == "auto" else text)
        torch.zeros(1, device=device).item()  # the meta device can make a tensor, and cannot read it
    except Exception as error:  # each kind of device fails in its own way
        raise ValueError(f"device {text!r} cannot be used here: {first_line(error)}") from None
    return device


def add_option(parser: Parser, name: str, of_task: dict[str, Field], n_tasks: int) -> None:
    """of_task: the option in each of the tasks that have it, of n_tasks in all."""
    first = next(iter(of_task.values())).metadata
    text, shown = first["text"], {task: f.metadata["shown"] for task, f in of_task.items()}
    if len(of_task) < n_tasks:
        text = f"{', '.join(of_task)} only; {text}"
    if len(set(shown.values())) > 1:
        text += f" [{'; '.join(f'{task}: {value}' for task, value in shown.items())}]"
    elif default := next(iter(shown.values())):
        text += f" [{default}]"
    kind = (
        {"metavar": first["takes"], "type": readable(first["read"] or str)}
        if first["takes"]
        else {"action": "store_true"}
    )
    kind |= {"nargs": "+"} if name == "model" else {}
    parser.add_argument(f"--{name.replace('_', '-')}", help=text, **kind)


def readable(read: Callable) -> Callable:
    """A reader whose ValueError argparse shows as it is."""

    def reader(text: str) -> object:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return reader
