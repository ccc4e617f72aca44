"""How large are engines of the full-size network, and how long does building one take? No GPU is used.

    python benchmarks/bench_engine.py --bundle /tmp/engines.medseg \
        --trained demo/trained/best.pt --data demo/data/organs

Builds a bundle of a full-size LLM-TransUNet with random weights and engines for three kinds of GPUs, builds every
engine again in another folder, and compares the bytes. The checkpoint is that of the CPU benchmark's cache, or is made
the same way. With ``--trained``, engines of a small trained network are built as well, with and without plugins.
"""

import subprocess
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
from medseg_trt.export.tensorrt.build import LIBRARIES
from medseg_trt.files import cache_folder
from medseg_trt.inspection.engine import read_layer_report, shares
from medseg_trt.processes import python_command

TARGETS = "sm86,sm89,sm120"
PRECISIONS = {  # by their name in the table
    "fp16": "fp16",
    "int8": "int8",
    "int8+fp16": "int8+fp16",
    "w8a16+fp16": "vit=w8a16+fp16,block=w8a16+fp16,resnet=fp16,decoder=fp16",  # the transformers' matrices in 8 bits
}
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
    unmet: list[str]  # failed expectations
    verdict: str  # on the graph's masks, from a CPU


def main() -> None:
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
        "flags": LIBRARIES["tensorrt-rtx"].flags,
        "executed": False,
        "precisions": PRECISIONS,
        "rows": [asdict(row) for row in rows],
        "small": [asdict(row) for row in small],
    }
    publish("engines", result, to_markdown, chosen)


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
        *python_command("medseg_trt", "build", "--ckpt", str(checkpoint), "--data", str(data)),
        *words,
        *("--backend", "tensorrt-rtx", "--target", TARGETS, "--reproducible-engine"),
        *more,
        *("-o", output),
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
        outcomes=[asdict(outcome) | {"holds": outcome.holds} for outcome in report.outcomes],
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
                        unmet=list(engine.failed_expectations),
                        verdict=str(verdict),
                    )
                )
    return rows


def _differing_bytes(first: Path, second: Path) -> int:
    sizes = first.stat().st_size, second.stat().st_size
    if sizes[0] != sizes[1]:
        return max(sizes)
    return int((np.memmap(first, np.uint8, "r") != np.memmap(second, np.uint8, "r")).sum())


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the page, but for the line on the machine."""
    rows = result["rows"]
    header = [
        "engine",
        "plan MB",
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
        [
            outcomes[0]["name"],
            *(f"{outcome['asked'] - len(outcome['failed'])} of {outcome['asked']}" for outcome in outcomes),
        ]
        for outcomes in zip(*(row["outcomes"] for row in rows), strict=True)
    ]
    lines = [
        "# Engines of the full-size LLM-TransUNet",
        "",
        f"Random weights, 256 x 256 pixels, batch 1 to 8, {result['library']}, for {result['targets']}. Built, and "
        "their graphs verified by one `medseg-trt build`, without a GPU; no engine was executed.",
        "",
        f"Flags of the builder: {', '.join(result['flags'])}. With the first the library refuses an engine that would "
        "allocate memory while it runs; its documentation promises that all others can be captured as a CUDA graph.",
        "",
        "Time and memory are those of the process that builds one engine on one core (`--reproducible-engine`). Each "
        "engine was built once more, in another folder.",
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


def _count(outcome: Mapping[str, Any]) -> str:
    return f"{outcome['asked'] - len(outcome['failed'])} of {outcome['asked']}"


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
                "failed expectations",
                "masks of its graph, on a CPU",
            ],
            cells,
        ),
        "",
    ]


if __name__ == "__main__":
    main()
