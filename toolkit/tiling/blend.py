"""Blend the logits of overlapping windows, a row of windows at a time.

Memory holds the logits of one row of windows: it depends on the width of the image, not on its height.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float32, Num
from numpy import ndarray

from medseg_trt.imaging.preprocess import Size
from medseg_trt.imaging.segment import Run
from medseg_trt.tiling.windows import starts, weights

ReadRows = Callable[[int, int], Num[ndarray, "rows width channels"]]  # rows from, and up to, of an image


def blended_rows(
    run: Run, read_rows: ReadRows, size: Size, window: Size, overlap: float, batch: int
) -> Iterator[tuple[int, Float32[ndarray, "classes rows width"]]]:
    """Yield the first row and the blended logits of consecutive bands of an image that is at least a window large.

    Args:
        run: raw windows (batch, height, width, channels) to logits (batch, classes, height, width).
        read_rows: gives the image's rows; every row is asked for once for each row of windows that covers it.
        size: of the image.
        window: its height and width in pixels of the image.
        overlap: of neighbouring windows, 0 … 1 exclusive.
        batch: windows per call of ``run``.
    """
    height, width = size
    weight = weights(window)
    columns = starts(width, window[1], overlap)
    total: ndarray | None = None
    count = np.zeros((window[0], width), np.float32)
    previous = 0
    for top in starts(height, window[0], overlap):
        if total is not None and (done := top - previous):
            yield previous, total[:, :done] / count[:done]
            _move_up(total, done)
            _move_up(count, done)
        previous = top
        band = read_rows(top, top + window[0])
        for first in range(0, len(columns), batch):
            lefts = columns[first : first + batch]
            logits = run(np.stack([band[:, left : left + window[1]] for left in lefts]))
            if total is None:
                total = np.zeros((logits.shape[1], *count.shape), np.float32)
            for left, of_window in zip(lefts, logits, strict=True):
                total[:, :, left : left + window[1]] += weight * of_window
                count[:, left : left + window[1]] += weight
    assert total is not None
    total /= count
    yield previous, total


def _move_up(values: ndarray, rows: int) -> None:
    """Drop the first rows of (…, rows, columns) and append as many zeros, in place."""
    kept = values.shape[-2] - rows
    values[..., :kept, :] = values[..., rows:, :]
    values[..., kept:, :] = 0
