"""Launch a kernel on arrays that are on a GPU already: PyTorch or CuPy arrays, or plain addresses.

Everything is checked here against the kernel's declaration, and nowhere after. PyTorch is not imported: an array says
itself where it is. Source: the CUDA Array Interface, version 3.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, cast

import numpy as np

from medseg_trt.errors import DeviceError, MissingExtraError, UsageError
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
    """What the CUDA driver said; ``Launcher`` adds the kernel's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One launch, as the CUDA driver needs it."""

    function: Any  # what Driver.load returned
    grid: tuple[int, int, int]  # blocks
    block: tuple[int, int, int]  # threads
    shared_bytes: int
    stream: Any  # 0 is the default stream
    layout: str  # of every argument: P is an address, i a 32-bit integer
    arguments: tuple[int, ...]


class Driver(ABC):
    """What both adapters do; each raises ``CudaError`` with the driver's own words."""

    capability: int  # of the device: 86 for sm_86
    cuda: Release  # the newest CUDA release that the driver knows

    @abstractmethod
    def load(self, ptx: str, symbol: str) -> Any:
        """Return a function of a PTX text, compiled for the device."""

    @abstractmethod
    def launch(self, launch: Launch) -> None:
        """Put a launch into its stream."""

    @abstractmethod
    def synchronize(self, stream: Any) -> None:
        """Wait until everything in a stream is done."""


def open_driver(name: str = "cuda-bindings", device: int = 0) -> Driver:
    """Return an adapter for a device, in the thread's current CUDA context or else in the device's primary one.

    Args:
        name: a key of ``DRIVERS``.
        device: its number.

    Raises:
        UsageError: there is no adapter of that name; the message lists those that there are.
        DeviceError: the machine has no NVIDIA driver or no such device.
        MissingExtraError: the adapter's package is not installed.
    """
    if name not in DRIVERS:
        raise UsageError(f"there is no CUDA adapter {name!r}; choose one of: {', '.join(DRIVERS)}")
    driver: Driver = importlib.import_module(DRIVERS[name]).open_device(device)
    return driver


