"""How well do AtP and RelP predict activation patching? The paper's Table 5, Figure 1 and Figure 2 from one command.

python evaluate.py                     the four toy models that come with the project, no download
python evaluate.py --model gpt2        the real GPT-2 small, from the Hugging Face Hub
python evaluate.py --task sva          circuits of SAE features (Section 5.2, Figure 3) on the toy GPT-NeoX model
python evaluate.py --task edges        what the paper does not have: edges between components, see beyond/edges

Read evaluate_nodes() for the first two, evaluate_circuits() for the third, evaluate_edges() for the last. The methods:
activation patching (AP, the truth), attribution patching (AtP), relevance patching (RelP), Integrated Gradients (IG).
The tasks: indirect objects (IOI) and subject-verb agreement (SVA), on prompt pairs of tasks.py. How well a method
predicts AP is Pearson's correlation (PCC) of their scores.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm.auto import tqdm

import models
import relp
import tasks
from beyond import conservation
from beyond import grid as grids
from beyond.audit import audit, print_audits
from beyond.edges import experiment as edges
from beyond.edges import tables as edge_tables
from beyond.methods import NAMES, is_method, method, parse_rules, without_number
from beyond.verify import print_verified, verify
from support import (
    circuit_figures,
    circuit_tables,
    circuits,
    figures,
    inspector,
    processes,
    results,
    scoring,
    statistics,
    tables,
)
from support.commandline import (
    Parser,
    add_option,
    by_family,
    instead,
    names,
    not_empty,
    one_name,
    option,
    read_batch_size,
    read_seed,
    read_thresholds,
    read_verify,
    readable,
    usable_device,
    whole,
)
from support.doubt import DOUBT_NEEDS, doubts
from support.kept import KeptPatching
from support.memory import BatchSize, check_patterns, out_of_memory
from support.methods import AP, Method, main_method
from support.positions import overlay
from support.processes import say
from support.progress import BAR
from support.prompts import batches, largest_group, node_pairs, prompt_arrays, read_pairs, split, tensors
from support.saes import load_saes
from support.scoring import on_a_few
from support.tokenizer import load_tokenizer

TOYS = ["toy-gpt2", "toy-neox", "toy-qwen2", "toy-gemma2"]
DEEP_TOYS = [name.replace("toy-", "toy-deep-") for name in TOYS]
NODES = ["resid_pre", "attn_out", "mlp_out"]  # residual stream, attention outputs and MLP outputs of Table 5
PATCHABLE = [*models.SequentialBlock.nodes, *relp.PARTS_OF]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAES = {  # of a model, if --saes names none
    "toy-neox": str(Path(__file__).parent / "toy" / "saes" / "neox"),
    "pythia-70m-deduped": "saprmarks/pythia-70m-deduped-saes",
    "EleutherAI/pythia-70m-deduped": "saprmarks/pythia-70m-deduped-saes",
}
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

# ---------------------------------------------------------------------------------------------------------------------
# Table 5, Figures 1 and 2: how well the methods predict AP of nodes


def evaluate_nodes(name: str, o: "NodeOptions", device: torch.device, shown: list) -> results.NodeReport:
    """The experiment on one model: scores by all methods, how well they agree with AP's, files, figure and table.

    shown: what inspect.html will show is added here.
    """
    # the model, and the prompt pairs
    started, began = time.time(), time.perf_counter()
    shard = partial(processes.shard_weights, device=device) if o.shard else None
    model = models.from_pretrained(name, DTYPES[o.dtype], device, shard)
    processes.choose_threads(model.config.d_model)
    check_nodes(name, model, o.nodes)
    pairs = pairs_of(name, model, o)
    say(
        f"\n{name}: {model.config.n_layers} layers, {len(pairs)} prompt pair{'s' * (len(pairs) > 1)}, "
        f"{o.dtype} on {device}, ready after {time.perf_counter() - began:.1f} s"
    )
    metric, groups = relp.METRICS[o.metric], [pair.group for pair in pairs]
    methods = [method(m, model.config.family, o.rules, o.steps) for m in o.methods]
    check_patterns(model, o.nodes, methods, max(len(pair.original) for pair in pairs), device)
    batch_size = BatchSize(o.batch_size, lockstep=o.shard)
    a_few = {"model": model, "pairs": pairs, "device": device, "batch_size": batch_size}
    audits = audit_methods(methods, **a_few)
    conserved = conserved_by(methods, metric, **a_few)

    # the scores; what an earlier run on the same pairs has left is not computed again, or not lost
    folder = results.folder_of(o.out, name, o.prompts, o.task, list(TASKS))
    earlier = results.earlier_run(folder, pairs, arguments(o, device))
    run_ap = KeptPatching(folder, [o.nodes, o.metric, o.dtype, str(device)], earlier if o.grid else None)
    how = {"nodes": o.nodes, "metric": metric, "device": device, "batch_size": batch_size, "lockstep": o.shard}
    score = partial(scoring.score_pairs, name, model, pairs, **how)  # score(methods, run_ap=...) -> scoring.Scores
    scored = score(methods, run_ap=run_ap)
    if run_ap.seconds_before:
        scored.seconds["ap"] += run_ap.seconds_before
        say("  AP's seconds include those of earlier runs")
    earlier = results.if_same_model(earlier, scored, folder)
    if earlier:  # methods that only the earlier run has scored are added to the tables and files
        added = earlier.add_to(scored, is_method)
        methods += [method(m, model.config.family, o.rules, o.steps) for m in added]
        audits |= {m: earlier.said("audit", m) for m in added if earlier.said("audit", m)}
        conserved = earlier.summary.get("conservation") if "relp" in added else conserved
    methods = in_order(methods)

    # how well the methods agree with AP, and whether rounding lets one see it
    others = [m.name for m in methods if m is not AP]
    weights = statistics.resamples(groups, seed=o.seed)
    pcc, differences = {}, {}
    if AP in methods:
        pcc, differences = statistics.agreements(scored.scores, scored.differs, o.nodes, others, weights, groups)
    rounding = on_a_few(partial(scoring.rounding, model, metric=metric), **a_few)
    drowned = scoring.drowned({node: scored.scores[methods[0].name, node] for node in o.nodes}, rounding)
    values = torch.tensor(scored.values)
    right = scoring.right(model, pairs, values, metric, device, batch_size)
    report = results.NodeReport(
        model=name,
        prompt_pairs=len(pairs),
        metric=o.metric,
        accuracy={run: statistics.mean(x, weights) for run, x in zip(("original", "patch"), right.unbind(1))},
        value={run: statistics.mean(x, weights) for run, x in zip(("original", "patch"), values.unbind(1))},
        cells={node: count_cells(scored.differs[node]) for node in o.nodes},
        pcc=pcc,
        differences=differences,
        rules=results.rules_json(model.rules(parse_rules(o.rules))),
        audit=audits,
        conservation=conserved,
        rounding=rounding,
        seconds=scored.seconds,
        arguments=arguments(o, device),
        versions=results.versions(),
    )

    # files, table, figures
    if processes.rank() == 0:
        # what --verify has no AP for, an earlier run may have found
        whole = earlier.completed(report) if earlier and o.verify and not pcc else report
        arrays = earlier.arrays if earlier else {}
        arrays = arrays | {f"{m}_{node}": value for (m, node), value in scored.scores.items()}
        arrays |= {f"doubt_{node}": value for node, value in doubts(scored.scores).items()}
        arrays |= {"values": scored.values, **prompt_arrays(pairs)}
        results.save(folder / "scores.npz", lambda file: np.savez_compressed(file, **arrays))
        whole.scores_npz = results.fingerprint(folder / "scores.npz")
        results.save_json(folder / "summary.json", whole.as_json())
        tables.print_report(report, methods, o.nodes, paper_numbers(name, o))
        if drowned:
            print(
                f"  WARNING: rounding in {o.dtype} moves {o.metric} by about {rounding:.2g}, which is not small beside "
                f"the effects on {', '.join(drowned)}; try a more precise --dtype"
            )
        if AP not in methods and not o.verify:
            tables.print_strongest(scored.scores, methods, o.nodes, pairs)
        print_audits(methods, audits, o.audit)
        if not o.no_plot:
            maps = partial(figures.heatmaps, name, scored.scores, methods, o.nodes, pairs, o.metric)
            results.save_figure(folder / "heatmaps.png", maps)
            page = partial(inspector.of_nodes, name, scored.scores, methods, o.nodes, pairs, o.metric, scored.values)
            inspector.collect(shown, page)
            if conserved:
                results.save_figure(folder / "conservation.png", partial(conservation.draw, name, conserved))

    # what the paper does not have
    if o.grid:
        ap = {node: scored.scores["ap", node] for node in o.nodes}
        all_sets = grids.grid(model, ap, o.nodes, groups, weights, score, name)
        if processes.rank() == 0:
            results.save_json(folder / "grid.json", vars(all_sets))
            grids.print_grid(all_sets, o.nodes)
    if o.verify:
        verified = verify(scored, pairs, o.nodes, others, *o.ranking, partial(score, [AP]))
        if processes.rank() == 0:
            results.save_json(folder / "verified.json", vars(verified))
            print_verified(verified, methods)
    if (not earlier or earlier.dropped) and processes.rank() == 0:
        results.remove_stale(folder, since=started)
    say(f"  written to {folder}/")
    processes.wait_for_all()
    run_ap.remove()
    return report


def check_nodes(name: str, model: models.Transformer, nodes: list[str]) -> None:
    known = [node for node in PATCHABLE if relp.node_of(node) in model.nodes]
    if unknown := [node for node in nodes if node not in known]:
        raise ValueError(f"{name} has no node {unknown[0]!r}: choose from {', '.join(known)}")


def pairs_of(name: str, model: models.Transformer, o: "NodeOptions | EdgeOptions") -> list[tasks.Pair]:
    """The pairs of the templates, or those of a file."""
    return node_pairs(name, model.config.n_vocab, o.prompts, o.pairs, o.seed, o.corruption, not o.no_bos)


def audit_methods(methods: list[Method], model, **a_few) -> dict:
    """The audit's report on each method that has rules; a_few: the pairs and so on, see on_a_few()."""

    def report(m: Method) -> dict:
        return on_a_few(lambda original, patch, _: audit(model, original, m.lrp, patch), model, **a_few)

    return {m.name: report(m) for m in methods if m.lrp is not None}


