"""A step is chosen where it raises Dice in every resample, and nowhere else."""

from dataclasses import replace

import numpy as np
import pytest

from medseg_trt.metrics.overlap import scores
from medseg_trt.postprocess.apply import postprocess
from medseg_trt.postprocess.learn import PredictedCase, learn_postprocessing
from medseg_trt.spec import Classes

CLASSES = Classes(names=("background", "organ", "lesion"))
SPACING = (2.0, 1.0, 1.0)


def case(seed: int, *, specks: int = 0, hole: bool = False, lesions: int = 2, slices: int = 6) -> PredictedCase:
    """Return a case with an organ and some lesions, and a prediction with specks of the organ and a hole in it."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((slices, 48, 48), np.uint8)
    truth[1:-1, 8:24, 8 + seed % 4 : 26] = 1
    for number in range(lesions):
        truth[1 + number, 30 + 8 * number : 34 + 8 * number, 30:36] = 2
    predicted = truth.copy()
    predicted[1:-1, 8:10] = 0  # never a perfect mask
    predicted[2, 30:31, 30:36] = 0
    for _ in range(specks):
        row, column = rng.integers(28, 46, 2)
        predicted[rng.integers(0, slices), row : row + 2, 2 + column // 3] = 1
    if hole:
        predicted[1:-1, 14:18, 14:18] = 0
    return PredictedCase(name=f"case{seed}", predicted=predicted, truth=truth, spacing_mm=SPACING)


def learn(cases):
    return learn_postprocessing(cases, CLASSES, "generated")


def test_specks_choose_a_removal_and_holes_their_filling_for_that_class_alone():
    post = learn([case(seed, specks=6, hole=True) for seed in range(6)])
    assert post is not None
    (steps,) = post.classes
    assert steps.name == "organ"
    assert steps.largest or steps.min_size > 0
    assert steps.fill_holes
    assert steps.gain.low > 0
    assert steps.gain.units == "cases"
    assert (post.unit, post.kind, post.cases, post.slices) == ("mm3", "volume", 6, 36)


def test_the_gain_is_that_of_the_corrected_masks():
    cases = [case(seed, specks=6) for seed in range(5)]
    post = learn(cases)
    assert post is not None

    def dice(masks):
        scored = [scores(mask, item.truth, CLASSES) for mask, item in zip(masks, cases, strict=True)]
        return float(np.mean([score.dice or 0.0 for case_scores in scored for score in case_scores]))

    assert post.gain.before == pytest.approx(dice([item.predicted for item in cases]))
    corrected = [postprocess(item.predicted, post, CLASSES, item.spacing_mm) for item in cases]
    assert post.gain.after == pytest.approx(dice(corrected))


def test_learn_returns_none_if_no_step_raises_dice():
    assert learn([case(seed) for seed in range(6)]) is None


def test_the_second_of_two_true_lesions_is_not_removed():
    """A rule that always kept the largest component would remove half of the lesions."""
    post = learn([case(seed, specks=6, lesions=2) for seed in range(6)])
    assert post is not None
    assert [steps.name for steps in post.classes] == ["organ"]


def test_a_gain_in_one_case_of_many_is_not_enough():
    assert learn([case(0, specks=6), *(case(seed) for seed in range(1, 8))]) is None


def test_few_cases_are_resampled_by_slice_and_labelled_so():
    post = learn([case(0, hole=True, slices=12)])
    assert post is not None
    assert post.classes[0].gain.units == "slices"


def test_learn_returns_none_for_mixed_images_and_volumes_or_no_cases():
    volume = case(1)
    assert (
        learn([case(0, hole=True, slices=12), replace(volume, predicted=volume.predicted[:1], truth=volume.truth[:1])])
        is None
    )
    assert learn([]) is None


def test_without_a_spacing_sizes_are_shares_of_a_slice():
    cases = [case(seed, hole=True, specks=6) for seed in range(6)]
    post = learn([PredictedCase(name=c.name, predicted=c.predicted, truth=c.truth, spacing_mm=None) for c in cases])
    assert post is not None
    assert post.unit == "share"
    assert all(steps.min_size < 1 for steps in post.classes)
