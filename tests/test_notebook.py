"""What a researcher writes in a notebook: pairs from strings, metrics by name, a model in memory, pictures, the top."""

import matplotlib
import pytest
import torch
from conftest import CHECKPOINTS, FAMILIES, hf_model
from test_evaluate import run, tiny  # noqa: F401

import models
import relp
import tasks
from support import figures, resume, tables
from support.tokenizer import load_tokenizer

TEXTS = (
    "Then, Mary and John went to the store. Mary gave a book to",
    "Then, John and Mary went to the store. John gave a book to",
    " John",
    " Mary",
)


@pytest.fixture(scope="module")
def toy():
    return models.from_pretrained("toy-gpt2"), load_tokenizer("toy-gpt2")


@pytest.fixture
def load(checkpoint):
    return lambda name: models.from_pretrained(str(checkpoint(name)[0]), torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# A pair of strings


def test_a_pair_of_strings_goes_into_relp_as_it_is(toy):
    model, tokenizer = toy
    pair = tasks.pair(tokenizer, *TEXTS)
    assert pair.roles[:4] == ("BOS", "Then", ",", " Mary") and pair.original[0] == tokenizer.bos_id
    original, patch, answers = pair
    assert (original.shape, patch.shape, answers.shape) == ((1, 16), (1, 16), (1, 2))
    assert [tokenizer.decode(answers[0, i : i + 1].tolist()) for i in (0, 1)] == [" John", " Mary"]
    scores = relp.attribute(model, *pair, nodes=["resid_pre"], lrp=True)["resid_pre"]
    assert scores.shape == (1, 4, 16) and scores[0, 0, 11] < -5  # the second mention, S2
    torch.testing.assert_close(
        relp.activation_patching(model, *pair, nodes=["resid_pre"])["resid_pre"][0, 0, :3], torch.zeros(3)
    )
    without = tasks.pair(tokenizer, *TEXTS, bos=False)
    assert without.original == pair.original[1:] and without.roles == pair.roles[1:]


@pytest.mark.parametrize("texts, words", [
    (("Then Mary", "Then", " a", " b"), ["equally many tokens", "2 tokens ['Then', ' Mary']", "1 token ['Then']"]),
    (("Then Mary", "Then Mary", " John", " Mary"), ["must differ"]),
    (("Then Mary", "Then John", " John Mary", " Mary"), ["original_answer must be one token", "' John', ' Mary'"]),
    (("Then Mary", "Then John", " John", " John"), ["patch_answer must differ"]),
])  # fmt: skip
def test_a_pair_that_cannot_be_is_refused_with_its_tokens(toy, texts, words):
    with pytest.raises(ValueError) as error:
        tasks.pair(toy[1], *texts)
    assert all(word in str(error.value) for word in words), error.value


# ---------------------------------------------------------------------------------------------------------------------
# Metrics by name, KL, and a metric of one's own


def test_a_metric_by_its_name(load, pair):
    model, (original, patch, answers) = load("gpt2"), pair
    for name, metric in relp.METRICS.items():
        targets = model(patch)[:, -1] if name == "kl" else answers
        for function in (relp.attribute, relp.activation_patching, resume.activation_patching):
            by_name, by_itself = (function(model, original, patch, targets, ["mlp_out"], m) for m in (name, metric))
            assert torch.equal(by_name["mlp_out"], by_itself["mlp_out"]) and by_name["mlp_out"].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_is_between_the_whole_distributions_of_the_patch_run_and_this_one(load, pair, family):
    model, (original, patch, _) = load(family), pair
    targets = model(patch)[:, -1]
    p, q = targets.softmax(-1), model(original)[:, -1].softmax(-1)
    value = relp.kl(model(original)[:, -1], targets)
    torch.testing.assert_close(value, (p * (p / q).log()).sum(-1))
    assert (value > 1e-3).all() and not relp.kl(targets, targets).any()
    # by the definition, and by resumed runs
    node, layer, pos = "mlp_out", 1, 3
    _, acts = relp.record(model, patch, [node])
    patch_act = acts[node, layer].squeeze(2)

    def hook(name, at, x):
        if (name, at) == (node, layer):
            x = x.clone()
            x[:, pos] = patch_act[:, pos]
        return x

    patched = model(original, hook=hook)[:, -1].softmax(-1)
    wanted = (p * (p / patched).log()).sum(-1) - value
    for function in (relp.activation_patching, resume.activation_patching):
        got = function(model, original, patch, targets, [node], "kl")[node][:, layer, pos]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    # AtP: the gradient by hand; the patch run's distribution is a constant
    x = relp.record(model, original, [node])[1][node, layer].squeeze(2).clone().requires_grad_()
    swapped = model(original, hook=lambda name, at, y: x if (name, at) == (node, layer) else y)[:, -1].log_softmax(-1)
    (gradient,) = torch.autograd.grad(-(p * swapped).sum(), x)
    wanted = ((patch_act - x) * gradient).sum(-1)
    got = relp.attribute(model, original, patch, targets, [node], "kl")[node][:, layer]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_a_metric_of_ones_own_has_targets_of_its_own(load, pair):
    """Here the direction in which the logits should move: any tensor with a row for each prompt."""
    model, (original, patch, answers) = load("gpt2"), pair
    direction = torch.zeros(4, model.config.n_vocab, dtype=torch.float64)
    direction.scatter_(1, answers, torch.tensor([2.0, -2.0], dtype=torch.float64).expand(4, 2))

    def along(logits, targets):
        return (logits * targets).sum(-1)

    for function in (relp.attribute, relp.activation_patching, resume.activation_patching):
        mine = function(model, original, patch, direction, ["mlp_out"], along)["mlp_out"]
        torch.testing.assert_close(mine, 2 * function(model, *pair, ["mlp_out"])["mlp_out"])


def test_kl_on_the_command_line(run, tiny, tmp_path):  # noqa: F811
    prompts = tmp_path / "ids.jsonl"
    prompts.write_text('{"original": [5, 6, 7], "patch": [5, 9, 7], "original_answer": 4, "patch_answer": 8}\n')
    given = ["--model", tiny["gemma2"], "--prompts", prompts, "--metric", "kl", "--no-plot", "--methods", "ap,relp"]
    code, out, err = run(*given)
    assert code == 0 and "mean kl +" in out and "and +0.000" in out and not err


# ---------------------------------------------------------------------------------------------------------------------
# A model in memory


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_model_in_memory_is_the_one_from_its_files(checkpoint, name):
    path, hf = checkpoint(name)
    ours, theirs = models.from_pretrained(str(path)), models.from_transformers(hf)
    assert ours.config == theirs.config and not theirs.training
    for (key, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b) and not b.requires_grad, key


def test_a_model_in_memory_keeps_its_dtype_and_its_own_weights():
    hf = hf_model("qwen2").to(torch.bfloat16)
    ours = models.from_transformers(hf)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    before = ours.embed_tokens.weight.clone()
    with torch.no_grad():
        hf.get_input_embeddings().weight.zero_()
    assert torch.equal(ours.embed_tokens.weight, before)


def test_a_model_in_memory_may_have_an_unembedding_of_its_own(tokens):
    """Its configuration says that it is tied to the embedding, and somebody has changed it since."""
    hf = hf_model("gpt2")
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight + 0.1)
    with torch.no_grad():
        torch.testing.assert_close(models.from_transformers(hf)(tokens), hf(tokens).logits, atol=1e-4, rtol=0)


