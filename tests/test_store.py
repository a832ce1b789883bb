"""AP's store: what is finished is not computed again, and what is kept is taken only for exactly the same AP."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
import relp
import tasks
from support import experts, families, results, resume, scoring
from support.results import Store, weights_digest
from support.scoring import AP, ATP

NODES = ["resid_pre", "head"]


@pytest.fixture
def model(checkpoint):
    return models.from_pretrained(str(checkpoint("gemma2")[0]))


def pair(*original, patch, answers=(5, 6)):
    roles = tuple(map(str, original))
    return tasks.Pair(tuple(original), tuple(patch), answers, f"length {len(original)}", roles)


PAIRS = [
    pair(1, 2, 3, 4, patch=(1, 9, 3, 4)),
    pair(1, 2, 3, 4, patch=(1, 2, 8, 4), answers=(7, 8)),
    pair(5, 6, 7, patch=(5, 6, 9)),
    pair(5, 6, 8, patch=(5, 7, 8)),
    pair(5, 9, 8, patch=(5, 7, 8)),
]


@pytest.fixture
def patched(monkeypatch):
    """The numbers of pairs that AP was run on, in calls of resume.activation_patching."""
    calls, original = [], resume.activation_patching

    def count(model, tokens, *args, **kwargs):
        calls.append(len(tokens))
        return original(model, tokens, *args, **kwargs)

    monkeypatch.setattr(resume, "activation_patching", count)
    return calls


@pytest.fixture
def score(model, tmp_path):
    def call(methods=(AP,), metric="logit_diff", size=None, out=tmp_path, nodes=NODES):
        return scoring.score_pairs("", model, PAIRS, list(methods), nodes, metric, size, out)

    return call


def same(a, b, tolerance=0.0):
    for key in a.scores:
        np.testing.assert_allclose(a.scores[key], b.scores[key], rtol=0, atol=tolerance)


def test_a_finished_run_computes_no_ap_again(score, patched, model, tmp_path):
    first = score()
    assert patched == [2, 3]
    again = score([AP, ATP])  # with another method, too
    assert patched == [2, 3]
    same(first, again)
    store = Store(tmp_path, model, NODES, "logit_diff")
    kept = sum(float(store.get(pair)["seconds"]) for pair in PAIRS)
    assert again.seconds["ap"] >= kept > 0  # what AP has taken, and not only reading the files
    assert kept <= first.seconds["ap"]


def test_what_is_lacking_of_a_batch_is_run(score, patched, model, tmp_path):
    wanted = score()
    Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[1]).unlink()
    same(score(), wanted, 1e-4)
    assert patched == [2, 3, 1]


@pytest.mark.parametrize("metric", ["logit_diff", "kl"])
def test_the_batch_size_does_not_matter(metric, score, patched):
    first = score(metric=metric, size=2)
    assert patched == [2, 2, 1]
    same(first, score(metric=metric, size=1))
    assert patched == [2, 2, 1]


def test_a_stopped_run_goes_on(score, patched, monkeypatch, tmp_path):
    wanted = score(out=None)
    del patched[:]
    counted = resume.activation_patching

    def stopped(model, tokens, *args, **kwargs):
        if len(patched) == 1:
            raise KeyboardInterrupt
        return counted(model, tokens, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(resume, "activation_patching", stopped)
        with pytest.raises(KeyboardInterrupt):
            score()
    assert patched == [2]
    same(score(), wanted)
    assert patched == [2, 3]  # the first batch is not run again
    assert all(path.suffix == ".npz" and not path.name.startswith(".") for path in (tmp_path / "ap").iterdir())


def test_without_a_folder_or_a_name_of_the_metric_nothing_is_kept(score, patched, tmp_path):
    def own(logits, targets):
        return logits.sum(-1)

    for _ in range(2):
        score(out=None)
        score(metric=own)
    assert patched == [2, 3] * 4 and not list(tmp_path.iterdir())


DAMAGES = [
    lambda file, content: file.write_bytes(b""),
    lambda file, content: file.write_bytes(content[: len(content) // 2]),
    lambda file, content: file.write_bytes(content[:100] + bytes([255 - content[100]]) + content[101:]),
    lambda file, content: np.savez(open(file, "wb"), resid_pre=np.zeros((3, 4))),
    lambda file, content: np.savez(open(file, "wb"), head=1, resid_pre=np.array(None), seconds=1.0),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(damage, score, patched, tmp_path):
    wanted = score()
    for file in (tmp_path / "ap").iterdir():
        damage(file, file.read_bytes())
    same(score(), wanted)
    assert patched == [2, 3] * 2
    same(score(), wanted)
    assert patched == [2, 3] * 2


# ---------------------------------------------------------------------------------------------------------------------
# The name of a file: each thing that determines AP, changed one at a time


def test_every_number_counts(model, tmp_path):
    """One of them in each tensor, changed by one rounding."""
    seen = {Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[0])}
    for name, x in model.state_dict().items():
        number = x.view(-1)[len(x.view(-1)) * 2 // 3]
        before = number.clone()
        number.copy_(torch.nextafter(before, before + 1))
        path = Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[0])
        assert path not in seen, name
        seen.add(path)
        number.copy_(before)
    assert Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[0]) in seen


def test_weights_are_told_apart():
    """Each of them from each other, in a large tensor too."""
    x, large = torch.arange(6.0).view(2, 3), torch.zeros(99_999)
    one = large.clone()
    one[54_321] = 1
    states = [{"x": x}, {"y": x}, {"x": x.view(3, 2)}, {"x": x.double()}, {"x": x.view(torch.int32)}, {"x": x.flip(0)}]
    states += [{"x": x.T}, {"x": x, "y": x}, {"x": x, "y": x + 1}, {"x": x + 1, "y": x}, {"x": large}, {"x": one}, {}]
    assert len({weights_digest(SimpleNamespace(state_dict=lambda s=state: s)) for state in states}) == len(states)


@pytest.mark.parametrize("change", ["config", "shares", "dtype", "device", "torch", "source"])
def test_what_the_forward_pass_depends_on(change, model, tmp_path, monkeypatch):
    before = Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[0])
    match change:
        case "config":
            model.config = dataclasses.replace(model.config, eps=model.config.eps * 1.01)
        case "shares":  # another process has another part of the weights
            monkeypatch.setattr(results, "gathered", lambda mine: [mine, "another"])
        case "dtype":
            model.double()
        case "device":
            monkeypatch.setattr(results, "device_name", lambda device: "another")
        case "torch":
            monkeypatch.setattr(torch, "__version__", "0.1")
        case "source":
            monkeypatch.setattr(results, "SOURCE", "another")
    assert Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[0]) != before


def test_nodes_metric_and_prompts(model, tmp_path):
    def path(nodes=NODES, metric="logit_diff", **changed):
        return Store(tmp_path, model, nodes, metric).path(dataclasses.replace(PAIRS[0], **changed))

    same = path(nodes=NODES[::-1], group="another", roles=("a", "b", "c", "d"))  # these change nothing
    assert same == path()
    changed = [path(nodes=["resid_pre"]), path(metric="prob_diff"), path(original=(1, 2, 3, 5))]
    changed += [path(patch=(1, 9, 3, 5)), path(answers=(5, 7)), path(answers=(6, 5))]
    assert len({path(), *changed}) == 7


@pytest.mark.parametrize("module", [models, relp, resume, families, experts])
def test_every_file_of_the_forward_pass_counts(module, model, tmp_path, monkeypatch):
    """As it was when the process began: what is written into it later is not what the process runs."""
    assert results.source_digest() == results.SOURCE
    before = Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[0])
    copy = tmp_path / "copy.py"
    copy.write_bytes(open(module.__file__, "rb").read() + b"#")
    monkeypatch.setattr(module, "__file__", str(copy))
    assert results.source_digest() != results.SOURCE
    assert Store(tmp_path, model, NODES, "logit_diff").path(PAIRS[0]) == before


def test_a_file_is_whole_or_not_there(model, tmp_path, monkeypatch):
    store = Store(tmp_path, model, ["resid_pre"], "logit_diff")
    scores = {"resid_pre": torch.ones(3, 4), "seconds": torch.tensor(1.0)}

    def half(file, **arrays):
        file.write(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(np, "savez_compressed", half)
        with pytest.raises(KeyboardInterrupt):
            store.put(PAIRS[0], scores)
    assert store.get(PAIRS[0]) is None and not list(store.folder.iterdir())
    store.put(PAIRS[0], scores)
    assert store.get(PAIRS[0])["resid_pre"].equal(scores["resid_pre"])


def test_two_runs_write_one_file(tmp_path):
    """One begins and ends while the other is writing. Both end well, and what is there is of the last."""

    def slow(file):
        file.write(b"of the ")
        results.save(tmp_path / "file", lambda file: file.write(b"of the first"))
        assert (tmp_path / "file").read_bytes() == b"of the first"
        file.write(b"second")

    results.save(tmp_path / "file", slow)
    assert (tmp_path / "file").read_bytes() == b"of the second"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
