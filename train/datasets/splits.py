"""Divide cases into training, validation and test, by file, never by slice: neighbouring slices are near-duplicates.

``shuffle_split`` and ``group_split`` return the same indices as scikit-learn's ``train_test_split`` and
``GroupShuffleSplit``, which the papers' code calls; both use one permutation of NumPy's legacy generator.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from medseg_trt.errors import InputError

Case = TypeVar("Case")

VALIDATION_SHARE = 0.2
TEST_SHARE = 0.2
PAPER_SEED = 41
GAP_SLICES = 3  # gap between two blocks of slices of one patient


def shuffle_split(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return (rest, held out) of the indices 0 … ``count`` - 1, each in the order in which it was drawn.

    Raises:
        InputError: one of the two would be empty.
    Source: scikit-learn 1.9, ``train_test_split(range(count), test_size=share, random_state=seed)``.
    """
    held_out = math.ceil(share * count)
    if not 0 < held_out < count:
        raise InputError(f"{count} case(s) cannot be divided; give at least two")
    order = np.random.RandomState(seed).permutation(count).tolist()  # scikit-learn's generator
    return order[held_out:], order[:held_out]


def group_split(groups: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Return (rest, held out) of the indices of ``groups``, in ascending order; no group is in both.

    ``share`` is of the groups, not of the cases.

    Raises:
        InputError: there is a single group.
    Source: scikit-learn 1.9, ``GroupShuffleSplit(test_size=share, random_state=seed)``.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        raise InputError(f"all cases are of {len(names)} group(s), which cannot be divided; give at least two")
    _, chosen = shuffle_split(len(names), share, seed)
    held_out = {names[index] for index in chosen}
    parts: tuple[list[int], list[int]] = [], []
    for index, group in enumerate(groups):
        parts[group in held_out].append(index)
    return parts


def paper_split(
    cases: Sequence[Case], seed: int = PAPER_SEED, groups: Sequence[str] | None = None
) -> dict[str, tuple[Case, ...]]:
    """Hold out a fifth of the cases for the test, then a fifth of the rest for validation, with the same seed twice.

    With ``groups``, one of each case, a fifth of the groups, and no group is in two splits.

    Raises:
        InputError: there are too few cases or groups.
    Source: Jiang & Liu 2024; UNeXt's ``train.py``, from which their protocol is taken.
    """

    def divide(indices: Sequence[int], share: float) -> tuple[list[int], list[int]]:
        if groups is None:
            rest, held_out = shuffle_split(len(indices), share, seed)
        else:
            rest, held_out = group_split([groups[index] for index in indices], share, seed)
        return [indices[position] for position in rest], [indices[position] for position in held_out]

    rest, test = divide(range(len(cases)), TEST_SHARE)
    train, val = divide(rest, VALIDATION_SHARE)
    return {name: tuple(cases[i] for i in part) for name, part in (("train", train), ("val", val), ("test", test))}


def split_seeds(count: int, first: int = PAPER_SEED) -> tuple[int, ...]:
    """Return the seeds of ``count`` splits of the same cases: the paper's, and the numbers after it."""
    return tuple(range(first, first + count))


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
