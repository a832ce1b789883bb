import pytest
import torch
from conftest import FAMILIES

import relp
from models import Rules, from_pretrained


def ap_by_definition(model, original, patch, answers, nodes, metric=relp.logit_diff):
    """Eq. 1 as it stands: for every node, layer, position (and part) one whole forward pass with that activation overwritten."""
    _, patch_acts = relp.record(model, patch, nodes)
    base = metric(model(original)[:, -1], answers)

    def effect(key, *at):
        def hook(n, l, x):
            if (n, l) == key:
                x = x.clone()
                x[(slice(None), *at)] = patch_acts[key][(slice(None), *at)]
            return x

        return metric(model(original, hook=hook)[:, -1], answers) - base

    result = {}
    for name in nodes:
        node = relp.PARTS_OF.get(name, name)
        for layer in range(model.config.n_layers):
            parts = range(patch_acts[node, layer].shape[2]) if name in relp.PARTS_OF else None
            for pos in range(original.shape[1]):
                result[name, layer, pos] = (
                    torch.stack([effect((node, layer), pos, i) for i in parts], -1)
                    if parts
                    else effect((node, layer), pos)
                )
    stack = lambda name, layer: torch.stack([result[name, layer, pos] for pos in range(original.shape[1])], dim=1)
    return {name: torch.stack([stack(name, layer) for layer in range(model.config.n_layers)], dim=1) for name in nodes}


