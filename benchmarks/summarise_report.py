"""Store the summary of a report of ``medseg-trt bench``: what the README's table shows, without times and profiles.

    python benchmarks/summarise_report.py demo/report

`make demo` writes that report. The results are `organs-demo.json` and a copy of the report's `report.md`.
"""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from results_file import RESULTS

from medseg_trt.bench.report_file import REPORT, read_bench_report
from medseg_trt.bench.schema import Report, Row
from medseg_trt.files import atomic_file, write_json

LATENCY = ("runs", "mean_ms", "median_ms", "p90_ms", "p95_ms", "p99_ms", "variation", "stable", "reason")
IMAGES = ("description", "timed", "data", "split", "labelled", "slices")
VERDICT = ("holds", "reference", "candidate", "drop", "drop_low", "drop_high", "limit", "reason")


def summarise(report: Report, sha256: str) -> dict[str, Any]:
    """Return the figures of a report that are the same for every number of runs and slices."""
    return {
        "script": "benchmarks/summarise_report.py",
        "report_sha256": sha256,
        "created": report.created,
        "commands": list(report.commands),
        "tier": asdict(report.tier),
        "batch": report.batch,
        "reference": report.reference,
        "images": _fields(asdict(report.images), IMAGES),
        "machine": asdict(report.machine),
        "versions": dict(report.versions),
        "digests": dict(report.digests),
        "summary": asdict(report.summary),
        "rows": [_summarise_row(row) for row in report.rows],
    }


def _summarise_row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "description": row.description,
        "size_mb": row.size_mb,
        "latency": {scope: _fields(asdict(latency), LATENCY) for scope, latency in row.latency.items()},
        "speedup": {scope: asdict(speedup) for scope, speedup in row.speedup.items()},
        "agreement": asdict(row.agreement),
        "memory": asdict(row.memory),
        "verdict": _fields(asdict(row.verdict), VERDICT),
    }


def _fields(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def main() -> None:
    """Write the summary and copy the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="the folder of the report")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    chosen = parser.parse_args()
    path = chosen.report / REPORT
    report, sha256 = read_bench_report(path), hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(chosen.output / "organs-demo.json", summarise(report, sha256))
    with atomic_file(chosen.output / "organs-demo.md") as temporary:
        temporary.write_bytes((chosen.report / "report.md").read_bytes())


if __name__ == "__main__":
    main()
