"""Where the masks of a run of ``infer`` go; ``MaskFolder`` is the destination that writes files."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.imaging.images import Image, Mask, Source, find_images, read_image
from medseg_trt.imaging.slide_mask import SlideMask
from medseg_trt.inference.outcomes import Kept, Refused, SlideToSegment
from medseg_trt.inference.resume import Record
from medseg_trt.sessions.base import Session
from medseg_trt.tiling.segment import with_mpp


class Destination:
    """Hand masks to the caller and write nothing; the first file that cannot be used ends the run."""

    def find_sources(self, inputs: Sequence[Path], bundle: Bundle) -> Sequence[Source]:
        """Find the images among files and folders; ``bundle`` is the one that the run uses.

        Raises:
            InputError: an input cannot be used.
        """
        return find_images(inputs)

    def close(self) -> None:
        """Delete what was kept on disk for the run alone."""

    @contextmanager
    def opened(self) -> Generator[None, None, None]:
        """Prepare for the run, and complete what is written at its end, also after an error."""
        yield

    def read(
        self, sources: Sequence[Source], bundle: Bundle, session: Session, batch: int
    ) -> Iterator[Image | SlideToSegment | Kept | Refused]:
        """Yield one item for every source, in order; called in a thread of its own."""
        return (with_mpp(read_image(source), bundle.tiles) for source in sources)

    def write(self, source: Source, image: Image, mask: Mask, bundle: Bundle) -> bool:
        """Write a mask and return whether that succeeded."""
        return True

    def write_slide(self, source: Source, mask: SlideMask) -> None:
        """Note the mask of a slide, which has been written where ``read`` asked for it."""

    def keep(self, source: Source, record: Record) -> None:
        """Note that the mask of an earlier run is kept."""

    def refuse(self, source: Source, error: Exception) -> None:
        """Handle an image that cannot be used: raise ``error``, or note it and let the run go on."""
        raise error
