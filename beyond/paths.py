"""EAP-IG for nodes, for comparison: the mean of the gradients at points between the two runs' embeddings.

    score(node) = (node(x_patch) - node(x_original)) . mean of the metric's gradient at the points

At a point the embedding is patch + k/m (original - patch), with k = 1 .. m, at all positions together. What follows is
computed from it. All nodes' gradients are taken at the same points, by one forward and one backward pass per point.
Integrated Gradients (steps of relp.attribute()) moves each node itself instead, and needs m passes for each of them.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

import relp
from relp import Key


@torch.enable_grad()
def activations_and_rho_from(
    model, tokens: Tensor, embedding: Tensor, targets: Tensor, nodes, metric=relp.logit_diff
) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """The activations and the gradients of the run whose stream begins with this embedding [batch, pos, 1, d_model]."""

    def stream_from_embedding(tokens: Tensor, lrp: bool, hook: Callable) -> Tensor:
        x = embedding.squeeze(2)
        for layer in range(model.config.n_layers):
            x = model.block(layer, x, lrp, hook)
        return x

    stream, acts = relp.record(SimpleNamespace(stream=stream_from_embedding), tokens, nodes, grad=True)
    rho = relp.coefficients(relp.read_out(model, stream, targets, metric), acts)
    return {key: x.detach() for key, x in acts.items()}, rho


def eap_ig(model, original, patch, targets, nodes, metric=relp.logit_diff, steps=5) -> dict[str, Tensor]:
    """EAP-IG-inputs (Hanna et al. 2024, arXiv 2403.17806) with m = `steps`, as in relp.attribute().

    beyond/edges/scores.py has it for edges.
    """
    relp.check(model, original, patch, targets, nodes)
    names, scores = {*nodes, "resid_pre"}, {}
    acts, patch_acts = (relp.record(model, tokens, names)[1] for tokens in (original, patch))
    for k in range(1, steps + 1):
        embedding = torch.lerp(patch_acts["resid_pre", 0], acts["resid_pre", 0], k / steps)
        _, rho = activations_and_rho_from(model, original, embedding, targets, names, metric)
        for key in rho:
            products = relp.difference(acts[key], patch_acts[key]) * rho[key]
            scores[key] = scores.get(key, 0) + products.sum(-1) / steps
    return relp.by_node(scores, nodes)
