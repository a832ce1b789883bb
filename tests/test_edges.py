"""Edge scores, exact patching and circuits against plain forward passes in which every reader has its own stream."""

import math

import pytest
import torch
from conftest import FAMILIES

import models
import relp
from beyond.edges.circuits import SHARES, Circuits, area, best, faithfulness, pruned, ranking, stability
from beyond.edges.graph import Graph, ungrouped, written_by_heads
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from beyond.methods import parse_rules
from beyond.twopoint import TWO_POINT
from models import Attend, Nodes, Rules, causal_mask, rotate

EDGE_FAMILIES = [*FAMILIES, "gpt2-untied", "qwen2-mha-tied-window", "llama-biased", "gemma3", "qwen3-moe"]
RULES = {
    "atp": False,
    "relp": True,
    "epsilon": Rules(ln=True, epsilon=0.1),
    "gamma+ah": Rules(ah=True, gamma=0.2),
    "temperature": parse_rules("ln,temperature=2"),
    "two-point": None,  # the family's
}
CASES = [(f, rules) for f in EDGE_FAMILIES for rules in RULES if (f, rules) != ("qwen3-moe", "two-point")]


@pytest.fixture
def load(checkpoint):
    return lambda name: models.from_pretrained(str(checkpoint(name)[0]), torch.float64)


def rules_of(model, name):
    return TWO_POINT[model.config.family] if RULES[name] is None else RULES[name]


# ---------------------------------------------------------------------------------------------------------------------
# A forward pass in which each reader sees the stream and something of its own beside it


def split_forward(model, tokens, lrp=False, extra=None):
    """The final stream as `logits` sees it, and every reader's stream {reader: [b, t, d]}. extra: {reader: [b, t, d]}.

    A reader sees the stream plus its extra. So with extra = 0 that requires a gradient, this is the gradient at the
    reader, and with extra = u(x_patch) - u(x_original), the metric is that of exact edge patching.
    """
    c, rules, extra = model.config, model.rules(lrp), extra or {}
    seen = {}

    def read(reader, x):
        seen[reader] = x
        return x + extra[reader] if reader in extra else x

    x = model.embed(tokens)
    for layer, b in enumerate(model.blocks):
        first, node = x, Nodes(None, layer)
        q, k, v = [], [], []
        for kind, heads in (("q", q), ("k", k), ("v", v)):
            for head in range(c.n_heads):
                y = b.attn.project(kind, b.ln1(read(f"a{layer}.h{head}<{kind}>", x), rules), rules)
                y = b.attn.split_heads(y)
                y = y if kind == "v" else rotate(y, 0, b.attn.rotary)
                own = head if kind == "q" else head // (c.n_heads // c.n_kv_heads)
                heads.append(y[:, :, own])
        q, k, v = (torch.stack(heads, dim=2) for heads in (q, k, v))
        mask = causal_mask(0, x.shape[1], x.shape[1], b.attn.window, x.device)
        out = b.attn.o(rules.attention(q, k, v, Attend(c, mask, node)).flatten(-2), rules)
        x = x + (b.ln1_post(out, rules) if hasattr(b, "ln1_post") else out)
        mlp = b.mlp(b.ln2(read(f"m{layer}", first if c.block == "parallel" else x), rules), rules, node)
        x = x + (b.ln2_post(mlp, rules) if hasattr(b, "ln2_post") else mlp)
    return read("logits", x), seen


def contributions(model, tokens):
    """{writer: [b, t, d]}, from a recorded run: what each adds to the stream."""
    _, acts = relp.record(model, tokens, {"resid_pre", "z", "attn_out", "mlp_out"})
    found = {"input": acts["resid_pre", 0]}
    for layer, b in enumerate(model.blocks):
        z = acts["z", layer]
        bias = 0 if b.attn.o.bias is None else b.attn.o.bias
        whole = z.flatten(-2) @ b.attn.o.weight.T + bias
        for head in range(model.config.n_heads):
            only = torch.zeros_like(z)
            only[:, :, head] = z[:, :, head]
            part = only.flatten(-2) @ b.attn.o.weight.T + bias / model.config.n_heads
            found[f"a{layer}.h{head}"] = part * (acts["attn_out", layer] / whole)  # a norm scales all parts alike
        found[f"m{layer}"] = acts["mlp_out", layer]
    return found


