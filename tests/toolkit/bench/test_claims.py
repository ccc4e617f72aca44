"""A factor, the medians beside it and its interval are one estimate; where times are poor, no factor is claimed."""

import json
import statistics

import click.testing
import numpy as np
import pytest
from tiny import write_volumes

from medseg_trt.bench import claims, measure, timings
from medseg_trt.bench.measure import RoundTimes
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timing_schema import Speedup, Start
from medseg_trt.bench.timings import Timings, speedups
from medseg_trt.cli import cli

START = Start(starts=1, import_ms=1.0, load_ms=1.0, first_ms=1.0, to_first_mask_ms=3.0, file_cache="generated")
ROUNDS, RUNS = 20, 11


def times(
    median_ms: float, seed: int, spread: float = 0.02, slow_rounds: int = 0, slower: float = 1.0
) -> list[list[float]]:
    """Return rounds of times; some rounds are slower as a whole, as on a machine that others use."""
    rng = np.random.default_rng(seed)
    rounds = median_ms * np.exp(rng.normal(0, spread, (ROUNDS, RUNS)))
    rounds[:slow_rounds] *= slower
    return rounds.tolist()


def timed(rounds_ms: list[list[float]]) -> Timings:
    latency = measure.latency(RoundTimes(rounds_ms=rounds_ms), "CPU")
    assert latency is not None
    return Timings(start=START, latency={"model": latency})


def speed(reference: list[list[float]], row: list[list[float]]) -> Speedup | Missing:
    return speedups(timed(reference), timed(row), "CPU", "CPU")["model"]


@pytest.mark.parametrize("slow_rounds", [0, 7])
def test_the_factor_is_that_of_the_medians_in_the_report_and_lies_in_its_interval(slow_rounds):
    """An independent reader has the rounds and the standard library alone."""
    pair = times(18.0, 0, slow_rounds=slow_rounds, slower=1.5), times(2.4, 1)
    claim = speed(*pair)
    assert isinstance(claim, Speedup)
    medians = [timed(part).latency["model"].median_ms for part in pair]  # pyright: ignore[reportAttributeAccessIssue]
    assert claim.ratio == pytest.approx(medians[0] / medians[1], rel=1e-12)
    for median_ms, rounds in zip(medians, pair, strict=True):
        assert median_ms == pytest.approx(statistics.geometric_mean(map(statistics.median, rounds)), rel=1e-12)
    assert claim.low < claim.ratio < claim.high
    assert claim.confidence == 0.9


def test_unequal_round_counts_give_the_unpaired_ratio_of_medians():
    pair = times(18.0, 0), times(2.4, 1)[:-3]
    claim = speed(*pair)
    assert isinstance(claim, Speedup)
    medians = [statistics.geometric_mean(map(statistics.median, rounds)) for rounds in pair]
    assert claim.ratio == pytest.approx(medians[0] / medians[1], rel=1e-12)


def hiccups(rounds: list[list[float]], of_rounds: float) -> list[list[float]]:
    """Let the first run of each round take so many times as long; no median moves."""
    return [[part[0] * of_rounds, *part[1:]] for part in rounds]


@pytest.mark.parametrize(("row", "side"), [(1, "its times vary by"), (0, "the reference's times vary by")])
def test_times_that_vary_by_more_than_their_mean_claim_no_factor(row, side):
    pair = [times(18.0, 0), times(2.4, 1)]
    assert isinstance(speed(*pair), Speedup)
    pair[row] = hiccups(pair[row], 60.0)
    assert measure.latency(RoundTimes(rounds_ms=pair[row]), "CPU").variation > 2.5  # pyright: ignore[reportOptionalMemberAccess]
    claim = speed(*pair)
    assert isinstance(claim, Missing)
    assert claim.reason.startswith(f"no ratio is claimed: {side} ")
    assert "above 100 %" in claim.reason


def test_an_interval_that_spans_half_the_factor_claims_none():
    assert isinstance(speed(times(18.0, 0, slow_rounds=6, slower=1.8), times(2.4, 1)), Speedup)
    claim = speed(times(18.0, 0, slow_rounds=10, slower=5.0), times(2.4, 1))
    assert isinstance(claim, Missing)
    assert "spans more than a factor of 1.5" in claim.reason


def test_too_few_rounds_for_an_interval_claim_no_factor():
    claim = speed(times(18.0, 0)[:4], times(2.4, 1)[:4])
    assert isinstance(claim, Missing)
    assert "4 round(s) are too few for an interval" in claim.reason


def test_an_interrupt_within_a_round_leaves_whole_rounds():
    taken = {"a": RoundTimes(rounds_ms=times(1.0, 0)[:7]), "b": RoundTimes(rounds_ms=times(2.0, 1)[:6])}
    taken["dead"] = RoundTimes(rounds_ms=times(2.0, 1)[:2], failure="it died")
    timings._keep_whole_rounds(taken)
    assert [len(part.rounds_ms) for part in taken.values()] == [6, 6, 2]


def test_claim_limits_equal_their_documented_derivations():
    waiting = np.random.default_rng(0).exponential(size=200_000)
    assert np.std(waiting) / np.mean(waiting) == pytest.approx(claims.MAX_CLAIMED_VARIATION, rel=0.01)
    low, high = 2 / claims.MAX_CLAIMED_SPREAD**0.5, 2 * claims.MAX_CLAIMED_SPREAD**0.5
    assert (round(low, 1), round(high, 1)) == (1.6, 2.4)


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_the_terminal_and_the_report_name_what_is_unstable(tiny_bundle, tmp_path, measured_here, monkeypatch, spread):
    rng = np.random.default_rng(0)

    def time(session, _batch, _duration_s, min_runs):
        runs = 1 if min_runs == 1 else 10 * min_runs
        return (session._milliseconds * np.exp(rng.normal(0, spread, runs))).tolist()

    monkeypatch.setattr(timings.MeasuredSession, "time", time)
    command = [
        "bench",
        "--bundle",
        tiny_bundle,
        "--ckpt",
        tiny_bundle.parent / "model" / "model.pt",
        "--tier",
        "quick",
        "--data",
        write_volumes(tmp_path / "data"),
        "-o",
        tmp_path / "report",
        "--max-dice-drop",
        "1",
        "--backends",
        "onnxruntime",
        "--no-profile",
    ]
    ran = click.testing.CliRunner().invoke(cli, [*map(str, command)])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["schema"] == 4
    headline = report["summary"]["headline"]
    assert headline in ran.output
    unstable = [row["name"] for row in report["rows"] if not row["latency"]["model"].get("stable", True)]
    assert bool(unstable) == (spread > 0.1)
    assert ("Unstable" in headline) == bool(unstable)
    for name in unstable:
        assert name in headline.partition("Unstable")[2]
    reference = report["rows"][0]["latency"]["model"]["median_ms"]
    for row in report["rows"][1:]:
        if "ratio" in row["speedup"]["model"]:
            assert row["speedup"]["model"]["ratio"] == pytest.approx(reference / row["latency"]["model"]["median_ms"])
