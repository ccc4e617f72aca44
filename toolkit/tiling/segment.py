"""Segment the slices of an image window by window: each window is prepared as a whole image is."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Num, UInt8
from numpy import ndarray

from medseg_trt.errors import UsageError
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import Size, for_image, labels_of, prepare, resize
from medseg_trt.imaging.segment import PixelRun, Run
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.blend import ReadRows, blended_rows
from medseg_trt.tiling.windows import Tiles, padding_before, starts, window_size

WINDOWS = 4  # per run of the network


def tiled(run: Run, image: Image, preprocessing: Preprocessing, tiles: Tiles) -> PixelRun:
    """Return the function from raw slices of an image to their labels.

    Args:
        run: the network.
        image: its values set the window of intensities where the preprocessing takes each image's own.
        preprocessing: of the network.
        tiles: how the image is cut.

    Raises:
        UsageError: the preprocessing resizes with splines, whose labels have no logits at the image's size.
    """
    check_tiles(preprocessing)
    image_preprocessing = for_image(preprocessing, image.pixels)
    window = window_size(tiles, preprocessing, image.spacing_in_plane)

    def labels(slices: ndarray) -> ndarray:
        return np.stack([_labels(run, pixels, image_preprocessing, window, tiles.overlap) for pixels in slices])

    return labels


def with_mpp(image: Image, tiles: Tiles | None) -> Image:
    """Return a 2-D image whose file names no spacing with that of ``tiles``, if they have one."""
    if tiles is None or tiles.mpp is None or image.geometry is not None or image.spacing_mm is not None:
        return image
    return replace(image, spacing_mm=(tiles.mpp / 1000,) * 3)


def check_tiles(preprocessing: Preprocessing) -> None:
    """Refuse a preprocessing that windows cannot have.

    Raises:
        UsageError: it resizes with splines.
    """
    if preprocessing.resizes_with_splines:
        raise UsageError(f"the network resizes with {preprocessing.resize}, which windows cannot; leave --tile out")


def window_run(run: Run, image_preprocessing: Preprocessing, window: Size) -> Run:
    """Return the function from raw windows (batch, height, width, channels) to logits of the windows' size."""
    stretched = _stretched(image_preprocessing)

    def logits_of(windows: ndarray) -> ndarray:
        return _at_size(run(np.stack([prepare(pixels, stretched, None) for pixels in windows])), window)

    return logits_of


def window_inputs(
    pixels: Num[ndarray, "height width channels"], image_preprocessing: Preprocessing, window: Size, overlap: float
) -> Float32[ndarray, "windows 3 image_height image_width"]:
    """Return the windows of a slice as the network's input, row by row, as ``label_rows`` gives them to the network."""
    padded = _Padded(
        read_rows=_rows_of(pixels), size=pixels.shape[:2], window=window, value=image_preprocessing.window[0]
    )
    stretched = _stretched(image_preprocessing)
    height, width = padded.padded_size
    bands = (padded(top, top + window[0]) for top in starts(height, window[0], overlap))
    lefts = starts(width, window[1], overlap)
    return np.stack([prepare(band[:, left : left + window[1]], stretched, None) for band in bands for left in lefts])


def labels_of_windows(
    logits: Float32[ndarray, "windows classes image_height image_width"], size: Size, window: Size, overlap: float
) -> UInt8[ndarray, "height width"]:
    """Return the labels of a slice of this size from the logits of its ``window_inputs``."""
    remaining = iter(logits)

    def read_rows(first: int, end: int) -> ndarray:
        return np.empty((end - first, size[1], 0), np.uint8)  # the pixels have been seen

    def next_logits(windows: ndarray) -> ndarray:
        return _at_size(np.stack([next(remaining) for _ in windows]), window)

    padded = _Padded(read_rows=read_rows, size=size, window=window, value=0.0)
    return _joined(_label_rows(next_logits, padded, overlap), size)


def _labels(run: Run, pixels: ndarray, image_preprocessing: Preprocessing, window: Size, overlap: float) -> ndarray:
    size = pixels.shape[:2]
    return _joined(label_rows(run, _rows_of(pixels), size, image_preprocessing, window, overlap), size)


def _joined(bands: Iterable[tuple[int, ndarray]], size: Size) -> ndarray:
    labels = np.empty(size, np.uint8)
    for start, band in bands:
        labels[start : start + len(band)] = band
    return labels


def _rows_of(pixels: ndarray) -> ReadRows:
    return lambda first, end: pixels[first:end]


def _stretched(image_preprocessing: Preprocessing) -> Preprocessing:
    return replace(image_preprocessing, spacing_mm=None)  # a window has the spacing of the network by its size


def _at_size(logits: ndarray, window: Size) -> ndarray:
    return logits if logits.shape[2:] == window else resize(logits, window, "linear")


def label_rows(
    run: Run, read_rows: ReadRows, size: Size, image_preprocessing: Preprocessing, window: Size, overlap: float
) -> Iterator[tuple[int, UInt8[ndarray, "rows width"]]]:
    """Yield the first row and the labels of consecutive bands of an image; see ``blended_rows``.

    An image that is smaller than a window is padded on all sides with the lower end of the window of intensities.
    """
    padded = _Padded(read_rows=read_rows, size=size, window=window, value=image_preprocessing.window[0])
    return _label_rows(window_run(run, image_preprocessing, window), padded, overlap)


def _label_rows(run_windows: Run, padded: "_Padded", overlap: float) -> Iterator[tuple[int, ndarray]]:
    """Yield bands of labels; ``run_windows`` takes raw windows and returns logits of the windows' size."""
    size = padded.size
    for start, logits in blended_rows(run_windows, padded, padded.padded_size, padded.window, overlap, WINDOWS):
        if not np.isfinite(logits).all():
            raise ValueError(f"logits of the rows from {start} are NaN or infinite")
        first = start - padded.before[0]
        labels = labels_of(logits)[max(-first, 0) : size[0] - first]
        if len(labels):
            yield max(first, 0), labels[:, padded.before[1] : padded.before[1] + size[1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Padded:
    """The rows of an image, padded with ``value`` where it is smaller than a window."""

    read_rows: ReadRows
    size: Size
    window: Size
    value: float

    @property
    def padded_size(self) -> Size:
        return max(self.size[0], self.window[0]), max(self.size[1], self.window[1])

    @property
    def before(self) -> Size:
        """Rows above and columns to the left of the image."""
        return padding_before(self.size[0], self.window[0]), padding_before(self.size[1], self.window[1])

    def __call__(self, first: int, end: int) -> ndarray:
        if self.padded_size == self.size:
            return self.read_rows(first, end)
        (top, left), (height, width) = self.before, self.size
        inside = max(first - top, 0), min(end - top, height)
        pixels = self.read_rows(*inside)
        above, right = inside[0] + top - first, self.padded_size[1] - width - left
        rows = (above, end - first - above - len(pixels))
        fitting = pixels.astype(
            np.result_type(pixels.dtype, np.float32)
        )  # the value may be outside of the pixels' type
        return np.pad(fitting, [rows, (left, right), (0, 0)], constant_values=self.value)
