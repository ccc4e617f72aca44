"""Limit what the compressed strips and tiles of a TIFF file inflate to, before they are decoded."""

import lzma
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError

SLACK_BYTES = 1024  # of a compressed strip that is longer than its pixels
LZMA_BYTES = 2**28  # that its decoder may use

Counter = Callable[[bytes, int], int]  # how many bytes it becomes, counted up to a limit


def require_segments_fit(path: Path, file: Any, page: Any, counters: Mapping[int, Counter]) -> None:
    """Inflate every strip or tile with a limit, and refuse one that exceeds the size of its pixels.

    Raises:
        InputError: one exceeds it, or a strip is missing.
    """
    for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True):
        if not size or page.compression in counters:
            read_segment(path, file, page, offset, size, counters)


def read_segment(path: Path, file: Any, page: Any, offset: int, size: int, counters: Mapping[int, Counter]) -> bytes:
    """Return the compressed bytes of one strip or tile that inflates to no more than its pixels.

    Args:
        path: the file, for messages.
        file: tifffile's.
        page: tifffile's.
        offset: of the strip or tile in the file.
        size: in bytes, as the page says.
        counters: by TIFF's number of the compression; others are not inflated here.

    Raises:
        InputError: it exceeds them, or is missing or cut short.
    """
    if not size:
        raise InputError(f"{path} has strips or tiles without pixels; save it again")
    segment_bytes = prod(page.chunks) * page.dtype.itemsize
    file.filehandle.seek(offset)
    possible = min(size, 2 * segment_bytes + SLACK_BYTES)
    packed = file.filehandle.read(possible)
    count_bytes = counters.get(page.compression)
    if len(packed) < possible:
        raise InputError(f"{path} is cut short: it ends before its pixels do; copy it again from its source")
    if size > len(packed) or (count_bytes is not None and count_bytes(packed, segment_bytes) > segment_bytes):
        raise InputError(f"{path} has strips or tiles that inflate to more than their pixels; save it again")
    return packed


def _deflated_bytes(packed: bytes, limit: int) -> int:
    return len(zlib.decompressobj().decompress(packed, limit + 1))


def _lzma_bytes(packed: bytes, limit: int) -> int:
    inflater = lzma.LZMADecompressor(memlimit=LZMA_BYTES)
    inflated = len(inflater.decompress(packed, limit + 1))
    return limit + 1 if inflater.unused_data else inflated  # tifffile also decodes what follows


def _packbits_bytes(packed: bytes, limit: int) -> int:
    """Count without unpacking. Source: TIFF 6.0, section 9."""
    inflated = position = 0
    while position < len(packed) and inflated <= limit:
        code = packed[position]
        inflated += code + 1 if code < 128 else 257 - code if code > 128 else 0
        position += code + 2 if code < 128 else 2 if code > 128 else 1
    return inflated


# By TIFF's number of the compression.
DEFLATED: Mapping[int, Counter] = {8: _deflated_bytes, 32946: _deflated_bytes}
OTHER_PACKED: Mapping[int, Counter] = {34925: _lzma_bytes, 32773: _packbits_bytes}  # libtiff, of Pillow, stops itself
