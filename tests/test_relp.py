"""AP by its definition and AtP by finite differences, on our models and on some written here; what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, NEWER

import relp
from models import Rules, from_pretrained

NODE_OF = {"head": "z", "head_q": "q", "head_k": "k", "head_v": "v", "head_pattern": "pattern", "neuron": "mlp_hidden"}


def ap_by_definition(model, original, patch, answers, nodes, metric=relp.logit_diff):
    """Eq. 1 as it stands: for every node, layer, position (and part) one whole forward pass with that one overwritten.

    For any model with stream and unembed, and without anything of relp.py but the metrics.
    """
    patch_acts = {}

    def keep(name, layer, x):
        patch_acts[name, layer] = x
        return x

    def value(hook=None):
        return metric(model.unembed(model.stream(original, hook=hook))[:, -1], answers)

    def effect(key, *at):
        def hook(name, layer, x):
            if (name, layer) == key:
                x = x.clone()
                x[(slice(None), *at)] = patch_acts[key][(slice(None), *at)]
            return x

        return value(hook) - base

    def at_position(name, key, pos):
        if name not in NODE_OF:
            return effect(key, pos)
        return torch.stack([effect(key, pos, part) for part in range(patch_acts[key].shape[2])], dim=-1)

    with torch.no_grad():
        model.stream(patch, hook=keep)
        base, result = value(), {}
        for name in nodes:
            keys = [(NODE_OF.get(name, name), layer) for layer in range(model.config.n_layers)]
            rows = [torch.stack([at_position(name, k, pos) for pos in range(original.shape[1])], dim=1) for k in keys]
            result[name] = torch.stack(rows, dim=1)
    return result


def spy(monkeypatch, owner, name, note):
    """note(*arguments, **options) of every call of owner's method or function."""
    function = getattr(owner, name)

    def noted(*arguments, **options):
        note(*arguments, **options)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, noted)


# ---------------------------------------------------------------------------------------------------------------------
# AP


@pytest.mark.parametrize(
    "name, metric",
    [(name, relp.logit_diff) for name in FAMILIES] + [("gpt2", relp.prob_diff), ("gemma2", relp.logprob_diff)],
)
def test_activation_patching_is_its_definition(name, metric, checkpoint, pair):
    """The resumed runs as well as the plain loop."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    nodes = model.nodes
    wanted = ap_by_definition(model, *pair, nodes, metric)
    got = relp.activation_patching(model, *pair, nodes, metric, rows=7)
    plain = relp.patch_one_by_one(model, *pair, nodes, metric)
    assert list(got) == list(plain) == list(nodes)
    for node in nodes:
        assert got[node].dtype == plain[node].dtype == torch.float64 and wanted[node].abs().max() > 1e-3
        torch.testing.assert_close(got[node], wanted[node], atol=1e-12, rtol=0)
        torch.testing.assert_close(plain[node], wanted[node], atol=1e-12, rtol=0)
        assert (got[node][:, :, :3] == 0).all()


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2", "gemma2", "gemma3"])
def test_heads_and_neurons(name, checkpoint, pair):
    """Parts of a node: AP by definition; AtP's and RelP's scores add up to the whole node's."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    original, patch, answers = pair = [x[:1] for x in pair]
    heads = ["head", "head_q", "head_k", "head_v", "head_pattern"]
    wanted = ap_by_definition(model, *pair, heads)
    got = relp.activation_patching(model, *pair, [*heads, "neuron"], rows=7)
    plain = relp.patch_one_by_one(model, *pair, heads)
    for name in heads:
        assert wanted[name].abs().amax((0, 2, 3)).gt(1e-6).all()  # in every layer
        torch.testing.assert_close(got[name], wanted[name], atol=1e-12, rtol=0)
        torch.testing.assert_close(plain[name], wanted[name], atol=1e-12, rtol=0)

    _, patch_acts = relp.record(model, patch, ["neuron"])

    def with_neuron(layer, pos, neuron):
        def hook(name, of_layer, x):
            if (name, of_layer) == ("mlp_hidden", layer):
                x = x.clone()
                x[:, pos, neuron] = patch_acts["mlp_hidden", layer][:, pos, neuron]
            return x

        return relp.logit_diff(model(original, hook=hook)[:, -1], answers)

    for layer, pos, neuron in ((0, 3, 1), (1, 6, 30), (2, 8, 5)):
        change = with_neuron(layer, pos, neuron) - relp.logit_diff(model(original)[:, -1], answers)
        assert change.abs().max() > 1e-6
        torch.testing.assert_close(got["neuron"][:, layer, pos, neuron], change, atol=1e-12, rtol=0)
    for lrp in (False, True):
        scores = relp.attribute(model, *pair, ["head", "z", "neuron", "mlp_hidden"], lrp=lrp)
        torch.testing.assert_close(scores["head"].sum(-1), scores["z"])
        torch.testing.assert_close(scores["neuron"].sum(-1), scores["mlp_hidden"])
    *_, differs = relp.compare(model, *pair, ["head"])
    assert differs["head"].shape == got["head"].shape and (got["head"][~differs["head"]] == 0).all()


