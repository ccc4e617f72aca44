"""Estimate latencies, changes of means and speed ratios with confidence intervals.

Few or scattered samples widen every interval. Random draws use a generator with a fixed seed: the same samples give
the same interval.
Sources: MLCommons inference rules, appendix "Early Stopping Criterion", for tails; Efron & Tibshirani 1993, "An
Introduction to the Bootstrap", chapter 13; Hesterberg 2015, "What Teachers Should Know About the Bootstrap", §4.3, for
the percentiles that small samples need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, Int64
from numpy import ndarray

CONFIDENCE = 0.90  # of an interval: the share that contains the true value; 5 % lie below and 5 % above it
TAIL_CONFIDENCE = 0.99  # of a tail latency, as in MLPerf
RESAMPLES = 5_000
MIN_UNITS = 5  # for fewer, the range is given: four values are all on one side by chance in one of eight cases
DRAWN_AT_ONCE = 1 << 22  # numbers, 32 MiB

Outcome = Literal["holds", "fails", "undecided"]
Rounds = Sequence[Sequence[float]]  # latencies by round; a round is shorter than drift and longer than a hiccup


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its confidence interval."""

    estimate: float
    low: float
    high: float
    units: int  # number of independent units: cases, or rounds of a measurement
    confidence: float | None = CONFIDENCE  # None: low and high are the range of fewer than MIN_UNITS

    __pydantic_config__ = {"extra": "forbid"}

    def at_least(self, limit: float) -> Outcome:
        """Test whether the true value is ``limit`` or more; non-inferiority requires "holds"."""
        if self.low >= limit:
            return "holds"
        return "fails" if self.high < limit else "undecided"


def coefficient_of_variation(samples: Sequence[float] | ndarray) -> float:
    """Return the standard deviation (of the sample, n - 1) as a share of the mean; 0 for a single sample."""
    values = _latencies(samples)
    return float(values.std(ddof=1) / values.mean()) if len(values) > 1 else 0.0


def allowed_over_latency(queries: int, percentile: float | int, confidence: float = TAIL_CONFIDENCE) -> int:
    """Return the number of queries that may exceed a latency which bounds the percentile from above; -1: none does.

    If ``100 - percentile`` per cent of all queries exceeded it, so few would do so with a probability of at most
    ``1 - confidence``.

    Args:
        queries: number of queries.
        percentile: 0 < percentile < 100.
        confidence: that the percentile is at or below the latency.
    """
    over = 1 - percentile / 100
    counts = np.arange(min(queries, int(queries * over) + 1) + 1)  # the median of a binomial is no farther up
    steps = np.log((queries - counts[:-1]) / (counts[:-1] + 1)) + np.log(over / (1 - over))
    log_probability = queries * np.log1p(-over) + np.concatenate([[0.0], np.cumsum(steps)])
    return int((np.cumsum(np.exp(log_probability)) <= 1 - confidence).sum()) - 1


def tail_latency(samples: Sequence[float] | ndarray, percentile: float | int) -> float | None:
    """Return MLPerf's early-stopping estimate of a percentile, which is at or above the true one with 99 %.

    Returns:
        None if there are too few samples: the 90th percentile needs 64, the 99th needs 662.
    """
    ordered = np.sort(_latencies(samples))
    allowed = allowed_over_latency(len(ordered), percentile)
    return float(ordered[len(ordered) - allowed]) if allowed >= 1 else None


