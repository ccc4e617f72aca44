"""Launch through NVIDIA's ``cuda-bindings``."""

import ctypes
from typing import Any

from medseg_trt.kernels.launch import CudaError, Driver, Launch, import_driver, no_device

TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int32}


def open_device(device: int) -> Driver:
    """Return the adapter for a device, in the current context or else in its primary one.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        DeviceError: there is no NVIDIA driver or no such device.
    """
    cuda = import_driver("cuda.bindings.driver", "kernels", device)
    try:
        return CudaBindings(cuda, device)
    except (CudaError, RuntimeError) as error:  # RuntimeError: the driver's library is not there
        raise no_device(device, error) from error


class CudaBindings(Driver):
    """The CUDA driver as ``cuda.bindings.driver`` has it."""

    def __init__(self, cuda: Any, device: int) -> None:
        """Open a device; ``cuda`` is the module ``cuda.bindings.driver``."""
        self._cuda = cuda
        self.call("cuInit", 0)
        version: int = self.call("cuDriverGetVersion")
        self.cuda = version // 1000, version % 1000 // 10
        if int(self.call("cuCtxGetCurrent")) == 0:
            self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", device)))
        here = self.call("cuCtxGetDevice")
        kinds = cuda.CUdevice_attribute
        major: int = self.call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, here)
        minor: int = self.call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, here)
        self.capability = 10 * major + minor
        self._modules: list[Any] = []  # a function lives as long as its module

    def load(self, ptx: str, symbol: str) -> Any:
        """Return a function of a PTX text, compiled for the device."""
        self._modules.append(self.call("cuModuleLoadData", ptx.encode() + b"\0"))
        return self.call("cuModuleGetFunction", self._modules[-1], symbol.encode())

    def launch(self, launch: Launch) -> None:
        """Put a launch into its stream, a handle."""
        types = tuple(TYPES[kind] for kind in launch.layout)
        self.call(
            "cuLaunchKernel", launch.function, *launch.grid, *launch.block, launch.shared_bytes, launch.stream,
            (launch.arguments, types), 0,
        )  # fmt: skip

    def synchronize(self, stream: Any) -> None:
        """Wait until everything in a stream is done."""
        self.call("cuStreamSynchronize", stream)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver and return its one result, if it has any."""
        status, *results = getattr(self._cuda, function)(*arguments)
        if int(status) != 0:
            raise CudaError(f"{function} returned {int(status)} {getattr(status, 'name', '')}".rstrip())
        return results[0] if results else None
