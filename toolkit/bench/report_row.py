"""Make a row of the report from everything that was measured of one network, with a reason for every missing figure."""

from collections.abc import Mapping

from medseg_trt.bench.accuracy import NetworkScores, differences
from medseg_trt.bench.accuracy_schema import Accuracy, Verdict
from medseg_trt.bench.candidates import Candidate
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profiling import Profiling
from medseg_trt.bench.schema import NOT_ON_GPU, Row
from medseg_trt.bench.timing_schema import SCOPES
from medseg_trt.bench.timings import Timings, speedups

REFERENCE_VERDICT = Missing(reason="it is the reference of the comparison")


def report_row(
    candidate: Candidate,
    reference: Candidate,
    scores: NetworkScores,
    verdicts: Mapping[str, Verdict | Missing],
    timings: Mapping[str, Timings],
    devices: Mapping[str, tuple[str, str]],
    profiling: Profiling,
) -> Row:
    """Return the row of a candidate; the dictionaries are by the candidate's name."""
    name = candidate.name
    not_run = Missing(reason=candidate.execution_note if not candidate.executed else "it did not start")
    timing = timings.get(name, Timings(start=not_run, failure=None))
    judgement = REFERENCE_VERDICT if candidate is reference else verdicts.get(name, not_run)
    is_scored = name in scores.networks
    accuracy = scores.accuracy(name) if is_scored else not_run
    reference_accuracy = scores.accuracy(reference.name)
    score_differences = (
        differences(reference_accuracy, accuracy, judgement)
        if isinstance(accuracy, Accuracy)
        and isinstance(reference_accuracy, Accuracy)
        and isinstance(judgement, Verdict)
        else ()
    )
    no_time = _why_not_timed(timing, judgement, not_run, is_scored)
    device, description = devices.get(name, ("none", candidate.backend))
    speed = (
        speedups(timings[reference.name], timing, devices[reference.name][0], device)
        if candidate is not reference and timing.latency
        else {}
    )
    return Row(
        name=name,
        role=candidate.role,
        backend=candidate.backend,
        device=device,
        description=description,
        executed=candidate.executed,
        statement=candidate.execution_note,
        precision=candidate.precision,
        compute=candidate.compute,
        variant=candidate.variant,
        size_mb=candidate.size_mb,
        failure=timing.failure,
        warnings=tuple(timing.warnings),
        start=timing.start,
        latency={scope: timing.latency.get(scope, no_time) for scope in SCOPES},
        speedup={
            scope: speed.get(scope, no_time if candidate is not reference else REFERENCE_VERDICT) for scope in SCOPES
        },
        stages_ms=timing.stages_ms,
        throughput=timing.throughput or no_time,
        memory=timing.memory or no_time,
        energy=timing.energy or no_time,
        on_gpu=timing.on_gpu or NOT_ON_GPU,
        agreement=scores.networks[name].agreement() if is_scored else not_run,
        accuracy=accuracy,
        differences=score_differences,
        verdict=judgement,
        worst=tuple(entry for entry, _ in scores.networks[name].worst) if is_scored else (),
        profile=profiling.profiles.get(name, Missing(reason=_no_profile(candidate, no_time))),
        roofline=profiling.rooflines.get(name, Missing(reason=_no_profile(candidate, no_time))),
    )


def _why_not_timed(timing: Timings, judgement: Verdict | Missing, not_run: Missing, is_scored: bool) -> Missing:
    if timing.failure is not None:
        return Missing(reason=timing.failure)
    if isinstance(judgement, Verdict) and not judgement.holds:
        return Missing(reason="its masks differ from the reference's, so it is not timed")
    return Missing(reason="not measured") if is_scored else not_run


def _no_profile(candidate: Candidate, no_time: Missing) -> str:
    return "PyTorch runs without a graph" if candidate.backend == "pytorch" else no_time.reason
