"""Run a checkpoint with PyTorch: eagerly in float32 it is the reference for every other session.

On a GPU the reference multiplies in float32 proper: PyTorch's own default takes TF32, with 10 bits of fraction, in
convolutions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from numpy import ndarray
from torch import Tensor

from medseg_trt.devices import CPU, ComputeDevice
from medseg_trt.errors import DeviceError
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.device_times import (
    UNTIMED,
    DeviceTimes,
    EventClock,
    OverlappedStream,
    time_copies,
    time_in_flight,
    time_overlapped,
)
from medseg_trt.sessions.pytorch_forms import EAGER, FORMATS, FORMS
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.torch_device import device_name, memory_errors, torch_device

AUTOCASTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
COPIES = 20  # timed per turn
STREAMS = 2  # of the throughput: one computes while the other copies
GRAPH_WARM_UPS = 3  # runs in another stream before a capture, as PyTorch's documentation asks for

Forward = Callable[[Tensor], Tensor]


class PyTorchSession(Session):
    """A PyTorch network in evaluation mode."""

    backend = "pytorch"

    def __init__(
        self, model: SegmentationModel, device: torch.device | None = None, arithmetic: str = "fp32", form: str = EAGER
    ) -> None:
        """Take a network.

        Args:
            model: in evaluation mode.
            device: that it is moved to; None: the CPU.
            arithmetic: a key of ``FORMATS``. ``fp32`` and ``tf32`` set PyTorch's switches for this process.
            form: a key of ``FORMS``.

        Raises:
            DeviceError: a CUDA graph on a CPU.
        """
        chosen = FORMS[form]
        self._device = device or torch.device("cpu")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # events and captures are made in the current one
        if chosen.cuda_graph and self._device.type != "cuda":
            raise DeviceError("a CUDA graph needs an NVIDIA GPU; choose --device cuda")
        layout = torch.channels_last if chosen.channels_last else torch.contiguous_format
        with memory_errors(f"PyTorch {torch.__version__}"):
            model = model.to(self._device)
        network: SegmentationModel = model.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        forward: Any = network
        if chosen.compile_mode is not None:
            forward = torch.compile(network, mode=chosen.compile_mode)
        self._layout, self._autocast, self._overlaps = layout, AUTOCASTS.get(arithmetic), chosen.overlaps
        self._forward: Forward = _Graphs(forward, self._computing) if chosen.cuda_graph else forward
        # Of the throughput. They are kept, since PyTorch keeps memory for every stream that it has seen.
        self._streams: list[Any] = []
        _allow_tf32(arithmetic == "tf32")
        self.device = device_name(self._device)
        how = FORMATS[arithmetic] if self._device.type == "cuda" else arithmetic
        self.description = f"PyTorch {torch.__version__} {how}" + (f", {chosen.words}" if form != EAGER else "")

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images; copies to a GPU and back pass pinned memory."""
        with memory_errors(self.description), torch.inference_mode():
            return self._downloaded(self._logits(self._uploaded(batch)))

    def time_on_device(
        self, batch: Float32[ndarray, "batch 3 height width"], duration_s: float, min_runs: int
    ) -> DeviceTimes | None:
        """Time the network alone on a GPU, and its throughput in two streams; see ``Session``."""
        if self._device.type != "cuda":
            return None
        clock = TorchEvents()
        with memory_errors(self.description), torch.inference_mode():
            images = self._uploaded(batch)
            for _ in range(UNTIMED):
                logits = self._logits(images)
            logits = logits.clone()  # a graph of torch.compile refuses the output of a run once the next one began
            torch.cuda.synchronize(self._device)
            times = time_in_flight(lambda: _discard(self._logits(images)), clock, duration_s, min_runs)
            host, target = torch.from_numpy(batch).pin_memory(), torch.empty_like(logits, device="cpu").pin_memory()
            while self._overlaps and len(self._streams) < STREAMS:
                self._streams.append(torch.cuda.Stream())
            overlapped = [self._overlapped(batch, stream) for stream in self._streams]
            return DeviceTimes(
                compute_ms=times.compute_ms,
                enqueue_ms=times.enqueue_ms,
                upload_ms=time_copies(lambda: _discard(images.copy_(host, non_blocking=True)), clock, COPIES),
                download_ms=time_copies(lambda: _discard(target.copy_(logits, non_blocking=True)), clock, COPIES),
                images_per_s=time_overlapped(overlapped, len(batch), duration_s, min_runs),
            )

    def close(self) -> None:
        """Free the network."""
        del self._forward

    def _computing(self) -> AbstractContextManager[object]:
        """Return a context that computes in the number format; weights are cast anew, as a capture demands."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast, cache_enabled=False)

    def _logits(self, images: Tensor) -> Tensor:
        with self._computing():
            return self._forward(images)

    def _overlapped(self, batch: ndarray, stream: Any) -> OverlappedStream:
        """Return what runs a batch in a stream of its own; the logits stay in pinned memory."""
        host = torch.from_numpy(batch).pin_memory()
        with torch.cuda.stream(stream):
            images = self._uploaded(batch)
            for _ in range(UNTIMED):
                target = torch.empty_like(self._logits(images), device="cpu").pin_memory()
        stream.synchronize()

        def enqueue() -> None:
            with torch.cuda.stream(stream):
                images.copy_(host, non_blocking=True)
                target.copy_(self._logits(images), non_blocking=True)

        return OverlappedStream(enqueue=enqueue, wait=stream.synchronize)

    def _uploaded(self, batch: ndarray) -> Tensor:
        images = torch.from_numpy(batch)
        if self._device.type == "cuda":
            images = images.pin_memory()
        return images.to(self._device, non_blocking=True, memory_format=self._layout)

    def _downloaded(self, logits: Tensor) -> ndarray:
        logits = logits.float().contiguous()
        if self._device.type != "cuda":
            return logits.numpy()
        target = torch.empty_like(logits, device="cpu", pin_memory=True)
        target.copy_(logits, non_blocking=True)
        torch.cuda.synchronize(self._device)
        return target.numpy()


class _Graphs:
    """A network that is captured once per shape of its input, and then replayed."""

    def __init__(self, forward: Forward, computing: Callable[[], AbstractContextManager[object]]) -> None:
        self._forward, self._computing = forward, computing
        self._captured: dict[tuple[int, ...], tuple[Any, Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        shape = tuple(images.shape)
        if shape not in self._captured:
            self._captured[shape] = self._capture(images)
        graph, source, logits = self._captured[shape]
        source.copy_(images, non_blocking=True)
        graph.replay()
        return logits

    def _capture(self, images: Tensor) -> tuple[Any, Tensor, Tensor]:
        source, stream = images.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self._computing():
            for _ in range(GRAPH_WARM_UPS):
                self._forward(source)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), self._computing():
            logits = self._forward(source)
        return graph, source, logits


class TorchEvents(EventClock):
    """PyTorch's events in its current stream."""

    def new_event(self) -> Any:
        """Return a new event."""
        return torch.cuda.Event(enable_timing=True)

    def record(self, event: Any) -> None:
        """Enqueue an event."""
        event.record()

    def wait(self, event: Any) -> None:
        """Wait until the device has reached an event."""
        event.synchronize()

    def elapsed_ms(self, start: Any, stop: Any) -> float:
        """Return the milliseconds between two events that the device has reached."""
        return float(start.elapsed_time(stop))


