"""Activation patching (AP), attribution patching (AtP) and relevance patching (RelP), in plain PyTorch.

Which parts of a model make it say one thing (on the original prompt) rather than another (on the patch prompt)?
AP answers by intervention: it writes a node's activation from the patch run into the original run and looks at what
that does to a metric,

    c(node) = metric(original run | node <- node(x_patch)) - metric(original run)                           (Eq. 1)

one run per node, layer and position. AtP and RelP predict the same numbers all at once, from two forward passes and one
backward pass:

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
    x_original, x_patch         original, patch: token ids [batch, pos], all of one length, without padding
    M, do(n <- n(x_patch))      model, hook
    L                           metric(logits [batch, vocab], targets [batch, ...]) -> [batch]
    n(x)                        an activation: [batch, pos, part, hidden], see record()
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

The AP of this file is Eq. 1 as it stands. support/resume.py has the same function, many times faster.

No package but torch is imported.
"""

import itertools

import torch
from torch import Tensor

Key = tuple[str, int]  # of an activation: (name of the node, layer)

# ---------------------------------------------------------------------------------------------------------------------
# Metrics: logits [batch, vocab] at the last position and targets, one row per prompt -> [batch]. For the first three
# metrics the targets are token ids [batch, 2]: the original's answer, the patch's answer. Or two sets of answers,
# [batch, 2, n], padded with -1: what counts is the mean of each set.


