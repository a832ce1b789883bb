"""Edge scores, exact patching and circuits against runs in which hooks show every reader a stream of its own."""

import math

import pytest
import torch
from conftest import FAMILIES

import models
import relp
import support.families  # noqa: F401
from beyond import twopoint
from beyond.edges.circuits import Circuits, along_paths, best, pruned, ranking
from beyond.edges.files import circuit_json
from beyond.edges.graph import Graph, stream_of, ungrouped, written_by_heads
from beyond.edges.judging import SHARES, area, areas, stability
from beyond.edges.patching import patch_edges
from beyond.edges.scores import attribute_edges
from models import Rules

EDGE_FAMILIES = [*FAMILIES, "gpt2-untied", "qwen2-mha-tied-window", "llama-biased", "qwen3", "gemma3", "qwen3-moe"]
RULES = {
    "atp": False,
    "relp": True,
    "epsilon": Rules(ln=True, epsilon=0.1),
    "gamma+ah": Rules(ah=True, gamma=0.2),
    "two-point": twopoint.TwoPoint(),
}
CASES = [(family, "relp") for family in EDGE_FAMILIES]
CASES += [(family, rules) for family in ("gpt2", "neox", "gemma2", "llama") for rules in RULES if rules != "relp"]
CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def load(checkpoint):
    """A model in which each query head has a key and a value of its own: split_run() needs that."""
    return lambda name: ungrouped(models.from_pretrained(str(checkpoint(name)[0]), torch.float64))


def split_run(model, tokens, see, lrp=False):
    """A run in which the reader sees see(reader, stream, acts) in the place of the stream. The final stream as `logits`
    sees it. acts: what the run has computed so far, {(node, layer): [b, t, ...]}.

    A reader's query, key, value or mlp_out is that of a run of its block on what it sees.
    """
    c, acts = model.config, {}

    def read(reader, name, layer):
        mid = name == "mlp_out" and not c.parallel
        x = see(reader, acts["resid_mid" if mid else "resid_pre", layer], acts)
        found = {}

        def hook(node, _, y):
            if node == "resid_mid" and mid:
                return x
            found[node] = y
            return y

        hook.nodes = {name, "resid_mid"} if mid else {name}
        model.block(layer, acts["resid_pre", layer] if mid else x, lrp, hook)
        return found[name]

    def hook(name, layer, x):
        if name == "mlp_out":
            x = read(f"m{layer}", name, layer)
        elif name in ("q", "k", "v"):
            x = torch.stack([read(f"a{layer}.h{h}<{name}>", name, layer)[:, :, h] for h in range(c.n_heads)], dim=2)
        acts[name, layer] = x
        return x

    hook.nodes = {"resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out"}
    return see("logits", model.stream(tokens, lrp, hook), acts)


def contributions(model, acts):
    """{writer: [b, t, d]}: what each adds to the stream, from recorded nodes of a run, or of the first part of one."""
    found = {"input": acts["resid_pre", 0]}
    for layer, b in enumerate(model.blocks):
        if ("attn_out", layer) in acts:
            z, weight, bias = acts["z", layer], b.attn.o.weight, b.attn.o.bias
            whole = z.flatten(-2) @ weight.T + (0 if bias is None else bias)
            for head in range(model.config.n_heads):
                only = torch.zeros_like(z)
                only[:, :, head] = z[:, :, head]
                part = only.flatten(-2) @ weight.T + (0 if bias is None else bias / model.config.n_heads)
                found[f"a{layer}.h{head}"] = part * (acts["attn_out", layer] / whole)  # a norm scales all parts alike
        if ("mlp_out", layer) in acts:
            found[f"m{layer}"] = acts["mlp_out", layer]
    return found


def run_nodes(model, tokens):
    """The nodes of an ordinary run, {(node, layer): [b, t, ...]}."""
    acts = {}

    def hook(name, layer, x):
        acts[name, layer] = x
        return x

    model.stream(tokens, hook=hook)
    return acts


def changes(model, pair):
    """[w, b, t, d]: what the writers add in the patch run minus what they add in the original run."""
    before, after = (contributions(model, run_nodes(model, tokens)) for tokens in pair[:2])
    return torch.stack([after[writer] - before[writer] for writer in Graph.of(model.config).writers])


