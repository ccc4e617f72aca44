"""PNG images keep their values, and damaged ones are refused; Pillow is the oracle."""

import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from stored_images import RNG, colours, opened, save, save_array

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import limits
from medseg_trt.imaging.images import read_image


def raw_png(width: int, height: int, bits: int, color_type: int, rows: bytes) -> bytes:
    """Return a PNG that Pillow itself would not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_grey_picture_keeps_its_values(tmp_path):
    values = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    image = read_image(save_array(values, tmp_path / "a.png"))
    np.testing.assert_array_equal(image.pixels, values[np.newaxis, :, :, np.newaxis])
    assert image.pixels.dtype == np.uint8
    assert (image.num_slices, image.size, image.spacing_mm, image.geometry) == (1, (6, 9), None, None)


def test_a_picture_of_one_bit_becomes_black_and_white(tmp_path):
    values = RNG.integers(0, 2, (6, 9)).astype(bool)
    pixels = read_image(save_array(values, tmp_path / "a.png")).pixels
    np.testing.assert_array_equal(pixels[0, ..., 0], np.where(values, 255, 0))


def test_a_coloured_picture_keeps_its_channels(tmp_path):
    picture = colours()
    pixels = read_image(save(picture, tmp_path / "a.png")).pixels
    np.testing.assert_array_equal(pixels[0], np.asarray(picture))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_is_dropped_and_not_blended(mode, tmp_path):
    opaque = colours().convert("L" if mode == "LA" else "RGB")
    picture = opaque.copy()
    picture.putalpha(PIL.Image.fromarray(RNG.integers(0, 256, (6, 9), dtype=np.uint8)))
    assert picture.mode == mode
    pixels = read_image(save(picture, tmp_path / "a.png")).pixels
    np.testing.assert_array_equal(pixels[0].squeeze(), np.asarray(opaque))


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\0\x80\xff"])  # of no entry, of one, of each
def test_a_palette_picture_becomes_rgb(transparency, tmp_path):
    indices = RNG.integers(0, 4, (6, 9), dtype=np.uint8)
    table = RNG.integers(0, 256, (4, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(indices)
    picture.putpalette(table.tobytes())
    picture.info = {} if transparency is None else {"transparency": transparency}
    picture.save(tmp_path / "a.png")
    assert ("transparency" in opened(tmp_path / "a.png").info) == (transparency is not None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels[0], table[indices])


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_kept_whole_and_transparency_is_dropped(color_type, channels, tmp_path):
    values = RNG.integers(0, 2**16, (2, 3, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    (tmp_path / "deep.png").write_bytes(raw_png(3, 2, 16, color_type, rows))
    pixels = read_image(tmp_path / "deep.png").pixels
    assert pixels.dtype == np.uint16
    np.testing.assert_array_equal(pixels[0], values[..., : channels - (channels in (2, 4))])


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**16 + 1, 2), (2**31 - 1, 2**31 - 1), (2**30, 1), (0, 5)])
def test_an_impossible_size_is_refused_before_anything_is_decoded(size, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    path = tmp_path / "bomb.png"
    path.write_bytes(raw_png(size[0], size[1], 8, 0, b"\0" * 100))
    with pytest.raises(InputError, match=r"bomb\.png (says it has .* pixels; 1 to|cannot be read)"):
        read_image(path)


def test_a_picture_with_one_pixel_too_many_is_refused(tmp_path, monkeypatch):
    path = save(colours(6, 9), tmp_path / "a.png")
    monkeypatch.setattr(limits, "MAX_PIXELS", 6 * 9)
    assert read_image(path).size == (6, 9)
    monkeypatch.setattr(limits, "MAX_PIXELS", 6 * 9 - 1)
    with pytest.raises(InputError, match="9 x 6 pixels; 1 to 53 are possible"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a picture\n" * 20, "cannot be read: its first bytes are not those of a PNG or JPEG or BMP file"),
        (b"", "cannot be read: it is empty"),
    ],
)
def test_what_is_no_png_inside_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"scan\.png {message}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_every_truncation_and_every_flipped_bit_of_the_pixels_is_noticed(tmp_path):
    path = save_array(RNG.integers(0, 256, (8, 7), dtype=np.uint8), tmp_path / "a.png")
    whole = path.read_bytes()
    for length in range(8, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.png is cut short"):
            read_image(path)
    start, stop = whole.index(b"IDAT"), whole.index(b"IEND") - 4
    for offset in range(start, stop):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            read_image(path)


def test_of_an_animation_the_first_frame_is_read_with_a_warning(tmp_path, caplog):
    frames = [PIL.Image.fromarray(RNG.integers(0, 256, (6, 9), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").pixels[0, ..., 0], np.asarray(frames[0]))
    assert "is an animation of 3 frames; only the first is used" in caplog.text
