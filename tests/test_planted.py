"""The planted circuit is what toy/plant.py says: the edges of CIRCUIT matter, and all the others do not.

The judge is a second forward pass, written here from the checkpoint's tensors, in which each reader adds up its own
stream: edge by edge, what a writer has written in this run, or what it wrote in another one.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "toy"))
import plant

from beyond.edges.graph import Graph
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from models import from_pretrained
from support import prompts
from support.tokenizer import load_tokenizer

PLANTED = Path(plant.ROOT) / "toy" / "planted"
CONFIG = json.loads((PLANTED / "config.json").read_text())
LAYERS, HEADS, D = CONFIG["n_layer"], CONFIG["n_head"], CONFIG["n_embd"]

# ---------------------------------------------------------------------------------------------------------------------
# Edges by brute force


def all_edges() -> list[str]:
    """Each reader with every writer before it."""
    writers, found = ["input"], []
    for layer in range(LAYERS):
        heads = [f"a{layer}.h{head}" for head in range(HEADS)]
        found += [f"{writer}->{head}<{part}>" for head in heads for part in "qkv" for writer in writers]
        writers += heads
        found += [f"{writer}->m{layer}" for writer in writers]
        writers.append(f"m{layer}")
    return found + [f"{writer}->logits" for writer in writers]


EDGES = all_edges()
OTHERS = [edge for edge in EDGES if edge not in plant.CIRCUIT]
DISTRACTORS = [f"a{layer}.h{head}" for layer in range(LAYERS) for head in range(1, HEADS)] + ["m0"]


class Planted:
    """The checkpoint as a plain loop over its heads and MLPs, in float64."""

    def __init__(self):
        tensors = load_file(PLANTED / "model.safetensors").items()
        self.w = {name.removeprefix("transformer."): tensor.double() for name, tensor in tensors}

    def run(self, tokens, replaced=(), by=None):
        """(logits of the last position [batch, vocab], {writer: what it writes [batch, pos, d_model]}).

        replaced: edges that carry what the writer has in `by` (as returned by another run) and not what it writes here.
        """
        w, replaced = self.w, set(replaced)
        written = {"input": w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]}

        def normed(reader, norm):
            stream = sum(by[u] if f"{u}->{reader}" in replaced else x for u, x in written.items())
            return F.layer_norm(stream, (D,), w[f"{norm}.weight"], w[f"{norm}.bias"], CONFIG["layer_norm_epsilon"])

        for layer in range(LAYERS):
            h, heads = f"h.{layer}", {}
            assert not w[f"{h}.attn.c_proj.bias"].any()  # it would belong to no head
            for i in range(HEADS):
                reads = {part: normed(f"a{layer}.h{i}<{part}>", f"{h}.ln_1") for part in "qkv"}
                heads[f"a{layer}.h{i}"] = self.head(h, i, reads)
            written |= heads
            hidden = normed(f"m{layer}", f"{h}.ln_2") @ w[f"{h}.mlp.c_fc.weight"] + w[f"{h}.mlp.c_fc.bias"]
            hidden = F.gelu(hidden, approximate="tanh")
            written[f"m{layer}"] = hidden @ w[f"{h}.mlp.c_proj.weight"] + w[f"{h}.mlp.c_proj.bias"]
        return normed("logits", "ln_f")[:, -1] @ w["lm_head.weight"].T, written

    def head(self, h, i, reads):
        """What head i of layer h writes. reads: the normed streams that its q, k and v see."""
        d = D // HEADS
        columns = {part: slice(n * D + i * d, n * D + (i + 1) * d) for n, part in enumerate("qkv")}
        weight, bias = self.w[f"{h}.attn.c_attn.weight"], self.w[f"{h}.attn.c_attn.bias"]
        q, k, v = (reads[part] @ weight[:, columns[part]] + bias[columns[part]] for part in "qkv")
        scores = q @ k.transpose(1, 2) / d**0.5
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        return pattern @ v @ self.w[f"{h}.attn.c_proj.weight"][i * d : (i + 1) * d]


class Runs:
    """Both prompts of the pairs, run once: original to patch (direction 0), or the other way round (1)."""

    def __init__(self, direction: int):
        self.model, self.pairs = Planted(), plant.pairs()
        order = ("original", "patch") if direction == 0 else ("patch", "original")
        self.tokens, other = (torch.tensor([getattr(pair, name) for pair in self.pairs]) for name in order)
        self.answers = torch.tensor([pair.answers[:: 1 - 2 * direction] for pair in self.pairs])
        logits, self.written = self.model.run(self.tokens)
        self.before = self.metric(logits)
        logits, self.other = self.model.run(other)
        self.after = self.metric(logits)

    def metric(self, logits):
        right, wrong = logits.gather(1, self.answers).unbind(1)
        return right - wrong

    def effects(self, edges, by=None):
        """The change in each pair's logit difference if these edges carry what the other run (or `by`) wrote."""
        return self.metric(self.model.run(self.tokens, edges, self.other if by is None else by)[0]) - self.before


