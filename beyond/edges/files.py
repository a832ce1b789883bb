"""The files of an edge run: edges.npz, circuits in EAP-IG's format, and the drawn one as Neuronpedia shows graphs."""

import re

import numpy as np
from torch import Tensor

from beyond.edges.graph import Graph
from beyond.edges.scoring import EdgeScores
from models import Config
from support.positions import overlay
from tasks import Pair, Tokenizer, labels


def arrays(graph: Graph, scores: dict[str, EdgeScores], roles: list[str]) -> dict[str, np.ndarray]:
    """What edges.npz holds. NaN where there is no edge.

    writers, readers, roles  names
    <method>                 [pairs, writers, readers], as EdgeScores.whole; one row, the mean, where they are too many
    <method>_positions       [writers, readers, roles], the mean over the pairs
    """
    there = graph.edges.numpy()
    result = {"writers": np.array(graph.writers), "readers": np.array(graph.readers), "roles": np.array(roles)}
    for method, of in scores.items():
        whole = of.whole.numpy()
        result[method] = spread(whole, there)
        if of.roles is not None:
            result[f"{method}_positions"] = np.moveaxis(spread(of.roles.astype(whole.dtype), there), 0, -1)
    return result


def spread(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Values of the edges [n, edges] as [n, writers, readers]."""
    result = np.full((len(values), *there.shape), np.nan, values.dtype)
    result[:, there] = values
    return result


def circuit_json(c: Config, scores: Tensor, kept: Tensor) -> dict:
    """A circuit as EAP-IG's Graph.from_json reads it. scores: float [writers, readers]; kept: bool, the same.

    There, a positive score speaks for the behaviour: it is ours times -1. Every edge of the graph is listed.
    """
    graph = Graph.of(c)
    edges = {
        name: {"score": -score, "in_graph": on}
        for name, score, on in zip(graph.names, scores[graph.edges].tolist(), kept[graph.edges].tolist())
    }
    # of a pruned circuit, a node is part if it writes; the logits are if they read
    nodes = dict(zip(graph.writers, kept.any(1).tolist())) | {"logits": bool(kept[:, -1].any())}
    return {
        "cfg": {
            "n_layers": c.n_layers,
            "n_heads": c.n_heads,
            "parallel_attn_mlp": graph.parallel,
            "d_model": c.d_model,
        },
        "nodes": {name: {"in_graph": on} for name, on in nodes.items()},
        "edges": edges,
    }


def neuronpedia_json(
    name: str, graph: Graph, drawn: list[dict], pairs: list[Pair], tokenizer: Tokenizer | None, metric: str
) -> dict:
    """A circuit as an attribution graph for Neuronpedia's viewer. drawn: as experiment.describe() lists the edges.

    A component is one node, at the position of the strongest edge that it writes to, since an edge's position is that
    of its writer; logits, and what has no such edge, is at the last position. There, a positive weight speaks for the
    behaviour: it is our score times -1. The prompt that is shown is an original one with all roles.
    """
    roles, at = overlay(pairs)
    example = int((at >= 0).sum(1).argmax())
    position = {role.strip(): int(i) for role, i in zip(roles, at[example]) if i >= 0}
    tokens = labels(list(pairs[example].original), tokenizer)
    edges = [(*edge["edge"].split("->"), edge["score"], edge["role"]) for edge in drawn]
    places, last = {}, len(tokens) - 1
    for writer, *_, role in edges:  # the strongest first
        places.setdefault(writer, position.get(role, last))
    for _, reader, *_ in edges:
        places.setdefault(reader.partition("<")[0], last)

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
    for writer, reader, score, _ in edges:
        ends = nodes[writer]["node_id"], nodes[reader.partition("<")[0]]["node_id"]
        links[ends] = links.get(ends, 0.0) - score
    description = (
        "A circuit of edges between components (heads and MLPs), found on prompt pairs such as this one. A weight is "
        f"the edge's score times -1: positive if {metric} falls when the edge is patched, so that the edge speaks for "
        "the original prompt's answer. The edges into a head's query, key and value are added. A component stands "
        "where its strongest edge matters most, in the mean over the prompts."
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
