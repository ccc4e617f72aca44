"""Imports point one way: toolkit → export → train → kernels → base, and between folders there is no circle.

Inference imports nothing that it does not need.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("toolkit", "export", "train", "kernels")
LAYERS = (*PACKAGES, "base")  # each may import itself and those after it
BASE = (
    "spec",
    "network_spec",
    "external_spec",
    "networks",
    "palette",
    "devices",
    "gpu",
    "pytorch_build",
    "field_errors",
    "errors",
    "files",
    "progress",
    "imaging",
    "metrics",
    "tiling",
    "window_spec",
)  # modules and folders of toolkit that all may use
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


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in FILES}
FOLDERS = {module_name(path) for path in FILES if path.name == "__init__.py"}


def layer(module: str) -> str:
    """Return the layer of a ``medseg_trt`` module or of a name in one."""
    return "base" if ".".join(module.split(".")[1:2]) in BASE else package_of(module)


def is_above(layer: str, other: str) -> bool:
    return LAYERS.index(layer) < LAYERS.index(other)


def package_of(module: str) -> str:
    """Return the folder of the repository that a module lies in."""
    first = ".".join(module.split(".")[1:2])
    return first if first in PACKAGES[1:] else "toolkit"


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted name of everything that is imported, also inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def table_entries(tree: ast.Module) -> Iterator[str]:
    """Yield every module that a string names, as in a table of modules that are imported on first use."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"medseg_trt(\.\w+)+(:\w+)?", str(node.value)):
            yield str(node.value).partition(":")[0]


@cache
def named_modules(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a source imports, and the modules that its strings name; parsing all sources takes seconds."""
    tree = ast.parse(source)
    return tuple(imports(tree)), tuple(table_entries(tree))


def violations(module: str, source: str) -> list[str]:
    """Return what is wrong with the direction of a module's imports."""
    own_layer, (imported, tabled) = layer(module), named_modules(source)
    wrong: list[str] = []
    for name in (*imported, *tabled):
        top = name.split(".")[0]
        if top == "":
            wrong.append(f"{name}: a relative import")
        elif top in PACKAGES:
            wrong.append(f"{name}: a second copy of medseg_trt")
        elif own_layer == "export" and top == "onnxruntime":
            wrong.append(f"{name}: export opens no session")
        elif top == "medseg_trt" and name != "medseg_trt.__version__" and is_above(layer(name), own_layer):
            wrong.append(f"{name}: from {own_layer} to {layer(name)}")
    return wrong


def folder_of(name: str, folders: Iterable[str]) -> str:
    """Return the innermost folder of a module or of a name in one; a module beside the folders is one of its own."""
    inside = [folder for folder in folders if folder != "medseg_trt" and f"{name}.".startswith(f"{folder}.")]
    return max(inside, key=len) if inside else ".".join(name.split(".")[:2])


def circular_imports(sources: Mapping[str, str], folders: Iterable[str]) -> list[str]:
    """Return each import between two folders that import each other, directly or through others.

    A table may name modules below its own folder: they are plug-ins, which import the folder that they plug into.
    """
    edges: list[tuple[str, str, str]] = []  # folder, the folder that it imports, and the import
    for module, source in sources.items():
        if module == "medseg_trt":
            continue  # it names the homes of the public names
        own, (imported, tabled) = folder_of(module, folders), named_modules(source)
        for name in (*imported, *(name for name in tabled if not name.startswith(f"{own}."))):
            other = folder_of(name, folders)
            if name.startswith("medseg_trt.") and name != "medseg_trt.__version__" and other != own:
                edges.append((own, other, f"{module}: {name}"))
    reached: dict[str, set[str]] = {}
    for own, other, _ in edges:
        reached.setdefault(own, set()).add(other)
    for middle in tuple(reached):
        for others in reached.values():
            if middle in others:
                others |= reached[middle]
    return [line for own, other, line in edges if own in reached.get(other, ())]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_permitted_layers(path):
    assert violations(module_name(path), SOURCES[module_name(path)]) == []


def test_every_base_module_exists():
    assert {f"medseg_trt.{name}" for name in BASE} <= SOURCES.keys()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_between_folders(package):
    own = {module: source for module, source in SOURCES.items() if package_of(module) == package}
    assert circular_imports(own, FOLDERS) == []


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        (
            "medseg_trt.sessions.base",
            "from medseg_trt.bench.measure import timed_runs",
            "medseg_trt.sessions.base: medseg_trt.bench.measure.timed_runs",
        ),
        (
            "medseg_trt.gpu",
            "def late():\n    from medseg_trt.sessions.open import open_session",
            "medseg_trt.gpu: medseg_trt.sessions.open.open_session",
        ),
        (
            "medseg_trt.bench.measure",
            "import medseg_trt.bench.report.write",
            "medseg_trt.bench.measure: medseg_trt.bench.report.write",
        ),
        (
            "medseg_trt.machine",
            "if TYPE_CHECKING:\n    from medseg_trt import pipeline",
            "medseg_trt.machine: medseg_trt.pipeline",
        ),
        (
            "medseg_trt.bundles.bundle",
            "PLUGINS = {'onnxruntime': 'medseg_trt.sessions.onnxruntime:open_graph'}",
            "medseg_trt.bundles.bundle: medseg_trt.sessions.onnxruntime",
        ),
        (
            "medseg_trt.train.block.blocks",
            "from medseg_trt.train.models.transunet import TransUNet",
            "medseg_trt.train.block.blocks: medseg_trt.train.models.transunet.TransUNet",
        ),
        (
            "medseg_trt.train.recipes.training_spec",
            "from medseg_trt.train.loop import train",
            "medseg_trt.train.recipes.training_spec: medseg_trt.train.loop.train",
        ),
    ],
)
def test_planted_circular_import_is_detected(module, source, line):
    assert line in circular_imports(SOURCES | {module: f"{SOURCES[module]}\n{source}"}, FOLDERS)


