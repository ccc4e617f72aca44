"""One DICOM file: where its planes lie, and its pixels as numbers.

Only the header is read first, with a limit; the pixels are decoded when it is known how many there will be.
"""

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, require
from medseg_trt.formats.guard import MAX_REASON, check_size, naming, require_finite

MAX_HEADER_BYTES = 2**25  # of everything before the pixels; enhanced files describe every frame there
MAX_INFLATED_BYTES = 2**28  # of a file that is deflated as a whole
DEFLATED = "1.2.840.10008.1.2.1.99"
IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
J2K_START = b"\xff\x4f\xff\x51"  # of every JPEG 2000 codestream; then 2 bytes length, 2 profile, and the sizes
J2K_SIZES = 8
J2K_SYNTAXES = ("1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20")  # JPEG 2000, and with high throughput
DECODERS = {  # what a transfer syntax needs that the extra `medical` does not bring
    "1.2.840.10008.1.2.4.57": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.70": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.50": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.51": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg-openjpeg",
}
QUANTITIES = ("CT", "PT")  # modalities whose numbers mean something, so that MONOCHROME1 says only how to show them
KEPT = (
    "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "SeriesNumber", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "PixelRepresentation", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "ImagerPixelSpacing",
    "SliceThickness", "SpacingBetweenSlices", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence",
)  # fmt: skip


