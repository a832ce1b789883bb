"""What the heads of the IOI circuit do: where they look from the last word, what they write there, who steers them.

python -m beyond.edges.roles --model smollm2-135m-q4 --pairs 24

The names are those of Wang et al. (arXiv 2211.00593). A name mover looks at a name and raises its logit; a negative
one lowers it. An S-inhibition head tells the movers which name is said twice: with what it writes in a prompt in which
S2 is the other name, they look elsewhere. Everything is at the last word (END), every number a mean over the prompts.
"""

import sys

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
from support.results import folder_of, save_json
from support.tokenizer import load_tokenizer

LOOKS = ("A", "B1", "S2")  # at whom a head can look
MOST = 10  # heads in a table
COLUMNS = {  # what is known of a head: the head of its column
    **{"A": "looks at A", "B1": "at B1", "S2": "at S2", "of A": "logit of A", "of B1": "of B1", "patched": "AP"},
    "movers": "movers at A",
}


def what_heads_do(model: Transformer, pairs: list[tasks.Pair]) -> dict[str, Tensor]:
    """Of one group's pairs, {what: [batch, layer, head]}.

    A, B1, S2   the head's attention from END to them
    of A, of B1 what its output at END adds to the logit of this name directly, through the last norm
    patched     AP of its output at END
    """
    original, patch, answers = tensors(pairs, model.embed_tokens.weight.device)
    stream, acts = relp.record(model, original, ["head_pattern", "head"])
    end, rows, layers = original.shape[1] - 1, torch.arange(len(pairs)), range(model.config.n_layers)
    cells = torch.zeros(len(layers), end + 1, model.config.n_heads, dtype=torch.bool, device=original.device)
    cells[:, end] = True
    effects = resume.activation_patching(model, original, patch, answers, ["head"], cells={"head": cells})
    found = {"patched": effects["head"][:, :, end]}
    for role in LOOKS:
        at = torch.tensor([pair.roles.index(role) for pair in pairs])
        found[role] = torch.stack([acts["head_pattern", layer][rows, end, :, at] for layer in layers], 1)
    parts = torch.stack([written_by_heads(model, n, acts["head", n][:, -1:])[:, :, 0] for n in layers], 1)
    for name, token in zip(("of A", "of B1"), answers.unbind(1)):
        found[name] = torch.einsum("hlbd,bd->blh", parts, rise(model, stream[:, -1], token))
    return found


@torch.enable_grad()
def rise(model: Transformer, x: Tensor, token: Tensor) -> Tensor:
    """How fast each prompt's logit of its token rises with the final stream x [b, d], its norm's scale constant."""
    x = x.detach().requires_grad_()
    logits = model.unembed(x, Rules(ln=True)).gather(1, token.unsqueeze(1))
    return torch.autograd.grad(logits.sum(), x)[0]


@torch.no_grad()
def attention_to_a(model: Transformer, pairs: list[tasks.Pair], movers: list[tuple[int, int]], head=None) -> Tensor:
    """The movers' mean attention [batch] from END to A, if a head writes at END what it does in the patch run.

    movers and head: (layer, head).
    """
    original, patch, _ = tensors(pairs, model.embed_tokens.weight.device)
    _, theirs = relp.record(model, patch, ["head"])
    at, rows, seen = torch.tensor([pair.roles.index("A") for pair in pairs]), torch.arange(len(pairs)), []

    def hook(node: str, layer: int, x: Tensor) -> Tensor:
        if node == "z" and head and head[0] == layer:
            x = x.clone()
            x[:, -1, head[1]] = theirs["head", layer][:, -1, head[1]]
        if node == "pattern":
            seen.extend(x[rows, -1, mover, at] for i, mover in movers if i == layer)
        return x

    hook.nodes = {"z", "pattern"}
    model.stream(original, hook=hook)
    return torch.stack(seen).mean(0)


def mean_of_groups(pairs: list[tasks.Pair], compute) -> dict[str, Tensor]:
    """The means over all pairs of what compute(pairs of one group) returns, {what: [batch, ...]}."""
    each = [compute([pairs[i] for i in numbers]) for numbers in by_group(pairs).values()]
    return {what: torch.cat([of[what] for of in each]).mean(0) for what in each[0]}


def strongest(found: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(layer, head) of the MOST heads with the largest AP in size, the largest first."""
    order = found["patched"].flatten().abs().argsort(descending=True)[:MOST]
    return [divmod(i, found["patched"].shape[1]) for i in order.tolist()]


def roles(name: str, o) -> None:
    """Both tables of one model; they are written down in roles.json, too."""
    model, tokenizer = load_model(name, o), load_tokenizer(name)
    swap, s2 = (tasks.ioi(tokenizer, o.pairs, o.seed, corruption, not o.no_bos) for corruption in ("swap", "s2"))
    say(f"\n{name}: {model.config.n_layers} layers, {o.pairs} prompt pairs")
    found = mean_of_groups(swap, lambda pairs: what_heads_do(model, pairs))
    say("\n  swap: the heads that matter most at the last word; what they add to the logits of both names")
    writers = [(head, {what: float(x[head]) for what, x in found.items()}) for head in strongest(found)]
    print_heads(writers)

    movers = [head for head, of in writers if of["A"] > 0.3]
    of_s2 = mean_of_groups(s2, lambda pairs: what_heads_do(model, pairs))
    looks = {
        head: mean_of_groups(s2, lambda pairs, head=head: {"A": attention_to_a(model, pairs, movers, head)})["A"]
        for head in (None, *strongest(of_s2))
    }
    names = ", ".join(f"a{layer}.h{head}" for layer, head in movers)
    say(f"\n  s2: the same; and how much {names} look at A")
    say(f"  with what the head writes in the patch run; in the original run {looks[None]:.2f}")
    steering = [
        (head, {what: float(x[head]) for what, x in of_s2.items()} | {"movers": float(looks[head])})
        for head in strongest(of_s2)
    ]
    print_heads(steering)
    folder = folder_of(o.out, name, "edges")
    save_json(folder / "roles.json", {"swap": by_name(writers), "s2": by_name(steering), "arguments": vars(o)})
    say(f"  written to {folder}/roles.json")


def by_name(table: list[tuple[tuple[int, int], dict]]) -> dict[str, dict]:
    return {f"a{layer}.h{head}": of for (layer, head), of in table}


def print_heads(table: list[tuple[tuple[int, int], dict]]) -> None:
    columns = [column for column in COLUMNS if column in table[0][1]]
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
