"""Other published methods at about RelP's price, for comparison: GIM, AttnLRP, CP-LRP, and AtP*.

    row                 RelP           GIM                       AttnLRP        CP-LRP
    ln                  x [1 / s]      as RelP                   as RelP        as RelP
    identity            x [phi(x)]     no rule                   as RelP        as RelP
    half                half of a*b    as RelP                   as RelP        as RelP
    q . k               no rule        half                      half           constant
    softmax             no rule        derivative at scores / 2  no rule        constant
    pattern . v         no rule        half                      half           of v only: the AH-rule

Linear layers have the 0-rule everywhere; the LRP papers have a small epsilon. Two published codes differ: GIM's package
for models of transformers leaves out some of its rules, and LXT's CP-LRP makes the gate constant.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import relp
from models import TABLE_4, Config, Pass, Rules, attend, attention_scores, backward_as, causal_mask


def paper_rules(family: str) -> Rules:
    """Table 4. ValueError if the family is not in it."""
    if family not in TABLE_4:
        raise ValueError(f"no rules are known for the family {family!r}: put them into models.TABLE_4")
    return TABLE_4[family]


@dataclass(frozen=True)
class HalfProducts(Rules):
    """The Half-rule, which Table 1 has for gates, for both matrix products of attention as well: q . k, pattern . v.

    So what reaches v is halved, and what reaches q and k, through both, is quartered.

    temperature  T: attention passes back the derivative of the softmax of scores / T, without that function's own 1 / T
    """

    temperature: float = 1.0

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, c: Config, p: Pass) -> Tensor:
        q, k = halved(q), halved(k)
        if self.temperature == 1:
            return halved(super().attention(q, k, v, mask, c, p))
        scores = attention_scores(q, k, c).masked_fill(mask, -torch.inf)
        smooth = self.temperature * (scores / self.temperature).softmax(-1)
        pattern = p.node("pattern", backward_as(scores.softmax(-1), smooth).to(v.dtype))
        z = torch.einsum("bqhk,bkhd->bqhd", pattern, v)
        return halved(z if p.wants("pattern") else backward_as(attend(q, k, v, mask, c, p), z))


def halved(x: Tensor) -> Tensor:
    """x, of which half the gradient goes back. Half of a bilinear product's: to halve it is to halve each factor's."""
    return backward_as(x, 0.5 * x)


def gim(family: str) -> Rules:
    """GIM (Edin et al. 2025, arXiv 2505.17630).

    With the signal g, pattern A = softmax(S), S_ij = q_i . k_j * scale, and P = softmax(S / 2),

        dA_ij = g_i . v_j / 2    dS_ij = P_ij (dA_ij - sum_m P_im dA_im)    dq_i = sum_j dS_ij k_j scale / 2
        dv_j = sum_i A_ij g_i / 2    norms frozen, gate and up half each, the activation's own derivative
    """
    return HalfProducts(ln=True, half=paper_rules(family).half, temperature=2.0)


def attnlrp(family: str) -> Rules:
    """AttnLRP (Achtibat et al. 2024, arXiv 2402.05602): the rules of Table 4, and half products. Its softmax rule,

        R_i = x_i (R_i' - s_i sum_j R_j')    R' at the output s, a Taylor expansion at x

    is the plain gradient: with R' = s . rho' it is x_i times s_i (rho_i' - sum_j s_j rho_j'), softmax's derivative.
    Its epsilon in linear layers, 1e-6 or less, is left out: the 0-rule.
    """
    return HalfProducts(**vars(paper_rules(family)))


def cp_lrp(family: str) -> Rules:
    """CP-LRP (Ali et al. 2022, arXiv 2202.07304): the rules of Table 4, and the pattern is constant."""
    return replace(paper_rules(family), ah=True)


# ---------------------------------------------------------------------------------------------------------------------


def atp_star(model, original, patch, targets, nodes, metric=relp.logit_diff) -> dict[str, Tensor]:
    """AtP* (Kramár et al. 2024, [18] of the paper), its QK fix: AtP that computes attention's softmax anew.

    score(q) = (pattern with that position's q from the patch run - pattern) . rho(pattern), and k alike. For each key,
    the softmax is computed once more. For other nodes it is AtP. Arguments and result as in relp.attribute().
    """
    if not any(relp.node_of(name) in ("q", "k") for name in nodes):
        return relp.attribute(model, original, patch, targets, nodes, metric)
    parts = ("head_q", "head_k", "head_pattern")
    acts, patch_acts, rho = relp.activations_and_rho(model, original, patch, targets, {*nodes, *parts}, metric)
    scores = {key: (relp.difference(acts[key], patch_acts[key]) * rho[key]).sum(-1) for key in rho}
    for layer, block in enumerate(model.blocks):
        q, k, q_patch, k_patch = (a[node, layer] for a in (acts, patch_acts) for node in ("head_q", "head_k"))
        of_q, of_k = softmax_anew(block.attn, q, k, q_patch, k_patch, rho["head_pattern", layer])
        scores["head_q", layer], scores["head_k", layer] = of_q, of_k
        scores["q", layer], scores["k", layer] = of_q.sum(-1, keepdim=True), of_k.sum(-1, keepdim=True)
    return relp.by_node(scores, nodes)


def softmax_anew(attn, q: Tensor, k: Tensor, q_patch: Tensor, k_patch: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each head's q and k [batch, pos, head], rho that of its pattern [batch, query, head, key]."""
    n_pos, key_heads = k.shape[1:3]
    mask = causal_mask(0, n_pos, n_pos, attn.window, q.device)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return attention_scores(q, attn.repeat_kv(k), attn.c).masked_fill(mask, -torch.inf)

    def effect(scores: Tensor) -> Tensor:
        return (scores.softmax(-1) - own.softmax(-1)) * rho

    own, with_k = scores(q, k), scores(q, k_patch)
    of_keys = []
    for key in range(n_pos):
        moved = own.clone()
        moved[..., key] = with_k[..., key]
        of_keys.append(effect(moved).sum((1, 3)))
    # query heads that share a key head: their effects add up
    return effect(scores(q_patch, k)).sum(-1), torch.stack(of_keys, dim=1).unflatten(2, (key_heads, -1)).sum(3)
