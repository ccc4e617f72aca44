"""A second, independent reader of masks: SimpleITK, by which 3D Slicer and ITK-SNAP read too."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK
from nibabel.affines import apply_affine

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # it says on stderr that it falls back to the qform
LPS = np.array([-1.0, -1.0, 1.0])


def voxels_by_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the values (slice, row, column) as stored, and where each lies in mm (right, anterior, superior)."""
    volume = SimpleITK.ReadImage(str(path))
    values = SimpleITK.GetArrayFromImage(volume)
    columns, rows, slices = volume.GetSize()
    affine = np.eye(4)
    affine[:3, :3] = np.array(volume.GetDirection()).reshape(3, 3) * volume.GetSpacing()
    affine[:3, 3] = volume.GetOrigin()
    return values, _positions(affine, (columns, rows, slices)) * LPS


def voxels_by_nibabel(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``voxels_by_itk`` does."""
    volume: Any = nibabel.load(path)
    values = np.asanyarray(volume.dataobj)
    return values.transpose(2, 1, 0), _positions(volume.affine, values.shape)


def require_seen_alike(path: Path, within_mm: float = 1e-3) -> None:
    """Fail unless SimpleITK and nibabel read the same labels at the same places.

    Headers hold float32, and the qform's rotation is stored as three of a quaternion's numbers: both cost micrometres.
    """
    by_itk, by_nibabel = voxels_by_itk(path), voxels_by_nibabel(path)
    np.testing.assert_array_equal(by_itk[0], by_nibabel[0])
    assert np.linalg.norm(by_itk[1] - by_nibabel[1], axis=-1).max() < within_mm


def _positions(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    indices = np.indices(shape).reshape(3, -1).T
    return apply_affine(affine, indices).reshape(*shape, 3).transpose(2, 1, 0, 3)
