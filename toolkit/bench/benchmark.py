"""Measure networks against a reference on the same images: masks first, then speed, then where the time goes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy import ndarray

from medseg_trt.bench.accuracy import AGREEMENT, NetworkScores, compare_all, verdict
from medseg_trt.bench.accuracy_record import SliceImages
from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bench.augmentation import AugmentationGain, augmentation_gain
from medseg_trt.bench.candidates import BenchDevice, Candidate, bundle_candidates, checkpoint_candidates
from medseg_trt.bench.measured_cases import MeasuredCases, Shape, measured_cases, one_image_file
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profiling import Profiling, profile_all
from medseg_trt.bench.report_row import report_row
from medseg_trt.bench.schema import Report
from medseg_trt.bench.summary import summary
from medseg_trt.bench.timed_session import EndToEndCase, MeasuredSession
from medseg_trt.bench.timing_schema import Tier
from medseg_trt.bench.timings import BATCHES, open_candidates, time_all
from medseg_trt.bundles.bundle import MANIFEST, Bundle, load_bundle
from medseg_trt.devices import AUTO, ComputeDevice
from medseg_trt.engines.choice import require_gpu
from medseg_trt.errors import MedsegError, MissingExtraError
from medseg_trt.export.gate import empty_gate
from medseg_trt.files import sha256
from medseg_trt.gpu import find_gpu
from medseg_trt.imaging.images import Image
from medseg_trt.imaging.preprocess import for_image, prepare
from medseg_trt.imaging.segment import Run
from medseg_trt.inference.prefetch import Prefetcher
from medseg_trt.machine import package_versions, this_machine
from medseg_trt.progress import LOG, track
from medseg_trt.sessions.augmented import check_tta

ENDED = "interrupted: the measurement ended before this one was complete"
NO_RATIO = "{} runs on the CPU, and no ratio is formed between devices"


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Which networks to measure, on which images, and for how long."""

    bundle: Path
    checkpoint: Path | None  # the reference; None: the bundle's fp32 network
    data: Path | None  # None: generated noise
    split: str
    tier: Tier
    backends: tuple[str, ...] = ()  # none: the fastest one for every precision
    batch: int = 1  # of the latencies of the network alone
    throughput_batches: tuple[int, ...] = BATCHES
    max_dice_drop: float | None = None  # None: that of the build
    profile: bool = True  # also profile the layers and measure the machine's peaks
    commands: tuple[str, ...] = ()
    tta: str | None = None  # also measure this test-time augmentation
    device: ComputeDevice = AUTO  # auto: all rows that can run, the reference on the GPU where PyTorch has it
    verify_key: Path | None = None  # the signer's public key; None: only digests are checked


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """The report, and its worst slices by row, in the order of ``Row.worst``."""

    report: Report
    worst_slices: Mapping[str, tuple[SliceImages, ...]]
    window: tuple[float, float]  # values drawn black and white
    ended_early: bool  # by an interrupt


