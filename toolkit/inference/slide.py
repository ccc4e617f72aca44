"""Segment a slide as a bundle asks: in windows, compared with the training images, and post-processed."""

from collections.abc import Callable, Iterator

from numpy import ndarray

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.guard.slide import unusual_slide
from medseg_trt.imaging.formats.slide import Slide
from medseg_trt.imaging.segment import Run
from medseg_trt.imaging.slide_mask import SlideMask
from medseg_trt.inference.outcomes import SlideToSegment
from medseg_trt.postprocess.apply import unsuited
from medseg_trt.postprocess.streamed import postprocessed_bands
from medseg_trt.progress import LOG
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.blend import ReadRows
from medseg_trt.tiling.slides import FinishBands, Judge, segment_slide


def slide_mask(
    run: Run, item: SlideToSegment, bundle: Bundle, label: str | None, check: Callable[[], None]
) -> SlideMask:
    """Segment a slide and write its mask by rows.

    Args:
        run: the network.
        item: the slide, and the file of its mask.
        bundle: of the network, with the windows that the slide is cut into.
        label: shows progress under this name; None shows none.
        check: called now and then; what it raises ends the work, and nothing is written.

    Raises:
        InputError: the slide is damaged, or its windows would take too much memory.
    """
    assert bundle.tiles is not None
    return segment_slide(
        run,
        item.slide,
        bundle.preprocessing,
        bundle.classes,
        bundle.tiles,
        item.path,
        label,
        check,
        judge=_judge(item.slide, bundle, check),
        finish=_finisher(item, bundle, check),
    )


def _judge(slide: Slide, bundle: Bundle, check: Callable[[], None]) -> Judge:
    def judge(read_rows: ReadRows, contract: Preprocessing) -> str | None:
        guard = bundle.content.guard
        if guard is None:
            return None
        reason = unusual_slide(guard, read_rows, slide.size, slide.spacing_mm, contract, slide.segment_rows, check)
        if reason is not None:
            LOG.warning("%s is unlike the training images: %s", slide.stem or slide.path.name, reason)
        return reason

    return judge


def _finisher(item: SlideToSegment, bundle: Bundle, check: Callable[[], None]) -> FinishBands:
    slide, post, name = item.slide, bundle.postprocessing, item.slide.stem or item.slide.path.name

    def finish(bands: Iterator[ndarray]) -> Iterator[ndarray]:
        if post is None:
            return bands
        if (reason := unsuited(post, 1, slide.size, slide.spacing_mm is not None, bundle.trained_side)) is not None:
            LOG.warning("%s is not post-processed: %s", name, reason)
            return bands
        return postprocessed_bands(
            bands, slide.size, post, bundle.classes, slide.spacing_mm, item.path.parent, name, check
        )

    return finish
