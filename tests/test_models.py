import pytest
import torch
from conftest import CHECKPOINTS

from models import from_pretrained


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_agree_with_transformers(name, checkpoint, tokens):
    path, hf = checkpoint(name)
    with torch.no_grad():
        wanted, got = hf(tokens).logits, from_pretrained(str(path))(tokens)
    assert wanted.std() > 0.5  # far from a trivial model
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
