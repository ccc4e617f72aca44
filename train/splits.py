"""Divide cases into training and validation, by file, never by slice, since neighbouring slices are near-duplicates."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from medseg_trt.errors import InputError

Case = TypeVar("Case")

VALIDATION_SHARE = 0.2
GAP_SLICES = 3  # left out on the border of a block of slices, where one patient must serve for both


def split_files(cases: Sequence[Case], seed: int) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Return (training, validation): a fifth of the files, at least one, is for validation.

    Raises:
        InputError: there are fewer than two files.
    """
    if len(cases) < 2:
        raise InputError(f"{len(cases)} file(s) cannot be divided into training and validation; give at least two")
    order = np.random.default_rng(seed).permutation(len(cases))
    count = math.ceil(VALIDATION_SHARE * len(cases))
    return tuple(cases[i] for i in sorted(order[count:])), tuple(cases[i] for i in sorted(order[:count]))


def split_volume(num_slices: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the half-open slice ranges (training, validation) of a single volume, with a gap between them.

    Raises:
        InputError: the volume is too thin.
    """
    count = math.ceil(VALIDATION_SHARE * num_slices)
    end = num_slices - count - GAP_SLICES
    if end < 1:
        raise InputError(
            f"a single file with {num_slices} slice(s) cannot be divided into training and validation; give two files"
        )
    return (0, end), (num_slices - count, num_slices)
