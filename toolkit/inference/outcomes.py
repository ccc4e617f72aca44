"""The outcomes of an image in a run of ``infer``."""

from dataclasses import dataclass
from pathlib import Path

from medseg_trt.imaging.formats.slide import Slide
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.slide_mask import SlideMask
from medseg_trt.inference.resume import Record


@dataclass(frozen=True, slots=True, eq=False)
class Segmented:
    """The image has a mask."""

    image: Image
    mask: Mask


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """An earlier run has written the mask of the same image with the same bundle and options."""

    record: Record


@dataclass(frozen=True, slots=True, eq=False)
class Refused:
    """The image cannot be used."""

    error: Exception
    image: Image | None = None  # None: it could not be read


@dataclass(frozen=True, slots=True, eq=False)
class SlideToSegment:
    """A slide, and the file that its mask is written to."""

    slide: Slide
    path: Path


@dataclass(frozen=True, slots=True, eq=False)
class SlideSegmented:
    """The mask of a slide has been written."""

    mask: SlideMask


Outcome = Segmented | SlideSegmented | Kept | Refused