def some_cells(shapes, seed=0):
    """{name: bool}, about a third of them True."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=g) < 0.3 for name, shape in shapes.items()}


def test_only_chosen_cells_are_patched(checkpoint, pair):
    model, nodes = from_pretrained(str(checkpoint("neox")[0])), ["resid_pre", "head"]
    whole = relp.activation_patching(model, *pair, nodes)
    for axes in (0, 1):  # a choice for every prompt, one for all
        cells = some_cells({name: x.shape[axes:] for name, x in whole.items()})
        some = relp.activation_patching(model, *pair, nodes, cells=cells)
        for name in nodes:
            torch.testing.assert_close(some[name], whole[name] * cells[name], atol=1e-5, rtol=0)
            assert (some[name] != 0).any() and (some[name][~cells[name].expand_as(some[name])] == 0).all()


@pytest.mark.parametrize("name", ["neox", "gemma2"])
def test_lockstep_changes_the_work_and_not_the_result(name, checkpoint, pair, monkeypatch):
    """Processes that share weights make the same calls whatever their prompts are; effects stay the same, zeros too."""
    model, nodes, calls = from_pretrained(str(checkpoint(name)[0])), ["resid_pre", "head"], []
    spy(monkeypatch, type(model), "block", lambda self, layer, x, *_, **options: calls.append((layer, x.shape)))
    wanted, other = relp.activation_patching(model, *pair, nodes), [x.flip(0) for x in pair]
    every = []
    for batch in (pair, other):
        calls.clear()
        got = relp.activation_patching(model, *batch, nodes, lockstep=True)
        every.append(list(calls))
    assert every[0] == every[1]
    for node in nodes:
        torch.testing.assert_close(got[node].flip(0), wanted[node], atol=1e-5, rtol=0)
        assert ((got[node].flip(0) == 0) >= (wanted[node] == 0)).all()


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_activation_patching_in_float32(name, checkpoint, pair):
    model, nodes = from_pretrained(str(checkpoint(name)[0])), ("resid_pre", "attn_out", "mlp_out")
    wanted = ap_by_definition(model, *pair, nodes)
    for node, got in relp.activation_patching(model, *pair, nodes).items():
        assert (got - wanted[node]).abs().max() < 1e-5 * wanted[node].abs().max()


def test_finished_pieces_are_taken_and_the_rest_computed(checkpoint, pair, monkeypatch):
    """A run that goes on from the pieces of another ends in the same numbers to the bit; pieces count as progress."""
    model, nodes, pieces, starts = from_pretrained(str(checkpoint("gemma2")[0])), ("resid_pre", "attn_out"), {}, set()
    spy(monkeypatch, type(model), "block", lambda *_, start=0, **options: starts.add(start))
    whole = relp.activation_patching(model, *pair, nodes, pieces=pieces)
    assert list(pieces) == list(range(9)) and {3, 5, 6, 8} <= starts
    some, seen = {pos: pieces[pos] for pos in range(6)}, []
    starts.clear()
    again = relp.activation_patching(model, *pair, nodes, pieces=some, progress=seen.append)
    for node in nodes:
        assert torch.equal(again[node], whole[node])
    assert {6, 8} <= starts and not starts & {3, 5}
    assert len(seen) == 9 and 0.3 < seen[5] < seen[6] < 1 and seen[-1] == 1 and seen == sorted(seen)


def test_patching_everything_at_the_last_position_gives_the_patch_run(checkpoint, pair):
    """Direction: patch activations go into the original run, and the effect is metric(patched) - metric(original)."""
    model = from_pretrained(str(checkpoint("qwen2")[0]))
    value, patch_value, _ = relp.compare(model, *pair, ())
    for function in (relp.activation_patching, relp.patch_one_by_one):
        effect = function(model, *pair, ("resid_post",))["resid_post"]
        torch.testing.assert_close(effect[:, -1, -1], patch_value - value)


def test_cells_where_the_runs_agree_are_exactly_zero(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    nodes = ("resid_pre", "attn_out", "mlp_out")
    value, patch_value, differs = relp.compare(model, *pair, nodes)
    torch.testing.assert_close(value, relp.logit_diff(model(pair[0])[:, -1], pair[2]))
    torch.testing.assert_close(patch_value, relp.logit_diff(model(pair[1])[:, -1], pair[2]))
    for node in nodes:
        assert not differs[node][:, :, :3].any() and differs[node][:, 0, 3].all()
        for scores in (
            relp.activation_patching(model, *pair, nodes),
            relp.patch_one_by_one(model, *pair, nodes),
            relp.attribute(model, *pair, nodes),
            relp.attribute(model, *pair, nodes, lrp=True),
        ):
            assert (scores[node][~differs[node]] == 0).all()
    assert (differs["resid_pre"][:, 0] == (pair[0] != pair[1])).all()  # layer 0: the tokens themselves


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2"])
def test_the_plain_loop_is_exactly_zero_in_every_kind_of_node(name, checkpoint, pair):
    """All kinds in one call: the pattern, whose presence changes how attention is computed, must not leave rounding."""
    model, pair = from_pretrained(str(checkpoint(name)[0])), [pair[0][:2, :5], pair[1][:2, :5], pair[2][:2]]
    kinds = [*model.nodes, *NODE_OF]
    if model.config.d_mlp > 50:  # a pass for every neuron takes long, and two families have few of them
        kinds.remove("neuron")
    *_, differs = relp.compare(model, *pair, kinds)
    plain, resumed = (f(model, *pair, kinds) for f in (relp.patch_one_by_one, relp.activation_patching))
    for kind in kinds:
        assert differs[kind].any() and not differs[kind][:, :, :3].any()
        torch.testing.assert_close(plain[kind], resumed[kind], atol=1e-4, rtol=1e-4)
        for scores in (plain[kind], resumed[kind]):
            assert scores.shape == differs[kind].shape and (scores[~differs[kind]] == 0).all(), kind


# ---------------------------------------------------------------------------------------------------------------------
# AtP, RelP and IG


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_atp_is_the_derivative(name, checkpoint, pair):
    """Eq. 2 against central finite differences: the metric with (a sliver of) the difference added to one node."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    kinds = ("resid_pre", "attn_out", "mlp_out", "z", "mlp_hidden", "pattern", "q", "k", "v")
    nodes = [node for node in model.nodes if node in kinds]
    assert len(nodes) == len(kinds) - (name == "qwen3-moe")  # which has no mlp_hidden
    assert_derivative(model, *pair, nodes, positions=(3, 6, 8))


