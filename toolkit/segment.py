"""Run a network over every slice of an image and bring its answer back to the image's own pixels."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8

from medseg_trt.images import Image
from medseg_trt.preprocess import Size, of_image, prepare, resampled_size, restore
from medseg_trt.progress import track
from medseg_trt.spec import Preprocessing

Run = Callable[[np.ndarray], np.ndarray]  # (batch, 3, H, W) float32 -> logits (batch, classes, H, W) float32
MaskRun = Callable[[np.ndarray, Size, Size], np.ndarray]  # ``Session.masks``


def prepared_slices(image: Image, preprocessing: Preprocessing) -> Float32[np.ndarray, "slices 3 height width"]:
    """Return all slices as the network's input."""
    contract = of_image(preprocessing, image.pixels)
    return np.stack([prepare(pixels, contract, image.spacing_in_plane) for pixels in image.pixels])


def segment(
    run: Run,
    image: Image,
    preprocessing: Preprocessing,
    batch: int,
    label: str | None = None,
    masks: MaskRun | None = None,
) -> UInt8[np.ndarray, "slices height width"]:
    """Return the label of every pixel of every slice.

    Args:
        run: the network, for example ``session.run``.
        image: what to segment.
        preprocessing: the contract the network was trained with.
        batch: how many slices go through the network at once.
        label: where it is given, progress is shown under this name.
        masks: a network that makes the labels itself; ``run`` is not called then.
    """
    labels = np.empty(image.pixels.shape[:3], np.uint8)
    contract = of_image(preprocessing, image.pixels)
    starts = range(0, len(labels), batch)
    for start in starts if label is None else track(starts, label):
        part = slice(start, start + batch)
        inputs = np.stack([prepare(pixels, contract, image.spacing_in_plane) for pixels in image.pixels[part]])
        if masks is not None:
            resampled = resampled_size(image.size, preprocessing, image.spacing_in_plane)
            labels[part] = masks(inputs, image.size, resampled)
            continue
        for index, logits in zip(range(start, start + len(inputs)), run(inputs), strict=True):
            labels[index] = restore(logits, image.size, preprocessing, image.spacing_in_plane)
    return labels