def conserved_by(methods: list[Method], metric, model, **a_few) -> dict | None:
    """RelP's conservation; a_few: the pairs and so on, see on_a_few().

    None if it is not defined: for rules that look at two runs, and for weights that are shared out.
    """
    lrp = next((m.lrp for m in methods if m.name == "relp"), None)
    if lrp is None or hasattr(lrp, "two_runs") or processes.world() > 1:
        return None

    def conserved(original, patch, answers):
        with torch.no_grad():
            answers = relp.targets(model, model.stream(patch), answers, metric)
        return conservation.conservation(model, original, answers, metric, lrp)

    return on_a_few(conserved, model, **a_few)


def in_order(methods: list[Method]) -> list[Method]:
    """As NAMES has them, sets of rules last."""
    return sorted(methods, key=lambda m: NAMES.index(m.name) if m.name in NAMES else len(NAMES))


def arguments(o: "Options", device: torch.device) -> dict:
    return {"task": o.task, **asdict(o), "device": str(device)}


def count_cells(differs: np.ndarray) -> dict[str, int]:
    return {"all": int((~np.isnan(differs)).sum()), "unchanged": int((differs == 0).sum())}


def paper_numbers(name: str, o: "NodeOptions") -> dict | None:
    """The paper's own numbers for this model, if prompts, metric and rules are those of its experiment."""
    same = not (o.prompts or o.no_bos) and (o.corruption, o.metric, o.rules) == ("swap", "logit_diff", "paper")
    return TABLE_5.get(name) if same else None


