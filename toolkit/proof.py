"""Compare a network with the PyTorch reference: by its logits where it must be the same, by its masks where it may not.

The reference's own answers are computed once.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import AccuracyGateError
from medseg_trt.export.gate import Verdict, compare
from medseg_trt.export.verify import labels_of, run_in_batches, verify
from medseg_trt.reference_images import ReferenceImages
from medseg_trt.segment import Run
from medseg_trt.spec import BuildSpec, to_dict


@dataclass(kw_only=True)
class Proof:
    """The reference, what it is shown, and the limits."""

    reference: Run
    images: ReferenceImages
    spec: BuildSpec
    _logits: ndarray = field(init=False)
    _masks: list[ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self._logits = run_in_batches(self.reference, self.images.judged.inputs, 1)
        self._masks = self.images.judged.masks(self._logits)

    def exact(self, run: Run) -> dict[str, Any]:
        """Compare the logits, image by image, batch by batch, row by row.

        Raises:
            AccuracyGateError: they differ by more than a float32 computation in another order does.
        """
        limits = {"max_abs_error": self.spec.max_abs_error, "min_agreement": self.spec.min_agreement}
        return to_dict(verify(run, self.reference, self.images.verified, self.images.description, **limits))

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return self._logits.shape[1]

    def verdict(self, run: Run) -> tuple[Verdict, dict[str, Any]]:
        """Judge the masks of a network, and also say how far its logits are off."""
        return self.verdict_of(run_in_batches(run, self.images.judged.inputs, 1))

    def verdict_of(self, logits: ndarray) -> tuple[Verdict, dict[str, Any]]:
        """Judge the masks that the logits of the judged images make; logits that are not finite make none."""
        judged = self.images.judged
        if not np.isfinite(logits).all():
            raise AccuracyGateError("the logits are not finite: a number is too large for its type")
        reference, candidate = (judged.counts(masks, self._masks) for masks in (self._masks, judged.masks(logits)))
        verdict = compare(reference, candidate, judged.cases, self.spec.max_dice_drop, judged.metric)
        error = self.error_of(logits)
        return verdict, {
            "images": self.images.description,
            "num_images": len(judged.inputs),
            "max_abs_error": float(np.abs(logits - self._logits).max()),
            "agreement": float((labels_of(logits) == labels_of(self._logits)).mean()),
            "sqnr_db": -10 * float(np.log10(error)) if error else None,
            "gate": {**to_dict(verdict), "holds": verdict.holds},
        }

    def error_of(self, logits: ndarray) -> float:
        """Return the squared error of the judged images' logits, relative to the reference's squares."""
        noise = np.square(logits - self._logits, dtype=np.float64).sum()
        return float(noise / np.square(self._logits, dtype=np.float64).sum())
