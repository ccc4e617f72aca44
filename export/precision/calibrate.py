"""Measure the range of every activation on real images, and choose the part of it that eight bits cover.

Each image is run twice: the first pass finds the extremes, the second fills a histogram, so that memory does not depend
on the number of images. This module opens no session: ``observe`` is a function from a batch to values.
Source: Wu et al. 2020, "Integer quantization for deep learning inference", §5.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import InputError, UsageError
from medseg_trt.export.graph.interface import INPUT
from medseg_trt.export.graph.onnx_graph import OnnxGraph
from medseg_trt.imaging.digest import image_digests

Observe = Callable[[ndarray], Mapping[str, ndarray]]  # (1, 3, H, W) float32 -> named values
MIN_IMAGES = 4
METHOD = "mse"  # in the manifest: the range with the least mean squared error
NUM_BINS = 4096  # even, so that zero lies between two bins
LEVELS = 255  # quantisation steps of the asymmetric format; the symmetric format has 254
CANDIDATES = np.linspace(0.1, 1.0, 91)  # shares of the largest value, compared by their error


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The range of a value that eight bits cover; values outside are clipped."""

    low: float  # of the asymmetric format, at most 0
    high: float  # of the asymmetric format, at least 0
    bound: float  # of the symmetric format: -bound … bound

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The ranges of a graph's activations, and the images on which they were measured."""

    ranges: Mapping[str, Range]  # by the name of the value
    method: str = METHOD
    images: tuple[str, ...]  # SHA-256 of each prepared image's bytes, in order

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def num_images(self) -> int:
        """The number of images."""
        return len(self.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Counts of values in NUM_BINS equal bins over -limit … limit; exact zeros are counted separately."""

    counts: ndarray  # (NUM_BINS,) float64
    zeros: int
    low: float  # the lowest and highest observed value
    high: float

    @property
    def limit(self) -> float:
        """The largest observed magnitude."""
        return max(-self.low, self.high)

    @property
    def centres(self) -> ndarray:
        """The centre of every bin."""
        return (np.arange(NUM_BINS) + 0.5) * (2 * self.limit / NUM_BINS) - self.limit

    def with_values(self, values: ndarray) -> "Histogram":
        """Return a histogram that also counts ``values``, all of which lie in ``low`` … ``high``."""
        nonzero = values[values != 0]
        counts = np.histogram(nonzero, NUM_BINS, (-self.limit, self.limit))[0] if nonzero.size else 0
        return replace(self, counts=self.counts + counts, zeros=self.zeros + values.size - nonzero.size)


def observed_graph(graph: OnnxGraph, names: Iterable[str]) -> OnnxGraph:
    """Return a copy with the named values as further outputs; ``calibrate`` reads the graph's input from the images."""
    model = graph.model.clone()
    known = {value.name: value for node in model.graph for value in node.outputs}
    outputs = {value.name for value in model.graph.outputs}
    for name in dict.fromkeys(names):
        if name not in outputs and name != INPUT:
            model.graph.outputs.append(known[name])
    return OnnxGraph(model=model)


def calibrate(observe: Observe, images: Float32[ndarray, "images 3 height width"], names: Sequence[str]) -> Calibration:
    """Return the ranges of the named values on the images.

    Args:
        observe: runs an ``observed_graph`` and returns its outputs by name.
        images: prepared, representative images; none that the accuracy gate uses.
        names: values of the graph, such as the inputs of its GEMMs.

    Raises:
        UsageError: fewer than MIN_IMAGES different images.
        InputError: an image or a value holds NaN or infinity, or all images are of one colour.
    """
    digests = image_digests(images)
    _check_images(images, digests)
    extremes = dict.fromkeys(names, (0.0, 0.0))
    for values in _observations(observe, images, names):
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise InputError(f"{name} is not finite on a calibration image; the network cannot be quantised")
            low, high = extremes[name]
            extremes[name] = min(low, float(value.min())), max(high, float(value.max()))
    histograms = {
        name: Histogram(counts=np.zeros(NUM_BINS), zeros=0, low=low, high=high)
        for name, (low, high) in extremes.items()
    }
    for values in _observations(observe, images, names):
        histograms = {name: histogram.with_values(values[name]) for name, histogram in histograms.items()}
    ranges = {name: mean_squared_error(histogram) for name, histogram in histograms.items()}
    return Calibration(ranges=ranges, images=digests)


def mean_squared_error(histogram: Histogram) -> Range:
    """Return the range with the least sum of expected squared rounding and clipping errors."""
    bound = _best(lambda share: _error(histogram, -share * histogram.limit, share * histogram.limit, LEVELS - 1))
    low = high = 1.0
    for _ in range(2):  # one side at a time; the second pass repeats the first with the other side known
        high = _best(lambda share: _error(histogram, low * histogram.low, share * histogram.high, LEVELS))  # noqa: B023
        low = _best(lambda share: _error(histogram, share * histogram.low, high * histogram.high, LEVELS))  # noqa: B023
    return _within(histogram, low * histogram.low, high * histogram.high, bound * histogram.limit)


def _observations(observe: Observe, images: ndarray, names: Sequence[str]) -> Iterable[dict[str, ndarray]]:
    for image in images:
        values = {INPUT: image[None], **observe(image[None])}
        if missing := [name for name in names if name not in values]:
            raise UsageError(f"the observed network has no value {missing[0]!r}; calibrate the graph that you quantise")
        yield {name: values[name] for name in names}


def _check_images(images: ndarray, digests: Sequence[str]) -> None:
    if len(set(digests)) < MIN_IMAGES:
        raise UsageError(
            f"{len(set(digests))} different calibration images are too few; give at least {MIN_IMAGES}: --data DIR"
        )
    if not np.isfinite(images).all():
        raise InputError("a calibration image holds NaN or infinity; check the data: medseg-trt data check DIR")
    empty = sum(bool(image.min() == image.max()) for image in images)
    if len(images) - empty < MIN_IMAGES:
        raise InputError(
            f"{empty} of {len(images)} calibration images are of one colour, such as all black; "
            "check the window of the preprocessing, or give other images: --data DIR"
        )


def _within(histogram: Histogram, low: float, high: float, bound: float) -> Range:
    """Return a range within the observed values."""
    return Range(low=max(low, histogram.low), high=min(high, histogram.high), bound=min(bound, histogram.limit))


def _best(error: Callable[[float], float]) -> float:
    return float(CANDIDATES[int(np.argmin([error(float(share)) for share in CANDIDATES]))])


def _error(histogram: Histogram, low: float, high: float, levels: int) -> float:
    """Return the summed expected squared error: step² / 12 inside the range, the squared clipped distance outside.

    Exact zeros have no error: both formats represent zero.
    """
    centres = histogram.centres
    clipped = np.where(centres > high, centres - high, np.where(centres < low, low - centres, 0.0))
    rounding = ((high - low) / levels) ** 2 / 12
    return float(histogram.counts @ np.where(clipped > 0, clipped**2, rounding))
