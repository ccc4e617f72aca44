"""How large are the engines of the full-size network, and what does building one take? No GPU is needed, and none used.

    python benchmarks/bench_engine.py --bundle /tmp/engines.medseg \
        --trained demo/trained/best.pt --data demo/data/organs

Builds a bundle of a full-size LLM-TransUNet of random weights with engines for three kinds of GPUs, then every engine
again, in another folder, and compares the bytes. The checkpoint is that of the CPU benchmark, where its cache has one,
else one is made the same way. With ``--trained``, a small network that was trained gets engines too, with plugins and
without.
"""

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bench_cpu_network
import numpy as np
from results_file import options, publish, table

from medseg_trt.bundles.bundle import Bundle, load_bundle
from medseg_trt.bundles.manifest import BuiltEngine
from medseg_trt.engines.child import build_in_child
from medseg_trt.engines.fingerprint import read_fingerprint
from medseg_trt.export.engine_layers import CUSTOM
from medseg_trt.export.gate import GateVerdict
from medseg_trt.files import cache_folder
from medseg_trt.inspection.engine import read_layer_report, shares

TARGETS = "sm86,sm89,sm120"
PRECISIONS = {  # by their name in the table
    "fp16": "fp16",
    "int8": "int8",
    "int8+fp16": "int8+fp16",
    "w8a16+fp16": "vit=w8a16+fp16,block=w8a16+fp16,resnet=fp16,decoder=fp16",  # the transformers' matrices in 8 bits
}
LIMITS_MB = {"fp16": 500, "int8": 275, "int8+fp16": 275, "w8a16+fp16": 320}  # of the plan, 10^6 bytes
LIMIT_S, LIMIT_RESIDENT_MB = 20, 3000  # wall time and memory of the process that builds one engine
SMALL_PRECISIONS = ("fp16", "int8+fp16")
SCANS = ("ct_A.nii.gz", "ct_B.nii.gz")
SLICES = 4  # of each scan, on which the bundle is verified


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One engine."""

    precision: str
    plan_mb: float
    wall_s: float  # of the process that builds it, with everything
    processor_s: float  # of the same
    peak_resident_mb: float  # of the same
    differing_bytes: int  # of two builds in different folders
    kernels: int
    shares: dict[str, float]  # of the multiply-accumulates, by type
    outcomes: list[dict[str, Any]]  # of what was expected of the layers


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallRow:
    """One engine of the trained network."""

    precision: str
    plugins: bool
    plan_mb: float
    kernels: int
    custom: int  # of those: plugins
    unmet: list[str]  # what was expected in vain
    verdict: str  # on the graph's masks, from a CPU


def main() -> int:
    """Build, measure, compare, and write the table."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="where the bundle goes, or one that was built so")
    parser.add_argument("--trained", type=Path, help="checkpoint of a small network")
    parser.add_argument("--data", type=Path, help="its images")
    chosen = parser.parse_args()
    if not chosen.bundle.exists():
        _build(chosen.bundle)
    bundle = load_bundle(chosen.bundle)
    rows = [_measure(bundle, engine) for engine in bundle.content.engines]
    small = _small_rows(chosen.trained, chosen.data) if chosen.trained else []
    first = bundle.content.engines[0].plan
    result = {
        "library": f"TensorRT-RTX {read_fingerprint(bundle.folder / first).version}",
        "targets": TARGETS,
        "executed": False,
        "precisions": PRECISIONS,
        "rows": [asdict(row) for row in rows],
        "limits": {"plan_mb": LIMITS_MB, "wall_s": LIMIT_S, "peak_resident_mb": LIMIT_RESIDENT_MB},
        "small": [asdict(row) for row in small],
    }
    publish("engines", result, to_markdown, chosen)
    return 0 if all(_holds(row) for row in rows) else 1


def _build(output: Path) -> None:
    with TemporaryDirectory() as folder:
        checkpoint = next(iter(cache_folder("bench_cpu").glob("networks-*/llm-transunet/model.pt")), None)
        scans = bench_cpu_network.image_folder(Path(folder), SCANS, SLICES)
        if checkpoint is None:
            checkpoint = Path(folder, "model.pt")
            bench_cpu_network.write_checkpoint("llm-transunet", checkpoint, scans)
        _run_build(checkpoint, scans, output, PRECISIONS.values(), "--max-dice-drop", "1")


def _run_build(checkpoint: Path, data: Path, output: Path, precisions: Iterable[str], *more: str) -> None:
    words = [word for text in precisions for word in ("--precision", text)]
    command = [
        sys.executable,
        "-m",
        "medseg_trt",
        "build",
        "--ckpt",
        checkpoint,
        "--data",
        data,
        *words,
        "--backend",
        "tensorrt-rtx",
        "--target",
        TARGETS,
        *more,
        "-o",
        output,
    ]
    subprocess.run(list(map(str, command)), check=True)


