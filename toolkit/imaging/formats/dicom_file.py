"""Read the header of one DICOM file: its type, its size in pixels, and the geometry of its planes.

No pixel is decoded here; their number is checked before decoding.
"""

import io
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_trt.errors import InputError, require
from medseg_trt.imaging.dicom_signature import LONG_VRS, SIGNATURE_BYTES, starts_like_dicom
from medseg_trt.imaging.formats.dicom_objects import ATTRIBUTES, kind_of_non_image, sop_class
from medseg_trt.imaging.formats.limits import check_size, convert_decoder_errors

MAX_HEADER_BYTES = 2**25  # of everything before the pixels; enhanced files describe every frame there
MAX_INFLATED_BYTES = 2**28  # of a file with the deflated transfer syntax
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
PIXEL_TAGS = ((0x7FE0, 0x0008), (0x7FE0, 0x0009), (0x7FE0, 0x0010))  # floats, doubles, integers
UNDEFINED_LENGTH = 0xFFFFFFFF  # of compressed pixels, which are stored in items
KEPT = [
    *("SOPClassUID", "SOPInstanceUID", "Modality", "StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber"),
    *("SeriesDescription", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation", "ImagePositionPatient", "ImageOrientationPatient"),
    *("PixelSpacing", "ImagerPixelSpacing", "SliceThickness", "SpacingBetweenSlices", "RescaleSlope"),
    *("RescaleIntercept", "ModalityLUTSequence", "PerFrameFunctionalGroupsSequence"),
    *("SharedFunctionalGroupsSequence", "ConcatenationUID", "InConcatenationTotalNumber", *ATTRIBUTES),
]
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")  # of a slice; together they place it
TOMOGRAPHIC = ("CT", "MR", "PT")  # modalities whose images are slices


class NotAnImageError(InputError):
    """A DICOM object that is not an image.

    Attributes:
        kind: the type of object, such as "a segmentation".
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelElement:
    """Where the pixels are stored in the file."""

    start: int  # byte at which the value begins
    length: int | None  # in bytes; None where the pixels are compressed and stored in items


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """One slice: its file, frame, and position in the patient (left, posterior, superior)."""

    path: Path
    frame: int
    corner_mm: tuple[float, float, float]  # of the first pixel's centre
    along_row: tuple[float, float, float]  # unit vector from column to column
    along_column: tuple[float, float, float]
    spacing_mm: tuple[float, float]  # between rows, between columns
    thickness_mm: float | None  # distance between slices by the header, which may be wrong


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Header:
    """The header of a file, read before its pixels are decoded."""

    path: Path
    elements: Any  # pydicom's dataset, without pixels
    syntax: str  # transfer syntax
    study: str
    series: str
    number: int | None  # of the series
    description: str  # of the series
    modality: str
    instance: str  # SOP instance UID: a label, which need not be unique
    shape: tuple[int, int, int, int]  # frames, rows, columns, samples
    planes: tuple[Plane, ...]  # one per frame; empty where a frame has no position
    spacing_mm: tuple[float, float] | None  # between rows and columns, where there are no planes
    pixel_element: PixelElement | None  # None where absent, or with the deflated transfer syntax


class Limited(io.RawIOBase):
    """A file that limits the bytes read, and the inflated size of a deflated data set."""

    def __init__(self, file: Any, budget: int) -> None:
        super().__init__()
        self._file, self._left = file, budget
        self._was_short = False

    @property
    def ended_early(self) -> bool:
        """Whether a read or seek went beyond the end of the file."""
        size = os.fstat(self._file.fileno()).st_size
        return self._was_short or self._file.tell() > size

    def read(self, size: int | None = -1) -> bytes:
        """Read up to ``size`` bytes, or the deflated remainder."""
        if size is None or size < 0:  # how pydicom reads a deflated data set
            rest = self._file.read()
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            if len(inflater.decompress(rest, MAX_INFLATED_BYTES + 1)) > MAX_INFLATED_BYTES:
                raise ValueError(f"it inflates to more than {MAX_INFLATED_BYTES >> 20} MiB")
            if not inflater.eof:
                raise ValueError("it is cut short: its deflated data set is incomplete")
            return rest
        block = self._file.read(min(size, self._left + 1))
        self._left -= len(block)
        self._was_short |= 0 < len(block) < size
        if self._left < 0:
            raise ValueError("its header is too long")
        return block

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move as in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in the file."""
        return self._file.tell()


def read_header(path: Path) -> Header:
    """Read everything except the pixels.

    Raises:
        NotAnImageError: it is another DICOM object, or has no pixels.
        InputError: it is damaged, cut short, or not a DICOM file.
        MissingExtraError: pydicom is not installed.
    """
    pydicom = require("pydicom", "medical")
    with convert_decoder_errors(path, Exception), path.open("rb") as file:
        is_dicom = starts_like_dicom(file.read(SIGNATURE_BYTES))
        file.seek(0)
        limited = Limited(file, MAX_HEADER_BYTES)
        elements = pydicom.dcmread(limited, stop_before_pixels=True, force=True, specific_tags=KEPT)
        _require_image(path, elements, is_dicom, limited.ended_early)
        syntax = _syntax(elements)
        frames = number_of(elements, "NumberOfFrames")
        samples = number_of(elements, "SamplesPerPixel")
        shape = (1 if frames is None else int(frames), int(elements.Rows), int(elements.Columns), int(samples or 1))
        check_size(path, shape, slices=shape[0])
        series_number = number_of(elements, "SeriesNumber")
        return Header(
            path=path,
            elements=elements,
            syntax=syntax,
            study=str(elements.get("StudyInstanceUID", "")),
            series=str(elements.get("SeriesInstanceUID", "")),
            number=None if series_number is None else int(series_number),
            description=str(elements.get("SeriesDescription", "")),
            modality=str(elements.get("Modality", "")),
            instance=str(elements.get("SOPInstanceUID", "")),
            shape=shape,
            planes=_planes(path, elements, shape[0]),
            spacing_mm=_spacing(elements, "PixelSpacing") or _spacing(elements, "ImagerPixelSpacing"),
            pixel_element=None if syntax == DEFLATED else _pixel_element(file, elements),
        )


def _require_image(path: Path, elements: Any, is_dicom: bool, ended_early: bool) -> None:
    kind = kind_of_non_image(elements)
    if kind is not None:
        raise NotAnImageError(f"{path} is {kind}, not an image; give the image that it belongs to", kind)
    if "Rows" in elements and "Columns" in elements:
        return
    if not (is_dicom or sop_class(elements)):
        raise InputError(f"{path} has no DICOM header; give a DICOM image")
    if ended_early:
        raise InputError(f"{path} is cut short: it ends within its header; copy it again")
    raise NotAnImageError(f"{path} holds no pixels; give a DICOM image", "an object without pixels")


def _pixel_element(file: Any, elements: Any) -> PixelElement | None:
    """Read the tag and the length of the pixel element at the file's current position."""
    is_implicit, is_little = elements.original_encoding
    order = "<" if is_little else ">"
    block = file.read(12)
    if len(block) < 12 or struct.unpack_from(f"{order}HH", block) not in PIXEL_TAGS:
        return None
    is_long = not is_implicit and block[4:6] in LONG_VRS
    (length,) = struct.unpack_from(f"{order}L", block, 8 if is_long else 4)
    start = file.tell() - (0 if is_long else 4)
    return PixelElement(start=start, length=None if length == UNDEFINED_LENGTH else length)


def number_of(elements: Any, name: str) -> float | None:
    """Return the number of an element, or None where it is missing or empty."""
    value = elements.get(name)
    return None if value is None or str(value) == "" else float(value)


def missing_geometry(header: Header) -> tuple[str, ...]:
    """Return the elements that a slice lacks to have a position; none for an image that need not have one."""
    missing = tuple(name for name in GEOMETRY if not header.elements.get(name))
    is_slice = header.modality in TOMOGRAPHIC or not {*GEOMETRY[:2]} <= {*missing}
    return missing if is_slice and header.shape[0] == 1 else ()


def _numbers(elements: Any, name: str, count: int) -> tuple[float, ...] | None:
    value = elements.get(name)
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
        return None
    return tuple(float(number) for number in value)


def _spacing(elements: Any, name: str) -> tuple[float, float] | None:
    spacing = _numbers(elements, name, 2)
    return (spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None


def _syntax(elements: Any) -> str:
    """Return the transfer syntax; where the file does not state it, the encoding of its header."""
    declared = elements.file_meta.get("TransferSyntaxUID") if elements.file_meta else None
    if declared:
        return str(declared)
    is_implicit, is_little = elements.original_encoding
    return IMPLICIT_LITTLE if is_implicit else EXPLICIT_LITTLE if is_little else EXPLICIT_BIG


def _planes(path: Path, elements: Any, frames: int) -> tuple[Plane, ...]:
    """Return the geometry of every frame, or nothing where a frame has no position.

    Source: DICOM PS3.3 C.7.6.2.1.1 (a plane in the patient) and C.7.6.16 (functional groups of frames).
    """
    shared = first_item(elements, "SharedFunctionalGroupsSequence")
    groups = elements.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        holders_by_frame = [[elements]] if frames == 1 else []
    else:
        if len(groups) != frames:
            raise InputError(f"{path} declares {frames} frames, but describes {len(groups)}; export it again")
        holders_by_frame = [[group, shared, elements] for group in groups]
    planes: list[Plane] = []
    for frame, holders in enumerate(holders_by_frame):
        position = _look_up(holders, "PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = _look_up(holders, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = _look_up(holders, "PixelMeasuresSequence", "PixelSpacing", 2)
        if position is None or orientation is None or spacing is None:
            return ()
        directions = np.array(orientation).reshape(2, 3)
        if not (np.isfinite(position).all() and np.allclose(directions @ directions.T, np.eye(2), atol=1e-2)):
            raise InputError(
                f"{path} has the impossible position {position} or orientation {orientation}; export it again"
            )
        if not all(0 < distance_mm < np.inf for distance_mm in spacing):
            raise InputError(f"{path} has the impossible pixel spacing {spacing} mm; export it again")
        along_row, along_column = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).tolist()
        between = _look_up(holders, "PixelMeasuresSequence", "SpacingBetweenSlices", 1)
        thickness = between or _look_up(holders, "PixelMeasuresSequence", "SliceThickness", 1)
        planes.append(
            Plane(
                path=path,
                frame=frame,
                corner_mm=_three(position),
                along_row=_three(along_row),
                along_column=_three(along_column),
                spacing_mm=(spacing[0], spacing[1]),
                thickness_mm=abs(thickness[0]) or None if thickness else None,
            )
        )
    return tuple(planes)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def first_item(elements: Any, name: str) -> Any:
    """Return the first item of a sequence, or None where there is none."""
    sequence = elements.get(name) if elements is not None else None
    return sequence[0] if sequence else None


def _look_up(holders: Sequence[Any], sequence: str, name: str, count: int) -> tuple[float, ...] | None:
    """Return numbers from the first that has them: the frame's group, the shared group, or the file itself."""
    for holder in holders:
        for elements in (first_item(holder, sequence), holder):
            if elements is None:
                continue
            numbers = _numbers(elements, name, count) if count > 1 else number_of(elements, name)
            if numbers is not None:
                return numbers if isinstance(numbers, tuple) else (numbers,)
    return None
