"""A GPU that is not there: it records every call, and does the work late, as a real one does.

Nothing happens before a stream is waited for. Copies then read the memory as it is at that moment, so a buffer that is
overwritten, moved or freed too early gives wrong masks or an error here, not only on a GPU. Device addresses lie where
no host memory is. Kernels are their references.
"""

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medseg_trt.kernels import load
from medseg_trt.kernels.device import Device, DeviceMemoryError
from medseg_trt.kernels.kernel import DTYPES, Entry, Kernel, rounded
from medseg_trt.kernels.launch import CudaError, Launch

Work = tuple[Callable[[], None], tuple[int, ...]]  # what is done, and the addresses it needs
FIRST_DEVICE_ADDRESS = 1 << 56  # beyond what a process can have
KERNELS = ("image_to_tensor", "logits_to_mask")


def symbol_as_ptx(kernel: Kernel, entry: Entry, capability: int, cuda: tuple[int, int]) -> str:
    """Return what ``FakeGpu.load`` finds a kernel by."""
    return entry.symbol


@dataclass
class Graph:
    """Recorded work."""

    work: list[Work]
    alive: bool = True


class FakeGpu(Device):
    """A device that records, delays and checks.

    ``calls`` holds every call by its name and arguments. ``fail`` makes the next call of a name raise what it maps to.
    ``limit`` is how many bytes there are.
    """

    capability, cuda, name = 89, (13, 0), "Fake GPU"

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.calls: list[tuple[Any, ...]] = []
        self.fail: dict[str, Exception] = {}
        self.memory: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.once_pinned: list[np.ndarray] = []  # so that a session that reads there does not bring down the tests
        self.streams: dict[int, list[Work]] = {}
        self.capturing: dict[int, list[Work]] = {}
        self.graphs: list[Graph] = []
        self.events: list[list[float]] = []
        self.loaded: set[str] = set()  # functions whose modules are there
        self.device_ms = 0.0  # a clock that only what runs on the device moves
        self._next = FIRST_DEVICE_ADDRESS
        self._active = threading.local()
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Return the names of all calls, in order."""
        return [call[0] for call in self.calls]

    def is_clean(self) -> bool:
        """Say whether everything was given back."""
        graphs = any(graph.alive for graph in self.graphs)
        return not (self.memory or self.pinned or self.streams or self.events or self.loaded or graphs)

    def note(self, *call: Any) -> None:
        """Record a call, and fail if it is to."""
        with self._lock:
            self.calls.append(call)
            if call[0] != "activate" and not getattr(self._active, "yes", False):
                raise AssertionError(f"{call[0]} in a thread without the device's context")
            if call[0] in self.fail:
                raise self.fail.pop(call[0])

    def enqueue(self, stream: int, work: Callable[[], None], *addresses: int) -> None:
        """Put work into a stream, or into what is being recorded from it."""
        with self._lock:
            self.capturing.get(stream, self.streams[stream]).append((work, addresses))

    def _require_unused(self, address: int) -> None:
        with self._lock:
            assert not [1 for queue in self.streams.values() for _, used in queue if address in used], "freed in use"

    def view(self, address: int, nbytes: int) -> np.ndarray:
        """Return device memory, which must be allocated as a whole."""
        for start, block in list(self.memory.items()):
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not allocated")

    def activate(self) -> None:
        self._active.yes = True
        self.note("activate")

    def free_bytes(self) -> int:
        self.note("free_bytes")
        return self.limit - sum(map(len, self.memory.values()))

    def allocate(self, nbytes: int) -> int:
        self.note("allocate", nbytes)
        with self._lock:
            if nbytes > self.limit - sum(map(len, self.memory.values())):
                raise DeviceMemoryError("cuMemAlloc returned 2 CUDA_ERROR_OUT_OF_MEMORY")
            address, self._next = self._next, self._next + (nbytes // 256 + 2) * 256  # never used again
            self.memory[address] = np.full(nbytes, 0xCD, np.uint8)
            return address

    def free(self, address: int) -> None:
        self.note("free", address)
        self._require_unused(address)
        del self.memory[address]

    def allocate_host(self, nbytes: int) -> int:
        self.note("allocate_host", nbytes)
        block = np.full(nbytes, 0xCD, np.uint8)
        self.pinned[block.ctypes.data] = block
        return block.ctypes.data

    def free_host(self, address: int) -> None:
        self.note("free_host", address)
        self._require_unused(address)
        self.once_pinned.append(self.pinned.pop(address))

    def new_stream(self) -> int:
        self.note("new_stream")
        with self._lock:
            stream = 0x500 + len(self.names())
            self.streams[stream] = []
            return stream

    def free_stream(self, stream: int) -> None:
        self.note("free_stream", stream)
        del self.streams[stream]

    def clear(self, address: int, nbytes: int, stream: int) -> None:
        self.note("clear", address, nbytes)
        self.enqueue(stream, lambda: self.view(address, nbytes).fill(0), address)

    def upload(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.note("upload", nbytes, stream)
        self._host(source, nbytes)
        self.enqueue(stream, lambda: np.copyto(self.view(target, nbytes), self._host(source, nbytes)), target, source)

    def download(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.note("download", nbytes, stream)
        self._host(target, nbytes)
        self.enqueue(stream, lambda: np.copyto(self._host(target, nbytes), self.view(source, nbytes)), target, source)

    def _host(self, address: int, nbytes: int) -> np.ndarray:
        """Return pinned memory, which must be allocated as a whole."""
        hits = [1 for start, buffer in list(self.pinned.items()) if start <= address <= start + len(buffer) - nbytes]
        assert hits, f"{nbytes} bytes at {address:#x} are not pinned"
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))

    def synchronize(self, stream: Any) -> None:
        self.note("synchronize", stream)
        assert stream not in self.capturing, "a stream that is recorded cannot be waited for"
        with self._lock:
            work, self.streams[stream][:] = list(self.streams[stream]), []
        self._do(work)

    def _do(self, work: list[Work]) -> None:
        events = {id(event) for event in self.events}
        for launch, addresses in work:
            launch()
            self.device_ms += not set(addresses) <= events  # a copy, a kernel or the network; an event takes no time

    def begin_capture(self, stream: int) -> None:
        self.note("begin_capture")
        assert stream not in self.capturing
        self.capturing[stream] = []

    def end_capture(self, stream: int) -> Graph:
        work = self.capturing.pop(stream)
        self.note("end_capture")
        graph = Graph(work)
        self.graphs.append(graph)
        return graph

    def launch_graph(self, graph: Graph, stream: int) -> None:
        self.note("launch_graph", stream)
        assert graph.alive, "a graph is launched that was given back"
        for launch, addresses in graph.work:
            self.enqueue(stream, launch, *addresses)

    def free_graph(self, graph: Graph) -> None:
        self.note("free_graph")
        assert graph.alive, "a graph is given back twice"
        graph.alive = False

    def new_event(self) -> list[float]:
        self.note("new_event")
        event = list[float]()
        self.events.append(event)
        return event

    def free_event(self, event: list[float]) -> None:
        self.note("free_event")
        self.events = [other for other in self.events if other is not event]

    def record_event(self, event: list[float], stream: int) -> None:
        self.note("record_event")
        assert any(other is event for other in self.events), "an event is used that was given back"
        event.clear()
        self.enqueue(stream, lambda: event.append(self.device_ms), id(event))

    def wait_event(self, event: list[float]) -> None:
        self.note("wait_event")
        assert any(other is event for other in self.events), "an event is waited for that was given back"
        with self._lock:
            queue = next(
                (queue for queue in self.streams.values() if any(used == (id(event),) for _, used in queue)), []
            )
            last = max((index for index, (_, used) in enumerate(queue) if used == (id(event),)), default=-1)
            work, queue[:] = queue[: last + 1], queue[last + 1 :]
        self._do(work)

    def elapsed_ms(self, start: list[float], stop: list[float]) -> float:
        self.note("elapsed_ms")
        assert start, "the device has not come by the first event"
        assert stop, "the device has not come by the second event"
        return stop[0] - start[0]

    def load(self, ptx: str, symbol: str) -> tuple[Kernel, Entry]:
        self.note("load", symbol)
        self.loaded.add(symbol)
        return next(
            (kernel, entry) for kernel in map(load, KERNELS) for entry in kernel.entries if entry.symbol == symbol
        )

    def unload(self) -> None:
        self.note("unload")
        self.loaded.clear()

    def launch(self, launch: Launch) -> None:
        kernel, entry = launch.function
        self.note("launch", kernel.name)
        assert entry.symbol in self.loaded, "a function is launched whose module was unloaded"
        self.enqueue(launch.stream, lambda: self._run(kernel, entry, launch.arguments), *launch.arguments)

    def _run(self, kernel: Kernel, entry: Entry, arguments: tuple[int, ...]) -> None:
        values = {parameter.name: value for parameter, value in zip(entry.parameters, arguments, strict=True)}
        scalars = {
            parameter.name: values[parameter.name] for parameter in entry.parameters if parameter.kind == "int32"
        }
        shapes = kernel.shapes(scalars, entry)
        arrays = {
            parameter.name: self.view(
                values[parameter.name], int(np.prod(shapes[parameter.name])) * DTYPES[parameter.dtype].itemsize
            )
            .view(DTYPES[parameter.dtype])
            .reshape(shapes[parameter.name])
            for parameter in entry.parameters
            if parameter.kind == "pointer"
        }
        out = next(parameter for parameter in entry.parameters if parameter.direction == "out")
        inputs = {name: values for name, values in arrays.items() if name != out.name}
        arrays[out.name][...] = rounded(kernel.reference(entry, inputs, scalars)[out.name].value, out.dtype)


def illegal_address() -> CudaError:
    """Return what a driver says of a broken kernel, from then on at every call."""
    return CudaError("cuStreamSynchronize returned 700 CUDA_ERROR_ILLEGAL_ADDRESS")
