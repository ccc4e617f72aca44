"""Find duplicate images: identical pixels, or the same image resized or recompressed.

An image hash has one bit for each of the 63 lowest frequencies of the image's 32 x 32 thumbnail: above or below their
median. Size, brightness, contrast and JPEG compression change it little (the "pHash" of Zauner 2010). Two images whose
hashes differ in few bits are candidates. They are duplicates only if their thumbnails correlate as well, because
different images of one kind from one device share their low frequencies.
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
# to 80, differed in at most 8 bits and correlated at 0.9947 or more; those of 256 pixels or more at 0.9985 or more.
# Different slices of one scan, 8 mm or more apart, correlated at up to 0.9928; those of different scans at up to 0.83.
MAX_BITS = 8
MIN_CORRELATION = 0.994
BLOCK = 512  # images compared with all others at once


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageHash:
    """The features of an image that identify its duplicates."""

    digest: str  # SHA-256 of the pixels, independent of the file format
    bits: int
    thumbnail: Float32[ndarray, "32 32"]  # mean 0 and norm 1; all 0 for a constant image


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicatePair:
    """Two duplicate images, by their indices in the sequence that was searched."""

    first: int
    second: int
    is_exact: bool  # True: the same pixels; False: similar


def hash_image(
    pixels: Num[ndarray, "slices height width channels"], window: tuple[float, float] | None = None
) -> ImageHash:
    """Return the hash of an image; for a volume, of its middle slice, with the digest of all slices.

    Args:
        pixels: as read from the file.
        window: lower and upper limit that the values are clipped to.
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
    return ImageHash(digest=digest, bits=bits, thumbnail=small / norm if norm > 0 else np.zeros_like(small))


def find_duplicates(hashes: Sequence[ImageHash], groups: Sequence[str | None]) -> list[DuplicatePair]:
    """Return all pairs of duplicates.

    Similar images of one group, such as frames of a video, are not reported unless their pixels are identical.
    Constant images, such as slices of air, are never duplicates.
    """
    bits = np.array([image_hash.bits for image_hash in hashes], np.uint64)
    varied = np.array([image_hash.thumbnail.any() for image_hash in hashes], bool)
    similar: list[DuplicatePair] = []
    for start in range(0, len(hashes), BLOCK):
        distance = np.bitwise_count(bits[start : start + BLOCK, np.newaxis] ^ bits)
        near = (distance <= MAX_BITS) & varied & varied[start : start + BLOCK, np.newaxis]
        for row, column in np.argwhere(near).tolist():
            first, second = start + row, column
            same_group = groups[first] is not None and groups[first] == groups[second]
            if first >= second or same_group or hashes[first].digest == hashes[second].digest:
                continue
            if float((hashes[first].thumbnail * hashes[second].thumbnail).sum()) >= MIN_CORRELATION:
                similar.append(DuplicatePair(first=first, second=second, is_exact=False))
    return [*_exact(hashes), *similar]


def _exact(hashes: Sequence[ImageHash]) -> list[DuplicatePair]:
    first_of: dict[str, int] = {}
    varied = [index for index, image_hash in enumerate(hashes) if image_hash.thumbnail.any()]
    pairs = ((first_of.setdefault(hashes[index].digest, index), index) for index in varied)
    return [DuplicatePair(first=first, second=second, is_exact=True) for first, second in pairs if first != second]


def _cosines() -> Float32[ndarray, "8 32"]:
    """Return the first rows of the discrete cosine transform of type II."""
    positions = (np.arange(THUMBNAIL) + 0.5) / THUMBNAIL
    return np.cos(np.pi * np.arange(FREQUENCIES)[:, np.newaxis] * positions).astype(np.float32)


COSINES = _cosines()
