"""Run a network over every slice of an image and bring its answer back to the image's own pixels."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import Size, of_image, prepare, resampled_size, restore
from medseg_trt.progress import track
from medseg_trt.spec import Preprocessing

Run = Callable[[np.ndarray], np.ndarray]  # (batch, 3, H, W) float32 -> logits (batch, classes, H, W) float32
MaskRun = Callable[[np.ndarray, Size, Size], np.ndarray]  # ``Session.masks``
PixelRun = Callable[[np.ndarray], np.ndarray]  # raw (batch, height, width, channels) -> labels uint8 of that size


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """What is done to a batch of an image's slices, one after the other."""

    prepare: Callable[[np.ndarray], np.ndarray]  # raw pixels (batch, height, width, channels) -> what the network takes
    run: Run
    finish: Callable[[np.ndarray], np.ndarray]  # the network's answer -> labels uint8 (batch, height, width)


def prepared_slices(image: Image, preprocessing: Preprocessing) -> Float32[np.ndarray, "slices 3 height width"]:
    """Return all slices as the network's input."""
    contract = of_image(preprocessing, image.pixels)
    return np.stack([prepare(pixels, contract, image.spacing_in_plane) for pixels in image.pixels])


def steps(
    run: Run,
    image: Image,
    preprocessing: Preprocessing,
    masks: MaskRun | None = None,
    pixels_to_masks: PixelRun | None = None,
) -> Steps:
    """Return the steps for the slices of one image; see ``segment`` for the arguments.

    With ``pixels_to_masks``, ``Session.device_pipeline``'s, the network prepares the pixels, and nothing else is run.
    """
    if pixels_to_masks is not None:
        return Steps(prepare=lambda pixels: pixels, run=pixels_to_masks, finish=lambda labels: labels)
    resampled = resampled_size(image.size, preprocessing, image.spacing_in_plane)
    contract = of_image(preprocessing, image.pixels)

    def prepared(pixels: np.ndarray) -> np.ndarray:
        return np.stack([prepare(each, contract, image.spacing_in_plane) for each in pixels])

    def answered(inputs: np.ndarray) -> np.ndarray:
        answer = run(inputs) if masks is None else masks(inputs, image.size, resampled)
        if len(answer) != len(inputs):
            raise ValueError(f"the network gave {len(answer)} answers to {len(inputs)} slices")
        return answer

    def restored(answer: np.ndarray) -> np.ndarray:
        if masks is not None:
            return answer
        return np.stack([restore(each, image.size, preprocessing, image.spacing_in_plane) for each in answer])

    return Steps(prepare=prepared, run=answered, finish=restored)


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
        image: what to segment.
        preprocessing: the contract the network was trained with.
        batch: how many slices go through the network at once.
        label: where it is given, progress is shown under this name.
        masks: a network that makes the labels itself; ``run`` is not called then.
        pixels_to_masks: a network that prepares the pixels, too; neither of the others is called then.
    """
    labels = np.empty(image.pixels.shape[:3], np.uint8)
    do = steps(run, image, preprocessing, masks, pixels_to_masks)
    starts = range(0, len(labels), batch)
    for start in starts if label is None else track(starts, label):
        part = slice(start, start + batch)
        labels[part] = do.finish(do.run(do.prepare(image.pixels[part])))
    return labels