# ---------------------------------------------------------------------------------------------------------------------
# Section 5.2, Figure 3: circuits of SAE features behind subject-verb agreement


def evaluate_circuits(name: str, o: "CircuitOptions", device: torch.device, shown: list) -> dict:
    """The experiment on one model: find circuits on discovery pairs, judge them on held-out pairs; files, figures."""
    # the model, its units, and the prompt pairs
    began = time.perf_counter()
    model, tokenizer = models.from_pretrained(name, DTYPES[o.dtype], device), load_tokenizer(name)
    processes.choose_threads(model.config.d_model)
    source = SAES.get(name) if o.saes == "auto" else o.saes
    units = load_units(name, source, model, o.nodes)
    saes = units["features"]
    pairs = circuit_pairs(tokenizer, model, o)
    say(
        f"\n{name}: {len(saes)} SAEs of {max(len(sae.W_dec) for sae in saes.values())} features, {o.pairs} discovery "
        f"and {o.held_out} held-out pairs, {o.dtype} on {device}, ready after {time.perf_counter() - began:.1f} s"
    )
    methods = [method(m, model.config.family, o.rules, o.steps) for m in o.methods]
    labels = {m.name: m.label for m in methods}
    batch_size, discovery = BatchSize(o.batch_size), next(iter(pairs.values()))[0]
    audits = audit_methods(methods, model, pairs=discovery, device=device, batch_size=batch_size)

    # circuits of each structure
    folder, structures = results.folder_of(o.out, name, o.prompts, o.task, list(TASKS)), {}
    for structure, (discovery, held_out) in pairs.items():
        found = score_units(f"{name} {structure}", model, discovery, units, methods, o, device, batch_size)
        result = structures[structure] = judge(structure, model, discovery, held_out, units, found, o, device)
        result.chosen = circuits.choose(result)
        prompts = torch.cat(tensors(held_out, device)[:2]).unique(dim=0)
        result.strongest = circuits.strongest_units(result, model, prompts, tokenizer, saes, o.top, o.sum_positions)
        if not o.no_plot:
            title, given = f"{name}, {structure}", (model, prompts, tokenizer, saes)
            inspector.collect(shown, partial(inspector.of_features, title, result, *given, methods, o))
        circuit_tables.print_structure(structure, result, labels, o.metric)
        results.save_json(folder / f"circuit-{structure}.json", circuits.circuit_json(structure, result))
    for file in folder.glob("circuit-*.json"):  # files of structures that an earlier run had
        if file.stem.removeprefix("circuit-") not in structures:
            file.unlink()

    # averages, files, table, figures
    summary = {"model": name, "task": o.task, "saes": source, "audit": audits, **circuits.summarise(structures, o.seed)}
    summary |= {"arguments": arguments(o, device), "versions": results.versions()}
    results.save_json(folder / "summary.json", summary)
    circuit_tables.print_circuits(summary, methods)
    print_audits(methods, audits, o.audit)
    if not o.no_plot:
        curves = partial(circuit_figures.faithfulness, name, structures, labels, o.metric, o.seed)
        results.save_figure(folder / "faithfulness.png", curves, dpi=110)
        results.save_figure(
            folder / "circuits.png", partial(circuit_figures.circuits, name, structures, labels), dpi=110
        )
    say(f"  written to {folder}/")
    return summary