@pytest.fixture(scope="module", params=[0, 1], ids=["patch into original", "original into patch"])
def runs(request):
    return Runs(request.param)


# ---------------------------------------------------------------------------------------------------------------------
# What is claimed of the circuit


def test_names():
    assert len(EDGES) == len(set(EDGES)) == 262
    assert set(plant.CIRCUIT) == {edge for path in plant.PATHS.values() for edge in path}
    assert set(plant.CIRCUIT) | set(plant.POSITIONS) < set(EDGES) and not set(plant.CIRCUIT) & set(plant.POSITIONS)


def test_the_model_follows_the_chain(runs):
    logits, _ = runs.model.run(runs.tokens)
    assert (logits.argmax(1) == runs.answers[:, 0]).all()
    assert ((runs.before > 4.5) & (runs.before < 5.5)).all() and ((runs.after < -4.5) & (runs.after > -5.5)).all()


def test_what_goes_through_other_edges_does_not_matter(runs):
    """All other edges at once, sets drawn at random, and all into one reader."""
    rng = random.Random(0)
    sets = [OTHERS, *([edge for edge in OTHERS if rng.random() < share] for share in (0.2, 0.5, 0.8) for _ in range(4))]
    sets += [[edge for edge in OTHERS if edge.endswith(f"->{name}")] for name in ("m1", "m2", "logits", "a2.h0<v>")]
    for edges in sets:
        assert edges and runs.effects(edges).abs().max() < 1e-4


def test_each_edge_matters_where_the_change_goes_through_it(runs):
    """By itself it turns the answer into the other one. It does nothing for pairs whose change takes another path."""
    groups = prompts.by_group(runs.pairs)
    assert list(groups) == list(plant.PATHS)
    for edge in plant.CIRCUIT:
        share = runs.effects([edge]) / (runs.after - runs.before)
        assert share.mean() > 0.1
        for change, indices in groups.items():
            wanted = 1.0 if edge in plant.PATHS[change] else 0.0
            assert (share[indices] - wanted).abs().max() < 0.01, (edge, change)


def test_without_the_distractors(runs):
    """Nothing changes where they write 0, or their mean over the pairs."""
    edges = [edge for edge in EDGES if edge.split("->")[0] in DISTRACTORS]
    for average in (torch.zeros_like, lambda x: x.mean(0, keepdim=True).expand_as(x)):
        by = {name: average(x) for name, x in runs.written.items()}
        assert runs.effects(edges, by).abs().max() < 1e-4
        for name in DISTRACTORS:
            assert runs.effects([edge for edge in edges if edge.startswith(f"{name}->")], by).abs().max() < 1e-4


def test_positions_are_needed_but_carry_no_change(runs):
    assert runs.effects(plant.POSITIONS).abs().max() < 1e-4
    level = plant.PART["level"]
    by = {"input": torch.zeros_like(runs.written["input"])}
    by["input"][..., level] = runs.written["input"][..., level]  # so that the norm stays
    for edge in plant.POSITIONS:
        assert runs.effects([edge], by).mean() < -2  # the model forgets the task


def test_distractors_are_at_work(runs):
    """They write different things in the two runs, and hear each other, and the circuit, in all layers."""
    side = plant.PART["side"]

    def change(name, written):
        """How much the writer's part `side` differs from this run's, as a share of its size: one number per pair."""
        size = runs.written[name][..., side].norm(dim=-1).mean()
        return (written[name] - runs.written[name])[..., side].norm(dim=-1).amax(1) / size

    for name in (*DISTRACTORS, "m1", "m2"):
        share = change(name, runs.other)
        assert share.mean() > 0.3 and share.min() > 0.03, name
    heard = ["a0.h1->m0", "a0.h1->a1.h2<q>", "a0.h2->a1.h1<k>", "m0->a1.h3<v>", "a1.h3->a2.h1<v>", "m1->a2.h2<k>"]
    for edge in (*heard, "a1.h1->m1", "a2.h3->m2", "input->a0.h3<q>", "a0.h0->a1.h1<k>", "a1.h0->a2.h1<v>"):
        writer, reader = edge.split("->")
        _, written = runs.model.run(runs.tokens, [edge], runs.other)
        share = change(reader.split("<")[0], written)
        assert share.mean() > 0.03, edge
        assert runs.effects([edge]).abs().max() < 1e-4


