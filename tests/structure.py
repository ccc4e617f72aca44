"""Print the figures of the tree's structure: sizes, functions, formatter escapes, untyped dictionaries, circles.

Run it in the repository's root: ``python tests/structure.py``.
"""

import ast
import re
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("toolkit", "export", "train", "kernels")


def tracked(*folders: str) -> list[Path]:
    """Return the Python files under folders that git tracks."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if name.endswith(".py")]


def lines_of(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def function_lengths(paths: list[Path]) -> list[tuple[int, str]]:
    """Return the length in lines and the name of every function, the shortest first."""
    lengths: list[tuple[int, str]] = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT)}:{node.name}"
                lengths.append(((node.end_lineno or node.lineno) - node.lineno + 1, name))
    return sorted(lengths)


def count(pattern: str, paths: list[Path]) -> int:
    """Return how often a regular expression matches in files."""
    return sum(len(re.findall(pattern, path.read_text(encoding="utf-8"))) for path in paths)


def folder_imports(package: str) -> dict[str, set[str]]:
    """Return which folders of a package each folder imports, wherever the import stands.

    A module at the top of the package counts as a folder of its own.
    """
    prefix = "medseg_trt." if package == "toolkit" else f"medseg_trt.{package}."
    edges: dict[str, set[str]] = defaultdict(set)
    for path in tracked(package):
        importer = path.relative_to(ROOT / package).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [module for module in imported(node) if module.startswith(prefix)]
            edges[importer].update(module.removeprefix(prefix).split(".")[0] for module in modules)
        edges[importer] -= {importer, *PACKAGES}
    return edges


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        if node.module == "medseg_trt":
            yield from (f"medseg_trt.{alias.name}" for alias in node.names)
        else:
            yield node.module


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of folders that import each other, directly or through others."""
    reach = {name: _reachable(edges, name) for name in edges}
    groups = {
        tuple(sorted(other for other in reach if other in reach[name] and name in reach[other]))
        for name in reach
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def _reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += edges.get(name, ())
    return reached


def main() -> None:
    """Print the table."""
    source, tests = tracked(*PACKAGES), tracked("tests")
    all_files = tracked(*PACKAGES, "tests", "benchmarks")
    functions = function_lengths(source)
    rows: list[tuple[str, object]] = []
    for name, paths in (("source", source), ("tests", tests)):
        sizes = sorted((lines_of(path), str(path.relative_to(ROOT))) for path in paths)
        rows += [
            (f"{name}: lines", sum(size for size, _ in sizes)),
            (f"{name}: files", len(sizes)),
            (f"{name}: median lines a file", statistics.median_low([size for size, _ in sizes])),
            (f"{name}: longest file", f"{sizes[-1][0]} ({sizes[-1][1]})"),
        ]
    rows += [
        ("functions: median lines", statistics.median_low([length for length, _ in functions])),
        ("functions: longest", f"{functions[-1][0]} ({functions[-1][1]})"),
        ("modules at the top of toolkit", len([path for path in source if path.parent == ROOT / "toolkit"])),
        *((f"circles between folders of {package}", circles(folder_imports(package)) or 0) for package in PACKAGES),
        ("fmt: skip", count(r"# fmt: (?:skip|off)\n", all_files)),
        ("dict[str, Any], source", count(r"dict\[str, Any\]", source)),
        ("monkeypatch, tests", count(r"\bmonkeypatch\b", tests)),
        ("README lines", lines_of(ROOT / "README.md")),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {figure}" for name, figure in rows))


if __name__ == "__main__":
    main()
