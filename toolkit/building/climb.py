"""Climb the ladder of the block: build the graphs of one rung after another until one passes every judge.

The judges are the error on held-out tokens and the accuracy gate, after quantisation and on every labelled split that
there is. A rung that fails one is recorded with its figures.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.building.block_ladder import BlockLadder, RungCandidate
from medseg_trt.building.bundle_steps import export_graph, write_variants
from medseg_trt.building.deployment import Deployment
from medseg_trt.building.executions import ExecutionTrials, execution_child, try_executions
from medseg_trt.building.reference import Reference
from medseg_trt.building.reference_images import SECOND_SPLIT, JudgedImages
from medseg_trt.bundles.block_report import BlockReport, RungReport, RungVerdict
from medseg_trt.bundles.manifest import Variant
from medseg_trt.errors import AccuracyGateError
from medseg_trt.export.fold.fold_rule import FoldResult
from medseg_trt.export.gate import GateVerdict
from medseg_trt.progress import LOG
from medseg_trt.spec import BuildSpec, from_dict
from medseg_trt.train.models.model import runner

FIRST_SPLIT = "val"  # in the report; the images of ``Reference``


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    report: RungReport
    variants: Mapping[str, Variant]
    tried: ExecutionTrials | None  # None: rejected before its executions were tried
    reference: Reference  # what its executions were compared with
    golden: tuple[ndarray, ndarray]


def climb(
    folder: Path,
    ladder: BlockLadder,
    folding: Mapping[str, FoldResult],
    reference: Reference,
    second: JudgedImages | None,
    golden_input: ndarray,
) -> Deployment:
    """Write the graphs of the cheapest rung that passes into ``folder``.

    Args:
        folder: of the bundle that is being made.
        ladder: the rungs to try.
        folding: the result of each folding rule.
        reference: the checkpoint's network.
        second: images of another labelled split, which are judged too.
        golden_input: the golden input.

    Raises:
        AccuracyGateError: no rung passes, or the graphs of the exact block fail.
        UsageError: a rung or a precision lacks calibration images.
    """
    reports = list[RungReport]()
    judges = {FIRST_SPLIT: reference} | ({} if second is None else {SECOND_SPLIT: reference.with_judged(second)})
    for candidate in ladder.candidates():
        attempt = _attempt(folder, candidate, folding, ladder.spec, judges, golden_input)
        reports.append(attempt.report)
        if attempt.tried is not None and attempt.report.accepted:
            return Deployment(
                variants=attempt.variants,
                tried=attempt.tried,
                golden=attempt.golden,
                block=_report(ladder, candidate, reports),
                reference=attempt.reference,
                second=None if candidate.is_exact else judges.get(SECOND_SPLIT),
            )
        LOG.warning("block %s is not used: %s", candidate.rung, attempt.report.reason)
        for path in folder.iterdir():
            path.unlink()
    raise AccuracyGateError(
        "; ".join(f"block {report.rung}: {report.reason}" for report in reports)
        + ". Nothing was written; choose --block exact, or auto"
    )


def _report(ladder: BlockLadder, chosen: RungCandidate, reports: list[RungReport]) -> BlockReport | None:
    if chosen.cost is None:
        return None
    return BlockReport(
        requested=ladder.spec.block,
        rung=str(chosen.rung),
        max_error=ladder.spec.max_block_error,
        max_unexplained=ladder.spec.max_block_unexplained,
        calibration=ladder.calibration,
        rungs=tuple(reports),
    )


def _attempt(
    folder: Path,
    candidate: RungCandidate,
    folding: Mapping[str, FoldResult],
    spec: BuildSpec,
    judges: Mapping[str, Reference],
    golden_input: ndarray,
) -> _Attempt:
    """Build and judge one rung; the graphs of one that fails on held-out tokens are judged too, for its figures."""
    run = runner(candidate.network)
    reference = judges[FIRST_SPLIT]
    verdicts, reasons = list[RungVerdict](), list[str]()
    if not candidate.is_exact:
        reference = reference.with_deployed(run)
        verdicts += [_verdict(split, "fp32", judge.verdict(run)[0]) for split, judge in judges.items()]
        reasons += [*_held_out_reasons(candidate, spec), *_failed(verdicts)]
    golden = golden_input, run(golden_input)
    variants: dict[str, Variant] = {}
    tried = None
    try:
        variants = write_variants(folder, export_graph(candidate.network, folding), spec, reference)
        verdicts += _rounded_verdicts(variants)
        if not reasons:
            tried = try_executions(folder, variants, spec, reference, golden)
            second_verdicts = list(_second_verdicts(folder, variants, tried, judges))
            verdicts += second_verdicts
            reasons += [] if candidate.is_exact else _failed(second_verdicts)
    except AccuracyGateError as error:
        if candidate.is_exact:
            raise
        reasons.append(str(error))
    report = RungReport(
        rung=str(candidate.rung),
        macs=candidate.cost.macs if candidate.cost is not None else 0,
        bytes=candidate.cost.bytes if candidate.cost is not None else 0,
        relative_error=candidate.error.relative if candidate.error is not None else None,
        unexplained=candidate.error.unexplained if candidate.error is not None else None,
        verdicts=tuple(verdicts),
        accepted=not reasons,
        reason="; ".join(reasons),
    )
    return _Attempt(report=report, variants=variants, tried=tried, reference=reference, golden=golden)


def _held_out_reasons(candidate: RungCandidate, spec: BuildSpec) -> list[str]:
    error = candidate.error
    assert error is not None  # only the exact block has none
    if error.within(spec.max_block_error, spec.max_block_unexplained):
        return []
    return [
        f"on held-out tokens its error is {error.relative:.4f} of the output, limit {spec.max_block_error:g}, and "
        f"{error.unexplained:.4f} of the output's variance, limit {spec.max_block_unexplained:g}"
    ]


def _failed(verdicts: Sequence[RungVerdict]) -> list[str]:
    return [
        f"{verdict.metric} on {verdict.split} in {verdict.precision} falls by up to {verdict.high:.4f}, limit "
        f"{verdict.limit:g}"
        for verdict in verdicts
        if not verdict.holds
    ]


def _rounded_verdicts(variants: Mapping[str, Variant]) -> Iterator[RungVerdict]:
    """Yield the gate's verdict on every rounded precision, as it was when its graphs were made."""
    gates = {variant.precision: variant.passes["gate"] for variant in variants.values()}
    return (
        _verdict(FIRST_SPLIT, precision, from_dict(GateVerdict, gate["verdict"], f"the gate of {precision}"))
        for precision, gate in gates.items()
        if gate is not None
    )


def _second_verdicts(
    folder: Path, variants: Mapping[str, Variant], tried: ExecutionTrials, judges: Mapping[str, Reference]
) -> Iterator[RungVerdict]:
    """Judge the best execution of every rounded precision on the second split."""
    if SECOND_SPLIT not in judges:
        return
    judge, judged = judges[SECOND_SPLIT], set[str]()
    for execution in tried.executions:
        precision = variants[execution.variant].precision
        if precision in judged or precision == "fp32" or not execution.executed:
            continue
        judged.add(precision)
        with execution_child(folder, variants[execution.variant], execution, judge.device) as session:
            logits = np.concatenate([session.run(image[np.newaxis]) for image in judge.images.judged.inputs])
        yield _verdict(SECOND_SPLIT, precision, judge.verdict_of(logits)[0])


def _verdict(split: str, precision: str, verdict: GateVerdict) -> RungVerdict:
    return RungVerdict(
        split=split,
        precision=precision,
        metric=verdict.metric,
        images=verdict.images,
        reference=verdict.reference,
        candidate=verdict.candidate,
        drop=verdict.drop,
        low=verdict.low,
        high=verdict.high,
        limit=verdict.limit,
        holds=verdict.holds,
    )
