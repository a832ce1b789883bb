"""Sparse autoencoders (SAEs) from files: dictionaries of directions, few of which make up an activation at a time."""

import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from models import REPOSITORY, SHORT_NAMES, Transformer, fetch, first_line, is_ordinary, no_repository, quote


@dataclass
class SAE:
    """The sparse autoencoder of one node: x [..., d] -> features f [..., n_features], f >= 0 -> x_hat [..., d].

    threshold  None: f = ReLU(pre). Else a JumpReLU: f = pre where pre > threshold, otherwise 0 (Rajamanoharan et al.
               2024).
    centred    b_dec is taken off x before it is encoded (dictionary_learning does so, Gemma Scope does not, SAELens
               either way).

    d is d_model, and for z n_heads * d_head: the node [batch, pos, n_heads, d_head] as z.flatten(-2). The weights need
    no gradient; one can be taken with respect to x. x should have their dtype.
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


TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")

# dictionary_learning
DICTIONARY = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "bias"}
DICTIONARY_NODES = {"embed": "resid_pre", "attn_out": "attn_out", "mlp_out": "mlp_out", "resid_out": "resid_post"}
AE_PT = re.compile(r"/(embed|(attn_out|mlp_out|resid_out)_layer(\d+))/[^/]+/ae\.pt$")

# SAELens: what may stand in these fields of cfg.json, if they are there at all; the rest is another function of x
SAELENS = {
    "architecture": ("standard", "jumprelu"),
    "activation_fn_str": ("relu",),
    "activation_fn": ("relu",),
    "normalize_activations": ("none",),
    "finetuning_scaling_factor": (),
    "hook_name_out": (),
}
HOOK = re.compile(r"blocks\.(\d+)\.(?:hook_(resid_pre|resid_mid|attn_out|mlp_out|resid_post)|attn\.hook_(z))")

# Gemma Scope (Lieberum et al. 2024): the stream after the block; the MLP's output after its post-norm, as our mlp_out
# is; attention on the heads' outputs before the output matrix, concatenated.
SCOPE_NODES = {"res": "resid_post", "mlp": "mlp_out", "att": "z"}
PARAMS_NPZ = re.compile(r"/layer_(\d+)/width_(\d+)([km])/average_l0_(\d+)/params\.npz$")


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

    Nothing is unpickled but tensors; of an archive only what is wanted is read. ValueError, in one line, for no SAEs
    or two of one node, a missing layer, another model's layer or width, and files that are damaged or of another kind.
    """
    names, read = sae_files(SHORT_NAMES.get(source, str(source)))
    saes, c = {}, model.config
    for (node, layer), file, cfg in find_saes(names, read):
        if nodes is not None and node not in nodes:
            continue
        if node not in model.nodes:
            raise ValueError(f"{file} is an SAE of {node}; this model's nodes are {', '.join(model.nodes)}")
        if layer >= c.n_layers:
            raise ValueError(f"{file} is an SAE of {node} in layer {layer}; the model's layers are 0..{c.n_layers - 1}")
        if (node, layer) in saes:
            raise ValueError(f"{file} is a second SAE of {node} in layer {layer}: give a directory with one of each")
        d = c.n_heads * c.d_head if node == "z" else c.d_model
        saes[node, layer] = read_sae(file, read, cfg, d, dtype, device)
    for node in nodes or ():
        wanted = range(1 if node == "resid_pre" else c.n_layers)
        if missing := [layer for layer in wanted if (node, layer) not in saes]:
            others = f" (nor in {', '.join(map(str, missing[1:]))})" * (len(missing) > 1)
            raise ValueError(f"{source} has no SAE of {node} in layer {missing[0]}{others}")
    if not saes:
        raise ValueError(
            f"{source} has no SAEs: ae.pt (dictionary_learning), cfg.json with sae_weights.safetensors (SAELens) or "
            "params.npz (Gemma Scope) in their published folders"
        )
    return dict(sorted(saes.items(), key=lambda item: (item[0][1], model.nodes.index(item[0][0]))))


def find_saes(names: list[str], read: Callable) -> Iterator[tuple[tuple[str, int], str, dict]]:
    """((node, layer), file, SAELens' cfg or {}) for each SAE among the files."""
    scope = {}
    for name in names:
        if match := AE_PT.search(name):
            kind, layer = (match[2], int(match[3])) if match[2] else ("embed", 0)
            yield (DICTIONARY_NODES[kind], layer), name, {}
        elif name.endswith("/cfg.json"):
            cfg = read(name, json.load)
            cfg = cfg if isinstance(cfg, dict) else {}
            metadata = cfg.get("metadata")  # newer SAELens keeps hook_name there
            cfg |= metadata if isinstance(metadata, dict) else {}
            if not isinstance(hook := cfg.get("hook_name"), str):
                raise ValueError(f"{name} has no hook_name that says where the SAE belongs")
            match = HOOK.fullmatch(hook)
            key = (match[2] or match[3], int(match[1])) if match else (hook, 0)
            yield key, name.removesuffix("cfg.json") + "sae_weights.safetensors", cfg
        elif match := PARAMS_NPZ.search(name):
            kind = re.findall(r"[/_-](res|mlp|att)(?=[/_-])", name[: match.start() + 1])
            if not kind:
                raise ValueError(f"{name}: no folder above it says res, mlp or att, as gemma-scope-2b-pt-res does")
            choice = int(match[2]) * {"k": 1, "m": 1000}[match[3]], abs(int(match[4]) - 100), name
            key = SCOPE_NODES[kind[-1]], int(match[1])
            scope[key] = min(scope.get(key, choice), choice)
    for key, (*_, name) in scope.items():
        yield key, name, {}


