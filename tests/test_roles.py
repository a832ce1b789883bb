"""beyond/edges/roles.py: what heads do at the last word, against plain runs."""

import json

import pytest
import torch

import models
import relp
import tasks
from beyond.edges import roles
from support.commandline import run
from support.prompts import tensors
from support.tokenizer import load_tokenizer

MODELS = ["toy-gpt2", "toy-qwen2", "toy-gemma2"]


def some_pairs(name, corruption, n=2):
    pairs = tasks.ioi(load_tokenizer(name), 30, 0, corruption)
    return [pair for pair in pairs if pair.group == pairs[0].group][:n]


@pytest.mark.parametrize("name", MODELS)
def test_attention_and_ap_of_heads_at_the_last_word(name):
    model, pairs = models.from_pretrained(name), some_pairs(name, "swap")
    original, patch, answers = tensors(pairs)
    found = roles.what_heads_do(model, pairs)
    truth = relp.activation_patching(model, original, patch, answers, ["head"])["head"][:, :, -1]
    assert truth.abs().max() > 0.1
    torch.testing.assert_close(found["patched"], truth, atol=1e-4, rtol=1e-4)
    _, acts = relp.record(model, original, ["head_pattern"])
    for i, pair in enumerate(pairs):
        for role in ("A", "B1", "S2"):
            for layer in range(model.config.n_layers):
                wanted = acts["head_pattern", layer][i, -1, :, pair.roles.index(role)]
                torch.testing.assert_close(found[role][i, layer], wanted)
    s2, b1 = pairs[0].roles.index("S2"), pairs[0].roles.index("B1")
    found = roles.what_heads_do(model, pairs, "S2")
    assert found.keys() == {"patched", "B1", "B1+1"}
    truth = relp.activation_patching(model, original, patch, answers, ["head"])["head"][:, :, s2]
    torch.testing.assert_close(found["patched"], truth, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["B1+1"][:, 1], acts["head_pattern", 1][:, s2, :, b1 + 1])


@pytest.mark.parametrize("name", MODELS)
def test_what_a_head_adds_to_a_logit(name):
    """With the last norm's scale as it is, the logit without the head's part is smaller by just that."""
    model, pairs = models.from_pretrained(name), some_pairs(name, "swap")
    original, _, answers = tensors(pairs)
    found = roles.what_heads_do(model, pairs)
    stream, acts = relp.record(model, original, ["head"])
    layer, head = model.config.n_layers - 1, 1
    part = roles.written_by_heads(model, layer, acts["head", layer][:, -1:])[head, :, 0]
    x, norm = stream[:, -1], model.ln_f

    def logits(x, scale):
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        y = x / scale * (norm.offset + norm.weight) + (0 if norm.bias is None else norm.bias)
        return y @ (model.embed_tokens if model.config.tied else model.unembed_tokens).weight.T

    centred = x - x.mean(-1, keepdim=True) if norm.centred else x
    scale = (norm.eps + centred.square().mean(-1, keepdim=True)).sqrt()
    cap = model.config.logit_softcap
    for i, what in enumerate(("of A", "of B1")):
        with_it, without = (logits(s, scale).gather(1, answers[:, i : i + 1])[:, 0] for s in (x, x - part))
        slope = 1 if cap is None else 1 - torch.tanh(with_it / cap) ** 2  # a softcap is not linear
        torch.testing.assert_close(found[what][:, layer, head], (with_it - without) * slope, atol=1e-4, rtol=1e-3)


def test_a_head_steers_what_the_movers_look_at():
    model, pairs = models.from_pretrained("toy-qwen2"), some_pairs("toy-qwen2", "s2")
    original, patch, _ = tensors(pairs)
    movers, head = [(2, 0), (3, 1)], (0, 1)
    _, theirs = relp.record(model, patch, ["z"])

    def swapped(name, layer, x):
        if (name, layer) == ("z", head[0]):
            x = x.clone()
            x[:, -1, head[1]] = theirs["z", layer].view_as(x)[:, -1, head[1]]
        if name == "pattern":
            seen[layer] = x
        return x

    for given in (None, head):
        seen = {}
        if given:
            model.stream(original, hook=swapped)
        else:
            _, acts = relp.record(model, original, ["pattern"])
            seen = {
                layer: x.view(len(pairs), original.shape[1], -1, original.shape[1]) for (_, layer), x in acts.items()
            }
        wanted = [
            sum(seen[layer][i, -1, mover, pair.roles.index("A")] for layer, mover in movers) / 2
            for i, pair in enumerate(pairs)
        ]
        torch.testing.assert_close(roles.attention_to_a(model, pairs, movers, [given])[given], torch.stack(wanted))
    first, second = roles.attention_to_a(model, pairs, movers, [None, head]).values()
    assert (first - second).abs().max() > 1e-6


def test_the_command(tmp_path, capsys):
    arguments = ["--model", "toy-gpt2", "--pairs", "4", "--out", str(tmp_path)]
    assert run(roles.main, arguments) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "toy-gpt2-edges" / "roles.json").read_text())
    model, pairs = models.from_pretrained("toy-gpt2"), tasks.ioi(load_tokenizer("toy-gpt2"), 4, 0)
    each = [relp.activation_patching(model, *tensors([pair]), ["head"])["head"][0, :, -1] for pair in pairs]
    ap = sum(each) / 4
    names = [f"a{i // 4}.h{i % 4}" for i in ap.flatten().abs().argsort(descending=True).tolist()[:10]]
    assert list(found["swap END"]) == names and all(f"  {name}" in out for name in names)
    largest = ap.flatten()[ap.flatten().abs().argsort(descending=True)[:10]].tolist()
    assert [of["patched"] for of in found["swap END"].values()] == pytest.approx(largest, abs=1e-4)
    assert all("movers" in of for place in ("END", "S2") for of in found[f"s2 {place}"].values())
    assert all("B1+1" in of for of in found["s2 S2"].values())
    assert run(roles.main, ["--model", "toy-gpt2", "--nodes", "z"]) == 2
