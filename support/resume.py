"""AP (Eq. 1) by resumed runs: the same numbers as relp.activation_patching, many times faster.

An edit at (layer, pos) changes nothing before that layer and, attention being causal, nothing before that position. So
an edited run is the original run *resumed*. Here resid_pre is edited at layer 1, position 2:

    position       0  1  2  3
    final stream   .  .  .  R
    layer 2        k  k  C  C
    layer 1        k  k  E  C
    layer 0        .  .  o  o

    E  the edit    C  computed in the edited run    R  read out: only the last position counts
    k  the original run's keys and values, which attention in C reads    o  the original run's stream

Another node is edited within its layer, and changes only its own position there; k and v change the later ones too.

What a model must offer besides what relp.py asks for. models.Transformer does:

    block(layer, x, hook=None, start=0, last=False)
                    one layer of a causal model whose nodes are resid_pre, k, v and others. x holds the positions from
                    `start` on. At "k" and "v" the hook is given the keys and values of these positions, and returns
                    them with those of the positions 0 to start - 1 in front. With last=True, only the last position
                    need be returned.

This file imports relp and torch only: it can be copied along with relp.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

import relp
from relp import PARTS_OF, Key

RECORDED_AS = {node: part for part, node in PARTS_OF.items()}  # these nodes are recorded part by part


def recorded_as(name: str) -> str:
    """The name under which a node's activation is recorded: with its parts, if it has any. head and z share one."""
    return RECORDED_AS.get(relp.node_of(name), name)


@torch.no_grad()
def activation_patching(
    model,
    original: Tensor,
    patch: Tensor,
    targets: Tensor,
    nodes,
    metric: str | Callable = relp.logit_diff,
    cells: dict[str, Tensor] | None = None,
    rows: int = 32,
    progress: Callable | None = None,
) -> dict[str, Tensor]:
    """AP (Eq. 1), exact: one (layer, position) of a node, or of a part of it, from the patch run into the original run.

    Arguments and result as in relp.attribute(), and:

    cells     {name: bool, shaped like the result or like one prompt's}: these are patched, and the rest is 0. Without
              them it is those where the two runs differ: elsewhere the effect is 0.
    rows      how many edited runs go through a block together (more as they get shorter, up to 16 times as many: each
              has a copy of all keys and values)
    progress  progress(fraction) is called as the work proceeds
    """
    relp.check(model, original, patch, targets, nodes)
    names = {recorded_as(name) for name in nodes}
    run = record_original(model, original, targets, names, metric)
    _, patch_acts = relp.record(model, patch, names)

    def edit(name, layer):
        key = recorded_as(name), layer
        x_original, x_patch = run.acts[key], patch_acts[key]  # [batch, pos, part, hidden]
        if cells is None:
            chosen = changed(x_original, x_patch)
            chosen = chosen if name in PARTS_OF else chosen.any(-1, keepdim=True)
        else:
            chosen = cells[name] if name in PARTS_OF else cells[name].unsqueeze(-1)
            chosen = chosen.select(-3, layer).expand(len(original), -1, -1)

        def new(prompts, pos, parts):
            if name not in PARTS_OF:
                return x_patch[prompts, pos : pos + 1]
            x = x_original[prompts, pos : pos + 1]  # a copy, in which the other parts stay
            x[range(len(x)), 0, parts] = x_patch[prompts, pos, parts]
            return x

        return Edit(relp.node_of(name), layer, chosen, new)

    edits = {(name, layer): edit(name, layer) for name in nodes for layer in range(run.n_layers)}
    return relp.by_node(effects(run, edits, rows, progress), nodes)


