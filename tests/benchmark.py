"""How fast, and why: everything measured side by side in one run, as ratios with their spread. Run by hand:

    python tests/benchmark.py                      GPT-2 small's size, 100 pairs of 15 tokens: 20 minutes on two cores
    python tests/benchmark.py --repeats 1 --grow   one round, and how AP's time grows with layers, positions and prompts
    python tests/benchmark.py --two-point          only the two-point rules beside RelP, one pair of 64 to 1,024 tokens
                                                   (with OMP_NUM_THREADS=1 if other work runs on the machine)

The model has random weights: speed does not depend on what it has learned. Pairs are shaped like IOI prompts: they
differ at B1, A and S2 under `swap`, only at S2 under `s2`.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import relp
from beyond.twopoint import TWO_POINT
from models import Config, Transformer

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


def seconds(f, device, clock=time.perf_counter):
    start = clock()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def spread(values, unit=""):
    return f"{statistics.median(values):.3g}{unit} ({min(values):.3g} to {max(values):.3g})"


@torch.no_grad()
def plain_pass(model, original, patch_acts, layer, pos):
    """What AP costs elsewhere, once per (node, layer, position): a whole pass with one activation overwritten."""

    def hook(name, of_layer, value):
        if (name, of_layer) == ("resid_pre", layer):
            value = value.clone()
            value[:, pos] = patch_acts["resid_pre", layer][:, pos]
        return value

    hook.nodes = ("resid_pre",)
    return model(original, hook=hook)


def matmul_rate(c, rows, device):
    """Floating-point operations per second of the machine's matrix product, at the shape of an MLP's."""
    x, w = torch.randn(rows, c.d_model, device=device), torch.randn(c.d_mlp, c.d_model, device=device)

    def product():
        return [torch.mm(x, w.T) for _ in range(10)]

    product()
    return 10 * 2 * rows * c.d_model * c.d_mlp / min(seconds(product, device) for _ in range(5))


def bench_ap(model, corruption, args, device):
    c, batch = model.config, random_pairs(corruption, args.prompts, args.length, model.config.n_vocab, device)
    rows = (2**9 if device.type == "cpu" else 2**16) // args.length
    _, patch_acts = relp.record(model, batch[1], ("resid_pre",))
    passes = len(NODES) * c.n_layers * args.length
    with FlopCounterMode(display=False) as counter:  # the work is the same for every prompt: counted on a few
        few = min(4, args.prompts)
        relp.activation_patching(model, *(x[:few] for x in batch), NODES)
    flops = counter.get_total_flops() * args.prompts / few

    def plain_passes(*layers):
        return [seconds(partial(plain_pass, model, batch[0], patch_acts, layer, 3), device) for layer in layers]

    ratios, rates = [], []
    for _ in range(args.repeats):
        plain = plain_passes(0, c.n_layers // 2)
        rate = matmul_rate(c, args.prompts * args.length, device)
        ap = seconds(partial(relp.activation_patching, model, *batch, NODES, rows=rows), device)
        plain += plain_passes(1, c.n_layers - 1)
        one = statistics.mean(plain)
        ratios.append(one * passes / ap)
        rates.append(flops / ap / statistics.mean([rate, matmul_rate(c, args.prompts * args.length, device)]))
        print(
            f"    AP {ap:.1f} s; one plain pass {one:.2f} s ({len(plain)} timed), times {passes} passes (extrapolated) "
            f"{one * passes:.0f} s",
            flush=True,
        )
    print(
        f"  AP, {corruption}: {spread(ratios, 'x')} faster than the plain loop; at "
        f"{spread([100 * r for r in rates], ' %')} of the matmul rate measured beside it",
        flush=True,
    )


def bench_relp(model, args, device):
    batch = random_pairs("swap", args.prompts, args.length, model.config.n_vocab, device)
    relevance = partial(relp.attribute, model, *batch, NODES, lrp=True)
    attribution = partial(relp.attribute, model, *batch, NODES)

    @torch.no_grad()
    def forward():
        model(batch[0])

    for f in (forward, relevance, attribution):
        f()
    times = [[seconds(f, device) for f in (forward, relevance, attribution)] for _ in range(5 * args.repeats)]
    print(f"  one plain forward pass {spread([t[0] for t in times], ' s')}")
    print(
        f"  RelP, whole: {spread([r / f for f, r, _ in times], 'x')} a plain forward pass; "
        f"{spread([r / a for _, r, a in times], 'x')} AtP",
        flush=True,
    )


def bench_two_point(model, args, device):
    """On the CPU in processor time, which other work beside it does not change, if there is one thread only."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    rules = {"relp": True, "twopoint": TWO_POINT["gpt2"]}
    for length in (64, 256, 1024):
        batch = random_pairs("swap", 1, length, model.config.n_vocab, device)
        runs = [partial(relp.attribute, model, *batch, NODES, lrp=lrp) for lrp in rules.values()]
        for run in runs:
            run()
        times = [[seconds(run, device, clock) for run in runs] for _ in range(5 * args.repeats)]
        of_relp, two_point = (statistics.median(t) for t in zip(*times))
        ratios = [b / a for a, b in times]
        size = argparse.Namespace(**{**vars(args), "prompts": 1, "length": length})
        relp_peak, peak_ = (in_fresh_process(what, size) / 2**20 for what in rules)
        print(
            f"  {length} tokens: RelP {of_relp:.2f} s, two-point {two_point / of_relp:.2f}x that ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); peak memory beyond the weights {relp_peak:.0f} and {peak_:.0f} MiB",
            flush=True,
        )


