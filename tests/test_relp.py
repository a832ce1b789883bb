"""AP by its definition and AtP by finite differences, on our models and on some written here; what is refused."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, NEWER

import relp
from models import Rules, from_pretrained
from support import resume

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
    got = resume.activation_patching(model, *pair, nodes, metric, rows=7)
    plain = relp.activation_patching(model, *pair, nodes, metric)
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
    got = resume.activation_patching(model, *pair, [*heads, "neuron"], rows=7)
    plain = relp.activation_patching(model, *pair, heads)
    for name in heads:
        assert wanted[name].abs().amax((0, 2, 3)).gt(1e-6).all()  # in every layer
        torch.testing.assert_close(got[name], wanted[name], atol=1e-12, rtol=0)
        torch.testing.assert_close(plain[name], wanted[name], atol=1e-12, rtol=0)

    _, patch_acts = relp.record(model, patch, ["neuron"])

    def with_neuron(layer, pos, neuron):
        def hook(name, of_layer, x):
            if (name, of_layer) == ("mlp_hidden", layer):
                x = x.clone()
                x[:, pos, neuron] = patch_acts["neuron", layer][:, pos, neuron, 0]
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


def some_cells(shapes, seed=0):
    """{name: bool}, about a third of them True."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=g) < 0.3 for name, shape in shapes.items()}


def test_only_chosen_cells_are_patched(checkpoint, pair):
    model, nodes = from_pretrained(str(checkpoint("neox")[0])), ["resid_pre", "head"]
    whole = resume.activation_patching(model, *pair, nodes)
    for axes in (0, 1):  # a choice for every prompt, one for all
        cells = some_cells({name: x.shape[axes:] for name, x in whole.items()})
        some = resume.activation_patching(model, *pair, nodes, cells=cells)
        for name in nodes:
            torch.testing.assert_close(some[name], whole[name] * cells[name], atol=1e-5, rtol=0)
            assert (some[name] != 0).any() and (some[name][~cells[name].expand_as(some[name])] == 0).all()


@pytest.mark.parametrize("name", FAMILIES + NEWER)
def test_activation_patching_in_float32(name, checkpoint, pair):
    model, nodes = from_pretrained(str(checkpoint(name)[0])), ("resid_pre", "attn_out", "mlp_out")
    wanted = ap_by_definition(model, *pair, nodes)
    for node, got in resume.activation_patching(model, *pair, nodes).items():
        assert (got - wanted[node]).abs().max() < 1e-5 * wanted[node].abs().max()


def test_patching_everything_at_the_last_position_gives_the_patch_run(checkpoint, pair):
    """Direction: patch activations go into the original run, and the effect is metric(patched) - metric(original)."""
    model = from_pretrained(str(checkpoint("qwen2")[0]))
    value, patch_value = (relp.logit_diff(model(tokens)[:, -1], pair[2]) for tokens in pair[:2])
    for function in (relp.activation_patching, resume.activation_patching):
        effect = function(model, *pair, ("resid_post",))["resid_post"]
        torch.testing.assert_close(effect[:, -1, -1], patch_value - value)


def differing(model, original, patch, kinds):
    """{kind: bool, shaped like the scores}: where the two runs differ."""
    (_, acts), (_, patch_acts) = (relp.record(model, tokens, kinds) for tokens in (original, patch))
    return relp.by_node({key: resume.changed(acts[key], patch_acts[key]) for key in acts}, kinds)


def test_every_edited_run_is_counted_as_progress(checkpoint, pair):
    model, seen = from_pretrained(str(checkpoint("gemma2")[0])), []
    resume.activation_patching(model, *pair, ("resid_pre", "attn_out"), progress=seen.append)
    assert len(seen) == 9 and seen[2] == 0 < seen[3] < seen[5] < seen[6] < 1 == seen[-1] and seen == sorted(seen)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gemma2"])