def _discard(_: Tensor) -> None:
    """Drop what a launch returns."""


def _allow_tf32(allowed: bool) -> None:
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def open_graph(
    path: Path,
    precision: str,
    threads: int | None,
    compute_dtype: str,
    device: ComputeDevice = CPU,
    form: str = EAGER,
) -> PyTorchSession:
    """Open a checkpoint as the other modules open a graph, so that a child process can hold it, too.

    Args:
        path: the checkpoint.
        precision: of the weights: fp32, there is no other.
        threads: CPU threads; None leaves it to PyTorch.
        compute_dtype: a key of ``FORMATS``.
        device: where it runs.
        form: a key of ``FORMS``.

    Raises:
        ArtefactError: the checkpoint cannot be used.
        DeviceError: PyTorch has no such device.
    """
    assert precision == "fp32"
    if threads is not None:
        torch.set_num_threads(threads)
    return PyTorchSession(load_checkpoint(path).model(), torch_device(device), compute_dtype, form)


def open_reference(checkpoint: Checkpoint, device: ComputeDevice = CPU) -> Session:
    """Open the checkpoint's own PyTorch network, eagerly in float32: what everything else is compared with.

    Raises:
        DeviceError: PyTorch has no such device.
    """
    return PyTorchSession(checkpoint.model(), torch_device(device))