def logit_diff(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of the original's answer minus logit of the patch's answer."""
    if targets.ndim == 2:
        of_original, of_patch = logits.gather(-1, targets).unbind(-1)
        return of_original - of_patch
    there = targets >= 0  # of sets of answers
    each = logits.gather(-1, targets.clamp(min=0).flatten(1)).view(targets.shape)
    of_original, of_patch = (each.where(there, 0).sum(-1) / there.sum(-1)).unbind(-1)
    return of_original - of_patch


def prob_diff(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability of the original's answer minus probability of the patch's answer."""
    return logit_diff(logits.softmax(-1), targets)


def logprob_diff(logits: Tensor, targets: Tensor) -> Tensor:
    """Difference of the two log-probabilities. The normaliser cancels, so it equals logit_diff up to rounding."""
    return logit_diff(logits.log_softmax(-1), targets)


def kl(logits: Tensor, targets: Tensor) -> Tensor:
    """KL(patch run || this run) of the whole next-token distributions, in nats: how far this run is from the patch run.

    The targets are the patch run's logits [batch, vocab]: model(patch)[:, -1]. In the patch run KL is 0. So here too, a
    node that carries the original answer has a negative score.
    """
    log_p, log_q = targets.log_softmax(-1), logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


METRICS = {"logit_diff": logit_diff, "prob_diff": prob_diff, "logprob_diff": logprob_diff, "kl": kl}


def read_out(model, stream: Tensor, targets: Tensor, metric=logit_diff, lrp=False) -> Tensor:
    """The metric [batch] at the last position of the final residual stream [batch, pos, d_model].

    metric: a function, or a name of METRICS.
    """
    metric = METRICS[metric] if isinstance(metric, str) else metric
    columns = None
    if metric is logit_diff:  # it needs the answers' logits only, not those of the whole vocabulary
        columns, numbers = targets.clamp(min=0).unique(return_inverse=True)
        targets = numbers.where(targets >= 0, -1)
    logits = model.unembed(stream[:, -1], lrp, columns)
    value = metric(logits, targets)
    if value.shape != logits.shape[:1]:
        raise ValueError(f"metric must return one number per prompt, {list(logits.shape[:1])}, got {list(value.shape)}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Nodes

# Parts of a node that have a score of their own: {part: the node}. Attention heads are parts of z, and their inputs
# parts of q, k, v (k and v: one per key-value head) and the pattern; neurons are parts of the MLP's hidden layer.
PARTS_OF = {"head": "z", "head_q": "q", "head_k": "k", "head_v": "v", "head_pattern": "pattern", "neuron": "mlp_hidden"}


def node_of(name: str) -> str:
    """The node whose activation is recorded or written for `name`: itself, or the one that it is a part of."""
    return PARTS_OF.get(name, name)


def by_part(x: Tensor, name: str) -> Tensor:
    """The one shape of this file: an activation [batch, pos, ...] as [batch, pos, part, hidden].

    Parts lie along the axis after pos. A name that is no part is its own single part.
    """
    return x.reshape(*x.shape[:2], x.shape[2] if name in PARTS_OF else 1, -1)


def record(model, tokens: Tensor, names, lrp=False, grad: bool = False) -> tuple[Tensor, dict[Key, Tensor]]:
    """One forward pass: the final residual stream, and the activations {(name, layer): [batch, pos, part, hidden]}.

    With grad, autograd can reach every one of them although no weight asks for a gradient.
    """
    acts = {}

    def hook(node, layer, x):
        # Nothing before this node is recorded, or the AH-rule has cut the graph: the graph begins here.
        if grad and not x.requires_grad:
            x = x.detach().requires_grad_()
        for name in names:
            if node_of(name) == node:
                acts[name, layer] = by_part(x, name)
                x = acts[name, layer].view_as(x)  # the pass goes on from what is recorded
        return x

    hook.nodes = {node_of(name) for name in names}
    with torch.set_grad_enabled(grad):
        return model.stream(tokens, lrp, hook), acts


def by_node(scores: dict[Key, Tensor], names) -> dict[str, Tensor]:
    """{(name, layer): [batch, pos, part]} -> {name: [batch, layer, pos]}, and for parts [batch, layer, pos, part]."""
    result = {}
    for name in names:
        layers = torch.stack([score for (other, _), score in scores.items() if other == name], dim=1)
        result[name] = layers if name in PARTS_OF else layers.squeeze(-1)
    return result


def difference(original: Tensor, patch: Tensor) -> Tensor:
    """node(x_patch) - node(x_original), in float32 or better."""
    dtype = torch.promote_types(original.dtype, torch.float32)
    return patch.to(dtype) - original.to(dtype)


def check(model, original: Tensor, patch: Tensor, targets: Tensor, names) -> None:
    """ValueError if the arguments do not fit."""
    if original.ndim != 2 or original.shape != patch.shape:
        shapes = f"{list(original.shape)} and {list(patch.shape)}"
        raise ValueError(f"original and patch must be token ids of one shape [batch, pos], got {shapes}")
    if len(targets) != len(original):
        raise ValueError(f"targets must have one row per prompt, {len(original)}, got {list(targets.shape)}")
    known = [*model.nodes, *(part for part, node in PARTS_OF.items() if node in model.nodes)]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown node {name!r}: this model has {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 1: AP


@torch.no_grad()
def activation_patching(
    model, original: Tensor, patch: Tensor, targets: Tensor, nodes, metric=logit_diff
) -> dict[str, Tensor]:
    """AP as Eq. 1 defines it: a whole forward pass for every node, layer, position and part. Exact, and slow.

    Arguments and result as in attribute().
    """
    check(model, original, patch, targets, nodes)
    _, patch_acts = record(model, patch, nodes)

    def metric_of_run(name=None, at_layer=0, pos=0, part=0):
        """The metric of the original run in which this activation has its value from the patch run, if it is named."""

        def hook(node, layer, x):
            if name is not None and (node, layer) == (node_of(name), at_layer):
                edited = by_part(x, name).clone()
                edited[:, pos, part] = patch_acts[name, layer][:, pos, part]
                x = edited.view_as(x)
            return x

        hook.nodes = {node_of(name) for name in nodes}  # the same in every run, so that all compute alike
        return read_out(model, model.stream(original, hook=hook), targets, metric)

    value, effects = metric_of_run(), {}
    for (name, layer), activation in patch_acts.items():
        effects[name, layer] = value.new_zeros(activation.shape[:3])
        for pos, part in itertools.product(range(activation.shape[1]), range(activation.shape[2])):
            effects[name, layer][:, pos, part] = metric_of_run(name, layer, pos, part) - value
    return by_node(effects, nodes)


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 2 and 3: AtP and RelP


def attribute(
    model, original: Tensor, patch: Tensor, targets: Tensor, nodes, metric=logit_diff, lrp=False, steps=None
) -> dict[str, Tensor]:
    """AtP (lrp=False, Eq. 2), RelP (lrp=True: the paper's rules, or a set of rules; Eq. 3), or IG (steps=10, say).

    original, patch [batch, pos] are token ids of one length, targets one row per prompt: the answers' token ids [batch,
    2], or whatever the metric compares with. nodes is a list of names of nodes or of their parts (PARTS_OF), metric a
    function or a name of METRICS. Returns {name: [batch, layer, pos]}, for parts [batch, layer, pos, part], in float32
    or better and in the metric's unit. ValueError if the arguments do not fit.
    """
    acts, patch_acts, rho = activations_and_rho(model, original, patch, targets, nodes, metric, lrp, steps)
    scores = {key: (difference(acts[key], patch_acts[key]) * rho[key]).sum(-1) for key in rho}
    return by_node(scores, nodes)


@torch.enable_grad()
def activations_and_rho(
    model, original: Tensor, patch: Tensor, targets: Tensor, nodes, metric=logit_diff, lrp=False, steps=None
) -> tuple[dict[Key, Tensor], dict[Key, Tensor], dict[Key, Tensor]]:
    """The activations of the original run and of the patch run, and rho: {(name, layer): [batch, pos, part, hidden]}.

    Two forward passes and one backward pass (IG: more), without a gradient of any weight. Arguments as in attribute().
    """
    check(model, original, patch, targets, nodes)
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients are needed here, and torch.inference_mode() is on: leave it")
    if steps is not None and lrp is not False:
        raise ValueError("Integrated Gradients averages plain gradients: give steps or lrp, not both")
    _, patch_acts = record(model, patch, nodes)
    stream, acts = record(model, original, nodes, lrp, grad=True)
    if steps is None:
        value = read_out(model, stream, targets, metric, lrp)
        rho = coefficients(value, acts)
    else:
        rho = integrated_gradients(model, original, acts, patch_acts, targets, metric, steps)
    return {key: x.detach() for key, x in acts.items()}, patch_acts, rho


def coefficients(value: Tensor, acts: dict[Key, Tensor]) -> dict[Key, Tensor]:
    """rho of recorded activations: the gradient of the metric [batch] there. Prompts do not mix: one backward pass."""
    if not value.requires_grad:  # the rules let nothing through to these nodes, as the AH-rule does to q and k
        return {key: torch.zeros_like(x) for key, x in acts.items()}
    return dict(zip(acts, torch.autograd.grad(value.sum(), list(acts.values()), materialize_grads=True)))


def integrated_gradients(
    model, original: Tensor, acts: dict, patch_acts: dict, targets: Tensor, metric, steps: int
) -> dict[Key, Tensor]:
    """rho of Integrated Gradients [21]: a node's gradient averaged from its original to its patch activation.

    The activation takes the values original + k/steps (patch - original), k = 0 .. steps - 1 (the quadrature of Marks
    et al. [44]); the rest of the run uses the original prompt. The price is `steps` forward and backward passes for
    every node and layer. Unlike in AP, all positions move together.
    """
    if steps < 1:
        raise ValueError(f"steps must be a whole number from 1 on, got {steps}")
    rho = {}
    for key in acts:
        rho[key] = torch.zeros_like(acts[key])
        for k in range(steps):
            moved = torch.lerp(acts[key].detach(), patch_acts[key], k / steps).requires_grad_()

            def hook(node, layer, x, key=key, moved=moved):
                return moved.view_as(x) if layer == key[1] else x

            hook.nodes = {node_of(key[0])}
            value = read_out(model, model.stream(original, hook=hook), targets, metric)
            rho[key] += coefficients(value, {key: moved})[key] / steps
    return rho


# ---------------------------------------------------------------------------------------------------------------------
# Features: a sparse autoencoder (SAE) writes an activation as x = sum_i f_i W_dec[i] + b_dec + error, and so the score
# of a node is the sum of its features' scores and the error's


def attribute_features(
    model, original: Tensor, patch: Tensor, targets: Tensor, saes: dict, metric=logit_diff, lrp=False, steps=None
) -> dict[Key, Tensor]:
    """The score of every feature and, last, of the error: {(name, layer): [batch, pos, n_features + 1]}.

    saes: {(name, layer): an SAE of the model's dtype}, anything with encode(x [..., d]) -> features [..., n_features]
    and a tensor W_dec [n_features, d]. The scores of one node add up to attribute()'s, and cost the same passes.
    """
    nodes = {name for name, _ in saes}
    return divide(*activations_and_rho(model, original, patch, targets, nodes, metric, lrp, steps), saes)


@torch.no_grad()
def divide(acts: dict, patch_acts: dict, rho: dict, saes: dict) -> dict[Key, Tensor]:
    """Each node's score divided among the features of its SAE and the error. `saes` may be of some of the nodes only.

    score(f_i) = (f_i(x_patch) - f_i(x_original)) (W_dec[i] . rho)
    score(error) = (error(x_patch) - error(x_original)) . rho
    """
    scores = {}
    for key, sae in saes.items():
        original, patch, rho_of_node = (x[key].squeeze(2) for x in (acts, patch_acts, rho))  # [batch, pos, d]
        where = (original != patch).any(-1) & (rho_of_node != 0).any(-1)  # elsewhere the scores are 0
        original, patch, rho_of_node = original[where], patch[where], rho_of_node[where]
        moves = difference(sae.encode(original), sae.encode(patch))
        of_features = moves * (rho_of_node @ sae.W_dec.T)
        of_node = (difference(original, patch) * rho_of_node).sum(-1, keepdim=True)
        of_error = of_node - of_features.sum(-1, keepdim=True)  # what is left of the node's score
        of_units = torch.cat([of_features, of_error], dim=-1)
        scores[key] = of_units.new_zeros(*where.shape, of_units.shape[-1])
        scores[key][where] = of_units
    return scores


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
        x = acts[key].squeeze(2)
        features = sae.encode(x)
        means[key] = features.mean(0), (x - features @ sae.W_dec).mean(0)
    return means


@torch.no_grad()
def run_circuit(
    model, tokens: Tensor, targets: Tensor, saes: dict, means: dict, circuit: dict, metric=logit_diff
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
    return read_out(model, model.stream(tokens, hook=hook), targets, metric)


def faithfulness(of_circuit: Tensor, of_full: Tensor, of_empty: Tensor) -> Tensor:
    """(L(C) - L(empty)) / (L(M) - L(empty)) from the metric [..., batch] of the three runs; L is its mean over prompts.

    With L(M without C) in the place of L(C), it is the completeness of C.
    """
    return (of_circuit.mean(-1) - of_empty.mean(-1)) / (of_full.mean(-1) - of_empty.mean(-1))


# ---------------------------------------------------------------------------------------------------------------------
# How well one method's scores predict another's


def pearson(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation (PCC) of all elements of two tensors of one shape, in float64.

    NaN if one of them is constant: if its spread is less than a millionth of its size.
    """
    a, b = a.double().flatten(), b.double().flatten()
    sizes = a.norm(), b.norm()
    a, b = a - a.mean(), b - b.mean()
    constant = any(x.norm() <= 1e-6 * size for x, size in zip((a, b), sizes))
    return float("nan") if constant else float(a @ b / (a.norm() * b.norm()))
