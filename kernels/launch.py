"""Launch a kernel on arrays in GPU memory: PyTorch or CuPy arrays, or plain addresses.

All arguments are checked here against the kernel's declaration. PyTorch is not imported: addresses come from the CUDA
Array Interface, version 3.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import numpy as np

from medseg_trt.errors import DeviceError, MissingExtraError, UsageError
from medseg_trt.gpu import not_enough_memory, require_gpu
from medseg_trt.kernels.kernel import DTYPES, Entry, Kernel, Parameter
from medseg_trt.kernels.library import FindPtx, Release, compile_here

DRIVERS: Mapping[str, str] = {
    "cuda-bindings": "medseg_trt.kernels.cuda_bindings_adapter",
    "pycuda": "medseg_trt.kernels.pycuda_adapter",
}
MOST_BLOCKS = 2**31 - 1, 65535, 65535
INT32 = range(-(2**31), 2**31)
LAYOUT = {"pointer": "P", "int32": "i"}  # as in struct


class CudaError(Exception):
    """An error of the CUDA driver; ``Launcher`` adds the kernel's name."""

    is_memory = False  # whether the device or the host lacks memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The arguments of one launch for the CUDA driver."""

    function: Any  # as Driver.load returned it
    grid: tuple[int, int, int]  # blocks
    block: tuple[int, int, int]  # threads
    shared_bytes: int
    stream: Any  # 0 is the default stream
    layout: str  # of every argument: P is an address, i a 32-bit integer
    arguments: tuple[int, ...]


class Driver(ABC):
    """The interface of both adapters; their methods raise ``CudaError`` with the driver's message."""

    capability: int  # of the device: 86 for sm_86
    cuda: Release  # the newest CUDA release that the driver supports

    @abstractmethod
    def load(self, ptx: str, symbol: str) -> Any:
        """Return a function of a PTX text, compiled for the device."""

    @abstractmethod
    def launch(self, launch: Launch) -> None:
        """Enqueue a launch in its stream."""

    @abstractmethod
    def unload(self) -> None:
        """Give back what ``load`` loaded; no function of it may be launched any more."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait until all work in a stream has completed."""


def open_driver(name: str = "cuda-bindings", device: int | None = 0) -> Driver:
    """Return the adapter of a device, in the thread's current CUDA context or else in the primary one.

    Args:
        name: a key of ``DRIVERS``.
        device: its number; None: that of the thread's current context, or without one the first.

    Raises:
        UsageError: no adapter has this name; the message lists the names.
        DeviceError: the machine has no NVIDIA driver or no such device.
        MissingExtraError: the adapter's package is not installed.
    """
    if name not in DRIVERS:
        raise UsageError(f"there is no CUDA adapter {name!r}; choose one of: {', '.join(DRIVERS)}")
    driver: Driver = importlib.import_module(DRIVERS[name]).open_device(device)
    return driver


def open_current_driver() -> Driver:
    """Return the adapter of the device whose CUDA context is current in this thread; see ``open_driver``."""
    return open_driver(device=None)


