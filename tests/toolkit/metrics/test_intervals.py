"""Tails against MLPerf's own logs and SciPy; intervals against closed forms, and by how often they are wrong."""

import numpy as np
import pytest
import scipy.stats
from numpy import ndarray

from medseg_trt.metrics import intervals
from medseg_trt.metrics.intervals import (
    MIN_UNITS,
    Interval,
    allowed_over_latency,
    change_interval,
    coefficient_of_variation,
    expanded_tail,
    sign_test_bound,
    speed_interval,
    student_quantile,
    tail_latency,
)

TRIALS = 400
MOST_ALARMS = 36  # of 400 at 5 %: 20 are expected, and more than this, or thrice this of 1600, come once in 3,000 times
LEAST_DETECTED = 0.95


@pytest.mark.parametrize(
    ("queries", "percentile", "allowed"),
    [
        (63, 90, 0),
        (64, 90, 1),
        (1024, 90, 80),  # the rules: the first p90 takes 64 queries; 80 of 1,024
        (2048, 90, 172 + 1),
        (2116, 90, 178 + 1),  # LoadGen's logs: "Would discard 172 highest latency queries"
        (458, 99, -1),
        (459, 99, 0),  # ... and "Processed 21 queries. Would need to run at least 438 more"
        (661, 99, 0),
        (662, 99, 1),
        (270_336, 99, 2583),  # the least for p99, and the rules' most
    ],
)
def test_early_stopping_is_mlperfs(queries: int, percentile: float, allowed: int) -> None:
    assert allowed_over_latency(queries, percentile) == allowed


@pytest.mark.parametrize("percentile", [50, 90, 95, 99, 99.9])
@pytest.mark.parametrize("confidence", [0.9, 0.99])
def test_early_stopping_is_the_binomial_distribution(percentile: float, confidence: float) -> None:
    for queries in (1, 2, 7, 30, 100, 663, 5000):
        counts = np.arange(queries + 1)
        below = scipy.stats.binom.cdf(counts, queries, 1 - percentile / 100) <= 1 - confidence
        assert allowed_over_latency(queries, percentile, confidence) == below.sum() - 1


def test_tail_latency_is_the_largest_sample_after_early_stopping() -> None:
    samples = np.random.default_rng(0).permutation(np.arange(1.0, 1025.0))
    assert tail_latency(samples, 90) == 1024 - 79
    assert tail_latency(samples[:64], 90) == samples[:64].max()  # one may exceed it, and none is discarded
    assert tail_latency(samples[:63], 90) is None
    assert tail_latency(samples[:661], 99) is None


def test_tail_is_seldom_below_the_true_percentile() -> None:
    rng = np.random.default_rng(0)
    true = float(scipy.stats.expon.ppf(0.9))
    estimates = [tail_latency(rng.exponential(size=100), 90) for _ in range(2000)]
    # 1 % is allowed; three standard deviations of 2,000 trials are 0.7 %. The plain percentile is below in every other.
    assert sum(estimate is not None and estimate < true for estimate in estimates) <= 0.017 * len(estimates)
    assert np.mean([np.percentile(rng.exponential(size=100), 90) < true for _ in range(200)]) > 0.3


def test_coefficient_of_variation_of_known_samples() -> None:
    assert coefficient_of_variation([9.0, 11.0]) == pytest.approx(np.sqrt(2) / 10)
    assert coefficient_of_variation([3.0]) == 0


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [1.0, -3.0], [1.0, float("nan")], [float("inf")]])
def test_a_clock_that_jumps_gives_no_figure(samples: list[float]) -> None:
    for function in (coefficient_of_variation, lambda samples: tail_latency(samples, 90)):
        with pytest.raises(ValueError, match="clock may have jumped"):
            function(samples)
    with pytest.raises(ValueError, match="clock may have jumped"):
        speed_interval([[1.0], samples], [[1.0], [1.0]], interleaved=True)


