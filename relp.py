"""Activation patching (AP), attribution patching (AtP) and relevance patching (RelP), in plain PyTorch.

Which parts of a model make it say one thing (on the original prompt) rather than another (on the patch prompt)?
AP answers by intervention: it writes a node's activation from the patch run into the original run and looks at what
that does to a metric,

    c(node) = metric(original run | node <- node(x_patch)) - metric(original run)                           (Eq. 1)

one run per node, layer and position. AtP and RelP predict the same numbers all at once, from two forward passes and one
backward:

    score(node) = (node(x_patch) - node(x_original)) . rho(node)            summed over the hidden dimension

    AtP    rho is the gradient of the metric on the original run                                            (Eq. 2)
    RelP   rho is LRP's propagation coefficient: the gradient of the same run with Table 1's rules on       (Eq. 3)
    IG     rho is the gradient averaged along the straight line from the node's original to its patch activation; this
           takes many more passes

For example, with "... Mary gave a book to" and "... John gave a book to" as token ids [1, pos], answers John and Mary:

    scores = attribute(model, original, patch, answers, ["resid_pre", "mlp_out"], lrp=True)                 # RelP
    scores["mlp_out"][0, 2, 5]                       # what layer 2's MLP does at position 5, in the metric's unit

Direction, everywhere: patch activations go into the original run, rho is taken on the original run, and a score is
metric(patched) - metric(original). So a node that carries the original answer has a negative logit_diff score.

    paper                       here
    x_original, x_patch         original, patch: token ids [batch, pos], all of one length
    M, do(n <- n(x_patch))      model, hook
    L                           metric(logits [batch, vocab], answers [batch, 2]) -> [batch]
    n(x)                        the activation of a node (its name) in one layer at one position
    rho                         rho
    c, c_AtP, c_RelP            the results: {node: [batch, layer, pos]}, one score per prompt pair; the paper's
                                expectation is their mean over the batch

What a model must offer. models.Transformer does, and so can a model of your own:

    config.n_layers             how many layers it has
    nodes                       the names of a layer's nodes, such as ("resid_pre", "mlp_out")
    stream(tokens, lrp=False, hook=None)
                                tokens [batch, pos] -> the final residual stream [batch, pos, d_model]. Each node's
                                activation [batch, pos, ...] goes through hook(name, layer, activation), and the pass
                                goes on with what the hook returns. The hook wants the names in hook.nodes only. lrp
                                says which rules are on.
    unembed(x, lrp=False, columns=None)
                                x [batch, d_model] -> logits [batch, vocab], or if columns is not None [batch, columns],
                                the logits of these token ids
    block(layer, x, hook=None, start=0, last=False)
                                for resumed runs, which make AP much faster (see `effects`). Without this method
                                activation_patching() runs the plain loop of Eq. 1, and patch_features() refuses.
                                One layer of a causal model whose nodes are resid_pre, k, v and others. x holds the
                                positions from `start` on. At "k" and "v" the hook returns more positions than it got,
                                the earlier ones in front. With last=True, only the last position need be returned.

No package but torch is imported.
"""

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Key = tuple[str, int]  # of an activation: (name of the node, layer)

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: logits [batch, vocab] at the last position, answers [batch, 2] (the original's, the patch's) -> [batch]


def logit_diff(logits: Tensor, answers: Tensor) -> Tensor:
    """Logit of the original's answer minus logit of the patch's answer."""
    of_original, of_patch = logits.gather(-1, answers).unbind(-1)
    return of_original - of_patch


def prob_diff(logits: Tensor, answers: Tensor) -> Tensor:
    """Probability of the original's answer minus probability of the patch's answer."""
    return logit_diff(logits.softmax(-1), answers)


def logprob_diff(logits: Tensor, answers: Tensor) -> Tensor:
    """Difference of the two log-probabilities. The normaliser cancels, so it equals logit_diff up to rounding."""
    return logit_diff(logits.log_softmax(-1), answers)


def kl(logits: Tensor, answers: Tensor) -> Tensor:
    """KL(patch run || this run) of the whole next-token distributions, in nats: how far this run is from the patch run.

    answers are here the patch run's logits [batch, vocab]: targets() makes them, and the answers that are given to
    attribute() and the like do not matter. In the patch run KL is 0. So here too, a node that carries the original
    answer has a negative score.
    """
    if not answers.is_floating_point():
        raise ValueError("kl needs the patch run's logits in the place of answers: see targets()")
    log_p, log_q = answers.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


METRICS = {"logit_diff": logit_diff, "prob_diff": prob_diff, "logprob_diff": logprob_diff, "kl": kl}


