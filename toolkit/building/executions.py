"""Try every way to run a graph here, each in a process of its own; keep those whose masks are right, fastest first.

What a back-end may do to a process (OpenVINO 2026.4.1 has died of a segmentation fault on some graphs) happens to the
child, and becomes one line in the bundle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.building.reference import Reference
from medseg_trt.bundles.manifest import Execution, Variant
from medseg_trt.errors import AccuracyGateError, ArtefactError, DeviceError, MedsegError, UsageError
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS, is_installed
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.mask_probe import check_masks
from medseg_trt.sessions.onnxruntime import needs_options
from medseg_trt.sessions.subprocess_session import ChildSession
from medseg_trt.spec import BuildSpec

ROUNDS = 2  # every execution is timed once in each round, in turn, so that a busy second cannot decide
SECONDS, MIN_RUNS = 1.0, 5  # of a round
GOLDEN_MARGIN = {True: 10, False: 2}  # exact or rounded: another processor adds in another order, and rounds others up
MIN_GAIN = 0.05  # what 8-bit arithmetic must save, or it is not worth its rounding
FLOAT = ("fp32", "fp16")
GRAPH_OF = {"bf16": "fp32"}  # a precision that is only a way to run another one's graph
STAND_IN = "onnxruntime"  # runs every flavour; judges a graph whose own back-end is not installed


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionTrials:
    """What came of all ways to run the variants."""

    executions: tuple[Execution, ...]  # the best first
    dropped: tuple[str, ...]  # those that are not to be used, each with its reason

    @property
    def verified(self) -> frozenset[str]:
        """The variants that a back-end has run, with masks that are right."""
        return frozenset(execution.variant for execution in self.executions)


def try_executions(
    folder: Path,
    variants: Mapping[str, Variant],
    spec: BuildSpec,
    reference: Reference,
    golden: tuple[ndarray, ndarray],
) -> ExecutionTrials:
    """Run every variant with every back-end that can read its flavour; compare, then time.

    Args:
        folder: where the graphs are.
        variants: the graphs by name.
        spec: what was asked for.
        reference: what the answers are compared with.
        golden: the golden input, and PyTorch's logits for it.

    Raises:
        AccuracyGateError: no way to run one of the precisions gives the right masks.
        UsageError: the back-end that was asked for does not exist.
    """
    wanted = spec.backend
    if wanted != "auto" and wanted not in BACKENDS:
        raise UsageError(f"no back-end is called {wanted!r}; choose one of: auto, {', '.join(BACKENDS)}")
    if wanted != "auto" and BACKENDS[wanted].gpu:
        raise UsageError(f"a build does not try {wanted}; leave --backend out here, and give it to infer")
    found: list[Execution] = []
    dropped: list[str] = []
    reasons: dict[str, MedsegError] = {}
    for name, variant in variants.items():
        for backend, compute in _ways(variant, wanted, _computes(variant, spec.precisions)):
            what = _what(name, backend, compute)
            try:
                found.append(_try(folder, name, variant, backend, compute, reference, golden))
            except DeviceError as error:  # this machine cannot; that is no fault of the graph
                dropped.append(f"{what}: {error}")
            except (AccuracyGateError, ArtefactError) as error:
                dropped.append(f"{what}: {error}")
                reasons[variant.precision] = error
                LOG.warning("%s is not used: %s", what, error)
    timed, died = _timed(folder, variants, found, golden[0])
    for execution, error in died:
        what = _what(execution.variant, execution.backend, execution.compute)
        dropped.append(f"{what}: {error}")
        reasons[variants[execution.variant].precision] = error
        LOG.warning("%s is not used: %s", what, error)
    for precision, error in reasons.items():
        if not any(variants[each.variant].precision == precision for each in timed):
            raise error
    if not timed:
        raise DeviceError(f"nothing here can run what was built: {'; '.join(dropped)}")
    return ExecutionTrials(executions=_ranked(timed, variants), dropped=tuple(dropped))


def default_graph(executions: Sequence[Execution], variants: Mapping[str, Variant]) -> str | None:
    """Return the file of the best graph that ONNX Runtime was verified with, opened without options, or None.

    Other tools open it under the name ``model.onnx``, and know nothing of the options that some precisions need.
    """
    for execution in executions:
        variant = variants[execution.variant]
        if execution.backend == STAND_IN and execution.executed and not needs_options(variant.precision):
            return variant.graph
    return None


def _what(name: str, backend: str, compute: str) -> str:
    return f"{name} with {backend} in {compute}"


def _ways(variant: Variant, wanted: str, computes: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (name, compute)
        for name, backend in BACKENDS.items()
        if not backend.gpu
        if wanted in ("auto", name) and variant.flavour in backend.flavours
        for compute in computes
        if compute in backend.computes
    ]


def _computes(variant: Variant, precisions: Sequence[str]) -> list[str]:
    """Return what the float parts of a variant may be computed in: what eight bits leave over in bfloat16, too."""
    if variant.precision == "fp32":
        return [name for name in ("fp32", "bf16") if name in precisions]
    return ["fp32"] if variant.precision == "fp16" else ["fp32", "bf16"]


def _try(
    folder: Path,
    name: str,
    variant: Variant,
    backend: str,
    compute: str,
    reference: Reference,
    golden: tuple[ndarray, ndarray],
) -> Execution:
    here = is_installed(backend)
    runner = backend if here else STAND_IN
    with _child(folder, variant, runner, compute if here else "fp32") as session:
        verification = verify_session(session, variant, compute, reference)
        check_masks(session, reference.contract.preprocessing, golden[0])
        error = float(np.abs(session.run(golden[0]) - golden[1]).max())
    return Execution(
        variant=name, backend=backend, compute=compute, executed=here,
        golden_error=GOLDEN_MARGIN[_is_exact(variant, compute)] * max(error, reference.spec.max_abs_error),
        verification={"by": session.description, **verification},
    )  # fmt: skip


def verify_session(session: Session, variant: Variant, compute: str, reference: Reference) -> dict[str, Any]:
    """Compare a session with PyTorch: all of its logits where nothing was rounded, else its masks.

    Raises:
        AccuracyGateError: it is not allowed to differ so much.
    """
    LOG.info("verify %s against PyTorch on %s", session.description, reference.images.description)
    masks = reference.in_graph_masks(session) if session.gives_masks else None
    if _is_exact(variant, compute):
        return reference.check_logits(session.run) | ({} if masks is None else reference.check_masks_of_graph(masks))
    verdict, figures = reference.verdict(session.run, masks)
    if not verdict.holds:
        raise AccuracyGateError(f"{session.description} draws other masks than PyTorch: {verdict}")
    return figures


def _is_exact(variant: Variant, compute: str) -> bool:
    return variant.precision == compute == "fp32"


def _timed(
    folder: Path, variants: Mapping[str, Variant], executions: Sequence[Execution], image: ndarray
) -> tuple[list[Execution], list[tuple[Execution, ArtefactError]]]:
    """Return the executions with their times, and those that died meanwhile with the reason."""
    best: dict[int, float] = {}
    died: dict[int, ArtefactError] = {}
    for _ in range(ROUNDS if len(executions) > 1 else 1):
        for place, execution in enumerate(executions):
            if execution.executed and place not in died:
                try:
                    with _child(folder, variants[execution.variant], execution.backend, execution.compute) as session:
                        median = float(np.median(session.time(image, SECONDS, MIN_RUNS)))
                except ArtefactError as error:
                    died[place] = error
                else:
                    best[place] = min(median, best.get(place, median))
    numbered = list(enumerate(executions))
    timed = [replace(each, median_ms=best.get(place)) for place, each in numbered if place not in died]
    return timed, [(each, died[place]) for place, each in numbered if place in died]


def _ranked(executions: Sequence[Execution], variants: Mapping[str, Variant]) -> tuple[Execution, ...]:
    """Sort by time, those that did not run last; integers go first only where they are clearly faster than floats."""

    def time_of(execution: Execution) -> float:
        return float("inf") if execution.median_ms is None else execution.median_ms

    ranked = sorted(executions, key=time_of)
    floats = [each for each in ranked if variants[each.variant].precision in FLOAT]
    if floats and floats[0] is not ranked[0] and time_of(ranked[0]) > (1 - MIN_GAIN) * time_of(floats[0]):
        ranked.remove(floats[0])
        ranked.insert(0, floats[0])
    return tuple(ranked)


def _child(folder: Path, variant: Variant, backend: str, compute: str) -> ChildSession:
    return ChildSession(folder / variant.graph, variant.precision, backend, None, compute)
