"""The house rules that imports must keep: downwards only, absolute, and nothing unpickles."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# From the top storey to the ground.
LAYERS = (
    "mats_cli",
    "hub_cards",
    "evaluation",
    "training",
    "processing_mats",
    "modeling_mats",
    "configuration_mats",
)
MAY_UNPICKLE = "modeling_mats/convert_msclap.py"
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def package_files() -> list[Path]:
    """Every Python file of the packages; a folder such as `mats-tiny` is no package but an exported checkpoint."""
    files = [path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py")]
    return sorted(path for path in files if all(part.isidentifier() for part in path.parts[:-1]))


def violations(path: str, source: str) -> list[str]:
    own = path.split("/")[0]
    allowed = set(LAYERS[LAYERS.index(own) :])
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(f"line {node.lineno}: relative import")
                continue
            modules = [node.module]
            if node.module == "torch" and any(alias.name == "load" for alias in node.names):
                found.append(f"line {node.lineno}: torch.load under another name")
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            if path != MAY_UNPICKLE and isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                found.append(f"line {node.lineno}: torch.load")
            if isinstance(node, ast.Call):
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if keywords.get("allow_pickle", "False") != "False":
                    found.append(f"line {node.lineno}: allow_pickle")
                if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
                    found.append(f"line {node.lineno}: torch.load without weights_only=True")
            continue
        tops = {module.split(".")[0] for module in modules}
        found += [f"line {node.lineno}: imports {top}, above it" for top in sorted(tops & set(LAYERS) - allowed)]
        unwanted = {"tests", "conftest"} | (UNPICKLERS if path != MAY_UNPICKLE else set())
        found += [f"line {node.lineno}: imports {top}" for top in sorted(tops & unwanted)]
    return found


@pytest.mark.parametrize("path", package_files(), ids=str)
def test_imports_run_downwards_and_nothing_unpickles(path):
    assert violations(path.as_posix(), (ROOT / path).read_text(encoding="utf-8")) == []


def test_every_core_package_is_looked_at():
    assert {"configuration_mats", "modeling_mats", "processing_mats"} <= {path.parts[0] for path in package_files()}


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("configuration_mats/a.py", "import modeling_mats", "imports modeling_mats, above it"),
        ("modeling_mats/a.py", "from processing_mats.santa_mats import SantaMemory", "imports processing_mats, above"),
        ("processing_mats/a.py", "def f():\n    import training.data", "imports training, above it"),
        ("processing_mats/a.py", "from . import audio_mats", "relative import"),
        ("processing_mats/a.py", "from .audio_mats import load_audio", "relative import"),
        ("training/a.py", "import pickle", "imports pickle"),
        ("training/a.py", "import torch\ntorch.load('a.pth', weights_only=True)", "line 2: torch.load"),
        ("training/a.py", "from torch import load", "torch.load under another name"),
        ("modeling_mats/convert_msclap.py", "torch.load('a.pth')", "without weights_only=True"),
        ("training/a.py", "np.load('a.npy', allow_pickle=True)", "allow_pickle"),
        ("training/a.py", "from tests.conftest import tone", "imports tests"),
    ],
)
def test_a_breach_is_found(path, source, complaint):
    (found,) = violations(path, source)
    assert complaint in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "processing_mats/a.py",
            "from modeling_mats.modeling_mats import MatsNoise\nimport processing_mats.audio_mats",
        ),
        ("mats_cli/a.py", "import hub_cards, evaluation, training"),
        ("modeling_mats/convert_msclap.py", "torch.load('a.pth', weights_only=True)"),
    ],
)
def test_what_is_allowed_is_not_complained_about(path, source):
    assert violations(path, source) == []
