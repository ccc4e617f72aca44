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
        try:
            yield stream
        except DeviceMemoryError:  # asked for too much; the stream is as it was
            self._give(stream)
            raise
        except BaseException:  # nobody knows what is still on its way in the stream
            self._drop(stream)
            raise
        self._give(stream)

    def close(self) -> None:
        """Wait until no stream is in use, and close all of them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._free) == self._made)
            while self._free:
                self._free.pop().close()
                self._made -= 1

    def _take(self) -> InferenceStream:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._free or self._made < self._most)
                if self._closed:
                    raise ValueError("the session is closed")
                if self._free:
                    return self._free.pop()
                try:
                    stream = self._make()
                except DeviceMemoryError as error:
                    if not self._made:
                        raise
                    self._most = self._made
                    LOG.info("the GPU has no memory for another stream (%s); threads take turns", error)
                else:
                    self._made += 1
                    return stream

    def _give(self, stream: InferenceStream) -> None:
        with self._changed:
            self._free.append(stream)
            self._changed.notify()

    def _drop(self, stream: InferenceStream) -> None:
        try:
            stream.close()
        finally:  # whatever happened to it, it is no longer waited for
            with self._changed:
                self._made -= 1
                self._changed.notify_all()