def test_circular_imports_reports_a_cycle_of_three_folders_but_not_its_importers():
    chain = {"a": "b", "b": "c", "c": "a", "above": "a"}
    sources = {f"medseg_trt.{folder}.x": f"import medseg_trt.{other}.x" for folder, other in chain.items()}
    caught = circular_imports(sources, {f"medseg_trt.{folder}" for folder in chain})
    assert sorted(caught) == [f"medseg_trt.{folder}.x: medseg_trt.{chain[folder]}.x" for folder in ("a", "b", "c")]


def test_module_name_strings_of_plug_ins_are_not_circular_imports():
    images, nifti = "medseg_trt.imaging.images", "medseg_trt.imaging.formats.nifti"
    sources = {images: f"READERS = {{'.nii': '{nifti}'}}", nifti: f"from {images} import Image"}
    folders = {"medseg_trt.imaging", "medseg_trt.imaging.formats"}
    assert circular_imports(sources, folders) == []
    assert len(circular_imports(sources | {images: f"import {nifti}"}, folders)) == 2


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("medseg_trt.train.loop", "from medseg_trt.export.fold.fold import fold"),
        ("medseg_trt.train.loop", "from medseg_trt import pipeline"),
        ("medseg_trt.train.loop", "import medseg_trt"),
        ("medseg_trt.train.datasets.folder", "def late():\n    import medseg_trt.bench.report.write"),
        ("medseg_trt.train.loop", "HOMES = {'verify': 'medseg_trt.export.verify'}"),
        ("medseg_trt.train.loop", "HOMES = {'int8': 'medseg_trt.export.precision.quantize:to_int8'}"),
        ("medseg_trt.kernels.rmsnorm", "from medseg_trt.train.block.llama import RMSNorm"),
        ("medseg_trt.kernels", "if TYPE_CHECKING:\n    from medseg_trt.train.block.llama import RMSNorm"),
        ("medseg_trt.export.verify", "from medseg_trt.sessions.open import open_session"),
        ("medseg_trt.export.verify", "from medseg_trt.sessions.onnxruntime import open_graph"),
        ("medseg_trt.export.tensorrt.build", "from medseg_trt.engines.fingerprint import EngineFingerprint"),
        ("medseg_trt.export.verify", "def late():\n    import onnxruntime as ort"),
        ("medseg_trt.export.verify", "from onnxruntime import InferenceSession"),
        ("medseg_trt.imaging.images", "from medseg_trt.bundles.bundle import Bundle"),
        ("medseg_trt.imaging.formats.nifti", "from medseg_trt.kernels.compile_cache import cached"),
        (
            "medseg_trt.imaging.segment",
            "class Late:\n    def method(self):\n        from medseg_trt.train.models.model import runner",
        ),
        ("medseg_trt.errors", "from medseg_trt import build"),
        ("medseg_trt.sessions.open", "from .base import Session"),
        ("medseg_trt.sessions.open", "from . import base"),
        ("medseg_trt.cli", "import toolkit.spec"),
        ("medseg_trt.cli", "from train.loop import train"),
        ("medseg_trt.cli", "from export import fold"),
        ("medseg_trt.train.block.llama", "import kernels"),
    ],
)
def test_forbidden_import_is_detected(module, source):
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


@pytest.mark.parametrize("package", sorted(FOLDERS - {"medseg_trt", "medseg_trt.kernels"}))
def test_a_package_is_a_docstring_only(package):
    (statement,) = ast.parse(SOURCES[package]).body
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
    modules = "medseg_trt.engines.rebuild, medseg_trt.export.tensorrt.expectations, medseg_trt.kernels.nodes"
    assert heavy_imports(f"import {modules}") == ["onnx"]
