"""AtP*'s fix for q and k: the softmax is computed anew, also where attention is saturated and in low precision."""

import random

import fuzz
import pytest
import torch
from conftest import FAMILIES

import relp
import tasks
from beyond import atp_star
from models import from_pretrained
from support.prompts import batches, tensors
from support.tokenizer import load_tokenizer

KINDS = ["head_q", "head_k", "q", "k", "mlp_out"]


def saturated(path, dtype, factor):
    """A model whose weights of q and k are so many times larger: nearly all of a query's weight is on one key."""
    model = from_pretrained(path, dtype=dtype)
    for block in model.blocks:
        for linear in (block.attn.q, block.attn.k):
            linear.weight.mul_(factor)
    return model


@pytest.mark.parametrize("factor", [1, 10])
@pytest.mark.parametrize("name", FAMILIES)
def test_qk_fix(name, factor, checkpoint, pair):
    """The pattern is that of a run with this q, or this k, patched; times the pattern's gradient. Others are AtP's."""
    model = saturated(str(checkpoint(name)[0]), torch.float64, factor)
    got = atp_star.attribute(model, *pair, KINDS)
    assert list(got) == KINDS
    acts, rho = relp.coefficients(model, pair[0], pair[2], ("q", "k", "pattern"))
    _, patch_acts = relp.record(model, pair[1], ("q", "k"))
    for node in "qk":
        for layer in range(model.config.n_layers):
            pattern, r = acts["pattern", layer].detach(), rho["pattern", layer]
            for pos in (0, 3, 5, 8):
                for head in range(acts[node, layer].shape[2]):
                    value = acts[node, layer].detach().clone()
                    value[:, pos, head] = patch_acts[node, layer][:, pos, head]
                    _, moved = relp.record(model, pair[0], ("q", "k", "pattern"), replace={(node, layer): value})
                    wanted = ((moved["pattern", layer] - pattern) * r).sum((1, 2, 3))
                    torch.testing.assert_close(got[f"head_{node}"][:, layer, pos, head], wanted, atol=1e-10, rtol=1e-8)
        assert got[f"head_{node}"].abs().max() > 1e-4
        torch.testing.assert_close(got[node], got[f"head_{node}"].sum(-1))
    torch.testing.assert_close(got["mlp_out"], relp.attribute(model, *pair, ["mlp_out"])["mlp_out"])


# ---------------------------------------------------------------------------------------------------------------------
# Precision. The scores, from the same q, k and rho, in float64; and as they were computed once, by formulas that cancel


class Layer:
    """q, k and rho of one layer in float64, heads of keys repeated; and the causal mask, position by position."""

    def __init__(self, model, layer, acts, patch_acts, rho):
        c = self.c = model.config
        q, k, q_patch, k_patch = (a[n, layer].detach().double() for a in (acts, patch_acts) for n in "qk")
        self.shared = c.n_heads // c.n_kv_heads  # query heads that read one key head
        self.q, self.q_patch = q, q_patch
        self.k, self.k_patch = (x.repeat_interleave(self.shared, dim=2) for x in (k, k_patch))
        self.rho = rho["pattern", layer].double()
        n_pos, window = q.shape[1], c.windows[layer] or q.shape[1]
        visible = [[query - window < key <= query for key in range(n_pos)] for query in range(n_pos)]
        self.visible = torch.tensor(visible)[:, None]  # [query, 1, key]

    def scores(self, q, k):
        scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * self.c.attn_scale
        cap = self.c.attn_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def softmax(self, scores, visible=None):
        return scores.masked_fill(~(self.visible if visible is None else visible), -torch.inf).softmax(-1)

    def by_key_head(self, by_key):
        """[batch, query head, key] -> [batch, key, key head]"""
        return by_key.transpose(1, 2).unflatten(2, (-1, self.shared)).sum(3)

    def exact(self, visible=None):
        """{"head_q": [batch, pos, head], "head_k": ...}, by the definition. visible: the keys that q can reach."""
        pattern = self.softmax(self.scores(self.q, self.k))
        of_q = (self.softmax(self.scores(self.q_patch, self.k), visible) - pattern) * self.rho
        of_k = []
        for key in range(self.q.shape[1]):
            k = self.k.clone()
            k[:, key] = self.k_patch[:, key]
            of_k.append(((self.softmax(self.scores(self.q, k)) - pattern) * self.rho).sum((1, 3)))
        return {"head_q": of_q.sum(-1), "head_k": self.by_key_head(torch.stack(of_k, dim=-1))}

    def cancelling(self):
        """head_k in float32 by the rank-one update of the softmax: one minus almost one where a key has all weight."""
        s, s_patch = self.scores(self.q, self.k).float(), self.scores(self.q, self.k_patch).float()
        pattern, r = self.softmax(s), self.rho.float()
        growth = (s_patch - s).clamp(max=60).exp()
        total = 1 + pattern * (growth - 1)
        rest = (pattern * r).sum(-1, keepdim=True) - pattern * r
        return self.by_key_head((pattern * (growth / total - 1) * r + (1 / total - 1) * rest).sum(1))


def layers(model, original, patch, answers):
    nodes = ("q", "k", "pattern")
    acts, rho = relp.coefficients(model, original, answers, nodes)
    _, patch_acts = relp.record(model, patch, nodes)
    return [Layer(model, layer, acts, patch_acts, rho) for layer in range(model.config.n_layers)], acts


