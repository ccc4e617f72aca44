"""A CUDA stream with everything that one thread at a time needs to run a network in it.

What goes up and comes down passes pinned memory, so that all copies, our two kernels and the network are one sequence
in one stream, with one wait at its end. A sequence that comes a second time is recorded as a CUDA graph. A graph keeps
every address and the state of its execution context; so it has a context of its own that nobody touches again, and
it is dropped when a buffer moves. All contexts of a stream work in the same memory: they never run at the same time.
Source: NVIDIA, "TensorRT Best Practices" (CUDA graphs).
"""

import ctypes
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import DeviceError
from medseg_trt.kernels import load
from medseg_trt.kernels.device import Device
from medseg_trt.kernels.launch import CudaError, Launcher
from medseg_trt.progress import LOG
from medseg_trt.sessions.tensorrt_engine import Context, Engine, EngineError

MOST_GRAPHS = 8  # of a stream; each has a context, and images come in many sizes
UNTIMED = 2  # runs: the first settles a shape, the second is recorded
Scalars = tuple[tuple[str, int], ...]  # of a kernel, by name


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceRequest:
    """One pass through the network. Equal requests are the same sequence of calls."""

    images: int
    to_tensor: Scalars | None = None  # of image_to_tensor; None: what goes up is prepared already
    to_mask: Scalars | None = None  # of logits_to_mask; None: the logits come down
    alone: bool = False  # the network alone: nothing goes up or comes down, images and logits stay on the device


class Buffer:
    """Memory that can grow; its address changes then."""

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._allocate, self._free = allocate, free
        self.address = self.nbytes = 0

    def reserve(self, nbytes: int) -> bool:
        """Have at least ``nbytes``, and say whether the address is another one now; the content is lost then."""
        if nbytes <= self.nbytes:
            return False
        self.close()
        self.address = self._allocate(nbytes)
        self.nbytes = nbytes
        return True

    def close(self) -> None:
        """Give the memory back."""
        if self.nbytes:
            address, self.address, self.nbytes = self.address, 0, 0
            self._free(address)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """A request as a CUDA graph."""

    graph: Any
    context: Context  # that it was recorded from, and lives as long


