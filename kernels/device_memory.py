"""Arrays on the GPU, and the time that launches take there, without PyTorch: through ``cuda-bindings`` alone."""

from collections.abc import Callable
from types import TracebackType

import numpy as np

from medseg_trt.kernels.cuda_bindings_adapter import CudaBindings
from medseg_trt.kernels.kernel import Array

STREAM = 0  # the default stream, in which everything here happens


class DeviceArray:
    """An array on the GPU; it lives until the ``DeviceMemory`` that made it ends."""

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
    """Gives memory on the device of a driver, and takes all of it back at the end of a ``with`` block."""

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
        """Return a copy of an array in the host's memory, once everything launched before is done."""
        result = np.empty(array.shape, array.dtype)
        self._driver.synchronize(STREAM)
        if result.nbytes:
            self._driver.call("cuMemcpyDtoH", result.ctypes.data, array.address, result.nbytes)
        return result

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Copy on the device, as fast as it can: what the speed of kernels is compared with."""
        nbytes = int(np.prod(source.shape)) * source.dtype.itemsize
        self._driver.call("cuMemcpyDtoDAsync", target.address, source.address, nbytes, STREAM)


def milliseconds(driver: CudaBindings, launch: Callable[[], None], *, runs: int, repeats: int) -> list[float]:
    """Return how long one launch takes on the device, by CUDA events, ``runs`` times.

    Args:
        driver: the device's.
        launch: puts the work into the default stream.
        runs: how many figures are wanted; as many launches before the first are not timed.
        repeats: launches between two events, so that a short kernel is not drowned by the events.
    """
    for _ in range(runs):
        launch()
    times: list[float] = []
    start, stop = driver.new_event(), driver.new_event()
    for _ in range(runs):
        driver.record_event(start, STREAM)
        for _ in range(repeats):
            launch()
        driver.record_event(stop, STREAM)
        driver.synchronize(STREAM)
        times.append(driver.elapsed_ms(start, stop) / repeats)
    for event in (start, stop):
        driver.free_event(event)
    return times
