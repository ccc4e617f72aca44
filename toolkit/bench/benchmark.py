"""Measure networks against a reference on the same images: masks first, then speed, then where the time goes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy import ndarray

from medseg_trt.bench.accuracy import AGREEMENT, NetworkScores, SliceImages, compare_all, differences, verdict
from medseg_trt.bench.accuracy_schema import Accuracy, Verdict
from medseg_trt.bench.candidates import Candidate, bundle_candidates, checkpoint_candidate
from medseg_trt.bench.layer_times import profile
from medseg_trt.bench.measured_cases import MeasuredCases, measured_cases, one_image_file
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.peaks import peaks, roofline
from medseg_trt.bench.profile_schema import Peak, Profile, Roofline
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.summary import summary
from medseg_trt.bench.timed_session import WholeWay
from medseg_trt.bench.timing_schema import SCOPES, Latency, Tier
from medseg_trt.bench.timings import BATCHES, Timings, open_candidates, speedups, time_all
from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.errors import MedsegError, MissingExtraError, require
from medseg_trt.files import sha256
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import for_image, prepare
from medseg_trt.imaging.segment import Run
from medseg_trt.inference.prefetch import Prefetcher
from medseg_trt.machine import package_versions, this_machine
from medseg_trt.progress import LOG, track
from medseg_trt.sessions.backends import BACKENDS

NO_PEAK_OF_GPUS = "the peaks that were measured are the processor's, not the GPU's"
ENDED = "interrupted: this measurement was ended before it was through"
REFERENCE_VERDICT = Missing(reason="it is what the others are compared with")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What to measure."""

    bundle: Path
    checkpoint: Path | None  # the reference; None: the bundle's own float32 network
    data: Path | None  # None: generated noise
    split: str
    tier: Tier
    backends: tuple[str, ...] = ()  # none: the best of every precision
    batch: int = 1  # of the latencies of the network alone
    throughput_batches: tuple[int, ...] = BATCHES
    max_dice_drop: float | None = None  # None: as at the build
    profile: bool = True  # look into the layers, and measure the machine's peaks
    commands: tuple[str, ...] = ()
    verify_key: Path | None = None  # of who built the bundle; None: its digests are checked alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The report, and the pictures of its worst slices, by row, in the order of ``Row.worst``."""

    report: Report
    pictures: Mapping[str, tuple[SliceImages, ...]]
    window: tuple[float, float]  # the values that are drawn black and white
    ended_early: bool  # by an interrupt; the report holds what was measured before