def bench(spec: Bench, scratch: Path) -> Measured:
    """Compare the masks of all networks, time those whose masks hold, then profile these.

    Args:
        spec: the networks and images.
        scratch: a folder on the disk; masks are written below it during the end-to-end timing.

    An interrupt during timing or profiling ends the measurement; the report holds what was measured before.

    Raises:
        InputError: the data cannot be used.
        UsageError: the networks and the data do not fit.
        ArtefactError: the checkpoint or the bundle cannot be used, or the reference dies.
    """
    bundle = load_bundle(spec.bundle, spec.verify_key)
    if spec.tta is not None:
        check_tta(spec.tta, bundle.preprocessing.image_size)
    candidates, digests, warnings = _candidates(spec, bundle)
    machine = this_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=scratch, prefix=".partial-")))
        cases = measured_cases(spec.data, spec.split, bundle, folder)
        first = next(cases.read())[1]
        image = _middle_slice(first, bundle)
        executable = [candidate for candidate in candidates if candidate.executed]
        sessions, timings = open_candidates(executable, image, spec.tier.starts, stack)
        if candidates[0].name not in sessions:
            raise MedsegError(f"the reference does not start: {timings[candidates[0].name].failure}")
        scores, shapes = _compare(sessions, cases, bundle, stack)
        for name, record in scores.networks.items():
            timings[name].failure = timings[name].failure or record.failure
        verdicts = _verdicts(candidates, scores, _max_dice_drop(spec, bundle))
        holding = {candidates[0].name, *(name for name, judgement in verdicts.items() if _holds(judgement))}
        accepted = {
            name: session for name, session in sessions.items() if name in holding and not timings[name].failure
        }
        for name in sessions.keys() - accepted.keys():
            sessions[name].close()  # not to be measured; on a GPU, its memory is the others' from now on
        batch = np.resize(image, (spec.batch, *image.shape[1:]))
        case, timed = _end_to_end_case(bundle, cases, first, folder)
        images = cases.images(shapes, timed)  # while generated noise is still on the disk
        augmentation = _augmentation(spec.tta, accepted, cases, bundle, warnings)
        measured = partial(time_all, accepted, timings, batch, case, spec.tier, spec.throughput_batches)
        ended = _ends_early(partial(measured, spec.device.number))
        devices = {name: (session.device, session.description) for name, session in sessions.items()}
    profiled = [candidate for candidate in executable if candidate.name in accepted]
    profiling = Profiling.missing(profiled, ENDED if ended else "left out: --no-profile")
    if spec.profile and not ended:
        graphs = [candidate for candidate in profiled if candidate.graph is not None]
        profiling = Profiling.missing(graphs, ENDED)
        ended = _ends_early(partial(profile_all, graphs, timings, image, profiling))
    warnings += [ENDED] if ended else []
    remarks = (
        empty_gate(item.reference, item.limit, "Dice") for item in verdicts.values() if isinstance(item, Verdict)
    )
    warnings += dict.fromkeys(remark for remark in remarks if remark is not None)
    rows = [
        report_row(candidate, candidates[0], scores, verdicts, timings, devices, profiling) for candidate in candidates
    ]
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        commands=spec.commands,
        tier=spec.tier,
        batch=spec.batch,
        reference=_describe_reference(spec, devices[candidates[0].name][0]),
        augmentation=augmentation,
        postprocessing="" if bundle.postprocessing is None else bundle.postprocessing.text(),
        images=images,
        classes=bundle.classes,
        machine=machine,
        versions=package_versions(),
        digests=digests,
        peaks=profiling.peaks,
        rows=tuple(rows),
        summary=summary(rows, spec.tier, scores.labelled),
        warnings=tuple(warnings),
    )
    worst = {name: tuple(slice_images for _, slice_images in record.worst) for name, record in scores.networks.items()}
    return Measured(report=report, worst_slices=worst, window=bundle.preprocessing.window, ended_early=ended)