def test_where_the_runs_agree_all_scores_are_exactly_zero(name, checkpoint, pair):
    """All kinds in one call: the pattern, whose presence changes how attention is computed, must not leave rounding."""
    model, pair = from_pretrained(str(checkpoint(name)[0])), [pair[0][:2, :5], pair[1][:2, :5], pair[2][:2]]
    kinds = [*model.nodes, *NODE_OF]
    if model.config.d_mlp > 50:  # a pass for every neuron takes long, and two families have few of them
        kinds.remove("neuron")
    differs = differing(model, *pair[:2], kinds)
    assert (differs["resid_pre"][:, 0] == (pair[0] != pair[1])).all()  # layer 0: the tokens themselves
    every = [f(model, *pair, kinds) for f in (relp.activation_patching, resume.activation_patching, relp.attribute)]
    every.append(relp.attribute(model, *pair, kinds, lrp=True))
    for kind in kinds:
        assert differs[kind].any() and not differs[kind][:, :, :3].any()
        torch.testing.assert_close(every[0][kind], every[1][kind], atol=1e-4, rtol=1e-4)
        for scores in every:
            assert scores[kind].shape == differs[kind].shape and (scores[kind][~differs[kind]] == 0).all(), kind


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
                x[:, pos] += by * (patch_acts[key] - acts[key]).view_as(x)[:, pos]
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
        x = acts["resid_post", last][:, -1, 0].clone().requires_grad_()
        rho = torch.autograd.grad(relp.logit_diff(model.unembed(x, Rules(ln=True)), pair[2]).sum(), x)[0]
        wanted = ((patch_acts["mlp_out", last] - acts["mlp_out", last])[:, -1, 0] * rho).sum(-1)
        torch.testing.assert_close(relp_paper["mlp_out"][:, last, -1], wanted)


def test_two_forward_passes_one_backward_no_weight_gradient(checkpoint, pair, monkeypatch):
    model = from_pretrained(str(checkpoint("llama")[0])).requires_grad_(True)  # even where somebody asks for them
    calls = []
    spy(monkeypatch, type(model), "stream", lambda *_, **options: calls.append("forward"))
    spy(monkeypatch, torch.autograd, "grad", lambda *_, **options: calls.append("backward"))
    relp.attribute(model, *pair, ("resid_pre", "mlp_out"), lrp=True)
    assert calls == ["forward", "forward", "backward"]
    assert all(p.grad is None for p in model.parameters())


def test_integrated_gradients_of_a_node_and_its_parts(checkpoint, pair):
    """head is a part of z, and z moves as a whole: the scores add up. Other nodes in the call do not matter."""
    model, steps = from_pretrained(str(checkpoint("gpt2")[0]), dtype=torch.float64), 3
    got = relp.attribute(model, *pair, ["z", "head", "mlp_out"], steps=steps)
    torch.testing.assert_close(got["head"].sum(-1), got["z"])
    assert torch.equal(relp.attribute(model, *pair, ["z"], steps=steps)["z"], got["z"])


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
        hook("k", layer, x.unsqueeze(2))
        v = hook("v", layer, (x @ self.value[layer]).unsqueeze(2)).squeeze(2)
        attn_out = hook("attn_out", layer, self.mix[layer, start : start + x.shape[1], : v.shape[1]] @ v)
        x = hook("resid_post", layer, x + attn_out)
        return x[:, -1:] if last else x

    def unembed(self, x, lrp=False, columns=None):
        return x @ (self.unembedding if columns is None else self.unembedding[columns]).T


def test_all_methods_agree_on_a_linear_model():
    g = torch.Generator().manual_seed(1)
    batch = *torch.randint(11, (2, 4, 9), generator=g), torch.randint(11, (4, 2), generator=g)
    model, nodes = LinearModel(), ("resid_pre", "attn_out", "resid_post")
    ap, plain = resume.activation_patching(model, *batch, nodes), relp.activation_patching(model, *batch, nodes)
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
    """The plain loop agrees with a brute force of this file."""
    model = OwnModel()
    wanted = ap_by_definition(model, *own_pair, model.nodes, metric)
    got = relp.activation_patching(model, *own_pair, model.nodes, metric)
    assert list(got) == list(model.nodes)
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


