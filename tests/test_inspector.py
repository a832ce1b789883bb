"""inspect.html, of nodes and of a circuit of edges: what is in it, and what it does in a real browser.

The browser is headless Chromium, driven through chromedriver by plain HTTP (the WebDriver protocol).
"""

import base64
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import models
import tasks
from beyond.edges import files
from beyond.edges.__main__ import TEMPLATE
from beyond.edges.graph import Graph
from support import inspector
from support.positions import laid_over, overlay
from support.scoring import AP, ATP, Method, Scores
from support.tokenizer import load_tokenizer
from tasks import Pair

METHODS = [AP, ATP, Method("relp", "RelP", lrp=True)]
NODES = ["resid_pre", "attn_out", "mlp_out"]
HOSTILE = [
    "</script><b id=evil>",
    "<!-- <script>",
    "\"'`\\",
    "😀\ud800",
    "\u202eabc",
    "שלום",
    "\u2028\u2029",
    "&lt;",
    "{{data}}",
    "\n",
    "",
]


class Words:
    """A tokenizer of these words."""

    def __init__(self, words):
        self.words, self.n_vocab, self.bos_id = words, len(words), None

    def decode(self, ids):
        return "".join(self.words[i] for i in ids)


SUMMARY = {"arguments": {"seed": 3, "corruption": "s2", "shard": False}, "versions": {"torch": "9.9"}}


def made_up(pairs, nodes=NODES, n_layers=4, methods=METHODS, parts=None):
    """Scores of these pairs, NaN beyond each prompt, with AP, AtP and RelP that differ."""
    rng, longest = np.random.default_rng(0), max(len(pair.original) for pair in pairs)
    beyond = np.arange(longest) >= np.array([len(pair.original) for pair in pairs])[:, None]
    scores = {}
    for m in methods:
        for node in nodes:
            shape = len(pairs), n_layers, longest, *((parts or {}).get(node, ()))
            values = (rng.standard_normal(shape) ** 3).astype(np.float32)
            values.swapaxes(1, 2)[beyond] = np.nan
            scores[m.name, node] = values
    values, likely = rng.standard_normal((len(pairs), 2)), rng.integers(0, 9, (len(pairs), 10))
    chances = np.tile([0.5, 0.2, 0.1, 0.05, 0.01], 2)[None].repeat(len(pairs), 0)
    return Scores(scores, values, np.ones((len(pairs), 2)), likely, chances, {})


def data_of(path):
    """The JSON in a page."""
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def unpacked(found, shape):
    whole = np.frombuffer(base64.b64decode(found["data"]), "<i2").reshape(shape)
    return np.where(whole == -32768, np.nan, whole * found["scale"] / 32767)


def is_close(found, values):
    """Equal to 1/65534 of the largest, and NaN in the same places."""
    found = unpacked(found, values.shape)
    assert (np.isnan(found) == np.isnan(values)).all() and found.size
    error = np.nanmax(np.abs(found - values), initial=0)
    assert error <= np.nanmax(np.abs(values), initial=0) / 65534 * (1 + 1e-6), error


@pytest.fixture(scope="module")
def pairs():
    return tasks.ioi(load_tokenizer("toy-gpt2"), 100, 0)


# ---------------------------------------------------------------------------------------------------------------------
# What is in the page


def test_the_numbers_are_those_of_the_scores(pairs, tmp_path):
    found = made_up(pairs)
    shown = inspector.of_nodes("toy-gpt2", found, METHODS, NODES, pairs, "logit_diff")
    inspector.write(tmp_path / "inspect.html", shown, SUMMARY)
    assert (tmp_path / "inspect.html").stat().st_size <= 3e5
    text = (tmp_path / "inspect.html").read_text()
    assert "http" not in text.replace("http-equiv", "") and "innerHTML" not in text and "src=" not in text
    shown, (_, at) = data_of(tmp_path / "inspect.html"), overlay(pairs)
    assert [kind["name"] for kind in shown["kinds"]] == NODES and len(shown["examples"]) == shown["n_pairs"] == 100
    for kind in shown["kinds"]:
        for m in METHODS:
            of_pairs = found.scores[m.name, kind["name"]]
            assert np.isnan(of_pairs).any()
            is_close(kind["each"][m.name], of_pairs)
            is_close(kind["mean"][m.name], laid_over(of_pairs, at))
    for pair, example, value in zip(pairs, shown["examples"], found.values.tolist()):
        words = load_tokenizer("toy-gpt2")
        for part in ("original", "patch", "answers"):
            assert [shown["tokens"][i] for i in example[part]] == [words.decode([i]) for i in getattr(pair, part)]
        assert example["values"] == value and tuple(example["roles"]) == pair.roles


