"""--grid, --verify, parts of nodes and sets of rules in the command line: every number computed again another way."""

import itertools
import json

import numpy as np
import pytest
import torch
from test_evaluate import results, run, tiny  # noqa: F401, the fixtures

import evaluate
import models
import relp
import tasks


@pytest.fixture
def setting(tiny):  # noqa: F811
    def call(name, n):
        model, tokenizer = models.from_pretrained(str(tiny[name])), models.load_tokenizer(str(tiny[name]))
        return model, tasks.ioi(tokenizer, n)

    return call


def of_length(pairs):
    """[(rows, [original, patch, answers])] for each prompt length."""
    lengths = [len(p.original) for p in pairs]
    for length in dict.fromkeys(lengths):
        rows = [i for i, other in enumerate(lengths) if other == length]
        yield rows, evaluate.tensors([pairs[i] for i in rows], "cpu")


def test_methods_may_be_sets_of_rules(tiny, results, setting):  # noqa: F811
    methods = "ap,atp,atp*,relp,twopoint,ig,ln+ah,half2+attention2,temperature=2+identity,epsilon=0.1"
    summary, scores = results(tiny["gemma2"], "--n", 4, "--methods", methods, "--steps", 3, "--nodes", "q,mlp_out,head")
    model, pairs = setting("gemma2", 4)
    options = {
        "atp": {},
        "relp": {"lrp": True},
        "twopoint": {"lrp": models.TWO_POINT["gemma2"]},
        "ig": {"steps": 3},
        "ln+ah": {"lrp": models.Rules(ln=True, ah=True)},
        "half2+attention2": {"lrp": models.Rules(two_point=("half", "attention"))},
        "temperature=2+identity": {"lrp": models.Rules(identity=True, temperature=2.0)},
        "epsilon=0.1": {"lrp": models.Rules(epsilon=0.1)},
    }
    assert list(summary["pcc"]) == [*("atp", "atp*", "relp", "twopoint", "ig"), *list(options)[4:]]
    for rows, batch in of_length(pairs):
        nodes = ["q", "mlp_out", "head"]
        wanted = {m: relp.attribute(model, *batch, nodes, **how) for m, how in options.items()}
        wanted["atp*"] = relp.attribute_star(model, *batch, nodes)
        wanted["ap"] = relp.activation_patching(model, *batch, nodes)
        for method, of_nodes in wanted.items():
            for node, value in of_nodes.items():
                got = scores[f"{method}_{node}"][rows][:, :, : value.shape[2]]
                assert got.shape == value.shape
                assert got == pytest.approx(value.numpy(), abs=1e-4 * float(value.abs().max()))
    assert np.abs(scores["atp*_q"] - scores["atp_q"])[~np.isnan(scores["atp_q"])].max() > 1e-6
    assert np.array_equal(scores["atp*_head"], scores["atp_head"], equal_nan=True)