def coefficients_by_hand(model, original, patch, answers, lrp):
    """{reader: rho_v [b, t, d]}, by autograd at each reader's own stream."""
    rules = model.rules(lrp)
    if hasattr(rules, "two_runs"):
        for_patch, rules = rules.two_runs()
        with torch.no_grad():
            relp.read_out(model, split_forward(model, patch, for_patch)[0], answers, lrp=for_patch)
    graph, shape = Graph.of(model.config), (*original.shape, model.config.d_model)
    extra = {reader: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for reader in graph.readers}
    value = relp.read_out(model, split_forward(model, original, rules, extra)[0], answers, lrp=rules).sum()
    rho = torch.autograd.grad(value, list(extra.values()), materialize_grads=True)
    return dict(zip(extra, rho))


@pytest.mark.parametrize("family, rules", CASES)
def test_scores_are_differences_times_the_gradient_at_the_readers_stream(load, pair, family, rules):
    model = load(family)
    lrp, graph = rules_of(model, rules), Graph.of(model.config)
    scores = attribute_edges(model, *pair, lrp=lrp, by_position=True)
    rho = coefficients_by_hand(model, *pair, lrp)
    before, after = (contributions(model, tokens) for tokens in pair[:2])
    changes = torch.stack([after[writer] - before[writer] for writer in graph.writers])
    wanted = torch.einsum("wbtd,rbtd->btwr", changes, torch.stack([rho[reader] for reader in graph.readers]))
    close = {"rtol": 0, "atol": 1e-10 * scores.abs().max()}
    assert scores.abs().max() > 1e-3
    torch.testing.assert_close(scores, wanted * graph.edges, **close)
    torch.testing.assert_close(attribute_edges(model, *pair, lrp=lrp), scores.sum(1), **close)
    # the edges of a reader add up to the score of the whole stream that it sees
    streams = [split_forward(model, tokens)[1] for tokens in pair[:2]]
    for r, reader in enumerate(graph.readers):
        wanted = ((streams[1][reader] - streams[0][reader]) * rho[reader]).sum(-1)
        torch.testing.assert_close(scores[..., r].sum(-1), wanted, **close)


@pytest.mark.parametrize("family, rules", CASES)
def test_the_edges_of_a_writer_add_up_to_its_score(load, pair, family, rules):
    model = load(family)
    lrp, graph = rules_of(model, rules), Graph.of(model.config)
    of_writers = attribute_edges(model, *pair, lrp=lrp, by_position=True).sum(-1)
    nodes = relp.attribute(model, *pair, ["resid_pre", "head", "attn_out", "mlp_out"], lrp=lrp)
    close = {"rtol": 0, "atol": 1e-10 * of_writers.abs().max()}
    torch.testing.assert_close(of_writers[:, :, 0], nodes["resid_pre"][:, 0], **close)
    plain_heads = "gemma" not in family and rules not in ("epsilon", "gamma+ah")
    for layer in range(graph.n_layers):
        writers = graph.writers_of(layer)
        heads = of_writers[:, :, writers.start : writers.stop - 1]
        torch.testing.assert_close(of_writers[:, :, writers.stop - 1], nodes["mlp_out"][:, layer], **close)
        torch.testing.assert_close(heads.sum(-1), nodes["attn_out"][:, layer], **close)
        if plain_heads:
            torch.testing.assert_close(heads, nodes["head"][:, layer], **close)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_eap_ig_is_the_mean_of_atp_along_the_embeddings_way(load, pair, family):
    model, (original, patch, answers) = load(family), pair
    graph, steps = Graph.of(model.config), 3
    before, after = (contributions(model, tokens) for tokens in (original, patch))
    total = {reader: 0 for reader in graph.readers}
    embed = model.embed
    for k in range(1, steps + 1):  # from the patch run's embedding to the original run's
        way = after["input"] + k / steps * (before["input"] - after["input"])
        model.embed = lambda tokens, way=way: way
        for reader, rho in coefficients_by_hand(model, original, patch, answers, False).items():
            total[reader] = total[reader] + rho / steps
        model.embed = embed
    scores = attribute_edges(model, *pair, steps=steps)
    for w, writer in enumerate(graph.writers):
        for r, reader in enumerate(graph.readers):
            if graph.edges[w, r]:
                wanted = ((after[writer] - before[writer]) * total[reader]).sum((1, 2))
                torch.testing.assert_close(scores[:, w, r], wanted, rtol=0, atol=1e-10 * scores.abs().max())
    torch.testing.assert_close(attribute_edges(model, *pair, steps=1), attribute_edges(model, *pair))


