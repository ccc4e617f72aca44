"""Segment many images so that reading one, running the network on another and writing a third overlap.

It is the loop of ``segment.segment``, a batch of slices at a time, with a thread for each of its three steps: one reads
and prepares, one runs the network, one brings the answers back to size; what is done with the mask is done in the
caller's. Pillow, zlib, NumPy and the back-ends let other threads run while they work. The order stays, queues are
short, and an error comes up where the loop would have raised it: after everything before it has been handed over.
"""

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from threading import Condition
from typing import TypeVar, cast

import numpy as np
from numpy import ndarray

from medseg_trt.bundle import Bundle
from medseg_trt.images import Image, Mask
from medseg_trt.overlap import POLL_S, Overlap
from medseg_trt.preprocess import outside_fraction
from medseg_trt.progress import LOG, track
from medseg_trt.segment import Steps, steps
from medseg_trt.session import Session

Other = TypeVar("Other")

ROOM_BYTES = 128 << 20  # of pixels: a volume of 512 x 512 x 256 in 16 bits


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """A batch of an image's slices on its way."""

    image: Image
    steps: Steps
    start: int
    number: int  # of parts of this image
    values: ndarray  # the network's input, then its answer


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
) -> Generator[tuple[Image, Mask] | Other, None, None]:
    """Yield every image with its mask, in order; what is no image comes out as it went in, in its place.

    ``images`` is gone through in another thread, a few batches ahead of the caller, and large ones one at a time. When
    the caller stops, whatever the reason, the threads end before this does.

    Args:
        images: read one by one, for example by a generator.
        session: the bundle's network.
        bundle: its preprocessing and classes are used.
        batch: how many slices go through the network at once.
        label: where it is given, progress over the slices is shown under this name.
    """
    room = _Room()
    with Overlap() as overlap:
        parts = overlap.ahead(_prepared(images, session, bundle, batch, room, overlap))
        answers = overlap.ahead(_answered(parts))
        for found in overlap.ahead(_finished(answers, bundle, label), depth=1):
            yield found
            if isinstance(found, tuple):
                room.take(-found[0].pixels.nbytes)


def _prepared(
    images: Iterable[Image | Other], session: Session, bundle: Bundle, batch: int, room: _Room, overlap: Overlap
) -> Iterator[_Part | Other]:
    masks = session.masks if session.gives_masks else None
    for image in images:
        if not isinstance(image, Image):
            yield image
            continue
        room.take(image.pixels.nbytes)
        _warn_of_what_is_outside(image, bundle)
        on_device = session.pixel_path(image.pixels, image.spacing_in_plane)
        do = steps(session.run, image, bundle.preprocessing, masks, on_device)
        starts = range(0, image.num_slices, batch)
        for start in starts:
            values = do.prepare(image.pixels[start : start + batch])
            yield _Part(image=image, steps=do, start=start, number=len(starts), values=values)
        overlap.wait_for(room.is_free)


def _answered(parts: Iterable[_Part | Other]) -> Iterator[_Part | Other]:
    for part in parts:
        if isinstance(part, _Part):
            yield replace(part, values=part.steps.run(part.values))
        else:
            yield part


def _finished(
    answers: Iterator[_Part | Other], bundle: Bundle, label: str | None
) -> Iterator[tuple[Image, Mask] | Other]:
    for first in answers:
        if not isinstance(first, _Part):
            yield first
            continue
        labels = np.empty(first.image.pixels.shape[:3], np.uint8)
        rest = cast("Iterator[_Part]", islice(answers, first.number - 1))  # an image's parts follow one another
        of_image = chain([first], rest)
        for part in of_image if label is None else track(of_image, label, total=first.number):
            found = part.steps.finish(part.values)
            labels[part.start : part.start + len(found)] = found
        yield first.image, Mask.of(first.image, labels, bundle.classes)


def _warn_of_what_is_outside(image: Image, bundle: Bundle) -> None:
    outside = outside_fraction(image.size, bundle.preprocessing, image.spacing_in_plane)
    if outside > 0:
        LOG.warning(
            "%s: %.0f %% of every slice lies outside the network's field of view and becomes background",
            image.stem or image.path.name, 100 * outside,
        )  # fmt: skip
