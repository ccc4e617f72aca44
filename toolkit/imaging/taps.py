"""Resize the axes of arrays as weighted sums of source pixels, one tap at a time: the same bits on every machine."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
from numpy import ndarray

from medseg_trt.spec import Resize

KEPT = 16  # taps: those of the rows and columns of the latest image sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Taps:
    """The source pixels and weights whose weighted sum is each pixel of a new axis."""

    index: ndarray  # (taps, pixels): position on the source axis
    weight: ndarray  # (taps, pixels) float32

    def only(self, part: slice) -> "Taps":
        """Return the taps of some pixels of the new axis."""
        return Taps(index=self.index[:, part], weight=self.weight[:, part])


@lru_cache(maxsize=KEPT)
def taps_of(source: int, target: int, method: Resize, start: int, stop: int) -> Taps:
    """Return the taps of pixels ``start`` to ``stop`` of an axis resized from ``source`` to ``target`` pixels."""
    centre = (np.arange(start, stop) + 0.5) * source / target  # in source pixels; pixel i reaches from i to i + 1
    if method == "nearest":
        index = np.clip(np.floor(centre), 0, source - 1).astype(np.intp)[np.newaxis]
        return _read_only(Taps(index=index, weight=np.ones(index.shape, np.float32)))
    support = max(source / target, 1.0) if method == "linear_antialias" else 1.0
    first = np.floor(centre - support + 0.5)
    position = first + np.arange(ceil(2 * support) + 1)[:, np.newaxis]
    weight = np.maximum(1 - np.abs(position + 0.5 - centre) / support, 0)
    weight[(position < 0) | (position >= source)] = 0
    weight /= weight.sum(axis=0)
    used = weight.any(axis=1)
    index = np.clip(position, 0, source - 1).astype(np.intp)
    return _read_only(Taps(index=index[used], weight=weight[used].astype(np.float32)))


def _read_only(taps: Taps) -> Taps:
    taps.index.flags.writeable = taps.weight.flags.writeable = False  # they are shared from here on
    return taps


def apply_taps(array: ndarray, rows: Taps, columns: Taps) -> ndarray:
    """Resize the last two axes, in the order that takes fewer operations."""
    height, width = array.shape[-2:]
    row_work, column_work = rows.index.size, columns.index.size
    rows_first = row_work * width + column_work * rows.index.shape[1]
    columns_first = column_work * height + row_work * columns.index.shape[1]
    if rows_first <= columns_first:
        return sum_columns(sum_rows(array, rows), columns)
    return sum_rows(sum_columns(array, columns), rows)


def sum_rows(array: ndarray, taps: Taps) -> ndarray:
    """Resize the last axis but one."""
    return _sum(array, taps.index, taps.weight[:, :, np.newaxis], axis=-2)


def sum_columns(array: ndarray, taps: Taps) -> ndarray:
    """Resize the last axis."""
    return _sum(array, taps.index, taps.weight, axis=-1)


def _sum(array: ndarray, indices: ndarray, weights: ndarray, axis: int) -> ndarray:
    """Return the weighted sum of the values that the rows of ``indices`` gather along an axis."""
    total = np.take(array, indices[0], axis)  # unlike fancy indexing, ``take`` keeps the memory order of the axes
    total *= weights[0]
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        gathered = np.take(array, index, axis)
        gathered *= weight
        total += gathered
    return total
