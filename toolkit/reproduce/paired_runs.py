"""Compare two networks from pairs of runs that share their seed, split and test images.

There are two sources of variance: the sample of test images, and the seed and split of the training. The bootstrap
resamples test images, the same for all runs of a split, and then the runs; for few runs it is too narrow. Student's t
interval over the differences of the runs is not, and it is widened for splits of one data set, whose training images
overlap. A gain is distinguishable from zero if both intervals exclude zero.

Sources: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapter 8; Nadeau & Bengio 2003, "Inference for
the Generalization Error", eq. 9.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from medseg_trt.metrics.overlap import ClassScore
from medseg_trt.metrics.protocols import METRICS
from medseg_trt.train.evaluate import Evaluation

GAIN_CONFIDENCE = 0.95  # of both intervals of a single gain
RESAMPLES = 5_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """One figure of one run, by unit (test case, image or batch) and class."""

    names: tuple[str, ...]  # of the units
    weights: tuple[float, ...]  # number of images of each unit
    values: tuple[tuple[float | None, ...], ...]  # units, classes; None: no figure
    mean: float | None  # as in the metric mode

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The scores of two networks that were trained with one seed on one split."""

    split: str
    before: Scores
    after: Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """The difference of the second network's figure and the first's, with two intervals."""

    estimate: float  # the mean over runs, of units with a figure for both networks
    bootstrap: tuple[float, float]  # over test cases and runs
    student: tuple[float, float] | None  # over runs; None for a single pair
    runs: int
    units: int  # test cases, images or batches, of all splits

    @property
    def is_distinguishable(self) -> bool:
        """Whether zero lies outside of both intervals."""
        intervals = (self.bootstrap, self.student)
        return all(interval is not None and (interval[0] > 0 or interval[1] < 0) for interval in intervals)

    def sentence(self, subject: str = "The LLaMA block's", *, lower_is_better: bool = False) -> str:
        """Return a sentence on whether there is a gain; ``subject`` names whose."""
        change = f"{self.estimate:+.4g}, bootstrap {_text(self.bootstrap)}"
        if self.student is None:
            whose = f"{subject[0].lower()}{subject[1:]}"
            return f"One pair of runs cannot tell whether {whose} gain is other than zero ({change})."
        change += f", t over {self.runs} pairs of runs {_text(self.student)}"
        if not self.is_distinguishable:
            return f"{subject} gain is not distinguishable from zero ({change})."
        helps = (self.estimate > 0) != lower_is_better
        effect = "gain is distinguishable from zero" if helps else "loss is distinguishable from zero"
        return f"{subject} {effect} ({change})."


def scores_of(evaluation: Evaluation, figure: str) -> Scores:
    """Return one figure, "dice", "iou" or "hd95", of an evaluation."""
    return Scores(
        names=tuple(case.case for case in evaluation.cases),
        weights=tuple(float(case.images) for case in evaluation.cases),
        values=tuple(tuple(_counted(score, figure, evaluation) for score in case.scores) for case in evaluation.cases),
        mean=getattr(evaluation, f"mean_{figure}"),
    )


def gain(pairs: Sequence[Pair], test_over_train: float = 0.0, confidence: float = GAIN_CONFIDENCE) -> Gain | None:
    """Return the gain of the second networks over the first; None if no unit has a figure for both.

    Args:
        pairs: the runs.
        test_over_train: number of test cases divided by number of training cases if there are several splits of one
            data set; 0 if all runs share one split.
        confidence: of both intervals, 0 … 1; higher where several gains are judged together.

    Raises:
        ValueError: the two runs of a pair were not scored on the same cases.
    """
    random = np.random.default_rng(0)
    drawn: dict[str, ndarray] = {}
    means, resampled = [], []
    for pair in pairs:
        if pair.before.names != pair.after.names:
            raise ValueError(f"the two runs of split {pair.split} were not scored on the same cases")
        differences = _array(pair.after) - _array(pair.before)
        weights, count = np.array(pair.before.weights), len(pair.before.names)
        if pair.split not in drawn:
            drawn[pair.split] = random.multinomial(count, np.full(count, 1 / count), RESAMPLES)
        means.append(_means(weights[None], differences)[0])
        resampled.append(_means(drawn[pair.split] * weights, differences))
    runs = np.array(means)
    if not np.isfinite(runs).all():
        return None
    chosen = random.integers(len(runs), size=(RESAMPLES, len(runs)))
    bootstrap = np.nanmean(np.array(resampled)[chosen, np.arange(RESAMPLES)[:, None]], axis=1)
    low, high = np.nanquantile(bootstrap, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Gain(
        estimate=float(runs.mean()),
        bootstrap=(float(low), float(high)),
        student=_student(runs, test_over_train, confidence),
        runs=len(runs),
        units=sum(counts.shape[1] for counts in drawn.values()),
    )


def mean_and_deviation(scores: Sequence[Scores]) -> tuple[float, float | None] | None:
    """Return the mean over runs and their standard deviation (of the sample); None if a run has no figure."""
    means = [score.mean for score in scores if score.mean is not None]
    if not means or len(means) < len(scores):
        return None
    return float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else None


def _counted(score: ClassScore, figure: str, evaluation: Evaluation) -> float | None:
    """Return a class's figure in one unit if the mean of the metric mode includes it."""
    return getattr(score, figure) if METRICS[evaluation.metric].every_unit_counts or score.truth_pixels else None


def _array(scores: Scores) -> Float64[ndarray, "units classes"]:
    return np.array([[np.nan if value is None else value for value in unit] for unit in scores.values], np.float64)


def _means(
    weights: Float64[ndarray, "draws units"], values: Float64[ndarray, "units classes"]
) -> Float64[ndarray, " draws"]:
    """Return the mean over classes of the weighted mean over units for every draw; missing figures are left out."""
    there = np.isfinite(values)
    total = weights @ np.where(there, values, 0.0)
    count = weights @ there.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_class = total / count
    counted = np.isfinite(of_class)
    number = counted.sum(axis=1)
    return np.where(number > 0, np.where(counted, of_class, 0.0).sum(axis=1) / np.maximum(number, 1), np.nan)


def _student(runs: Float64[ndarray, " runs"], test_over_train: float, confidence: float) -> tuple[float, float] | None:
    if len(runs) < 2:
        return None
    from scipy.stats import t

    error = np.sqrt((1 / len(runs) + test_over_train) * runs.var(ddof=1))
    margin = float(t.ppf((1 + confidence) / 2, len(runs) - 1) * error)
    return float(runs.mean()) - margin, float(runs.mean()) + margin


def _text(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.4g} … {interval[1]:+.4g}"
