"""Scores against sets of pixels and against scikit-learn, and the empty cases one by one."""

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg_trt.metrics import overlap
from medseg_trt.metrics.overlap import ClassScore, confusion, mean_scores, scores
from medseg_trt.spec import Classes

CLASSES = Classes(names=("background", "liver", "spleen", "tumour"))
# two integers divided once in float64 on either side
EXACT = 1e-15
labels_of = hnp.arrays(
    np.uint8, st.shared(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6)), elements=st.integers(0, 3)
)


def pixels_of(labels: np.ndarray, label: int) -> set[int]:
    return {index for index, value in enumerate(labels.ravel().tolist()) if value == label}


@settings(derandomize=True, deadline=None, max_examples=150)
@given(prediction=labels_of, truth=labels_of)
def test_dice_and_iou_are_those_of_sets_of_pixels(prediction, truth):
    scored = scores(prediction, truth, CLASSES)
    assert [score.name for score in scored] == ["liver", "spleen", "tumour"]
    for label, score in enumerate(scored, 1):
        ours, theirs = pixels_of(prediction, label), pixels_of(truth, label)
        assert (score.predicted_pixels, score.truth_pixels) == (len(ours), len(theirs))
        if ours | theirs:
            assert score.dice == pytest.approx(2 * len(ours & theirs) / (len(ours) + len(theirs)), abs=EXACT)
            assert score.iou == pytest.approx(len(ours & theirs) / len(ours | theirs), abs=EXACT)
        else:
            assert (score.dice, score.iou) == (None, None)
        assert (
            score.state
            == {
                (True, True): "present",
                (False, False): "absent",
                (True, False): "missed",
                (False, True): "false alarm",
            }[bool(theirs), bool(ours)]
        )


def test_a_volume_is_scored_as_scikit_learn_scores_its_pixels():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (5, 31, 33), dtype=np.uint8)
    prediction = np.where(rng.random(truth.shape) < 0.7, truth, rng.integers(0, 4, truth.shape)).astype(np.uint8)
    scored = scores(prediction, truth, CLASSES)
    flat = truth.ravel(), prediction.ravel()
    dice = np.ravel(sklearn.metrics.f1_score(*flat, average=None))[1:]  # pyright: ignore[reportArgumentType]  # None is documented
    iou = np.ravel(sklearn.metrics.jaccard_score(*flat, average=None))[1:]  # pyright: ignore[reportArgumentType]  # None is documented
    assert [score.dice for score in scored] == pytest.approx(dice.tolist(), abs=EXACT)
    assert [score.iou for score in scored] == pytest.approx(iou.tolist(), abs=EXACT)
    np.testing.assert_array_equal(confusion(prediction, truth, 4), sklearn.metrics.confusion_matrix(*flat))
    # A volume is one case, and not the mean of its slices.
    slices = [scores(*pair, CLASSES)[0].dice for pair in zip(prediction, truth, strict=True)]
    assert abs(np.mean([dice for dice in slices if dice is not None]) - dice[0]) > 1e-6


def labels(*values: int) -> np.ndarray:
    return np.array(values, np.uint8)


@pytest.mark.parametrize(
    ("prediction", "truth", "dice", "iou", "state"),
    [
        (labels(0, 0), labels(0, 0), None, None, "absent"),
        (labels(0, 0), labels(1, 0), 0.0, 0.0, "missed"),
        (labels(1, 1), labels(0, 0), 0.0, 0.0, "false alarm"),
        (labels(1, 0), labels(0, 1), 0.0, 0.0, "present"),
        (labels(1, 1), labels(1, 1), 1.0, 1.0, "present"),
        (labels(1, 1), labels(1, 0), 2 / 3, 1 / 2, "present"),
    ],
)
def test_scores_report_dice_iou_and_state_for_each_kind_of_case(prediction, truth, dice, iou, state):
    assert scores(prediction, truth, CLASSES)[0] == ClassScore(
        name="liver",
        dice=dice,
        iou=iou,
        truth_pixels=int(truth.sum()),
        predicted_pixels=int(prediction.sum()),
        correct_pixels=int((prediction & truth).sum()),
        state=state,
    )


