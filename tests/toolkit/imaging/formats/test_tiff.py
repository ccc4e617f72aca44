"""TIFF pictures and stacks, written with tifffile and with Pillow, and read whatever decodes them."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile
from tiny import TWO_ORGANS

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import tiff_directories
from medseg_trt.imaging.images import Mask, read_image, read_labels, write_mask

RNG = np.random.default_rng(0)
SIZE = (32, 48)


def grey(dtype: str) -> np.ndarray:
    if dtype[0] == "f":
        return RNG.normal(0, 100, SIZE).astype(dtype)
    limits = np.iinfo(dtype)
    return RNG.integers(limits.min, limits.max, SIZE, dtype=dtype)


def save(path: Path, values: np.ndarray, **how: Any) -> Path:
    options: dict[str, Any] = {"photometric": "minisblack"}
    tifffile.imwrite(path, values, **(options | how))
    return path


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"tile": (16, 16)},
        {"compression": "zlib"},
        {"compression": "zlib", "byteorder": ">"},
    ],
)
def test_grey_numbers_of_every_width_are_kept(dtype, how, tmp_path):
    values = grey(dtype)
    pixels = read_image(save(tmp_path / "a.tif", values, **how)).pixels[0, ..., 0]
    np.testing.assert_array_equal(pixels, values.astype(np.float32) if dtype[0] == "f" else values)
    assert pixels.dtype.isnative


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colours_of_8_and_16_bits_are_kept_whole(dtype, planar, tmp_path):
    values = RNG.integers(0, np.iinfo(dtype).max, (*SIZE, 3), dtype=dtype)
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    path = save(tmp_path / "a.tiff", stored, photometric="rgb", planarconfig=planar)
    np.testing.assert_array_equal(read_image(path).pixels[0], values)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "group4"])
def test_usual_compressions_are_read(compression, tmp_path):
    values = RNG.integers(0, 2, SIZE).astype(bool) if compression == "group4" else grey("u1")
    PIL.Image.fromarray(values).save(tmp_path / "a.tif", compression=compression)
    expected = np.where(values, 255, 0) if compression == "group4" else values
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels[0, ..., 0], expected)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_miniswhite_tiff_is_inverted(dtype, tmp_path):
    values = grey(dtype)
    decoded = read_image(save(tmp_path / "a.tif", values, photometric="miniswhite")).pixels[0, ..., 0]
    np.testing.assert_array_equal(decoded, np.iinfo(dtype).max - values)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f8"])
def test_equal_pages_are_slices_and_the_mask_has_as_many_pages(dtype, tmp_path):
    stack = np.stack([grey(dtype) for _ in range(5)])
    image = read_image(save(tmp_path / "a.tif", stack))
    np.testing.assert_array_equal(image.pixels[..., 0], stack.astype(image.pixels.dtype))
    labels = RNG.integers(0, 3, (5, *SIZE), dtype=np.uint8)
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert path.name == "a.tif"
    np.testing.assert_array_equal(tifffile.imread(path), labels)
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)
    with PIL.Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.array(TWO_ORGANS.colors)[labels[0]])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["u1", "u4"])  # by Pillow; by tifffile
def test_tiff_orientation_is_applied_to_the_image_and_undone_in_the_mask(orientation, dtype, tmp_path):
    values = grey(dtype)
    path = save(tmp_path / "a.tif", values, extratags=[(274, 3, 1, orientation, True)])
    picture = PIL.Image.fromarray((values % 251).astype(np.uint8))
    picture.getexif()[274] = orientation
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels[0, ..., 0] % 251, np.asarray(PIL.ImageOps.exif_transpose(picture)))
    labels = (image.pixels[..., 0] % 3).astype(np.uint8)
    mask = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    with PIL.Image.open(mask) as written:
        np.testing.assert_array_equal(np.asarray(written), values % 3)
    np.testing.assert_array_equal(read_labels(mask, image, 3), labels)


def test_single_page_mask_of_a_tiff_stack_is_refused(tmp_path):
    image = read_image(save(tmp_path / "a.tif", np.stack([grey("u1")] * 3)))
    mask = save(tmp_path / "mask.tif", np.zeros(SIZE, np.uint8))
    with pytest.raises(InputError, match=r"mask\.tif is 48 x 32 pixels, 1 page\(s\), but its image .* 3 page\(s\)"):
        read_labels(mask, image, 2)


@pytest.mark.parametrize("others", [np.zeros((9, 9), np.uint8), np.zeros(SIZE, np.uint16)])
def test_pages_that_differ_are_refused(others, tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for values in (grey("u1"), others):
            file.write(values, photometric="minisblack")
    with pytest.raises(InputError, match="page 2 is not like page 1"):
        read_image(tmp_path / "a.tif")


def endless(path: Path, pages: int) -> Path:
    """Write a TIFF of pages of one pixel that share it."""
    entries = [(256, 3, 1), (257, 3, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 3, 1), (279, 4, 1)]
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    size = 2 + len(packed) + 4
    starts = [16 + index * size for index in range(pages)]
    content = struct.pack("<2sHI8x", b"II", 42, starts[0])
    for following in [*starts[1:], 0]:
        content += struct.pack("<H", len(entries)) + packed + struct.pack("<I", following)
    path.write_bytes(content)
    return path


def test_tiff_with_too_many_pages_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_directories, "MAX_SLICES", 50)
    assert read_image(endless(tmp_path / "a.tif", 50)).num_slices == 50
    with pytest.raises(InputError, match=r"a\.tif has more than 50 pages"):
        read_image(endless(tmp_path / "a.tif", 51))


def test_a_size_that_cannot_be_is_refused_before_anything_is_decoded(tmp_path):
    path = endless(tmp_path / "a.tif", 1)
    content = bytearray(path.read_bytes())
    for entry in range(2):
        struct.pack_into("<HII", content, 16 + 2 + entry * 12 + 2, 4, 1, 60_000)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.tif"):
        read_image(path)


def test_every_truncation_ends_in_one_line(tmp_path):
    whole = save(tmp_path / "a.tif", grey("u4")).read_bytes()
    path = tmp_path / "cut.tif"
    for length in range(0, len(whole), 211):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.tif") as caught:
            read_image(path)
        assert "\n" not in str(caught.value)


def test_nan_is_refused_with_its_count(tmp_path):
    values = grey("f4")
    values[3, 3] = np.nan
    with pytest.raises(InputError, match=r"a\.tif holds 1 NaN"):
        read_image(save(tmp_path / "a.tif", values))
