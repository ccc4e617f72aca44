"""A gain of the block counts where chance, in the test images and in the trainings, cannot explain it."""

import math

import numpy as np
import pytest
from scipy import stats

from medseg_trt.reproduce.paired_runs import Gain, Pair, Scores, gain, mean_and_deviation, scores_of
from medseg_trt.spec import Classes
from medseg_trt.train.evaluate import CaseScores, Evaluation


def scores(values, weights=None, names=None):
    rows = tuple(tuple(None if math.isnan(value) else float(value) for value in row) for row in np.atleast_2d(values))
    return Scores(
        names=names or tuple(f"case{index}" for index in range(len(rows))),
        weights=tuple(map(float, weights or [1] * len(rows))),
        values=rows,
        mean=float(np.nanmean(values)),
    )


def pairs(differences, split="41", level=0.7, seed=0):
    """Return a pair a run, whose scores of every case (rows) differ by as much as is said."""
    random = np.random.default_rng(seed)
    made = []
    for difference in differences:
        before = level + random.normal(0, 0.05, np.shape(difference))
        made.append(Pair(split=split, before=scores(before), after=scores(before + difference)))
    return made


def bounded(chosen, test_over_train=0.0) -> Gain:
    measured = gain(chosen, test_over_train)
    assert measured is not None
    return measured


def test_the_estimate_is_the_mean_of_classes_means_by_weight():
    nan = math.nan
    before = scores([[0.5, nan], [0.5, 0.2], [0.1, 0.2]], weights=[8, 8, 2])
    after = scores([[0.6, 0.9], [0.8, 0.6], [0.1, nan]], weights=[8, 8, 2])
    measured = gain([Pair(split="41", before=before, after=after)])
    first = (8 * 0.1 + 8 * 0.3 + 2 * 0.0) / 18
    second = 0.4  # of the second unit alone: in the others one of the two has no figure
    assert measured is not None
    assert measured.estimate == pytest.approx((first + second) / 2)
    assert (measured.runs, measured.units, measured.student) == (1, 3, None)


def test_a_true_gain_counts_and_noise_does_not():
    random = np.random.default_rng(1)
    better = bounded(pairs([random.normal(0.03, 0.02, (40, 1)) for _ in range(5)]))
    noise = bounded(pairs([random.normal(0.0, 0.02, (40, 1)) for _ in range(5)]))
    worse = bounded(pairs([random.normal(-0.03, 0.02, (40, 1)) for _ in range(5)]))
    assert "gain is distinguishable from zero (" in better.sentence()
    assert "gain is not distinguishable from zero (" in noise.sentence()
    assert "loss is distinguishable from zero" in worse.sentence()
    assert "loss is distinguishable" in better.sentence(lower_is_better=True)  # a larger distance is worse
    assert "gain is distinguishable" in worse.sentence(lower_is_better=True)


def test_a_gain_that_holds_on_few_images_or_in_few_runs_alone_does_not_count():
    random = np.random.default_rng(2)
    of_one_case = np.full((12, 1), -0.01)
    of_one_case[0] = 0.5  # every run finds it, so that t over runs is sure
    one_case = bounded(pairs([of_one_case + random.normal(0, 1e-3, (12, 1)) for _ in range(3)]))
    assert one_case.student is not None
    assert one_case.student[0] > 0
    assert one_case.bootstrap[0] < 0
    assert not one_case.is_distinguishable
    lucky = bounded(pairs([np.full((40, 1), 0.04), np.full((40, 1), 0.01), np.full((40, 1), 0.02)]))
    assert lucky.bootstrap[0] > 0  # a bootstrap of three runs never reaches below the smallest
    assert lucky.student is not None
    assert lucky.student[0] < 0
    assert not lucky.is_distinguishable


def test_one_pair_of_runs_cannot_tell():
    measured = bounded(pairs([np.full((40, 1), 0.1)]))
    assert measured.bootstrap[0] > 0
    assert measured.sentence().startswith(
        "One pair of runs cannot tell whether the LLaMA block's gain is other than zero"
    )


def test_the_interval_over_runs_is_students_and_wider_for_overlapping_splits():
    of_runs = [0.01, 0.02, 0.04]
    same = pairs([np.full((6, 1), value) for value in of_runs])
    expected = stats.t.interval(0.95, 2, np.mean(of_runs), stats.sem(of_runs))
    assert bounded(same).student == pytest.approx(expected)
    half = np.std(of_runs, ddof=1) * np.sqrt(1 / 3 + 0.25) * stats.t.ppf(0.975, 2)
    assert bounded(same, 0.25).student == pytest.approx((np.mean(of_runs) - half, np.mean(of_runs) + half))


def test_the_bootstrap_covers_a_true_gain_as_often_as_it_says():
    """Cases' differences that all runs of a split share: drawn anew for every run by itself, they would seem surer."""
    random, missed, trials = np.random.default_rng(3), 0, 60
    for _ in range(trials):
        of_case = random.normal(0.02, 0.05, (30, 1))
        measured = bounded(pairs([of_case + random.normal(0, 0.005, (30, 1)) for _ in range(6)]))
        missed += not measured.bootstrap[0] <= 0.02 <= measured.bootstrap[1]
    # 5 % of 60 are 3, with a deviation of 1.7; intervals that are 1 / sqrt(6) as wide would miss some 40 %.
    assert missed <= 10


def test_runs_that_were_scored_on_other_cases_are_no_pair():
    one, other = scores([[0.5]]), scores([[0.5]], names=("another",))
    with pytest.raises(ValueError, match="not scored on the same cases"):
        gain([Pair(split="41", before=one, after=other)])


def test_without_a_figure_there_is_no_gain_and_no_mean():
    nothing = Scores(names=("case",), weights=(1.0,), values=((None,),), mean=None)
    assert gain([Pair(split="41", before=nothing, after=nothing)]) is None
    assert mean_and_deviation([nothing]) is None


def test_the_mean_over_runs_has_a_deviation_where_there_are_two():
    assert mean_and_deviation([scores([[0.5]])]) == (0.5, None)
    assert mean_and_deviation([scores([[0.5]]), scores([[0.7]])]) == pytest.approx((0.6, np.std([0.5, 0.7], ddof=1)))


@pytest.mark.parametrize(("metric", "value"), [("volume", None), ("volume_transunet", 1.0)])
def test_a_figure_that_the_metric_leaves_out_of_its_mean_is_left_out(metric, value):
    """A false alarm: ``volume`` averages over the cases whose mask has the class, TransUNet over all."""
    from medseg_trt.metrics.overlap import mean_scores
    from medseg_trt.metrics.overlap import scores as score
    from medseg_trt.metrics.protocols import METRICS

    truth, classes = np.zeros((1, 4, 4), np.uint8), Classes(names=("background", "lesion"))
    prediction = truth.copy()
    prediction[0, 0, 0] = 1
    of_case = tuple(map(METRICS[metric].rule, score(prediction, truth, classes)))
    means = mean_scores([of_case], over_all=METRICS[metric].every_unit_counts)
    measured = Evaluation(cases=(CaseScores(case="a", scores=of_case),), means=means, metric=metric)
    assert scores_of(measured, "dice").values == ((value,),)
