"""Segment many images so that reading, inference and writing run at the same time.

This is the loop of ``segment.segment``, a batch of slices at a time, with one thread for each of its three stages: the
first reads and prepares, the second runs the network, the third restores masks to the size of the image. A session with
streams has a thread for each of them. The caller's thread uses the masks. Pillow, zlib, NumPy and the back-ends release
the GIL while they work. Order is kept, queues are short, and an error is raised where the loop would raise it: after
all earlier images have been handed over.
"""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from threading import Condition
from typing import cast

import numpy as np
from numpy import ndarray

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import InputError, MedsegError
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.preprocess import outside_fraction
from medseg_trt.imaging.segment import SegmentationStages, segmentation_stages
from medseg_trt.inference.outcomes import Kept, Outcome, Refused, Segmented, SlideSegmented, SlideToSegment
from medseg_trt.inference.prefetch import POLL_S, Prefetcher, StoppedError
from medseg_trt.inference.slide import slide_mask
from medseg_trt.progress import LOG, track
from medseg_trt.sessions.base import Session
from medseg_trt.spec import Preprocessing
from medseg_trt.tiling.segment import tiled

MAX_PENDING_BYTES = 128 << 20  # of pixels: a volume of 512 x 512 x 256 in 16 bits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _PendingImage:
    """An image between reading and its mask."""

    image: Image
    num_batches: int
    steps: SegmentationStages | None  # None: preparing them failed
    unusual: str | None = None  # see ``Bundle.unusual``
    errors: list[Exception] = field(default_factory=list[Exception])  # after the first, no stage works on the image


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _SliceBatch:
    """Consecutive slices of a pending image."""

    pending: _PendingImage
    start: int  # index of the first slice
    values: ndarray | None  # the network's input, then its output; None after an error


# What passes from stage to stage; slices are worked on by all, and slides by the second alone.
Item = _SliceBatch | SlideToSegment | SlideSegmented | Kept | Refused
Read = Image | SlideToSegment | Kept | Refused


