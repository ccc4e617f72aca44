"""Time networks side by side: warmed up, in turn, so that a drifting machine hits all alike, as percentiles.

The time of each row is cut into rounds, and in a round every row has its turn of some runs. A whole turn instead of a
single run: a row's caches are its own while it is timed, and its threads have gone to sleep before the next one begins.
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

TimedRuns = Callable[[float, int], list[float]]  # for so many seconds, at least so many runs: the milliseconds of each

TIERS: Mapping[str, Tier] = {
    "quick": Tier(name="quick", warmup_ms=200.0, warmup_runs=10, duration_s=3.0, min_runs=10, starts=1),
    "report": Tier(name="report", warmup_ms=200.0, warmup_runs=10, duration_s=10.0, min_runs=100, starts=3),
    # 662 is the least number of runs from which a 99th percentile can be estimated with 99 % confidence.
    "certify": Tier(name="certify", warmup_ms=200.0, warmup_runs=10, duration_s=600.0, min_runs=662, starts=5),
}
TURN_S = 0.5
MIN_ROUNDS = 5  # fewer give no interval of a ratio
HOST_CLOCK = "host clock"
SETTLE_S = 0.02  # the threads of most back-ends wait in a loop for some milliseconds before they sleep
ABSURD_FACTOR, ABSURD_MS = 1000.0, 1000.0  # times the median, and no less than this: no tail is as long as that
MAX_VARIATION: Mapping[str, float] = {
    # trtexec's limit, for clocks that can be locked.
    "CUDA": 0.025,
    # Nobody locks a CPU's clock or keeps its caches from others. A median of 100 runs, the least of a report, has a
    # standard error of 1.25 * variation / 10: 1.3 % at this limit, so that 3 % slower can still be told.
    "CPU": 0.10,
}


@dataclass(kw_only=True)
class RoundTimes:
    """What was measured of a row so far."""

    rounds_ms: list[list[float]] = field(default_factory=list[list[float]])
    warmup_runs: int = 0
    failure: str | None = None


def tier(name: str, *, warmup_ms: float | None = None, duration_s: float | None = None) -> Tier:
    """Return a tier of ``TIERS``, changed where a figure is given; then it is no longer called so."""
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
    found: dict[str, RoundTimes] | None = None,
) -> dict[str, RoundTimes]:
    """Warm every row up, then let all of them have a turn, round by round.

    A row that fails keeps what it has; the others go on.

    Args:
        rows: by name.
        tier: how long.
        settle: waits for so many seconds.
        found: where the times are put as they come, so that the caller has them after an interrupt, too.
    """
    found = {} if found is None else found
    found |= {name: RoundTimes() for name in rows}

    def turn(name: str, seconds: float, runs: int) -> list[float]:
        if found[name].failure is not None:
            return []
        try:
            return rows[name](seconds, runs)
        except MedsegError as error:
            found[name].failure = str(error)
            return []

    for name in rows:
        found[name].warmup_runs = len(turn(name, tier.warmup_ms / 1000, tier.warmup_runs))
    rounds = max(MIN_ROUNDS, ceil(tier.duration_s / TURN_S))
    for _ in range(rounds):
        for name in rows:
            settle(SETTLE_S)
            turn(name, 0.0, 1)  # what the others have put out of the caches comes back uncounted
            if taken := turn(name, tier.duration_s / rounds, ceil(tier.min_runs / rounds)):
                found[name].rounds_ms.append(taken)
    return found


def latency(taken: RoundTimes, device: str, timer: str = HOST_CLOCK) -> Latency | None:
    """Sum up single times; None where there are none.

    The median is ``median_of_rounds``. Percentiles are interpolated linearly between the sorted times. Times that no
    run can take, negative ones and those a thousand times the median, are set aside: they are the clock's, not the
    network's.
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
    """Return the coefficient of variation up to which the times of a device are called stable."""
    return MAX_VARIATION["CPU" if device.upper().startswith("CPU") else "CUDA"]


def timing_warnings(found: Latency, device: str, scope: str) -> list[str]:
    """Return what a reader has to know before he believes the times."""
    said: list[str] = []
    if not found.stable:
        said.append(
            f"{scope}: unstable, times vary by {100 * found.variation:.1f} %, "
            f"more than {100 * max_variation(device):g} %"
        )
    if found.set_aside_ms:
        said.append(
            f"{scope}: the clock jumped {len(found.set_aside_ms)} time(s), by {_listed(found.set_aside_ms)} ms; "
            "these are in no figure"
        )
    if found.p90_estimate_ms is None:
        said.append(f"{scope}: {found.runs} runs are too few to be sure of p90")
    return said


def _listed(steps: Sequence[float]) -> str:
    return ", ".join(f"{step:.3g}" for step in steps[:5]) + (", …" if len(steps) > 5 else "")
