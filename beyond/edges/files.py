"""The files of an edge run: edges.npz, and circuits in EAP-IG's format."""

import numpy as np
import torch
from torch import Tensor

from beyond.edges.graph import Graph
from beyond.edges.scoring import EdgeScores
from models import Config


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
        f"{graph.writers[w]}->{graph.readers[r]}": {"score": -float(scores[w, r]), "in_graph": bool(kept[w, r])}
        for w, r in graph.edges.nonzero().tolist()
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


def in_matrix(graph: Graph, values: Tensor) -> Tensor:
    """Values of the edges [edges] as [writers, readers], 0 where there is none."""
    result = torch.zeros(graph.edges.shape, dtype=values.dtype)
    result[graph.edges] = values
    return result
