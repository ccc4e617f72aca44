"""Compute Dice and IoU of predicted labels per class, and report empty cases separately.

With true positive (tp), false positive (fp) and false negative (fn) pixels, Dice is ``2 tp / (2 tp + fp + fn)`` and
IoU is ``tp / (tp + fp + fn)``; no constant is added to either. Where a class is in neither mask, both are 0 / 0: the
class is "absent", has no value and enters no mean. HD95 (``hausdorff``) exists only where the class is in both; how
often it does not is counted beside the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from medseg_trt.metrics.hausdorff import hd95
from medseg_trt.spec import Classes

State = Literal["present", "absent", "missed", "false alarm"]
STATES: dict[tuple[bool, bool], State] = {  # (in the truth, in the prediction)
    (True, True): "present",
    (False, False): "absent",
    (True, False): "missed",
    (False, True): "false alarm",
}
CHUNK_PIXELS = 1 << 22  # counted at once: ``bincount`` makes an int64 of every pixel, 32 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassScore:
    """The scores of one class in one case.

    ``state`` is "present" (in both), "absent" (in neither; ``dice`` and ``iou`` are None), "missed" (only in the truth)
    or "false alarm" (only in the prediction); the last two score 0.
    """

    name: str
    dice: float | None  # 0 … 1
    iou: float | None  # 0 … 1
    truth_pixels: int
    predicted_pixels: int
    correct_pixels: int  # in both
    state: State
    hd95: float | None = None  # in the unit of the spacing that was given; None unless it was asked for and exists


@dataclass(frozen=True, kw_only=True, slots=True)
class MeanScore:
    """The mean scores of one class over several cases.

    The means of Dice and IoU run over the ``cases`` whose truth has the class, missed ones included as 0; that of HD95
    over those of them that are not missed. None where there is none. In some of ``protocols`` the means run over
    all cases, and a case may be an image or a batch.
    """

    name: str
    dice: float | None  # 0 … 1
    iou: float | None  # 0 … 1
    cases: int  # whose truth has the class
    missed: int
    false_alarms: int
    absent: int
    hd95: float | None = None

    @property
    def present(self) -> int:
        """The number of cases with the class in the truth and in the prediction."""
        return self.cases - self.missed


def scores(
    prediction: UInt8[ndarray, "..."],
    truth: UInt8[ndarray, "..."],
    classes: Classes,
    hd95_spacing: Sequence[float] | None = None,
) -> tuple[ClassScore, ...]:
    """Score every class except the background, for one 2-D image or one whole volume.

    Args:
        prediction: labels.
        truth: labels of the same shape.
        classes: their names.
        hd95_spacing: the distance between pixels along each axis; None computes no HD95.

    Raises:
        ValueError: the shapes differ, or a label has no name in ``classes``.
    """
    matrix = confusion(prediction, truth, len(classes.names))
    correct, truth_pixels, predicted_pixels = (
        counts.tolist() for counts in (matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0))
    )
    cases = list(zip(classes.names, correct, truth_pixels, predicted_pixels, strict=True))
    distances = [
        None if hd95_spacing is None else hd95(prediction == label, truth == label, hd95_spacing)
        for label in range(1, len(cases))
    ]
    return tuple(_class_score(*case, distance) for case, distance in zip(cases[1:], distances, strict=True))


def mean_scores(
    cases: Sequence[Sequence[ClassScore]], weights: Sequence[float] | None = None, *, over_all: bool = False
) -> tuple[MeanScore, ...]:
    """Average the ``scores`` of several cases per class; without a case the result is empty.

    Args:
        cases: the scores of each case.
        weights: the weight of each case; None weights them equally.
        over_all: also average over cases whose truth lacks the class, where they have a value.

    Raises:
        ValueError: the cases do not hold the same classes.
    """
    if len({tuple(score.name for score in case) for case in cases}) > 1:
        raise ValueError("the cases hold different classes; score all of them with the same class names")
    counting = [1.0] * len(cases) if weights is None else weights
    return tuple(_mean_score(scores_of_class, counting, over_all) for scores_of_class in zip(*cases, strict=True))


def confusion(
    prediction: UInt8[ndarray, "..."], truth: UInt8[ndarray, "..."], num_classes: int
) -> Int64[ndarray, "truth_classes predicted_classes"]:
    """Count the pixels of every pair of true label (row) and predicted label (column).

    Raises:
        ValueError: the shapes differ, or a label is not below ``num_classes``.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"the prediction is {prediction.shape}, but the truth is {truth.shape}")
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.size and labels.max() >= num_classes:
            raise ValueError(f"the {name} holds label {labels.max()}, but there are {num_classes} classes")
    counts = np.zeros(num_classes**2, np.int64)
    predicted, true = prediction.ravel(), truth.ravel()
    for start in range(0, true.size, CHUNK_PIXELS):
        part = slice(start, start + CHUNK_PIXELS)
        pairs = true[part].astype(np.intp) * num_classes + predicted[part]
        counts += np.bincount(pairs, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def _class_score(
    name: str, correct: int, truth_pixels: int, predicted_pixels: int, distance: float | None
) -> ClassScore:
    both, either = truth_pixels + predicted_pixels, truth_pixels + predicted_pixels - correct
    return ClassScore(
        name=name,
        dice=2 * correct / both if both else None,
        iou=correct / either if either else None,
        truth_pixels=truth_pixels,
        predicted_pixels=predicted_pixels,
        correct_pixels=correct,
        state=STATES[truth_pixels > 0, predicted_pixels > 0],
        hd95=distance,
    )


def _mean_score(scores_of_class: Sequence[ClassScore], weights: Sequence[float], over_all: bool) -> MeanScore:
    counted = [
        (score, weight)
        for score, weight in zip(scores_of_class, weights, strict=True)
        if over_all or score.truth_pixels
    ]
    states = [score.state for score in scores_of_class]
    return MeanScore(
        name=scores_of_class[0].name,
        dice=_mean([(score.dice, weight) for score, weight in counted]),
        iou=_mean([(score.iou, weight) for score, weight in counted]),
        cases=states.count("present") + states.count("missed"),
        missed=states.count("missed"),
        false_alarms=states.count("false alarm"),
        absent=states.count("absent"),
        hd95=_mean([(score.hd95, weight) for score, weight in counted]),
    )


def _mean(values: Sequence[tuple[float | None, float]]) -> float | None:
    """Return the weighted mean of the values that exist."""
    existing = [(value, weight) for value, weight in values if value is not None]
    return (
        sum(value * weight for value, weight in existing) / sum(weight for _, weight in existing) if existing else None
    )
