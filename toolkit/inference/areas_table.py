"""The table of areas: one row for each class of each mask in a folder, whichever run wrote the mask."""

import csv
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from medseg_trt.files import atomic_file, folder_lock
from medseg_trt.imaging.images import MASK_SUFFIXES, Mask, file_stem
from medseg_trt.imaging.slide_mask import SlideMask
from medseg_trt.inference.csv_table import Row, inert_row, require_table, stored_rows
from medseg_trt.progress import printable, unicode_text

AREAS = "areas.csv"
HEADER = ("file", "class", "label", "pixels", "mm2", "ml", "unusual")
OLDER_HEADER = HEADER[:-1]
UNUSUAL = HEADER.index("unusual")
MAX_BYTES = 1 << 36  # of an existing table, which is read by rows: a hundred million masks take about a tenth
LISTED_FOLDERS = 64  # whose escaped names are kept in memory


def area_rows(mask: Mask | SlideMask, name: str) -> tuple[Row, ...]:
    """Return the rows of one mask, in valid Unicode; ``name`` is that of its image in the table."""
    digits = 6 if isinstance(mask, SlideMask) else 3  # of square millimetres; six are square microns
    return tuple(
        (
            unicode_text(name),
            area.name,
            str(label),
            str(area.pixels),
            "" if area.mm2 is None else f"{area.mm2:.{digits}f}",
            "" if area.ml is None else f"{area.ml:.4f}",
            unicode_text(mask.unusual or ""),
        )
        for label, area in enumerate(mask.areas(), 1)
    )


class AreaTable:
    """Collects the rows of a run in a temporary database on disk, and merges them into the table of a folder."""

    def __init__(self) -> None:
        # a private file that SQLite deletes; a run may be taken from one thread to another between two masks
        self._rows = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._rows.executescript(
            "BEGIN; CREATE TABLE row (name TEXT, label TEXT, number TEXT, pixels TEXT, mm2 TEXT, ml TEXT, "
            "unusual TEXT);"
            "CREATE TABLE image (name TEXT PRIMARY KEY) WITHOUT ROWID;"
            "CREATE TABLE mask (name BLOB PRIMARY KEY) WITHOUT ROWID;"
        )

    def add(self, mask: str, rows: Sequence[Row]) -> None:
        """Add the rows of an image.

        Args:
            mask: the path of its mask below the folder.
            rows: of the image, one for each class.
        """
        self._rows.execute("INSERT OR IGNORE INTO mask VALUES (?)", (os.fsencode(mask),))
        shown = [tuple(map(printable, _complete_row(row))) for row in rows]
        self._rows.executemany("INSERT OR IGNORE INTO image VALUES (?)", [row[:1] for row in shown])
        self._rows.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?, ?)", shown)

    def write(self, folder: Path) -> None:
        """Replace the table of a folder: rows of other masks that still exist, then the rows that were added.

        The table is locked meanwhile, and replaced as a whole.

        Raises:
            UsageError: the file ``areas.csv`` is not such a table.
        """
        path, masks = folder / AREAS, _MasksOnDisk(folder)
        with (
            folder_lock(folder),
            atomic_file(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            table = csv.writer(file)
            table.writerow(HEADER)
            for row in stored_areas(path):
                if self._is_of_another_mask(row[0], masks):
                    table.writerow(inert_row(row))
            for row in self._rows.execute("SELECT * FROM row ORDER BY rowid"):
                table.writerow(inert_row(row))

    def close(self) -> None:
        """Delete the temporary database."""
        self._rows.close()

    def _is_of_another_mask(self, name: str, masks: "_MasksOnDisk") -> bool:
        """Return whether a row of an earlier run has a mask that this run has not written."""
        if self._rows.execute("SELECT 1 FROM image WHERE name = ?", (name,)).fetchone():
            return False
        return any(
            not self._rows.execute("SELECT 1 FROM mask WHERE name = ?", (os.fsencode(mask),)).fetchone()
            for mask in masks.of_image(name)
        )


class _MasksOnDisk:
    """Finds the masks in a folder by the names of their images as a table shows them, with escaped characters."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._escaped_entries = lru_cache(LISTED_FOLDERS)(_escaped_entries)

    def of_image(self, name: str) -> Iterator[str]:
        """Yield the paths of an image's masks below the folder."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            return
        stem = file_stem(Path(name))
        for suffix in MASK_SUFFIXES:
            yield from self._files(path.with_name(f"{stem}{suffix}"))

    def _files(self, shown: PurePosixPath) -> Iterator[str]:
        if (self._folder / shown).is_file():
            yield str(shown)
        if "\\" not in str(shown):
            return
        paths = [""]
        for part in shown.parts:
            paths = [
                os.path.join(path, entry)
                for path in paths
                for entry in (part, *self._escaped_entries(self._folder / path).get(part, ()))
            ]
        yield from (path for path in paths if path != str(shown) and (self._folder / path).is_file())


def _escaped_entries(folder: Path) -> dict[str, list[str]]:
    """Return the names in a folder that are shown in another way, by how they are shown."""
    entries: dict[str, list[str]] = {}
    if folder.is_dir():
        for name in os.listdir(folder):
            if (shown := printable(name)) != name:
                entries.setdefault(shown, []).append(name)
    return entries


def stored_areas(path: Path) -> Iterator[Row]:
    """Yield the rows of a table without its header, one at a time; none if the file does not exist.

    Raises:
        UsageError: the file is not a table of areas, or larger than ``MAX_BYTES``.
    """
    return stored_rows(path, HEADER, MAX_BYTES, OLDER_HEADER)


def require_own_areas(folder: Path) -> None:
    """Refuse a folder whose ``areas.csv`` is another kind of file.

    Raises:
        UsageError: it is not a table of areas.
    """
    require_table(folder / AREAS, HEADER, MAX_BYTES, OLDER_HEADER)


def _complete_row(row: Row) -> Row:
    """Return a row with all columns; those of earlier versions have no ``unusual``."""
    return row + ("",) * (len(HEADER) - len(row))


def unusual_reason(rows: Iterable[Sequence[str]]) -> str | None:
    """Return in which way the image of these rows is unlike the training images; None: it is not, or not known."""
    return min((row[UNUSUAL] for row in rows if len(row) > UNUSUAL and row[UNUSUAL]), default=None)
