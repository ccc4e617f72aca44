"""Does every rung of the block's ladder become an engine, and how large is it? No GPU is needed, and none is used.

Fits every rung of a trained network, writes its graph in fp16, and builds one TensorRT-RTX engine from it for three
kinds of GPUs. No engine is executed. The masks of the rungs are judged in block_analysis.

    python benchmarks/bench_block_engines.py run/best.pt --data data/organs
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from results_file import options, publish, table

from medseg_trt.building.block_ladder import BlockLadder, RungCandidate
from medseg_trt.building.bundle_steps import export_graph
from medseg_trt.building.reference_images import reference_images, second_judged_images
from medseg_trt.engines.child import build_in_child
from medseg_trt.export.fold.fold import fold
from medseg_trt.export.graph.save import save_graphs
from medseg_trt.export.precision.quantize import parse_precision, quantise
from medseg_trt.export.tensorrt.expectations import layer_report
from medseg_trt.spec import BuildSpec, EngineSpec
from medseg_trt.train.checkpoint import load_checkpoint

TARGETS = ("sm86", "sm89", "sm120")
PRECISION = "fp16"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRow:
    """The engine of one rung."""

    rung: str
    block_macs: int
    plan_mb: float
    kernels: int
    wall_s: float
    processor_s: float
    library: str


def candidates(path: Path, data: Path) -> Iterator[tuple[RungCandidate, Mapping[str, Any]]]:
    """Yield every rung of a checkpoint's block, with the results of the folding."""
    checkpoint = load_checkpoint(path)
    network = checkpoint.model()
    folded, report = fold(network)
    judged = (reference_images(checkpoint, data).judged, second_judged_images(checkpoint, data))
    splits = tuple(split for split in judged if split is not None)
    for candidate in BlockLadder(checkpoint, network, folded, BuildSpec(block="auto"), data, splits).candidates():
        yield candidate, report


def engine_of(candidate: RungCandidate, folding: Mapping[str, Any], folder: Path) -> EngineRow:
    """Build the engine of one rung."""
    graph = quantise(export_graph(candidate.network, folding).graph, parse_precision(PRECISION))
    save_graphs({"graph.onnx": graph}, folder, "weights.bin")
    plan = folder / "engine.plan"
    spec = EngineSpec(library="tensorrt-rtx", targets=TARGETS)
    answer = build_in_child(folder / "graph.onnx", plan, spec, None)
    assert candidate.cost is not None  # ``candidates`` are of a network with a block
    return EngineRow(
        rung=str(candidate.rung),
        block_macs=candidate.cost.macs,
        plan_mb=plan.stat().st_size / 1e6,
        kernels=len(layer_report(answer.output.layers, graph).layers),
        wall_s=answer.wall_s,
        processor_s=answer.processor_s,
        library=f"TensorRT-RTX {answer.output.version}",
    )


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the page."""
    rows = result["rows"]
    cells = [
        [
            row["rung"],
            f"{row['block_macs']:,}",
            f"{row['plan_mb']:.2f}",
            str(row["kernels"]),
            f"{row['wall_s']:.1f}",
            f"{row['processor_s']:.1f}",
        ]
        for row in rows
    ]
    return "\n".join(
        [
            "# Engines of every rung of the block",
            "",
            f"The demo's network, {PRECISION}, {rows[0]['library']}, for {', '.join(TARGETS)}. One build each, none "
            "was executed.",
            "",
            *table(["block", "MACs of the block", "plan MB", "kernels", "wall s", "processor s"], cells),
            "",
        ]
    )


def main() -> None:
    """Build and publish."""
    parser = options(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    chosen = parser.parse_args()
    rows = list[EngineRow]()
    for candidate, folding in candidates(chosen.checkpoint, chosen.data):
        with TemporaryDirectory() as folder:
            rows.append(engine_of(candidate, folding, Path(folder)))
    publish("block_engines", {"rows": [asdict(row) for row in rows]}, to_markdown, chosen)


if __name__ == "__main__":
    main()
