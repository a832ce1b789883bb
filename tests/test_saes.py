"""Sparse autoencoders: encode and decode by hand, the three published layouts read back, and all that can be wrong."""

import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_hub import Hub, client, reply

from models import from_pretrained
from support.saes import SAE, load_saes

D, N, LAYERS = 32, 50, 3  # of the tiny checkpoints
ALL = [("resid_pre", 0)] + [(node, layer) for layer in range(LAYERS) for node in ("attn_out", "mlp_out", "resid_post")]


def random_sae(seed, d=D, jump=False, centred=True):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    return SAE(normal(d, N), normal(N), normal(N, d), normal(d), normal(N).abs() * 3 if jump else None, centred)


@pytest.fixture(scope="module")
def model(checkpoint):
    return from_pretrained(str(checkpoint("neox")[0]))


@pytest.fixture(scope="module")
def gemma(checkpoint):
    return from_pretrained(str(checkpoint("gemma2")[0]))


def same(read, written):
    for field in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        a, b = getattr(read, field), getattr(written, field)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), field
    assert read.centred == written.centred


# ---------------------------------------------------------------------------------------------------------------------
# Writers of the published layouts


def write_dictionary(root, key, sae, size="10_32768", edit=dict):
    """dictionary_learning: ae.pt with the state_dict of its class AutoEncoder."""
    node, layer = key
    name = {"resid_pre": "embed", "resid_post": f"resid_out_layer{layer}"}.get(node, f"{node}_layer{layer}")
    folder = root / "dictionaries" / "pythia-70m-deduped" / name / size
    folder.mkdir(parents=True)
    state = {
        "bias": sae.b_dec,
        "encoder.weight": sae.W_enc.T.contiguous(),
        "encoder.bias": sae.b_enc,
        "decoder.weight": sae.W_dec.T.contiguous(),
    }
    torch.save(edit(state), folder / "ae.pt")
    return folder / "ae.pt"


def write_saelens(root, key, sae, new=True, folder=None, edit=dict, **fields):
    """SAELens: new has the settings of training in metadata, old everything in one table."""
    node, layer = key
    hook = f"blocks.{layer}." + ("attn.hook_z" if node == "z" else f"hook_{node}")
    folder = root / (folder or hook)
    folder.mkdir(parents=True)
    d, n = sae.W_enc.shape
    cfg = {
        "architecture": "standard" if sae.threshold is None else "jumprelu",
        "d_in": d,
        "d_sae": n,
        "apply_b_dec_to_input": sae.centred,
        "normalize_activations": "none",
    }
    where = {"hook_name": hook, "model_name": "tiny", "hook_head_index": None}
    if new:
        cfg["metadata"] = where
    else:
        cfg |= {**where, "activation_fn_str": "relu", "finetuning_scaling_factor": False}
    (folder / "cfg.json").write_text(json.dumps({**cfg, **fields}))
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors |= {} if sae.threshold is None else {"threshold": sae.threshold}
    save_file(edit(tensors), folder / "sae_weights.safetensors")
    return folder


def write_scope(root, kind, layer, sae, width="16k", l0=71, edit=dict):
    """Gemma Scope: params.npz."""
    folder = root / f"gemma-scope-2b-pt-{kind}" / f"layer_{layer}" / f"width_{width}" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    arrays = {name: getattr(sae, name).numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    np.savez(folder / "params.npz", **edit(arrays))
    return folder / "params.npz"


def zipped(folder, file):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return file


def dictionaries(root):
    saes = {key: random_sae(i) for i, key in enumerate(ALL)}
    for key, sae in saes.items():
        write_dictionary(root, key, sae)
    return saes


# ---------------------------------------------------------------------------------------------------------------------
# The class


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("jump", [False, True])
def test_encode_and_decode_are_their_formulas(jump, centred):
    sae, x = random_sae(0, jump=jump, centred=centred), torch.randn(2, 5, D)
    f, x_hat = sae.encode(x), sae.decode(sae.encode(x))
    for b, t in ((0, 0), (1, 4)):
        for i in range(0, N, 7):
            inputs = (x[b, t, j] - (sae.b_dec[j] if centred else 0) for j in range(D))
            pre = sum(x_j * sae.W_enc[j, i] for j, x_j in enumerate(inputs)) + sae.b_enc[i]
            expected = pre if pre > (sae.threshold[i] if jump else 0) else torch.tensor(0.0)
            torch.testing.assert_close(f[b, t, i], expected, rtol=1e-4, atol=1e-4)
        expected = sum(f[b, t, i] * sae.W_dec[i] for i in range(N)) + sae.b_dec
        torch.testing.assert_close(x_hat[b, t], expected, rtol=1e-4, atol=1e-3)
    assert 0 < (f > 0).sum() < f.numel()
    if jump:
        plain = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, None, centred).encode(x)
        assert torch.equal(f, plain.where(plain > sae.threshold, 0)) and (plain > 0).sum() > (f > 0).sum()