# ---------------------------------------------------------------------------------------------------------------------
# Exact patching


@pytest.mark.parametrize("family, by_position", [
    *((family, False) for family in EDGE_FAMILIES), *((family, True) for family in ("gpt2", "neox", "llama", "gemma3")),
])  # fmt: skip
def test_exact_patching_is_the_definition(load, pair, family, by_position):
    model, (original, patch, answers) = load(family), tuple(x[1:3] for x in pair)
    graph, n_pos = Graph.of(model.config), original.shape[1]
    scores, _ = patch_edges(model, original, patch, answers, by_position=by_position, rows=7)
    before, after = (contributions(model, tokens) for tokens in (original, patch))
    value = relp.read_out(model, split_forward(model, original)[0], answers)

    def effect(writer, reader, places):
        change = torch.zeros_like(before[writer])
        change[:, places] = (after[writer] - before[writer])[:, places]
        return relp.read_out(model, split_forward(model, original, extra={reader: change})[0], answers) - value

    largest = 0
    for w, writer in enumerate(graph.writers):
        for r, reader in enumerate(graph.readers):
            if not graph.edges[w, r]:
                assert not scores[..., w, r].any()
            elif by_position and (w + r) % 11 == 0:  # some of them: these are many runs
                wanted = torch.stack([effect(writer, reader, [pos]) for pos in range(n_pos)], dim=1)
                largest = max(largest, float(wanted.abs().max()))
                torch.testing.assert_close(scores[:, :, w, r], wanted, rtol=0, atol=1e-12)
            elif not by_position and (w + r) % 3 == 0:
                wanted = effect(writer, reader, slice(None))
                largest = max(largest, float(wanted.abs().max()))
                torch.testing.assert_close(scores[:, w, r], wanted, rtol=0, atol=1e-12)
    assert largest > 0.01


def test_only_the_chosen_edges_are_patched_and_counted(load, pair):
    model = load("gpt2")
    graph = Graph.of(model.config)
    whole, all_runs = patch_edges(model, *pair)
    only = torch.zeros_like(graph.edges)
    only[0, 0] = only[3, -1] = True
    only[-1, 0] = True  # there is no such edge
    scores, runs = patch_edges(model, *pair, only=only)
    assert runs == 8 and all_runs == 4 * int(graph.edges.sum())  # four pairs; all writers differ from position 3 on
    assert torch.equal(scores != 0, (whole != 0) & only)
    torch.testing.assert_close(scores[:, only], whole[:, only])


def test_an_edge_whose_writer_does_the_same_costs_no_run(load, pair):
    model = load("gpt2")
    original, _, answers = pair
    scores, runs = patch_edges(model, original, original, answers, by_position=True)
    assert runs == 0 and not scores.any()


