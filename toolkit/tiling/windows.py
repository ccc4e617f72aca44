"""Where the windows of an image lie, and how much each of their pixels counts.

Positions and weights are those of MONAI's ``sliding_window_inference`` with ``mode="gaussian"``, the tests' oracle.
"""

from dataclasses import dataclass, replace
from math import inf

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import UsageError
from medseg_trt.imaging.preprocess import Size, Spacing
from medseg_trt.spec import Preprocessing
from medseg_trt.window_spec import Windows

SIGMA = 0.125  # of the Gaussian, in window sizes
LEAST_WEIGHT = 1e-3  # relative to the middle of a window: its corners count, where no other window covers them


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    """The windows that an image is cut into."""

    size: int | None = None  # pixels of the image, rows and columns; None: what the network takes, without resizing
    overlap: float = 0.25  # of neighbouring windows, 0 … 1 exclusive
    mpp: float | None = None  # microns per pixel of 2-D images, at full resolution; None: what their files say

    def __post_init__(self) -> None:
        Windows(size="auto" if self.size is None else self.size, overlap=self.overlap)  # raises what it refuses
        if self.mpp is not None and not 0 < self.mpp < inf:
            raise ValueError(f"{self.mpp} microns per pixel are impossible; give a positive number")

    def __str__(self) -> str:
        """Return what masks depend on."""
        scale = "" if self.mpp is None else f", {self.mpp:g} microns per pixel"
        return f"windows of {'auto' if self.size is None else self.size} pixels, overlap {self.overlap:g}{scale}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AsRecorded:
    """The windows that a network records, if it was trained on windows, with what was asked of them."""

    overlap: float | None = None  # None: the recorded one
    mpp: float | None = None  # as in ``Tiles``


AS_RECORDED = AsRecorded()
TileChoice = Tiles | AsRecorded | None  # None: whole slices, whatever the network was trained on


def recorded_tiles(preprocessing: Preprocessing) -> Tiles | None:
    """Return the windows that a network was trained on; None: whole slices."""
    windows = preprocessing.windows
    if windows is None:
        return None
    return Tiles(size=None if windows.size == "auto" else windows.size, overlap=windows.overlap)


def chosen_tiles(choice: TileChoice, recorded: Tiles | None) -> Tiles | None:
    """Return the windows of a run; None: whole slices.

    Raises:
        UsageError: an overlap or a scale is given for windows that there are none of.
    """
    if not isinstance(choice, AsRecorded):
        return choice
    if recorded is not None:
        overlap = recorded.overlap if choice.overlap is None else choice.overlap
        return replace(recorded, overlap=overlap, mpp=recorded.mpp if choice.mpp is None else choice.mpp)
    if choice.overlap is not None:
        raise UsageError("--overlap is that of windows; give --tile auto too")
    if choice.mpp is not None:
        raise UsageError("--mpp is the scale of images that are cut into windows; give --tile auto too")
    return None


def is_as_recorded(tiles: Tiles | None, preprocessing: Preprocessing) -> bool:
    """Say whether masks are made as a network's steps were learnt and its graphs were judged, whatever the scale."""
    return (None if tiles is None else replace(tiles, mpp=None)) == recorded_tiles(preprocessing)


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


def num_windows(size: Size, window: Size, overlap: float) -> int:
    """Return how many windows an image is cut into; one that is smaller than a window is padded to it."""
    rows, columns = (starts(max(pair), pair[1], overlap) for pair in zip(size, window, strict=True))
    return len(rows) * len(columns)


def padding_before(length: int, window: int) -> int:
    """Return the pixels before an axis that is shorter than a window; its rest is padded after it."""
    return max(window - length, 0) // 2


def weights(window: Size) -> Float32[ndarray, "height width"]:
    """Return how much each pixel of a window counts: a Gaussian about its middle."""
    rows, columns = (_gaussian(size) for size in window)
    product = np.outer(rows, columns).astype(np.float32)
    return np.maximum(product, max(float(product.min()), LEAST_WEIGHT))


def _gaussian(size: int) -> ndarray:
    distance = np.arange(size) - (size - 1) / 2
    return np.exp(-(distance**2) / (2 * (SIGMA * size) ** 2)).astype(np.float32)
