"""Sparse autoencoders (SAEs) from files: dictionaries of directions, few of which make up an activation at a time."""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from models import SHORT_NAMES, Transformer, first_line
from support.processes import say


@dataclass
class SAE:
    """The sparse autoencoder of one node: x [..., d] -> features f [..., n_features], f >= 0 -> x_hat [..., d].

    threshold  None: f = ReLU(pre). Else a JumpReLU: f = pre where pre > threshold, otherwise 0 (Rajamanoharan et al.
               2024).
    centred    b_dec is taken off x before it is encoded (dictionary_learning does so, Gemma Scope does not, SAELens
               either way).

    d is d_model; of z it is n_heads * d_head. x should have the weights' dtype.
    """

    W_enc: Tensor  # [d, n_features]
    b_enc: Tensor  # [n_features]
    W_dec: Tensor  # [n_features, d]: row i is the direction that feature i writes
    b_dec: Tensor  # [d]
    threshold: Tensor | None = None  # [n_features]
    centred: bool = True

    def encode(self, x: Tensor) -> Tensor:
        pre = F.linear(x - self.b_dec if self.centred else x, self.W_enc.T, self.b_enc)
        return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec

    def error(self, x: Tensor) -> Tensor:
        """What the features leave out: x = decode(encode(x)) + error(x)."""
        return x - self.decode(self.encode(x))


DICTIONARY_NODES = {"embed": "resid_pre", "attn_out": "attn_out", "mlp_out": "mlp_out", "resid_out": "resid_post"}
AE_PT = re.compile(r"/(embed|attn_out|mlp_out|resid_out)(?:_layer(\d+))?/[^/]+/ae\.pt$")

# SAELens: what these fields of cfg.json may be if they are there. Anything else is another function of x.
OFF = (None, False, "", {}, [], [None])
SAELENS = {
    "architecture": ("standard", "jumprelu", *OFF),
    "activation_fn_str": ("relu", *OFF),
    "activation_fn": ("relu", *OFF),
    "normalize_activations": ("none", *OFF),
    "finetuning_scaling_factor": OFF,
    "hook_name_out": OFF,
    "model_from_pretrained_kwargs": OFF,  # such as fold_ln: the activations were those of a changed model
    "prepend_bos": (None, True),
    "seqpos_slice": OFF,
}
HOOK = re.compile(r"blocks\.(\d+)\.(?:hook_(resid_pre|resid_mid|attn_out|mlp_out|resid_post)|attn\.hook_(z))")

# Gemma Scope (Lieberum et al. 2024): the stream after the block; the MLP's output after its post-norm, as our mlp_out
# is; attention on the heads' outputs before the output matrix, concatenated.
SCOPE_NODES = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}
PARAMS_NPZ = re.compile(r".*[/_-](res|mlp|att)[/_-](?:.*/)?layer_(\d+)/width_(\d+)([km])/average_l0_(\d+)/params\.npz$")