def test_a_value_that_is_edited_up_to_the_end(load, pair):
    """relp's Edit with to_end: the same as a hook that writes all positions from one on."""
    model, (original, patch, answers) = load("gemma2"), pair
    start = 3
    for node, layer in [("resid_pre", 1), ("k", 2), ("v", 0), ("q", 2), ("mlp_out", 2), ("attn_out", 1)]:
        run = relp.record_original(model, original, answers, {node}, relp.logit_diff)
        _, acts = relp.record(model, patch, {node})
        cells = torch.zeros(*original.shape, 1, dtype=torch.bool)
        cells[:, start] = True
        x = acts[node, layer]
        edit = relp.Edit(node, layer, cells, lambda prompts, pos, parts, x=x: x[prompts, pos:], to_end=True)
        found = relp.effects(run, {"edit": edit}, rows=3)["edit"]

        def hook(name, at, y, node=node, layer=layer, x=x):
            return torch.cat([y[:, :start], x[:, start:]], dim=1) if (name, at) == (node, layer) else y

        wanted = relp.read_out(model, model.stream(original, hook=hook), answers) - run.value
        torch.testing.assert_close(found[:, start, 0], wanted, rtol=0, atol=1e-12)
        assert wanted.abs().max() > 1e-3 and not found[:, :start].any() and not found[:, start + 1 :].any()


# ---------------------------------------------------------------------------------------------------------------------
# The graph


def test_names_order_and_numbers_are_those_of_eap_igs_graph():
    graph = Graph(2, 2, parallel=False)
    assert graph.writers == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert graph.readers == [
        "a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0",
        "a1.h0<q>", "a1.h1<q>", "a1.h0<k>", "a1.h1<k>", "a1.h0<v>", "a1.h1<v>", "m1", "logits",
    ]  # fmt: skip
    edges = {f"{graph.writers[w]}->{graph.readers[r]}" for w, r in graph.edges.nonzero().tolist()}
    assert len(edges) == 6 * 1 + 3 + 6 * 4 + 6 + 7
    assert {"input->a0.h0<q>", "a0.h1->m0", "m0->a1.h1<k>", "m1->logits", "a1.h0->m1"} <= edges
    assert not {"a0.h0->a0.h1<q>", "m0->m0", "a1.h0->a1.h0<v>"} & edges
    parallel = Graph(2, 2, parallel=True)
    of_parallel = {f"{parallel.writers[w]}->{parallel.readers[r]}" for w, r in parallel.edges.nonzero().tolist()}
    assert edges - of_parallel == {"a0.h0->m0", "a0.h1->m0", "a1.h0->m1", "a1.h1->m1"}


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "llama-biased"])
def test_keys_and_values_of_ones_own_change_nothing(load, tokens, family):
    model = load(family)
    own = ungrouped(model)
    assert own.config.n_kv_heads == own.config.n_heads > model.config.n_kv_heads
    torch.testing.assert_close(own(tokens), model(tokens), rtol=0, atol=1e-12)
    assert own.blocks[0].mlp.up.weight.data_ptr() == model.blocks[0].mlp.up.weight.data_ptr()
    assert ungrouped(own) is own


@pytest.mark.parametrize("family", EDGE_FAMILIES)
def test_heads_add_up_to_what_attention_writes(load, tokens, family):
    model = load(family)
    _, acts = relp.record(model, tokens, {"z", "attn_out"})
    for layer in range(model.config.n_layers):
        parts = written_by_heads(model, layer, acts["z", layer])
        torch.testing.assert_close(parts.sum(0), acts["attn_out", layer], rtol=0, atol=1e-12)


def test_a_model_that_is_no_transformer_is_refused(pair):
    class Other:
        nodes = ("resid_pre",)

    with pytest.raises(ValueError, match="edges need a models.Transformer, got Other"):
        attribute_edges(Other(), *pair)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        attribute_edges(models.from_pretrained("toy-gpt2"), *pair, steps=0)
    with pytest.raises(ValueError, match="give steps or lrp, not both"):
        attribute_edges(models.from_pretrained("toy-gpt2"), *pair, lrp=True, steps=2)


