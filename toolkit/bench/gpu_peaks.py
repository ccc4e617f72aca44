"""Measure the peaks of a GPU with PyTorch: large matrix products in every number format, and a copy.

Events of the device enclose each launch, and launches are kept in flight, so that the time to enqueue them does not
count. As on a CPU, the peaks are achieved figures, not theoretical ones.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial

import torch

from medseg_trt.bench.profile_schema import Peak
from medseg_trt.sessions.device_times import time_in_flight
from medseg_trt.sessions.pytorch import TorchEvents
from medseg_trt.train.torch_device import device_name

FORMATS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}
SIDE = 4096  # rows and columns of the matrices: 69 billion multiply-accumulates a product
COPY_BYTES = 1 << 29  # larger than any cache
LAUNCHES = 70  # the best of them is the peak

Milliseconds = Callable[[Callable[[], object]], float]  # of one launch


def gpu_peaks(
    device: torch.device, milliseconds: Milliseconds | None = None, side: int = SIDE, copy_bytes: int = COPY_BYTES
) -> tuple[Peak, ...]:
    """Measure the peak of every number format in which PyTorch multiplies on a device; TF32 is off.

    Args:
        device: a GPU.
        milliseconds: times one launch; None: by events of the device.
        side: rows and columns of the matrices.
        copy_bytes: size of the copied array.

    Raises:
        RuntimeError: the device lacks free memory, or reports an error.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # events are recorded in its stream
        return tuple(_peaks(device, milliseconds or _by_events, side, copy_bytes))


def _peaks(device: torch.device, measure: Milliseconds, side: int, copy_bytes: int) -> Iterator[Peak]:
    copied = 2 * copy_bytes / measure(_copy(copy_bytes, device)) / 1e6
    torch.backends.cuda.matmul.allow_tf32 = False
    for arithmetic, dtype in FORMATS.items():
        multiply = _product(side, dtype, device)
        try:
            multiply()
        except RuntimeError:  # this device does not multiply in this format
            continue
        rate = side**3 / measure(multiply) / 1e6
        yield Peak(
            arithmetic=arithmetic,
            gmacs_per_s=rate,
            gemm=f"{side} x {side} by {side} x {side}, PyTorch {torch.__version__}",
            gbytes_per_s=copied,
            copy=f"{copy_bytes >> 20} MiB on the device, bytes read and written",
            device=device_name(device),
        )


def _copy(num_bytes: int, device: torch.device) -> Callable[[], object]:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return partial(torch.empty_like(source).copy_, source)


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    multiply: Callable[..., object] = getattr(torch, "_int_mm" if dtype == torch.int8 else "mm")
    return partial(multiply, left, right)


def _by_events(launch: Callable[[], object]) -> float:
    def discarding() -> None:
        launch()

    return min(time_in_flight(discarding, TorchEvents(), 0.0, LAUNCHES).compute_ms)