@torch.no_grad()
def patch_features(
    model,
    original: Tensor,
    patch: Tensor,
    targets: Tensor,
    saes: dict,
    metric: str | Callable = relp.logit_diff,
    rows: int = 32,
    progress: Callable | None = None,
) -> dict[Key, Tensor]:
    """AP of single features, exact: at one position feature i, or the error, is given its value in the patch run.

        node <- node(x_original) + (f_i(x_patch) - f_i(x_original)) W_dec[i]

    Arguments and result as in relp.attribute_features(). One run per feature that differs: for small models.
    """
    nodes = {name for name, _ in saes}
    relp.check(model, original, patch, targets, nodes)
    run = record_original(model, original, targets, nodes, metric)
    _, patch_acts = relp.record(model, patch, nodes)

    def edit(key, sae):
        x, x_patch = run.acts[key].squeeze(2), patch_acts[key].squeeze(2)
        moves = relp.difference(sae.encode(x), sae.encode(x_patch)).to(x.dtype)  # of the features
        error_moves = relp.difference(x, x_patch).to(x.dtype) - moves @ sae.W_dec  # b_dec cancels
        cells = torch.cat([moves != 0, (error_moves != 0).any(-1, keepdim=True)], dim=-1)  # the error is the last unit
        moves, directions = pad(moves, (0, 1)), pad(sae.W_dec, (0, 0, 0, 1))

        def new(prompts, pos, parts):
            move = moves[prompts, pos, parts, None] * directions[parts]
            move = torch.where((parts == len(sae.W_dec))[:, None], error_moves[prompts, pos], move)
            return (x[prompts, pos] + move)[:, None, None]

        return Edit(*key, cells, new)

    return effects(run, {key: edit(key, sae) for key, sae in saes.items()}, rows, progress)