def assert_derivative(model, original, patch, answers, nodes, positions, step=1e-5):
    acts, patch_acts = (relp.record(model, tokens, nodes)[1] for tokens in (original, patch))
    got = relp.attribute(model, original, patch, answers, nodes)

    def moved(key, pos, by):
        def hook(name, layer, x):
            if (name, layer) == key:
                x = x.clone()
                x[:, pos] += by * (patch_acts[key] - acts[key])[:, pos]
            return x

        with torch.no_grad():
            return relp.logit_diff(model.unembed(model.stream(original, hook=hook))[:, -1], answers)

    for node, layer in acts:
        for pos in positions:
            slope = (moved((node, layer), pos, step) - moved((node, layer), pos, -step)) / (2 * step)
            torch.testing.assert_close(got[node][:, layer, pos], slope, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_relp_differs_from_atp_by_its_rules_only(name, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]))
    nodes = ("resid_pre", "attn_out", "mlp_out")
    atp, relp_paper, relp_none = (relp.attribute(model, *pair, nodes, lrp=rules) for rules in (False, True, Rules()))
    for node in nodes:
        assert torch.equal(relp_none[node], atp[node])
        assert (relp_paper[node] - atp[node]).abs().max() > 1e-2
    # the last layer's mlp_out meets nothing but the final norm and the unembedding: rho by hand
    _, acts = relp.record(model, pair[0], ("mlp_out", "resid_post"))
    _, patch_acts = relp.record(model, pair[1], ("mlp_out",))
    last = model.config.n_layers - 1
    if model.config.logit_softcap is None:
        x = acts["resid_post", last][:, -1].clone().requires_grad_()
        rho = torch.autograd.grad(relp.logit_diff(model.unembed(x, Rules(ln=True)), pair[2]).sum(), x)[0]
        wanted = ((patch_acts["mlp_out", last] - acts["mlp_out", last])[:, -1] * rho).sum(-1)
        torch.testing.assert_close(relp_paper["mlp_out"][:, last, -1], wanted)


def test_two_forward_passes_one_backward_no_weight_gradient(checkpoint, pair, monkeypatch):
    model = from_pretrained(str(checkpoint("llama")[0])).requires_grad_(True)  # even where somebody asks for them
    calls = []
    spy(monkeypatch, type(model), "stream", lambda *_, **options: calls.append("forward"))
    spy(monkeypatch, torch.autograd, "grad", lambda *_, **options: calls.append("backward"))
    relp.attribute(model, *pair, ("resid_pre", "mlp_out"), lrp=True)
    assert calls == ["forward", "forward", "backward"]
    assert all(p.grad is None for p in model.parameters())


