"""Volumes whose axes are not quite at right angles: their masks open in SimpleITK, and lie where their source does."""

from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK
from dicoms import dataset, placed, save
from itk import voxels_by_itk, voxels_by_nibabel
from nibabel.affines import apply_affine
from tiny import TWO_ORGANS

from medseg_trt.imaging.formats.nifti import header_of
from medseg_trt.imaging.images import Mask, read_image, write_mask

SHAPE = (12, 101, 122)  # slices, rows, columns
SPACING_MM = 3.0
CORNER_MM = np.array([-160.0, -120.0, 350.0])  # left, posterior, superior
YAW, PITCH = np.radians([13.7, -21.3])
OBLIQUE = np.array([[np.cos(YAW), -np.sin(YAW), 0], [np.sin(YAW), np.cos(YAW), 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, np.cos(PITCH), -np.sin(PITCH)], [0, np.sin(PITCH), np.cos(PITCH)]]
)
VALUES = (np.indices(SHAPE).sum(axis=0) % 251).astype(np.int16)


def rounded(decimals: int) -> np.ndarray:
    """Return the axes of an oblique volume whose numbers were rounded."""
    return np.round(OBLIQUE * [1, 1, SPACING_MM], decimals) * [SPACING_MM, SPACING_MM, 1]


def drifting(drift_mm: float) -> np.ndarray:
    """Return the axes of axial slices that each lie a little beside the one before."""
    axes = np.eye(3) * SPACING_MM
    axes[0, 2] = drift_mm
    return axes


def tilted(degrees: float) -> np.ndarray:
    """Return the axes of a CT with a tilted gantry."""
    angle = np.radians(degrees)
    return SPACING_MM * np.array([[1, 0, 0], [0, np.cos(angle), 0], [0, -np.sin(angle), 1]])


def affine_ras(axes: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, CORNER_MM
    return np.diag([-1, -1, 1, 1]) @ affine


def save_dicom(folder: Path, axes: np.ndarray) -> Path:
    for index, pixels in enumerate(VALUES):
        where = placed(np.round((axes[:, :2] / SPACING_MM).T.ravel(), 8), CORNER_MM + index * axes[:, 2])
        save(folder / f"{index}.dcm", dataset(pixels, **(where | {"PixelSpacing": [SPACING_MM, SPACING_MM]})))
    return folder


def save_nifti(path: Path, axes: np.ndarray) -> Path:
    volume = nibabel.Nifti1Image(VALUES.transpose(2, 1, 0), affine_ras(axes))
    volume.header.set_qform(None, 0)
    volume.header.set_sform(affine_ras(axes), 1)
    path = path.with_suffix(".nii.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(volume, path)
    return path


def save_nrrd(path: Path, axes: np.ndarray) -> Path:
    path = path.with_suffix(".nrrd")
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"space": "left-posterior-superior", "space directions": axes.T, "space origin": CORNER_MM}
    nrrd.write(str(path), VALUES.transpose(2, 1, 0), header)
    return path


def write(source: Path, folder: Path) -> Path:
    image = read_image(source)
    return write_mask(Mask.of(image, (image.pixels[..., 0] % 3).astype(np.uint8), TWO_ORGANS), folder / "masks")


CASES = {  # axes, how far SimpleITK may put a voxel beside its place in mm, whether a warning says that it does
    "right angles": (OBLIQUE * SPACING_MM, 1e-3, False),
    "3 decimals": (rounded(3), 0.054, False),
    "2 decimals": (rounded(2), 0.75, False),
    "drift of 2 micrometres": (drifting(0.002), 0.002 * 11 / 2 + 1e-3, False),
    "drift of 20 micrometres": (drifting(0.02), 0.02 * 11 / 2 + 1e-2, False),
    "drift of 100 micrometres": (drifting(0.1), 0.1 * 11 / 2 + 1e-2, True),
}
# DICOM's cosines are rescaled to unit length: rounded ones are up to half a digit off, at 122 voxels of 3 mm.
RESCALED_MM = {"3 decimals": 0.0005 * 366, "2 decimals": 0.005 * 366}


@pytest.mark.parametrize("kind", [save_dicom, save_nifti, save_nrrd])
@pytest.mark.parametrize("case", CASES)
def test_nibabel_and_simpleitk_read_every_mask_voxel_at_its_position(case, kind, tmp_path, caplog):
    axes, within_mm, is_told = CASES[case]
    path = write(kind(tmp_path / "scan", axes), tmp_path)
    slices, rows, columns = np.indices(SHAPE)
    true_mm = (CORNER_MM + np.stack([columns, rows, slices], axis=-1) @ axes.T) * (-1, -1, 1)
    values, places_mm = voxels_by_nibabel(path)
    np.testing.assert_array_equal(values, VALUES % 3)
    assert np.linalg.norm(places_mm - true_mm, axis=-1).max() < RESCALED_MM.get(case, 1e-3)
    by_itk, seen_mm = voxels_by_itk(path)
    np.testing.assert_array_equal(by_itk, VALUES % 3)
    assert np.linalg.norm(seen_mm - places_mm, axis=-1).max() < within_mm
    assert ("tilted" in caplog.text) == is_told


@pytest.mark.parametrize("kind", [save_dicom, save_nifti, save_nrrd])
def test_of_a_tilted_gantry_one_warning_says_who_can_open_the_mask_and_what_to_do(kind, tmp_path, caplog):
    axes = tilted(15)
    path = write(kind(tmp_path / "scan", axes), tmp_path)
    (record,) = caplog.records
    for part in ("tilted by 15 degrees", "nibabel", "3D Slicer, ITK-SNAP) cannot open it", "dcm2niix"):
        assert part in record.getMessage()
    slices, rows, columns = np.indices(SHAPE)
    true_mm = (CORNER_MM + np.stack([columns, rows, slices], axis=-1) @ axes.T) * (-1, -1, 1)
    values, places_mm = voxels_by_nibabel(path)
    np.testing.assert_array_equal(values, VALUES % 3)
    assert np.linalg.norm(places_mm - true_mm, axis=-1).max() < 1e-3
    with pytest.raises(RuntimeError, match="orthonormal"):  # as the warning says
        SimpleITK.ReadImage(str(path))


def test_a_qform_that_the_source_has_is_kept(tmp_path):
    path = save_nifti(tmp_path / "scan", rounded(3))
    volume: Any = nibabel.load(path)
    other = affine_ras(np.eye(3) * SPACING_MM)
    volume.header.set_qform(other, 2)
    nibabel.save(nibabel.Nifti1Image(np.asanyarray(volume.dataobj), None, volume.header), path)
    written: Any = nibabel.load(write(path, tmp_path))
    np.testing.assert_allclose(written.header.get_qform(), other, atol=1e-4)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (2, 1)


def test_rounded_axes_of_a_fine_volume_get_a_qform_and_a_warning_of_how_far_it_is_off(caplog):
    axes = rounded(2) * (0.7 / SPACING_MM)
    header = header_of(Path("fine.dcm"), (512, 512, 40), affine_ras(axes))
    corners = np.array(np.meshgrid((0, 511), (0, 511), (0, 39))).reshape(3, -1).T
    off_mm = apply_affine(header.get_qform(), corners) - apply_affine(header.get_sform(), corners)
    farthest = np.linalg.norm(off_mm, axis=1).max() / 0.7
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert 0.5 < farthest < 2
    (record,) = caplog.records
    assert f"show it up to {farthest:.2g} voxels beside" in record.getMessage()