def test_a_jumprelu_never_lets_a_negative_value_through():
    sae = random_sae(0, jump=True)
    sae.threshold = -sae.threshold
    assert sae.encode(torch.randn(20, D)).min() == 0


def test_error_is_what_the_features_leave_out():
    sae, x = random_sae(0), torch.randn(2, 5, D, dtype=torch.float64)
    sae = SAE(sae.W_enc.double(), sae.b_enc.double(), sae.W_dec.double(), sae.b_dec.double())
    torch.testing.assert_close(sae.decode(sae.encode(x)) + sae.error(x), x, rtol=0, atol=1e-12)
    assert sae.error(x).abs().max() > 0.1


def test_a_gradient_goes_through_the_features():
    sae, x = random_sae(0, jump=True), torch.randn(4, D, requires_grad=True)
    f = sae.encode(x)
    (grad,) = torch.autograd.grad(f.sum(), x)
    torch.testing.assert_close(grad, (f > 0).float() @ sae.W_enc.T)


# ---------------------------------------------------------------------------------------------------------------------
# What works


@pytest.mark.parametrize("source", ["folder", "folder above", "zip", "folder with a zip"])
def test_dictionary_learning(source, model, tmp_path):
    written, folder = dictionaries(tmp_path / "in"), tmp_path / "in" / "dictionaries" / "pythia-70m-deduped"
    (tmp_path / "published").mkdir()
    archive = zipped(tmp_path / "in", tmp_path / "published" / "dictionaries.zip")
    paths = {"folder": folder, "folder above": tmp_path / "in", "zip": archive, "folder with a zip": archive.parent}
    path = paths[source]
    read = load_saes(str(path), model)
    assert list(read) == ALL  # by layer, in the order of the data flow
    for key in ALL:
        same(read[key], written[key])
    assert list(load_saes(str(path), model, nodes=("mlp_out",))) == [("mlp_out", layer) for layer in range(LAYERS)]


def test_of_a_zip_only_what_is_wanted_is_read(model, tmp_path, monkeypatch):
    dictionaries(tmp_path / "in")
    archive, opened, read = zipped(tmp_path / "in", tmp_path / "d.zip"), [], zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, name, *rest: opened.append(name) or read(self, name, *rest)
    )
    load_saes(str(archive), model, nodes=("attn_out",))
    assert sorted(opened) == [
        f"dictionaries/pythia-70m-deduped/attn_out_layer{i}/10_32768/ae.pt" for i in range(LAYERS)
    ]


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("jump", [True, False])
@pytest.mark.parametrize("centred", [True, False])
def test_saelens(new, jump, centred, model, tmp_path):
    keys = [*ALL, ("resid_pre", 2), ("z", 1)]  # z is as wide as the model here
    written = {key: random_sae(i, jump=jump, centred=centred) for i, key in enumerate(keys)}
    for i, (key, sae) in enumerate(written.items()):
        write_saelens(tmp_path, key, sae, new, folder=f"a/sae{i}")
    read = load_saes(str(tmp_path), model)
    assert read.keys() == written.keys()
    for key in keys:
        same(read[key], written[key])


