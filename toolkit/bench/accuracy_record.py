"""What is recorded of one network while all of them run on the same cases."""

from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray

from medseg_trt.bench.accuracy_schema import Agreement, CaseAccuracy, SliceCounts, WorstCase
from medseg_trt.bench.missing import Missing


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SliceImages:
    """The arrays of a worst slice."""

    pixels: ndarray  # (height, width, channels), raw
    truth: ndarray | None  # labels
    reference: ndarray
    candidate: ndarray


@dataclass(kw_only=True)
class AccuracyRecord:
    """The scores of one network so far."""

    cases: list[CaseAccuracy] = field(default_factory=list[CaseAccuracy])
    slices: list[SliceCounts] = field(default_factory=list[SliceCounts])
    worst: list[tuple[WorstCase, SliceImages]] = field(default_factory=list[tuple[WorstCase, SliceImages]])
    failure: str | None = None
    max_abs_error: float = 0.0
    same_labels: int = 0
    all_labels: int = 0
    noise: float = 0.0
    power: float = 0.0

    def agreement(self) -> Agreement | Missing:
        """Return the agreement with the reference."""
        if not self.all_labels:
            return Missing(reason=self.failure or "there is no image")
        return Agreement(
            max_abs_error=self.max_abs_error,
            labels=self.same_labels / self.all_labels,
            sqnr_db=10 * float(np.log10(self.power / self.noise)) if self.noise and self.power else None,
        )