def off(got, wanted):
    """The largest difference, as a fraction of the largest score."""
    return float((got.double() - wanted).abs().nan_to_num(torch.inf).max() / wanted.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_saturated_attention_in_float32(name, checkpoint, pair):
    """Scores of q and k are those of a softmax in float64."""
    model = saturated(str(checkpoint(name)[0]), torch.float32, 10)
    got, (in_float64, acts) = atp_star.attribute(model, *pair, KINDS), layers(model, *pair)
    if model.config.attn_softcap is None:  # a cap keeps attention from being saturated
        assert all(acts["pattern", layer].amax(-1).median() > 0.999 for layer in range(1, 3))
    wanted = [layer.exact() for layer in in_float64]
    for kind in ("head_q", "head_k"):
        assert off(got[kind], torch.stack([w[kind] for w in wanted], dim=1)) < 5e-4
        torch.testing.assert_close(got[kind[-1]], got[kind].sum(-1))
    if model.config.attn_softcap is None:
        missed = torch.stack([layer.cancelling() for layer in in_float64], dim=1)
        assert off(missed, torch.stack([w["head_k"] for w in wanted], dim=1)) > 1e-2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma2"])  # whose cap lets nothing underflow
def test_weights_that_underflow_are_not_masked(name, checkpoint, pair):
    """In float16 a weight below 6e-8 is 0. A patched q may well look there: such a key is not one of the future."""
    model = saturated(str(checkpoint(name)[0]), torch.float16, 4)
    got, (in_float64, acts) = atp_star.attribute(model, *pair, ["head_q", "head_k"]), layers(model, *pair)
    wanted = [layer.exact() for layer in in_float64]
    for kind in ("head_q", "head_k"):
        assert off(got[kind], torch.stack([w[kind] for w in wanted], dim=1)) < 0.05
    kept = [acts["pattern", i] != 0 for i in range(model.config.n_layers)]
    assert any((~k & layer.visible).any() for k, layer in zip(kept, in_float64))
    taken_for_masked = torch.stack([layer.exact(k)["head_q"] for k, layer in zip(kept, in_float64)], dim=1)
    assert off(taken_for_masked, torch.stack([w["head_q"] for w in wanted], dim=1)) > 0.2


@pytest.mark.parametrize("factor", [1, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision_gives_finite_scores(name, dtype, factor, checkpoint, pair):
    model = saturated(str(checkpoint(name)[0]), dtype, factor)
    got = atp_star.attribute(model, *pair, KINDS)
    for kind, scores in got.items():
        assert scores.dtype == torch.float32 and scores.isfinite().all(), kind
        assert scores.abs().max() > 1e-4, kind
    if factor == 1:
        exact = atp_star.attribute(saturated(str(checkpoint(name)[0]), torch.float64, factor), *pair, KINDS)
        for kind in KINDS:
            assert relp.pearson(got[kind], exact[kind]) > (0.999 if dtype == torch.float16 else 0.95), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_cells_where_the_runs_agree_are_exactly_zero(name, dtype, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=dtype)
    got = atp_star.attribute(model, *pair, KINDS)
    *_, differs = relp.compare(model, *pair, [*KINDS, "pattern"])  # in runs that form the pattern, as AtP* does
    for kind in KINDS:
        assert got[kind].shape == differs[kind].shape and differs[kind].any() and not differs[kind][:, :, :3].any()
        assert (got[kind][~differs[kind]] == 0).all(), kind
        assert (got[kind][differs[kind]] != 0).any(), kind


def test_what_is_asked_for_and_nothing_else(checkpoint, pair):
    model = from_pretrained(str(checkpoint("llama")[0]))
    assert atp_star.attribute(model, *pair, []) == {}
    for kinds in (["k"], ["mlp_out", "head_q"], ["mlp_out"]):
        assert list(atp_star.attribute(model, *pair, kinds)) == kinds
    with pytest.raises(ValueError, match="unknown node 'keys'"):
        atp_star.attribute(model, *pair, ["keys"])
    with pytest.raises(ValueError, match="metric must be a function or one of"):
        atp_star.attribute(model, *pair, ["k"], "accuracy")


def test_random_models():
    """120 models of all families, from tame to saturated, with grouped heads and windows, in float64."""
    kinds, checked = ["head_q", "head_k"], 0
    for number in range(120):
        rng = random.Random(number)
        _, model = fuzz.random_model(rng, torch.float64)
        tokens = fuzz.random_tokens(rng, model)
        got, wanted = atp_star.attribute(model, *tokens, kinds), [layer.exact() for layer in layers(model, *tokens)[0]]
        for kind in kinds:
            whole = torch.stack([of_layer[kind] for of_layer in wanted], dim=1)
            if whole.abs().max() > 1e-9:
                checked += 1
                assert off(got[kind], whole) < 1e-9, number
    assert checked > 100


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.2)], ids=str)
@pytest.mark.parametrize("name", ["toy-gpt2", "toy-neox", "toy-qwen2", "toy-gemma2"])
def test_toys(name, dtype, bound):
    """On IOI, where attention is saturated: the softmax of the q and k that this dtype has, in float64."""
    model, pairs = from_pretrained(name, dtype), tasks.ioi(load_tokenizer(name), 6)
    for numbers in batches(pairs, 6):
        tokens = tensors([pairs[i] for i in numbers], "cpu")
        got = atp_star.attribute(model, *tokens, ["head_q", "head_k"])
        wanted = [layer.exact() for layer in layers(model, *tokens)[0]]
        for kind in got:
            assert off(got[kind], torch.stack([of_layer[kind] for of_layer in wanted], dim=1)) < bound
