"""A circuit of edges as a picture: the layers upward, a box for each node, each edge in the colour of what it feeds."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from beyond.edges.graph import Graph
from beyond.edges.layout import HEIGHT, ROW, WIDTH, ends, layout
from support.positions import legend

COLORS = {"q": "#7b3fa0", "k": "#2a8c4a", "v": "#1f6fb4", "mlp": "#c77400", "logits": "#333333"}
LABELS = {"q": "query", "k": "key", "v": "value", "mlp": "MLP", "logits": "logits"}
AGAINST = "against the behaviour"


def draw(title: str, edges: list[dict], graph: Graph) -> Figure:
    """edges: each with its "edge" (its name), "score" and "role" (where it matters most), the strongest first.

    The width of an edge is the size of its score; a dashed one works against the behaviour.
    """
    drawn = layout([edge["edge"] for edge in edges], graph)
    xs = [x for line in [*drawn.points, drawn.labels, drawn.boxes.values()] for x, _ in line] or [0.0]
    top = max((y for _, y in drawn.boxes.values()), default=0.0)
    size = max(6.5, 0.75 * (max(xs) - min(xs) + 2 * WIDTH)), 1.6 + 0.48 * (top + ROW)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    largest = max((abs(edge["score"]) for edge in edges), default=0) or 1.0
    for edge, points, at in reversed(list(zip(edges, drawn.points, drawn.labels))):  # the strongest on top
        score, kind = edge["score"], ends(edge["edge"])[2]
        look = {"edgecolor": COLORS[kind], "linewidth": 0.6 + 4.4 * abs(score) / largest, "alpha": 0.75}
        ax.add_patch(PathPatch(curve(points), facecolor="none", linestyle="--" if score > 0 else "-", **look))
        box = {"boxstyle": "round,pad=0.08", "fc": "white", "ec": "none", "alpha": 0.85}
        text = f"{edge['role']}\n" + f"{score:.3g}".replace("-", "−")
        ax.annotate(text, at, bbox=box, zorder=2.5, ha="center", va="center", fontsize=7, color=COLORS[kind])
    for name, (x, y) in drawn.boxes.items():
        corner = x - WIDTH / 2, y - HEIGHT / 2
        ax.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, "round,pad=0.02", fc="#f4f4f4", ec="#444444", zorder=3))
        ax.annotate(name, (x, y), ha="center", va="center", fontsize=9, zorder=4)
    ax.set_xlim(min(xs) - WIDTH, max(xs) + WIDTH)
    ax.set_ylim(-0.5, top + 0.5)
    ax.axis("off")
    figure.suptitle(title, fontsize=10, wrap=True)
    kinds = {ends(edge["edge"])[2] for edge in edges}
    shown = [(COLORS[kind], label) for kind, label in LABELS.items() if kind in kinds]
    handles = [Line2D([], [], color=color, linewidth=2.5, label=label) for color, label in shown]
    if any(edge["score"] > 0 for edge in edges):
        handles.append(Line2D([], [], color="grey", linewidth=2, linestyle="--", label=AGAINST))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, title="what an edge feeds")
    words = "on an edge: its score, and the position at which it matters most"
    meanings = legend([edge["role"] for edge in edges])
    ax.set_title(f"{words}. {meanings}" if meanings else words, fontsize=7, wrap=True)
    return figure


def curve(points: list[tuple[float, float]]) -> Path:
    """A line through the points that is vertical at each of them."""
    corners, codes = [points[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        middle = (y0 + y1) / 2
        corners += [(x0, middle), (x1, middle), (x1, y1)]
        codes += [Path.CURVE4] * 3
    return Path(corners, codes)