def test_parts_of_a_cell_are_its_strongest(pairs):
    pairs = pairs[:3]
    found = made_up(pairs, ["mlp_out", "neuron"], parts={"neuron": (20,)})
    shown = inspector.of_nodes("toy-gpt2", found, METHODS, ["mlp_out", "neuron"], pairs, "logit_diff")
    kind = shown.kinds[1]
    assert kind.wholes == ["mlp_hidden", "mlp_out"] and kind.parts["of"] == 20 and shown.kinds[0].parts is None
    of = {m.name: found.scores[m.name, "neuron"] for m in METHODS}
    is_close(kind.each["relp"], of["relp"].sum(-1))
    k = kind.parts["each"]["k"]
    index = np.frombuffer(base64.b64decode(kind.parts["each"]["index"]), "<u4").reshape(*of["ap"].shape[:3], k)
    strength = np.max([np.abs(x) for x in of.values()], axis=0)[0, 1, 2]
    assert k == inspector.PARTS and set(index[0, 1, 2]) == set(np.argsort(-strength)[:k])
    for name, x in of.items():
        is_close(kind.parts["each"]["scores"][name], np.take_along_axis(x, index.astype(int), -1))


def test_a_large_run_shows_its_first_pairs_and_the_mean_of_all(pairs, monkeypatch):
    found = made_up(pairs)
    scores = found.scores
    monkeypatch.setattr(inspector, "MOST", 9 * 4 * 16 * 30)
    shown = inspector.of_nodes("toy-gpt2", found, METHODS, NODES, pairs, "logit_diff")
    longest = scores["ap", "resid_pre"].shape[2]
    n = 9 * 4 * 16 * 30 // (9 * 4 * longest)
    assert len(shown.examples) == n < shown.n_pairs == 100
    is_close(shown.kinds[0].each["ap"], scores["ap", "resid_pre"][:n])
    is_close(shown.kinds[0].mean["ap"], laid_over(scores["ap", "resid_pre"], overlay(pairs)[1]))


def test_zeros_and_missing_values_stay_apart():
    found = inspector.packed(np.array([0.0, np.nan, -3.0, 3.0, np.inf]))
    assert found["scale"] == 3
    values = unpacked(found, (5,))
    assert values.tolist()[0] == 0 and np.isnan(values[[1, 4]]).all() and values.tolist()[2:4] == [-3, 3]
    assert unpacked(inspector.packed(np.zeros(3)), (3,)).tolist() == [0, 0, 0]
    assert np.isnan(unpacked(inspector.packed(np.full(3, np.nan)), (3,))).all()


def hostile_model(monkeypatch):
    """A model whose every token, and name, wants to break the page."""
    monkeypatch.setattr(inspector, "load_tokenizer", lambda name: Words(HOSTILE))
    ids = tuple(range(len(HOSTILE)))
    roles = tuple(HOSTILE)
    pairs = [Pair(ids, (1, 0, *ids[2:]), (0, 3), roles, "g"), Pair(ids[:4], (1, *ids[1:4]), (5, 6), roles[:4], "h")]
    found = made_up(pairs)
    return inspector.of_nodes("</script>&amp;", found, METHODS, NODES, pairs, "logit_diff")


def test_hostile_prompts_are_data(monkeypatch, tmp_path):
    inspector.write(tmp_path / "inspect.html", hostile_model(monkeypatch), SUMMARY)
    text = (tmp_path / "inspect.html").read_bytes()
    assert text.count(b"</script>") == 2 and text.count(b"<!--") == inspector.TEMPLATE.read_bytes().count(b"<!--")
    found = data_of(tmp_path / "inspect.html")
    assert found["tokens"] == HOSTILE and found["title"] == "</script>&amp;"


def test_the_command_writes_the_page(tmp_path):
    page = tmp_path / "toy-gpt2-ioi" / "inspect.html"
    given = ["--model", "toy-gpt2", "--pairs", "4", "--out", str(tmp_path)]
    evaluate.main(given)
    shown = data_of(page)
    assert shown["title"] == "toy-gpt2"
    with np.load(page.parent / "scores.npz") as file:
        for kind in shown["kinds"]:
            for m, found in kind["each"].items():
                is_close(found, file[f"{m}_{kind['name']}"])
        assert [pair["values"] for pair in shown["examples"]] == file["values"].tolist()
    model, pairs = models.from_pretrained("toy-gpt2"), tasks.ioi(load_tokenizer("toy-gpt2"), 4)
    for pair, example in zip(pairs, shown["examples"]):
        original, patch, _ = pair
        wanted = torch.cat([model(x)[0, -1].softmax(-1).topk(5).values for x in (original, patch)])
        assert example["chances"] == pytest.approx(wanted.tolist(), abs=1e-4)
        first = int(model(patch)[0, -1].argmax())
        assert shown["tokens"][example["likely"][5]] == load_tokenizer("toy-gpt2").decode([first])
    evaluate.main([*given, "--no-plot"])
    assert not page.exists()  # it would show an earlier run


