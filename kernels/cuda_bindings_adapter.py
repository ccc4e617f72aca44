"""Launch through NVIDIA's ``cuda-bindings``."""

import ctypes
from typing import Any

from medseg_trt.kernels.device import Device, DeviceMemoryError
from medseg_trt.kernels.launch import CudaError, Driver, Launch, import_driver, no_device

TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int32}
NAME_BYTES = 256
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


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


class CudaBindings(Device):
    """The CUDA driver as ``cuda.bindings.driver`` has it."""

    def __init__(self, cuda: Any, device: int) -> None:
        """Open a device; ``cuda`` is the module ``cuda.bindings.driver``."""
        self._cuda = cuda
        self.call("cuInit", 0)
        version: int = self.call("cuDriverGetVersion")
        self.cuda = version // 1000, version % 1000 // 10
        if int(self.call("cuCtxGetCurrent")) == 0:
            self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", self.call("cuDeviceGet", device)))
        self._context = self.call("cuCtxGetCurrent")
        here = self.call("cuCtxGetDevice")
        kinds = cuda.CUdevice_attribute
        major: int = self.call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, here)
        minor: int = self.call("cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, here)
        self.capability = 10 * major + minor
        name: bytes = self.call("cuDeviceGetName", NAME_BYTES, here)
        self.name = name.partition(b"\0")[0].decode(errors="replace")
        self._modules: list[Any] = []  # a function lives as long as its module

    def load(self, ptx: str, symbol: str) -> Any:
        """Return a function of a PTX text, compiled for the device."""
        self._modules.append(self.call("cuModuleLoadData", ptx.encode() + b"\0"))
        return self.call("cuModuleGetFunction", self._modules[-1], symbol.encode())

    def launch(self, launch: Launch) -> None:
        """Put a launch into its stream, a handle."""
        types = tuple(TYPES[kind] for kind in launch.layout)
        self.call(
            "cuLaunchKernel",
            launch.function,
            *launch.grid,
            *launch.block,
            launch.shared_bytes,
            launch.stream,
            (launch.arguments, types),
            0,
        )

    def synchronize(self, stream: Any) -> None:
        """Wait until everything in a stream is done."""
        self.call("cuStreamSynchronize", stream)

    def activate(self) -> None:
        """Make the context that this adapter was opened in the calling thread's."""
        self.call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Return how much memory of the device nobody uses."""
        return int(self.call("cuMemGetInfo"))  # the first result; the second is how much there is

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory on the device."""
        return int(self.call("cuMemAlloc", max(nbytes, 1)))

    def free(self, address: int) -> None:
        """Give memory of the device back."""
        self.call("cuMemFree", address)

    def allocate_host(self, nbytes: int) -> int:
        """Return the address of new pinned memory."""
        return int(self.call("cuMemAllocHost", max(nbytes, 1)))

    def free_host(self, address: int) -> None:
        """Give pinned memory back."""
        self.call("cuMemFreeHost", address)

    def new_stream(self) -> int:
        """Return the handle of a new stream."""
        return int(self.call("cuStreamCreate", NON_BLOCKING))

    def free_stream(self, stream: int) -> None:
        """Give a stream back."""
        self.call("cuStreamDestroy", stream)

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        """Set memory of the device to zero."""
        self.call("cuMemsetD8Async", address, 0, nbytes, stream)

    def upload(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy from pinned memory."""
        self.call("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def download(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Copy to pinned memory."""
        self.call("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def begin_capture(self, stream: int) -> None:
        """Record what this thread puts into a stream; what other threads do with the device is their affair."""
        self.call("cuStreamBeginCapture", stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> Any:
        """Return the recorded work, ready to be launched."""
        graph = self.call("cuStreamEndCapture", stream)
        try:
            return self.call("cuGraphInstantiate", graph, 0)
        finally:
            self.call("cuGraphDestroy", graph)

    def launch_graph(self, graph: Any, stream: int) -> None:
        """Put recorded work into a stream."""
        self.call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        """Give recorded work back."""
        self.call("cuGraphExecDestroy", graph)

    def new_event(self) -> Any:
        """Return an event that takes the time."""
        return self.call("cuEventCreate", 0)

    def free_event(self, event: Any) -> None:
        """Give an event back."""
        self.call("cuEventDestroy", event)

    def record_event(self, event: Any, stream: int) -> None:
        """Put an event into a stream."""
        self.call("cuEventRecord", event, stream)

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two events that have happened."""
        return float(self.call("cuEventElapsedTime", start, stop))

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver and return its first result, if it has any."""
        status, *results = getattr(self._cuda, function)(*arguments)
        if int(status) != 0:
            kind = DeviceMemoryError if int(status) == OUT_OF_MEMORY else CudaError
            raise kind(f"{function} returned {int(status)} {getattr(status, 'name', '')}".rstrip())
        return results[0] if results else None
