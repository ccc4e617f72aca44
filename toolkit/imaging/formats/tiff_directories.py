"""Follow the directories of a TIFF file, and limit what their tags hold, before a library reads them.

tifffile and Pillow read the values of tags whole, and a sparse file of a few KB on the disk may declare gigabytes.
Source: TIFF 6.0, section 2; BigTIFF; SubIFDs: TIFF Technical Note 1.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.limits import MAX_SLICES

MAX_TAGS = 2**20  # of all directories: 256 for each of MAX_SLICES pages
MAX_TAG_BYTES = 2**30  # of memory for the tags of all directories; 2**18 x 2**18 pixels in tiles of 128 need a third
BYTES_PER_VALUE = 40  # of a tuple of Python's numbers, which tifffile makes
BYTES_PER_BYTE = 5  # copies of texts and bytes at once, as seen with Pillow
TYPE_BYTES = {1: 1, 2: 1, 6: 1, 7: 1, 3: 2, 8: 2, 4: 4, 9: 4, 11: 4, 13: 4, 5: 8, 10: 8, 12: 8, 16: 8, 17: 8, 18: 8}
STRIP_OFFSETS, TILE_OFFSETS, SUB_DIRECTORIES = 273, 324, 330
OFFSETS = {4: "I", 13: "I", 16: "Q", 18: "Q"}  # types that offsets of directories have


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    tag: int
    kind: int
    count: int
    values_at: int  # where its values are in the file

    @property
    def num_bytes(self) -> int:
        return self.count * TYPE_BYTES.get(self.kind, 0)


def count_directories(path: Path) -> int:
    """Count the directories by following their chain; tifffile ignores a broken link.

    Raises:
        InputError: a link leads beyond the end of the file or back, there are more than ``MAX_SLICES``, or the tags of
            the directories and of the smaller copies below them hold too much or contradict each other.
    """
    with path.open("rb") as file:
        reader = _Reader(path, file)
        offset = reader.first
        seen: set[int] = set()
        while offset:
            if offset in seen:
                raise InputError(f"{path}: its pages refer to each other in a circle; save it again")
            seen.add(offset)
            if len(seen) > MAX_SLICES:
                raise InputError(f"{path} has more than {MAX_SLICES} pages; save them in several files")
            entries, offset = reader.directory(offset)
            reader.check_copies(entries)
    return len(seen)


class _Reader:
    """The directories of an open file, of either byte order and size of offsets."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._size = path.stat().st_size
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        is_big = head[2:4] in (b"\x2b\0", b"\0\x2b")
        self._order = order
        self._count = struct.Struct(f"{order}Q" if is_big else f"{order}H")
        self._entry = struct.Struct(f"{order}HHQ8s" if is_big else f"{order}HHI4s")
        self._offset = struct.Struct(f"{order}Q" if is_big else f"{order}I")
        self._tags = self._tag_bytes = 0  # of the directories before, and the memory that they take
        self._below: set[int] = set()  # offsets of smaller copies
        self.first = self._number(self._offset, 8 if is_big else 4)

    def directory(self, offset: int) -> tuple[list[_Entry], int]:
        """Return the entries of a directory, and the offset of the next one; 0 after the last.

        Raises:
            InputError: the file ends before, its tags hold too much, or it has both strips and tiles.
        """
        count, start = self._number(self._count, offset), offset + self._count.size
        following = self._number(self._offset, start + count * self._entry.size)
        self._tags += count
        if self._tags > MAX_TAGS:
            raise InputError(f"{self._path} has more than {MAX_TAGS} tags; save it again")
        block = self._read(start, count * self._entry.size)
        entries = [
            self._entry_of(start + number * self._entry.size, *fields)
            for number, fields in enumerate(self._entry.iter_unpack(block))
        ]
        self._check_tags(entries)
        return entries, following

    def check_copies(self, entries: list[_Entry]) -> None:
        """Check the directories below a directory, to any depth, as those of the chain.

        Raises:
            InputError: one is refused, or there are more than ``MAX_SLICES``.
        """
        waiting = [entries]
        while waiting:
            for offset in self._sub_directories(waiting.pop()):
                if offset in self._below or offset >= self._size:  # tifffile leaves it out
                    continue
                self._below.add(offset)
                if len(self._below) > MAX_SLICES:
                    raise InputError(f"{self._path} has more than {MAX_SLICES} smaller copies; save it again")
                waiting.append(self.directory(offset)[0])

    def _check_tags(self, entries: list[_Entry]) -> None:
        if {STRIP_OFFSETS, TILE_OFFSETS} <= {entry.tag for entry in entries}:
            raise InputError(f"{self._path} has a page in strips and in tiles, which may differ; save it again")
        for entry in entries:
            if entry.values_at + entry.num_bytes <= self._size:  # others are ignored, or refused by their readers
                is_bytes = TYPE_BYTES.get(entry.kind) == 1
                self._tag_bytes += entry.count * (BYTES_PER_BYTE if is_bytes else BYTES_PER_VALUE)
        if self._tag_bytes > MAX_TAG_BYTES:
            raise InputError(
                f"{self._path} has tags that would take more than {MAX_TAG_BYTES >> 20} MiB of memory; save it again, "
                "without the data of other programs"
            )

    def _sub_directories(self, entries: list[_Entry]) -> Iterator[int]:
        for entry in entries:
            if entry.tag == SUB_DIRECTORIES and entry.kind in OFFSETS and entry.count <= MAX_SLICES:
                block = self._read(entry.values_at, entry.num_bytes)
                yield from struct.unpack(f"{self._order}{entry.count}{OFFSETS[entry.kind]}", block)

    def _entry_of(self, at: int, tag: int, kind: int, count: int, value: bytes) -> _Entry:
        entry = _Entry(tag=tag, kind=kind, count=count, values_at=at + self._entry.size - len(value))
        if entry.num_bytes <= len(value):
            return entry
        return _Entry(tag=tag, kind=kind, count=count, values_at=self._offset.unpack(value)[0])

    def _number(self, form: struct.Struct, offset: int) -> int:
        return form.unpack(self._read(offset, form.size))[0]

    def _read(self, offset: int, num_bytes: int) -> bytes:
        self._file.seek(min(offset, self._size))
        block = self._file.read(num_bytes)
        if len(block) < num_bytes:
            raise InputError(f"{self._path} is cut short: it ends before its pages do; copy it again from its source")
        return block
