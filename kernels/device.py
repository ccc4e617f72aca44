"""What a session asks of a GPU beyond launches: memory, streams, copies, captured graphs and events.

Every method puts its work into a stream or does it at once, and raises ``CudaError`` with the driver's own words. A
thread calls ``activate`` before anything else. Nothing here frees by itself: who allocates frees.
"""

from abc import abstractmethod
from typing import Any

from medseg_trt.errors import DeviceError
from medseg_trt.kernels.launch import CudaError, Driver, open_driver

ADAPTER = "cuda-bindings"  # the one that has all of this


class DeviceMemoryError(CudaError):
    """There is not enough memory on the device, or not enough that can be pinned."""


class Device(Driver):
    """A driver that also has memory, streams, graphs and events."""

    name: str  # of the device, "NVIDIA GeForce RTX 4090"

    @abstractmethod
    def activate(self) -> None:
        """Make the device's context the calling thread's."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return how much memory of the device nobody uses."""

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory on the device, aligned to 256 bytes; its content is undefined."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Give memory of the device back."""

    @abstractmethod
    def allocate_host(self, nbytes: int) -> int:
        """Return the address of new pinned memory of the host: only from there a copy runs beside the program."""

    @abstractmethod
    def free_host(self, address: int) -> None:
        """Give pinned memory back."""

    @abstractmethod
    def new_stream(self) -> int:
        """Return the handle of a new stream that does not wait for the default one."""

    @abstractmethod
    def free_stream(self, stream: int) -> None:
        """Give a stream back."""

    @abstractmethod
    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Set memory of the device to zero."""

    @abstractmethod
    def upload(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from pinned memory; ``source`` must not change before the stream is done."""

    @abstractmethod
    def download(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy to pinned memory; ``target`` holds it once the stream is done."""

    @abstractmethod
    def begin_capture(self, stream: int) -> None:
        """Record what this thread puts into a stream from now on, instead of doing it."""

    @abstractmethod
    def end_capture(self, stream: int) -> Any:
        """Return the recorded work, ready to be launched; it keeps every address that it was recorded with."""

    @abstractmethod
    def launch_graph(self, graph: Any, stream: int) -> None:
        """Put recorded work into a stream."""

    @abstractmethod
    def free_graph(self, graph: Any) -> None:
        """Give recorded work back."""

    @abstractmethod
    def new_event(self) -> Any:
        """Return a mark that can be put into streams and remembers when the device came by."""

    @abstractmethod
    def free_event(self, event: Any) -> None:
        """Give a mark back."""

    @abstractmethod
    def record_event(self, event: Any, stream: int) -> None:
        """Put a mark into a stream, behind all that is there."""

    @abstractmethod
    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two marks that the device has come by, to about half a microsecond."""


def open_device(number: int = 0) -> Device:
    """Return a device that a session can use.

    Raises:
        DeviceError: the machine has no NVIDIA driver or no such device, or ``cuda-bindings`` is not installed.
    """
    driver = open_driver(ADAPTER, number)
    if not isinstance(driver, Device):
        raise DeviceError(f"the CUDA adapter {ADAPTER} has no streams and graphs; install another medseg-trt")
    return driver
