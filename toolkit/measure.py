"""Time networks side by side: warmed up, interleaved so that a drifting machine hits all alike, as percentiles."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from medseg_trt.segment import Run

MIN_WARMUP_RUNS = 3
MIN_RUNS = 10  # fewer give no 90th percentile worth the name


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How long one network took for one batch, the network alone: no decoding, no resizing."""

    median_ms: float
    p90_ms: float
    min_ms: float
    max_ms: float
    runs: int


def time_interleaved(
    runs: Mapping[str, Run], batch: np.ndarray, *, warmup_ms: float = 200.0, duration_s: float = 10.0
) -> dict[str, Timing]:
    """Time every network on the same batch, one call of each in turn.

    Args:
        runs: the networks by name.
        batch: (batch, 3, H, W) float32.
        warmup_ms: how long each one runs uncounted, and at least three times.
        duration_s: how long all of them together are timed; each runs at least ten times.
    """
    for run in runs.values():
        _repeat(run, batch, warmup_ms)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + duration_s
    while time.perf_counter() < end or any(len(taken) < MIN_RUNS for taken in samples.values()):
        for name, run in runs.items():
            began = time.perf_counter()
            run(batch)
            samples[name].append(1000 * (time.perf_counter() - began))
    return {name: timing(taken) for name, taken in samples.items()}


def timing(samples_ms: list[float]) -> Timing:
    """Sum up single times; percentiles are interpolated linearly between the sorted samples."""
    return Timing(
        median_ms=float(np.percentile(samples_ms, 50)),
        p90_ms=float(np.percentile(samples_ms, 90)),
        min_ms=min(samples_ms),
        max_ms=max(samples_ms),
        runs=len(samples_ms),
    )


def _repeat(run: Run, batch: np.ndarray, warmup_ms: float) -> None:
    end, count = time.perf_counter() + warmup_ms / 1000, 0
    while time.perf_counter() < end or count < MIN_WARMUP_RUNS:
        run(batch)
        count += 1
