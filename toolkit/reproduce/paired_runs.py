"""Say whether one network is better than another, from pairs of runs that share their seed, split and test images.

Chance comes in twice: through the images that happen to be tested, and through the seed and the split of a training.
The bootstrap draws test images anew, the same for all runs of a split, and then the runs. It is too narrow where there
are few runs; Student's t interval over the runs' differences is not, and is widened for splits of one data set, whose
training images overlap. A gain counts where both exclude zero.

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

CONFIDENCE = 0.95  # that the interval holds the true gain
RESAMPLES = 5_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """One figure of one run: of every test case, image or batch, and of every class."""

    names: tuple[str, ...]  # of the units
    weights: tuple[float, ...]  # how many images each is
    values: tuple[tuple[float | None, ...], ...]  # units, classes; None where there is no figure
    mean: float | None  # as the metric counts it

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """The scores of two networks that were trained with one seed on one split."""

    split: str
    before: Scores
    after: Scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """By how much the second network's figure is larger, and how sure that is."""

    estimate: float  # the mean over runs, of what both networks have a figure for
    bootstrap: tuple[float, float]  # over test cases and runs
    student: tuple[float, float] | None  # over runs; None for a single pair of them
    runs: int
    units: int  # test cases, images or batches, of all splits

    @property
    def is_distinguishable(self) -> bool:
        """Whether zero lies outside of both intervals."""
        intervals = (self.bootstrap, self.student)
        return all(each is not None and (each[0] > 0 or each[1] < 0) for each in intervals)

    def sentence(self, *, lower_is_better: bool = False) -> str:
        """Say in plain words whether the language block helps."""
        change = f"{self.estimate:+.4g}, bootstrap {_text(self.bootstrap)}"
        if self.student is None:
            return f"One pair of runs cannot tell whether the LLaMA block's gain is other than zero ({change})."
        change += f", t over {self.runs} pairs of runs {_text(self.student)}"
        if not self.is_distinguishable:
            return f"The LLaMA block's gain is not distinguishable from zero ({change})."
        helps = (self.estimate > 0) != lower_is_better
        what = "gain is distinguishable from zero" if helps else "loss is distinguishable from zero: it does harm"
        return f"The LLaMA block's {what} ({change})."


def scores_of(found: Evaluation, figure: str) -> Scores:
    """Return one figure, "dice", "iou" or "hd95", of an evaluation."""
    return Scores(
        names=tuple(case.case for case in found.cases),
        weights=tuple(float(case.images) for case in found.cases),
        values=tuple(tuple(_counted(score, figure, found) for score in case.scores) for case in found.cases),
        mean=getattr(found, f"mean_{figure}"),
    )


def gain(pairs: Sequence[Pair], test_over_train: float = 0.0) -> Gain | None:
    """Bound the gain of the second networks over the first; None where nothing has a figure in both.

    Args:
        pairs: the runs.
        test_over_train: cases of the test split divided by those of the training split, where several splits of one
            data set were taken; 0 where all runs share one split.

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
    low, high = np.nanquantile(bootstrap, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Gain(
        estimate=float(runs.mean()),
        bootstrap=(float(low), float(high)),
        student=_student(runs, test_over_train),
        runs=len(runs),
        units=sum(counts.shape[1] for counts in drawn.values()),
    )


def mean_and_deviation(scores: Sequence[Scores]) -> tuple[float, float | None] | None:
    """Return the mean over runs and their standard deviation (of the sample); None where a run has no figure."""
    found = [each.mean for each in scores if each.mean is not None]
    if not found or len(found) < len(scores):
        return None
    return float(np.mean(found)), float(np.std(found, ddof=1)) if len(found) > 1 else None


def _counted(score: ClassScore, figure: str, found: Evaluation) -> float | None:
    """Return a class's figure in one unit, where the metric's mean counts it."""
    return getattr(score, figure) if METRICS[found.metric].every_unit_counts or score.truth_pixels else None


def _array(scores: Scores) -> Float64[ndarray, "units classes"]:
    return np.array([[np.nan if value is None else value for value in unit] for unit in scores.values], np.float64)


def _means(
    weights: Float64[ndarray, "draws units"], values: Float64[ndarray, "units classes"]
) -> Float64[ndarray, " draws"]:
    """Return, for every draw, the mean over classes of the weighted mean over units, without what has no figure."""
    there = np.isfinite(values)
    total = weights @ np.where(there, values, 0.0)
    count = weights @ there.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_class = total / count
    counted = np.isfinite(of_class)
    number = counted.sum(axis=1)
    return np.where(number > 0, np.where(counted, of_class, 0.0).sum(axis=1) / np.maximum(number, 1), np.nan)


def _student(runs: Float64[ndarray, " runs"], test_over_train: float) -> tuple[float, float] | None:
    if len(runs) < 2:
        return None
    from scipy.stats import t

    error = np.sqrt((1 / len(runs) + test_over_train) * runs.var(ddof=1))
    margin = float(t.ppf((1 + CONFIDENCE) / 2, len(runs) - 1) * error)
    return float(runs.mean()) - margin, float(runs.mean()) + margin


def _text(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.4g} … {interval[1]:+.4g}"
