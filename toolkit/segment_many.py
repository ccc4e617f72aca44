"""Segment many images so that reading one, running the network on another and writing a third overlap.

It is the loop of ``segment.segment``, a batch of slices at a time, with a thread each for two of its three steps: one
reads and prepares, one runs the network, and the caller's own thread brings the answers back to size and writes.
Pillow, zlib, NumPy and the back-ends let other threads run while they work. The order stays, queues are short, and an
error comes up where the loop would have raised it: after everything before it has been handed over.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import TypeVar

import numpy as np
from numpy import ndarray

from medseg_trt.bundle import Bundle
from medseg_trt.images import Image, Mask
from medseg_trt.overlap import ahead
from medseg_trt.preprocess import outside_fraction
from medseg_trt.progress import LOG, track
from medseg_trt.segment import Steps, steps
from medseg_trt.session import Session

Other = TypeVar("Other")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Part:
    """A batch of an image's slices on its way."""

    image: Image
    steps: Steps
    start: int
    number: int  # of parts of this image
    values: ndarray  # the network's input, then its answer


def segment_many(
    images: Iterable[Image | Other], session: Session, bundle: Bundle, batch: int, label: str | None = None
) -> Iterator[tuple[Image, Mask] | Other]:
    """Yield every image with its mask, in order; what is no image comes out as it went in, in its place.

    ``images`` is gone through in another thread, a few batches ahead of the caller. When the caller stops, whatever the
    reason, the threads end before this does.

    Args:
        images: read one by one, for example by a generator.
        session: the bundle's network.
        bundle: its preprocessing and classes are used.
        batch: how many slices go through the network at once.
        label: where it is given, progress over the slices is shown under this name.
    """
    with ahead(_prepared(images, session, bundle, batch)) as parts, ahead(_answered(parts)) as answers:
        for first in answers:
            if not isinstance(first, _Part):
                yield first
                continue
            labels = np.empty(first.image.pixels.shape[:3], np.uint8)
            of_image = chain([first], islice(answers, first.number - 1))
            for part in of_image if label is None else track(of_image, label, total=first.number):
                found = part.steps.finish(part.values)
                labels[part.start : part.start + len(found)] = found
            yield first.image, Mask.of(first.image, labels, bundle.classes)


def _prepared(images: Iterable[Image | Other], session: Session, bundle: Bundle, batch: int) -> Iterator[_Part | Other]:
    masks = session.masks if session.gives_masks else None
    for image in images:
        if not isinstance(image, Image):
            yield image
            continue
        _warn_of_what_is_outside(image, bundle)
        do = steps(session.run, image, bundle.preprocessing, masks)
        starts = range(0, image.num_slices, batch)
        for start in starts:
            values = do.prepare(image.pixels[start : start + batch])
            yield _Part(image=image, steps=do, start=start, number=len(starts), values=values)


def _answered(parts: Iterable[_Part | Other]) -> Iterator[_Part | Other]:
    for part in parts:
        if isinstance(part, _Part):
            yield replace(part, values=part.steps.run(part.values))
        else:
            yield part


def _warn_of_what_is_outside(image: Image, bundle: Bundle) -> None:
    outside = outside_fraction(image.size, bundle.preprocessing, image.spacing_in_plane)
    if outside > 0:
        LOG.warning(
            "%s: %.0f %% of every slice lies outside the network's field of view and becomes background",
            image.stem or image.path.name, 100 * outside,
        )  # fmt: skip
