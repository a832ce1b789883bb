"""How well do AtP and RelP predict activation patching? The paper's two experiments.

python evaluate.py                     Table 5, Figures 1 and 2 on the four toy models that come with the project
python evaluate.py --model gpt2        the same on the real GPT-2 small, from the Hugging Face Hub
python evaluate.py --task sva          Section 5.2, Figure 3: circuits of SAE features, on the toy GPT-NeoX model

Read evaluate_nodes() for the first two and evaluate_circuits() for the third. The methods: activation patching (AP, the
truth), attribution patching (AtP), relevance patching (RelP), Integrated Gradients (IG). The tasks: indirect objects
(IOI) and subject-verb agreement (SVA), on the prompt pairs of tasks.py. How well a method predicts AP is Pearson's
correlation (PCC) of their scores.
"""

import argparse
import sys

from support.options import evaluate_parser

if __name__ == "__main__" and {"-h", "--help"} & {*sys.argv}:
    evaluate_parser().parse_args()  # answers --help before torch is loaded, which takes seconds

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import models
import relp
import tasks
from beyond.methods import method
from support import circuits, inspector, processes, prompts, results, resume, scoring, statistics, tables
from support.commandline import load, load_model, parse, run
from support.options import NODES, TOYS
from support.positions import labels_of, overlay
from support.processes import say
from support.results import save, save_figure, save_json
from support.saes import load_saes
from support.scoring import AP, Method
from support.tokenizer import load_tokenizer

TABLE_5 = {  # paper, Appendix B: PCC with AP of AtP and RelP, on 100 IOI prompts
    "gpt2": {"resid_pre": (0.753, 0.968), "attn_out": (0.979, 0.962), "mlp_out": (0.195, 0.992)},
    "gpt2-medium": {"resid_pre": (0.671, 0.884), "attn_out": (0.961, 0.982), "mlp_out": (0.551, 0.993)},
    "gpt2-large": {"resid_pre": (0.740, 0.853), "attn_out": (0.461, 0.965), "mlp_out": (0.006, 0.956)},
    "pythia-70m": {"resid_pre": (0.728, 0.898), "attn_out": (0.981, 0.986), "mlp_out": (0.507, 0.967)},
    "pythia-410m": {"resid_pre": (0.695, 0.874), "attn_out": (0.879, 0.903), "mlp_out": (0.501, 0.948)},
    "qwen2-0.5b": {"resid_pre": (0.684, 0.922), "attn_out": (0.933, 0.965), "mlp_out": (0.717, 0.981)},
    "qwen2-7b": {"resid_pre": (0.230, 0.549), "attn_out": (0.395, 0.569), "mlp_out": (0.471, 0.622)},
    "gemma2-2b": {"resid_pre": (0.391, 0.769), "attn_out": (0.942, 0.956), "mlp_out": (0.910, 0.952)},
}
RUNS = ("original", "patch")
SAES = {  # of a model, if --saes names none
    "toy-neox": str(Path(__file__).parent / "toy" / "saes" / "neox"),
    "pythia-70m-deduped": "saprmarks/pythia-70m-deduped-saes",
}

# ---------------------------------------------------------------------------------------------------------------------
# Table 5, Figures 1 and 2: how well the methods predict AP of nodes


