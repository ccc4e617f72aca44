"""A CUDA stream with everything that one thread at a time needs to run a network in it.

What goes up and comes down passes pinned memory, so that all copies, our two kernels and the network are one sequence
in one stream, with one wait at its end. The network alone is recorded as a CUDA graph, once for each size of batch that
comes a second time; copies and kernels stay outside, so that images of any size share it. Batches are filled up to the
next power of two, so that there are few. Each size has a context of its own, whose state and addresses its graph keeps,
and all contexts of a stream work in the same memory: they never run at the same time.
Source: NVIDIA, "TensorRT Best Practices" (CUDA graphs).
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import DeviceError
from medseg_trt.kernels import load
from medseg_trt.kernels.device import Device
from medseg_trt.kernels.kernel import Entry
from medseg_trt.kernels.launch import CudaError, Launch, Launcher
from medseg_trt.progress import LOG
from medseg_trt.sessions.device_times import UNTIMED, DeviceTimes, OverlappedStream, time_copies, time_in_flight
from medseg_trt.sessions.stream_events import StreamEvents
from medseg_trt.sessions.tensorrt_engine import Context, Engine, EngineError

COPIES = 20  # timed per turn
MOST_LAUNCHES = 256  # whose checked arguments are kept: two for each size of image and batch
Scalars = tuple[tuple[str, int], ...]  # of a kernel, by name


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceRequest:
    """One pass through the network."""

    images: int
    to_tensor: Scalars | None = None  # of image_to_tensor; None: what goes up is prepared already
    to_mask: Scalars | None = None  # of logits_to_mask; None: the logits come down


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


@dataclass(kw_only=True, slots=True)
class PreparedBatch:
    """The network for one size of batch."""

    context: Context
    runs: int = 0
    graph: Any = None  # of one run; None: not recorded yet, or it cannot be


class InferenceStream:
    """A CUDA stream, its buffers, and a context for each size of batch; used by one thread at a time."""

    def __init__(self, engine: Engine, device: Device, launcher: Launcher, *, graphs: bool = True) -> None:
        """Allocate what the engine's largest batch needs.

        Raises:
            CudaError: there is not enough memory, or no device any more.
        """
        self._engine, self._device, self._launcher = engine, device, launcher
        self._wants_graphs = graphs
        self._batches: dict[int, PreparedBatch] = {}
        self._launches: dict[tuple[str, Scalars, int, int], tuple[Entry, Launch]] = {}
        self._activations, self._tensor, self._logits, self._pixels, self._mask = self._buffers = tuple(
            Buffer(device.allocate, device.free) for _ in range(5)
        )
        self._upward, self._downward = self._pinned = tuple(
            Buffer(device.allocate_host, device.free_host) for _ in range(2)
        )
        self._stream = device.new_stream()
        try:
            self._activations.reserve(engine.activation_bytes)
            self._tensor.reserve(engine.most * engine.input.nbytes)
            self._logits.reserve(engine.most * engine.output.nbytes)
            device.clear(self._tensor.address, self._tensor.nbytes, self._stream)  # rows beyond the images are read too
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
            EngineError: the engine does, or makes no context.
        """
        assert source.nbytes == self._up_bytes(request)
        self._reserve(request)
        batch = self._prepared(self._engine.filled_up(request.images))
        _host(self._upward)[: source.nbytes] = source.reshape(-1).view(np.uint8)
        self._enqueue_with_copies(request, batch)
        self._device.synchronize(self._stream)
        output = self._output(request)
        self._record_if_seen(batch)
        return output

    def overlapped(self, source: ndarray) -> OverlappedStream:
        """Return what runs prepared images that stay in pinned memory, as do the logits; see ``time_overlapped``.

        Args:
            source: contiguous images of the engine's type, at most as many as it takes at once.

        Raises:
            CudaError, EngineError: as ``run`` does.
        """
        request = InferenceRequest(images=len(source))
        for _ in range(UNTIMED):
            self.run(request, source)
        batch = self._prepared(self._engine.filled_up(request.images))
        return OverlappedStream(
            enqueue=lambda: self._enqueue_with_copies(request, batch),
            wait=lambda: self._device.synchronize(self._stream),
        )

    def time(self, sizes: list[int], duration_s: float, min_runs: int) -> DeviceTimes:
        """Return the times of the network alone, of images that are on the device already, and of their copies.

        Args:
            sizes: numbers of images that run one after the other, each at most as many as the engine takes at once.
            duration_s: seconds by the host's clock.
            min_runs: at least so many runs.

        Raises:
            CudaError, EngineError: as ``run`` does.
        """
        batches = [self._prepared(self._engine.filled_up(images)) for images in sizes]
        for _ in range(UNTIMED):
            for batch in batches:
                self._enqueue(batch)
                self._device.synchronize(self._stream)
                self._record_if_seen(batch)

        def launch() -> None:
            for batch in batches:
                self._enqueue(batch)

        whole = InferenceRequest(images=max(sizes))
        self._reserve(whole)
        with StreamEvents(self._device, self._stream) as clock:
            times = time_in_flight(launch, clock, duration_s, min_runs)
            return DeviceTimes(
                compute_ms=times.compute_ms,
                enqueue_ms=times.enqueue_ms,
                upload_ms=time_copies(lambda: self._upload(whole), clock, COPIES),
                download_ms=time_copies(lambda: self._download(whole), clock, COPIES),
            )

    def watch(self, source: ndarray, runs: int) -> dict[str, list[float]]:
        """Return the milliseconds of every layer, by its name, in each of ``runs`` runs; see ``time``.

        It is done in a context of its own, since layers that are watched wait for one another.
        """
        self.run(InferenceRequest(images=len(source)), source)
        context = self._engine.context(self._activations.address)
        taken = context.watch()
        self._set_addresses(context, self._engine.filled_up(len(source)))
        for _ in range(UNTIMED + runs):
            context.enqueue(self._stream)
            self._device.synchronize(self._stream)
        return {name: layer_ms[UNTIMED:] for name, layer_ms in taken.items()}

    def close(self) -> None:
        """Wait for the stream and give everything back; on a broken device, what it still takes."""
        with suppress(CudaError):
            self._device.synchronize(self._stream)
        while self._batches:
            _, batch = self._batches.popitem()
            if batch.graph is not None:
                with suppress(CudaError):
                    self._device.free_graph(batch.graph)
        for buffer in (*self._buffers, *self._pinned):
            with suppress(CudaError):
                buffer.close()
        with suppress(CudaError):
            self._device.free_stream(self._stream)

    def _prepared(self, size: int) -> PreparedBatch:
        """Return the network for a size of batch, with a new context for a new one."""
        if size not in self._batches:
            context = self._engine.context(self._activations.address)
            self._set_addresses(context, size)
            self._batches[size] = PreparedBatch(context=context)
        return self._batches[size]

    def _set_addresses(self, context: Context, size: int) -> None:
        context.prepare(size, self._tensor.address, self._logits.address)

    def _enqueue_with_copies(self, request: InferenceRequest, batch: PreparedBatch) -> None:
        self._upload(request)
        self._enqueue(batch)
        self._download(request)

    def _enqueue(self, batch: PreparedBatch) -> None:
        """Put the network into the stream."""
        if batch.graph is not None:
            self._device.launch_graph(batch.graph, self._stream)
        else:
            batch.context.enqueue(self._stream)

    def _upload(self, request: InferenceRequest) -> None:
        """Put the way up into the stream: the copy, and from pixels to the network's input."""
        target = self._tensor if request.to_tensor is None else self._pixels
        self._device.upload(target.address, self._upward.address, self._up_bytes(request), self._stream)
        if request.to_tensor is not None:
            self._launch("image_to_tensor", self._engine.input.dtype, request.to_tensor, self._pixels, self._tensor)

    def _download(self, request: InferenceRequest) -> None:
        """Put the way down into the stream: from logits to masks, and the copy."""
        if request.to_mask is not None:
            self._launch("logits_to_mask", self._engine.output.dtype, request.to_mask, self._logits, self._mask)
        source = self._logits if request.to_mask is None else self._mask
        self._device.download(self._downward.address, source.address, self._down_bytes(request), self._stream)

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
        self._upward.reserve(up)
        self._downward.reserve(down)
        if request.to_tensor is not None:
            self._pixels.reserve(up)
        if request.to_mask is not None:
            self._mask.reserve(down)

    def _launch(self, name: str, dtype: np.dtype[Any], scalars: Scalars, source: Buffer, target: Buffer) -> None:
        """Put a kernel into the stream; the arguments of those that came before are not checked again."""
        key = name, scalars, source.address, target.address
        known = self._launches.get(key)
        if known is None:
            kernel = load(name)
            entry = kernel.entry(f"{name}_{dtype.name}")
            first, last = (parameter.name for parameter in entry.parameters if parameter.kind == "pointer")
            arrays = {first: source.address, last: target.address}
            prepared = self._launcher.prepare(kernel, entry, arrays, dict(scalars), self._stream)
            if prepared is None:
                return
            if len(self._launches) >= MOST_LAUNCHES:
                self._launches.clear()
            known = self._launches[key] = entry, prepared
        self._launcher.run(*known)

    def _output(self, request: InferenceRequest) -> ndarray:
        shape, dtype = self._down(request)
        return _host(self._downward)[: self._down_bytes(request)].view(dtype).reshape(shape).copy()

    def _record_if_seen(self, batch: PreparedBatch) -> None:
        """Record the network for a batch that has run a second time; where that fails, every call is made anew."""
        batch.runs += 1
        if not self._wants_graphs or batch.graph is not None or batch.runs < UNTIMED:
            return
        try:
            batch.graph = self._capture(batch.context)  # its shape has settled: TensorRT's first run cannot be recorded
        except (CudaError, EngineError, DeviceError) as error:
            self._wants_graphs = False
            LOG.warning("CUDA graphs are not used, every call is made anew: %s", error)

    def _capture(self, context: Context) -> Any:
        if not context.is_capturable(self._stream):
            raise EngineError("TensorRT says that the engine cannot be recorded")
        self._device.begin_capture(self._stream)
        try:
            context.enqueue(self._stream)
        except BaseException:
            with suppress(CudaError):  # the stream has to leave the mode all the same
                self._device.free_graph(self._device.end_capture(self._stream))
            raise
        return self._device.end_capture(self._stream)


def _host(buffer: Buffer) -> ndarray:
    """Return pinned memory as an array of bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * buffer.nbytes).from_address(buffer.address))
