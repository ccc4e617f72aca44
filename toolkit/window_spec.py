"""The windows that a network is trained on and makes masks with, as recipes, checkpoints and bundles record them."""

from dataclasses import dataclass
from typing import Literal

LARGEST = 1 << 14  # pixels: the sides of the largest image that is decoded as a whole; smaller images are padded


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """A network sees windows of images at their own resolution instead of whole slices, in training and afterwards.

    ``size`` is rows and columns in pixels of the image; "auto" is what the network takes, without resizing, or its
    field of view where it and the image have a pixel spacing. ``overlap`` is that of neighbouring windows after the
    training, from 0 to less than 1.
    """

    size: int | Literal["auto"] = "auto"
    overlap: float = 0.25

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.size != "auto" and not 1 <= self.size <= LARGEST:
            raise ValueError(f"windows of {self.size} pixels are impossible; give 1 to {LARGEST}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"the overlap is {self.overlap}; it must be from 0 to less than 1")
