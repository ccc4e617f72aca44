"""Learn a guard from training images, and its limit from held-out ones."""

from collections.abc import Iterable
from dataclasses import replace
from math import ceil

import numpy as np

from medseg_trt.guard.features import FLOORS, NAMES, SliceFeatures, image_features, vector
from medseg_trt.guard.guard import FeatureRange, Guard
from medseg_trt.imaging.images import Image
from medseg_trt.spec import Preprocessing

FALSE_ALARMS = 0.05  # of held-out slices
MIN_SLICES = 5  # of either side; of fewer, nothing is learnt
MIN_LIMIT = 1.0  # spreads: what is nearer is not far outside, however alike the held-out slices are
TAIL = 0.01  # of the training slices, left out at either end of a range
PER_IMAGE = 64  # slices


def learn_guard(training: Iterable[Image], held_out: Iterable[Image], preprocessing: Preprocessing) -> Guard | None:
    """Return a guard; None where there are too few slices.

    Args:
        training: the images that the network was trained on, read one by one.
        held_out: other images of the same kind.
        preprocessing: of the network.
    """
    known = [slice_ for image in training for slice_ in image_features(image, preprocessing, PER_IMAGE)]
    held = [image_features(image, preprocessing, PER_IMAGE) for image in held_out]
    other = [slice_ for slices in held for slice_ in slices]
    if min(len(known), len(other)) < MIN_SLICES:
        return None
    template = np.mean([slice_.thumbnail for slice_ in known], axis=0).round(4)
    guard = Guard(
        ranges=_ranges(known, template),
        template=tuple(map(tuple, template.tolist())),
        limit=MIN_LIMIT,
        false_alarms=1.0,
        training_slices=len(known),
        held_out_slices=len(other),
        held_out_cases=len(held),
    )
    scores = sorted(float(guard.distances(vector(slice_, template)).max()) for slice_ in other)
    rank = min(ceil((len(scores) + 1) * (1 - FALSE_ALARMS)), len(scores))
    return replace(guard, limit=max(scores[rank - 1], MIN_LIMIT), false_alarms=1 - rank / (len(scores) + 1))


def _ranges(slices: list[SliceFeatures], template: np.ndarray) -> dict[str, FeatureRange]:
    """Return the range of every feature that all training slices have."""
    values = np.array([vector(slice_, template) for slice_ in slices])
    ranges: dict[str, FeatureRange] = {}
    for name, column in zip(NAMES, values.T, strict=True):
        if np.isfinite(column).all():
            low, high = np.quantile(column, [TAIL, 1 - TAIL]).round(6).tolist()
            ranges[name] = FeatureRange(low=low, high=high, spread=max((high - low) / 2, FLOORS[name]))
    return ranges
