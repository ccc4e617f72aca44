"""TIFF files made by hand, whose tags contradict each other or declare what no image holds."""

import os
import struct
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from slides import jpeg_tiles, texture, write_jpeg, write_slide

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import tiff_directories
from medseg_trt.imaging.formats.slide import find_slide, open_rows
from medseg_trt.imaging.images import read_image

SIZE, TILE = (70, 60), (64, 48)
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES = 256, 257, 258, 259, 262, 277
STRIP_OFFSETS, ROWS_PER_STRIP, STRIP_BYTES, TILE_WIDTH, TILE_HEIGHT = 273, 278, 279, 322, 323
TILE_OFFSETS, TILE_BYTES, SUB_DIRECTORIES, SAMPLE_FORMAT, PRIVATE = 324, 325, 330, 339, 65000
SHORT, LONG, LONG8 = 3, 4, 16
FORMS = {1: "B", SHORT: "H", LONG: "I", LONG8: "Q"}
DATA = 1 << 14  # where the pixels begin
Tags = Mapping[int, tuple[int, Sequence[int], int]]  # type, values, and the count that the tag declares


def tag(kind: int, *values: int, count: int | None = None) -> tuple[int, Sequence[int], int]:
    return kind, values, len(values) if count is None else count


def big_tiff(path: Path, pixels: np.ndarray, changes: Tags, num_bytes: int = 0) -> Path:
    """Write a tiled BigTIFF with changed tags; the file is sparse up to ``num_bytes``."""
    height, width, samples = pixels.shape
    padded = np.pad(pixels, [(0, -height % TILE[0]), (0, -width % TILE[1]), (0, 0)])
    corners = [(top, left) for top in range(0, height, TILE[0]) for left in range(0, width, TILE[1])]
    tiles = [padded[top : top + TILE[0], left : left + TILE[1]].tobytes() for top, left in corners]
    tags = {
        WIDTH: tag(LONG, width), HEIGHT: tag(LONG, height), BITS: tag(SHORT, *[8 * pixels.itemsize] * samples),
        COMPRESSION: tag(SHORT, 1), PHOTOMETRIC: tag(SHORT, 2 if samples == 3 else 1), SAMPLES: tag(SHORT, samples),
        TILE_WIDTH: tag(LONG, TILE[1]), TILE_HEIGHT: tag(LONG, TILE[0]),
        TILE_OFFSETS: tag(LONG8, *(DATA + number * len(tiles[0]) for number in range(len(tiles)))),
        TILE_BYTES: tag(LONG8, *map(len, tiles)),
        SAMPLE_FORMAT: tag(SHORT, *[{"u": 1, "f": 3}[pixels.dtype.kind]] * samples),
    } | dict(changes)  # fmt: skip
    entries, behind, start = b"", b"", 16 + 8 + 20 * len(tags) + 8
    for number, (kind, values, count) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{FORMS[kind]}", *values)
        if len(packed) > 8:
            behind, packed = behind + packed, struct.pack("<Q", start + len(behind))
        entries += struct.pack("<HHQ", number, kind, count) + packed.ljust(8, b"\0")
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags))
    path.write_bytes((head + entries + bytes(8) + behind).ljust(DATA, b"\0") + b"".join(tiles))
    if num_bytes:
        os.truncate(path, num_bytes)
    return path


def by_rows(path: Path) -> np.ndarray:
    slide = find_slide(path, None, None)
    assert slide is not None
    with open_rows(slide) as rows:
        return np.concatenate([rows(top, min(top + 16, slide.size[0])) for top in range(0, slide.size[0], 16)])


def refused(path: Path, message: str) -> None:
    for read in (by_rows, read_image):
        with pytest.raises(InputError, match=message) as raised:
            read(path)
        assert "\n" not in str(raised.value)


def test_the_hand_made_file_is_read(tmp_path):
    path = big_tiff(tmp_path / "a.tif", texture(SIZE), {})
    np.testing.assert_array_equal(by_rows(path), texture(SIZE))
    np.testing.assert_array_equal(read_image(path).pixels[0], texture(SIZE))


@pytest.mark.parametrize("dtype", ["u4", "f2", "f4", "f8"])
def test_colours_that_pillow_has_no_mode_for_are_those_of_the_whole_image(dtype, tmp_path):
    pixels = (texture(SIZE) * 3).astype(dtype)
    path = big_tiff(tmp_path / "a.tif", pixels, {})
    np.testing.assert_array_equal(by_rows(path), pixels)
    np.testing.assert_array_equal(read_image(path).pixels[0], pixels)


# Before the limit, each took 3 to 10 GiB: tifffile and Pillow read the values of a sparse file.
@pytest.mark.parametrize(
    "changes",
    [
        {TILE_OFFSETS: tag(LONG8, DATA, count=2**27), TILE_BYTES: tag(LONG8, DATA, count=2**27)},
        {PRIVATE: tag(1, *struct.pack("<Q", DATA), count=2**31)},
        {PRIVATE: tag(LONG8, DATA, count=2**28)},
    ],
    ids=["offsets", "bytes", "numbers"],
)
def test_tags_that_fill_the_memory_are_refused_before_they_are_read(changes, tmp_path):
    refused(
        big_tiff(tmp_path / "a.tif", texture(SIZE), changes, DATA + 2**31), "tags that would take more than 1024 MiB"
    )


