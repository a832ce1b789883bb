"""Scores of SAE features: against the definition, their sum, and Integrated Gradients."""

import pytest
import torch
from test_saes import random_sae

import relp
from models import from_pretrained
from support import resume


@pytest.fixture
def model(checkpoint):
    return from_pretrained(str(checkpoint("gemma2")[0]), dtype=torch.float64)


@pytest.fixture
def saes(model):
    keys = [("resid_pre", 0), ("attn_out", 1), ("mlp_out", 1), ("resid_post", 2), ("z", 0)]
    made = {key: random_sae(i, d=48 if key[0] == "z" else 32) for i, key in enumerate(keys)}
    for sae in made.values():
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            setattr(sae, name, getattr(sae, name).double() * 0.3)
    return made


def with_node(model, tokens, answers, key, moved):
    """The metric of the run in which one node has this activation [batch, pos, d]."""

    def hook(name, layer, x):
        return moved.view_as(x) if (name, layer) == key else x

    with torch.no_grad():
        return relp.read_out(model, model.stream(tokens, hook=hook), answers)


@pytest.mark.parametrize("lrp", [False, True], ids=["atp", "relp"])
def test_features_and_error_add_up_to_the_node(model, saes, pair, lrp):
    got = relp.attribute_features(model, *pair, saes, lrp=lrp)
    whole = relp.attribute(model, *pair, ["resid_pre", "attn_out", "mlp_out", "resid_post", "z"], lrp=lrp)
    assert got.keys() == saes.keys()
    for (name, layer), scores in got.items():
        torch.testing.assert_close(scores.sum(-1), whole[name][:, layer])
        assert (scores[..., :-1] != 0).any() and (scores[..., -1] != 0).any()


def test_a_features_score_is_the_derivative(model, saes, pair):
    """AtP's against central finite differences: a sliver of the feature's difference, along its decoder direction."""
    original, patch, answers = pair
    got, step = relp.attribute_features(model, *pair, saes), 1e-5
    nodes = {name for name, _ in saes}
    (_, acts), (_, patch_acts) = (relp.record(model, tokens, nodes) for tokens in (original, patch))
    for key, sae in saes.items():
        x, y = acts[key].flatten(2), patch_acts[key].flatten(2)
        moves = (sae.encode(y) - sae.encode(x)).unsqueeze(-1) * sae.W_dec  # [batch, pos, feature, d]
        moves = torch.cat([moves, (sae.error(y) - sae.error(x)).unsqueeze(2)], dim=2)
        for pos in (3, 8):
            for i in (got[key][:, pos].abs().sum(0).argmax(), -1):

                def metric(by, key=key, x=x, pos=pos, move=moves[:, pos, i]):
                    moved = x.clone()
                    moved[:, pos] += by * move
                    return with_node(model, original, answers, key, moved)

                derivative = (metric(step) - metric(-step)) / (2 * step)
                torch.testing.assert_close(got[key][:, pos, i], derivative, atol=1e-7, rtol=1e-5)


def test_integrated_gradients_sum_to_the_effect(model, saes, pair):
    """Completeness: summed up they approach, as the steps grow, the effect of patching the node everywhere."""
    saes = {key: sae for key, sae in saes.items() if key[0] in ("attn_out", "mlp_out")}
    few, many = (relp.attribute_features(model, *pair, saes, steps=steps) for steps in (10, 100))
    nodes = {name for name, _ in saes}
    _, patch_acts = relp.record(model, pair[1], nodes)
    base = relp.logit_diff(model(pair[0])[:, -1], pair[2])
    for key in saes:
        effect = with_node(model, pair[0], pair[2], key, patch_acts[key]) - base
        off = [(scores[key].sum((1, 2)) - effect).abs().max() for scores in (few, many)]
        assert off[1] < 0.2 * off[0] and off[1] < 0.05 * effect.abs().max()


def test_integrated_gradients_passes(model, saes, pair, monkeypatch):
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    relp.attribute_features(model, *pair, saes, steps=10)
    assert len(calls) == 10 * len({name for name, _ in saes}) * model.config.n_layers
    calls.clear()
    relp.attribute_features(model, *pair, saes, lrp=True)
    assert len(calls) == 1


def test_patching_a_feature_is_its_definition(model, saes, pair):
    """Every feature and error of some positions by whole forward passes; those that do not differ are 0."""
    original, patch, answers = pair
    got = resume.patch_features(model, *pair, saes, rows=50)
    nodes = {name for name, _ in saes}
    (stream, acts), (_, patch_acts) = (relp.record(model, tokens, nodes) for tokens in (original, patch))
    base = relp.read_out(model, stream, answers)
    for key, sae in saes.items():
        x, y = acts[key].flatten(2), patch_acts[key].flatten(2)
        features = sae.encode(y) - sae.encode(x)
        n = features.shape[-1]
        assert got[key].shape == (*x.shape[:2], n + 1)
        for pos in (2, 3, 7):
            for i in (*range(0, n, 5), n):
                moved = x.clone()
                error_moves = (sae.error(y) - sae.error(x))[:, pos]
                moved[:, pos] += error_moves if i == n else features[:, pos, i, None] * sae.W_dec[i]
                effect = with_node(model, original, answers, key, moved) - base
                torch.testing.assert_close(got[key][:, pos, i], effect, atol=1e-12, rtol=0)
        if key != ("resid_post", 2):  # after the last block, only the last position counts
            assert got[key][:, 3:, :-1].abs().max() > 1e-6 and got[key][:, 3:, -1].abs().max() > 1e-6
        assert (got[key][:, :, :-1][features == 0] == 0).all()


@pytest.mark.parametrize("how", [{}, {"lrp": True}, {"steps": 2}], ids=["atp", "relp", "ig"])
def test_scores_need_no_gradient(model, saes, pair, how):
    """Not even if the SAE's own weights do, as they would in training: no graph is kept, and nobody gets a gradient."""
    plain = relp.attribute_features(model, *pair, saes, **how)
    weights = [getattr(sae, name) for sae in saes.values() for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    for weight in weights:
        weight.requires_grad_()
    got = relp.attribute_features(model, *pair, saes, **how)
    assert got.keys() == saes.keys()
    for key in saes:
        assert not got[key].requires_grad and torch.equal(got[key], plain[key])
    assert all(weight.grad is None for weight in weights)
    assert not any(scores.requires_grad for scores in resume.patch_features(model, *pair, saes).values())


def test_an_sae_is_what_has_encode_and_w_dec(model, saes, pair):
    """Nothing else of it is used: scores are the same with a bare object in its place."""

    class Bare:
        def __init__(self, sae):
            self.encode, self.W_dec = sae.encode, sae.W_dec

    bare = {key: Bare(sae) for key, sae in saes.items()}
    for function in (relp.attribute_features, resume.patch_features):
        got, wanted = function(model, *pair, bare), function(model, *pair, saes)
        assert all(torch.equal(got[key], wanted[key]) for key in saes)