def load_units(name: str, source: str | None, model: models.Transformer, nodes: list[str] | None) -> dict[str, dict]:
    """{kind of unit: {(node, layer): SAE or Neurons}}: features and errors, the same nodes' dimensions, MLP neurons."""
    if not source:
        raise ValueError(f"no sparse autoencoders are known for {name}: name some with --saes")
    weight, first, n_layers = model.embed_tokens.weight, first_judged(model), model.config.n_layers
    saes = load_saes(source, model, weight.dtype, weight.device, nodes)
    if not any(layer >= first for _, layer in saes):
        raise ValueError(f"{source} has no SAE in the layers that are judged, {first} to {n_layers - 1}")

    def neurons(n: int) -> relp.Neurons:
        return relp.Neurons(torch.eye(n, dtype=weight.dtype, device=weight.device))

    dimensions = {key: neurons(sae.W_dec.shape[1]) for key, sae in saes.items()}
    hidden = {("mlp_hidden", layer): neurons(model.config.d_mlp) for layer in range(n_layers)}
    return {"features": saes, "dimensions": dimensions, "mlp_neurons": hidden}


def first_judged(model: models.Transformer) -> int:
    """The layer from which on circuits are judged: the first third is left out (Appendix A.2)."""
    return model.config.n_layers // 3


def circuit_pairs(tokenizer, model: models.Transformer, o: "CircuitOptions") -> dict[str, tuple[list, list]]:
    """{structure: (discovery pairs, held-out pairs)}, from the templates or from a file (then of its largest group)."""
    if not o.prompts:
        return {s: tasks.sva(tokenizer, s, o.pairs, o.held_out, o.seed, not o.no_bos) for s in o.structures}
    pairs = read_pairs(o.prompts, tokenizer, not o.no_bos, model.config.n_vocab, skip_unaligned=True)
    pairs = largest_group(pairs, o.pairs + o.held_out)
    return {results.slug(Path(o.prompts).stem): split(pairs, o.pairs, o.held_out, o.seed)}


