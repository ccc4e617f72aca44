"""Run a program against ``fake_driver.c``, a CUDA driver that launches nothing, and read what it was asked for."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = [Path(__file__).with_name(name) for name in ("fake_driver.c", "fake_memory.c")]


@dataclass(frozen=True, slots=True)
class Launched:
    """One launch, as the driver got it."""

    symbol: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    stream: int
    arguments: tuple[int, ...]


def compiler() -> str | None:
    """Return the C compiler, or None."""
    return shutil.which("gcc") or shutil.which("cc")


def build(folder: Path, also: Sequence[str] = ()) -> Path:
    """Compile the driver into a folder and return that; functions in ``also`` that it lacks are there and fail."""
    others = folder / "others.c"
    others.write_text("".join(f"__attribute__((weak)) int {name}(void) {{ return 801; }}\n" for name in also))
    command = [compiler() or "cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *SOURCES, others]
    subprocess.run([*command, "-o", folder / "libcuda.so.1", "-ldl"], check=True)
    return folder


def run(folder: Path, command: Sequence[str | Path]) -> list[Launched]:
    """Run a command with the driver of a folder, and return its launches.

    Raises:
        subprocess.CalledProcessError: the command failed; what it printed is a note of the error.
    """
    log = folder / "launches"
    log.unlink(missing_ok=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_LOG": str(log)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        error = subprocess.CalledProcessError(done.returncode, [str(part) for part in command])
        error.add_note(done.stdout + done.stderr)
        raise error
    return [_parsed(line) for line in log.read_text().splitlines()] if log.exists() else []


def python(folder: Path, code: str, *arguments: str | Path) -> list[Launched]:
    """Run Python code, as ``run`` does."""
    return run(folder, [sys.executable, "-c", code, *arguments])


def _parsed(line: str) -> Launched:
    symbol, *numbers = line.split()
    values = tuple(int(number) for number in numbers)
    return Launched(symbol, values[:3], values[3:6], values[6], values[7], values[8:])
