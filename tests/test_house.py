"""How the files lean on each other, and that relp.py and models.py work by themselves, copied to an empty folder."""

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import models
import relp

ROOT = Path(models.__file__).parent
LOW = {"models", "relp", "tasks"}  # files that stand by themselves
MAY_IMPORT = {  # what the files in a folder, or a file, may import of the project: files, and all files in folders
    **dict.fromkeys(LOW, set()),
    "support": {"support", *LOW},
    "beyond": {"beyond", "support", *LOW},
    "evaluate": {"beyond", "support", *LOW},
    "toy": {"toy", "support", *LOW},  # the scripts that have trained the toys
}

# ---------------------------------------------------------------------------------------------------------------------
# Who imports whom


def source() -> dict[str, str]:
    """{module: its text} of all files but tests: models, support.tables, ...; the scripts in toy as toy.train."""
    files = [*ROOT.glob("*.py"), *(f for folder in ("support", "beyond", "toy") for f in (ROOT / folder).rglob("*.py"))]
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return {name.removesuffix(".__init__"): file.read_text(encoding="utf-8") for name, file in zip(names, files)}


@cache
def imports(text: str, of_project: frozenset[str], only_module_level: bool = False) -> set[str]:
    """The modules that a file imports, anywhere in it. `from support import tables` is support.tables."""
    found, todo = set(), [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and only_module_level:
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= {name if name in of_project else module for name in inner}
    return found


def faults(files: dict[str, str]) -> list[str]:
    """What is wrong with the imports of these files {module: text}."""
    graph, found = {}, []
    for name, text in files.items():
        folder, imported = name.split(".")[0], imports(text, frozenset(files))
        if folder == "toy":  # scripts import their neighbours without the folder's name
            imported = {f"toy.{m}" if f"toy.{m}" in files else m for m in imported}
        if folder not in MAY_IMPORT:
            found.append(f"nothing is known of {name}")
            continue
        of_project = {m for m in imported if m.split(".")[0] in MAY_IMPORT}
        graph[name] = of_project & files.keys()
        found += [f"{name} imports {m}, which is no file" for m in of_project - files.keys()]
        found += [f"{name} imports {m}" for m in sorted(of_project) if m.split(".")[0] not in MAY_IMPORT[folder]]
        found += [f"{name} imports {m}: not seen here" for m in imported if m.startswith(".")]
        found += [f"{name} uses {word}: not seen here" for word in ("__import__", "importlib") if word in text]
        if name in ("relp", "models"):  # models may import other packages where it needs them, but not at the top
            packages = {m.split(".")[0] for m in imports(text, frozenset(files), only_module_level=name == "models")}
            packages -= {*sys.stdlib_module_names, *MAY_IMPORT, "torch"}
            found += [f"{name} imports {m}" for m in sorted(packages)]
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"a circle: {' <- '.join(error.args[1])}")
    return found


def test_every_file_imports_only_what_stands_below_it():
    files = source()
    assert LOW | {"evaluate", "toy.train", "support.tables", "beyond.grid", "support", "beyond"} < files.keys()
    assert imports(files["evaluate"], frozenset(files)) >= {"beyond.methods", "support.tables", *LOW}  # are found
    assert faults(files) == []


