"""What a norm hides from the gradient, and the slopes that show it layer by layer."""

import pytest
import torch
from conftest import FAMILIES

import relp
from beyond.blindness import take_apart
from models import Rules, from_pretrained
from support import figures
from support.methods import ATP
from support.statistics import by_layer

NODES = ["resid_pre", "attn_out", "mlp_out"]


@pytest.mark.parametrize("name", [*FAMILIES, "gemma3"])
def test_the_parts_add_up_to_the_scores(name, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    atp = relp.attribute(model, *pair, NODES)
    by_rule = relp.attribute(model, *pair, NODES, lrp=Rules(ln=True))
    for node in NODES:
        parts = take_apart(model, *pair, node, 1)
        torch.testing.assert_close(parts.atp, atp[node][:, 1])
        torch.testing.assert_close(parts.ln_along + parts.ln_across, by_rule[node][:, 1])
        torch.testing.assert_close(parts.mended, parts.atp + parts.ln_along - parts.atp_along)
        assert (parts.cos < 1 + 1e-12).all() and (parts.size > 0).all()


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen2", "gemma2"])
def test_the_gradient_is_blind_along_the_stream(name, checkpoint, pair):
    """After the last layer there is one norm only. What the MLP adds along the stream moves nothing, to first order."""
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    for norm in [m for m in model.modules() if hasattr(m, "eps")]:
        norm.eps = 0.0
    parts = take_apart(model, *pair, "mlp_out", model.config.n_layers - 1)
    assert parts.ln_along[:, -1].abs().min() > 1e-4
    assert parts.atp_along[:, -1].abs().max() < 1e-12
    # the rest has no part along the stream, so there the size does not change: both agree
    torch.testing.assert_close(parts.atp_across[:, -1], parts.ln_across[:, -1])


def test_a_node_that_is_the_stream(checkpoint, pair):
    parts = take_apart(from_pretrained(str(checkpoint("qwen2")[0])), *pair, "resid_pre", 2)
    torch.testing.assert_close(parts.cos, torch.ones(4, 9))
    torch.testing.assert_close(parts.size, torch.ones(4, 9))
    with pytest.raises(ValueError, match="node must be one of resid_pre, attn_out, mlp_out, got 'z'"):
        take_apart(from_pretrained(str(checkpoint("qwen2")[0])), *pair, "z", 2)
    with pytest.raises(ValueError, match="olmo3 models do not norm the stream before attention"):
        take_apart(from_pretrained(str(checkpoint("olmo3")[0])), *pair, "mlp_out", 0)


def test_slopes_by_layer():
    """Prompts of unequal length, and heads: layer 0's scores are half of AP's, layer 1's three times too large."""
    ap = torch.randn(5, 2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ap[3:, :, 3] = torch.nan
    scores = ap * torch.tensor([0.5, -3.0])[:, None, None]
    got = by_layer(scores, ap)
    squares = ap.nan_to_num().square().sum((0, 2, 3))
    assert got["slope"] == pytest.approx([0.5, -3.0])
    assert got["share"] == pytest.approx((squares / squares.sum()).tolist())
    figure = figures.slopes({"a": {"atp": {"mlp_out": {"by_layer": got}}}}, [ATP], ["mlp_out"])
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "AtP"]
    assert line.get_xydata().tolist() == [[0, 0.5], [1, -0.5]]  # beyond the axis: at its end