def _middle_slice(image: Image, bundle: Bundle) -> ndarray:
    """Return the prepared middle slice of an image, (1, 3, height, width)."""
    preprocessing = for_image(bundle.preprocessing, image.pixels)
    return prepare(image.pixels[image.num_slices // 2], preprocessing, image.spacing_in_plane)[np.newaxis]


def _compare(
    sessions: Mapping[str, MeasuredSession], cases: MeasuredCases, bundle: Bundle, stack: ExitStack
) -> tuple[NetworkScores, list[tuple[str, Shape]]]:
    """Return the scores of all networks, and name and shape of every case."""
    LOG.info("compare the masks of %d networks on %d cases of %s", len(sessions), len(cases.cases), cases.data)
    shapes: list[tuple[str, Shape]] = []
    runs: dict[str, Run] = {name: session.run for name, session in sessions.items()}
    prefetcher = stack.enter_context(Prefetcher())  # decodes a case while the networks run on the one before
    scores = compare_all(
        runs,
        track(prefetcher.prefetch(cases.read()), "compare", total=len(cases.cases)),
        bundle.preprocessing,
        bundle.classes,
        lambda name, image: shapes.append((name, (image.num_slices, *image.size))),
        bundle.finish,
    )
    return scores, shapes


def _augmentation(
    tta: str | None, accepted: Mapping[str, MeasuredSession], cases: MeasuredCases, bundle: Bundle, warnings: list[str]
) -> AugmentationGain | None:
    """Measure test-time augmentation with the bundle's first row whose masks hold, else with the reference.

    If that fails, a warning says why, and the report goes on.
    """
    if tta is None:
        return None
    name = ([*accepted][1:] or [*accepted])[0]
    LOG.info("tta %s with %s", tta, name)
    try:
        return augmentation_gain(tta, name, accepted[name].run, cases.read(), bundle)
    except MedsegError as error:  # such as too little memory
        warnings.append(f"not measured: {error}")
        return None


def _max_dice_drop(spec: Bench, bundle: Bundle) -> float:
    return bundle.content.build.max_dice_drop if spec.max_dice_drop is None else spec.max_dice_drop


def _holds(judgement: Verdict | Missing) -> bool:
    return isinstance(judgement, Verdict) and judgement.holds


def _ends_early(work: Callable[[], None]) -> bool:
    """Run a measurement, and return whether it was interrupted; what it has measured until then is kept."""
    try:
        work()
    except KeyboardInterrupt:
        LOG.warning("interrupted; the report holds what was measured until now")
        return True
    return False


def _candidates(spec: Bench, bundle: Bundle) -> tuple[list[Candidate], dict[str, str], list[str]]:
    digests = {"bundle manifest": sha256(bundle.folder / MANIFEST)}
    digests |= {name: entry.sha256 for name, entry in bundle.content.files.items()}
    device, warnings = _device(spec)
    variants = bundle_candidates(bundle, spec.backends, with_reference=spec.checkpoint is None, device=device)
    if spec.checkpoint is None:
        return variants, digests, warnings
    from medseg_trt.train.checkpoint import load_checkpoint

    loaded = load_checkpoint(spec.checkpoint)
    digests["checkpoint"] = sha256(spec.checkpoint)
    if loaded.block_sha256:
        digests["language block"] = loaded.block_sha256
    if digests["checkpoint"] != bundle.content.source["sha256"]:
        warnings.append(f"{bundle.folder.name} was not built from {spec.checkpoint.name}, but from another checkpoint")
    if loaded.preprocessing != bundle.preprocessing:
        warnings.append("checkpoint and bundle have different preprocessing; the bundle's was used")
    return [*checkpoint_candidates(spec.checkpoint, loaded.block_file, device), *variants], digests, warnings


def _device(spec: Bench) -> tuple[BenchDevice, list[str]]:
    """Return where the networks run, and what a reader has to know of it.

    Raises:
        DeviceError: the GPU that was asked for is not there, or PyTorch does not have it.
    """
    asked = spec.device
    gpu = require_gpu(asked.number) if asked.kind == "cuda" else find_gpu() if asked.gpu_allowed else None
    if gpu is None:
        return BenchDevice(asked=asked, gpu=None), []
    if spec.checkpoint is None:
        return BenchDevice(asked=asked, gpu=gpu), [NO_RATIO.format("without --ckpt the reference")]
    from medseg_trt.train.torch_device import torch_device

    if torch_device(asked).type == "cpu":  # raises where the GPU was asked for
        return BenchDevice(asked=asked, gpu=gpu), [NO_RATIO.format("this PyTorch finds no GPU, so the reference")]
    return BenchDevice(asked=asked, gpu=gpu, pytorch=ComputeDevice("cuda", asked.number)), []


def _describe_reference(spec: Bench, device: str) -> str:
    if spec.checkpoint is not None:
        return f"PyTorch in float32 on {device}, {spec.checkpoint.name}"
    return "the bundle's fp32 network, which the build compared with PyTorch; no checkpoint was given"


def _verdicts(candidates: Sequence[Candidate], scores: NetworkScores, limit: float) -> dict[str, Verdict | Missing]:
    reference, metric = scores.networks[candidates[0].name], "Dice" if scores.labelled else AGREEMENT
    return {
        candidate.name: verdict(reference, scores.networks[candidate.name], limit, candidate.allowed, metric)
        for candidate in candidates[1:]
        if candidate.name in scores.networks
    }


def _end_to_end_case(
    bundle: Bundle, cases: MeasuredCases, image: Image, folder: Path
) -> tuple[EndToEndCase | Missing, str]:
    try:
        path, timed = one_image_file(image, folder, cases.cases[0].image)
    except MissingExtraError as error:
        return Missing(reason=str(error)), "none"
    case = EndToEndCase(
        image=path,
        preprocessing=bundle.preprocessing,
        classes=bundle.classes,
        postprocessing=bundle.postprocessing,
        output=folder,
    )
    return case, timed