@pytest.mark.parametrize(
    "name, metric",
    [(name, relp.logit_diff) for name in FAMILIES] + [("gpt2", relp.prob_diff), ("gemma2", relp.logprob_diff)],
)
def test_activation_patching_is_its_definition(name, metric, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    nodes = model.nodes
    with torch.no_grad():
        wanted = ap_by_definition(model, *pair, nodes, metric)
    got = relp.activation_patching(model, *pair, nodes, metric, rows=7)
    for node in nodes:
        assert got[node].dtype == torch.float64 and wanted[node].abs().max() > 1e-3
        torch.testing.assert_close(got[node], wanted[node], atol=1e-12, rtol=0)
        assert (got[node][:, :, :3] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_neurons(name, checkpoint, pair):
    """Parts of a node: AP by definition; AtP's and RelP's scores add up to the whole node's."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    pair = [x[:2] for x in pair]
    heads = ["head", "head_q", "head_k", "head_v", "head_pattern"]
    with torch.no_grad():
        wanted = ap_by_definition(model, *pair, heads)
    got = relp.activation_patching(model, *pair, [*heads, "neuron"], rows=7)
    for name in heads:
        assert wanted[name].abs().amax((0, 2, 3)).gt(1e-6).all()  # in every layer
        torch.testing.assert_close(got[name], wanted[name], atol=1e-12, rtol=0)
    _, patch_acts = relp.record(model, pair[1], ["neuron"])
    for layer, pos, neuron in ((0, 3, 1), (1, 6, 30), (2, 8, 5)):

        def hook(n, l, x):
            if (n, l) == ("mlp_hidden", layer):
                x = x.clone()
                x[:, pos, neuron] = patch_acts["mlp_hidden", layer][:, pos, neuron]
            return x

        with torch.no_grad():
            change = relp.logit_diff(model(pair[0], hook=hook)[:, -1], pair[2]) - relp.logit_diff(
                model(pair[0])[:, -1], pair[2]
            )
        assert change.abs().max() > 1e-6
        torch.testing.assert_close(got["neuron"][:, layer, pos, neuron], change, atol=1e-12, rtol=0)
    for lrp in (False, True):
        scores = relp.attribute(model, *pair, ["head", "z", "neuron", "mlp_hidden"], lrp=lrp)
        torch.testing.assert_close(scores["head"].sum(-1), scores["z"])
        torch.testing.assert_close(scores["neuron"].sum(-1), scores["mlp_hidden"])
    *_, differs = relp.compare(model, *pair, ["head"])
    assert differs["head"].shape == got["head"].shape and (got["head"][~differs["head"]] == 0).all()


def test_chosen_cells_alone_are_patched(checkpoint, pair):
    model, nodes = from_pretrained(str(checkpoint("neox")[0])), ["resid_pre", "head"]
    whole, g = relp.activation_patching(model, *pair, nodes), torch.Generator().manual_seed(0)
    for shape in (lambda x: x.shape, lambda x: x.shape[1:]):  # a choice for every prompt, one for all
        cells = {name: torch.rand(shape(whole[name]), generator=g) < 0.3 for name in nodes}
        some = relp.activation_patching(model, *pair, nodes, cells=cells)
        for name in nodes:
            torch.testing.assert_close(some[name], whole[name] * cells[name], atol=1e-5, rtol=0)
            assert (some[name] != 0).any()


@pytest.mark.parametrize("name", ["neox", "gemma2"])
def test_lockstep_changes_the_work_and_not_the_result(name, checkpoint, pair, monkeypatch):
    """Processes that share weights make the same calls whatever their prompts are; the effects stay the same, zeros included."""
    model, nodes, calls = from_pretrained(str(checkpoint(name)[0])), ["resid_pre", "head"], []
    monkeypatch.setattr(
        type(model),
        "block",
        lambda self, layer, x, *a, f=type(model).block, **k: (
            calls.append((layer, x.shape)) or f(self, layer, x, *a, **k)
        ),
    )
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


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_patching_in_float32(name, checkpoint, pair):
    model, nodes = from_pretrained(str(checkpoint(name)[0])), ("resid_pre", "attn_out", "mlp_out")
    with torch.no_grad():
        wanted = ap_by_definition(model, *pair, nodes)
    for node, got in relp.activation_patching(model, *pair, nodes).items():
        assert (got - wanted[node]).abs().max() < 1e-5 * wanted[node].abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_atp_is_the_derivative(name, checkpoint, pair):
    """Eq. 2 against central finite differences: the metric with (a sliver of) the difference added to one node."""
    model, step = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64), 1e-5
    original, patch, answers = pair
    nodes = [
        n for n in model.nodes if n in ("resid_pre", "attn_out", "mlp_out", "z", "mlp_hidden", "pattern", "q", "k", "v")
    ]
    _, acts = relp.record(model, original, nodes)
    _, patch_acts = relp.record(model, patch, nodes)
    got = relp.attribute(model, *pair, nodes)
    for (node, layer), value in acts.items():
        for pos in (3, 6, 8):

            def moved(by):
                def hook(n, l, x):
                    if (n, l) == (node, layer):
                        x = x.clone()
                        x[:, pos] += by * (patch_acts[node, layer] - value)[:, pos]
                    return x

                with torch.no_grad():
                    return relp.logit_diff(model(original, hook=hook)[:, -1], answers)

            torch.testing.assert_close(
                got[node][:, layer, pos], (moved(step) - moved(-step)) / (2 * step), atol=1e-7, rtol=1e-5
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_relp_differs_from_atp_by_its_rules_alone(name, checkpoint, pair):
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


def test_finished_pieces_are_taken_and_the_rest_computed(checkpoint, pair):
    """A run that goes on from the pieces of another ends in the same numbers to the bit; progress is that of the work left."""
    model, nodes, pieces = from_pretrained(str(checkpoint("gemma2")[0])), ("resid_pre", "attn_out"), {}
    whole = relp.activation_patching(model, *pair, nodes, pieces=pieces)
    assert list(pieces) == list(range(9))
    some, seen = {pos: pieces[pos] for pos in range(6)}, []
    again = relp.activation_patching(model, *pair, nodes, pieces=some, progress=seen.append)
    for node in nodes:
        assert torch.equal(again[node], whole[node])
    assert 0.3 < seen[0] < 1 and seen[-1] == 1 and seen == sorted(seen)


class LinearModel:
    """A stream that every block mixes linearly over positions (lower-triangular) and dimensions: all methods must agree."""

    nodes = ("resid_pre", "attn_out", "resid_post", "k", "v")

    def __init__(self, n_layers=3, d=5, vocab=11, n_pos=9):
        g = torch.Generator().manual_seed(0)
        self.config = type("Config", (), {"n_layers": n_layers})
        self.embedding, self.unembedding = (torch.randn(vocab, d, generator=g, dtype=torch.float64) for _ in range(2))
        self.mix = torch.randn(n_layers, n_pos, n_pos, generator=g, dtype=torch.float64).tril()
        self.value = torch.randn(n_layers, d, d, generator=g, dtype=torch.float64)

    def stream(self, tokens, lrp=False, hook=None):
        x = self.embedding[tokens]
        for layer in range(self.config.n_layers):
            x = self.block(layer, x, lrp, hook)
        return x

    def block(self, layer, x, lrp=False, hook=None, start=0, last=False):
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
    ap, atp, relevance = (
        relp.activation_patching(model, *batch, nodes),
        relp.attribute(model, *batch, nodes),
        relp.attribute(model, *batch, nodes, lrp=True),
    )
    for node in nodes:
        assert ap[node].abs().max() > 0.1
        torch.testing.assert_close(atp[node], ap[node], atol=1e-10, rtol=1e-10)
        assert torch.equal(relevance[node], atp[node])


def test_two_forward_passes_one_backward_no_weight_gradient(checkpoint, pair, monkeypatch):
    model = from_pretrained(str(checkpoint("llama")[0])).requires_grad_(True)  # even where somebody asks for them
    calls = []
    monkeypatch.setattr(
        type(model), "stream", lambda self, *a, f=type(model).stream, **k: calls.append("forward") or f(self, *a, **k)
    )
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append("backward") or grad(*a, **k))
    relp.attribute(model, *pair, ("resid_pre", "mlp_out"), lrp=True)
    assert calls == ["forward", "forward", "backward"]
    assert all(p.grad is None for p in model.parameters())


def test_low_precision_scores_are_summed_in_float32(checkpoint, pair):
    path = str(checkpoint("gpt2")[0])
    exact = relp.attribute(from_pretrained(path), *pair, ("resid_pre",), lrp=True)["resid_pre"]
    for dtype in (torch.bfloat16, torch.float16):
        got = relp.attribute(from_pretrained(path, dtype=dtype), *pair, ("resid_pre",), lrp=True)["resid_pre"]
        assert got.dtype == torch.float32
        assert relp.pearson(got.flatten(), exact.flatten()) > 0.99


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
            relp.attribute(model, *pair, nodes),
            relp.attribute(model, *pair, nodes, lrp=True),
        ):
            assert (scores[node][~differs[node]] == 0).all()
    assert (differs["resid_pre"][:, 0] == (pair[0] != pair[1])).all()  # layer 0: the tokens themselves


def test_patching_everything_at_the_last_position_gives_the_patch_run(checkpoint, pair):
    """Direction: patch activations go into the original run, and the effect is metric(patched) - metric(original)."""
    model = from_pretrained(str(checkpoint("qwen2")[0]))
    value, patch_value, _ = relp.compare(model, *pair, ())
    effect = relp.activation_patching(model, *pair, ("resid_post",))["resid_post"]
    torch.testing.assert_close(effect[:, -1, -1], patch_value - value)


def test_metrics():
    logits, answers = torch.tensor([[1.0, 3.0, 0.0], [2.0, 2.0, 5.0]]), torch.tensor([[1, 0], [0, 2]])
    p = logits.softmax(-1)
    torch.testing.assert_close(relp.logit_diff(logits, answers), torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(relp.prob_diff(logits, answers), torch.stack([p[0, 1] - p[0, 0], p[1, 0] - p[1, 2]]))
    torch.testing.assert_close(relp.logprob_diff(logits, answers), torch.tensor([2.0, -3.0]))


@pytest.mark.parametrize("what, change", {
    "one shape": lambda o, p, a: (o, p[:, 1:], a),
    "answers": lambda o, p, a: (o, p, a[:, :1]),
    "token ids": lambda o, p, a: (o + 1000, p, a),
    "context of 64": lambda o, p, a: (o.repeat(1, 9), p.repeat(1, 9), a),
}.items())  # fmt: skip
def test_bad_input_is_named(what, change, checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    with pytest.raises(ValueError, match=what):
        relp.attribute(model, *change(*pair), ("resid_pre",))
    with pytest.raises(ValueError, match="unknown node 'resid'"):
        relp.attribute(model, *pair, ("resid",))


@pytest.mark.parametrize("name", FAMILIES)
def test_qk_fix(name, checkpoint, pair):
    """AtP*: the pattern is that of a run with this q, or this k, patched; times the pattern's gradient. Other nodes are AtP's."""
    model, nodes = (
        from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64),
        ["head_q", "head_k", "q", "k", "mlp_out"],
    )
    got = relp.attribute_star(model, *pair, nodes)
    assert list(got) == nodes
    acts, rho = relp.coefficients(model, pair[0], pair[2], ("q", "k", "pattern"))
    _, patch_acts = relp.record(model, pair[1], ("q", "k"))
    for node in "qk":
        for layer in range(model.config.n_layers):
            for pos in (0, 3, 5, 8):
                for head in range(acts[node, layer].shape[2]):
                    value = acts[node, layer].detach().clone()
                    value[:, pos, head] = patch_acts[node, layer][:, pos, head]
                    _, moved = relp.record(model, pair[0], ("q", "k", "pattern"), replace={(node, layer): value})
                    wanted = ((moved["pattern", layer] - acts["pattern", layer].detach()) * rho["pattern", layer]).sum(
                        (1, 2, 3)
                    )
                    torch.testing.assert_close(got[f"head_{node}"][:, layer, pos, head], wanted, atol=1e-10, rtol=1e-8)
        assert got[f"head_{node}"].abs().max() > 1e-4
        torch.testing.assert_close(got[node], got[f"head_{node}"].sum(-1))
    torch.testing.assert_close(got["mlp_out"], relp.attribute(model, *pair, ["mlp_out"])["mlp_out"])
