"""The table of areas: one row for each class of each mask in a folder, whichever run wrote the mask."""

import csv
import re
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path

from medseg_trt.errors import UsageError
from medseg_trt.files import atomic_file, folder_lock, open_regular
from medseg_trt.imaging.images import MASK_SUFFIXES, Mask, output_stem, suffix_of
from medseg_trt.progress import unicode_text

AREAS = "areas.csv"
HEADER = ("file", "class", "label", "pixels", "mm2", "ml")
MAX_BYTES = 1 << 28  # of an existing table: a million masks of three classes take a third
FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")  # spreadsheets accept the full-width forms, too

Row = tuple[str, ...]


def area_rows(mask: Mask) -> tuple[Row, ...]:
    """Return the rows of one mask, in valid Unicode."""
    return tuple(
        (
            unicode_text(mask.name),
            area.name,
            str(label),
            str(area.pixels),
            "" if area.mm2 is None else f"{area.mm2:.3f}",
            "" if area.ml is None else f"{area.ml:.4f}",
        )
        for label, area in enumerate(mask.areas(), 1)
    )


def merge_areas(folder: Path, masks: Iterable[str], rows: Sequence[Row]) -> Path:
    """Add the rows of this run's masks after the rows of other masks that still exist.

    The table is locked meanwhile, and replaced as a whole.

    Args:
        folder: of the masks.
        masks: the file names of the masks that this run has made or kept.
        rows: the rows of those masks.

    Raises:
        UsageError: the file ``areas.csv`` is not such a table.
    """
    path = folder / AREAS
    done = {row[0] for row in rows}
    with folder_lock(folder):
        others = {unicode_text(entry.name) for entry in folder.iterdir()} - {unicode_text(mask) for mask in masks}
        kept = [row for row in read_areas(path) if row[0] not in done and _has_mask(row[0], others)]
        text = StringIO()
        csv.writer(text).writerows([[_inert(cell) for cell in row] for row in (HEADER, *kept, *rows)])
        with atomic_file(path) as temporary:
            temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
    return path


def read_areas(path: Path) -> list[Row]:
    """Return the rows of a table without its header; none if the file does not exist.

    Raises:
        UsageError: the file is not a table of areas.
    """
    remedy = "move it away, or choose another folder with -o"
    try:
        with open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{path} cannot be read as a table of areas ({error.strerror}); {remedy}") from error
    try:
        if len(content) > MAX_BYTES:
            raise ValueError
        rows = [tuple(map(_active, row)) for row in csv.reader(StringIO(content.decode("utf-8-sig"), newline=""))]
        if rows[:1] != [HEADER] or any(len(row) != len(HEADER) for row in rows):
            raise ValueError
    except (ValueError, csv.Error) as error:
        raise UsageError(f"{path} is not a table of areas, so it is not replaced; {remedy}") from error
    return rows[1:]


def _has_mask(name: str, masks: set[str]) -> bool:
    """Return whether ``masks`` has the mask of the image ``name``."""
    path = Path(name)
    stem = name if suffix_of(path) is None else output_stem(path)
    return any(f"{stem}{suffix}" in masks for suffix in MASK_SUFFIXES)


def _inert(cell: str) -> str:
    """Prefix with an apostrophe what a spreadsheet would read as a formula."""
    return f"'{cell}" if FORMULA.match(cell) else cell


def _active(cell: str) -> str:
    """Undo ``_inert``."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
