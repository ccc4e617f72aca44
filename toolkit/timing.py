"""Time repeated calls with a clock that may stop or jump."""

import time
from collections.abc import Callable

from medseg_trt.errors import DeviceError

Clock = Callable[[], float]  # seconds
MAX_STANDING = 1000  # consecutive runs that took no time: then the clock has stopped


def timed_runs(
    call: Callable[[], object], duration_s: float, min_runs: int, clock: Clock = time.perf_counter
) -> list[float]:
    """Repeat a call for ``duration_s`` and at least ``min_runs`` times; return the milliseconds of each run.

    A clock that is set back gives a negative time here; ``bench.measure.latency`` sets it aside.

    Raises:
        DeviceError: the clock stands still.
    """
    samples_ms: list[float] = []
    spent_ms, standing = 0.0, 0
    while len(samples_ms) < min_runs or spent_ms < 1000 * duration_s:
        began = clock()
        call()
        samples_ms.append(1000 * (clock() - began))
        spent_ms += max(samples_ms[-1], 0.0)
        standing = standing + 1 if samples_ms[-1] == 0 else 0
        if standing > MAX_STANDING:
            raise DeviceError("the clock stands still, so nothing can be timed; look at the machine's clock source")
    return samples_ms