def evaluate_nodes(name: str, o: argparse.Namespace) -> dict:
    """The experiment on one model: what summary.json holds."""
    # the model, its prompt pairs, and the scores of all methods
    model, pairs = load(name, o)
    folder = results.folder_of(o.out, name, o.task, "pair" if o.original else o.prompts)
    methods = [method(m, model.config.family, o.rules, o.steps) for m in o.methods]
    found = scoring.score_pairs(name, model, pairs, methods, o.nodes, o.metric, o.batch_size, o.out, o.shard)

    # how well they agree with AP's
    groups = [pair.group for pair in pairs]
    weights = statistics.resamples(groups, seed=o.seed)
    agreement, differences = {}, {}
    if AP in methods:
        others = [m.name for m in methods if m is not AP]
        agreement, differences = statistics.agreements(found.scores, o.nodes, others, groups, weights)
    summary = {
        "model": name,
        "prompt_pairs": len(pairs),
        "metric": o.metric,
        "labels": labels_of(pairs),
        "accuracy": of_both_runs(found.right, weights),
        "value": of_both_runs(found.values, weights),
        "agreement": agreement,
        "differences": differences,
        "seconds": found.seconds,
        "arguments": vars(o),
        "versions": results.versions(),
    }
    if processes.rank() > 0:
        return summary

    # table, files, figure, page
    tables.print_report(summary, methods, o.nodes, paper_numbers(name, o))
    if AP not in methods or o.original:
        tables.print_strongest(found.scores, methods, o.nodes, pairs)
    arrays = {f"{m}_{node}": scores for (m, node), scores in found.scores.items()}
    arrays |= {"values": found.values, **prompts.prompt_arrays(pairs)}
    with results.replacing(folder, "heatmaps.png", "inspect.html") as new:
        save(new / "scores.npz", lambda file: np.savez_compressed(file, **arrays))
        table = tables.as_csv(found.scores, methods, o.nodes, pairs)
        save(new / "scores.csv", lambda file: file.write(table.encode()))
        save_json(new / "summary.json", summary)
        if not o.no_plot:
            from support import figures  # and with it matplotlib

            maps = partial(figures.heatmaps, name, found.scores, methods, o.nodes, pairs, o.metric)
            save_figure(new / "heatmaps.png", maps)
            page = inspector.of_nodes(name, found, methods, o.nodes, pairs, o.metric)
            inspector.write(new / "inspect.html", page, summary)
    inspector.finish(folder)
    return summary


def of_both_runs(values: np.ndarray, weights: torch.Tensor) -> dict:
    """The means of values [pair, 2] over the pairs, with their intervals."""
    return {run: statistics.mean(torch.tensor(values[:, i]), weights) for i, run in enumerate(RUNS)}


def paper_numbers(name: str, o: argparse.Namespace) -> dict | None:
    """The paper's own numbers for this model, if prompts, metric and rules are those of its experiment."""
    others = o.prompts or o.original or o.no_bos
    same = (o.corruption, o.metric, o.rules) == ("swap", "logit_diff", "paper")
    return TABLE_5.get(name) if same and not others else None


def compare_models(summaries: list[dict], o: argparse.Namespace) -> None:
    """Table 5 and Figure 1."""
    methods = [method(m, "gpt2", o.rules) for m in o.methods if m != "ap"]  # for their labels
    tables.print_overview(summaries, methods, o.nodes)
    if not o.no_plot:
        from support import figures

        of_models = {summary["model"]: summary["agreement"] for summary in summaries}
        save_figure(Path(o.out) / "pcc.png", partial(figures.correlations, of_models, methods, o.nodes))


# ---------------------------------------------------------------------------------------------------------------------
# Section 5.2, Figure 3: circuits of SAE features behind subject-verb agreement


