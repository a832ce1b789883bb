"""Random models of every family, with odd sizes and weights from tame to saturated: are the numbers right?"""

import random

import pytest
import torch

import relp
import support.experts  # registers the mixture of experts
import support.families  # noqa: F401 (registers the newer families)
from beyond.audit import audit
from models import TABLE_4, Config, Rules, Transformer
from support import resume


def random_config(rng: random.Random) -> dict:
    """A valid config.json of any family."""
    family = rng.choice(list(TABLE_4))
    kv_heads, shared, d_head = rng.randint(1, 3), rng.randint(1, 3), 2 * rng.randint(1, 6)
    heads, layers = kv_heads * shared, rng.randint(1, 4)
    if family in ("gpt2", "gpt_neox"):
        kv_heads = heads
    width = heads * d_head if family in ("gpt2", "gpt_neox") else 2 * rng.randint(2, 20)
    if family == "gpt2":
        hf = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": 12}
        hf |= {"n_inner": rng.choice([None, rng.randint(1, 50)])}
        hf |= {"activation_function": rng.choice(["gelu", "gelu_new"])}
    else:
        hf = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
        hf |= {"intermediate_size": rng.randint(1, 50), "max_position_embeddings": 12}
        hf["tie_word_embeddings"] = rng.random() < 0.5
    if family == "gpt_neox":
        hf |= {"rotary_pct": rng.choice([0.5, 1.0]), "use_parallel_residual": rng.random() < 0.5}
    if family not in ("gpt2", "gpt_neox"):
        hf |= {"num_key_value_heads": kv_heads, "head_dim": d_head}
    if family not in ("gpt2", "gpt_neox", "llama", "olmo2"):
        hf["sliding_window"] = rng.randint(1, 8)
    if "qwen" in family:
        hf |= {"use_sliding_window": rng.random() < 0.5, "max_window_layers": rng.randint(0, layers)}
    if "gemma" in family:
        hf["query_pre_attn_scalar"] = rng.randint(1, 30)
    if family == "gemma2":
        hf |= {"attn_logit_softcapping": rng.choice([None, 5.0]), "final_logit_softcapping": rng.choice([None, 5.0])}
    if family == "gemma3_text":
        hf["sliding_window_pattern"] = rng.randint(1, 3)
    if family == "phi3":
        hf["original_max_position_embeddings"] = 12
    if "moe" in family:
        n = rng.randint(1, 5)
        hf |= {"num_experts": n, "num_experts_per_tok": rng.randint(1, n), "moe_intermediate_size": rng.randint(1, 9)}
        hf |= {"norm_topk_prob": rng.random() < 0.5, "decoder_sparse_step": rng.randint(1, 2)}
    return {"model_type": family, "vocab_size": rng.randint(5, 60), **hf}


@pytest.fixture(params=range(24))
def case(request):
    """rng, a model in float64, and prompts with targets."""
    rng = random.Random(request.param)
    torch.manual_seed(request.param)
    model = Transformer(Config.from_hf(random_config(rng)))
    scale = rng.choice([1, 5, 20])
    for p in model.parameters():
        p.data = (p.data + 0.02 * torch.randn_like(p)) * (scale if p.ndim > 1 else 1)
    n, n_pos, vocab = rng.randint(1, 3), rng.randint(1, 9), model.config.n_vocab
    original, patch, answers = (torch.randint(vocab, shape) for shape in ((n, n_pos), (n, n_pos), (n, 2)))
    if rng.random() < 0.5:  # that differ at one position only
        patch = torch.where(torch.arange(n_pos) != rng.randrange(n_pos), original, patch)
    return rng, model.double().requires_grad_(False).eval(), (original, patch, answers)


def test_resumed_runs_are_the_plain_loop(case):
    rng, model, batch = case
    known = [*model.nodes, *(part for part, node in relp.PARTS_OF.items() if node in model.nodes)]
    nodes = rng.sample(known, 3)
    wanted = relp.activation_patching(model, *batch, nodes)
    got = resume.activation_patching(model, *batch, nodes, rows=rng.choice([1, 3, 32]))
    for node in nodes:
        size = max(1.0, float(wanted[node].abs().max()))
        torch.testing.assert_close(got[node], wanted[node], atol=1e-10 * size, rtol=0)


def test_rules_change_no_bit_and_the_audit_accepts_them(case):
    rng, model, (original, _, _) = case
    flags = {name: rng.random() < 0.5 for name in ("ln", "identity", "half", "ah")}
    rules = Rules(
        **flags, **rng.choice([{}, {"epsilon": 10 ** rng.uniform(-3, 1)}, {"gamma": 10 ** rng.uniform(-3, 1)}])
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(model.to(dtype)(original), model(original, lrp=rules)), dtype
    if model.config.family != "qwen3_moe":
        audit(model, original, rules)
