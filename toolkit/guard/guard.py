"""What a bundle keeps of its training images, and the comparison of an image with it.

The score of a slice is the largest distance of a feature from the range of the training slices, in spreads of that
range. A slice is far outside where its score exceeds a limit, which held-out slices were within but for a stated share.
Source of the limit: split conformal prediction (Papadopoulos et al. 2002); neighbouring slices of a volume are not
independent, so the share holds for slices like the held-out ones alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from medseg_trt.guard.features import (
    BODY,
    CUT,
    DARK_QUANTILE,
    GRID,
    INTENSITIES,
    NAMES,
    SliceFeatures,
    image_features,
    is_inverted,
    vector,
)
from medseg_trt.imaging.images import Image
from medseg_trt.spec import Preprocessing

MAX_FEATURE = 1000.0  # of any; sizes are logarithms to base 2, and no double holds the power of a larger one
MAX_SLICES = 16  # of an image that are compared
GROUPS: Mapping[str, str] = {  # feature -> what a reader calls it
    **dict.fromkeys(INTENSITIES, "intensities"),
    "colour": "colour",
    "roughness": "noise or sharpness",
    "stripes": "stripes",
    "lines": "stripes",
    "similarity": "content",
    "upright": "upside down",
    "sides": "left and right exchanged",
    "pixels": "size in pixels",
    "extent": "size in millimetres",
    "aspect": "shape",
}
TURNS = ("upright", "sides")  # they change their signs in an inverted image as well


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureRange:
    """The range of one feature in the training slices."""

    low: float  # 1 % are below
    high: float  # 1 % are above
    spread: float  # unit of the distance outside

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, self.spread)
        if not (all(abs(number) <= MAX_FEATURE for number in numbers) and self.spread > 0 and self.low <= self.high):
            raise ValueError(f"the range of a feature lies within ±{MAX_FEATURE:g}, and its spread is positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What training images looked like, and the limit of the score."""

    ranges: Mapping[str, FeatureRange]  # by feature
    template: tuple[tuple[float, ...], ...]  # mean training slice, 8 x 8, 0 … 1
    limit: float
    false_alarms: float  # largest share of slices like the held-out ones that exceed the limit, 0 … 1
    training_slices: int
    held_out_slices: int
    held_out_cases: int

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.ranges) - set(NAMES)):
            raise ValueError(f"no feature is called {unknown[0]!r}")
        if {len(row) for row in self.template} != {GRID} or len(self.template) != GRID:
            raise ValueError(f"the template has {GRID} rows and columns")
        if not (isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"the limit is {self.limit}; it must be a positive number")

    def distances(self, values: Float64[ndarray, " features"]) -> Float64[ndarray, " features"]:
        """Return how far each feature of a slice is outside of its range, in spreads; 0 inside and where unknown."""
        distances = np.zeros(len(NAMES))
        for index, name in enumerate(NAMES):
            if (known := self.ranges.get(name)) is not None and np.isfinite(values[index]):
                outside = max(known.low - values[index], values[index] - known.high, 0.0)
                distances[index] = outside / known.spread
        return distances

    @property
    def largest_side(self) -> float | None:
        """The square root of the pixels of the largest training images; None where it is not known."""
        known = self.ranges.get("pixels")
        return None if known is None else 2.0**known.high

    def text(self) -> str:
        """Say in one line what the guard knows."""
        return (
            f"{self.training_slices} training slices; at most {100 * self.false_alarms:.1f} % false alarms, by slice, "
            f"on {self.held_out_slices} held-out slices of {self.held_out_cases} case(s)"
        )


def unusual(guard: Guard, image: Image, preprocessing: Preprocessing) -> str | None:
    """Return in which way an image is far outside of the training images; None: it is not.

    A volume is far outside where more than half of its compared slices are.
    """
    return unusual_slices(guard, image_features(image, preprocessing, MAX_SLICES), preprocessing)


def unusual_slices(guard: Guard, slices: Sequence[SliceFeatures], preprocessing: Preprocessing) -> str | None:
    """Return in which way more than half of the slices are far outside of the training images; None: they are not."""
    template = np.array(guard.template)
    vectors = np.array([vector(slice_, template) for slice_ in slices])
    distances = np.array([guard.distances(values) for values in vectors])
    if (distances.max(axis=1) > guard.limit).mean() <= 0.5:
        return None
    typical = np.median(distances, axis=0)
    order = np.argsort(-typical, kind="stable")
    far = [NAMES[index] for index in order if typical[index] > guard.limit]
    shown = vectors
    if not far:  # the slices differ in various features: name the one in which most of them do, and how these do
        is_far = distances > guard.limit
        most = int(is_far.sum(axis=0).argmax())
        far, shown = [NAMES[most]], vectors[is_far[:, most]]
    inverted = "similarity" in far and np.mean([is_inverted(slice_, template) for slice_ in slices]) > 0.5
    if inverted:
        far = ["similarity", *(name for name in far if name not in (*TURNS, "similarity"))]
    reasons: dict[str, str] = {}
    for name in far:
        index = NAMES.index(name)
        reasons.setdefault(GROUPS[name], _reason(name, float(np.median(shown[:, index])), guard, preprocessing))
    return ("inverted intensities: " if inverted else "") + "; ".join(reasons.values())


def _reason(name: str, value: float, guard: Guard, preprocessing: Preprocessing) -> str:
    known = guard.ranges[name]
    if name in INTENSITIES:
        low, high = (0.0, 1.0) if preprocessing.own_window else preprocessing.window
        raw = [low + number * (high - low) for number in (value, known.low, known.high)]
        cut = " or less" if value <= CUT[0] else " or more" if value >= CUT[1] else ""
        percent = 100 * BODY.get(name, DARK_QUANTILE)
        which = f"{percent:.0f} % quantile" + (" without the dark" if name in BODY else "")
        return f"intensities ({which} {raw[0]:.4g}{cut}, in training {raw[1]:.4g} … {raw[2]:.4g})"
    if name in ("pixels", "extent", "aspect"):
        number, low, high = (2.0**exponent for exponent in (value, known.low, known.high))
        return f"{GROUPS[name]} ({number:.3g}, in training {low:.3g} … {high:.3g})"
    return f"{GROUPS[name]} ({name} {value:.2f}, in training {known.low:.2f} … {known.high:.2f})"