def evaluate_circuits(name: str, o: argparse.Namespace) -> dict:
    """The experiment on one model: circuits found on discovery pairs, and judged on held-out pairs."""
    # the model, its units, and the prompt pairs of each structure
    model, tokenizer = load_model(name, o), load_tokenizer(name)
    folder = results.folder_of(o.out, name, o.task, o.prompts)
    source = o.saes or SAES.get(name)
    units = load_units(name, source, model, o.nodes)
    pairs = circuit_pairs(tokenizer, model, o)
    methods = [method(m, model.config.family, o.rules, o.steps) for m in o.methods]
    labels = {m.name: m.label for m in methods}
    say(f"\n{name}: {o.pairs} discovery and {o.held_out} held-out pairs, {o.dtype} on {o.device}")

    # circuits of each structure
    structures = {}
    for structure, (discovery, held_out) in pairs.items():
        found = score_units(f"{name} {structure}", model, discovery, units, methods, o)
        s = structures[structure] = judge(model, discovery, held_out, units, found, o)
        s.chosen = circuits.choose(s)
        tokens = torch.cat(prompts.tensors(held_out, o.device)[:2]).unique(dim=0)
        s.strongest = circuits.strongest_units(s, model, tokens, tokenizer, units, o.top)
        tables.print_structure(structure, s, labels, o.metric)

    # their averages: table, files, figures
    summary = {"model": name, "task": o.task, "saes": source, **circuits.summarise(structures, o.seed)}
    summary |= {"arguments": vars(o), "versions": results.versions()}
    tables.print_circuits(summary, methods)
    with results.replacing(folder, "circuit-*.json", "*.png") as new:
        for structure, s in structures.items():
            save_json(new / f"circuit-{structure}.json", circuits.circuit_json(structure, s))
        save_json(new / "summary.json", summary)
        if not o.no_plot:
            from support import figures

            curves = partial(figures.faithfulness, name, structures, labels, o.metric, o.seed, summary)
            save_figure(new / "faithfulness.png", curves, dpi=110)
    inspector.finish(folder)
    return summary


def load_units(name: str, source: str | None, model: models.Transformer, nodes: list[str] | None) -> dict[str, dict]:
    """{kind of unit: {(node, layer): SAE or Neurons}}: features and errors, the same nodes' dimensions, MLP neurons."""
    weight, first, c = model.embed_tokens.weight, first_judged(model), model.config

    def neurons(n: int) -> relp.Neurons:
        return relp.Neurons(torch.eye(n, dtype=weight.dtype, device=weight.device))

    hidden = {("mlp_hidden", layer): neurons(c.d_mlp) for layer in range(c.n_layers)}
    if not source and nodes:
        raise ValueError(f"--nodes are nodes that have SAEs, and none are known for {name}: name some with --saes")
    if not source:
        say(f"\nno sparse autoencoders are known for {name}: units are neurons only; --saes names some")
        keys = [(node, layer) for layer in range(c.n_layers) for node in ("attn_out", "mlp_out")]
        return {"mlp_neurons": hidden, "dimensions": {key: neurons(c.d_model) for key in keys}}
    saes = load_saes(source, model, weight.dtype, weight.device, nodes)
    if not any(layer >= first for _, layer in saes):
        raise ValueError(f"{source} has no SAE in the layers that are judged, {first} to {c.n_layers - 1}")
    dimensions = {key: neurons(sae.W_dec.shape[1]) for key, sae in saes.items()}
    return {"features": saes, "dimensions": dimensions, "mlp_neurons": hidden}


def first_judged(model: models.Transformer) -> int:
    """The layer from which on circuits are judged: the first third is left out (Appendix A.2)."""
    return model.config.n_layers // 3


def circuit_pairs(tokenizer, model: models.Transformer, o: argparse.Namespace) -> dict[str, tuple[list, list]]:
    """{structure: (discovery pairs, held-out pairs)}, from the templates or from a file (then of its largest group)."""
    if not o.prompts:
        return {s: tasks.sva(tokenizer, s, o.pairs, o.held_out, o.seed, not o.no_bos) for s in o.structures}
    pairs = prompts.read_pairs(o.prompts, tokenizer, not o.no_bos, model.config.n_vocab, skip_unaligned=True)
    pairs = prompts.largest_group(pairs, o.pairs + o.held_out)
    return {results.slug(Path(o.prompts).stem): prompts.split(pairs, o.pairs, o.held_out, o.seed)}