def test_attention_of_the_circuit_is_sharp(runs):
    """At the last position, on the word that the step looks for."""
    patterns = {}

    def keep(name, layer, x):
        patterns[layer] = x[:, :, 0]  # head 0: [batch, query, key]
        return x

    keep.nodes = {"pattern"}
    from_pretrained(str(PLANTED))(runs.tokens, hook=keep)
    for link in (2, 4, 6, 8):
        assert patterns[0][:, link, link - 1].min() > 0.999
    for layer in (1, 2):
        assert patterns[layer][:, -1].amax(-1).min() > 0.999


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_files_are_what_the_script_writes(tmp_path):
    plant.save(tmp_path)
    made, shipped = load_file(tmp_path / "model.safetensors"), load_file(PLANTED / "model.safetensors")
    assert made.keys() == shipped.keys()
    assert all(torch.equal(made[name], shipped[name]) and made[name].dtype == torch.float32 for name in made)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (PLANTED / name).read_bytes(), name
    assert sum(file.stat().st_size for file in PLANTED.iterdir()) < 1e6


def test_transformers_reads_the_same_model(runs):
    import transformers

    hf = transformers.AutoModelForCausalLM.from_pretrained(PLANTED, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        theirs, ours = hf(runs.tokens).logits, from_pretrained(str(PLANTED))(runs.tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(runs.model.run(runs.tokens)[0].float(), theirs[:, -1], atol=1e-4, rtol=0)


def test_the_tokenizer():
    import transformers

    ours, theirs = load_tokenizer(str(PLANTED)), transformers.AutoTokenizer.from_pretrained(PLANTED)
    tokens = torch.tensor([[ours.bos_id, *ours.encode("Ann Bob Dan Eve Bob Cid Eve Fay Ann")]])  # the README's example
    assert ours.decode([from_pretrained(str(PLANTED))(tokens)[0, -1].argmax().item()]) == " Cid"
    for pair in plant.pairs():
        words = plant.text(pair.original)
        assert (ours.bos_id, *ours.encode(words)) == pair.original
        assert theirs(words, add_special_tokens=False)["input_ids"] == list(pair.original[1:])
        assert ours.decode(pair.original[1:]) == f" {words}"


def test_the_pairs_in_the_file():
    """They are those of pairs(), but for their roles and groups."""
    model = from_pretrained(str(PLANTED))
    from_file = prompts.read_pairs(PLANTED / "pairs.jsonl", load_tokenizer(str(PLANTED)))
    ours = plant.pairs()
    assert len(ours) == len(set(ours)) == 40
    for pair, same in zip(ours, from_file, strict=True):
        assert (pair.original, pair.patch, pair.answers) == (same.original, same.patch, same.answers)
        assert len(pair.roles) == len(pair.original) == model.config.n_ctx
        a_to_b = dict(zip(pair.original[1:9:2], pair.original[2:9:2]))
        assert a_to_b[a_to_b[pair.original[-1]]] == pair.answers[0]
        assert len({word % plant.OPPOSITE for word in pair.original[1:]}) == 6
    assert plant.pairs(12, seed=3) == plant.pairs(40, seed=3)[:12] != ours[:12]


def test_methods_are_judged_by_the_known_circuit(tmp_path):
    """Exact patching and RelP find the ten edges and no other; the plain gradient misses some of them."""
    model = from_pretrained("toy-planted")
    batch = [torch.tensor([getattr(p, part) for p in plant.pairs()]) for part in ("original", "patch", "answers")]
    graph = Graph.of(model.config)
    assert {*plant.CIRCUIT, *plant.POSITIONS} < set(EDGES) and len(EDGES) == int(graph.edges.sum())
    scores = {"ap": patch_edges(model, *batch)[0], "relp": attribute_edges(model, *batch, lrp=True)}
    scores["atp"] = attribute_edges(model, *batch)
    scores["none"] = torch.zeros_like(scores["ap"])
    arrays = {name: x.masked_fill(~graph.edges, torch.nan).numpy() for name, x in scores.items()}
    np.savez(tmp_path / "edges.npz", writers=graph.writers, readers=graph.readers, **arrays)
    found = plant.judge(tmp_path / "edges.npz")
    assert found["ap"] == found["relp"] == (1, 1)
    assert found["none"][0] == 0.5 and 0.9 < found["atp"][0] < 1 and found["atp"][1] < 0.8
    by_hand = scores["ap"].mean(0)  # the claims about single edges, by the project's own exact patching
    for edge in EDGES:
        writer, reader = edge.split("->")
        effect = by_hand[graph.writers.index(writer), graph.readers.index(reader)]
        assert effect < -2 if edge in plant.CIRCUIT else abs(effect) < 1e-4
