"""Convert the values of a mask to labels: whole numbers from 0, or 0 and 255 for one class. Count pixels per label."""

from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from medseg_trt.errors import InputError

# A float mask that is saved with an int16 header and a slope is off by half a step: largest label / 131070, which stays
# below 1e-3 up to label 131. Probabilities and soft edges are further off.
ROUNDING = 1e-3
HALF_BRIGHT = 127  # of 255
MID_GREYS = (32, 223)  # values that a soft edge between 0 and 255 passes through, and few label maps reach
CHUNK_PIXELS = 1 << 22  # counted at once: ``bincount`` copies every pixel to an int64, 32 MiB
MIN_GREYS = 2  # between 0 and the brightest; a single one may as well be a class drawn in grey


def as_labels(values: ndarray, path: Path, num_labels: int | None) -> UInt8[ndarray, "slices height width"]:
    """Return the values of a mask as labels; values within 1e-3 of a whole number are rounded.

    With two labels, 0 and 255 become 0 and 1.

    Args:
        values: as read from the file.
        path: the mask, for messages.
        num_labels: the number of labels, background included; None allows 0 … 255.

    Raises:
        InputError: a value is not a label.
    """
    limit = num_labels or 256
    whole = np.rint(values) if values.dtype.kind == "f" else values
    wrong = (whole < 0) | (whole > 255)
    if values.dtype.kind == "f":
        wrong |= np.abs(values - whole) > ROUNDING
    if not wrong.any():
        labels = whole.astype(np.uint8)
        if num_labels == 2 and not ((labels != 0) & (labels != 255)).any():
            labels //= 255
        wrong = labels >= limit
        if not wrong.any():
            return labels
    offending = [f"{value:g}" for value in np.unique(values[wrong])[:5].tolist()]
    raise InputError(
        f"{path} holds the values {', '.join(offending)} …, but labels range from 0 to {limit - 1}; {_remedy(values)}"
    )


def pixels_per_label(labels: UInt8[ndarray, "..."], num_labels: int) -> Int64[ndarray, " labels"]:
    """Count the pixels of every label from 0 to ``num_labels`` - 1.

    Args:
        labels: of a 2-D image or a volume.
        num_labels: background included; every label is below it.
    """
    counts, flat = np.zeros(num_labels, np.int64), labels.ravel()
    for start in range(0, flat.size, CHUNK_PIXELS):
        counts += np.bincount(flat[start : start + CHUNK_PIXELS], minlength=num_labels)
    return counts


def looks_soft(values: ndarray) -> bool:
    """Return whether the distinct values look like those of a 0/255 mask with soft edges."""
    brightest = values.max(initial=0)
    between = values[(values > 0) & (values < brightest)]
    low, high = MID_GREYS
    is_grey = len(between) >= MIN_GREYS and ((between > low) & (between < high)).any()
    return bool(is_grey and HALF_BRIGHT < brightest <= 255)


def _remedy(values: ndarray) -> str:
    distinct = np.unique(values)
    if looks_soft(distinct):
        return "it looks like 0/255 with soft edges; threshold it, or name the classes"
    if distinct[0] >= 0 and distinct[-1] <= 1:
        return "it looks like probabilities or soft edges; threshold it at 0.5"
    if len(distinct) == 2 and distinct[0] == 0 and distinct[1] > 255:
        return f"it holds only 0 and {distinct[1]:g}; save it with 0 and 1"
    return "check the mask and the list of classes"
