"""``metadata.csv``: the video sequence of each frame in the Kaggle archive of CVC-ClinicDB."""

import csv
from collections.abc import Mapping
from pathlib import Path

from medseg_trt.errors import InputError

NAME = "metadata.csv"
FRAME, SEQUENCE = "frame_id", "sequence_id"
MAX_BYTES = 1 << 24


def sequences(*folders: Path) -> Mapping[str, str]:
    """Return the sequence of every frame, from the first folder with the file; empty without one.

    Raises:
        InputError: the file is not such a table.
    """
    path = next((folder / NAME for folder in folders if (folder / NAME).is_file()), None)
    if path is None:
        return {}
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB; it should have a line a frame")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error
    if any(not row.get(column) for row in rows for column in (FRAME, SEQUENCE)):
        raise InputError(f"{path} must have the columns {FRAME} and {SEQUENCE}, filled in every line")
    return {row[FRAME]: f"sequence {row[SEQUENCE]}" for row in rows}
