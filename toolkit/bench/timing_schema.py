"""Dataclasses of ``report.json`` for speed, memory and energy. Times are milliseconds, sizes 10^6 bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medseg_trt.bench.missing import Missing

Scope = Literal["model", "model+transfers", "end-to-end"]
SCOPES: Mapping[Scope, str] = {
    "model": "the network alone, with its input prepared in memory; no decoding, no resizing",
    "model+transfers": "the network, with transfers of the input to the device and of the logits back",
    "end-to-end": "from the image file to the mask file on the disk: read, prepare, run, restore the size, write",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """Duration and number of runs of a measurement."""

    name: str  # quick, report, certify, or "custom" where an option changed it
    warmup_ms: float  # of every row and scope, uncounted
    warmup_runs: int  # at least so many
    duration_s: float  # of every row and scope
    min_runs: int  # at least so many
    starts: int  # of every row, each in a process of its own

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of one row for one batch in one scope, after the warm-up."""

    rounds_ms: tuple[tuple[float, ...], ...]  # every single time; every row runs in each round
    runs: int
    mean_ms: float
    min_ms: float
    max_ms: float
    median_ms: float  # geometric mean of the rounds' medians: the ratio of two of them is their ``Speedup``
    p90_ms: float  # percentiles of all times, interpolated linearly between the sorted ones
    p95_ms: float
    p99_ms: float
    p90_estimate_ms: float | None  # MLPerf's early-stopping estimate at 99 % confidence; None: too few runs
    p99_estimate_ms: float | None
    variation: float  # coefficient of variation: standard deviation by mean
    stable: bool  # whether the variation is low enough for this kind of device
    warmup_runs: int
    timer: str  # the host's clock, or CUDA events
    set_aside_ms: tuple[float, ...] = ()  # clock errors; excluded from all other figures

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def samples_ms(self) -> list[float]:
        """All times, one after the other."""
        return [sample for samples in self.rounds_ms for sample in samples]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """The speed of a row relative to the reference in one scope: the ratio of the two ``median_ms``."""

    ratio: float
    low: float  # the interval
    high: float
    confidence: float  # of the interval, 0 … 1
    rounds: int

    __pydantic_config__ = {"extra": "forbid"}


NO_OVERLAP = Missing(reason="not measured: the network runs in one stream")


@dataclass(frozen=True, kw_only=True, slots=True)
class OnGpu:
    """What a row's time on a GPU consists of besides the network: medians of all rounds, times in milliseconds."""

    enqueue_ms: float  # that the host takes to enqueue the network, by its own clock
    upload_ms: float | Missing  # of the input
    download_ms: float | Missing  # of the logits
    sm_mhz: tuple[int, ...]  # clock at the end of each round; empty where nvidia-smi does not say
    held_back_by: tuple[str, ...]  # what lowered the clock in at least one round
    images_per_s: float | Missing = NO_OVERLAP  # in two streams: the copies of one overlap the network in the other

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Times from the start of a process to its first output, the best of several processes."""

    starts: int
    import_ms: float  # from the start of the process until the back-end's package is imported
    load_ms: float  # read the weights, optimise, compile
    first_ms: float  # the first inference after it
    to_first_mask_ms: float  # the sum of these times
    file_cache: str  # whether the files were read from the disk

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """Images per second with one or several concurrent callers."""

    batch: int  # images at once
    streams: int  # concurrent callers
    threads: int | None  # of each caller; None: the back-end's default
    images_per_s: float
    images: int
    seconds: float

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory of a row's process, on the host and on the device."""

    loaded_mb: float  # resident after loading
    peak_mb: float  # highest resident memory until all latencies were measured
    anonymous_mb: float  # resident memory without mapped files, after the latencies
    device_mb: float | Missing

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Energy per image, including everything else that the meter covers."""

    joules_per_image: float
    watts: float  # mean
    meter: str  # RAPL, NVML or tegrastats, and what it covers

    __pydantic_config__ = {"extra": "forbid"}
