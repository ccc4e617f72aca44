"""Events in a stream of the CUDA driver, as the clock of a measurement."""

from contextlib import suppress
from typing import Any

from medseg_trt.kernels.device import Device
from medseg_trt.kernels.launch import CudaError
from medseg_trt.sessions.device_times import EventClock


class StreamEvents(EventClock):
    """Events in one stream; a context manager that gives all of them back at the end."""

    def __init__(self, device: Device, stream: int) -> None:
        self._device, self._stream = device, stream
        self._made: list[Any] = []

    def __enter__(self) -> "StreamEvents":
        return self

    def __exit__(self, *_: object) -> None:
        for event in self._made:
            with suppress(CudaError):
                self._device.free_event(event)

    def new_event(self) -> Any:
        """Return a new event."""
        self._made.append(self._device.new_event())
        return self._made[-1]

    def record(self, event: Any) -> None:
        """Enqueue an event."""
        self._device.record_event(event, self._stream)

    def wait(self, event: Any) -> None:
        """Wait until the device has reached an event."""
        self._device.wait_event(event)

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two events that the device has reached."""
        return self._device.elapsed_ms(start, stop)