def test_a_model_of_ones_own_has_no_parts_under_other_names(own_pair):
    with pytest.raises(ValueError, match="unknown node 'head': this model has trunk, keys, .*, trunk_after$"):
        relp.attribute(OwnModel(), *own_pair, ["head"])


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_ap_on_a_model_of_ones_own_that_can_be_resumed(rows, own_pair):
    model, nodes = Resumable(), [*Resumable.nodes, "head", "head_k", "head_v"]
    wanted = ap_by_definition(model, *own_pair, nodes)
    model.streams = 0
    got = resume.activation_patching(model, *own_pair, nodes, rows=rows)
    assert model.streams == 2  # the original and the patch run: all else is resumed
    for node in nodes:
        assert wanted[node].transpose(0, 1).flatten(1).abs().amax(1).gt(1e-3).all()  # in every layer
        torch.testing.assert_close(got[node], wanted[node], atol=1e-12, rtol=0)
        assert (got[node][:, :, :2] == 0).all()
    by_other_names = relp.activation_patching(OwnModel(), *own_pair, OwnModel.nodes)
    for theirs, ours in zip(OwnModel.nodes, Resumable.nodes):  # the same model, by the plain loop
        torch.testing.assert_close(got[ours], by_other_names[theirs], atol=1e-12, rtol=0)


