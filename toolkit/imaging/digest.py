"""Identify an image by its pixels, whatever file stores them."""

import hashlib
from collections.abc import Iterable

import numpy as np
from jaxtyping import Num
from numpy import ndarray


def image_digest(pixels: Num[ndarray, "..."]) -> str:
    """Return the SHA-256 of an array's bytes in C order as 64 hexadecimal digits; shape and type do not enter."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def image_digests(images: Iterable[Num[ndarray, "..."]]) -> tuple[str, ...]:
    """Return the ``image_digest`` of every image; an array is a sequence along its first axis."""
    return tuple(image_digest(image) for image in images)