def import_driver(module: str, extra: str, device: int | None) -> Any:
    """Import the package of an adapter.

    Raises:
        MissingExtraError: it is not installed.
        DeviceError: it is installed, but the driver's library is missing.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{module} is not installed. Install it: pip install 'medseg-trt[{extra}]'") from error
    except ImportError as error:
        raise no_device(device, error) from error


def no_device(device: int | None, error: Exception) -> DeviceError:
    """Return the error of a device that cannot be opened: that it is missing, or else what CUDA reports."""
    try:
        gpu = require_gpu(device or 0)
    except DeviceError as missing:
        return missing
    return DeviceError(f"{gpu.name}, cuda:{device or 0}, cannot be opened: {str(error).rstrip('.')}")


class Launcher:
    """Launches kernels on one device; every function is loaded once."""

    def __init__(self, driver: Driver, find_ptx: FindPtx = compile_here, *, wait: bool = False) -> None:
        """Launch through a driver.

        Args:
            driver: as ``open_driver`` returned it.
            find_ptx: returns the PTX: ``library.open_library(folder)``, or compiles it.
            wait: wait for the end of every launch, so that an error inside the kernel is raised with its name.
        """
        self.driver = driver
        self.find_ptx = find_ptx
        self.wait = wait
        self._functions: dict[str, Any] = {}

    def launch(
        self, kernel: Kernel, entry: Entry, arrays: Mapping[str, Any], scalars: Mapping[str, int], stream: Any = 0
    ) -> None:
        """Enqueue a kernel in a stream; ``prepare`` describes arguments and errors. Without blocks, it is skipped."""
        prepared = self.prepare(kernel, entry, arrays, scalars, stream)
        if prepared is not None:
            self.run(entry, prepared)

    def prepare(
        self, kernel: Kernel, entry: Entry, arrays: Mapping[str, Any], scalars: Mapping[str, int], stream: Any = 0
    ) -> Launch | None:
        """Check the arguments of a launch and load its function; ``run`` may then be called any number of times.

        Args:
            kernel: the kernel.
            entry: one of its functions.
            arrays: for every pointer by name, an array with ``__cuda_array_interface__`` of exactly the declared type
                and shape, C-contiguous; or an address, of which only the alignment is checked. Arrays must not overlap
                an output.
            scalars: every int32 argument by name.
            stream: the stream's handle, for instance ``torch.cuda.current_stream().cuda_stream``; other streams are
                not synchronised.

        Returns:
            The launch, or None where it has no blocks.

        Raises:
            ValueError: an argument does not match the kernel's declaration.
            DeviceError: the device is too old, or CUDA reports an error; the message begins with the kernel's name.
        """
        arguments = pack(kernel, entry, arrays, scalars)
        grid = kernel.grid(scalars)
        if any(blocks > most for blocks, most in zip(grid, MOST_BLOCKS, strict=True)):
            raise ValueError(f"{entry.name}: {grid} blocks exceed {MOST_BLOCKS}; split the input")
        if 0 in grid:
            return None
        try:
            function = self._function(kernel, entry)
        except CudaError as error:
            raise _named(entry, error) from error
        return Launch(
            function=function,
            grid=grid,
            block=kernel.block,
            shared_bytes=kernel.shared_bytes,
            stream=stream,
            layout="".join(LAYOUT[parameter.kind] for parameter in entry.parameters),
            arguments=arguments,
        )

    def run(self, entry: Entry, launch: Launch) -> None:
        """Enqueue a launch that ``prepare`` returned for the entry.

        Raises:
            DeviceError: CUDA reports an error; the message begins with the kernel's name.
        """
        try:
            self.driver.launch(launch)
            if self.wait:
                self.driver.synchronize(launch.stream)
        except CudaError as error:
            raise _named(entry, error) from error

    def close(self) -> None:
        """Give the loaded functions back; another launch loads them again."""
        self._functions.clear()
        self.driver.unload()

    def _function(self, kernel: Kernel, entry: Entry) -> Any:
        if entry.symbol not in self._functions:
            ptx = self.find_ptx(kernel, entry, self.driver.capability, self.driver.cuda)
            self._functions[entry.symbol] = self.driver.load(ptx, entry.symbol)
        return self._functions[entry.symbol]


def _named(entry: Entry, error: CudaError) -> DeviceError:
    return not_enough_memory(entry.name, str(error)) if error.is_memory else DeviceError(f"{entry.name}: {error}")


def pack(kernel: Kernel, entry: Entry, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> tuple[int, ...]:
    """Check all arguments and return them in the kernel's order: addresses and integers.

    Raises:
        ValueError: an argument does not match the kernel's declaration.
    """
    kinds = {kind: [parameter.name for parameter in entry.parameters if parameter.kind == kind] for kind in LAYOUT}
    for arguments, names in ((arrays, kinds["pointer"]), (scalars, kinds["int32"])):
        if set(arguments) != set(names):
            raise ValueError(f"{entry.name} takes {', '.join(names)}; given are {', '.join(arguments)}")
    for name, value in scalars.items():
        if value not in INT32:
            raise ValueError(f"{entry.name}: {name} is {value}, which does not fit into 32 bits")
    if kernel.max_width is not None and scalars.get("width", 0) > kernel.max_width:
        raise ValueError(f"{entry.name}: the width is {scalars['width']}; at most {kernel.max_width} are possible")
    shapes = kernel.shapes(scalars, entry)
    addresses = {
        parameter.name: _address(entry, parameter, arrays[parameter.name], shapes[parameter.name])
        for parameter in entry.parameters
        if parameter.kind == "pointer"
    }
    _refuse_overlap(entry, addresses, shapes)
    return tuple(
        addresses[parameter.name] if parameter.kind == "pointer" else scalars[parameter.name]
        for parameter in entry.parameters
    )


def _address(entry: Entry, parameter: Parameter, array: object, shape: tuple[int, ...]) -> int:
    """Return the address of an array that matches its parameter."""
    name, dtype = f"{entry.name}: {parameter.name}", DTYPES[parameter.dtype]
    if isinstance(array, int):
        address = array
    else:
        interface = cast("dict[str, Any] | None", getattr(array, "__cuda_array_interface__", None))
        if interface is None:
            raise ValueError(f"{name} is not on a CUDA device")
        if interface["typestr"][1:] != dtype.str[1:]:  # without the byte order, which is the same on every GPU
            raise ValueError(f"{name} is {interface['typestr']}; it must be {parameter.dtype}")
        if tuple(interface["shape"]) != shape:
            raise ValueError(f"{name} has shape {tuple(interface['shape'])}; it must be {shape}")
        strides = interface.get("strides")
        if strides is not None and not _contiguous(shape, tuple(strides), dtype.itemsize):
            raise ValueError(f"{name} has gaps or another order of axes (strides {tuple(strides)}); make it contiguous")
        address, read_only = interface["data"]
        if parameter.direction == "out" and read_only:
            raise ValueError(f"{name} is read-only")
    if address % dtype.itemsize or (address == 0 and 0 not in shape):
        raise ValueError(f"{name} starts at {address:#x}, which is no address of {parameter.dtype}")
    return address


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    expected_stride = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != expected_stride:
            return False
        expected_stride *= length
    return True


def _refuse_overlap(entry: Entry, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    pointers = [parameter for parameter in entry.parameters if parameter.kind == "pointer"]
    for one, other in combinations(pointers, 2):
        if "out" not in (one.direction, other.direction):
            continue
        start = max(addresses[one.name], addresses[other.name])
        stop = min(
            addresses[parameter.name]
            + int(np.prod(shapes[parameter.name], dtype=np.int64)) * DTYPES[parameter.dtype].itemsize
            for parameter in (one, other)
        )
        if start < stop:
            raise ValueError(f"{entry.name}: {one.name} and {other.name} overlap; give {other.name} memory of its own")
