"""A circuit of edges as a picture: the layers upward, a box for each node, each edge in the colour of what it feeds."""

from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from beyond.edges.graph import Graph
from support.positions import legend

COLORS = {"q": "#7b3fa0", "k": "#2a8c4a", "v": "#1f6fb4", "mlp": "#c77400", "logits": "#333333"}
LABELS = {"q": "query", "k": "key", "v": "value", "mlp": "MLP", "logits": "logits"}
MOST = 40  # edges that an eye can take in
WIDTH, HEIGHT, GAP = 1.1, 0.34, 0.55  # of a box; between boxes of a row
ROW = 1.5  # from one row to the next
PORTS = {"q": -0.35, "k": 0.0, "v": 0.35}  # where an edge enters a head's box


def draw(title: str, edges: list[dict], graph: Graph) -> Figure:
    """edges: {"edge": name, "score", "role": the position at which it matters most}, the strongest first.

    The width of an edge is the size of its score; a dashed one works against the behaviour.
    """
    shown = [(*edge["edge"].split("->"), edge["score"], edge["role"]) for edge in edges[:MOST]]
    at = layout([(writer, reader.partition("<")[0]) for writer, reader, *_ in shown], graph)
    x, y = (np.array([place[i] for place in at.values()] or [0.0]) for i in (0, 1))
    figure = Figure(figsize=(max(7, 3 + 1.05 * np.ptp(x)), 2.4 + 0.9 * np.ptp(y)), layout="constrained")
    ax = figure.subplots()
    largest = max((abs(score) for *_, score, _ in shown), default=0) or 1.0
    entered = Counter()
    for writer, reader, score, role in reversed(shown):  # the strongest on top
        node, _, kind = reader.rstrip(">").partition("<")
        kind = kind or ("logits" if node == "logits" else "mlp")
        (x0, y0), (x1, y1) = at[writer], at[node]
        ends = (x0, y0 + HEIGHT / 2), (x1 + PORTS.get(kind, 0) * WIDTH, y1 - HEIGHT / 2)
        draw_edge(ax, ends, COLORS[kind], 0.6 + 5.4 * abs(score) / largest, score > 0, role, entered[node])
        entered[node] += 1
    for name, (x0, y0) in at.items():
        corner = x0 - WIDTH / 2, y0 - HEIGHT / 2
        ax.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, "round,pad=0.02", fc="#f4f4f4", ec="#444444", zorder=3))
        ax.annotate(name, (x0, y0), ha="center", va="center", fontsize=9, zorder=4)
    ax.set_xlim(x.min() - WIDTH, x.max() + WIDTH)
    ax.set_ylim(y.min() - 0.6, y.max() + 0.6)
    ax.axis("off")
    more = f" (the {MOST} strongest of {len(edges)} edges; the file has the others)" if len(edges) > MOST else ""
    figure.suptitle(f"{title}{more}", fontsize=10)
    handles = [Line2D([], [], color=color, linewidth=2.5, label=LABELS[kind]) for kind, color in COLORS.items()]
    handles.append(Line2D([], [], color="grey", linewidth=2, linestyle="--", label="against the behaviour"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, title="what an edge feeds")
    if meanings := legend([role for *_, role in shown]):
        ax.set_title(f"on an edge: the position at which it matters most. {meanings}", fontsize=7, wrap=True)
    return figure


def draw_edge(ax, ends: tuple, color: str, width: float, against: bool, role: str, number: int) -> None:
    """A curve that leaves its writer upward and comes to its reader from below, with its position written on it.

    number: how many edges into the same node are drawn before; positions are written at different heights
    """
    (x0, y0), (x1, y1) = ends
    far = y1 - y0 > ROW
    side = WIDTH if far and abs(x1 - x0) < WIDTH / 2 else 0  # around what is between them
    points = np.array([(x0, y0), (x0 + side, y0 + 0.5 * ROW), (x1 + side, y1 - 0.5 * (y1 - y0)), (x1, y1)])
    path = Path(points, [Path.MOVETO, *[Path.CURVE4] * 3])
    line = "--" if against else "-"
    ax.add_patch(FancyArrowPatch(path=path, arrowstyle="-", color=color, linewidth=width, linestyle=line, alpha=0.75))
    t = 0.85 - 0.1 * (number % 5)
    weights = np.array([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])  # Bezier's
    box = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8}
    ax.annotate(role, weights @ points, bbox=box, zorder=2.5, ha="center", va="center", fontsize=6.5, color=color)


def layout(edges: list[tuple[str, str]], graph: Graph) -> dict[str, tuple[float, float]]:
    """{node: (x, y)}: input, then for each layer a row of heads and one for the MLP, then logits; empty rows left out.

    Nodes of a row are put in the order of the mean place of those they are connected with, which spares crossings.
    """
    used = {name for edge in edges for name in edge}
    every = [["input"], *(row for layer in range(graph.n_layers) for row in (graph.heads_of(layer), [f"m{layer}"]))]
    rows = [[name for name in row if name in used] for row in [*every, ["logits"]]]
    rows = [row for row in rows if row]
    neighbours = {name: [] for name in used}
    for writer, reader in edges:
        neighbours[writer].append(reader)
        neighbours[reader].append(writer)
    x = {name: place for row in rows for name, place in spread(row)}
    for _ in range(20):
        for row in rows:
            row.sort(key=lambda name: np.mean([x[other] for other in neighbours[name]]))
            x |= dict(spread(row))
    # MLPs to the right, so that the edges between the heads of different layers do not run through them
    right = max(x.values(), default=0) + WIDTH
    y = {name: ROW * i for i, row in enumerate(rows) for name in row}
    return {name: (right if name.startswith("m") else x[name], y[name]) for name in y}


def spread(row: list[str]) -> list[tuple[str, float]]:
    """Places of the nodes of one row, around 0."""
    return [(name, (i - (len(row) - 1) / 2) * (WIDTH + GAP)) for i, name in enumerate(row)]
