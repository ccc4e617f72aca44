"""Several sessions of one network beside each other, each on its share of the processor's cores.

One image alone runs fastest on all cores. Several run faster beside each other than one after another: the threads of
one run wait for each other at every operation, and whatever else the processor does, decoding and encoding among it,
holds up all of them.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue

from jaxtyping import Float32, UInt8
from numpy import ndarray

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.imaging.preprocess import Size
from medseg_trt.machine import cores
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.equal_bits import have_equal_bits
from medseg_trt.sessions.open import choose, open_execution


class SessionStreams(Session):
    """A session whose runs may overlap: the first one takes all cores, and those beside it their share."""

    def __init__(self, whole: Session, parts: Sequence[Session]) -> None:
        """Take over the sessions.

        Args:
            whole: runs on all cores.
            parts: each runs on its share; as many runs as there are parts may overlap, and a further one waits.
        """
        self.backend, self.device, self.gives_masks = whole.backend, whole.device, whole.gives_masks
        self.description = f"{whole.description}, {len(parts)} streams"
        self.count = len(parts)
        self._sessions = (whole, *parts)
        self._whole, self._free = whole, SimpleQueue[Session]()
        for part in parts:
            self._free.put(part)
        self._lock, self._running = threading.Lock(), 0

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """See ``Session``; threads may call it."""
        with self._one() as session:
            return session.run(batch)

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """See ``Session``; threads may call it."""
        with self._one() as session:
            return session.masks(batch, size, resampled)

    def close(self) -> None:
        """Free all sessions."""
        for session in self._sessions:
            session.close()

    @contextmanager
    def _one(self) -> Iterator[Session]:
        with self._lock:
            is_alone = self._running == 0
            self._running += 1
        session = self._whole if is_alone else self._free.get()
        try:
            yield session
        finally:
            if not is_alone:
                self._free.put(session)
            with self._lock:
                self._running -= 1


def open_streams(
    bundle: Bundle, whole: Session, precision: str | None, threads: int | None, batch: int, most: int
) -> SessionStreams | None:
    """Open sessions beside ``whole``, which they take over, or return None where one session at a time is better.

    That is on a GPU, where a larger batch is faster, on a single core, with ``most`` = 1, and where the network's last
    bits depend on the number of threads.

    Args:
        bundle: of ``whole``.
        whole: an open session.
        precision: what ``whole`` was opened with.
        threads: the same; None for all cores.
        batch: the largest number of slices in a run.
        most: how many runs may overlap; each takes memory for weights of its own.

    Raises:
        ArtefactError: the back-end refuses the network.
    """
    available = threads or cores()
    count = min(available, most)
    if BACKENDS[whole.backend].gpu or count < 2:
        return None
    execution = choose(bundle, whole.backend, precision)
    with ExitStack() as opened:
        parts = [opened.enter_context(open_execution(bundle, execution, available // count))]
        if not have_equal_bits(whole, parts[0], bundle.preprocessing.image_size, batch):
            LOG.info("%s gives other last bits on fewer cores, so one image runs at a time", whole.description)
            return None
        while len(parts) < count:
            parts.append(opened.enter_context(open_execution(bundle, execution, available // count)))
        opened.pop_all()
    LOG.info("%s: up to %d images run beside each other", whole.description, count)
    return SessionStreams(whole, parts)
