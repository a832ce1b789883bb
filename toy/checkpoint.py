"""Writes a model of models.py under the names and in the layout of Hugging Face transformers."""

import torch
from torch import Tensor

from models import FAMILIES, Transformer

PREFIX = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}  # of all names but the unembedding's
LAYERS = {"gpt2": "h."}
UNEMBEDDING = ("lm_head", "embed_out")


def to_checkpoint(model: Transformer) -> dict[str, Tensor]:
    """{name: tensor} for safetensors' save_file: the inverse of loading."""
    family, ours, result = model.config.family, dict(model.state_dict()), {}
    prefix, layers = PREFIX.get(family, "model."), LAYERS.get(family, "layers.")
    for theirs, modules in sorted(FAMILIES[family][1].items(), key=lambda item: -len(item[1])):  # fused ones first
        for layer in range(model.config.n_layers) if theirs.startswith(".") else [None]:
            for kind in ("weight", "bias"):
                block = "" if layer is None else f"blocks.{layer}"
                names = [f"{block}{module}.{kind}" for module in modules]
                if names[0] in ours:
                    xs = [ours.pop(name) for name in names]
                    stem = f"{prefix}{layers}{layer}" if layer is not None else prefix * (theirs not in UNEMBEDDING)
                    x = fused(xs, model.config)
                    x = x.t() if family == "gpt2" and layer is not None else x  # its weights are [d_in, d_out]
                    result[f"{stem}{theirs}.{kind}"] = x.contiguous()
    return result


def fused(xs: list[Tensor], c) -> Tensor:
    """The one tensor that holds those of several modules: models.split() backward."""
    if c.family == "gpt_neox" and len(xs) == 3:
        return torch.stack([x.unflatten(0, (c.n_heads, c.d_head)) for x in xs], 1).flatten(0, 2)
    return torch.cat(xs)
