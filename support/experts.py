"""Mixtures of experts: Qwen3-MoE. It is Qwen3 (families.py), but its MLP is a sum of some of many small ones.

    w = softmax(W_router x)        mlp_out = sum_e w_e mlp_e(x), over the n_chosen experts e with the largest w

at each position by itself. The choice is constant: no gradient sees it, and no rule predicts what another choice would
do. The weights are constant or not: RouterRules has both. toy/README.md compares them.

models.py imports this file, and by it families.py, if it is there.
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
    """Its neurons are no node: each position has others."""

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
        times = getattr(rules, "route", torch.mul)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, t, rank = (chosen == e).nonzero(as_tuple=True)  # where it is chosen
            if len(b):
                own = expert(x[None, b, t], rules, node)  # [1, positions, d_model]
                weight = weights[None, b, t, rank, None].to(own.dtype)
                y = y.index_put((b, t), times(weight, own)[0], accumulate=True)
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
    """Experts in every decoder_sparse_step-th layer, but for those of mlp_only_layers."""
    n = hf.get("num_experts") or hf["num_local_experts"]
    chosen, d_expert, step = hf["num_experts_per_tok"], hf["moe_intermediate_size"], hf.get("decoder_sparse_step", 1)
    for what, value in {
        "experts": n,
        "experts per token": chosen,
        "neurons per expert": d_expert,
        "step": step,
    }.items():
        if not is_size(value):
            raise ValueError(f"config.json of a mixture gives {what} = {quote(value)}: a positive number is needed")
    if chosen > n:
        raise ValueError(f"config.json has a router that chooses {chosen} of {n} experts")
    layers = [layer for layer in range(hf["num_hidden_layers"]) if (layer + 1) % step == 0]
    layers = tuple(layer for layer in layers if layer not in (hf.get("mlp_only_layers") or []))
    mixture = Mixture(n, chosen, d_expert, bool(hf.get("norm_topk_prob", False)), layers) if layers else None
    return {**qwen3_config(hf), "block": "qwen3_moe", "mixture": mixture}


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 stacks experts in memory, gate_up_proj [expert, 2 * d_expert, d_model]. In files each is alone."""
    parts = {".experts.gate_up_proj": ("gate_proj", "up_proj"), ".experts.down_proj": ("down_proj",)}
    result = dict(tensors)
    for name in tensors:
        for end, names in parts.items():
            for e, x in enumerate(result.pop(name)) if name.endswith(end) else ():
                stem = name.rpartition(".")[0]
                result |= {f"{stem}.{e}.{n}.weight": y for n, y in zip(names, x.chunk(len(names)))}
    return result


MOST |= {"moe_intermediate_size": 10**6, "num_experts": 256, "num_local_experts": 256}
# Lines for experts that a model does not have stand for nothing
NAMES = {"model.layers.{}.mlp.gate": "blocks.{}.mlp.router"} | {
    f"model.layers.{{}}.mlp.experts.{e}.{part}_proj": f"blocks.{{}}.mlp.experts.{e}.{part}"
    for e in range(MOST["num_experts"])
    for part in ("gate", "up", "down")
}
BLOCKS["qwen3_moe"] = Qwen3MoeBlock
FAMILIES["qwen3_moe"] = qwen3_moe_config, LLAMA_NAMES | NORMS_OF_QK | NAMES
IN_MEMORY["qwen3_moe"] = unstacked
TABLE_4["qwen3_moe"] = Rules(ln=True, identity=True, half=True)