def test_integrated_gradients_of_a_node_and_its_parts_are_one_computation(checkpoint, pair, monkeypatch):
    """head is a part of z: both are scored from the same passes, `steps` for every layer."""
    model, calls, steps = from_pretrained(str(checkpoint("gpt2")[0]), dtype=torch.float64), [], 3
    spy(monkeypatch, torch.autograd, "grad", lambda *_, **options: calls.append("backward"))
    got = relp.attribute(model, *pair, ["z", "head"], steps=steps)
    assert len(calls) == steps * model.config.n_layers
    torch.testing.assert_close(got["head"].sum(-1), got["z"])
    calls.clear()
    assert torch.equal(relp.attribute(model, *pair, ["z"], steps=steps)["z"], got["z"])
    assert len(calls) == steps * model.config.n_layers


def test_low_precision_scores_are_summed_in_float32(checkpoint, pair):
    path = str(checkpoint("gpt2")[0])
    exact = relp.attribute(from_pretrained(path), *pair, ("resid_pre",), lrp=True)["resid_pre"]
    for dtype in (torch.bfloat16, torch.float16):
        got = relp.attribute(from_pretrained(path, dtype=dtype), *pair, ("resid_pre",), lrp=True)["resid_pre"]
        assert got.dtype == torch.float32
        assert relp.pearson(got.flatten(), exact.flatten()) > 0.99


# ---------------------------------------------------------------------------------------------------------------------
# Models that are none of models.py


class LinearModel:
    """A stream that every block mixes linearly over positions (lower-triangular) and dimensions: all methods agree."""

    nodes = ("resid_pre", "attn_out", "resid_post", "k", "v")

    def __init__(self, n_layers=3, d=5, vocab=11, n_pos=9):
        g = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace(n_layers=n_layers)
        self.embedding, self.unembedding = (torch.randn(vocab, d, generator=g, dtype=torch.float64) for _ in range(2))
        self.mix = torch.randn(n_layers, n_pos, n_pos, generator=g, dtype=torch.float64).tril()
        self.value = torch.randn(n_layers, d, d, generator=g, dtype=torch.float64)

    def stream(self, tokens, lrp=False, hook=None):
        x = self.embedding[tokens]
        for layer in range(self.config.n_layers):
            x = self.block(layer, x, hook)
        return x

    def block(self, layer, x, hook=None, start=0, last=False):
        hook = hook or (lambda name, layer, value: value)
        x = hook("resid_pre", layer, x)
        hook("k", layer, x)
        v = hook("v", layer, x @ self.value[layer])
        attn_out = hook("attn_out", layer, self.mix[layer, start : start + x.shape[1], : v.shape[1]] @ v)
        x = hook("resid_post", layer, x + attn_out)
        return x[:, -1:] if last else x

    def unembed(self, x, lrp=False, columns=None):
        return x @ (self.unembedding if columns is None else self.unembedding[columns]).T


