"""What a measurement is written as: JSON for machines, Markdown for readers, both from the same rows."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from medseg_trt.files import atomic_file, write_json
from medseg_trt.measure import Timing

SCHEMA = 1
PACKAGES = ("medseg-trt", "numpy", "torch", "onnx", "onnxruntime")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchRow:
    """One network on one back-end, compared with the PyTorch reference on the same images."""

    name: str
    backend: str
    device: str
    executed: bool  # False where a row was only built or simulated
    max_abs_error: float  # of the logits
    agreement: float  # share of pixels with the same label, 0 … 1
    mean_dice: float | None  # over the classes that occur, where the images have masks
    timing: Timing
    size_mb: float  # 10^6 bytes of weights and graph on disk


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that a ``bench`` found."""

    images: str  # which, how many, of what split
    batch: int
    rows: tuple[BenchRow, ...]  # the reference first
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {"schema": SCHEMA, **asdict(self)}


def machine() -> dict[str, Any]:
    """Say what this machine is, as far as it bears on a measurement."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a figure depends on, as far as they are installed."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.json`` and ``report.md`` and return the path of the latter."""
    write_json(folder / "report.json", report.to_dict())
    path = folder / "report.md"
    with atomic_file(path) as temporary:
        temporary.write_text(to_markdown(report), encoding="utf-8")
    return path


def to_markdown(report: Report) -> str:
    """Return the report as a Markdown page."""
    machine = report.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        "# medseg-trt bench",
        "",
        f"Images: {report.images}. Batch {report.batch}; the network alone is timed (decoding and resizing are not), "
        "the rows in turn.",
        "",
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}, Python {machine['python']}; "
        f"{versions}.",
        "",
        *table(HEADER, bench_cells(report)),
        "",
        "Agreement is the share of pixels with the same label as the first row. "
        "Research use only; not a medical device.",
        "",
    ]
    return "\n".join(lines)


HEADER = ("network", "median ms", "p90 ms", "runs", "speed", "max abs error", "agreement", "mean Dice", "size MB")


def bench_cells(report: Report) -> list[tuple[str, ...]]:
    """Return the table's rows as text, under ``HEADER``."""
    return [_cells(row, report.rows[0].timing.median_ms) for row in report.rows]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; all columns but the first are set flush right."""
    rule = [":--", *("--:" for _ in header[1:])]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, rule, *rows)]


def _cells(row: BenchRow, reference_ms: float) -> tuple[str, ...]:
    return (
        f"{row.name} ({row.device}{'' if row.executed else ', not executed'})",
        f"{row.timing.median_ms:.2f}",
        f"{row.timing.p90_ms:.2f}",
        str(row.timing.runs),
        f"{reference_ms / row.timing.median_ms:.2f}x",
        f"{row.max_abs_error:.1e}",
        f"{100 * row.agreement:.3f} %",
        "–" if row.mean_dice is None else f"{row.mean_dice:.4f}",
        f"{row.size_mb:.1f}",
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
