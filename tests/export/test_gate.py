import numpy as np
import pytest
from numpy import ndarray

from medseg_trt.export.gate import MIN_CASES, GateVerdict, compare, fall_back_to_float
from medseg_trt.metrics.overlap import mean_scores, scores
from medseg_trt.spec import Classes


def counts_of(dice) -> ndarray:
    """Return the counts of one class in slices where truth and mask have 10,000 pixels each."""
    right = np.rint(10_000 * np.asarray(dice, np.float64)).astype(np.int64)
    return np.stack([right, np.full_like(right, 10_000), np.full_like(right, 10_000)], axis=-1)[:, None]


def verdict_of(drops, limit=0.005, cases=None) -> GateVerdict:
    drops = np.asarray(drops, np.float64)
    return compare(counts_of(np.full(len(drops), 0.9)), counts_of(0.9 - drops), cases or ["one"] * len(drops), limit)


def test_the_same_masks_pass_and_have_no_interval():
    verdict = verdict_of(np.zeros(20))
    assert (verdict.drop, verdict.low, verdict.high, verdict.holds) == (0, 0, 0, True)


def test_a_drop_on_every_image_fails_just_above_the_limit():
    assert verdict_of(np.full(20, 0.0049)).holds
    assert not verdict_of(np.full(20, 0.0051)).holds


def test_a_mean_below_the_limit_fails_with_a_wide_interval():
    verdict = verdict_of(np.tile([0.1, -0.094], 10))
    assert verdict.drop < verdict.limit < verdict.high
    assert not verdict.holds


def test_the_interval_is_that_of_the_normal_distribution_where_there_are_many_images():
    drops = np.random.default_rng(0).normal(0.01, 0.02, 1000)
    verdict = verdict_of(drops)
    half = 1.6449 * drops.std() / np.sqrt(len(drops))  # the 95th percentile of the mean's normal distribution
    # 5,000 resamples leave 3 % of scatter in a 5th percentile: about half / 1.6449 * 0.03 = 0.018 half.
    assert verdict.high - verdict.drop == pytest.approx(half, rel=0.08)
    assert verdict.drop - verdict.low == pytest.approx(half, rel=0.08)


def test_slices_of_one_case_are_resampled_together():
    by_patient = np.random.default_rng(0).normal(0, 0.02, 12)
    cases = [f"patient{number:02}" for number in range(12) for _ in range(25)]
    drops = np.repeat(by_patient, 25)
    together, apart = verdict_of(drops, cases=cases), verdict_of(drops, cases=["one"] * 300)
    assert (together.unit, apart.unit) == ("cases", "slices")
    # 12 values instead of 300: the interval is wider by the root of 25.
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(5, rel=0.15)


def test_a_gate_on_a_network_that_segments_nothing_says_that_it_shows_nothing():
    nothing = compare(counts_of(np.zeros(20)), counts_of(np.zeros(20)), ["one"] * 20, 0.005)
    assert nothing.holds
    assert nothing.remark is not None
    assert nothing.remark.startswith("the accuracy gate shows nothing: the reference itself has Dice 0.0000, ")
    assert "\n" not in nothing.remark
    assert compare(counts_of(np.full(20, 0.01)), counts_of(np.zeros(20)), ["one"] * 20, 0.005).remark is None
    assert verdict_of(np.zeros(20)).remark is None
    assert verdict_of(np.zeros(20), limit=0.9).remark is not None  # 0.9 can drop by 0.9 at most


def test_few_cases_are_resampled_by_slice():
    assert verdict_of(np.zeros(4), cases=["a", "b", "c", "d"]).unit == "slices"
    assert MIN_CASES == 5


def test_gate_reference_score_equals_the_dice_of_evaluate():
    classes = Classes(names=("background", "one", "two"))
    rng = np.random.default_rng(0)
    cases = ["a", "a", "a", "b", "b"]
    truths, masks = rng.integers(0, 3, (2, 5, 8, 8)).astype(np.uint8)
    expected = [scores(masks[np.array(cases) == case], truths[np.array(cases) == case], classes) for case in "ab"]
    counts = np.array(
        [
            [[((m == k) & (t == k)).sum(), (m == k).sum(), (t == k).sum()] for k in (1, 2)]
            for m, t in zip(masks, truths, strict=True)
        ]
    )
    verdict = compare(counts, counts, cases, 0.005)
    assert verdict.reference == pytest.approx(np.mean([score.dice or 0.0 for score in mean_scores(expected)]))


def test_a_false_alarm_in_a_case_without_the_class_costs_something():
    reference = np.array([[[50, 60, 60], [0, 0, 0]], [[50, 60, 60], [0, 0, 0]]])
    candidate = reference.copy()
    candidate[1, 1] = [0, 5, 0]
    verdict = compare(reference, candidate, ["a", "b"], 0.005)
    five_sixths = 100 / 120
    assert verdict.reference == pytest.approx((five_sixths + five_sixths + 1) / 3)
    assert verdict.candidate == pytest.approx((five_sixths + five_sixths + 0) / 3)
    # In another slice of a case that has the class it is a few pixels among many.
    reference[0, 1] = candidate[0, 1] = [90, 100, 100]
    pooled = compare(reference, candidate, ["a", "a"], 0.005)
    assert pooled.drop == pytest.approx((180 / 200 - 180 / 205) / 2)


def test_empty_truths_and_masks_have_no_drop():
    nothing = np.zeros((3, 2, 3), np.int64)
    verdict = compare(nothing, nothing, ["a", "b", "c"], 0.005)
    assert (verdict.reference, verdict.candidate, verdict.holds) == (1, 1, True)


def test_scores_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(np.zeros((3, 1, 3), np.int64), np.zeros((3, 1, 3), np.int64), ["a"], 0.1)
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(np.zeros((0, 1, 3), np.int64), np.zeros((0, 1, 3), np.int64), [], 0.1)


ERRORS = {"harmless": 0.001, "bad": 0.3, "worse": 0.5}


def judge(kept: frozenset[str]) -> GateVerdict:
    return verdict_of(np.full(10, sum(error for name, error in ERRORS.items() if name not in kept)), limit=0.01)


def test_the_worst_groups_return_to_float_until_the_gate_holds():
    fallback = fall_back_to_float(judge, ERRORS.__getitem__, ERRORS, lambda kept: True)
    assert fallback.verdict.holds
    assert fallback.kept_float == ("worse", "bad")
    assert fallback.costs == pytest.approx((0.801, 0.301))
    assert [name for name, _ in fallback.ranks] == ["worse", "bad", "harmless"]


def test_no_group_is_ranked_where_the_gate_holds_at_once():
    def never(group: str) -> float:
        raise AssertionError

    fallback = fall_back_to_float(lambda kept: verdict_of(np.zeros(5)), never, ERRORS, lambda kept: True)
    assert (fallback.kept_float, fallback.ranks) == ((), ())


def test_the_fallback_stops_at_its_budget_with_a_failed_verdict():
    fallback = fall_back_to_float(judge, ERRORS.__getitem__, ERRORS, lambda kept: len(kept) < 2)
    assert fallback.kept_float == ("worse",)
    assert not fallback.verdict.holds
