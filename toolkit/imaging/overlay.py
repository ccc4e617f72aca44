"""Draw what was found: a picture, or the labelled slices of a volume, each class in its colour and named below."""

from math import ceil, isqrt
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from medseg_trt.files import atomic_file
from medseg_trt.imaging.images import Image, Mask

ALPHA = 0.45  # of a colour on what it covers; contours cover it whole
MAX_SLICES = 12  # of a volume
TILE_WIDTH = 256  # small slices are enlarged to it
LONGEST_TILE = 512  # of a montage; a single picture may be four times as long
LEGEND_HEIGHT = 22


def write_overlay(image: Image, mask: Mask, window: tuple[float, float], path: Path) -> None:
    """Write a PNG of the image, its classes coloured and named; of a volume, up to 12 evenly spaced labelled slices.

    Args:
        image: what the mask belongs to.
        mask: its labels.
        window: the values that become black and white, for example ``Preprocessing.window``.
        path: the picture to write.
    """
    import PIL.Image

    shown = _slices_to_show(mask.labels)
    tiles = [tile(image, mask, window, index) for index in shown]
    columns = isqrt(len(tiles) - 1) + 1
    height, width, _ = tiles[0].shape
    sheet = np.zeros((ceil(len(tiles) / columns) * height, columns * width, 3), np.uint8)
    for place, drawn in enumerate(tiles):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height, left : left + width] = drawn
    picture = _with_legend(PIL.Image.fromarray(sheet), mask)
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")


def _slices_to_show(labels: ndarray) -> list[int]:
    labelled = np.flatnonzero(labels.any(axis=(1, 2)))
    candidates = labelled if labelled.size else np.arange(len(labels))
    places = np.linspace(0, len(candidates) - 1, min(len(candidates), MAX_SLICES))
    return candidates[np.round(places).astype(np.intp)].tolist()


def tile(image: Image, mask: Mask, window: tuple[float, float], index: int) -> UInt8[ndarray, "height width 3"]:
    """Draw one slice with its classes at their true proportions; a pixel of the tile is as high as it is wide."""
    import PIL.Image
    from PIL import ImageDraw

    size = _tile_size(image)
    low, high = window
    grey = (np.clip(image.pixels[index].astype(np.float32), low, high) - low) * (255 / (high - low))
    rgb = np.broadcast_to(grey.round().astype(np.uint8), (*image.size, 3))
    pixels = np.asarray(PIL.Image.fromarray(rgb.copy()).resize(size, PIL.Image.Resampling.BILINEAR))
    labels = np.asarray(PIL.Image.fromarray(mask.labels[index]).resize(size, PIL.Image.Resampling.NEAREST))
    colors = np.array(mask.classes.colors, np.float32)[labels]
    alpha = np.where(_contours(labels), 1.0, ALPHA * (labels > 0))[..., np.newaxis]
    blended = PIL.Image.fromarray((pixels * (1 - alpha) + colors * alpha).round().astype(np.uint8))
    if image.num_slices > 1:
        ImageDraw.Draw(blended).text(
            (4, 2), f"slice {index}", fill="white", font=_font(), stroke_width=1, stroke_fill="black"
        )
    return np.array(blended)


def _tile_size(image: Image) -> tuple[int, int]:
    """Return width and height in square pixels."""
    between_rows, between_columns = image.spacing_in_plane or (1.0, 1.0)
    width = max(image.size[1], TILE_WIDTH)
    height = width * (image.size[0] * between_rows) / (image.size[1] * between_columns)
    longest = LONGEST_TILE if image.num_slices > 1 else 4 * LONGEST_TILE
    shrink = min(1.0, longest / max(width, height))
    return max(1, round(width * shrink)), max(1, round(height * shrink))


def _contours(labels: ndarray) -> ndarray:
    """Mark the labelled pixels that touch another label."""
    edge = np.zeros(labels.shape, bool)
    vertical, horizontal = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    return edge & (labels > 0)


def _with_legend(picture: Any, mask: Mask) -> Any:
    """Return the picture with the classes that it shows named below."""
    import PIL.Image
    from PIL import ImageDraw

    font = _font()
    classes = zip(mask.areas(), mask.classes.colors[1:], strict=True)
    entries = [(area.name, color) for area, color in classes if area.pixels] or [("no labels", (0, 0, 0))]
    places: list[tuple[int, int, str, tuple[int, int, int]]] = []
    left, line, widest = 0, 0, 0
    for name, color in entries:
        width = LEGEND_HEIGHT + ceil(font.getlength(name)) + 8
        if left and left + width > picture.width:
            left, line = 0, line + 1
        places.append((left, picture.height + line * LEGEND_HEIGHT, name, color))
        left += width
        widest = max(widest, left)
    sheet = PIL.Image.new("RGB", (max(picture.width, widest), picture.height + (line + 1) * LEGEND_HEIGHT))
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for left, top, name, color in places:
        draw.rectangle((left + 5, top + 5, left + 16, top + 16), fill=color)
        draw.text((left + LEGEND_HEIGHT, top + 2), name, fill="white", font=font)
    return sheet


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=13)
