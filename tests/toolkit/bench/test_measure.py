"""A clock that only the timed networks move stands in for the machine."""

import statistics
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest

from medseg_trt.bench import measure
from medseg_trt.bench.measure import (
    MIN_ROUNDS,
    SETTLE_S,
    TIERS,
    TURN_S,
    RoundTimes,
    interleaved_rounds,
    max_variation,
    tier,
    timing_warnings,
)
from medseg_trt.bench.timing_schema import Tier
from medseg_trt.errors import ArtefactError, DeviceError
from medseg_trt.metrics.intervals import speed_interval
from medseg_trt.timing import MAX_STANDING, timed_runs

TICK_S = 2**-10  # a power of two, so that the clock never rounds
SHORT = Tier(name="short", warmup_ms=0.0, warmup_runs=3, duration_s=0.5, min_runs=10, starts=1)


def latency(taken: RoundTimes, device: str) -> Any:
    """Sum up times of which there are some."""
    return measure.latency(taken, device)


def skip(_seconds: float) -> None:
    """Let no threads settle: there are none."""


class Machine:
    """Networks that take as long as they are told, and a log of who ran when."""

    def __init__(self) -> None:
        self.now_s = 1024.0
        self.log: list[str] = []
        self.settled: list[float] = []

    def network(self, name: str, ticks: float, drift: float = 0.0):
        """Return a network that takes ``ticks``, and of the machine's drift a share of a tick more in each run."""

        def turn(seconds: float, runs: int) -> list[float]:
            def call() -> None:
                self.log.append(name)
                self.now_s += TICK_S * (ticks + drift * len(self.log))

            return timed_runs(call, seconds, runs, clock=lambda: self.now_s)

        return turn


@pytest.fixture
def machine():
    return Machine()


def test_networks_have_their_turns_after_each_has_warmed_up(machine):
    rows = {name: machine.network(name, ticks) for name, ticks in (("a", 2), ("b", 3), ("c", 5))}
    measured = interleaved_rounds(rows, SHORT, settle=machine.settled.append)
    assert machine.log[:9] == [*"aaabbbccc"]
    turns = ["".join(part) for part in _runs_of_one(machine.log[9:])]
    assert [turn[0] for turn in turns] == [*"abc"] * MIN_ROUNDS
    assert {name: [len(taken) for taken in row_times.rounds_ms] for name, row_times in measured.items()} == {
        name: [len(turn) - 1 for turn in turns if turn[0] == name]
        for name in "abc"  # the first of a turn is uncounted
    }
    medians = [latency(measured[name], "CPU").median_ms for name in "abc"]
    assert medians == pytest.approx([1000 * ticks * TICK_S for ticks in (2, 3, 5)], rel=1e-12)  # a mean of logarithms
    assert machine.settled == [SETTLE_S] * (3 * MIN_ROUNDS)


def test_a_drifting_machine_hits_all_alike(machine):
    alike = {name: machine.network(name, 10, drift=2**-9) for name in "ab"}
    measured = interleaved_rounds(
        alike, Tier(name="long", warmup_ms=0.0, warmup_runs=3, duration_s=20.0, min_runs=100, starts=1), skip
    )
    first, last = measured["a"].rounds_ms[0][0], measured["a"].rounds_ms[-1][-1]
    assert last > 1.5 * first
    interval = speed_interval(measured["b"].rounds_ms, measured["a"].rounds_ms, interleaved=True)
    assert interval.estimate == pytest.approx(1, abs=0.03)  # one turn of the drift is 2 %: 25 runs of a 5000th each
    one_after_the_other = speed_interval(measured["b"].rounds_ms[-5:], measured["a"].rounds_ms[:5], interleaved=False)
    assert one_after_the_other.estimate > 1.3


def test_turns_are_as_long_and_as_many_as_the_tier_says(machine):
    long = Tier(name="long", warmup_ms=0.0, warmup_runs=3, duration_s=8.0, min_runs=10, starts=1)
    measured = interleaved_rounds({"a": machine.network("a", 4)}, long, skip)["a"]
    assert len(measured.rounds_ms) == 8 / TURN_S
    assert sum(map(len, measured.rounds_ms)) == 8 * 1024 / 4


