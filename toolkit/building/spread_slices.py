"""Choose slices of many images, evenly spread, and prepare what a network gets of them: whole slices, or windows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import Size, Spacing, for_image, prepare
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.segment import window_inputs
from medseg_trt.tiling.windows import Tiles, num_windows, recorded_tiles, starts, window_size

MAX_WINDOWS_OF_SIDE = 4  # of a slice; of a larger one, a part is taken, or few slices of a slide would be all there is

Inputs = Float32[ndarray, "_ 3 height width"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SpreadSlice:
    """A slice, or the part of a large one that is taken where the network sees windows."""

    case: str
    size: Size
    labels: ndarray | None  # (height, width)
    spacing: Spacing | None
    window: Size | None  # pixels of the image; None: the slice is prepared as a whole
    num_inputs: int
    inputs: Callable[[], Inputs]  # prepares windows when it is called, as they take more memory than the slice


def spread_slices(
    preprocessing: Preprocessing, cases: Iterator[tuple[str, Image, ndarray | None]], per_case: int
) -> Iterator[SpreadSlice]:
    """Yield up to ``per_case`` slices of every case, without those of one grey, which all look alike."""
    tiles = recorded_tiles(preprocessing)
    for name, image, labels in cases:
        image_preprocessing = for_image(preprocessing, image.pixels)
        window = None if tiles is None else window_size(tiles, preprocessing, image.spacing_in_plane)
        parts = [
            _part(image.size, None if labels is None else labels[number], window, tiles)
            for number in range(image.num_slices)
        ]
        varied = [
            number for number, part in enumerate(parts) if _is_varied(image.pixels[number][part], image_preprocessing)
        ]
        for number in (varied[index] for index in evenly_spread(len(varied), per_case)):
            pixels, of_slice = image.pixels[number][parts[number]], None if labels is None else labels[number]
            yield SpreadSlice(
                case=name,
                size=pixels.shape[:2],
                labels=None if of_slice is None else of_slice[parts[number]].copy(),
                spacing=image.spacing_in_plane,
                window=window,
                num_inputs=1
                if tiles is None or window is None
                else num_windows(pixels.shape[:2], window, tiles.overlap),
                inputs=_inputs(pixels, image_preprocessing, image.spacing_in_plane, window, tiles),
            )


def _inputs(
    pixels: ndarray,
    image_preprocessing: Preprocessing,
    spacing: Spacing | None,
    window: Size | None,
    tiles: Tiles | None,
) -> Callable[[], Inputs]:
    if tiles is None or window is None:
        prepared = prepare(pixels, image_preprocessing, spacing)[np.newaxis]
        return lambda: prepared
    kept = pixels.copy()  # not the whole image
    return lambda: window_inputs(kept, image_preprocessing, window, tiles.overlap)


def spread_inputs(slices: Sequence[SpreadSlice], count: int) -> list[tuple[str, ndarray]]:
    """Return the case and the network's input of every slice, or its most varied windows, ``count`` or more in all."""
    per_slice = -(-count // max(len(slices), 1))
    return [(item.case, inputs) for item in slices for inputs in _most_varied(item.inputs(), per_slice)]


def evenly_spread(length: int, count: int) -> list[int]:
    """Return up to ``count`` indices of a sequence, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(int)).tolist()


def _most_varied(inputs: Inputs, count: int) -> Inputs:
    """Return the inputs with the largest deviation in their order: others may be of nothing but the background."""
    deviation = inputs.std(axis=(1, 2, 3))
    return inputs[np.sort(np.argsort(-deviation, kind="stable")[:count])]


def _is_varied(pixels: ndarray, image_preprocessing: Preprocessing) -> bool:
    clipped = pixels.clip(*image_preprocessing.window)
    return bool(clipped.min() != clipped.max())


def _part(size: Size, labels: ndarray | None, window: Size | None, tiles: Tiles | None) -> tuple[slice, slice]:
    """Return the part of a slice that is taken, about the middle of what is labelled, else of the slice."""
    if tiles is None or window is None:
        return slice(None), slice(None)
    labelled = None if labels is None or not labels.any() else np.nonzero(labels)
    rows, columns = (
        _span(length, of_window, tiles.overlap, None if labelled is None else labelled[axis])
        for axis, (length, of_window) in enumerate(zip(size, window, strict=True))
    )
    return rows, columns


def _span(length: int, window: int, overlap: float, labelled: ndarray | None) -> slice:
    first = starts(max(length, window), window, overlap)
    if len(first) <= MAX_WINDOWS_OF_SIDE:
        return slice(0, length)
    taken = first[MAX_WINDOWS_OF_SIDE - 1] + window
    middle = length // 2 if labelled is None else (int(labelled.min()) + int(labelled.max()) + 1) // 2
    start = min(max(middle - taken // 2, 0), length - taken)
    return slice(start, start + taken)
