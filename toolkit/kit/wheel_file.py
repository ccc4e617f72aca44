"""Read what a wheel says of itself: name, version, licence and digest."""

import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from medseg_trt.files import sha256

LICENCE_CLASSIFIER = "License :: OSI Approved :: "
LICENCE_NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "AUTHORS")
LONGEST_LICENCE_NAME = 100  # characters; some packages put the whole text there


@dataclass(frozen=True, kw_only=True, slots=True)
class Wheel:
    """A wheel of a kit."""

    file: str
    name: str
    version: str
    sha256: str
    licence: str  # an SPDX expression or a name; empty where the wheel tells none
    is_spdx: bool
    licence_files: tuple[str, ...]  # names inside the wheel


def read_wheel(path: Path) -> Wheel:
    """Read name, version and licence of a wheel. Source: PyPA, core metadata 2.4."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.count("/") == 1 and name.endswith(".dist-info/METADATA")]
        headers = HeaderParser().parsestr(archive.read(metadata).decode("utf-8"))
    expression, text = headers["License-Expression"], headers["License"] or ""
    classifiers = [line for line in headers.get_all("Classifier", []) if line.startswith("License :: ")]
    short = text if len(text) <= LONGEST_LICENCE_NAME and "\n" not in text else ""
    named = ", ".join(line.removeprefix(LICENCE_CLASSIFIER).removeprefix("License :: ") for line in classifiers)
    return Wheel(
        file=path.name,
        name=headers["Name"],
        version=headers["Version"],
        sha256=sha256(path),
        licence=expression or named or short,
        is_spdx=expression is not None,
        licence_files=tuple(name for name in names if _is_licence(name)),
    )


def _is_licence(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if name.endswith("/") or file.endswith((".py", ".h", ".hpp")):
        return False
    return ".dist-info/licenses" in folder or file.upper().startswith(LICENCE_NAMES)
