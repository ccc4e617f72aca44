"""What a TIFF file holds is read whole or refused: stacks in one directory, volumetric files, pyramids, channels."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tifffile
from tiny import TWO_ORGANS

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import tiff_layout
from medseg_trt.imaging.images import Mask, read_image, read_labels, write_mask

STACK = np.random.default_rng(0).integers(0, 255, (12, 48, 32), dtype=np.uint8)
IMAGEJ_STACK = {"imagej": True, "metadata": {"axes": "ZYX"}, "truncate": True}


def save(path: Path, values: np.ndarray = STACK, **how: Any) -> Path:
    options: dict[str, Any] = {"photometric": "minisblack"}
    tifffile.imwrite(path, values, **(options | how))
    return path


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
@pytest.mark.parametrize(
    "how",
    [
        {"imagej": True, "metadata": {"axes": "ZYX"}, "truncate": True},
        {"imagej": True, "metadata": {"axes": "TYX"}, "truncate": True},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"imagej": True},  # tifffile calls the slices channels
        {"metadata": {"axes": "ZYX"}, "truncate": True},
        {"volumetric": True, "tile": (4, 32, 32)},
        {"volumetric": True, "tile": (16, 32, 32), "compression": "zlib"},
        {"ome": True, "metadata": {"axes": "ZYX"}},
        {"metadata": None},
    ],
)
def test_every_way_to_store_a_stack_gives_all_slices(how, dtype, tmp_path):
    path = save(tmp_path / "a.tif", STACK.astype(dtype), **how)
    image = read_image(path)
    np.testing.assert_array_equal(tifffile.imread(path), STACK)
    np.testing.assert_array_equal(image.pixels[..., 0], STACK)
    labels = (STACK % 3).astype(np.uint8)
    mask = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    np.testing.assert_array_equal(tifffile.imread(mask), labels)


def test_colour_slices_in_one_directory_are_read(tmp_path):
    colours = np.stack([STACK, STACK // 2, STACK // 3], axis=-1)
    path = save(tmp_path / "a.tif", colours, photometric="rgb", metadata={"axes": "ZYXS"}, truncate=True)
    np.testing.assert_array_equal(read_image(path).pixels, colours)


@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((6, 2), {"imagej": True, "metadata": {"axes": "ZCYX"}}),
        ((12,), {"imagej": True, "metadata": {"axes": "ZYX"}, "truncate": True, "channels": 3}),
        ((2, 6), {"imagej": True, "metadata": {"axes": "TZYX"}, "truncate": True}),
        ((2, 6), {"ome": True, "metadata": {"axes": "CZYX"}}),
        ((3, 4), {"metadata": {"axes": "QZYX"}, "truncate": True}),
    ],
)
def test_channels_and_times_are_no_slices(shape, how, tmp_path):
    how = dict(how)
    if how.pop("channels", None):
        shape, how["metadata"] = (3,), {"axes": "CYX"}
    values = STACK[: int(np.prod(shape))].reshape(*shape, *STACK.shape[1:])
    with pytest.raises(InputError, match=r"a\.tif has the axes .*; one stack of grey or RGB slices .* Split Channels"):
        read_image(save(tmp_path / "a.tif", values, **how))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["u1", "u4"])  # by Pillow; by tifffile
def test_of_a_pyramid_or_a_picture_with_a_thumbnail_the_full_resolution_is_read(compression, dtype, tmp_path):
    full = np.kron(STACK[0], np.ones((8, 8), np.uint8)).astype(dtype)
    options: dict[str, Any] = {"photometric": "minisblack", "compression": compression, "tile": (64, 64)}
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        for step in (1, 2, 4):
            file.write(full[::step, ::step], subfiletype=int(step > 1), **options)
    with tifffile.TiffWriter(tmp_path / "thumbnail_first.tif") as file:
        file.write(full[::8, ::8].copy(), subfiletype=1, **options, metadata=None)
        file.write(full, **options, metadata=None)
    with tifffile.TiffWriter(tmp_path / "ome.ome.tif") as file:
        file.write(full, subifds=1, **options)
        file.write(full[::2, ::2], subfiletype=1, **options)
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_image(path).pixels[0, ..., 0], full, err_msg=path.name)


def test_pages_that_differ_in_their_compression_alone_are_one_stack(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for index, compression in enumerate(["zlib", None, "zlib"]):
            file.write(STACK[index], photometric="minisblack", compression=compression, metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels[..., 0], STACK[:3])


@pytest.mark.parametrize(
    ("how", "old", "new", "message"),
    [
        ({"ome": True, "metadata": {"axes": "ZYX"}}, b'SizeZ="12"', b'SizeZ="24"', "lacks 12 of the 24 pages"),
        (
            {"ome": True, "metadata": {"axes": "ZYX"}},
            b'SizeX="32" SizeY="48" SizeC="1" SizeZ="12"',
            b'SizeX="3" SizeY="4" SizeC="1" SizeZ="9999"',
            "more than 4096 planes",
        ),
        (IMAGEJ_STACK, b"slices=12", b"slices=24", "imagej description"),
        (IMAGEJ_STACK, b"images=12", b"images=24", "24 images .* holds 12"),
        ({"metadata": {"axes": "ZYX"}, "truncate": True}, b"[12,", b"[24,", "cut short|description"),
    ],
)
def test_a_file_that_holds_less_than_it_says_is_refused(how, old, new, message, tmp_path):
    path = save(tmp_path / "a.tif", **how)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(InputError, match=rf"a\.tif.*({message})"):
        read_image(path)


def test_every_cut_of_a_stack_is_called_cut_short(tmp_path):
    path = save(tmp_path / "a.tif", STACK[:3], metadata=None)
    whole = path.read_bytes()
    for length in range(64, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.tif is cut short"):
            read_image(path)


def test_pages_that_refer_to_each_other_in_a_circle_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", STACK[0], metadata=None)
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * entries, first)
    path.write_bytes(content)
    with pytest.raises(InputError, match="in a circle"):
        read_image(path)


@pytest.mark.parametrize("dtype", ["u1", "u4"])
def test_channels_beyond_colours_and_transparency_are_refused(dtype, tmp_path):
    values = np.stack([STACK[0]] * 5, axis=-1).astype(dtype)
    with pytest.raises(InputError, match=r"a\.tif"):
        read_image(save(tmp_path / "a.tif", values, planarconfig="contig"))
    alpha = save(tmp_path / "b.tif", values[..., :2], planarconfig="contig", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_image(alpha).pixels[0, ..., 0], STACK[0])


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])  # Pillow decodes the first two, tifffile the third
def test_each_page_is_inverted_by_its_own_photometric_interpretation(dtype, tmp_path):
    stored = STACK.astype(dtype)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for index, page in enumerate(stored):
            inverted = index % 2 == 1
            values = np.iinfo(dtype).max - page if inverted else page
            file.write(values, photometric="miniswhite" if inverted else "minisblack", metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels[..., 0], stored)


@pytest.mark.parametrize("dtype", ["u1", "u4"])
def test_pages_of_different_orientations_are_refused(dtype, tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page, orientation in zip(STACK[:2].astype(dtype), (1, 3), strict=True):
            tags = [(274, 3, 1, orientation, True)]
            file.write(page, photometric="minisblack", metadata=None, extratags=tags)
    with pytest.raises(InputError, match=r"page 2 .* page 1"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
@pytest.mark.parametrize(("channels", "photometric"), [(2, "minisblack"), (5, "rgb")])
def test_samples_that_are_neither_colours_nor_transparency_are_refused(channels, photometric, dtype, tmp_path):
    values = np.stack([STACK[0]] * channels, axis=-1).astype(dtype)
    path = save(tmp_path / "a.tif", values, photometric=photometric, planarconfig="contig", metadata=None)
    with pytest.raises(InputError, match=f"{channels} channels"):
        read_image(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 122), (122, 1)])
def test_a_single_row_or_column_stays_one(size, tmp_path):
    values = np.arange(np.prod(size), dtype=np.uint16).reshape(size)
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.tif", values)).pixels[0, ..., 0], values)
    with tifffile.TiffWriter(tmp_path / "b.tif") as file:
        for page in (values, values + 1):
            file.write(page, photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif").pixels[..., 0], [values, values + 1])


def test_the_mask_of_a_stack_in_one_directory_is_read_from_one_as_well(tmp_path):
    image = read_image(save(tmp_path / "a.tif", metadata={"axes": "ZYX"}, truncate=True))
    mask = save(tmp_path / "m.tif", STACK % 3, imagej=True, metadata={"axes": "ZYX"}, truncate=True)
    np.testing.assert_array_equal(read_labels(mask, image, 3), STACK % 3)
    PIL.Image.fromarray(STACK[0] % 3).save(tmp_path / "one.tif")
    with pytest.raises(InputError, match="1 page"):
        read_labels(tmp_path / "one.tif", image, 3)


def test_more_slices_than_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("medseg_trt.imaging.formats.limits.MAX_SLICES", 11)
    assert tiff_layout.MAX_SLICES == 4096
    with pytest.raises(InputError, match="11 slices"):
        read_image(save(tmp_path / "a.tif", metadata={"axes": "ZYX"}, truncate=True))