def read_sae(file: str, read: Callable, cfg: dict, d: int, dtype: torch.dtype, device: str | torch.device) -> SAE:
    """One SAE, its tensors checked against each other and against the width d of its node."""
    names, turned = {}, file.endswith(".pt")  # dictionary_learning keeps its matrices the other way round
    if turned:
        theirs, names = read(file, pickled_tensors), DICTIONARY
    elif file.endswith(".npz"):
        theirs = read(file, numpy_tensors)
    else:
        theirs = read(file, lambda f: safetensors.torch.load(f.read()))
        for field, allowed in SAELENS.items():
            if (value := cfg.get(field)) and value not in allowed:
                only = f", only {' and '.join(allowed)}" * bool(allowed)
                raise ValueError(f"{file}: an SAE with {field} {value!r} in its cfg.json is not supported{only}")
    jump = file.endswith(".npz") or cfg.get("architecture") == "jumprelu" or "threshold" in theirs
    ours, n = {}, None
    for name in TENSORS + ("threshold",) * jump:
        their_name = names.get(name, name)
        x = theirs.get(their_name)
        if not isinstance(x, Tensor) or not is_ordinary(x):
            there = ", ".join(map(str, theirs)) or "nothing"
            raise ValueError(f"{file} has no tensor {their_name} of floating-point numbers; it has {there}")
        x = x.T if turned and x.ndim == 2 else x
        n = n or (x.shape[-1] if x.ndim else 0)  # W_enc comes first
        shape = {"W_enc": [d, n], "W_dec": [n, d], "b_dec": [d]}.get(name, [n])
        if list(x.shape) != shape:
            got, wanted = (list(s)[:: -1 if turned else 1] for s in (x.shape, shape))
            raise ValueError(f"{file}: {their_name} has the shape {got}, for this model {wanted} is expected")
        ours[name] = x.to(device, dtype).contiguous()
        if not ours[name].isfinite().all():
            raise ValueError(f"{file}: {their_name} has values that are not finite, or too large for {dtype}")
    centred = turned or bool(cfg.get("apply_b_dec_to_input", bool(cfg)))  # SAELens' default is True
    return SAE(**ours, centred=centred)


def pickled_tensors(file: io.IOBase) -> dict[str, Tensor]:
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def numpy_tensors(file: io.IOBase) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(file, allow_pickle=False).items()}


def sae_files(source: str) -> tuple[list[str], Callable]:
    """The paths of all files in a source, and read(path, parse): parse applied to the open file, errors in one line."""
    path, is_folder, is_file = Path(source), os.path.isdir(source), os.path.isfile(source)
    if is_folder:
        names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    elif is_file:
        try:
            archive = zipfile.ZipFile(path)
        except Exception as error:  # a damaged file can run into anything
            raise ValueError(f"{path} is no zip archive, or a damaged one: {first_line(error)}") from None
        names = archive.namelist()
    else:
        names = repository_files(source)
    zips = [name for name in names if name.endswith(".zip")]
    if len(zips) == 1 and not any(name.endswith(("ae.pt", "cfg.json", "params.npz")) for name in names):
        return sae_files(str(path / zips[0] if is_folder else fetch(source, zips[0])))
    root = path.resolve().as_posix() if is_folder or is_file else source

    def opened(name: str) -> io.IOBase:
        if is_file:
            return io.BytesIO(archive.read(name))  # only what is read is unpacked
        return (path / name if is_folder else fetch(source, name)).open("rb")

    def read(name: str, parse: Callable) -> object:
        try:
            with opened(name.removeprefix(root + "/")) as file:
                return parse(file)
        except Exception as error:  # a damaged file can run into anything
            raise ValueError(f"{name} cannot be read: {first_line(error)}") from None

    return [f"{root}/{name}" for name in names], read


def repository_files(name: str) -> list[str]:
    """The files of a Hub repository; where the Hub cannot be asked, those that are in the cache."""
    if not REPOSITORY.fullmatch(name):
        raise ValueError(
            f"there are no SAEs at {quote(name)}: give a directory, a zip archive, or a Hub repository owner/name"
        )
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        return sorted(HfApi().list_repo_files(name))
    except errors.RepositoryNotFoundError:
        raise ValueError(no_repository(name)) from None
    except Exception as error:
        try:
            cached = Path(snapshot_download(name, local_files_only=True))
        except Exception:
            reason = f"the files of {name} are not in the cache and the Hub cannot be asked: {first_line(error)}"
            raise ValueError(reason) from None
        return sorted(p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.is_file())
