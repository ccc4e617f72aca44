import numpy as np
import pytest

from medseg_trt.export.gate import CONFIDENCE, MIN_CASES, Verdict, compare, relax


def verdict_of(drops, limit=0.005, cases=None) -> Verdict:
    drops = np.asarray(drops, np.float64)
    return compare(np.full(len(drops), 0.9), 0.9 - drops, cases or ["one"] * len(drops), limit)


def test_the_same_masks_pass_and_have_no_interval():
    verdict = verdict_of(np.zeros(20))
    assert (verdict.drop, verdict.low, verdict.high, verdict.holds) == (0, 0, 0, True)


def test_a_drop_on_every_image_fails_just_above_the_limit():
    assert verdict_of(np.full(20, 0.0049)).holds
    assert not verdict_of(np.full(20, 0.0051)).holds


def test_a_mean_below_the_limit_is_not_enough_where_images_scatter():
    drops = np.tile([0.1, -0.094], 10)
    verdict = verdict_of(drops)
    assert verdict.drop < verdict.limit < verdict.high
    assert not verdict.holds


def test_the_interval_is_that_of_the_normal_distribution_where_there_are_many_images():
    drops = np.random.default_rng(0).normal(0.01, 0.05, 4000)
    verdict = verdict_of(drops)
    half = 1.6449 * drops.std() / np.sqrt(len(drops))  # the 95th percentile of the mean's normal distribution
    # 10,000 resamples leave 2 % of scatter in a 5th percentile: about half / 1.6449 * 0.021 = 0.013 half.
    assert verdict.high - verdict.drop == pytest.approx(half, rel=0.06)
    assert verdict.drop - verdict.low == pytest.approx(half, rel=0.06)
    assert CONFIDENCE == 0.95


def test_slices_of_one_patient_are_no_independent_images():
    rng = np.random.default_rng(0)
    by_patient = rng.normal(0, 0.02, 12)
    cases = [f"patient{number}" for number in range(12) for _ in range(50)]
    drops = np.repeat(by_patient, 50)
    together, apart = verdict_of(drops, cases=cases), verdict_of(drops, cases=["one"] * 600)
    assert (together.unit, apart.unit) == ("cases", "slices")
    # 12 values instead of 600: the interval is wider by the root of 50, 7.1.
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(7.1, rel=0.15)


def test_few_patients_are_resampled_by_slice():
    assert verdict_of(np.zeros(4), cases=["a", "b", "c", "d"]).unit == "slices"
    assert MIN_CASES == 5


def test_scores_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(np.zeros(3), np.zeros(3), ["a"], 0.1)
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(np.zeros(0), np.zeros(0), [], 0.1)


ERRORS = {"harmless": 0.001, "bad": 0.3, "worse": 0.5}


def judge(kept: frozenset[str]) -> Verdict:
    return verdict_of(np.full(10, sum(error for name, error in ERRORS.items() if name not in kept)), limit=0.01)


def test_the_worst_groups_go_back_to_float_until_the_gate_holds():
    relaxed = relax(judge, ERRORS.__getitem__, ERRORS, lambda kept: True)
    assert relaxed.verdict.holds
    assert relaxed.kept_float == ("worse", "bad")
    assert relaxed.costs == pytest.approx((0.801, 0.301))
    assert [name for name, _ in relaxed.ranks] == ["worse", "bad", "harmless"]


def test_nothing_is_ranked_where_the_gate_holds_at_once():
    def never(group: str) -> float:
        raise AssertionError

    relaxed = relax(lambda kept: verdict_of(np.zeros(5)), never, ERRORS, lambda kept: True)
    assert (relaxed.kept_float, relaxed.ranks) == ((), ())


def test_it_stops_before_too_much_is_float_and_says_that_it_does_not_hold():
    relaxed = relax(judge, ERRORS.__getitem__, ERRORS, lambda kept: len(kept) < 2)
    assert relaxed.kept_float == ("worse",)
    assert not relaxed.verdict.holds
