"""Relevance patching (RelP), attribution patching (AtP) and activation patching (AP), in plain PyTorch.

Which parts of a model make it say one thing (on the original prompt) rather than another (on the patch prompt)?
AP answers by intervention: it writes a node's activation from the patch run into the original run and looks at what
that does to a metric,

    c(node) = metric(original run | node <- node(x_patch)) - metric(original run)                           (Eq. 1)

one run per node. AtP and RelP predict the same number for all nodes at once, from two forward passes and one backward:

    score(node) = (node(x_patch) - node(x_original)) . rho(node)            summed over the hidden dimension

    AtP    rho is the gradient of the metric on the original run                                            (Eq. 2)
    RelP   rho is LRP's propagation coefficient: the gradient of the same run with Table 1's rules on       (Eq. 3)

Direction, everywhere: patch activations go into the original run, rho is taken on the original run, and a score is
metric(patched) - metric(original). So a node that carries the original answer has a negative logit_diff score.

    paper                       here
    x_original, x_patch         original, patch: token ids [batch, pos], equal length within a pair
    M, do(n <- n(x_patch))      model, hook
    L                           metric(logits [batch, vocab], answers [batch, 2]) -> [batch]
    n(x)                        a node's activation at one layer and position
    rho                         rho
    c, c_AtP, c_RelP            the results: {node name: [batch, layer, pos]}, one score per prompt pair

The model is models.Transformer, or anything with its methods stream, block and unembed. Only torch is imported.
"""
import math

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------
# Metrics: logits [batch, vocab] at the last position, answers [batch, 2] (the original's, the patch's) -> [batch]


def logit_diff(logits: Tensor, answers: Tensor) -> Tensor:
    """Logit of the original's answer minus logit of the patch's answer."""
    right, wrong = logits.gather(-1, answers).unbind(-1)
    return right - wrong


def prob_diff(logits: Tensor, answers: Tensor) -> Tensor:
    """Probability of the original's answer minus probability of the patch's answer."""
    return logit_diff(logits.softmax(-1), answers)


def logprob_diff(logits: Tensor, answers: Tensor) -> Tensor:
    """Difference of the two log-probabilities. The normaliser cancels, so it equals logit_diff up to rounding."""
    return logit_diff(logits.log_softmax(-1), answers)


METRICS = {"logit_diff": logit_diff, "prob_diff": prob_diff, "logprob_diff": logprob_diff}


def read_out(model, stream: Tensor, answers: Tensor, metric=logit_diff, lrp=False) -> Tensor:
    """The metric [batch] at the last position of the final residual stream [batch, pos, d_model]."""
    columns = None
    if metric is logit_diff:  # needs no logits but the answers'
        columns, answers = answers.unique(return_inverse=True)
    return metric(model.unembed(stream[:, -1], lrp, columns), answers)


# ---------------------------------------------------------------------------------------------------------
# AtP and RelP


def record(model, tokens: Tensor, nodes, lrp=False, grad: bool = False) -> tuple[Tensor, dict]:
    """One forward pass: the final residual stream, and the nodes' activations {(name, layer): [batch, pos, ...]}.

    With grad, autograd can reach every one of them although no weight asks for a gradient.
    """
    kept = {}

    def hook(name, layer, value):
        if grad and not value.requires_grad:
            value = value.detach().requires_grad_()
        kept[name, layer] = value
        return value

    hook.nodes = nodes
    with torch.set_grad_enabled(grad):
        return model.stream(tokens, lrp, hook), kept


def attribute(model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff, lrp=False) -> dict[str, Tensor]:
    """AtP (lrp=False, Eq. 2) or RelP (lrp=True: the paper's rules, or a set of rules; Eq. 3).

    original, patch [batch, pos] and answers [batch, 2] are token ids. Returns {node: [batch, layer, pos]} in float32 or
    better, in the metric's unit. Two forward passes, one backward pass, no gradient of any weight.
    """
    check(model, original, patch, answers, nodes)
    _, patch_acts = record(model, patch, nodes)
    stream, acts = record(model, original, nodes, lrp, grad=True)
    with torch.enable_grad():
        value = read_out(model, stream, answers, metric, lrp).sum()  # prompts are independent: one backward serves all
    rho = dict(zip(acts, torch.autograd.grad(value, list(acts.values()), allow_unused=True)))
    none = torch.zeros(original.shape, device=original.device)  # no path from the node to the metric
    score = {key: none if rho[key] is None else dot(difference(acts[key], patch_acts[key]), rho[key]) for key in acts}
    return by_layer(score, nodes)