def test_all_methods_agree_on_a_linear_model():
    g = torch.Generator().manual_seed(1)
    batch = *torch.randint(11, (2, 4, 9), generator=g), torch.randint(11, (4, 2), generator=g)
    model, nodes = LinearModel(), ("resid_pre", "attn_out", "resid_post")
    ap, plain = relp.activation_patching(model, *batch, nodes), relp.patch_one_by_one(model, *batch, nodes)
    atp, relevance = (relp.attribute(model, *batch, nodes, lrp=lrp) for lrp in (False, True))
    for node in nodes:
        assert ap[node].abs().max() > 0.1
        torch.testing.assert_close(plain[node], ap[node], atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(atp[node], ap[node], atol=1e-10, rtol=1e-10)
        assert torch.equal(relevance[node], atp[node])


class OwnModel:
    """A small causal transformer written for these tests: only what relp.py asks of a model, under names of its own.

    It has no rules and ignores lrp. Two layers, two heads, a tanh MLP, no norms but one before the unembedding.
    """

    nodes = ("trunk", "keys", "values", "mixed", "bump", "trunk_after")

    def __init__(self, n_layers=2, d=6, d_head=3, n_heads=2, vocab=13, n_pos=7):
        g = torch.Generator().manual_seed(0)

        def weight(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5

        self.config, self.n_heads = SimpleNamespace(n_layers=n_layers), n_heads
        self.words, self.places, self.out = weight(vocab, d), weight(n_pos, d), weight(vocab, d) * 2
        shapes = {"q": (d, n_heads * d_head), "k": (d, n_heads * d_head), "v": (d, n_heads * d_head)}
        shapes |= {"o": (n_heads * d_head, d), "up": (d, 2 * d), "down": (2 * d, d)}
        self.layers = [{name: 2 * weight(*shape) for name, shape in shapes.items()} for _ in range(n_layers)]
        self.streams = 0  # how many whole passes were made

    def stream(self, tokens, lrp=False, hook=None):
        self.streams += 1
        x = self.words[tokens] + self.places[: tokens.shape[1]]
        for layer in range(self.config.n_layers):
            x = self.layer(layer, x, hook)
        return x

    def unembed(self, x, lrp=False, columns=None):
        x = x / (1 + x.square().mean(-1, keepdim=True)).sqrt()
        return x @ (self.out if columns is None else self.out[columns]).T

    def layer(self, layer, x, hook, start=0, last=False, masked_from=None):
        """start and last as relp.py asks it of block(); masked_from: the first position as the causal mask has it."""
        trunk, keys, values, mixed, bump, trunk_after = self.nodes
        weights = self.layers[layer]

        def node(name, value):
            return hook(name, layer, value) if hook and name in getattr(hook, "nodes", self.nodes) else value

        def heads(x, name):
            return (x @ weights[name]).unflatten(-1, (self.n_heads, -1))

        x = node(trunk, x)
        k, v = node(keys, heads(x, "k")), node(values, heads(x, "v"))
        first, x = (start + x.shape[1] - 1, x[:, -1:]) if last else (start, x)
        first = first if masked_from is None else masked_from
        visible = torch.arange(k.shape[1]) <= first + torch.arange(x.shape[1])[:, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", heads(x, "q"), k)
        attention = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        z = node(mixed, torch.einsum("bhqk,bkhd->bqhd", attention, v))
        x = x + z.flatten(2) @ weights["o"]
        return node(trunk_after, x + node(bump, torch.tanh(x @ weights["up"]) @ weights["down"]))


class Resumable(OwnModel):
    """The same with the method block(), for which nodes must have the names that relp.py asks for."""

    nodes = ("resid_pre", "k", "v", "z", "mlp_out", "resid_post")

    def block(self, layer, x, hook=None, start=0, last=False):
        return self.layer(layer, x, hook, start, last)


@pytest.fixture
def own_pair():
    """original, patch [3, 6] and answers [3, 2] for OwnModel; the first two tokens are the same in both prompts."""
    g = torch.Generator().manual_seed(3)
    original, answers = torch.randint(13, (3, 6), generator=g), torch.tensor([[1, 2], [3, 4], [1, 5]])
    patch = original.clone()
    patch[:, 2] = (patch[:, 2] + 4) % 13
    patch[1:, 4] = (patch[1:, 4] + 1) % 13
    return original, patch, answers


@pytest.mark.parametrize("metric", [relp.logit_diff, relp.prob_diff])
def test_ap_on_a_model_of_ones_own(metric, own_pair):
    """Without block() AP is the plain loop, and agrees with a brute force of this file."""
    model = OwnModel()
    wanted = ap_by_definition(model, *own_pair, model.nodes, metric)
    for function in (relp.activation_patching, relp.patch_one_by_one):
        model.streams = 0
        got = function(model, *own_pair, model.nodes, metric)
        assert list(got) == list(model.nodes)
        assert model.streams >= len(model.nodes) * 2 * 6  # a whole pass per node, layer and position
        for node in model.nodes:
            assert wanted[node].shape == (3, 2, 6) and wanted[node].abs().amax((0, 2)).gt(1e-3).all()
            torch.testing.assert_close(got[node], wanted[node], atol=1e-12, rtol=0)
            assert (got[node][:, :, :2] == 0).all()


def test_atp_and_relp_on_a_model_of_ones_own(own_pair):
    model = OwnModel()
    assert_derivative(model, *own_pair, model.nodes, positions=range(6))
    atp, relevance = (relp.attribute(model, *own_pair, model.nodes, lrp=lrp) for lrp in (False, True))
    for node in model.nodes:
        assert atp[node].abs().max() > 1e-2 and (atp[node][:, :, :2] == 0).all()
        assert torch.equal(relevance[node], atp[node])  # it ignores lrp


def test_cells_in_the_plain_loop(own_pair):
    model = OwnModel()
    whole = relp.activation_patching(model, *own_pair, model.nodes)
    for axes in (0, 1):  # a choice for every prompt, one for all
        cells = some_cells({name: x.shape[axes:] for name, x in whole.items()})
        some = relp.activation_patching(model, *own_pair, model.nodes, cells=cells)
        for name in model.nodes:
            assert torch.equal(some[name], whole[name] * cells[name])
            assert (some[name] != 0).any() and ((whole[name] != 0) & ~cells[name]).any()


def test_a_model_of_ones_own_has_no_parts_under_other_names(own_pair):
    with pytest.raises(ValueError, match="unknown node 'head': this model has trunk, keys, .*, trunk_after$"):
        relp.attribute(OwnModel(), *own_pair, ["head"])


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_ap_on_a_model_of_ones_own_that_can_be_resumed(rows, own_pair):
    model, nodes = Resumable(), [*Resumable.nodes, "head", "head_k", "head_v"]
    wanted = ap_by_definition(model, *own_pair, nodes)
    model.streams = 0
    got = relp.activation_patching(model, *own_pair, nodes, rows=rows)
    assert model.streams == 2  # the original and the patch run: all else is resumed
    for node in nodes:
        assert wanted[node].transpose(0, 1).flatten(1).abs().amax(1).gt(1e-3).all()  # in every layer
        torch.testing.assert_close(got[node], wanted[node], atol=1e-12, rtol=0)
        assert (got[node][:, :, :2] == 0).all()
    by_other_names = relp.activation_patching(OwnModel(), *own_pair, OwnModel.nodes)
    for theirs, ours in zip(OwnModel.nodes, Resumable.nodes):  # the same model, by the plain loop
        torch.testing.assert_close(got[ours], by_other_names[theirs], atol=1e-12, rtol=0)


class Forgetful(Resumable):
    """block() takes start and last, and does as if they were not there; it shows k and v to nobody."""

    def block(self, layer, x, hook=None, start=0, last=False):
        def others(name, layer, value):
            return hook(name, layer, value)

        others.nodes = set(hook.nodes) - {"k", "v"}
        return self.layer(layer, x, others)


class Silent(Forgetful):
    """The whole run shows no k and v either."""

    nodes = ("resid_pre", "keys", "values", "z", "mlp_out", "resid_post")


class Shifted(Resumable):
    """block() has the earlier keys and values, and masks as if its positions began at 0."""

    def block(self, layer, x, hook=None, start=0, last=False):
        return self.layer(layer, x, hook, start, last, masked_from=0)


class Deaf(Resumable):
    """block() shows k and v, and goes on with its own instead of what the hook returns."""

    def block(self, layer, x, hook=None, start=0, last=False):
        def heard_by_nobody(name, layer, value):
            returned = hook(name, layer, value)
            return value if name in ("k", "v") else returned

        heard_by_nobody.nodes = hook.nodes
        return self.layer(layer, x, heard_by_nobody, 0, last)


@pytest.mark.parametrize("kind", [Forgetful, Silent, Shifted, Deaf])
def test_a_block_that_does_not_resume_is_noticed(kind, own_pair):
    """AP of it would be wrong without a word."""
    model = kind()
    with pytest.raises(ValueError, match=r"block\(\) does not resume") as error:
        relp.activation_patching(model, *own_pair, ["resid_pre", "mlp_out"])
    assert "\n" not in str(error.value)
    sae = relp.Neurons(torch.eye(6, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"block\(\) does not resume"):
        relp.patch_features(model, *own_pair, {("mlp_out", 0): sae})
    # what needs no block() works
    wanted = ap_by_definition(model, *own_pair, ["mlp_out"])
    got = relp.patch_one_by_one(model, *own_pair, ["mlp_out"])
    torch.testing.assert_close(got["mlp_out"], wanted["mlp_out"], atol=1e-12, rtol=0)


def test_features_on_models_of_ones_own(own_pair):
    """Dimensions as features: their scores add up to the node's. AP of features is for models that can be resumed."""
    sae = relp.Neurons(torch.eye(6, dtype=torch.float64))
    scores = relp.attribute_features(OwnModel(), *own_pair, {("bump", 0): sae, ("mixed", 1): sae})
    whole = relp.attribute(OwnModel(), *own_pair, ["bump", "mixed"])
    torch.testing.assert_close(scores["bump", 0].sum(-1), whole["bump"][:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(scores["mixed", 1].sum(-1), whole["mixed"][:, 1], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="no method `block`"):
        relp.patch_features(OwnModel(), *own_pair, {("bump", 0): sae})


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and correlation


def test_metrics():
    logits, answers = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 5.0]]), torch.tensor([[1, 0], [0, 2]])
    p = logits.softmax(-1)
    torch.testing.assert_close(relp.logit_diff(logits, answers), torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(relp.prob_diff(logits, answers), torch.stack([p[0, 1] - p[0, 0], p[1, 0] - p[1, 2]]))
    torch.testing.assert_close(relp.logprob_diff(logits, answers), torch.tensor([2.0, -3.0]))


def corr(a, b):
    return np.corrcoef(a.double().flatten(), b.double().flatten())[0, 1]


def test_pearson():
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    assert relp.pearson(a, b) == pytest.approx(corr(a, b), abs=1e-12)
    assert relp.pearson(a + 1000, b) == pytest.approx(corr(a + 1000, b), abs=1e-9)
    for scale in (1e-20, 1e20):  # of no matter
        assert relp.pearson(a * scale, b) == pytest.approx(corr(a, b), abs=1e-6)
    assert relp.pearson(a, a) == pytest.approx(1) and relp.pearson(a, -a) == pytest.approx(-1)


def test_pearson_of_maps():
    """Maps of three axes as attribute() returns them: all elements count."""
    a, noise = torch.randn(2, 4, 3, 9, generator=torch.Generator().manual_seed(1))
    b = a + noise
    assert isinstance(relp.pearson(a, b), float)
    assert relp.pearson(a, b) == pytest.approx(corr(a, b), abs=1e-12)
    assert relp.pearson(a, b) == relp.pearson(a.flatten(), b.flatten())
    transposed = a.transpose(0, 2), b.transpose(0, 2)  # not contiguous
    assert relp.pearson(*transposed) == pytest.approx(corr(a, b), abs=1e-12)


@pytest.mark.parametrize("shapes", [((4, 3), (3, 4)), ((4, 3), (12,)), ((4, 1), (4, 3)), ((), (1,))])
def test_pearson_of_unequal_shapes(shapes):
    """Shapes that hold equally many numbers, or that could be broadcast, are no maps of the same cells."""
    a, b = (torch.rand(shape) for shape in shapes)
    with pytest.raises(ValueError) as error:
        relp.pearson(a, b)
    text = str(error.value)
    assert "\n" not in text and all(str(list(shape)) in text for shape in shapes)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -1e-12])
def test_pearson_of_a_constant(value):
    a = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(2))
    constant = torch.full_like(a, value)
    assert math.isnan(relp.pearson(a, constant)) and math.isnan(relp.pearson(constant, a))
    assert math.isnan(relp.pearson(constant, constant))


def test_pearson_of_what_varies_by_rounding_only():
    """Less than a millionth of its size is no variation; more is."""
    a, noise = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(2)).double()
    for size in (1.0, 1e-30, -1e30):
        assert math.isnan(relp.pearson(a, size * (1 + 1e-8 * noise)))
        assert relp.pearson(a, abs(size) * (1 + 1e-4 * noise)) == pytest.approx(corr(a, noise), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused: a ValueError in one line that names the argument

SCORES_OF_NODES = [relp.attribute, relp.activation_patching, relp.patch_one_by_one, relp.compare]


def refusal(function, *arguments, **options):
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("what, change", {
    "one shape": lambda o, p, a: (o, p[:, 1:], a),
    "answers": lambda o, p, a: (o, p, a[:, :1]),
    "token ids": lambda o, p, a: (o + 1000, p, a),
    "context of 64": lambda o, p, a: (o.repeat(1, 9), p.repeat(1, 9), a),
}.items())  # fmt: skip
def test_bad_input_is_named(what, change, checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    assert what in refusal(relp.attribute, model, *change(*pair), ("resid_pre",))
    assert "unknown node 'resid'" in refusal(relp.attribute, model, *pair, ("resid",))


NODES = ["resid_pre"]
WRONG = {  # what the message must name: the arguments
    "original, a list": (["original", "list"], lambda o, p, a: (o.tolist(), p, a, NODES)),
    "original, a string": (["original", "str"], lambda o, p, a: ("After John", p, a, NODES)),
    "prompts, strings": (["original", "str"], lambda o, p, a: ("After John", "After Mary", a, NODES)),
    "prompts, lists of strings": (["original", "list"], lambda o, p, a: (["After John"], ["After Mary"], a, NODES)),
    "patch, a string": (["patch", "str"], lambda o, p, a: (o, "After Mary", a, NODES)),
    "one prompt without a batch": (["original", "[9]"], lambda o, p, a: (o[0], p[0], a, NODES)),
    "answers, strings": (["answers", "list"], lambda o, p, a: (o, p, [" Mary", " John"], NODES)),
    "answers, one axis": (["answers", "[2]"], lambda o, p, a: (o, p, a[0], NODES)),
    "negative answers": (["answers"], lambda o, p, a: (o, p, a - 200, NODES)),
    "one negative answer": (["answers"], lambda o, p, a: (o, p, torch.cat([a[:-1], a[-1:] * 0 - 1]), NODES)),
    "an empty batch": (["prompt"], lambda o, p, a: (o[:0], p[:0], a[:0], NODES)),
    "empty prompts": (["prompt"], lambda o, p, a: (o[:, :0], p[:, :0], a, NODES)),
    "metric, a wrong name": (["metric", "'accuracy'", "logit_diff"], lambda o, p, a: (o, p, a, NODES, "accuracy")),
    "nodes, a string": (["nodes", "'resid_pre'"], lambda o, p, a: (o, p, a, "resid_pre")),
    "nodes, a generator": (["nodes", "generator"], lambda o, p, a: (o, p, a, (n for n in NODES))),
    "original, no integers": (["original", "float32"], lambda o, p, a: (o.float(), p, a, NODES)),
    "answers beyond the vocabulary": (["0..96", "200"], lambda o, p, a: (o, p, a * 0 + 200, NODES)),
    "the same, all logits": (["answers", "97", "200"], lambda o, p, a: (o, p, a * 0 + 200, NODES, relp.prob_diff)),
    "a metric of another shape": (["metric", "[4]", "[4, 2]"], lambda o, p, a: (o, p, a, NODES, wrong_metric)),
}


def wrong_metric(logits, answers):
    return logits.gather(-1, answers)


@pytest.mark.parametrize("function", SCORES_OF_NODES)
@pytest.mark.parametrize("words, change", WRONG.values(), ids=WRONG)
def test_wrong_arguments(words, change, function, checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    message = refusal(function, model, *change(*pair))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("function", [relp.attribute_features, relp.patch_features])
def test_wrong_arguments_with_features(function, checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    original, patch, answers = pair
    saes = {("mlp_out", 0): relp.Neurons(torch.eye(32))}
    assert "metric" in refusal(function, model, *pair, saes, "accuracy")
    assert "original" in refusal(function, model, "After John", patch, answers, saes)
    assert "unknown node 'mlp'" in refusal(function, model, *pair, {("mlp", 0): saes["mlp_out", 0]})
    for key in (("head", 0), ("mlp_out", 3), ("mlp_out", -1)):
        assert str(key) in refusal(function, model, *pair, {key: saes["mlp_out", 0]})


def test_wrong_cells(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    cells = torch.ones(4, 3, 9)
    for wrong in ({}, {"resid_pre": cells}, {"resid_pre": cells.int()}, {"mlp_out": cells.bool()}):
        message = refusal(relp.activation_patching, model, *pair, NODES, cells=wrong)
        assert "cells must have a bool tensor" in message and "'resid_pre'" in message


def test_inference_mode(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    with torch.inference_mode():
        assert "inference_mode" in refusal(relp.attribute, model, *pair, NODES)
        relp.activation_patching(model, *pair, NODES)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_the_ah_rule_lets_nothing_through_to_q_and_k(name, checkpoint, pair):
    """Alone, too: then no gradient at all is left to be taken."""
    model = from_pretrained(str(checkpoint(name)[0]))
    for nodes in (["q"], ["k", "head_q"], ["q", "resid_pre"]):
        scores = relp.attribute(model, *pair, nodes, lrp=Rules(ah=True))
        assert not any(scores[node].any() for node in nodes if node != "resid_pre")
        assert all(scores[node].shape[:3] == (4, model.config.n_layers, 9) for node in nodes)


@pytest.mark.parametrize("lrp", [True, Rules(ln=True), Rules()])
def test_steps_or_rules_and_not_both(lrp, checkpoint, pair):
    """Integrated Gradients averages plain gradients; rules would have been ignored, or mixed in, without a word."""
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    message = refusal(relp.attribute, model, *pair, NODES, lrp=lrp, steps=10)
    assert "steps" in message and "lrp" in message
    saes = {("mlp_out", 0): relp.Neurons(torch.eye(32))}
    message = refusal(relp.attribute_features, model, *pair, saes, lrp=lrp, steps=10)
    assert "steps" in message and "lrp" in message


@pytest.mark.parametrize("steps", [0, -3, 2.5, "10"])
def test_steps_below_one(steps, checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    message = refusal(relp.attribute, model, *pair, NODES, steps=steps)
    assert "steps must be a whole number from 1 on" in message and str(steps) in message
    saes = {("mlp_out", 0): relp.Neurons(torch.eye(32))}
    assert "steps must be a whole number" in refusal(relp.attribute_features, model, *pair, saes, steps=steps)


@pytest.mark.parametrize("lrp", ["paper", None, 1])
def test_other_values_of_lrp(lrp, checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    assert "lrp" in refusal(relp.attribute, model, *pair, NODES, lrp=lrp)


def test_of_no_nodes_there_are_no_scores(checkpoint, pair):
    for model in (from_pretrained(str(checkpoint("gpt2")[0])), from_pretrained(str(checkpoint("gemma2")[0]))):
        for options in ({}, {"lrp": True}, {"steps": 2}):
            assert relp.attribute(model, *pair, [], **options) == {}
        for function in (relp.activation_patching, relp.patch_one_by_one):
            assert function(model, *pair, []) == {}
        value, patch_value, differs = relp.compare(model, *pair, [])
        assert value.shape == patch_value.shape == (4,) and differs == {}
        for function in (relp.attribute_features, relp.patch_features):
            assert function(model, *pair, {}) == {}
