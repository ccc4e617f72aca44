"""Run a network over every slice of an image and resample its output to the image's own pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import Size, for_image, prepare, resampled_size, restore
from medseg_trt.progress import track
from medseg_trt.spec import Preprocessing

Run = Callable[[np.ndarray], np.ndarray]  # (batch, 3, H, W) float32 -> logits (batch, classes, H, W) float32
MaskRun = Callable[[np.ndarray, Size, Size], np.ndarray]  # ``Session.masks``
Finish = Callable[[Image, np.ndarray], np.ndarray]  # labels of a whole image (slices, height, width) -> corrected ones
PixelRun = Callable[[np.ndarray], np.ndarray]  # raw (batch, height, width, channels) -> labels uint8 of that size


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationStages:
    """The three functions that a batch of slices passes through in turn."""

    prepare: Callable[[np.ndarray], np.ndarray]  # raw pixels (batch, height, width, channels) -> network input
    run: Run
    finish: Callable[[np.ndarray], np.ndarray]  # network output -> labels uint8 (batch, height, width)


def prepared_slices(image: Image, preprocessing: Preprocessing) -> Float32[np.ndarray, "slices 3 height width"]:
    """Return all slices as the network's input."""
    image_preprocessing = for_image(preprocessing, image.pixels)
    return np.stack([prepare(pixels, image_preprocessing, image.spacing_in_plane) for pixels in image.pixels])


def segmentation_stages(
    run: Run,
    image: Image,
    preprocessing: Preprocessing,
    masks: MaskRun | None = None,
    pixels_to_masks: PixelRun | None = None,
) -> SegmentationStages:
    """Return the stages for the slices of one image; see ``segment`` for the arguments.

    ``pixels_to_masks`` prepares and restores the pixels itself: on a GPU (``Session.device_pipeline``), or window by
    window (``tiling.segment.tiled``).
    """
    if pixels_to_masks is not None:
        return SegmentationStages(prepare=lambda pixels: pixels, run=pixels_to_masks, finish=lambda labels: labels)
    resampled = resampled_size(image.size, preprocessing, image.spacing_in_plane)
    image_preprocessing = for_image(preprocessing, image.pixels)

    def prepare_batch(pixels: np.ndarray) -> np.ndarray:
        return np.stack([prepare(slice_pixels, image_preprocessing, image.spacing_in_plane) for slice_pixels in pixels])

    def run_batch(inputs: np.ndarray) -> np.ndarray:
        outputs = run(inputs) if masks is None else masks(inputs, image.size, resampled)
        if len(outputs) != len(inputs):
            raise ValueError(f"the network returned {len(outputs)} outputs for {len(inputs)} slices")
        return outputs

    def restore_batch(outputs: np.ndarray) -> np.ndarray:
        if masks is not None:
            return outputs
        return np.stack([restore(logits, image.size, preprocessing, image.spacing_in_plane) for logits in outputs])

    return SegmentationStages(prepare=prepare_batch, run=run_batch, finish=restore_batch)


def segment(
    run: Run,
    image: Image,
    preprocessing: Preprocessing,
    batch: int,
    label: str | None = None,
    masks: MaskRun | None = None,
    pixels_to_masks: PixelRun | None = None,
) -> UInt8[np.ndarray, "slices height width"]:
    """Return the label of every pixel of every slice.

    Args:
        run: the network, for example ``session.run``.
        image: the image to segment.
        preprocessing: the preprocessing that the network was trained with.
        batch: the number of slices per call of the network.
        label: shows progress under this name; None shows none.
        masks: a network that returns labels; it is called instead of ``run``.
        pixels_to_masks: a network that prepares the pixels and returns labels; it is called instead of the others.
    """
    labels = np.empty(image.pixels.shape[:3], np.uint8)
    stages = segmentation_stages(run, image, preprocessing, masks, pixels_to_masks)
    starts = range(0, len(labels), batch)
    for start in starts if label is None else track(starts, label):
        part = slice(start, start + batch)
        labels[part] = stages.finish(stages.run(stages.prepare(image.pixels[part])))
    return labels