@pytest.mark.parametrize(("count", "rank"), [(4, None), (5, 0), (7, 0), (8, 1), (10, 1), (11, 2)])
def test_bound_is_the_sign_tests(count: int, rank: int | None) -> None:
    """The places are those of printed tables of the sign test at 5 %, one-sided; four values prove nothing."""
    values = [1.0 + number for number in range(count)]
    assert sign_test_bound(values[::-1]) == (0 if rank is None else values[rank])


def test_bound_of_the_sign_test_covers() -> None:
    """Of lower ends of 90 % intervals, 5 % lie above the true median; three deviations of 2000 trials: 1.5 %."""
    random = np.random.default_rng(0)
    assert np.mean([sign_test_bound(random.exponential(size=9).tolist()) > np.log(2) for _ in range(2000)]) < 0.065


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 24, 99, 1000])
def test_students_quantile_is_scipys(degrees: int) -> None:
    for probability in (0.5, 0.9, 0.95, 0.999):
        expected = scipy.stats.t.ppf(probability, degrees)
        assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_interval_of_normal_values_is_students() -> None:
    values = np.random.default_rng(1).normal(3, 2, 12)
    interval = change_interval(np.zeros(12), values)
    low, high = scipy.stats.t.interval(0.9, 11, values.mean(), scipy.stats.sem(values))
    assert interval.estimate == pytest.approx(values.mean())
    # 5,000 resamples leave some 4 % of scatter so far out, and the values are not quite normal.
    assert (interval.low, interval.high) == (pytest.approx(low, abs=0.2), pytest.approx(high, abs=0.2))
    assert (interval.units, interval.confidence) == (12, 0.9)


def test_interval_is_scipys_bootstrap_where_there_are_many() -> None:
    values = np.random.default_rng(2).exponential(size=400)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    interval = change_interval(np.zeros(400), values)
    assert (interval.low, interval.high) == (pytest.approx(theirs.low, rel=0.01), pytest.approx(theirs.high, rel=0.01))


def test_the_mean_is_that_of_the_classes_that_occur() -> None:
    before = np.array([[0.9, 0.5, np.nan], [0.7, np.nan, np.nan]] * 5)
    after = before + np.array([-0.1, 0.2, 0.0])
    interval = change_interval(before, after)
    assert interval.estimate == pytest.approx((-0.1 + 0.2) / 2)
    assert interval.low == pytest.approx(interval.high)  # every case changed by as much


def test_few_units_show_their_range() -> None:
    interval = change_interval(np.zeros(4), np.array([0.1, -0.2, 0.3, 0.0]))
    assert (interval.low, interval.high, interval.confidence) == (-0.2, 0.3, None)
    assert MIN_UNITS == 5
    two = speed_interval([[2.0], [3.0]], [[1.0], [1.0]], interleaved=True)
    assert (two.low, two.high, two.confidence) == (pytest.approx(2), pytest.approx(3), None)
    apart = speed_interval([[2.0], [3.0]], [[1.0], [1.5]], interleaved=False)
    assert (apart.low, apart.high, apart.confidence) == (pytest.approx(2 / 1.5), pytest.approx(3), None)


def test_what_cannot_be_paired_is_refused() -> None:
    for before, after in (
        (np.zeros(0), np.zeros(0)),
        (np.zeros(5), np.zeros(6)),
        (np.array([1.0, np.nan]), np.array([1.0, 1.0])),
    ):
        with pytest.raises(ValueError, match="cannot be paired"):
            change_interval(before, after)
    with pytest.raises(ValueError, match="not taken in turn"):
        speed_interval([[1.0]] * 5, [[1.0]] * 6, interleaved=True)
    with pytest.raises(ValueError, match="no round"):
        speed_interval([], [], interleaved=True)


def test_interval_at_least_returns_holds_undecided_or_fails() -> None:
    interval = Interval(estimate=1.25, low=1.2, high=1.3, units=20)
    assert [interval.at_least(limit) for limit in (1.2, 1.25, 1.3, 1.31)] == [
        "holds",
        "undecided",
        "undecided",
        "fails",
    ]


