"""Try every way to run a graph here, each in a process of its own; keep those whose masks are right, fastest first.

What a back-end may do to a process (OpenVINO 2026.4.1 has died of a segmentation fault on some graphs) happens to the
child, and becomes one line in the bundle.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.building.reference import Reference
from medseg_trt.bundles.manifest import Execution, Variant
from medseg_trt.bundles.verification import Verification
from medseg_trt.devices import CPU, ComputeDevice
from medseg_trt.errors import AccuracyGateError, ArtefactError, DeviceError, MedsegError, UsageError
from medseg_trt.progress import LOG
from medseg_trt.sessions.backends import BACKENDS, is_installed
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.mask_probe import check_masks
from medseg_trt.sessions.onnxruntime import needs_options
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import ChildSession
from medseg_trt.spec import BuildSpec

ROUNDS = 2  # every execution is timed once in each round, in turn, so that a busy second cannot decide
SECONDS, MIN_RUNS = 1.0, 5  # of a round
GOLDEN_MARGIN = {True: 10, False: 2}  # exact or rounded: another processor adds in another order, and rounds others up
MIN_GAIN = 0.05  # what 8-bit arithmetic must save, or it is not worth its rounding
FLOAT = ("fp32", "fp16")
GRAPH_OF = {"bf16": "fp32"}  # a precision that is only a way to run another one's graph
STAND_IN = "onnxruntime"  # runs every dialect; judges a graph whose own back-end is not installed


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionTrials:
    """What came of all ways to run the variants."""

    executions: tuple[Execution, ...]  # the best first
    rejected: tuple[str, ...]  # those that are not to be used, each with its reason

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
    """Run every variant with every back-end that can read its dialect; compare, then time.

    Args:
        folder: where the graphs are.
        variants: the graphs by name.
        spec: what was asked for.
        reference: what the logits and masks are compared with; where it runs on a GPU, back-ends of GPUs are tried too.
        golden: the golden input, and PyTorch's logits for it.

    Raises:
        AccuracyGateError: no way to run one of the precisions gives the right masks.
        UsageError: the back-end that was asked for does not exist.
    """
    wanted = spec.backend
    if wanted != "auto" and wanted not in BACKENDS:
        raise UsageError(f"no back-end is called {wanted!r}; choose one of: auto, {', '.join(BACKENDS)}")
    device = reference.device
    if wanted != "auto" and BACKENDS[wanted].gpu and device.kind != "cuda":
        raise UsageError(
            f"a build tries {wanted} with --device cuda alone; leave --backend out here, and give it to infer"
        )
    verified: list[Execution] = []
    rejected: list[str] = []
    reasons: dict[str, MedsegError] = {}
    for name, variant in variants.items():
        for backend, compute_dtype in _ways(variant, wanted, _compute_dtypes(variant, spec.precisions), device):
            label = _label(name, backend, compute_dtype)
            try:
                verified.append(try_execution(folder, name, variant, backend, compute_dtype, reference, golden))
            except DeviceError as error:  # this machine cannot; that is no fault of the graph
                rejected.append(f"{label}: {error}")
            except (AccuracyGateError, ArtefactError) as error:
                rejected.append(f"{label}: {error}")
                reasons[variant.precision] = error
                LOG.warning("%s is not used: %s", label, error)
    return settled(
        folder,
        variants,
        ExecutionTrials(executions=tuple(verified), rejected=tuple(rejected)),
        reasons,
        golden[0],
        device,
    )


def _label(name: str, backend: str, compute_dtype: str) -> str:
    return f"{name} with {backend} in {compute_dtype}"


def label_of(execution: Execution) -> str:
    """Return the name of an execution in messages."""
    return _label(execution.variant, execution.backend, execution.compute_dtype)


def settled(
    folder: Path,
    variants: Mapping[str, Variant],
    verified: ExecutionTrials,
    reasons: Mapping[str, MedsegError],
    image: ndarray,
    device: ComputeDevice,
    label: Callable[[Execution], str] = label_of,
) -> ExecutionTrials:
    """Time executions that were verified, in turn, and put the best first; those that die meanwhile are rejected.

    Args:
        folder: where the graphs are.
        variants: the graphs by name.
        verified: the executions in any order, and what was rejected before.
        reasons: by precision, why an execution of it was rejected.
        image: the golden input.
        device: which GPU executions take, where they take one.
        label: the name of an execution in messages.

    Raises:
        AccuracyGateError, ArtefactError: no execution of one of the precisions is left; the reason is its own.
        DeviceError: no execution is left.
    """
    rejected, reasons = list(verified.rejected), dict(reasons)
    timed, died = _timed(folder, variants, verified.executions, image, device)
    for execution, error in died:
        rejected.append(f"{label(execution)}: {error}")
        reasons[variants[execution.variant].precision] = error
        LOG.warning("%s is not used: %s", label(execution), error)
    for precision, error in reasons.items():
        if not any(variants[execution.variant].precision == precision for execution in timed):
            raise error
    if not timed:
        raise DeviceError(f"nothing here can run what was built: {'; '.join(rejected)}")
    return ExecutionTrials(executions=_ranked(timed, variants), rejected=tuple(rejected))


def default_graph(executions: Sequence[Execution], variants: Mapping[str, Variant]) -> str | None:
    """Return the file of the best graph that ONNX Runtime was verified with, opened without options, or None.

    Other tools open it under the name ``model.onnx``, and know nothing of the options that some precisions need.
    """
    for execution in executions:
        variant = variants[execution.variant]
        if execution.backend == STAND_IN and execution.executed and not needs_options(variant.precision):
            return variant.graph
    return None


def _ways(variant: Variant, wanted: str, compute_dtypes: Sequence[str], device: ComputeDevice) -> list[tuple[str, str]]:
    return [
        (name, compute_dtype)
        for name, backend in BACKENDS.items()
        if not backend.gpu or (device.kind == "cuda" and not backend.engines and is_installed(name))
        if wanted in ("auto", name) and variant.dialect in backend.dialects
        for compute_dtype in compute_dtypes
        if compute_dtype in backend.compute_dtypes
    ]


def _compute_dtypes(variant: Variant, precisions: Sequence[str]) -> list[str]:
    """Return what the float parts of a variant may be computed in: what eight bits leave over in bfloat16, too."""
    if variant.precision == "fp32":
        return [name for name in ("fp32", "bf16") if name in precisions]
    return ["fp32"] if variant.precision == "fp16" else ["fp32", "bf16"]


def try_execution(
    folder: Path,
    name: str,
    variant: Variant,
    backend: str,
    compute_dtype: str,
    reference: Reference,
    golden: tuple[ndarray, ndarray],
) -> Execution:
    """Compare one way to run a variant with PyTorch, in a process of its own; for the arguments see ``try_executions``.

    Raises:
        AccuracyGateError: it gives other logits or masks.
        ArtefactError: the back-end refuses the graph or the engine, or dies of it.
        DeviceError: this machine cannot run it.
    """
    is_here = is_installed(backend)
    runner = backend if is_here else STAND_IN
    with _child(folder, variant, runner, compute_dtype if is_here else "fp32", reference.device) as session:
        figures = verify_session(session, variant, compute_dtype, reference)
        check_masks(session, reference.contract.preprocessing, golden[0])
        error = float(np.abs(session.run(golden[0]) - golden[1]).max())
    return Execution(
        variant=name,
        backend=backend,
        compute_dtype=compute_dtype,
        executed=is_here,
        golden_error=GOLDEN_MARGIN[_is_exact(variant, compute_dtype)] * max(error, reference.spec.max_abs_error),
        verification=Verification(by=session.description, **figures),
    )


def verify_session(session: Session, variant: Variant, compute_dtype: str, reference: Reference) -> dict[str, Any]:
    """Compare a session with PyTorch: all of its logits where nothing was rounded, else its masks.

    Where the block was replaced, an unrounded session has the logits of the network with the replacement, and its masks
    are judged as well.

    Raises:
        AccuracyGateError: it is not allowed to differ so much.
    """
    LOG.info("verify %s against %s on %s", session.description, reference.name, reference.images.description)
    masks = reference.in_graph_masks(session) if session.gives_masks else None
    if _is_exact(variant, compute_dtype):
        logits_check = reference.check_logits(session.run)
        if reference.deployed is None:
            return logits_check | ({} if masks is None else reference.check_masks_of_graph(masks))
    verdict, figures = reference.verdict(session.run, masks)
    if not verdict.holds:
        raise AccuracyGateError(f"{session.description} draws other masks than {reference.name}: {verdict}")
    return figures


def _is_exact(variant: Variant, compute_dtype: str) -> bool:
    return variant.precision == compute_dtype == "fp32"


def _timed(
    folder: Path,
    variants: Mapping[str, Variant],
    executions: Sequence[Execution],
    image: ndarray,
    device: ComputeDevice,
) -> tuple[list[Execution], list[tuple[Execution, MedsegError]]]:
    """Return the executions with their times, and those that died meanwhile with the reason."""
    best: dict[int, float] = {}
    died: dict[int, MedsegError] = {}
    for _ in range(ROUNDS if len(executions) > 1 else 1):
        for index, execution in enumerate(executions):
            if execution.executed and index not in died:
                try:
                    with _child(
                        folder, variants[execution.variant], execution.backend, execution.compute_dtype, device
                    ) as session:
                        median = float(np.median(session.time(image, SECONDS, MIN_RUNS)))
                except (ArtefactError, DeviceError) as error:
                    died[index] = error
                else:
                    best[index] = min(median, best.get(index, median))
    numbered = list(enumerate(executions))
    timed = [replace(execution, median_ms=best.get(index)) for index, execution in numbered if index not in died]
    return timed, [(execution, died[index]) for index, execution in numbered if index in died]


def _ranked(executions: Sequence[Execution], variants: Mapping[str, Variant]) -> tuple[Execution, ...]:
    """Sort by time, those that did not run last; integers go first only where they are clearly faster than floats."""

    def time_of(execution: Execution) -> float:
        return float("inf") if execution.median_ms is None else execution.median_ms

    ranked = sorted(executions, key=time_of)
    floats = [execution for execution in ranked if variants[execution.variant].precision in FLOAT]
    if floats and floats[0] is not ranked[0] and time_of(ranked[0]) > (1 - MIN_GAIN) * time_of(floats[0]):
        ranked.remove(floats[0])
        ranked.insert(0, floats[0])
    return tuple(ranked)


def execution_child(
    folder: Path, variant: Variant, execution: Execution, device: ComputeDevice = CPU, streams: int = 1
) -> ChildSession:
    """Open an execution that was verified, in a process of its own.

    Args:
        folder: where the graphs are.
        variant: of the execution.
        execution: what to open.
        device: which GPU, if it takes one.
        streams: images beside each other, if its back-end has streams.
    """
    return _child(folder, variant, execution.backend, execution.compute_dtype, device, streams)


def _child(
    folder: Path, variant: Variant, backend: str, compute_dtype: str, device: ComputeDevice, streams: int = 1
) -> ChildSession:
    request = SessionRequest(
        backend=backend,
        path=folder if BACKENDS[backend].engines else folder / variant.graph,
        precision=variant.precision,
        compute_dtype=compute_dtype,
        device=device,
        streams=streams,
    )
    return ChildSession(request)
