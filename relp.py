"""Relevance patching (RelP), attribution patching (AtP) and activation patching (AP), in plain PyTorch.

Which parts of a model make it say one thing (on the original prompt) rather than another (on the patch prompt)?
AP answers by intervention: it writes a node's activation from the patch run into the original run and looks at what
that does to a metric,

    c(node) = metric(original run | node <- node(x_patch)) - metric(original run)                           (Eq. 1)

one run per node. AtP and RelP predict the same number for all nodes at once, from two forward passes and one backward:

    score(node) = (node(x_patch) - node(x_original)) . rho(node)            summed over the hidden dimension

    AtP    rho is the gradient of the metric on the original run                                            (Eq. 2)
    RelP   rho is LRP's propagation coefficient: the gradient of the same run with Table 1's rules on       (Eq. 3)
    RelP with two-point rules: what the rules hold constant is taken between the two runs (models.TWO_POINT)
    IG     rho is the gradient averaged on the node's way from the original to the patch run, at many times the price

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
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

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

# Node kinds that are the parts of a node, each scored by itself: attention heads, by what they put out or by one of
# their inputs, and neurons of the MLP. The parts lie along the first axis behind batch and pos.
PARTS_OF = {"head": "z", "head_q": "q", "head_k": "k", "head_v": "v", "head_pattern": "pattern", "neuron": "mlp_hidden"}


def record(model, tokens: Tensor, nodes, lrp=False, grad: bool = False, replace=None) -> tuple[Tensor, dict]:
    """One forward pass: the final residual stream, and the nodes' activations {(name, layer): [batch, pos, ...]}.

    With grad, autograd can reach every one of them although no weight asks for a gradient. replace, {(name, layer):
    value}, takes the place of what these nodes have computed.
    """
    kept = {}

    def hook(name, layer, value):
        if replace and (name, layer) in replace:
            value = replace[name, layer]
        if grad and not value.requires_grad:
            value = value.detach().requires_grad_()
        kept[name, layer] = value
        return value

    hook.nodes = {PARTS_OF.get(name, name) for name in nodes}
    with torch.set_grad_enabled(grad):
        return model.stream(tokens, lrp, hook), kept


def coefficients(model, tokens, answers, nodes, metric=logit_diff, lrp=False, replace=None) -> tuple[dict, dict]:
    """The nodes' activations and their rho, both {(name, layer): [batch, pos, ...]}: one forward pass, one backward."""
    stream, acts = record(model, tokens, nodes, lrp, True, replace)
    with torch.enable_grad():
        value = read_out(model, stream, answers, metric, lrp).sum()  # prompts are independent: one backward serves all
    return acts, dict(zip(acts, torch.autograd.grad(value, list(acts.values()), materialize_grads=True)))


def run_patch(model, tokens, answers, nodes, metric=logit_diff, lrp=False) -> tuple[dict, object]:
    """The nodes' activations in the patch run, and the rules for the original run: with two-point rules they know this one."""
    if not getattr(lrp, "two_point", ()):
        return record(model, tokens, nodes)[1], lrp
    lrp = lrp.taped()
    stream, acts = record(model, tokens, nodes, lrp)
    with torch.no_grad():
        read_out(model, stream, answers, metric, lrp)  # the final norm has its two points as well
    lrp.tape.playing = True
    return acts, lrp


def propagate(
    model, original: Tensor, patch: Tensor, answers: Tensor, keys, metric=logit_diff, lrp=False, steps=None
) -> dict[tuple, tuple[Tensor, Tensor, Tensor]]:
    """{(name, layer): (node(x_original), node(x_patch), rho)} for `keys`, pairs (name, layer).

    Two forward passes and one backward; with `steps`, Integrated Gradients' many (see integrated()).
    """
    nodes = {name for name, _ in keys}
    patch_acts, lrp = run_patch(model, patch, answers, nodes, metric, lrp)
    if steps is None:
        acts, rho = coefficients(model, original, answers, nodes, metric, lrp)
    else:
        _, acts = record(model, original, nodes)
        rho = {k: integrated(model, original, answers, k, acts[k], patch_acts[k], metric, steps) for k in keys}
    return {key: (acts[key].detach(), patch_acts[key], rho[key]) for key in keys}


