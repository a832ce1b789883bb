"""inspect.html: one page on which every score of a run can be looked at. inspect.html beside this file is its template.

The page has maps of layers and tokens. A map is stored in 16 bits per score, with one scale: a score is exact to
1/65534 of the largest one in its map. There is one map per method and kind of node for the means over the pairs, and
another one for the pairs one by one. "No value" is kept apart from 0.
"""

import base64
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np

import relp
from support.positions import laid_over, legend, overlay
from support.processes import say
from support.results import save, without_nan
from support.scoring import Method, Scores
from support.tokenizer import NoTokenizer, load_tokenizer
from tasks import Pair, labels

TEMPLATE = Path(__file__).with_name("inspect.html")
HERE = "{{data}}"  # where the data goes in the template
LARGEST = 32767
NO_VALUE = -32768
MOST = 2**20  # numbers of one model, about 3 MB of the page; if there are more, only the first pairs are shown
PARTS = 8  # how many heads or neurons of a cell are shown
WHOLE = {"head": "attn_out", "neuron": "mlp_out"}  # where a reader looks for these, beside relp.PARTS_OF


@dataclass
class Kind:
    """The maps of one kind of node.

    mean    {method: packed [layers, columns]}, the mean over the pairs by role
    each    {method: packed [pairs, layers, positions]}, the pairs one by one
    parts   what a cell is made of: see strongest_parts(); None if that is not known
    exact   packed like each: 1 where the first method is AP in a run that has AP of some cells only; None: no such run
    wholes  other kinds whose cells are made of these parts too
    """

    name: str
    mean: dict
    each: dict
    parts: dict | None = None
    wholes: list[str] = field(default_factory=list)
    exact: dict | None = None


@dataclass
class Shown:
    """What the page shows of one model.

    tokens    the tokens that occur; prompts are numbers of these
    examples  the pairs: original, patch, answers, roles, values (the metric of both runs), at (see positions.overlay),
              likely and chances (see scoring.Scores)
    n_pairs   how many there were, and `laid_over` how many of them the means are of
    values    the metric of both runs, mean over the pairs
    """

    title: str
    metric: str
    methods: list[dict]
    rows: list[str]
    columns: list[str]
    kinds: list[Kind]
    tokens: list[str]
    examples: list[dict]
    n_pairs: int
    laid_over: int
    values: list[float]
    meanings: str


def write(path: Path, shown, summary: dict, template: Path = TEMPLATE) -> None:
    """The page of a dataclass: Shown, or another one in a template of its own. ValueError if it cannot be written."""
    text = template.read_text(encoding="utf-8")
    save(path, lambda file: file.write(text.replace(HERE, embedded(shown, summary)).encode()))


