"""Generated slides: tiled and pyramidal TIFF files, as tifffile writes them, and JPEG tiles as scanners write them."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tifffile

TILE = (64, 48)
JPEG, YCBCR = 7, 6  # TIFF's compression and photometric interpretation
SUBSAMPLED = (530, 3, 2, (2, 2), True)  # the tag of YCbCr with colours of half resolution


def texture(size: tuple[int, int], seed: int = 0, channels: int = 3) -> np.ndarray:
    """Return smooth generated noise (height, width, channels) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 10 + 2, size[1] // 10 + 2, 3)).astype(np.uint8)
    pixels = np.asarray(PIL.Image.fromarray(coarse).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC))
    return pixels[..., :channels]


def write_slide(path: Path, pixels: np.ndarray, levels: int = 3, mpp: float | None = None, **how: Any) -> Path:
    """Write a pyramid in which every level has every second row and column; ``mpp`` is that of full resolution."""
    options: dict[str, Any] = {"tile": TILE, "photometric": "rgb" if pixels.shape[-1] == 3 else "minisblack"} | how
    values = pixels if pixels.shape[-1] == 3 else pixels[..., 0]
    with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
        for level in range(levels):
            if mpp is not None:
                density = 1e4 / (mpp * 2**level)
                options |= {"resolution": (density, density), "resolutionunit": "CENTIMETER"}
            file.write(values[:: 2**level, :: 2**level], subfiletype=int(level > 0), metadata=None, **options)
    return path


def jpeg_tiles(pixels: np.ndarray, tile: tuple[int, int], quality: int = 90, **how: Any) -> Iterator[bytes]:
    """Yield the tiles of an image as JPEG, the last ones padded."""
    rows, columns = (-(-size // side) * side for size, side in zip(pixels.shape, tile, strict=False))
    padded = np.pad(pixels, [(0, rows - pixels.shape[0]), (0, columns - pixels.shape[1]), (0, 0)], mode="edge")
    for top in range(0, rows, tile[0]):
        for left in range(0, columns, tile[1]):
            file = BytesIO()
            part = np.ascontiguousarray(padded[top : top + tile[0], left : left + tile[1]])
            PIL.Image.fromarray(part).save(file, "JPEG", quality=quality, **how)
            yield file.getvalue()


def write_encoded(
    file: tifffile.TiffWriter, tiles: Iterator[bytes], shape: tuple[int, ...], tile: tuple[int, int], **how: Any
) -> None:
    """Write tiles that are compressed already; ``mark_compression`` then names how, which tifffile would check."""
    file.write(tiles, shape=shape, dtype=np.uint8, tile=tile, compression="zlib", metadata=None, **how)


def mark_compression(path: Path, compression: int, photometric: int | None = None) -> Path:
    """Name the compression, and the colours, of all tiled pages of a file."""
    with tifffile.TiffFile(path, mode="r+") as file:
        for page in [page for page in file.pages if isinstance(page, tifffile.TiffPage) and page.is_tiled]:
            page.tags["Compression"].overwrite(compression)
            if photometric is not None:
                page.tags["PhotometricInterpretation"].overwrite(photometric)
    return path


def write_jpeg(
    path: Path, tiles: Iterator[bytes], shape: tuple[int, ...], photometric: int, tile: tuple[int, int] = (64, 64),
    tags: tuple[Any, ...] = (),
) -> Path:  # fmt: skip
    """Write an image of JPEG tiles; ``photometric`` is 1 for grey, 2 for RGB, 6 for YCbCr."""
    with tifffile.TiffWriter(path) as file:
        colours = "rgb" if len(shape) == 3 else "minisblack"
        write_encoded(file, tiles, shape, tile, photometric=colours, extratags=tags)
    return mark_compression(path, JPEG, photometric)


def write_svs(path: Path, pixels: np.ndarray, mpp: float = 0.5) -> Path:
    """Write Aperio's layout: JPEG tiles, a thumbnail in strips, a smaller level, and a label."""
    description = f"Aperio Image Library v11\r\n{pixels.shape[1]}x{pixels.shape[0]} |AppMag = 20|MPP = {mpp}"
    tile = (64, 64)
    with tifffile.TiffWriter(path) as file:
        tiles = jpeg_tiles(pixels, tile)
        write_encoded(file, tiles, pixels.shape, tile, photometric="rgb", description=description)
        file.write(np.ascontiguousarray(pixels[::8, ::8]), photometric="rgb", metadata=None)
        half = np.ascontiguousarray(pixels[::2, ::2])
        write_encoded(file, jpeg_tiles(half, tile), half.shape, tile, photometric="rgb")
        file.write(np.full((20, 30, 3), 200, np.uint8), photometric="rgb", subfiletype=1, metadata=None)
    return mark_compression(path, JPEG, YCBCR)