def score_units(
    title: str,
    model,
    pairs: list,
    units: dict,
    methods: list[Method],
    o: "CircuitOptions",
    device,
    batch_size: BatchSize,
) -> circuits.Found:
    """Every method's scores of every unit, averaged over the discovery pairs; AP's are of features and errors only."""
    metric, length, saes = relp.METRICS[o.metric], len(pairs[0].original), units["features"]
    size, rows = batch_size.chosen(model, length, device)
    size = max(1, min(size, 2**27 // (length * sum(len(sae.W_dec) for sae in saes.values()))))  # 512 MiB of scores
    every = list(batches(pairs, size))
    means, costs, each = {kind: {} for kind in units}, {}, {m.name: {} for m in methods}
    with tqdm(total=len(every) * len(methods), leave=False, disable=None, delay=2, bar_format=BAR) as bar:
        for m in methods:
            bar.set_description_str(f"{title} {m.label}")
            cost = circuits.Cost()

            def scored(part, runs, m=m, cost=cost):
                return score_batch(model, tensors([pairs[i] for i in part], device), units, m, metric, runs, cost)

            for numbers in every:
                for _, of_part in batch_size.in_parts(numbers, scored, size, rows if m is AP else 1):
                    for kind, scores in of_part.items():
                        scoring.check_finite(title, list(scores.values()), model)
                        total = means[kind].setdefault(m.name, {})
                        for key, of_pairs in scores.items():
                            total[key] = total.get(key, 0) + of_pairs.sum(0) / len(pairs)
                            if kind == "features" and AP in methods:
                                each[m.name].setdefault(key, []).append(of_pairs.cpu())
                bar.update()
            costs[m.name] = circuits.Cost(cost.forward / len(pairs), cost.backward / len(pairs), cost.seconds)
    if o.sum_positions:
        means = circuits.sum_positions(means)
    agreement = {}
    if AP in methods:
        each = {name: {key: torch.cat(parts) for key, parts in scores.items()} for name, scores in each.items()}
        agreement = circuits.agreement_of_units(each, pairs, o.seed)
    return circuits.Found(means, costs, agreement)


def score_batch(model, tokens, units: dict, m: Method, metric, rows: int, cost: circuits.Cost) -> dict[str, dict]:
    """One method's scores of one batch, {kind of unit: {node: [batch, pos, units]}}.

    Adds to the cost; a pass counts as often as there are pairs in the batch.
    """
    saes, counted, began = units["features"], circuits.Counted(model), time.perf_counter()
    if m is AP:
        scores = {"features": relp.patch_features(counted, *tokens, saes, metric, rows=rows)}
        cost.forward += counted.rows_read - len(tokens[0])  # rows that were read out, minus those of the original run
    else:
        terms = relp.propagate(counted, *tokens, saes, metric, **m.options)
        scores = {"features": relp.divide(terms, saes)}
    seconds = time.perf_counter() - began
    if m is not AP:  # the cost is that of the features; the MLPs' neurons need further passes
        scores["dimensions"] = relp.divide(terms, units["dimensions"])
        terms = relp.propagate(model, *tokens, units["mlp_neurons"], metric, **m.options)
        scores["mlp_neurons"] = relp.divide(terms, units["mlp_neurons"])
    cost.seconds += seconds
    cost.forward += counted.forward * len(tokens[0])
    cost.backward += counted.backward * len(tokens[0])
    return scores


def judge(
    structure: str,
    model,
    discovery: list,
    held_out: list,
    units: dict,
    found: circuits.Found,
    o: "CircuitOptions",
    device,
) -> circuits.Structure:
    """Run the circuits at every threshold T_N on the held-out pairs.

    T_N is a share of the total effect, |mean metric(original) - mean metric(patch)| on the discovery pairs, the same
    for all methods. Layers before first_judged are left as they are, and not counted.
    """
    metric, first = relp.METRICS[o.metric], first_judged(model)
    values = [x.mean().item() for x in relp.compare(model, *tensors(discovery, device), (), metric)[:2]]
    original, patch, answers = tensors(held_out, device)
    full, full_patch, _ = relp.compare(model, original, patch, answers, (), metric)
    effect = abs(values[0] - values[1])
    thresholds = [share * effect for share in o.thresholds]
    mean_prompts = patch if o.means == "held-out" else tensors(discovery, device)[1]
    runs = {}
    for name, variant in circuits.VARIANTS.items():
        judged = {key: sae for key, sae in units[variant.kind].items() if key[1] >= first}
        means = relp.unit_means(model, mean_prompts, judged)
        run = partial(relp.run_circuit, model, original, answers, judged, means, metric=metric)
        shapes = {key: (len(features), features.shape[1] + 1) for key, (features, _) in means.items()}
        empty = run({key: torch.zeros(shape, dtype=torch.bool, device=device) for key, shape in shapes.items()})
        runs[name] = {}
        for m, scores in found.scores[variant.kind].items():
            sizes, inside, outside = [], [], []
            for threshold in thresholds:
                circuit = {key: scores[key].abs() > threshold for key in judged}
                circuit, rest = variant.without_errors(circuit), variant.without_errors(circuits.complement(circuit))
                size = sum(int(kept.sum()) for kept in circuit.values())
                if not sizes or size != sizes[-1]:  # circuits are nested: two of one size are the same
                    of_circuit, of_rest = run(circuit), run(rest)
                sizes.append(size), inside.append(of_circuit), outside.append(of_rest)
            if not sizes[0] and name == "features":
                label, lowest = method(m, rules=o.rules).label, f"the lowest threshold, {thresholds[0]:.3g}"
                share = f"({o.thresholds[0]:.3g} of the total effect)"
                raise ValueError(
                    f"{structure}: no unit's {label} score exceeds {lowest} {share}: choose lower --thresholds"
                )
            metrics = (x.cpu().double() for x in (torch.stack(inside), torch.stack(outside), empty))
            runs[name][m] = circuits.Runs(sizes, *metrics)
    return circuits.Structure(
        held_out=held_out,
        roles=overlay(held_out)[0],
        found=found,
        accuracy={"original": float((full > 0).double().mean()), "patch": float((full_patch < 0).double().mean())},
        discovery={"original": values[0], "patch": values[1]},
        total_effect=effect,
        thresholds=thresholds,
        full=full.cpu().double(),
        first_layer=first,
        runs=runs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Edges, which the paper does not have


def evaluate_edges(name: str, o: "EdgeOptions", device: torch.device, shown: list) -> dict:
    """Scores of the edges between components, and circuits of them: beyond/edges/README.md explains it."""
    began = time.perf_counter()
    model = models.from_pretrained(name, DTYPES[o.dtype], device)
    processes.choose_threads(model.config.d_model)
    pairs, judged, judged_on = edge_pairs(name, model, o)
    say(
        f"\n{name}: {model.config.n_layers} layers, {len(pairs)} prompt pair{'s' * (len(pairs) > 1)} to find circuits "
        f"and {judged_on} to judge them, {o.dtype} on {device}, ready after {time.perf_counter() - began:.1f} s"
    )
    methods, metric = [method(m, model.config.family, o.rules) for m in o.methods], relp.METRICS[o.metric]
    batch_size = BatchSize(o.batch_size)
    audits = audit_methods(methods, model, pairs=pairs, device=device, batch_size=batch_size)
    setting = edges.Setting(
        name=name,
        model=model,
        pairs=pairs,
        judged=judged,
        judged_on=judged_on,
        methods=methods,
        metric=metric,
        device=device,
        batch_size=batch_size,
        audits=audits,
        by_node=o.level == "node",
        verify=o.verify,
        arguments=arguments(o, device),
        shown=shown,
    )
    return edges.evaluate(setting, results.folder_of(o.out, name, o.prompts, o.task, list(TASKS)))


def edge_pairs(name: str, model: models.Transformer, o: "EdgeOptions") -> tuple[list, list, str]:
    """Pairs to score and find circuits on, pairs to judge circuits by, and these in words."""
    if not o.prompts and not o.judge:
        n = o.pairs or 100
        pairs = pairs_of(name, model, replace(o, pairs=n + o.held_out))
        return pairs[:n], pairs[n:], f"{o.held_out} held-out pair{'s' * (o.held_out > 1)}"
    pairs = pairs_of(name, model, o if o.prompts else replace(o, pairs=o.pairs or 100))
    if not o.judge:
        return pairs, pairs, "the same pairs"
    judged = pairs_of(name, model, replace(o, prompts=o.judge, pairs=None))
    return pairs, judged, f"{len(judged)} pair{'s' * (len(judged) > 1)} of {o.judge}"


# ---------------------------------------------------------------------------------------------------------------------
# The command line. A task's options are the fields of a dataclass: their defaults, their help, how their text is read.


def read_methods(text: str) -> list[str]:
    return [method(name).name for name in dict.fromkeys(text.split(","))]  # ValueError for a name that is unknown


def read_rules(text: str) -> str:
    parse_rules(text)
    return text


@dataclass(kw_only=True)
class Options:
    """What all tasks understand. ValueError if values do not go together."""

    task: ClassVar[str]
    model: list[str] = option(
        ["toys"],
        "NAME",
        "short names, Hub repositories, directories; toys, or toys-deep: four of them; paper: Table 5's",
    )
    prompts: str | None = option(
        None, "FILE", "prompt pairs from a JSON-lines file instead of the templates", partial(not_empty, "a file")
    )
    pairs: int = option(100, "N", "prompt pairs; with --prompts at most that many", whole)
    seed: int = option(0, "N", "of the choice of prompts, and of the resamples for intervals", read_seed)
    metric: str = option(
        "logit_diff",
        "NAME",
        f"what is measured at the output: {', '.join(relp.METRICS)}",
        partial(one_name, "metric", relp.METRICS),
    )
    methods: list[str] | None = option(
        ["ap", "atp", "relp"],
        "LIST",
        f"of {','.join(NAMES)} and sets of rules, such as ln+ah",
        read_methods,
    )
    rules: str = option(
        "paper",
        "RULES",
        "paper, none, or of ln,identity,half,ah,router,epsilon=X,gamma=X,temperature=X; "
        "two-point: ln2,identity2,half2,attention2",
        read_rules,
    )
    device: str = option("auto", "DEVICE", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = option(
        "float32", "TYPE", f"of weights and activations: {', '.join(DTYPES)}", partial(one_name, "dtype", DTYPES)
    )
    batch_size: str = option(
        "auto", "SIZE", "prompts, or patched runs, at a time; auto: as many as fit into memory", read_batch_size
    )
    out: str = option("results", "DIR", "where the results go")
    no_bos: bool = option(False, None, "put no BOS token in front of the prompts")
    audit: bool = option(False, None, "print which rule was applied to which modules; summary.json has it always")
    no_plot: bool = option(False, None, "draw nothing")

    def __post_init__(self):
        several = {"toys": TOYS, "toys-deep": DEEP_TOYS, "paper": list(TABLE_5)}
        self.model = list(dict.fromkeys(name for given in self.model for name in several.get(given, [given])))
        taken = {}
        for name in self.model:
            if (other := taken.setdefault(results.slug(name), name)) != name:
                raise ValueError(
                    f"{other} and {name} would write to one folder, {results.slug(name)}: run them one by one"
                )

    def refuse(self, *unfit: str) -> None:
        """ValueError if one of these methods is asked for."""
        for name in self.methods:
            if without_number(name) in unfit:
                raise ValueError(f"method {name} has no meaning with --task {self.task}")


@dataclass(kw_only=True)
class NodeOptions(Options):
    """The options of --task ioi."""

    task = "ioi"
    nodes: list[str] = option(NODES, "LIST", f"of {','.join(PATCHABLE)}", partial(names, "node", PATCHABLE))
    steps: int = option(10, "N", "of Integrated Gradients", whole)
    corruption: str = option(
        "swap",
        "swap|s2",
        "exchange both names, or the second mention only",
        partial(one_name, "corruption", tasks.CORRUPTIONS),
    )
    grid: bool = option(False, None, "every subset of the rules, and how well each predicts AP")
    verify: int | str | None = option(
        None, "K|doubt:K", "AP of K nodes (heads, neurons too) of largest score or doubt, or edges", read_verify
    )
    shard: bool = option(False, None, "under torchrun: share the weights out over the processes as well")

    def __post_init__(self):
        super().__post_init__()
        if self.grid and self.verify:
            raise ValueError("--grid needs AP of all nodes, --verify spares it: choose one")
        if self.grid:
            self.methods = list(dict.fromkeys(["ap", "atp", "relp", *self.methods]))
        if self.verify:
            self.methods = [name for name in self.methods if name != "ap"]
            if not self.methods:
                raise ValueError("--verify needs a method to rank the nodes by, such as --methods relp")
            if self.ranking[0] == "doubt" and not set(DOUBT_NEEDS) <= set(self.methods):
                raise ValueError("--verify doubt:K ranks by |RelP - AtP|: both must be among the --methods")

    @property
    def ranking(self) -> tuple[str, int]:
        """What --verify ranks by, a method or doubt, and how many nodes it verifies."""
        by, _, k = str(self.verify).rpartition(":")
        return by or main_method(self.methods), int(k)


@dataclass(kw_only=True)
class CircuitOptions(Options):
    """The options of --task sva. nodes = None means all nodes that have an SAE."""

    task = "sva"
    model: list[str] = instead(Options, "model", ["toy-neox"])
    pairs: int = instead(Options, "pairs", 300)
    nodes: list[str] | None = instead(NodeOptions, "nodes", None, "auto")
    steps: int = instead(NodeOptions, "steps", 10)
    methods: list[str] | None = instead(Options, "methods", None, "auto")
    structures: list[str] = option(
        list(tasks.SVA), "LIST", f"of {','.join(tasks.SVA)}", partial(names, "structure", tasks.SVA)
    )
    held_out: int = option(100, "N", "prompt pairs to judge circuits by", whole)
    saes: str = option("auto", "SOURCE", "sparse autoencoders: a directory, zip or Hub repository")
    thresholds: list[float] = option(
        read_thresholds("1e-4,1,15"),
        "LOW,HIGH,COUNT",
        "T_N, as shares of the total effect",
        read_thresholds,
        "1e-4,1,15",
    )
    means: str = option(
        "held-out",
        "held-out|discovery",
        "the patch prompts whose means replace units outside a circuit",
        partial(one_name, "choice of means", ("held-out", "discovery")),
    )
    sum_positions: bool = option(False, None, "score a unit over all positions together")
    top: int = option(10, "K", "how many of the strongest units to list", whole)

    def __post_init__(self):
        super().__post_init__()
        if self.methods is None:  # AP of every feature is for small models
            self.methods = ["ap", "atp", "relp", "ig"] if set(self.model) <= set(TOYS) else ["atp", "relp", "ig"]
        if "atp*" in self.methods:
            raise ValueError("AtP*'s fix is one of q and k: it has no meaning with --task sva")
        if self.metric == "kl":
            raise ValueError("--metric kl compares with the patch run: it has no meaning with --task sva")
        self.refuse("eg", "eap-ig", "eap-ig-act")


@dataclass(kw_only=True)
class EdgeOptions(Options):
    """The options of --task edges."""

    task = "edges"
    pairs: int | None = instead(Options, "pairs", None, "100, or all")
    methods: list[str] | None = instead(Options, "methods", None, "auto")
    corruption: str = instead(NodeOptions, "corruption", "swap")
    held_out: int = instead(CircuitOptions, "held_out", 100)
    judge: str | None = option(
        None, "FILE", "prompt pairs to judge circuits by, as in --prompts", partial(not_empty, "a file")
    )
    level: str = option("edge", "edge|node", "what circuits are made of", partial(one_name, "level", ("edge", "node")))
    verify: int | str | None = instead(NodeOptions, "verify", None)

    def __post_init__(self):
        super().__post_init__()
        if self.methods is None:  # exact patching of every edge is for small models
            exact = ["ap"] if set(self.model) <= {*TOYS, *DEEP_TOYS, "toy-qwen3", "toy-planted"} else []
            self.methods = [*exact, "atp", "relp", "twopoint", "eap-ig-5", "eap-ig-30"]
        if isinstance(self.verify, str):
            raise ValueError(f"--verify {self.verify} has no meaning with --task edges: only nodes have a doubt")
        if self.verify:
            self.methods = [name for name in self.methods if name != "ap"]
        if self.methods in ([], ["ap"]):
            raise ValueError("--task edges needs a method besides ap, such as --methods ap,relp")
        self.refuse("atp*", "ig", "eg", "eap-ig-act")


TASKS = {"ioi": NodeOptions, "sva": CircuitOptions, "edges": EdgeOptions}
EXPERIMENTS = {"ioi": evaluate_nodes, "sva": evaluate_circuits, "edges": evaluate_edges}


def parse(argv: list[str] | None) -> Options:
    """The options of a command line. ValueError, in one line, for those that cannot be."""
    parser = Parser(
        prog="evaluate.py",
        usage="python evaluate.py [options]",
        description="Compare AtP and RelP with activation patching: print tables, draw figures, save the numbers.",
        epilog=f"models: {by_family(name for name in models.SHORT_NAMES if not name.startswith('toy-'))}. "
        "example: python evaluate.py --model gpt2 qwen3-0.6b --rules ln,epsilon=1e-4",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=32, width=120),
        argument_default=argparse.SUPPRESS,  # options that are not given are missing from `given`
    )
    task_help = "indirect objects, circuits of subject-verb agreement, or edges between components [ioi]"
    parser.add_argument(
        "--task", metavar="|".join(TASKS), type=readable(partial(one_name, "task", TASKS)), help=task_help
    )
    of_tasks = {task: {f.name: f for f in fields(options)} for task, options in TASKS.items()}
    for name in of_tasks["ioi"] | of_tasks["sva"] | of_tasks["edges"]:
        having = {task: of_task[name] for task, of_task in of_tasks.items() if name in of_task}
        add_option(parser, name, having, len(TASKS))
    given = vars(parser.parse_args(argv))
    task = given.pop("task", "ioi")
    for name in sorted(given.keys() - of_tasks[task].keys()):
        raise ValueError(f"--{name.replace('_', '-')} has no meaning with --task {task}")
    if "prompts" in given:
        for name in sorted(given.keys() & {"corruption", "structures"}):
            raise ValueError(f"--{name} is for the templates: it has no meaning with --prompts")
    if task == "edges" and "held_out" in given and given.keys() & {"prompts", "judge"}:
        raise ValueError("--held-out is for the templates: name a file of pairs to judge circuits by with --judge")
    if task == "ioi" and "verify" in given:
        given.setdefault("nodes", [*NODES, "head", "neuron"])
    return TASKS[task](**given)


# ---------------------------------------------------------------------------------------------------------------------


def complain(error: Exception, name: str = "") -> int:
    """One line on stderr, and the exit code: 2 for what the user can mend, 1 for a bug of ours."""
    text, code = models.first_line(error), 2
    if out_of_memory(error):
        text = "out of memory; try a smaller --batch-size, fewer --pairs, or --dtype bfloat16"
    elif processes.is_lost(error):
        text = "another process has stopped"
    elif not isinstance(error, ValueError | OSError):
        with tempfile.NamedTemporaryFile("w", prefix="evaluate-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        text, code = f"{type(error).__name__}: this is a bug; the traceback is in {file.name}", 1
    text = text if name in text or len(name) > 200 else f"{name}: {text}"
    print(f"evaluate.py: error: {text if len(text) < 1000 else f'{text[:1000]}...'}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """The exit code. 0: all went well; 2: an error of the user's; 1: a bug of ours.

    In one process, a model that fails does not stop those after it.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no word of the Hub's retries; a failure is our error
    if not sys.warnoptions:  # libraries warn of what ends in our own error, or in nothing
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):  # what the terminal has no letters for is written as \u....
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        o = parse(argv)
        device = processes.join(usable_device(o.device))
        if o.task != "ioi" and processes.world() > 1:
            raise ValueError(f"--task {o.task} runs in one process")
        if o.task == "ioi" and o.shard and processes.world() == 1:
            raise ValueError("--shard needs several processes: torchrun --nproc-per-node=N evaluate.py --shard ...")
        results.check_writable(o.out)
    except Exception as error:
        return complain(error)
    reports, shown, codes, said = [], [], [], set()
    for name in o.model:
        try:
            reports.append(EXPERIMENTS[o.task](name, o, device, shown))
        except Exception as error:
            key = type(error), str(error)
            if key not in said:  # one mistake is said once, not once per model
                codes.append(complain(error, name))
            said.add(key)
        if codes and processes.world() > 1:
            return codes[0]  # the other processes may be waiting for this one: torchrun ends them
    if o.task in COMPARE and len(reports) > 1 and processes.rank() == 0:
        try:
            COMPARE[o.task](reports, o)
        except Exception as error:
            codes.append(complain(error))
    if shown:
        try:
            inspector.write(Path(o.out) / "inspect.html", shown)
            print(f"  to look at every score, open {Path(o.out) / 'inspect.html'} in a browser")
        except Exception as error:
            codes.append(complain(error))
    processes.leave()
    return min(codes, default=0)  # a bug counts more than a mistake


def compare_models(reports: list[results.NodeReport], o: NodeOptions) -> None:
    """Table 5 and Figure 1: the methods that all models were scored with."""
    shared = [m for m in reports[0].pcc if all(m in report.pcc for report in reports)]
    if not shared:
        return
    methods = [method(m, rules=o.rules) for m in shared]
    tables.print_overview(reports, methods, o.nodes)
    if not o.no_plot:
        of_models = {report.model: report.pcc for report in reports}
        for file, draw in (("pcc.png", figures.correlations), ("slopes.png", figures.slopes)):
            results.save_figure(Path(o.out) / file, partial(draw, of_models, methods, o.nodes))


def compare_edges(summaries: list[dict], o: EdgeOptions) -> None:
    """A line per model: how well the methods agree with exact patching, and their circuits."""
    labels = {m: method(m, rules=o.rules).label for m in o.methods}
    edge_tables.print_overview(summaries, labels | {"random": "random"})


COMPARE = {"ioi": compare_models, "edges": compare_edges}


if __name__ == "__main__":
    processes.own = True
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        stopped = "stopped; AP of --task ioi goes on from here when the command is given again"
        print(f"evaluate.py: {stopped}", file=sys.stderr)
        sys.exit(130)