def test_a_page_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "inspect.html").mkdir()
    with pytest.raises(ValueError, match="cannot write"):
        inspector.write(tmp_path / "inspect.html", hostile_model(monkeypatch), SUMMARY)


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


class Browser:
    """A session of chromedriver."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", "--hide-scrollbars"]
        options = {"args": arguments, "perfLoggingPrefs": {"enableNetwork": True}}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        self.session = ""
        self.session = f"/session/{self.post('/session', capabilities={'alwaysMatch': wanted})['sessionId']}"

    def request(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + self.session + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from None

    def post(self, path, **body):
        return self.request("POST", path, body)

    def run(self, script, *arguments):
        """A script's value."""
        return self.post("/execute/sync", script=script, args=list(arguments))

    def open(self, path):
        self.log("browser"), self.log("performance")
        self.post("/url", url=path.as_uri())

    def log(self, kind):
        return self.post("/se/log", type=kind)

    def element(self, css):
        return next(iter(self.post("/element", using="css selector", value=css).values()))

    def click(self, css):
        self.post(f"/element/{self.element(css)}/click")

    def choose(self, css, value):
        self.click(f'{css} option[value="{value}"]')

    def mouse(self, x, y, click=False):
        moves = [{"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}]
        moves += [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}] * click
        parameters = {"pointerType": "mouse"}
        self.post("/actions", actions=[{"type": "pointer", "id": "mouse", "parameters": parameters, "actions": moves}])

    def keys(self, *keys):
        each = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": each}])

    def text(self, css):
        return self.run("return document.querySelector(arguments[0]).textContent", css)

    def shown(self):
        """What the readout says: the place, and {method: its numbers}."""
        rows = self.run(
            "return [...document.querySelectorAll('#readout [data-method]')].map(row => [row.dataset.method, "
            "...[...row.children].slice(1).map(cell => cell.textContent)])"
        )
        return self.text("#where"), {name: [number(text) for text in numbers] for name, *numbers in rows}

    def at(self, method, row, column):
        """Where a cell of a map is in the window."""
        return self.run(
            "const canvas = document.querySelector(`figure[data-method='${arguments[0]}'] canvas`);"
            "canvas.scrollIntoView({block: 'center'});"
            "const box = canvas.getBoundingClientRect(), {x, y} = corner({row: arguments[1], column: arguments[2]});"
            "return [box.x + x + layout.cellWidth / 2, box.y + y + layout.cellHeight / 2]",
            method,
            row,
            column,
        )

    def faults(self):
        """Errors in the console, and requests for anything but the page itself."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        outside = [url for url in asked if not url.startswith(("file:", "data:"))]
        assert any(url.startswith("file:") for url in asked)  # the log works
        return [entry["message"] for entry in self.log("browser")], outside


def number(text):
    text = text.replace("−", "-").removesuffix(" %")
    return float(text) if text and text != "no value" else None


@pytest.fixture(scope="module")
def browser():
    driver = shutil.which("chromedriver")
    if not driver or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no chromium and chromedriver on this machine (Debian: chromium-driver)")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        port = None
        for line in process.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                port = int(found[1])
                break
        session = Browser(port)
        try:
            yield session
        finally:
            session.request("DELETE", "")
    finally:
        process.terminate()
        process.wait(10)
        process.stdout.close()


@pytest.fixture(scope="module")
def nodes_page(pairs, tmp_path_factory):
    """A page of a run with heads, and its scores."""
    nodes = [*NODES, "head"]
    scores = made_up(pairs[:6], nodes, parts={"head": (4,)})
    shown = inspector.of_nodes("toy-gpt2", scores, METHODS, nodes, pairs[:6], "logit_diff")
    path = tmp_path_factory.mktemp("page") / "inspect.html"
    inspector.write(path, shown, SUMMARY)
    return SimpleNamespace(path=path, scores=scores.scores, pairs=pairs[:6], values=scores.values, likely=scores.likely)


def expect(shown, scores, index):
    """The readout shows these scores and their errors, to the precision of the page."""
    exact = 2e-4 * max(float(np.nanmax(np.abs(values))) for values in scores.values())
    assert shown.keys() == scores.keys()
    ap = float(scores["ap"][index])
    for name, (score, error, _) in shown.items():
        assert score == pytest.approx(float(scores[name][index]), abs=exact), name
        if name != "ap":
            assert error == pytest.approx(float(scores[name][index]) - ap, abs=exact)


def of_kind(page, node, pair=None):
    if pair is not None:
        return {m.name: page.scores[m.name, node][pair] for m in METHODS}
    return {m.name: laid_over(page.scores[m.name, node], overlay(page.pairs)[1]) for m in METHODS}


def test_pointing_at_a_cell_shows_its_numbers_everywhere(browser, nodes_page):
    browser.open(nodes_page.path)
    means = of_kind(nodes_page, "resid_pre")
    for m, row, column in (("ap", 0, 3), ("relp", 3, 10), ("atp", 2, 15)):
        browser.mouse(*browser.at(m, row, column))
        where, shown = browser.shown()
        assert where == f"resid_pre, layer {row}, {overlay(nodes_page.pairs)[0][column].strip()}"
        expect(shown, means, (row, column))
        boxes = browser.run("return [...document.querySelectorAll('.marker.here')].map(m => m.style.cssText)")
        assert len(boxes) == 3 and len(set(boxes)) == 1  # in all maps
    browser.choose("#kind", 2)
    browser.choose("#pair", 4)
    n = len(nodes_page.pairs[4].original)
    browser.mouse(*browser.at("relp", 1, n - 1))
    where, shown = browser.shown()
    assert where.startswith("mlp_out, layer 1, “") and "END" in where
    of_all = {m.name: nodes_page.scores[m.name, "mlp_out"] for m in METHODS}
    expect(shown, of_all, (4, 1, n - 1))
    numbers = browser.run("return [...document.querySelectorAll('#prompts .runs bdi + span')].map(x => x.textContent)")
    assert [number(text) for text in numbers] == pytest.approx(nodes_page.values[4].tolist(), rel=2e-3)
    corner = browser.run(
        "const token = document.querySelector('[data-column=\"5\"]');"
        "token.scrollIntoView();"
        "const box = token.getBoundingClientRect();"
        "return [box.x + 5, box.y + 5]"
    )
    browser.mouse(*corner)  # a token of the prompts
    assert browser.run("return [state.here.row, state.here.column]") == [1, 5]
    assert browser.faults() == ([], [])


def test_the_keyboard_moves_and_opens(browser, nodes_page):
    browser.open(nodes_page.path)
    browser.mouse(*browser.at("ap", 1, 4))
    up, right, down, left, enter = "\ue013", "\ue014", "\ue015", "\ue012", "\ue007"
    browser.keys(up, right, right, down, left)
    assert browser.run("return [state.here.row, state.here.column]") == [1, 5]
    means = of_kind(nodes_page, "resid_pre")
    expect(browser.shown()[1], means, (1, 5))
    browser.keys(*[down] * 5, *[right] * 30)  # it stops at the edge
    columns = means["ap"].shape[1]
    assert browser.run("return [state.here.row, state.here.column]") == [0, columns - 1]
    browser.keys(enter)
    assert browser.text("#details h2") == browser.text("#where")
    browser.keys("\ue004")  # Tab: the focus can be seen
    assert browser.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert browser.faults() == ([], [])


def test_the_largest_error_in_three_clicks(browser, nodes_page):
    browser.open(nodes_page.path)
    means = of_kind(nodes_page, "resid_pre")
    error = means["relp"] - means["ap"]
    browser.click("#error")
    largest = max(np.abs(means[m] - means["ap"]).max() for m in ("atp", "relp"))
    assert number(browser.text("#legend span")) == pytest.approx(-largest, rel=5e-3)
    assert browser.run("return view.drawn.relp[cellOf(arguments[0])]", {"row": 2, "column": 7}) == pytest.approx(
        error[2, 7], abs=1e-3
    )
    assert len(browser.run("return [...document.querySelectorAll('#list tr')]")) == 10
    browser.click("#list tr:first-child button")
    row, column = np.unravel_index(np.abs(error).argmax(), error.shape)
    assert browser.run("return [state.opened.row, state.opened.column]") == [row, column]
    words = browser.text("#details")
    assert "an error of" in words and "All kinds of nodes at this place" in words and "pair " in words
    browser.choose("#list-scope", "everything")
    browser.click("#list tr:first-child button")
    each = {node: [of_kind(nodes_page, node, pair) for pair in range(6)] for node in NODES}
    sums = [{m: x.sum(-1) for m, x in of_kind(nodes_page, "head", pair).items()} for pair in range(6)]
    each["head"] = sums
    worst = max((np.nanmax(np.abs(x["relp"] - x["ap"])), k, i) for k, of in enumerate(each.values())
                for i, x in enumerate(of))  # fmt: skip
    assert browser.run("return [state.kind, state.pair]") == [worst[1], worst[2]]
    found = browser.run("return view.scores.relp[cellOf(state.here)] - view.scores.ap[cellOf(state.here)]")
    assert abs(found) == pytest.approx(worst[0], rel=1e-3)
    assert browser.faults() == ([], [])


def test_a_fault_is_listed_once_and_how_often(browser, nodes_page):
    """By any method, over all pairs and nodes: the largest error of each role and node, and the pairs of half of it."""
    browser.open(nodes_page.path)
    browser.choose("#list-method", "any")
    browser.choose("#list-scope", "everything")
    sizes = {}  # {(node, role): {pair: the largest error, and whose}}
    for node in (*NODES, "head"):
        for i, pair in enumerate(nodes_page.pairs):
            scores = {m: x.sum(-1) if x.ndim > 2 else x for m, x in of_kind(nodes_page, node, i).items()}
            for m in ("atp", "relp"):
                error = np.abs(scores[m] - scores["ap"])[:, : len(pair.original)].max(0)
                for role, size in zip(pair.roles, error):
                    of_role = sizes.setdefault((node, role), {})
                    of_role[i] = max((float(size), m), of_role.get(i, (0, "")))
    order = sorted(sizes.items(), key=lambda item: -max(item[1].values())[0])[:10]
    lines = browser.run(
        "return [...document.querySelectorAll('#list tr')].map(row => [...row.children].map(cell => cell.textContent))"
    )
    labels = {"atp": "AtP", "relp": "RelP"}
    for (what, value, _, often), ((node, role), of_pairs) in zip(lines, order, strict=True):
        size, m = max(of_pairs.values())
        pair = next(i for i, found in of_pairs.items() if found == (size, m))
        assert what.startswith(f"{labels[m]}, {node}, layer ") and what.endswith(f", {role.strip()}, pair {pair + 1}")
        assert abs(number(value)) == pytest.approx(size, rel=1e-2)
        assert often == f"in {sum(x >= size / 2 for x, _ in of_pairs.values())} of 6 pairs"
    assert len({tuple(key) for key, _ in order}) == 10


def test_a_fault_of_a_single_pair_is_counted_in_pairs_or_layers(browser, pairs, tmp_path):
    found = made_up(pairs[:1])
    page = inspector.of_nodes("toy-gpt2", found, METHODS, NODES, pairs[:1], "logit_diff")
    inspector.write(tmp_path / "inspect.html", page, SUMMARY)
    browser.open(tmp_path / "inspect.html")
    for scope, of in (("map", "4 layers"), ("pairs", "1 pairs"), ("everything", "1 pairs")):
        browser.choose("#list-scope", scope)
        often = browser.run("return [...document.querySelectorAll('#list tr td:last-child')].map((x) => x.textContent)")
        counts = [int(re.fullmatch(f"in (\\d+) of {of}", text)[1]) for text in often]
        assert len(counts) == 10 and all(1 <= count <= int(of[0]) for count in counts)


def test_the_next_tokens_of_both_runs(browser, nodes_page):
    browser.open(nodes_page.path)
    assert browser.run("return document.querySelectorAll('.next').length") == 0  # the mean has none
    browser.choose("#pair", 3)
    lines = browser.run("return [...document.querySelectorAll('.next')].map(line => line.textContent)")
    for run, line, ids in zip(("original", "patch"), lines, nodes_page.likely[3].reshape(2, 5)):
        assert line.startswith(f"{run}, next: ") and [float(x) for x in re.findall(r"([\d.]+) %", line)] == [
            50,
            20,
            10,
            5,
            1,
        ]
        assert all(load_tokenizer("toy-gpt2").decode([int(i)]).strip() in line for i in ids)


def test_a_click_opens_the_heads_of_a_cell(browser, nodes_page):
    browser.open(nodes_page.path)
    browser.choose("#kind", 1)  # attn_out is made of heads
    browser.choose("#pair", 2)
    browser.mouse(*browser.at("relp", 3, 6), click=True)
    heads = {m.name: nodes_page.scores[m.name, "head"][2, 3, 6] for m in METHODS}
    rows = browser.run(
        "return [...document.querySelectorAll('#details .side-by-side > div:first-child tr')].slice(1)"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    strength = np.max([np.abs(x) for x in heads.values()], axis=0)
    assert [int(row[0].removeprefix("head ")) for row in rows] == np.argsort(-strength).tolist()
    for name, *numbers in rows:
        part = int(name.removeprefix("head "))
        for m, text in zip(METHODS, numbers):
            assert number(text) == pytest.approx(heads[m.name][part], abs=0.02)
    assert browser.faults() == ([], [])


def test_the_scatter_and_the_maps_are_linked(browser, nodes_page):
    browser.open(nodes_page.path)
    x, y = browser.run(
        "const box = document.querySelector('#scatter').getBoundingClientRect(), cell = cellOf({row: 1, column: 9});"
        "return [box.x + axes.x(view.scores.ap[cell]), box.y + axes.y(view.drawn.relp[cell])]"
    )
    browser.mouse(x, y)
    row, column = browser.run("return [state.here.row, state.here.column]")
    near = browser.run(
        "const cell = cellOf(state.here), there = cellOf({row: 1, column: 9});"
        "return Math.min(...predictors().map(m => Math.hypot(axes.x(view.scores.ap[cell]) - "
        "axes.x(view.scores.ap[there]), axes.y(view.drawn[m.name][cell]) - axes.y(view.drawn.relp[there]))))"
    )
    assert near < 1.5  # this point, or one that lies on it
    browser.mouse(x, y, click=True)
    assert browser.run("return [state.opened.row, state.opened.column]") == [row, column]
    assert browser.faults() == ([], [])


def emulate(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.post("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})


def test_light_and_dark(browser, nodes_page):
    """As the system has it, also if that changes while the page is open."""
    browser.open(nodes_page.path)
    background = "return getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark", "light"):
        emulate(browser, scheme)
        brightness = sum(map(int, re.findall(r"\d+", browser.run(background))[:3]))
        assert (brightness < 100) == (scheme == "dark"), scheme
        colours = browser.run("return [theme(), color(0)]")
        assert colours == [scheme, {"light": "rgb(240,240,238)", "dark": "rgb(42,46,55)"}[scheme]]
    browser.click("#how")
    assert (
        "1/65534" in browser.text("#help") and browser.run("return document.querySelector('#help').offsetHeight") > 50
    )
    assert browser.faults() == ([], [])


def test_hostile_prompts_in_a_browser(browser, monkeypatch, tmp_path):
    inspector.write(tmp_path / "a #?%22 b.html", hostile_model(monkeypatch), SUMMARY)
    browser.open(tmp_path / "a #?%22 b.html")
    for pair in (-1, 0, 1):
        browser.choose("#pair", pair)
        assert "</script><b id=evil>" in browser.text("#prompts")
        browser.mouse(*browser.at("relp", 2, 2), click=True)
        browser.choose("#list-scope", "everything")
    assert browser.run("return document.querySelector('#evil')") is None
    assert browser.run("return document.querySelectorAll('script, style, link, b').length") == 4  # those of the page
    assert browser.faults() == ([], [])


def test_a_run_without_ap(browser, pairs, tmp_path):
    methods = METHODS[1:]
    found = made_up(pairs[:3], methods=methods)
    shown = inspector.of_nodes("toy-gpt2", found, methods, NODES, pairs[:3], "logit_diff")
    inspector.write(tmp_path / "inspect.html", shown, SUMMARY)
    browser.open(tmp_path / "inspect.html")
    browser.mouse(*browser.at("relp", 1, 3), click=True)
    means = laid_over(found.scores["relp", "resid_pre"], overlay(pairs[:3])[1])
    assert browser.shown()[1]["relp"] == [pytest.approx(means[1, 3], abs=2e-3)]
    assert browser.run("return document.querySelector('#error').disabled") and "strongest" in browser.text(
        "#list-title"
    )
    assert browser.run("return document.querySelector('#scatter-panel').offsetHeight") == 0
    assert browser.faults() == ([], [])


def test_the_address_shows_the_same_again(browser, nodes_page):
    """A reload, or the link in another window: node, pair, cell and "Error"; an address of another page is let be."""
    browser.open(nodes_page.path)
    browser.choose("#kind", 1)
    browser.choose("#pair", 3)
    browser.mouse(*browser.at("relp", 2, 5), click=True)
    browser.run("document.querySelector('#error').click()")
    browser.choose("#list-method", "atp")
    address, words = browser.run("return location.href"), browser.text("#where")
    assert "node=attn_out" in address and "method=atp" in address
    state = "return JSON.stringify([state.kind, state.pair, state.opened, state.error, state.method])"
    before = browser.run(state)
    browser.request("POST", "/url", {"url": "about:blank"})
    browser.request("POST", "/url", {"url": address})
    assert browser.run(state) == before and browser.text("#where") == words
    for odd in ("node=none&pair=0&layer=0&position=0", "node=mlp_out&pair=99&layer=0&position=0", "x", "node=mlp_out"):
        browser.request("POST", "/url", {"url": "about:blank"})
        browser.request("POST", "/url", {"url": address.split("#")[0] + "#" + odd})
        assert browser.run("return state.pair") == -1 and browser.faults() == ([], [])


@pytest.mark.parametrize("size", [(800, 600), (390, 800)])
def test_in_a_narrow_window_a_line_of_the_list_leads_to_its_cell(browser, nodes_page, size):
    browser.request("POST", "/window/rect", {"width": size[0], "height": size[1]})
    try:
        browser.open(nodes_page.path)
        browser.run("document.querySelector('#list tr.link button').click()")
        inside = "const b = document.querySelector('.marker.here').getBoundingClientRect(); return [b.top, b.bottom]"
        top, bottom = browser.run(inside)
        assert 0 <= top < bottom <= size[1]
        wide = "return document.documentElement.scrollWidth <= window.innerWidth + 1"
        assert browser.run(wide)
    finally:
        browser.request("POST", "/window/rect", {"width": 1280, "height": 900})


def test_each_token_has_the_colour_of_its_largest_score(browser, nodes_page):
    browser.open(nodes_page.path)
    browser.choose("#pair", 2)
    truth, n = of_kind(nodes_page, NODES[0], 2)["ap"], len(nodes_page.pairs[2].original)
    wanted = [truth[np.abs(truth[:, pos]).argmax(), pos] for pos in range(n)]
    found = browser.run("return view.columns.map((_, column) => strongestIn(column))")
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    shadows = browser.run("return [...document.querySelectorAll('.position')].map((x) => x.style.boxShadow)")
    colours = browser.run("return view.columns.map((_, column) => color(strongestIn(column) / view.scale))")
    assert len(shadows) == n and all(c.replace(",", ", ") in s for c, s in zip(colours, shadows)), (shadows, colours)


def test_scores_and_maps_can_be_saved(browser, nodes_page):
    """As CSV, of the pair that is shown; and as PNG."""
    browser.open(nodes_page.path)
    browser.choose("#kind", 2)
    browser.choose("#pair", 2)
    head, *lines = browser.run("return asCsv()").splitlines()
    assert head == "layer,position,label,ap,atp,relp"
    pair, scores = nodes_page.pairs[2], of_kind(nodes_page, NODES[2], 2)
    assert len(lines) == 4 * len(pair.original)
    found = np.array([[float(x) for x in line.rsplit(",", 3)[1:]] for line in lines])
    wanted = np.stack([scores[m][:, : len(pair.original)].ravel() for m in ("ap", "atp", "relp")], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    browser.run("window.saved = []; download = (name, href) => saved.push([name, href.slice(0, 22)])")
    browser.run("for (const b of document.querySelectorAll('figcaption button, #csv')) b.click()")
    names = dict(browser.run("return saved"))
    assert names.keys() == {*(f"{NODES[2]}-{m}.png" for m in ("ap", "atp", "relp")), f"{NODES[2]}.csv"}
    assert names[f"{NODES[2]}-ap.png"].startswith("data:image/png;base64,")


def test_where_the_page_comes_from_is_said(browser, nodes_page):
    browser.open(nodes_page.path)
    about = browser.run("return document.querySelector('#about').textContent")
    assert "seed 3" in about and "corruption s2" in about and "torch 9.9" in about and "shard" not in about
    assert browser.run("return document.querySelector('#where').getAttribute('aria-live')") == "polite"


def test_the_list_of_runs(tmp_path, capsys):
    """index.html has a line for each run, the newest first, with links; what is no run is passed over."""
    for name, pcc in (("a", 0.25), ("b <i>", 0.75)):
        folder = tmp_path / name
        folder.mkdir()
        agreement = {"relp": {"mlp_out": {"averaged": [pcc, 0, 1]}}}
        (folder / "summary.json").write_text(json.dumps({"agreement": agreement, "prompt_pairs": 7}))
        (folder / "inspect.html").touch()
        os.utime(folder / "summary.json", (1000 + pcc * 1e6, 1000 + pcc * 1e6))
    (tmp_path / "of-edges").mkdir()
    of_edges = {"agreement": {"relp": {"averaged": [0.5, 0, 1], "slope": [1, 1, 1]}}, "prompt_pairs": 9}
    (tmp_path / "of-edges" / "summary.json").write_text(json.dumps(of_edges))
    os.utime(tmp_path / "of-edges" / "summary.json", (5, 5))
    for name, text in (("c", "{"), ("d", "[1]"), ("e", '{"agreement": 3}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(text)
    inspector.finish(tmp_path / "a")
    page = (tmp_path / "index.html").read_text()
    lines = [line for line in page.splitlines() if line.startswith("<tr><td>")]
    assert len(lines) == 3 and "mlp_out 0.750" in lines[0] and "mlp_out 0.250" in lines[1] and "<td>7</td>" in lines[0]
    assert "edges 0.500" in lines[2] and "<td>9</td>" in lines[2]
    assert "b &lt;i&gt;" in lines[0] and 'href="b%20%3Ci%3E/inspect.html"' in lines[0] and "<i>" not in page
    assert f"written to {tmp_path / 'a'}/\n  all runs: {tmp_path}/index.html" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# The page of a circuit of edges


@pytest.fixture(scope="module")
def circuit_page(tmp_path_factory):
    names = ["input->m0", "m0->a2.h1<v>", "input->a2.h1<k>", "a2.h1->logits", "m0->logits"]
    scores = [-9.0, -4.0, 2.5, -1.25, -0.001]
    edges = [{"edge": e, "score": x, "role": "S2", "scores": {"relp": x, "atp": x / 2}} for e, x in zip(names, scores)]
    page = files.page("a <b>circuit</b>", edges, Graph(3, 2), {"relp": "RelP", "atp": "AtP"}, "logit_diff")
    path = tmp_path_factory.mktemp("circuit") / "inspect.html"
    inspector.write(path, page, SUMMARY, TEMPLATE)
    return path


def lit(browser):
    """The names of boxes and edges in the picture that have not faded."""
    return set(browser.run("return [...document.querySelectorAll('svg .on')].map((x) => x.dataset.name)"))


def test_a_circuit_is_drawn_with_its_edges_and_their_weights(browser, circuit_page):
    browser.open(circuit_page)
    texts = browser.run("return [...document.querySelectorAll('svg text')].map((x) => x.textContent)")
    boxes, weights = {"input", "m0", "a2.h1", "logits"}, {"−9", "−4", "+2.5", "−1.25", "−0.001"}
    assert set(texts) == boxes | weights | {"S2"} and browser.text("h1") == "a <b>circuit</b>"
    dashed = browser.run(
        "return [...document.querySelectorAll('path[stroke-dasharray]')].map((x) => x.parentNode.dataset.name)"
    )
    assert dashed == ["input->a2.h1<k>"]
    rows = browser.run("return [...document.querySelectorAll('#edges tr')].map((x) => x.textContent)")
    assert rows[0] == "edgeatRelPAtP" and rows[2] == "m0->a2.h1<v>S2−4−2" and len(rows) == 6
    assert "seed 3" in browser.text("#about") and "S2: B1's second mention" in browser.text("#words")
    assert browser.faults() == ([], [])


def test_a_box_or_an_edge_is_chosen_by_mouse_keyboard_and_address(browser, circuit_page):
    browser.open(circuit_page)
    assert lit(browser) == set()
    browser.click("svg [data-name='a2.h1']")
    of_head = {"a2.h1", "m0", "input", "logits", "m0->a2.h1<v>", "input->a2.h1<k>", "a2.h1->logits"}
    assert lit(browser) == of_head and browser.text("#chosen") == "a2.h1: 3 edges"
    browser.keys("\ue00c")  # Escape
    assert lit(browser) == set()
    browser.run("document.querySelector(\"svg [data-name='m0->logits']\").focus()")
    browser.keys("\ue007")  # Enter
    assert lit(browser) == {"m0", "logits", "m0->logits"} and "m0 gives to the logits" in browser.text("#chosen")
    address = browser.run("return location.href")
    browser.post("/url", url="about:blank")
    browser.post("/url", url=address)
    assert lit(browser) == {"m0", "logits", "m0->logits"}
    browser.click("#edges tr:nth-child(3) button")
    assert lit(browser) == {"m0", "a2.h1", "m0->a2.h1<v>"} and browser.faults() == ([], [])


@pytest.mark.parametrize("size", [(1440, 900), (800, 600), (390, 800)])
def test_both_pages_fit_three_windows_in_both_schemes(browser, nodes_page, circuit_page, size):
    browser.request("POST", "/window/rect", {"width": size[0], "height": size[1]})
    try:
        for path, scheme in ((p, scheme) for p in (nodes_page.path, circuit_page) for scheme in ("light", "dark")):
            emulate(browser, scheme)
            browser.open(path)
            assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth + 1"), (path, scheme)
            brightness = browser.run(
                "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
            )
            assert (sum(brightness[:3]) < 100) == (scheme == "dark") and browser.faults() == ([], [])
    finally:
        emulate(browser, "light")
        browser.request("POST", "/window/rect", {"width": 1280, "height": 900})
