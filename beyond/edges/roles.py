"""What the heads of the IOI circuit do: where they look, what they write, who steers them.

python -m beyond.edges.roles --model smollm2-135m-q4 --pairs 24

The names are those of Wang et al. (arXiv 2211.00593). A name mover looks from the last word (END) at A and raises its
logit; a negative one lowers it. An S-inhibition head tells the movers which name is said twice: if its output is
replaced by that of a prompt with the other name at S2, they look at the other name. It reads this at S2, where other
heads look at B1 (duplicate token heads) or at the word after it (induction heads). All numbers are means over prompts.
"""

import sys
from functools import partial

import torch
from torch import Tensor

import relp
import tasks
from beyond.edges.graph import written_by_heads
from models import Rules, Transformer
from support import resume
from support.commandline import load_model, parse, run
from support.options import PAIR, common_parser
from support.processes import say
from support.prompts import by_group, tensors
from support.results import folder_of, save_json, versions
from support.tokenizer import load_tokenizer

LOOKS = {"END": ("A", "B1", "S2"), "S2": ("B1", "B1+1")}  # where a head can look from there; B1+1: the word after B1
MOST = 10  # heads in a table
MUCH = 0.3  # of its attention: with that much on A, a head is a mover
COLUMNS = {  # what is known of a head: the title of its column
    "A": "looks at A", "B1": "at B1", "B1+1": "after B1", "S2": "at S2", "of A": "logit of A", "of B1": "of B1",
    "patched": "AP",
    "movers": "movers at A",
}  # fmt: skip


def what_heads_do(model: Transformer, pairs: list[tasks.Pair], where: str = "END") -> dict[str, Tensor]:
    """Of the heads at one place in the prompts of one group, {what: [batch, layer, head]}.

    A, B1, ...  the head's attention from there to them
    of A, of B1 what its output there adds to the logit of this name directly, through the last norm; only at END
    patched     AP of its output there
    """
    original, patch, answers = tensors(pairs, model.embed_tokens.weight.device)
    stream, acts = relp.record(model, original, ["head_pattern", "head"])
    here, layers = position(pairs, where), range(model.config.n_layers)
    cells = torch.zeros(len(layers), original.shape[1], model.config.n_heads, dtype=torch.bool, device=original.device)
    cells[:, here] = True
    effects = resume.activation_patching(model, original, patch, answers, ["head"], cells={"head": cells})
    found = {"patched": effects["head"][:, :, here]}
    for role in LOOKS[where]:
        at = position(pairs, role)
        found[role] = torch.stack([acts["head_pattern", layer][:, here, :, at] for layer in layers], 1)
    if where == "END":
        parts = torch.stack([written_by_heads(model, n, acts["head", n][:, -1:])[:, :, 0] for n in layers], 1)
        for name, token in zip(("of A", "of B1"), answers.unbind(1)):
            found[name] = torch.einsum("hlbd,bd->blh", parts, gradient(model, stream[:, -1], token))
    return found


def position(pairs: list[tasks.Pair], role: str) -> int:
    """Where a role is in all prompts of one group."""
    name, _, further = role.partition("+")
    return pairs[0].roles.index(name) + int(further or 0)


@torch.enable_grad()
def gradient(model: Transformer, x: Tensor, token: Tensor) -> Tensor:
    """The gradient of each prompt's logit of its token in the final stream x [b, d], the last norm's scale constant."""
    x = x.detach().requires_grad_()
    logits = model.unembed(x, Rules(ln=True)).gather(1, token.unsqueeze(1))
    return torch.autograd.grad(logits.sum(), x)[0]


@torch.no_grad()
def attention_to_a(model: Transformer, pairs: list[tasks.Pair], movers: list, heads: list, where: str = "END") -> dict:
    """{head: the movers' mean attention [batch] from END to A}, if this head writes at one place what it does in the
    patch run; None: if no head does.

    movers and heads: (layer, head).
    """
    original, patch, _ = tensors(pairs, model.embed_tokens.weight.device)
    _, patch_acts = relp.record(model, patch, ["head"])
    here, at_a, found = position(pairs, where), position(pairs, "A"), {}
    for head in heads:
        found[head] = 0

        def hook(node: str, layer: int, x: Tensor, head=head) -> Tensor:
            if node == "z" and head and head[0] == layer:
                x = x.clone()
                x[:, here, head[1]] = patch_acts["head", layer][:, here, head[1]]
            if node == "pattern":
                found[head] += sum(x[:, -1, mover, at_a] for i, mover in movers if i == layer) / len(movers)
            return x

        hook.nodes = {"z", "pattern"}
        model.stream(original, hook=hook)
    return found