def test_tags_below_a_directory_count_as_well(tmp_path, monkeypatch):
    below = {SUB_DIRECTORIES: tag(LONG8, 16)}  # the directory itself, once more
    path = big_tiff(tmp_path / "a.tif", texture(SIZE), below)
    np.testing.assert_array_equal(by_rows(path), texture(SIZE))
    monkeypatch.setattr(tiff_directories, "MAX_TAGS", 20)
    refused(path, "more than 20 tags")
    monkeypatch.setattr(tiff_directories, "MAX_TAGS", 2**20)
    monkeypatch.setattr(tiff_directories, "MAX_SLICES", 0)
    with pytest.raises(InputError, match="more than 0 pages"):
        find_slide(path, None, None)


def test_strips_and_tiles_of_one_page_are_refused(tmp_path):
    """Of such a page tifffile reads the tiles, and Pillow the strips, which may be others."""
    changes = {STRIP_OFFSETS: tag(LONG, DATA), STRIP_BYTES: tag(LONG, 70 * 60 * 3), ROWS_PER_STRIP: tag(LONG, 70)}
    refused(big_tiff(tmp_path / "a.tif", texture(SIZE), changes), "in strips and in tiles")


def test_a_second_grey_channel_without_a_meaning_is_refused(tmp_path):
    refused(big_tiff(tmp_path / "a.tif", texture(SIZE)[..., :2], {}), "2 channels")


def test_tiles_beyond_the_end_are_called_cut_short(tmp_path):
    refused(big_tiff(tmp_path / "a.tif", texture(SIZE), {TILE_OFFSETS: tag(LONG8, *[2**40] * 4)}), "cut short")


def jpeg(mode: str) -> bytes:
    file = BytesIO()
    PIL.Image.new(mode, (64, 64), 77).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(("mode", "channels", "photometric"), [("RGB", 1, 1), ("L", 3, 6), ("L", 3, 2), ("CMYK", 3, 2)])
def test_jpeg_tiles_of_other_colours_than_the_header_names_are_refused(mode, channels, photometric, tmp_path):
    shape = SIZE if channels == 1 else (*SIZE, channels)
    path = write_jpeg(tmp_path / "a.tif", iter([jpeg(mode)] * 2), shape, photometric)
    with pytest.raises(InputError, match=r"a\.tif"):
        find_slide(path, None, None)


def svs(path: Path, description: str, *levels: np.ndarray) -> Path:
    import tifffile

    with tifffile.TiffWriter(path) as file:
        for number, level in enumerate(levels):
            tile = None if number == 1 else TILE
            text = description if number == 0 else None
            file.write(level, photometric="rgb", metadata=None, description=text, tile=tile)
    return path


@pytest.mark.parametrize("mpp", ["5e-1", "1,25", "0.5.5", "9" * 400, "0.00000001", "500", "-0.5", "0"])
def test_invalid_aperio_mpp_is_ignored_and_mpp_is_requested(mpp, tmp_path):
    pixels = texture((300, 260))
    path = svs(tmp_path / "a.svs", f"Aperio |MPP = {mpp}", pixels, pixels[::8, ::8].copy(), pixels[::2, ::2].copy())
    with pytest.raises(InputError, match="give the microns of a pixel"):
        find_slide(path, None, 0.001)
    assert find_slide(path, 0.5, 0.001) is not None


def test_a_level_that_is_larger_than_its_image_is_refused(tmp_path):
    pixels = texture((300, 260))
    path = svs(tmp_path / "a.svs", "Aperio |MPP = 0.5", pixels[::2, ::2].copy(), pixels[::8, ::8].copy(), pixels)
    with pytest.raises(InputError, match="no smaller copy"):
        find_slide(path, None, None)


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_slide_that_is_written_to_while_it_is_read_is_refused(when, tmp_path):
    path = write_slide(tmp_path / "a.tif", texture((300, 260)), levels=1)
    slide = find_slide(path, None, None)
    assert slide is not None

    def write() -> None:
        with path.open("r+b") as file:
            file.seek(-1000, 2)
            file.write(bytes(100))

    def read() -> None:
        with open_rows(slide) as rows:
            rows(0, 16)
            write()
            rows(16, 300)

    if when == "before":
        write()
    with pytest.raises(InputError, match="has changed while it was read"):
        read()


def test_jpeg_tiles_are_still_read(tmp_path):
    path = write_jpeg(tmp_path / "a.tif", jpeg_tiles(texture(SIZE), (64, 64)), (*SIZE, 3), 6)
    assert by_rows(path).shape == (*SIZE, 3)
