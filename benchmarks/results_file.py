"""Shared by the benchmarks: their options, and writing of results as JSON and Markdown.

With ``--json``, stdout carries only the result, from the parsing of the options on.
"""

import argparse
import atexit
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medseg_trt.bench.report.write import table
from medseg_trt.commands.json_output import only_json
from medseg_trt.files import atomic_file, write_json
from medseg_trt.machine import package_versions, this_machine

__all__ = ["RESULTS", "options", "publish", "script", "table", "where"]
RESULTS = Path(__file__).parent / "results"
STARTED = this_machine()  # and its load before the benchmark adds its own


class Options(argparse.ArgumentParser):
    """A parser that keeps stdout for the result where ``--json`` is given."""

    def parse_args(self, *arguments: Any, **options: Any) -> Any:
        """Read the options; with ``--json``, everything but the result goes to stderr from here on."""
        chosen = super().parse_args(*arguments, **options)
        if chosen.json:
            stack = ExitStack()
            chosen.stdout = stack.enter_context(only_json())
            atexit.register(stack.close)
        return chosen


def options(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows ``--json`` and ``-o``."""
    parser = Options(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    return parser


def publish(
    name: str, result: Mapping[str, Any], to_markdown: Callable[[Mapping[str, Any]], str], chosen: argparse.Namespace
) -> None:
    """Write a result as ``store`` does, and print one of the two files."""
    measured, page = store(name, result, to_markdown, chosen.output)
    if chosen.json:
        chosen.stdout.print(measured)
    else:
        print(page)


def store(
    name: str, result: Mapping[str, Any], to_markdown: Callable[[Mapping[str, Any]], str], output: Path
) -> tuple[dict[str, Any], str]:
    """Add which script measured where and when, write ``NAME.json`` and ``NAME.md``, and return both contents."""
    measured = {
        "script": script(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": asdict(STARTED),
        "versions": package_versions(),
        **result,
    }
    page = f"{to_markdown(measured)}\n{where(measured)}\n"
    write_json(output / f"{name}.json", measured)
    with atomic_file(output / f"{name}.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return measured, page


def script() -> str:
    """Return the path of the running script in the repository."""
    return f"benchmarks/{Path(sys.argv[0]).name}"


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