class InferenceStream:
    """A CUDA stream, its buffers, its context and its graphs; used by one thread at a time."""

    def __init__(self, engine: Engine, device: Device, launcher: Launcher, *, graphs: bool = True) -> None:
        """Allocate what the engine's largest batch needs.

        Raises:
            CudaError: there is not enough memory, or no device any more.
            EngineError: the engine makes no context.
        """
        self._engine, self._device, self._launcher = engine, device, launcher
        self._wants_graphs = graphs
        self._recorded: OrderedDict[InferenceRequest, Recorded] = OrderedDict()
        self._seen: set[InferenceRequest] = set()
        self._activations, self._tensor, self._logits, self._pixels, self._mask = self._buffers = tuple(
            Buffer(device.allocate, device.free) for _ in range(5)
        )
        self._upward, self._downward = self._pinned = tuple(
            Buffer(device.allocate_host, device.free_host) for _ in range(2)
        )
        self._context: Context | None = None
        self._stream = device.new_stream()
        try:
            self._activations.reserve(engine.activation_bytes)
            self._tensor.reserve(engine.most * engine.input.nbytes)
            self._logits.reserve(engine.most * engine.output.nbytes)
            device.clear(self._tensor.address, self._tensor.nbytes, self._stream)  # rows beyond the images are read too
            self._context = engine.context(self._activations.address)
        except BaseException:
            self.close()
            raise

    def run(self, request: InferenceRequest, source: ndarray) -> ndarray:
        """Execute a request and return a copy of its output: logits, or masks.

        Args:
            request: what to do; at most as many images as the engine takes at once.
            source: contiguous; prepared images of the engine's type, or pixels.

        Raises:
            CudaError: the device reports an error.
            EngineError: the engine does.
        """
        assert source.nbytes == self._up_bytes(request)
        self._reserve(request)
        _host(self._upward)[: source.nbytes] = source.reshape(-1).view(np.uint8)
        self._start(request)
        self._device.synchronize(self._stream)
        answer = self._answer(request)
        self._record_if_seen(request)
        return answer

    def time(self, source: ndarray, runs: int) -> list[float]:
        """Return the milliseconds that the network takes for prepared images that are on the device already.

        Args:
            source: as for ``run``; at most as many images as the engine takes at once.
            runs: how often, after ``UNTIMED`` that are not timed.

        Raises:
            CudaError, EngineError: as ``run`` does.
        """
        self.run(InferenceRequest(images=len(source)), source)
        request, taken = InferenceRequest(images=len(source), alone=True), list[float]()
        marks = [self._device.new_event(), self._device.new_event()]
        try:
            for _ in range(UNTIMED + runs):
                self._start(request, *marks)
                self._device.synchronize(self._stream)
                taken.append(self._device.elapsed_ms(*marks))
                self._record_if_seen(request)
        finally:
            for mark in marks:
                with suppress(CudaError):
                    self._device.free_event(mark)
        return taken[UNTIMED:]

    def watch(self, source: ndarray, runs: int) -> dict[str, list[float]]:
        """Return the milliseconds of every layer, by its name, in each of ``runs`` runs; see ``time``.

        It is done in a context of its own, since layers that are watched wait for one another.
        """
        self.run(InferenceRequest(images=len(source)), source)
        request = InferenceRequest(images=len(source), alone=True)
        context = self._engine.context(self._activations.address)
        taken = context.watch()
        self._prepare(request, context)
        for _ in range(UNTIMED + runs):
            self._put(request, context)
            self._device.synchronize(self._stream)
        return {name: found[UNTIMED:] for name, found in taken.items()}

    def close(self) -> None:
        """Wait for the stream and give everything back; on a broken device, what it still takes."""
        with suppress(CudaError):
            self._device.synchronize(self._stream)
        self._forget_graphs()
        self._context = None
        for buffer in (*self._buffers, *self._pinned):
            with suppress(CudaError):
                buffer.close()
        with suppress(CudaError):
            self._device.free_stream(self._stream)

    def _start(self, request: InferenceRequest, before: Any = None, after: Any = None) -> None:
        """Put a request into the stream, between two marks if there are any."""
        assert self._context is not None
        recorded = self._recorded.get(request)
        if recorded is None:
            self._prepare(request, self._context)
        if before is not None:
            self._device.record_event(before, self._stream)
        if recorded is None:
            self._put(request, self._context)
        else:
            self._recorded.move_to_end(request)
            self._device.launch_graph(recorded.graph, self._stream)
        if after is not None:
            self._device.record_event(after, self._stream)

    def _record_if_seen(self, request: InferenceRequest) -> None:
        """Record a request that was done a second time."""
        if self._wants_graphs and request not in self._recorded:
            if request in self._seen:
                self._record(request)
            self._seen.add(request)

    def _up_bytes(self, request: InferenceRequest) -> int:
        if request.to_tensor is None:
            return request.images * self._engine.input.nbytes
        return request.images * dict(request.to_tensor)["image_stride"]

    def _down(self, request: InferenceRequest) -> tuple[tuple[int, ...], np.dtype[Any]]:
        if request.to_mask is None:
            return (request.images, *self._engine.output.shape), self._engine.output.dtype
        size = dict(request.to_mask)
        return (request.images, size["height"], size["width"]), np.dtype(np.uint8)

    def _down_bytes(self, request: InferenceRequest) -> int:
        shape, dtype = self._down(request)
        return int(np.prod(shape)) * dtype.itemsize

    def _reserve(self, request: InferenceRequest) -> None:
        up, down = self._up_bytes(request), self._down_bytes(request)
        needed = [(self._upward, up), (self._downward, down)]
        needed += [(self._pixels, up)] if request.to_tensor is not None else []
        needed += [(self._mask, down)] if request.to_mask is not None else []
        if any(nbytes > buffer.nbytes for buffer, nbytes in needed):
            self._forget_graphs()  # they hold the old addresses
            for buffer, nbytes in needed:
                buffer.reserve(nbytes)

    def _prepare(self, request: InferenceRequest, context: Context) -> None:
        batch = max(request.images, self._engine.least)
        context.prepare(batch, self._tensor.address, self._logits.address)

    def _put(self, request: InferenceRequest, context: Context) -> None:
        """Put a request into the stream: up, prepare, the network, label, down."""
        if request.alone:
            context.enqueue(self._stream)
            return
        target = self._tensor if request.to_tensor is None else self._pixels
        self._device.upload(target.address, self._upward.address, self._up_bytes(request), self._stream)
        if request.to_tensor is not None:
            self._launch("image_to_tensor", self._engine.input.dtype, request.to_tensor, self._pixels, self._tensor)
        context.enqueue(self._stream)
        if request.to_mask is not None:
            self._launch("logits_to_mask", self._engine.output.dtype, request.to_mask, self._logits, self._mask)
        source = self._logits if request.to_mask is None else self._mask
        self._device.download(self._downward.address, source.address, self._down_bytes(request), self._stream)

    def _launch(self, name: str, dtype: np.dtype[Any], scalars: Scalars, source: Buffer, target: Buffer) -> None:
        kernel = load(name)
        entry = kernel.entry(f"{name}_{dtype.name}")
        first, last = (each.name for each in entry.parameters if each.kind == "pointer")
        arrays = {first: source.address, last: target.address}
        self._launcher.launch(kernel, entry, arrays, dict(scalars), self._stream)

    def _answer(self, request: InferenceRequest) -> ndarray:
        shape, dtype = self._down(request)
        return _host(self._downward)[: self._down_bytes(request)].view(dtype).reshape(shape).copy()

    def _record(self, request: InferenceRequest) -> None:
        """Record a request whose output has been read. Where that fails, every request is enqueued call by call."""
        try:
            self._keep(request, self._capture(request))
        except (CudaError, EngineError, DeviceError) as error:
            self._wants_graphs = False
            LOG.warning("CUDA graphs are not used, every call is made anew: %s", error)

    def _capture(self, request: InferenceRequest) -> Recorded:
        context = self._engine.context(self._activations.address)
        self._prepare(request, context)
        self._put(request, context)  # TensorRT settles a new shape in its first run, which cannot be recorded
        self._device.synchronize(self._stream)
        if not context.is_capturable(self._stream):
            raise EngineError("TensorRT says that the engine cannot be recorded")
        self._device.begin_capture(self._stream)
        try:
            self._put(request, context)
        except BaseException:
            with suppress(CudaError):  # the stream has to leave the mode all the same
                self._device.free_graph(self._device.end_capture(self._stream))
            raise
        return Recorded(graph=self._device.end_capture(self._stream), context=context)

    def _keep(self, request: InferenceRequest, recorded: Recorded) -> None:
        self._recorded[request] = recorded
        if len(self._recorded) > MOST_GRAPHS:
            _, oldest = self._recorded.popitem(last=False)
            self._device.free_graph(oldest.graph)

    def _forget_graphs(self) -> None:
        while self._recorded:
            _, recorded = self._recorded.popitem()
            with suppress(CudaError):
                self._device.free_graph(recorded.graph)


def _host(buffer: Buffer) -> ndarray:
    """Return pinned memory as an array of bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address))
