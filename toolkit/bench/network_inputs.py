"""What networks get of an image, and how labels are made of their logits: whole slices, or windows of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import for_image, restore
from medseg_trt.imaging.segment import Run, prepared_slices
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.segment import labels_of_windows, window_inputs
from medseg_trt.tiling.windows import Tiles, recorded_tiles, window_size

BATCH = 4


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NetworkInputs:
    """The network's input of some slices of an image."""

    inputs: Float32[ndarray, "_ 3 image_height image_width"]
    labels: Callable[[ndarray], ndarray]  # logits of all inputs -> labels (slices, height, width)

    def logits(self, run: Run) -> ndarray:
        """Return the logits of all inputs."""
        starts = range(0, len(self.inputs), BATCH)
        return np.concatenate([run(self.inputs[start : start + BATCH]) for start in starts])


def network_inputs(image: Image, preprocessing: Preprocessing) -> Iterator[NetworkInputs]:
    """Yield the slices of an image in order: all at once, or one by one where each is cut into windows."""
    tiles = recorded_tiles(preprocessing)
    if tiles is None:
        yield _whole(image, preprocessing)
    else:
        yield from _in_windows(image, preprocessing, tiles)


def _whole(image: Image, preprocessing: Preprocessing) -> NetworkInputs:
    def labels(logits: ndarray) -> ndarray:
        return np.stack([restore(of_slice, image.size, preprocessing, image.spacing_in_plane) for of_slice in logits])

    return NetworkInputs(inputs=prepared_slices(image, preprocessing), labels=labels)


def _in_windows(image: Image, preprocessing: Preprocessing, tiles: Tiles) -> Iterator[NetworkInputs]:
    contract, window = for_image(preprocessing, image.pixels), window_size(tiles, preprocessing, image.spacing_in_plane)

    def labels(logits: ndarray) -> ndarray:
        return labels_of_windows(logits, image.size, window, tiles.overlap)[np.newaxis]

    for pixels in image.pixels:
        yield NetworkInputs(inputs=window_inputs(pixels, contract, window, tiles.overlap), labels=labels)
