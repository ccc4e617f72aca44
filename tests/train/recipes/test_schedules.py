"""Learning rates at the steps where the formulas are easily done by hand."""

import pytest

from medseg_trt.train.recipes.schedules import SCHEDULES, learning_rate


def rate(step, *, schedule="cosine", total=13_950, peak=0.01, floor=0.0, warmup=0):
    return learning_rate(step, total, schedule=schedule, peak=peak, floor=floor, warmup_steps=warmup)


def test_poly_is_transunets():
    assert rate(0, schedule="poly") == 0.01
    assert rate(1, schedule="poly") == pytest.approx(0.01 * (1 - 1 / 13_950) ** 0.9, rel=1e-12)
    assert rate(13_949, schedule="poly") == pytest.approx(0.01 * (1 / 13_950) ** 0.9, rel=1e-9)


def test_cosine_falls_to_the_floor():
    assert rate(0, total=200, peak=1e-4, floor=1e-5) == pytest.approx(1e-4)
    assert rate(100, total=200, peak=1e-4, floor=1e-5) == pytest.approx((1e-4 + 1e-5) / 2)
    assert rate(200, total=200, peak=1e-4, floor=1e-5) == pytest.approx(1e-5)


def test_warmup_climbs_in_equal_parts_and_meets_the_peak():
    climbed = [rate(step, total=100, peak=1.0, warmup=4) for step in range(5)]
    assert climbed == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "cosine_five_times"])
def test_no_other_schedule_rises(schedule):
    rates = [rate(step, schedule=schedule, total=50) for step in range(51)]
    assert rates == sorted(rates, reverse=True)