# ---------------------------------------------------------------------------------------------------------------------
# Circuits


def run_by_hand(model, original, patch, answers, kept):
    """The metric of a circuit's run: every reader adds up what the writers have written, edge by edge."""
    c, graph, plain = model.config, Graph.of(model.config), Rules()
    theirs = contributions(model, patch)
    mine = {"input": model.embed(original)}
    keeps = {(graph.writers[w], graph.readers[r]) for w, r in kept.nonzero().tolist()}

    def stream(reader, writers):
        return sum(mine[u] if (u, reader) in keeps else theirs[u] for u in writers)

    for layer, b in enumerate(model.blocks):
        before, z = list(mine), []
        for head in range(c.n_heads):
            own, qkv = head // (c.n_heads // c.n_kv_heads), []
            for kind in "qkv":
                x = b.ln1(stream(f"a{layer}.h{head}<{kind}>", before), plain)
                y = b.attn.split_heads(b.attn.project(kind, x, plain))[:, :, [head if kind == "q" else own]]
                qkv.append(y if kind == "v" else rotate(y, 0, b.attn.rotary))
            mask = causal_mask(0, original.shape[1], original.shape[1], b.attn.window, original.device)
            z.append(plain.attention(*qkv, Attend(c, mask, Nodes(None, layer))))
        z, bias = torch.cat(z, dim=2), 0 if b.attn.o.bias is None else b.attn.o.bias
        whole = z.flatten(-2) @ b.attn.o.weight.T + bias
        out = b.ln1_post(whole, plain) if hasattr(b, "ln1_post") else whole
        for head in range(c.n_heads):
            columns = slice(head * c.d_head, (head + 1) * c.d_head)
            part = z[:, :, head] @ b.attn.o.weight[:, columns].T + bias / c.n_heads
            mine[f"a{layer}.h{head}"] = part * (out / whole)
        x = stream(f"m{layer}", before if graph.parallel else list(mine))
        mlp = b.mlp(b.ln2(x, plain), plain, Nodes(None, layer))
        mine[f"m{layer}"] = b.ln2_post(mlp, plain) if hasattr(b, "ln2_post") else mlp
    return relp.read_out(model, stream("logits", list(mine)), answers)