def test_rows_are_the_truth_and_columns_the_prediction():
    matrix = confusion(labels(1, 1, 2), labels(0, 1, 3), 4)
    assert matrix.dtype == np.int64
    expected = np.zeros((4, 4), int)
    expected[0, 1] = expected[1, 1] = expected[3, 2] = 1
    np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**9])
def test_two_hundred_classes_are_counted_one_by_one_whatever_the_chunks(chunk, monkeypatch):
    rng = np.random.default_rng(0)
    prediction, truth = rng.integers(0, 200, (2, 5, 13), dtype=np.uint8)
    expected = np.zeros((200, 200), int)
    np.add.at(expected, (truth, prediction), 1)
    monkeypatch.setattr(overlap, "CHUNK_PIXELS", chunk)
    np.testing.assert_array_equal(confusion(prediction, truth, 200), expected)


def test_a_view_that_is_not_contiguous_is_counted_pixel_by_pixel():
    rng = np.random.default_rng(0)
    prediction, truth = rng.integers(0, 4, (2, 6, 8), dtype=np.uint8)
    np.testing.assert_array_equal(
        confusion(prediction.T[::2], truth.T[::2], 4), confusion(prediction.T[::2].copy(), truth.T[::2].copy(), 4)
    )
    assert scores(np.asfortranarray(prediction), truth, CLASSES) == scores(prediction, truth, CLASSES)


def test_labels_without_a_class_and_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="the prediction holds label 4, but there are 4 classes"):
        scores(labels(0, 4), labels(0, 0), CLASSES)
    with pytest.raises(ValueError, match="the truth holds label 255, but there are 4 classes"):
        scores(labels(0, 1), labels(255, 0), CLASSES)
    with pytest.raises(ValueError, match=r"the prediction is \(2, 3\), but the truth is \(3, 2\)"):
        scores(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8), CLASSES)


def test_means_run_over_the_cases_that_have_the_class():
    liver = Classes(names=("background", "liver"))
    pairs = [  # prediction, truth
        (labels(1, 1, 0, 0), labels(1, 1, 0, 0)),  # Dice 1, IoU 1
        (labels(1, 1, 0, 0), labels(1, 0, 0, 0)),  # Dice 2/3, IoU 1/2
        (labels(0, 0, 0, 0), labels(0, 1, 0, 0)),  # missed: 0
        (labels(1, 0, 0, 0), labels(0, 0, 0, 0)),  # a false alarm enters no mean
        (labels(0, 0, 0, 0), labels(0, 0, 0, 0)),  # nor does an absent class
    ]
    (mean,) = mean_scores([scores(prediction, truth, liver) for prediction, truth in pairs])
    assert mean.name == "liver"
    assert mean.dice == pytest.approx((1 + 2 / 3 + 0) / 3, abs=EXACT)
    assert mean.iou == pytest.approx((1 + 1 / 2 + 0) / 3, abs=EXACT)
    assert (mean.cases, mean.missed, mean.false_alarms, mean.absent) == (3, 1, 1, 1)


def test_a_class_that_no_case_has_gets_no_figure():
    empty = labels(0, 0)
    means = mean_scores([scores(empty, empty, CLASSES), scores(labels(0, 2), empty, CLASSES)])
    assert [mean.name for mean in means] == ["liver", "spleen", "tumour"]
    assert [(mean.dice, mean.iou, mean.cases) for mean in means] == [(None, None, 0)] * 3
    assert [(mean.false_alarms, mean.absent) for mean in means] == [(0, 2), (1, 1), (0, 2)]
    assert mean_scores([]) == ()


def test_cases_with_different_classes_have_no_mean():
    one, other = Classes(names=("background", "liver")), Classes(names=("background", "spleen"))
    with pytest.raises(ValueError, match="different classes"):
        mean_scores([scores(labels(0), labels(0), one), scores(labels(0), labels(0), other)])
