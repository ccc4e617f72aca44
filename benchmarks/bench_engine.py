"""How large are the engines of the full-size network, and what does building one take? No GPU is needed, and none used.

    python benchmarks/bench_engine.py -o /tmp/engines.medseg

Builds a bundle of a full-size LLM-TransUNet of random weights with engines for three kinds of GPUs, then every engine
again, with a free batch and with a fixed one, and compares the bytes. The checkpoint is that of the CPU benchmark,
where its cache has one, else one is made the same way.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench_cpu_network
import numpy as np

from medseg_trt.bundle import BuiltEngine, Bundle, load_bundle
from medseg_trt.engine_child import build_in_child
from medseg_trt.engine_inspection import read_report, shares
from medseg_trt.files import atomic_file, cache_folder, write_json
from medseg_trt.fingerprint import read_fingerprint
from medseg_trt.report import machine, table

TARGETS = "sm86,sm89,sm120"
PRECISIONS = {  # by their name in the table
    "fp16": "fp16",
    "int8": "int8",
    "w8a16": "resnet=fp16,vit=w8a16,block=w8a16,decoder=fp16",  # all matrices of the transformers in eight bits
}
LIMITS_MB = {"fp16": 500, "int8": 275, "w8a16": 320}  # of the plan, 10^6 bytes
LIMIT_S, LIMIT_RESIDENT_MB = 20, 3000  # processor time and memory of the process that builds one engine
SCANS = ("ct_A.nii.gz", "ct_B.nii.gz")
SLICES = 4  # of each scan, on which the bundle is verified
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine."""

    precision: str
    plan_mb: float
    wall_s: float  # of the process that builds it again, with everything
    processor_s: float  # of the same; it keeps to one core, so an idle machine would take about as long
    load_average: float  # when it began: other work on the machine
    peak_resident_mb: float  # of the same
    differing_bytes: int  # of the two builds, where the batch is free
    fixed_batch_identical: bool  # of two builds with a batch of 1
    kernels: int
    shares: dict[str, float]  # of the multiply-accumulates, by type
    outcomes: list[dict[str, Any]]  # of what was expected of the layers


