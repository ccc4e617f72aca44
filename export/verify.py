"""Compare the logits of a network with those of its reference, over images, batch sizes and rows of a batch.

This module opens no session: a network is a function from a batch to its logits.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import AccuracyGateError
from medseg_trt.imaging import preprocess
from medseg_trt.imaging.segment import Run

BATCH_SIZES = (1, 3, 4)
PROBED_ROWS = 3  # of one batch, to test that rows are independent
NOISE_IMAGES = 4

Inputs = Float32[ndarray, "images 3 height width"]
Logits = Float32[ndarray, "images classes height width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """Differences between a network and its reference."""

    images: str  # description of the images
    num_images: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float  # of the logits, over all images and batch sizes
    agreement: float  # share of pixels with the same label, 0 … 1, in the worst batch size
    max_row_error: float  # of a row's logits: repeated run, repeated rows, permuted rows, other rows in the batch

    __pydantic_config__ = {"extra": "forbid"}


def verify_logits(
    run: Run, reference: Run, inputs: Inputs, images: str, *, max_abs_error: float, min_agreement: float
) -> Verification:
    """Run both networks on the same images and return their differences.

    The reference runs one image at a time, so that an error that depends on the batch cannot occur in both.

    Args:
        run: the network to verify.
        reference: the network to compare with.
        inputs: prepared images; repeated where there are fewer than the largest batch.
        images: description of the inputs, for the record.
        max_abs_error: limit for the logits, and for the change of a row with the rest of its batch. It is multiplied by
            the largest magnitude of the reference's logits where that exceeds 1: rounding errors grow with the terms.
        min_agreement: lowest share of pixels with the same label.

    Raises:
        AccuracyGateError: a limit is exceeded; the message names it and the value.
    """
    batch_inputs = (
        inputs if len(inputs) >= max(BATCH_SIZES) else np.resize(inputs, (max(BATCH_SIZES), *inputs.shape[1:]))
    )
    expected = run_in_batches(reference, batch_inputs, 1)
    by_batch_size = [run_in_batches(run, batch_inputs, size) for size in BATCH_SIZES]
    if any(logits.shape != expected.shape for logits in by_batch_size):
        raise AccuracyGateError(
            f"the logits have shape {by_batch_size[0].shape}, those of the reference {expected.shape}"
        )
    limit = max_abs_error * max(1.0, float(np.abs(expected).max()))
    result = Verification(
        images=images,
        num_images=len(inputs),
        batch_sizes=BATCH_SIZES,
        max_abs_error=_largest(_distance(logits, expected) for logits in by_batch_size),
        agreement=min(float((labels_of(logits) == labels_of(expected)).mean()) for logits in by_batch_size),
        max_row_error=_largest(_row_errors(run, batch_inputs[:PROBED_ROWS])),
    )
    for name, value, allowed, broken in (
        ("logits differ by", result.max_abs_error, limit, not result.max_abs_error <= limit),
        ("share of equal labels is", result.agreement, min_agreement, not result.agreement >= min_agreement),
        (
            "rows of a batch change each other by",
            result.max_row_error,
            limit,
            not result.max_row_error <= limit,
        ),
    ):
        if broken:
            raise AccuracyGateError(f"on {images}: {name} {value:.6g}, the limit is {allowed:g}; nothing was written")
    return result


def noise(image_size: tuple[int, int]) -> Inputs:
    """Return seeded noise of several spatial scales, for verification without images."""
    rng = np.random.default_rng(0)
    height, width = image_size
    blobs = [
        np.kron(rng.normal(size=(NOISE_IMAGES, 3, -(-height // cell), -(-width // cell))), np.ones((cell, cell)))[
            ..., :height, :width
        ]
        for cell in (1, 4, 16)
    ]
    return (np.sum(blobs, axis=0) / 4 + 0.5).astype(np.float32)


def run_in_batches(run: Run, inputs: Inputs, size: int) -> Logits:
    """Return the logits of all images, ``size`` of them at a time."""
    return np.concatenate([run(inputs[start : start + size]) for start in range(0, len(inputs), size)])


def labels_of(logits: Logits) -> ndarray:
    """Return the label of every pixel of the network's own image, see ``preprocess.labels_of``."""
    return np.stack([preprocess.labels_of(image) for image in logits])


def _row_errors(run: Run, batch: Inputs) -> Iterator[float]:
    batched = run(batch)
    yield _distance(run(batch), batched)
    yield _distance(run(np.repeat(batch[:1], len(batch), axis=0)), batched[:1])
    reversed_rows = run(batch[::-1].copy())
    yield _distance(reversed_rows[::-1], batched)
    for row in range(len(batch)):
        others = batch[::-1] * 2 + 1  # unlike any row of the batch
        others[row] = batch[row]
        yield _distance(run(others)[row], batched[row])


def _distance(first: ndarray, second: ndarray) -> float:
    return float(np.abs(first - second).max())


def _largest(distances: Iterable[float]) -> float:
    """Return the largest distance; NaN if one is NaN, which Python's ``max`` can drop and every limit rejects."""
    return float(np.max(list(distances)))
