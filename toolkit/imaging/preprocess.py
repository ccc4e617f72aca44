"""Convert decoded pixels to the network's input, and its logits to labels, alike in training and inference.

Resizing is separable: each axis is a short list of taps (source pixel and weight) that are summed one at a time, so
that the same input gives the same bits on every machine. Positions are half-pixel centres: pixel ``i`` of ``n`` lies at
``(i + 0.5) / n``. The splines of TransUNet's protocol are SciPy's, where pixel ``i`` lies at ``i / (n - 1)``.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Num, UInt8
from numpy import ndarray

from medseg_trt.errors import InputError, require
from medseg_trt.imaging.taps import Taps, apply_taps, sum_columns, sum_rows, taps_of
from medseg_trt.spec import SPLINE_ORDERS, Preprocessing, Resize

Size = tuple[int, int]  # height, width in pixels
Spacing = tuple[float, float]  # millimetres between rows, and between columns

BAND_VALUES = 2**17  # logits resized to the source's size at once, so that they stay in the cache
MAX_WIDENED_VALUES = 2**24  # float32: 67 MB


def for_image(p: Preprocessing, pixels: Num[ndarray, "slices height width channels"]) -> Preprocessing:
    """Return the preprocessing of one whole image; with ``own_window`` its window is the image's range of values."""
    if not p.own_window:
        return p
    low, high = float(pixels.min()), float(pixels.max())
    return replace(p, window=(low, high if high > low else low + 1), own_window=False)


def prepare(
    pixels: Num[ndarray, "height width channels"], p: Preprocessing, spacing_mm: Spacing | None
) -> Float32[ndarray, "3 image_height image_width"]:
    """Return the network's input for one slice; a grey slice is repeated to three channels.

    Args:
        pixels: raw values with 1 or 3 channels, in the unit of ``p.window``.
        p: the preprocessing of this image, see ``for_image``.
        spacing_mm: distance between rows and between columns, where known.

    Raises:
        ValueError: the channels are neither 1 nor 3, a pixel is NaN or infinite, or the spacing is not positive.
        InputError: the image is in colour, and ``p.channel_order`` is "grey".
    """
    return resize_and_normalize(clip_and_scale(pixels, p), p, spacing_mm)


def clip_and_scale(
    pixels: Num[ndarray, "height width channels"], p: Preprocessing
) -> Float32[ndarray, "channels height width"]:
    """Clip values to the window, scale them to 0 … 1 and order the channels: the first half of ``prepare``.

    Raises:
        ValueError: the channels are neither 1 nor 3, or a pixel is NaN or infinite.
        InputError: the image is in colour, and ``p.channel_order`` is "grey".
    """
    if pixels.shape[2] not in (1, 3):
        raise ValueError(f"the image has {pixels.shape[2]} channels; 1 or 3 are supported")
    if p.channel_order == "grey" and pixels.shape[2] != 1:
        raise InputError("the image is in colour, and the network was made for grey images: convert it to grey first")
    _require_finite(pixels, "pixels")
    low, high = p.window
    values = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    values = (np.clip(values, low, high) - np.float32(low)) / np.float32(high - low)
    return values[::-1] if p.channel_order == "bgr" else values


def resize_and_normalize(
    values: Float32[ndarray, "channels height width"], p: Preprocessing, spacing_mm: Spacing | None
) -> Float32[ndarray, "3 image_height image_width"]:
    """Resize, pad or crop, and normalise: the second half of ``prepare``.

    Raises:
        ValueError: the spacing is not positive.
    """
    if p.resizes_with_splines:
        canvas = resize(values, p.image_size, p.resize)
    else:
        axes = _canvas_axes(values.shape[1:], p, spacing_mm)
        taps = [axis.canvas_taps(p.resize) for axis in axes]
        canvas = np.zeros((len(values), *p.image_size), np.float32)  # 0 is the window's lower end
        canvas[:, *(axis.filled for axis in axes)] = apply_taps(values, taps[0], taps[1])
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (p.mean, p.std))
    return (canvas - mean) / std


def prepare_labels(
    labels: UInt8[ndarray, "height width"], p: Preprocessing, spacing_mm: Spacing | None
) -> UInt8[ndarray, "image_height image_width"]:
    """Return the labels of ``prepare``'s output: those of the nearest source pixels, and background in the padding.

    Raises:
        ValueError: the spacing is not positive.
    """
    if p.resizes_with_splines:
        return _zoom(labels, p.image_size, order=0)
    rows, columns = _canvas_axes(labels.shape, p, spacing_mm)
    canvas = np.zeros(p.image_size, np.uint8)
    nearest = np.ix_(rows.canvas_taps("nearest").index[0], columns.canvas_taps("nearest").index[0])
    canvas[rows.filled, columns.filled] = labels[nearest]
    return canvas


