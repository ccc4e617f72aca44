"""A clock that only the timed networks move stands in for the machine."""

import statistics
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from medseg_trt import measure
from medseg_trt.measure import MIN_RUNS, MIN_WARMUP_RUNS, time_interleaved, timing

TICK_S = 2**-10  # a power of two, so that the clock never rounds
BATCH = np.zeros((1, 3, 16, 16), np.float32)


class Machine:
    """Networks that take as long as they are told, and a log of who ran when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1024.0
        self.log: list[str] = []
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def network(self, name: str, ticks: float, cold_ticks: float = 0, cold_runs: int = 0):
        """Return a network that takes ``ticks``, but ``cold_ticks`` the first times."""

        def run(batch: np.ndarray) -> np.ndarray:
            assert batch is BATCH
            self.now_s += TICK_S * (cold_ticks if self.log.count(name) < cold_runs else ticks)
            self.log.append(name)
            return batch

        return run


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def warm_up_and_timed(log, found) -> tuple[list[str], list[str]]:
    timed = sum(each.runs for each in found.values())
    return log[:-timed], log[-timed:]


def test_networks_run_in_turn_after_each_has_warmed_up(machine):
    runs = {name: machine.network(name, ticks) for name, ticks in (("a", 2), ("b", 3), ("c", 5))}
    found = time_interleaved(runs, BATCH, warmup_ms=0.0, duration_s=0.5)
    warm_up, timed = warm_up_and_timed(machine.log, found)
    assert warm_up == [name for name in "abc" for _ in range(MIN_WARMUP_RUNS)]
    assert timed == ["a", "b", "c"] * found["a"].runs
    assert [found[name].median_ms for name in "abc"] == [1000 * ticks * TICK_S for ticks in (2, 3, 5)]


def test_a_drifting_machine_hits_all_alike(machine):
    def slower_every_time(batch: np.ndarray) -> np.ndarray:
        machine.log.append("")
        machine.now_s += TICK_S * (10 + len(machine.log) * 2**-10)
        return batch

    found = time_interleaved(dict.fromkeys("ab", slower_every_time), BATCH, warmup_ms=0.0, duration_s=60.0)
    assert found["a"].runs > 1000
    # One step of the drift apart; one network after the other, they would lie more than a thousand steps apart.
    assert found["b"].median_ms - found["a"].median_ms == pytest.approx(1000 * TICK_S * 2**-10)


def test_warm_up_lasts_as_long_as_asked_and_is_not_counted(machine):
    runs = {"cold": machine.network("cold", 2, cold_ticks=512, cold_runs=4), "even": machine.network("even", 1)}
    found = time_interleaved(runs, BATCH, warmup_ms=2000.0, duration_s=0.25)
    warm_up, timed = warm_up_and_timed(machine.log, found)
    assert warm_up == ["cold"] * 4 + ["even"] * 2048
    assert len(timed) > 2 * MIN_RUNS
    assert (found["cold"].max_ms, found["even"].max_ms) == (2000 * TICK_S, 1000 * TICK_S)


def test_without_warm_up_a_cold_run_would_show(machine):
    run = machine.network("cold", 2, cold_ticks=512, cold_runs=MIN_WARMUP_RUNS + 1)
    found = time_interleaved({"cold": run}, BATCH, warmup_ms=0.0, duration_s=0.25)
    assert found["cold"].max_ms == 512_000 * TICK_S


def test_a_slow_network_still_runs_the_least_number_of_times(machine):
    runs = {"slow": machine.network("slow", 60 * 1024), "fast": machine.network("fast", 1)}
    found = time_interleaved(runs, BATCH, warmup_ms=0.0, duration_s=0.1)
    assert {name: each.runs for name, each in found.items()} == {"slow": MIN_RUNS, "fast": MIN_RUNS}
    assert machine.log.count("slow") == MIN_WARMUP_RUNS + MIN_RUNS


def test_timing_lasts_as_long_as_asked(machine):
    found = time_interleaved({"only": machine.network("only", 4)}, BATCH, warmup_ms=0.0, duration_s=2.0)
    assert found["only"].runs == 2 * 1024 / 4


@pytest.mark.parametrize("count", [2, 10, 11, 100])
def test_percentiles_are_those_of_the_standard_library(count):
    samples_ms = list(np.random.default_rng(count).lognormal(1, 0.5, count))
    deciles = statistics.quantiles(samples_ms, n=10, method="inclusive")
    found = timing(samples_ms)
    assert found.median_ms == pytest.approx(statistics.median(samples_ms), rel=1e-12)  # float64, a few roundings
    assert found.p90_ms == pytest.approx(deciles[8], rel=1e-12)
    assert (found.min_ms, found.max_ms, found.runs) == (min(samples_ms), max(samples_ms), count)
    ordered = [found.min_ms, found.median_ms, found.p90_ms, found.max_ms]
    assert all(lower < upper for lower, upper in pairwise(ordered))


def test_milliseconds_are_milliseconds():
    import time

    def nap(batch: np.ndarray) -> np.ndarray:
        time.sleep(0.004)
        return batch

    found = time_interleaved({"nap": nap}, BATCH, warmup_ms=0.0, duration_s=0.0)
    assert 4 <= found["nap"].min_ms < 40  # sleep never ends early; a busy machine may oversleep, but not all ten times
