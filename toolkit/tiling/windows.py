"""Where the windows of an image lie, and how much each of their pixels counts.

Positions and weights are those of MONAI's ``sliding_window_inference`` with ``mode="gaussian"``, the tests' oracle.
"""

from dataclasses import dataclass
from math import inf, isqrt

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.imaging.formats.limits import MAX_PIXELS
from medseg_trt.imaging.preprocess import Size, Spacing
from medseg_trt.spec import Preprocessing

LARGEST = isqrt(MAX_PIXELS)  # of a window's sides; smaller images are padded to it
SIGMA = 0.125  # of the Gaussian, in window sizes
LEAST_WEIGHT = 1e-3  # relative to the middle of a window: its corners count, where no other window covers them


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """The windows that an image is cut into."""

    size: int | None = None  # pixels of the image, rows and columns; None: what the network takes, without resizing
    overlap: float = 0.25  # of neighbouring windows, 0 … 1 exclusive
    mpp: float | None = None  # microns per pixel of 2-D images, at full resolution; None: what their files say

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= LARGEST:
            raise ValueError(f"windows of {self.size} pixels are impossible; give 1 to {LARGEST}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"the overlap is {self.overlap}; it must be from 0 to less than 1")
        if self.mpp is not None and not 0 < self.mpp < inf:
            raise ValueError(f"{self.mpp} microns per pixel are impossible; give a positive number")

    def __str__(self) -> str:
        """Return what masks depend on."""
        scale = "" if self.mpp is None else f", {self.mpp:g} microns per pixel"
        return f"windows of {'auto' if self.size is None else self.size} pixels, overlap {self.overlap:g}{scale}"


def window_size(tiles: Tiles, p: Preprocessing, spacing_mm: Spacing | None) -> Size:
    """Return the height and width of a window in pixels of the image.

    Without a given size, it is that of the network's input, or the network's field of view where the preprocessing and
    the image have a spacing.
    """
    if tiles.size is not None:
        return tiles.size, tiles.size
    if p.spacing_mm is None or spacing_mm is None:
        return p.image_size
    rows, columns = (
        max(1, round(pixels * p.spacing_mm / distance_mm))
        for pixels, distance_mm in zip(p.image_size, spacing_mm, strict=True)
    )
    return rows, columns


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Return the first pixels of the windows along an axis that is at least a window long."""
    if window == length:
        return [0]
    interval = max(int(window * (1 - overlap)), 1)
    number = -(-(length - window) // interval) + 1
    return [min(index * interval, length - window) for index in range(number)]


def weights(window: Size) -> Float32[ndarray, "height width"]:
    """Return how much each pixel of a window counts: a Gaussian about its middle."""
    rows, columns = (_gaussian(size) for size in window)
    product = np.outer(rows, columns).astype(np.float32)
    return np.maximum(product, max(float(product.min()), LEAST_WEIGHT))


def _gaussian(size: int) -> ndarray:
    distance = np.arange(size) - (size - 1) / 2
    return np.exp(-(distance**2) / (2 * (SIGMA * size) ** 2)).astype(np.float32)