@pytest.fixture
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five times as fast; how often an interval is wrong does not depend on it, only where its ends are to a digit."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)


def accuracy_alarms(loss: float, cases: int, trials: int, seed: int) -> int:
    """Count the comparisons that are sure that Dice fell."""
    rng = np.random.default_rng(seed)
    alarms = 0
    for _ in range(trials):
        before = rng.beta(9, 2, cases)
        alarms += change_interval(before, before - loss + rng.normal(0, 0.015, cases)).high < 0
    return alarms


@pytest.mark.usefixtures("fewer_resamples")
def test_no_change_of_dice_is_no_alarm_and_a_loss_of_a_hundredth_is_found() -> None:
    assert accuracy_alarms(0.0, 5, 4 * TRIALS, seed=0) <= 3 * MOST_ALARMS
    assert accuracy_alarms(0.01, 50, TRIALS, seed=1) >= LEAST_DETECTED * TRIALS


@pytest.mark.usefixtures("fewer_resamples")
def test_plain_percentiles_of_few_cases_would_be_wrong_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "expanded_tail", lambda units, confidence: (1 - confidence) / 2)
    assert accuracy_alarms(0.0, 5, 4 * TRIALS, seed=0) > 3 * MOST_ALARMS
    assert expanded_tail(5, 0.9) < 0.05


def clock(rng: np.random.Generator, rounds: int, slower: float) -> tuple[ndarray, ndarray]:
    """Return simulated times of two rows (rounds, runs): the machine drifts and wanders, and one run in 20 hiccups."""
    drift = np.exp(0.3 * np.sin(2 * np.pi * np.arange(rounds) / rounds) + np.cumsum(rng.normal(0, 0.03, rounds)))

    def turn(factor: float) -> ndarray:
        jitter = np.exp(rng.normal(0, 0.03, (rounds, 8)))
        hiccups = 1 + (rng.random((rounds, 8)) < 0.05) * rng.exponential(2, (rounds, 8))
        return 50 * factor * drift[:, None] * jitter * hiccups

    return turn(1.0), turn(slower)


def speed_alarms(slower: float, interleaved: bool, seed: int, rounds: int = 20) -> int:
    """Count, of 400 comparisons of a row with a second one, those that are sure that the second is slower."""
    rng = np.random.default_rng(seed)
    alarms = 0
    for _ in range(TRIALS):
        first, second = clock(rng, rounds, slower)
        if not interleaved:
            second = clock(rng, rounds, slower)[1]  # another time, another drift
        alarms += speed_interval(first.tolist(), second.tolist(), interleaved=interleaved).high < 1
    return alarms


@pytest.mark.usefixtures("fewer_resamples")
@pytest.mark.parametrize("rounds", [6, 20])
def test_speed_interval_rarely_alarms_for_equal_speed(rounds: int) -> None:
    assert speed_alarms(1.0, interleaved=True, seed=0, rounds=rounds) <= MOST_ALARMS


@pytest.mark.usefixtures("fewer_resamples")
def test_speed_interval_detects_a_3_percent_slowdown() -> None:
    assert speed_alarms(1.03, interleaved=True, seed=1) >= LEAST_DETECTED * TRIALS


@pytest.mark.usefixtures("fewer_resamples")
def test_without_turns_a_drifting_machine_alarms_for_nothing() -> None:
    assert speed_alarms(1.0, interleaved=False, seed=2) > MOST_ALARMS


@pytest.mark.usefixtures("fewer_resamples")
def test_speed_interval_of_round_means_misses_a_3_percent_slowdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hiccups move a mean; this is why a round is summed up by its median."""
    monkeypatch.setattr(intervals.np, "median", np.mean)
    assert speed_alarms(1.03, interleaved=True, seed=1) < LEAST_DETECTED * TRIALS
