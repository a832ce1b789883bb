"""The download path, against a small server on loopback that speaks the Hub's protocol; real GPT-2 with RELP_HUB=1.

Most tests point huggingface_hub (its constants: it reads the environment once, when it is imported) at the server and
stay in this process; those about `evaluate.py` start it as a user would, with HF_ENDPOINT in the environment.
"""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS
from safetensors.torch import load_file, save_file

import relp
from models import Rules, from_pretrained
from support.results import slug
from support.tokenizer import NoTokenizer, load_tokenizer

ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------------------------------------------------------
# The server


class Hub:
    """Serves directories as repositories: hub.repos["owner/name"] = directory.

    Which commit is the newest, which files it has, and HEAD and GET of /{owner}/{name}/resolve/{commit}/{file}, with
    the headers that huggingface_hub reads. As on the real Hub, large files (here: weights) are redirected to another
    host, whose address carries no repository. hub.faults["owner/name"] or hub.faults["owner/name", "file"] is a
    function(handler) that answers instead; hub.log lists the requests.
    """

    def __init__(self):
        self.repos, self.faults, self.log, self.commit = {}, {}, [], "c" * 40
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_HEAD = lambda self: hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        """No more answers, on connections that are open neither; closing twice does no harm."""
        from huggingface_hub.utils import _http

        self.server.shutdown()
        self.server.server_close()
        _http.close_session()

    def answer(self, request):
        self.log.append((request.command, request.path))
        cdn, path = request.path.startswith("/cdn/"), request.path.split("?")[0]
        asks, _, file = path.removeprefix("/cdn/").removeprefix("/api/models").strip("/").partition("/resolve/")
        repo, name = "/".join(asks.split("/")[:2]), "/".join(file.split("/")[1:])
        if path.startswith("/api/") and not path.startswith("/api/models"):
            return refuse(404)(request)  # what the client asks besides, such as /api/agent-harnesses
        fault = self.faults.get((repo, name), self.faults.get(repo))
        if fault and (cdn or not getattr(fault, "cdn_only", False)):
            return fault(request)
        if repo not in self.repos:
            return refuse(401, "RepoNotFound", "Repository not found")(request)
        if path.startswith("/api/"):
            found = [{"type": "file", "path": f.name, "size": 1, "oid": "0"} for f in self.repos[repo].iterdir()]
            commit = {"id": repo, "sha": self.commit, "siblings": []}
            content = json.dumps(found if "/tree/" in path else commit).encode()
            return reply(request, 200, {"Content-Type": "application/json"}, content)
        file = self.repos[repo] / name
        if not file.is_file():
            return refuse(404, "EntryNotFound", "Entry not found", self.commit)(request)
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        if file.suffix in (".safetensors", ".bin") and not cdn:
            headers = {
                "Location": f"http://localhost:{self.port}/cdn{request.path}",
                "X-Repo-Commit": self.commit,
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": len(content),
            }
            reply(request, 302, headers)
        else:
            reply(request, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit}, content)


def reply(request, status, headers=(), body=b"", length=None):
    request.send_response(status)
    for key, value in {"Content-Length": len(body) if length is None else length, **dict(headers)}.items():
        request.send_header(key, str(value))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def refuse(status, code=None, message=None, commit=None):
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
    return lambda request: reply(request, status, {k: v for k, v in headers.items() if v})


def hang_up(request):
    """Close the connection without a word."""
    request.close_connection = True


def cut_off(request):
    """Promise 1000 bytes, send 100."""
    reply(request, 200, {"ETag": '"e"'}, b"x" * 100, length=1000)
    request.close_connection = True


def captive_portal(request):
    """A login page, status 200, whatever was asked for."""
    reply(request, 200, {"Content-Type": "text/html"}, b"<html>Welcome to our WiFi</html>")


def cut_short(request):
    """A whole answer, shorter than the one that was announced."""
    reply(request, 200, {"ETag": '"e"'}, b"x" * 100)


def hang_up_in_download(request):
    hang_up(request)


def cut_off_download(request):
    cut_off(request)


