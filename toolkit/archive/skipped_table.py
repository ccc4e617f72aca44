"""The table of what a run over an archive has not segmented, written a row at a time: ``skipped.csv``."""

import csv
from collections.abc import Iterable
from pathlib import Path

from medseg_trt.archive.grouping import SKIPPED
from medseg_trt.archive.plan import Skipped
from medseg_trt.files import atomic_file
from medseg_trt.inference.areas_table import MAX_BYTES, require_own_areas
from medseg_trt.inference.csv_table import inert_row, require_table

SKIPPED_HEADER = ("file", "kind", "reason")
MAX_CELL = 4096  # characters, before control characters are escaped; the csv module reads at most 131,072


def require_own_tables(folder: Path) -> None:
    """Refuse to replace a file that is not a table of an earlier run.

    Raises:
        UsageError: ``areas.csv`` or ``skipped.csv`` is another kind of file.
    """
    require_own_areas(folder)
    require_table(folder / SKIPPED, SKIPPED_HEADER, MAX_BYTES)


def write_skipped(folder: Path, skipped: Iterable[Skipped]) -> None:
    """Write what was not segmented, and the reasons."""
    with atomic_file(folder / SKIPPED) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(SKIPPED_HEADER)
        for item in skipped:
            kind = "refused" if item.refused else "left out"
            table.writerow(inert_row((_cut(item.file), kind, _cut(item.reason))))


def _cut(text: str) -> str:
    """Leave out the middle of a text that is too long, such as a line of a list that is no path."""
    half = MAX_CELL // 2
    return text if len(text) <= MAX_CELL else f"{text[:half]} … {text[-half:]}"
