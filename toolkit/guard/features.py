"""The numbers by which images are compared: a vector of each slice.

Intensities are raw values in units of the network's window (0 its lower end, 1 its upper end), cut at -1 and 2: the
network sees no difference farther out. What neighbouring pixels tell is measured at the network's size, so that it does
not depend on the resolution of the image. Ratios are logarithms to base 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2, sqrt

import numpy as np
from jaxtyping import Float32, Float64, Num
from numpy import ndarray

from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import clip_and_scale, for_image, resize
from medseg_trt.spec import Preprocessing

DARKEST, BODY = "dark", {"body25": 0.25, "body50": 0.5, "body75": 0.75, "body95": 0.95}
DARK_QUANTILE = 0.05  # of all pixels
BODY_FROM = 0.05  # of the window: quantiles of the body are of brighter pixels, so that air around it does not count
INTENSITIES = (DARKEST, *BODY)
FLOORS: Mapping[str, float] = {  # feature -> least spread of training images that is believed
    **dict.fromkeys(INTENSITIES, 0.2),
    "colour": 0.02,  # mean difference of the largest and the smallest channel
    "roughness": 0.5,  # of neighbouring pixels, relative to the slice's standard deviation
    "stripes": 0.6,  # differences between rows by those between columns
    "lines": 1.0,  # the same, of the image's own pixels
    "similarity": 0.15,  # correlation with the mean training slice
    "upright": 0.5,  # correlation of what differs between the upper and the lower half; changes its sign upside down
    "sides": 0.5,  # the same of the left and the right half
    "pixels": 3.0,  # height and width, by a factor of 8
    "extent": 1.0,  # the same in millimetres, by a factor of 2
    "aspect": 1.0,
}
NAMES = tuple(FLOORS)
GRID = 8  # rows and columns of a thumbnail
CUT = (-1.0, 2.0)
INVERTED = 0.5  # least correlation of a slice's negative with the mean training slice that is believed
MAX_SIDE = 256  # of the part whose own pixels are compared
SAMPLES = 4  # rows and columns of a block of pixels that stand for it in large images
MAX_COUNTED = 1 << 14  # pixels that quantiles are taken of, evenly spread
TINY = 1e-3  # of the window; differences below are none

Thumbnail = Float64[ndarray, "8 8"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SliceFeatures:
    """The features of a slice that need no other slice, and its thumbnail."""

    values: Mapping[str, float]
    thumbnail: Thumbnail


def slice_features(
    pixels: Num[ndarray, "height width channels"], p: Preprocessing, spacing_mm: tuple[float, float] | None
) -> SliceFeatures:
    """Return the features of one slice; ``extent`` only with a spacing. ``p`` is that of the image, ``for_image``."""
    low, width = p.window[0], p.window[1] - p.window[0]
    height, columns = pixels.shape[:2]
    step = max(1, round(sqrt(height * columns / MAX_COUNTED)))
    first_row, first_column = (min(step // 2, side - 1) for side in (height, columns))
    few = (pixels[first_row::step, first_column::step].astype(np.float64) - low) / width
    grey = few.mean(axis=2).clip(*CUT)
    body = grey[grey > BODY_FROM]
    seen = resize(clip_and_scale(_reduced(pixels, p), p), p.image_size, "linear_antialias").mean(axis=0)
    quantiles = np.quantile(body, list(BODY.values())).tolist() if body.size else [0.0] * len(BODY)
    between_rows, between_columns = _differences(seen)
    own_rows, own_columns = _differences(grey_part(pixels, p))
    values = {
        DARKEST: float(np.quantile(grey, DARK_QUANTILE)),
        **dict(zip(BODY, quantiles, strict=True)),
        "colour": float((few.max(axis=2) - few.min(axis=2)).mean()),
        "roughness": log2((between_rows + between_columns + TINY) / (float(seen.std()) + TINY)),
        "stripes": log2((between_rows + TINY) / (between_columns + TINY)),
        "lines": log2((own_rows + TINY) / (own_columns + TINY)),
        "pixels": log2(sqrt(height * columns)),
        "aspect": log2(height / columns),
    }
    if spacing_mm is not None:
        values["extent"] = log2(sqrt(height * spacing_mm[0] * columns * spacing_mm[1]))
    return SliceFeatures(values=values, thumbnail=_thumbnail(seen))


def image_features(image: Image, preprocessing: Preprocessing, max_slices: int) -> list[SliceFeatures]:
    """Return the features of up to ``max_slices`` slices, evenly spread."""
    contract = for_image(preprocessing, image.pixels)
    count = min(max_slices, image.num_slices)
    numbers = np.unique(np.linspace(0, image.num_slices - 1, count).round().astype(int))
    return [slice_features(image.pixels[number], contract, image.spacing_in_plane) for number in numbers]


def vector(features: SliceFeatures, template: Thumbnail) -> Float64[ndarray, " features"]:
    """Return all features in the order of ``NAMES``; NaN for those that the slice does not have."""
    seen = features.thumbnail
    values = {
        **features.values,
        "similarity": _correlation(seen, template),
        "upright": _correlation(seen - seen[::-1], template - template[::-1]),
        "sides": _correlation(seen - seen[:, ::-1], template - template[:, ::-1]),
    }
    return np.array([values.get(name, np.nan) for name in NAMES])


def is_inverted(features: SliceFeatures, template: Thumbnail) -> bool:
    """Return whether a slice's negative resembles the mean training slice, more than the slice in any of four turns.

    Turns are those that exchange its halves: upside down, left and right, both, none.
    """
    seen = features.thumbnail
    turned = max(_correlation(copy, template) for copy in (seen, seen[::-1], seen[:, ::-1], seen[::-1, ::-1]))
    return -_correlation(seen, template) > max(turned, INVERTED)


def _reduced(pixels: ndarray, p: Preprocessing) -> ndarray:
    """Return a slice reduced to at least twice the network's size, by the means of up to 4 x 4 pixels of each block."""
    factor = min(have // (2 * take) for have, take in zip(pixels.shape[:2], p.image_size, strict=True))
    if factor < 2:
        return pixels
    number = min(factor, SAMPLES)
    offsets = [(2 * index + 1) * factor // (2 * number) for index in range(number)]
    rows, columns = (size // factor * factor for size in pixels.shape[:2])
    low, high = p.window
    total = np.zeros((rows // factor, columns // factor, pixels.shape[2]), np.float32)
    for row in offsets:
        for column in offsets:
            total += np.clip(pixels[row:rows:factor, column:columns:factor], low, high)
    return total / np.float32(number**2)


def grey_part(
    pixels: Num[ndarray, "height width channels"], p: Preprocessing
) -> Float32[ndarray, "part_height part_width"]:
    """Return the middle of a slice, at most 256 x 256 of its own pixels, in grey, 0 … 1."""
    starts = [max((size - MAX_SIDE) // 2, 0) for size in pixels.shape[:2]]
    part = pixels[starts[0] : starts[0] + MAX_SIDE, starts[1] : starts[1] + MAX_SIDE]
    return clip_and_scale(part, p).mean(axis=0)


def _differences(grey: ndarray) -> tuple[float, float]:
    """Return the mean differences of neighbouring rows, and of neighbouring columns; 0 where there is one alone."""
    rows, columns = (float(np.abs(np.diff(grey, axis=axis)).mean()) if grey.shape[axis] > 1 else 0.0 for axis in (0, 1))
    return rows, columns


def _thumbnail(seen: ndarray) -> Thumbnail:
    """Return a slice at 8 x 8 pixels."""
    return resize(seen, (GRID, GRID), "linear_antialias").astype(np.float64)


def _correlation(thumbnail: ndarray, template: ndarray) -> float:
    """Return the correlation of two thumbnails; 0 where one is of one grey."""
    first, second = thumbnail - thumbnail.mean(), template - template.mean()
    norm = float(np.sqrt(np.square(first).sum() * np.square(second).sum()))
    return float((first * second).sum()) / norm if norm > 1e-9 else 0.0
