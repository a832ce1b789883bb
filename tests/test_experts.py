"""Mixtures of experts: the sum over the chosen experts, the two rules for its weights, what is refused."""

import json
import shutil

import pytest
import torch
import transformers

import evaluate
import models
from beyond import grid as grids
from beyond.audit import audit
from beyond.conservation import conservation
from beyond.methods import parse_rules
from models import Config, Rules, from_pretrained
from support.experts import RouterRules

MIXTURES = ["qwen3-moe", "qwen3-moe-normed"]
RULES = [
    Rules(),
    Rules(half=True),
    Rules(ln=True, identity=True, half=True, ah=True),
    RouterRules(router=True),
    RouterRules(ln=True, identity=True, half=True, router=True),
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
    logits = m.router(x, rules)
    smallest = logits.topk(m.mixture.n_chosen).values[..., -1:]
    chosen = (logits >= smallest).to(x)
    assert (chosen.sum(-1) == m.mixture.n_chosen).all()
    w = logits.exp() * chosen
    w = w / (w if m.mixture.normed else logits.exp()).sum(-1, keepdim=True)
    y = torch.stack([expert(x, rules, models.Nodes(None, 0)) for expert in m.experts], -1)
    if getattr(rules, "router", False):
        return (w.detach()[..., None, :] * y).sum(-1)
    return (w[..., None, :] * y).sum(-1)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_the_sum_and_its_gradient(name, rules, load):
    m = load(name).blocks[1 if "normed" in name else 2].mlp
    g = torch.Generator().manual_seed(3)
    x, signal = (torch.randn(2, 7, 32, dtype=torch.float64, generator=g) for _ in range(2))
    x.requires_grad_()
    got = m(x, rules, models.Nodes(None, 0))
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
    ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0: a positive"),
    ({"num_experts": 513}, "num_experts = 513: above 512"),
    ({"num_experts": "8"}, "num_experts = '8'"),
    ({"num_experts": 0}, "num_experts = 0"),
    ({"num_experts": 500, "num_hidden_layers": 101}, "500 experts in 101 layers: above 50000"),
    ({"moe_intermediate_size": -1}, "moe_intermediate_size = -1"),
    ({"moe_intermediate_size": 10**7}, "moe_intermediate_size = 10000000: above"),
    ({"moe_intermediate_size": None}, "moe_intermediate_size = None"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
    ({"mlp_only_layers": 3}, "mlp_only_layers = 3: a list of layers"),
    ({"mlp_only_layers": ["1"]}, "mlp_only_layers = ..1..: a list of layers"),
    ({"mlp_only_layers": [48]}, "mlp_only_layers = .48.: a list of layers"),
    ({"norm_topk_prob": "false"}, "norm_topk_prob = 'false': true or false"),
])  # fmt: skip
def test_impossible_mixtures_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        Config.from_hf(PUBLISHED | change)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Audit, conservation


def blames(model, tokens, rules) -> str:
    with pytest.raises(ValueError, match="^the rules in use are not those requested: .*$") as error:
        audit(model, tokens, rules)
    return str(error.value).removeprefix("the rules in use are not those requested: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_the_audit_passes_what_is_right(name, dtype, load, tokens):
    model = load(name, dtype)
    n_mixtures = len(model.config.mixture.layers)
    for rules in (False, True, *RULES, Rules(gamma=0.3), Rules(ln=True, epsilon=0.1)):
        report = audit(model, tokens, rules)
        found, rules = report["rules"], model.rules(rules)
        router = getattr(rules, "router", False)
        assert ("router" in report["no rule"]) == (not router)
        assert ("router" in found) == router and ("half" in found) == rules.half
        if router:
            assert found["router"]["applied"] == {"Experts": n_mixtures}
        if rules.half:
            assert found["half"]["applied"].keys() == {"MLP"} and found["half"]["applied"]["MLP"] > 3


def test_experts_that_nobody_chooses_are_not_missed(load):
    """One token has chosen two of five experts."""
    model = load("qwen3-moe")
    counts = audit(model, torch.tensor([[5]]), Rules(identity=True))["rules"]["identity"]
    assert counts["applied"] == {"MLP": 2 + 1 + 2}


def test_a_wrong_forward_pass_may_choose_others(load, tokens, monkeypatch):
    """The audit names where it is wrong, though it sees experts that the right one has not called."""
    model = load("qwen3-moe")
    monkeypatch.setattr(Rules, "gate", lambda self, a, b: -a * b if self.half else a * b)
    for pos in range(3):
        says = blames(model, tokens[pos : pos + 1, :2], Rules(half=True))
        assert "the forward pass is changed in blocks.0.mlp.experts." in says and "the logits" in says


def test_a_model_without_experts(checkpoint, tokens, tmp_path):
    """decoder_sparse_step beyond its layers: a Qwen3."""
    given = json.loads((checkpoint("qwen3")[0] / "config.json").read_text())
    fields = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(given | fields | {"decoder_sparse_step": 4}))
    shutil.copy(checkpoint("qwen3")[0] / "model.safetensors", tmp_path)
    model = from_pretrained(str(tmp_path))
    assert model.config.mixture is None
    assert torch.equal(model(tokens), from_pretrained(str(checkpoint("qwen3")[0]))(tokens))