def changed(original: Tensor, patch: Tensor) -> Tensor:
    """[batch, pos, part]: True where the two runs differ. Elsewhere every method scores exactly 0."""
    return (patch != original).any(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Edited runs


@dataclass
class OriginalRun:
    """The original run, recorded so that edited runs can be resumed from it."""

    model: object
    targets: Tensor
    metric: str | Callable
    value: Tensor  # the metric [batch]
    streams: list[Tensor]  # before each layer, and after the last: [batch, pos, d_model]
    acts: dict[Key, Tensor]  # [batch, pos, part, hidden]: head_k and head_v of every layer, and what was asked for
    n_layers: int
    n_pos: int


@dataclass
class Edit:
    """What is written into the original run: at `node` of `layer`, one edited run for each True in `cells`.

    cells   bool [batch, pos, part]
    new     new(prompts [n], pos, parts [n]) -> [n, 1, part, hidden]: the node's activation at pos in n edited runs
    to_end  True: new() returns it at all positions from pos on, [n, n_pos - pos, part, hidden]: one run edits them all
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


@torch.no_grad()
def record_original(model, tokens: Tensor, targets: Tensor, names, metric: str | Callable) -> OriginalRun:
    """The original run with the activations of these names. ValueError if the model has no method block()."""
    if not hasattr(model, "block"):
        raise ValueError("this model has no method `block`, which resumed runs need: use relp.activation_patching")
    final, acts = relp.record(model, tokens, {"resid_pre", "head_k", "head_v", *names})
    n_layers = model.config.n_layers
    streams = [*(acts["resid_pre", layer].squeeze(2) for layer in range(n_layers)), final]
    value = relp.read_out(model, final, targets, metric)
    return OriginalRun(model, targets, metric, value, streams, acts, n_layers, tokens.shape[1])


@torch.no_grad()
def effects(run: OriginalRun, edits: dict, rows: int = 32, progress: Callable | None = None) -> dict:
    """{label: [batch, pos, part]}: metric(edited run) - metric(original run) for edits {label: Edit}; 0 outside cells.

    rows and progress: as in activation_patching().
    """
    if not edits:
        return {}
    counts = [sum(int(to_run(run, edit, pos).sum()) for edit in edits.values()) for pos in range(run.n_pos)]
    # a resumed run computes the positions from pos on
    work = [count * (run.n_pos - pos) for pos, count in enumerate(counts)]
    result = {label: torch.zeros_like(edit.cells, dtype=run.value.dtype) for label, edit in edits.items()}
    for pos in range(run.n_pos):
        length = max(run.n_pos - pos, run.n_pos // 16)
        for label, of_edit in effects_at(run, edits, pos, max(1, rows * run.n_pos // length)).items():
            result[label][:, pos] = of_edit
        if progress:
            progress(sum(work[: pos + 1]) / max(1, sum(work)))
    return result


def to_run(run: OriginalRun, edit: Edit, pos: int) -> Tensor:
    """Which of an edit's cells at one position need a run: bool [batch, part].

    The last position is read out, and another one reaches it through attention only: in the last layer by an edit of k,
    of v, or of resid_pre, which enters this layer. An edit with to_end includes the last position.
    """
    matters = edit.entry < run.n_layers or pos == run.n_pos - 1 or edit.to_end or edit.node in ("k", "v")
    return edit.cells[:, pos] & matters


def effects_at(run: OriginalRun, edits: dict, pos: int, rows: int) -> dict:
    """{label: [batch, part]}: the effects of all edits at one position, `rows` edited runs at a time."""
    labels = sorted(edits, key=lambda label: edits[label].entry)
    in_order = [edits[label] for label in labels]
    # one row (edit, prompt, part) for each edited run; edit is a number in this order
    places = [to_run(run, edit, pos).nonzero() for edit in in_order]
    jobs = torch.cat([pad(place, (1, 0), value=i) for i, place in enumerate(places)])
    effect = run.value.new_zeros(len(jobs))
    for start in range(0, len(jobs), rows):
        effect[start : start + rows] = run_jobs(run, in_order, jobs[start : start + rows], pos)
    result = {}
    for i, label in enumerate(labels):
        mine = jobs[:, 0] == i
        result[label] = run.value.new_zeros(edits[label].cells[:, pos].shape)
        result[label][jobs[mine, 1], jobs[mine, 2]] = effect[mine]
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
    return relp.read_out(run.model, x, run.targets[prompts], run.metric) - run.value[prompts]


def edited_stream(run: OriginalRun, edit: Edit, pos: int, prompts: Tensor, parts: Tensor) -> Tensor:
    """The streams of edited runs before the layer that they enter: [n, positions from pos on, d_model].

    After the last layer it is the last position only, which is all that counts there.
    """
    new, stream = edit.new(prompts, pos, parts), run.streams[edit.layer][prompts, pos:]
    edited = new.shape[1]  # positions
    last = edit.entry == run.n_layers
    if edit.node in ("k", "v"):  # a key or value changes all later positions of its layer
        x = resume(run, edit.layer, stream, prompts, pos, last=last, node=edit.node, new=new)
    elif edit.node == "resid_pre":
        x = torch.cat([new.squeeze(2), stream[:, edited:]], dim=1)
    else:  # others change their own positions only
        own = resume(run, edit.layer, stream[:, :edited], prompts, pos, node=edit.node, new=new)
        x = torch.cat([own, run.streams[edit.entry][prompts, pos + edited :]], dim=1)
    return x[:, -1:] if last else x


def resume(
    run: OriginalRun, layer: int, x: Tensor, prompts: Tensor, pos: int, last=False, node=None, new=None
) -> Tensor:
    """One block on the streams x [n, positions from pos on, d_model], which are runs of these prompts.

    If a node of this layer is named, its activation at the m positions from pos on is `new` [n, m, part, hidden].
    """

    def hook(name, _, y):
        if name in ("k", "v"):
            past_and_y = run.acts[f"head_{name}", layer].index_select(0, prompts)[:, : pos + y.shape[1]]  # a copy
            past_and_y[:, pos:] = y
            if name == node:
                past_and_y[:, pos : pos + new.shape[1]] = new
            return past_and_y
        if name != node:
            return y
        # a recorded pattern has all keys, this run those up to pos
        return (new[..., : y.shape[-1]] if node == "pattern" else new).reshape(y.shape)

    # if the original run has shown its pattern, this one does too, so that both round alike
    hook.nodes = {"k", "v"} | {node} | ({"pattern"} if ("head_pattern", layer) in run.acts else set())
    return run.model.block(layer, x, hook=hook, start=pos, last=last)
