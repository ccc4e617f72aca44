"""The real CT series of the sample organs with the UIDs that its authors emptied."""

from pathlib import Path

import pydicom
from pydicom.uid import UID

ROOT = "1.2.826.0.1.3680043.8.498"


def repair(series: Path, folder: Path, study: int = 77, limit: int | None = None) -> list[Path]:
    """Write the files of a series with SOP Class, SOP Instance, Study and Series UIDs; return them in order.

    Args:
        series: the files, whose four UIDs are empty.
        folder: where to write.
        study: makes the UIDs of one copy differ from those of another.
        limit: take only so many files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number, path in enumerate(sorted(series.iterdir())[:limit], 1):
        dataset = pydicom.dcmread(path)
        dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID
        dataset.StudyInstanceUID = f"{ROOT}.{study}"
        dataset.SeriesInstanceUID = f"{ROOT}.{study}.1"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = UID(f"{ROOT}.{study}.1.{number}")
        dataset.PatientID = f"test-{study}"
        dataset.save_as(folder / path.name)
        paths.append(folder / path.name)
    return paths
