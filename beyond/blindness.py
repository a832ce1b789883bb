"""Why AtP misses much of what a node does: it is blind along the stream.

A norm divides the stream by its size. If the stream only grows, what comes out of the norm stays as it was, so that the
norm's derivative along the stream is 0. A node whose output points the way of the stream that is normed next is then
mostly invisible to the gradient: layer 0's MLP output, say, is nearly all of that stream. The LN-rule holds the size
constant, and RelP sees the whole change.

So the change of a node is taken apart: along the stream, and across it. toy/README.md says what comes out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import relp
from models import Rules, upcast


@dataclass
class Parts:
    """A node's change in one layer, taken apart, and what AtP and the LN-rule make of the parts; each [batch, pos]."""

    cos: Tensor  # between the node's activation and the stream that is normed next, on the original prompt
    size: Tensor  # of the activation, as a share of that stream's
    atp_along: Tensor  # change along the stream . gradient
    atp_across: Tensor  # the rest of the change . gradient
    ln_along: Tensor  # change along the stream . rho of the LN-rule
    ln_across: Tensor  # the rest of the change . that rho

    @property
    def atp(self) -> Tensor:
        return self.atp_along + self.atp_across

    @property
    def mended(self) -> Tensor:
        """AtP, but with the LN-rule for the part that AtP does not see."""
        return self.ln_along + self.atp_across


def take_apart(
    model, original: Tensor, patch: Tensor, answers: Tensor, node: str, layer: int, metric=relp.logit_diff
) -> Parts:
    """The parts of the change of resid_pre, attn_out or mlp_out in one layer. Arguments as in relp.attribute()."""
    after = {"resid_pre": "resid_pre", "attn_out": "resid_mid", "mlp_out": "resid_post"}
    if node not in after:
        raise ValueError(f"node must be one of {', '.join(after)}, got {node!r}")
    if not hasattr(model.blocks[layer].ln1, "weight"):
        raise ValueError(f"{model.config.family} models do not norm the stream before attention and MLP")
    next_normed = after[node] if after[node] in model.nodes else "resid_post"  # parallel blocks have no resid_mid
    relp.check(model, original, patch, answers, [node, next_normed], metric)
    keys = [(node, layer), (next_normed, layer)]
    plain, by_rule = (
        relp.propagate(model, original, patch, answers, keys, metric, lrp=rules) for rules in (False, Rules(ln=True))
    )
    terms = plain[node, layer]
    change = relp.difference(terms.original, terms.patch)
    x, stream = (upcast(plain[key].original) for key in keys)
    if model.config.layer_norm:  # which takes off the mean before it divides
        x, stream = (y - y.mean(-1, keepdim=True) for y in (x, stream))
    direction = stream / stream.norm(dim=-1, keepdim=True)
    along = (change * direction).sum(-1, keepdim=True) * direction
    rho, rho_ln = terms.rho, by_rule[node, layer].rho
    return Parts(
        cos=torch.cosine_similarity(x, stream, dim=-1),
        size=x.norm(dim=-1) / stream.norm(dim=-1),
        atp_along=(along * rho).sum(-1),
        atp_across=((change - along) * rho).sum(-1),
        ln_along=(along * rho_ln).sum(-1),
        ln_across=((change - along) * rho_ln).sum(-1),
    )
