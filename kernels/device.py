"""The interface of a GPU for sessions: memory, streams, copies, captured graphs and events besides launches.

Methods enqueue their work in a stream or do it at once, and raise ``CudaError`` with the driver's message. A thread
calls ``activate`` first. Nothing is freed automatically: the caller that allocates frees.
"""

from abc import abstractmethod
from typing import Any

from medseg_trt.errors import DeviceError
from medseg_trt.kernels.launch import CudaError, Driver, open_driver

ADAPTER = "cuda-bindings"  # the only adapter that implements ``Device``


class DeviceMemoryError(CudaError):
    """The device or the host lacks free memory."""

    is_memory = True


class Device(Driver):
    """A driver that also has memory, streams, graphs and events."""

    name: str  # of the device, "NVIDIA GeForce RTX 4090"

    @abstractmethod
    def activate(self) -> None:
        """Make the device's CUDA context current in the calling thread."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the free memory of the device."""

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Allocate device memory, aligned to 256 bytes and uninitialised, and return its address."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Free device memory."""

    @abstractmethod
    def allocate_host(self, nbytes: int) -> int:
        """Allocate pinned host memory, which asynchronous copies need, and return its address."""

    @abstractmethod
    def free_host(self, address: int) -> None:
        """Free pinned memory."""

    @abstractmethod
    def new_stream(self) -> int:
        """Return the handle of a new stream that does not synchronise with the default stream."""

    @abstractmethod
    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""

    @abstractmethod
    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Set memory of the device to zero."""

    @abstractmethod
    def upload(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from pinned memory; ``source`` must not change until the stream has completed."""

    @abstractmethod
    def download(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy to pinned memory; ``target`` is valid when the stream has completed."""

    @abstractmethod
    def begin_capture(self, stream: int) -> None:
        """Start to record the work that this thread enqueues in a stream, instead of executing it."""

    @abstractmethod
    def end_capture(self, stream: int) -> Any:
        """Return the recorded work as an executable graph, which uses the recorded addresses."""

    @abstractmethod
    def launch_graph(self, graph: Any, stream: int) -> None:
        """Enqueue recorded work."""

    @abstractmethod
    def free_graph(self, graph: Any) -> None:
        """Destroy recorded work."""

    @abstractmethod
    def new_event(self) -> Any:
        """Return an event that records the time at which the device reaches it."""

    @abstractmethod
    def free_event(self, event: Any) -> None:
        """Destroy an event."""

    @abstractmethod
    def record_event(self, event: Any, stream: int) -> None:
        """Enqueue an event in a stream."""

    @abstractmethod
    def wait_event(self, event: Any) -> None:
        """Wait until the device has reached an event."""

    @abstractmethod
    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two completed events, with a resolution of about half a microsecond."""


def open_device(number: int = 0) -> Device:
    """Return a device that a session can use.

    Raises:
        DeviceError: the machine has no NVIDIA driver or no such device, or ``cuda-bindings`` is not installed.
    """
    driver = open_driver(ADAPTER, number)
    if not isinstance(driver, Device):
        raise DeviceError(f"the CUDA adapter {ADAPTER} has no streams and graphs; reinstall medseg-trt")
    return driver