class NoPicturesError(InputError):
    """It is DICOM, but something else than an image, or nothing that DICOM knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plane:
    """One slice: which frame of which file, and where it lies in the patient (left, posterior, superior)."""

    path: Path
    frame: int
    corner_mm: tuple[float, float, float]  # of the first pixel's centre
    along_row: tuple[float, float, float]  # unit vector from column to column
    along_column: tuple[float, float, float]
    spacing_mm: tuple[float, float]  # between rows, between columns
    thickness_mm: float | None  # from slice to slice as the header says, which may be wrong


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Header:
    """What is known of a file before its pixels are decoded."""

    path: Path
    elements: Any  # pydicom's dataset, without pixels
    syntax: str  # transfer syntax
    series: str
    number: int | None  # of the series, for people
    instance: str
    shape: tuple[int, int, int, int]  # frames, rows, columns, samples
    planes: tuple[Plane, ...]  # one for every frame; none where a frame does not say where it lies
    spacing_mm: tuple[float, float] | None  # between rows and columns, where there are no planes


class _Limited(io.RawIOBase):
    """A file of which no more than a budget is read, and a deflated rest only if it inflates to a possible size."""

    def __init__(self, file: Any, budget: int) -> None:
        super().__init__()
        self._file, self._left = file, budget

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:  # pydicom reads so where the rest of the file is deflated
            rest = self._file.read()
            inflater = zlib.decompressobj(-zlib.MAX_WBITS)
            if len(inflater.decompress(rest, MAX_INFLATED_BYTES + 1)) > MAX_INFLATED_BYTES:
                raise ValueError(f"it inflates to more than {MAX_INFLATED_BYTES >> 20} MiB")
            return rest
        block = self._file.read(min(size, self._left + 1))
        self._left -= len(block)
        if self._left < 0:
            raise ValueError("its header is too long")
        return block

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_header(path: Path) -> Header:
    """Read everything but the pixels.

    Raises:
        InputError: it is damaged, no DICOM file, or holds no pixels.
        MissingExtraError: pydicom is not installed.
    """
    pydicom = require("pydicom", "medical")
    with naming(path, Exception), path.open("rb") as file:
        limited = _Limited(file, MAX_HEADER_BYTES)
        elements = pydicom.dcmread(limited, stop_before_pixels=True, force=True, specific_tags=list(KEPT))
        if "Rows" not in elements or "Columns" not in elements:
            what = "no pictures" if "SOPClassUID" in elements or elements.file_meta else "no DICOM header"
            raise NoPicturesError(f"{path} holds {what}; only DICOM images can be read")
        frames = _number(elements, "NumberOfFrames")
        shape = (
            1 if frames is None else int(frames), int(elements.Rows), int(elements.Columns),
            int(elements.get("SamplesPerPixel") or 1),
        )  # fmt: skip
        check_size(path, shape)
        series_number = _number(elements, "SeriesNumber")
        return Header(
            path=path,
            elements=elements,
            syntax=_syntax(elements),
            series=str(elements.get("SeriesInstanceUID", "")),
            number=None if series_number is None else int(series_number),
            instance=str(elements.get("SOPInstanceUID", "")),
            shape=shape,
            planes=_planes(path, elements, shape[0]),
            spacing_mm=_spacing(elements, "PixelSpacing") or _spacing(elements, "ImagerPixelSpacing"),
        )


def read_frames(header: Header) -> ndarray:
    """Decode all frames to (frames, rows, columns, channels), scaled by the header and with white as the largest value.

    Integers stay integers where the scale is whole.

    Raises:
        InputError: they are damaged, or compressed in a way that nothing installed can decode.
    """
    path, elements = header.path, header.elements
    pydicom = require("pydicom", "medical")
    pixels = require("pydicom.pixels", "medical")
    with naming(path, Exception):
        _require_decoder(header)
        _require_codestreams_fit(header)
        extra: Any = pydicom.Dataset()
        try:
            if header.syntax == DEFLATED:
                with path.open("rb") as file:
                    extra = pydicom.dcmread(_Limited(file, path.stat().st_size), force=True)
                values = pixels.pixel_array(extra)
            else:
                values = pixels.pixel_array(path, ds_out=extra, transfer_syntax_uid=pydicom.uid.UID(header.syntax))
        except RuntimeError as error:
            if header.syntax not in DECODERS:
                raise
            reason = " ".join(str(error).split())[-MAX_REASON:]
            raise InputError(
                f"{path} cannot be decoded: … {reason}; another decoder may: pip install {DECODERS[header.syntax]}"
            ) from error
        frames, rows, columns, samples = header.shape
        if values.size != prod(header.shape):
            raise InputError(f"{path} holds {values.shape} pixels, but its header says {header.shape}")
        values = values.astype(values.dtype.newbyteorder("="), copy=False).reshape(frames, rows, columns, samples)
        photometric = str(elements.get("PhotometricInterpretation", ""))
        if photometric == "PALETTE COLOR":
            values = pixels.apply_color_lut(values[..., 0], extra)
            return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
        if samples == 1:
            values = _in_units(elements, values, inverted=photometric == "MONOCHROME1")
        elif samples != 3:
            raise InputError(f"{path} has {samples} samples a pixel; 1 or 3 are possible")
        if values.dtype.kind == "f":
            values = values.astype(np.float32)
        require_finite(path, values)
    return values


def _number(elements: Any, name: str) -> float | None:
    value = elements.get(name)
    return None if value is None or str(value) == "" else float(value)


def _numbers(elements: Any, name: str, count: int) -> tuple[float, ...] | None:
    value = elements.get(name)
    if value is None or isinstance(value, str) or not hasattr(value, "__len__") or len(value) != count:
        return None
    return tuple(float(each) for each in value)


def _spacing(elements: Any, name: str) -> tuple[float, float] | None:
    spacing = _numbers(elements, name, 2)
    return (spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None


def _syntax(elements: Any) -> str:
    """Return the transfer syntax; of a file that does not say, what its header is written in."""
    said = elements.file_meta.get("TransferSyntaxUID") if elements.file_meta else None
    if said:
        return str(said)
    is_implicit, is_little = elements.original_encoding
    return IMPLICIT_LITTLE if is_implicit else EXPLICIT_LITTLE if is_little else EXPLICIT_BIG


def _planes(path: Path, elements: Any, frames: int) -> tuple[Plane, ...]:
    """Return where every frame lies.

    Source: DICOM PS3.3 C.7.6.2.1.1 (a plane in the patient) and C.7.6.16 (functional groups of frames).
    """
    shared = _first(elements, "SharedFunctionalGroupsSequence")
    groups = elements.get("PerFrameFunctionalGroupsSequence")
    if groups is None:
        own = [[elements]] if frames == 1 else []
    else:
        own = [[group, shared, elements] for group in groups] if len(groups) == frames else []
    planes: list[Plane] = []
    for frame, places in enumerate(own):
        position = _look_up(places, "PlanePositionSequence", "ImagePositionPatient", 3)
        orientation = _look_up(places, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = _look_up(places, "PixelMeasuresSequence", "PixelSpacing", 2)
        if position is None or orientation is None or spacing is None:
            return ()
        directions = np.array(orientation).reshape(2, 3)
        if not (np.isfinite(position).all() and np.allclose(directions @ directions.T, np.eye(2), atol=1e-2)):
            raise InputError(f"{path} says it lies at {position} along {orientation}, which cannot be")
        if not all(0 < each < np.inf for each in spacing):
            raise InputError(f"{path} says its pixels are {spacing} mm, which cannot be")
        along_row, along_column = (directions / np.linalg.norm(directions, axis=1, keepdims=True)).tolist()
        between = _look_up(places, "PixelMeasuresSequence", "SpacingBetweenSlices", 1)
        thickness = between or _look_up(places, "PixelMeasuresSequence", "SliceThickness", 1)
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


def _first(elements: Any, name: str) -> Any:
    sequence = elements.get(name) if elements is not None else None
    return sequence[0] if sequence else None


def _look_up(places: Sequence[Any], sequence: str, name: str, count: int) -> tuple[float, ...] | None:
    """Return numbers from the frame's group, the group that all frames share, or the file itself."""
    for place in places:
        for holder in (_first(place, sequence), place):
            if holder is None:
                continue
            found = _numbers(holder, name, count) if count > 1 else _number(holder, name)
            if found is not None:
                return found if isinstance(found, tuple) else (found,)
    return None


