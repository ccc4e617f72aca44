"""Images that arrive while a run goes on: a sequence that ends when its owner says so."""

from collections.abc import Iterator, Sequence
from threading import Condition
from typing import overload

from medseg_trt.imaging.images import Source


class FedSources(Sequence[Source]):
    """A queue that any number of iterators read from its start; each waits for more until ``close``."""

    def __init__(self) -> None:
        self._sources: list[Source] = []
        self._closed = False
        self._changed = Condition()

    def feed(self, sources: Sequence[Source]) -> None:
        """Append images."""
        with self._changed:
            self._sources += sources
            self._changed.notify_all()

    def close(self) -> None:
        """Let the iterators end once they have read everything."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Source]:
        position = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda position=position: self._closed or position < len(self._sources))
                if position == len(self._sources):
                    return
                source = self._sources[position]
            yield source
            position += 1

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Source]: ...
    def __getitem__(self, index: int | slice) -> Source | Sequence[Source]:
        return self._sources[index]
