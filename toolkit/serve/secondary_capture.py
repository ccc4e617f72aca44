"""The overlay of a mask as a DICOM Secondary Capture, for viewers that cannot show segmentations."""

import hashlib
from pathlib import Path

import numpy as np

from medseg_trt import __version__
from medseg_trt.errors import require
from medseg_trt.files import atomic_file
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.overlay import write_overlay
from medseg_trt.serve.settings import EXTRA

SERIES_OFFSET = 1000  # beside the number of the segmentation's series


def write_secondary_capture(
    image: Image, mask: Mask, window: tuple[float, float], segmentation: Path, path: Path, work: Path
) -> None:
    """Draw the overlay of ``infer --overlay`` into a Secondary Capture of the same study.

    Patient, study and dates are the segmentation's, and the UIDs are derived from its UID.

    Args:
        image: the image.
        mask: its labels.
        window: the values shown as black and white.
        segmentation: the file with the DICOM segmentation of the mask.
        path: the file to write.
        work: a folder for the overlay.
    """
    import PIL.Image

    pydicom, highdicom = require("pydicom", "medical"), require("highdicom", EXTRA)
    write_overlay(image, mask, window, work / "overlay.png")
    with PIL.Image.open(work / "overlay.png") as overlay:
        pixels = np.asarray(overlay.convert("RGB"))
    source = pydicom.dcmread(segmentation, stop_before_pixels=True)
    capture = highdicom.sc.SCImage(
        pixel_array=pixels,
        photometric_interpretation="RGB",
        bits_allocated=8,
        coordinate_system="PATIENT",
        patient_orientation=("L", "P"),
        study_instance_uid=source.StudyInstanceUID,
        series_instance_uid=_uid(source.SOPInstanceUID, "series"),
        series_number=int(source.SeriesNumber) + SERIES_OFFSET,
        sop_instance_uid=_uid(source.SOPInstanceUID, "instance"),
        instance_number=1,
        manufacturer="medseg-trt",
        software_versions=__version__,
        series_description="Segmentation overlay, not for diagnosis",
        patient_id=source.PatientID,
        patient_name=source.PatientName,
        patient_birth_date=source.PatientBirthDate,
        patient_sex=source.PatientSex,
        accession_number=source.AccessionNumber,
        study_id=source.StudyID,
        study_date=source.StudyDate or None,
        study_time=source.StudyTime or None,
        referring_physician_name=source.get("ReferringPhysicianName"),
        specific_character_set=source.get("SpecificCharacterSet"),
    )
    capture.Laterality = ""  # of a paired body part it must be present, and which part this is stays unknown
    date, time = source.ContentDate, source.ContentTime
    capture.InstanceCreationDate, capture.InstanceCreationTime = date, time
    for name, value in (
        ("ContentDate", date),
        ("ContentTime", time),
        ("DateOfSecondaryCapture", date),
        ("TimeOfSecondaryCapture", time),
    ):
        if name in capture:
            setattr(capture, name, value)
    for item in capture.get("ContributingEquipmentSequence", [])[-1:]:
        item.ContributionDateTime = date + time
    with atomic_file(path) as temporary:
        capture.save_as(temporary, enforce_file_format=True)


def _uid(uid: str, role: str) -> str:
    digest = bytearray(hashlib.sha256(f"medseg-trt overlay\n{role}\n{uid}".encode()).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x80, digest[8] & 0x3F | 0x80
    return f"2.25.{int.from_bytes(digest)}"