def peak(what, args):
    """Bytes that `what` needs at its peak beyond the model and the prompts; on the CPU, call it in a fresh process."""
    device = torch.device(args.device)
    model = random_model(args.layers, args.d_model, args.vocab, device)
    batch = random_pairs("swap", args.prompts, args.length, args.vocab, device)
    run = {
        "graph": partial(relp.record, model, batch[0], ("resid_pre",), grad=True),
        "relp": partial(relp.attribute, model, *batch, NODES, lrp=True),
        "twopoint": partial(relp.attribute, model, *batch, NODES, lrp=TWO_POINT["gpt2"]),
        "atp": partial(relp.attribute, model, *batch, NODES),
        "ap": partial(relp.activation_patching, model, *batch, NODES),
    }[what]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def memory(key):
    """Bytes of this process, from Linux: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_fresh_process(what, args):
    """Its peak. An allocator keeps what it has been given."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak, (what, args))


def bench_memory(args):
    used = {what: in_fresh_process(what, args) for what in ("graph", "relp", "atp", "ap")}
    times = ", ".join(f"{what} {used[what] / used['graph']:.2f}x" for what in ("relp", "atp", "ap"))
    graph = f"one forward pass with its graph {used['graph'] / 2**20:.0f} MiB"
    print(f"  peak memory beyond the weights: {graph}; {times} that", flush=True)


def bench_growth(args, device):
    base = dict(layers=6, length=15, prompts=40)
    print("  how AP's time grows (swap, 256 wide, 6 layers, 15 positions, 40 prompts, one of them changed):")
    for what, values in {"layers": (3, 6, 12), "length": (15, 30, 60), "prompts": (20, 40, 80)}.items():
        times = []
        for value in values:
            size = {**base, what: value}
            model = random_model(size["layers"], 256, 1000, device)
            batch = random_pairs("swap", size["prompts"], size["length"], 1000, device)
            run = partial(relp.activation_patching, model, *batch, NODES)
            run()
            times.append(min(seconds(run, device) for _ in range(3)))
        print(f"    {what:8}" + "".join(f"{v:>6}: {t / times[0]:5.1f}x" for v, t in zip(values, times)), flush=True)


def bench_transformer_lens(args, device):
    """The field's standard library on a model of the same size: one of its patched passes against one of ours."""
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError:
        print("  transformer_lens is not installed: not compared")
        return
    config = HookedTransformerConfig(
        n_layers=args.layers,
        d_model=args.d_model,
        n_ctx=1024,
        d_head=64,
        d_vocab=args.vocab,
        act_fn="gelu_new",
        normalization_type="LNPre",
        device=str(device),
    )
    theirs, ours = HookedTransformer(config), random_model(args.layers, args.d_model, args.vocab, device)
    original, patch, _ = random_pairs("swap", args.prompts, args.length, args.vocab, device)
    _, patch_acts = relp.record(ours, patch, ("resid_pre",))

    def overwrite(value, hook):
        value[:, 3] = patch_acts["resid_pre", 1][:, 3]
        return value

    @torch.no_grad()
    def their_pass():
        theirs.run_with_hooks(original, fwd_hooks=[("blocks.1.hook_resid_pre", overwrite)])

    their_pass()
    our_pass = partial(plain_pass, ours, original, patch_acts, 1, 3)
    times = [(seconds(their_pass, device), seconds(our_pass, device)) for _ in range(3 * args.repeats)]
    print(f"  transformer_lens: one patched pass takes {spread([a / b for a, b in times], 'x')} one plain pass here")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=12, d_model=768, vocab=50257, prompts=100, length=15, repeats=3).items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--grow", action="store_true", help="measure the growth with layers, positions and prompts as well")
    p.add_argument("--two-point", action="store_true", help="the two-point rules beside RelP, and nothing else")
    args = p.parse_args()
    device = torch.device(args.device)
    model = random_model(args.layers, args.d_model, args.vocab, device)
    prompts = "1 pair" if args.two_point else f"{args.prompts} pairs of {args.length} tokens"
    print(
        f"{args.layers} layers, {args.d_model} wide, {prompts}, float32, {device}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        flush=True,
    )
    if args.two_point:
        return bench_two_point(model, args, device)
    bench_relp(model, args, device)
    bench_memory(args)
    for corruption in PLACES:
        bench_ap(model, corruption, args, device)
    bench_transformer_lens(args, device)
    if args.grow:
        bench_growth(args, device)


if __name__ == "__main__":
    main()
