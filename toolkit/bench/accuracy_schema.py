"""What ``report.json`` holds of the masks. Dice and IoU are 0 … 1."""

from dataclasses import dataclass
from typing import Literal

from medseg_trt.metrics.overlap import ClassScore, MeanScore

Unit = Literal["cases", "slices"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a row's answers are from the reference's on the same images, whatever the truth."""

    max_abs_error: float  # of the logits
    labels: float  # share of the network's pixels with the same label, 0 … 1
    sqnr_db: float | None  # signal to rounding noise of the logits; None: they are equal

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseAccuracy:
    """The scores of one case, class by class."""

    case: str
    scores: tuple[ClassScore, ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceCounts:
    """The pixels of every class but the background in one slice: right, in the mask, in the truth."""

    case: str
    slice: int
    counts: tuple[tuple[int, int, int], ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How good a row's masks are, at the images' own size."""

    metric: str  # "Dice", or "agreement with the reference in Dice" where nobody has drawn masks
    mean_dice: float | None  # over the classes that occur
    mean_iou: float | None
    mean_hd95: float | None
    hd95_unit: str | None  # "mm" or "pixels"; None: HD95 was not measured
    means: tuple[MeanScore, ...]  # by class, over the cases that have it
    cases: tuple[CaseAccuracy, ...]
    slices: tuple[SliceCounts, ...]  # what a bootstrap can resample where there are few cases

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A row's score minus the reference's, paired on the same images."""

    metric: Literal["Dice", "IoU", "HD95"]
    class_name: str | None  # None: the mean over the classes
    unit: Unit  # what was paired and resampled
    pairs: int
    reference: float
    candidate: float
    difference: float  # candidate minus reference
    low: float  # the interval of the difference
    high: float
    confidence: float | None  # of the interval, 0 … 1; None: the ends are the range of too few pairs for an interval

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a row's masks are as good as the reference's: a test of non-inferiority in Dice."""

    holds: bool
    reference: float  # mean Dice, as the gate of a build counts it: a class found where there is none counts 0
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
    """A slice on which a row does worst against the reference."""

    case: str
    slice: int
    reference_dice: float | None  # mean over the classes that occur in the slice
    candidate_dice: float | None
    difference: float  # candidate minus reference
    changed_pixels: int  # with another label than the reference's

    __pydantic_config__ = {"extra": "forbid"}