def embedded(shown, summary: dict) -> str:
    """JSON that does no harm within an HTML script element: ASCII, without < > &."""
    command = {"command": " ".join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M")}
    given = {option: str(x) for option, x in summary["arguments"].items() if x not in (None, False)}
    about = command | summary["versions"] | given
    text = json.dumps(without_nan(asdict(shown) | {"about": about}), separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def finish(folder: Path) -> None:
    """Say where a run's files are, and list all runs beside it, the newest first, in index.html."""
    rows = []
    for file in sorted(folder.parent.glob("*/summary.json"), key=lambda file: -file.stat().st_mtime):
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
            pcc = summary.get("agreement", {}).get("relp", {})
            pcc = {"edges": pcc} if "averaged" in pcc else pcc
            of_nodes = ", ".join(f"{node} {of['averaged'][0]:.3f}" for node, of in pcc.items())
        except (ValueError, AttributeError, KeyError, TypeError):  # another program's, or a damaged one
            continue
        names = sorted(path.name for path in file.parent.iterdir() if path.suffix in (".html", ".png"))
        links = (f'<a href="{quote(file.parent.name)}/{name}">{name}</a>' for name in names)
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
        cells = [escape(file.parent.name), str(summary.get("prompt_pairs", "")), of_nodes, date, " ".join(links)]
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    heads = "".join(f"<th>{head}</th>" for head in ("run", "pairs", "PCC of RelP with AP", "date", "files"))
    page = INDEX.format("\n".join(f"<tr>{row}</tr>" for row in (heads, *rows)))
    save(folder.parent / "index.html", lambda file: file.write(page.encode()))
    say(f"  written to {folder}/\n  all runs: {folder.parent}/index.html")


INDEX = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Runs</title>
<meta name="viewport" content="width=device-width"><style>
:root {{ color-scheme: light dark; }} body {{ font: 16px/1.4 system-ui, sans-serif; margin: 1rem; }}
td, th {{ padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top; }}
</style><h1>Runs</h1><table>
{}
</table></html>
"""


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def packed(values: np.ndarray) -> dict:
    """{"scale": the largest size, "data": base64 of 16-bit integers}; a value is integer * scale / 32767."""
    values = np.asarray(values, np.float64)
    there = np.isfinite(values)
    scale = float(np.abs(values[there]).max(initial=0))
    whole = np.full(values.shape, NO_VALUE, "<i2")
    whole[there] = np.rint(values[there] / (scale or 1) * LARGEST)
    return {"scale": scale, "data": in_base64(whole)}


def in_base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def method_names(methods: list[Method]) -> list[dict]:
    return [{"name": m.name, "label": m.label} for m in methods]


def strongest_parts(scores: dict[str, np.ndarray]) -> dict:
    """Of each cell the PARTS parts that some method scores highest. scores: {method: [cells, parts]}.

    Returns their numbers and scores: {"index": base64 of [cells, k], "k": k, "scores": {method: packed [cells, k]}}.
    """
    strength = np.zeros(next(iter(scores.values())).shape)
    for values in scores.values():
        np.maximum(strength, np.nan_to_num(np.abs(values)), out=strength)
    chosen = np.argsort(-strength, axis=1, kind="stable")[:, :PARTS]
    found = {m: packed(np.take_along_axis(values, chosen, axis=1)) for m, values in scores.items()}
    return {"index": in_base64(chosen.astype("<u4")), "k": chosen.shape[1], "scores": found}


def prompts_shown(pairs: list[Pair], tokenizer, at: np.ndarray, found: Scores) -> tuple[list, list]:
    """Tokens, and examples that are numbers of these: see Shown. Of a set of answers the first is shown."""
    pairs = [replace(pair, answers=tuple(x[0] if isinstance(x, tuple) else x for x in pair.answers)) for pair in pairs]
    likely, chances = found.likely[: len(pairs)].tolist(), found.chances.astype(float).round(4).tolist()
    of_pairs = ((*pair.original, *pair.patch, *pair.answers, *more) for pair, more in zip(pairs, likely))
    ids = dict.fromkeys(i for of_pair in of_pairs for i in of_pair)
    number = {token: i for i, token in enumerate(ids)}
    examples = [
        {part: [number[i] for i in getattr(pair, part)] for part in ("original", "patch", "answers")}
        | {"roles": pair.roles, "at": at[i].tolist(), "values": found.values[i].tolist()}
        | {"likely": [number[token] for token in likely[i]], "chances": chances[i]}
        for i, pair in enumerate(pairs)
    ]
    return labels(list(ids), tokenizer), examples


# ---------------------------------------------------------------------------------------------------------------------
# What a run has


def tokenizer_of(name: str):
    """None if the model comes without one."""
    try:
        return load_tokenizer(name)
    except NoTokenizer:
        return None


def of_nodes(
    name: str,
    found: Scores,
    methods: list[Method],
    nodes: list[str],
    pairs: list[Pair],
    metric: str,
    exact: dict | None = None,
) -> Shown:
    """The node experiment. exact: as in Kind."""
    scores, (columns, at) = found.scores, overlay(pairs)
    first = {node: scores[methods[0].name, node] for node in nodes}
    n_layers, longest = next(iter(first.values())).shape[1:3]
    cells = sum(len(methods) if x.ndim == 3 else len(methods) + (len(methods) + 2) * PARTS for x in first.values())
    n = min(len(pairs), max(1, MOST // (cells * n_layers * longest)))
    kinds = []
    for node in nodes:
        every = {m.name: scores[m.name, node] for m in methods}
        means = {m: laid_over(x, at) for m, x in every.items()}  # [layers, columns, ...parts]
        kind = Kind(node, mean={}, each={})
        if first[node].ndim > 3:
            number = first[node].shape[3]
            of_mean = strongest_parts({m: x.reshape(-1, number) for m, x in means.items()})
            of_pairs = strongest_parts({m: x[:n].reshape(-1, number) for m, x in every.items()})
            kind.parts = {"what": node, "of": number, "mean": of_mean, "each": of_pairs}
            kind.wholes = [relp.node_of(node), *([WHOLE[node]] if node in WHOLE else [])]
            means, every = ({m: x.sum(-1) for m, x in of.items()} for of in (means, every))
        kind.mean = {m: packed(x) for m, x in means.items()}
        kind.each = {m: packed(x[:n]) for m, x in every.items()}
        if exact:
            kind.exact = packed(exact[node][:n].reshape(n, n_layers, longest, -1).any(-1))
        kinds.append(kind)
    tokens, examples = prompts_shown(pairs[:n], tokenizer_of(name), at, found)
    return Shown(
        title=name,
        metric=metric,
        methods=method_names(methods),
        rows=[str(layer) for layer in range(n_layers)],
        columns=columns,
        kinds=kinds,
        tokens=tokens,
        examples=examples,
        n_pairs=len(pairs),
        laid_over=int((at >= 0).any(1).sum()),
        values=found.values.mean(0).tolist(),
        meanings=legend(columns),
    )