def import_driver(module: str, extra: str, device: int) -> Any:
    """Import the package that an adapter is for.

    Raises:
        MissingExtraError: it is not installed.
        DeviceError: it is, but the driver's library that it needs is not.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{module} is not installed. Install it: pip install 'medseg-trt[{extra}]'") from error
    except ImportError as error:
        raise no_device(device, error) from error


def no_device(device: int, error: Exception) -> DeviceError:
    """Return the error that a device cannot be opened, for the adapters."""
    reason = str(error).rstrip(".")
    return DeviceError(f"no CUDA device {device}: {reason}. Kernels need an NVIDIA GPU and its driver")


class Launcher:
    """Launches kernels on one device; each is loaded once."""

    def __init__(self, driver: Driver, find_ptx: FindPtx = compile_here, *, wait: bool = False) -> None:
        """Launch through a driver.

        Args:
            driver: what ``open_driver`` returned.
            find_ptx: where the PTX comes from: ``library.open_library(folder)``, or compiled on the spot.
            wait: after every launch, wait for its end, so that an error inside the kernel is raised with its name.
        """
        self.driver = driver
        self.find_ptx = find_ptx
        self.wait = wait
        self._functions: dict[str, Any] = {}

    def launch(
        self, kernel: Kernel, entry: Entry, arrays: Mapping[str, Any], scalars: Mapping[str, int], stream: Any = 0
    ) -> None:
        """Put a kernel into a stream. Where there is nothing to do, nothing is launched.

        Args:
            kernel: which one.
            entry: one of its functions.
            arrays: for every pointer by name, an array with ``__cuda_array_interface__`` of exactly the declared type
                and shape, C-contiguous; or an address, about which only its alignment can be checked. They must not
                overlap an output.
            scalars: every int32 argument by name.
            stream: the stream's handle, for instance ``torch.cuda.current_stream().cuda_stream``; what is before it
                in other streams is not waited for.

        Raises:
            ValueError: an argument is not what the kernel declares.
            DeviceError: the device is too old, or CUDA reports an error; the message begins with the kernel's name.
        """
        arguments = pack(kernel, entry, arrays, scalars)
        grid = kernel.grid(scalars)
        if any(blocks > most for blocks, most in zip(grid, MOST_BLOCKS, strict=True)):
            raise ValueError(f"{entry.name}: {grid} blocks are more than {MOST_BLOCKS}; give it less at once")
        if 0 in grid:
            return
        try:
            self.driver.launch(
                Launch(
                    function=self._function(kernel, entry),
                    grid=grid,
                    block=kernel.block,
                    shared_bytes=kernel.shared_bytes,
                    stream=stream,
                    layout="".join(LAYOUT[parameter.kind] for parameter in entry.parameters),
                    arguments=arguments,
                )
            )
            if self.wait:
                self.driver.synchronize(stream)
        except CudaError as error:
            raise DeviceError(f"{entry.name}: {error}") from error

    def _function(self, kernel: Kernel, entry: Entry) -> Any:
        if entry.symbol not in self._functions:
            ptx = self.find_ptx(kernel, entry, self.driver.capability, self.driver.cuda)
            self._functions[entry.symbol] = self.driver.load(ptx, entry.symbol)
        return self._functions[entry.symbol]


def pack(kernel: Kernel, entry: Entry, arrays: Mapping[str, Any], scalars: Mapping[str, int]) -> tuple[int, ...]:
    """Check every argument, and return them in the kernel's order: addresses and integers.

    Raises:
        ValueError: one is not what the kernel declares.
    """
    kinds = {kind: [each.name for each in entry.parameters if each.kind == kind] for kind in LAYOUT}
    for given, wanted in ((arrays, kinds["pointer"]), (scalars, kinds["int32"])):
        if set(given) != set(wanted):
            raise ValueError(f"{entry.name} takes {', '.join(wanted)}; given are {', '.join(given)}")
    for name, value in scalars.items():
        if value not in INT32:
            raise ValueError(f"{entry.name}: {name} is {value}, which does not fit into 32 bits")
    if kernel.max_width is not None and scalars.get("width", 0) > kernel.max_width:
        raise ValueError(f"{entry.name}: the width is {scalars['width']}; at most {kernel.max_width} are possible")
    shapes = kernel.shapes(scalars, entry)
    addresses = {
        each.name: _address(entry, each, arrays[each.name], shapes[each.name])
        for each in entry.parameters
        if each.kind == "pointer"
    }
    _refuse_overlap(entry, addresses, shapes)
    return tuple(addresses[each.name] if each.kind == "pointer" else scalars[each.name] for each in entry.parameters)


def _address(entry: Entry, parameter: Parameter, array: object, shape: tuple[int, ...]) -> int:
    """Return where an array starts, if it is what the parameter declares."""
    name, dtype = f"{entry.name}: {parameter.name}", DTYPES[parameter.dtype]
    if isinstance(array, int):
        address = array
    else:
        interface = cast("dict[str, Any] | None", getattr(array, "__cuda_array_interface__", None))
        if interface is None:
            raise ValueError(f"{name} is not on a CUDA device")
        if interface["typestr"][1:] != dtype.str[1:]:  # but for the byte order, of which a GPU knows one
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
    wanted = itemsize
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != wanted:
            return False
        wanted *= length
    return True


def _refuse_overlap(entry: Entry, addresses: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    pointers = [each for each in entry.parameters if each.kind == "pointer"]
    for one, other in combinations(pointers, 2):
        if "out" not in (one.direction, other.direction):
            continue
        start = max(addresses[one.name], addresses[other.name])
        stop = min(
            addresses[each.name] + int(np.prod(shapes[each.name], dtype=np.int64)) * DTYPES[each.dtype].itemsize
            for each in (one, other)
        )
        if start < stop:
            raise ValueError(f"{entry.name}: {one.name} and {other.name} overlap; give {other.name} memory of its own")
