"""Mixtures of experts: the sum over the chosen experts, the two rules for its weights, what is refused."""

import json
import shutil

import pytest
import torch
import transformers

import evaluate
from models import Config, Pass, Rules, from_pretrained
from support.commandline import run

MIXTURES = ["qwen3-moe", "qwen3-moe-normed"]
RULES = [
    Rules(),
    Rules(half=True),
    Rules(ln=True, identity=True, half=True, ah=True),
]
PUBLISHED = dict(
    model_type="qwen3_moe", attention_bias=False, decoder_sparse_step=1, head_dim=128, hidden_act="silu",
    hidden_size=2048, intermediate_size=6144, max_position_embeddings=32768, max_window_layers=48, mlp_only_layers=[],
    moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
    num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000.0,
    sliding_window=None, tie_word_embeddings=False, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip


@pytest.fixture
def load(checkpoint):
    return lambda name, dtype=torch.float64: from_pretrained(str(checkpoint(name)[0]), dtype)


def every_expert_everywhere(m, x, rules):
    """The sum over all experts at all positions; those that are not chosen have the weight 0. m: an Experts."""
    logits = m.router(x, Pass(rules))
    smallest = logits.topk(m.mixture.n_chosen).values[..., -1:]
    chosen = (logits >= smallest).to(x)
    assert (chosen.sum(-1) == m.mixture.n_chosen).all()
    w = logits.exp() * chosen
    w = w / (w if m.mixture.normed else logits.exp()).sum(-1, keepdim=True)
    y = torch.stack([expert(x, Pass(rules)) for expert in m.experts], -1)
    return (w[..., None, :] * y).sum(-1)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_the_sum_and_its_gradient(name, rules, load):
    m = load(name).blocks[1 if "normed" in name else 2].mlp
    g = torch.Generator().manual_seed(3)
    x, signal = (torch.randn(2, 7, 32, dtype=torch.float64, generator=g) for _ in range(2))
    x.requires_grad_()
    got = m(x, Pass(rules))
    wanted = every_expert_everywhere(m, x, rules)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got, every_expert_everywhere(m, x, Rules()))
    gradients = [torch.autograd.grad(y, x, signal)[0] for y in (got, wanted)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0.01


def test_which_layers_have_experts(load):
    def kinds(name):
        return [type(block.mlp).__name__ for block in load(name).blocks]

    assert kinds("qwen3-moe") == ["Experts", "Expert", "Experts"]
    assert kinds("qwen3-moe-normed") == ["Expert", "Experts", "Expert"]
    for name in MIXTURES:
        assert "mlp_hidden" not in load(name).nodes


def test_a_published_configuration():
    ours, theirs = Config.from_hf(PUBLISHED), transformers.Qwen3MoeConfig(**PUBLISHED)
    assert ours.mixture == (theirs.num_experts, theirs.num_experts_per_tok, 768, True, tuple(range(48)))
    assert (ours.d_mlp, ours.d_head, ours.n_kv_heads) == (6144, 128, 4) and set(ours.windows) == {None}
    assert Config.from_hf(theirs.to_dict() | {"rope_parameters": None, "rope_theta": 1e6}) == ours


@pytest.mark.parametrize("change, message", [
    ({"num_experts_per_tok": 129}, "a router that chooses 129 of 128 experts"),
    ({"num_experts_per_tok": 0}, "a router that chooses 0 of 128"),
    ({"num_experts": 513}, "8 of 513 experts"),
    ({"num_experts": "8"}, "wrong type"),
    ({"decoder_sparse_step": 0}, "wrong type"),
    ({"mlp_only_layers": 3}, "wrong type"),
])  # fmt: skip
def test_impossible_mixtures_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Config.from_hf(PUBLISHED | change)
    assert "\n" not in str(error.value)


def test_a_model_without_experts(checkpoint, tokens, tmp_path):
    """decoder_sparse_step beyond its layers: a Qwen3."""
    given = json.loads((checkpoint("qwen3")[0] / "config.json").read_text())
    fields = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(given | fields | {"decoder_sparse_step": 4}))
    shutil.copy(checkpoint("qwen3")[0] / "model.safetensors", tmp_path)
    model = from_pretrained(str(tmp_path))
    assert model.config.mixture is None
    assert torch.equal(model(tokens), from_pretrained(str(checkpoint("qwen3")[0]))(tokens))


def test_two_point_rules_are_refused(checkpoint, tmp_path, capsys):
    prompts = tmp_path / "ids.jsonl"
    row = {"original": [5, 6, 7], "patch": [5, 9, 7], "original_answer": 1, "patch_answer": 2}
    prompts.write_text(json.dumps(row))
    given = ["--model", str(checkpoint("qwen3-moe")[0]), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert run(evaluate.main, [*given, "--methods", "ap,twopoint"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "two-point rules do not fit mixtures of experts: the two runs may choose" in err


def test_shapes_of_experts_are_checked(checkpoint, tmp_path):
    """config.json with another number of experts than the checkpoint has."""
    path = checkpoint("qwen3-moe")[0]
    fields = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    for change in ({"num_local_experts": 4}, {"num_local_experts": 6}, {"moe_intermediate_size": 11}):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match="the weights do not fit config.json"):
            from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(fields | {"mlp_only_layers": []}))
    with pytest.raises(ValueError, match="the weights do not fit config.json"):
        from_pretrained(str(tmp_path))
