"""Work ahead: let iterators run in threads of their own, so that what makes items and what uses them overlap."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")

DEPTH = 2  # items that wait between two threads; more would only take memory
POLL_S = 0.05  # how soon a thread that waits notices that it is to end


class StoppedError(Exception):
    """Nobody wants the items any more; ends the threads and is seen by nobody else."""


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class Prefetcher:
    """Stages of work, each in a thread, for the time of a ``with`` block.

    At its end, whatever the reason, the threads have ended: each one after the item at hand.
    """

    def __init__(self) -> None:
        self._stop = Event()
        self._threads: list[Thread] = []

    def prefetch(self, items: Iterable[Item], depth: int = DEPTH) -> Iterator[Item]:
        """Go through ``items`` in a thread of its own, at most ``depth`` and the one at hand ahead of who uses them.

        An error comes up at its place in the order. The iterator that is returned may itself be gone through in a
        thread of this object.
        """
        queue: Queue[Item | _End] = Queue(depth)

        def work() -> None:
            error = None
            with suppress(StoppedError):  # nobody waits for the end of a stage that is stopped
                try:
                    for item in items:
                        self.wait_for(lambda item=item: _put(queue, item))
                except StoppedError:
                    raise
                except BaseException as raised:
                    error = raised
                self.wait_for(lambda: _put(queue, _End(error)))

        thread = Thread(target=work, name="medseg-trt", daemon=True)
        self._threads.append(thread)
        thread.start()
        return self._taken(queue)

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Return when ``done``, which waits for ``POLL_S`` by itself, says so.

        Raises:
            StoppedError: the block has ended before.
        """
        while not self._stop.is_set():
            if done():
                return
        raise StoppedError

    def _taken(self, queue: "Queue[Item | _End]") -> Iterator[Item]:
        while True:
            found: list[Item | _End] = []
            self.wait_for(lambda found=found: _get(queue, found))
            if not isinstance(item := found[0], _End):
                yield item
            elif item.error is None:
                return
            else:
                raise item.error

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def _put(queue: "Queue[Item]", item: Item) -> bool:
    try:
        queue.put(item, timeout=POLL_S)
    except Full:
        return False
    return True


def _get(queue: "Queue[Item]", found: list[Item]) -> bool:
    try:
        found.append(queue.get(timeout=POLL_S))
    except Empty:
        return False
    return True
