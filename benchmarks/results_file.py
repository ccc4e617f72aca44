"""What the benchmarks share: their options, and how results are written: JSON, and the Markdown page made from it."""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medseg_trt.files import atomic_file, write_json
from medseg_trt.machine import package_versions, this_machine
from medseg_trt.report.write import table

__all__ = ["RESULTS", "options", "publish", "table", "where"]
RESULTS = Path(__file__).parent / "results"


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows ``--json`` and ``-o``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    return parser


def publish(
    name: str, result: Mapping[str, Any], to_markdown: Callable[[Mapping[str, Any]], str], chosen: argparse.Namespace
) -> None:
    """Add where and when it was measured, write ``NAME.json`` and ``NAME.md``, and print one of them."""
    measured = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(this_machine()), "versions": package_versions(), **result,
    }  # fmt: skip
    page = f"{to_markdown(measured)}\n{where(measured)}\n"
    write_json(chosen.output / f"{name}.json", measured)
    with atomic_file(chosen.output / f"{name}.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(json.dumps(measured) if chosen.json else page)


def where(result: Mapping[str, Any]) -> str:
    """Return a line on the machine, the day and the versions of a result, or of a report of ``bench``."""
    here = result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    load = f"; load of the minute before {here['load']:.1f}" if here.get("load") is not None else ""
    day = (result.get("measured") or result["created"])[:10]
    return (
        f"Measured {day} on {here['processor']}, {here['cores']} cores{load}; {here['system']}, "
        f"Python {here['python']}; {versions}."
    )
