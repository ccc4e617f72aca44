"""Dataclasses of ``report.json``.

A figure that may be missing has the type ``X | Missing``, and ``Missing`` holds the reason. Times are milliseconds,
sizes 10^6 bytes, Dice and IoU 0 … 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from medseg_trt.bench.accuracy_schema import Accuracy, Agreement, Difference, Verdict, WorstCase
from medseg_trt.bench.augmentation import AugmentationGain
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Peak, Profile, Roofline
from medseg_trt.bench.timing_schema import (
    SCOPES,
    Energy,
    Latency,
    Memory,
    OnGpu,
    Scope,
    Speedup,
    Start,
    Throughput,
    Tier,
)
from medseg_trt.machine import Machine
from medseg_trt.spec import Classes

SCHEMA = 4
READABLE = (3, 4)  # schema 4 adds peers and what a time on a GPU consists of, and calls ``flavour`` ``variant``
NOT_ON_GPU = Missing(reason="it was not timed on a GPU")


@dataclass(frozen=True, kw_only=True, slots=True)
class CaseFile:
    """A case of the measurement."""

    case: str
    slices: int
    height: int
    width: int
    sha256: str  # of the bytes of the image's files, one file after the other

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The images that all rows ran on."""

    description: str  # number, data set and split
    timed: str  # the image of the end-to-end scope
    data: str  # the data folder's name
    split: str
    labelled: bool  # False: there are no masks, the reference's are the truth
    slices: int
    cases: tuple[CaseFile, ...]

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One network on one back-end."""

    name: str  # unique in this report
    role: Literal["reference", "variant", "peer"]  # a peer is PyTorch run in another way; its masks fail nothing
    backend: str  # a key of sessions.backends.BACKENDS, or "pytorch"
    device: str
    description: str  # back-end, version, precision and threads, from the session
    executed: bool  # False: it was only built or simulated
    statement: str  # what ran here, and what was only built or simulated
    precision: str
    compute: str  # number format of the float parts
    variant: str  # the graph's dialect, or how PyTorch runs it
    size_mb: float  # of weights and graph on the disk
    failure: str | None  # the reason for an early end; earlier measurements are kept
    warnings: tuple[str, ...]
    start: Start | Missing
    latency: Mapping[Scope, Latency | Missing]
    speedup: Mapping[Scope, Speedup | Missing]
    stages_ms: Mapping[str, float]  # medians of the end-to-end stages; empty if not measured
    throughput: tuple[Throughput, ...] | Missing
    memory: Memory | Missing
    energy: Energy | Missing
    agreement: Agreement | Missing
    accuracy: Accuracy | Missing
    differences: tuple[Difference, ...]
    verdict: Verdict | Missing
    worst: tuple[WorstCase, ...]  # the largest loss first
    profile: Profile | Missing
    roofline: Roofline | Missing
    on_gpu: OnGpu | Missing = NOT_ON_GPU

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A summary of the report."""

    holds: bool  # whether the masks of every row that ran hold
    headline: str
    lines: tuple[str, ...]
    fastest: str | None  # the row with the lowest median among those whose masks hold

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All results of a ``bench``."""

    schema: int = SCHEMA
    created: str  # ISO 8601, UTC
    commands: tuple[str, ...]  # that made the report
    tier: Tier
    batch: int  # of the latencies
    reference: str  # description
    augmentation: AugmentationGain | None = None  # None: --tta was not given
    postprocessing: str = ""  # of the masks of all rows; empty: they are as the networks make them
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
        """Return the row with a name."""
        return next(row for row in self.rows if row.name == name)
