"""The images of one run over an archive, in order: a private copy of what the index holds, which no other run changes.

The copy is an SQLite file in a temporary folder, so that memory does not grow with the number of images.
"""

import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import overload

from medseg_trt.archive.containers import Container
from medseg_trt.archive.entries import Entries, Identity, read_list
from medseg_trt.archive.grouping import SEPARATOR, Grouping
from medseg_trt.archive.index import UNREADABLE, classify, index_key, open_index, record_entries
from medseg_trt.archive.request import ArchiveRequest, Part
from medseg_trt.imaging.images import Source

COPY = f"""
CREATE TABLE plan.skipped AS
    SELECT input, sort, file, reason, refused FROM problem
    UNION ALL SELECT input, sort, path, reason, kind = '{UNREADABLE}' OR (alone AND kind = '') FROM file
    WHERE reason <> ''
    UNION ALL SELECT input, sort, path, reason, 1 FROM candidate WHERE reason IS NOT NULL;
CREATE TABLE plan.image (position INTEGER PRIMARY KEY, stem BLOB, path BLOB, files BLOB);
INSERT INTO plan.image SELECT row_number() OVER (ORDER BY input, sort, id) - 1, stem, path, files FROM candidate
    WHERE reason IS NULL;
CREATE INDEX plan.image_stem ON image (stem);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A row of ``skipped.csv``."""

    file: str
    reason: str
    refused: bool  # an error; otherwise it is left out


class Plan(Sequence[Source]):
    """The images of a run or of one part of it; iterated any number of times, also in several threads."""

    def __init__(self, folder: TemporaryDirectory[str], containers: dict[Path, Container], part: Part | None) -> None:
        """Take the copy in ``folder``; it is deleted with this object."""
        self._folder = folder
        self.containers = containers
        self._part = part
        with closing(self._connected()) as plan:
            (self.num_images,) = plan.execute("SELECT count(*) FROM image").fetchone()
            (self.num_left_out,) = plan.execute("SELECT count(*) FROM skipped WHERE NOT refused").fetchone()

    def close(self) -> None:
        """Delete the copy, and close the archive files."""
        for container in self.containers.values():
            container.close()
        self._folder.cleanup()

    def of(self, part: Part | None) -> "Plan":
        """Return the same plan for another part, or for all images."""
        return Plan(self._folder, self.containers, part)

    def __len__(self) -> int:
        return len(range(self.num_images)[self._slice()])

    def __iter__(self) -> Iterator[Source]:
        yield from (source for _, source in self.numbered())

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Source]: ...
    def __getitem__(self, index: int | slice) -> Source | Sequence[Source]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        position = range(self.num_images)[self._slice()][index]
        with closing(self._connected()) as plan:
            row = plan.execute("SELECT stem, path, files FROM image WHERE position = ?", (position,)).fetchone()
        return _source(*row)

    def numbered(self) -> Iterator[tuple[int, Source]]:
        """Yield every image with its position among the images of all parts."""
        start, step = (0, 1) if self._part is None else (self._part.number - 1, self._part.of)
        with closing(self._connected()) as plan:
            query = "SELECT position, stem, path, files FROM image WHERE position % ? = ? ORDER BY position"
            for position, *row in plan.execute(query, (step, start)):
                yield position, _source(*row)

    def named(self, stem: str) -> tuple[int, Source]:
        """Return the image with a stem, and its position among the images of all parts."""
        with closing(self._connected()) as plan:
            query = "SELECT position, stem, path, files FROM image WHERE stem = ?"
            position, *row = plan.execute(query, (os.fsencode(stem),)).fetchone()
        return position, _source(*row)

    def skipped(self) -> Iterator[Skipped]:
        """Yield what is not segmented, in order, and the reasons."""
        with closing(self._connected()) as plan:
            for file, reason, refused in plan.execute(
                "SELECT file, reason, refused FROM skipped ORDER BY input, sort, file"
            ):
                yield Skipped(file=os.fsdecode(file), reason=reason, refused=bool(refused))

    def digest(self) -> str:
        """Return the SHA-256 of the names of all images and of what is skipped."""
        digest = hashlib.sha256()
        with closing(self._connected()) as plan:
            for row in plan.execute("SELECT stem, path, files FROM image ORDER BY position"):
                digest.update(b"\0\0".join(row) + b"\0\0\0")
        for item in self.skipped():
            digest.update(repr(item).encode())
        return digest.hexdigest()

    def _slice(self) -> slice:
        return slice(None) if self._part is None else slice(self._part.number - 1, None, self._part.of)

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(Path(self._folder.name) / "plan.sqlite", check_same_thread=False)


def make_plan(
    inputs: Sequence[Path], request: ArchiveRequest, ignored: Sequence[Path], output: Path, part: Part | None
) -> Plan:
    """List and index the inputs, and return the images in the order in which they are segmented.

    Args:
        inputs: that the user named: folders, patterns, archive files, DICOMDIRs and images.
        request: which images are wanted, and further inputs.
        ignored: folders that are not listed, besides the output folder.
        output: the folder of the masks.
        part: of the images; None for all.

    Raises:
        InputError: the list of inputs cannot be read.
        MissingExtraError: there are DICOM files and pydicom is not installed.
    """
    folder = TemporaryDirectory(prefix="medseg-trt-")
    try:
        return _made_plan(inputs, request, Entries(ignored=_identities(output, *ignored), output=output), part, folder)
    except BaseException:
        folder.cleanup()
        raise


def _made_plan(
    inputs: Sequence[Path],
    request: ArchiveRequest,
    entries: Entries,
    part: Part | None,
    folder: TemporaryDirectory[str],
) -> Plan:
    lines = None if request.list_file is None else _kept_lines(request.list_file, Path(folder.name) / "list")
    named = ((number, item) for number, path in enumerate(inputs) for item in entries.of(path))
    listed = () if lines is None else ((len(inputs), item) for item in entries.listed(read_list(str(lines))))
    with open_index(index_key(inputs, request, lines)) as index:
        record_entries(index, chain(named, listed))
        classify(index, request.where, entries.containers)
        grouping = Grouping(index, request.names, entries.containers)
        grouping.run()
        grouping.refuse_clashes()
        _copy(index, Path(folder.name) / "plan.sqlite")
    return Plan(folder, entries.containers, part)


def _identities(*folders: Path) -> set[Identity]:
    statuses = [folder.stat() for folder in folders if folder.exists()]
    return {(status.st_dev, status.st_ino) for status in statuses}


def _kept_lines(name: str, path: Path) -> Path:
    """Copy the list: standard input can be read once only, and a file may change meanwhile."""
    with path.open("wb") as file:
        file.writelines(os.fsencode(line) + b"\n" for line in read_list(name))
    return path


def _copy(index: sqlite3.Connection, path: Path) -> None:
    index.commit()
    index.execute("ATTACH ? AS plan", (str(path),))
    index.executescript(COPY)
    index.commit()
    index.execute("DETACH plan")


def _source(stem: bytes, path: bytes, files: bytes) -> Source:
    return Source(
        path=Path(os.fsdecode(path)),
        files=tuple(Path(os.fsdecode(file)) for file in files.split(SEPARATOR)),
        stem=os.fsdecode(stem),
    )