def test_warm_up_lasts_as_long_as_asked_and_is_not_counted(machine):
    warm = Tier(name="warm", warmup_ms=2000.0, warmup_runs=3, duration_s=0.25, min_runs=10, starts=1)
    measured = interleaved_rounds({"a": machine.network("a", 1)}, warm, skip)["a"]
    assert measured.warmup_runs == 2048
    assert latency(measured, "CPU").warmup_runs == 2048
    assert sum(map(len, measured.rounds_ms)) == len(machine.log) - 2048 - MIN_ROUNDS


def test_a_slow_network_still_runs_the_least_number_of_times(machine):
    measured = interleaved_rounds({"slow": machine.network("slow", 60 * 1024)}, SHORT, skip)["slow"]
    assert [len(taken) for taken in measured.rounds_ms] == [2] * MIN_ROUNDS


def test_a_network_that_dies_in_the_middle_keeps_what_it_had_and_the_others_go_on(machine):
    steady, turns = machine.network("steady", 2), count()

    def dies(seconds: float, runs: int) -> list[float]:
        if next(turns) == 6:  # the warm-up is 0, then two of each round
            raise ArtefactError("openvino was killed by signal 11; it is not used")
        return steady(seconds, runs)

    measured = interleaved_rounds({"dies": dies, "steady": steady}, SHORT, skip)
    assert measured["dies"].failure == "openvino was killed by signal 11; it is not used"
    assert len(measured["dies"].rounds_ms) == 2
    assert next(turns) == 7  # nobody asked it again
    assert measured["steady"].failure is None
    assert len(measured["steady"].rounds_ms) == MIN_ROUNDS


@pytest.mark.parametrize("runs", [2, 10, 11, 100])
def test_percentiles_are_those_of_the_standard_library(runs):
    samples_ms = list(np.random.default_rng(runs).lognormal(1, 0.5, runs))
    measured = latency(RoundTimes(rounds_ms=[samples_ms[:1], samples_ms[1:]]), "CPU")
    hundredths = statistics.quantiles(samples_ms, n=100, method="inclusive")
    for value, percent in ((measured.p90_ms, 90), (measured.p95_ms, 95), (measured.p99_ms, 99)):
        assert value == pytest.approx(hundredths[percent - 1], rel=1e-12)  # float64, a few roundings
    assert measured.mean_ms == pytest.approx(statistics.fmean(samples_ms), rel=1e-12)
    assert measured.variation == pytest.approx(statistics.stdev(samples_ms) / statistics.fmean(samples_ms), rel=1e-9)
    assert (measured.min_ms, measured.max_ms, measured.runs) == (min(samples_ms), max(samples_ms), runs)
    ordered = [measured.min_ms, measured.p90_ms, measured.p95_ms, measured.p99_ms, measured.max_ms]
    assert all(lower < upper for lower, upper in pairwise(ordered))
    assert measured.samples_ms == samples_ms
    of_rounds = [statistics.median(samples_ms[:1]), statistics.median(samples_ms[1:])]
    assert measured.median_ms == pytest.approx(statistics.geometric_mean(of_rounds), rel=1e-12)


def test_the_tail_is_estimated_from_as_many_runs_as_mlperf_wants():
    measured = {
        runs: latency(RoundTimes(rounds_ms=[[float(step) for step in range(1, runs + 1)]]), "CPU")
        for runs in (63, 64, 661, 662)
    }
    assert [measured[runs].p90_estimate_ms is None for runs in (63, 64, 661, 662)] == [True, False, False, False]
    assert [measured[runs].p99_estimate_ms is None for runs in (63, 64, 661, 662)] == [True, True, True, False]
    assert measured[64].p90_estimate_ms == 64  # one may be over; the slowest is the estimate
    assert TIERS["certify"].min_runs == 662


