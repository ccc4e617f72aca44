"""NIfTI volumes of every orientation, unit and type are read, and damaged ones refused; nibabel is the oracle."""

import gzip
import itertools
import struct
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from itk import require_seen_alike
from nibabel.affines import apply_affine
from stored_images import (
    LPS_AFFINE,
    ORIENTATIONS,
    RNG,
    SHAPE,
    SPACING_MM,
    colours,
    load,
    reoriented,
    save,
    save_volume,
    some_labels,
)
from tiny import TWO_ORGANS, write_nifti

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats import nifti
from medseg_trt.imaging.images import Mask, read_image, write_mask


@pytest.mark.parametrize(("permutation", "flips"), ORIENTATIONS)
def test_every_orientation_is_read_alike_and_its_mask_lies_as_its_source(permutation, flips, tmp_path):
    values = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
    stored, affine = reoriented(values, permutation, flips)
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
    expected, _ = reoriented(labels, permutation, flips)
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
    stored, affine = reoriented(some_labels(), *orientation)
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
    stored, affine = reoriented(values, (0, 1, 2), (False, False, False))
    _, elsewhere = reoriented(values, (0, 1, 2), (True, False, True))
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
    stored, affine = reoriented(values, (1, 0, 2), (True, False, False))
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
    stored, affine = reoriented(labels, (0, 1, 2), (True, True, False))
    image = read_image(save_volume(tmp_path / "scan.nii", stored.reshape(*stored.shape, *closing), affine))
    np.testing.assert_array_equal(image.pixels[..., 0], labels)
    written = load(write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks"))
    assert written.shape == (*stored.shape, *closing)
    np.testing.assert_array_equal(np.asanyarray(written.dataobj).reshape(stored.shape), stored)


@pytest.mark.parametrize("shape", [(5, 4, 3, 2), (5, 4, 3, 1, 2), (5,)])
def test_nifti_with_other_than_three_dimensions_is_refused(shape, tmp_path):
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
@pytest.mark.parametrize("offset", [-8, -3])  # in the checksum; in the length
def test_a_wrong_checksum_of_gzip_is_noticed(offset, size, tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", RNG.integers(0, 1000, size, dtype=np.int16))
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"scan\.nii\.gz cannot be read: (CRC check failed|Incorrect length)"):
        read_image(path)


@pytest.mark.parametrize(
    ("suffix", "content"), [(".nii", b"no volume" * 99), (".nii.gz", gzip.compress(b"no" * 999, mtime=0))]
)
def test_file_without_nifti_content_is_refused(suffix, content, tmp_path):
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
        ([(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 1, 0)], "linearly dependent axes"),
        ([(1, 0, 0, 0), (0, 1, 1, 0), (0, 1, 1 + 1e-6, 0)], "linearly dependent axes"),
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
    assert "has no orientation" in caplog.text
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
    offset=st.integers(0, 400),
    replacement=st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\0\0\x80\x7f", b"\0\0\xc0\x7f"])),
)
def test_a_damaged_header_ends_in_an_image_or_in_one_line_that_names_the_file(suffix, offset, replacement, whole_files):
    content = whole_files.content[suffix]
    offset %= len(content) - 8
    path = whole_files.folder / f"damaged{suffix}"
    path.write_bytes(content[:offset] + replacement + content[offset + len(replacement) :])
    try:
        message = f"read {path.name}: {read_image(path).size}"
    except InputError as error:
        message = str(error)
    assert path.name in message
    assert "\n" not in message