def difference(original: Tensor, patch: Tensor) -> Tensor:
    """node(x_patch) - node(x_original), in float32 or better."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    return patch.detach().to(dtype) - original.detach().to(dtype)


def changed(original: Tensor, patch: Tensor) -> Tensor:
    """[batch, pos]: True where a node's activations differ between the two runs. Elsewhere every method scores exactly 0."""
    return (patch != original).flatten(2).any(-1)


def dot(delta: Tensor, rho: Tensor) -> Tensor:
    """delta . rho over everything behind batch and pos."""
    return (delta * rho).flatten(2).sum(-1)


def by_layer(values: dict, nodes) -> dict[str, Tensor]:
    """{(name, layer): [batch, pos]} -> {name: [batch, layer, pos]}"""
    return {name: torch.stack([v for (n, _), v in values.items() if n == name], dim=1) for name in nodes}


def check(model, original, patch, answers, nodes) -> None:
    if original.shape != patch.shape:
        raise ValueError(f"original and patch must have one shape, got {list(original.shape)} and {list(patch.shape)}")
    if answers.shape != (len(original), 2):
        raise ValueError(f"answers must have the shape [{len(original)}, 2], got {list(answers.shape)}")
    if unknown := [name for name in nodes if name not in model.nodes]:
        raise ValueError(f"unknown node {unknown[0]!r}: this model has {', '.join(model.nodes)}")


def compare(model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff) -> tuple[Tensor, Tensor, dict]:
    """The metric [batch] of the original run and of the patch run, and {node: bool [batch, layer, pos]}: where they differ."""
    check(model, original, patch, answers, nodes)
    stream, acts = record(model, original, nodes)
    patch_stream, patch_acts = record(model, patch, nodes)
    values = [read_out(model, s, answers, metric) for s in (stream, patch_stream)]
    return *values, by_layer({key: changed(acts[key], patch_acts[key]) for key in acts}, nodes)


# ---------------------------------------------------------------------------------------------------------
# AP


