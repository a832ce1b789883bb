"""A configuration is read completely or refused: every field of transformers' is changed, one at a time.

Then our logits are those of transformers with the same configuration, or we refuse it. There is no third.
"""

import copy
import json

import pytest
import torch
import transformers
from conftest import CHECKPOINTS, FAMILIES, NEWER, VOCAB

import models
import support.experts  # noqa: F401 (newer families)

NAMES = [*FAMILIES, *NEWER, "mistral", "olmo2", "phi3"]
TOKENS = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "gelu_pytorch_tanh", "quick_gelu")
TYPES = ("linear", "dynamic", "yarn", "llama3", "longrope", "default", "proportional")
# That transformers does not read, or reads only from the repository: what they would mean is not known here.
MADE_UP = {"use_secret_norm": True, "qk_layernorm": True, "logit_scale": 0.5, "embedding_multiplier": 2.0, "num_mtp": 3}


def others(name: str, value: object) -> list:
    """Values of the same sort, and of another one."""
    if "activation" in name or name == "hidden_act":
        return [act for act in ACTIVATIONS if act != value]
    if name in ("rope_type", "type"):
        return [kind for kind in TYPES if kind != value]
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, 2 * value, 0, None]
        case float():
            return [1.5 * value + 0.25, 0.5 * value, 0.0, 3]
        case None:
            return [True, 1, 2, 0.5, [0], "x"]
        case str():
            return ["x", ""]
        case list():
            return [value[::-1], value[:-1], [], None]
        case dict():
            return [None, {}]
    return []


def edits(config: dict) -> list[tuple[str, dict]]:
    """(what was changed, the configuration). Fields of fields are changed too."""
    found = []

    def change(path: tuple, value: object) -> None:
        edited = copy.deepcopy(config)
        inner = edited
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        found.append((f"{'.'.join(path)} = {value!r}", edited))

    def walk(part: dict, path: tuple) -> None:
        for name, value in part.items():
            for other in others(name, value):
                change((*path, name), other)
            if isinstance(value, dict):
                walk(value, (*path, name))
            if path or name in ("rope_parameters", "rope_theta"):
                continue
            missing = {key: x for key, x in config.items() if key != name}
            found.append((f"no {name}", missing))

    walk(config, ())
    for name, value in MADE_UP.items():
        change((name,), value)
    for rope in ({"factor": 2.0, "type": "linear"}, {"factor": 2.0, "type": "dynamic"}, {"mrope_section": [1, 1, 2]}):
        change(("rope_scaling",), rope)
    return found


def of_transformers(kind: type, config: dict) -> torch.nn.Module | None:
    """None if transformers itself cannot make, or run, such a model."""
    try:
        with torch.no_grad():
            read = kind.from_dict(copy.deepcopy(config))
            read._attn_implementation = read._experts_implementation = "eager"
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(read).float().eval()
            for x in model.parameters():
                x.normal_(std=0.3)
            model.expected = model(input_ids=TOKENS).logits
            return model if model.expected.isfinite().all() else None
    except Exception:  # whatever it runs into
        return None


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_read_completely_or_refused(name):
    kind, fields = CHECKPOINTS[name]
    kind = getattr(transformers, kind)
    config = json.loads(kind(**fields).to_json_string(use_diff=False))
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    wrong, read, refused = [], 0, 0
    for what, edited in [("nothing", config), *edits(config)]:
        theirs = of_transformers(kind, edited)
        if theirs is None:
            continue
        try:
            with torch.no_grad():
                hf = {"model_type": config["model_type"], **edited}
                ours = models.filled(models.Config.from_hf(hf), theirs.state_dict(), torch.float32, "cpu")(TOKENS)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and what != "nothing", (what, error)
            continue
        read += 1
        if not torch.allclose(ours, theirs.expected, atol=1e-3, rtol=1e-3):
            wrong.append(f"{what}: {float((ours - theirs.expected).abs().max()):.3g}")
    assert not wrong, wrong
    assert read > 40 and refused > 10, (read, refused)
