"""HD95: the 95th percentile of the distances between the surfaces of two masks.

The surface is the set of mask pixels with a direct neighbour (4 in a slice, 6 in a volume) outside the mask; pixels
beyond the array count as outside. The percentile is that of the distances of both directions together, as in MedPy's
``hd95``, which TransUNet and later papers report. MONAI takes the larger of the percentiles of the two directions: a
different value for the same masks.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from medseg_trt.errors import require

PERCENTILE = 95

Distances = Float64[ndarray, "..."]  # one per surface point


def hd95(
    prediction: Bool[ndarray, "..."],
    truth: Bool[ndarray, "..."],
    spacing_mm: Sequence[float] | None = None,
) -> float | None:
    """Return the 95th percentile Hausdorff distance; None if a mask is empty.

    Args:
        prediction: a mask of any number of axes.
        truth: a mask of the same shape.
        spacing_mm: millimetres between pixels along each axis; without it the result is in pixels.

    Raises:
        ValueError: the shapes differ, or ``spacing_mm`` does not have one number per axis.
        MissingExtraError: SciPy is not installed.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"the prediction is {prediction.shape}, but the truth is {truth.shape}")
    spacing = np.ones(truth.ndim) if spacing_mm is None else np.asarray(spacing_mm, np.float64)
    if len(spacing) != truth.ndim:
        raise ValueError(f"{len(spacing)} spacings for {truth.ndim} axes")
    first, second = (surface_points(mask) * spacing for mask in (prediction, truth))
    if not len(first) or not len(second):
        return None
    return float(np.percentile(np.concatenate([_nearest(first, second), _nearest(second, first)]), PERCENTILE))


def surface_points(mask: Bool[ndarray, "..."]) -> Float64[ndarray, "points axes"]:
    """Return the indices of the surface pixels."""
    box = _bounding_box(mask)
    if box is None:
        return np.empty((0, mask.ndim))
    cut = np.pad(mask[box], 1)
    inner = tuple(slice(1, -1) for _ in range(mask.ndim))
    interior = cut[inner].copy()
    for axis in range(mask.ndim):
        for shift in (slice(None, -2), slice(2, None)):
            interior &= cut[(*inner[:axis], shift, *inner[axis + 1 :])]
    return np.argwhere(cut[inner] & ~interior) + np.array([part.start for part in box], np.float64)


def _bounding_box(mask: ndarray) -> tuple[slice, ...] | None:
    box: list[slice] = []
    for axis in range(mask.ndim):
        part = mask[tuple(box)]  # cropped along the axes before
        used = np.flatnonzero(part.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not used.size:
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def _nearest(points: ndarray, targets: ndarray) -> Distances:
    """Return the distance from each point to the nearest target."""
    spatial = require("scipy.spatial", "report")
    distances, _ = spatial.KDTree(targets).query(points)
    return distances