@pytest.mark.parametrize(
    "name, flags", [("gpt2", ["ln", "identity", "ah"]), ("gemma2", ["ln", "identity", "half", "ah"])]
)
def test_grid(name, flags, tiny, run, setting, tmp_path, monkeypatch):  # noqa: F811
    """Every subset with every linear rule, its numbers those of a run with these rules alone; the marks; what a rule adds."""
    monkeypatch.setattr(evaluate, "LINEAR", ["", "gamma=0.5"])
    code, out, err = run("--model", tiny[name], "--n", 5, "--no-plot", "--grid", "--nodes", "attn_out,mlp_out")
    assert (code, err) == (0, [])
    found = json.loads((tmp_path / "out" / f"{name}-ioi" / "grid.json").read_text())
    subsets = [s for n in range(len(flags) + 1) for s in itertools.combinations(flags, n)]
    labels = {"+".join([*s, *linear]) or "none" for s in subsets for linear in ([], ["gamma=0.5"])}
    assert found["rules"].keys() == labels and len(labels) == 2 ** (len(flags) + 1)
    paper = "+".join(f for f in flags if f != "ah")
    assert found["paper"] == paper

    model, pairs = setting(name, 5)
    groups = [p.group for p in pairs]
    with np.load(tmp_path / "out" / f"{name}-ioi" / "scores.npz") as file:
        ap = {node: torch.tensor(file[f"ap_{node}"]) for node in ("attn_out", "mlp_out")}
    for label in ("none", paper, "ln", "ln+ah+gamma=0.5"):
        lrp, got = evaluate.parse_rules(label.replace("+", ",")), []
        for node in ap:
            scores = torch.full_like(ap[node], torch.nan)
            for rows, batch in of_length(pairs):
                value = relp.attribute(model, *batch, [node], lrp=lrp)[node]
                scores[rows, :, : value.shape[2]] = value
            wanted = relp.agreement(scores, ap[node], groups)
            for what in ("averaged", "pooled", "per_prompt"):
                assert found["rules"][label][node][what][0] == pytest.approx(float(wanted[what]), abs=1e-4)
            got.append(float(wanted["averaged"]))
        assert found["rules"][label]["mean"][0] == pytest.approx(np.mean(got), abs=1e-4)
    mean = lambda label: found["rules"][label]["mean"][0]
    for flag in flags:
        of = found["effects"][flag]
        assert of["alone"][0] == pytest.approx(mean(flag) - mean("none"))
        others = [f for f in paper.split("+") if f != flag]
        with_it = "+".join(f for f in flags if f in (*others, flag))
        assert of["beside the paper's others"][0] == pytest.approx(mean(with_it) - mean("+".join(others)))
        pairs_of_sets = [
            ("+".join(f for f in flags if f in (*s, flag)), "+".join(s) or "none") for s in subsets if flag not in s
        ]
        assert of["on average"][0] == pytest.approx(np.mean([mean(a) - mean(b) for a, b in pairs_of_sets]))

    table = out.split("PCC with AP by rules")[1].split("what a rule adds")[0].splitlines()[1:]
    rows = [(line.split()[0], line) for line in table if line.strip()]
    assert sorted(label for label, _ in rows) == sorted(labels)
    assert [mean(label) for label, _ in rows] == sorted((mean(label) for label in labels), reverse=True)
    marked = {label: line for label, line in rows}
    assert "the paper's" in marked[paper] and "LN alone" in marked["ln"] and "AtP" in marked["none"]
    best = max(flags, key=lambda flag: found["effects"][flag]["alone"][0])
    assert f"  {best} alone makes" in out


def test_grid_takes_ap_from_disk(tiny, run, tmp_path, monkeypatch):  # noqa: F811
    """The second run of the same model and prompts patches nothing and prints the same; other prompts, or weights, are patched anew."""
    monkeypatch.setattr(evaluate, "LINEAR", [""])
    calls, patching = [], relp.activation_patching
    monkeypatch.setattr(relp, "activation_patching", lambda *a, **k: calls.append(1) or patching(*a, **k))
    arguments = ["--model", tiny["gpt2"], "--n", 3, "--no-plot", "--nodes", "mlp_out"]
    table = lambda out: out.split("PCC with AP by rules")[1]
    first = run(*arguments, "--grid")[1]
    done = len(calls)
    assert done > 0 and table(run(*arguments, "--grid")[1]) == table(first) and len(calls) == done
    run(*arguments, "--grid", "--seed", 1)
    assert len(calls) > done
    done = len(calls)
    run(*arguments)  # without --grid, AP is what is asked for
    assert len(calls) > done
    path = tmp_path / "out" / "gpt2-ioi" / "scores.npz"
    path.write_bytes(path.read_bytes()[:200])
    done = len(calls)
    code, _, err = run(*arguments, "--grid")
    assert (code, err) == (0, []) and len(calls) > done


