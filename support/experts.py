"""Mixtures of experts: Qwen3-MoE. It is Qwen3 (families.py), but its MLP is a weighted sum of a few of many small MLPs.

    w = softmax(W_router x)        mlp_out = sum_e w_e mlp_e(x), over the n_chosen experts e with the largest w

at each position by itself. The choice is constant: no gradient sees it, and no rule predicts what another choice would
do. The weights have their gradient, unless RouterRules(router=True) makes them constant; toy/README.md compares both.

If this file exists, models.py imports it, and this file imports families.py.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import (
    BLOCKS,
    FAMILIES,
    IN_MEMORY,
    LLAMA_NAMES,
    MLP,
    MOST,
    TABLE_4,
    Config,
    Linear,
    Nodes,
    Rules,
    SequentialBlock,
    const,
    is_size,
    quote,
    upcast,
)
from support.families import NORMS_OF_QK, Qwen3Block, qwen3_config


class Mixture(NamedTuple):
    n_experts: int
    n_chosen: int  # at each position
    d_expert: int  # neurons of each expert
    normed: bool  # the weights of the chosen experts are divided by their sum
    layers: tuple[int, ...]  # that have experts; the others have an MLP


@dataclass(frozen=True)
class RouterRules(Rules):
    """Table 1, and a row of ours for the router: sum_e [w_e]_const. mlp_e(x), as the AH-rule has the pattern.

    Without it, and in all other Rules, the product w_e mlp_e(x) keeps its plain gradient.
    """

    router: bool = False

    def route(self, weight: Tensor, y: Tensor) -> Tensor:
        return const(weight, self.router) * y


class Expert(MLP):
    """An MLP without the node mlp_hidden, also in layers without experts: so all blocks have the same nodes."""

    def forward(self, x: Tensor, rules: Rules, node: Nodes) -> Tensor:
        return super().forward(x, rules, Nodes(None, 0))


class Experts(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.mixture = c.mixture
        self.router = Linear(c.d_model, c.mixture.n_experts, bias=False)
        expert = replace(c, d_mlp=c.mixture.d_expert)
        self.experts = nn.ModuleList(Expert(expert) for _ in range(c.mixture.n_experts))

    def forward(self, x: Tensor, rules: Rules, node: Nodes) -> Tensor:
        if hasattr(rules, "two_runs"):
            raise ValueError("two-point rules do not fit mixtures of experts: two runs may choose different experts")
        weights, chosen = self.choose(self.router(x, rules))
        weighted = getattr(rules, "route", torch.mul)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, t, rank = (chosen == e).nonzero(as_tuple=True)  # where it is chosen, as the 1st, 2nd, ... one
            if len(b):
                out = expert(x[None, b, t], rules, node)  # [1, positions, d_model]
                weight = weights[None, b, t, rank, None].to(out.dtype)
                y = y.index_put((b, t), weighted(weight, out)[0], accumulate=True)
        return y

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From the router's output, the weights of the chosen experts and their numbers, both [b, t, n_chosen]."""
        weights, chosen = upcast(logits).softmax(-1).topk(self.mixture.n_chosen)
        return weights / weights.sum(-1, keepdim=True) if self.mixture.normed else weights, chosen


class Qwen3MoeBlock(Qwen3Block):
    nodes = tuple(n for n in SequentialBlock.nodes if n != "mlp_hidden")

    def __init__(self, c: Config, layer: int):
        super().__init__(c, layer)
        self.mlp = Experts(c) if c.mixture and layer in c.mixture.layers else Expert(c)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and names


def qwen3_moe_config(hf: dict) -> dict:
    """Experts in every decoder_sparse_step-th layer, but for those of mlp_only_layers. A window is in every layer."""
    fields = {name: hf[name] for name in ("num_experts_per_tok", "moe_intermediate_size")}
    fields["num_experts"] = hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"]
    fields["decoder_sparse_step"] = hf.get("decoder_sparse_step", 1)
    for name, value in fields.items():
        if not is_size(value):
            raise ValueError(f"config.json gives {name} = {quote(value)}: a positive whole number is needed")
    n_chosen, d_expert, n_experts, step = fields.values()
    if n_chosen > n_experts:
        raise ValueError(f"config.json has a router that chooses {n_chosen} of {n_experts} experts")
    n_layers, without = hf["num_hidden_layers"], hf.get("mlp_only_layers") or []
    if not isinstance(without, list) or not all(layer in range(n_layers) for layer in without):
        raise ValueError(f"config.json gives mlp_only_layers = {quote(without)}: a list of layers is needed")
    normed = hf.get("norm_topk_prob", False)
    if not isinstance(normed, bool):
        raise ValueError(f"config.json gives norm_topk_prob = {quote(normed)}: true or false is needed")
    layers = tuple(layer for layer in range(n_layers) if (layer + 1) % step == 0 and layer not in without)
    if n_experts * len(layers) > MOST_EXPERTS:
        raise ValueError(f"config.json has {n_experts} experts in {len(layers)} layers: above {MOST_EXPERTS}")
    hf = {"head_dim": None, **hf, "layer_types": ["sliding_attention"] * n_layers}
    mixture = Mixture(n_experts, n_chosen, d_expert, normed, layers) if layers else None
    return {**qwen3_config(hf), "block": "qwen3_moe", "mixture": mixture}


# As in models.py: sizes that no model comes near
MOST |= {"moe_intermediate_size": 10**6, "num_experts": 512, "num_local_experts": 512}
MOST_EXPERTS = 50_000  # of all layers


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 stacks experts in memory: gate_up_proj [expert, 2 * d_expert, d_model], down_proj [expert, ...].

    In files each has its own gate_proj, up_proj and down_proj.
    """
    parts = {".experts.gate_up_proj": ("gate_proj", "up_proj"), ".experts.down_proj": ("down_proj",)}
    result = dict(tensors)
    for name, stack in tensors.items():
        for end, names in parts.items():
            if name.endswith(end):
                del result[name]
                for e, x in enumerate(stack):
                    stem = f"{name.rpartition('.')[0]}.{e}"
                    result |= {f"{stem}.{n}.weight": y for n, y in zip(names, x.chunk(len(names)))}
    return result


# The names of as many experts as may be: layout() leaves out those that a model does not have
NAMES = {"model.layers.{}.mlp.gate": "blocks.{}.mlp.router"} | {
    f"model.layers.{{}}.mlp.experts.{e}.{part}_proj": f"blocks.{{}}.mlp.experts.{e}.{part}"
    for e in range(MOST["num_experts"])
    for part in ("gate", "up", "down")
}
BLOCKS["qwen3_moe"] = Qwen3MoeBlock
FAMILIES["qwen3_moe"] = qwen3_moe_config, LLAMA_NAMES | NORMS_OF_QK | NAMES
IN_MEMORY["qwen3_moe"] = unstacked
TABLE_4["qwen3_moe"] = Rules(ln=True, identity=True, half=True)
