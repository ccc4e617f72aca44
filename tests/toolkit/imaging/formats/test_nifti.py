"""NIfTI files of two axes, single slices in any direction, unknown units, and voxels that the header does not know."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from tiny import TWO_ORGANS, write_nifti

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import Mask, read_image, read_labels, write_mask

SLICE = np.arange(20, dtype=np.int16).reshape(5, 4)


def stored(path: Path) -> np.ndarray:
    return np.asanyarray(nibabel.load(path).dataobj)  # pyright: ignore


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_of_two_axes_is_the_slice_that_the_same_file_of_three_axes_is(suffix, tmp_path):
    affine = np.diag([-2.0, 1.5, 3, 1])
    flat, deep = tmp_path / f"flat{suffix}", tmp_path / f"deep{suffix}"
    nibabel.save(nibabel.Nifti1Image(SLICE, affine), flat)
    nibabel.save(nibabel.Nifti1Image(SLICE[..., np.newaxis], affine), deep)
    image = read_image(flat)
    np.testing.assert_array_equal(image.pixels, read_image(deep).pixels)
    assert image.pixels.shape == (1, 4, 5, 1)
    assert image.spacing_mm == (3.0, 1.5, 2.0)
    labels = (image.pixels[..., 0] % 3).astype(np.uint8)
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    np.testing.assert_array_equal(stored(path), SLICE % 3)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))), SLICE.T % 3)
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)


@pytest.mark.parametrize("turn", [[[1, 0, 0], [0, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 0, 0], [0, 1, 0]]])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_coronal_or_sagittal_slice_stays_one_slice(turn, axes, tmp_path):
    affine = np.eye(4)
    affine[:3, :3] = np.array(turn) * 2.0
    values = SLICE if axes == 2 else SLICE[..., np.newaxis]
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "a.nii")
    image = read_image(tmp_path / "a.nii")
    np.testing.assert_array_equal(image.pixels[..., 0], [SLICE.T])
    labels = (image.pixels[..., 0] % 3).astype(np.uint8)
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    np.testing.assert_array_equal(stored(path), values % 3)
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)


def test_one_dimensional_nifti_is_refused(tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.arange(9, dtype=np.int16), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(InputError, match="a volume has three axes, a slice two"):
        read_image(tmp_path / "a.nii")


@pytest.mark.parametrize(("code", "warned"), [(4, True), (7, True), (12, True), (2, False), (64, False), (10, False)])
def test_a_unit_that_nifti_does_not_know_counts_as_millimetres_with_a_warning(code, warned, tmp_path, caplog):
    volume = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(5, 4, 3), np.diag([2.0, 1.5, 3, 1]))
    volume.header["xyzt_units"] = code
    nibabel.save(volume, tmp_path / "a.nii.gz")
    image = read_image(tmp_path / "a.nii.gz")
    assert image.spacing_mm == (3.0, 1.5, 2.0)
    assert (f"a.nii.gz has an unknown unit of length (xyzt_units {code}); mm is assumed" in caplog.text) == warned
    labels = np.zeros(image.pixels.shape[:3], np.uint8)
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert SimpleITK.ReadImage(str(path)).GetSpacing() == (2.0, 1.5, 3.0)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("behind", "refused"), [(b"", False), (bytes(512), False), (b"\1", True), (bytes(2**17), True)]
)
def test_voxels_behind_those_of_the_header_are_refused_and_padding_is_not(suffix, behind, refused, tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(5, 4, 3))
    content = path.read_bytes() + behind
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" else content)
    if refused:
        with pytest.raises(InputError, match=r"b\.nii.* holds more pixels than the 120 bytes .*; repair the header"):
            read_image(path)
    else:
        np.testing.assert_array_equal(read_image(path).pixels, read_image(tmp_path / "a.nii").pixels)


def test_two_gzip_members_and_zeros_behind_them_are_one_file(tmp_path):
    content = write_nifti(tmp_path / "a.nii", np.arange(60, dtype=np.int16).reshape(5, 4, 3)).read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]) + bytes(300))
    np.testing.assert_array_equal(read_image(path).pixels, read_image(tmp_path / "a.nii").pixels)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_truncated_nifti_is_refused_as_cut_short(suffix, tmp_path):
    path = write_nifti(tmp_path / f"a{suffix}", np.arange(60, dtype=np.int16).reshape(5, 4, 3))
    whole = path.read_bytes()
    for length in range(360 if suffix == ".nii" else 120, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.nii.* is cut short"):
            read_image(path)