def load_saes(
    source: str,
    model: Transformer,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    nodes: list[str] | None = None,
) -> dict[tuple[str, int], SAE]:
    """{(node, layer): SAE} of a directory, a zip archive, or a Hub repository "owner/name" (or its only zip).

    Three layouts are read:

    dictionary_learning  .../{embed,attn_out_layer3,mlp_out_layer3,resid_out_layer3}/10_32768/ae.pt (Marks et al. 2024;
                         repository saprmarks/pythia-70m-deduped-saes). embed is resid_pre of layer 0.
    SAELens              folders of any name with cfg.json and sae_weights.safetensors; cfg's hook_name says which node.
    Gemma Scope          .../gemma-scope-2b-pt-{res,mlp,att}/layer_3/width_16k/average_l0_59/params.npz. Of several for
                         one layer, the narrowest and of these the one with an L0 nearest 100 (SAELens' "canonical").

    nodes  the names that are wanted: each must have an SAE in every layer (resid_pre: in layer 0). None: all there are.

    Nothing but tensors is unpickled. Of an archive only what is wanted is read. ValueError, in one line, for no SAEs
    or two of one node, a missing layer, another model's layer or width, and files that are damaged or of another kind.
    """
    files = files_of(SHORT_NAMES.get(source, str(source)))
    saes, c, trained_on = {}, model.config, set()
    for (node, layer), file, cfg in find_saes(files):
        if nodes is not None and node not in nodes:
            continue
        if node not in model.nodes or layer >= c.n_layers:
            has = f"this model has layers 0..{c.n_layers - 1} and the nodes {', '.join(model.nodes)}"
            raise ValueError(f"{file} is an SAE of {node} in layer {layer}; {has}")
        if (node, layer) in saes:
            raise ValueError(f"{file} is a second SAE of {node} in layer {layer}: give a directory with one of each")
        d = c.n_heads * c.d_head if node == "z" else c.d_model
        saes[node, layer] = read_sae(file, files, cfg, d, dtype, device)
        trained_on |= {str(cfg["model_name"])} if "model_name" in cfg else set()
    for node in nodes or ():
        for layer in range(1 if node == "resid_pre" else c.n_layers):
            if (node, layer) not in saes:
                raise ValueError(f"{source} has no SAE of {node} in layer {layer}")
    if not saes:
        raise ValueError(f"{source} has no SAEs: ae.pt, cfg.json with sae_weights.safetensors, or params.npz")
    for theirs in sorted(trained_on):
        say(f"  {source} has SAEs of the model {theirs!r:.80}")
    return dict(sorted(saes.items(), key=lambda item: (item[0][1], model.nodes.index(item[0][0]))))


def find_saes(files: dict[str, Callable]) -> Iterator[tuple[tuple[str, int], str, dict]]:
    """((node, layer), file, SAELens' cfg or {}) for each SAE among the files."""
    scope = {}
    for file in files:
        if match := AE_PT.search(file):
            yield (DICTIONARY_NODES[match[1]], int(match[2] or 0)), file, {}
        elif file.endswith("/cfg.json"):
            cfg = read(file, files, parse_cfg)
            match = HOOK.fullmatch(cfg["hook_name"])
            key = (match[2] or match[3], int(match[1])) if match else (cfg["hook_name"], 0)
            yield key, file.removesuffix("cfg.json") + "sae_weights.safetensors", cfg
        elif match := PARAMS_NPZ.match(file):
            key = SCOPE_NODES[match[1]], int(match[2])
            width = int(match[3]) * (1000 if match[4] == "m" else 1)
            choice = width, abs(int(match[5]) - 100), file
            scope[key] = min(scope.get(key, choice), choice)
    for key, (_, _, file) in scope.items():
        yield key, file, {}


def read_sae(file: str, files: dict, cfg: dict, d: int, dtype: torch.dtype, device: str | torch.device) -> SAE:
    """One SAE. Its tensors are checked against each other and against the width d of its node."""
    for field, allowed in SAELENS.items():
        if cfg.get(field) not in allowed:
            names = [name for name in allowed if isinstance(name, str) and name]
            only = f", only {' and '.join(names)}" if names else ""
            raise ValueError(f"{file}: an SAE with {field} {cfg[field]!r} in its cfg.json is not supported{only}")
    theirs, ours, is_scope = read(file, files, PARSERS[Path(file).suffix]), {}, file.endswith(".npz")
    is_jump = is_scope or cfg.get("architecture") == "jumprelu" or "threshold" in theirs
    for name in ["W_dec", "W_enc", "b_enc", "b_dec"] + ["threshold"] * is_jump:
        if name not in theirs:
            raise ValueError(f"{file} has no tensor {name}; it has {', '.join(theirs) or 'nothing'}")
        x = ours[name] = theirs[name].to(device, dtype).contiguous()
        n = ours["W_dec"].shape[0]
        shape = {"W_enc": [d, n], "W_dec": [n, d], "b_dec": [d]}.get(name, [n])
        if list(x.shape) != shape:
            raise ValueError(f"{file}: {name} has the shape {list(x.shape)}, for this model {shape} is expected")
        if not x.isfinite().all():
            raise ValueError(f"{file}: {name} has values that are not finite, or too large for {dtype}")
    return SAE(**ours, centred=not is_scope and bool(cfg.get("apply_b_dec_to_input", True)))