def mean_of_groups(pairs: list[tasks.Pair], compute) -> dict[str, Tensor]:
    """The means over all pairs of what compute(pairs of one group) returns, {what: [batch, ...]}."""
    each = [compute([pairs[i] for i in numbers]) for numbers in by_group(pairs).values()]
    return {what: torch.cat([of[what] for of in each]).mean(0) for what in each[0]}


def strongest(found: dict[str, Tensor]) -> dict[tuple[int, int], dict[str, float]]:
    """{(layer, head): {what: value}} of the MOST heads with the largest AP in size, the largest first."""
    order = found["patched"].flatten().abs().argsort(descending=True)[:MOST]
    heads = [divmod(i, found["patched"].shape[1]) for i in order.tolist()]
    return {head: {what: float(x[head]) for what, x in found.items()} for head in heads}


def roles(name: str, o) -> None:
    """The tables of one model; they are written down in roles.json, too. ValueError if it has no name mover."""
    model, tokenizer = load_model(name, o), load_tokenizer(name)
    swap, s2 = (tasks.ioi(tokenizer, o.pairs, o.seed, corruption, not o.no_bos) for corruption in ("swap", "s2"))
    say(f"\n{name}: {model.config.n_layers} layers, {o.pairs} prompt pairs; AP is what counts for the order")
    found = {"swap END": strongest(mean_of_groups(swap, partial(what_heads_do, model)))}
    say("\n  both names exchanged (swap), heads at END")
    print_heads(found["swap END"])
    movers = [head for head, of in found["swap END"].items() if of["A"] > MUCH]
    if not movers:
        raise ValueError(f"none of {name}'s {MOST} heads that matter most at END looks at A: it has no name movers")
    names = ", ".join(by_name(dict.fromkeys(movers)))
    say(f"\n  movers: {names}; in the last column, how much they look at A")
    say("  if the head writes there what it does in the prompt with the other name at S2")
    for where in LOOKS:
        of_place = strongest(mean_of_groups(s2, partial(what_heads_do, model, where=where)))
        heads = [None, *of_place]
        looks = mean_of_groups(s2, partial(attention_to_a, model, movers=movers, heads=heads, where=where))
        found[f"s2 {where}"] = {head: of | {"movers": float(looks[head])} for head, of in of_place.items()}
        say(f"\n  the other name at S2 (s2), heads at {where}; without a patch, movers at A: {looks[None]:.2f}")
        print_heads(found[f"s2 {where}"])
    folder = folder_of(o.out, name, "edges")
    tables = {title: by_name(table) for title, table in found.items()}
    save_json(folder / "roles.json", tables | {"arguments": vars(o), "versions": versions()})
    say(f"  written to {folder}/roles.json")


def by_name(table: dict[tuple[int, int], dict]) -> dict[str, dict]:
    return {f"a{layer}.h{head}": of for (layer, head), of in table.items()}


def print_heads(table: dict[tuple[int, int], dict]) -> None:
    columns = [column for column in COLUMNS if column in next(iter(table.values()))]
    say(f"  {'':8}" + "".join(f"{COLUMNS[column]:>12}" for column in columns))
    for name, of in by_name(table).items():
        say(f"  {name:8}" + "".join(f"{of[column]:12.2f}" for column in columns))


def main(argv: list[str] | None = None) -> None:
    without = ["methods", "rules", "nodes", "metric", "corruption", "prompts", "batch-size", *PAIR]
    o = parse(common_parser("python -m beyond.edges.roles", __doc__.splitlines()[0], without), argv)
    for name in o.model:
        roles(name, o)


if __name__ == "__main__":
    sys.exit(run(main))
