"""What a measurement is written down as: the frozen data of ``report.json``, and how such a file is read back.

Every figure is either there or says why it is not: a field that may lack is ``X | Missing``, and ``Missing`` holds the
reason in words. Times are milliseconds, sizes 10^6 bytes, Dice and IoU 0 … 1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from medseg_trt.bench.accuracy_schema import Accuracy, Agreement, Difference, Verdict, WorstCase
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.profile_schema import Peak, Profile, Roofline
from medseg_trt.bench.timing_schema import SCOPES, Energy, Latency, Memory, Scope, Speedup, Start, Throughput, Tier
from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.machine import Machine
from medseg_trt.spec import Classes, from_dict

SCHEMA = 3
REPORT = "report.json"
MAX_REPORT_BYTES = 1 << 28  # ten minutes of half a millisecond in three scopes and ten rows take a tenth of it


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
