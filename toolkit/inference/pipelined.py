"""Segment many images so that reading one, running the network on another and writing a third overlap.

It is the loop of ``segment.segment``, a batch of slices at a time, with a thread for each of its three steps: one reads
and prepares, one runs the network, one brings the answers back to size; what is done with the mask is done in the
caller's. Pillow, zlib, NumPy and the back-ends let other threads run while they work. The order stays, queues are
short, and an error comes up where the loop would have raised it: after everything before it has been handed over.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from threading import Condition
from typing import TypeVar, cast

import numpy as np
from numpy import ndarray

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import InputError, MedsegError
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.preprocess import outside_fraction
from medseg_trt.imaging.segment import Steps, steps
from medseg_trt.inference.prefetch import POLL_S, Prefetcher, StoppedError
from medseg_trt.progress import LOG, track
from medseg_trt.sessions.base import Session

Other = TypeVar("Other")

ROOM_BYTES = 128 << 20  # of pixels: a volume of 512 x 512 x 256 in 16 bits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Failure:
    """An image that could not be segmented, and why."""

    image: Image
    error: Exception


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """One image on its way."""

    image: Image
    num_parts: int
    steps: Steps | None  # None: they could not be prepared
    errors: list[Exception] = field(default_factory=list[Exception])  # from the first on, nothing more is done for it


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """A batch of an image's slices on its way."""

    job: _Job
    start: int
    values: ndarray | None  # the network's input, then its answer; None after an error


class _Room:
    """The memory of the images on their way: none is read while those before it take more than ``ROOM_BYTES``."""

    def __init__(self) -> None:
        self._taken = 0
        self._changed = Condition()

    def take(self, count: int) -> None:
        with self._changed:
            self._taken += count
            self._changed.notify()

    def is_free(self) -> bool:
        """Say so, or wait for ``POLL_S`` whether it will be."""
        with self._changed:
            return self._changed.wait_for(lambda: self._taken <= ROOM_BYTES, POLL_S)


def segment_many(
    images: Iterable[Image | Other], session: Session, bundle: Bundle, batch: int, label: str | None = None
) -> Generator[tuple[Image, Mask] | Failure | Other, None, None]:
    """Yield every image with its mask, in order; what is no image comes out as it went in, in its place.

    ``images`` is gone through in another thread, a few batches ahead of the caller, and large ones one at a time. When
    the caller stops, whatever the reason, the threads end before this does. An error with one image, lack of memory
    included, comes out as a ``Failure`` in its place; our own errors but ``InputError`` concern all images and are
    raised.

    Args:
        images: read one by one, for example by a generator.
        session: the bundle's network.
        bundle: its preprocessing and classes are used.
        batch: how many slices go through the network at once.
        label: where it is given, progress over the slices is shown under this name.
    """
    room = _Room()
    with Prefetcher() as prefetcher:
        parts = prefetcher.prefetch(_prepared(images, session, bundle, batch, room, prefetcher))
        answers = prefetcher.prefetch(_answered(parts))
        for found in prefetcher.prefetch(_finished(answers, bundle, label), depth=1):
            yield found
            if isinstance(found, tuple):
                room.take(-found[0].pixels.nbytes)
            elif isinstance(found, Failure):
                room.take(-found.image.pixels.nbytes)


def _prepared(
    images: Iterable[Image | Other], session: Session, bundle: Bundle, batch: int, room: _Room, prefetcher: Prefetcher
) -> Iterator[_Part | Other]:
    for image in images:
        if not isinstance(image, Image):
            yield image
            continue
        room.take(image.pixels.nbytes)
        starts = range(0, image.num_slices, batch)
        job = _Job(image=image, num_parts=len(starts), steps=None)
        with _failing(job):
            job = replace(job, steps=_steps(image, session, bundle))
        for start in starts:
            values = None
            with _failing(job):
                if job.steps is not None and not job.errors:
                    values = job.steps.prepare(image.pixels[start : start + batch])
            yield _Part(job=job, start=start, values=values)
        prefetcher.wait_for(room.is_free)


def _steps(image: Image, session: Session, bundle: Bundle) -> Steps:
    _warn_of_what_is_outside(image, bundle)
    masks = session.masks if session.gives_masks else None
    on_device = session.pixel_path(image.pixels, image.spacing_in_plane)
    return steps(session.run, image, bundle.preprocessing, masks, on_device)


def _answered(parts: Iterable[_Part | Other]) -> Iterator[_Part | Other]:
    for part in parts:
        if not isinstance(part, _Part):
            yield part
            continue
        values = None
        with _failing(part.job):
            if part.values is not None and part.job.steps is not None and not part.job.errors:
                values = part.job.steps.run(part.values)
        yield replace(part, values=values)


def _finished(
    answers: Iterator[_Part | Other], bundle: Bundle, label: str | None
) -> Iterator[tuple[Image, Mask] | Failure | Other]:
    for first in answers:
        if not isinstance(first, _Part):
            yield first
            continue
        job = first.job
        rest = cast("Iterator[_Part]", islice(answers, job.num_parts - 1))  # an image's parts follow one another
        parts = chain([first], rest)
        mask: Mask | None = None
        with _failing(job):
            mask = _mask(job, parts if label is None else track(parts, label, total=job.num_parts), bundle)
        for _ in parts:  # those of a failed image that are still to come
            pass
        yield Failure(image=job.image, error=job.errors[0]) if mask is None else (job.image, mask)


def _mask(job: _Job, parts: Iterable[_Part], bundle: Bundle) -> Mask | None:
    labels = np.empty(job.image.pixels.shape[:3], np.uint8)
    for part in parts:
        if job.errors or job.steps is None or part.values is None:
            return None
        found = job.steps.finish(part.values)
        labels[part.start : part.start + len(found)] = found
    return Mask.of(job.image, labels, bundle.classes)


@contextmanager
def _failing(job: _Job) -> Generator[None, None, None]:
    """Note an error that concerns one image alone; others are raised."""
    try:
        yield
    except InputError as error:
        job.errors.append(error)
    except (MedsegError, StoppedError):
        raise
    except Exception as error:
        job.errors.append(error)


def _warn_of_what_is_outside(image: Image, bundle: Bundle) -> None:
    outside = outside_fraction(image.size, bundle.preprocessing, image.spacing_in_plane)
    if outside > 0:
        LOG.warning(
            "%s: %.0f %% of every slice lies outside the network's field of view and becomes background",
            image.stem or image.path.name, 100 * outside,
        )  # fmt: skip
