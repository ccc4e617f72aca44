"""Does every precision preserve the masks of trained networks? Builds each checkpoint in all precisions.

    python benchmarks/precisions.py organs-run/best.pt data/organs tumours-run/best.pt data/tumours

The gate, its limit and its images are those of ``medseg-trt build``. The milliseconds are those of the build, not of an
interleaved measurement, and only order the rows.
"""

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from results_file import options, publish, table

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.bundles.tables import execution_table
from medseg_trt.pipeline import build
from medseg_trt.spec import BuildSpec

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "w8a16", "w4a16")


def main() -> None:
    """Build every pair of checkpoint and data folder."""
    parser = options(__doc__)
    parser.add_argument("pairs", nargs="+", type=Path, help="a checkpoint and its data folder, and so on")
    chosen = parser.parse_args()
    if len(chosen.pairs) % 2:
        parser.error("give pairs of a checkpoint and its data folder")
    networks: dict[str, Any] = {}
    lines = ["# Precisions on trained networks", ""]
    for checkpoint, data in zip(chosen.pairs[::2], chosen.pairs[1::2], strict=True):
        with TemporaryDirectory() as folder:
            bundle = build(checkpoint, BuildSpec(precisions=PRECISIONS), Path(folder, "model.medseg"), data)
            networks[data.name] = _record(bundle)
            lines += _section(bundle, data.name)
    publish("precisions", {"networks": networks}, lambda _: "\n".join(lines), chosen)


def _record(bundle: Bundle) -> dict[str, Any]:
    content = bundle.content
    return {
        "executions": [asdict(execution) for execution in content.executions],
        "rejected_executions": list(content.rejected_executions),
        "policies": {name: variant.passes["policy"] for name, variant in content.variants.items()},
        "int8_share": {name: variant.passes["int8_share"] for name, variant in content.variants.items()},
        "kept_float": {name: (v.passes["gate"] or {}).get("kept_float") for name, v in content.variants.items()},
    }


def _section(bundle: Bundle, name: str) -> list[str]:
    train = bundle.content.source["provenance"]["recipe"]["train"]
    gates = (execution.verification.gate for execution in bundle.content.executions)
    gate = next(verdict for verdict in gates if verdict is not None)
    return [
        f"## {name}",
        "",
        f"{gate.images} slices of the validation split, resampled by {gate.unit}; Dice of PyTorch "
        f"{gate.reference:.4f}; limit of the drop {gate.limit}. "
        f"Trained for {train['epochs']} epochs of {train['slices_per_epoch']} slices.",
        "",
        *table(*execution_table(bundle)),
        "",
        *(f"Not used: {line}" for line in bundle.content.rejected_executions),
        "",
    ]


if __name__ == "__main__":
    main()
