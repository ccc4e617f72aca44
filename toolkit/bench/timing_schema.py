"""What ``report.json`` holds of speed, memory and energy. Times are milliseconds, sizes 10^6 bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medseg_trt.bench.missing import Missing

Scope = Literal["model", "model+transfers", "end-to-end"]
SCOPES: Mapping[Scope, str] = {
    "model": "the network alone, its input prepared and in place; no decoding, no resizing",
    "model+transfers": "the network, and the way of the input to the device and of the answer back",
    "end-to-end": "from the image file to the mask file on the disk: read, prepare, run, bring back to size, write",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """How long is measured."""

    name: str  # quick, report, certify, or "custom" where an option changed it
    warmup_ms: float  # of every row and scope, uncounted
    warmup_runs: int  # at least so many
    duration_s: float  # of every row and scope
    min_runs: int  # at least so many
    starts: int  # of every row, each in a process of its own

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """How long one row took for one batch in one scope, after its warm-up."""

    rounds_ms: tuple[tuple[float, ...], ...]  # every single time; in each round every row has its turn
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
    timer: str  # what measured: the host's clock, or CUDA events
    set_aside_ms: tuple[float, ...] = ()  # steps of the clock that no run can take; reported, in no other figure

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def samples_ms(self) -> list[float]:
        """All times, one after the other."""
        return [sample for taken in self.rounds_ms for sample in taken]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """How many times as fast as the reference a row is in one scope: the ratio of the two ``median_ms``."""

    ratio: float
    low: float  # the interval
    high: float
    confidence: float  # of the interval, 0 … 1
    rounds: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How long it takes until there is a first answer, the best of several processes of their own."""

    starts: int
    import_ms: float  # from the start of the process until the back-end's package is there
    load_ms: float  # read the weights, optimise, compile
    first_ms: float  # the first inference after it
    to_first_mask_ms: float  # all of it, from the start of the process
    file_cache: str  # whether the files had to come from the disk

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """How many images a second go through, as fast as they can be handed over."""

    batch: int  # images at once
    streams: int  # callers at the same time
    threads: int | None  # of each; None: the back-end's own choice
    images_per_s: float
    images: int
    seconds: float

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What a row's own process takes, of the host and of the device."""

    loaded_mb: float  # resident after loading
    peak_mb: float  # resident at its highest until all latencies were measured
    anonymous_mb: float  # of the last, what is not a mapped file
    device_mb: float | Missing

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """What one image takes, everything else on the meter included."""

    joules_per_image: float
    watts: float  # mean
    meter: str  # RAPL, NVML or tegrastats, and what it covers

    __pydantic_config__ = {"extra": "forbid"}