def _measure(bundle: Bundle, engine: BuiltEngine) -> Row:
    variant = bundle.content.variants[engine.variant]
    first = bundle.folder / engine.plan
    with TemporaryDirectory() as folder:
        second = Path(folder, first.name)
        build_in_child(bundle.folder / variant.graph, second, engine.spec, None)
        differing = _differing_bytes(first, second)
    report, names = read_layer_report(first), {text: name for name, text in PRECISIONS.items()}
    return Row(
        precision=names[variant.precision],
        plan_mb=first.stat().st_size / 1e6,
        wall_s=engine.wall_s,
        processor_s=engine.processor_s,
        peak_resident_mb=engine.peak_resident_mb,
        differing_bytes=differing,
        kernels=len(report.layers),
        shares=shares(report.layers),
        outcomes=[asdict(each) | {"holds": each.holds} for each in report.outcomes],
    )


def _small_rows(checkpoint: Path, data: Path) -> list[SmallRow]:
    rows = []
    for plugins in ("off", "on"):
        with TemporaryDirectory() as folder:
            output = Path(folder, "small.medseg")
            _run_build(checkpoint, data, output, SMALL_PRECISIONS, "--plugins", plugins)
            bundle = load_bundle(output)
            for engine in bundle.content.engines:
                variant, plan = bundle.content.variants[engine.variant], bundle.folder / engine.plan
                layers = read_layer_report(plan).layers
                verdict = GateVerdict(**variant.passes["gate"]["verdict"])
                rows.append(
                    SmallRow(
                        precision=variant.precision,
                        plugins=engine.spec.plugins,
                        plan_mb=plan.stat().st_size / 1e6,
                        kernels=len(layers),
                        custom=sum(layer.kind == CUSTOM for layer in layers),
                        unmet=list(engine.unmet),
                        verdict=str(verdict),
                    )
                )
    return rows


def _differing_bytes(first: Path, second: Path) -> int:
    sizes = first.stat().st_size, second.stat().st_size
    if sizes[0] != sizes[1]:
        return max(sizes)
    return int((np.memmap(first, np.uint8, "r") != np.memmap(second, np.uint8, "r")).sum())


def _holds(row: Row) -> bool:
    return (
        row.plan_mb <= LIMITS_MB[row.precision]
        and row.wall_s <= LIMIT_S
        and row.peak_resident_mb <= LIMIT_RESIDENT_MB
        and row.differing_bytes == 0
    )


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the page, but for the line on the machine."""
    rows, limits = result["rows"], result["limits"]
    header = [
        "engine",
        "plan MB",
        "limit MB",
        "wall s",
        "processor s",
        "peak MB",
        "bytes that differ from a second",
        "kernels",
        "MACs",
    ]
    cells = [
        [
            row["precision"],
            f"{row['plan_mb']:.1f}",
            str(limits["plan_mb"][row["precision"]]),
            f"{row['wall_s']:.1f}",
            f"{row['processor_s']:.1f}",
            f"{row['peak_resident_mb']:.0f}",
            f"{row['differing_bytes']:,}",
            str(row["kernels"]),
            ", ".join(f"{100 * share:.1f} % {dtype}" for dtype, share in row["shares"].items()),
        ]
        for row in rows
    ]
    expected = [
        [outcomes[0]["name"], *(f"{each['asked'] - len(each['failed'])} of {each['asked']}" for each in outcomes)]
        for outcomes in zip(*(row["outcomes"] for row in rows), strict=True)
    ]
    lines = [
        "# Engines of the full-size LLM-TransUNet",
        "",
        f"Random weights, 256 x 256 pixels, batch 1 to 8, {result['library']}, for {result['targets']}. Built, and "
        "their graphs verified by one `medseg-trt build`, without a GPU; no engine was executed.",
        "",
        f"Limits: {limits['wall_s']} s and {limits['peak_resident_mb']} MB of the process that builds one engine, "
        "which keeps to one core. Each engine was built once more, in another folder.",
        "",
        *table(header, cells),
        "",
        f"`w8a16+fp16` is `{result['precisions']['w8a16+fp16']}`.",
        "",
        "## What the builder's list of layers says",
        "",
        *table(["expected", *(row["precision"] for row in rows)], expected),
        "",
        *_small_lines(result["small"]),
    ]
    return "\n".join(lines)


def _small_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    cells = [
        [
            row["precision"],
            "on" if row["plugins"] else "off",
            f"{row['plan_mb']:.1f}",
            str(row["kernels"]),
            str(row["custom"]),
            "; ".join(row["unmet"]) or "–",
            row["verdict"],
        ]
        for row in rows
    ]
    return [
        "## A small network that was trained, with plugins and without",
        "",
        *table(
            [
                "engine",
                "plugins",
                "plan MB",
                "kernels",
                "plugins among them",
                "expected in vain",
                "masks of its graph, on a CPU",
            ],
            cells,
        ),
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