@torch.no_grad()
def activation_patching(model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff, rows=64, pieces=None, progress=None) -> dict[str, Tensor]:
    """AP (Eq. 1), exact: one (layer, position) of one node at a time, from the patch run into the original run.

    A patch at (layer, pos) changes nothing before that layer and nothing before that position. So a patched run is the
    original run *resumed*: its residual stream from pos on, edited at pos, goes on from that layer, while attention
    reads the keys and values of the positions before from the original run. For one position, we walk down the layers
    once; at each, the patches of that layer join those that are already under way. Where the two runs agree the effect
    is 0 and nothing is run.

    Arguments and result as in attribute(); `nodes` may be any whose patch changes one position of the stream behind
    the block (all but k, v and pattern). rows: how many patched runs go through a block together. pieces: a mapping
    {pos: effects} in which finished positions are kept and from which they are taken, so that a long run can go on
    where it was stopped. progress(fraction) is called as the work proceeds.
    """
    check(model, original, patch, answers, nodes)
    if several := [name for name in nodes if name in ("k", "v", "pattern")]:
        raise ValueError(f"activation patching has no node {several[0]!r}: choose from {', '.join(n for n in model.nodes if n not in ('k', 'v', 'pattern'))}")
    final, acts = record(model, original, {"resid_pre", "k", "v", *nodes})
    _, patch_acts = record(model, patch, nodes)
    base = read_out(model, final, answers, metric)
    n_layers, n_pos = model.config.n_layers, original.shape[1]
    streams = [acts["resid_pre", layer] for layer in range(n_layers)] + [final]
    differs = {key: changed(acts[key], patch_acts[key]) for key in patch_acts}

    def resumed(prompts, pos, name=None):
        """The hook of original runs resumed at pos, the node `name` at pos coming from the patch runs."""

        def hook(node, layer, value):
            if node == name:
                return patch_acts[name, layer][prompts, pos : pos + 1]
            if node in ("k", "v"):
                value = torch.cat([acts[node, layer][prompts, :pos], value], dim=1)
            return value

        hook.nodes = ("k", "v", name)
        return hook

    def patched_stream(name, layer, pos, prompts):
        """The streams from pos on into which this patch has been written: ahead of its layer for resid_pre, else behind it."""
        if name == "resid_pre":
            stream, edited = streams[layer], patch_acts[name, layer][prompts, pos : pos + 1]
        else:  # within its own layer the patch changes the stream at pos alone
            stream, edited = streams[layer + 1], streams[layer][prompts, pos : pos + 1]
            edited = model.block(layer, edited, hook=resumed(prompts, pos, name), start=pos)
        return torch.cat([edited, stream[prompts, pos + 1 :]], dim=1)

    def effects_at(pos):
        """[node, batch, layer]: the effects of all patches at one position."""
        nonlocal done
        under_way, prompts, x = [], original.new_zeros(0), final[:0, pos:]  # which patches, on which prompts, their streams
        for layer in range(n_layers + 1):
            for name in nodes:
                key = (name, layer if name == "resid_pre" else layer - 1)  # the patches that enter the stream here
                if key in differs and (layer < n_layers or pos == n_pos - 1):  # behind the last block, only the last position is read
                    where = differs[key][:, pos].nonzero()[:, 0]
                    under_way.append((key, where))
                    prompts, x = torch.cat([prompts, where]), torch.cat([x, patched_stream(*key, pos, where)])
            if layer < n_layers:
                parts = max(1, math.ceil(len(under_way) * len(original) / rows))  # of no more than `rows` runs
                step = lambda part, who: model.block(layer, part, hook=resumed(who, pos), start=pos, last=layer == n_layers - 1)
                x = torch.cat([step(*part) for part in zip(x.tensor_split(parts), prompts.tensor_split(parts))])
                done += len(x)
                if progress:
                    progress(done / total)
        effect = base.new_zeros(len(nodes), len(original), n_layers)
        change = read_out(model, x, answers[prompts], metric) - base[prompts]
        for ((name, layer), where), c in zip(under_way, change.split([len(where) for _, where in under_way])):
            effect[nodes.index(name), where, layer] = c
        return effect

    # runs through one block: a patch at (layer, pos) goes through all blocks that it enters
    work = sum(d.sum(0) * (n_layers - layer - (name != "resid_pre")) for (name, layer), d in differs.items()).tolist()
    done, total = 0, max(1, sum(work))
    pieces = {} if pieces is None else pieces
    for pos in range(n_pos):
        if pos in pieces:
            done += work[pos]
        else:
            pieces[pos] = effects_at(pos)
    return dict(zip(nodes, torch.stack([pieces[pos] for pos in range(n_pos)], dim=-1)))


# ---------------------------------------------------------------------------------------------------------
# How well a method predicts AP. Scores of all prompts are [prompt, layer, pos], NaN beyond a prompt's length; groups
# names for each prompt the group (template) whose positions mean the same.


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two vectors, in float64; NaN where one of them is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else float("nan")


def averaged(scores: Tensor, groups: list[str]) -> Tensor:
    """Each group's mean map over its prompts, flattened, one group behind the other (the maps that Figure 2 shows)."""
    rows = {g: [i for i, other in enumerate(groups) if other == g] for g in dict.fromkeys(groups)}
    maps = torch.cat([scores[i].double().mean(0).flatten() for i in rows.values()])
    return maps[~maps.isnan()]


def pcc(scores: Tensor, ap: Tensor, groups: list[str], cells: Tensor | None = None) -> dict[str, float]:
    """Pearson correlation of a method's scores with AP's, three ways. Section 5.1 of the paper leaves the way open.

    averaged         of the prompt-averaged maps: per group, the groups' maps concatenated
    pooled           over all cells of all prompts at once
    per_prompt       the mean over prompts of each prompt's own correlation; per_prompt_std is their spread

    cells, [prompt, layer, pos] bool, leaves out those where it is False (averaged: False in the whole group).
    """
    if cells is None:
        cells = torch.ones_like(ap, dtype=torch.bool)
    keep = averaged(torch.where(ap.isnan(), torch.nan, cells.double()), groups) > 0
    there = ~ap.isnan() & cells
    each = torch.tensor([pearson(s[t], a[t]) for s, a, t in zip(scores, ap, there) if t.any()], dtype=torch.float64)
    each = each[~each.isnan()]
    return {
        "averaged": pearson(averaged(scores, groups)[keep], averaged(ap, groups)[keep]),
        "pooled": pearson(scores[there], ap[there]),
        "per_prompt": float(each.mean()),
        "per_prompt_std": float((each - each.mean()).square().mean().sqrt()),
    }
