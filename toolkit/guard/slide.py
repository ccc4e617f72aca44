"""Compare a slide with the training images, by parts of it that are as large as those were.

A slide shows many times what a training image did, and much of it may be glass. So parts on a grid are read, and those
with the most variation are compared as the slices of a volume are. A slide that is no larger than training images is
one part.
"""

from collections.abc import Callable, Iterator
from math import sqrt

import numpy as np
from jaxtyping import Num
from numpy import ndarray

from medseg_trt.guard.features import SliceFeatures, slice_features
from medseg_trt.guard.guard import FeatureRange, Guard, unusual_slices
from medseg_trt.imaging.preprocess import Size
from medseg_trt.spec import Preprocessing

DOWN, ACROSS = 8, 4  # parts of a slide, at most
COMPARED = 8  # of them: those with the most variation
MAX_BYTES = 1 << 27  # of the parts beside each other, unless one alone is larger
ANY_SIZE = FeatureRange(low=10.0, high=10.0, spread=1.0)  # of a guard that knows none: parts of 1024 pixels
SQUARE = FeatureRange(low=0.0, high=0.0, spread=1.0)
SAMPLES = 256  # pixels along a side that the variation is taken of

ReadRows = Callable[[int, int], Num[ndarray, "rows width channels"]]


def unusual_slide(
    guard: Guard,
    read_rows: ReadRows,
    size: Size,
    spacing_mm: tuple[float, float] | None,
    preprocessing: Preprocessing,
    step: int,
    check: Callable[[], None] = lambda: None,
) -> str | None:
    """Return in which way a slide is far outside of the training images; None: it is not.

    Args:
        guard: of the network.
        read_rows: gives the slide's rows.
        size: of the slide.
        spacing_mm: between its rows and between its columns, where known.
        preprocessing: of the network, for this slide, see ``preprocess.for_image``.
        step: rows that are read at once.
        check: called before every step; what it raises ends the work.
    """
    part = part_size(guard, size, spacing_mm if preprocessing.spacing_mm is not None else None)
    found: list[tuple[float, SliceFeatures]] = []
    for pixels in _parts(read_rows, size, part, step, check):
        found.append((_variation(pixels), slice_features(pixels, preprocessing, spacing_mm)))
    found.sort(key=lambda item: -item[0])
    return unusual_slices(guard, [features for _, features in found[:COMPARED]], preprocessing)


def part_size(guard: Guard, size: Size, spacing_mm: tuple[float, float] | None) -> Size:
    """Return the height and width of the parts of a slide: those of a typical training image.

    With ``spacing_mm``, of a network that takes pixels at a distance, it is as large in millimetres.
    """
    known, pixel_mm = guard.ranges.get("pixels", ANY_SIZE), 1.0
    if spacing_mm is not None and "extent" in guard.ranges:
        known, pixel_mm = guard.ranges["extent"], sqrt(spacing_mm[0] * spacing_mm[1])
    if sqrt(size[0] * size[1]) * pixel_mm <= 2.0**known.high:
        return size
    side, shape = 2.0 ** _middle(known) / pixel_mm, 2.0 ** (_middle(guard.ranges.get("aspect", SQUARE)) / 2)
    height, width = max(1.0, min(side * shape, size[0])), max(1.0, min(side / shape, size[1]))
    return round(height), round(width)


def _middle(known: FeatureRange) -> float:
    return (known.low + known.high) / 2


def _parts(
    read_rows: ReadRows, size: Size, part: Size, step: int, check: Callable[[], None]
) -> Iterator[Num[ndarray, "height width channels"]]:
    """Yield parts on a grid; memory holds those beside each other."""
    height, width = part
    pixels = read_rows(0, 1)
    fitting = max(MAX_BYTES // (height * width * pixels.shape[2] * pixels.itemsize), 1)
    across = max(min(ACROSS, size[1] // width, fitting), 1)
    lefts = _spread(size[1], width, across)
    for top in _spread(size[0], height, max(min(DOWN, size[0] // height), 1)):
        parts = [np.empty((height, width, pixels.shape[2]), pixels.dtype) for _ in lefts]
        for first in range(0, height, step):
            check()
            end = min(first + step, height)
            rows = read_rows(top + first, top + end)
            for values, left in zip(parts, lefts, strict=True):
                values[first:end] = rows[:, left : left + width]
        yield from parts


def _spread(length: int, part: int, number: int) -> list[int]:
    """Return the first pixels of parts that lie in the middles of as many equal sections."""
    return [min(max(round((index + 0.5) * length / number - part / 2), 0), length - part) for index in range(number)]


def _variation(pixels: Num[ndarray, "height width channels"]) -> float:
    """Return the standard deviation of some of the pixels."""
    rows, columns = (max(1, count // SAMPLES) for count in pixels.shape[:2])
    return float(pixels[::rows, ::columns].mean(axis=2).std())