def rho_by_hand(model, original, patch, answers, lrp):
    """{reader: rho_v [b, t, d]}, by autograd at what each reader sees."""
    graph, rules = Graph.of(model.config), model.rules(lrp)
    if isinstance(rules, twopoint.TwoPoint):
        for_patch, rules = rules.two_runs()
        with torch.no_grad():
            stream = split_run(model, patch, lambda reader, x, acts: x, for_patch)
            relp.read_out(model, stream, answers, lrp=for_patch)
    extra = {r: torch.zeros(*original.shape, model.config.d_model, dtype=torch.float64) for r in graph.readers}
    for x in extra.values():
        x.requires_grad_()
    stream = split_run(model, original, lambda reader, x, acts: x + extra[reader], rules)
    value = relp.read_out(model, stream, answers, lrp=rules).sum()
    return dict(zip(extra, torch.autograd.grad(value, list(extra.values()), materialize_grads=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("family, rules", CASES)
def test_scores_and_their_two_sums(load, pair, family, rules):
    model = load(family)
    graph, lrp = Graph.of(model.config), RULES[rules]
    scores = attribute_edges(model, *pair, lrp=lrp, by_position=True)
    close = {"rtol": 0, "atol": 1e-10 * float(scores.abs().max())}
    assert scores.abs().max() > 1e-3

    # the definition: the writer's change times the gradient at what the reader sees
    rho = rho_by_hand(model, *pair, lrp)
    wanted = torch.einsum("wbtd,rbtd->btwr", changes(model, pair), torch.stack([rho[r] for r in graph.readers]))
    torch.testing.assert_close(scores, wanted * graph.edges, **close)
    torch.testing.assert_close(attribute_edges(model, *pair, lrp=lrp), scores.sum(1), **close)

    # the edges of a reader add up to the score of the whole stream that it sees
    before, after = (run_nodes(model, tokens) for tokens in pair[:2])
    for layer, kind in graph.places:
        key = stream_of(graph, layer, kind)
        for reader in range(len(graph.readers))[graph.readers_of(layer, kind)]:
            of_stream = ((after[key] - before[key]) * rho[graph.readers[reader]]).sum(-1)
            torch.testing.assert_close(scores[..., reader].sum(-1), of_stream, **close)

    # the edges of a writer add up to the node's score
    of_writers, parallel = scores.sum(-1), graph.parallel
    assert parallel == (family in ("neox", "neox-tied-half-rotary"))
    nodes = relp_or_two_point(model, pair, lrp)
    torch.testing.assert_close(of_writers[:, :, 0], nodes["resid_pre"][:, 0], **close)
    for layer in range(graph.n_layers):
        *heads, mlp = range(len(graph.writers))[graph.writers_of(layer)]
        torch.testing.assert_close(of_writers[:, :, mlp], nodes["mlp_out"][:, layer], **close)
        torch.testing.assert_close(of_writers[:, :, heads].sum(-1), nodes["attn_out"][:, layer], **close)
        if not graph.post_norm and rules not in ("epsilon", "gamma+ah"):  # a plain matrix from z to the stream
            torch.testing.assert_close(of_writers[:, :, heads], nodes["head"][:, layer], **close)


def relp_or_two_point(model, pair, lrp):
    """Node scores by these rules."""
    names = ["resid_pre", "head", "attn_out", "mlp_out"]
    if not isinstance(lrp, twopoint.TwoPoint):
        return relp.attribute(model, *pair, names, lrp=lrp)
    acts, patch_acts, rho = twopoint.activations_and_rho(model, *pair, names, relp.logit_diff, lrp)
    return relp.by_node({key: ((patch_acts[key] - acts[key]) * rho[key]).sum(-1) for key in rho}, names)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_eap_ig_is_the_mean_of_atp_along_the_embeddings_way(load, pair, family):
    model, (original, patch, answers) = load(family), pair
    graph, steps, embed, total = Graph.of(model.config), 3, model.embed, {}
    before, after = model.embed(original), model.embed(patch)
    for k in range(1, steps + 1):  # from the patch run's embedding to the original run's
        model.embed = lambda tokens, k=k: after + k / steps * (before - after)
        for reader, rho in rho_by_hand(model, original, patch, answers, False).items():
            total[reader] = total.get(reader, 0) + rho / steps
        model.embed = embed
    rho = torch.stack([total[reader] for reader in graph.readers])
    wanted = torch.einsum("wbtd,rbtd->bwr", changes(model, pair), rho) * graph.edges
    torch.testing.assert_close(attribute_edges(model, *pair, steps=steps), wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(attribute_edges(model, *pair, steps=1), attribute_edges(model, *pair))


# ---------------------------------------------------------------------------------------------------------------------
# Exact patching


@pytest.mark.parametrize("family", EDGE_FAMILIES)
def test_exact_patching_is_the_definition(load, pair, family):
    """A plain loop over some of the edges, whole and by position."""
    model, (original, patch, answers) = load(family), tuple(x[1:3] for x in pair)
    graph, change = Graph.of(model.config), changes(model, (original, patch))
    whole, runs = patch_edges(model, original, patch, answers, rows=7)
    by_position, _ = patch_edges(model, original, patch, answers, by_position=True)
    value = relp.read_out(model, model.stream(original), answers)

    def effect(w, r, places):
        moved = torch.zeros_like(change[w])
        moved[:, places] = change[w][:, places]
        stream = split_run(model, original, lambda reader, x, _: x + moved if reader == graph.readers[r] else x)
        return relp.read_out(model, stream, answers) - value

    edges = graph.edges.nonzero().tolist()
    assert runs == 2 * len(edges) and not whole[:, ~graph.edges].any() and not by_position[..., ~graph.edges].any()
    largest = 0
    for w, r in edges[::17]:
        wanted = effect(w, r, slice(None))
        torch.testing.assert_close(whole[:, w, r], wanted, **CLOSE)
        largest = max(largest, float(wanted.abs().max()))
    assert largest > 0.01
    for w, r in edges[::101]:
        for pos in (3, 6, 8):  # two where tokens differ, and the last one
            torch.testing.assert_close(by_position[:, pos, w, r], effect(w, r, [pos]), **CLOSE)


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
    scores, runs = patch_edges(model, pair[0], pair[0], pair[2], by_position=True)
    assert runs == 0 and not scores.any()  # writers that do the same cost no run


# ---------------------------------------------------------------------------------------------------------------------
# The graph


def test_names_and_order_are_those_of_eap_igs_graph():
    graph = Graph(2, 2)
    assert graph.writers == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert graph.readers == [
        "a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0",
        "a1.h0<q>", "a1.h1<q>", "a1.h0<k>", "a1.h1<k>", "a1.h0<v>", "a1.h1<v>", "m1", "logits",
    ]  # fmt: skip
    edges = set(graph.names)
    assert len(edges) == len(graph.names) == 6 * 1 + 3 + 6 * 4 + 6 + 7
    assert {"input->a0.h0<q>", "a0.h1->m0", "m0->a1.h1<k>", "m1->logits", "a1.h0->m1"} <= edges
    assert not {"a0.h0->a0.h1<q>", "m0->m0", "a1.h0->a1.h0<v>"} & edges
    assert edges - set(Graph(2, 2, parallel=True).names) == {"a0.h0->m0", "a0.h1->m0", "a1.h0->m1", "a1.h1->m1"}


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "llama-biased", "qwen3"])
def test_keys_and_values_of_ones_own_change_nothing(checkpoint, tokens, pair, family):
    model = models.from_pretrained(str(checkpoint(family)[0]), torch.float64)
    own = ungrouped(model)
    assert own.config.n_kv_heads == own.config.n_heads > model.config.n_kv_heads
    torch.testing.assert_close(own(tokens), model(tokens), **CLOSE)
    assert own.blocks[0].mlp.up.weight.data_ptr() == model.blocks[0].mlp.up.weight.data_ptr()
    assert ungrouped(own) is own
    assert torch.equal(attribute_edges(model, *pair, lrp=True), attribute_edges(own, *pair, lrp=True))
    assert torch.equal(patch_edges(model, *pair)[0], patch_edges(own, *pair)[0])


def test_heads_add_up_to_attn_out_where_a_bias_and_a_norm_follow(load, tokens):
    model = load("gemma2")
    for block in model.blocks:
        block.attn.o.bias = torch.nn.Parameter(torch.randn(32, dtype=torch.float64), requires_grad=False)
    acts = run_nodes(model, tokens)
    for layer in range(model.config.n_layers):
        parts = written_by_heads(model, layer, acts["z", layer])
        torch.testing.assert_close(parts.sum(0), acts["attn_out", layer], **CLOSE)


def test_bad_arguments(checkpoint, load, pair):
    class Other:
        nodes = ("resid_pre",)

    with pytest.raises(ValueError, match="edges need a models.Transformer, got Other"):
        attribute_edges(Other(), *pair)
    with pytest.raises(ValueError, match="olmo3 models are not supported"):
        patch_edges(models.from_pretrained(str(checkpoint("olmo3")[0])), *pair)
    with pytest.raises(ValueError, match="steps must be a whole number"):
        attribute_edges(load("gpt2"), *pair, steps=0)
    with pytest.raises(ValueError, match="give steps or lrp, not both"):
        attribute_edges(load("gpt2"), *pair, lrp=True, steps=2)


# ---------------------------------------------------------------------------------------------------------------------
# Circuits


def run_by_hand(model, original, patch, answers, kept):
    """The metric of a circuit's run: every reader adds up what the writers have written, edge by edge."""
    graph, theirs = Graph.of(model.config), contributions(model, run_nodes(model, patch))
    edges = set(graph.names_of(kept))
    seen = {reader: graph.writers[: int(graph.edges[:, r].sum())] for r, reader in enumerate(graph.readers)}

    def see(reader, x, acts):
        mine = contributions(model, acts)
        parts = [mine[u] if f"{u}->{reader}" in edges else theirs[u] for u in seen[reader]]
        return sum(parts)

    return relp.read_out(model, split_run(model, original, see), answers)


@pytest.mark.parametrize("family", EDGE_FAMILIES)
def test_a_circuits_run_is_the_definition(load, pair, family):
    model, (original, patch, answers) = load(family), pair
    run = Circuits(model, original, patch, answers)
    edges, generator = run.graph.edges, torch.Generator().manual_seed(3)
    whole, empty = (relp.read_out(model, model.stream(tokens), answers) for tokens in (original, patch))
    torch.testing.assert_close(run(edges), whole, **CLOSE)
    torch.testing.assert_close(run(torch.zeros_like(edges)), empty, **CLOSE)
    for share in (0.3, 0.9, 0.1):  # with few edges, many components repeat the patch run
        kept = edges & (torch.rand(edges.shape, generator=generator) < share)
        wanted = run_by_hand(model, original, patch, answers, kept)
        assert (wanted - whole).abs().max() > 1e-3 and (wanted - empty).abs().max() > 1e-3
        torch.testing.assert_close(run(kept), wanted, **CLOSE)
        assert torch.equal(run(kept | ~edges), run(kept))  # what is no edge does not count


def test_a_circuit_without_one_edge_is_exact_patching_of_it(load, pair):
    model = load("neox")
    graph, run = Graph.of(model.config), Circuits(model, *pair)
    scores, _ = patch_edges(model, *pair)
    whole = run(graph.edges)
    for w, r in graph.edges.nonzero().tolist()[::7]:
        kept = graph.edges.clone()
        kept[w, r] = False
        torch.testing.assert_close(run(kept) - whole, scores[:, w, r], **CLOSE)


def test_edges_are_ranked_by_what_they_do_for_the_behaviour_or_at_all():
    graph = Graph(1, 1)  # input and the head have an edge to m0 and logits, m0 one to logits
    scores = torch.arange(15.0).view(3, 5) % 7 - 3  # [[-3 -2 -1 0 1], [2 3 -3 -2 -1], [0 1 2 3 -3]]
    assert ranking(scores, graph, signed=True).tolist() == [0, 14, 1, 8, 2, 9, 3, 4]  # the most negative first
    assert ranking(scores, graph, signed=False).tolist() == [0, 14, 1, 8, 2, 4, 9, 3]


@pytest.mark.parametrize("parallel", [False, True])
def test_the_strongest_path_through_an_edge(parallel):
    """By a walk along every path. The edges above any strength are a circuit that needs no pruning."""
    graph = Graph(2, 2, parallel)
    strength = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaving = {}
    for name, size in zip(graph.names, strength[graph.edges].tolist()):
        writer, reader = name.split("->")
        leaving.setdefault(writer, []).append((name, reader.partition("<")[0], size))
    through = {}

    def walk(node, path, weakest):
        if node == "logits":
            for name in path:
                through[name] = max(weakest, through.get(name, 0))
        for name, reader, size in leaving.get(node, []):
            walk(reader, [*path, name], min(weakest, size))

    walk("input", [], math.inf)
    found = along_paths(strength, graph)
    wanted = torch.tensor([through[name] for name in graph.names], dtype=torch.float64)
    torch.testing.assert_close(found[graph.edges], wanted, atol=1e-8, rtol=0)
    for least in wanted.unique().tolist():
        kept = graph.in_matrix(wanted >= least)
        assert torch.equal(pruned(kept, graph), kept)


def circuit_of(graph, *names):
    kept = torch.tensor([name in names for name in graph.names])
    assert kept.sum() == len(names)
    return graph.in_matrix(kept)


def test_edges_that_lead_nowhere_are_pruned():
    graph = Graph(3, 2)
    path = ["input->a0.h1<k>", "a0.h1->m0", "m0->a2.h0<v>", "a2.h0->logits"]
    ends = ["input->a1.h0<q>", "a1.h0->m1", "a0.h1->a1.h1<q>"]  # nobody reads m1, or what a1.h1 writes
    starts = ["a1.h1->m2", "m2->logits", "a0.h0->logits"]  # a1.h1 writes nothing else, and a0.h0 reads nothing
    wanted = circuit_of(graph, *path)
    assert torch.equal(pruned(wanted, graph), wanted)
    assert torch.equal(pruned(circuit_of(graph, *path, *ends), graph), wanted)
    # a1.h1 does read now: from a0.h1
    more = circuit_of(graph, *path, "a0.h1->a1.h1<q>", *starts[:2])
    assert torch.equal(pruned(circuit_of(graph, *path, *ends, *starts), graph), more)
    assert not pruned(circuit_of(graph, *path[:-1]), graph).any()
    assert not pruned(circuit_of(graph, *path[1:]), graph).any()
    # the first edges of a ranking
    order = torch.tensor([circuit_of(graph, name).flatten().nonzero().item() for name in path])
    assert torch.equal(best(order, 4, graph), wanted) and not best(order, 3, graph).any()


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2", "gemma3"])
def test_pruning_does_not_change_the_run(load, pair, family):
    """Also where a norm follows attention, so that a head without a reader counts for the others of its layer."""
    run, generator, fewer = Circuits(load(family), *pair), torch.Generator().manual_seed(1), 0
    for share in (0.02, 0.05, 0.1, 0.2) * 3:
        kept = run.graph.edges & (torch.rand(run.graph.edges.shape, generator=generator) < share)
        rest = pruned(kept, run.graph)
        fewer += int(kept.sum() - rest.sum())
        torch.testing.assert_close(run(rest), run(kept), **CLOSE)
    assert fewer > 20


def test_areas_are_mibs():
    f = torch.rand(2, len(SHARES), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = range(len(SHARES) - 1)
    linear, log = (
        sum((x[i + 1] - x[i]) * (f[0, i] + f[0, i + 1]) / 2 for i in steps) for x in (SHARES, [*map(math.log, SHARES)])
    )
    found = areas(*f)
    torch.testing.assert_close(found["cpr"], linear)
    torch.testing.assert_close(found["cpr_log"], log / math.log(1000))
    torch.testing.assert_close(found["cmd"], area((1 - f[1]).abs()))
    torch.testing.assert_close(found["cmd_log"], area((1 - f[1]).abs(), log=True))
    torch.testing.assert_close(area(torch.ones(len(SHARES), 1)), torch.tensor([0.999]))


def test_stability_counts_what_the_resamples_have_in_common():
    scores, graph = torch.zeros(3, 8), Graph(1, 1)
    scores[:, :3] = torch.tensor([[9.0, 5, 1], [9, 1, 5], [-9, 5, 1]])
    weights = torch.tensor([[3.0, 0, 0], [0, 3, 0], [1, 1, 1], [0, 0, 3]], dtype=torch.float64)
    inclusion, overlap = stability(scores, 2, weights, graph)
    # {0, 1}, {0, 2}, {1 (11), 0 (9)}, {0, 1}
    assert inclusion.tolist() == [1, 0.75, 0.25, 0, 0, 0, 0, 0]
    assert overlap == pytest.approx((3 * 1 + 3 * (1 / 3)) / 6)
    direct = graph.names.index("input->logits")
    scores[:, direct] = 0.5
    assert stability(scores, 1, weights, graph, paths=True)[0][direct] == 1  # the only path


def test_a_circuit_file_has_every_edge_and_the_other_sign(load):
    """As EAP-IG's Graph.from_json reads it: an unknown name is an error there, an edge that is missing is out."""
    config = load("gpt2").config
    graph = Graph.of(config)
    scores = torch.randn(graph.edges.shape, generator=torch.Generator().manual_seed(0))
    path = ["input->a0.h1<k>", "a0.h1->logits"]
    content = circuit_json(config, scores, circuit_of(graph, *path))
    assert content["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}
    assert list(content["nodes"]) == [*graph.writers, "logits"] and list(content["edges"]) == graph.names
    assert [node for node, of in content["nodes"].items() if of["in_graph"]] == ["input", "a0.h1", "logits"]
    assert [edge for edge, of in content["edges"].items() if of["in_graph"]] == path
    assert [of["score"] for of in content["edges"].values()] == (-scores[graph.edges]).tolist()
    for u in graph.writers:  # a node's score is the sum of the edges from it; nobody scores logits
        edges = [of["score"] for name, of in content["edges"].items() if name.startswith(f"{u}->")]
        assert content["nodes"][u]["score"] == pytest.approx(sum(edges), abs=1e-5) and edges
    assert content["nodes"]["logits"] == {"in_graph": True}
