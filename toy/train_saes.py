"""Train the toy SAEs: sparse autoencoders on the toy NeoX model, one for its embedding and for every block's outputs.

    python toy/train_saes.py            # thirteen SAEs, written to toy/saes/neox

All thirteen learn from the same forward passes over the corpus of toy/train.py. Each minimises

    |x - x_hat|^2 + lambda * sum_i f_i |W_dec_i|,    f = ReLU((x - b_dec) W_enc + b_enc),    x_hat = f W_dec + b_dec

on x in units in which it has mean 0 and variance 1. lambda is steered so that a given number of features is active on a
token (L0). Features that no longer fire start anew as directions that the others miss. At the end the decoder is fitted
once more, by least squares, because the penalty makes the reconstruction too small. The files are in the layout of
SAELens, in fp16, and work on the model's activations as they are.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from train import ROOT, training_rows  # this import puts the project on the path

from models import Transformer, from_pretrained
from relp import Key, record
from support.saes import SAE, load_saes

NODES = ("resid_pre", "attn_out", "mlp_out", "resid_post")  # resid_pre of layer 0 only: the embedding
ROWS = [(32, 24), (32, 24), (12, 64)]  # (rows, tokens in each), as in training the model, but fewer
N_FEATURES = 512  # 4 d_model
L0 = 16  # features that are active on a token, on average
LEARNING_RATE = 2e-3


def activations(model: Transformer, rows: torch.Tensor) -> dict[Key, torch.Tensor]:
    """{(node, layer): [token, d_model]} of the thirteen."""
    _, kept = record(model, rows, NODES)
    return {key: x.flatten(0, 2) for key, x in kept.items() if key[0] != "resid_pre" or key[1] == 0}


def stacked(model: Transformer, rng: random.Random, batches: int = 1) -> torch.Tensor:
    """[sae, token, d_model]: the activations of fresh rows."""
    parts = []
    for _ in range(batches):
        acts = activations(model, training_rows(rng, *rng.choice(ROWS)))
        parts.append(torch.stack(list(acts.values())))
    return torch.cat(parts, dim=1)


def train(model: Transformer, seed: int, steps: int) -> dict[str, torch.Tensor]:
    """The weights of all SAEs as {name: [sae, ...]}, for activations as they are. Prints how it goes."""
    torch.manual_seed(seed)
    rng, started = random.Random(seed), time.time()
    x = stacked(model, rng, batches=8)
    mean = x.mean(1, keepdim=True)  # [sae, 1, d]
    scale = (x - mean).square().sum(-1, keepdim=True).mean(1, keepdim=True).sqrt()  # [sae, 1, 1]
    x = (x - mean) / scale
    n_saes, _, d = x.shape

    # features start as directions of activations
    tokens = x[:, torch.randperm(x.shape[1])[:N_FEATURES]]
    W_dec = F.normalize(tokens + 0.05 * torch.randn(n_saes, N_FEATURES, d), dim=-1)
    W_enc, b_enc, b_dec = W_dec.transpose(1, 2).clone(), torch.zeros(n_saes, 1, N_FEATURES), torch.zeros(n_saes, 1, d)
    weights = [w.requires_grad_() for w in (W_enc, b_enc, W_dec, b_dec)]
    optimiser = torch.optim.Adam(weights, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / 50, 1, 0.02 + 3 * (1 - step / steps))
    )
    penalty, fired = torch.full((n_saes, 1), 0.1), torch.zeros(n_saes, N_FEATURES)
    active = torch.full((n_saes,), float(L0))
    for step in range(1, steps + 1):
        x = (stacked(model, rng) - mean) / scale
        f = torch.baddbmm(b_enc, x - b_dec, W_enc).relu()  # [sae, token, feature]
        residual = x - torch.baddbmm(b_dec, f, W_dec)
        error = residual.square().sum(-1)  # [sae, token], 1 on average where nothing is explained
        loss = (error + penalty * (f * W_dec.norm(dim=-1)[:, None]).sum(-1)).mean(1).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            fires = (f > 0).float()
            fired += fires.sum(1)
            active = 0.9 * active + 0.1 * fires.sum(-1).mean(1)
            penalty *= (active / L0)[:, None].clamp(0.5, 2) ** 0.05
            if step % 100 == 0:
                dead = fired == 0
                if step <= 0.7 * steps:
                    revive(dead, weights, optimiser, residual.detach(), error.detach())
                fired.zero_()
                print(
                    f"step {step:5d}  unexplained {error.mean().item():.3f}  L0 {active.mean().item():.1f}  "
                    f"dead {dead.float().mean().item():.3f}  {time.time() - started:.0f} s",
                    flush=True,
                )
    with torch.no_grad():
        x = (stacked(model, rng, batches=40) - mean) / scale
        f = torch.baddbmm(b_enc, x - b_dec, W_enc).relu()
        refit(f, x, W_dec, b_dec, b_enc, W_enc)
        # rows of length 1; what is taken off them goes into the features
        norm = W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        W_dec, W_enc, b_enc = W_dec / norm, W_enc * norm.mT, b_enc * norm.mT
        # f in units of the activations: the scale goes into the biases, the mean into b_dec
        return {"W_enc": W_enc, "b_enc": (scale * b_enc)[:, 0], "W_dec": W_dec, "b_dec": (scale * b_dec + mean)[:, 0]}


def revive(
    dead: torch.Tensor,
    weights: list[torch.Tensor],
    optimiser: torch.optim.Adam,
    residual: torch.Tensor,
    error: torch.Tensor,
) -> None:
    """Dead features start anew as residuals of tokens, with a weak encoder.

    The tokens are drawn by their squared error (Bricken et al. 2023).
    """
    W_enc, b_enc, W_dec, _ = weights
    for sae in dead.any(-1).nonzero()[:, 0].tolist():
        which = dead[sae].nonzero()[:, 0]
        tokens = torch.multinomial(error[sae].square() + 1e-12, len(which), replacement=True)
        direction = F.normalize(residual[sae, tokens], dim=-1)
        W_dec[sae, which], b_enc[sae, 0, which] = direction, 0.0
        W_enc[sae][:, which] = 0.5 * direction.T
        for weight, index in ((W_dec, (sae, which)), (b_enc, (sae, 0, which)), (W_enc, (sae, slice(None), which))):
            for moment in ("exp_avg", "exp_avg_sq"):
                optimiser.state[weight][moment][index] = 0.0


def refit(f, x, W_dec, b_dec, b_enc, W_enc) -> None:  # all are tensors [sae, ...]
    """Set the decoder to the one that explains x best given the features.

    The encoder goes on seeing the b_dec that it was trained with.
    """
    for sae in range(len(f)):
        mean_f, mean_x = f[sae].mean(0), x[sae].mean(0)
        g, y = (f[sae] - mean_f).double(), (x[sae] - mean_x).double()
        ridge = 1e-4 * len(g) * torch.eye(g.shape[1], dtype=g.dtype) * g.square().mean().clamp(min=1e-12)
        # dead features keep their rows
        W_dec[sae] += torch.linalg.solve(g.T @ g + ridge, g.T @ (y - g @ W_dec[sae].double())).float()
        new = mean_x - mean_f @ W_dec[sae]
        b_enc[sae, 0] += (new - b_dec[sae, 0]) @ W_enc[sae]
        b_dec[sae, 0] = new


@torch.no_grad()
def measure(model: Transformer, saes: dict[Key, SAE], seed: int, batches: int = 12) -> tuple[float, dict]:
    """The model's loss, and {(node, layer): L0, FVE, loss recovered, dead}, on rows that training did not see.

    fve             1 - |x - x_hat|^2 / |x - mean x|^2, summed over tokens
    loss_recovered  (loss with the node's mean - loss with x_hat) / (loss with the node's mean - loss): next-token loss
    dead            the fraction of features that fire on none of the tokens
    """
    rng = random.Random(seed)
    rows = [training_rows(rng, *ROWS[i % len(ROWS)]) for i in range(batches)]
    acts = [activations(model, r) for r in rows]

    def loss(key=None, new=None):
        """The next-token loss; with a key, new(x) takes the place of that activation."""

        def hook(name, layer, x):
            return new(x) if (name, layer) == key else x

        losses = []
        for r in rows:
            logits = model(r[:, :-1], hook=hook)
            losses.append(F.cross_entropy(logits.flatten(0, 1), r[:, 1:].flatten(), reduction="none"))
        return torch.cat(losses).mean().item()

    whole, result = loss(), {}
    for key, sae in saes.items():
        x = torch.cat([a[key] for a in acts])
        f, mean = sae.encode(x), x.mean(0)
        ablated = loss(key, mean.expand_as)
        spliced = loss(key, lambda x, sae=sae: x - sae.error(x))
        result[key] = {
            "l0": (f > 0).float().sum(-1).mean().item(),
            "fve": 1 - (sae.error(x).square().sum() / (x - mean).square().sum()).item(),
            "loss_recovered": (ablated - spliced) / (ablated - whole),
            "loss_mean_ablated": ablated,
            "dead": (f > 0).any(0).logical_not().float().mean().item(),
        }
    return whole, result


def save(weights: dict[str, torch.Tensor], keys: list[Key], out: Path) -> None:
    """One folder for each SAE, named by its hook as SAELens calls it: cfg.json and sae_weights.safetensors (fp16)."""
    for i, (node, layer) in enumerate(keys):
        hook = f"blocks.{layer}.hook_{node}"
        (out / hook).mkdir(parents=True, exist_ok=True)
        tensors = {name: w[i].half().contiguous() for name, w in weights.items()}
        save_file(tensors, out / hook / "sae_weights.safetensors", metadata={"format": "pt"})
        d, n = weights["W_enc"][i].shape
        cfg = {
            "architecture": "standard",
            "d_in": d,
            "d_sae": n,
            "dtype": "float16",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"model_name": "toy-neox", "hook_name": hook, "hook_head_index": None, "prepend_bos": True},
        }
        (out / hook / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the corpus (default: 0)")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps of about 768 tokens (default: 1500)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "toy" / "saes" / "neox", help="folder (default: toy/saes/neox)"
    )
    args = parser.parse_args()
    started = time.time()
    model = from_pretrained("toy-neox")
    weights = train(model, args.seed, args.steps)
    keys = list(activations(model, training_rows(random.Random(0), 1, 8)))
    save(weights, keys, args.out)
    loss, quality = measure(model, load_saes(str(args.out), model), seed=12345)
    record = {
        "seed": args.seed,
        "steps": args.steps,
        "lr": LEARNING_RATE,
        "features": N_FEATURES,
        "target_l0": L0,
        "model_loss": round(loss, 4),
        "saes": {f"{node}.{layer}": {k: round(v, 4) for k, v in q.items()} for (node, layer), q in quality.items()},
        "minutes": round((time.time() - started) / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{'SAE':14}  L0     FVE     loss recovered  dead")
    for name, q in record["saes"].items():
        print(f"{name:14} {q['l0']:5.1f}  {q['fve']:.4f}  {q['loss_recovered']:.4f}          {q['dead']:.3f}")
    print(f"saved in {args.out}")


if __name__ == "__main__":
    main()
