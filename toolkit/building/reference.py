"""Compare a network with the reference: by its logits where it must be the same, by its masks where it may not.

The reference is PyTorch, or for a network that came as an ONNX file, that file. Its logits are computed once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.building.contract import Contract
from medseg_trt.building.reference_images import JudgedImages, ReferenceImages
from medseg_trt.devices import CPU, ComputeDevice
from medseg_trt.errors import AccuracyGateError, ArtefactError
from medseg_trt.export.gate import GateVerdict, compare
from medseg_trt.export.verify import labels_of, run_in_batches, verify_logits
from medseg_trt.imaging.digest import image_digest
from medseg_trt.imaging.preprocess import resampled_size
from medseg_trt.imaging.segment import Run
from medseg_trt.sessions.base import Session
from medseg_trt.spec import BuildSpec, to_dict


@dataclass(kw_only=True)
class Reference:
    """The reference, its contract, what it is shown, and the limits."""

    network: Run
    contract: Contract
    images: ReferenceImages
    spec: BuildSpec
    device: ComputeDevice = CPU  # where graphs and engines are tried; PyTorch runs there, too, if it can
    deployed: Run | None = None  # the network with a replaced block, of which float32 graphs are copies
    _logits: ndarray = field(init=False)
    _masks: list[ndarray] = field(init=False)
    _remembering: Run = field(init=False)

    def __post_init__(self) -> None:
        self._logits = run_in_batches(self.network, self.images.judged.inputs, 1)
        if not np.isfinite(self._logits).all():
            raise ArtefactError(
                f"{self.name} gives logits that are NaN or infinite; its weights are damaged, or a number on the way "
                "is too large for float32"
            )
        self._masks = self._masks_of(self._logits)
        self._remembering = _remembering(self.deployed or self.network)

    @property
    def name(self) -> str:
        """What is compared with, for messages: "PyTorch", or what else runs the unchanged network."""
        return self.images.judged.reference

    def with_deployed(self, deployed: Run) -> "Reference":
        """Return the same reference for graphs of a network whose block is replaced.

        Logits are compared with that network's, masks still with those of the checkpoint's.
        """
        changed = copy.copy(self)
        changed.deployed, changed._remembering = deployed, _remembering(deployed)
        return changed

    def with_judged(self, judged: JudgedImages) -> "Reference":
        """Return a reference that judges the masks of other images."""
        return replace(self, images=replace(self.images, judged=judged))

    def check_logits(self, run: Run) -> dict[str, Any]:
        """Compare the logits, image by image, batch by batch, row by row.

        Raises:
            AccuracyGateError: they differ by more than a float32 computation in another order does.
        """
        limits = {"max_abs_error": self.spec.max_abs_error, "min_agreement": self.spec.min_agreement}
        return to_dict(verify_logits(run, self._remembering, self.images.verified, self.images.description, **limits))

    def check_masks_of_graph(self, masks: Sequence[ndarray]) -> dict[str, Any]:
        """Compare the masks that a graph made itself of the judged images with PyTorch's, pixel by pixel.

        Raises:
            AccuracyGateError: more pixels differ than where two classes tie.
        """
        same = [(mask == truth).mean() for mask, truth in zip(masks, self._masks, strict=True)]
        agreement = float(np.mean(same))
        if not agreement >= self.spec.min_agreement:
            raise AccuracyGateError(
                f"the masks that the graph makes agree with {self.name}'s on {100 * agreement:.2f} % of the pixels only"
            )
        return {"own_masks_agreement": agreement}

    def in_graph_masks(self, session: Session) -> list[ndarray]:
        """Return the masks of the judged images that a graph with ``--outputs mask`` makes."""
        judged, preprocessing = self.images.judged, self.contract.preprocessing
        sizes = [
            resampled_size(size, preprocessing, spacing)
            for size, spacing in zip(judged.sizes, judged.spacings, strict=True)
        ]
        return [
            session.masks(image[np.newaxis], size, resampled)[0]
            for image, size, resampled in zip(judged.inputs, judged.sizes, sizes, strict=True)
        ]

    def verdict(self, run: Run, masks: Sequence[ndarray] | None = None) -> tuple[GateVerdict, dict[str, Any]]:
        """Judge the masks of a network, its own or those of its logits, and also say how far its logits are off."""
        return self.verdict_of(run_in_batches(run, self.images.judged.inputs, 1), masks)

    def verdict_of(self, logits: ndarray, masks: Sequence[ndarray] | None = None) -> tuple[GateVerdict, dict[str, Any]]:
        """Judge masks of the judged images, or those that these logits make; logits that are not finite make none."""
        judged = self.images.judged
        if not np.isfinite(logits).all():
            raise AccuracyGateError("the logits are not finite: a number is too large for its type")
        candidate_masks = self._masks_of(logits) if masks is None else masks
        num_labels = len(self.contract.classes.names)
        reference, candidate = (
            judged.counts(compared, self._masks, num_labels) for compared in (self._masks, candidate_masks)
        )
        verdict = compare(reference, candidate, judged.cases, self.spec.max_dice_drop, judged.metric)
        error = self.error_of(logits)
        return verdict, {
            "images": self.images.description,
            "num_images": len(judged.inputs),
            "max_abs_error": float(np.abs(logits - self._logits).max()),
            "agreement": float((labels_of(logits) == labels_of(self._logits)).mean()),
            "sqnr_db": -10 * float(np.log10(error)) if error else None,
            "gate": verdict,
        }

    def error_of(self, logits: ndarray) -> float:
        """Return the squared error of the judged images' logits, relative to the reference's squares."""
        noise = np.square(logits - self._logits, dtype=np.float64).sum()
        return float(noise / np.square(self._logits, dtype=np.float64).sum())

    def _masks_of(self, logits: ndarray) -> list[ndarray]:
        return self.images.judged.masks(logits, self.contract.preprocessing)


def _remembering(run: Run) -> Run:
    """Return the network with a cache: every graph is compared with the same logits of the same few images."""
    cached: dict[str, ndarray] = {}

    def run_cached(batch: ndarray) -> ndarray:
        key = image_digest(batch)
        if key not in cached:
            cached[key] = run(batch)
        return cached[key]

    return run_cached
