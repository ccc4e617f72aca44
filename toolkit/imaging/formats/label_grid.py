"""Map the labels of a volume to the voxels of its image, where both share one grid in space."""

from itertools import product

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import Image
from medseg_trt.progress import LOG

# How far the two grids may be apart at any corner, as a share of the shortest voxel side. Headers are rounded: float32
# affines to 1e-4 mm, text to 2 or 3 decimals (at most 0.009 mm in space), quaternions to 2e-5 (7 µm over 366 mm). 2 %
# is above these for sides from 0.45 mm, and 25 times below what would move a voxel's centre into its neighbour. Voxels
# that are 0.05 % larger are 6 % of a side away after 122 voxels: another grid.
MAX_SHARE = 0.02


def labels_on_grid(mask: Image, like: Image, *, may_be_cropped: bool) -> ndarray:
    """Return a volume's labels (slices, rows, columns) on its image's grid.

    Args:
        mask: as read, reoriented like its image.
        like: its image.
        may_be_cropped: whether the mask may cover only a part of the image; the rest is background.

    Raises:
        InputError: the mask differs from its image in size or geometry.
    """
    assert mask.geometry is not None  # callers have checked both
    assert like.geometry is not None
    theirs, ours = mask.geometry.affine_mm, like.geometry.affine_mm
    shape, image_shape = mask.pixels.shape[:3], like.pixels.shape[:3]
    sizes = f"{mask.path} is {shape} slices, rows and columns, but its image is {image_shape}"
    if shape == image_shape:
        start = np.zeros(3)
    elif may_be_cropped:
        start = np.rint(np.linalg.solve(ours, theirs[:, 3])[:3])
    else:
        raise InputError(sizes)
    expected = ours.copy()
    expected[:, 3] = ours @ [*start, 1]
    apart_mm = _largest_distance(theirs, expected, shape)
    allowed_mm = MAX_SHARE * np.linalg.norm(ours[:3, :3], axis=0).min()
    if apart_mm > allowed_mm and shape == image_shape:
        raise InputError(
            f"{mask.path} has another geometry than its image {like.path}: their corners are up to {apart_mm:.4g} mm "
            f"apart, and {allowed_mm:.2g} mm ({MAX_SHARE:.0%} of a voxel) are allowed; resample the mask to the image"
        )
    first = tuple(int(index) for index in start[::-1])  # slice, row, column
    last = tuple(index + size for index, size in zip(first, shape, strict=True))
    is_inside = all(low >= 0 and high <= size for low, high, size in zip(first, last, image_shape, strict=True))
    if apart_mm > allowed_mm or not is_inside:
        raise InputError(
            f"{sizes}, and its voxels are not a part of the image's; export it on the image's grid (3D Slicer: "
            "Segmentations, Export to labelmap, with the image as reference volume)"
        )
    if shape == image_shape:
        return mask.pixels[..., 0]
    LOG.info("%s covers a part of its image, %s of %s voxels; the rest is background", mask.path, shape, image_shape)
    labels = np.zeros(image_shape, mask.pixels.dtype)
    labels[tuple(slice(low, high) for low, high in zip(first, last, strict=True))] = mask.pixels[..., 0]
    return labels


def _largest_distance(first: Float64[ndarray, "4 4"], second: Float64[ndarray, "4 4"], shape: tuple[int, ...]) -> float:
    """Return the largest distance between the centres of two corresponding corner voxels, in millimetres.

    The distance is convex over the grid, so no voxel is further apart than a corner.
    """
    slices, rows, columns = shape
    corners = np.array([[*corner, 1] for corner in product((0, columns - 1), (0, rows - 1), (0, slices - 1))], float)
    return float(np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max())