def _require_decoder(header: Header) -> None:
    pixels = require("pydicom.pixels", "medical")
    uid = require("pydicom.uid", "medical").UID(header.syntax)
    if not uid.is_transfer_syntax or (not uid.is_private and uid.name == header.syntax):
        raise InputError(f"{header.path} says it is stored as {header.syntax[:64]!r}, which is no transfer syntax")
    if uid.is_compressed and not uid.is_deflated and not pixels.get_decoder(uid).is_available:
        package = DECODERS.get(header.syntax)
        remedy = f"install a decoder: pip install {package}" if package else "convert it to uncompressed DICOM"
        raise InputError(f"{header.path} is compressed as {uid.name}; {remedy}")


def _require_codestreams_fit(header: Header) -> None:
    """Refuse a JPEG 2000 stream that says it is larger than the header says: a decoder would believe it.

    Source: ISO/IEC 15444-1 A.5.1, marker SIZ.
    """
    if not header.syntax.startswith(J2K_SYNTAXES):
        return
    pydicom = require("pydicom", "medical")
    frames, rows, columns, _ = header.shape
    wanted = ["PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
    elements = pydicom.dcmread(header.path, force=True, specific_tags=wanted)
    for frame in require("pydicom.encaps", "medical").generate_frames(elements.PixelData, number_of_frames=frames):
        place = frame.find(J2K_START)
        if place < 0:
            raise InputError(f"{header.path} is said to be JPEG 2000, but is not")
        sizes = np.frombuffer(frame, ">u4", 4, place + J2K_SIZES).astype(np.int64)  # right, lower, left, upper ends
        width, height = (sizes[:2] - sizes[2:]).tolist()
        if (width, height) != (columns, rows):
            raise InputError(
                f"{header.path} holds a JPEG 2000 picture of {width} x {height} pixels, but its header says "
                f"{columns} x {rows}"
            )


def _in_units(elements: Any, stored: ndarray, inverted: bool) -> ndarray:
    """Apply MONOCHROME1 and the modality's scale, frame by frame where they differ."""
    if inverted and elements.get("Modality") not in QUANTITIES and stored.dtype.kind in "iu":
        bits = int(elements.get("BitsStored") or 8 * stored.dtype.itemsize)
        stored = (-1 - stored if stored.dtype.kind == "i" else (2**bits - 1) - stored).astype(stored.dtype)
    if elements.get("ModalityLUTSequence"):
        return require("pydicom.pixels", "medical").apply_modality_lut(stored, elements)
    scales = _scales(elements, len(stored))
    if all(scale == (1, 0) for scale in scales):
        return stored
    whole = stored.dtype.kind in "iu" and all(float(each).is_integer() for scale in scales for each in scale)
    if not whole:
        values = np.empty(stored.shape, np.float32)
        for frame, (slope, intercept) in enumerate(scales):
            values[frame] = stored[frame].astype(np.float64) * slope + intercept
        return values
    ends = [float(end) * slope + shift for slope, shift in set(scales) for end in (stored.min(), stored.max())]
    fitting = [
        kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= min(ends) <= max(ends) <= np.iinfo(kind).max
    ]
    values = np.empty(stored.shape, fitting[0] if fitting else np.float32)
    for frame, (slope, intercept) in enumerate(scales):
        values[frame] = stored[frame].astype(np.float64) * slope + intercept
    return values


def _scales(elements: Any, frames: int) -> Sequence[tuple[float, float]]:
    """Return slope and intercept of every frame."""
    shared = _first(elements, "SharedFunctionalGroupsSequence")
    groups = elements.get("PerFrameFunctionalGroupsSequence") or [None] * frames
    scales: list[tuple[float, float]] = []
    for group in [*groups, *[None] * frames][:frames]:
        holders = (
            _first(group, "PixelValueTransformationSequence"),
            _first(shared, "PixelValueTransformationSequence"),
        )
        holder = next((each for each in holders if each is not None), elements)
        slope, intercept = _number(holder, "RescaleSlope"), _number(holder, "RescaleIntercept")
        scales.append((1.0 if slope is None else slope, 0.0 if intercept is None else intercept))
    return scales