def score_units(
    title: str, model: models.Transformer, pairs: list, units: dict, methods: list[Method], o: argparse.Namespace
) -> circuits.Found:
    """Every method's scores of every unit, averaged over the discovery pairs; AP's are of the first kind only."""
    first = next(iter(units))
    n_units = len(pairs[0].original) * sum(len(sae.W_dec) + 1 for sae in units[first].values())
    most = max(1, 2**27 // n_units)  # pairs at a time: a method's scores of a batch then take 512 MiB at most
    means, costs = {kind: {} for kind in units}, {}
    each = {m.name: {} for m in methods}  # of the first kind, for the agreement with AP
    for m in tqdm(methods, title, leave=False, disable=None, delay=2):
        began = time.perf_counter()
        score = partial(score_batch, model, pairs, units, m, o.metric)
        for _, scores in scoring.by_batch(model, pairs, score, o.batch_size, most):
            for kind, of_kind in scores.items():
                scoring.check_finite(title, of_kind, model)
                total = means[kind].setdefault(m.name, {})
                for key, of_pairs in of_kind.items():
                    total[key] = total.get(key, 0) + of_pairs.sum(0) / len(pairs)
                    if kind == first and AP in methods:
                        each[m.name].setdefault(key, []).append(of_pairs.cpu())
        names_of_nodes = {node for of_kind in units.values() for node, _ in of_kind}
        forward, backward = m.passes(len(names_of_nodes) * model.config.n_layers)
        if m is AP:  # a resumed run for each unit that has an effect
            forward += sum(int((x != 0).sum()) for parts in each["ap"].values() for x in parts) / len(pairs)
        costs[m.name] = {"forward": forward, "backward": backward, "seconds": time.perf_counter() - began}
    agreement = {}
    if AP in methods:
        each = {name: {key: torch.cat(parts) for key, parts in scores.items()} for name, scores in each.items()}
        agreement = circuits.agreement_of_units(each, pairs, o.seed)
    return circuits.Found(means, costs, agreement)


def score_batch(
    model: models.Transformer, pairs: list, units: dict, m: Method, metric: str, numbers: list[int], rows: int
) -> dict[str, dict]:
    """One method's scores of the pairs of these numbers, {kind of unit: {node: [batch, pos, units]}}."""
    tokens = prompts.tensors([pairs[i] for i in numbers], model.embed_tokens.weight.device)
    if m is AP:
        first = next(iter(units))
        return {first: resume.patch_features(model, *tokens, units[first], metric, rows)}
    nodes = {node for of_kind in units.values() for node, _ in of_kind}
    found = m.activations_and_rho(model, *tokens, nodes, metric)
    return {kind: relp.divide(*found, of_kind) for kind, of_kind in units.items()}


def judge(
    model: models.Transformer,
    discovery: list,
    held_out: list,
    units: dict,
    found: circuits.Found,
    o: argparse.Namespace,
) -> circuits.Structure:
    """Run the circuits at every threshold T_N on the held-out pairs.

    T_N is a share of the total effect, |mean metric(original) - mean metric(patch)| on the discovery pairs, the same
    for all methods. Layers before first_judged are left as they are, and not counted.
    """
    first, tokens = first_judged(model), prompts.tensors(held_out, o.device)
    values = scoring.two_runs(model, *prompts.tensors(discovery, o.device), o.metric)["values"].mean(0).tolist()
    effect = abs(values[0] - values[1])
    thresholds = [share * effect for share in o.thresholds]
    runs, variants = {}, {name: v for name, v in circuits.VARIANTS.items() if v.kind in units}
    for name, variant in variants.items():
        judged = {key: sae for key, sae in units[variant.kind].items() if key[1] >= first}
        run = runner(model, *tokens, judged, o.metric)
        of_methods = found.scores[variant.kind].items()
        runs[name] = {m: curve(run, {key: x[key] for key in judged}, thresholds, variant) for m, x in of_methods}
    of_model = scoring.two_runs(model, *tokens, o.metric)
    return circuits.Structure(
        held_out=held_out,
        roles=overlay(held_out)[0],
        found=found,
        accuracy=dict(zip(RUNS, of_model["right"].mean(0).tolist())),
        discovery=dict(zip(RUNS, values)),
        total_effect=effect,
        thresholds=thresholds,
        full=of_model["values"][:, 0].cpu().double(),
        first_layer=first,
        runs=runs,
    )


def runner(model: models.Transformer, original, patch, answers, units: dict, metric: str) -> Callable:
    """run(circuit) -> the metric [pair] with all other units held at their means over the patch prompts."""
    means = relp.unit_means(model, patch, units)
    return partial(relp.run_circuit, model, original, answers, units, means, metric=metric)


def curve(run: Callable, scores: dict, thresholds: list[float], variant: circuits.Variant) -> circuits.Runs:
    """The circuits of one method, the units whose score exceeds a threshold in size, and all other units."""
    sizes, inside, outside = [], [], []
    for threshold in thresholds:
        circuit = {key: x.abs() > threshold for key, x in scores.items()}
        rest = {key: ~kept for key, kept in circuit.items()}
        if not variant.errors:
            for kept in (*circuit.values(), *rest.values()):
                kept[:, -1] = False
        size = sum(int(kept.sum()) for kept in circuit.values())
        if not sizes or size != sizes[-1]:  # circuits are nested: two of one size are the same
            of_circuit, of_rest = run(circuit), run(rest)
        sizes.append(size)
        inside.append(of_circuit)
        outside.append(of_rest)
    empty = run({key: torch.zeros_like(x, dtype=torch.bool) for key, x in scores.items()})
    return circuits.Runs(sizes, *(x.cpu().double() for x in (torch.stack(inside), torch.stack(outside), empty)))


# ---------------------------------------------------------------------------------------------------------------------
# The command line

EXPERIMENTS = {"ioi": evaluate_nodes, "sva": evaluate_circuits}
DEFAULTS = {  # of the options that the tasks do not share. None: it depends on the model
    "ioi": {
        "model": ["toys"],
        "pairs": 100,
        "methods": "ap,atp,relp",
        "nodes": NODES,
        "corruption": "swap",
        "shard": False,
        "original": None,
    },
    "sva": {
        "model": ["toy-neox"],
        "pairs": 300,
        "methods": None,
        "nodes": None,
        "structures": list(tasks.SVA),
        "held_out": 100,
        "saes": None,
        "thresholds": "1e-4,1,15",
        "top": 10,
    },
}


def options(argv: list[str] | None) -> argparse.Namespace:
    """The options of a command line. ValueError for those that cannot be."""
    parser = evaluate_parser()

    # what an option is if it is not given depends on the task, and not every task has it
    parser.set_defaults(**{name: None for of_task in DEFAULTS.values() for name in of_task})
    given = parser.parse_known_args(argv)[0]
    task = given.task
    unfit = dict.fromkeys((DEFAULTS["ioi"] | DEFAULTS["sva"]).keys() - DEFAULTS[task].keys(), f"--task {task}")
    unfit |= dict.fromkeys(["corruption", "structures"] if given.prompts or given.original else [], "own prompts")
    for name, other in unfit.items():
        if getattr(given, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {other}")
    parser.set_defaults(**DEFAULTS[task])
    o = parse(parser, argv)

    if task == "sva":
        if o.metric == "kl":
            raise ValueError("--metric kl compares with the patch run: it has no meaning with --task sva")
        if o.methods is None:  # AP of every feature is for small models
            o.methods = ["ap", "atp", "relp", "ig"] if set(o.model) <= set(TOYS) else ["atp", "relp", "ig"]
    for name in o.methods:  # a name that is unknown is refused before a model is loaded
        m = method(name, "gpt2", o.rules, o.steps)
        if task == "sva" and m.attribute and not m.rho and m is not AP:
            raise ValueError(f"method {name} has no meaning with --task sva")
    if task == "sva" and processes.world() > 1:
        raise ValueError("--task sva runs in one process")
    if o.shard and processes.world() == 1:
        raise ValueError("--shard needs several processes: torchrun --nproc-per-node=N evaluate.py --shard ...")
    return o


def main(argv: list[str] | None = None) -> None:
    o, found = options(argv), []
    try:
        for name in o.model:
            found.append(EXPERIMENTS[o.task](name, o))
    finally:  # if a model fails, what has been found of those before it is shown all the same
        if o.task == "ioi" and len(found) > 1 and "ap" in o.methods and processes.rank() == 0:
            compare_models(found, o)


if __name__ == "__main__":
    sys.exit(run(main))
