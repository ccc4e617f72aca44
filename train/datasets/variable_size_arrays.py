"""Arrays of different shapes, concatenated in one file that every process memory-maps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

DATA, SHAPES = "values.npy", "shapes.npy"


class VariableSizeArrays(Sequence[ndarray]):
    """Arrays by index; assign to an index to write the array.

    Args:
        values: all values, flat.
        shapes: (arrays, axes).
    """

    def __init__(self, values: ndarray, shapes: ndarray) -> None:
        self._values = values
        self._shapes = shapes
        self._ends = np.cumsum(shapes.prod(axis=1))

    @classmethod
    def create(cls, folder: Path, shapes: Sequence[tuple[int, ...]], dtype: type) -> "VariableSizeArrays":
        """Create the files with undefined values."""
        folder.mkdir(parents=True)
        sizes = np.array(shapes, np.int64)
        np.save(folder / SHAPES, sizes)
        total = int(sizes.prod(axis=1).sum())
        return cls(np.lib.format.open_memmap(folder / DATA, "w+", dtype, (total,)), sizes)

    @classmethod
    def open(cls, folder: Path) -> "VariableSizeArrays":
        """Memory-map the files of ``create``."""
        return cls(np.load(folder / DATA, mmap_mode="r"), np.load(folder / SHAPES))

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, index: int) -> ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        shape = self._shapes[index]
        end = self._ends[index]
        return self._values[end - shape.prod() : end].reshape(shape)

    def __setitem__(self, index: int, array: ndarray) -> None:
        self[index][...] = array
