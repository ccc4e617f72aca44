"""Dataclasses of ``report.json`` for masks. Dice and IoU are 0 … 1."""

from dataclasses import dataclass
from typing import Literal

from medseg_trt.metrics.overlap import ClassScore, MeanScore

Unit = Literal["cases", "slices"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Agreement of a row's logits and labels with the reference's on the same images."""

    max_abs_error: float  # of the logits
    labels: float  # share of the network's pixels with the same label, 0 … 1
    sqnr_db: float | None  # signal to rounding noise of the logits; None: they are equal

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseAccuracy:
    """The scores of one case by class."""

    case: str
    scores: tuple[ClassScore, ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceCounts:
    """Pixel counts of every class except the background in one slice: correct, predicted, true."""

    case: str
    slice: int
    counts: tuple[tuple[int, int, int], ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Scores of a row's masks at the size of the images."""

    metric: str  # "Dice", or "agreement with the reference in Dice" for images without masks
    mean_dice: float | None  # over the classes that occur
    mean_iou: float | None
    mean_hd95: float | None
    hd95_unit: str | None  # "mm" or "pixels"; None: HD95 was not measured
    means: tuple[MeanScore, ...]  # by class, over the cases that have it
    cases: tuple[CaseAccuracy, ...]
    slices: tuple[SliceCounts, ...]  # for the bootstrap where there are few cases

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A row's score minus the reference's, paired on the same images."""

    metric: Literal["Dice", "IoU", "HD95"]
    class_name: str | None  # None: the mean over the classes
    unit: Unit  # that is paired and resampled
    pairs: int
    reference: float
    candidate: float
    difference: float  # candidate minus reference
    low: float  # the interval of the difference
    high: float
    confidence: float | None  # of the interval, 0 … 1; None: too few pairs, low and high are their range

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The result of a non-inferiority test of a row's Dice against the reference's."""

    holds: bool
    reference: float  # mean Dice as in the gate of a build: a false alarm counts 0
    candidate: float
    drop: float  # negative where the row is better
    drop_low: float  # the interval
    drop_high: float
    limit: float  # that the upper end must not exceed
    confidence: float  # of the interval, 0 … 1
    unit: Unit
    pairs: int
    words: str

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstCase:
    """One of the slices with the largest loss of Dice against the reference."""

    case: str
    slice: int
    reference_dice: float | None  # mean over the classes that occur in the slice
    candidate_dice: float | None
    difference: float  # candidate minus reference
    changed_pixels: int  # with another label than the reference's

    __pydantic_config__ = {"extra": "forbid"}
