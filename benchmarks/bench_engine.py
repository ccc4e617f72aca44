"""How large are the engines of the full-size network, and what does building one take? No GPU is needed, and none used.

    python benchmarks/bench_engine.py --bundle /tmp/engines.medseg
    python benchmarks/bench_engine.py --bundle /tmp/engines --graphs default.medseg --graphs stored.medseg

Builds a bundle of a full-size LLM-TransUNet of random weights with engines for three kinds of GPUs, then engines again,
with a free batch and with a fixed one, and compares the bytes. The checkpoint is that of the CPU benchmark, where its
cache has one, else one is made the same way. With ``--graphs`` the graphs are those of bundles that are there already,
and the mix is made of their float graph by the pass that the build uses, without its verification.
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench_cpu_network
import numpy as np
import onnx_ir as ir
from results_file import options, publish, table

from medseg_trt.bundle import BuiltEngine, Variant, load_bundle
from medseg_trt.engine_child import build_in_child
from medseg_trt.engine_inspection import read_report, shares
from medseg_trt.engines import build_engines
from medseg_trt.export.onnx_graph import OnnxGraph
from medseg_trt.export.quantize import parse_precision, quantise
from medseg_trt.export.save import save_flavours
from medseg_trt.files import cache_folder
from medseg_trt.fingerprint import read_fingerprint
from medseg_trt.spec import EngineSpec

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine."""

    precision: str
    plan_mb: float
    wall_s: float  # of the process that builds it, with everything
    processor_s: float  # of the same; it keeps to one core, so an idle machine would take about as long
    peak_resident_mb: float  # of the same
    differing_bytes: int | None  # of two builds where the batch is free; None: it was built once
    fixed_batch_identical: bool | None  # of two builds with a batch of 1
    kernels: int
    shares: dict[str, float]  # of the multiply-accumulates, by type
    outcomes: list[dict[str, Any]]  # of what was expected of the layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """Engines and the graphs that they were built from."""

    folder: Path
    variants: Mapping[str, Variant]
    engines: Sequence[BuiltEngine]
    source: str


