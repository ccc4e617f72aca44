"""The modules of the package and their imports, read from the source without importing it."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("toolkit", "export", "train", "kernels")
TOP = "medseg_trt"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Module:
    """One source file."""

    name: str  # medseg_trt.…
    path: Path  # below the repository's root
    tree: ast.Module


def read_modules(root: Path = ROOT) -> dict[str, Module]:
    """Parse every module below ``root``; the keys are dotted names."""
    modules: dict[str, Module] = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            path = file.relative_to(root)
            first, *parts = path.with_suffix("").parts
            below = [] if first == "toolkit" else [first]
            name = ".".join([TOP, *below, *(part for part in parts if part != "__init__")])
            modules[name] = Module(name=name, path=path, tree=ast.parse(file.read_text(encoding="utf-8")))
    return modules


def imported_modules(module: Module, modules: Mapping[str, Module]) -> set[str]:
    """Find the modules that one module imports.

    An import counts wherever it stands: at the top, in a function or under ``TYPE_CHECKING``. A string ``module`` or
    ``module:name`` counts too, as in the tables of readers and back-ends. ``medseg_trt`` itself, which holds the
    version, is left out.
    """
    resolved = {_resolve(name, modules) for name in _dotted_names(module.tree)}
    return resolved - {"", TOP, module.name}


def _dotted_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(rf"{TOP}(\.\w+)+(:\w+)?", node.value)
        ):
            yield node.value.partition(":")[0]


def _resolve(name: str, modules: Mapping[str, Module]) -> str:
    """Cut the name of an imported object down to its module; empty if the module is not ours."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name
