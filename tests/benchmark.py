"""How fast AP, RelP and AtP are: ratios of times that are measured side by side, with their spread. Run by hand:

    python tests/benchmark.py                      GPT-2 small's size, 100 pairs of 15 tokens: 20 minutes on two cores
    python tests/benchmark.py --repeats 1 --prompts 20

The model has random weights: speed does not depend on what it has learned. Pairs are shaped like IOI prompts: they
differ at B1, A and S2 under `swap`, only at S2 under `s2`.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import relp
from models import Config, Transformer
from support import resume
from support.scoring import auto_size

NODES = ("resid_pre", "attn_out", "mlp_out")
PLACES = {"swap": (2, 4, 10), "s2": (10,)}  # BOS After B1 and A went to the PLACE , S2 gave a OBJECT END


def random_model(layers, d_model, vocab, device):
    torch.manual_seed(0)
    hf = {"model_type": "gpt2", "n_embd": d_model, "n_layer": layers, "n_head": d_model // 64}
    config = Config.from_hf({**hf, "n_positions": 1024, "vocab_size": vocab})
    return Transformer(config).requires_grad_(False).eval().to(device)


def random_pairs(corruption, prompts, length, vocab, device):
    original = torch.randint(vocab, (prompts, length))
    patch = original.clone()
    for place in PLACES[corruption]:
        place = place * length // 15
        patch[:, place] = (patch[:, place] + 1) % vocab
    return original.to(device), patch.to(device), torch.randint(vocab, (prompts, 2), device=device)


def seconds(f, device):
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values):
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


@torch.no_grad()
def plain_pass(model, original, patch_acts, layer):
    """A whole pass with one activation overwritten: a plain loop makes one for each node, layer and position."""

    def hook(name, of_layer, value):
        if of_layer == layer:
            value = value.clone()
            value[:, 3] = patch_acts["resid_pre", layer][:, 3, 0]
        return value

    hook.nodes = ("resid_pre",)
    return model(original, hook=hook)


def bench_ap(model, corruption, args, device):
    batch = random_pairs(corruption, args.prompts, args.length, args.vocab, device)
    rows = auto_size(model, args.length)[1]
    _, patch_acts = relp.record(model, batch[1], ("resid_pre",))
    ratios = []
    for _ in range(args.repeats):
        ap = seconds(partial(resume.activation_patching, model, *batch, NODES, rows=rows), device)
        layers = (0, args.layers // 2, args.layers - 1)
        plain = [seconds(partial(plain_pass, model, batch[0], patch_acts, layer), device) for layer in layers]
        loop = statistics.mean(plain) * len(NODES) * args.layers * args.length
        ratios.append(loop / ap)
        print(f"    AP {ap:.1f} s; the plain loop would take {loop:.0f} s", flush=True)
    print(f"  AP, {corruption}, against a plain loop: {spread(ratios)} times faster", flush=True)


def bench_relp(model, args, device):
    batch = random_pairs("swap", args.prompts, args.length, args.vocab, device)

    @torch.no_grad()
    def forward():
        model(batch[0])

    runs = forward, *(partial(relp.attribute, model, *batch, NODES, lrp=lrp) for lrp in (True, False))
    for run in runs:
        run()
    times = [[seconds(run, device) for run in runs] for _ in range(5 * args.repeats)]
    print(f"  RelP, against one plain forward pass: {spread([r / f for f, r, _ in times])} times its time")
    print(f"  RelP, against AtP: {spread([r / a for _, r, a in times])} times its time", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=12, d_model=768, vocab=50257, prompts=100, length=15, repeats=3).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    device = torch.device(args.device)
    model = random_model(args.layers, args.d_model, args.vocab, device)
    size = f"{args.layers} layers, {args.d_model} wide, {args.prompts} pairs of {args.length} tokens"
    print(f"{size}, float32, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}", flush=True)
    bench_relp(model, args, device)
    for corruption in PLACES:
        bench_ap(model, corruption, args, device)


if __name__ == "__main__":
    main()