def main() -> int:
    """Build, measure, compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="where the bundle goes")
    parser.add_argument("--keep", action="store_true", help="measure the bundle that is there already")
    options = parser.parse_args()
    if not options.keep:
        _build(options.output)
    bundle = load_bundle(options.output)
    names = {text: name for name, text in PRECISIONS.items()}
    rows = [
        _measure(bundle, engine, names[bundle.content.variants[engine.variant].precision])
        for engine in bundle.content.engines
    ]
    _write(rows, read_fingerprint(bundle.folder / bundle.content.engines[0].plan).version)
    return 0 if all(_holds(row) for row in rows) else 1


def _build(output: Path) -> None:
    with TemporaryDirectory() as folder:
        checkpoint = next(iter(cache_folder("bench_cpu").glob("networks-*/llm-transunet/model.pt")), None)
        scans = bench_cpu_network.image_folder(Path(folder), SCANS, SLICES)
        if checkpoint is None:
            checkpoint = Path(folder, "model.pt")
            bench_cpu_network.write_checkpoint("llm-transunet", checkpoint, scans)
        precisions = [word for text in PRECISIONS.values() for word in ("--precision", text)]
        command = [sys.executable, "-m", "medseg_trt", "build", "--ckpt", str(checkpoint), "--data", str(scans),
                   *precisions, "--max-dice-drop", "1", "--backend", "tensorrt-rtx", "--target", TARGETS,
                   "-o", str(output)]  # fmt: skip
        subprocess.run(command, check=True)


def _measure(bundle: Bundle, engine: BuiltEngine, name: str) -> Row:
    graph = bundle.folder / bundle.content.variants[engine.variant].graph
    first = bundle.folder / engine.plan
    with TemporaryDirectory() as folder:
        again = Path(folder, first.name)
        began, load = time.perf_counter(), os.getloadavg()[0]
        answer = build_in_child(graph, again, engine.spec, None)
        wall_s = time.perf_counter() - began
        fixed = [Path(folder, f"fixed{number}.plan") for number in range(2)]
        for path in fixed:
            build_in_child(graph, path, replace(engine.spec, max_batch=1), None)
        report = read_report(first)
        return Row(
            precision=name, plan_mb=first.stat().st_size / 1e6, wall_s=wall_s,
            processor_s=answer.processor_s, load_average=load,
            peak_resident_mb=answer.peak_resident_mb, differing_bytes=_differing_bytes(first, again),
            fixed_batch_identical=_differing_bytes(*fixed) == 0, kernels=len(report.layers),
            shares=shares(report.layers), outcomes=[asdict(each) | {"holds": each.holds} for each in report.outcomes],
        )  # fmt: skip


def _differing_bytes(first: Path, second: Path) -> int:
    sizes = first.stat().st_size, second.stat().st_size
    if sizes[0] != sizes[1]:
        return max(sizes)
    return int((np.memmap(first, np.uint8, "r") != np.memmap(second, np.uint8, "r")).sum())


def _holds(row: Row) -> bool:
    return (
        row.plan_mb <= LIMITS_MB[row.precision]
        and row.processor_s <= LIMIT_S
        and row.peak_resident_mb <= LIMIT_RESIDENT_MB
        and row.fixed_batch_identical
    )


def _write(rows: list[Row], version: str) -> None:
    here = machine()
    limits = {"plan_mb": LIMITS_MB, "processor_s": LIMIT_S, "peak_resident_mb": LIMIT_RESIDENT_MB}
    found = {"library": f"TensorRT-RTX {version}", "targets": TARGETS, "executed": False, "limits": limits,
             "machine": here, "precisions": PRECISIONS, "rows": [asdict(row) for row in rows]}  # fmt: skip
    write_json(RESULTS / "engines.json", json.loads(json.dumps(found)))
    header = ["engine", "plan MB", "limit MB", "processor s", "wall s", "load", "peak MB",
              "bytes that differ, free batch", "fixed batch identical", "kernels", "MACs"]  # fmt: skip
    cells = [
        [row.precision, f"{row.plan_mb:.1f}", str(LIMITS_MB[row.precision]), f"{row.processor_s:.1f}",
         f"{row.wall_s:.1f}", f"{row.load_average:.1f}",
         f"{row.peak_resident_mb:.0f}", f"{row.differing_bytes:,}", "yes" if row.fixed_batch_identical else "no",
         str(row.kernels), ", ".join(f"{100 * share:.1f} % {dtype}" for dtype, share in row.shares.items())]
        for row in rows
    ]  # fmt: skip
    expected = [[name, *(_outcome(row, name) for row in rows)] for name in (each["name"] for each in rows[0].outcomes)]
    lines = [
        "# Engines of the full-size LLM-TransUNet",
        "",
        f"Random weights, 256 x 256 pixels, batch 1 to 8, TensorRT-RTX {version}, for {TARGETS}. Built without a GPU "
        f"and never executed. One build each; limits: {LIMIT_S} s and {LIMIT_RESIDENT_MB} MB of the building process.",
        "",
        *table(header, cells),
        "",
        f"`w8a16` is `{PRECISIONS['w8a16']}`. Seconds and memory are those of the whole child process, which keeps to "
        "one core; the machine did other work (load), so the processor's seconds are held against the limit. With a "
        "free batch two builds differ in the names and the order of symbols of shapes inside the plan; with "
        "`--max-batch 1` nothing is free.",
        "",
        "## What the builder's list of layers says",
        "",
        *table(["expected", *(row.precision for row in rows)], expected),
        "",
        f"{here['processor']}, {here['cores']} cores, {here['system']}, Python {here['python']}.",
        "",
    ]
    with atomic_file(RESULTS / "engines.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")


def _outcome(row: Row, name: str) -> str:
    outcome = next(each for each in row.outcomes if each["name"] == name)
    return f"{outcome['asked'] - len(outcome['failed'])} of {outcome['asked']}"


if __name__ == "__main__":
    sys.exit(main())