@pytest.mark.parametrize("name, line, says", [
    ("relp", "import models", "relp imports models"),
    ("relp", "class A:\n    from tasks import Pair", "relp imports tasks"),
    ("relp", "import numpy as np", "relp imports numpy"),
    ("relp", "def f():\n    from numpy import array", "relp imports numpy"),
    ("models", "from relp import record", "models imports relp"),
    ("models", "def f():\n    from support.tables import short", "models imports support.tables"),
    ("models", "if True:\n    import safetensors", "models imports safetensors"),
    ("tasks", "from support import tokenizer", "tasks imports support.tokenizer"),
    ("support.positions", "from beyond import grid", "support.positions imports beyond.grid"),
    ("support.positions", "import evaluate", "support.positions imports evaluate"),
    ("beyond.grid", "from evaluate import main", "beyond.grid imports evaluate"),
    ("beyond.grid", "from .methods import method", "beyond.grid imports .methods: not seen here"),
    ("beyond.grid", "import importlib", "beyond.grid uses importlib: not seen here"),
    ("models", 'importlib.import_module("relp")', "models uses importlib: not seen here"),
    ("models", "if True:\n    import support.families", "models imports support.families"),
    ("beyond.grid", "import support.no_such_file", "beyond.grid imports support.no_such_file, which is no file"),
    ("toy.train", "import beyond.grid", "toy.train imports beyond.grid"),
    ("toy.train", "from train_saes import main", "a circle: "),
    ("support.prompts", "from support.scoring import Scores", "a circle: "),
    ("utils", "", "nothing is known of utils"),
    ("beyond.rivals", "def f():\n    from beyond.methods import FLAGS", "a circle: "),
])  # fmt: skip
def test_an_import_that_must_not_be_is_found(name, line, says):
    files = source()
    files[name] = f"{files.get(name, '')}\n{line}\n"
    found = faults(files)
    assert any(fault.startswith(says) if says.endswith(" ") else fault == says for fault in found), found


# ---------------------------------------------------------------------------------------------------------------------
# Minimal

LIMITS = {
    "relp.py": 430,
    "models.py": 720,
    "tasks.py": 300,
    "evaluate.py": 400,
    "support/*.py": 3950,
    "beyond/*.py": 950,
}


@pytest.mark.parametrize("files", LIMITS)
def test_length(files):
    lines = {file.name: len(file.read_text(encoding="utf-8").splitlines()) for file in ROOT.glob(files)}
    assert 0 < sum(lines.values()) <= LIMITS[files], lines


# ---------------------------------------------------------------------------------------------------------------------
# Copies in an empty folder

ONLY_TORCH = """
import sys
import torch

MAY = {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "relp", "models", "resume", "__main__"}

class Block:  # a meta path finder: it comes first, and refuses every other package
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in MAY:
            raise ModuleNotFoundError(f"blocked: {name}")

for name in [name for name in sys.modules if name.split(".")[0] not in MAY]:
    del sys.modules[name]  # what torch has imported for itself
sys.meta_path.insert(0, Block())
try:
    import numpy
    raise SystemExit("numpy can be imported")
except ModuleNotFoundError as error:
    assert str(error) == "blocked: numpy"
"""

RELP_ALONE = """
import relp

class Own:  # a model of one's own: one layer that adds up the positions
    class config:
        n_layers = 1
    nodes = ("resid_pre",)
    table = torch.arange(20.0).view(10, 2)

    def stream(self, tokens, lrp=False, hook=None):
        x = self.table[tokens]
        x = x if hook is None or "resid_pre" not in hook.nodes else hook("resid_pre", 0, x)
        return x.cumsum(1)

    def unembed(self, x, lrp=False, columns=None):
        logits = x @ self.table.T
        return logits if columns is None else logits[:, columns]

arguments = Own(), torch.tensor([[1, 2, 3]]), torch.tensor([[1, 5, 3]]), torch.tensor([[4, 6]]), ["resid_pre"]
got = [f(*arguments)["resid_pre"] for f in (relp.attribute, relp.activation_patching)]
assert all(torch.equal(x, got[0]) for x in got) and got[0][0, 0].tolist() == [0, -48, 0], got
"""

SMALL = dict(model_type="qwen2", vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)  # fmt: skip

RELP_AND_MODELS = f"""
import json, relp, models

torch.manual_seed(0)
model = models.Transformer(models.Config.from_hf({SMALL})).requires_grad_(False).eval()
for p in model.parameters():
    p.normal_(std=0.3)
g = torch.Generator().manual_seed(1)
original, patch = torch.randint(50, (2, 3, 6), generator=g)
answers = torch.randint(50, (3, 2), generator=g)
nodes = ["resid_pre", "attn_out", "mlp_out", "head"]
scores = relp.attribute(model, original, patch, answers, nodes, lrp=True)
both = scores, relp.activation_patching(model, original, patch, answers, nodes)
"""