def main() -> int:
    """Build, measure, compare, and write the table."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="where the bundle, or the engines, go")
    parser.add_argument("--graphs", type=Path, action="append", help="a bundle that has some of the graphs")
    parser.add_argument("--again", choices=["all", *PRECISIONS], default="all", help="what is built again, to compare")
    chosen = parser.parse_args()
    made = _of_graphs(chosen.graphs, chosen.bundle) if chosen.graphs else _build(chosen.bundle)
    names = {text: name for name, text in PRECISIONS.items()}
    rows = [
        _measure(made, engine, names[made.variants[engine.variant].precision], chosen.again) for engine in made.engines
    ]
    publish("engines", _result(rows, read_fingerprint(made.folder / made.engines[0].plan).version, made.source),
            to_markdown, chosen)  # fmt: skip
    return 0 if all(_holds(row) for row in rows) else 1


def _of_graphs(bundles: Sequence[Path], output: Path) -> Made:
    """Build engines of graphs that bundles hold; the mix is made of the float one."""
    found = {
        variant.precision: (folder, variant)
        for folder in bundles
        for variant in load_bundle(folder).content.variants.values()
        if variant.flavour == "canonical"
    }
    variants: dict[str, Variant] = {}
    output.mkdir(parents=True)
    for name, precision in PRECISIONS.items():
        if precision in found:
            folder, variants[name] = found[precision]
            for file in (variants[name].graph, variants[name].weights):
                shutil.copyfile(folder / file, output / file)
        else:
            folder, variant = found["fp32"]
            graph = quantise(OnnxGraph(model=ir.load(folder / variant.graph)), parse_precision(precision))
            files = {"graph": f"{name}.onnx", "weights": f"weights-{name}.bin"}
            save_flavours({files["graph"]: graph}, output, files["weights"])
            variants[name] = replace(variant, precision=precision, **files)
    spec = EngineSpec(library="tensorrt-rtx", targets=tuple(TARGETS.split(",")))
    engines = build_engines(output, variants, set(variants), spec, PRECISIONS.values())
    source = (
        "Graphs of bundles that `medseg-trt build` made and verified; that of w8a16 is made of their float graph by "
        "the pass that the build uses, and was not verified."
    )
    return Made(folder=output, variants=variants, engines=engines.built, source=source)


def _build(output: Path) -> Made:
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
    content = load_bundle(output).content
    source = "Built and verified by one `medseg-trt build`."
    return Made(folder=output, variants=content.variants, engines=content.engines, source=source)


def _measure(made: Made, engine: BuiltEngine, name: str, again: str) -> Row:
    graph, first = made.folder / made.variants[engine.variant].graph, made.folder / engine.plan
    report, differing, identical = read_report(first), None, None
    if again in ("all", name):
        with TemporaryDirectory() as folder:
            second, fixed = Path(folder, first.name), [Path(folder, f"fixed{number}.plan") for number in range(2)]
            build_in_child(graph, second, engine.spec, None)
            differing = _differing_bytes(first, second)
            for path in fixed:
                build_in_child(graph, path, replace(engine.spec, max_batch=1), None)
            identical = _differing_bytes(*fixed) == 0
    return Row(
        precision=name, plan_mb=first.stat().st_size / 1e6, wall_s=engine.wall_s, processor_s=engine.processor_s,
        peak_resident_mb=engine.peak_resident_mb, differing_bytes=differing, fixed_batch_identical=identical,
        kernels=len(report.layers), shares=shares(report.layers),
        outcomes=[asdict(each) | {"holds": each.holds} for each in report.outcomes],
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
        and row.fixed_batch_identical is not False
    )


def _result(rows: list[Row], version: str, source: str) -> dict[str, Any]:
    return {
        "library": f"TensorRT-RTX {version}", "targets": TARGETS, "executed": False, "source": source,
        "limits": {"plan_mb": LIMITS_MB, "processor_s": LIMIT_S, "peak_resident_mb": LIMIT_RESIDENT_MB},
        "precisions": PRECISIONS, "rows": [asdict(row) for row in rows],
    }  # fmt: skip


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the page, but for the line on the machine."""
    rows, limits = result["rows"], result["limits"]
    header = ["engine", "plan MB", "limit MB", "processor s", "wall s", "peak MB", "bytes that differ, free batch",
              "fixed batch identical", "kernels", "MACs"]  # fmt: skip
    cells = [
        [row["precision"], f"{row['plan_mb']:.1f}", str(limits["plan_mb"][row["precision"]]),
         f"{row['processor_s']:.1f}", f"{row['wall_s']:.1f}", f"{row['peak_resident_mb']:.0f}",
         "–" if row["differing_bytes"] is None else f"{row['differing_bytes']:,}",
         {None: "–", True: "yes", False: "no"}[row["fixed_batch_identical"]], str(row["kernels"]),
         ", ".join(f"{100 * share:.1f} % {dtype}" for dtype, share in row["shares"].items())]
        for row in rows
    ]  # fmt: skip
    expected = [
        [outcomes[0]["name"], *(f"{each['asked'] - len(each['failed'])} of {each['asked']}" for each in outcomes)]
        for outcomes in zip(*(row["outcomes"] for row in rows), strict=True)
    ]
    lines = [
        "# Engines of the full-size LLM-TransUNet",
        "",
        f"Random weights, 256 x 256 pixels, batch 1 to 8, {result['library']}, for {result['targets']}. Built without "
        f"a GPU and never executed. {result['source']}",
        "",
        f"One build each; limits: {limits['processor_s']} s of processor time and {limits['peak_resident_mb']} MB of "
        "the building process.",
        "",
        *table(header, cells),
        "",
        f"`w8a16` is `{result['precisions']['w8a16']}`. Seconds and memory are those of the whole child process, which "
        "keeps to one core; other work ran on the machine, so the processor's seconds are held against the limit. With "
        "a free batch two builds differ in the names and the order of symbols of shapes inside the plan; with "
        "`--max-batch 1` nothing is free.",
        "",
        "## What the builder's list of layers says",
        "",
        *table(["expected", *(row["precision"] for row in rows)], expected),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
