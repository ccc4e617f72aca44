"""Four evaluation protocols of published results: what is pooled, and what an empty mask scores.

``volume`` is recommended: it hides no empty case. ``unext_batch`` and ``volume_transunet`` reproduce published code,
for values that are comparable with theirs; ``per_image`` is UNeXt's formula without its dependence on
the size of a batch. With the pixels of a class that are in both masks and those that are in either:

==================  =================================================  =====================================
mode                where it is in both                                in neither / missed / false alarm
==================  =================================================  =====================================
volume              Dice, IoU and HD95 of a case at its own size       left out / 0, HD95 left out / left out
per_image           IoU = (both + s) / (either + s), s = 1e-5, Dice =  1 / about 0 / about 0
                    2 IoU / (1 + IoU), of an image at the network's
                    size
unext_batch         the same of a batch, all pixels of it together     1 / about 0 / about 0
volume_transunet    MedPy's Dice and HD95 of a case, in voxels         0, HD95 0 / 0, HD95 0 / 1, HD95 0
==================  =================================================  =====================================

Sources: UNeXt-pytorch ``metrics.py`` and ``val.py``; Beckschen/TransUNet ``utils.py``, ``calculate_metric_percase``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from medseg_trt.metrics.overlap import ClassScore

SMOOTH = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricMode:
    """One evaluation protocol."""

    unit: Literal["case", "image", "batch"]  # unit that is scored before the mean; a case at its own size
    rule: Callable[[ClassScore], ClassScore]  # converts the scores of one class in one unit
    every_unit_counts: bool  # in the mean; otherwise only those whose truth has the class
    hd95: Literal["never", "if wanted", "always"]
    text: str  # description for reports


def as_counted(score: ClassScore) -> ClassScore:
    """Return the score of ``metrics.overlap.scores`` unchanged."""
    return score


def unext(score: ClassScore) -> ClassScore:
    """Return UNeXt's smoothed IoU and the Dice derived from it."""
    both = score.correct_pixels
    either = score.truth_pixels + score.predicted_pixels - both
    iou = (both + SMOOTH) / (either + SMOOTH)
    return replace(score, iou=iou, dice=2 * iou / (iou + 1))


def transunet(score: ClassScore) -> ClassScore:
    """Return TransUNet's pair of Dice and HD95: a false alarm is perfect, a missed and an absent class are (0, 0)."""
    if score.state == "present":
        return replace(score, iou=None)
    return replace(score, iou=None, dice=1.0 if score.state == "false alarm" else 0.0, hd95=0.0)


METRICS: Mapping[str, MetricMode] = {
    "volume": MetricMode(
        unit="case",
        rule=as_counted,
        every_unit_counts=False,
        hd95="if wanted",
        text="every case at its own size; the mean is over the cases whose mask has the class, a missed one counts 0",
    ),
    "per_image": MetricMode(
        unit="image",
        rule=unext,
        every_unit_counts=True,
        hd95="never",
        text="every image at the network's size, IoU = (both + 1e-5) / (either + 1e-5), Dice = 2 IoU / (1 + IoU); "
        "where the class is in neither mask both are 1, where it is in one alone about 0",
    ),
    "unext_batch": MetricMode(
        unit="batch",
        rule=unext,
        every_unit_counts=True,
        hd95="never",
        text="as UNeXt counts: all pixels of a batch together, at the network's size, then the mean over the batches, "
        "by their images; it depends on the size of the batch and on the order of the files",
    ),
    "volume_transunet": MetricMode(
        unit="case",
        rule=transunet,
        every_unit_counts=True,
        hd95="always",
        text="as TransUNet counts: every case at its own size, HD95 in voxels; a false alarm counts as Dice 1 and "
        "HD95 0, a missed and an absent class as Dice 0 and HD95 0",
    ),
}
