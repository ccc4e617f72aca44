"""The quaternion of a NIfTI header: the rotation that ITK-based viewers open a volume by.

A quaternion holds no shear, and ITK opens no NIfTI file whose axes are not at right angles, to a few parts in a
million. Rounded direction cosines and slices that drift sideways make such axes. The header keeps them in its sform,
which nibabel goes by; its qform takes the nearest rotation, which ITK falls back to.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from medseg_trt.progress import LOG

RIGHT_ANGLED = 1e-5  # largest cosine between axes that a quaternion can stand for
ROUNDED_COSINE = 0.015  # between axes whose direction cosines were rounded to two decimals: 0.005 * 3 components
SCANNER = 1  # NIfTI's code for scanner coordinates


def set_qform(path: Path, header: Any, affine: Float64[ndarray, "4 4"]) -> None:
    """Set the qform of a header to the rotation that is nearest to ``affine``, or leave it away and warn.

    The distances of all voxels to where they truly lie decide what is nearest. The farthest voxel is off by 0.04 mm
    where cosines were rounded to three decimals and by 0.6 mm where to two (122 x 101 x 12 voxels of 3 mm), and by half
    of the whole sideways drift of the slices. A warning tells of more than half the shortest voxel side, and of axes
    that rounding does not explain; where both meet, as with a tilted gantry, no qform is written.

    Args:
        path: the volume, for the warning.
        header: nibabel's NIfTI header with its shape; its voxel sizes become those of ``affine``.
        affine: from (column, row, slice, 1) to the header's unit of length.

    Source: the orthogonal Procrustes problem (Schönemann 1966), solved by a polar decomposition.
    """
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    directions = affine[:3, :3] / sides
    cosine = float(np.abs(directions.T @ directions - np.eye(3)).max())
    if cosine < RIGHT_ANGLED:
        header.set_qform(affine, SCANNER)
        return
    shape = np.array(header.get_data_shape()[:3])
    nearest, farthest = _nearest_rotation(directions, sides, affine[:3, 3], shape)
    is_near, is_rounding = farthest <= sides.min() / 2, cosine <= ROUNDED_COSINE
    if is_near or is_rounding:
        header.set_qform(nearest, SCANNER)
        seen = f"show it up to {farthest / sides.min():.2g} voxels beside"
        remedy = ""
    else:
        header["pixdim"][1:4] = sides
        seen = "cannot open it"
        remedy = "; for these, straighten the volume (dcm2niix writes it as …_Tilt…nii) and segment that"
    if not (is_near and is_rounding):
        LOG.warning(
            "%s: its slices are tilted by %.2g degrees against the direction they follow one another in, and so is the "
            "mask: nibabel and other readers of the sform show it in its place, ITK-based viewers (3D Slicer, "
            "ITK-SNAP) %s%s",
            path,
            np.degrees(np.arcsin(min(cosine, 1.0))),
            seen,
            remedy,
        )


def _nearest_rotation(
    directions: ndarray, sides: ndarray, corner: ndarray, shape: ndarray
) -> tuple[Float64[ndarray, "4 4"], float]:
    """Return the affine of the rotation (or rotoreflection) nearest to given directions, and the largest distance.

    The volume is turned about its centre; each axis counts by the square of its length.
    """
    left, _, right = np.linalg.svd(directions * (sides * shape) ** 2)
    rotated = left @ right * sides
    difference = directions * sides - rotated
    centre = (shape - 1) / 2
    nearest = np.eye(4)
    nearest[:3, :3] = rotated
    nearest[:3, 3] = corner + difference @ centre
    corners = np.array(np.meshgrid(*[(-half, half) for half in centre])).reshape(3, -1)
    return nearest, float(np.linalg.norm(difference @ corners, axis=0).max())
