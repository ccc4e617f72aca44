"""Apply post-processing to the labels of one image: components in 3-D with 26 neighbours, holes slice by slice.

Steps that were learnt on volumes say nothing of single slices, and the other way round; sizes in millimetres need a
spacing. In windows, an image that is much larger than the training images shows more than they did, not finer: there
the largest component, or a share of the image, is not what was learnt. Where steps do not apply, a mask stays as the
network made it.
Source: Isensee et al. 2021, "nnU-Net", for components that are removed where the validation set gains by it.
"""

from math import sqrt

import numpy as np
from jaxtyping import Bool, UInt8
from numpy import ndarray

from medseg_trt.errors import require
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import Size
from medseg_trt.imaging.segment import Finish
from medseg_trt.postprocess.steps import ClassSteps, Postprocessing, Unit
from medseg_trt.progress import LOG
from medseg_trt.spec import Classes

Labels = UInt8[ndarray, "slices height width"]
NEIGHBOURS = 26
MAX_GROWTH = 2.0  # of the side of an image, from that of the largest training images


def finisher(post: Postprocessing | None, classes: Classes, trained_side: float | None = None) -> Finish:
    """Return the function that corrects the labels of an image; without steps, or where they do not apply, none.

    ``trained_side`` is that of ``unsuited``.
    """

    def finish(image: Image, labels: ndarray) -> ndarray:
        if post is None:
            return labels
        reason = unsuited(post, image.num_slices, image.size, image.spacing_mm is not None, trained_side)
        if reason is not None:
            LOG.warning("%s is not post-processed: %s", image.stem or image.path.name, reason)
            return labels
        return postprocess(labels, post, classes, image.spacing_mm)

    return finish


def unsuited(
    post: Postprocessing, num_slices: int, size: Size, has_spacing: bool, trained_side: float | None = None
) -> str | None:
    """Return why the steps do not apply to an image; None: they do.

    Args:
        post: the steps.
        num_slices: of the image.
        size: height and width of a slice.
        has_spacing: whether its spacing is known.
        trained_side: the square root of the pixels of the largest training images, for an image that is cut into
            windows; None: it is resized as a whole, or nothing is known.
    """
    if (num_slices > 1) != (post.kind == "volume"):
        learnt = "volumes" if post.kind == "volume" else "single slices"
        return f"the steps were learnt on {learnt}, and it has {num_slices} slice(s)"
    if post.unit != "share" and not has_spacing:
        return "the steps remove components by their size in millimetres, and its spacing is not known"
    growth = 1.0 if trained_side is None else sqrt(size[0] * size[1]) / trained_side
    if growth > MAX_GROWTH and any(
        steps.largest or (steps.min_size and post.unit == "share") for steps in post.classes
    ):
        return f"its sides are {growth:.1f} times those of the training images, on which the steps were learnt"
    return None


def postprocess(
    labels: Labels, post: Postprocessing, classes: Classes, spacing_mm: tuple[float, float, float] | None
) -> Labels:
    """Return corrected labels; the array that is given stays as it is.

    Args:
        labels: of a whole image.
        post: the steps; they apply to this image, see ``unsuited``.
        classes: the names of the labels.
        spacing_mm: between slices, rows and columns, where ``post`` has sizes in millimetres.

    Raises:
        MissingExtraError: cc3d or SciPy is not installed.
    """
    corrected = labels.copy()
    size = pixel_size(post.unit, labels.shape, spacing_mm)
    for steps in post.classes:
        apply_steps(corrected, classes.names.index(steps.name), steps, size)
    return corrected


def pixel_size(unit: Unit, shape: tuple[int, ...], spacing_mm: tuple[float, float, float] | None) -> float:
    """Return the size of one pixel in a unit.

    Raises:
        ValueError: the unit needs a spacing, and there is none.
    """
    if unit == "share":
        return 1 / (shape[1] * shape[2])
    if spacing_mm is None:
        raise ValueError(f"sizes in {unit} need a spacing")
    return float(np.prod(spacing_mm if unit == "mm3" else spacing_mm[1:]))


def apply_steps(labels: Labels, label: int, steps: ClassSteps, size: float) -> None:
    """Correct one class in place; ``size`` is that of one pixel in the unit of ``steps``."""
    box = _bounding_box(labels == label)
    if box is None:
        return
    part = labels[box]  # a view
    if steps.largest or steps.min_size:
        mask = part == label
        part[mask & ~_kept(mask, steps, size)] = 0
    if steps.fill_holes:
        part[_holes(part == label) & (part == 0)] = label


def _kept(mask: Bool[ndarray, "slices height width"], steps: ClassSteps, size: float) -> ndarray:
    """Return the pixels of the components that stay; of equally large ones the first."""
    cc3d = require("cc3d", "medical")
    components = cc3d.connected_components(mask, connectivity=NEIGHBOURS)
    counts = np.bincount(components.ravel())
    counts[0] = 0  # the pixels of no component
    stays = counts * size >= steps.min_size
    if steps.largest:
        stays &= np.arange(len(counts)) == counts.argmax()
    stays[0] = False
    return stays[components]


def _holes(mask: Bool[ndarray, "slices height width"]) -> ndarray:
    ndimage = require("scipy.ndimage", "medical")
    return np.stack([ndimage.binary_fill_holes(plane) for plane in mask]) & ~mask


def _bounding_box(mask: Bool[ndarray, "slices height width"]) -> tuple[slice, ...] | None:
    """Return the slices of the smallest box with the whole mask; None for an empty one."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != axis)
        (indices,) = np.nonzero(mask.any(axis=others))
        if not len(indices):
            return None
        box.append(slice(int(indices[0]), int(indices[-1]) + 1))
    return tuple(box)
