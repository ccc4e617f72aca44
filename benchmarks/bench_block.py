"""What does the language block cost after it is replaced: ours on each rung, against ours of the plain TransUNet?

Builds bundles of a trained LLM-TransUNet with the exact block and with ``--block auto``, and one of a plain TransUNet,
all in INT8 and judged by the gate; then times the fastest execution of each and PyTorch's eager network, on one thread,
in interleaved rounds, every measurement in a process of its own. Processor time stands beside wall time, since it
survives a busy machine.

    python benchmarks/bench_block.py run/best.pt --plain plain/best.pt --data data/organs [--rounds 5]
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from bench_cpu_artefacts import in_own_process
from results_file import options, publish, table

from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import MedsegError
from medseg_trt.pipeline import build
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.spec import BuildSpec, to_dict

SECONDS, MIN_RUNS = 2.0, 5  # of a network in a round
THREADS = 1
SPEC = BuildSpec(precisions=("fp32", "int8"))


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedNetwork:
    """A network to time."""

    name: str
    opener: str  # a back-end, or pytorch
    path: Path
    precision: str
    compute: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundTimes:
    """Medians of one round in milliseconds."""

    wall_ms: float
    processor_ms: float
    runs: int


def measure(network: TimedNetwork, image: np.ndarray) -> RoundTimes:
    """Open a network on one thread and time it."""
    run = _opened(network)
    run(image)
    wall, processor = list[float](), list[float]()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(wall) < MIN_RUNS:
        began = time.perf_counter(), time.process_time()
        run(image)
        wall.append(1000 * (time.perf_counter() - began[0]))
        processor.append(1000 * (time.process_time() - began[1]))
    return RoundTimes(wall_ms=float(np.median(wall)), processor_ms=float(np.median(processor)), runs=len(wall))


def _opened(network: TimedNetwork) -> Callable[[np.ndarray], np.ndarray]:
    if network.opener == "pytorch":
        import torch

        from medseg_trt.train.checkpoint import load_checkpoint
        from medseg_trt.train.models.model import runner

        torch.set_num_threads(THREADS)
        return runner(load_checkpoint(network.path).model())
    module = import_module(BACKENDS[network.opener].module)
    return module.open_graph(network.path, network.precision, THREADS, network.compute).run


def fastest_int8(name: str, bundle: Bundle) -> TimedNetwork:
    """Return the fastest INT8 execution that the build verified."""
    execution = next(row for row in bundle.content.executions if bundle.variant(row).precision == "int8")
    variant = bundle.variant(execution)
    return TimedNetwork(
        name=f"{name}, block {bundle.block}" if bundle.block else name,
        opener=execution.backend,
        path=bundle.folder / variant.graph,
        precision=variant.precision,
        compute=execution.compute_dtype,
    )


def built(folder: Path, checkpoint: Path, plain: Path, data: Path) -> Iterator[tuple[str, Bundle]]:
    """Yield the bundles with their names."""
    yield "ours, exact", build(checkpoint, SPEC, folder / "exact.medseg", data)
    yield "ours, auto", build(checkpoint, replace(SPEC, block="auto"), folder / "auto.medseg", data)
    yield "ours, plain TransUNet", build(plain, SPEC, folder / "plain.medseg", data)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the page."""
    times = result["times"]
    rows = [
        [
            name,
            f"{np.median([row['wall_ms'] for row in rounds]):.2f}",
            f"{np.median([row['processor_ms'] for row in rounds]):.2f}",
            str(len(rounds)),
        ]
        for name, rounds in times.items()
    ]
    ratios = [
        [name, f"{ratio:.3f}", f"{low:.3f} … {high:.3f}"] for name, (ratio, low, high) in result["ratios"].items()
    ]
    judged = [
        [
            rung["rung"],
            "–" if rung["relative_error"] is None else f"{rung['relative_error']:.4f}",
            verdict["split"],
            verdict["precision"],
            f"{verdict['reference']:.4f} → {verdict['candidate']:.4f}",
            *(f"{verdict[key]:.5f}" for key in ("drop", "high", "limit")),
        ]
        for rung in result["block"]["rungs"]
        for verdict in rung["verdicts"]
    ]
    parts = [
        "# The language block after its replacement",
        (__doc__ or "").partition("\n\n")[2].partition("\n\n    ")[0],
        "\n".join(table(["network", "wall ms", "processor ms", "rounds"], rows)),
        "\n".join(table(["processor time", "ratio", "rounds from … to"], ratios)),
        "What `--block auto` tried, and what the judges said. Where PyTorch's own Dice is near the limit of the drop, "
        "the gate shows little:",
        "\n".join(table(["rung", "relative error", "split", "precision", "Dice", "drop", "up to", "limit"], judged)),
    ]
    return "\n\n".join(parts) + "\n"


def ratio(times: Mapping[str, list[RoundTimes]], above: str, below: str) -> tuple[float, float, float]:
    """Return the median, smallest and largest quotient of processor times of the same round."""
    pairs = zip(times[above], times[below], strict=True)
    quotients = [first.processor_ms / second.processor_ms for first, second in pairs]
    return float(np.median(quotients)), min(quotients), max(quotients)


def main() -> None:
    """Build, time and publish."""
    parser = options(__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--plain", type=Path, required=True, help="a checkpoint of the same TransUNet without a block")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with TemporaryDirectory() as temporary:
        bundles = dict(built(Path(temporary), chosen.checkpoint, chosen.plain, chosen.data))
        networks = [fastest_int8(name, bundle) for name, bundle in bundles.items()]
        eager = TimedNetwork(
            name="PyTorch eager", opener="pytorch", path=chosen.checkpoint, precision="fp32", compute="fp32"
        )
        image = bundles["ours, exact"].golden()[0]
        times: dict[str, list[RoundTimes]] = {network.name: [] for network in (*networks, eager)}
        for _ in range(chosen.rounds):
            for network in (*networks, eager):
                times[network.name].append(in_own_process(measure, network, image))
        block = bundles["ours, auto"].content.block
    if block is None:
        raise MedsegError(f"{chosen.checkpoint} has no language block")
    exact, auto, plain = (network.name for network in networks)
    pairs = ((exact, plain), (auto, plain), (eager.name, exact), (eager.name, auto))
    result = {
        "checkpoint": chosen.checkpoint.name,
        "image": list(image.shape),
        "block": to_dict(block),
        "times": {name: [asdict(row) for row in rounds] for name, rounds in times.items()},
        "ratios": {f"{above} ÷ {below}": ratio(times, above, below) for above, below in pairs},
    }
    publish("bench_block", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
