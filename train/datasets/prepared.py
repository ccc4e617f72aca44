"""All slices of a split, prepared once for the network in files that every worker process memory-maps."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg_trt.errors import InputError
from medseg_trt.imaging.preprocess import (
    Size,
    clip_and_scale,
    for_image,
    prepare,
    prepare_labels,
    resize_and_normalize,
)
from medseg_trt.progress import LOG, track
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.windows import padding_before, recorded_tiles, window_size
from medseg_trt.train.datasets.folder import Case, read_case
from medseg_trt.train.datasets.variable_size_arrays import VariableSizeArrays

EIGHT_BIT = (0.0, 255.0)
IMAGES, LABELS = "images.npy", "labels.npy"
SOURCE_IMAGES, SOURCE_LABELS = "images", "labels"  # folders
WINDOW_SIZES = "window_sizes.npy"


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSlices:
    """The slices of a split at the network's size or, for augmentation first, at their source's size.

    Images are (slices, 3, height, width) float32, labels (slices, height, width) uint8, mapped from disk. At the
    source's size they differ in shape, grey slices have one channel, and values are 0 … 1.
    """

    images: np.ndarray | VariableSizeArrays
    labels: np.ndarray | VariableSizeArrays
    slices_of_class: tuple[np.ndarray, ...]  # for every label, the slices that contain it
    resized_as: Preprocessing | None = None  # the remaining preprocessing, at the source's size

    def draw(self, index: int, label: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return a slice for augmentation, or a part of it; ``label`` was drawn before the slice, which holds it."""
        return np.array(self.images[index]), np.array(self.labels[index])

    def finish(self, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a slice, after optional augmentation, as the network's input."""
        if self.resized_as is None:
            return image, labels
        return resize_and_normalize(image, self.resized_as, None), prepare_labels(labels, self.resized_as, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowedSlices(PreparedSlices):
    """Slices at their source's size, of which windows are drawn as ``tiling`` cuts them out of an image."""

    window_sizes: np.ndarray  # (slices, 2): height and width in pixels of the source
    stretched: Preprocessing  # of a window, which has the network's spacing by its size

    def draw(self, index: int, label: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return a random window of a slice as the network's input; with ``label``, one that holds a pixel of it."""
        image, labels = self.images[index], self.labels[index]
        window = (int(self.window_sizes[index, 0]), int(self.window_sizes[index, 1]))
        pixel = None if label is None else np.unravel_index(rng.choice(np.flatnonzero(labels == label)), labels.shape)
        start = (
            _start(labels.shape[0], window[0], None if pixel is None else int(pixel[0]), rng),
            _start(labels.shape[1], window[1], None if pixel is None else int(pixel[1]), rng),
        )
        return (
            resize_and_normalize(cut(image, start, window), self.stretched, None),
            prepare_labels(cut(labels, start, window), self.stretched, None),
        )


def _start(length: int, window: int, pixel: int | None, rng: np.random.Generator) -> int:
    """Draw where a window begins on an axis; with ``pixel``, so that it holds this pixel."""
    last = max(length - window, 0)
    if pixel is None:
        return int(rng.integers(last + 1))
    return int(rng.integers(min(max(pixel - window + 1, 0), last), min(pixel, last) + 1))


def cut(array: np.ndarray, start: tuple[int, int], window: tuple[int, int]) -> np.ndarray:
    """Return a window of the last two axes; an axis that is shorter is padded with zeros on both sides."""
    part = array[..., start[0] : start[0] + window[0], start[1] : start[1] + window[1]]
    missing = [size - length for size, length in zip(window, part.shape[-2:], strict=True)]
    before = [padding_before(length, size) for size, length in zip(window, part.shape[-2:], strict=True)]
    sides = [(first, all_ - first) for first, all_ in zip(before, missing, strict=True)]
    return np.pad(part, [*[(0, 0)] * (array.ndim - 2), *sides])


def mapped_slices(
    folder: Path, slices_of_class: tuple[np.ndarray, ...], resized_as: Preprocessing | None = None
) -> PreparedSlices:
    """Memory-map the slices that ``prepare_slices`` or ``source_slices`` wrote, in any process.

    Args:
        folder: that they are in.
        slices_of_class: as written.
        resized_as: the preprocessing of slices at their source's size; where it has windows, windows are drawn.
    """
    if resized_as is None:
        images, labels = (np.load(folder / name, mmap_mode="r") for name in (IMAGES, LABELS))
    else:
        images, labels = (VariableSizeArrays.open(folder / name) for name in (SOURCE_IMAGES, SOURCE_LABELS))
        if resized_as.windows is not None:
            return WindowedSlices(
                images=images,
                labels=labels,
                slices_of_class=slices_of_class,
                window_sizes=np.load(folder / WINDOW_SIZES),
                stretched=replace(resized_as, spacing_mm=None),
            )
    return PreparedSlices(images=images, labels=labels, slices_of_class=slices_of_class, resized_as=resized_as)


def prepare_slices(
    cases: Sequence[Case], preprocessing: Preprocessing, num_labels: int, folder: Path
) -> PreparedSlices:
    """Read, check and prepare every slice of ``cases`` into two files in ``folder``.

    Every mask is checked before training: on a GPU a label out of range causes an error that names no file.

    Raises:
        InputError: a file cannot be used, or the disk is too full.
    """
    height, width = preprocessing.image_size
    total = len(_shapes(cases, num_labels))
    _require_room(total * height * width * (3 * 4 + 1), folder)
    images = np.lib.format.open_memmap(folder / IMAGES, "w+", np.float32, (total, 3, height, width))
    labels = np.lib.format.open_memmap(folder / LABELS, "w+", np.uint8, (total, height, width))
    holds = np.zeros((total, num_labels), bool)
    unscaled: list[str] = []
    index = 0
    for case in track(cases, "prepare the slices"):
        image, masks = read_case(case, num_labels)
        image_preprocessing = for_image(preprocessing, image.pixels)
        unscaled += _unlike_window(case, image.pixels, image_preprocessing)
        for pixels, mask in zip(image.pixels, masks, strict=True):
            images[index] = prepare(pixels, image_preprocessing, image.spacing_in_plane)
            labels[index] = prepare_labels(mask, image_preprocessing, image.spacing_in_plane)
            holds[index, np.unique(labels[index])] = True
            index += 1
    _warn_of_unscaled(unscaled)
    return PreparedSlices(images=images, labels=labels, slices_of_class=_slices_of_class(holds))


def source_slices(cases: Sequence[Case], preprocessing: Preprocessing, num_labels: int, folder: Path) -> PreparedSlices:
    """Read and check every slice of ``cases``, and keep them at their own size in ``folder``, values scaled to 0 … 1.

    Where the preprocessing has windows, the size of each slice's windows is kept, too.

    Raises:
        InputError: a file cannot be used, or the disk is too full.
    """
    shapes = _shapes(cases, num_labels)
    _require_room(sum(height * width * (4 * channels + 1) for channels, height, width in shapes), folder)
    images = VariableSizeArrays.create(folder / SOURCE_IMAGES, shapes, np.float32)
    labels = VariableSizeArrays.create(folder / SOURCE_LABELS, [shape[1:] for shape in shapes], np.uint8)
    tiles = recorded_tiles(preprocessing)
    window_sizes: list[Size] = []
    holds = np.zeros((len(shapes), num_labels), bool)
    unscaled: list[str] = []
    index = 0
    for case in track(cases, "prepare the slices"):
        image, masks = read_case(case, num_labels)
        image_preprocessing = for_image(preprocessing, image.pixels)
        unscaled += _unlike_window(case, image.pixels, image_preprocessing)
        if tiles is not None:
            window_sizes += [window_size(tiles, preprocessing, image.spacing_in_plane)] * image.num_slices
        for pixels, mask in zip(image.pixels, masks, strict=True):
            images[index], labels[index] = clip_and_scale(pixels, image_preprocessing), mask
            holds[index, np.unique(mask)] = True
            index += 1
    _warn_of_unscaled(unscaled)
    if tiles is not None:
        np.save(folder / WINDOW_SIZES, np.array(window_sizes))
    return PreparedSlices(
        images=images, labels=labels, slices_of_class=_slices_of_class(holds), resized_as=preprocessing
    )


def _require_room(needed_bytes: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if needed_bytes > shutil.disk_usage(folder).free:
        raise InputError(
            f"the disk of {folder} has no room for {needed_bytes / 1e9:.1f} GB of prepared slices; "
            "choose another with -o"
        )


def _shapes(cases: Sequence[Case], num_labels: int) -> list[tuple[int, int, int]]:
    """Return channels, height and width of every slice, after checking its mask."""
    shapes: list[tuple[int, int, int]] = []
    for case in track(cases, "check the masks"):
        image, _ = read_case(case, num_labels)
        shapes += [(image.pixels.shape[3], *image.size)] * image.num_slices
    return shapes


def _slices_of_class(holds: np.ndarray) -> tuple[np.ndarray, ...]:
    return tuple(np.flatnonzero(column) for column in holds.T)


def _warn_of_unscaled(unscaled: Sequence[str]) -> None:
    if unscaled:
        LOG.warning(
            '%d case(s) do not have values of 0 … 255, but the window does; set "window" in dataset.json: %s',
            len(unscaled),
            unscaled[0],
        )


def _unlike_window(case: Case, pixels: np.ndarray, preprocessing: Preprocessing) -> list[str]:
    """Warn of a case whose values exceed the 8-bit window and would become all black or white."""
    low, high = pixels.min(), pixels.max()
    fits = pixels.dtype == np.uint8 or (low >= 0 and 1 < high <= EIGHT_BIT[1])
    if fits or preprocessing.window != EIGHT_BIT:
        return []
    return [f"{case.name} runs from {low:g} to {high:g}"]
