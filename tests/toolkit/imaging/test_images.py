"""Reading and writing of generated pictures and volumes, with Pillow and nibabel as oracles."""

import gzip
import itertools
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from itk import require_seen_alike
from nibabel.affines import apply_affine
from nibabel.nifti1 import Nifti1Extension
from tiny import TWO_ORGANS, write_nifti

from medseg_trt.errors import InputError, MedsegError
from medseg_trt.imaging.formats import limits, nifti
from medseg_trt.imaging.images import Area, Image, Mask, find_images, output_stem, read_image, read_labels, write_mask
from medseg_trt.spec import Classes

RNG = np.random.default_rng(0)
LESION = Classes(names=("background", "lesion"))

# --- pictures


def colours(height: int = 6, width: int = 9) -> PIL.Image.Image:
    return PIL.Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(picture: PIL.Image.Image, path: Path) -> Path:
    picture.save(path)
    return path


def save_array(values: np.ndarray, path: Path) -> Path:
    return save(PIL.Image.fromarray(values), path)


def opened(path: Path) -> PIL.Image.Image:
    """Return Pillow's picture, with its file closed."""
    with PIL.Image.open(path) as picture:
        picture.load()
        return picture.copy()


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
    for place in range(start, stop):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError):
            read_image(path)


# --- volumes

SHAPE = (3, 4, 5)  # slices, rows, columns: all different, so that no two axes can be confused
SPACING_MM = (3.0, 1.5, 2.0)
ORIENTATIONS = [(p, f) for p in itertools.permutations(range(3)) for f in itertools.product([False, True], repeat=3)]
LPS_AFFINE = np.array([[-2.0, 0, 0, 31], [0, -1.5, 0, -12], [0, 0, 3, 7], [0, 0, 0, 1]])  # of (column, row, slice)


