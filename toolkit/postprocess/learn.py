"""Choose post-processing on labelled cases: a step stays only where it raises Dice with its whole interval.

Dice and its interval are those of the accuracy gate: by case from five cases on, by slice below. Few cases widen the
interval, so that fewer steps are chosen. Steps are compared one by one, without a correction for their number.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from medseg_trt.export.gate import GateVerdict, compare
from medseg_trt.metrics.overlap import confusion
from medseg_trt.postprocess.apply import apply_steps, pixel_size, postprocess
from medseg_trt.postprocess.steps import ClassSteps, Gain, Kind, Postprocessing, Unit
from medseg_trt.progress import LOG
from medseg_trt.spec import Classes

SIZE_SHARES = (0.01, 0.05, 0.2)  # candidates of the minimum size, in the median size of the class in a true mask
Labels = UInt8[ndarray, "slices height width"]
NO_GAIN = Gain(before=0.0, after=0.0, low=0.0, high=0.0, units="cases")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PredictedCase:
    """A labelled case, and the labels that a network gives it."""

    name: str
    predicted: Labels
    truth: Labels
    spacing_mm: tuple[float, float, float] | None


def learn_postprocessing(cases: Sequence[PredictedCase], classes: Classes, description: str) -> Postprocessing | None:
    """Return the steps that raise Dice, or None where no step does.

    Args:
        cases: complete images, all volumes or all single slices; else nothing is learnt.
        classes: the names of the labels.
        description: of the cases, for readers.
    """
    are_volumes = {len(case.truth) > 1 for case in cases}
    if len(are_volumes) != 1:
        LOG.info("no post-processing is learnt: there are %s", "images beside volumes" if cases else "no cases")
        return None
    kind: Kind = "volume" if are_volumes.pop() else "image"
    unit = _unit(kind, cases)
    chosen = tuple(
        steps
        for label, name in list(enumerate(classes.names))[1:]
        if (steps := _choose(cases, label, name, unit)) is not None
    )
    if not chosen:
        return None
    names = [case.name for case in cases for _ in case.truth]
    post = Postprocessing(
        kind=kind,
        unit=unit,
        classes=chosen,
        gain=NO_GAIN,
        cases=len(cases),
        slices=len(names),
        description=description,
    )
    corrected = [postprocess(case.predicted, post, classes, case.spacing_mm) for case in cases]
    verdict = compare(
        counts_of((case.predicted for case in cases), cases, len(classes.names)),
        counts_of(corrected, cases, len(classes.names)),
        names,
        limit=0.0,
    )
    return replace(post, gain=_gain(verdict)) if _is_gain(verdict) else None


def counts_of(
    masks: Iterable[ndarray], cases: Sequence[PredictedCase], num_labels: int
) -> Int64[ndarray, "slices classes 3"]:
    """Count the pixels of every class in every slice of all cases: right, in the mask, in the truth."""

    def matrices() -> Iterator[ndarray]:
        for mask, case in zip(masks, cases, strict=True):
            for plane, true in zip(mask, case.truth, strict=True):
                yield confusion(plane, true, num_labels)

    return np.array([np.stack([m.diagonal(), m.sum(axis=0), m.sum(axis=1)], axis=1)[1:] for m in matrices()])


def _unit(kind: Kind, cases: Sequence[PredictedCase]) -> Unit:
    if any(case.spacing_mm is None for case in cases):
        return "share"
    return "mm3" if kind == "volume" else "mm2"


def _choose(cases: Sequence[PredictedCase], label: int, name: str, unit: Unit) -> ClassSteps | None:
    """Return the steps of one class: the best way to remove components, and then filled holes, if each gains."""
    sizes = [pixel_size(unit, case.truth.shape, case.spacing_mm) for case in cases]
    raw = [(case.predicted == label).astype(np.uint8) for case in cases]
    truths = [replace(case, truth=(case.truth == label).astype(np.uint8)) for case in cases]
    names = [case.name for case in cases for _ in case.truth]

    def corrected(steps: ClassSteps) -> list[ndarray]:
        masks = [mask.copy() for mask in raw]
        for mask, size in zip(masks, sizes, strict=True):
            apply_steps(mask, 1, steps, size)
        return masks

    def verdict(before: Sequence[ndarray], after: Sequence[ndarray]) -> GateVerdict:
        return compare(counts_of(before, truths, 2), counts_of(after, truths, 2), names, limit=0.0)

    best: tuple[GateVerdict, ClassSteps] | None = None
    for steps in _removals(name, [case.truth for case in truths], sizes):
        judged = verdict(raw, corrected(steps))
        if _is_gain(judged) and (best is None or judged.drop < best[0].drop):
            best = judged, steps
    kept = best[1] if best is not None else None
    filled = replace(kept, fill_holes=True) if kept else ClassSteps(name=name, fill_holes=True, gain=NO_GAIN)
    if _is_gain(verdict(corrected(kept) if kept else raw, corrected(filled))):
        kept = filled
    return replace(kept, gain=_gain(verdict(raw, corrected(kept)))) if kept is not None else None


def _removals(name: str, truths: Sequence[ndarray], sizes: Sequence[float]) -> Iterator[ClassSteps]:
    """Yield the ways to remove components of a class; none, where no case has the class and nothing can be judged."""
    present = [float(truth.sum()) * size for truth, size in zip(truths, sizes, strict=True) if truth.any()]
    if not present:
        return
    yield ClassSteps(name=name, largest=True, gain=NO_GAIN)
    for share in SIZE_SHARES:
        yield ClassSteps(name=name, min_size=share * float(np.median(present)), gain=NO_GAIN)


def _is_gain(verdict: GateVerdict) -> bool:
    """Say whether the whole interval of the drop lies below 0."""
    return verdict.drop < 0 and verdict.high < 0


def _gain(verdict: GateVerdict) -> Gain:
    return Gain(
        before=verdict.reference, after=verdict.candidate, low=-verdict.high, high=-verdict.low, units=verdict.unit
    )
