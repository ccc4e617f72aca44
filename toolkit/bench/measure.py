"""Time networks in interleaved rounds, so that drift of the machine affects all of them, and report percentiles.

The time of each row is divided into rounds; in a round every row runs for a fraction of its time. Several consecutive
runs instead of one: the row has the caches to itself, and its threads are asleep before the next row begins.
Sources: trtexec (200 ms of warm-up, 2.5 % of variation); optimum-benchmark (10 runs of warm-up); MLPerf Inference
(100 queries, 600 s, and the early-stopping estimate of a percentile).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np

from medseg_trt.bench.timing_schema import Latency, Tier
from medseg_trt.errors import MedsegError
from medseg_trt.metrics.intervals import coefficient_of_variation, median_of_rounds, tail_latency

TimedRuns = Callable[[float, int], list[float]]  # (seconds, least number of runs) -> milliseconds of every run

TIERS: Mapping[str, Tier] = {
    "quick": Tier(name="quick", warmup_ms=200.0, warmup_runs=10, duration_s=3.0, min_runs=10, starts=1),
    "report": Tier(name="report", warmup_ms=200.0, warmup_runs=10, duration_s=10.0, min_runs=100, starts=3),
    # 662 is the least number of runs from which a 99th percentile can be estimated with 99 % confidence.
    "certify": Tier(name="certify", warmup_ms=200.0, warmup_runs=10, duration_s=600.0, min_runs=662, starts=5),
}
TURN_S = 0.5
MIN_ROUNDS = 5  # fewer give no interval for a ratio
HOST_CLOCK = "host clock"
SETTLE_S = 0.02  # threads of most back-ends spin for some milliseconds before they sleep
ABSURD_FACTOR, ABSURD_MS = 1000.0, 1000.0  # a time above both, the first in medians, is a clock error
MAX_VARIATION: Mapping[str, float] = {
    # trtexec's limit, for clocks that can be locked.
    "CUDA": 0.025,
    # A CPU's clock is not locked and its caches are shared. A median of 100 runs, the least of a report, has a standard
    # error of 1.25 * variation / 10: 1.3 % at this limit, so that a slowdown of 3 % is still detected.
    "CPU": 0.10,
}


@dataclass(kw_only=True)
class RoundTimes:
    """The times of a row so far."""

    rounds_ms: list[list[float]] = field(default_factory=list[list[float]])
    warmup_runs: int = 0
    failure: str | None = None


def tier(name: str, *, warmup_ms: float | None = None, duration_s: float | None = None) -> Tier:
    """Return a tier of ``TIERS``; with another warm-up or duration it is called "custom"."""
    changes = {"warmup_ms": warmup_ms, "duration_s": duration_s}
    changes = {key: value for key, value in changes.items() if value is not None}
    chosen = replace(TIERS[name], **changes)
    if chosen == TIERS[name]:
        return chosen
    short = chosen.duration_s < TIERS["quick"].duration_s
    return replace(chosen, name="custom", min_runs=TIERS["quick"].min_runs if short else chosen.min_runs)


def interleaved_rounds(
    rows: Mapping[str, TimedRuns],
    tier: Tier,
    settle: Callable[[float], None] = time.sleep,
    times: dict[str, RoundTimes] | None = None,
    turn_warmup_s: Mapping[str, float] | None = None,
    after_turn: Callable[[str], None] = lambda _name: None,
) -> dict[str, RoundTimes]:
    """Warm up every row, then time all rows in every round.

    A row that fails keeps its times; the others continue.

    Args:
        rows: by name.
        tier: duration and number of runs.
        settle: sleeps for the given seconds.
        times: filled during the measurement, so that the caller has the times after an interrupt as well.
        turn_warmup_s: seconds of uncounted runs before each turn of a row, whose clock falls while others run; none: a
            single run, which refills the caches.
        after_turn: is called with the row's name when its turn of a round has ended.
    """
    times = {} if times is None else times
    times |= {name: RoundTimes() for name in rows}

    def timed_round(name: str, seconds: float, runs: int) -> list[float]:
        if times[name].failure is not None:
            return []
        try:
            return rows[name](seconds, runs)
        except MedsegError as error:
            times[name].failure = str(error)
            return []

    for name in rows:
        times[name].warmup_runs = len(timed_round(name, tier.warmup_ms / 1000, tier.warmup_runs))
    rounds = max(MIN_ROUNDS, ceil(tier.duration_s / TURN_S))
    for _ in range(rounds):
        for name in rows:
            settle(SETTLE_S)
            timed_round(name, (turn_warmup_s or {}).get(name, 0.0), 1)  # uncounted
            if samples := timed_round(name, tier.duration_s / rounds, ceil(tier.min_runs / rounds)):
                times[name].rounds_ms.append(samples)
                after_turn(name)
    return times


def latency(taken: RoundTimes, device: str, timer: str = HOST_CLOCK) -> Latency | None:
    """Summarise the times of a row; None if there are none.

    The median is ``median_of_rounds``. Percentiles are interpolated linearly between the sorted times. Negative times
    and times above a thousand medians are clock errors and are set aside.
    """
    median = float(np.median([step for steps in taken.rounds_ms for step in steps if step > 0] or [0.0]))
    longest = max(ABSURD_FACTOR * median, ABSURD_MS)
    rounds = [[step for step in steps if 0 < step <= longest] for steps in taken.rounds_ms]
    samples = [step for steps in rounds for step in steps]
    if not samples:
        return None
    p90, p95, p99 = np.percentile(samples, [90, 95, 99]).tolist()
    rounds = [steps for steps in rounds if steps]
    variation = coefficient_of_variation(samples)
    return Latency(
        rounds_ms=tuple(map(tuple, rounds)),
        runs=len(samples),
        mean_ms=float(np.mean(samples)),
        min_ms=min(samples),
        max_ms=max(samples),
        median_ms=median_of_rounds(rounds),
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        p90_estimate_ms=tail_latency(samples, 90),
        p99_estimate_ms=tail_latency(samples, 99),
        variation=variation,
        stable=variation <= max_variation(device),
        warmup_runs=taken.warmup_runs,
        timer=timer,
        set_aside_ms=tuple(step for steps in taken.rounds_ms for step in steps if not 0 < step <= longest),
    )


def max_variation(device: str) -> float:
    """Return the largest coefficient of variation of stable times on a device."""
    return MAX_VARIATION["CPU" if device.upper().startswith("CPU") else "CUDA"]


def timing_warnings(latency: Latency, device: str, scope: str) -> list[str]:
    """Return warnings about the quality of the times."""
    warnings: list[str] = []
    if not latency.stable:
        warnings.append(
            f"{scope}: unstable, times vary by {100 * latency.variation:.1f} %, "
            f"more than {100 * max_variation(device):g} %"
        )
    if latency.set_aside_ms:
        warnings.append(
            f"{scope}: the clock jumped {len(latency.set_aside_ms)} time(s), by {_listed(latency.set_aside_ms)} ms; "
            "these are excluded from all figures"
        )
    if latency.p90_estimate_ms is None:
        warnings.append(f"{scope}: {latency.runs} runs are too few to bound p90")
    return warnings


def _listed(steps: Sequence[float]) -> str:
    return ", ".join(f"{step:.3g}" for step in steps[:5]) + (", …" if len(steps) > 5 else "")
