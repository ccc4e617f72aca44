"""Rewrite the tables of the READMEs from the stored results.

    python benchmarks/readme_tables.py [README.md …] [--check]

A table stands between `<!-- table NAME -->` and `<!-- end NAME -->`, where NAME is a key of ``TABLES``. The text
between them is replaced by the table and a line with machine, day and versions; the rest is unchanged. Without
arguments, the files of ``README_FILES`` are rewritten: all of them, or none if one has an error.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results_file import RESULTS, table, where

from medseg_trt.files import atomic_file

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- table (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end (?P=name) -->", re.DOTALL)


def cold_start(result: Mapping[str, Any]) -> list[str]:
    """Make the table of the time from the command to the first mask."""
    rows = [(row["name"], f"{row['typical_s']:.2f}", f"{row['speed']:.2f}x") for row in result["rows"]]
    return table(("from typing to the first mask", "s", "speed"), rows)


def engines(result: Mapping[str, Any]) -> list[str]:
    """Make the table of the full-size network's engines: size, build time and fused layers."""
    rows = [
        (
            row["precision"],
            f"{row['plan_mb']:.0f}",
            f"{row['wall_s']:.1f}",
            f"{row['peak_resident_mb'] / 1000:.1f}",
            f"{row['kernels']}",
            *(_count(row["outcomes"], name) for name in SHOWN_OUTCOMES),
        )
        for row in result["rows"]
    ]
    return table(("engine", "plan MB", "build s", "GB", "kernels", "attention fused", "INT8 GEMMs in Int8"), rows)


def _count(outcomes: Sequence[Mapping[str, Any]], name: str) -> str:
    outcome = next(outcome for outcome in outcomes if outcome["name"] == name)
    return f"{outcome['asked'] - len(outcome['failed'])} of {outcome['asked']}" if outcome["asked"] else "–"


def organs_demo(report: Mapping[str, Any]) -> list[str]:
    """Make the table of the demo's report, summarised in ``organs-demo.json``; a missing number is a dash."""
    rows = []
    for row in report["rows"]:
        latency, speed, agreement = row["latency"]["model"], row["speedup"]["model"], row["agreement"]
        rows.append(
            (
                row["name"],
                _figure(latency, "median_ms", "{:.2f}"),
                _figure(latency, "p90_ms", "{:.2f}"),
                _figure(latency, "runs", "{}"),
                _figure(speed, "ratio", "{:.2f}x"),
                _figure(agreement, "max_abs_error", "{:.1e}"),
                _figure(agreement, "labels", "{:.3%}"),
                f"{row['size_mb']:.1f}",
            )
        )
    header = ("network", "median ms", "p90 ms", "runs", "speed", "max abs error", "agreement", "size MB")
    return table(header, rows)


def _figure(figures: Mapping[str, Any], name: str, form: str) -> str:
    return form.format(figures[name]) if name in figures else "–"


SHOWN_OUTCOMES = ("attention is one kernel", "INT8 GEMMs multiply Int8")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadmeTable:
    """How a table is made from the results file of the same name, and the command that measures these."""

    lines: Callable[[Mapping[str, Any]], list[str]]
    command: str


TABLES: Mapping[str, ReadmeTable] = {  # name of the table and of its results file
    "cold_start": ReadmeTable(lines=cold_start, command="python benchmarks/bench_cold_start.py"),
    "organs-demo": ReadmeTable(
        lines=organs_demo, command="make demo, then python benchmarks/summarise_report.py demo/report"
    ),
    "engines": ReadmeTable(lines=engines, command="python benchmarks/bench_engine.py"),
}
README_FILES = ("README.md", "benchmarks/README.md", "toolkit/engines/README.md")


def rewritten(text: str, results: Path) -> str:
    """Replace the tables of a text by those made from the results.

    Raises:
        SystemExit: a table is unknown, its results are missing, or a mark has no end.
    """

    def made(mark: re.Match[str]) -> str:
        name = mark["name"]
        if name not in TABLES:
            raise SystemExit(f"no table is called {name!r}; known are {', '.join(TABLES)}")
        path = results / f"{name}.json"
        if not path.is_file():
            raise SystemExit(f"{path} does not exist; measure: {TABLES[name].command}")
        result = json.loads(path.read_text(encoding="utf-8"))
        if "versions" not in result:
            raise SystemExit(f"{path} is of an earlier version; measure again")
        lines = [f"<!-- table {name} -->", *TABLES[name].lines(result), "", where(result), f"<!-- end {name} -->"]
        return "\n".join(lines)

    matches, marks = MARK.findall(text), text.count("<!-- table ")
    if len(matches) != marks:
        raise SystemExit(f"{marks} tables begin, but {len(matches)} end: write <!-- end NAME --> after each")
    return MARK.sub(made, text)


def main() -> None:
    """Rewrite the files, or with ``--check`` only report whether they would change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readmes", type=Path, nargs="*", default=[ROOT / name for name in README_FILES])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    options = parser.parse_args()
    before = {path: path.read_text(encoding="utf-8") for path in options.readmes}
    after = {path: rewritten(text, options.results) for path, text in before.items()}
    stale = [path for path in before if after[path] != before[path]]
    if options.check:
        sys.exit(f"out of date: {', '.join(map(str, stale))}; run make readme-tables" if stale else 0)
    for path in stale:
        with atomic_file(path) as temporary:
            temporary.write_text(after[path], encoding="utf-8")


if __name__ == "__main__":
    main()