def test_a_model_in_memory_that_is_quantized_is_refused():
    hf = hf_model("llama")
    whole_numbers = torch.ones(48, 32, dtype=torch.int8)
    hf.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(whole_numbers, requires_grad=False)
    with pytest.raises(ValueError, match="up.weight holds no floating-point numbers"):
        models.from_transformers(hf)


def test_a_model_in_memory_that_is_not_ours_is_refused():
    import transformers

    other = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8,
    ))  # fmt: skip
    with pytest.raises(ValueError, match="opt"):
        models.from_transformers(other)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, the top


def test_a_heatmap_shows_the_mean_over_prompts_and_the_sum_over_heads():
    g = torch.Generator().manual_seed(0)
    scores = {"resid_pre": torch.randn(3, 2, 4, generator=g), "head": torch.randn(3, 2, 4, 5, generator=g)}
    figure = figures.heatmap(scores, ["BOS", "a", "b", "c"], "RelP")
    assert isinstance(figure, matplotlib.figure.Figure)
    images = [ax.images[0] for ax in figure.axes[:2]]
    torch.testing.assert_close(torch.tensor(images[0].get_array().data), scores["resid_pre"].double().mean(0))
    torch.testing.assert_close(torch.tensor(images[1].get_array().data), scores["head"].double().mean(0).sum(-1))
    largest = max(abs(image.get_array()).max() for image in images)
    assert all(image.get_clim() == (-largest, largest) for image in images)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["BOS", "a", "b", "c"]
    with pytest.raises(ValueError, match=r"scores of head must be \[batch, layer, 4 labelled positions\], got"):
        figures.heatmap({"head": torch.zeros(3, 2, 5)}, ["a"] * 4)
    with pytest.raises(ValueError, match="no scores"):
        figures.heatmap({}, ["a"])


def test_the_top_are_the_largest_in_size_with_layer_token_and_part():
    scores = {"resid_pre": torch.zeros(2, 2, 3), "head": torch.zeros(2, 2, 3, 4)}
    scores["resid_pre"][:, 1, 2] = torch.tensor([3.0, 1.0])
    scores["head"][:, 0, 1, 3] = -2.5
    scores["head"][:, 1, 0, 0] = 1.0
    found = tables.top(scores, ["BOS", " a", " b"], k=3)
    assert found == [("head", 0, 1, " a", 3, -2.5), ("resid_pre", 1, 2, " b", None, 2.0), ("head", 1, 0, "BOS", 0, 1.0)]
    assert found[0].layer == 0 and found[0].label == " a"
    assert repr(found).splitlines()[1].split() == ["resid_pre", "layer", "1", "position", "2", "b", "+2.000"]
    assert repr(found).startswith("head 3 ") and str(found) == repr(found)
    assert len(tables.top(scores, ["BOS", " a", " b"], 100)) == 6 + 24
    with pytest.raises(ValueError, match="2 labelled positions"):
        tables.top(scores, ["BOS", " a"])
