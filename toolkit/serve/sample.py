"""A generated picture to try the page with: discs on a dark ground, of no patient."""

import io
from functools import lru_cache

import numpy as np

SCALE = 2  # the sample is this many times as large as the network's input, at most MAX_SIDE
MAX_SIDE = 512
DISCS = ((0.35, 0.35, 0.18, 190), (0.6, 0.65, 0.22, 150), (0.7, 0.3, 0.1, 230))  # row, column, radius, value


@lru_cache(maxsize=8)
def sample_png(image_size: tuple[int, int]) -> bytes:
    """Return the sample as PNG."""
    import PIL.Image

    height, width = (min(SCALE * side, MAX_SIDE) for side in image_size)
    rows, columns = np.indices((height, width)) / np.array([height, width]).reshape(2, 1, 1)
    values = 30 + 20 * rows
    for row, column, radius, value in DISCS:
        values[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = value
    buffer = io.BytesIO()
    PIL.Image.fromarray(values.round().astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()
