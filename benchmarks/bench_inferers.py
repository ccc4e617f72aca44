"""How fast do MONAI's and Optimum's inferers run the same network on the same slices?

    python benchmarks/bench_inferers.py --bundle model.medseg --ckpt best.pt --volume ct.nii.gz [--duration-s 5]

Every inferer first computes the logits of the slices, which must equal PyTorch's. Then all are timed in interleaved
rounds with a batch of four slices. Inferers that are not installed are reported. Optimum needs its own environment.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_file import options, publish, table

from medseg_trt.bench.measure import interleaved_rounds, tier
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import MedsegError
from medseg_trt.imaging.images import read_image
from medseg_trt.imaging.segment import prepared_slices
from medseg_trt.metrics.intervals import median_of_rounds, speed_interval
from medseg_trt.sessions.open import open_session
from medseg_trt.timing import timed_runs
from medseg_trt.train.checkpoint import load_checkpoint

SLICES = 4
MAX_ERROR = 1e-3  # of logits of order 10, between computations in float32
Run = Callable[[np.ndarray], np.ndarray]


def monai_ways(model: torch.nn.Module, size: tuple[int, int]) -> dict[str, Run]:
    """Return MONAI's inferers around the PyTorch network."""
    from monai.inferers.inferer import SimpleInferer, SlidingWindowInferer

    ways = {
        "MONAI SimpleInferer, PyTorch": SimpleInferer(),
        "MONAI SlidingWindowInferer, PyTorch": SlidingWindowInferer(roi_size=size, sw_batch_size=SLICES, overlap=0.0),
    }

    def run_with(inferer: Any) -> Run:
        def run(batch: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return inferer(torch.from_numpy(batch), model).numpy()

        return run

    return {name: run_with(inferer) for name, inferer in ways.items()}


def optimum_way(bundle: Path) -> Run:
    """Return Optimum's model around the bundle's graph."""
    import medseg_trt.bundles.optimum  # noqa: F401  # it registers the bundle's kind

    from optimum.onnxruntime import ORTModelForSemanticSegmentation  # pyright: ignore[reportMissingImports]  # isort: skip

    model = ORTModelForSemanticSegmentation.from_pretrained(str(bundle))
    return lambda batch: model(pixel_values=torch.from_numpy(batch)).logits.numpy()


def to_markdown(result: Any) -> str:
    """Return the results as a page."""
    rows = [
        (
            row["name"],
            f"{row['median_ms']:.1f}",
            f"{row['speed']:.2f}x",
            f"{row['low']:.2f} … {row['high']:.2f}",
            str(row["runs"]),
            f"{row['max_abs_error']:.1e}",
        )
        for row in result["rows"]
    ]
    header = ("way", f"ms for {SLICES} slices", "speed", "90 % interval", "runs", "max abs error")
    missing = [f"Not measured: {name}: {reason}" for name, reason in result["missing"].items()]
    lines = ["# Other ways to run the network", "", f"{result['images']}; the network alone, fp32.", ""]
    return "\n".join([*lines, *table(header, rows), "", *missing, ""])


def main() -> None:
    """Verify, measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--duration-s", type=float, default=5.0)
    chosen = parser.parse_args()
    bundle, model = load_bundle(chosen.bundle), load_checkpoint(chosen.ckpt).model()
    image = read_image(chosen.volume)
    middle = image.num_slices // 2
    batch = prepared_slices(image, bundle.preprocessing)[middle : middle + SLICES]
    missing: dict[str, str] = {}

    def pytorch(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    ways: dict[str, Run] = {"PyTorch": pytorch}
    try:
        ways |= monai_ways(model, bundle.preprocessing.image_size)
    except ImportError as error:
        missing["MONAI"] = str(error)
    try:
        ways["Optimum, ONNX Runtime"] = optimum_way(chosen.bundle)
    except (ImportError, MedsegError) as error:
        missing["Optimum"] = str(error)
    with ExitStack() as stack:
        for backend in dict.fromkeys(execution.backend for execution in bundle.content.executions):
            try:
                session = stack.enter_context(open_session(bundle, backend, precision="fp32"))
                ways[f"medseg-trt, {session.description}"] = session.run
            except MedsegError as error:
                missing[backend] = str(error)
        truth = pytorch(batch)
        errors = {name: float(np.abs(run(batch) - truth).max()) for name, run in ways.items()}
        wrong = [name for name, error in errors.items() if not error <= MAX_ERROR]
        if wrong:
            raise SystemExit(f"{', '.join(wrong)}: other logits than PyTorch's; nothing is timed")
        turns = {
            name: lambda seconds, runs, run=run: timed_runs(lambda: run(batch), seconds, runs)
            for name, run in ways.items()
        }
        round_times = interleaved_rounds(turns, tier("quick", duration_s=chosen.duration_s))
        taken = {name: times.rounds_ms for name, times in round_times.items()}
    rows = []
    for name, rounds in taken.items():
        speed = speed_interval(taken["PyTorch"], rounds, interleaved=True)
        samples = [execution for steps in rounds for execution in steps]
        rows.append(
            {
                "name": name,
                "median_ms": median_of_rounds(rounds),
                "p90_ms": float(np.percentile(samples, 90)),
                "runs": len(samples),
                "speed": speed.estimate,
                "low": speed.low,
                "high": speed.high,
                "max_abs_error": errors[name],
            }
        )
    images = f"{SLICES} slices of {chosen.volume.name}, {bundle.preprocessing.image_size[0]} pixels wide"
    publish("inferers", {"images": images, "rows": rows, "missing": missing}, to_markdown, chosen)


if __name__ == "__main__":
    main()
