"""What a kit is made of."""

import re
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import UsageError

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}  # bytes
MIN_PART_BYTES = 1 << 10
SIZE = re.compile(r"(\d+)([KMG])")
GIVEN = re.compile(r"([A-Za-z0-9][\w.-]*)(?:==([\w.!+]+))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class KitSpec:
    """What a kit is made of, and for which Python."""

    source: Path  # a clone of the repository
    python: str  # a version, a name on PATH or a path
    extras: tuple[str, ...] = ()
    samples: tuple[str, ...] = ()
    given: tuple[str, ...] = ()  # NAME or NAME==VERSION of packages that the target machine has
    part_bytes: int = 48 << 20
    with_tests: bool = False
    cuda_torch: bool = False


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``48M``: K, M and G are 2¹⁰, 2²⁰ and 2³⁰ bytes.

    Raises:
        UsageError: it is no size, or less than ``MIN_PART_BYTES``.
    """
    match = SIZE.fullmatch(text)
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if size < MIN_PART_BYTES:
        raise UsageError(f"--parts {text}: give a size from 1K, for example --parts 48M")
    return size


def parse_given(text: str) -> tuple[str, str | None]:
    """Return the normalised name and the version, if there is one, of a package that the target machine has.

    Raises:
        UsageError: it is no ``NAME`` or ``NAME==VERSION``.
    """
    match = GIVEN.fullmatch(text)
    if match is None:
        raise UsageError(f"--given {text}: give NAME or NAME==VERSION, for example --given torch==2.11.0")
    return normalised(match[1]), match[2]


def normalised(name: str) -> str:
    """Return a package's name as package indexes write it. Source: PyPA, name normalization."""
    return re.sub(r"[-_.]+", "-", name).lower()