class _MemoryBudget:
    """Limits the pixels of pending images: no image is read while they take more than ``MAX_PENDING_BYTES``."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._changed = Condition()

    def add(self, num_bytes: int) -> None:
        """Count the pixels of an image; a negative number releases them."""
        with self._changed:
            self._num_bytes += num_bytes
            self._changed.notify()

    def is_free(self) -> bool:
        """Return whether an image may be read, after waiting for at most ``POLL_S``."""
        with self._changed:
            return self._changed.wait_for(lambda: self._num_bytes <= MAX_PENDING_BYTES, POLL_S)


def segment_many(
    images: Iterable[Read], session: Session, bundle: Bundle, batch: int, label: str | None = None
) -> Generator[Outcome, None, None]:
    """Yield the outcome of every image, in order; ``Kept`` and ``Refused`` pass through unchanged.

    Slides are segmented and written by rows.

    Another thread iterates over ``images``, a few batches ahead of the caller, and reads large images one at a time.
    When the caller stops, for any reason, the threads end before this generator does. An error of one image, lack of
    memory included, is yielded as ``Refused``. A ``MedsegError`` other than ``InputError`` concerns all images and is
    raised.

    Args:
        images: read one by one, for example by a generator.
        session: the bundle's network.
        bundle: its preprocessing and classes are used.
        batch: slices per run of the network.
        label: shows progress over the slices under this name; None shows none.
    """
    budget = _MemoryBudget()
    with _runs(session, bundle) as pool, Prefetcher() as prefetcher:
        prepared = prefetcher.prefetch(_prepare(images, session, bundle, batch, budget, prefetcher))
        if pool is None:
            outputs = prefetcher.prefetch(_ran(item, session, bundle, label, prefetcher) for item in prepared)
        else:
            started = (pool.submit(_ran, item, session, bundle, label, prefetcher) for item in prepared)
            outputs = _in_order(prefetcher.prefetch(started, depth=session.streams), prefetcher)
        for outcome in prefetcher.prefetch(_finish(outputs, bundle, label), depth=1):
            yield outcome
            if isinstance(outcome, Segmented | Refused) and outcome.image is not None:
                budget.add(-outcome.image.pixels.nbytes)


def _prepare(
    images: Iterable[Read],
    session: Session,
    bundle: Bundle,
    batch: int,
    budget: _MemoryBudget,
    prefetcher: Prefetcher,
) -> Iterator[Item]:
    warned = False
    for image in images:
        if not isinstance(image, Image):
            yield image
            continue
        if not warned and has_foreign_values(image, bundle.preprocessing):
            warned = True
            LOG.warning(
                "%s holds values of a picture, 0 … 255, but the network was trained on %g … %g (window); "
                "are these CT values?",
                *(image.stem or image.path.name, *bundle.preprocessing.window),
            )
        budget.add(image.pixels.nbytes)
        starts = range(0, image.num_slices, batch)
        pending = _PendingImage(image=image, num_batches=len(starts), steps=None)
        with _collect_errors(pending):
            pending = replace(pending, steps=_steps(image, session, bundle), unusual=_unusual(image, bundle))
        for start in starts:
            values = None
            with _collect_errors(pending):
                if pending.steps is not None and not pending.errors:
                    values = pending.steps.prepare(image.pixels[start : start + batch])
            yield _SliceBatch(pending=pending, start=start, values=values)
        prefetcher.wait_for(budget.is_free)


def _steps(image: Image, session: Session, bundle: Bundle) -> SegmentationStages:
    if bundle.tiles is not None:
        windows = tiled(session.run, image, bundle.preprocessing, bundle.tiles)
        return segmentation_stages(session.run, image, bundle.preprocessing, pixels_to_masks=windows)
    _warn_about_field_of_view(image, bundle)
    masks = session.masks if session.gives_masks else None
    on_device = session.device_pipeline(image.pixels, image.spacing_in_plane)
    return segmentation_stages(session.run, image, bundle.preprocessing, masks, on_device)


@contextmanager
def _runs(session: Session, bundle: Bundle) -> Generator[Executor | None, None, None]:
    """Yield threads for runs that overlap, or None; the windows of an image are run one after another."""
    if session.streams == 1 or bundle.tiles is not None:
        yield None
        return
    pool = ThreadPoolExecutor(session.streams, "medseg-trt run")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(started: Iterable[Future[Item]], prefetcher: Prefetcher) -> Iterator[Item]:
    """Yield results as soon as those before them are there: nothing waits for what has not been read yet."""
    for future in started:
        prefetcher.wait_for(lambda future=future: bool(wait([future], POLL_S).done))
        yield future.result()


def _ran(item: Item, session: Session, bundle: Bundle, label: str | None, prefetcher: Prefetcher) -> Item:
    if isinstance(item, SlideToSegment):
        return _slide(item, session, bundle, label, prefetcher)
    if not isinstance(item, _SliceBatch):
        return item
    values, pending = None, item.pending
    with _collect_errors(pending):
        if item.values is not None and pending.steps is not None and not pending.errors:
            values = pending.steps.run(item.values)
    return replace(item, values=values)


def _slide(
    item: SlideToSegment, session: Session, bundle: Bundle, label: str | None, prefetcher: Prefetcher
) -> SlideSegmented | Refused:
    """Segment a slide and write its mask by rows, all in this stage."""

    def check() -> None:
        prefetcher.wait_for(lambda: True)

    try:
        mask = slide_mask(session.run, item, bundle, label, check)
    except InputError as error:
        return Refused(error)
    except (MedsegError, StoppedError, OSError):
        raise
    except Exception as error:
        return Refused(error)
    return SlideSegmented(mask)


def _finish(items: Iterator[Item], bundle: Bundle, label: str | None) -> Iterator[Outcome]:
    for first in items:
        if isinstance(first, SlideToSegment):
            raise TypeError("a slide passed the stage that segments it")
        if not isinstance(first, _SliceBatch):
            yield first
            continue
        pending = first.pending
        rest = cast("Iterator[_SliceBatch]", islice(items, pending.num_batches - 1))  # batches of an image are adjacent
        batches = chain([first], rest)
        mask: Mask | None = None
        with _collect_errors(pending):
            tracked = batches if label is None else track(batches, label, total=pending.num_batches)
            mask = _mask(pending, tracked, bundle)
        for _ in batches:  # the remaining batches of a failed image
            pass
        yield Refused(pending.errors[0], pending.image) if mask is None else Segmented(pending.image, mask)


def _mask(pending: _PendingImage, batches: Iterable[_SliceBatch], bundle: Bundle) -> Mask | None:
    labels = np.empty(pending.image.pixels.shape[:3], np.uint8)
    for batch in batches:
        if pending.errors or pending.steps is None or batch.values is None:
            return None
        finished = pending.steps.finish(batch.values)
        labels[batch.start : batch.start + len(finished)] = finished
    return Mask.of(pending.image, bundle.finish(pending.image, labels), bundle.classes, pending.unusual)


@contextmanager
def _collect_errors(pending: _PendingImage) -> Generator[None, None, None]:
    """Collect an error that concerns one image alone; raise others."""
    try:
        yield
    except InputError as error:
        pending.errors.append(error)
    except (MedsegError, StoppedError):
        raise
    except Exception as error:
        pending.errors.append(error)


def has_foreign_values(image: Image, preprocessing: Preprocessing) -> bool:
    """Return whether an image is an 8-bit picture, while the network takes Hounsfield units, which go below 0."""
    is_picture = image.geometry is None and image.num_slices == 1 and image.pixels.dtype == np.uint8
    return is_picture and preprocessing.window[0] < 0 and not preprocessing.own_window


def _unusual(image: Image, bundle: Bundle) -> str | None:
    """Compare an image with the training images, and say in one line where it is far outside; that costs no mask."""
    name = image.stem or image.path.name
    try:
        reason = bundle.unusual(image)
    except Exception as error:
        LOG.warning("%s is not compared with the training images: %s: %s", name, type(error).__name__, error)
        return None
    if reason is not None:
        LOG.warning("%s is unlike the training images: %s", name, reason)
    return reason


def _warn_about_field_of_view(image: Image, bundle: Bundle) -> None:
    outside = outside_fraction(image.size, bundle.preprocessing, image.spacing_in_plane)
    if outside > 0:
        name, percent = image.stem or image.path.name, 100 * outside
        LOG.warning(
            "%s: %.0f %% of every slice lies outside the network's field of view and becomes background", name, percent
        )
