"""Segment a slide window by window: rows are read, segmented and written, and memory holds a row of windows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.mask_pyramid import write_pyramid
from medseg_trt.imaging.formats.slide import Slide, open_rows
from medseg_trt.imaging.preprocess import Size, for_image
from medseg_trt.imaging.segment import Run
from medseg_trt.imaging.slide_mask import SlideMask
from medseg_trt.progress import LOG, track
from medseg_trt.spec import Classes, Preprocessing
from medseg_trt.tiling.blend import ReadRows
from medseg_trt.tiling.segment import check_tiles, label_rows
from medseg_trt.tiling.windows import Tiles, starts, window_size

MAX_ROW_BYTES = 2**32  # of pixels and logits of a row of windows
Judge = Callable[[ReadRows, Preprocessing], str | None]
FinishBands = Callable[[Iterator[ndarray]], Iterator[ndarray]]
SUMS = 2  # arrays of the size of a row's logits at once: sums, and the mean of what is complete


def segment_slide(
    run: Run,
    slide: Slide,
    preprocessing: Preprocessing,
    classes: Classes,
    tiles: Tiles,
    path: Path,
    label: str | None = None,
    check: Callable[[], None] = lambda: None,
    judge: Judge = lambda *_: None,
    finish: FinishBands = lambda bands: bands,
) -> SlideMask:
    """Write the mask of a slide, a tiled and pyramidal TIFF, atomically.

    Args:
        run: the network.
        slide: the level of the slide that is read.
        preprocessing: of the network.
        classes: of its labels.
        tiles: how the slide is cut.
        path: of the mask.
        label: shows progress over the rows of windows under this name; None shows none.
        check: called after every row of windows; what it raises ends the work, and nothing is written.
        judge: says in which way the slide, with its preprocessing, is unlike the training images.
        finish: corrects the labels of the whole slide.

    Raises:
        InputError: a tile of the slide is damaged, or a row of windows would take more than ``MAX_ROW_BYTES``.
        UsageError: the preprocessing resizes with splines.
    """
    check_tiles(preprocessing)
    window = window_size(tiles, preprocessing, slide.spacing_mm)
    _require_memory(slide, window, classes)
    if slide.level:
        LOG.info("%s is read at level %d of its pyramid, %d x %d pixels", slide.path, slide.level, *slide.size[::-1])
    with open_rows(slide) as read_rows:
        contract = _for_slide(preprocessing, slide, read_rows, check)
        unusual = judge(read_rows, contract)
        bands = label_rows(run, read_rows, slide.size, contract, window, tiles.overlap)

        def labels() -> Iterator[ndarray]:
            total = len(starts(max(slide.size[0], window[0]), window[0], tiles.overlap))
            for _, band in bands if label is None else track(bands, label, total=total):
                check()
                yield band

        path.parent.mkdir(parents=True, exist_ok=True)
        counts = write_pyramid(path, finish(labels()), slide.size, classes, slide.spacing_mm)
    return SlideMask(
        path=slide.path,
        file=path,
        size=slide.size,
        counts=counts,
        classes=classes,
        spacing_mm=slide.spacing_mm,
        stem=slide.stem,
        unusual=unusual,
    )


def _require_memory(slide: Slide, window: Size, classes: Classes) -> None:
    """Refuse windows whose rows take too much memory.

    Raises:
        InputError: they do.
    """
    width = max(slide.size[1], window[1])
    pixel_rows = 2 * window[0] + 2 * slide.segment_rows  # decoded strips or tiles, and a band of them
    num_bytes = pixel_rows * slide.row_bytes + SUMS * window[0] * width * classes.num_logits * 4
    if num_bytes > MAX_ROW_BYTES:
        raise InputError(
            f"{slide.path}: a row of windows of {window[0]} pixels would take {num_bytes / 2**30:.1f} GiB, and "
            f"{MAX_ROW_BYTES >> 30} are allowed; give smaller windows, for example --tile 256"
        )


def _for_slide(
    preprocessing: Preprocessing, slide: Slide, read_rows: ReadRows, check: Callable[[], None]
) -> Preprocessing:
    """Return the preprocessing of this slide; with ``own_window`` all its pixels are read once for their range."""
    if not preprocessing.own_window:
        return preprocessing
    low, high = np.inf, -np.inf
    for first in range(0, slide.size[0], slide.segment_rows):
        check()
        rows = read_rows(first, min(first + slide.segment_rows, slide.size[0]))
        low, high = min(low, float(rows.min())), max(high, float(rows.max()))
    return for_image(preprocessing, np.array([low, high]).reshape(1, 2, 1, 1))
