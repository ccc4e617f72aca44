"""How does the time of an image grow with its size and with the batch? Random weights, ONNX Runtime and OpenVINO.

    python benchmarks/bench_scaling.py [--architecture llm-transunet-small] [--sizes 128,256,384] [--batches 1,2,4,8]

A network of each size is built and verified as by `build`; then all batches of a size are timed in interleaved rounds.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from results_file import options, publish, table

from medseg_trt.bench.measure import interleaved_rounds, tier
from medseg_trt.bundles.bundle import Bundle
from medseg_trt.pipeline import build
from medseg_trt.sessions.backends import is_installed
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec, Classes, Preprocessing
from medseg_trt.timing import timed_runs
from medseg_trt.train.block.blocks import random_block, save_block
from medseg_trt.train.checkpoint import Checkpoint, save_checkpoint, trained_weights
from medseg_trt.train.models.model import build_model, model_spec

CLASSES = Classes(names=("background", *(f"class{number}" for number in range(1, 9))))


def random_bundle(architecture: str, size: int, folder: Path) -> Bundle:
    """Build a bundle of random weights for square images of this size."""
    spec = model_spec(architecture, (size, size), CLASSES.num_logits)
    file, digest, block = None, None, None
    if spec.block is not None:
        file, block = folder / "block.safetensors", random_block(spec.block, seed=0)
        digest = save_block(block, file)
    torch.manual_seed(0)
    checkpoint = Checkpoint(
        weights=trained_weights(build_model(spec, block)),
        spec=spec,
        preprocessing=Preprocessing(image_size=(size, size)),
        classes=CLASSES,
        block_file=file,
        block_sha256=digest,
    )
    save_checkpoint(checkpoint, folder / "model.pt")
    return build(folder / "model.pt", BuildSpec(), folder / "model.medseg")


def time_batches(bundle: Bundle, backend: str, batches: list[int], duration_s: float) -> dict[int, list[float]]:
    """Return the milliseconds of an image, by batch."""
    images = np.random.default_rng(0).random((max(batches), 3, *bundle.preprocessing.image_size), np.float32)
    with open_session(bundle, backend) as session:
        turns = {
            str(batch): lambda seconds, runs, batch=batch: timed_runs(
                lambda: session.run(images[:batch]), seconds, runs
            )
            for batch in batches
        }
        times_of = interleaved_rounds(turns, tier("quick", duration_s=duration_s))
    return {
        int(batch): [step / int(batch) for steps in times.rounds_ms for step in steps]
        for batch, times in times_of.items()
    }


def to_markdown(result: Any) -> str:
    """Return the results as a page."""
    batches = sorted({int(batch) for row in result["rows"] for batch in row["ms_per_image"]})
    rows = [
        (
            f"{row['size']} x {row['size']}, {row['backend']}",
            *(f"{row['ms_per_image'][str(batch)]['median']:.1f}" for batch in batches),
        )
        for row in result["rows"]
    ]
    return "\n".join(
        [
            "# Scaling with image size and batch",
            "",
            f"{result['architecture']}, random weights, fp32; median milliseconds of an image, the network alone.",
            "",
            *table(("image, back-end", *(f"batch {batch}" for batch in batches)), rows),
            "",
        ]
    )


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--architecture", default="llm-transunet-small")
    parser.add_argument("--sizes", default="128,256,384")
    parser.add_argument("--batches", default="1,2,4,8")
    parser.add_argument("--duration-s", type=float, default=3.0)
    chosen = parser.parse_args()
    batches, rows = [int(execution) for execution in chosen.batches.split(",")], []
    for size in map(int, chosen.sizes.split(",")):
        with TemporaryDirectory() as folder:
            bundle = random_bundle(chosen.architecture, size, Path(folder))
            for backend in filter(
                is_installed, dict.fromkeys(execution.backend for execution in bundle.content.executions)
            ):
                taken = time_batches(bundle, backend, batches, chosen.duration_s)
                figures = {
                    str(batch): {"median": float(np.median(ms)), "p90": float(np.percentile(ms, 90)), "runs": len(ms)}
                    for batch, ms in taken.items()
                }
                rows.append({"size": size, "backend": backend, "ms_per_image": figures})
    publish("scaling", {"architecture": chosen.architecture, "rows": rows}, to_markdown, chosen)


if __name__ == "__main__":
    main()