def test_features_on_models_of_ones_own(own_pair):
    """Dimensions as features: their scores add up to the node's. AP of features is for models that can be resumed."""
    sae = relp.Neurons(torch.eye(6, dtype=torch.float64))
    scores = relp.attribute_features(OwnModel(), *own_pair, {("bump", 0): sae, ("mixed", 1): sae})
    whole = relp.attribute(OwnModel(), *own_pair, ["bump", "mixed"])
    torch.testing.assert_close(scores["bump", 0].sum(-1), whole["bump"][:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(scores["mixed", 1].sum(-1), whole["mixed"][:, 1], atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="no method `block`"):
        resume.patch_features(OwnModel(), *own_pair, {("bump", 0): sae})


# ---------------------------------------------------------------------------------------------------------------------
# Metrics and correlation


def test_metrics():
    logits, answers = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 5.0]]), torch.tensor([[1, 0], [0, 2]])
    p = logits.softmax(-1)
    torch.testing.assert_close(relp.logit_diff(logits, answers), torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(relp.prob_diff(logits, answers), torch.stack([p[0, 1] - p[0, 0], p[1, 0] - p[1, 2]]))
    torch.testing.assert_close(relp.logprob_diff(logits, answers), torch.tensor([2.0, -3.0]))
    theirs = torch.tensor([[0.0, 1.0, 2.0], [2.0, 2.0, 5.0]])
    wanted = (theirs.softmax(-1) * (theirs.softmax(-1) / p).log()).sum(-1)
    torch.testing.assert_close(relp.kl(logits, theirs), wanted)
    assert wanted[0] > 1 and relp.kl(theirs, theirs).abs().max() < 1e-6


def test_a_metric_has_targets_of_its_own(checkpoint, pair):
    """Any tensor with a row per prompt: here a direction in the space of logits, and the patch run's logits for kl."""
    model, (original, patch, _) = from_pretrained(str(checkpoint("gpt2")[0]), dtype=torch.float64), pair
    direction = torch.randn(4, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cases = [(direction, lambda logits, targets: (logits * targets).sum(-1)), (model(patch)[:, -1], relp.kl)]
    for targets, metric in cases:
        wanted = ap_by_definition(model, original, patch, targets, NODES, metric)["resid_pre"]
        for function in (relp.activation_patching, resume.activation_patching):
            got = function(model, original, patch, targets, NODES, metric)["resid_pre"]
            torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)
        scores = relp.attribute(model, original, patch, targets, ["resid_post"], metric)["resid_post"]
        assert wanted.abs().max() > 1e-2 and scores.abs().max() > 1e-2


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

SCORES_OF_NODES = [relp.attribute, relp.activation_patching, resume.activation_patching]
NODES = ["resid_pre"]
WRONG = {  # what the message must name
    "one prompt without a batch": (["original", "[9]"], lambda o, p, a: (o[0], p[0], a, NODES)),
    "prompts of two lengths": (["one shape", "[4, 9]", "[4, 8]"], lambda o, p, a: (o, p[:, 1:], a, NODES)),
    "too few targets": (["targets", "4", "[3, 2]"], lambda o, p, a: (o, p, a[:3], NODES)),
    "an unknown node": (["'resid'", "resid_pre", "head_q"], lambda o, p, a: (o, p, a, ["resid"])),
    "an unknown token": (["token ids", "0..96"], lambda o, p, a: (o + 1000, p, a, NODES)),
    "a prompt that is too long": (["context of 64"], lambda o, p, a: (o.repeat(1, 9), p.repeat(1, 9), a, NODES)),
    "answers beyond the vocabulary": (["0..96", "200"], lambda o, p, a: (o, p, a * 0 + 200, NODES)),
    "a metric of another shape": (["metric", "[4]", "[4, 2]"], lambda o, p, a: (o, p, a, NODES, wrong_metric)),
}


def wrong_metric(logits, targets):
    return logits.gather(-1, targets)


def refusal(function, *arguments, **options):
    with pytest.raises(ValueError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("function", SCORES_OF_NODES)
@pytest.mark.parametrize("words, change", WRONG.values(), ids=WRONG)
def test_wrong_arguments(words, change, function, checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    message = refusal(function, model, *change(*pair))
    assert all(word in message for word in words), message


def test_wrong_ways_to_attribute(checkpoint, pair):
    """Steps average plain gradients: rules would have been ignored, or mixed in, without a word."""
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    for lrp in (True, Rules(ln=True), Rules()):
        message = refusal(relp.attribute, model, *pair, NODES, lrp=lrp, steps=10)
        assert "steps" in message and "lrp" in message
    assert "steps must be a whole number from 1 on, got 0" in refusal(relp.attribute, model, *pair, NODES, steps=0)
    assert "lrp" in refusal(relp.attribute, model, *pair, NODES, lrp="paper")
    with torch.inference_mode():
        assert "inference_mode" in refusal(relp.attribute, model, *pair, NODES)
        resume.activation_patching(model, *pair, NODES)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_the_ah_rule_lets_nothing_through_to_q_and_k(name, checkpoint, pair):
    """By itself, too: then no gradient at all is left to be taken."""
    model = from_pretrained(str(checkpoint(name)[0]))
    for nodes in (["q"], ["k", "head_q"], ["q", "resid_pre"]):
        scores = relp.attribute(model, *pair, nodes, lrp=Rules(ah=True))
        assert not any(scores[node].any() for node in nodes if node != "resid_pre")
        assert all(scores[node].shape[:3] == (4, model.config.n_layers, 9) for node in nodes)


def test_of_no_nodes_there_are_no_scores(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    assert all(function(model, *pair, []) == {} for function in SCORES_OF_NODES)
    assert all(function(model, *pair, {}) == {} for function in (relp.attribute_features, resume.patch_features))


def test_sets_of_answers(checkpoint, pair):
    """Padded with -1, the mean of each set; AP, RelP and resumed AP with them are means of those of single answers."""
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    original, patch, targets = pair
    logits = model(original)[:, -1]
    sets = torch.tensor([[[3, 5, -1], [7, -1, -1]]] * len(original))
    expected = (logits[:, 3] + logits[:, 5]) / 2 - logits[:, 7]
    torch.testing.assert_close(relp.logit_diff(logits, sets), expected)
    p = logits.softmax(-1)
    torch.testing.assert_close(relp.prob_diff(logits, sets), (p[:, 3] + p[:, 5]) / 2 - p[:, 7])
    assert torch.equal(relp.logit_diff(logits, targets[:, :, None]), relp.logit_diff(logits, targets))
    single = [torch.tensor([[a, 7]] * len(original)) for a in (3, 5)]
    for function in (resume.activation_patching, relp.activation_patching, partial(relp.attribute, lrp=True)):
        of_set = function(model, original, patch, sets, ["mlp_out"])["mlp_out"]
        of_each = [function(model, original, patch, one, ["mlp_out"])["mlp_out"] for one in single]
        torch.testing.assert_close(of_set, sum(of_each) / 2, atol=1e-5, rtol=1e-4)
