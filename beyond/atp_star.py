"""AtP* (Kramár et al. 2024, [18] of the paper): AtP that computes attention's softmax instead of linearising it."""

import torch
from torch import Tensor

import relp
from models import Attend, Nodes, causal_mask
from relp import PARTS_OF


def attribute(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=relp.logit_diff
) -> dict[str, Tensor]:
    """AtP with the QK fix of AtP*; for nodes other than q and k it is relp.attribute(). Arguments and result are its.

    score(q) = (pattern with that position's q from the patch run - pattern) . rho(pattern), and k alike. For each key,
    the softmax is computed once more. For models.Transformer only.
    """
    relp.check(model, original, patch, answers, nodes, metric)
    names = [name for name in nodes if PARTS_OF.get(name, name) in ("q", "k")]
    others = [name for name in nodes if name not in names]
    result = relp.attribute(model, original, patch, answers, others, metric) if others else {}
    if not names:
        return result
    acts, rho = relp.coefficients(model, original, answers, ("q", "k", "pattern"), metric)
    _, patch_acts = relp.record(model, patch, ("q", "k", "pattern"))  # formed here too, so that equal runs round alike
    fixed = {}
    for layer, block in enumerate(model.blocks):
        q, k, q_patch, k_patch = (a[n, layer].detach() for a in (acts, patch_acts) for n in "qk")
        n_pos, key_heads = k.shape[1:3]
        k, k_patch = block.attn.repeat_kv(k), block.attn.repeat_kv(k_patch)
        mask = causal_mask(0, n_pos, n_pos, block.attn.window, q.device)
        attend = Attend(model.config, mask, Nodes(None, layer))
        scores, scores_patch = attend.scores(q, k), attend.scores(q, k_patch)  # [batch, query, head, key]
        pattern = attend.softmax(scores)
        r = rho["pattern", layer].to(pattern.dtype)
        fixed["q", layer] = ((attend.softmax(attend.scores(q_patch, k)) - pattern) * r).sum(-1)
        by_key = []
        for key in range(n_pos):
            moved = scores.clone()
            moved[..., key] = scores_patch[..., key]
            by_key.append(((attend.softmax(moved) - pattern) * r).sum((1, 3)))  # [batch, head]
        # query heads that share a key head: their effects add up
        fixed["k", layer] = torch.stack(by_key, dim=1).unflatten(2, (key_heads, -1)).sum(3)

    def score(name, key):
        return fixed[key] if name in PARTS_OF else fixed[key].sum(-1, keepdim=True)

    result |= relp.by_layer(model, names, score)
    return {name: result[name] for name in nodes}
