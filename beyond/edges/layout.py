"""Where the boxes and the edges of a drawn circuit stand: the layers upward, and no edge behind a box.

The rows, from below: input; of each layer that occurs its heads, then its MLP; logits. Between two rows there is one
of labels: an edge's label stands below its reader. An edge that goes past a row has a place in it, which it shares with
the other edges from its writer. What stands in one row stands side by side.
"""

from dataclasses import dataclass

import numpy as np

from beyond.edges.graph import Graph

WIDTH, HEIGHT = 1.1, 0.36  # of a box
LABEL, LANE, GAP = 0.62, 0.1, 0.22  # widths: of a label, of an edge that goes past; between two of a row
ROW = 1.5  # from one row of boxes to the next
BELOW = 0.62  # from a box down to the labels of the edges into it
PORTS = {"q": -0.35, "k": 0.0, "v": 0.35}  # where an edge enters a head's box


@dataclass
class Drawn:
    """boxes: {node: its middle}; of each edge its points, from writer to reader, and where its label stands."""

    boxes: dict[str, tuple[float, float]]
    points: list[list[tuple[float, float]]]
    labels: list[tuple[float, float]]


def ends(edge: str) -> tuple[str, str, str]:
    """a0.h1->a2.h0<k> is ("a0.h1", "a2.h0", "k"): writer, reading node, what it feeds there; also "mlp" or "logits"."""
    writer, reader = edge.split("->")
    node, _, kind = reader.rstrip(">").partition("<")
    return writer, node, kind or ("logits" if node == "logits" else "mlp")


def layout(edges: list[str], graph: Graph) -> Drawn:
    """The places of these edges, by their names, and of the nodes that they join."""
    used = {node for edge in edges for node in ends(edge)[:2]}
    every = [["input"], *(row for layer in range(graph.n_layers) for row in (graph.heads_of(layer), [f"m{layer}"]))]
    rows = [[node for node in row if node in used] for row in [*every, ["logits"]]]
    rows = [row for row in rows if row]
    level = {node: 2 * i for i, row in enumerate(rows) for node in row}  # between them, odd, those of the labels

    # each edge as a chain of items: its writer, its writer's lanes, its label, its reader
    chains, items = [], [{} for _ in range(2 * len(rows))]  # items: {item: its width} of each level
    for node, i in level.items():
        items[i][node] = WIDTH
    for edge in edges:
        writer, reader, _ = ends(edge)
        lanes = [(writer, i) for i in range(level[writer] + 1, level[reader] - 1)]
        for lane in lanes:
            items[lane[1]][lane] = LANE
        items[level[reader] - 1][edge] = LABEL
        chains.append([writer, *lanes, edge, reader])
    x = spread_out(items, chains)

    def y(i: int) -> float:
        return i / 2 * ROW if i % 2 == 0 else (i + 1) / 2 * ROW - BELOW

    points = []
    for edge, (writer, *lanes, label, reader) in zip(edges, chains):
        line = [(x[writer], y(level[writer]) + HEIGHT / 2)]
        for lane in lanes:
            beside = HEIGHT if lane[1] % 2 == 0 else 0  # straight up beside the boxes of a row
            line += [(x[lane], y(lane[1]) - beside), (x[lane], y(lane[1]) + beside)]
        end = x[reader] + PORTS.get(ends(edge)[2], 0) * WIDTH
        points.append([*line, (x[label], y(level[reader] - 1)), (end, y(level[reader]) - HEIGHT / 2)])
    return Drawn({node: (x[node], y(i)) for node, i in level.items()}, points, [line[-2] for line in points])


def spread_out(items: list[dict], chains: list[list]) -> dict:
    """{item: x}: each item near the mean of those that it is joined with, in an order that spares crossings.

    Rows are sorted and placed again and again, from below and from above (the barycentre heuristic).
    """
    joined = {item: {-1: [], 1: []} for of_level in items for item in of_level}
    for chain in chains:
        for lower, upper in zip(chain, chain[1:]):
            joined[lower][1].append(upper)
            joined[upper][-1].append(lower)
    order = [list(of_level) for of_level in items]
    x = {item: place for i, of_level in enumerate(order) for item, place in placed(of_level, items[i], {}).items()}
    for sweep in range(40):
        up = sweep % 2 == 0
        sides = (-1,) if up else (1,)
        if sweep >= 20:
            sides = (-1, 1)
        for i in range(len(items)) if up else reversed(range(len(items))):
            near = {item: [x[other] for side in sides for other in joined[item][side]] for item in order[i]}
            wanted = {item: float(np.mean(of_item)) if of_item else x[item] for item, of_item in near.items()}
            order[i].sort(key=wanted.get)
            x |= placed(order[i], items[i], wanted)
    return x


def placed(order: list, widths: dict, wanted: dict) -> dict:
    """{item: x} in this order, side by side, as near as can be to what is wanted (isotonic regression)."""
    offsets, blocks, at = [], [], 0.0
    for item in order:
        at += widths[item] / 2 + (GAP if offsets else 0)
        offsets.append(at)
        blocks.append([wanted.get(item, 0.0) - at, 1])
        at += widths[item] / 2
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:  # they would overlap: they move together
            (b, m), (a, n) = blocks.pop(), blocks.pop()
            blocks.append([(a * n + b * m) / (n + m), n + m])
    starts = [start for start, n in blocks for _ in range(n)]
    return {item: start + offset for item, start, offset in zip(order, starts, offsets)}