def test_saelens_subtracts_b_dec_unless_told_otherwise(model, tmp_path):
    folder = write_saelens(tmp_path, ("mlp_out", 0), random_sae(0))
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["apply_b_dec_to_input"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert load_saes(str(tmp_path), model)["mlp_out", 0].centred


def test_gemma_scope(gemma, tmp_path):
    c = gemma.config
    widths = {"res": ("resid_post", c.d_model), "mlp": ("mlp_out", c.d_model), "att": ("z", c.n_heads * c.d_head)}
    assert widths["att"][1] != c.d_model
    written = {}
    for kind, (node, d) in widths.items():
        for layer in range(LAYERS):
            sae = written[node, layer] = random_sae(len(written), d, jump=True, centred=False)
            write_scope(tmp_path, kind, layer, sae, l0=90 + layer)
            for width, l0 in (("16k", 10), ("16k", 300), ("65k", 100), ("1m", 100)):  # farther from 100, or wider
                write_scope(tmp_path, kind, layer, random_sae(99, d, jump=True, centred=False), width, l0)
    read = load_saes(str(tmp_path), gemma)
    assert read.keys() == written.keys()
    for key in read:
        same(read[key], written[key])
    assert set(load_saes(str(tmp_path / "gemma-scope-2b-pt-att"), gemma)) == {("z", layer) for layer in range(LAYERS)}

    kept = {}  # they fit what the model computes
    gemma(torch.arange(2, 9)[None], hook=lambda name, layer, x: kept.setdefault((name, layer), x))
    for (node, layer), sae in read.items():
        x = kept[node, layer].flatten(-2) if node == "z" else kept[node, layer]
        assert sae.encode(x).shape == (1, 7, N) and sae.error(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_dtype_is_the_one_asked_for(dtype, model, tmp_path):
    def half(tensors):
        return {name: x.half() for name, x in tensors.items()}

    write_saelens(tmp_path, ("mlp_out", 1), random_sae(0), edit=half)
    sae = load_saes(str(tmp_path), model, dtype)["mlp_out", 1]
    assert sae.W_enc.dtype == sae.b_dec.dtype == dtype and torch.equal(sae.W_enc, random_sae(0).W_enc.half().to(dtype))


class SAEHub(Hub):
    """The Hub, which lists a repository's files as well: GET /api/models/{owner}/{name}/tree/main?recursive=True."""

    def answer(self, request):
        parts = request.path.split("?")[0].split("/")
        if parts[1:3] != ["api", "models"] or parts[5:6] != ["tree"]:
            return super().answer(request)
        self.log.append((request.command, request.path))
        if not (root := self.repos.get("/".join(parts[3:5]))):
            return reply(request, 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        files = [
            {"type": "file", "path": p.relative_to(root).as_posix(), "size": p.stat().st_size, "oid": "0" * 40}
            for p in sorted(root.rglob("*"))
            if p.is_file()
        ]
        reply(request, 200, {"Content-Type": "application/json"}, json.dumps(files).encode())


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = SAEHub()
    with client(monkeypatch, server.url, tmp_path / "cache"):
        yield server
    server.close()


def test_a_repository_of_folders(hub, model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    written = {("mlp_out", layer): random_sae(layer) for layer in range(LAYERS)}
    for key, sae in [*written.items(), (("attn_out", 0), random_sae(9))]:
        write_saelens(tmp_path / "repo", key, sae)
    hub.repos["tiny/saes"] = tmp_path / "repo"
    read = load_saes("tiny/saes", model, nodes=["mlp_out"])
    for key in written:
        same(read[key], written[key])
    got = {path for command, path in hub.log if command == "GET" and path.endswith(".safetensors")}
    assert len([path for path in got if "/cdn/" not in path]) <= LAYERS and not any("attn_out" in path for path in got)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_saes("tiny/saes", model, nodes=["mlp_out"]).keys() == written.keys()


def test_a_repository_of_one_zip(hub, model, tmp_path):
    written = dictionaries(tmp_path / "in")
    (tmp_path / "repo").mkdir()
    zipped(tmp_path / "in", tmp_path / "repo" / "dictionaries_pythia-70m-deduped_10.zip")
    (tmp_path / "repo" / "README.md").write_text("SAEs")
    hub.repos["tiny/zip"] = tmp_path / "repo"
    read = load_saes("tiny/zip", model)
    assert list(read) == ALL
    for key in ALL:
        same(read[key], written[key])


# ---------------------------------------------------------------------------------------------------------------------
# What does not: one line that names the file and what is expected


def refused(source, model, *words, **options):
    with pytest.raises(ValueError) as error:
        load_saes(str(source), model, **options)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_no_such_source(model, hub, tmp_path):
    refused("nowhere", model, "'nowhere'", "a directory, a zip archive, or a Hub repository")
    refused("tiny/absent", model, "tiny/absent is neither a directory here nor a repository on the Hub")
    hub.close()
    refused("tiny/absent", model, "tiny/absent", "not in the cache and the Hub cannot be asked")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", model, "empty has no SAEs", "ae.pt", "sae_weights.safetensors", "params.npz")
    (tmp_path / "file.zip").write_bytes(b"not a zip")
    refused(tmp_path / "file.zip", model, "file.zip", "zip archive")


def test_a_missing_layer_is_named(model, tmp_path):
    write_dictionary(tmp_path, ("mlp_out", 0), random_sae(0))
    refused(tmp_path, model, "no SAE of mlp_out in layer 1", nodes=["mlp_out"])
    refused(tmp_path, model, "no SAE of resid_pre in layer 0", nodes=["resid_pre", "mlp_out"])
    assert list(load_saes(str(tmp_path), model)) == [("mlp_out", 0)]


def test_a_layer_or_a_node_that_the_model_does_not_have(model, tmp_path):
    write_dictionary(tmp_path / "a", ("resid_post", 3), random_sae(0))
    refused(tmp_path / "a", model, "resid_out_layer3", "resid_post in layer 3", "0..2")
    write_saelens(tmp_path / "b", ("resid_mid", 0), random_sae(0))
    refused(tmp_path / "b", model, "resid_mid", "mlp_out, resid_post")  # parallel blocks have none
    write_saelens(tmp_path / "c", ("x", 0), random_sae(0), new=False, hook_name="blocks.0.mlp.hook_post")
    refused(tmp_path / "c", model, "sae_weights.safetensors", "blocks.0.mlp.hook_post", "mlp_out")
    for layer in range(LAYERS):
        write_saelens(tmp_path / "c", ("mlp_out", layer), random_sae(0))
    assert len(load_saes(str(tmp_path / "c"), model, nodes=["mlp_out"])) == LAYERS  # the others are nobody's business


def test_two_saes_of_one_node(model, tmp_path):
    for size in ("5_32768", "10_32768"):
        write_dictionary(tmp_path, ("mlp_out", 1), random_sae(0), size)
    refused(tmp_path, model, "5_32768", "second SAE of mlp_out in layer 1")


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_wrong_shapes(name, model, tmp_path):
    def cut(tensors, key):
        return {**tensors, key: tensors[key][..., :-1].clone()}

    theirs = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "bias"}[name]
    write_dictionary(tmp_path / "a", ("mlp_out", 0), random_sae(0), edit=lambda t: cut(t, theirs))
    refused(tmp_path / "a", model, "ae.pt", name, "is expected")
    write_saelens(tmp_path / "b", ("mlp_out", 0), random_sae(0), edit=lambda t: cut(t, name))
    refused(tmp_path / "b", model, "sae_weights.safetensors", name, "is expected")


def test_another_models_width(model, gemma, tmp_path):
    write_dictionary(tmp_path / "a", ("mlp_out", 0), random_sae(0, d=24))
    refused(tmp_path / "a", model, "W_dec has the shape [50, 24], for this model [50, 32] is expected")
    write_saelens(tmp_path / "b", ("mlp_out", 0), random_sae(0, d=24))
    refused(tmp_path / "b", model, "W_dec has the shape [50, 24], for this model [50, 32] is expected")
    write_scope(tmp_path / "c", "att", 0, random_sae(0, jump=True))  # d_model where n_heads * d_head is due
    refused(tmp_path / "c", gemma, "W_dec has the shape [50, 32], for this model [50, 48] is expected")


def test_missing_tensors(model, gemma, tmp_path):
    def without(name):
        return lambda tensors: {k: v for k, v in tensors.items() if k != name}

    write_dictionary(tmp_path / "a", ("mlp_out", 0), random_sae(0), edit=without("encoder.bias"))
    refused(tmp_path / "a", model, "ae.pt cannot be read", "encoder.bias")
    write_saelens(tmp_path / "b", ("mlp_out", 0), random_sae(0), edit=without("W_dec"))
    refused(tmp_path / "b", model, "sae_weights.safetensors has no tensor W_dec")
    write_saelens(tmp_path / "c", ("mlp_out", 0), random_sae(0, jump=True), edit=without("threshold"))
    refused(tmp_path / "c", model, "sae_weights.safetensors has no tensor threshold")
    write_scope(tmp_path / "d", "res", 0, random_sae(0, jump=True), edit=without("threshold"))
    refused(tmp_path / "d", gemma, "params.npz has no tensor threshold")
    folder = write_saelens(tmp_path / "f", ("mlp_out", 0), random_sae(0))
    (folder / "sae_weights.safetensors").unlink()
    refused(tmp_path / "f", model, "sae_weights.safetensors cannot be read")


def test_numbers_that_are_none(model, tmp_path):
    write_saelens(tmp_path / "a", ("mlp_out", 0), random_sae(0), edit=lambda t: {**t, "b_enc": t["b_enc"] / 0})
    refused(tmp_path / "a", model, "b_enc has values that are not finite")
    write_saelens(tmp_path / "b", ("mlp_out", 0), random_sae(0), edit=lambda t: {**t, "b_enc": t["b_enc"] * 1e6})
    refused(tmp_path / "b", model, "b_enc", "torch.float16", dtype=torch.float16)


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
@pytest.mark.parametrize("kind", ["ae.pt", "sae_weights.safetensors", "params.npz", "cfg.json"])
def test_damaged_files(kind, damage, model, gemma, tmp_path):
    if kind == "ae.pt":
        file = write_dictionary(tmp_path, ("mlp_out", 0), random_sae(0))
    elif kind == "params.npz":
        file = write_scope(tmp_path, "mlp", 0, random_sae(0, jump=True))
    else:
        file = write_saelens(tmp_path, ("mlp_out", 0), random_sae(0)) / kind
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "noise": bytes(range(256)) * 9, "empty": b""}[damage])
    refused(tmp_path, gemma if kind == "params.npz" else model, kind, "cannot be read")


def test_a_damaged_member_of_a_zip(model, tmp_path):
    dictionaries(tmp_path / "in")
    file = zipped(tmp_path / "in", tmp_path / "d.zip")
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo("dictionaries/pythia-70m-deduped/mlp_out_layer1/10_32768/ae.pt")
    content = bytearray(file.read_bytes())
    for i in range(200, 400):
        content[info.header_offset + i] ^= 255
    file.write_bytes(content)
    refused(file, model, "mlp_out_layer1", "cannot be read")
    load_saes(str(file), model, nodes=["attn_out"])
    file.write_bytes(content[:-3000])
    refused(file, model, "d.zip is no zip archive, or a damaged one")


def test_code_in_a_file_is_not_run(model, gemma, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    write_dictionary(tmp_path / "a", ("mlp_out", 0), random_sae(0), edit=lambda t: {**t, "bias": Evil()})
    refused(tmp_path / "a", model, "ae.pt cannot be read")
    evil = np.array([Evil()], dtype=object)
    write_scope(tmp_path / "b", "mlp", 0, random_sae(0, jump=True), edit=lambda arrays: {**arrays, "b_dec": evil})
    refused(tmp_path / "b", gemma, "params.npz cannot be read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "field, value",
    [
        ("architecture", "topk"),
        ("architecture", "gated"),
        ("normalize_activations", "layer_norm"),
        ("activation_fn_str", "tanh-relu"),
        ("finetuning_scaling_factor", True),
        ("hook_name_out", "blocks.1.hook_mlp_out"),
        ("model_from_pretrained_kwargs", {"fold_ln": True, "center_writing_weights": True}),
        ("prepend_bos", False),
        ("seqpos_slice", [1, None]),
    ],
)
def test_other_kinds_of_autoencoder(field, value, model, tmp_path):
    write_saelens(tmp_path, ("mlp_out", 0), random_sae(0), **{field: value})
    refused(tmp_path, model, "sae_weights.safetensors", field, repr(value), "not supported")


def test_unplaced_saes(model, gemma, tmp_path):
    write_saelens(tmp_path / "a", ("mlp_out", 0), random_sae(0), metadata=[1])
    refused(tmp_path / "a", model, "cfg.json cannot be read")
    (tmp_path / "a" / "blocks.0.hook_mlp_out" / "cfg.json").write_text("[1]")
    refused(tmp_path / "a", model, "cfg.json cannot be read")
    (tmp_path / "a" / "blocks.0.hook_mlp_out" / "cfg.json").write_text("{}")
    refused(tmp_path / "a", model, "cfg.json", "has no hook_name")
    write_scope(tmp_path / "b", "transcoders", 0, random_sae(0, jump=True))
    refused(tmp_path / "b", gemma, "b has no SAEs")


def test_settings_that_change_nothing_are_read_and_the_model_is_named(model, tmp_path, capsys):
    settings = {"model_from_pretrained_kwargs": {}, "prepend_bos": True, "seqpos_slice": [None]}
    write_saelens(tmp_path, ("mlp_out", 0), random_sae(0), **settings)
    write_saelens(tmp_path, ("mlp_out", 1), random_sae(1), new=False, model_name=["odd"])
    assert [*load_saes(str(tmp_path), model)] == [("mlp_out", 0), ("mlp_out", 1)]
    assert f"{tmp_path} has SAEs of the model 'tiny'" in capsys.readouterr().out
