"""A lane: a CUDA stream with everything that one thread at a time needs to run a network in it.

What goes up and comes down passes pinned memory, so that all copies, our two kernels and the network are one sequence
in one stream, with one wait at its end. A sequence that comes a second time is recorded as a CUDA graph. A graph keeps
every address and the state of its execution context; so it has a context of its own that nobody touches again, and
it is dropped when a buffer moves. All contexts of a lane work in the same memory: they never run at the same time.
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

MOST_GRAPHS = 8  # of a lane; each has a context, and pictures come in many sizes
UNTIMED = 2  # runs: the first settles a shape, the second is recorded
Scalars = tuple[tuple[str, int], ...]  # of a kernel, by name


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One pass through the network. Equal jobs are the same sequence of calls."""

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
    """A job as a CUDA graph."""

    graph: Any
    context: Context  # that it was recorded from, and lives as long


class Lane:
    """A stream, its buffers, its context and its graphs; used by one thread at a time."""

    def __init__(self, engine: Engine, device: Device, launcher: Launcher, *, graphs: bool = True) -> None:
        """Allocate what the engine's largest batch needs.

        Raises:
            CudaError: there is not enough memory, or no device any more.
            EngineError: the engine makes no context.
        """
        self._engine, self._device, self._launcher = engine, device, launcher
        self._wants_graphs = graphs
        self._recorded: OrderedDict[Job, Recorded] = OrderedDict()
        self._seen: set[Job] = set()
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

    def run(self, job: Job, source: ndarray) -> ndarray:
        """Do a job and return a copy of what comes down: logits, or masks.

        Args:
            job: what to do; at most as many images as the engine takes at once.
            source: contiguous; prepared images of the engine's type, or pixels.

        Raises:
            CudaError: the device reports an error.
            EngineError: the engine does.
        """
        assert source.nbytes == self._up_bytes(job)
        self._reserve(job)
        _host(self._upward)[: source.nbytes] = source.reshape(-1).view(np.uint8)
        self._start(job)
        self._device.synchronize(self._stream)
        answer = self._answer(job)
        self._record_if_seen(job)
        return answer

    def time(self, source: ndarray, runs: int) -> list[float]:
        """Return the milliseconds that the network takes for prepared images that are on the device already.

        Args:
            source: as for ``run``; at most as many images as the engine takes at once.
            runs: how often, after ``UNTIMED`` that are not timed.

        Raises:
            CudaError, EngineError: as ``run`` does.
        """
        self.run(Job(images=len(source)), source)
        job, taken = Job(images=len(source), alone=True), list[float]()
        marks = [self._device.new_event(), self._device.new_event()]
        try:
            for _ in range(UNTIMED + runs):
                self._start(job, *marks)
                self._device.synchronize(self._stream)
                taken.append(self._device.elapsed_ms(*marks))
                self._record_if_seen(job)
        finally:
            for mark in marks:
                with suppress(CudaError):
                    self._device.free_event(mark)
        return taken[UNTIMED:]

    def watch(self, source: ndarray, runs: int) -> dict[str, list[float]]:
        """Return the milliseconds of every layer, by its name, in each of ``runs`` runs; see ``time``.

        It is done in a context of its own, since layers that are watched wait for one another.
        """
        self.run(Job(images=len(source)), source)
        job, context = Job(images=len(source), alone=True), self._engine.context(self._activations.address)
        taken = context.watch()
        self._prepare(job, context)
        for _ in range(UNTIMED + runs):
            self._put(job, context)
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

    def _start(self, job: Job, before: Any = None, after: Any = None) -> None:
        """Put a job into the stream, between two marks if there are any."""
        assert self._context is not None
        recorded = self._recorded.get(job)
        if recorded is None:
            self._prepare(job, self._context)
        if before is not None:
            self._device.record_event(before, self._stream)
        if recorded is None:
            self._put(job, self._context)
        else:
            self._recorded.move_to_end(job)
            self._device.launch_graph(recorded.graph, self._stream)
        if after is not None:
            self._device.record_event(after, self._stream)

    def _record_if_seen(self, job: Job) -> None:
        """Record a job that was done a second time."""
        if self._wants_graphs and job not in self._recorded:
            if job in self._seen:
                self._record(job)
            self._seen.add(job)

    def _up_bytes(self, job: Job) -> int:
        if job.to_tensor is None:
            return job.images * self._engine.input.nbytes
        return job.images * dict(job.to_tensor)["image_stride"]

    def _down(self, job: Job) -> tuple[tuple[int, ...], np.dtype[Any]]:
        if job.to_mask is None:
            return (job.images, *self._engine.output.shape), self._engine.output.dtype
        size = dict(job.to_mask)
        return (job.images, size["height"], size["width"]), np.dtype(np.uint8)

    def _down_bytes(self, job: Job) -> int:
        shape, dtype = self._down(job)
        return int(np.prod(shape)) * dtype.itemsize

    def _reserve(self, job: Job) -> None:
        up, down = self._up_bytes(job), self._down_bytes(job)
        needed = [(self._upward, up), (self._downward, down)]
        needed += [(self._pixels, up)] if job.to_tensor is not None else []
        needed += [(self._mask, down)] if job.to_mask is not None else []
        if any(nbytes > buffer.nbytes for buffer, nbytes in needed):
            self._forget_graphs()  # they hold the old addresses
            for buffer, nbytes in needed:
                buffer.reserve(nbytes)

    def _prepare(self, job: Job, context: Context) -> None:
        batch = max(job.images, self._engine.least)
        context.prepare(batch, self._tensor.address, self._logits.address)

    def _put(self, job: Job, context: Context) -> None:
        """Put a job into the stream: up, prepare, the network, label, down."""
        if job.alone:
            context.enqueue(self._stream)
            return
        target = self._tensor if job.to_tensor is None else self._pixels
        self._device.upload(target.address, self._upward.address, self._up_bytes(job), self._stream)
        if job.to_tensor is not None:
            self._launch("image_to_tensor", self._engine.input.dtype, job.to_tensor, self._pixels, self._tensor)
        context.enqueue(self._stream)
        if job.to_mask is not None:
            self._launch("logits_to_mask", self._engine.output.dtype, job.to_mask, self._logits, self._mask)
        source = self._logits if job.to_mask is None else self._mask
        self._device.download(self._downward.address, source.address, self._down_bytes(job), self._stream)

    def _launch(self, name: str, dtype: np.dtype[Any], scalars: Scalars, source: Buffer, target: Buffer) -> None:
        kernel = load(name)
        entry = kernel.entry(f"{name}_{dtype.name}")
        first, last = (each.name for each in entry.parameters if each.kind == "pointer")
        arrays = {first: source.address, last: target.address}
        self._launcher.launch(kernel, entry, arrays, dict(scalars), self._stream)

    def _answer(self, job: Job) -> ndarray:
        shape, dtype = self._down(job)
        return _host(self._downward)[: self._down_bytes(job)].view(dtype).reshape(shape).copy()

    def _record(self, job: Job) -> None:
        """Record a job whose answer has been read. Where that fails, every job is put into the stream anew."""
        try:
            self._keep(job, self._capture(job))
        except (CudaError, EngineError, DeviceError) as error:
            self._wants_graphs = False
            LOG.warning("CUDA graphs are not used, every call is made anew: %s", error)

    def _capture(self, job: Job) -> Recorded:
        context = self._engine.context(self._activations.address)
        self._prepare(job, context)
        self._put(job, context)  # TensorRT settles a new shape in its first run, which cannot be recorded
        self._device.synchronize(self._stream)
        if not context.is_capturable(self._stream):
            raise EngineError("TensorRT says that the engine cannot be recorded")
        self._device.begin_capture(self._stream)
        try:
            self._put(job, context)
        except BaseException:
            with suppress(CudaError):  # the stream has to leave the mode all the same
                self._device.free_graph(self._device.end_capture(self._stream))
            raise
        return Recorded(graph=self._device.end_capture(self._stream), context=context)

    def _keep(self, job: Job, recorded: Recorded) -> None:
        self._recorded[job] = recorded
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
