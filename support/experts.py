"""Mixtures of experts: Qwen3-MoE. It is Qwen3 (families.py), but its MLP is a weighted sum of a few of many small MLPs.

    w = softmax(W_router x)        mlp_out = sum_e w_e mlp_e(x), over the n_chosen experts e with the largest w

at each position by itself. The choice is constant: no gradient sees it, and no rule predicts what another choice would
do. The weights w have their plain gradient.

When this file is imported, the tables of models.py know the family too.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import (
    BLOCKS,
    COLUMNS,
    FAMILIES,
    MLP,
    NODES,
    TABLE_4,
    TIDY,
    Block,
    Config,
    Linear,
    Pass,
    Rules,
    upcast,
)
from support.families import QK_NORMS, NormedAttention, qwen3_config


class Mixture(NamedTuple):
    n_experts: int
    n_chosen: int  # at each position
    d_expert: int  # neurons of each expert
    normed: bool  # the weights of the chosen experts are divided by their sum
    layers: tuple[int, ...]  # that have experts; the others have an MLP


@dataclass(frozen=True)
class MixtureConfig(Config):
    mixture: Mixture | None = None  # None: no layer has experts


class Expert(MLP):
    """An MLP without the node mlp_hidden, also in layers without experts: so all blocks have the same nodes."""

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        return super().forward(x, Pass(p.rules))


class Experts(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.mixture = c.mixture
        self.router = Linear(c.d_model, c.mixture.n_experts, bias=False)
        expert = replace(c, d_mlp=c.mixture.d_expert)
        self.experts = nn.ModuleList(Expert(expert) for _ in range(c.mixture.n_experts))

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        weights, chosen = self.choose(self.router(x, p))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            b, t, rank = (chosen == e).nonzero(as_tuple=True)  # where it is chosen, as the 1st, 2nd, ... one
            if len(b):
                out = expert(x[None, b, t], p)  # [1, positions, d_model]
                weight = weights[None, b, t, rank, None].to(out.dtype)
                y = y.index_put((b, t), (weight * out)[0], accumulate=True)
        return y

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From the router's output, the weights of the chosen experts and their numbers, both [b, t, n_chosen]."""
        weights, chosen = upcast(logits).softmax(-1).topk(self.mixture.n_chosen)
        return weights / weights.sum(-1, keepdim=True) if self.mixture.normed else weights, chosen


class Qwen3MoeBlock(Block):
    def __init__(self, c: Config, layer: int):
        super().__init__(c, layer, NormedAttention)
        self.nodes = tuple(name for name in NODES if name != "mlp_hidden")
        self.mlp = Experts(c) if c.mixture and layer in c.mixture.layers else Expert(c)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and names


def qwen3_moe_config(hf: dict) -> Config:
    """Experts in every decoder_sparse_step-th layer, but for those of mlp_only_layers. A window is in every layer."""
    n_layers, step = hf["num_hidden_layers"], hf.pop("decoder_sparse_step", 1)
    without = hf.pop("mlp_only_layers", None) or []
    layers = tuple(layer for layer in range(n_layers) if (layer + 1) % step == 0 and layer not in without)
    n_experts = hf.pop("num_local_experts", None) or hf.pop("num_experts", 128)
    mixture = Mixture(
        n_experts, hf.pop("num_experts_per_tok", 8), hf.pop("moe_intermediate_size", 768),
        hf.pop("norm_topk_prob", False), layers,
    )  # fmt: skip
    if not 1 <= mixture.n_chosen <= n_experts <= MOST_EXPERTS:
        raise ValueError(f"config.json has a router that chooses {mixture.n_chosen} of {n_experts} experts")
    for name in ("output_router_logits", "router_aux_loss_coef"):
        hf.pop(name, None)  # of training
    hf["max_window_layers"] = 0
    config = qwen3_config(hf, "qwen3_moe", d_head=0, kv_heads=4)
    return MixtureConfig(**vars(config), mixture=mixture if layers else None)


MOST_EXPERTS = 512  # that have names


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


NAMES = {".mlp.gate": [".mlp.router"]} | {
    f".mlp.experts.{e}.{part}_proj": [f".mlp.experts.{e}.{part}"]
    for e in range(MOST_EXPERTS)
    for part in ("gate", "up", "down")
}
BLOCKS["qwen3_moe"] = Qwen3MoeBlock
FAMILIES["qwen3_moe"] = qwen3_moe_config, COLUMNS["llama"] | QK_NORMS | NAMES
TIDY["qwen3_moe"] = unstacked
TABLE_4["qwen3_moe"] = Rules(ln=True, identity=True, half=True)