def sign_test_bound(values: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Return the lower end of an interval of the true median of the values; 0 if there are too few.

    The inverted sign test: the number of n values below the median is binomial.
    """
    ordered, count = sorted(values), len(values)
    tails = np.cumsum([comb(count, number) * 0.5**count for number in range(count + 1)])
    safe = int((tails <= (1 - confidence) / 2 + 1e-12).sum())
    return ordered[safe - 1] if safe else 0.0


def change_interval(
    before: Float[ndarray, "..."], after: Float[ndarray, "..."], confidence: float = CONFIDENCE
) -> Interval:
    """Bound the change of a mean that was measured before and after on the same units, which are resampled in pairs.

    Units are rows. With columns, for example classes, the mean is that of the columns' means. NaN marks what a unit
    lacks, before and after alike; a column without any value does not count.

    Raises:
        ValueError: there is no unit, or the two cannot be paired.
    """
    if not len(before) or before.shape != after.shape or (np.isnan(before) != np.isnan(after)).any():
        raise ValueError(f"{before.shape} and {after.shape} values cannot be paired")
    differences = (after - before).reshape(len(before), -1).astype(np.float64)
    if len(differences) < MIN_UNITS:
        unit_means = _means(np.eye(len(differences), dtype=np.int64), differences)
        estimate = _means(np.ones((1, len(differences)), np.int64), differences)[0]
        return Interval(
            estimate=float(estimate),
            low=float(unit_means.min()),
            high=float(unit_means.max()),
            units=len(differences),
            confidence=None,
        )
    return _interval(differences, confidence, np.random.default_rng(0))


def speed_interval(slower: Rounds, faster: Rounds, *, interleaved: bool, confidence: float = CONFIDENCE) -> Interval:
    """Bound how many times faster one network is than another: the ratio of their ``median_of_rounds``.

    With as many rounds on both sides, it is also the geometric mean of the rounds' ratios. With
    interleaved rounds, a drift of the machine affects both sides of a round's ratio and cancels; rounds are resampled
    in pairs. Otherwise the rounds of each network are resampled separately, and the interval does not cover drift
    between the two measurements.

    Args:
        slower: latencies above the fraction bar, by round.
        faster: those below it.
        interleaved: whether ``slower[i]`` and ``faster[i]`` were taken in the same round.
        confidence: of the interval, 0 … 1.

    Raises:
        ValueError: a latency is not a positive number, there is none, or those taken in turn are not as many rounds.
    """
    above, below = _logs_of_medians(slower), _logs_of_medians(faster)
    if interleaved:
        if len(above) != len(below):
            raise ValueError(f"{len(above)} and {len(below)} rounds were not taken in turn")
        log_ratio = change_interval(below, above, confidence)
    else:
        log_ratio = _difference(above, below, confidence)
    ends = np.exp([log_ratio.estimate, log_ratio.low, log_ratio.high]).tolist()
    return Interval(estimate=ends[0], low=ends[1], high=ends[2], units=log_ratio.units, confidence=log_ratio.confidence)


def median_of_rounds(rounds: Rounds) -> float:
    """Return the geometric mean of the medians of the rounds; a median is not moved by a hiccup within its round.

    The ratio of two of them is the estimate of ``speed_interval``.

    Raises:
        ValueError: a latency is not a positive number, or there is none.
    """
    return float(np.exp(_logs_of_medians(rounds).mean()))


def draw(units: int, times: int, generator: np.random.Generator) -> Int64[ndarray, "times units"]:
    """Draw as many units as there are, with replacement, and return how often each one was drawn."""
    return generator.multinomial(units, np.full(units, 1 / units), times)


def bounds(resampled: Float64[ndarray, " draws"], units: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentiles of resampled estimates between which the true value lies.

    Resamples of few units scatter less than new samples would. Taking the percentiles farther out mends that to first
    order: it gives a mean of normal values Student's interval.
    """
    tail = expanded_tail(units, confidence)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


@cache
def expanded_tail(units: int, confidence: float) -> float:
    """Return the share of resamples to leave out at either end of an interval of so many units."""
    if units < 2:
        return 0.0
    return NormalDist().cdf(-np.sqrt(units / (units - 1)) * student_quantile((1 + confidence) / 2, units - 1))


def student_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's distribution for a probability of at least one half, by bisection."""
    low, high = 0.0, 1.0
    while _student_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _student_cdf(value: float, degrees: int) -> float:
    """Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4, for whole degrees of freedom."""
    angle = np.arctan(value / np.sqrt(degrees))
    odd = degrees % 2
    numbers = np.arange(2 + odd, degrees - 1, 2)  # the series ends at the cosine's power of degrees - 2
    factors = np.cos(angle) ** 2 * (numbers - 1) / numbers
    series = np.sin(angle) * float(np.cumprod(np.concatenate([[1.0], factors])).sum())
    if odd:
        series = 2 / np.pi * (angle + (series * np.cos(angle) if degrees > 1 else 0))
    return float(1 + series) / 2


def _latencies(samples: Sequence[float] | ndarray) -> Float64[ndarray, " samples"]:
    values = np.asarray(samples, np.float64)
    if not len(values) or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError("latencies are positive numbers, and at least one; the clock may have jumped")
    return values


def _logs_of_medians(rounds: Rounds) -> Float64[ndarray, " rounds"]:
    if not len(rounds):
        raise ValueError("there is no round")
    return np.log([np.median(_latencies(latencies)) for latencies in rounds])


def _interval(values: Float64[ndarray, "units columns"], confidence: float, generator: np.random.Generator) -> Interval:
    low, high = bounds(_resampled(values, generator), len(values), confidence)
    estimate = _means(np.ones((1, len(values)), np.int64), values)[0]
    return Interval(estimate=float(estimate), low=low, high=high, units=len(values), confidence=confidence)


def _difference(above: Float64[ndarray, " a"], below: Float64[ndarray, " b"], confidence: float) -> Interval:
    """Bound the difference of the means of two independent samples."""
    units, estimate = min(len(above), len(below)), float(above.mean() - below.mean())
    if units < MIN_UNITS:
        low, high = float(above.min() - below.max()), float(above.max() - below.min())
        return Interval(estimate=estimate, low=low, high=high, units=units, confidence=None)
    generator = np.random.default_rng(0)
    first, second = (_resampled(logs[:, None], generator) for logs in (above, below))
    low, high = bounds(first - second, units, confidence)
    return Interval(estimate=estimate, low=low, high=high, units=units, confidence=confidence)


def _resampled(values: Float64[ndarray, "units columns"], generator: np.random.Generator) -> Float64[ndarray, " draws"]:
    at_once = max(1, DRAWN_AT_ONCE // len(values))
    sizes = [min(at_once, RESAMPLES - start) for start in range(0, RESAMPLES, at_once)]
    return np.concatenate([_means(draw(len(values), size, generator), values) for size in sizes])


def _means(
    times: Int64[ndarray, "draws units"], values: Float64[ndarray, "units columns"]
) -> Float64[ndarray, " draws"]:
    """Return the mean of the columns' means, for units that count so many times; 0 where nothing was drawn."""
    weights = times @ np.isfinite(values).astype(np.float64)
    columns = (times @ np.nan_to_num(values)) / np.maximum(weights, 1)
    occurs = weights > 0
    return (columns * occurs).sum(axis=1) / np.maximum(occurs.sum(axis=1), 1)
