import pytest
import torch
from conftest import FAMILIES, VOCAB

import relp
from models import from_pretrained


def ap_by_definition(model, original, patch, answers, nodes, metric=relp.logit_diff):
    """Eq. 1 as it stands: for every node, layer and position one whole forward pass with that activation overwritten."""
    _, patch_acts = relp.record(model, patch, nodes)
    base = metric(model(original)[:, -1], answers)
    effect = {}
    for (name, layer), value in patch_acts.items():
        per_position = []
        for pos in range(original.shape[1]):

            def hook(n, l, x):
                if (n, l) == (name, layer):
                    x = x.clone()
                    x[:, pos] = value[:, pos]
                return x

            per_position.append(metric(model(original, hook=hook)[:, -1], answers) - base)
        effect[name, layer] = torch.stack(per_position, dim=1)
    return {name: torch.stack([effect[name, layer] for layer in range(model.config.n_layers)], dim=1) for name in nodes}


@pytest.fixture
def pair():
    g = torch.Generator().manual_seed(2)
    original, answers = torch.randint(VOCAB, (4, 9), generator=g), torch.randint(VOCAB, (4, 2), generator=g)
    patch = original.clone()
    patch[:, 3] = (patch[:, 3] + 5) % VOCAB
    patch[:2, 6] = (patch[:2, 6] + 7) % VOCAB
    return original, patch, answers


@pytest.mark.parametrize("metric", relp.METRICS.values(), ids=relp.METRICS)
@pytest.mark.parametrize("name", FAMILIES)
def test_activation_patching_is_its_definition(name, metric, checkpoint, pair):
    model = from_pretrained(str(checkpoint(name)[0]), dtype=torch.float64)
    nodes = [n for n in model.nodes if n not in ("k", "v", "pattern")]
    with torch.no_grad():
        wanted = ap_by_definition(model, *pair, nodes, metric)
    got = relp.activation_patching(model, *pair, nodes, metric, rows=7)
    for node in nodes:
        assert got[node].dtype == torch.float64 and wanted[node].abs().max() > 1e-3
        torch.testing.assert_close(got[node], wanted[node], atol=1e-12, rtol=0)
        assert (got[node][:, :, :3] == 0).all()
