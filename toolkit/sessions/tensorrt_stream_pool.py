"""Share streams among threads: each is used by one thread at a time, and made when it is first needed."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import Condition

from medseg_trt.kernels.device import DeviceMemoryError
from medseg_trt.progress import LOG
from medseg_trt.sessions.tensorrt_stream import InferenceStream


class StreamPool:
    """At most ``most`` streams; a thread that finds none free waits."""

    def __init__(self, make: Callable[[], InferenceStream], most: int) -> None:
        self._make, self._most = make, most
        self._free: list[InferenceStream] = []
        self._made = 0
        self._closed = False
        self._changed = Condition()

    @contextmanager
    def one(self) -> Generator[InferenceStream, None, None]:
        """Yield a stream for this thread alone. After an error it is closed, and the next thread gets a new one.

        Raises:
            ValueError: the streams are closed.
            CudaError, EngineError: not even one stream could be made.
        """
        stream = self._take()
        with self._lent([stream]):
            yield stream

    @contextmanager
    def all(self) -> Generator[list[InferenceStream], None, None]:
        """Yield every stream for this thread alone, as many as there is memory for, once no other thread uses one.

        Raises:
            ValueError: the streams are closed.
            CudaError, EngineError: not even one stream could be made.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._free) == self._made)
            self._require_open()
            while self._made < self._most and (stream := self._new()) is not None:
                self._free.append(stream)
            streams, self._free = self._free, []
        with self._lent(streams):
            yield streams

    def close(self) -> None:
        """Wait until no stream is in use, and close all of them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._made)
            while self._free:
                self._free.pop().close()
                self._made -= 1

    @contextmanager
    def _lent(self, streams: list[InferenceStream]) -> Generator[None, None, None]:
        """Take streams back when they are no longer used; after an error they are closed."""
        end = self._drop
        try:
            yield
            end = self._give
        except DeviceMemoryError:  # asked for too much; the stream is as it was
            end = self._give
            raise
        finally:  # after any other error nobody knows what is still on its way in the stream
            for stream in streams:
                end(stream)

    def _take(self) -> InferenceStream:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._free or self._made < self._most)
                self._require_open()
                if self._free:
                    return self._free.pop()
                if (stream := self._new()) is not None:
                    return stream

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError("the session is closed")

    def _new(self) -> InferenceStream | None:
        """Make a stream; None where the device has memory for no more than there are."""
        try:
            stream = self._make()
        except DeviceMemoryError as error:
            if not self._made:
                raise
            self._most = self._made
            LOG.info("the GPU has no memory for another stream (%s); threads take turns", error)
            return None
        self._made += 1
        return stream

    def _give(self, stream: InferenceStream) -> None:
        with self._changed:
            self._free.append(stream)
            self._changed.notify_all()

    def _drop(self, stream: InferenceStream) -> None:
        try:
            stream.close()
        finally:  # whatever happened to it, it is no longer waited for
            with self._changed:
                self._made -= 1
                self._changed.notify_all()