def turned(values: np.ndarray, permutation: tuple[int, ...], flips: tuple[bool, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Store (slice, row, column) values with permuted and flipped axes (column, row, slice); return the affine too."""
    stored = values.transpose(2, 1, 0).transpose(permutation)
    to_lps = np.zeros((4, 4))
    to_lps[3, 3] = 1
    for axis, (source, flip) in enumerate(zip(permutation, flips, strict=True)):
        to_lps[source, axis] = -1 if flip else 1
        to_lps[source, 3] = stored.shape[axis] - 1 if flip else 0
    return np.flip(stored, tuple(axis for axis, flip in enumerate(flips) if flip)), LPS_AFFINE @ to_lps


def load(path: Path) -> Any:
    return nibabel.load(path)


def stored_values(path: Path) -> np.ndarray:
    return np.asanyarray(load(path).dataobj)


def save_volume(path: Path, stored: np.ndarray, affine: np.ndarray, codes=(1, 2), kind=nibabel.Nifti1Image) -> Path:
    volume = kind(np.ascontiguousarray(stored), affine)
    for set_form, code in zip((volume.set_qform, volume.set_sform), codes, strict=True):
        set_form(affine if code else None, code)
    nibabel.save(volume, path)
    return path


def some_labels(shape=SHAPE, count=3) -> np.ndarray:
    return RNG.integers(0, count, shape, dtype=np.uint8)


@pytest.mark.parametrize(("permutation", "flips"), ORIENTATIONS)
def test_every_orientation_is_read_alike_and_its_mask_lies_as_its_source(permutation, flips, tmp_path):
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    stored, affine = turned(values, permutation, flips)
    image = read_image(save_volume(tmp_path / "scan.nii", stored, affine))
    np.testing.assert_array_equal(image.pixels[..., 0], values)
    assert image.pixels.dtype == np.int16
    assert image.spacing_mm == SPACING_MM
    assert image.spacing_in_plane == SPACING_MM[1:]
    assert image.geometry is not None
    # float32 in the header: 2**-24 of at most 50 mm is 3e-6. One voxel too far is 1.5 mm or more.
    np.testing.assert_allclose(image.geometry.affine_mm, LPS_AFFINE, atol=1e-5)

    labels = some_labels()
    written = load(write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks"))
    expected, _ = turned(labels, permutation, flips)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), expected)
    source = load(tmp_path / "scan.nii")
    assert written.header.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, source.affine)
    require_seen_alike(tmp_path / "masks" / "scan.nii.gz")


CODES = [(1, 2), (2, 0), (0, 3), (4, 1)]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("orientation", [ORIENTATIONS[0], ORIENTATIONS[13], ORIENTATIONS[30]])
def test_the_mask_keeps_the_place_in_the_header(codes, kind, orientation, tmp_path):
    stored, affine = turned(some_labels(), *orientation)
    path = save_volume(tmp_path / "scan.nii.gz", stored, affine, codes, kind)
    mask = Mask.of(read_image(path), some_labels(), TWO_ORGANS)
    source, written = load(path), load(write_mask(mask, tmp_path / "masks"))
    assert type(written) is type(source)
    assert written.shape == source.shape
    for field in nifti.GEOMETRY_FIELDS:
        np.testing.assert_array_equal(written.header[field], source.header[field], err_msg=field)
    for form in ("get_qform", "get_sform"):
        (written_form, written_code), (form_, code) = getattr(written, form)(coded=True), getattr(source, form)(True)
        assert written_code == code
        if code:
            np.testing.assert_array_equal(written_form, form_)


def test_qform_and_sform_that_differ_are_both_kept_and_the_sform_counts(tmp_path):
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    stored, affine = turned(values, (0, 1, 2), (False, False, False))
    _, elsewhere = turned(values, (0, 1, 2), (True, False, True))
    volume = nibabel.Nifti1Image(stored, affine)
    volume.set_qform(elsewhere, 1)
    volume.set_sform(affine, 2)
    nibabel.save(volume, tmp_path / "scan.nii")
    image = read_image(tmp_path / "scan.nii")
    np.testing.assert_array_equal(image.pixels[..., 0], values)
    written = load(write_mask(Mask.of(image, some_labels(), TWO_ORGANS), tmp_path / "masks"))
    # float32 quaternions: 1e-6 of 60 mm; the two forms are 8 mm apart
    np.testing.assert_allclose(written.get_qform(), elsewhere, atol=1e-4)
    np.testing.assert_array_equal(written.get_sform(), load(tmp_path / "scan.nii").get_sform())


angles = st.floats(-180, 180, allow_nan=False)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    turns=st.tuples(angles, angles, angles),
    sizes_mm=st.tuples(*[st.floats(0.2, 8)] * 3),
    mirrored=st.booleans(),
    unit=st.sampled_from(["mm", "meter", "micron", "unknown"]),
)
def test_the_mask_of_an_oblique_volume_has_the_voxel_order_of_its_source(
    turns, sizes_mm, mirrored, unit, tmp_path_factory
):
    rotation = np.eye(3)
    for (first, second), turn in zip([(0, 1), (0, 2), (1, 2)], np.deg2rad(turns), strict=True):
        step = np.eye(3)
        step[first, first] = step[second, second] = np.cos(turn)
        step[first, second], step[second, first] = -np.sin(turn), np.sin(turn)
        rotation = rotation @ step
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-sizes_mm[0] if mirrored else sizes_mm[0], *sizes_mm[1:]])
    affine[:3, 3] = -40, 20, 300
    stored = some_labels((4, 3, 5))
    volume = nibabel.Nifti1Image(stored, affine)
    volume.header.set_xyzt_units(unit)
    folder = tmp_path_factory.mktemp("oblique")
    nibabel.save(volume, folder / "scan.nii")
    image = read_image(folder / "scan.nii")
    written = load(write_mask(Mask.of(image, image.pixels[..., 0], TWO_ORGANS), folder / "masks"))
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), stored)
    np.testing.assert_array_equal(written.affine, load(folder / "scan.nii").affine)
    if unit in ("mm", "unknown"):  # nibabel gives the others in their own unit
        require_seen_alike(folder / "masks" / "scan.nii.gz")
    # Each voxel of our array lies, by our affine, where nibabel says that the stored voxel of the same number lies.
    assert image.geometry is not None
    numbers = np.arange(stored.size, dtype=np.int32).reshape(stored.shape)
    nibabel.save(nibabel.Nifti1Image(numbers, None, volume.header), folder / "numbers.nii")
    pixels = read_image(folder / "numbers.nii").pixels[..., 0]
    slices, rows, columns = np.indices(pixels.shape).reshape(3, -1)
    ours = apply_affine(image.geometry.affine_mm, np.stack([columns, rows, slices], axis=1))
    in_mm = {"mm": 1, "unknown": 1, "meter": 1e3, "micron": 1e-3}[unit]
    stored_at = np.stack(np.unravel_index(pixels.ravel(), stored.shape), axis=1)
    theirs = in_mm * apply_affine(load(folder / "scan.nii").affine, stored_at)
    # float64 on both sides: 2**-52 of 3e5. The smallest voxel is 0.2 µm apart from the next.
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1.0), ("meter", 1e3), ("micron", 1e-3), ("unknown", 1.0)])
def test_the_spacing_is_in_millimetres_whatever_the_unit(unit, factor, tmp_path):
    volume = nibabel.Nifti1Image(np.zeros((5, 4, 3), np.int16), np.diag([2.0, 1.5, 3.0, 1]))
    volume.header.set_xyzt_units(unit)
    nibabel.save(volume, tmp_path / "scan.nii")
    image = read_image(tmp_path / "scan.nii")
    assert image.spacing_mm == pytest.approx([3 * factor, 1.5 * factor, 2 * factor], rel=1e-6)  # slice, row, column


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i2", "u1", "f4", "f8"])
def test_every_form_of_nifti_gives_the_same_numbers(suffix, kind, order, dtype, tmp_path):
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    stored, affine = turned(values, (1, 0, 2), (True, False, False))
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    content = kind(stored, affine, header).to_bytes()
    path = tmp_path / f"scan{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.lower().endswith("gz") else content)
    pixels = read_image(path).pixels
    np.testing.assert_array_equal(pixels[..., 0], values)
    assert pixels.dtype == (np.float32 if dtype in ("f4", "f8") else np.dtype(dtype))
    assert pixels.dtype.isnative


def patched(path: Path, offset: int, form: str, *values: float) -> Path:
    """Overwrite a field of an uncompressed little-endian NIfTI-1 file."""
    content = bytearray(path.read_bytes())
    struct.pack_into(f"<{form}", content, offset, *values)
    path.write_bytes(content)
    return path


VOXEL_OFFSET, SLOPE, SFORM_ROW = 108, 112, 280  # bytes into a NIfTI-1 header


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize(("slope", "intercept"), [(2.0, -1024.0), (1.0, -1024.0), (0.25, 0.0), (-1.0, 3.0)])
def test_the_header_scales_the_voxels(dtype, slope, intercept, tmp_path):
    stored = RNG.integers(0, 200, (5, 4, 3)).astype(dtype)
    path = patched(write_nifti(tmp_path / "scan.nii", stored), SLOPE, "ff", slope, intercept)
    pixels = read_image(path).pixels
    assert pixels.dtype == np.float32
    # Integers below 2**24 are exact in float32; the oracle scales in float64.
    np.testing.assert_array_equal(np.unique(pixels), np.unique(load(path).get_fdata()))
    assert not np.array_equal(np.unique(pixels), np.unique(stored))


def test_a_slope_of_zero_means_unscaled(tmp_path):
    stored = RNG.integers(0, 200, (5, 4, 3), dtype=np.int16)
    path = patched(write_nifti(tmp_path / "scan.nii", stored), SLOPE, "ff", 0.0, 7.0)
    pixels = read_image(path).pixels
    assert pixels.dtype == np.int16
    np.testing.assert_array_equal(np.sort(pixels, axis=None), np.sort(stored, axis=None))


@pytest.mark.parametrize("closing", [(1,), (1, 1)])
def test_closing_axes_of_one_are_dropped_and_come_back_in_the_mask(closing, tmp_path):
    labels = some_labels()
    stored, affine = turned(labels, (0, 1, 2), (True, True, False))
    image = read_image(save_volume(tmp_path / "scan.nii", stored.reshape(*stored.shape, *closing), affine))
    np.testing.assert_array_equal(image.pixels[..., 0], labels)
    written = load(write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks"))
    assert written.shape == (*stored.shape, *closing)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj).reshape(stored.shape), stored)


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 4, 3, 1, 2), (5,)])
def test_what_is_not_one_volume_is_refused(shape, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / "series.nii")
    with pytest.raises(InputError, match=r"series\.nii has the shape .* a volume has three axes"):
        read_image(tmp_path / "series.nii")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused_with_their_count(value, tmp_path):
    values = np.zeros((5, 4, 3), np.float32)
    values[1, 1, 1] = values[2, 3, 0] = value
    with pytest.raises(InputError, match=r"scan\.nii holds 2 NaN or infinite voxels"):
        read_image(write_nifti(tmp_path / "scan.nii", values))


def test_a_scaling_that_overflows_is_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", np.full((5, 4, 3), 1000, np.int16))
    with pytest.raises(InputError, match="60 NaN or infinite voxels"):
        read_image(patched(path, SLOPE, "ff", 1e38, 0))


def test_complex_and_coloured_voxels_are_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 4, 3), np.complex64), np.eye(4)), tmp_path / "scan.nii")
    with pytest.raises(InputError, match="complex64 voxels"):
        read_image(tmp_path / "scan.nii")
    colour = np.zeros((5, 4, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), tmp_path / "colour.nii")
    with pytest.raises(InputError, match=r"colour\.nii holds .* voxels"):
        read_image(tmp_path / "colour.nii")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_volume_that_is_cut_short_is_refused_at_every_length(suffix, tmp_path):
    path = write_nifti(tmp_path / f"scan{suffix}", np.arange(60, dtype=np.int16).reshape(5, 4, 3))
    whole = path.read_bytes()
    for length in range(0, len(whole), 1 if suffix == ".nii.gz" else 13):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"scan\.nii"):
            read_image(path)


@pytest.mark.parametrize("size", [(5, 4, 3), (64, 64, 64)])  # less and more than is read ahead
@pytest.mark.parametrize("place", [-8, -3])  # in the checksum; in the length
def test_a_wrong_checksum_of_gzip_is_noticed(place, size, tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", RNG.integers(0, 1000, size, dtype=np.int16))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.nii\.gz cannot be read: (CRC check failed|Incorrect length)"):
        read_image(path)


@pytest.mark.parametrize(
    ("suffix", "content"), [(".nii", b"no volume" * 99), (".nii.gz", gzip.compress(b"no" * 999, mtime=0))]
)
def test_what_is_no_nifti_inside_is_refused(suffix, content, tmp_path):
    (tmp_path / f"scan{suffix}").write_bytes(content)
    with pytest.raises(InputError, match="is not a NIfTI file"):
        read_image(tmp_path / f"scan{suffix}")


def test_an_impossible_volume_is_refused_by_its_header(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", np.zeros((5, 4, 3), np.int16))
    with pytest.raises(InputError, match="says it has 30000 x 30000 x 30000 pixels"):
        read_image(patched(path, 42, "hhh", 30000, 30000, 30000))


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e9, -1.0, np.inf, np.nan])
def test_voxels_that_start_at_an_impossible_place_are_refused(offset, tmp_path):
    path = write_nifti(tmp_path / "scan.nii", np.zeros((5, 4, 3), np.int16))
    with pytest.raises(InputError, match=r"scan\.nii"):
        read_image(patched(path, VOXEL_OFFSET, "f", offset))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 1, 0)], "axes fall together"),
        ([(1, 0, 0, 0), (0, 1, 1, 0), (0, 1, 1 + 1e-6, 0)], "axes fall together"),
        ([(1, 0, 0, 0), (0, 0, 0, 0), (0, 0, 1, 0)], "1 x 0 x 1 mm"),
        ([(1, 0, 0, 0), (0, np.nan, 0, 0), (0, 0, 1, 0)], "1 x nan x 1 mm"),
        ([(1e8, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)], r"1e\+08 x 1 x 1 mm"),
        ([(1, 0, 0, np.inf), (0, 1, 0, 0), (0, 0, 1, 0)], "repair its affine"),
    ],
)
def test_an_affine_that_cannot_be_is_refused(rows, message, tmp_path):
    path = write_nifti(tmp_path / "scan.nii", np.zeros((5, 4, 3), np.int16))
    with pytest.raises(InputError, match=message):
        read_image(patched(path, SFORM_ROW, "12f", *itertools.chain(*rows)))


def test_a_volume_that_does_not_say_how_it_lies_is_read_with_a_warning(tmp_path, caplog):
    path = save_volume(tmp_path / "scan.nii", np.zeros((5, 4, 3), np.int16), np.diag([2, 1.5, 3, 1]), codes=(0, 0))
    image = read_image(path)
    assert image.spacing_mm == SPACING_MM
    assert "does not say how it lies" in caplog.text
    caplog.clear()
    read_image(write_nifti(tmp_path / "placed.nii", np.zeros((5, 4, 3), np.int16)))
    assert not caplog.text


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("whole")
    save(colours(), folder / "a.png")
    write_nifti(folder / "a.nii", np.arange(60, dtype=np.int16).reshape(5, 4, 3))
    return SimpleNamespace(folder=folder, content={suffix: (folder / f"a{suffix}").read_bytes() for suffix in DAMAGED})


DAMAGED = (".png", ".nii")


@pytest.mark.filterwarnings("error")
@settings(derandomize=True, deadline=None, max_examples=250)
@given(
    suffix=st.sampled_from(DAMAGED),
    place=st.integers(0, 400),
    replacement=st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\0\0\x80\x7f", b"\0\0\xc0\x7f"])),
)
def test_a_damaged_header_ends_in_an_image_or_in_one_line_that_names_the_file(suffix, place, replacement, whole_files):
    content = whole_files.content[suffix]
    place %= len(content) - 8
    path = whole_files.folder / f"damaged{suffix}"
    path.write_bytes(content[:place] + replacement + content[place + len(replacement) :])
    try:
        message = f"read {path.name}: {read_image(path).size}"
    except InputError as error:
        message = str(error)
    assert path.name in message
    assert "\n" not in message


# --- which files


def test_the_files_of_a_folder_come_in_natural_order_without_hidden_and_foreign_ones(tmp_path):
    names = ["img10.png", "img2.png", "IMG1.PNG", "scan.nii.gz", "b.nii", ".hidden.png", "notes.txt", "archive.gz"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "deeper.png").touch()
    assert [source.name for source in find_images([tmp_path])] == [
        "b.nii", "IMG1.PNG", "img2.png", "img10.png", "scan.nii.gz",
    ]  # fmt: skip


def test_the_order_of_the_inputs_is_kept_and_duplicates_come_once(tmp_path):
    paths = [tmp_path / name for name in ("b.png", "a.png", "c.png")]
    for path in paths:
        path.touch()
    assert [source.path for source in find_images(paths)] == paths
    found = find_images([paths[2], tmp_path, paths[2]])
    assert [source.path for source in found] == [paths[2], paths[1], paths[0]]


def test_numbers_and_letters_in_names_can_be_compared(tmp_path):
    names = ["1.png", "b.png", "a1b2.png", "a1b10.png", "a01b3.png", "10.png", "2.png"]
    for name in names:
        (tmp_path / name).touch()
    assert [source.name for source in find_images([tmp_path])] == [
        "1.png", "2.png", "10.png", "a1b2.png", "a01b3.png", "a1b10.png", "b.png",
    ]  # fmt: skip


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.png does not exist"):
        find_images([tmp_path / "nowhere.png"])


def test_a_file_of_another_kind_is_refused_with_the_known_kinds(tmp_path):
    (tmp_path / "a.gif").touch()
    with pytest.raises(InputError, match=r"a\.gif is of an unsupported format; .*\.png, .*\.nii, \.nii\.gz"):
        find_images([tmp_path / "a.gif"])
    with pytest.raises(InputError, match=r"holds no image; supported files end with \.png"):
        find_images([tmp_path])


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.png", "a"), ("a.b.PNG", "a.b"), ("a.nii", "a"), ("a.v1.nii.gz", "a.v1"), ("A.NII.GZ", "A"), ("a.txt", "a")],
)
def test_the_stem_drops_one_kind_of_suffix(name, stem):
    assert output_stem(Path("folder.x", name)) == stem


# --- labels


def picture_image(folder: Path, size=(6, 9)) -> Image:
    return read_image(save_array(np.zeros(size, np.uint8), folder / "picture.png"))


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGB", "RGBA"])
def test_label_pictures_of_every_mode_give_the_same_labels(mode, tmp_path):
    labels = some_labels((6, 9))
    picture = PIL.Image.fromarray(labels)
    if mode == "P":
        picture.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200])
    else:
        picture = picture.convert(mode)
    path = save(picture, tmp_path / "mask.png")
    assert opened(path).mode == mode
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), 3)[0], labels)


def test_a_deep_label_picture_is_read_while_its_values_are_labels(tmp_path):
    labels = some_labels((6, 9)).astype(np.uint16)
    path = save_array(labels, tmp_path / "mask.png")
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), 3)[0], labels)
    save_array(labels + np.uint16(256), path)  # 256 … 258: the lower bytes alone would be labels
    with pytest.raises(InputError, match="256, 257, 258"):
        read_labels(path, picture_image(tmp_path), None)


def test_a_colour_picture_is_no_mask(tmp_path):
    with pytest.raises(InputError, match=r"mask\.png is a colour picture; a mask holds label numbers"):
        read_labels(save(colours(), tmp_path / "mask.png"), picture_image(tmp_path), 3)


@pytest.mark.parametrize("high", [1, 255])
@pytest.mark.parametrize("mode", ["L", "1"])
def test_a_binary_mask_may_be_written_as_0_and_255(high, mode, tmp_path):
    truth = RNG.integers(0, 2, (6, 9), dtype=np.uint8)
    path = save_array((truth * high) if mode == "L" else truth.astype(bool), tmp_path / "mask.png")
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), 2)[0], truth)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_a_mask_of_0_1_and_255_is_not_taken_for_a_binary_one(num_labels, tmp_path):
    values = np.zeros((6, 9), np.uint8)
    values[0, 0], values[1, 1] = 1, 255
    with pytest.raises(InputError, match=rf"mask\.png holds the values 255 .* 0 to {num_labels - 1}"):
        read_labels(save_array(values, tmp_path / "mask.png"), picture_image(tmp_path), num_labels)


def test_values_without_a_class_are_named_with_the_file(tmp_path):
    path = save_array(np.arange(54, dtype=np.uint8).reshape(6, 9), tmp_path / "mask.png")
    with pytest.raises(InputError, match=r"mask\.png holds the values 3, 4, 5, 6, 7 …, but labels range from 0 to 2"):
        read_labels(path, picture_image(tmp_path), 3)
    np.testing.assert_array_equal(read_labels(path, picture_image(tmp_path), None).ravel(), np.arange(54))


@pytest.mark.parametrize("shape", [(9, 6), (6, 8), (7, 9)])
def test_a_mask_of_another_size_is_refused(shape, tmp_path):
    path = save_array(np.zeros(shape, np.uint8), tmp_path / "mask.png")
    with pytest.raises(InputError, match=rf"mask\.png is {shape[1]} x {shape[0]} pixels, but its image is 9 x 6"):
        read_labels(path, picture_image(tmp_path), 2)


def volume_image(folder: Path) -> Image:
    return read_image(write_nifti(folder / "volume.nii", np.zeros((5, 4, 3), np.int16)))


def test_float_labels_are_read_while_they_are_whole(tmp_path):
    labels = RNG.integers(0, 3, (5, 4, 3)).astype(np.float32)
    image = volume_image(tmp_path)
    path = write_nifti(tmp_path / "mask.nii", labels)
    found = read_labels(path, image, 3)
    np.testing.assert_array_equal(found, labels[::-1, ::-1].transpose(2, 1, 0))  # x and y run the other way in LPS
    labels[2, 2, 2] = 0.5
    with pytest.raises(InputError, match=r"mask\.nii holds the values 0\.5 "):
        read_labels(write_nifti(path, labels), image, 3)


@pytest.mark.parametrize("value", [-1, 300, 256])
def test_numbers_that_do_not_fit_a_byte_do_not_wrap_round_to_labels(value, tmp_path):
    labels = np.zeros((5, 4, 3), np.int16)
    labels[0, 0, 0] = value
    with pytest.raises(InputError, match=rf"mask\.nii holds the values {value} "):
        read_labels(write_nifti(tmp_path / "mask.nii", labels), volume_image(tmp_path), None)


def test_the_mask_of_a_volume_is_turned_as_its_image_even_if_it_is_stored_otherwise(tmp_path):
    labels = some_labels()
    image = read_image(save_volume(tmp_path / "scan.nii", *turned(labels, (0, 1, 2), (False, True, False))))
    mask = save_volume(tmp_path / "mask.nii", *turned(labels, (2, 0, 1), (True, False, False)))
    np.testing.assert_array_equal(read_labels(mask, image, 3), labels)


@pytest.mark.parametrize(("shift_mm", "refused"), [(0.029, False), (0.031, True), (1.5, True)])  # 2 % of 1.5 mm
def test_a_mask_that_lies_elsewhere_is_refused(shift_mm, refused, tmp_path):
    stored, affine = turned(some_labels(), (0, 1, 2), (False, False, False))
    image = read_image(save_volume(tmp_path / "scan.nii", stored, affine))
    affine[1, 3] += shift_mm
    mask = save_volume(tmp_path / "mask.nii", stored, affine, codes=(0, 1))
    if refused:
        with pytest.raises(InputError, match=r"mask\.nii does not lie where its image .*scan\.nii lies"):
            read_labels(mask, image, 3)
    else:
        assert read_labels(mask, image, 3).shape == SHAPE


def test_volumes_and_pictures_are_not_mixed(tmp_path):
    png = save_array(np.zeros((4, 5), np.uint8), tmp_path / "mask.png")
    nifti = write_nifti(tmp_path / "mask.nii", np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(InputError, match="give a NIfTI mask"):
        read_labels(png, volume_image(tmp_path), 2)
    with pytest.raises(InputError, match="give a PNG mask"):
        read_labels(nifti, picture_image(tmp_path, (4, 5)), 2)
    with pytest.raises(InputError, match=r"\(4, 4, 5\) slices, rows and columns, but its image is \(3, 4, 5\)"):
        read_labels(write_nifti(nifti, np.zeros((5, 4, 4), np.uint8)), volume_image(tmp_path), 2)


# --- masks


def test_a_mask_refuses_labels_of_another_size_or_without_a_name(tmp_path):
    image = picture_image(tmp_path)
    with pytest.raises(ValueError, match=r"the labels are \(1, 6, 8\), but the image is \(1, 6, 9\)"):
        Mask.of(image, np.zeros((1, 6, 8), np.uint8), LESION)
    with pytest.raises(ValueError, match="label 2 has no name; there are 2 classes"):
        Mask.of(image, np.full((1, 6, 9), 2, np.uint8), LESION)


@pytest.mark.parametrize("count", [2, 3, 256])
def test_a_written_picture_shows_the_class_colours_and_gives_the_labels_back(count, tmp_path):
    classes = Classes(names=tuple(f"class {index}" for index in range(count)))
    image = picture_image(tmp_path, (16, 17))
    labels = (np.arange(16 * 17) % count).astype(np.uint8).reshape(1, 16, 17)
    path = write_mask(Mask.of(image, labels, classes), tmp_path / "masks")
    assert path == tmp_path / "masks" / "picture.png"
    picture = opened(path)
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), labels[0])
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.array(classes.colors)[labels[0]])
    np.testing.assert_array_equal(read_labels(path, image, count), labels)


def test_a_written_volume_gives_the_labels_back(tmp_path):
    image, labels = volume_image(tmp_path), some_labels()
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert path == tmp_path / "masks" / "volume.nii.gz"
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)


def test_the_same_mask_is_the_same_file_at_any_time(tmp_path, monkeypatch):
    image, labels = volume_image(tmp_path), some_labels()
    days = itertools.count(0, 86_400)
    monkeypatch.setattr(nifti.gzip, "time", SimpleNamespace(time=lambda: next(days)))
    first, second = (write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_nothing_of_the_patient_in_the_header_is_copied_to_the_mask(tmp_path):
    volume = nibabel.Nifti1Image(np.zeros((5, 4, 3), np.int16), np.diag([2, 1.5, 3, 1]))
    volume.header["descrip"], volume.header["db_name"], volume.header["intent_name"] = b"Jane Doe", b"Doe", b"Jane"
    volume.header.extensions.append(Nifti1Extension("comment", b"Jane Doe"))
    nibabel.save(volume, tmp_path / "scan.nii")
    assert b"Jane Doe" in (tmp_path / "scan.nii").read_bytes()
    mask = Mask.of(read_image(tmp_path / "scan.nii"), some_labels(), TWO_ORGANS)
    content = gzip.decompress(write_mask(mask, tmp_path / "masks").read_bytes())
    assert b"Jane" not in content
    assert b"Doe" not in content


def stopped(*args: Any, **kwargs: Any) -> bytes:
    raise OSError("no space left")


@pytest.mark.parametrize("kind", ["picture", "volume"])
def test_an_error_while_writing_leaves_the_old_mask_and_nothing_half_done(kind, tmp_path, monkeypatch):
    image = picture_image(tmp_path) if kind == "picture" else volume_image(tmp_path)
    folder = tmp_path / "masks"
    old = write_mask(Mask.of(image, np.zeros(image.pixels.shape[:3], np.uint8), TWO_ORGANS), folder)
    content = old.read_bytes()
    monkeypatch.setattr("PIL.Image.Image.save", stopped)
    monkeypatch.setattr("medseg_trt.imaging.formats.nifti.gzip.compress", stopped)
    with pytest.raises(OSError, match="no space left"):
        write_mask(Mask.of(image, np.ones(image.pixels.shape[:3], np.uint8), TWO_ORGANS), folder)
    assert list(folder.iterdir()) == [old]
    assert old.read_bytes() == content


@pytest.mark.parametrize("fault", ["mirrored", "moved"])
def test_a_volume_mask_that_comes_out_wrong_is_not_written(fault, tmp_path, monkeypatch):
    image, labels = volume_image(tmp_path), some_labels()
    read_back = nifti.load

    def faulty(path: Path) -> Any:
        values, header, affine = read_back(path)
        if fault == "mirrored":
            return values[::-1], header, affine
        header["qoffset_x"] += 1
        return values, header, affine

    monkeypatch.setattr(nifti, "load", faulty)
    with pytest.raises(MedsegError, match="did not come out the way the image lies"):
        write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert list((tmp_path / "masks").iterdir()) == []


def test_the_areas_of_a_picture_are_pixels(tmp_path):
    labels = np.zeros((1, 6, 9), np.uint8)
    labels[0, :2, :3], labels[0, 5, 5] = 1, 2
    areas = Mask.of(picture_image(tmp_path), labels, TWO_ORGANS).areas()
    assert areas == (Area(name="disc", pixels=6, mm2=None, ml=None), Area(name="bar", pixels=1, mm2=None, ml=None))


def test_the_areas_of_a_volume_are_millilitres(tmp_path):
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[:, 0, 0] = 2
    areas = Mask.of(volume_image(tmp_path), labels, TWO_ORGANS).areas()  # voxels of 2 x 1.5 x 3 = 9 mm³
    assert areas[0] == Area(name="disc", pixels=0, mm2=None, ml=0.0)
    assert (areas[1].pixels, areas[1].mm2, areas[1].ml) == (3, None, pytest.approx(0.027, rel=1e-12))


def test_the_areas_of_a_single_slice_are_square_millimetres(tmp_path):
    image = read_image(write_nifti(tmp_path / "slice.nii", np.zeros((5, 4, 1), np.int16)))
    areas = Mask.of(image, np.ones((1, 4, 5), np.uint8), TWO_ORGANS).areas()
    assert areas[0] == Area(name="disc", pixels=20, mm2=60.0, ml=None)
