"""Draw masks over their images: a 2-D image or the labelled slices of a volume, with the class colours and a legend."""

from math import ceil, isqrt
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from medseg_trt.files import atomic_file
from medseg_trt.imaging.images import Image, Mask

ALPHA = 0.45  # of a class colour over the image; contours are opaque
MAX_SLICES = 12  # of a volume
TILE_WIDTH = 256  # small slices are enlarged to it
LONGEST_TILE = 512  # of a montage; a single 2-D image may be four times as long
LEGEND_HEIGHT = 22
CAPTION_TOP = 18  # below the number of the first slice
MARGIN = 3  # pixels between a border and the letter of a side
ANCHORS = {(0.0, 0.5): "lm", (1.0, 0.5): "rm", (0.5, 0.0): "mt", (0.5, 1.0): "mb"}  # of Pillow, by border
SLICE_AXIS = 2  # of the columns of ``Geometry.affine_mm``


def write_overlay(image: Image, mask: Mask, window: tuple[float, float], path: Path) -> None:
    """Write a PNG of the image with coloured classes and a legend; for a volume, up to 12 labelled slices.

    Args:
        image: the image of the mask.
        mask: its labels.
        window: the values shown as black and white, for example ``Preprocessing.window``.
        path: the PNG file to write.
    """
    import PIL.Image
    from PIL import ImageDraw

    shown = _slices_to_show(mask.labels)
    tiles = [tile(image, mask, window, index) for index in shown]
    columns = isqrt(len(tiles) - 1) + 1
    height, width, _ = tiles[0].shape
    sheet = np.zeros((ceil(len(tiles) / columns) * height, columns * width, 3), np.uint8)
    for index, tile_pixels in enumerate(tiles):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + height, left : left + width] = tile_pixels
    drawn = PIL.Image.fromarray(sheet)
    if len(shown) < image.num_slices:
        ImageDraw.Draw(drawn).text((4, CAPTION_TOP), f"{len(shown)} of {image.num_slices} slices", **_text_style())
    overlay = _with_legend(drawn, mask)
    with atomic_file(path) as temporary:
        overlay.save(temporary, format="PNG")


def _draw_sides(drawn: Any, image: Image) -> None:
    """Write L and R, the patient's sides, at the borders of Pillow's image where the file states them."""
    from PIL import ImageDraw

    width, height = drawn.size
    draw = ImageDraw.Draw(drawn)
    for (across, down), letter in patient_sides(image).items():
        position = (MARGIN + across * (width - 2 * MARGIN), MARGIN + down * (height - 2 * MARGIN))
        draw.text(position, letter, anchor=ANCHORS[across, down], **_text_style())


def patient_sides(image: Image) -> dict[tuple[float, float], str]:
    """Return the borders at the patient's left and right, as parts of width and height, with their letters.

    None, where the file does not state them or they lie in front and behind: of a sagittal slice.
    """
    if image.geometry is None or not image.geometry.is_known:
        return {}
    rightward = image.geometry.affine_mm[0, :3] / np.linalg.norm(image.geometry.affine_mm[:3, :3], axis=0)
    axis = int(np.abs(rightward).argmax())  # column, row or slice
    if axis == SLICE_AXIS:
        return {}
    first, last = "LR" if rightward[axis] > 0 else "RL"
    return {(0.0, 0.5): first, (1.0, 0.5): last} if axis == 0 else {(0.5, 0.0): first, (0.5, 1.0): last}


def _slices_to_show(labels: ndarray) -> list[int]:
    labelled = np.flatnonzero(labels.any(axis=(1, 2)))
    candidates = labelled if labelled.size else np.arange(len(labels))
    positions = np.linspace(0, len(candidates) - 1, min(len(candidates), MAX_SLICES))
    return candidates[np.round(positions).astype(np.intp)].tolist()


def tile(image: Image, mask: Mask, window: tuple[float, float], index: int) -> UInt8[ndarray, "height width 3"]:
    """Draw one slice with its classes, resampled to square pixels."""
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
        ImageDraw.Draw(blended).text((4, 2), f"slice {index}", **_text_style())
    _draw_sides(blended, image)
    return np.array(blended)


def _tile_size(image: Image) -> tuple[int, int]:
    """Return width and height of the tile in square pixels."""
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


def _with_legend(overlay: Any, mask: Mask) -> Any:
    """Append a legend of the classes that occur below Pillow's image."""
    import PIL.Image
    from PIL import ImageDraw

    font = _font()
    classes = zip(mask.areas(), mask.classes.colors[1:], strict=True)
    entries = [(area.name, color) for area, color in classes if area.pixels] or [("no labels", (0, 0, 0))]
    placed_entries: list[tuple[int, int, str, tuple[int, int, int]]] = []
    left, line, widest = 0, 0, 0
    for name, color in entries:
        width = LEGEND_HEIGHT + ceil(font.getlength(name)) + 8
        if left and left + width > overlay.width:
            left, line = 0, line + 1
        placed_entries.append((left, overlay.height + line * LEGEND_HEIGHT, name, color))
        left += width
        widest = max(widest, left)
    sheet = PIL.Image.new("RGB", (max(overlay.width, widest), overlay.height + (line + 1) * LEGEND_HEIGHT))
    sheet.paste(overlay, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for left, top, name, color in placed_entries:
        draw.rectangle((left + 5, top + 5, left + 16, top + 16), fill=color)
        draw.text((left + LEGEND_HEIGHT, top + 2), name, fill="white", font=font)
    return sheet


def _text_style() -> dict[str, Any]:
    return {"fill": "white", "font": _font(), "stroke_width": 1, "stroke_fill": "black"}


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=13)