for fault in (hang_up_in_download, cut_off_download, cut_short):
    fault.cdn_only = True  # strikes the file itself; what the Hub says about it is right


# ---------------------------------------------------------------------------------------------------------------------
# Its checkpoints


def tiny_tokenizer(folder):
    """A byte-level BPE, trained on a few words, as tokenizer.json and tokenizer_config.json of GPT-2's kind."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["When John and Mary went to the store, John gave a drink to"] * 9,
        vocab_size=290,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"})
    )


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One tiny GPT-2 as {"whole", "sharded", "pickled", "pickled-shards"}: directory in Hugging Face layout."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(**{**CHECKPOINTS["gpt2"][1], "vocab_size": 300})
    )
    base = tmp_path_factory.mktemp("checkpoints")
    for kind in ("whole", "sharded", "pickled", "pickled-shards"):
        folder = base / kind
        model.save_pretrained(folder, **({"max_shard_size": "40KB"} if kind == "sharded" else {}))
        tiny_tokenizer(folder)
        if kind.startswith("pickled"):
            (folder / "model.safetensors").unlink()
            half, state = {"pickled": "pytorch_model.bin"}.get(kind, "pytorch_model-1.bin"), model.state_dict()
            torch.save(state, folder / half)
            if kind == "pickled-shards":
                (folder / "pytorch_model.bin.index.json").write_text(
                    json.dumps({"weight_map": dict.fromkeys(state, half)})
                )
    assert len(list((base / "sharded").glob("model-*.safetensors"))) > 1
    return {folder.name: folder for folder in base.iterdir()}


@contextmanager
def client(monkeypatch, url, cache):
    """huggingface_hub here talks to `url`, keeps its files in `cache`, and does not wait between its attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with monkeypatch.context() as m:
        m.setattr(constants, "ENDPOINT", url)
        m.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        m.setattr(constants, "HF_HUB_CACHE", str(cache))
        m.setattr(constants, "HF_HUB_OFFLINE", False)
        m.setenv("NO_PROXY", "127.0.0.1,localhost")
        m.setattr("time.sleep", lambda seconds: None)
        _http.close_session()  # the next one reads NO_PROXY
        yield m
    _http.close_session()


@pytest.fixture
def hub(monkeypatch, tmp_path, folders):
    """A server with the repositories tiny/whole, tiny/sharded, ...; huggingface_hub looks there, its cache is empty."""
    server = Hub()
    server.repos.update({f"tiny/{kind}": folder for kind, folder in folders.items()})
    with client(monkeypatch, server.url, tmp_path / "cache"):
        yield server
    server.close()


TOKENS = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(1))
TEXT = "When John and Mary went to the store, Bob gave 3 drinks to"


def same_as(folder, name):
    """Do the model and the tokenizer of this name equal those of the local directory?"""
    assert torch.equal(from_pretrained(name)(TOKENS), from_pretrained(str(folder))(TOKENS))
    here, there = load_tokenizer(name), load_tokenizer(str(folder))
    assert here.encode(TEXT) == there.encode(TEXT) and here.bos_id == there.bos_id == 0


# ---------------------------------------------------------------------------------------------------------------------
# What works


@pytest.mark.parametrize("kind", ["whole", "sharded", "pickled", "pickled-shards"])
def test_a_repository_is_its_directory(kind, hub, folders):
    same_as(folders[kind], f"tiny/{kind}")


def test_only_what_is_needed_is_downloaded_once(hub, folders):
    from_pretrained("tiny/whole")
    load_tokenizer("tiny/whole")
    needed = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    got = [path for command, path in hub.log if command == "GET" and "/resolve/" in path]
    assert {path.split("/")[-1] for path in got} == needed
    hub.log.clear()
    same_as(folders["whole"], "tiny/whole")
    assert not any("/resolve/" in path for _, path in hub.log)  # it asks only whether anything has changed


