"""The form of a result that the page draws: pixels and labels, raw, after a JSON header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.imaging.images import Image, Mask

ALIGNMENT = 8  # bytes: typed arrays of JavaScript begin at multiples of their element's size


def encode_view(header: Mapping[str, Any], image: Image, mask: Mask, window: tuple[float, float]) -> bytes:
    """Return 4 bytes with the length of the JSON (little-endian), the JSON, the pixels and the labels.

    The JSON states where the two begin, and the element type of the pixels.
    """
    pixels = _small(image.pixels)
    content = dict(header) | {
        "dtype": pixels.dtype.name,
        "channels": pixels.shape[3],
        "window": list(_shown_window(pixels, window)),
    }
    space = len(json.dumps(content)) + 100  # for the two positions, which are written into the JSON
    start = -(-(4 + space) // ALIGNMENT) * ALIGNMENT
    content |= {"pixels_start": start, "labels_start": start + pixels.nbytes}
    text = json.dumps(content).encode().ljust(start - 4)
    little = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
    return b"".join((len(text).to_bytes(4, "little"), text, little.tobytes(), mask.labels.tobytes()))


def read_view(path: Path) -> tuple[dict[str, Any], ndarray]:
    """Return the header and the labels (slices, height, width) of a file that holds a view."""
    content = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(content[:4].tobytes(), "little")
    header = json.loads(content[4 : 4 + length].tobytes())
    return header, np.asarray(content[header["labels_start"] :]).reshape(header["shape"])


def _small(pixels: ndarray) -> ndarray:
    """Return pixels in the smallest of the types that a browser has."""
    if pixels.dtype.kind in "iub" and pixels.size:
        low, high = int(pixels.min()), int(pixels.max())
        for dtype in (np.uint8, np.int16):
            limits = np.iinfo(dtype)
            if limits.min <= low and high <= limits.max:
                return np.ascontiguousarray(pixels, dtype)
    return np.ascontiguousarray(pixels, np.float32)


def _shown_window(pixels: ndarray, window: tuple[float, float]) -> tuple[float, float]:
    """Return the model's window, or the range of the pixels where they lie outside it."""
    if pixels.shape[3] == 3:
        return 0.0, 255.0 if pixels.dtype == np.uint8 else float(pixels.max(initial=1))
    low, high = float(pixels.min()), float(pixels.max())
    overlap = min(high, window[1]) - max(low, window[0])
    return window if overlap > 0 else (low, max(high, low + 1))
