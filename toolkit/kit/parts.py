"""Write files into an archive that is cut into numbered parts, with the digest of every part.

``kit.manifest`` lists them in lines that a shell can read; its last line is the digest of the lines before it.
"""

import hashlib
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from medseg_trt.errors import UsageError
from medseg_trt.files import atomic_file, sha256

MANIFEST = "kit.manifest"
PART_NAME = re.compile(r"kit\.tar\.\d{3}")
MAX_PARTS = 999  # numbers have three digits
FORM = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A file of a kit."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What ``install.sh`` reads of a kit."""

    project: str
    version: str
    python: str  # 3.12
    abi: str
    given: tuple[str, ...]
    parts: tuple[Part, ...]
    total_sha256: str  # of all parts, one after the other

    def write(self, path: Path, beside: Sequence[Part]) -> None:
        """Write the manifest with the entries of files that lie beside the parts; names are without spaces."""
        lines = [
            f"kit {FORM}",
            f"project {self.project} {self.version}",
            f"python {self.python} {self.abi}",
            *(f"given {package}" for package in self.given),
            *(f"part {part.sha256} {part.num_bytes} {part.name}" for part in self.parts),
            *(f"file {file.sha256} {file.num_bytes} {file.name}" for file in beside),
            f"total {self.total_sha256}",
        ]
        text = "".join(f"{line}\n" for line in lines)
        with atomic_file(path) as temporary:
            temporary.write_text(f"{text}seal {hashlib.sha256(text.encode()).hexdigest()}\n", encoding="utf-8")


class PartWriter:
    """A file to write to; its bytes become ``kit.tar.001``, ``kit.tar.002`` … of at most ``part_bytes`` bytes."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self._folder, self._part_bytes = folder, part_bytes
        self._total = hashlib.sha256()
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._free = 0  # bytes that the open part may still take
        self.parts: list[Part] = []

    def write(self, data: bytes) -> int:
        """Append bytes.

        Raises:
            UsageError: there would be more than ``MAX_PARTS`` parts.
        """
        view = memoryview(data)
        while len(view):
            if self._file is None:
                self._open()
            taken, view = view[: self._free], view[self._free :]
            assert self._file is not None
            self._file.write(taken)
            self._digest.update(taken)
            self._total.update(taken)
            self._free -= len(taken)
            if not self._free:
                self.close()
        return len(data)

    def close(self) -> None:
        """End the open part."""
        if self._file is not None:
            num_bytes, name = self._file.tell(), Path(self._file.name).name
            self._file.close()
            self._file = None
            self.parts.append(Part(name=name, num_bytes=num_bytes, sha256=self._digest.hexdigest()))

    def total_sha256(self) -> str:
        """Return the digest of all bytes."""
        return self._total.hexdigest()

    def _open(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise UsageError(f"the kit needs more than {MAX_PARTS} parts; choose larger ones, for example --parts 48M")
        self._file = (self._folder / f"kit.tar.{len(self.parts) + 1:03}").open("xb")
        self._digest, self._free = hashlib.sha256(), self._part_bytes


def write_parts(content: Path, folder: Path, part_bytes: int) -> tuple[tuple[Part, ...], str]:
    """Write all files below ``content`` to parts in ``folder``; return the parts and the digest of all their bytes.

    Equal files make equal parts: names are sorted, and owners and times are left out.
    """
    writer = PartWriter(folder, part_bytes)
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", writer), mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(path for path in content.rglob("*") if path.is_file()):
                archive.add(path, str(path.relative_to(content)), recursive=False, filter=_plain)
    finally:
        writer.close()
    return tuple(writer.parts), writer.total_sha256()


def files_beside(folder: Path, names: Sequence[str]) -> tuple[Part, ...]:
    """Return the entries of files that lie beside the parts."""
    paths = [folder / name for name in names]
    return tuple(Part(name=path.name, num_bytes=path.stat().st_size, sha256=sha256(path)) for path in paths)


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
    info.mode = 0o755 if info.mode & 0o100 else 0o644
    return info