@pytest.mark.parametrize("kind", ["whole", "sharded", "pickled", "pickled-shards"])
@pytest.mark.parametrize("how", ["offline", "server gone", "server broken"])
def test_the_cache_serves_when_the_hub_does_not(kind, how, hub, folders, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    same_as(folders[kind], f"tiny/{kind}")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        _http.close_session()
    elif how == "server gone":
        hub.close()
    else:
        hub.faults[f"tiny/{kind}"] = refuse(500)
    same_as(folders[kind], f"tiny/{kind}")


def test_a_revision(monkeypatch, folders):
    """owner/name@revision, and a short name with one, for the model and its tokenizer."""
    asked = []

    def download(repository, revision, allow_patterns):
        asked.append((repository, revision))
        return str(folders["whole"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = from_pretrained("tiny/whole@step3000")
    assert torch.equal(model(TOKENS), from_pretrained(str(folders["whole"]))(TOKENS))
    load_tokenizer("pythia-70m@step1000")
    from_pretrained("gpt2")
    assert asked == [
        ("tiny/whole", "step3000"),
        ("EleutherAI/pythia-70m", "step1000"),
        ("openai-community/gpt2", None),
    ]
    assert slug("EleutherAI/pythia-70m@step1000") == "EleutherAI-pythia-70m-step1000"


def test_an_adapter_is_refused(folders, tmp_path):
    shutil.copytree(folders["whole"], tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter \(LoRA\): merge it into the weights first"):
        from_pretrained(str(tmp_path / "adapted"))


def test_a_new_commit_is_noticed(hub, folders, tmp_path):
    """Also where it brings a file that the repository lacked before: weights go from shards to one file."""
    shutil.copytree(folders["sharded"], tmp_path / "moving")
    hub.repos["tiny/moving"] = tmp_path / "moving"
    old = from_pretrained("tiny/moving")(TOKENS)
    hub.commit = "d" * 40
    weights = load_file(folders["whole"] / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, tmp_path / "moving" / "model.safetensors")
    new = from_pretrained("tiny/moving")(TOKENS)
    assert not torch.equal(new, old)
    same_as(tmp_path / "moving", "tiny/moving")


def test_a_file_that_was_cut_off_once_is_fetched_again(hub, folders):
    hub.faults["tiny/whole", "model.safetensors"] = cut_short
    with pytest.raises(ValueError):
        from_pretrained("tiny/whole")
    del hub.faults["tiny/whole", "model.safetensors"]
    same_as(folders["whole"], "tiny/whole")


def test_a_checkpoint_without_tokenizer(hub, folders, tmp_path):
    shutil.copytree(folders["whole"], tmp_path / "mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink()
    hub.repos["tiny/mute"] = tmp_path / "mute"
    from_pretrained("tiny/mute")
    with pytest.raises(NoTokenizer, match="tiny/mute has no tokenizer"):
        load_tokenizer("tiny/mute")


# ---------------------------------------------------------------------------------------------------------------------
# What does not, in one line


def says(name, *words, load=from_pretrained):
    """`load(name)` raises a ValueError of one line that holds the name and the words."""
    with pytest.raises(ValueError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in (name, *words)), message
    return caught.value


@pytest.mark.parametrize(
    "answer",
    [refuse(404, "RepoNotFound", "Repository not found"), refuse(401, "RepoNotFound", "Repository not found")],
    ids=["404", "401"],
)
@pytest.mark.parametrize("load", [from_pretrained, load_tokenizer])
def test_missing_repository(answer, load, hub):
    hub.faults["tiny/absent"] = answer
    error = says("tiny/absent", "Repository Not Found", load=load)
    assert not isinstance(error, NoTokenizer)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("load", [from_pretrained, load_tokenizer])
def test_gated_repository(status, load, hub):
    hub.faults["tiny/whole"] = refuse(status, "GatedRepo", "Access to model tiny/whole is restricted.")
    says("tiny/whole", "gated", "restricted", load=load)


def test_a_repository_whose_files_are_gated_but_not_its_configuration(hub):
    hub.faults["tiny/whole", "model.safetensors"] = refuse(
        403, "GatedRepo", "Access to model tiny/whole is restricted."
    )
    says("tiny/whole", "gated")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(missing, hub, folders, tmp_path):
    shutil.copytree(folders["whole"], tmp_path / "part")
    (tmp_path / "part" / missing).unlink()
    hub.repos["tiny/part"] = tmp_path / "part"
    says("tiny--part", missing, load=lambda _: from_pretrained("tiny/part"))


def test_missing_shard(hub, folders, tmp_path):
    shutil.copytree(folders["sharded"], tmp_path / "part")
    shard = sorted((tmp_path / "part").glob("model-*.safetensors"))[-1]
    shard.unlink()
    hub.repos["tiny/part"] = tmp_path / "part"
    says("weights do not fit", "Missing key", load=lambda _: from_pretrained("tiny/part"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    "fault",
    [hang_up, refuse(500), refuse(503), refuse(429), captive_portal, refuse(401), refuse(403), refuse(404)],
    ids=["hang-up", "500", "503", "429", "captive portal", "401", "403", "404"],
)
def test_broken_server(file, fault, hub):
    hub.faults["tiny/whole", file] = fault
    assert "no weights" not in str(says("tiny/whole", "cannot be downloaded"))  # that is not known


@pytest.mark.parametrize(
    "fault",
    [cut_off_download, cut_short, hang_up_in_download, refuse(500)],
    ids=["cut off", "cut short", "hang-up", "500"],
)
def test_a_download_that_breaks(fault, hub, folders, tmp_path):
    """One line, and nothing in the cache that could be taken for the file."""

    def strike(request):
        return fault(request)

    strike.cdn_only = True
    hub.faults["tiny/whole", "model.safetensors"] = strike
    says("tiny/whole", "cannot be downloaded")
    cached = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert "model.safetensors" not in cached
    del hub.faults["tiny/whole", "model.safetensors"]
    same_as(folders["whole"], "tiny/whole")


def test_no_server_at_all(hub):
    hub.close()
    says("tiny/whole", "internet connection")
    says("tiny/whole", "internet connection", load=load_tokenizer)


def test_the_network_goes_between_two_files(hub):
    """A tokenizer file that could not be asked for is not one that the repository lacks: BOS would be the wrong one."""
    hub.faults["tiny/whole", "tokenizer_config.json"] = refuse(500)
    says("tiny/whole", "cannot be downloaded", load=load_tokenizer)


def test_a_cache_that_cannot_be_written(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    says("tiny/whole", "cannot be downloaded")


@pytest.mark.parametrize(
    "name", ["gpt3", "no/such/place", "-/-", "a b/c", "./nowhere", "../x", "tiny/..", "whole@main", "~/gpt2"]
)
def test_names_that_are_no_repositories(name, hub):
    says(name)
    assert not any("/resolve/" in path for _, path in hub.log)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, as a user starts it


def evaluate(*arguments, hub_url, home, **environment):
    """Runs evaluate.py with huggingface_hub's waits cut to nothing (a full retry takes 23 seconds)."""
    start = """
import runpy, sys, time
time.sleep = lambda s: None
sys.argv[0] = "evaluate.py"
sys.path.insert(0, ".")
runpy.run_path("evaluate.py", run_name="__main__")
"""

    def is_foreign(key):
        return key.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or key.upper().endswith("_PROXY")

    env = {key: value for key, value in os.environ.items() if not is_foreign(key)}
    env |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", start, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def pairs_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        json.dumps({"original": [5, 6, 7, 8], "patch": [5, 9, 7, 8], "original_answer": 1, "patch_answer": 2})
    )
    return file


@pytest.mark.parametrize("case", ["gated", "no network", "cut off"])
def test_evaluate_ends_in_one_line(case, hub, pairs_file, tmp_path):
    fault, words = {
        "gated": (refuse(403, "GatedRepo", "Access to model tiny/x is restricted."), "gated"),
        "no network": (None, "internet connection"),
        "cut off": (cut_off_download, "cannot be downloaded"),
    }[case]
    name = "tiny/whole"
    hub.faults[name, "model.safetensors" if case == "cut off" else "config.json"] = fault
    url = hub.url if case != "no network" else "http://127.0.0.1:9"  # the discard port: closed
    run = evaluate(
        "--model", name, "--prompts", pairs_file, "--out", tmp_path / "out", hub_url=url, home=tmp_path / "home"
    )
    assert run.returncode == 2, run.stderr
    lines = run.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("evaluate.py: error:") and name in lines[0] and words in lines[0], (
        run.stderr
    )
    assert run.stdout == "" and list((tmp_path / "out").iterdir()) == []


def test_evaluate_downloads_and_then_works_from_the_cache(hub, folders, pairs_file, tmp_path):
    """The results of a repository are those of its directory; a second run needs no server."""
    arguments = ["--prompts", pairs_file, "--no-plot", "--nodes", "resid_pre", "--out", tmp_path / "out"]
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        run = evaluate(
            "--model",
            "tiny/whole",
            folders["whole"],
            *arguments,
            hub_url=hub.url,
            home=tmp_path / "home",
            **environment,
        )
        assert (run.returncode, run.stderr) == (0, "")
        hub.faults["tiny/whole"] = refuse(500)
        remote, local = (tmp_path / "out" / f"{slug}-ioi-pairs" / "scores.npz" for slug in ("tiny-whole", "whole"))
        assert remote.read_bytes() == local.read_bytes()
        remote.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The reference notebook, in its own terms
#
# The notebook patches the other way round. It has eight prompts, 2k and 2k+1 each other's partner; for prompt i it
# *runs on the partner* ("corrupted") and patches activations of the *listed* prompt ("clean") into that run. So in our
# terms original = the partner and patch = the listed prompt. Its metric asks for the listed prompt's answer, ours for
# the original's: metric_notebook = -metric, prompt by prompt. It averages over the prompts and rescales so that the
# corrupted run scores 0 and the clean run 1:
#
#     score_notebook = mean_i(-score_i) / (clean - corrupted) = mean_i(score_i) / mean_i(metric_patch - metric_original)
#
# Its model is TransformerLens' GPT-2: LayerNorm's weights folded into the next layer, and what is written to the stream
# centred (mean 0 over the hidden dimension). With P the projection that takes the mean away, its activations are P n
# where ours are n. Every path from the stream to the logits begins with a LayerNorm, which starts with P, so nothing
# depends on the part that P removes: AP is the same. The gradient's, and rho's, too: rho = P rho (LN-rule or not: the
# mean subtraction stays differentiable), hence (P delta) . rho = delta . rho and AtP and RelP are the same. A centred
# unembedding adds one number to all logits, which no difference sees. What is left is float32 rounding along twelve
# blocks, some 1e-5 of a score of 1 (folding changes the order of the sums); TOLERANCE leaves a factor of 20.

NOTEBOOK = json.loads((Path(__file__).parent / "gpt2_ioi_notebook.json").read_text())
NOTEBOOK_RUNS = {
    "activation_patching": lambda model, *batch: relp.activation_patching(model, *batch),
    "attribution_patching": lambda model, *batch: relp.attribute(model, *batch),
    "relevance_patching_ln_rule_only": lambda model, *batch: relp.attribute(model, *batch, lrp=Rules(ln=True)),
}
TOLERANCE = 2e-4


def our_pairs(prompts, answers):
    """The notebook's prompts [n, pos] and answers [n, (right, wrong)], token ids, as our (original, patch, answers)."""
    partner = [i ^ 1 for i in range(len(prompts))]
    assert answers[partner].equal(answers.flip(1))
    # the original's answer is the partner's: the listed prompt's wrong one
    return prompts[partner], prompts, answers.flip(1)


def notebook_scores(model, prompts, answers, run, nodes):
    """{node: [layer, pos]}: what the notebook would show, computed by us."""
    original, patch, ours = our_pairs(prompts, answers)
    values = [relp.logit_diff(model(tokens)[:, -1], ours).mean() for tokens in (original, patch)]
    return {
        node: score.mean(0) / (values[1] - values[0])
        for node, score in run(model, original, patch, ours, nodes).items()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(our model, transformers' model, prompts, answers): a random GPT-2, and partners of which one token differs."""
    from conftest import hf_model

    hf = hf_model("gpt2").double()
    folder = tmp_path_factory.mktemp("small")
    hf.save_pretrained(folder)
    prompts = torch.randint(2, 97, (4, 7), generator=torch.Generator().manual_seed(2))
    prompts[1::2] = prompts[::2]
    prompts[:, 4] = torch.tensor([11, 12, 13, 14])
    answers = torch.tensor([[20, 21], [21, 20], [22, 23], [23, 22]])
    return from_pretrained(str(folder), dtype=torch.float64), hf, prompts, answers


def folded(hf):
    """A copy of transformers' GPT-2 as TransformerLens makes it: LayerNorm folded, what writes and unembeds centred."""
    import copy

    def centre(x):
        return x - x.mean(-1, keepdim=True)

    hf = copy.deepcopy(hf)
    hf.lm_head.weight = torch.nn.Parameter(hf.lm_head.weight.clone())  # untied
    hf.config.tie_word_embeddings = False
    t = hf.transformer
    with torch.no_grad():
        for p in (t.wte.weight, t.wpe.weight):
            p.copy_(centre(p))
        for block in t.h:
            for norm, reader in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                reader.bias += norm.bias @ reader.weight
                reader.weight *= norm.weight[:, None]
                norm.weight.fill_(1), norm.bias.zero_()
            for writer in (block.attn.c_proj, block.mlp.c_proj):
                writer.weight.copy_(centre(writer.weight)), writer.bias.copy_(centre(writer.bias))
        # the final bias moves into an unembedding bias, which GPT-2 lacks: kept in the norm, divided by its new weight
        hf.lm_head.weight *= t.ln_f.weight
        t.ln_f.bias /= t.ln_f.weight
        t.ln_f.weight.fill_(1)
        hf.lm_head.weight -= hf.lm_head.weight.mean(0)
    return hf


def test_patching_everything_scores_1(small):
    """The prompts differ in one token: patched before the first block, it makes the corrupted run the clean one."""
    model, _, prompts, answers = small
    score = notebook_scores(model, prompts, answers, NOTEBOOK_RUNS["activation_patching"], ["resid_pre"])["resid_pre"]
    expected = torch.zeros(7, dtype=torch.float64)
    expected[4] = 1
    torch.testing.assert_close(score[0], expected)
    torch.testing.assert_close(score[-1, :4], torch.zeros(4, dtype=torch.float64))  # nothing before the change


def test_notebook_scores_agree_with_the_notebooks_own_way(small):
    """The notebook's loops for transformers' model, folded and centred: its direction, its metric, its mean."""
    model, hf, prompts, answers = small
    hf, partner = folded(hf), [1, 0, 3, 2]
    with torch.no_grad():
        assert torch.allclose(hf(prompts).logits.diff(), model(prompts).diff())  # the same model up to a constant
    parts = {  # node: (module whose output it is, or input where pre)
        "resid_pre": lambda layer: (hf.transformer.h[layer], True),
        "attn_out": lambda layer: (hf.transformer.h[layer].attn, False),
        "mlp_out": lambda layer: (hf.transformer.h[layer].mlp, False),
    }

    def run(tokens, edit):
        """Logit difference with edit(node, layer, activation) put in the place of every activation it returns."""

        def swap(node, layer, x):
            new = edit(node, layer, x[0] if isinstance(x, tuple) else x)
            if new is None:
                return x
            return (new, *x[1:]) if isinstance(x, tuple) else new

        handles = []
        for node, part in parts.items():
            for layer in range(3):
                module, pre = part(layer)
                put = partial(swap, node, layer)
                if pre:
                    handles.append(module.register_forward_pre_hook(lambda m, x, put=put: put(x)))
                else:
                    handles.append(module.register_forward_hook(lambda m, i, x, put=put: put(x)))
        logits = hf(tokens).logits[:, -1]
        for handle in handles:
            handle.remove()
        return (logits.gather(1, answers[:, :1]) - logits.gather(1, answers[:, 1:])).mean()

    clean_cache, corrupted_cache = {}, {}
    clean = run(prompts, lambda node, layer, x: clean_cache.update({(node, layer): x.detach()}))

    def keep(node, layer, x):
        corrupted_cache[node, layer] = x
        x.retain_grad()

    def patch(key, pos, node, layer, x):
        if (node, layer) == key:
            return torch.cat([x[:, :pos], clean_cache[key][:, pos : pos + 1], x[:, pos + 1 :]], 1)

    corrupted = run(prompts[partner], keep)
    corrupted.backward()
    scale = (clean - corrupted).item()

    ap = notebook_scores(model, prompts, answers, NOTEBOOK_RUNS["activation_patching"], list(parts))
    atp = notebook_scores(model, prompts, answers, NOTEBOOK_RUNS["attribution_patching"], list(parts))
    for node in parts:
        for layer in range(3):
            delta = clean_cache[node, layer] - corrupted_cache[node, layer].detach()
            assert delta.mean(-1).abs().max() < 1e-12  # centred, as ours is not
            wanted = (delta * corrupted_cache[node, layer].grad).sum((0, 2)) / scale
            torch.testing.assert_close(atp[node][layer], wanted, atol=1e-9, rtol=0)
            for pos in range(7):
                with torch.no_grad():
                    wanted = (run(prompts[partner], partial(patch, (node, layer), pos)) - corrupted) / scale
                torch.testing.assert_close(ap[node][layer, pos], wanted.detach(), atol=1e-9, rtol=0)


def test_folding_and_centring_leave_every_score_as_it_is(small, tmp_path):
    """What the comparison with TransformerLens' model rests on, also under the LN-rule."""
    model, hf, prompts, answers = small
    folded(hf).save_pretrained(tmp_path)
    other = from_pretrained(str(tmp_path), dtype=torch.float64)
    for run in NOTEBOOK_RUNS.values():
        ours, theirs = (
            notebook_scores(m, prompts, answers, run, ["resid_pre", "attn_out", "mlp_out"]) for m in (model, other)
        )
        for node in ours:
            torch.testing.assert_close(ours[node], theirs[node], atol=1e-9, rtol=0)


def test_the_notebooks_prompts_have_its_15_positions():
    folder = ROOT.parent / "shared" / "tokenizers" / "gpt2"
    if not folder.is_dir():
        pytest.skip("needs GPT-2's tokenizer files in ../shared/tokenizers")
    tokenizer = load_tokenizer(str(folder))
    assert {len([tokenizer.bos_id, *tokenizer.encode(p)]) for p in NOTEBOOK["prompts"]} == {15}
    assert {len(tokenizer.encode(a)) for pair in NOTEBOOK["answers"] for a in pair} == {1}


@pytest.mark.hub
@pytest.mark.skipif(
    os.environ.get("RELP_HUB") != "1", reason="downloads GPT-2 small (0.5 GB) from the Hugging Face Hub: set RELP_HUB=1"
)
def test_gpt2_gives_the_notebooks_numbers():
    model, tokenizer = from_pretrained("gpt2"), load_tokenizer("gpt2")
    prompts = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(p)] for p in NOTEBOOK["prompts"]])
    answers = torch.tensor([[tokenizer.encode(a)[0] for a in pair] for pair in NOTEBOOK["answers"]])
    assert relp.logit_diff(model(prompts)[:, -1], answers).mean().item() == pytest.approx(3.5519, abs=1e-3)
    for name, run in NOTEBOOK_RUNS.items():
        wanted = {node: torch.tensor(values) for node, values in NOTEBOOK[name].items()}
        scores = notebook_scores(model, prompts, answers, run, list(wanted))
        for node in wanted:
            off = (scores[node] - wanted[node]).abs().max()
            assert off <= TOLERANCE, f"{name}, {node}: off by {off:.3g}"
