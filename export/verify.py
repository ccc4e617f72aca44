"""Compare two ways to run the same network, image by image, batch by batch and row by row.

Nothing here opens a session: a network is a function from a batch to its logits.
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
PROBED_ROWS = 3  # of one batch, for what they do to each other
NOISE_IMAGES = 4

Inputs = Float32[ndarray, "images 3 height width"]
Logits = Float32[ndarray, "images classes height width"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """How far a network is from its reference."""

    images: str  # what it was shown, and whether it was real
    num_images: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float  # of the logits, over all images and batch sizes
    agreement: float  # share of pixels with the same label, 0 … 1, in the worst batch size
    max_row_error: float  # of a row's logits: a second time, beside copies of itself, moved, beside other rows

    __pydantic_config__ = {"extra": "forbid"}


def verify_logits(
    run: Run, reference: Run, inputs: Inputs, images: str, *, max_abs_error: float, min_agreement: float
) -> Verification:
    """Show both networks the same images and return how far they are apart.

    The reference sees one image at a time, so that a mistake that grows with the batch cannot hide in both.

    Args:
        run: the network to verify.
        reference: what it must agree with.
        inputs: prepared images; repeated where there are fewer than the largest batch.
        images: what they are, for the record.
        max_abs_error: limit for the logits, and for what a row may change with the rest of its batch; where a logit of
            the reference is larger than 1, so is the limit, since the rounding of a sum grows with its terms.
        min_agreement: lowest share of pixels with the same label.

    Raises:
        AccuracyGateError: a limit is broken; the message says which and by how much.
    """
    shown = inputs if len(inputs) >= max(BATCH_SIZES) else np.resize(inputs, (max(BATCH_SIZES), *inputs.shape[1:]))
    expected = run_in_batches(reference, shown, 1)
    answers = [run_in_batches(run, shown, size) for size in BATCH_SIZES]
    if any(answer.shape != expected.shape for answer in answers):
        raise AccuracyGateError(f"the logits are {answers[0].shape}, the reference's are {expected.shape}")
    limit = max_abs_error * max(1.0, float(np.abs(expected).max()))
    found = Verification(
        images=images,
        num_images=len(inputs),
        batch_sizes=BATCH_SIZES,
        max_abs_error=_largest(_distance(answer, expected) for answer in answers),
        agreement=min(float((labels_of(answer) == labels_of(expected)).mean()) for answer in answers),
        max_row_error=_largest(_row_errors(run, shown[:PROBED_ROWS])),
    )
    for name, value, allowed, broken in (
        ("logits differ by", found.max_abs_error, limit, not found.max_abs_error <= limit),
        ("share of equal labels is", found.agreement, min_agreement, not found.agreement >= min_agreement),
        (
            "rows of a batch change each other by",
            found.max_row_error,
            limit,
            not found.max_row_error <= limit,
        ),
    ):
        if broken:
            raise AccuracyGateError(f"on {images}: {name} {value:.6g}, the limit is {allowed:g}; nothing was written")
    return found


def noise(image_size: tuple[int, int]) -> Inputs:
    """Return seeded noise, blurred to blobs of several sizes, for a check where there are no images."""
    rng = np.random.default_rng(0)
    height, width = image_size
    blobs = [
        np.kron(rng.normal(size=(NOISE_IMAGES, 3, height // cell, width // cell)), np.ones((cell, cell)))
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
    together = run(batch)
    yield _distance(run(batch), together)
    yield _distance(run(np.repeat(batch[:1], len(batch), axis=0)), together[:1])
    backwards = run(batch[::-1].copy())
    yield _distance(backwards[::-1], together)
    for row in range(len(batch)):
        others = batch[::-1] * 2 + 1  # far from anything in the batch
        others[row] = batch[row]
        yield _distance(run(others)[row], together[row])


def _distance(first: ndarray, second: ndarray) -> float:
    return float(np.abs(first - second).max())


def _largest(distances: Iterable[float]) -> float:
    """Return the largest; NaN where there is one, which no limit lets pass and Python's ``max`` may lose."""
    return float(np.max(list(distances)))
