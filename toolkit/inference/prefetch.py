"""Run iterators in threads of their own, so that producing and using items happen at the same time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")

DEPTH = 2  # items that wait between two threads; more only takes memory
POLL_S = 0.05  # how often a waiting thread checks whether to end


class StoppedError(Exception):
    """The ``with`` block has ended; raised inside the threads only, to end them."""


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class Prefetcher:
    """Runs stages of work, each in a thread, during a ``with`` block.

    The block ends, for whatever reason, after all threads have ended; each completes its current item.
    """

    def __init__(self) -> None:
        self._stop = Event()
        self._threads: list[Thread] = []

    def prefetch(self, items: Iterable[Item], depth: int = DEPTH) -> Iterator[Item]:
        """Iterate over ``items`` in a thread of its own, at most ``depth`` + 1 items ahead of the consumer.

        An error is raised at its place in the order. The returned iterator may itself be prefetched by this object.
        """
        queue: Queue[Item | _End] = Queue(depth)

        def work() -> None:
            error = None
            with suppress(StoppedError):  # nobody waits for a stopped stage
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
        return self._items_of(queue)

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Call ``done`` until it returns True; ``done`` itself waits for at most ``POLL_S``.

        Raises:
            StoppedError: the block has ended first.
        """
        while not self._stop.is_set():
            if done():
                return
        raise StoppedError

    def _items_of(self, queue: "Queue[Item | _End]") -> Iterator[Item]:
        while True:
            received: list[Item | _End] = []
            self.wait_for(lambda received=received: _get(queue, received))
            if not isinstance(item := received[0], _End):
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


def _get(queue: "Queue[Item]", received: list[Item]) -> bool:
    try:
        received.append(queue.get(timeout=POLL_S))
    except Empty:
        return False
    return True
