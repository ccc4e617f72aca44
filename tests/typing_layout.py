"""Lay the package out for type checkers as it is installed: ``python tests/typing_layout.py``, then ``pyright``.

``pyproject.toml`` maps folders to packages, which type checkers do not read. Real folders with a link to every module
are made below ``build/typing``. They are made anew each time: a link that stays behind is a module that does not exist.
"""

import os
import shutil
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUFFIXES = {".py", ".pyi"}
MARKER = "py.typed"


def lay_out(root: Path) -> Path:
    """Replace ``build/typing`` below a repository's root and return it.

    Args:
        root: has a ``pyproject.toml`` with the table ``tool.setuptools.package-dir``.
    """
    with (root / "pyproject.toml").open("rb") as file:
        package_folders: dict[str, str] = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    layout = root / "build" / "typing"
    if layout.exists():
        shutil.rmtree(layout)
    for package, folder in package_folders.items():
        for source in sorted((root / folder).rglob("*")):
            if source.suffix in SUFFIXES or source.name == MARKER:
                link = layout.joinpath(*package.split("."), source.relative_to(root / folder))
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(source, link.parent))
    return layout


if __name__ == "__main__":
    lay_out(ROOT)
