"""Decode one strip or tile of a TIFF file: as a TIFF file of its own, so that it has the values of the whole image.

JPEG tiles are decoded by libjpeg-turbo directly, because libtiff fills what is damaged with grey and says nothing.
"""

import struct
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num
from numpy import ndarray

from medseg_trt.errors import InputError, require
from medseg_trt.imaging.formats.images_2d import open_image, require_mode
from medseg_trt.imaging.formats.limits import convert_decoder_errors, require_finite
from medseg_trt.imaging.formats.segment_bytes import DEFLATED, OTHER_PACKED, read_segment
from medseg_trt.imaging.formats.tiff import (
    WHITE_IS_ZERO,
    as_numbers,
    is_kept_whole,
    is_unknown_mode,
    page_values,
    slices_first,
)
from medseg_trt.imaging.preprocess import Size

SHORT, LONG = 3, 4  # TIFF's types of a tag, of 2 and 4 bytes
FORMATS = {SHORT: "H", LONG: "I"}
JPEG, JPEG_TABLES, JPEG_BITS = 7, 347, 8
PALETTE, YCBCR = 3, 6
GREY, COLOURS = ("Gray",), ("RGB", "YCbCr")  # simplejpeg's names
APERIO_YCBCR = 33003  # JPEG 2000 whose decoders do not convert the colours
COPIED_TAGS = {258: SHORT, 259: SHORT, 262: SHORT, 266: SHORT, 277: SHORT, 284: SHORT, 317: SHORT, 320: SHORT,
               338: SHORT, 339: SHORT}  # how values are stored, their compression, colours and palette  # fmt: skip
START, SCAN, END = b"\xff\xd8", 0xDA, b"\xff\xd9"  # JPEG's markers
APP0, APP14 = 0xE0, 0xEE  # segments that name the colours, of JFIF and Adobe
COUNTERS = {**DEFLATED, **OTHER_PACKED}
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # and then whether the colours are YCbCr


def decode_segment(path: Path, file: Any, page: Any, index: int, size: Size) -> Num[ndarray, "height width channels"]:
    """Return the values of one strip or tile, with 1 or 3 channels.

    Args:
        path: the file, for messages.
        file: tifffile's.
        page: tifffile's, of grey values or interleaved colours.
        index: of the strip or tile.
        size: its height and width in pixels; the last strip has fewer rows than the others.

    Raises:
        InputError: it is damaged, inflates to more than its pixels, or no decoder for it is installed.
    """
    with convert_decoder_errors(path, Exception):
        if page.compression == APERIO_YCBCR:
            raise InputError(
                f"{path} has tiles of JPEG 2000 in YCbCr, which are not supported; save it with JPEG tiles"
            )
        packed = read_segment(path, file, page, page.dataoffsets[index], page.databytecounts[index], COUNTERS)
        if page.compression == JPEG:
            values = _decode_jpeg(path, page, packed, size)
        else:
            values = _decode_file(path, _file_of(file.byteorder, page, packed, size), page.compression)
        if values.shape[:2] != size:
            raise InputError(f"{path} has a tile of {values.shape[1]} x {values.shape[0]} pixels; save it again")
        require_finite(path, values)
    return values.reshape(*size, -1)


def _decode_file(path: Path, content: bytes, compression: int) -> ndarray:
    """Decode a TIFF file of one strip as ``tiff`` decodes a page."""
    if compression in import_module("PIL.TiffImagePlugin").COMPRESSION_INFO:
        try:
            with open_image(path, "TIFF", content) as image:
                if is_kept_whole(image):
                    require_mode(path, image.mode)
                    return page_values(image, indices=False)
        except InputError as error:
            if not is_unknown_mode(error):
                raise
    tifffile = require("tifffile", "medical")
    with tifffile.TiffFile(BytesIO(content)) as file:
        page = file.pages[0]
        return as_numbers(path, page, *slices_first(page.asarray(maxworkers=1), page.axes))[0]


def _file_of(order: str, page: Any, packed: bytes, size: Size) -> bytes:
    """Return a TIFF file with one strip. Source: TIFF 6.0, section 2."""
    height, width = size
    tags: dict[int, tuple[int, tuple[int, ...]]] = {
        256: (LONG, (width,)), 257: (LONG, (height,)), 278: (LONG, (height,)), 279: (LONG, (len(packed),)),
        273: (LONG, (0,)),
    }  # fmt: skip
    for tag, kind in COPIED_TAGS.items():
        if (value := page.tags.valueof(tag)) is not None:
            tags[tag] = kind, tuple(int(number) for number in np.atleast_1d(value).ravel())
    entries, behind = b"", b""
    data_start = 8 + 2 + 12 * len(tags) + 4
    lengths = [_num_bytes(kind, values) for kind, values in tags.values()]
    extra_bytes = sum(length for length in lengths if length > 4)
    tags[273] = LONG, (data_start + extra_bytes,)
    for tag, (kind, values) in sorted(tags.items()):
        written = struct.pack(f"{order}{len(values)}{FORMATS[kind]}", *values)
        if len(written) > 4:
            behind, written = behind + written, struct.pack(f"{order}I", data_start + len(behind))
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + written.ljust(4, b"\0")
    mark = b"II" if order == "<" else b"MM"
    head = mark + struct.pack(f"{order}HIH", 42, 8, len(tags))
    return head + entries + bytes(4) + behind + packed


def _num_bytes(kind: int, values: tuple[int, ...]) -> int:
    return len(values) * struct.calcsize(FORMATS[kind])


def _decode_jpeg(path: Path, page: Any, packed: bytes, size: Size) -> ndarray:
    """Decode a JPEG of 8 bits; its colours are those that the TIFF names.

    Source: TIFF Technical Note 2; the Adobe segment is that of ITU-T T.872, section 6.5.3.
    """
    import simplejpeg  # pyright: ignore[reportMissingTypeStubs]

    is_grey = page.samplesperpixel == 1
    tables = page.tags.valueof(JPEG_TABLES) or b""
    content = START + ADOBE + bytes([page.photometric == YCBCR]) + _segments(tables) + _segments(packed)
    if is_grey:
        content = START + _segments(tables) + _segments(packed)
    height, width, space, _ = simplejpeg.decode_jpeg_header(content)
    if (height, width) != size:
        raise InputError(f"{path} has a tile of {width} x {height} pixels; save it again")
    if space not in (GREY if is_grey else COLOURS) or page.bitspersample != JPEG_BITS or page.photometric == PALETTE:
        raise InputError(f"{path} has JPEG tiles ({space}) whose colours are not those of its header; save it again")
    values = simplejpeg.decode_jpeg(content, "GRAY" if is_grey else "RGB", strict=True)
    return 255 - values if page.photometric == WHITE_IS_ZERO else values


def _segments(content: bytes) -> bytes:
    """Return the segments of a JPEG without its start, without those that name colours, and of tables without the end.

    Raises:
        EOFError: it is cut short.
        ValueError: it is no JPEG.
    """
    if not content:
        return b""
    if content[:2] != START:
        raise ValueError("a tile is no JPEG")
    kept, position = [b""], 2
    while content[position : position + 2] != END:
        marker, code, length = struct.unpack_from(">BBH", content.ljust(position + 4, b"\0"), position)
        if marker != START[0]:
            raise EOFError
        if code == SCAN:
            return b"".join([*kept, content[position:]])
        if code not in (APP0, APP14):
            kept.append(content[position : position + 2 + length])
        position += 2 + length
    return b"".join(kept)
