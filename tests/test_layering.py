"""Imports point one way, toolkit → export → train → kernels, and inference imports nothing that it does not need."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("toolkit", "export", "train", "kernels")  # each may import those after it
LEAVES = (
    "spec",
    "errors",
    "files",
    "locks",
    "plain_text",
    "progress",
    "metrics.intervals",
    "metrics.overlap",
    "metrics.protocols",
    "metrics.hausdorff",
    "imaging.preprocess",
    "imaging.images",
    "imaging.listing",
    "imaging.formats",
    "imaging.overlay",
    "imaging.segment",
    "export.graph.interface",
    "engines.fingerprint",
    "export.engine_layers",
)
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "transformers",
    "scipy",
    "matplotlib",
    "nibabel",
    "pydicom",
    "tifffile",
    "h5py",
)
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    package, *parts = path.relative_to(ROOT).with_suffix("").parts
    below = [] if package == "toolkit" else [package]
    return ".".join(["medseg_trt", *below, *(part for part in parts if part != "__init__")])


def place(module: str) -> str:
    """Return the package of a ``medseg_trt`` module, or "leaf"."""
    below = module.removeprefix("medseg_trt").removeprefix(".")
    if any(f"{below}.".startswith(f"{leaf}.") for leaf in LEAVES):
        return "leaf"
    first = below.split(".")[0]
    return first if first in PACKAGES[1:] else "toolkit"


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted name of everything imported anywhere, also where a string names the module, as in a table."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"medseg_trt(\.\w+)+", str(node.value)):
            yield node.value  # pyright: ignore[reportReturnType]  # it matched, so it is a string


def violations(module: str, source: str) -> list[str]:
    """Say what is wrong with the imports of a module."""
    here = place(module)
    found: list[str] = []
    for name in imports(ast.parse(source)):
        top = name.split(".")[0]
        if top == "":
            found.append(f"{name}: a relative import")
        elif top in PACKAGES:
            found.append(f"{name}: a second copy of medseg_trt")
        elif here == "export" and top == "onnxruntime":
            found.append(f"{name}: export opens no session")
        elif top == "medseg_trt" and name != "medseg_trt.__version__":
            there = place(name)
            if there != "leaf" and (here == "leaf" or PACKAGES.index(there) < PACKAGES.index(here)):
                found.append(f"{name}: from {here} to {there}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_from_left_to_right(path):
    assert violations(module_name(path), path.read_text(encoding="utf-8")) == []


def test_every_leaf_exists():
    assert {f"medseg_trt.{leaf}" for leaf in LEAVES} <= {module_name(path) for path in FILES}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("medseg_trt.train.loop", "from medseg_trt.export.fold.fold import fold"),
        ("medseg_trt.train.loop", "from medseg_trt import pipeline"),
        ("medseg_trt.train.loop", "import medseg_trt"),
        ("medseg_trt.train.datasets.folder", "def late():\n    import medseg_trt.bench.report.write"),
        ("medseg_trt.train.loop", "HOMES = {'verify': 'medseg_trt.export.verify'}"),
        ("medseg_trt.kernels.rmsnorm", "from medseg_trt.train.models.llama import RMSNorm"),
        ("medseg_trt.kernels", "if TYPE_CHECKING:\n    from medseg_trt.train.models.llama import RMSNorm"),
        ("medseg_trt.export.verify", "from medseg_trt.sessions.open import open_session"),
        ("medseg_trt.export.verify", "from medseg_trt.sessions.onnxruntime import open_graph"),
        ("medseg_trt.export.verify", "def late():\n    import onnxruntime as ort"),
        ("medseg_trt.export.verify", "from onnxruntime import InferenceSession"),
        ("medseg_trt.imaging.images", "from medseg_trt.bundles.bundle import Bundle"),
        (
            "medseg_trt.imaging.segment",
            "class Late:\n    def method(self):\n        from medseg_trt.train.models.model import runner",
        ),
        ("medseg_trt.errors", "from medseg_trt import build"),
        ("medseg_trt.sessions.open", "from .bundle import Bundle"),
        ("medseg_trt.sessions.open", "from . import bundle"),
        ("medseg_trt.cli", "import toolkit.spec"),
        ("medseg_trt.cli", "from train.loop import train"),
        ("medseg_trt.cli", "from export import fold"),
        ("medseg_trt.train.models.llama", "import kernels"),
    ],
)
def test_a_planted_import_is_caught(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("medseg_trt.pipeline", "from medseg_trt.export.graph.trace import trace\nfrom medseg_trt.train import loop"),
        ("medseg_trt.export.fold.fold", "from medseg_trt.train.models.model import build_model"),
        (
            "medseg_trt.train.block.blocks",
            "from medseg_trt import __version__\nfrom medseg_trt.errors import UsageError",
        ),
        ("medseg_trt.imaging.segment", "from medseg_trt.imaging.preprocess import prepare\nimport trainer, numpy"),
    ],
)
def test_a_permitted_import_is_not_caught(module, source):
    assert violations(module, source) == []


@pytest.mark.parametrize("package", ["train", "export"])
def test_a_package_is_a_docstring_only(package):
    (statement,) = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)


def heavy_imports(statement: str) -> list[str]:
    """Return which heavy packages are loaded after a statement in a fresh Python."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules.keys() & {set(HEAVY)!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "module",
    [
        "bundles.bundle",
        "sessions.open",
        "sessions.onnxruntime",
        "pipeline",
        "imaging.images",
        "imaging.overlay",
        "imaging.segment",
        "samples.catalogue",
        "bench.measure",
        "bench.candidates",
        "engines.choice",
    ],
)
def test_importing_the_inference_path_is_light(module):
    assert heavy_imports(f"import medseg_trt.{module}") == []


def test_every_public_name_is_found_and_the_torch_free_ones_are_light():
    names = "medseg_trt.BuildSpec, medseg_trt.ModelSpec, medseg_trt.Mask, medseg_trt.infer, medseg_trt.load_bundle"
    assert heavy_imports(f"import medseg_trt\ndir(medseg_trt), {names}") == []


def test_a_heavy_import_is_caught():
    assert "torch" in heavy_imports("import medseg_trt.sessions.pytorch")


def test_building_an_engine_again_needs_no_torch():
    modules = "medseg_trt.engines.build, medseg_trt.export.tensorrt.expectations, medseg_trt.kernels.nodes"
    assert heavy_imports(f"import {modules}") == ["onnx"]