def run(code: str, folder: Path) -> str:
    """What a fresh Python process prints that runs this code in a folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    """copied("relp", "models") -> an empty folder with copies of these files."""

    def copy(*names):
        for name in names:
            shutil.copy(ROOT / f"{name}.py", tmp_path)
        return tmp_path

    return copy


def test_relp_by_itself_with_a_model_of_ones_own(copied):
    folder = copied("relp")
    assert run(f"{ONLY_TORCH}{RELP_ALONE}\nprint(relp.__file__)", folder).strip() == str(folder / "relp.py")


def test_relp_and_models_by_themselves(copied):
    """RelP of a random small Transformer with nothing but torch: the same scores as in the project."""
    folder = copied("relp", "models")
    show = "print(json.dumps([relp.__file__, models.__file__, *({k: v.tolist() for k, v in x.items()} for x in both)]))"
    *files, scores, ap = json.loads(run(f"{ONLY_TORCH}{RELP_AND_MODELS}{show}", folder))
    assert files == [str(folder / "relp.py"), str(folder / "models.py")]
    here = {"torch": torch}
    exec(RELP_AND_MODELS, here)
    for got, wanted in zip((scores, ap), here["both"]):
        assert got.keys() == wanted.keys()
        for node in wanted:
            torch.testing.assert_close(torch.tensor(got[node]), wanted[node])
            assert wanted[node].abs().max() > 1e-3


def test_a_copy_of_models_does_not_offer_the_toys(copied):
    """They lie beside the original. The name is said as it was given."""
    given = ("yot", "no-such", "TOY")
    code = f"""
import models
for name in {given}:
    try:
        models.from_pretrained(name)
    except ValueError as error:
        print(error)
"""
    for name, line in zip(given, run(code, copied("models")).splitlines(), strict=True):
        before, offered = line.split(": give one of ")
        assert before == f"unknown model {name!r}"
        assert "toy" not in offered and "gpt2-xl, " in offered and str(ROOT) not in line
    with pytest.raises(ValueError, match="unknown model 'no-such': give one of .*, toy-gpt2, ") as error:
        models.from_pretrained("no-such")
    assert "/" not in str(error.value)


@pytest.mark.parametrize("name, near", [
    ("gpt2-small", "gpt2-xl, gpt2-large, gpt2-medium, gpt2, a Hub"),
    ("toy-gpt", "toy-gpt2, "),
    ("pythia-160m", "pythia-410m, pythia-70m"),
])  # fmt: skip
def test_names_that_are_near_are_offered(name, near):
    with pytest.raises(ValueError, match=f"unknown model '{name}': give one of {near}") as error:
        models.from_pretrained(name)
    assert len(str(error.value)) < 200


def test_copies_under_other_names_beside_a_package_called_support(tmp_path):
    """In a package of one's own, with another package `support` on the path: the same numbers."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "support").mkdir()
    for name in ("mine/__init__.py", "support/__init__.py"):
        (tmp_path / name).write_text("")
    shutil.copy(ROOT / "relp.py", tmp_path / "mine" / "attribution.py")
    shutil.copy(ROOT / "models.py", tmp_path / "mine" / "transformer.py")
    code = RELP_AND_MODELS.replace(
        "import json, relp, models", "from mine import attribution as relp, transformer as models"
    )
    show = "import json, support; print(json.dumps([{k: v.tolist() for k, v in x.items()} for x in both]))"
    found = json.loads(run(f"import torch\n{code}{show}", tmp_path))
    here = {"torch": torch}
    exec(RELP_AND_MODELS, here)
    for got, wanted in zip(found, here["both"]):
        for node in wanted:
            torch.testing.assert_close(torch.tensor(got[node]), wanted[node])


def test_newer_families_are_named(copied):
    """A copy of models.py without them says what is missing."""
    code = """
import models
try:
    models.Config.from_hf({"model_type": "qwen3"})
except ValueError as error:
    print(error)
"""
    assert "import support.families" in run(code, copied("models"))


def test_the_files_are_those_of_this_checkout():
    """The tests import the files beside their folder, and no installed ones."""
    assert ROOT == Path(__file__).parents[1] and Path(relp.__file__).parent == ROOT