def parse_cfg(file: io.IOBase) -> dict:
    """SAELens' cfg.json; newer versions keep hook_name in its metadata."""
    cfg = json.load(file)
    cfg |= cfg.get("metadata", {})
    if not isinstance(cfg.get("hook_name"), str):
        raise ValueError("it has no hook_name that says where the SAE belongs")
    return cfg


def dictionary_tensors(file: io.IOBase) -> dict[str, Tensor]:
    """dictionary_learning keeps its matrices the other way round."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    W_enc, W_dec = state["encoder.weight"].mT, state["decoder.weight"].mT
    return {"W_enc": W_enc, "b_enc": state["encoder.bias"], "W_dec": W_dec, "b_dec": state["bias"]}


PARSERS = {
    ".pt": dictionary_tensors,
    ".npz": lambda file: {name: torch.from_numpy(x) for name, x in np.load(file, allow_pickle=False).items()},
    ".safetensors": lambda file: safetensors.torch.load(file.read()),
}


def read(name: str, files: dict[str, Callable], parse: Callable) -> object:
    """parse(the open file); whatever is wrong with the file is a ValueError of one line."""
    try:
        with files[name]() as file:
            return parse(file)
    except Exception as error:  # a damaged file can run into anything
        raise ValueError(f"{name} cannot be read: {first_line(error)}") from None


def files_of(source: str) -> dict[str, Callable[[], io.IOBase]]:
    """{path: a function that opens it} of all files in a directory, a zip archive or a Hub repository."""
    if os.path.isfile(source):
        return members(source, open(source, "rb"))
    if os.path.isdir(source):
        found = sorted(path for path in Path(source).resolve().rglob("*") if path.is_file())
        files = {path.as_posix(): partial(path.open, "rb") for path in found}
    else:
        files = {f"{source}/{n}": partial(download, source, n) for n in repository_files(source)}
    zips = [name for name in files if name.endswith(".zip")]
    if len(zips) == 1 and not any(name.endswith(("ae.pt", "cfg.json", "params.npz")) for name in files):
        return members(zips[0], files[zips[0]]())
    return files


def members(name: str, file: io.IOBase) -> dict[str, Callable[[], io.IOBase]]:
    try:
        archive = zipfile.ZipFile(file)
    except Exception as error:  # a damaged file can run into anything
        raise ValueError(f"{name} is no zip archive, or a damaged one: {first_line(error)}") from None
    return {f"{name}/{member}": lambda member=member: io.BytesIO(archive.read(member)) for member in archive.namelist()}


def download(source: str, name: str) -> io.IOBase:
    from huggingface_hub import hf_hub_download

    try:
        return open(hf_hub_download(source, name), "rb")
    except Exception as error:
        raise ValueError(f"{name} of {source} cannot be downloaded: {first_line(error)}") from None


def repository_files(name: str) -> list[str]:
    """The files of a Hub repository; where the Hub cannot be asked, those that are in the cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        wanted = "give a directory, a zip archive, or a Hub repository owner/name"
        raise ValueError(f"there are no SAEs at {name!r:.80}: {wanted}")
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        return HfApi().list_repo_files(name)
    except errors.RepositoryNotFoundError:
        raise ValueError(f"{name} is neither a directory here nor a repository on the Hub") from None
    except Exception as error:
        reason = first_line(error)
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except Exception:
        raise ValueError(f"the files of {name} are not in the cache and the Hub cannot be asked: {reason}") from None
    return [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
