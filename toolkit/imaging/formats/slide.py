"""Read one large 2-D image of a TIFF file by its rows: a whole-slide image (SVS), a pyramid, or a tiled image.

Which directory is the image, and which are its smaller copies, is judged by the file's content. The strips or tiles of
a few rows are decoded at a time.
"""

import os
import re
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num
from numpy import ndarray

from medseg_trt.errors import InputError, require
from medseg_trt.imaging.formats.limits import MAX_PIXELS, convert_decoder_errors
from medseg_trt.imaging.formats.tiff import BLACK_IS_ZERO, ORIENTATION, RGB, WHITE_IS_ZERO, require_colours
from medseg_trt.imaging.formats.tiff_directories import count_directories
from medseg_trt.imaging.formats.tiff_layout import MASK, REDUCED, require_description
from medseg_trt.imaging.formats.tiff_segments import JPEG, YCBCR, decode_segment
from medseg_trt.imaging.preprocess import Size

MAX_SIDE = 2**18  # pixels of a slide: 65 mm at 0.25 µm
MAX_SEGMENT_BYTES = 2**26  # of a decoded strip or tile: 4096 x 4096 pixels of RGB
COLOURS = (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, 3, YCBCR)  # 3: a palette
UNIT_UM = {2: 25400.0, 3: 10000.0}  # TIFF's ResolutionUnit: inch, centimetre
COARSEST_UM = 20.0  # of a scanner; printers' and screens' resolutions, 72 to 1200 dpi, are no sizes of pixels
FITTING = 1.05  # a copy is fine enough for a network whose pixels are smaller by up to this factor
FINEST_UM = 1e-4  # of an electron microscope
APERIO_MPP = re.compile(r"\bMPP\s*=\s*([0-9]+(?:\.[0-9]*)?)\s*(?:\||$)")  # other forms of numbers are not guessed
TO_TILES = "save it in tiles, for example with vips tiffsave in.tif out.tif --tile --pyramid --bigtiff"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Slide:
    """One level of a large 2-D image that is read by its rows."""

    path: Path
    size: Size
    channels: int
    dtype: np.dtype[Any]
    level: int  # 0: full resolution
    spacing_mm: tuple[float, float] | None  # between rows and between columns of this level, where known
    segment_rows: int  # of a strip or tile
    state: tuple[int, int, int]  # of the file, see ``_state``
    stem: str | None = None  # of its mask, where ``path`` does not give it

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of decoded pixels."""
        return self.size[1] * self.channels * self.dtype.itemsize


class SlideRows:
    """Decode rows of an open slide; the strips or tiles of the rows before are kept."""

    def __init__(self, slide: Slide, file: Any, page: Any) -> None:
        self._slide, self._file, self._page = slide, file, page
        self._decoded: dict[int, ndarray] = {}  # by the row of strips or tiles

    def __call__(self, first: int, end: int) -> Num[ndarray, "rows width channels"]:
        """Return the rows from ``first`` up to ``end``.

        Raises:
            InputError: a strip or tile of them is damaged, or the file has changed.
        """
        step = self._slide.segment_rows
        needed = range(first // step, -(-end // step))
        self._decoded = {row: pixels for row, pixels in self._decoded.items() if row in needed}
        for row in needed:
            if row not in self._decoded:
                self._decoded[row] = self._row_of_segments(row)
        _require_unchanged(self._slide, self._file)
        parts = [self._decoded[row][max(first - row * step, 0) : end - row * step] for row in needed]
        return np.concatenate(parts)

    def _row_of_segments(self, row: int) -> ndarray:
        slide, (rows, columns) = self._slide, self._page.chunks[:2]
        per_row = -(-slide.size[1] // columns)
        height = rows if self._page.is_tiled else min(rows, slide.size[0] - row * rows)
        pixels = np.empty((height, per_row * columns, slide.channels), slide.dtype)
        for column in range(per_row):
            values = decode_segment(slide.path, self._file, self._page, row * per_row + column, (height, columns))
            pixels[:, column * columns : (column + 1) * columns] = values
        return pixels[:, : slide.size[1]]


def find_slide(path: Path, mpp: float | None, network_mm: float | None) -> Slide | None:
    """Return a large 2-D image, or None where the file is small enough and neither tiled nor a pyramid.

    Of a pyramid, the coarsest copy is taken that is as fine as the network's pixels.

    Args:
        path: a TIFF file.
        mpp: microns per pixel at full resolution; None takes the file's own.
        network_mm: distance of the network's pixels; None: it takes images at any, and gets full resolution.

    Raises:
        InputError: it is damaged, too large, or stored in a way that cannot be read by rows; or the distance of its
            pixels is needed and unknown.
        MissingExtraError: tifffile is not installed.
    """
    with _opened(path) as file, convert_decoder_errors(path, Exception):
        levels = _levels(path, file)
        if levels is None:
            return None
        full = levels[0]
        spacing_mm = (mpp / 1000, mpp / 1000) if mpp is not None else _spacing_mm(file, full)
        if network_mm is not None and spacing_mm is None:
            raise InputError(
                f"{path} does not say how large its pixels are, and the network was trained at {network_mm * 1000:g} "
                "microns a pixel; give the microns of a pixel at full resolution, for example --mpp 0.25"
            )
        spacings = [_spacing_of(level, full, spacing_mm) for level in levels]
        index = 0
        if network_mm is not None:
            fine = [number for number, known in enumerate(spacings) if known and max(known) <= FITTING * network_mm]
            index = max(fine, default=0, key=lambda number: max(spacings[number] or (0.0,)))
        page = levels[index]
        _require_readable(path, page)
        values = decode_segment(path, file, page, 0, _segment_size(page, 0))
        return Slide(
            path=path,
            size=(page.imagelength, page.imagewidth),
            channels=values.shape[2],
            dtype=values.dtype,
            level=index,
            spacing_mm=spacings[index],
            segment_rows=page.chunks[0],
            state=_state(file),
        )


@contextmanager
def open_rows(slide: Slide) -> Generator[SlideRows, None, None]:
    """Yield the function that returns rows of a slide.

    Raises:
        InputError: the file has changed.
    """
    with _opened(slide.path) as file:
        _require_unchanged(slide, file)
        with convert_decoder_errors(slide.path, Exception):
            levels = _levels(slide.path, file)
        assert levels is not None
        yield SlideRows(slide, file, levels[slide.level])


def _state(file: Any) -> tuple[int, int, int]:
    """Return what differs once an open file has been written to, or another one has its name."""
    status = os.fstat(file.filehandle.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns


def _require_unchanged(slide: Slide, file: Any) -> None:
    """Refuse to go on with a file that is no longer the one that was judged.

    Raises:
        InputError: it is not.
    """
    if _state(file) != slide.state:
        raise InputError(f"{slide.path} has changed while it was read; run it again")


@contextmanager
def _opened(path: Path) -> Generator[Any, None, None]:
    tifffile = require("tifffile", "medical")
    directories = count_directories(path)
    with ExitStack() as stack:  # errors of what the caller does meanwhile are not errors of this file
        with convert_decoder_errors(path, Exception):
            file = stack.enter_context(tifffile.TiffFile(path, _multifile=False))
            if len(file.pages) != directories:
                raise InputError(f"{path} has {directories} pages, {len(file.pages)} of them readable; save it again")
            require_description(path, file)
        yield file


def _levels(path: Path, file: Any) -> list[Any] | None:
    """Return tifffile's pages of the image, full resolution first; None: it is to be read as a whole.

    Raises:
        InputError: it is large, and no single 2-D image with smaller copies of itself.
    """
    kept = [series for series in file.series if not series.keyframe.subfiletype & (REDUCED | MASK)]
    if not kept:
        return None
    largest = max(kept, key=lambda series: prod(series.shape))
    pages = [level.keyframe for level in largest.levels]
    full = pages[0]
    pixels = full.imagelength * full.imagewidth
    is_one = all(size == 1 for axis, size in zip(largest.axes, largest.shape, strict=True) if axis not in "YXS")
    others = [series for series in kept if series is not largest]  # of a pyramid, a thumbnail without pyramid is small
    is_alone = file.is_svs or not others or (len(pages) > 1 and all(_is_thumbnail(other, pixels) for other in others))
    if not (is_one and is_alone):
        if pixels <= MAX_PIXELS:
            return None
        raise InputError(f"{path} holds several large images; save the one that is wanted as a file of its own")
    if not full.is_tiled and len(pages) == 1 and pixels <= MAX_PIXELS:
        return None
    for number, page in enumerate(pages):
        _require_copy(path, full, page, number)
    return pages


def _is_thumbnail(series: Any, pixels: int) -> bool:
    return len(series.levels) == 1 and 4 * prod(series.shape) < pixels


def _require_copy(path: Path, full: Any, page: Any, number: int) -> None:
    """Refuse a level that is no smaller copy of the image.

    Raises:
        InputError: it has other values or another shape.
    """
    # Each side of a copy is rounded up or down to whole pixels, at each level anew.
    rows = [(page.imagelength + off) / full.imagelength for off in (-2, 2)]
    columns = [(page.imagewidth + off) / full.imagewidth for off in (-2, 2)]
    is_like = (page.dtype, page.samplesperpixel) == (full.dtype, full.samplesperpixel)
    is_larger = page.imagelength > full.imagelength or page.imagewidth > full.imagewidth
    if not is_like or is_larger or rows[0] > columns[1] or columns[0] > rows[1]:
        raise InputError(
            f"{path}: level {number} of its pyramid, {page.imagewidth} x {page.imagelength} pixels, is no smaller copy "
            f"of its image, {full.imagewidth} x {full.imagelength}; save it again as a plain TIFF"
        )


def _require_readable(path: Path, page: Any) -> None:
    """Refuse a page that cannot be read by rows.

    Raises:
        InputError: it is too large, stored in too large strips, rotated, or in other colours.
    """
    height, width = page.imagelength, page.imagewidth
    if not 0 < min(height, width) <= max(height, width) <= MAX_SIDE:
        raise InputError(
            f"{path} has {width} x {height} pixels; at most {MAX_SIDE} a side are possible: cut it into parts"
        )
    if prod(page.chunks) * page.dtype.itemsize > MAX_SEGMENT_BYTES:
        raise InputError(
            f"{path} is stored in pieces of {page.chunks[1]} x {page.chunks[0]} pixels, too large to be read by rows; "
            + TO_TILES
        )
    require_colours(path, page)
    is_interleaved = page.axes in ("YX", "YXS")
    is_colour = page.photometric in COLOURS and (page.photometric != YCBCR or page.compression == JPEG)
    if not is_interleaved or not is_colour or (page.compression == JPEG and page.samplesperpixel not in (1, 3)):
        raise InputError(f"{path} is not stored as grey or interleaved RGB, which is read by rows; {TO_TILES}")
    if page.tags.valueof(ORIENTATION, 1) != 1:
        raise InputError(f"{path} is to be rotated by its orientation tag, which large images cannot be; {TO_TILES}")
    if len(page.dataoffsets) != prod(page.chunked):
        raise InputError(f"{path} has {len(page.dataoffsets)} of {prod(page.chunked)} strips or tiles; save it again")


def _segment_size(page: Any, row: int) -> Size:
    rows, columns = page.chunks[:2]
    return rows if page.is_tiled else min(rows, page.imagelength - row * rows), columns


def _spacing_mm(file: Any, page: Any) -> tuple[float, float] | None:
    """Return the distance between rows and columns that the file names: Aperio's MPP, or TIFF's resolution."""
    if file.is_svs and (named := APERIO_MPP.search(page.description)):
        return _possible(float(named.group(1)), float(named.group(1)))
    unit_um = UNIT_UM.get(page.tags.valueof("ResolutionUnit", 2))
    densities = [_fraction(page.tags.valueof(name)) for name in ("YResolution", "XResolution")]
    if unit_um is None or not all(min(pair) > 0 for pair in densities):
        return None
    rows_um, columns_um = (unit_um * below / above for above, below in densities)
    return _possible(rows_um, columns_um)


def _possible(rows_um: float, columns_um: float) -> tuple[float, float] | None:
    """Return distances in mm; None where no scanner has such pixels."""
    is_possible = min(rows_um, columns_um) >= FINEST_UM and max(rows_um, columns_um) <= COARSEST_UM
    return (rows_um / 1000, columns_um / 1000) if is_possible else None


def _fraction(value: Any) -> tuple[int, int]:
    """Return numerator and denominator of a tag; zeros where it holds something else."""
    try:
        numerator, denominator = value
        return int(numerator), int(denominator)
    except (TypeError, ValueError):
        return 0, 0


def _spacing_of(level: Any, full: Any, spacing_mm: tuple[float, float] | None) -> tuple[float, float] | None:
    if spacing_mm is None:
        return None
    return spacing_mm[0] * full.imagelength / level.imagelength, spacing_mm[1] * full.imagewidth / level.imagewidth
