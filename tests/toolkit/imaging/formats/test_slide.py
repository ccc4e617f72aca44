"""Slides are read by rows: the same values as the whole image, whatever their tiles are."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile
from slides import SUBSAMPLED, YCBCR, jpeg_tiles, mark_compression, texture, write_jpeg, write_slide, write_svs

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import slide as slide_module
from medseg_trt.imaging.formats.slide import Slide, find_slide, open_rows
from medseg_trt.imaging.images import read_image

SIZE = (150, 130)


def found(path: Path, mpp: float | None = None, network_mm: float | None = None) -> Slide:
    slide = find_slide(path, mpp, network_mm)
    assert slide is not None
    return slide


def pixels_by_rows(path: Path, step: int = 37, **how: Any) -> np.ndarray:
    """Read a slide in bands that fit no tile, each beginning inside of the one before."""
    slide = found(path, **how)
    with open_rows(slide) as rows:
        bands = [rows(first, min(first + step + 20, slide.size[0])) for first in range(0, slide.size[0], step)]
    assert all(band.dtype == slide.dtype and band.shape[1:] == (slide.size[1], slide.channels) for band in bands)
    return np.concatenate([band[:step] for band in bands])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"bigtiff": True},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": True},
        {"compression": "lzma"},
        {"tile": (16, 256)},
    ],
)
def test_rows_are_those_of_the_image(channels, how, tmp_path):
    pixels = texture(SIZE, channels=channels)
    np.testing.assert_array_equal(pixels_by_rows(write_slide(tmp_path / "a.tif", pixels, **how)), pixels)


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_other_widths_and_byte_orders_are_kept(dtype, order, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 30000, (*SIZE, 1)).astype(dtype)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels[..., 0], tile=(32, 48), byteorder=order, photometric="minisblack", compression="zlib")
    read = pixels_by_rows(path)
    np.testing.assert_array_equal(read, pixels)
    assert read.dtype.isnative


def test_sixteen_bit_colours_lose_their_transparency_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2**16, (*SIZE, 4)).astype(np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, tile=(32, 48), photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(pixels_by_rows(path), pixels[..., :3])


@pytest.mark.parametrize("photometric", ["miniswhite", "palette"])
def test_other_colours_are_those_of_the_whole_image(photometric, tmp_path):
    indices = texture(SIZE, channels=1)[..., 0]
    path = tmp_path / "a.tif"
    colormap = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tifffile.imwrite(
        path, indices, tile=(32, 48), photometric=photometric, colormap=colormap if photometric == "palette" else None
    )
    np.testing.assert_array_equal(pixels_by_rows(path), read_image(path).pixels[0])


@pytest.mark.parametrize(
    ("photometric", "how", "tags"),
    [
        (YCBCR, {"subsampling": 2}, (SUBSAMPLED,)),
        (YCBCR, {"subsampling": 0}, ((530, 3, 2, (1, 1), True),)),
        (1, {"subsampling": 0}, ()),
        (0, {"subsampling": 0}, ()),
    ],
)
def test_jpeg_tiles_are_those_of_libtiff(photometric, how, tags, tmp_path):
    pixels, is_grey = texture(SIZE), photometric != YCBCR
    tiles = jpeg_tiles(pixels, (64, 64), **how)
    shape = SIZE if is_grey else pixels.shape
    path = tmp_path / "a.tif"
    write_jpeg(path, map(grey_jpeg, tiles) if is_grey else tiles, shape, photometric, tags=tags)
    read = pixels_by_rows(path)
    with PIL.Image.open(path) as image:  # libtiff
        expected = np.array(image.convert("L" if is_grey else "RGB")).reshape(*SIZE, -1)
    np.testing.assert_array_equal(read, expected)
    if not is_grey:
        assert np.abs(read.astype(int) - pixels).mean() < 6  # JPEG of quality 90; other colours would differ by 50


def grey_jpeg(content: bytes) -> bytes:
    from io import BytesIO

    file = BytesIO()
    PIL.Image.open(BytesIO(content)).convert("L").save(file, "JPEG", quality=90)
    return file.getvalue()


def test_jpeg_tiles_of_aperio_have_tables_of_their_own_and_rgb_without_conversion(tmp_path):
    """Tables lie in a tag, and photometric RGB means that the three components are red, green and blue."""
    pixels = texture(SIZE)
    streams = list(jpeg_tiles(pixels, (64, 64), keep_rgb=True, subsampling=0))
    tables, tiles = b"\xff\xd8", []
    for number, content in enumerate(streams):
        kept, position = b"\xff\xd8", 2
        while content[position + 1] != 0xDA:
            length = 2 + struct.unpack_from(">H", content, position + 2)[0]
            if content[position + 1] in (0xDB, 0xC4):
                tables += content[position : position + length] if number == 0 else b""
            elif content[position + 1] == 0xC0:
                kept += content[position : position + length]
            position += length
        tiles.append(kept + content[position:])
    tables += b"\xff\xd9"
    path = tmp_path / "a.tif"
    write_jpeg(path, iter(tiles), pixels.shape, 2, tags=((347, 7, len(tables), tables, True),))
    read = pixels_by_rows(path)
    with PIL.Image.open(path) as image:
        np.testing.assert_array_equal(read, np.array(image))
    assert np.abs(read.astype(int) - pixels).mean() < 6


def test_of_a_pyramid_full_resolution_is_read_or_the_level_that_fits_the_network(tmp_path):
    pixels = texture((300, 260))
    path = write_slide(tmp_path / "a.tif", pixels, mpp=0.25)
    for network_um, level in [(None, 0), (0.25, 0), (0.3, 0), (0.49, 1), (0.5, 1), (0.9, 1), (1.0, 2), (8.0, 2)]:
        slide = found(path, network_mm=None if network_um is None else network_um / 1000)
        assert slide.level == level
        assert slide.size == tuple(-(-size // 2**level) for size in (300, 260))
        assert slide.spacing_mm == pytest.approx((0.25e-3 * 2**level,) * 2, rel=1e-6)
        read = pixels_by_rows(path, network_mm=None if network_um is None else network_um / 1000)
        np.testing.assert_array_equal(read, pixels[:: 2**level, :: 2**level])


def test_sub_directories_are_levels(tmp_path):
    pixels, path = texture((200, 180)), tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(pixels, tile=(64, 64), photometric="rgb", subifds=1)
        file.write(pixels[::2, ::2], tile=(64, 64), photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(pixels_by_rows(path), pixels)
    slide = found(path, mpp=1.0, network_mm=2e-3)
    assert (slide.level, slide.size) == (1, (100, 90))


def test_an_svs_file_is_its_full_image_not_its_thumbnail_or_label(tmp_path):
    pixels = texture((300, 260))
    path = write_svs(tmp_path / "a.svs", pixels)
    slide = found(path)
    assert (slide.size, slide.level, slide.spacing_mm) == ((300, 260), 0, (0.5e-3, 0.5e-3))
    assert np.abs(pixels_by_rows(path).astype(int) - pixels).mean() < 6
    assert found(path, network_mm=1e-3).size == (150, 130)
    assert found(path, mpp=1.0, network_mm=1e-3).size == (300, 260)  # what is typed counts more


@pytest.mark.parametrize(
    ("resolution", "unit", "spacing_mm"),
    [
        ((40000, 20000), "CENTIMETER", (0.5e-3, 0.25e-3)),
        ((50800, 50800), "INCH", (0.5e-3, 0.5e-3)),
        ((72, 72), "INCH", None),  # a screen's
        ((1200, 1200), "INCH", None),  # a printer's
        ((4, 4), "NONE", None),
    ],
)
def test_resolution_tags_of_scanners_are_believed(resolution, unit, spacing_mm, tmp_path):
    path = write_slide(tmp_path / "a.tif", texture(SIZE), levels=1, resolution=resolution, resolutionunit=unit)
    assert found(path).spacing_mm == (None if spacing_mm is None else pytest.approx(spacing_mm))


def test_slide_without_spacing_asks_for_mpp_if_the_network_needs_it(tmp_path):
    path = write_slide(tmp_path / "a.tif", texture(SIZE))
    with pytest.raises(InputError, match=r"a\.tif does not say .* trained at 2 microns a pixel; .* --mpp 0\.25"):
        find_slide(path, None, 2e-3)
    assert found(path, mpp=1.0, network_mm=2e-3).level == 1


def test_small_images_without_tiles_are_read_as_a_whole(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", texture(SIZE), photometric="rgb")
    assert find_slide(tmp_path / "a.tif", None, None) is None
    stack = np.stack([texture(SIZE, channels=1)[..., 0]] * 3)
    tifffile.imwrite(tmp_path / "b.tif", stack, tile=(32, 48), photometric="minisblack")
    assert find_slide(tmp_path / "b.tif", None, None) is None


def test_large_images_in_strips_are_read_by_rows_and_refused_where_a_strip_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    pixels = texture(SIZE)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", rowsperstrip=16, compression="zlib")
    np.testing.assert_array_equal(pixels_by_rows(tmp_path / "a.tif"), pixels)
    monkeypatch.setattr(slide_module, "MAX_SEGMENT_BYTES", SIZE[0] * SIZE[1])
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="rgb", rowsperstrip=SIZE[0])
    with pytest.raises(InputError, match=r"pieces of 130 x 150 pixels, too large .* vips tiffsave .* --tile"):
        find_slide(tmp_path / "b.tif", None, None)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate"])
def test_strips_of_libtiff_are_read_by_rows(compression, tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    pixels = texture(SIZE)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.tif", compression=compression, tiffinfo={278: 16})
    np.testing.assert_array_equal(pixels_by_rows(tmp_path / "a.tif"), pixels)


def test_a_huge_file_in_one_strip_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as file:  # 40,000 x 40,000 pixels, of which nothing is stored
        file.write(None, shape=(40000, 40000), dtype=np.uint8, photometric="minisblack", rowsperstrip=40000)
    with pytest.raises(InputError, match="40000 x 40000 pixels, too large to be read by rows"):
        find_slide(path, None, None)
    with pytest.raises(InputError, match="give --tile auto"):
        read_image(path)


def damaged(path: Path, fault: str) -> Path:
    """Damage the second row of tiles of a slide with deflated tiles."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, count = page.dataoffsets[4], page.databytecounts[4]
        counts = page.tags["TileByteCounts"]
        where = counts.valueoffset + 4 * struct.Struct("<" + {3: "H", 4: "I"}[int(counts.dtype)]).size
        form = {3: "<H", 4: "<I"}[int(counts.dtype)]
    content = bytearray(path.read_bytes())
    bomb = zlib.compress(bytes(10**6))[:count]
    match fault:
        case "changed":
            content[offset + count // 2 : offset + count // 2 + 8] = b"\xff" * 8
        case "bomb":
            content[offset : offset + len(bomb)] = bomb
        case "missing":
            struct.pack_into(form, content, where, 0)
        case "too long":
            struct.pack_into(form, content, where, 2 ** (8 * struct.calcsize(form)) - 1)
        case "cut short":
            content = content[: offset + count // 2]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("fault", ["changed", "bomb", "missing", "too long", "cut short"])
def test_a_damaged_tile_is_refused_in_one_line(fault, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    path = damaged(write_slide(tmp_path / "a.tif", noise, levels=1, compression="zlib"), fault)
    with pytest.raises(InputError, match=r"a\.tif") as raised:
        pixels_by_rows(path)
    assert "\n" not in str(raised.value)


def test_a_jpeg_tile_that_is_cut_short_is_refused_not_filled_with_grey(tmp_path):
    tiles = list(jpeg_tiles(texture(SIZE), (64, 64)))
    tiles[-1] = tiles[-1][: len(tiles[-1]) // 2]
    path = write_jpeg(tmp_path / "a.tif", iter(tiles), (*SIZE, 3), YCBCR, tags=(SUBSAMPLED,))
    with pytest.raises(InputError, match=r"cannot be read|cut short"):
        pixels_by_rows(path)


@pytest.mark.parametrize("compression", [33005, 34712])
def test_a_codec_that_is_not_installed_is_named_with_its_package(compression, tmp_path):
    path = write_jpeg(tmp_path / "a.tif", iter([b"\xff\x4f\xff\x51" + bytes(100)] * 9), (*SIZE, 3), 2)
    mark_compression(path, compression)  # of tiles of JPEG 2000
    with pytest.raises(InputError, match="pip install imagecodecs") as raised:
        find_slide(path, None, None)
    assert "\n" not in str(raised.value)


def test_levels_that_are_no_smaller_copies_are_refused(tmp_path):
    pixels, path = texture((300, 260)), tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(64, 48), photometric="rgb", subifds=1, metadata=None)
        file.write(pixels[::2, ::3], tile=(64, 48), photometric="rgb", subfiletype=1, metadata=None)
    with tifffile.TiffFile(path) as file:
        levels = len(file.series[0].levels)
    if levels == 1:  # tifffile takes it for another image: it is no level, and nothing reads it
        np.testing.assert_array_equal(pixels_by_rows(path), pixels)
    svs = tmp_path / "b.svs"
    with tifffile.TiffWriter(svs) as file:
        file.write(pixels, tile=(64, 48), photometric="rgb", description="Aperio |MPP = 0.5", metadata=None)
        file.write(pixels[::8, ::8], photometric="rgb", metadata=None)
        file.write(pixels[::2, ::3], tile=(64, 48), photometric="rgb", metadata=None)
    with pytest.raises(InputError, match="level 1 of its pyramid, 87 x 150 pixels, is no smaller copy"):
        find_slide(svs, None, None)


def test_two_slides_in_one_file_are_refused_where_they_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_module, "MAX_PIXELS", 100)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for size in (SIZE, (149, 130)):
            file.write(texture(size), tile=(64, 48), photometric="rgb", metadata=None)
    with pytest.raises(InputError, match="holds several large images"):
        find_slide(tmp_path / "a.tif", None, None)