def test_the_audit_names_what_is_wrong(load, tokens, monkeypatch):
    model, const_router = load("qwen3-moe"), RouterRules(half=True, router=True)
    with monkeypatch.context() as m:
        m.setattr(RouterRules, "route", lambda self, weight, y: weight * y)
        assert blames(model, tokens, const_router) == "router: changed no gradient in blocks.0.mlp, blocks.2.mlp"
    with monkeypatch.context() as m:
        m.setattr(RouterRules, "route", lambda self, weight, y: weight.detach() * y)
        assert blames(model, tokens, RouterRules()) == "router: applied unasked in blocks.0.mlp, blocks.2.mlp"
    with monkeypatch.context() as m:
        m.setattr(RouterRules, "route", Rules.gate)
        says = "no rule: not the gradient owed in blocks.0.mlp, blocks.2.mlp"
        assert blames(model, tokens, RouterRules(half=True)) == says
    with monkeypatch.context() as m:
        m.setattr(RouterRules, "route", lambda self, weight, y: weight * y.detach())
        assert blames(model, tokens, RouterRules()).startswith("no rule: not the gradient owed in blocks.0.mlp")
    assert blames(from_pretrained("toy-qwen3"), tokens, const_router) == "router: met no module of Experts"


def test_relevance_is_kept_if_the_router_is_constant(load, tokens):
    """There are no biases. Else the router's softmax takes some, and no other module does."""
    model, answers = load("qwen3-moe"), tokens[:, :2]
    whole = conservation(model, tokens, answers, lrp=RouterRules(True, True, True, True, router=True))
    assert whole["kept"] == pytest.approx([1] * 4, abs=1e-6)  # the norms' own eps
    for kind, losses in whole["lost"].items():
        assert max(map(abs, losses)) < 1e-6, kind
    some = conservation(model, tokens, answers, lrp=Rules(True, True, True, True))
    assert max(map(abs, some["lost"]["Experts"])) > 1e-3 and some["lost"]["Experts"][1] == 0
    for kind in some["lost"].keys() - {"Experts"}:
        assert max(map(abs, some["lost"][kind])) < 1e-6, kind
    of_activation = conservation(model, tokens, answers, lrp=RouterRules(True, False, True, True, router=True))["lost"]
    assert max(map(abs, of_activation["Expert"])) > 1e-3 and max(map(abs, of_activation["Experts"])) < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_names_of_rules():
    assert parse_rules("ln,half,router") == RouterRules(ln=True, half=True, router=True)
    for text in ("router,temperature=2", "ln2,router"):
        with pytest.raises(ValueError, match="router goes with the rules of Table 1 only"):
            parse_rules(text)


def test_the_grid_has_the_router(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grids, "LINEAR", [""])
    prompts = tmp_path / "ids.jsonl"
    row = {"original": [5, 6, 7], "patch": [5, 9, 7], "original_answer": 1, "patch_answer": 2}
    prompts.write_text("\n".join([json.dumps(row)] * 3))
    arguments = ["--prompts", str(prompts), "--no-plot", "--out", str(tmp_path / "out"), "--nodes", "mlp_out", "--grid"]
    for name, n in (("qwen3-moe", 32), ("qwen3", 16)):
        assert evaluate.main(["--model", str(checkpoint(name)[0]), *arguments]) == 0
        (found,) = (tmp_path / "out").glob(f"{checkpoint(name)[0].name}-*/grid.json")
        found = json.loads(found.read_text())
        assert len(found["rules"]) == n and ("router" in found["effects"]) == (n == 32)


@pytest.mark.parametrize("method", ["twopoint", "ln2"])
def test_two_point_rules_are_refused(method, checkpoint, tmp_path, capsys):
    prompts = tmp_path / "ids.jsonl"
    row = {"original": [5, 6, 7], "patch": [5, 9, 7], "original_answer": 1, "patch_answer": 2}
    prompts.write_text(json.dumps(row))
    given = ["--model", str(checkpoint("qwen3-moe")[0]), "--prompts", str(prompts), "--out", str(tmp_path / "out")]
    assert evaluate.main([*given, "--methods", f"ap,{method}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "two-point rules do not fit mixtures of experts: two runs may choose" in err


def test_shapes_of_experts_are_checked(checkpoint, tmp_path):
    """config.json with another number of experts than the checkpoint has."""
    path = checkpoint("qwen3-moe")[0]
    fields = json.loads((path / "config.json").read_text())
    shutil.copy(path / "model.safetensors", tmp_path)
    for change in ({"num_local_experts": 4}, {"num_local_experts": 6}, {"moe_intermediate_size": 11}):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match="has the shape .*, config.json asks for"):
            from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(fields | {"mlp_only_layers": []}))
    with pytest.raises(ValueError, match="lacks|unexpected"):
        from_pretrained(str(tmp_path))
