"""Read a clone of the repository: its version, extras and files."""

import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import InputError

NAME = "medseg-trt"
CONSTRAINTS = Path("tests", "constraints.txt")
TEST_GROUP = "gpu-check"  # the dependency group of what a kit's tests need


@dataclass(frozen=True, kw_only=True, slots=True)
class Project:
    """What a kit needs to know of the source."""

    folder: Path
    version: str
    extras: tuple[str, ...]
    test_requirements: tuple[str, ...]

    @property
    def constraints(self) -> Path:
        """The file of the tested versions."""
        return self.folder / CONSTRAINTS


def read_project(folder: Path) -> Project:
    """Read ``pyproject.toml`` of a clone.

    Raises:
        InputError: the folder is no clone of this repository.
    """
    refused = InputError(f"{folder} is no clone of {NAME}, from which a kit is made: --source DIR")
    try:
        data = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise refused from error
    if data.get("project", {}).get("name") != NAME or not (folder / CONSTRAINTS).is_file():
        raise refused
    return Project(
        folder=folder,
        version=data["project"]["version"],
        extras=tuple(data["project"]["optional-dependencies"]),
        test_requirements=tuple(data["dependency-groups"][TEST_GROUP]),
    )


def copy_tracked(project: Project, target: Path) -> None:
    """Copy the files that Git tracks, as they are in the working tree: nothing that was built.

    Raises:
        InputError: the folder is no working tree of Git, or Git is not installed.
    """
    command = ["git", "ls-files", "-z", "--cached"]
    try:
        done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"{project.folder} is no working tree of Git; clone the repository, and run it there"
        ) from error
    for name in done.stdout.split("\0"):
        if (source := project.folder / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
