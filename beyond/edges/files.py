"""The files of an edge run: edges.npz, circuits in EAP-IG's format, and the drawn one as Neuronpedia shows graphs."""

import re
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from beyond.edges.graph import Graph
from beyond.edges.layout import HEIGHT, WIDTH, ends, layout
from models import Config
from support.positions import legend, overlay
from support.prompts import prompt_arrays
from tasks import Pair, Tokenizer, labels


def arrays(graph: Graph, scores: dict[str, Tensor], pairs: list[Pair], judged: list[Pair]) -> dict[str, np.ndarray]:
    """What edges.npz holds. scores: {method: [pairs, edges]}.

    writers, readers  their names
    <method>          [pairs, writers, readers], NaN where there is no edge
    lengths, original_tokens, patch_tokens, answers  the pairs, as in scores.npz; with judged_ before it, those that
                      the circuits were judged on
    """
    there = graph.edges.numpy()
    result = {"writers": np.array(graph.writers), "readers": np.array(graph.readers)}
    for method, of_edges in scores.items():
        result[method] = np.full((len(of_edges), *there.shape), np.nan, of_edges.numpy().dtype)
        result[method][:, there] = of_edges.numpy()
    result |= prompt_arrays(pairs)
    return result | {f"judged_{name}": array for name, array in prompt_arrays(judged).items()}


def circuit_json(c: Config, scores: Tensor, kept: Tensor) -> dict:
    """A circuit as EAP-IG's Graph.from_json reads it. scores: float [writers, readers]; kept: bool, the same.

    There, a positive score speaks for the behaviour: it is ours times -1. Every edge of the graph is listed, and every
    node with the sum of the edges from it.
    """
    graph = Graph.of(c)
    edges = {
        name: {"score": -score, "in_graph": on}
        for name, score, on in zip(graph.names, scores[graph.edges].tolist(), kept[graph.edges].tolist())
    }
    of_circuit = {node for name, edge in edges.items() if edge["in_graph"] for node in ends(name)[:2]}
    nodes = dict(zip(graph.writers, (-scores.where(graph.edges, 0).sum(1)).tolist()))
    nodes = {name: {"in_graph": name in of_circuit, "score": score} for name, score in nodes.items()}
    return {
        "cfg": {
            "n_layers": c.n_layers,
            "n_heads": c.n_heads,
            "parallel_attn_mlp": graph.parallel,
            "d_model": c.d_model,
        },
        "nodes": nodes | {"logits": {"in_graph": "logits" in of_circuit}},
        "edges": edges,
    }


@dataclass
class Page:
    """What circuit.html shows: see layout.Drawn; edges as figure.draw() takes them, with "scores" by every method."""

    title: str
    metric: str
    methods: dict[str, str]  # {name: label}
    edges: list[dict]
    boxes: dict[str, tuple[float, float]]
    size: tuple[float, float]  # of a box
    meanings: str  # of the positions


def page(title: str, edges: list[dict], graph: Graph, methods: dict[str, str], metric: str) -> Page:
    drawn, edges = layout([edge["edge"] for edge in edges], graph), [dict(edge) for edge in edges]
    for edge, points, at in zip(edges, drawn.points, drawn.labels):
        writer, reader, kind = ends(edge["edge"])
        edge |= {"writer": writer, "reader": reader, "kind": kind, "points": points, "at": at}
    meanings = legend([edge["role"] for edge in edges])
    return Page(title, metric, methods, edges, drawn.boxes, (WIDTH, HEIGHT), meanings)


def neuronpedia_json(
    name: str, graph: Graph, edges: list[dict], pairs: list[Pair], tokenizer: Tokenizer | None, metric: str
) -> dict:
    """A circuit as an attribution graph for Neuronpedia's viewer. edges: as figure.draw() takes them.

    A component is one node, at the position of the strongest edge that it writes to, since an edge's position is that
    of its writer; logits, and what has no such edge, is at the last position. There, a positive weight speaks for the
    behaviour: it is our score times -1. The prompt that is shown is an original one with all roles.
    """
    roles, at = overlay(pairs)
    shown = int((at >= 0).sum(1).argmax())
    position = {role.strip(): int(i) for role, i in zip(roles, at[shown]) if i >= 0}
    tokens = labels(list(pairs[shown].original), tokenizer)
    places, last = {}, len(tokens) - 1
    for edge in edges:  # the strongest first
        places.setdefault(ends(edge["edge"])[0], position.get(edge["role"], last))
    for edge in edges:
        places.setdefault(ends(edge["edge"])[1], last)

    def node(component: str) -> dict:
        part, _, head = component.partition(".")
        number, place = part.lstrip("am"), places[component]
        kinds = {"input": ("embedding", "E"), "logits": ("logit", str(graph.n_layers))}
        kind, layer = kinds.get(component, ("attention head" if head else "mlp", number))
        identity, label = f"{component}@{place}", f"{component} at {tokens[place]!r}"
        where = {"layer": layer, "ctx_idx": place, "feature_type": kind, "feature": None}
        return {"node_id": identity, "jsNodeId": identity, "clerp": label} | where

    nodes = {component: node(component) for component in [*graph.writers, "logits"] if component in places}
    links = {}  # a head reads with q, k and v: one link is their sum
    for edge in edges:
        link = tuple(nodes[component]["node_id"] for component in ends(edge["edge"])[:2])
        links[link] = links.get(link, 0.0) - edge["score"]
    description = (
        f"A circuit of edges between heads and MLPs. A weight is positive if {metric} falls when the edge is patched: "
        "the edge speaks for the original prompt's answer. The edges into a head's query, key and value are added. A "
        "component stands where its strongest edge matters most, in the mean over the prompts."
    )
    return {
        "metadata": {
            "slug": "-".join(filter(None, re.split(r"[^a-z0-9]+", f"{name} {metric} circuit".lower()))),
            "scan": name,
            "prompt_tokens": tokens,
            "prompt": "".join(tokens),
            "info": {"description": description, "generator": {"name": "relp", "version": "1"}},
        },
        "qParams": {},
        "nodes": list(nodes.values()),
        "links": [{"source": a, "target": b, "weight": weight} for (a, b), weight in links.items()],
    }
