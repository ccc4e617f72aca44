"""Launch through NVIDIA's ``cuda-bindings``."""

import ctypes
import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from medseg_trt.kernels.device import Device, DeviceMemoryError
from medseg_trt.kernels.launch import CudaError, Driver, Launch, import_driver, no_device
from medseg_trt.kernels.modules import MODULES, LoadedModule

TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int32}
NAME_BYTES = 256
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


def open_device(device: int | None) -> Driver:
    """Return the adapter of a device, in the current CUDA context or else in the primary one; see ``open_driver``.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        DeviceError: there is no NVIDIA driver or no such device.
    """
    cuda = import_driver("cuda.bindings.driver", "kernels", device)
    try:
        return CudaBindings(cuda, device)
    except (CudaError, RuntimeError) as error:  # RuntimeError: the driver's library is missing
        raise no_device(device, error) from error


class CudaBindings(Device):
    """The CUDA driver through ``cuda.bindings.driver``."""

    def __init__(self, cuda: Any, device: int | None) -> None:
        """Open a device, or None for that of the current context; ``cuda`` is the module ``cuda.bindings.driver``."""
        self._cuda = cuda
        self.call("cuInit", 0)
        version: int = self.call("cuDriverGetVersion")
        self.cuda = version // 1000, version % 1000 // 10
        has_context = int(self.call("cuCtxGetCurrent")) != 0
        if not has_context or device is not None:
            wanted = self.call("cuDeviceGet", device or 0)
            if not has_context or int(self.call("cuCtxGetDevice")) != int(wanted):
                self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", wanted))
        self._context = self.call("cuCtxGetCurrent")
        current_device = self.call("cuCtxGetDevice")
        kinds = cuda.CUdevice_attribute
        major: int = self.call(
            "cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, current_device
        )
        minor: int = self.call(
            "cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, current_device
        )
        self.capability = 10 * major + minor
        name: bytes = self.call("cuDeviceGetName", NAME_BYTES, current_device)
        self.name = name.partition(b"\0")[0].decode(errors="replace")
        self._modules: list[LoadedModule] = []  # a function is valid while its module is loaded

    def load(self, ptx: str, symbol: str) -> Any:
        """Return a function of a PTX text, compiled for the device; see ``modules``."""
        text = ptx.encode() + b"\0"
        key = id(self._cuda), int(self._context), hashlib.sha256(text).hexdigest()
        module = MODULES.get(key, lambda: self.call("cuModuleLoadData", text), _unloader(self._cuda, self._context))
        self._modules.append(module)
        return self.call("cuModuleGetFunction", module.handle, symbol.encode())

    def unload(self) -> None:
        """Give the modules back; their functions may not be launched any more."""
        self._modules.clear()

    def launch(self, launch: Launch) -> None:
        """Enqueue a launch in its stream, given as a handle."""
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
        """Make this adapter's CUDA context current in the calling thread."""
        self.call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Return the free memory of the device."""
        return int(self.call("cuMemGetInfo"))  # the first result; the second is the total

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory on the device."""
        return int(self.call("cuMemAlloc", max(nbytes, 1)))

    def free(self, address: int) -> None:
        """Free device memory."""
        self.call("cuMemFree", address)

    def allocate_host(self, nbytes: int) -> int:
        """Return the address of new pinned memory."""
        return int(self.call("cuMemAllocHost", max(nbytes, 1)))

    def free_host(self, address: int) -> None:
        """Free pinned memory."""
        self.call("cuMemFreeHost", address)

    def new_stream(self) -> int:
        """Return the handle of a new stream."""
        return int(self.call("cuStreamCreate", NON_BLOCKING))

    def free_stream(self, stream: int) -> None:
        """Destroy a stream."""
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
        """Record the work that this thread enqueues; the work of other threads is not affected."""
        self.call("cuStreamBeginCapture", stream, self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> Any:
        """Return the recorded work, ready to be launched."""
        graph = self.call("cuStreamEndCapture", stream)
        try:
            return self.call("cuGraphInstantiate", graph, 0)
        finally:
            self.call("cuGraphDestroy", graph)

    def launch_graph(self, graph: Any, stream: int) -> None:
        """Enqueue recorded work."""
        self.call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        """Destroy recorded work."""
        self.call("cuGraphExecDestroy", graph)

    def new_event(self) -> Any:
        """Return an event that records the time."""
        return self.call("cuEventCreate", 0)

    def free_event(self, event: Any) -> None:
        """Destroy an event."""
        self.call("cuEventDestroy", event)

    def record_event(self, event: Any, stream: int) -> None:
        """Record an event in a stream."""
        self.call("cuEventRecord", event, stream)

    def wait_event(self, event: Any) -> None:
        """Wait until the device has reached an event."""
        self.call("cuEventSynchronize", event)

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two completed events."""
        return float(self.call("cuEventElapsedTime", start, stop))

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the driver and return its first result; None if it has none."""
        status, *results = getattr(self._cuda, function)(*arguments)
        if int(status) != 0:
            kind = DeviceMemoryError if int(status) == OUT_OF_MEMORY else CudaError
            raise kind(f"{function} returned {int(status)} {getattr(status, 'name', '')}".rstrip())
        return results[0] if results else None


def _unloader(cuda: Any, context: Any) -> Callable[[Any], None]:
    """Return what unloads a module in its context, from whatever thread; the driver's answer is of no use then."""

    def unload(module: Any) -> None:
        with suppress(Exception):
            (status,) = cuda.cuCtxPushCurrent(context)
            if int(status) != 0:  # it is gone, and its modules with it; there is nothing to pop
                return
            cuda.cuModuleUnload(module)
            cuda.cuCtxPopCurrent()

    return unload
