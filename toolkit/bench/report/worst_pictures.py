"""Draw a slice as pictures within a page: the image, the masks that were drawn and found, and what differs."""

from base64 import b64encode
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.bench.accuracy_record import SliceImages
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.overlay import tile
from medseg_trt.spec import Classes

LOST_AND_FOUND = (  # in no class's colour, and apart for colour-blind eyes
    ("lost against the reference", (255, 0, 200)),
    ("added", (60, 255, 60)),
    ("another class", (255, 255, 255)),
)
COLORS = 128  # of a picture's palette


def tiles(images: SliceImages, classes: Classes, window: tuple[float, float]) -> list[tuple[str, str]]:
    """Return the pictures with their names, as ``data:`` addresses; without a drawn mask they are four, else five."""
    changes = Classes(
        names=("same", *(name for name, _ in LOST_AND_FOUND)),
        colors=((0, 0, 0), *(color for _, color in LOST_AND_FOUND)),
    )
    empty = np.zeros_like(images.reference)
    low, high = window
    dimmed = (low, low + 2 * (high - low))  # so that a few changed pixels stand out
    drawn = [
        ("image", empty, classes, window),
        *([] if images.truth is None else [("drawn mask", images.truth, classes, window)]),
        ("reference", images.reference, classes, window),
        ("network", images.candidate, classes, window),
        ("difference", differing(images.reference, images.candidate), changes, dimmed),
    ]
    return [(name, _address(_tile(images.pixels, labels, known, values))) for name, labels, known, values in drawn]


def differing(reference: ndarray, candidate: ndarray) -> ndarray:
    """Return 1 where a label was lost, 2 where one was added, 3 where it became another one, 0 elsewhere."""
    labels = np.zeros(reference.shape, np.uint8)
    other = reference != candidate
    labels[other] = 3
    labels[other & (candidate == 0)] = 1
    labels[other & (reference == 0)] = 2
    return labels


def _tile(pixels: ndarray, labels: ndarray, classes: Classes, window: tuple[float, float]) -> ndarray:
    image = Image(path=Path("slice"), pixels=pixels[np.newaxis])
    return tile(image, Mask.of(image, labels[np.newaxis], classes), window, 0)


def _address(colors: ndarray) -> str:
    import PIL.Image

    stream = BytesIO()
    PIL.Image.fromarray(colors).quantize(COLORS).save(stream, format="PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"
