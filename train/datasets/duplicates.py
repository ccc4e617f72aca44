"""Find pictures that are copies of one another: the same pixels, or the same picture resized or compressed again.

A picture's look is the 63 lowest frequencies of its 32 x 32 thumbnail, each above or below their median, which neither
size, nor brightness and contrast, nor JPEG's losses change much (the "pHash" of Zauner 2010). Two looks that differ in
few bits are candidates; alike they are only if the thumbnails agree as well, since pictures of one kind, taken by one
device, share their low frequencies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Num
from numpy import ndarray

from medseg_trt.imaging.digest import image_digest
from medseg_trt.imaging.preprocess import resize

THUMBNAIL = 32  # pixels
FREQUENCIES = 8  # along each axis; without the mean, 63 bits
# Copies of 100 slices and photographs, 90 to 640 pixels wide, at 0.37 to 1.5 times their size and as JPEG of quality 20
# to 80, differed in up to 8 bits and correlated at 0.9947 and more, those of 256 pixels and more at 0.9985 and more.
# Different slices of one scan, 8 mm and more apart, came up to 0.9928; of different scans to 0.83.
MAX_BITS = 8
MIN_CORRELATION = 0.994
BLOCK = 512  # pictures compared with all others at once


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Look:
    """What is kept of a picture to find its copies."""

    digest: str  # of the pixels, with their shape and type, whatever file they lie in
    bits: int
    thumbnail: Float32[ndarray, "32 32"]  # of mean 0 and norm 1; all 0 of a picture of one grey


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two pictures that are copies, by their places in the sequence that was looked through."""

    first: int
    second: int
    is_exact: bool  # the same pixels; else alike


def look_at(pixels: Num[ndarray, "slices height width channels"], window: tuple[float, float] | None = None) -> Look:
    """Return the look of a picture, or of the middle slice of a volume, whose digest is of all slices.

    Args:
        pixels: as they were read.
        window: lower and upper end of the values that matter.
    """
    digest = f"{pixels.shape} {pixels.dtype.str} {image_digest(pixels)}"
    middle = pixels[len(pixels) // 2]
    grey = np.zeros(middle.shape[:2], np.float32)
    for channel in range(middle.shape[2]):  # a mean over the last axis takes five times as long
        grey += middle[..., channel] / np.float32(middle.shape[2])
    if window is not None:
        grey = grey.clip(*window)
    small = resize(grey, (THUMBNAIL, THUMBNAIL), "linear_antialias")
    small = small - small.mean()
    norm = float(np.linalg.norm(small))
    low = (COSINES @ small @ COSINES.T).ravel()[1:]
    bits = int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")
    return Look(digest=digest, bits=bits, thumbnail=small / norm if norm > 0 else np.zeros_like(small))


def find_copies(looks: Sequence[Look], groups: Sequence[str | None]) -> list[Pair]:
    """Return all pairs of copies; pictures that are merely alike and of one group are none, frames of a film for one.

    Pictures of one grey, such as slices of nothing but air, are copies of nothing.
    """
    bits = np.array([look.bits for look in looks], np.uint64)
    shown = np.array([look.thumbnail.any() for look in looks], bool)
    found: list[Pair] = []
    for start in range(0, len(looks), BLOCK):
        distance = np.bitwise_count(bits[start : start + BLOCK, np.newaxis] ^ bits)
        near = (distance <= MAX_BITS) & shown & shown[start : start + BLOCK, np.newaxis]
        for row, column in np.argwhere(near).tolist():
            first, second = start + row, column
            same_group = groups[first] is not None and groups[first] == groups[second]
            if first >= second or same_group or looks[first].digest == looks[second].digest:
                continue
            if float((looks[first].thumbnail * looks[second].thumbnail).sum()) >= MIN_CORRELATION:
                found.append(Pair(first=first, second=second, is_exact=False))
    return [*_exact(looks), *found]


def _exact(looks: Sequence[Look]) -> list[Pair]:
    first_of: dict[str, int] = {}
    shown = [index for index, look in enumerate(looks) if look.thumbnail.any()]
    pairs = ((first_of.setdefault(looks[index].digest, index), index) for index in shown)
    return [Pair(first=first, second=second, is_exact=True) for first, second in pairs if first != second]


def _cosines() -> Float32[ndarray, "8 32"]:
    """Return the first rows of the discrete cosine transform of type II."""
    places = (np.arange(THUMBNAIL) + 0.5) / THUMBNAIL
    return np.cos(np.pi * np.arange(FREQUENCIES)[:, np.newaxis] * places).astype(np.float32)


COSINES = _cosines()
