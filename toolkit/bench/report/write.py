"""Write what was measured: JSON for machines, a page for readers, Markdown for both, all from the same figures."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from medseg_trt.bench.accuracy_schema import Verdict
from medseg_trt.bench.benchmark import Measured
from medseg_trt.bench.report.page import html_page, markdown_page
from medseg_trt.bench.schema import REPORT, Report, Row
from medseg_trt.bench.timing_schema import Latency, Speedup
from medseg_trt.errors import MissingExtraError
from medseg_trt.files import atomic_file, write_json
from medseg_trt.progress import LOG
from medseg_trt.spec import to_dict

PAGE, MARKDOWN = "index.html", "report.md"
HEADER = ("network", "median ms", "p90 ms", "runs", "times as fast", "Dice", "drop <", "verdict", "MB")


def write_report(measured: Measured, folder: Path) -> Path:
    """Write ``report.json``, ``report.md`` and ``index.html``, and return the last one of them that could be made.

    Without the extra ``report`` there is the JSON alone, with a warning. An earlier report stays until all of the new
    one is on the disk.
    """
    report, pages = measured.report, dict[str, str]()
    try:
        pages = {MARKDOWN: markdown_page(report), PAGE: html_page(report, measured.pictures, measured.window)}
    except MissingExtraError as error:
        LOG.warning("no page is drawn: %s", error)
    with ExitStack() as stack:
        write_json(stack.enter_context(atomic_file(folder / REPORT)), to_dict(report))
        for name, text in pages.items():
            stack.enter_context(atomic_file(folder / name)).write_text(text, encoding="utf-8")
    return folder / (PAGE if pages else REPORT)


def cells(report: Report) -> list[tuple[str, ...]]:
    """Return the terminal's table as text, under ``HEADER``."""
    return [_cells(row) for row in report.rows]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table; all columns but the first are set flush right."""
    rule = [":--", *("--:" for _ in header[1:])]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in (header, rule, *rows)]


def _cells(row: Row) -> tuple[str, ...]:
    alone, speed, judged = row.latency["model"], row.speedup["model"], row.verdict
    known = isinstance(alone, Latency)
    return (
        row.name,
        f"{alone.median_ms:.2f}" if known else "–",
        f"{alone.p90_ms:.2f}" if known else "–",
        str(alone.runs) if known else "–",
        f"{speed.ratio:.2f}" if isinstance(speed, Speedup) else "–",
        f"{judged.candidate:.4f}" if isinstance(judged, Verdict) else "–",
        f"{judged.drop_high:.4f}" if isinstance(judged, Verdict) else "–",
        _verdict(row),
        f"{row.size_mb:.1f}",
    )


def _verdict(row: Row) -> str:
    if row.role == "reference":
        return "reference"
    if not row.executed:
        return "not executed"
    if row.failure is not None:
        return "failed"
    return ("holds" if row.verdict.holds else "does not hold") if isinstance(row.verdict, Verdict) else "–"