@pytest.mark.parametrize("family", EDGE_FAMILIES)
def test_a_circuits_run_is_the_definition(load, pair, family):
    model, (original, patch, answers) = load(family), pair
    run = Circuits(ungrouped(model), original, patch, answers)
    edges, generator = run.graph.edges, torch.Generator().manual_seed(3)
    whole, empty = (relp.read_out(model, model.stream(tokens), answers) for tokens in (original, patch))
    torch.testing.assert_close(run(edges), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(run(torch.zeros_like(edges)), empty, rtol=0, atol=1e-12)
    for share in (0.3, 0.9):
        kept = edges & (torch.rand(edges.shape, generator=generator) < share)
        wanted = run_by_hand(model, original, patch, answers, kept)
        assert (wanted - whole).abs().max() > 1e-3 and (wanted - empty).abs().max() > 1e-3
        torch.testing.assert_close(run(kept), wanted, rtol=0, atol=1e-12)


def test_a_circuit_without_one_edge_is_exact_patching_of_it(load, pair):
    model = load("neox")
    graph, run = Graph.of(model.config), Circuits(model, *pair)
    scores, _ = patch_edges(model, *pair)
    whole = run(graph.edges)
    for w, r in graph.edges.nonzero().tolist()[::7]:
        kept = graph.edges.clone()
        kept[w, r] = False
        torch.testing.assert_close(run(kept) - whole, scores[:, w, r], rtol=0, atol=1e-12)


def test_edges_are_ranked_by_what_they_do_for_the_behaviour_or_at_all():
    scores = torch.tensor([[0.5, -3.0, 1.0], [9.0, -2.0, 4.0]])
    items = torch.tensor([[True, True, True], [False, True, True]])
    assert ranking(scores, items, signed=True).tolist() == [1, 4, 0, 2, 5]  # the most negative first
    assert ranking(scores, items, signed=False).tolist() == [5, 1, 4, 2, 0]


def test_edges_that_lead_nowhere_are_pruned():
    graph = Graph(3, 2, parallel=False)

    def circuit(*names):
        kept = torch.zeros_like(graph.edges)
        for name in names:
            writer, reader = name.split("->")
            kept[graph.writers.index(writer), graph.readers.index(reader)] = True
        assert (kept & graph.edges).sum() == len(names)
        return kept

    path = ["input->a0.h1<k>", "a0.h1->m0", "m0->a2.h0<v>", "a2.h0->logits"]
    ends = ["input->a1.h0<q>", "a1.h0->m1", "a0.h1->a1.h1<q>"]  # nobody reads m1, or what a1.h1 writes
    starts = ["a1.h1->m2", "m2->logits", "a0.h0->logits"]  # a1.h1 writes nothing else, and a0.h0 reads nothing
    assert torch.equal(pruned(circuit(*path), graph), circuit(*path))
    assert torch.equal(pruned(circuit(*path, *ends), graph), circuit(*path))
    # a1.h1 does read now: from a0.h1
    assert torch.equal(pruned(circuit(*path, *ends, *starts), graph), circuit(*path, "a0.h1->a1.h1<q>", *starts[:2]))
    assert not pruned(circuit(*path[:-1]), graph).any() and not pruned(circuit(*path[1:]), graph).any()
    assert torch.equal(pruned(graph.edges, graph), graph.edges)
    # as edges of the first items of a ranking, or of nodes with all that they write
    order = torch.tensor([i for name in path for i in circuit(name).flatten().nonzero()[0].tolist()])
    assert torch.equal(best(order, 4, graph, by_node=False), circuit(*path)) and not best(order, 3, graph, False).any()
    # input and m0 with all that they write, but for what goes to nodes that write nothing
    nodes = best(torch.tensor([0, 3, 1]), 2, graph, by_node=True)
    assert torch.equal(nodes, circuit("input->m0", "input->logits", "m0->logits"))


def test_areas_are_mibs():
    f = torch.rand(len(SHARES), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    linear = log = 0
    for i in range(len(SHARES) - 1):
        middle = (f[i] + f[i + 1]) / 2
        linear += (SHARES[i + 1] - SHARES[i]) * middle
        log += (math.log(SHARES[i + 1]) - math.log(SHARES[i])) * middle
    torch.testing.assert_close(area(f), linear)
    torch.testing.assert_close(area(f, log=True), log / math.log(1000))
    torch.testing.assert_close(area(torch.ones(len(SHARES), 1)), torch.tensor([0.999]))


def test_faithfulness_has_both_averages():
    circuit, whole, empty = torch.tensor([[2.0, 5.0], [6.0, 6.0], [-2.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    f = faithfulness(circuit, whole, empty, weights)
    assert f["ratio_of_means"].tolist() == pytest.approx([(3.5 + 1) / (6 + 1), 0.5])
    assert f["mean_of_ratios"].tolist() == pytest.approx([(4 / 8 + 5 / 6) / 2, 0.5])


def test_stability_counts_what_the_resamples_have_in_common():
    scores = torch.tensor([[9.0, 5, 1, 0], [9, 1, 5, 0], [-9, 5, 1, 0]])
    weights = torch.tensor([[3.0, 0, 0], [0, 3, 0], [1, 1, 1], [0, 0, 3]], dtype=torch.float64)
    inclusion, overlap = stability(scores, 2, weights)
    # {0, 1}, {0, 2}, {1 (11), 0 (9)}, {0, 1}
    assert inclusion.tolist() == [1, 0.75, 0.25, 0]
    assert overlap == pytest.approx((3 * 1 + 3 * (1 / 3)) / 6)
