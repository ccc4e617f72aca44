"""Write the tables of the README anew from the results that are stored here.

    python benchmarks/readme_tables.py [README.md] [--check]

A table stands between two comments, `<!-- table NAME -->` and `<!-- end NAME -->`; NAME is a key of ``TABLES``. What is
between them is replaced by the table and a line on the machine, the day and the versions; the rest stays as it is.
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

MARK = re.compile(r"<!-- table (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end (?P=name) -->", re.DOTALL)


def infer_pipeline(result: Mapping[str, Any]) -> list[str]:
    """Return how long the ways through many files take."""
    rows = [
        (f"{each['what']}, {way}", f"{found['typical_s']:.1f}", f"{found['speed']:.2f}x",
         f"{found['low']:.2f} … {found['high']:.2f}", f"{found['peak_mb']:.0f}")
        for each in result["rows"] for way, found in each["ways"].items()
    ]  # fmt: skip
    return table(("images", "s", "speed", "90 % interval", "peak MB"), rows)


def cold_start(result: Mapping[str, Any]) -> list[str]:
    """Return how long it takes from typing to the first mask."""
    rows = [(each["name"], f"{each['typical_s']:.2f}", f"{each['speed']:.2f}x") for each in result["rows"]]
    return table(("from typing to the first mask", "s", "speed"), rows)


def inferers(result: Mapping[str, Any]) -> list[str]:
    """Return how long other tools' ways to run the network take."""
    rows = [(each["name"], f"{each['median_ms']:.1f}", f"{each['speed']:.2f}x") for each in result["rows"]]
    return table((f"way, {result['images']}", "ms", "speed"), rows)


def scaling(result: Mapping[str, Any]) -> list[str]:
    """Return milliseconds an image by size and batch."""
    batches = list(result["rows"][0]["ms_per_image"])
    rows = [
        (f"{each['size']} x {each['size']}, {each['backend']}",
         *(f"{each['ms_per_image'][batch]['median']:.1f}" for batch in batches))
        for each in result["rows"]
    ]  # fmt: skip
    return table(("ms an image", *(f"batch {batch}" for batch in batches)), rows)


def aa(result: Mapping[str, Any]) -> list[str]:
    """Return how often the same network was called faster or slower than itself."""
    rows = [
        (each["what"], str(each["comparisons"]), str(each["faster"]), str(each["slower"])) for each in result["rows"]
    ]
    return table(("second network", "comparisons", "said faster", "said slower"), rows)


def engines(result: Mapping[str, Any]) -> list[str]:
    """Return the engines of the full-size network: how large, how long to build, and what the builder fused."""
    rows = [
        (each["precision"], f"{each['plan_mb']:.0f}", f"{each['wall_s']:.1f}", f"{each['peak_resident_mb'] / 1000:.1f}",
         f"{each['kernels']}", *(_count(each["outcomes"], name) for name in SHOWN_OUTCOMES))
        for each in result["rows"]
    ]  # fmt: skip
    return table(("engine", "plan MB", "build s", "GB", "kernels", "attention fused", "INT8 GEMMs in Int8"), rows)


def _count(outcomes: Sequence[Mapping[str, Any]], name: str) -> str:
    found = next(each for each in outcomes if each["name"] == name)
    return f"{found['asked'] - len(found['failed'])} of {found['asked']}" if found["asked"] else "–"


def organs_demo(report: Mapping[str, Any]) -> list[str]:
    """Return the rows of the demo's ``report.json``, stored as ``organs-demo.json``; a figure that lacks is a dash."""
    rows = []
    for row in report["rows"]:
        latency, speed, agreement = row["latency"]["model"], row["speedup"]["model"], row["agreement"]
        rows.append((
            row["name"], _figure(latency, "median_ms", "{:.2f}"), _figure(latency, "p90_ms", "{:.2f}"),
            _figure(latency, "runs", "{}"), _figure(speed, "ratio", "{:.2f}x"),
            _figure(agreement, "max_abs_error", "{:.1e}"), _figure(agreement, "labels", "{:.3%}"),
            f"{row['size_mb']:.1f}",
        ))  # fmt: skip
    header = ("network", "median ms", "p90 ms", "runs", "speed", "max abs error", "agreement", "size MB")
    return table(header, rows)


def _figure(found: Mapping[str, Any], name: str, form: str) -> str:
    return form.format(found[name]) if name in found else "–"


SHOWN_OUTCOMES = ("attention is one kernel", "INT8 GEMMs multiply Int8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of the README."""

    lines: Callable[[Mapping[str, Any]], list[str]]  # of the stored result
    command: str  # that makes the result


TABLES: Mapping[str, Table] = {  # by the name of the table, which is that of the results file
    "infer_pipeline": Table(lines=infer_pipeline, command="python benchmarks/bench_infer_pipeline.py"),
    "cold_start": Table(lines=cold_start, command="python benchmarks/bench_cold_start.py"),
    "inferers": Table(lines=inferers, command="python benchmarks/bench_inferers.py"),
    "scaling": Table(lines=scaling, command="python benchmarks/bench_scaling.py"),
    "aa": Table(lines=aa, command="python benchmarks/bench_aa.py"),
    "organs-demo": Table(
        lines=organs_demo, command="make demo; cp demo/report/report.json benchmarks/results/organs-demo.json"
    ),
    "engines": Table(lines=engines, command="python benchmarks/bench_engine.py"),
}


def rewritten(text: str, results: Path) -> str:
    """Return the text with its tables made from the results.

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

    found, marks = MARK.findall(text), text.count("<!-- table ")
    if len(found) != marks:
        raise SystemExit(f"{marks} tables begin, but {len(found)} end: write <!-- end NAME --> after each")
    return MARK.sub(made, text)


def main() -> None:
    """Rewrite the file, or with ``--check`` say whether it would change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path, nargs="?", default=Path(__file__).parents[1] / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the file is out of date")
    chosen = parser.parse_args()
    before = chosen.readme.read_text(encoding="utf-8")
    after = rewritten(before, chosen.results)
    if chosen.check:
        sys.exit(f"{chosen.readme} is not what the results say: make readme-tables" if after != before else 0)
    with atomic_file(chosen.readme) as temporary:
        temporary.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