def test_a_clock_that_jumps_is_reported_and_in_no_figure():
    times = [10.0] * 70
    jumped = [*times[:20], -5.0, *times[20:40], 3_600_000.0, 0.0, *times[40:]]
    measured = latency(RoundTimes(rounds_ms=[jumped[:50], jumped[50:]]), "CPU")
    assert measured.set_aside_ms == (-5.0, 3_600_000.0, 0.0)
    assert (measured.mean_ms, measured.max_ms, measured.runs, measured.variation) == (10, 10, 70, 0)
    (said,) = timing_warnings(measured, "CPU", "model")
    assert said == "model: the clock jumped 3 time(s), by -5, 3.6e+06, 0 ms; these are excluded from all figures"


def test_a_long_tail_is_no_jump():
    measured = latency(RoundTimes(rounds_ms=[[1.0] * 99 + [900.0]]), "CPU")  # a process that was stopped for a second
    assert (measured.max_ms, measured.set_aside_ms) == (900, ())


def test_without_a_time_that_can_be_there_is_no_latency():
    assert latency(RoundTimes(rounds_ms=[[-1.0, 0.0]]), "CPU") is None
    assert latency(RoundTimes(), "CPU") is None


def test_a_clock_that_is_set_back_does_not_end_the_measurement_late():
    clock = iter([0.0, 1.0, 1.0, -50.0, -50.0, -49.0, -49.0, -48.0])
    assert timed_runs(lambda: None, 3.0, 1, clock=lambda: next(clock)) == [1000, -51_000, 1000, 1000]


def test_a_clock_that_stands_still_is_an_error():
    calls = count()
    with pytest.raises(DeviceError, match="stands still"):
        timed_runs(lambda: next(calls), 1.0, 1, clock=lambda: 7.0)
    assert next(calls) == MAX_STANDING + 1


@pytest.mark.parametrize(
    ("device", "spread", "stable"),
    [("CPU", 0.09, True), ("CPU", 0.11, False), ("CUDA:0", 0.02, True), ("CUDA:0", 0.03, False)],
)
def test_timing_warning_for_unstable_times(device, spread, stable):
    samples = [10.0 * (1 + spread * sign) for sign in (1, -1)] * 50
    measured = latency(RoundTimes(rounds_ms=[samples]), device)
    assert measured.stable is stable
    varies = f"{100 * measured.variation:.1f} %, more than {100 * max_variation(device):g} %"
    expected = [] if stable else [f"model: unstable, times vary by {varies}"]
    assert timing_warnings(measured, device, "model") == expected


def test_timing_warning_for_too_few_runs():
    said = timing_warnings(latency(RoundTimes(rounds_ms=[[1.0] * 12]), "CPU"), "CPU", "model")
    assert said == ["model: 12 runs are too few to bound p90"]


def test_a_tier_that_was_changed_has_another_name():
    assert tier("report") == TIERS["report"]
    assert (TIERS["quick"].duration_s, TIERS["report"].duration_s, TIERS["certify"].duration_s) == (3, 10, 600)
    assert (TIERS["quick"].min_runs, TIERS["report"].min_runs) == (10, 100)
    changed = tier("report", duration_s=20.0)
    assert (changed.name, changed.duration_s, changed.min_runs) == ("custom", 20, 100)
    assert tier("report", duration_s=0.1).min_runs == 10  # who wants a tenth of a second does not want 100 runs
    assert tier("quick", warmup_ms=0.0).warmup_runs >= 10


def test_timed_runs_returns_milliseconds():
    import time

    taken = timed_runs(lambda: time.sleep(0.004), 0.0, 10)
    assert len(taken) == 10
    assert 4 <= min(taken) < 40  # sleep never ends early; a busy machine may oversleep, but not all ten times


def _runs_of_one(log: list[str]) -> list[list[str]]:
    measured: list[list[str]] = []
    for name in log:
        if measured and measured[-1][-1] == name:
            measured[-1].append(name)
        else:
            measured.append([name])
    return measured
