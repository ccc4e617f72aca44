"""Find the Python that a kit is made for: pip judges markers and wheels by the interpreter that runs it."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import UsageError

LOWEST = (3, 11)
VERSION = re.compile(r"\d+\.\d+(\.\d+)?")
PROBE = (
    "import json, sys, sysconfig; "
    "print(json.dumps([sys.executable, list(sys.version_info[:3]), sysconfig.get_config_var('SOABI')]))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Interpreter:
    """A Python that runs."""

    path: Path
    version: tuple[int, int, int]
    abi: str  # SOABI: implementation, version, processor and C library, as in cpython-312-x86_64-linux-gnu

    @property
    def minor(self) -> str:
        """Its version without the patch level, as in 3.12."""
        return f"{self.version[0]}.{self.version[1]}"


def find_interpreter(wanted: str) -> Interpreter:
    """Return the Python of a version, from PATH or pyenv's folder, or that of a name or path.

    Raises:
        UsageError: there is none, or it is too old.
    """
    for path in _candidates(wanted):
        interpreter = probe(path)
        if interpreter is None or (VERSION.fullmatch(wanted) and not _is_version(interpreter, wanted)):
            continue
        if interpreter.version[:2] < LOWEST:
            raise UsageError(f"{path} is Python {interpreter.minor}; medseg-trt needs 3.11 or newer: --python 3.12")
        return interpreter
    where = f"not on PATH as python{wanted}, not in {_pyenv()}" if VERSION.fullmatch(wanted) else "it does not run"
    raise UsageError(f"there is no Python {wanted} ({where}). Install it, or name another: --python PATH")


def probe(path: Path) -> Interpreter | None:
    """Ask a Python what it is; None where it does not run, as pyenv's shims of versions that are switched off."""
    try:
        done = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, check=False)
        executable, (major, minor, patch), abi = json.loads(done.stdout)
    except (OSError, ValueError, TypeError):
        return None
    return Interpreter(path=Path(executable), version=(major, minor, patch), abi=str(abi))


def _candidates(wanted: str) -> Iterator[Path]:
    if not VERSION.fullmatch(wanted):
        yield Path(shutil.which(wanted) or wanted)
        return
    major_minor = ".".join(wanted.split(".")[:2])
    if on_path := shutil.which(f"python{major_minor}"):
        yield Path(on_path)
    versions = (path for path in _pyenv().glob(f"{major_minor}*") if VERSION.fullmatch(path.name))
    for folder in sorted(versions, key=lambda path: [int(part) for part in path.name.split(".")], reverse=True):
        yield folder / "bin" / "python"


def _pyenv() -> Path:
    return Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"


def _is_version(interpreter: Interpreter, wanted: str) -> bool:
    numbers = tuple(int(part) for part in wanted.split("."))
    return interpreter.version[: len(numbers)] == numbers
