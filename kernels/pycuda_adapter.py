"""Launch through ``pycuda``."""

import atexit
from typing import Any

from medseg_trt.errors import UsageError
from medseg_trt.kernels.device import DeviceMemoryError
from medseg_trt.kernels.launch import CudaError, Driver, Launch, import_driver, no_device


def open_device(device: int | None) -> Driver:
    """Return the adapter of a device, in the current CUDA context or else in the primary one.

    Raises:
        MissingExtraError: pycuda is not installed.
        DeviceError: there is no NVIDIA driver or no such device.
        UsageError: the current context is of another device; pycuda's user keeps the stack of contexts.
    """
    cuda = import_driver("pycuda.driver", "pycuda", device)
    try:
        return Pycuda(cuda, device)
    except cuda.Error as error:
        raise no_device(device, error) from error


class Pycuda(Driver):
    """The CUDA driver through ``pycuda.driver``."""

    def __init__(self, cuda: Any, device: int | None) -> None:
        """Open a device; ``cuda`` is the module ``pycuda.driver``."""
        self._cuda = cuda
        cuda.init()
        version: int = cuda.get_driver_version()
        self.cuda = version // 1000, version % 1000 // 10
        if cuda.Context.get_current() is not None:
            if device is not None and cuda.Context.get_device() != cuda.Device(device):
                raise UsageError(
                    f"the current CUDA context is of another GPU than cuda:{device}; push a context of that GPU first"
                )
        else:
            self._context = cuda.Device(device or 0).retain_primary_context()
            self._context.push()
            atexit.register(self._context.pop)  # pycuda aborts a process that exits with a pushed context
        major, minor = cuda.Context.get_device().compute_capability()
        self.capability = 10 * major + minor
        self._modules: list[Any] = []  # a function is valid while its module is loaded

    def load(self, ptx: str, symbol: str) -> Any:
        """Return a function of a PTX text, compiled for the device."""
        try:
            self._modules.append(self._cuda.module_from_buffer(ptx.encode() + b"\0"))
            return self._modules[-1].get_function(symbol)
        except self._cuda.Error as error:
            raise self._error(error) from error

    def unload(self) -> None:
        """Give the modules back; pycuda unloads them."""
        self._modules.clear()

    def launch(self, launch: Launch) -> None:
        """Enqueue a launch in its stream: a ``pycuda.driver.Stream`` or 0, not the handle of another library."""
        if isinstance(launch.stream, int) and launch.stream != 0:
            raise CudaError("pycuda launches on its own Stream objects only; pass one, or open cuda-bindings")
        try:
            launch.function.prepare(launch.layout)
            launch.function.prepared_async_call(
                launch.grid, launch.block, launch.stream or None, *launch.arguments, shared_size=launch.shared_bytes
            )
        except self._cuda.Error as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> CudaError:
        kind = DeviceMemoryError if isinstance(error, self._cuda.MemoryError) else CudaError
        return kind(str(error))

    def synchronize(self, stream: Any) -> None:
        """Wait until all work in a stream, or for 0 in the context, has completed."""
        try:
            (stream or self._cuda.Context).synchronize()
        except self._cuda.Error as error:
            raise self._error(error) from error
