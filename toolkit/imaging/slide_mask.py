"""The mask of a slide: written by rows, and never in memory as a whole."""

from dataclasses import dataclass
from pathlib import Path

from medseg_trt.imaging.areas import Area, areas_of
from medseg_trt.spec import Classes


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideMask:
    """A mask in a tiled, pyramidal TIFF file, and how much its classes cover."""

    path: Path  # of the image
    file: Path  # of the mask
    size: tuple[int, int]  # height, width in pixels, at full resolution
    counts: tuple[int, ...]  # pixels of every class
    classes: Classes
    spacing_mm: tuple[float, float] | None = None  # between rows and columns
    stem: str | None = None
    unusual: str | None = None  # in which way the slide is unlike the training images; None: it is not, or not known

    @property
    def name(self) -> str:
        """The image's name, for messages."""
        return self.stem or self.path.name

    def areas(self) -> tuple[Area, ...]:
        """Measure every class except the background."""
        spacing_mm = self.spacing_mm and (self.spacing_mm[0], *self.spacing_mm)  # a slice has no thickness
        return areas_of(self.counts, self.classes, spacing_mm, is_slice=True)