def restore(
    logits: Float32[ndarray, "classes image_height image_width"],
    source_size: Size,
    p: Preprocessing,
    spacing_mm: Spacing | None,
) -> UInt8[ndarray, "height width"]:
    """Return the label of every source pixel: logits resized linearly, then the largest, or ``> 0`` for one logit.

    Source pixels that were cropped away become background. For equal logits, see ``labels_of``. With a spline, labels
    are computed at the network's size and resized with order 0.

    Raises:
        ValueError: the logits are not of ``p.image_size`` or not finite, or the spacing is not positive.
    """
    if logits.shape[1:] != p.image_size:
        raise ValueError(f"the logits are {logits.shape[1:]} pixels, but the network's input is {p.image_size}")
    _require_finite(logits, "logits")
    if p.resizes_with_splines:
        return _zoom(labels_of(logits), source_size, order=0)
    rows, columns = _canvas_axes(source_size, p, spacing_mm)
    row_taps, column_taps = rows.source_taps(), columns.source_taps()
    widened = _resize_columns(logits, row_taps, column_taps)
    labels = np.empty(source_size, np.uint8)
    band = max(BAND_VALUES // (len(logits) * source_size[1]), 1)
    for start in range(0, source_size[0], band):
        part = slice(start, start + band)
        if widened is None:
            labels[part] = labels_of(apply_taps(logits, row_taps.only(part), column_taps))
        else:
            labels[part] = labels_of(sum_rows(widened, row_taps.only(part)))
    return labels * np.outer(rows.inside, columns.inside)


def resampled_size(source_size: Size, p: Preprocessing, spacing_mm: Spacing | None) -> Size:
    """Return the size of a slice after resampling: the network's size, or that at the network's pixel spacing.

    Raises:
        ValueError: the spacing is not positive.
    """
    if p.spacing_mm is None or spacing_mm is None:
        return p.image_size
    if not all(0 < distance_mm < float("inf") for distance_mm in spacing_mm):
        raise ValueError(f"the spacing {spacing_mm} mm must be positive")
    rows, columns = (
        max(1, round(pixels * distance_mm / p.spacing_mm))
        for pixels, distance_mm in zip(source_size, spacing_mm, strict=True)
    )
    return rows, columns


def outside_fraction(source_size: Size, p: Preprocessing, spacing_mm: Spacing | None) -> float:
    """Return the share, 0 … 1, of the source pixels that are cropped away and get no label.

    Raises:
        ValueError: the spacing is not positive.
    """
    rows, columns = _canvas_axes(source_size, p, spacing_mm)
    return 1.0 - float(rows.inside.mean() * columns.inside.mean())


def resize(
    array: Num[ndarray, "*batch height width"], size: Size, method: Resize
) -> Float32[ndarray, "*batch new_height new_width"]:
    """Resize the last two axes.

    ``linear`` takes two neighbours and clamps at the edges. ``linear_antialias`` widens that triangle by the reduction
    factor and normalises the weights inside the image to one; when enlarging it equals ``linear``. The splines are
    SciPy's.
    Source: PyTorch's ``interpolate`` (``nearest-exact``, ``bilinear``, ``antialias=True``), the tests' oracle.

    Raises:
        MissingExtraError: ``method`` is a spline and SciPy is not installed.
    """
    if method in SPLINE_ORDERS:
        planes = np.asarray(array, np.float32).reshape(-1, *array.shape[-2:])
        zoomed = [_zoom(plane, size, SPLINE_ORDERS[method]) for plane in planes]
        return np.stack(zoomed).reshape(*array.shape[:-2], *size)
    height, width = array.shape[-2:]
    rows, columns = taps_of(height, size[0], method, 0, size[0]), taps_of(width, size[1], method, 0, size[1])
    return apply_taps(np.asarray(array, dtype=np.float32), rows, columns)


def golden(
    p: Preprocessing,
) -> tuple[Float32[ndarray, "height width channels"], Float32[ndarray, "3 image_height image_width"]]:
    """Return seeded noise that extends beyond both ends of the window, and ``prepare``'s output for it.

    One axis is reduced and the other enlarged; where ``p`` has a spacing, one is cropped and the other padded.
    The noise comes from the raw bits of PCG64, which NumPy guarantees to keep.
    """
    size = 5 * p.image_size[0] // 4 + 1, p.image_size[1] // 2 + 3
    noise = np.random.PCG64(0).random_raw(size[0] * size[1] * 3).reshape(*size, 3) / 2.0**64
    low, high = p.window
    pixels = (low + (high - low) * (1.5 * noise - 0.25)).astype(np.float32)
    pixels = pixels[..., :1] if p.channel_order == "grey" else pixels
    spacing_mm = None if p.spacing_mm is None else (1.3 * p.spacing_mm, 0.8 * p.spacing_mm)
    return pixels, prepare(pixels, for_image(p, pixels[np.newaxis]), spacing_mm)


def _zoom(plane: ndarray, size: Size, order: int) -> ndarray:
    """Resize one plane as TransUNet does; one of the right size is returned unchanged."""
    if plane.shape == size:
        return plane
    ndimage = require("scipy.ndimage", "medical")
    factors = [new / old for new, old in zip(size, plane.shape, strict=True)]
    return ndimage.zoom(plane, factors, order=order)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """How one source axis maps to the same axis of the network's input, the canvas."""

    source: int
    resampled: int  # pixels of the source at the canvas's spacing
    canvas: int

    @property
    def offset(self) -> int:
        """Canvas position of the first resampled pixel; negative where the source is cropped."""
        return (self.canvas - self.resampled) // 2

    @property
    def filled(self) -> slice:
        """The part of the canvas that is not padding."""
        return slice(max(self.offset, 0), min(self.offset + self.resampled, self.canvas))

    @property
    def inside(self) -> ndarray:
        """Which source pixels have their centre on the canvas."""
        centre = (np.arange(self.source) + 0.5) * self.resampled / self.source + self.offset
        return (centre >= 0) & (centre < self.canvas)

    def canvas_taps(self, method: Resize) -> Taps:
        """Return the taps from the source axis to the filled part of the canvas."""
        start, stop = self.filled.start - self.offset, self.filled.stop - self.offset
        return taps_of(self.source, self.resampled, method, start, stop)

    def source_taps(self) -> Taps:
        """Return the taps from the canvas to the source axis; beyond the filled part, its edge is repeated."""
        taps = taps_of(self.resampled, self.source, "linear", 0, self.source)
        index = np.clip(taps.index + self.offset, self.filled.start, self.filled.stop - 1)
        return Taps(index=index, weight=taps.weight)


def _canvas_axes(source_size: Size, p: Preprocessing, spacing_mm: Spacing | None) -> tuple[_Axis, _Axis]:
    rows, columns = (
        _Axis(source=source, resampled=resampled, canvas=canvas)
        for source, resampled, canvas in zip(
            source_size, resampled_size(source_size, p, spacing_mm), p.image_size, strict=True
        )
    )
    return rows, columns


def _resize_columns(logits: ndarray, rows: Taps, columns: Taps) -> ndarray | None:
    """Return logits with the source's columns, or None where that gathers more than band by band or is too large."""
    gathered, height = len(logits) * logits.shape[-2] * columns.index.shape[1], rows.index.shape[1]
    return sum_columns(logits, columns) if logits.shape[-2] <= height and gathered <= MAX_WIDENED_VALUES else None


def labels_of(logits: Num[ndarray, "classes height width"]) -> UInt8[ndarray, "height width"]:
    """Return the label of every pixel: the class of its largest logit; of a single logit, 1 where it is above 0.

    Of equal logits the lowest class wins, as in ``numpy.argmax``, and a single logit of exactly 0 is background. The
    same rule holds in ``restore``, graphs that return masks (``export.graph.masks``), comparisons (``export.verify``)
    and the CUDA kernel ``logits_to_mask``.
    """
    if len(logits) == 1:
        return (logits[0] > 0).astype(np.uint8)
    best = logits[0].copy()
    labels = np.zeros(best.shape, np.uint8)
    for label, plane in enumerate(logits[1:], 1):
        higher = (plane > best).view(np.uint8)
        np.maximum(labels, higher * np.uint8(label), out=labels)  # labels ascend; faster than a masked write
        np.maximum(best, plane, out=best)
    return labels


def _require_finite(values: ndarray, name: str) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} {name} are NaN or infinite")
