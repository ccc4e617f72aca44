"""Work ahead: let an iterator run in a thread of its own, so that what makes its items and what uses them overlap."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

Item = TypeVar("Item")

DEPTH = 2  # items that wait between two threads; more would only take memory
POLL_S = 0.05  # how soon a thread that waits for room notices that nobody wants its items any more


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


@contextmanager
def ahead(items: Iterable[Item], depth: int = DEPTH) -> Generator[Iterator[Item], None, None]:
    """Go through ``items`` in a thread of its own, at most ``depth`` and the one at hand ahead of who uses them."""
    queue: Queue[Item | _End] = Queue(depth)
    unwanted = Event()

    def put(item: Item | _End) -> None:
        while not unwanted.is_set():
            with suppress(Full):
                return queue.put(item, timeout=POLL_S)

    def work() -> None:
        error = None
        try:
            for item in items:
                put(item)
                if unwanted.is_set():
                    return
        except BaseException as raised:
            error = raised
        put(_End(error))

    def taken() -> Iterator[Item]:
        while not isinstance(item := queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error

    thread = Thread(target=work, name="medseg-trt ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        unwanted.set()
        thread.join()
