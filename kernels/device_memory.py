"""Arrays on the GPU and the duration of launches, through ``cuda-bindings`` without PyTorch."""

from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from medseg_trt.kernels.cuda_bindings_adapter import CudaBindings
from medseg_trt.kernels.kernel import Array

STREAM = 0  # the default stream


class DeviceArray:
    """An array on the GPU, valid until the end of the ``DeviceMemory`` that allocated it."""

    def __init__(self, address: int, like: Array) -> None:
        """Describe memory at ``address`` of the shape and type of ``like``."""
        self.address, self.shape, self.dtype = address, like.shape, like.dtype
        self.__cuda_array_interface__ = {
            "shape": like.shape,
            "typestr": like.dtype.str,
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class DeviceMemory:
    """Allocates device memory and frees all of it at the end of a ``with`` block."""

    def __init__(self, driver: CudaBindings) -> None:
        """Allocate through a driver, in its context."""
        self._driver = driver
        self._addresses: list[int] = []

    def __enter__(self) -> "DeviceMemory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for address in self._addresses:
            self._driver.call("cuMemFree", address)

    def upload(self, array: Array) -> DeviceArray:
        """Return a copy of an array on the device."""
        source = np.ascontiguousarray(array)
        address = int(self._driver.call("cuMemAlloc", max(source.nbytes, 1)))
        self._addresses.append(address)
        if source.nbytes:
            self._driver.call("cuMemcpyHtoD", address, source.ctypes.data, source.nbytes)
        return DeviceArray(address, source)

    def download(self, array: DeviceArray) -> Array:
        """Return a copy of an array in the host's memory, after all earlier launches."""
        result = np.empty(array.shape, array.dtype)
        self._driver.synchronize(STREAM)
        if result.nbytes:
            self._driver.call("cuMemcpyDtoH", result.ctypes.data, array.address, result.nbytes)
        return result

    def copy(self, source: DeviceArray, target: DeviceArray, stream: int) -> None:
        """Copy on the device: the bandwidth that kernels are compared with."""
        nbytes = int(np.prod(source.shape)) * source.dtype.itemsize
        self._driver.call("cuMemcpyDtoDAsync", target.address, source.address, nbytes, stream)


def milliseconds(driver: CudaBindings, launches: Sequence[Callable[[int], None]], *, runs: int) -> list[float]:
    """Measure the mean duration of launches on the device with CUDA events, ``runs`` times.

    The launches are captured as one graph: to enqueue one from Python takes longer than a small kernel runs.

    Args:
        driver: the device's.
        launches: enqueue work in a given stream, and have run before. For the bandwidth of the memory, each has buffers
            of its own, all together larger than the device's cache.
        runs: number of measurements, after as many that are discarded.
    """
    stream = driver.new_stream()
    driver.begin_capture(stream)
    for launch in launches:
        launch(stream)
    graph = driver.end_capture(stream)
    times: list[float] = []
    start, stop = driver.new_event(), driver.new_event()
    for _ in range(2 * runs):
        driver.record_event(start, stream)
        driver.launch_graph(graph, stream)
        driver.record_event(stop, stream)
        driver.synchronize(stream)
        times.append(driver.elapsed_ms(start, stop) / len(launches))
    for event in (start, stop):
        driver.free_event(event)
    driver.free_graph(graph)
    driver.free_stream(stream)
    return times[runs:]
