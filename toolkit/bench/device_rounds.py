"""Collect what the rounds on a GPU consist of, and say what binds a row: the host, the copies or the clocks.

Source of the warnings: NVIDIA's trtexec, which prints the same for its measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from medseg_trt.bench.gpu_clocks import GpuClock
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timing_schema import NO_OVERLAP, Latency, OnGpu
from medseg_trt.sessions.device_times import DeviceTimes

NO_COPIES = Missing(reason="this back-end does not report the time of copies")
# trtexec warns where enqueueing takes 80 % of the network's time: the GPU then begins to wait for the host.
ENQUEUE_SHARE = 0.8
CLOCK_SPREAD = 0.05  # of the highest clock; more, and rounds are not of one machine


@dataclass(kw_only=True)
class DeviceRounds:
    """The rounds of one row on a GPU so far."""

    enqueue_ms: list[float] = field(default_factory=list[float])
    upload_ms: list[float] = field(default_factory=list[float])
    download_ms: list[float] = field(default_factory=list[float])
    images_per_s: list[float] = field(default_factory=list[float])
    clocks: list[GpuClock] = field(default_factory=list[GpuClock])

    def add(self, times: DeviceTimes) -> None:
        """Add a round."""
        self.enqueue_ms += times.enqueue_ms
        self.upload_ms += times.upload_ms
        self.download_ms += times.download_ms
        self.images_per_s += times.images_per_s

    def look(self, clock: GpuClock | None) -> None:
        """Add the GPU's clock in a round; None: it is not known."""
        if clock is not None:
            self.clocks.append(clock)

    def summary(self) -> OnGpu | Missing:
        """Return the medians, or the reason why there are none."""
        if not self.enqueue_ms:
            return Missing(reason="no round on the GPU was timed")
        return OnGpu(
            enqueue_ms=median(self.enqueue_ms),
            upload_ms=_median(self.upload_ms, NO_COPIES),
            download_ms=_median(self.download_ms, NO_COPIES),
            images_per_s=_median(self.images_per_s, NO_OVERLAP),
            sm_mhz=tuple(clock.sm_mhz for clock in self.clocks),
            held_back_by=tuple(dict.fromkeys(reason for clock in self.clocks for reason in clock.held_back_by)),
        )


def binding_warnings(latency: Latency, on_gpu: OnGpu) -> list[str]:
    """Return what holds a row back besides the network itself."""
    warnings: list[str] = []
    alone_ms = latency.median_ms
    if on_gpu.enqueue_ms > ENQUEUE_SHARE * alone_ms:
        warnings.append(
            f"model: bound by the host, which takes {on_gpu.enqueue_ms:.3f} ms to enqueue {alone_ms:.3f} ms of work; "
            "a CUDA graph takes less"
        )
    for name, copy_ms in (("upload", on_gpu.upload_ms), ("download", on_gpu.download_ms)):
        if isinstance(copy_ms, float) and copy_ms > alone_ms:
            warnings.append(f"model+transfers: bound by the {name}, which takes {copy_ms:.3f} ms")
    if on_gpu.held_back_by:
        warnings.append(f"model: the GPU's clock was held back by {', '.join(on_gpu.held_back_by)}")
    if on_gpu.sm_mhz and min(on_gpu.sm_mhz) < (1 - CLOCK_SPREAD) * max(on_gpu.sm_mhz):
        warnings.append(
            f"model: the GPU's clock varied from {min(on_gpu.sm_mhz)} to {max(on_gpu.sm_mhz)} MHz; lock it: "
            "nvidia-smi --lock-gpu-clocks"
        )
    return warnings


def _median(samples: Sequence[float], otherwise: Missing) -> float | Missing:
    return median(samples) if samples else otherwise
