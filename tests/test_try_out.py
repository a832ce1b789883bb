"""support.try_out: what is wrong with a model, a metric or a set of rules is one line; and the example of a model."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, NEWER
from test_relp import Resumable

import models
import relp
import support.own_model
from beyond.twopoint import TwoPoint
from models import Rules, from_pretrained
from support import resume
from support.own_model import OwnModel
from support.try_out import try_out

NODES = ["resid_pre", "mlp_out"]
PROMPTS = (
    torch.tensor([[1, 2, 3, 4], [2, 2, 3, 1]]),
    torch.tensor([[1, 5, 3, 4], [2, 5, 3, 1]]),
    torch.tensor([[6, 7]] * 2),
)


def test_the_example():
    """RelP differs from AtP, predicts AP, and resumed runs are those of Eq. 1; its docstring runs."""
    model = OwnModel()
    with torch.no_grad():
        try_out(model, *PROMPTS, NODES, lrp=True)
    truth = relp.activation_patching(model, *PROMPTS, [*NODES, "z", "k", "v"])
    resumed = resume.activation_patching(model, *PROMPTS, [*NODES, "z", "k", "v"])
    for node, x in truth.items():
        torch.testing.assert_close(resumed[node], x, atol=1e-5, rtol=0)
    with_rule, without = (relp.attribute(model, *PROMPTS, ["mlp_out"], lrp=lrp)["mlp_out"] for lrp in (True, False))
    assert not torch.allclose(with_rule, without, atol=1e-3)
    assert relp.pearson(with_rule, truth["mlp_out"]) > 0.6
    example = re.sub(r"^    ", "", support.own_model.__doc__.split("\n\n", 1)[1], flags=re.MULTILINE)
    exec(compile(example, "example", "exec"), {})


def test_the_example_is_short():
    assert len(Path(support.own_model.__file__).read_text().splitlines()) <= 65


@pytest.mark.parametrize("name", [*FAMILIES, *NEWER])
def test_our_families_pass(name, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]))
    for metric in (relp.logit_diff, "prob_diff"):
        try_out(model, *pair, [*NODES, "head"], metric, lrp=True)


def detached(logits, targets):
    return relp.logit_diff(logits, targets).detach()


def mixing(logits, targets):
    values = relp.logit_diff(logits, targets)
    return values - values.mean() / 2


@pytest.mark.parametrize("metric, says", [
    (detached, "the metric passes back no gradient"),
    (mixing, "the metric of a prompt depends on the others: "),
])  # fmt: skip
def test_metrics(metric, says):
    with pytest.raises(ValueError, match=says) as error:
        try_out(OwnModel(), *PROMPTS, NODES, metric)
    assert "\n" not in str(error.value)


class Louder(Rules):
    def norm(self, x, eps):
        return 1.1 * super().norm(x, eps)


def test_rules(checkpoint, pair):
    model = from_pretrained(str(checkpoint("gpt2")[0]))
    with pytest.raises(ValueError, match="values change under the rules: "):
        try_out(model, *pair, NODES, lrp=Louder(ln=True))
    with pytest.raises(
        ValueError, match="the rules change no coefficient: with this model, RelP's scores would be AtP's"
    ):
        try_out(model, *pair, NODES, lrp=Rules(half=True))  # GPT-2 has no gate
    with pytest.raises(ValueError, match="the rules change no coefficient"):
        try_out(Resumable(), *PROMPTS, NODES, lrp=True)  # it ignores lrp
    with pytest.raises(ValueError, match="two-point rules need both runs"):
        try_out(model, *pair, NODES, lrp=TwoPoint())


class BothWays(OwnModel):
    """Attention sees later positions too."""

    def block(self, layer, x, lrp=False, hook=None, start=0, last=False):
        seen = x.flip(1).cumsum(1).flip(1) / 5
        return super().block(layer, x + seen, lrp, hook, start, last)


class Forgetful(OwnModel):
    """A resumed run does not see the keys before it."""

    def block(self, layer, x, lrp=False, hook=None, start=0, last=False):
        def short(name, layer, y):
            z = hook(name, layer, y)
            return z[:, start:] if name in ("k", "v") and start else z

        if start:
            short.nodes = hook.nodes
        return super().block(layer, x, lrp, short if start else hook, start, last)


class First(OwnModel):
    """It takes the first position for the last one."""

    def block(self, layer, x, lrp=False, hook=None, start=0, last=False):
        y = super().block(layer, x, lrp, hook, start)
        return y[:, :1] if last else y


class Deaf(OwnModel):
    """It ignores start and the hook where it is resumed."""

    def block(self, layer, x, lrp=False, hook=None, start=0, last=False):
        return super().block(layer, x, lrp, None if start else hook, 0, last)


@pytest.mark.parametrize("kind", [BothWays, Forgetful, First, Deaf])
def test_a_block_that_does_not_resume(kind):
    with pytest.raises(ValueError, match=r"block\(\) does not resume an edited run: use relp.activation_patching"):
        try_out(kind(), *PROMPTS, NODES)


def test_it_imports_relp_and_torch_only(tmp_path):
    names = re.findall(
        r"^(?:import|from) (\w+)", Path(sys.modules["support.try_out"].__file__).read_text(), re.MULTILINE
    )
    assert {*names} == {"torch", "relp"} and models
