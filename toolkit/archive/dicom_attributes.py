"""Read the attributes by which the DICOM files of an archive are grouped and chosen."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_trt.errors import UsageError, require
from medseg_trt.imaging.formats.dicom_file import MAX_HEADER_BYTES, Limited
from medseg_trt.imaging.formats.dicom_objects import ATTRIBUTES, kind_of_non_image

MAX_VALUE = 1024  # characters of a value that are compared; a DICOM name has up to 64
LABELS = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
ALWAYS = ("SOPClassUID", "Modality", "ImageType", "ImagePositionPatient", *LABELS, *ATTRIBUTES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attributes:
    """What the index keeps of a DICOM file."""

    patient: str = ""
    study: str = ""
    series: str = ""
    corner: str = ""  # position of the first pixel; empty where there is none
    reason: str | None = None  # why it is not segmented, or None
    values: tuple[str, ...] = ()  # of the keywords that were asked for
    is_damaged: bool = False  # it is read by itself, which gives the reason


def require_keyword(keyword: str) -> None:
    """Refuse what is no attribute of DICOM's dictionary.

    Raises:
        UsageError: there is no such attribute.
        MissingExtraError: pydicom is not installed.
    """
    require("pydicom", "medical")
    from pydicom.datadict import tag_for_keyword

    if tag_for_keyword(keyword) is None:
        raise UsageError(f"DICOM has no attribute {keyword!r}; examples are Modality, SeriesDescription and PatientID")


def read_attributes(path: Path, keywords: Sequence[str] = ()) -> Attributes:
    """Read the labels of a DICOM file and the values of further keywords; what is damaged has neither.

    Of a damaged file, reading the image gives the reason later.

    Raises:
        MissingExtraError: pydicom is not installed.
    """
    pydicom = require("pydicom", "medical")
    with suppress(Exception), path.open("rb") as file:
        limited = Limited(file, MAX_HEADER_BYTES)
        tags = [*dict.fromkeys((*ALWAYS, *keywords))]
        elements = pydicom.dcmread(limited, stop_before_pixels=True, force=True, specific_tags=tags)
        patient, study, series = (_text(elements, name) for name in LABELS)
        return Attributes(
            patient=patient,
            study=study,
            series=series,
            corner=_text(elements, "ImagePositionPatient"),
            reason=_reason(elements),
            values=tuple(_text(elements, name) for name in keywords),
        )
    return Attributes(is_damaged=True)


def _reason(elements: Any) -> str | None:
    if (kind := kind_of_non_image(elements)) is not None:
        return f"DICOM without an image of its own: {kind}"
    return "a localizer" if "LOCALIZER" in _text(elements, "ImageType").upper().split("\\") else None


def _text(elements: Any, name: str) -> str:
    """Return a value as DICOM writes it: several are separated by backslashes."""
    value = getattr(elements, name, None)
    if value is None:
        value = getattr(elements.file_meta, name, None)  # such as TransferSyntaxUID
    if value is None:
        return ""
    from pydicom.multival import MultiValue

    text = "\\".join(map(str, value)) if isinstance(value, MultiValue) else str(value)
    return text.strip(" \0")[:MAX_VALUE]
