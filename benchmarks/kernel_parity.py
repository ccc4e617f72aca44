"""How far is each CUDA kernel from its contract? The shipped PTX, executed on a CPU, against float64.

    python benchmarks/kernel_parity.py [--full] [--only rotary] [-o benchmarks/results]

Every entry runs over widths 1 to 8192 with 3 and 17 rows (``--full``: 1, 3, 17 and 256), and once with 256 rows of
4096. Each width meets rows of magnitude 1e-3, 1, 1e3 and near the largest float16, of zeros, with an infinity, with
a NaN. ``kernel_parity.json`` and ``.md`` get, for each output of each entry, the largest error in tolerances and in
spacings of its type, the findings of the checkers, and the bytes moved. ``--only`` measures one kernel again, after its
code has changed, and leaves the rows of the others as they are.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from gpu_free.cases import CASES, SCALES
from gpu_free.execute import execute, ptx_of
from results_file import script

from medseg_trt.files import write_json
from medseg_trt.kernels import KERNELS, load
from medseg_trt.kernels.compile import DEFAULT, compiler_version
from medseg_trt.kernels.kernel import Entry, Kernel, distance

WIDTHS = (1, 33, 64, 576, 768, 4093, 4096, 8192)
ROWS = (1, 3, 17, 256)


def cases(full: bool) -> Iterator[tuple[int, int, int]]:
    """Yield rows, width and the first row's magnitude, so that every width meets every magnitude."""
    for width in WIDTHS:
        for rows in ROWS if full else (3, 17):
            for first_scale in range(0, len(SCALES), rows):
                yield rows, width, first_scale
    if not full:
        yield 256, 4096, 0


def measure(kernel: Kernel, entry: Entry, full: bool) -> list[dict[str, Any]]:
    """Return one row for each output of an entry."""
    ptx = ptx_of(kernel, entry)
    outputs = [parameter for parameter in entry.parameters if parameter.direction == "out"]
    worst = {parameter.name: {"of_tolerance": 0.0, "of_unit": 0.0} for parameter in outputs}
    findings, runs, moved = 0, 0, None
    for rows, width, first_scale in cases(full):
        rng = np.random.default_rng(zlib.crc32(f"{entry.name} {rows} {width} {first_scale}".encode()))
        with np.errstate(over="ignore", invalid="ignore"):
            scalars, inputs = CASES[kernel.name](entry, rows, width, first_scale, rng)
            execution = execute(kernel, entry, scalars, inputs, ptx)
            expected = kernel.reference(entry, inputs, scalars)
            for parameter in outputs:
                name, tolerance = parameter.name, kernel.tolerance[parameter.dtype]
                output = execution.outputs[name]
                error, unit = distance(output, expected[name], parameter.dtype, of=tolerance.of)
                excess = tolerance.excess(output, expected[name], parameter.dtype)
                certain = expected[name].slack == 0  # where no earlier rounding stood at a tie
                ratio = np.where(certain, error / unit, 0.0)
                worst[name]["of_tolerance"] = max(worst[name]["of_tolerance"], float(excess.max(initial=0.0)))
                worst[name]["of_unit"] = max(worst[name]["of_unit"], float(ratio.max(initial=0.0)))
        findings, runs = findings + len(execution.report.findings), runs + 1
        if (rows, width, first_scale) == (256, 4096, 0):
            moved = execution.report.moved_bytes / kernel.bytes_moved(scalars, entry)
    return [
        {
            "kernel": kernel.name,
            "entry": entry.name,
            "output": parameter.name,
            "dtype": parameter.dtype,
            "runs": runs,
            "largest_error_of_tolerance": worst[parameter.name]["of_tolerance"],
            "largest_error_of_unit": worst[parameter.name]["of_unit"],
            "unit": "step" if "int" in parameter.dtype else f"ulp of {kernel.tolerance[parameter.dtype].of}",
            "tolerance_ulps": kernel.tolerance[parameter.dtype].ulps,
            "findings": findings,
            "moved_over_least_at_256x4096": moved,
        }
        for parameter in outputs
    ]


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Return the rows as Markdown."""
    head = (
        "entry | output | type | runs | largest error | allowed | share of tolerance | findings | bytes moved / least"
    )
    lines = [f"# {title}", "", "Bytes moved at 256 rows of 4096; by `benchmarks/kernel_parity.py`.", "", f"| {head} |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        moved = row["moved_over_least_at_256x4096"]
        lines.append(
            f"| {row['entry']} | {row['output']} | {row['dtype']} | {row['runs']} | {row['largest_error_of_unit']:.4g} "
            f"{row['unit']} | {row['tolerance_ulps']:g} | {row['largest_error_of_tolerance']:.4f} | {row['findings']} "
            f"| {'not run' if moved is None else f'{moved:.4f}'} |"
        )
    return "\n".join(lines) + "\n"


def kept_rows(path: Path, full: bool) -> list[dict[str, Any]]:
    """Return the rows of an earlier run of the same compiler over the same cases."""
    before = json.loads(path.read_text(encoding="utf-8"))
    if (before["compiler"], before["full"]) != (compiler_version(DEFAULT), full):
        raise SystemExit(f"{path} is of {before['compiler']}, full: {before['full']}; leave out --only")
    return before["rows"]


def main() -> None:
    """Measure and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="1, 3, 17 and 256 rows of every width")
    parser.add_argument("--only", choices=KERNELS, help="measure this kernel; the rows of the others stay")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    known = kept_rows(arguments.output / "kernel_parity.json", arguments.full) if arguments.only else []
    for name in KERNELS:
        if arguments.only not in (None, name):
            rows += [row for row in known if row["kernel"] == name]
            continue
        kernel = load(name)
        for entry in kernel.entries:
            rows += measure(kernel, entry, arguments.full)
            print(entry.name, rows[-1]["largest_error_of_tolerance"], file=sys.stderr, flush=True)
    compiler = compiler_version(DEFAULT)
    title = f"Kernels against float64: shipped PTX (compute_80; fp8: compute_89) executed on a CPU, {compiler}"
    write_json(
        arguments.output / "kernel_parity.json",
        {"script": script(), "compiler": compiler, "full": arguments.full, "rows": rows},
    )
    (arguments.output / "kernel_parity.md").write_text(table(rows, title), encoding="utf-8")


if __name__ == "__main__":
    main()
