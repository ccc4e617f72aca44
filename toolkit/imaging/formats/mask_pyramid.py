"""Write a mask by its rows as a tiled, pyramidal TIFF: every smaller copy has every second row and column.

Full resolution goes to the file while the rows come; the smaller copies go to a temporary file until their turn. The
directories are a chain, as OpenSlide, QuPath and libvips expect of a pyramid.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from medseg_trt.errors import MedsegError, require
from medseg_trt.files import atomic_file
from medseg_trt.imaging.label_values import pixels_per_label
from medseg_trt.imaging.preprocess import Size
from medseg_trt.spec import Classes

TILE = 512  # pixels; a copy of one tile is the last
REDUCED = 1  # NewSubfileType of a smaller copy
CLASSIC_BYTES = 2**32 - 2**25  # of a TIFF with offsets of 32 bits; the rest is for directories
UM_PER_CM = 10_000


class _Level:
    """One copy of the mask: compresses its tiles, and passes every second row and column to the next copy."""

    def __init__(self, size: Size, spool: IO[bytes]) -> None:
        height, width = size
        self.size, self.digest = size, hashlib.sha256()
        self._spool, self._stored = spool, list[tuple[int, int]]()  # where the tiles of a smaller copy are
        self._rows = np.zeros((TILE, -(-width // TILE) * TILE), np.uint8)
        self._filled = 0
        is_last = max(size) <= TILE
        self.next = None if is_last else _Level((-(-height // 2), -(-width // 2)), spool)

    def tiles_of(self, band: ndarray) -> Iterator[bytes]:
        """Add rows, and yield the compressed tiles that they complete."""
        while len(band):
            taken = band[: TILE - self._filled]
            self._rows[self._filled : self._filled + len(taken), : self.size[1]] = taken
            self._filled += len(taken)
            band = band[len(taken) :]
            if self._filled == TILE:
                yield from self._row_of_tiles()

    def last_tiles(self) -> Iterator[bytes]:
        """Yield the tiles of the last rows, and complete the smaller copies."""
        if self._filled:
            self._rows[self._filled :] = 0
            yield from self._row_of_tiles()
        if self.next is not None:
            self.next.store(self.next.last_tiles())

    def store(self, tiles: Iterable[bytes]) -> None:
        """Keep tiles in the temporary file."""
        for tile in tiles:
            self._stored.append((self._spool.tell(), len(tile)))
            self._spool.write(tile)

    def stored_tiles(self) -> Iterator[bytes]:
        """Yield the tiles that ``store`` kept."""
        for offset, count in self._stored:
            self._spool.seek(offset)
            yield self._spool.read(count)

    def _row_of_tiles(self) -> Iterator[bytes]:
        if self.next is not None:
            self.next.store(self.next.tiles_of(self._rows[: self._filled : 2, : self.size[1] : 2]))
        self._filled = 0
        for left in range(0, self._rows.shape[1], TILE):
            tile = self._rows[:, left : left + TILE].tobytes()
            self.digest.update(tile)
            yield zlib.compress(tile)


def write_pyramid(
    path: Path,
    bands: Iterable[UInt8[ndarray, "rows width"]],
    size: Size,
    classes: Classes,
    spacing_mm: tuple[float, float] | None = None,
) -> tuple[int, ...]:
    """Write a mask whose rows come in bands, atomically; return the pixels of every class.

    Args:
        path: the file to write.
        bands: consecutive rows of labels, from the first to the last.
        size: height and width of the mask.
        classes: their number and colours.
        spacing_mm: between rows and between columns, where known.

    Raises:
        MedsegError: the file read back differs from the rows; nothing is written.
    """
    tifffile = require("tifffile", "medical")
    counts = np.zeros(len(classes.names), np.int64)
    with atomic_file(path) as temporary, TemporaryFile(dir=path.parent) as spool:
        full = _Level(size, spool)

        def tiles() -> Iterator[bytes]:
            nonlocal counts
            for band in bands:
                counts += pixels_per_label(band, len(counts))
                yield from full.tiles_of(band)
            yield from full.last_tiles()

        is_big = size[0] * size[1] * 4 / 3 > CLASSIC_BYTES
        levels = [full]
        with tifffile.TiffWriter(temporary, bigtiff=is_big) as file:
            encoded = chain(tiles())  # tifffile closes a generator after its last tile
            file.write(encoded, **_options(full, full, classes, spacing_mm))
            is_whole = not list(encoded)  # also completes the smaller copies
            while (level := levels[-1].next) is not None:
                file.write(level.stored_tiles(), **_options(level, full, classes, spacing_mm), subfiletype=REDUCED)
                levels.append(level)
        if not is_whole or counts.sum() != size[0] * size[1] or not _is_as_written(tifffile, temporary, levels):
            raise MedsegError(f"the mask {path.name} differs when read back; nothing was written")
    return tuple(counts.tolist())


def _options(
    level: _Level, full: _Level, classes: Classes, spacing_mm: tuple[float, float] | None
) -> Mapping[str, Any]:
    """Return the arguments of tifffile for a level."""
    colours = np.zeros((3, 256), np.uint16)
    colours[:, : len(classes.colors)] = np.array(classes.colors, np.uint16).T * 257
    options: dict[str, Any] = {
        "shape": level.size,
        "dtype": np.uint8,
        "tile": (TILE, TILE),
        "compression": "zlib",
        "photometric": "palette",
        "colormap": colours,
        "metadata": None,
        "software": "medseg-trt",
    }
    if spacing_mm is not None:
        rows, columns = (
            size / whole / (distance_mm * 1000) * UM_PER_CM
            for size, whole, distance_mm in zip(level.size, full.size, spacing_mm, strict=True)
        )
        options |= {"resolution": (columns, rows), "resolutionunit": "CENTIMETER"}
    return options


def _is_as_written(tifffile: Any, path: Path, levels: list[_Level]) -> bool:
    """Read all tiles back and compare them with what was written."""
    with tifffile.TiffFile(path) as file:
        if [page.shape for page in file.pages] != [level.size for level in levels]:
            return False
        for page, level in zip(file.pages, levels, strict=True):
            digest = hashlib.sha256()
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                file.filehandle.seek(offset)
                digest.update(zlib.decompress(file.filehandle.read(count)))
            if digest.digest() != level.digest.digest():
                return False
    return True
