"""A picture of 0 … 255 is warned of where the network takes Hounsfield units, and nowhere else."""

from pathlib import Path

import numpy as np
import pytest

from medseg_trt.imaging.images import Image
from medseg_trt.inference.pipelined import has_foreign_values
from medseg_trt.spec import Preprocessing

CT = Preprocessing(image_size=(32, 32), window=(-125.0, 275.0))
PICTURE = Preprocessing(image_size=(32, 32))


def image(dtype: type, *, slices: int = 1, channels: int = 1) -> Image:
    return Image(path=Path("a"), pixels=np.zeros((slices, 8, 8, channels), dtype))


@pytest.mark.parametrize("channels", [1, 3])
def test_has_foreign_values_is_true_for_8_bit_images_and_a_ct_network(channels):
    assert has_foreign_values(image(np.uint8, channels=channels), CT)


@pytest.mark.parametrize(
    ("given", "preprocessing"),
    [
        (image(np.uint8), PICTURE),
        (image(np.int16), CT),
        (image(np.float32), CT),
        (image(np.uint16), CT),  # a 16-bit PNG may hold shifted CT values
        (image(np.uint8, slices=4), CT),
        (image(np.uint8), Preprocessing(image_size=(32, 32), window=(-125.0, 275.0), own_window=True)),
    ],
)
def test_has_foreign_values_is_false_for_suitable_images(given, preprocessing):
    assert not has_foreign_values(given, preprocessing)