def attribute(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff, lrp=False, steps=None
) -> dict[str, Tensor]:
    """AtP (lrp=False, Eq. 2), RelP (lrp=True: the paper's rules, or a set of rules; Eq. 3), or IG (steps=10, say).

    original, patch [batch, pos] and answers [batch, 2] are token ids. Returns {node: [batch, layer, pos]}, for the kinds
    in PARTS_OF [batch, layer, pos, part], in float32 or better and in the metric's unit. AtP and RelP are two forward
    passes and one backward pass, without a gradient of any weight.
    """
    check(model, original, patch, answers, nodes)
    keys = [(PARTS_OF.get(name, name), layer) for name in nodes for layer in range(model.config.n_layers)]
    runs = propagate(model, original, patch, answers, keys, metric, lrp, steps)

    def score(name, key):
        before, after, rho = runs[key]
        return dot(difference(before, after), rho, parts=name in PARTS_OF)

    return by_layer(model, nodes, score)


def difference(original: Tensor, patch: Tensor) -> Tensor:
    """node(x_patch) - node(x_original), in float32 or better."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    return patch.detach().to(dtype) - original.detach().to(dtype)


def dot(delta: Tensor, rho: Tensor, parts: bool = False) -> Tensor:
    """delta . rho over everything behind batch and pos, or behind batch, pos and part."""
    return (delta * rho).unsqueeze(-1).flatten(2 + parts).sum(-1)


def changed(original: Tensor, patch: Tensor, parts: bool = False) -> Tensor:
    """[batch, pos] or [batch, pos, part]: True where the two runs differ. Elsewhere every method scores exactly 0."""
    return (patch != original).unsqueeze(-1).flatten(2 + parts).any(-1)


def by_layer(model, nodes, value) -> dict[str, Tensor]:
    """{name: [batch, layer, pos, ...]} of value(name, (node, layer)) -> [batch, pos, ...]."""
    layers = range(model.config.n_layers)
    return {
        name: torch.stack([value(name, (PARTS_OF.get(name, name), layer)) for layer in layers], dim=1) for name in nodes
    }


def check(model, original, patch, answers, nodes) -> None:
    if original.shape != patch.shape:
        raise ValueError(f"original and patch must have one shape, got {list(original.shape)} and {list(patch.shape)}")
    if answers.shape != (len(original), 2):
        raise ValueError(f"answers must have the shape [{len(original)}, 2], got {list(answers.shape)}")
    if unknown := [name for name in nodes if PARTS_OF.get(name, name) not in model.nodes]:
        raise ValueError(f"unknown node {unknown[0]!r}: this model has {', '.join((*model.nodes, *PARTS_OF))}")


def compare(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff
) -> tuple[Tensor, Tensor, dict]:
    """The metric [batch] of the original run and of the patch run, and {node: bool [batch, layer, pos]}: where they differ."""
    check(model, original, patch, answers, nodes)
    stream, acts = record(model, original, nodes)
    patch_stream, patch_acts = record(model, patch, nodes)
    values = [read_out(model, s, answers, metric) for s in (stream, patch_stream)]
    differs = lambda name, key: changed(acts[key], patch_acts[key], parts=name in PARTS_OF)
    return *values, by_layer(model, nodes, differs)


# ---------------------------------------------------------------------------------------------------------
# Features: sparse autoencoders divide a node, x = sum_i f_i W_dec[i] + b_dec + error, and its score with it


def attribute_features(
    model, original: Tensor, patch: Tensor, answers: Tensor, saes: dict, metric=logit_diff, lrp=False, steps=None
) -> dict[tuple, Tensor]:
    """The score of every feature and, last, of the error: {(name, layer): [batch, pos, n_features + 1]}.

    saes: {(name, layer): models.SAE, or what has its encode and W_dec}. The scores of one node add up to
    attribute()'s, and cost the same passes.
    """
    check(model, original, patch, answers, {name for name, _ in saes})
    return divide(propagate(model, original, patch, answers, saes, metric, lrp, steps), saes)


def divide(runs: dict, saes: dict) -> dict[tuple, Tensor]:
    """propagate()'s runs as scores of the units of `saes`, which may be some of the runs' nodes.

    score(f_i) = (f_i(x_patch) - f_i(x_original)) (W_dec[i] . rho)
    score(error) = (error(x_patch) - error(x_original)) . rho
    """
    scores = {}
    for key, sae in saes.items():
        before, after, rho = (x.flatten(2) for x in runs[key])
        where = changed(before, after) & (rho != 0).any(-1)  # elsewhere the scores are 0
        before, after, rho = before[where], after[where], rho[where]
        features = difference(sae.encode(before), sae.encode(after)) * (rho @ sae.W_dec.T)
        error = (difference(before, after) * rho).sum(-1) - features.sum(-1)  # what is left of the node's score
        of_units = torch.cat([features, error.unsqueeze(-1)], dim=-1)
        scores[key] = of_units.new_zeros(*where.shape, of_units.shape[-1])
        scores[key][where] = of_units
    return scores


# ---------------------------------------------------------------------------------------------------------
# Two relatives, for comparison: Integrated Gradients, and AtP*'s way with q and k


def integrated(
    model, tokens, answers, key, before: Tensor, after: Tensor, metric=logit_diff, steps: int = 10
) -> Tensor:
    """rho of Integrated Gradients [21] for one node: its gradient averaged along the way from the original to the patch run.

    The node takes the values before + k/steps (after - before), k = 0 .. steps - 1 (the quadrature of Marks et al. [44]),
    all else follows from the original prompt: `steps` forward and backward passes for every node.
    """
    total = torch.zeros_like(before)
    for k in range(steps):
        moved = {key: torch.lerp(before, after, k / steps)}
        total += coefficients(model, tokens, answers, (key[0],), metric, replace=moved)[1][key]
    return total / steps


def attribute_star(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff
) -> dict[str, Tensor]:
    """AtP with the QK fix of AtP* [18]: for q and k the softmax is computed, not linearised; else it is attribute().

    score(q) = (pattern with that position's q from the patch run - pattern) . rho(pattern), and k alike. Needs, beside
    what attribute() does, model.blocks[layer].attn.scores(q, k), as models.Transformer has it.
    """
    check(model, original, patch, answers, nodes)
    names = [name for name in nodes if PARTS_OF.get(name, name) in ("q", "k")]
    others = [name for name in nodes if name not in names]
    result = attribute(model, original, patch, answers, others, metric) if others else {}
    acts, rho = coefficients(model, original, answers, ("q", "k", "pattern"), metric)
    _, patch_acts = record(model, patch, ("q", "k"))
    fixed = {}
    for layer in range(model.config.n_layers):
        q, k, q_patch, k_patch = (a[n, layer].detach() for a in (acts, patch_acts) for n in "qk")
        groups = q.shape[2] // k.shape[2]  # query heads that share one key head
        pattern, r = acts["pattern", layer].detach(), rho["pattern", layer]  # [batch, query, head, key]
        scores = lambda q, k: model.blocks[layer].attn.scores(q, k.repeat_interleave(groups, dim=2)).to(r.dtype)
        s, s_k = scores(q, k), scores(q, k_patch)
        by_q = scores(q_patch, k).masked_fill(pattern == 0, -torch.inf).softmax(-1) - pattern
        fixed["q", layer] = (by_q * r).sum(-1)
        # one key changes one score of a row: its weight grows by the factor `growth`, all are divided by the new sum
        growth = (s_k - s).clamp(max=60).exp()
        total = 1 + pattern * (growth - 1)
        rest = (pattern * r).sum(-1, keepdim=True) - pattern * r
        by_k = pattern * (growth / total - 1) * r + (1 / total - 1) * rest
        fixed["k", layer] = by_k.sum(1).transpose(1, 2).unflatten(2, (-1, groups)).sum(3)  # [batch, key, key head]
    result |= by_layer(model, names, lambda name, key: fixed[key] if name in PARTS_OF else fixed[key].sum(-1))
    return {name: result[name] for name in nodes}


# ---------------------------------------------------------------------------------------------------------
# AP


@dataclass
class Edit:
    """What AP writes into the original run: at `node` of `layer`, one run for each True in `cells`.

    cells  bool [batch, pos] or, for the parts of a node, [batch, pos, part]
    value  value(prompts, pos) or value(prompts, pos, parts) -> [n, 1, ...], the node at pos in n edited runs
    """

    node: str
    layer: int
    cells: Tensor
    value: object

    @property
    def entry(self) -> int:
        """The layer that the edited run goes on from: resid_pre is written ahead of its layer, all else within it."""
        return self.layer + (self.node != "resid_pre")


def activation_patching(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff, cells=None, **how
) -> dict[str, Tensor]:
    """AP (Eq. 1), exact: one (layer, position) of one node, or part of a node, from the patch run into the original run.

    Arguments and result as in attribute().

    cells  {node: bool}, shaped like the result or like one prompt's: patch these alone, and return 0 elsewhere
    how    rows, pieces, progress, lockstep: see effects()
    """
    check(model, original, patch, answers, nodes)
    final, acts = record(model, original, {*KEPT, *nodes})
    _, patch_acts = record(model, patch, nodes)

    def edit(name, layer):
        parts = name in PARTS_OF
        key = PARTS_OF.get(name, name), layer
        before, after = acts[key], patch_acts[key]
        chosen = changed(before, after, parts)
        if cells is not None:
            chosen = chosen & cells[name].select(-2 - parts, layer)

        def value(prompts, pos, *part):
            if not parts:
                return after[prompts, pos : pos + 1]
            row = torch.arange(len(prompts), device=prompts.device)  # this part from the patch run, the others stay
            index = row, torch.zeros_like(row), *part
            return before[prompts, pos : pos + 1].index_put(index, after[prompts, pos, part[0]])

        return Edit(*key, chosen, value)

    edits = {(name, layer): edit(name, layer) for name in nodes for layer in range(model.config.n_layers)}
    result = effects(model, original, answers, final, acts, edits, metric, **how)
    return by_layer(model, nodes, lambda name, key: result[name, key[1]])


def patch_features(
    model, original: Tensor, patch: Tensor, answers: Tensor, saes: dict, metric=logit_diff, **how
) -> dict[tuple, Tensor]:
    """AP of single features, exact: at one position feature i, or the error, is given its value in the patch run.

        node <- node(x_original) + (f_i(x_patch) - f_i(x_original)) W_dec[i]

    Arguments and result as in attribute_features(); how: as in effects(). One run per feature that differs: for small
    models.
    """
    nodes = {name for name, _ in saes}
    check(model, original, patch, answers, nodes)
    final, acts = record(model, original, {*KEPT, *nodes})
    _, patch_acts = record(model, patch, nodes)

    def edit(key, sae):
        before, after = acts[key].flatten(2), patch_acts[key].flatten(2)
        features = difference(sae.encode(before), sae.encode(after)).to(before.dtype)
        error = difference(before, after).to(before.dtype) - features @ sae.W_dec  # b_dec cancels
        features, W_dec = pad(features, (0, 1)), pad(sae.W_dec, (0, 0, 0, 1))  # the error comes last

        def value(prompts, pos, part):
            move = features[prompts, pos, part, None] * W_dec[part]
            move = torch.where((part == len(sae.W_dec))[:, None], error[prompts, pos], move)
            return acts[key][prompts, pos : pos + 1] + move.view(-1, 1, *acts[key].shape[2:])

        return Edit(*key, torch.cat([features[..., :-1] != 0, (error != 0).any(-1, keepdim=True)], dim=-1), value)

    edits = {key: edit(key, sae) for key, sae in saes.items()}
    return effects(model, original, answers, final, acts, edits, metric, **how)


KEPT = "resid_pre", "k", "v"  # of the original run, so that runs can be resumed in the middle


@torch.no_grad()
def effects(
    model,
    original: Tensor,
    answers: Tensor,
    final: Tensor,
    acts: dict,
    edits: dict,
    metric=logit_diff,
    rows: int = 32,
    pieces=None,
    progress=None,
    lockstep: bool = False,
) -> dict:
    """{label: metric(edited run) - metric(original run), shaped as its cells} for edits {label: Edit}; 0 outside of the cells.

    An edit at (layer, pos) changes nothing before that layer and nothing before that position. So an edited run is the
    original run *resumed*: its residual stream from pos on, edited, goes on from that layer, while attention reads the
    keys and values of the positions before from the original run. Edited runs of one position go down the layers
    together, in convoys that runs of later layers join where they begin.

    final     the original run's final stream; acts: its nodes, those in KEPT among them
    rows      how many runs go through a block together (more as they get shorter)
    pieces    a mapping {pos: {label: effects}} in which finished positions are kept and from which they are taken, so
              that a long run can go on where it was stopped
    progress  progress(fraction) is called as the work proceeds
    lockstep  run all cells, changed or not: processes that share weights must make the same calls
    """
    n_layers, n_pos = model.config.n_layers, original.shape[1]
    base = read_out(model, final, answers, metric)
    streams = [acts["resid_pre", layer] for layer in range(n_layers)] + [final]

    def resumed(prompts, pos, key=None, value=None):
        """The hook of original runs resumed at pos, the node `key` having this value there."""

        def hook(name, layer, x):
            edited = (name, layer) == key
            if name in ("k", "v"):
                past_and_x = acts[name, layer].index_select(0, prompts)[:, : pos + x.shape[1]]
                past_and_x[:, pos:] = x
                if edited:
                    past_and_x[:, pos : pos + 1] = value
                return past_and_x
            return value[..., : x.shape[-1]] if edited else x  # of a pattern the keys up to here

        hook.nodes = ("k", "v", key and key[0])
        return hook

    def edited_stream(edit, pos, where):
        """The streams from pos on, at the layer that the edited runs enter; `where` indexes prompt, or prompt and part."""
        prompts, value = where[0], edit.value(where[0], pos, *where[1:])
        stream = streams[edit.layer][prompts, pos:]
        if edit.node == "resid_pre":
            return torch.cat([value, stream[:, 1:]], dim=1)
        # k and v reach all later positions at once, any other node its own alone
        reach = None if edit.node in ("k", "v") else 1
        hook, last = resumed(prompts, pos, (edit.node, edit.layer), value), reach is None and edit.entry == n_layers
        edited = model.block(edit.layer, stream[:, :reach], hook=hook, start=pos, last=last)
        return edited if reach is None else torch.cat([edited, streams[edit.entry][prompts, pos + 1 :]], dim=1)

    def convoys(pos):
        """Lists of (label, where) in the order in which they enter, of at most `rows` runs each."""
        most, convoy, size = max(1, rows * n_pos // (n_pos - pos)), [], 0
        for label, edit in sorted(edits.items(), key=lambda item: item[1].entry):
            if edit.entry == n_layers and pos < n_pos - 1 and edit.node not in ("k", "v"):
                continue  # behind the last block, only the last position is read
            where = (edit.cells[:, pos] | lockstep).nonzero()
            while len(where):
                part, where = where[: most - size], where[most - size :]
                convoy.append((label, part.unbind(1)))
                size += len(part)
                if size == most:
                    yield convoy
                    convoy, size = [], 0
        if convoy:
            yield convoy

    def effects_at(pos):
        """{label: [batch, ...]}: the effects of all edits at one position."""
        nonlocal done
        effect = {label: base.new_zeros(edit.cells[:, pos].shape) for label, edit in edits.items()}
        for convoy in convoys(pos):
            prompts, x = original.new_zeros(0), None
            for layer in range(edits[convoy[0][0]].entry, n_layers + 1):
                for label, where in convoy:
                    if edits[label].entry == layer:
                        stream = edited_stream(edits[label], pos, where)
                        prompts, x = torch.cat([prompts, where[0]]), stream if x is None else torch.cat([x, stream])
                if layer < n_layers:
                    x = model.block(layer, x, hook=resumed(prompts, pos), start=pos, last=layer == n_layers - 1)
                    done += len(x)
            change = read_out(model, x, answers[prompts], metric) - base[prompts]
            for (label, where), c in zip(convoy, change.split([len(where[0]) for _, where in convoy])):
                effect[label][where] = c
            if progress:
                progress(done / total)
        return {label: value * edits[label].cells[:, pos] for label, value in effect.items()}

    # in runs through one block: an edited run goes through all blocks from the one that it enters on
    steps = lambda convoy: sum(len(where[0]) * (n_layers - edits[label].entry) for label, where in convoy)
    work = [sum(map(steps, convoys(pos))) for pos in range(n_pos)]
    done, total = 0, max(1, sum(work))
    pieces = {} if pieces is None else pieces
    for pos in range(n_pos):
        if pos in pieces:
            done += work[pos]
        else:
            pieces[pos] = effects_at(pos)
    return {label: torch.stack([pieces[pos][label] for pos in range(n_pos)], dim=1) for label in edits}


# ---------------------------------------------------------------------------------------------------------
# Circuits (Section 5.2): units are features and errors, each at a position. A circuit {(name, layer): bool
# [pos, n_features + 1]} is what is left of the model when all other units are held at their means.


class Neurons:
    """A node's own dimensions in the place of an SAE's features: f = x, W_dec [d, d] the identity, and so no error."""

    def __init__(self, W_dec: Tensor):
        self.W_dec = W_dec

    def encode(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def unit_means(model, tokens: Tensor, saes: dict) -> dict[tuple, tuple[Tensor, Tensor]]:
    """{(name, layer): (features [pos, n_features], the rest x - sum_i f_i W_dec[i] [pos, d])}, means over tokens [batch, pos].

    The rest is the error plus b_dec, which is constant: to hold the one at its mean is to hold the other.
    """
    _, acts = record(model, tokens, {name for name, _ in saes})
    means = {}
    for key, sae in saes.items():
        x = acts[key].flatten(2)
        features = sae.encode(x)
        means[key] = features.mean(0), (x - features @ sae.W_dec).mean(0)
    return means


@torch.no_grad()
def run_circuit(model, tokens: Tensor, answers: Tensor, saes: dict, means: dict, circuit: dict, metric=logit_diff):
    """The metric [batch] of the run in which all units of `saes` outside the circuit are held at their means,

        x <- sum_i g_i W_dec[i] + rest,     g_i = f_i(x) in the circuit, else its mean; the rest x - sum_i f_i(x) W_dec[i]
                                            where the error is in the circuit, else its mean

    where f are those of the x that this run has computed, so that nodes ablated before have their effect.
    """

    def hook(name, layer, x):
        key = name, layer
        if key not in saes:
            return x
        sae, (features, rest), flat = saes[key], means[key], x.flatten(2)
        own, kept, error_kept = sae.encode(flat), circuit[key][:, :-1], circuit[key][:, -1:]
        held = torch.where(kept, own, features)
        # with the error in the circuit, x + the features' change: exactly x where all are
        moved = torch.where(error_kept, flat, rest) + torch.where(error_kept, held - own, held) @ sae.W_dec
        return moved.view_as(x)

    hook.nodes = {name for name, _ in saes}
    return read_out(model, model.stream(tokens, hook=hook), answers, metric)


def faithfulness(circuit: Tensor, full: Tensor, empty: Tensor) -> Tensor:
    """(L(C) - L(empty)) / (L(M) - L(empty)) of the metrics' means over the last axis. Of the complement's run: completeness."""
    return (circuit.mean(-1) - empty.mean(-1)) / (full.mean(-1) - empty.mean(-1))


# ---------------------------------------------------------------------------------------------------------
# How well a method predicts AP. Scores of all prompts are [prompt, layer, pos], maybe with parts behind, NaN beyond a
# prompt's length; groups names for each prompt the group (template) whose positions mean the same.
#
# Every measure is a function of how often each prompt counts, weights [B, prompt]: once each for the number itself, as
# often as it was drawn for a bootstrap resample. The same weights for two methods make their difference a paired one.


def resamples(groups: list[str], B: int = 1000, seed: int = 0) -> Tensor:
    """The weights [B, prompt] of B bootstrap resamples of the prompts: how often each was drawn.

    As many prompts as there are, with replacement, within each group (stratified: the design fixes how many a template
    has). Groups of a single prompt are one stratum, since alone they could not vary; a resample leaves the cells of an
    absent group out. One prompt in all says nothing about the spread: its weights are 0, and every measure is NaN.
    """
    generator, weights = torch.Generator().manual_seed(seed), torch.zeros(B, len(groups), dtype=torch.float64)
    strata = [g if groups.count(g) > 1 else None for g in groups]
    for stratum in dict.fromkeys(strata if len(groups) > 1 else ()):
        rows = torch.tensor([i for i, other in enumerate(strata) if other == stratum])
        drawn = rows[torch.randint(len(rows), (B, len(rows)), generator=generator)]
        weights.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return weights


def interval(values: Tensor) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of a measure's, or of a difference's, values [B] over the resamples.

    Undefined resamples (NaN) are left out. Where they are more than a twentieth, the interval is undefined too.
    """
    if values.isnan().double().mean() > 0.05:
        return math.nan, math.nan
    return tuple(values.nanquantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist())


def agreement(
    scores: Tensor,
    ap: Tensor,
    groups: list[str],
    cells: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """How well a method's scores s predict AP's a, as {measure: [B]}; B is 1 without weights. All in float64.

    Three Pearson correlations (PCC; Section 5.1 of the paper leaves open which); NaN where one side is constant:

    averaged         of the averaged maps: per group the mean over its prompts (as in Figure 2), groups concatenated
    pooled           over all cells of all prompts at once
    per_prompt       the mean over prompts of each prompt's own; per_prompt_std is their spread over prompts

    The others are of the averaged maps, as `averaged` is. In parentheses what a perfect method has:

    spearman         PCC of the cells' ranks, equal values sharing their mean rank: is the order right? (1)
    sign             of the cells that matter, |a| >= 10 % of the largest |a|, the share where s has a's sign (1)
    recall           of AP's top 10 cells by |a|, the share in the method's top 10 by |s|; see `top` for ties (1)
    slope            sum(a s) / sum(a a), the least-squares line through 0: is the size right, or only the shape? (1)
    false_negative   the largest |a| where the method says zero, |s| <= 1 % of the largest |s|, as a share of the
                     largest |a| (0)

    cells, shaped like the scores and bool, leaves out those where it is False (averaged maps: in all prompts drawn).
    """
    weights = (torch.ones(1, len(ap)) if weights is None else weights).double()
    padding = ap.flatten(1).isnan()
    there = ~padding if cells is None else ~padding & cells.flatten(1)
    s, a = (x.double().flatten(1).masked_fill(padding, 0) for x in (scores, ap))
    rows = [[i for i, other in enumerate(groups) if other == g] for g in dict.fromkeys(groups)]

    def of_averages(w: Tensor) -> dict[str, Tensor]:
        total = lambda x: torch.cat([w[:, r] @ x[r].double() for r in rows], dim=1)  # [B, cells of all groups]
        keep, drawn = (total(there) > 0) & (total(padding) == 0), total(~padding)
        return of_maps(total(s) / drawn, total(a) / drawn, keep)

    parts = [of_averages(w) for w in weights.split(max(1, 2**22 // (len(rows) * s.shape[1])))]  # 32 MB a map
    sums = moments(s, a, there)
    each = correlation(sums)
    w = weights * ~each.isnan()
    mean, square = (w @ x.nan_to_num() / w.sum(1) for x in (each, each * each))
    return {
        **{name: torch.cat([part[name] for part in parts]) for name in parts[0]},
        "pooled": correlation(weights @ sums),
        "per_prompt": mean,
        "per_prompt_std": (square - mean * mean).clamp(min=0).sqrt(),
    }


def of_maps(s: Tensor, a: Tensor, keep: Tensor, k: int = 10) -> dict[str, Tensor]:
    """The measures of the averaged maps s and a [B, cell], over the cells in keep; `agreement` defines them."""
    pcc = correlation(moments(s, a, keep))
    order = (ranks(x.masked_fill(~keep, math.inf)) for x in (s, a))  # what is left out comes last: no rank changes
    spearman = correlation(moments(*order, keep)).where(~pcc.isnan(), torch.nan)  # a constant's order is rounding
    s, a = s.masked_fill(~keep, 0), a.masked_fill(~keep, 0)
    most_s, most_a = (x.abs().amax(1, keepdim=True) for x in (s, a))
    share = lambda part, whole: (part & whole).double().sum(1) / whole.double().sum(1)
    return {
        "averaged": pcc,
        "spearman": spearman,
        "sign": share(s.sign() == a.sign(), (a.abs() >= 0.1 * most_a) & (a != 0)),
        "recall": share(top(s.abs(), k), top(a.abs(), k)),
        "slope": (a * s).sum(1) / (a * a).sum(1),
        "false_negative": a.abs().masked_fill(s.abs() > 0.01 * most_s, 0).amax(1) / most_a[:, 0],
    }


def top(size: Tensor, k: int) -> Tensor:
    """Which cells of each row are among the k largest. Zeros never are, nor are ties for which there is no room."""
    return size > (size.topk(k + 1).values[:, -1:] if k < size.shape[1] else 0)


def ranks(x: Tensor) -> Tensor:
    """Each value's rank in its row, from 1; equal values share the mean of their ranks."""
    ordered, at = x.sort()
    i, new = torch.arange(x.shape[1]), torch.ones_like(x, dtype=torch.bool)  # new: not the value in front of it again
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(new, i, 0).cummax(1).values  # of the run of equal values that a value belongs to
    last = torch.where(new.roll(-1, 1), i, x.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(x).scatter(1, at, (first + last).to(x.dtype) / 2 + 1)


def moments(a: Tensor, b: Tensor, there: Tensor) -> Tensor:
    """What a correlation is made of: sums over the last axis, where there is True. Those of several prompts add up."""
    a, b = a.masked_fill(~there, 0), b.masked_fill(~there, 0)
    return torch.stack([x.sum(-1) for x in (there.double(), a, b, a * a, b * b, a * b)], dim=-1)


def correlation(sums: Tensor) -> Tensor:
    """Pearson correlation from moments [..., 6]; NaN where one side is constant (to the rounding of the sums)."""
    n, a, b, aa, bb, ab = sums.unbind(-1)
    var_a, var_b = aa - a * a / n, bb - b * b / n
    varies = (var_a > 1e-12 * aa) & (var_b > 1e-12 * bb)
    return torch.where(varies, (ab - a * b / n) / (var_a.sqrt() * var_b.sqrt()), torch.nan)


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of two vectors, in float64; NaN where one of them is constant."""
    return float(correlation(moments(a.double(), b.double(), torch.ones_like(a, dtype=torch.bool))))


# ---------------------------------------------------------------------------------------------------------
# Conservation: how much of the metric's relevance is left at each layer, and what the rest was lost to


def conservation(model, tokens: Tensor, answers: Tensor, metric=logit_diff, lrp=True) -> dict:
    """What the stream keeps of the metric's relevance, and what each block loses, as fractions of the metric.

    A tensor x holds the relevance x . rho. A module loses what its output holds and its input does not. Of that, biases
    get b . (gradient of b), the modules within lose their own, and what remains is the module's: Attention's is what q and
    k get in excess (the softmax), MLP's that of activation and gate, Linear's the epsilon-rule's; a block's is "residual".

        {"prompts": .., "metric": mean over them, "kept": [layer + 1], "lost": {kind: [layer + 1]}}

    kept[l] + all lost[..][l] = kept[l + 1]; the last entries are the final stream, and what lies between it and the metric.
    Not for two-point rules, under which it is (x_patch - x) . rho that is kept.
    """
    parts, came, went = [*model.blocks, model.ln_f], {}, {}
    modules = [m for part in parts for m in part.modules()]
    biases = {m: m.bias for m in modules if getattr(m, "bias", None) is not None}

    def before(m, args):
        x = args[0]  # a tensor has several readers: as a node of its own, it gets what this one sends back
        came[m] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        return came[m], *args[1:]

    hooks = [m.register_forward_pre_hook(before) for m in modules]
    hooks += [m.register_forward_hook(lambda m, args, y: went.update({m: y})) for m in modules]
    needed = {b: b.requires_grad for b in biases.values()}
    try:
        for b in needed:
            b.requires_grad_()
        with torch.enable_grad():
            value = read_out(model, model.stream(tokens, lrp), answers, metric, lrp).sum()
            nodes = [*came.values(), *went.values(), *biases.values()]
            rho = iter(torch.autograd.grad(value, nodes, materialize_grads=True))
    finally:
        for h in hooks:
            h.remove()
        for b, before_this in needed.items():
            b.requires_grad_(before_this)
    value = float(value.detach()) or math.nan  # of nothing there are no fractions
    held = lambda x: float((x.detach().cpu().double() * next(rho).cpu().double()).sum()) / value
    came, went, biases = ({m: held(x) for m, x in them.items()} for them in (came, went, biases))

    lost = {}
    for layer, part in enumerate(parts):
        for m in part.modules():
            own = went[m] - came[m] - biases.get(m, 0.0) - sum(went[child] - came[child] for child in m.children())
            kind = "residual" if m in parts[:-1] else type(m).__name__
            for kind, loss in ((kind, own), ("biases", biases.get(m, 0.0))):
                lost.setdefault(kind, [0.0] * len(parts))[layer] += loss
    lost["unembedding"] = [0.0] * (len(parts) - 1) + [1 - went[model.ln_f]]
    return {"prompts": len(tokens), "metric": value / len(tokens), "kept": [came[part] for part in parts], "lost": lost}
