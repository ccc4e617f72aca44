"""Write a report as JSON, HTML and Markdown, all from the same figures."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from medseg_trt.bench.accuracy_schema import Accuracy, Verdict
from medseg_trt.bench.benchmark import Measured
from medseg_trt.bench.report.page import html_page, markdown_page
from medseg_trt.bench.report_file import REPORT
from medseg_trt.bench.schema import Report, Row
from medseg_trt.bench.timing_schema import Latency, Speedup
from medseg_trt.errors import MissingExtraError
from medseg_trt.files import atomic_file, write_json
from medseg_trt.progress import LOG
from medseg_trt.spec import to_dict

PAGE, MARKDOWN = "index.html", "report.md"
HEADER = ("network", "median ms", "p90 ms", "runs", "times as fast", "Dice", "drop <", "verdict", "MB")


def write_report(measured: Measured, folder: Path) -> Path:
    """Write ``report.json``, ``report.md`` and ``index.html``; return the path of the page, or of the JSON without it.

    Without the extra ``report`` only the JSON is written, with a warning. An earlier report is replaced when all files
    of the new one are complete.
    """
    report, pages = measured.report, dict[str, str]()
    try:
        pages = {MARKDOWN: markdown_page(report), PAGE: html_page(report, measured.worst_slices, measured.window)}
    except MissingExtraError as error:
        LOG.warning("index.html and report.md are not written: %s", error)
    with ExitStack() as stack:
        write_json(stack.enter_context(atomic_file(folder / REPORT)), to_dict(report), indent=None)
        for name, text in pages.items():
            stack.enter_context(atomic_file(folder / name)).write_text(text, encoding="utf-8")
    return folder / (PAGE if pages else REPORT)


def cells(report: Report) -> list[tuple[str, ...]]:
    """Return the terminal's table as text, under ``HEADER``."""
    return [_cells(row, report) for row in report.rows]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; all columns but the first are right-aligned."""
    rule = [":--", *("--:" for _ in header[1:])]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, rule, *rows)]


def _cells(row: Row, report: Report) -> tuple[str, ...]:
    alone, speed, judged = row.latency["model"], row.speedup["model"], row.verdict
    known = isinstance(alone, Latency)
    return (
        row.name,
        f"{alone.median_ms:.2f}" if known else "–",
        f"{alone.p90_ms:.2f}" if known else "–",
        str(alone.runs) if known else "–",
        f"{speed.ratio:.2f}" if isinstance(speed, Speedup) else "–",
        _dice(row, report),
        f"{judged.drop_high:.4f}" if isinstance(judged, Verdict) else "–",
        _verdict(row),
        f"{row.size_mb:.1f}",
    )


def _dice(row: Row, report: Report) -> str:
    """Return the mean Dice of a verdict, of which the reference has none of its own: it is in those of the others."""
    if isinstance(row.verdict, Verdict):
        return f"{row.verdict.candidate:.4f}"
    if row.role == "reference":
        for other in report.rows:
            if isinstance(other.verdict, Verdict):
                return f"{other.verdict.reference:.4f}"
    accuracy = row.accuracy
    return f"{accuracy.mean_dice:.4f}" if isinstance(accuracy, Accuracy) and accuracy.mean_dice is not None else "–"


def _verdict(row: Row) -> str:
    if row.role == "reference":
        return "reference"
    if not row.executed:
        return "not executed"
    if row.failure is not None:
        return "failed"
    return ("holds" if row.verdict.holds else "does not hold") if isinstance(row.verdict, Verdict) else "–"
