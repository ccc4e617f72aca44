"""Decode, scale and check the pixels of one DICOM file."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, BinaryIO

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, require
from medseg_trt.imaging.formats.dicom_file import DEFLATED, Header, Limited, first_item, number_of
from medseg_trt.imaging.formats.limits import MAX_REASON, convert_decoder_errors, require_finite

J2K_START = b"\xff\x4f\xff\x51"  # of every JPEG 2000 codestream; then 2 bytes length, 2 profile, and the sizes
J2K_SIZES = 8
J2K_SYNTAXES = ("1.2.840.10008.1.2.4.9", "1.2.840.10008.1.2.4.20")  # JPEG 2000, and with high throughput
JPEG_START = b"\xff\xd8\xff"  # of every JPEG and JPEG-LS stream; neither start occurs inside a stream
RLE = "1.2.840.10008.1.2.5"  # one item a frame
ITEM, SEQUENCE_END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
DECODERS = {  # transfer syntax -> package that decodes it, where the extra `medical` does not include one
    "1.2.840.10008.1.2.4.57": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.70": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.50": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.51": "pylibjpeg-libjpeg",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg-openjpeg",
}
QUANTITIES = ("CT", "PT")  # modalities of physical quantities, where MONOCHROME1 concerns display only


def read_frames(header: Header) -> ndarray:
    """Decode all frames to (frames, rows, columns, channels), scaled by the header and with white as the largest value.

    Integers stay integers where slope and intercept are whole numbers.

    Raises:
        InputError: they are damaged, cut short, more frames than the header declares, or compressed in a way that no
            installed decoder supports.
    """
    path, elements = header.path, header.elements
    pydicom = require("pydicom", "medical")
    pixels = require("pydicom.pixels", "medical")
    with convert_decoder_errors(path, Exception):
        _require_all_pixels(header)
        _require_decoder(header)
        _require_codestreams_fit(header)
        extra: Any = pydicom.Dataset()
        try:
            if header.syntax == DEFLATED:
                with path.open("rb") as file:
                    extra = pydicom.dcmread(Limited(file, path.stat().st_size), force=True)
                _require_length(header, len(extra.PixelData))
                values = pixels.pixel_array(extra)
            else:
                values = pixels.pixel_array(path, ds_out=extra, transfer_syntax_uid=pydicom.uid.UID(header.syntax))
        except RuntimeError as error:
            if header.syntax not in DECODERS:
                raise
            reason = " ".join(str(error).split())[-MAX_REASON:]
            raise InputError(
                f"{path} cannot be decoded: … {reason}; try another decoder: pip install {DECODERS[header.syntax]}"
            ) from error
        frames, rows, columns, samples = header.shape
        if values.size != prod(header.shape):
            raise InputError(
                f"{path} holds {values.shape} pixels, but its header declares {header.shape}; export it again"
            )
        values = values.astype(values.dtype.newbyteorder("="), copy=False).reshape(frames, rows, columns, samples)
        photometric = str(elements.get("PhotometricInterpretation", ""))
        if photometric == "PALETTE COLOR":
            values = pixels.apply_color_lut(values[..., 0], extra)
            return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
        if samples == 1:
            values = _in_units(elements, values, inverted=photometric == "MONOCHROME1")
        elif samples != 3:
            raise InputError(f"{path} has {samples} samples per pixel; 1 or 3 are supported")
        if values.dtype.kind == "f":
            values = values.astype(np.float32)
        require_finite(path, values)
    return values


def _require_all_pixels(header: Header) -> None:
    """Refuse a file with fewer pixels than its header declares, or with more frames, which would be left out."""
    path, element = header.path, header.pixel_element
    if header.syntax == DEFLATED:
        return
    if element is None:
        raise InputError(f"{path} cannot be read: it holds no pixels, but its header declares some; export it again")
    if element.length is not None:
        _require_length(header, min(element.length, path.stat().st_size - element.start))
        return
    with path.open("rb") as file:
        file.seek(element.start)
        _require_frames(header, _count_streams(header, file))


def _require_length(header: Header, stored: int) -> None:
    """Refuse uncompressed pixels whose size differs from the header's."""
    expected = require("pydicom.pixels.utils", "medical").get_expected_length(header.elements)
    if stored < expected:
        raise InputError(
            f"{header.path} cannot be read: it is cut short, with {stored} of {expected} bytes of pixels; copy it again"
        )
    _require_frames(header, stored * header.shape[0] // expected)


def _require_frames(header: Header, stored: int) -> None:
    if stored > header.shape[0]:
        raise InputError(
            f"{header.path} holds {stored} frames, but its header declares {header.shape[0]}; correct NumberOfFrames"
        )


def _count_streams(header: Header, file: BinaryIO) -> int:
    """Count the frames among the items of compressed pixels by their first bytes; at least 1."""
    items = _items(header, file)
    offsets_length, _ = next(items, (0, b""))  # of the basic offset table, 4 bytes a frame
    starts = [start for _, start in items]
    if header.syntax == RLE:
        return len(starts)
    return max(offsets_length // 4, sum(start.startswith((J2K_START, JPEG_START)) for start in starts), 1)


def _items(header: Header, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the length and the first bytes of each item up to the end of the sequence.

    Raises:
        InputError: the file ends before the sequence does.
    """
    while True:
        tag, length = file.read(4), int.from_bytes(file.read(4), "little")
        if tag == SEQUENCE_END:
            return
        if len(tag) < len(ITEM):
            raise InputError(f"{header.path} cannot be read: it is cut short within its pixels; copy it again")
        if tag != ITEM:
            raise InputError(f"{header.path} cannot be read: its compressed pixels are damaged; copy it again")
        following = file.tell() + length
        yield length, file.read(min(length, len(J2K_START)))
        file.seek(following)


def _require_decoder(header: Header) -> None:
    pixels = require("pydicom.pixels", "medical")
    uid = require("pydicom.uid", "medical").UID(header.syntax)
    if not uid.is_transfer_syntax or (not uid.is_private and uid.name == header.syntax):
        raise InputError(
            f"{header.path} has the transfer syntax {header.syntax[:64]!r}, which is private or none; convert it to "
            "uncompressed DICOM where it was made"
        )
    if uid.is_compressed and not uid.is_deflated and not pixels.get_decoder(uid).is_available:
        package = DECODERS.get(header.syntax)
        remedy = f"install a decoder: pip install {package}" if package else "convert it to uncompressed DICOM"
        raise InputError(f"{header.path} is compressed as {uid.name}; {remedy}")


def _require_codestreams_fit(header: Header) -> None:
    """Refuse a JPEG 2000 stream whose size differs from the header's: a decoder would allocate the stream's size.

    Source: ISO/IEC 15444-1 A.5.1, marker SIZ.
    """
    if not header.syntax.startswith(J2K_SYNTAXES):
        return
    pydicom = require("pydicom", "medical")
    frames, rows, columns, _ = header.shape
    wanted = ["PixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
    elements = pydicom.dcmread(header.path, force=True, specific_tags=wanted)
    for frame in require("pydicom.encaps", "medical").generate_frames(elements.PixelData, number_of_frames=frames):
        start = frame.find(J2K_START)
        if start < 0:
            raise InputError(f"{header.path} has the transfer syntax of JPEG 2000, but other content; export it again")
        sizes = np.frombuffer(frame, ">u4", 4, start + J2K_SIZES).astype(np.int64)  # right, lower, left, upper ends
        width, height = (sizes[:2] - sizes[2:]).tolist()
        if (width, height) != (columns, rows):
            raise InputError(
                f"{header.path} holds a JPEG 2000 image of {width} x {height} pixels, but its header declares "
                f"{columns} x {rows}; export it again"
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
    whole = stored.dtype.kind in "iu" and all(float(number).is_integer() for scale in scales for number in scale)
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
    shared = first_item(elements, "SharedFunctionalGroupsSequence")
    groups = elements.get("PerFrameFunctionalGroupsSequence") or [None] * frames  # as many as frames: see Header
    scales: list[tuple[float, float]] = []
    for group in groups:
        holders = (
            first_item(group, "PixelValueTransformationSequence"),
            first_item(shared, "PixelValueTransformationSequence"),
        )
        holder = next((item for item in holders if item is not None), elements)
        slope, intercept = number_of(holder, "RescaleSlope"), number_of(holder, "RescaleIntercept")
        scales.append((1.0 if slope is None else slope, 0.0 if intercept is None else intercept))
    return scales
