"""How much of the metric's relevance the residual stream holds before each layer, and what the rest was lost to.

python -m beyond.conservation --model toy-gpt2 --rules ln,identity,ah
"""

import math
import sys

import torch
from torch import Tensor

import relp
from beyond.methods import parse_rules
from support.commandline import load, parse, run
from support.options import common_parser
from support.processes import say
from support.prompts import batches, tensors
from support.scoring import two_runs


@torch.enable_grad()
def conservation(model, tokens: Tensor, targets: Tensor, metric=relp.logit_diff, lrp=True) -> dict[str, list[float]]:
    """{"kept", "softmax", "rest": [layer + 1]}: what the stream keeps of the metric, and what a layer loses on the way
    back, as fractions of the metric. The last entries are of the final stream and what comes after it.

    A tensor x holds the relevance x . rho. The softmax loses what z holds beyond q, k and v: less than nothing if q and
    k get relevance too. The rest goes to norms, activations and gates without a rule, and to biases. kept[l] and both
    losses of layer l add up to kept[l + 1]; beyond the last one, to the metric.
    """
    stream, acts = relp.record(model, tokens, ("resid_pre", "q", "k", "v", "z"), lrp, grad=True)
    acts["resid_pre", model.config.n_layers] = stream
    value = relp.read_out(model, stream, targets, metric, lrp)
    rho = relp.coefficients(value, acts)
    whole = float(value.detach().sum()) or math.nan  # there are no fractions of 0
    held = {key: float((acts[key].detach().double() * rho[key]).sum()) / whole for key in acts}
    layers = range(model.config.n_layers)
    kept = [held["resid_pre", layer] for layer in (*layers, len(layers))]
    softmax = [held["z", layer] - sum(held[node, layer] for node in "qkv") for layer in layers] + [0.0]
    rest = [after - before - lost for before, after, lost in zip(kept, [*kept[1:], 1.0], softmax)]
    return {"kept": kept, "softmax": softmax, "rest": rest}


def main(argv: list[str] | None = None) -> None:
    without = ["nodes", "methods", "batch-size"]
    o = parse(common_parser("python -m beyond.conservation", __doc__.splitlines()[0], without), argv)
    for name in o.model:
        model, pairs = load(name, o)
        few = [pairs[i] for i in next(batches(pairs, 4))]
        original, patch, answers = tensors(few, o.device)
        targets = two_runs(model, original, patch, answers, o.metric)["targets"]
        found = conservation(model, original, targets, o.metric, parse_rules(o.rules))
        say(f"  layer     kept  lost to the softmax  lost to the rest    (fractions of {o.metric}, {len(few)} prompts)")
        for layer, (kept, softmax, rest) in enumerate(zip(*found.values())):
            say(f"  {layer if layer < len(model.blocks) else 'end':>5}{kept:9.3f}{softmax:21.3f}{rest:18.3f}")


if __name__ == "__main__":
    sys.exit(run(main))
