"""What a measurement is written down as: the frozen data of ``report.json``, and how such a file is read back.

Every figure is either there or says why it is not: a field that may lack is ``X | Missing``, and ``Missing`` holds the
reason in words. Times are milliseconds, sizes 10^6 bytes, Dice and IoU 0 … 1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.machine import Machine
from medseg_trt.metrics.overlap import ClassScore, MeanScore
from medseg_trt.spec import Classes, from_dict

SCHEMA = 3
REPORT = "report.json"
MAX_REPORT_BYTES = 1 << 28  # ten minutes of half a millisecond in three scopes and ten rows take a tenth of it

Scope = Literal["model", "model+transfers", "end-to-end"]
Unit = Literal["cases", "slices"]
SCOPES: Mapping[Scope, str] = {
    "model": "the network alone, its input prepared and in place; no decoding, no resizing",
    "model+transfers": "the network, and the way of the input to the device and of the answer back",
    "end-to-end": "from the image file to the mask file on the disk: read, prepare, run, bring back to size, write",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """A figure that does not exist, and why."""

    reason: str

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tier:
    """How long is measured."""

    name: str  # quick, report, certify, or "custom" where an option changed it
    warmup_ms: float  # of every row and scope, uncounted
    warmup_runs: int  # at least so many
    duration_s: float  # of every row and scope
    min_runs: int  # at least so many
    starts: int  # of every row, each in a process of its own

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseFile:
    """A case that was measured on."""

    case: str
    slices: int
    height: int
    width: int
    sha256: str  # of the image's files, one after the other

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The images that all rows were shown."""

    description: str  # which, how many, of what split
    timed: str  # the one image of the end-to-end scope, in words
    data: str  # the data folder's name
    split: str
    labelled: bool  # False: nobody has drawn masks, the reference's are the truth
    slices: int
    cases: tuple[CaseFile, ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """How long one row took for one batch in one scope, after its warm-up."""

    rounds_ms: tuple[tuple[float, ...], ...]  # every single time; in each round every row has its turn
    runs: int
    mean_ms: float
    min_ms: float
    max_ms: float
    median_ms: float  # geometric mean of the rounds' medians: the ratio of two of them is their ``Speedup``
    p90_ms: float  # percentiles of all times, interpolated linearly between the sorted ones
    p95_ms: float
    p99_ms: float
    p90_estimate_ms: float | None  # MLPerf's early-stopping estimate at 99 % confidence; None: too few runs
    p99_estimate_ms: float | None
    variation: float  # coefficient of variation: standard deviation by mean
    stable: bool  # whether the variation is low enough for this kind of device
    warmup_runs: int
    timer: str  # what measured: the host's clock, or CUDA events
    set_aside_ms: tuple[float, ...] = ()  # steps of the clock that no run can take; reported, in no other figure

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def samples_ms(self) -> list[float]:
        """All times, one after the other."""
        return [sample for taken in self.rounds_ms for sample in taken]


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """How many times as fast as the reference a row is in one scope: the ratio of the two ``median_ms``."""

    ratio: float
    low: float  # the interval
    high: float
    confidence: float  # of the interval, 0 … 1
    rounds: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How long it takes until there is a first answer, the best of several processes of their own."""

    starts: int
    import_ms: float  # from the start of the process until the back-end's package is there
    load_ms: float  # read the weights, optimise, compile
    first_ms: float  # the first inference after it
    to_first_mask_ms: float  # all of it, from the start of the process
    file_cache: str  # whether the files had to come from the disk

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """How many images a second go through, as fast as they can be handed over."""

    batch: int  # images at once
    streams: int  # callers at the same time
    threads: int | None  # of each; None: the back-end's own choice
    images_per_s: float
    images: int
    seconds: float

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What a row's own process takes, of the host and of the device."""

    loaded_mb: float  # resident after loading
    peak_mb: float  # resident at its highest until all latencies were measured
    anonymous_mb: float  # of the last, what is not a mapped file
    device_mb: float | Missing

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """What one image takes, everything else on the meter included."""

    joules_per_image: float
    watts: float  # mean
    meter: str  # RAPL, NVML or tegrastats, and what it covers

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far a row's answers are from the reference's on the same images, whatever the truth."""

    max_abs_error: float  # of the logits
    labels: float  # share of the network's pixels with the same label, 0 … 1
    sqnr_db: float | None  # signal to rounding noise of the logits; None: they are equal

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseAccuracy:
    """The scores of one case, class by class."""

    case: str
    scores: tuple[ClassScore, ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceCounts:
    """The pixels of every class but the background in one slice: right, in the mask, in the truth."""

    case: str
    slice: int
    counts: tuple[tuple[int, int, int], ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How good a row's masks are, at the images' own size."""

    metric: str  # "Dice", or "agreement with the reference in Dice" where nobody has drawn masks
    mean_dice: float | None  # over the classes that occur
    mean_iou: float | None
    mean_hd95: float | None
    hd95_unit: str | None  # "mm" or "pixels"; None: HD95 was not measured
    means: tuple[MeanScore, ...]  # by class, over the cases that have it
    cases: tuple[CaseAccuracy, ...]
    slices: tuple[SliceCounts, ...]  # what a bootstrap can resample where there are few cases

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A row's score minus the reference's, paired on the same images."""

    metric: Literal["Dice", "IoU", "HD95"]
    class_name: str | None  # None: the mean over the classes
    unit: Unit  # what was paired and resampled
    pairs: int
    reference: float
    candidate: float
    difference: float  # candidate minus reference
    low: float  # the interval of the difference
    high: float
    confidence: float | None  # of the interval, 0 … 1; None: the ends are the range of too few pairs for an interval

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a row's masks are as good as the reference's: a test of non-inferiority in Dice."""

    holds: bool
    reference: float  # mean Dice, as the gate of a build counts it: a class found where there is none counts 0
    candidate: float
    drop: float  # negative where the row is better
    drop_low: float  # the interval
    drop_high: float
    limit: float  # that the upper end must not exceed
    confidence: float  # of the interval, 0 … 1
    unit: Unit
    pairs: int
    words: str

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstCase:
    """A slice on which a row does worst against the reference."""

    case: str
    slice: int
    reference_dice: float | None  # mean over the classes that occur in the slice
    candidate_dice: float | None
    difference: float  # candidate minus reference
    changed_pixels: int  # with another label than the reference's

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTime:
    """What one step of the network takes, as the back-end says."""

    name: str
    kind: str  # the operator
    kernel: str  # the back-end's implementation, where it says
    part: str  # of the network: resnet, vit, block, decoder; "other" where that cannot be told
    runs: int
    ms: float  # of one inference
    share: float  # of all steps, 0 … 1
    macs: int | None  # multiply-accumulates; None where the step multiplies no matrices or cannot be told
    bytes: int | None  # of weights and values read and written, each once

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartTime:
    """What a part of the network takes."""

    part: str
    ms: float
    share: float
    macs: int
    steps: int

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Where a row's time goes; taken in a run of its own, since looking costs time."""

    tool: str
    runs: int
    total_ms: float
    parts: tuple[PartTime, ...]  # the largest first
    layers: tuple[LayerTime, ...]  # the largest first

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """What this machine reached in the same run: a large matrix product, and a copy."""

    arithmetic: str  # fp32, bf16 or int8
    gmacs_per_s: float  # 10^9 multiply-accumulates a second
    gemm: str  # what was multiplied, by what
    gbytes_per_s: float  # 10^9 bytes a second, read and written
    copy: str

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """A row against its machine's roof."""

    arithmetic: str  # of Peak
    macs: int  # of one image
    bytes: int  # of one image: weights and values, each read and written once
    intensity: float  # MACs a byte
    reached_gmacs_per_s: float
    roof_gmacs_per_s: float  # at this intensity
    share: float  # reached by roof

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One network on one back-end."""

    name: str  # its own in this report
    role: Literal["reference", "variant"]
    backend: str  # a key of sessions.backends.BACKENDS, or "pytorch"
    device: str
    description: str  # back-end, version, precision and threads, as the session says
    executed: bool  # False where a row was only built or simulated
    statement: str  # in words: what ran here, and what was only built or simulated
    precision: str
    compute: str  # what float parts are computed in
    flavour: str
    size_mb: float  # of weights and graph on the disk
    failure: str | None  # why it ended early; what was measured before is kept
    warnings: tuple[str, ...]
    start: Start | Missing
    latency: Mapping[Scope, Latency | Missing]
    speedup: Mapping[Scope, Speedup | Missing]
    stages_ms: Mapping[str, float]  # medians of the parts of the end-to-end scope; empty where it was not measured
    throughput: tuple[Throughput, ...] | Missing
    memory: Memory | Missing
    energy: Energy | Missing
    agreement: Agreement | Missing
    accuracy: Accuracy | Missing
    differences: tuple[Difference, ...]
    verdict: Verdict | Missing
    worst: tuple[WorstCase, ...]  # the worst first
    profile: Profile | Missing
    roofline: Roofline | Missing

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The report in a few lines."""

    holds: bool  # whether every row that ran is as good as the reference
    headline: str
    lines: tuple[str, ...]
    fastest: str | None  # the row whose masks hold and whose median is lowest

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that a ``bench`` found."""

    schema: int = SCHEMA
    created: str  # ISO 8601, UTC
    commands: tuple[str, ...]  # to repeat it
    tier: Tier
    batch: int  # of the latencies
    reference: str  # what everything is compared with, in words
    images: Images
    classes: Classes
    machine: Machine
    versions: Mapping[str, str]
    digests: Mapping[str, str]  # SHA-256 of the checkpoint, its block and the bundle's manifest
    peaks: tuple[Peak, ...] | Missing
    rows: tuple[Row, ...]  # the reference first
    summary: Summary
    warnings: tuple[str, ...] = ()
    scopes: Mapping[str, str] = field(default_factory=lambda: {str(scope): words for scope, words in SCOPES.items()})

    __pydantic_config__ = {"extra": "forbid"}

    def row(self, name: str) -> Row:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)


def read_bench_report(path: Path) -> Report:
    """Read what ``bench`` wrote: a ``report.json``, or the folder that it lies in.

    Raises:
        InputError: there is no such file, or it is no JSON.
        ArtefactError: it is of another version, or not what a report must be.
    """
    path = path / REPORT if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path} does not exist; make a report: medseg-trt bench -o DIR")
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise ArtefactError(f"{path} is larger than {MAX_REPORT_BYTES >> 20} MiB; it is no report")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    if fields.get("schema") != SCHEMA:
        raise ArtefactError(
            f"{path} has schema {fields.get('schema')!r}; this version reads {SCHEMA}. "
            "Measure again: medseg-trt bench -o DIR"
        )
    report = from_dict(Report, fields, str(path))
    if not report.rows:
        raise ArtefactError(f"{path}: Report rows: there is no row")
    return report
