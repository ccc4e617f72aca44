"""Apply post-processing to a single slice whose rows come in bands: to the same bytes as ``apply.postprocess``.

The raw mask waits compressed on the disk. It is read three times: components are numbered band by band and joined where
bands touch; then the same with the holes of what stays; then every band is corrected. Memory holds a band, and 17 bytes
of every component, of which there is a limit.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from numpy import ndarray

from medseg_trt.errors import require
from medseg_trt.postprocess.apply import pixel_size
from medseg_trt.postprocess.steps import ClassSteps, Postprocessing
from medseg_trt.progress import LOG
from medseg_trt.spec import Classes

MAX_COMPONENTS = 1 << 24  # of a class, and of its holes
MAX_ROWS = 128  # of a band: what is numbered at once
WITH_CORNERS, SIDES_ALONE = 8, 4  # neighbours that join pixels of a component, and those of a hole
NONE = -1  # the component of a pixel that is in none

Band = UInt8[ndarray, "rows width"]


class TooManyComponentsError(Exception):
    """A mask is too ragged for its components to be counted."""


class Components:
    """Numbers the connected components of a binary mask, band by band from the top."""

    def __init__(self, neighbours: int) -> None:
        """Choose which pixels touch: ``WITH_CORNERS`` or ``SIDES_ALONE``."""
        self._cc3d = require("cc3d", "medical")
        self._neighbours = neighbours
        self._parent = np.empty(0, np.int64)  # of every component, among those of lower number; itself for a root
        self._sizes: list[ndarray] = []  # by band
        self._at_border: list[ndarray] = []  # whether a component touches the left or right border
        self._last: ndarray | None = None  # components of the row above the next band
        self._first_row = np.empty(0, np.int64)
        self.count = 0

    def number(self, mask: Bool[ndarray, "rows width"], first: int) -> Int32[ndarray, "rows width"]:
        """Return the component of every pixel of a band whose components begin with a number; ``NONE`` elsewhere."""
        local = self._cc3d.connected_components(mask, connectivity=self._neighbours)
        return np.where(mask, local.astype(np.int32) + (first - 1), NONE)

    def add(self, mask: Bool[ndarray, "rows width"]) -> None:
        """Take the next band.

        Raises:
            TooManyComponentsError: there are more than ``MAX_COMPONENTS``.
        """
        numbers = self.number(mask, self.count)
        new = max(int(numbers.max()) + 1 - self.count, 0)
        if self.count + new > MAX_COMPONENTS:
            raise TooManyComponentsError
        self._grow(self.count + new)
        self._sizes.append(np.bincount(numbers[mask] - self.count, minlength=new))
        beside = np.zeros(new, bool)
        for column in (numbers[:, 0], numbers[:, -1]):
            beside[column[column != NONE] - self.count] = True
        self._at_border.append(beside)
        if self._last is None:
            self._first_row = numbers[0].copy()
        else:
            self._join(self._last, numbers[0])
        self._last = numbers[-1].copy()
        self.count += new

    def roots(self) -> Int64[ndarray, " components"]:
        """Return the lowest number of the pieces of every component, which stands for it."""
        roots = self._parent[: self.count]
        while (higher := roots[roots] != roots).any():
            roots[higher] = roots[roots[higher]]
        return roots

    def sizes(self) -> Int64[ndarray, " components"]:
        """Return the pixels of every component, at its root; 0 elsewhere."""
        total = np.zeros(self.count, np.int64)
        np.add.at(total, self.roots(), _joined(self._sizes))
        return total

    def at_border(self) -> Bool[ndarray, " components"]:
        """Return whether every component touches a border of the image."""
        roots, touching = self.roots(), np.zeros(self.count, bool)
        touching[roots[_joined(self._at_border).astype(bool)]] = True
        for row in (self._first_row, self._last if self._last is not None else self._first_row):
            touching[roots[row[row != NONE]]] = True
        return touching[roots]

    def _join(self, above: ndarray, below: ndarray) -> None:
        width = len(above)
        shifts = (-1, 0, 1) if self._neighbours == WITH_CORNERS else (0,)
        pairs: list[ndarray] = []
        for shift in shifts:
            upper = above[max(shift, 0) : width + min(shift, 0)]
            lower = below[max(-shift, 0) : width + min(-shift, 0)]
            touch = (upper != NONE) & (lower != NONE)
            pairs.append(np.stack([upper[touch], lower[touch]], axis=1))
        for first, second in np.unique(np.concatenate(pairs), axis=0).tolist():
            one, other = self._root(first), self._root(second)
            self._parent[max(one, other)] = min(one, other)

    def _root(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = int(parent[number])
        return number

    def _grow(self, count: int) -> None:
        if count > len(self._parent):
            more = np.arange(len(self._parent), max(count, 2 * len(self._parent)))
            self._parent = np.concatenate([self._parent, more])


def _joined(parts: Sequence[ndarray]) -> ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


@dataclass(kw_only=True, slots=True)
class _ClassPlan:
    """What becomes of the pixels of one class."""

    label: int
    steps: ClassSteps
    kept: ndarray | None = None  # of the components of the class, whether they stay; None: all do
    filled: ndarray | None = None  # of what lies beside the kept ones, whether it is a hole; None: nothing is filled
    _class: Components = field(default_factory=lambda: Components(WITH_CORNERS))
    _rest: Components = field(default_factory=lambda: Components(SIDES_ALONE))

    def measure(self, bands: Iterable[Band], size: float) -> None:
        """Find the components that stay; ``size`` is that of a pixel in the unit of the steps."""
        if not (self.steps.largest or self.steps.min_size):
            return
        for band in bands:
            self._class.add(band == self.label)
        roots, counts = self._class.roots(), self._class.sizes()
        stays = counts * size >= self.steps.min_size
        if self.steps.largest and len(counts):
            stays &= np.arange(len(counts)) == counts.argmax()
        self.kept = stays[roots]

    def find_holes(self, bands: Iterable[Band]) -> None:
        """Find what the kept components enclose."""
        if not self.steps.fill_holes:
            return
        position = 0
        for band in bands:
            mask, position = self._mask(band, position)
            self._rest.add(~mask)
        self.filled = ~self._rest.at_border()

    def correct(self, bands: Iterable[Band]) -> Iterator[Band]:
        """Yield the bands with this class corrected; those that come may have other classes corrected."""
        position = hole = 0
        for band in bands:
            mask, position = self._mask(band, position)
            band[(band == self.label) & ~mask] = 0
            if self.filled is not None:
                numbers = self._rest.number(~mask, hole)
                hole = max(int(numbers.max()) + 1, hole)
                inside = (numbers != NONE) & (band == 0)
                inside[inside] = self.filled[numbers[inside]]
                band[inside] = self.label
            yield band

    def _mask(self, band: Band, position: int) -> tuple[Bool[ndarray, "rows width"], int]:
        """Return the kept pixels of the class, and the number of the next component."""
        mask = band == self.label
        if self.kept is None or not mask.any():
            return mask, position
        numbers = self._class.number(mask, position)
        stays = np.zeros(mask.shape, bool)
        stays[mask] = self.kept[numbers[mask]]
        return stays, int(numbers.max()) + 1


class _Spool:
    """Bands in a temporary file, to be read any number of times."""

    def __init__(self, file: IO[bytes], bands: Iterable[Band]) -> None:
        self._file, self._stored = file, list[tuple[int, int, tuple[int, ...]]]()
        for band in bands:
            for first in range(0, len(band), MAX_ROWS):
                part = np.ascontiguousarray(band[first : first + MAX_ROWS])
                packed = zlib.compress(part.data, 1)
                self._stored.append((file.tell(), len(packed), part.shape))
                file.write(packed)

    def read(self, check: Callable[[], None]) -> Iterator[Band]:
        for offset, count, shape in self._stored:
            check()
            self._file.seek(offset)
            yield np.frombuffer(zlib.decompress(self._file.read(count)), np.uint8).reshape(shape).copy()


def postprocessed_bands(
    bands: Iterable[Band],
    size: tuple[int, int],
    post: Postprocessing,
    classes: Classes,
    spacing_mm: tuple[float, float] | None,
    folder: Path,
    name: str,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Band]:
    """Yield the corrected rows of an image; a mask with too many components stays raw, which is said.

    Args:
        bands: of raw labels, from the top to the bottom.
        size: of the image.
        post: the steps; they apply to this image, see ``apply.unsuited``.
        classes: the names of the labels.
        spacing_mm: between rows and columns, where ``post`` has sizes in millimetres.
        folder: for the temporary file.
        name: of the image, for messages.
        check: called for every band; what it raises ends the work.

    Raises:
        MissingExtraError: cc3d is not installed.
    """
    of_pixel = pixel_size(post.unit, (1, *size), None if spacing_mm is None else (0.0, *spacing_mm))
    plans = [_ClassPlan(label=classes.names.index(steps.name), steps=steps) for steps in post.classes]
    with TemporaryFile(dir=folder) as file:
        spool = _Spool(file, bands)
        try:
            for plan in plans:
                plan.measure(spool.read(check), of_pixel)
                plan.find_holes(spool.read(check))
        except TooManyComponentsError:
            LOG.warning("%s is not post-processed: its mask has more than %d components", name, MAX_COMPONENTS)
            plans = []
        corrected = spool.read(check)
        for plan in plans:
            corrected = plan.correct(corrected)
        yield from corrected