def bench(what: Bench, scratch: Path) -> Measured:
    """Compare, then time what draws the right masks, then look inside.

    Args:
        what: the networks and images.
        scratch: a folder on the disk that masks are written to during the end-to-end timing.

    An interrupt while networks are timed ends the measurement, and what is there already becomes the report.

    Raises:
        InputError: the data cannot be used.
        UsageError: the networks and the data do not fit.
        ArtefactError: the checkpoint or the bundle cannot be used, or the reference dies.
    """
    bundle = load_bundle(what.bundle, what.verify_key)
    candidates, digests, warnings = _candidates(what, bundle)
    machine = this_machine()
    limit = bundle.content.build.max_dice_drop if what.max_dice_drop is None else what.max_dice_drop
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=scratch, prefix=".partial-")))
        cases = measured_cases(what.data, what.split, bundle, folder)
        first = next(cases.read())[1]
        contract = for_image(bundle.preprocessing, first.pixels)
        image = prepare(first.pixels[first.num_slices // 2], contract, first.spacing_in_plane)[np.newaxis]
        here = [each for each in candidates if each.executed]
        sessions, timings = open_candidates(here, image, what.tier.starts, stack)
        reference = candidates[0].name
        if reference not in sessions:
            raise MedsegError(f"the reference does not start: {timings[reference].failure}")
        read: list[tuple[str, Image]] = []
        LOG.info("compare the masks of %d networks on %d cases of %s", len(sessions), len(cases.cases), cases.data)
        runs: dict[str, Run] = {name: session.run for name, session in sessions.items()}
        prefetcher = stack.enter_context(
            Prefetcher()
        )  # a case is decoded while the one before goes through the networks
        compared = compare_all(
            runs,
            track(prefetcher.prefetch(cases.read()), "compare", total=len(cases.cases)),
            bundle.preprocessing,
            bundle.classes,
            lambda name, image: read.append((name, replace(image, pixels=image.pixels[:, :1, :1]))),
        )
        verdicts = _verdicts(candidates, compared, limit)
        for name, found in compared.networks.items():
            timings[name].failure = timings[name].failure or found.failure
        fit = {
            name: session
            for name, session in sessions.items()
            if timings[name].failure is None and (name == reference or _holds(verdicts[name]))
        }
        batch = np.resize(image, (what.batch, *image.shape[1:]))
        way, timed = _end_to_end_case(bundle, cases, first, folder)
        images = cases.images(read, timed)  # while noise is still on the disk
        ended = _ends_early(lambda: time_all(fit, timings, batch, way, what.tier, what.throughput_batches))
        devices = {name: (session.device, session.description) for name, session in sessions.items()}
    alive = [each for each in here if each.name in fit]
    inside = _not_looked_inside(alive, ENDED if ended else "left out: --no-profile")
    if what.profile and not ended:
        ended = _ends_early(lambda: _look_inside(alive, timings, image, inside))
    warnings += [ENDED] if ended else []
    rows = [_row(each, candidates[0], compared, verdicts, timings, devices, inside) for each in candidates]
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commands=what.commands,
        tier=what.tier,
        batch=what.batch,
        reference=_reference_words(what),
        images=images,
        classes=bundle.classes,
        machine=machine,
        versions=package_versions(),
        digests=digests,
        peaks=inside.peaks,
        rows=tuple(rows),
        summary=summary(rows, what.tier, compared.labelled),
        warnings=tuple(warnings),
    )
    pictures = {name: tuple(each for _, each in found.worst) for name, found in compared.networks.items()}
    return Measured(report=report, pictures=pictures, window=bundle.preprocessing.window, ended_early=ended)


@dataclass(kw_only=True, slots=True)
class _Inside:
    """What was found inside the rows so far."""

    peaks: tuple[Peak, ...] | Missing
    profiles: dict[str, Profile | Missing]
    rooflines: dict[str, Roofline | Missing]


def _ends_early(work: Callable[[], None]) -> bool:
    """Work, and say whether somebody interrupted it; whatever it has finished until then is kept."""
    try:
        work()
    except KeyboardInterrupt:
        LOG.warning("interrupted; the report holds what was measured until now")
        return True
    return False


def _candidates(what: Bench, bundle: Bundle) -> tuple[list[Candidate], dict[str, str], list[str]]:
    digests = {"bundle manifest": sha256(bundle.folder / MANIFEST)}
    digests |= {name: entry.sha256 for name, entry in bundle.content.files.items()}
    variants = bundle_candidates(bundle, what.backends, with_reference=what.checkpoint is None)
    if what.checkpoint is None:
        return variants, digests, []
    from medseg_trt.train.checkpoint import load_checkpoint

    loaded = load_checkpoint(what.checkpoint)
    digests["checkpoint"] = sha256(what.checkpoint)
    if loaded.block_sha256:
        digests["language block"] = loaded.block_sha256
    warnings: list[str] = []
    if digests["checkpoint"] != bundle.content.source["sha256"]:
        warnings.append(f"{bundle.folder.name} was not built from {what.checkpoint.name}, but from another checkpoint")
    if loaded.preprocessing != bundle.preprocessing:
        warnings.append("the checkpoint prepares images in another way than the bundle; the bundle's way was taken")
    return [checkpoint_candidate(what.checkpoint, loaded.block_file), *variants], digests, warnings


def _reference_words(what: Bench) -> str:
    if what.checkpoint is not None:
        return f"PyTorch in float32, {what.checkpoint.name}"
    return "the bundle's own float32 network, which was compared with PyTorch at the build; no checkpoint was given"


def _verdicts(candidates: Sequence[Candidate], compared: NetworkScores, limit: float) -> dict[str, Verdict | Missing]:
    reference, metric = compared.networks[candidates[0].name], "Dice" if compared.labelled else AGREEMENT
    return {
        each.name: verdict(reference, compared.networks[each.name], limit, each.allowed, metric)
        for each in candidates[1:]
        if each.name in compared.networks
    }


def _holds(found: Verdict | Missing) -> bool:
    return isinstance(found, Verdict) and found.holds


def _end_to_end_case(
    bundle: Bundle, cases: MeasuredCases, image: Image, folder: Path
) -> tuple[WholeWay | Missing, str]:
    try:
        path, timed = one_image_file(image, folder, cases.cases[0].image)
    except MissingExtraError as error:
        return Missing(reason=str(error)), "none"
    way = WholeWay(image=path, preprocessing=bundle.preprocessing, classes=bundle.classes, output=folder)
    return way, timed


def _not_looked_inside(candidates: Sequence[Candidate], reason: str) -> _Inside:
    names, missing = [each.name for each in candidates], Missing(reason=reason)
    return _Inside(peaks=missing, profiles=dict.fromkeys(names, missing), rooflines=dict.fromkeys(names, missing))


def _look_inside(
    candidates: Sequence[Candidate], timings: Mapping[str, Timings], image: ndarray, inside: _Inside
) -> None:
    """Profile the rows that were timed, and put them under the machine's roof."""
    graphs = [each for each in candidates if each.graph is not None]
    unreached = _not_looked_inside(graphs, ENDED)
    inside.peaks, inside.profiles, inside.rooflines = unreached.peaks, unreached.profiles, unreached.rooflines
    LOG.info("measure how fast this machine multiplies and copies")
    inside.peaks = peaks([(each.backend, each.arithmetic) for each in graphs if not BACKENDS[each.backend].gpu])
    for each in graphs:
        LOG.info("profile the layers of %s", each.name)
        of_device = Missing(reason=NO_PEAK_OF_GPUS) if BACKENDS[each.backend].gpu else inside.peaks
        inside.profiles[each.name], inside.rooflines[each.name] = _inside_one(
            each, timings[each.name], image, of_device
        )


def _inside_one(
    candidate: Candidate, timings: Timings, image: ndarray, found: tuple[Peak, ...] | Missing
) -> tuple[Profile | Missing, Roofline | Missing]:
    try:
        ir = require("onnx_ir", "export")
    except MissingExtraError as error:
        return Missing(reason=str(error)), Missing(reason=str(error))
    from medseg_trt.export.graph.node_costs import node_costs
    from medseg_trt.export.graph.trace import OnnxGraph

    assert candidate.graph is not None  # the reference in PyTorch has none, and is not looked into
    costs = node_costs(OnnxGraph(model=ir.load(candidate.graph)))
    inside = profile(candidate.path, candidate.backend, candidate.precision, candidate.compute, image, costs)
    alone = timings.latency.get("model", Missing(reason="not measured"))
    if isinstance(found, Missing):
        return inside, found
    if not isinstance(alone, Latency):
        return inside, alone
    peak = next((each for each in found if each.arithmetic == candidate.arithmetic), None)
    if peak is None:
        return inside, Missing(reason=f"no back-end here runs a plain {candidate.arithmetic} matrix product")
    return inside, roofline(alone, sum(each.macs for each in costs), sum(each.bytes for each in costs), peak)


def _row(
    candidate: Candidate,
    reference: Candidate,
    compared: NetworkScores,
    verdicts: Mapping[str, Verdict | Missing],
    timings: Mapping[str, Timings],
    devices: Mapping[str, tuple[str, str]],
    inside: _Inside,
) -> Row:
    name = candidate.name
    not_run = Missing(reason=candidate.statement if not candidate.executed else "it did not start")
    row = timings.get(name, Timings(start=not_run, failure=None))
    judged = REFERENCE_VERDICT if candidate is reference else verdicts.get(name, not_run)
    known = name in compared.networks
    accuracy = compared.accuracy(name) if known else not_run
    theirs = compared.accuracy(reference.name)
    paired = (
        differences(theirs, accuracy, judged)
        if isinstance(accuracy, Accuracy) and isinstance(theirs, Accuracy) and isinstance(judged, Verdict)
        else ()
    )
    nothing = _why_not_timed(row, judged, not_run, known)
    device, description = devices.get(name, ("none", candidate.backend))
    speed = speedups(timings[reference.name], row) if candidate is not reference and row.latency else {}
    return Row(
        name=name,
        role=candidate.role,
        backend=candidate.backend,
        device=device,
        description=description,
        executed=candidate.executed,
        statement=candidate.statement,
        precision=candidate.precision,
        compute=candidate.compute,
        flavour=candidate.flavour,
        size_mb=candidate.size_mb,
        failure=row.failure,
        warnings=tuple(row.warnings),
        start=row.start,
        latency={scope: row.latency.get(scope, nothing) for scope in SCOPES},
        speedup={
            scope: speed.get(scope, nothing if candidate is not reference else REFERENCE_VERDICT) for scope in SCOPES
        },
        stages_ms=row.stages_ms,
        throughput=row.throughput or nothing,
        memory=row.memory or nothing,
        energy=row.energy or nothing,
        agreement=compared.networks[name].agreement() if known else not_run,
        accuracy=accuracy,
        differences=paired,
        verdict=judged,
        worst=tuple(entry for entry, _ in compared.networks[name].worst) if known else (),
        profile=inside.profiles.get(name, Missing(reason=_no_profile(candidate, nothing))),
        roofline=inside.rooflines.get(name, Missing(reason=_no_profile(candidate, nothing))),
    )


def _why_not_timed(row: Timings, judged: Verdict | Missing, not_run: Missing, known: bool) -> Missing:
    if row.failure is not None:
        return Missing(reason=row.failure)
    if isinstance(judged, Verdict) and not judged.holds:
        return Missing(reason="it draws other masks than the reference, so it is not timed")
    return Missing(reason="not measured") if known else not_run


def _no_profile(candidate: Candidate, nothing: Missing) -> str:
    return "PyTorch runs without a graph" if candidate.backend == "pytorch" else nothing.reason