def test_verify(tiny, run, setting, tmp_path):  # noqa: F811
    """The K largest averaged scores over all kinds of nodes, AP of these and no others, the next score as the bound."""
    nodes = ["mlp_out", "head", "neuron"]
    code, out, err = run(
        "--model",
        tiny["gpt2"],
        "--n",
        6,
        "--no-plot",
        "--nodes",
        ",".join(nodes),
        "--methods",
        "ap,atp,relp",
        "--verify",
        9,
    )
    assert (code, err) == (0, [])
    folder = tmp_path / "out" / "gpt2-ioi"
    found = json.loads((folder / "verified.json").read_text())
    with np.load(folder / "scores.npz") as file:
        scores = dict(file)
    assert not any(key.startswith("ap_") for key in scores)
    model, pairs = setting("gpt2", 6)
    roles, at = evaluate.overlay(pairs)

    def averaged(values, layer, label, part):  # over the pairs that have this role
        own = [i for i in range(len(pairs)) if at[i, label] >= 0]
        return float(np.mean([values[(i, layer, at[i, label], *part)] for i in own]))

    every = []
    for node in nodes:
        values = scores[f"relp_{node}"]
        for layer, label, *part in np.ndindex(values.shape[1], len(roles), *values.shape[3:]):
            every.append((averaged(values, layer, label, part), node, layer, label, *part))
    every.sort(key=lambda row: -abs(row[0]))
    assert found["ranked_by"] == "relp" and found["of"] == len(every) and len(found["nodes"]) == 9
    assert found["bound"] == pytest.approx(abs(every[9][0]), rel=1e-4)
    whole = {node: np.full(scores[f"relp_{node}"].shape, np.nan) for node in nodes}
    for rows, batch in of_length(pairs):
        for node, value in relp.activation_patching(model, *batch, nodes).items():
            whole[node][rows, :, : value.shape[2]] = value.numpy()
    for row, (score, node, layer, label, *part) in zip(found["nodes"], every):
        assert row["scores"]["relp"] == pytest.approx(score, rel=1e-4)
        assert (row["node"], row["layer"], row["position"]) == (node, layer, roles[label])
        assert row["part"] == (part[0] if part else None)
        assert row["scores"]["ap"] == pytest.approx(averaged(whole[node], layer, label, part), abs=1e-4)
        assert row["scores"]["atp"] == pytest.approx(averaged(scores[f"atp_{node}"], layer, label, part), abs=1e-5)
    run("--model", tiny["gpt2"], "--n", 3, "--no-plot", "--methods", "relp", "--verify", 9)
    with np.load(folder / "scores.npz") as file:
        assert {key[5:] for key in file if key.startswith("relp_")} == {
            "resid_pre",
            "attn_out",
            "mlp_out",
            "head",
            "neuron",
        }
    assert "the 9 nodes of" in out and f"beyond {found['bound']:.3f}" in out


def test_figure_of_heads_and_neurons(tiny, run, tmp_path):  # noqa: F811
    code, _, err = run(
        "--model", tiny["gemma2"], "--n", 2, "--nodes", "resid_pre,head,head_k,neuron", "--methods", "atp,relp"
    )
    picture = (tmp_path / "out" / "gemma2-ioi" / "heatmaps.png").read_bytes()
    assert (code, err) == (0, []) and picture.startswith(b"\x89PNG") and len(picture) > 10000


@pytest.mark.parametrize("arguments, words", [
    (["--grid", "--verify", "3"], ["--grid", "--verify", "choose one"]),
    (["--verify", "0"], ["--verify", "at least 1"]),
    (["--verify", "3", "--methods", "ap"], ["--verify", "--methods relp"]),
    (["--prompts", "pairs.jsonl", "--corruption", "s2"], ["--corruption", "no meaning with --prompts"]),
    (["--methods", "ap,ln+mlp"], ["unknown method 'ln+mlp'", "ln+ah"]),
    (["--methods", "ln3"], ["unknown method 'ln3'"]),
    (["--rules", "ln,ah2"], ["unknown rule 'ah2'", "attention2"]),
    (["--rules", "temperature=0"], ["temperature", "positive"]),
    (["--task", "sva", "--methods", "relp,atp*"], ["AtP*", "sva"]),
    (["--task", "sva", "--grid"], ["--grid", "sva"]),
    (["--nodes", "heads"], ["unknown node 'heads'", "head_pattern"]),
])  # fmt: skip
def test_bad_input(arguments, words, run):  # noqa: F811
    code, _, err = run(*arguments)
    assert code == 2 and len(err) == 1 and all(word in err[0] for word in words), err