def metric_of(metric: str | Callable) -> Callable:
    return METRICS[metric] if isinstance(metric, str) else metric


@torch.no_grad()
def targets(model, patch_stream: Tensor, answers: Tensor, metric) -> Tensor:
    """What the metric compares logits with: the answers; for kl the patch run's logits, from its final stream."""
    return model.unembed(patch_stream[:, -1]) if metric_of(metric) is kl else answers


def read_out(model, stream: Tensor, answers: Tensor, metric=logit_diff, lrp=False) -> Tensor:
    """The metric [batch] at the last position of the final residual stream [batch, pos, d_model]."""
    columns, metric = None, metric_of(metric)
    if metric is logit_diff:  # it needs the answers' logits only
        columns, answers = answers.unique(return_inverse=True)
    logits = model.unembed(stream[:, -1], lrp, columns)
    if columns is None and metric is not kl and int(answers.max()) >= logits.shape[-1]:
        raise ValueError(f"answers must be token ids below {logits.shape[-1]}, got {int(answers.max())}")
    value = metric(logits, answers)
    if value.shape != logits.shape[:1]:
        raise ValueError(f"metric must return one number per prompt, {list(logits.shape[:1])}, got {list(value.shape)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Nodes

# Parts of a node that have a score of their own: {part: the node}. Attention heads are parts of z, and their inputs
# parts of q, k, v (k and v: one per key-value head) and the pattern; neurons are parts of the MLP's hidden layer. The
# parts lie along the axis after batch and pos.
PARTS_OF = {"head": "z", "head_q": "q", "head_k": "k", "head_v": "v", "head_pattern": "pattern", "neuron": "mlp_hidden"}


def node_of(name: str) -> str:
    """The node whose activation is recorded or written for `name`: itself, or the one that it is a part of."""
    return PARTS_OF.get(name, name)


def record(model, tokens: Tensor, nodes, lrp=False, grad: bool = False, replace=None) -> tuple[Tensor, dict]:
    """One forward pass: the final residual stream, and the nodes' activations {(name, layer): [batch, pos, ...]}.

    With grad, autograd can reach every one of them although no weight asks for a gradient. replace, {(name, layer):
    activation}, takes the place of what these nodes have computed.
    """
    kept = {}

    def hook(name, layer, x):
        if replace and (name, layer) in replace:
            x = replace[name, layer]
        # Autograd has nothing to go back to from here: the node becomes a leaf. So does the pattern under the AH-rule:
        # it has a rho of its own, though it passes nothing on to q and k.
        if grad and not x.requires_grad:
            x = x.detach().requires_grad_()
        kept[name, layer] = x
        return x

    hook.nodes = {node_of(name) for name in nodes}
    with torch.set_grad_enabled(grad):
        return model.stream(tokens, lrp, hook), kept


def by_part(x: Tensor, name: str) -> Tensor:
    """The activation of `name`'s node as [batch, pos, part, hidden]. A name that is no part is its own single part."""
    if name not in PARTS_OF:
        return x.flatten(2).unsqueeze(2)
    return x if x.ndim == 4 else x.unsqueeze(-1)  # a neuron has no hidden dimension


def by_layer(model, nodes, function: Callable) -> dict[str, Tensor]:
    """Puts function(name, (node, layer)), each [batch, pos, part], together: {name: [batch, layer, pos, part]}.

    A name that is no part has no part axis.
    """
    result = {}
    for name in nodes:
        layers = [function(name, (node_of(name), layer)) for layer in range(model.config.n_layers)]
        stacked = torch.stack(layers, dim=1)
        result[name] = stacked if name in PARTS_OF else stacked.squeeze(-1)
    return result


def difference(original: Tensor, patch: Tensor) -> Tensor:
    """node(x_patch) - node(x_original), in float32 or better."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    return patch.detach().to(dtype) - original.detach().to(dtype)


def changed(original: Tensor, patch: Tensor, name: str) -> Tensor:
    """[batch, pos, part]: True where the two runs differ. Elsewhere every method scores exactly 0."""
    return by_part(patch != original, name).any(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 1: AP


@torch.no_grad()
def patch_one_by_one(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff
) -> dict[str, Tensor]:
    """AP as Eq. 1 defines it: a whole forward pass for every node, layer and position (and part). Exact, and slow.

    Arguments and result as in attribute(). activation_patching() gives the same numbers, up to rounding, much faster.
    """
    check(model, original, patch, answers, nodes, metric)
    patch_stream, patch_acts = record(model, patch, nodes)
    answers = targets(model, patch_stream, answers, metric)

    def patched(key=None, place=None):
        """The metric of the original run, with the patch run's values of the activation `key` at the index `place`."""

        def hook(name, layer, x):
            if (name, layer) == key:
                x = x.clone()
                x[place] = patch_acts[key][place]
            return x

        hook.nodes = {node_of(name) for name in nodes}  # the same as in the patch run, so that both compute alike
        return read_out(model, model.stream(original, hook=hook), answers, metric)

    value = patched()  # nothing is patched

    def effects_of_node(name, key):
        n_pos, n_parts = by_part(patch_acts[key], name).shape[1:3]
        result = value.new_zeros(len(value), n_pos, n_parts)
        for pos, part in itertools.product(range(n_pos), range(n_parts)):
            place = (slice(None), pos, part) if name in PARTS_OF else (slice(None), pos)
            result[:, pos, part] = patched(key, place) - value
        return result

    return by_layer(model, nodes, effects_of_node)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 2 and 3: AtP and RelP. In short:
#
#     patch_acts = the nodes' activations in the patch run
#     acts, rho  = the nodes' activations in the original run, and the metric's gradient there; for RelP with rules on
#     score      = ((patch_acts - acts) * rho).sum(over the hidden dimension)


class Terms(NamedTuple):
    """What a node's scores are made of, each [batch, pos, ...]."""

    original: Tensor
    patch: Tensor
    rho: Tensor

    def products(self) -> Tensor:
        """(patch - original) * rho, still to be summed over the hidden dimension."""
        return difference(self.original, self.patch) * self.rho


def coefficients(
    model, tokens: Tensor, answers: Tensor, nodes, metric=logit_diff, lrp=False, replace=None
) -> tuple[dict, dict]:
    """The nodes' activations and their rho, both {(name, layer): [batch, pos, ...]}: one forward pass, one backward."""
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients are needed here, and torch.inference_mode() is on: leave it")
    stream, acts = record(model, tokens, nodes, lrp, grad=True, replace=replace)
    with torch.enable_grad():
        value = read_out(model, stream, answers, metric, lrp).sum()  # prompts do not mix: one backward is enough
    if not value.requires_grad:  # the rules let nothing through to these nodes, as the AH-rule does to q and k
        return acts, {key: torch.zeros_like(x) for key, x in acts.items()}
    return acts, dict(zip(acts, torch.autograd.grad(value, list(acts.values()), materialize_grads=True)))


def propagate(
    model, original: Tensor, patch: Tensor, answers: Tensor, keys, metric=logit_diff, lrp=False, steps=None
) -> dict[Key, Terms]:
    """The terms of the activations `keys`: two forward passes and one backward (with `steps`, see integrated()).

    Table 1's rules need the original run only. Rules that need the patch run too have a method two_runs(). It returns
    two sets of rules: the first is on in the patch run and takes notes; the second is on in the original run and reads
    them.
    """
    if steps is not None and lrp is not False:
        raise ValueError("Integrated Gradients averages plain gradients: give steps or lrp, not both")
    nodes = {name for name, _ in keys}
    patch_lrp = False
    if hasattr(lrp, "two_runs"):
        patch_lrp, lrp = lrp.two_runs()
    patch_stream, patch_acts = record(model, patch, nodes, patch_lrp)
    answers = targets(model, patch_stream, answers, metric)
    if patch_lrp is not False:
        with torch.no_grad():
            read_out(model, patch_stream, answers, metric, patch_lrp)  # for what the rules note in unembed()
    if steps is None:
        acts, rho = coefficients(model, original, answers, nodes, metric, lrp)
    else:
        _, acts = record(model, original, nodes)
        rho = {k: integrated(model, original, answers, k, acts[k], patch_acts[k], metric, steps) for k in keys}
    return {key: Terms(acts[key].detach(), patch_acts[key], rho[key]) for key in keys}


def attribute(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff, lrp=False, steps=None
) -> dict[str, Tensor]:
    """AtP (lrp=False, Eq. 2), RelP (lrp=True: the paper's rules, or a set of rules; Eq. 3), or IG (steps=10, say).

    original, patch [batch, pos] and answers [batch, 2] are token ids, nodes a list of names of nodes or of their parts
    (PARTS_OF), metric a function or a name of METRICS. Returns {name: [batch, layer, pos]}, for parts [batch, layer,
    pos, part], in float32 or better and in the metric's unit. AtP and RelP are two forward passes and one backward
    pass, without a gradient of any weight.
    ValueError if the arguments do not fit.
    """
    check(model, original, patch, answers, nodes, metric)
    keys = {(node_of(name), layer) for name in nodes for layer in range(model.config.n_layers)}
    terms = propagate(model, original, patch, answers, keys, metric, lrp, steps)
    return by_layer(model, nodes, lambda name, key: by_part(terms[key].products(), name).sum(-1))


def integrated(
    model, tokens: Tensor, answers: Tensor, key: Key, original: Tensor, patch: Tensor, metric, steps: int
) -> Tensor:
    """rho of Integrated Gradients [21] for one activation: its gradient averaged from `original` to `patch`.

    The activation takes the values original + k/steps (patch - original), k = 0 .. steps - 1 (the quadrature of Marks
    et al. [44]); the rest of the run uses the original prompt. The price is `steps` forward and backward passes for
    every node and layer. Unlike in AP, all positions move together.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps!r}")
    total = torch.zeros_like(original)
    for k in range(steps):
        moved = {key: torch.lerp(original, patch, k / steps)}
        total += coefficients(model, tokens, answers, (key[0],), metric, replace=moved)[1][key]
    return total / steps


# ---------------------------------------------------------------------------------------------------------------------
# Features: a sparse autoencoder (SAE) writes an activation as x = sum_i f_i W_dec[i] + b_dec + error, and so the score
# of a node is the sum of its features' scores and the error's


def attribute_features(
    model, original: Tensor, patch: Tensor, answers: Tensor, saes: dict, metric=logit_diff, lrp=False, steps=None
) -> dict[Key, Tensor]:
    """The score of every feature and, last, of the error: {(name, layer): [batch, pos, n_features + 1]}.

    saes: {(name, layer): an SAE of the model's dtype}, anything with encode(x [..., d]) -> features [..., n_features]
    and a tensor W_dec [n_features, d]. The scores of one node add up to attribute()'s, and cost the same passes.
    """
    check(model, original, patch, answers, {name for name, _ in saes}, metric, keys=saes)
    return divide(propagate(model, original, patch, answers, saes, metric, lrp, steps), saes)


@torch.no_grad()
def divide(terms: dict[Key, Terms], saes: dict) -> dict[Key, Tensor]:
    """Each node's scores divided among the features of its SAE and the error. `saes` may be of some of the nodes only.

    score(f_i) = (f_i(x_patch) - f_i(x_original)) (W_dec[i] . rho)
    score(error) = (error(x_patch) - error(x_original)) . rho
    """
    scores = {}
    for key, sae in saes.items():
        of_node = Terms(*(x.flatten(2) for x in terms[key]))
        where = (of_node.original != of_node.patch).any(-1) & (of_node.rho != 0).any(-1)  # elsewhere the scores are 0
        of_node = Terms(*(x[where] for x in of_node))
        moves = difference(sae.encode(of_node.original), sae.encode(of_node.patch))
        features = moves * (of_node.rho @ sae.W_dec.T)
        error = of_node.products().sum(-1) - features.sum(-1)  # what is left of the node's score
        of_units = torch.cat([features, error.unsqueeze(-1)], dim=-1)
        scores[key] = of_units.new_zeros(*where.shape, of_units.shape[-1])
        scores[key][where] = of_units
    return scores


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 1 again, much faster: AP by resumed runs


@dataclass
class OriginalRun:
    """The original run, recorded so that edited runs can be resumed from it.

    acts  {(name, layer): [batch, pos, ...]}: resid_pre, k and v of every layer, and whatever else was asked for. The
          stream after the last block is the resid_pre of layer n_layers.
    """

    model: object
    answers: Tensor
    metric: str | Callable
    value: Tensor  # the metric [batch]
    acts: dict[Key, Tensor]
    n_layers: int
    n_pos: int


@dataclass
class Edit:
    """What AP writes into the original run: at `node` of `layer`, one edited run for each True in `cells`.

    cells   bool [batch, pos, part]
    new     new(prompts [n], pos, parts [n]) -> [n, 1, ...]: the node's activation at position pos in n edited runs
    to_end  True: new() returns it at all positions from pos on, [n, n_pos - pos, ...], and one run edits them together
    """

    node: str
    layer: int
    cells: Tensor
    new: Callable
    to_end: bool = False

    @property
    def entry(self) -> int:
        """The first layer that an edited run goes through as a whole: resid_pre is edited before its layer.

        Other nodes are edited within their layer, which edited_stream() computes.
        """
        return self.layer if self.node == "resid_pre" else self.layer + 1


def activation_patching(
    model,
    original: Tensor,
    patch: Tensor,
    answers: Tensor,
    nodes,
    metric=logit_diff,
    cells: dict | None = None,
    rows: int = 32,
    pieces: dict | None = None,
    progress: Callable | None = None,
    lockstep: bool = False,
) -> dict[str, Tensor]:
    """AP (Eq. 1), exact: one (layer, position) of a node, or of a part of it, from the patch run into the original run.

    Arguments and result as in attribute(). cells, {node: bool}, shaped like the result or like one prompt's: patch
    these only, and return 0 elsewhere. rows, pieces, progress and lockstep are those of effects(); a model that has no
    method `block` does without them.
    """
    check(model, original, patch, answers, nodes, metric)
    for name in nodes if cells is not None else ():
        if name not in cells or cells[name].dtype != torch.bool:
            raise ValueError(f"cells must have a bool tensor for every node, and has none for {name!r}")
    if not hasattr(model, "block"):
        scores = patch_one_by_one(model, original, patch, answers, nodes, metric)
        return scores if cells is None else {name: scores[name].where(cells[name], 0) for name in nodes}
    patch_stream, patch_acts = record(model, patch, nodes)
    run = record_original(model, original, targets(model, patch_stream, answers, metric), nodes, metric)

    def edit(name, layer):
        key = node_of(name), layer
        x_original, x_patch = run.acts[key], patch_acts[key]
        chosen = changed(x_original, x_patch, name)
        if cells is not None:
            of_node = cells[name] if name in PARTS_OF else cells[name].unsqueeze(-1)
            chosen = chosen & of_node.select(-3, layer)

        def new(prompts, pos, parts):
            if name not in PARTS_OF:
                return x_patch[prompts, pos : pos + 1]
            x = x_original[prompts, pos : pos + 1]  # a copy, in which the other parts stay
            x[range(len(x)), 0, parts] = x_patch[prompts, pos, parts]
            return x

        return Edit(*key, chosen, new)

    edits = {(name, layer): edit(name, layer) for name in nodes for layer in range(run.n_layers)}
    result = effects(run, edits, rows, pieces, progress, lockstep)
    return by_layer(model, nodes, lambda name, key: result[name, key[1]])


@torch.no_grad()
def patch_features(
    model, original: Tensor, patch: Tensor, answers: Tensor, saes: dict, metric=logit_diff, rows: int = 32
) -> dict[Key, Tensor]:
    """AP of single features, exact: at one position feature i, or the error, is given its value in the patch run.

        node <- node(x_original) + (f_i(x_patch) - f_i(x_original)) W_dec[i]

    Arguments and result as in attribute_features(). One run per feature that differs: for small models.
    """
    nodes = {name for name, _ in saes}
    check(model, original, patch, answers, nodes, metric, keys=saes)
    patch_stream, patch_acts = record(model, patch, nodes)
    run = record_original(model, original, targets(model, patch_stream, answers, metric), nodes, metric)

    def edit(key, sae):
        x, x_original, x_patch = run.acts[key], run.acts[key].flatten(2), patch_acts[key].flatten(2)
        moves = difference(sae.encode(x_original), sae.encode(x_patch)).to(x.dtype)  # of the features
        error_moves = difference(x_original, x_patch).to(x.dtype) - moves @ sae.W_dec  # b_dec cancels
        cells = torch.cat([moves != 0, (error_moves != 0).any(-1, keepdim=True)], dim=-1)  # the error is the last unit
        moves, directions = pad(moves, (0, 1)), pad(sae.W_dec, (0, 0, 0, 1))

        def new(prompts, pos, parts):
            move = moves[prompts, pos, parts, None] * directions[parts]
            move = torch.where((parts == len(sae.W_dec))[:, None], error_moves[prompts, pos], move)
            return x[prompts, pos : pos + 1] + move.view(-1, 1, *x.shape[2:])

        return Edit(*key, cells, new)

    return effects(run, {key: edit(key, sae) for key, sae in saes.items()}, rows)


@torch.no_grad()
def record_original(model, tokens: Tensor, answers: Tensor, nodes, metric) -> OriginalRun:
    """The original run with these nodes. ValueError if the model's block() cannot resume it."""
    if not hasattr(model, "block"):
        raise ValueError(
            "this model has no method `block`, and its runs cannot be resumed: see what relp.py asks of it"
        )
    final, acts = record(model, tokens, {"resid_pre", "k", "v", *nodes})
    n_layers, n_pos = model.config.n_layers, tokens.shape[1]
    acts["resid_pre", n_layers] = final
    run = OriginalRun(model, answers, metric, read_out(model, final, answers, metric), acts, n_layers, n_pos)
    # a trial: the first prompt from the middle on, and nothing edited
    first, middle = torch.zeros(1, dtype=torch.long, device=tokens.device), n_pos // 2
    x = acts["resid_pre", 0][first, middle:]
    for layer in range(n_layers):
        x = resume(run, layer, x, first, middle, last=layer == n_layers - 1)
    off, size = (x[:, -1] - final[first, -1]).abs().max(), final[first, -1].abs().max()
    if off > size * torch.finfo(final.dtype).eps ** 0.5:
        raise ValueError(
            f"this model's block() does not resume a run: its final stream is off by {off:.3g}. See what relp.py asks "
            "of it, or do without it: AP then makes one whole pass per node, layer and position"
        )
    return run


def effects(
    run: OriginalRun,
    edits: dict[tuple, Edit],
    rows: int = 32,
    pieces: dict | None = None,
    progress: Callable | None = None,
    lockstep: bool = False,
) -> dict[tuple, Tensor]:
    """{label: [batch, pos, part]}: metric(edited run) - metric(original run) for edits {label: Edit}; 0 outside cells.

    An edit at (layer, pos) changes nothing before that layer and, attention being causal, nothing before that position.
    So an edited run is the original run *resumed*. Here resid_pre is edited at layer 1, position 2:

        position       0  1  2  3
        final stream   .  .  .  R
        layer 2        k  k  C  C
        layer 1        k  k  E  C
        layer 0        .  .  o  o

        E  the edit    C  computed in the edited run    R  read out: only the last position counts
        k  the original run's keys and values, which attention in C reads    o  the original run's stream

    Another node is edited within its layer, and changes only its own position there; k and v change the later ones too.

    rows      how many edited runs go through a block together (more as they get shorter, up to 16 times as many: each
              has a copy of all keys and values)
    pieces    a mapping {pos: {label: effects}} in which finished positions are kept and from which they are taken, so
              that a long run can go on where it was stopped: with the same arguments
    progress  progress(fraction) is called as the work proceeds
    lockstep  run all cells, changed or not: processes that share weights must make the same calls
    """
    if not edits:
        return {}
    pieces = {} if pieces is None else pieces
    if progress:
        counts = [sum(int(to_run(run, e, pos, lockstep).sum()) for e in edits.values()) for pos in range(run.n_pos)]
        work = torch.tensor(counts) * torch.arange(run.n_pos, 0, -1)  # a resumed run computes the positions from pos on
    for pos in range(run.n_pos):
        if pos not in pieces:
            length = max(run.n_pos - pos, run.n_pos // 16)
            pieces[pos] = effects_at(run, edits, pos, max(1, rows * run.n_pos // length), lockstep)
        if progress:
            progress(int(work[: pos + 1].sum()) / max(1, int(work.sum())))
    return {label: torch.stack([pieces[pos][label] for pos in range(run.n_pos)], dim=1) for label in edits}


def to_run(run: OriginalRun, edit: Edit, pos: int, lockstep: bool) -> Tensor:
    """Which of an edit's cells at one position need a run: bool [batch, part]."""
    # The last position is read out, and another one reaches it through attention only: in the last layer by an edit of
    # k, of v, or of resid_pre, which enters this layer. An edit with to_end contains it.
    reaches = edit.to_end or edit.node in ("k", "v")
    matters = edit.entry < run.n_layers or pos == run.n_pos - 1 or reaches
    return (edit.cells[:, pos] | lockstep) & matters


@torch.no_grad()
def effects_at(run: OriginalRun, edits: dict[tuple, Edit], pos: int, rows: int, lockstep: bool) -> dict[tuple, Tensor]:
    """{label: [batch, part]}: the effects of all edits at one position, `rows` edited runs at a time."""
    labels = sorted(edits, key=lambda label: edits[label].entry)
    in_order = [edits[label] for label in labels]
    # one row (edit, prompt, part) for each edited run; edit is a number in this order
    places = [to_run(run, edit, pos, lockstep).nonzero() for edit in in_order]
    jobs = torch.cat([pad(place, (1, 0), value=i) for i, place in enumerate(places)])
    effect = run.value.new_zeros(len(jobs))
    for start in range(0, len(jobs), rows):
        effect[start : start + rows] = run_jobs(run, in_order, jobs[start : start + rows], pos)
    result = {}
    for i, label in enumerate(labels):
        mine, cells = jobs[:, 0] == i, edits[label].cells[:, pos]
        result[label] = run.value.new_zeros(cells.shape)
        result[label][jobs[mine, 1], jobs[mine, 2]] = effect[mine]
        result[label] = result[label].where(cells, 0)  # lockstep runs others too
    return result


def run_jobs(run: OriginalRun, edits: list[Edit], jobs: Tensor, pos: int) -> Tensor:
    """The effects [n] of edited runs, given as rows (edit, prompt, part) in the order of the layers that they enter.

    They go through the layers together: those that enter a later layer join there.
    """
    numbers, prompts, _ = jobs.unbind(1)
    present = numbers.unique().tolist()
    x = None  # the streams of those that have joined
    for layer in range(edits[present[0]].entry, run.n_layers + 1):
        for i in present:
            if edits[i].entry == layer:
                _, its_prompts, its_parts = jobs[numbers == i].unbind(1)
                stream = edited_stream(run, edits[i], pos, its_prompts, its_parts)
                x = stream if x is None else torch.cat([x, stream])
        if layer < run.n_layers:
            x = resume(run, layer, x, prompts[: len(x)], pos, last=layer == run.n_layers - 1)
    return read_out(run.model, x, run.answers[prompts], run.metric) - run.value[prompts]


def edited_stream(run: OriginalRun, edit: Edit, pos: int, prompts: Tensor, parts: Tensor) -> Tensor:
    """The streams of edited runs before the layer that they enter: [n, positions from pos on, d_model].

    After the last layer it is the last position only, which is all that counts there.
    """
    new, stream = edit.new(prompts, pos, parts), run.acts["resid_pre", edit.layer][prompts, pos:]
    edited = new.shape[1]  # positions
    assert edited == (run.n_pos - pos if edit.to_end else 1)
    last = edit.entry == run.n_layers
    if edit.node in ("k", "v"):  # a key or value changes all later positions of its layer
        x = resume(run, edit.layer, stream, prompts, pos, last=last, node=edit.node, new=new)
    elif edit.node == "resid_pre":
        x = torch.cat([new, stream[:, edited:]], dim=1)
    else:  # others change their own positions only
        own = resume(run, edit.layer, stream[:, :edited], prompts, pos, node=edit.node, new=new)
        x = torch.cat([own, run.acts["resid_pre", edit.entry][prompts, pos + edited :]], dim=1)
    return x[:, -1:] if last else x


def resume(
    run: OriginalRun, layer: int, x: Tensor, prompts: Tensor, pos: int, last=False, node=None, new=None
) -> Tensor:
    """One block on the streams x [n, positions from pos on, d_model], which are runs of these prompts.

    If a node of this layer is named, its activation at the m positions from pos on is `new` [n, m, ...].
    """

    def hook(name, _, y):
        if name in ("k", "v"):
            past_and_y = run.acts[name, layer].index_select(0, prompts)[:, : pos + y.shape[1]]  # a copy
            past_and_y[:, pos:] = y
            if name == node:
                past_and_y[:, pos : pos + new.shape[1]] = new
            return past_and_y
        # a recorded pattern has all keys, this run those up to pos
        return new[..., : y.shape[-1]] if name == node else y

    # if the original run has shown its pattern, this one does too, so that both round alike
    hook.nodes = {"k", "v"} | {node} | ({"pattern"} if ("pattern", layer) in run.acts else set())
    return run.model.block(layer, x, hook=hook, start=pos, last=last)


# ---------------------------------------------------------------------------------------------------------------------
# Circuits (Section 5.2). Units are features and errors, each at a position. A circuit {(name, layer): bool [pos,
# n_features + 1]} says which units are left as they are while all others are held at their means: usually those
# whose mean score is larger in size than a threshold.


class Neurons:
    """A node's own dimensions in the place of an SAE's features: f = x, W_dec [d, d] the identity, and so no error."""

    def __init__(self, W_dec: Tensor):
        self.W_dec = W_dec

    def encode(self, x: Tensor) -> Tensor:
        return x


@torch.no_grad()
def unit_means(model, tokens: Tensor, saes: dict) -> dict[Key, tuple[Tensor, Tensor]]:
    """Means over tokens [batch, pos]: {(name, layer): (features [pos, n_features], rest [pos, d])}.

    The rest of x is x - sum_i f_i W_dec[i]: its mean is that of the error, plus b_dec, which is constant.
    """
    _, acts = record(model, tokens, {name for name, _ in saes})
    means = {}
    for key, sae in saes.items():
        x = acts[key].flatten(2)
        features = sae.encode(x)
        means[key] = features.mean(0), (x - features @ sae.W_dec).mean(0)
    return means


@torch.no_grad()
def run_circuit(
    model, tokens: Tensor, answers: Tensor, saes: dict, means: dict, circuit: dict, metric=logit_diff
) -> Tensor:
    """The metric [batch] of the run in which all units of `saes` outside the circuit are held at their means.

        x <- sum_i g_i W_dec[i] + rest

        g_i    f_i(x) if feature i is in the circuit, else its mean
        rest   x - sum_i f_i(x) W_dec[i] if the error is in the circuit, else its mean

    x is what this run has computed, so that nodes ablated before have their effect.
    """

    def hook(name, layer, x):
        key = name, layer
        if key not in saes:
            return x
        sae, (mean_f, mean_rest), flat = saes[key], means[key], x.flatten(2)
        f, feature_kept, error_kept = sae.encode(flat), circuit[key][:, :-1], circuit[key][:, -1:]
        g = torch.where(feature_kept, f, mean_f)
        # with the error in the circuit x + sum_i (g_i - f_i) W_dec[i], which is exactly x if all features are kept
        x_new = torch.where(error_kept, flat, mean_rest) + torch.where(error_kept, g - f, g) @ sae.W_dec
        return x_new.view_as(x)

    hook.nodes = {name for name, _ in saes}
    return read_out(model, model.stream(tokens, hook=hook), answers, metric)


def faithfulness(of_circuit: Tensor, of_full: Tensor, of_empty: Tensor) -> Tensor:
    """(L(C) - L(empty)) / (L(M) - L(empty)) from the metric [..., batch] of the three runs; L is its mean over prompts.

    With L(M without C) in the place of L(C), it is the completeness of C.
    """
    return (of_circuit.mean(-1) - of_empty.mean(-1)) / (of_full.mean(-1) - of_empty.mean(-1))


# ---------------------------------------------------------------------------------------------------------------------
# The two runs side by side, Pearson's correlation (PCC), and the check of arguments


def compare(
    model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric=logit_diff
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The metric [batch] of the original and of the patch run; {node: [batch, layer, pos]}, True where they differ."""
    check(model, original, patch, answers, nodes, metric)
    stream, acts = record(model, original, nodes)
    patch_stream, patch_acts = record(model, patch, nodes)
    answers = targets(model, patch_stream, answers, metric)
    value, patch_value = (read_out(model, x, answers, metric) for x in (stream, patch_stream))
    return value, patch_value, by_layer(model, nodes, lambda name, key: changed(acts[key], patch_acts[key], name))


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson correlation of all elements of two tensors of one shape, in float64.

    NaN if one of them is constant: if its spread is less than a millionth of its size.
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {list(a.shape)} and {list(b.shape)}")
    a, b = a.double().flatten(), b.double().flatten()
    sizes = a.norm(), b.norm()
    a, b = a - a.mean(), b - b.mean()
    constant = any(x.norm() <= 1e-6 * size for x, size in zip((a, b), sizes))
    return float("nan") if constant else float(a @ b / (a.norm() * b.norm()))


def check(model, original: Tensor, patch: Tensor, answers: Tensor, nodes, metric, keys=()) -> None:
    """ValueError if the arguments do not fit. keys: those of SAEs."""
    for what, tokens in (("original", original), ("patch", patch), ("answers", answers)):
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            got = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"{what} must be a tensor of token ids with two axes, [batch, ...], got {got}")
    if original.shape != patch.shape:
        raise ValueError(f"original and patch must have one shape, got {list(original.shape)} and {list(patch.shape)}")
    if answers.shape != (len(original), 2):
        raise ValueError(f"answers must have the shape [{len(original)}, 2], got {list(answers.shape)}")
    if not original.numel():
        raise ValueError(f"there must be a prompt of one token at least, got {list(original.shape)}")
    if int(answers.min()) < 0:
        raise ValueError(f"answers must be token ids from 0 on, got {int(answers.min())}")
    if not callable(metric) and (not isinstance(metric, str) or metric not in METRICS):
        raise ValueError(f"metric must be a function or one of {', '.join(METRICS)}, got {metric!r}")
    if isinstance(nodes, str) or not isinstance(nodes, Collection):
        raise ValueError(f"nodes must be a list of names, such as ['resid_pre'], got {nodes!r}")
    if unknown := [name for name in nodes if node_of(name) not in model.nodes]:
        parts = [name for name, node in PARTS_OF.items() if node in model.nodes]
        raise ValueError(f"unknown node {unknown[0]!r}: this model has {', '.join((*model.nodes, *parts))}")
    for name, layer in keys:
        if name in PARTS_OF or layer not in range(model.config.n_layers):
            raise ValueError(
                f"an SAE is of a whole node in one of {model.config.n_layers} layers, not of {name, layer}"
            )
