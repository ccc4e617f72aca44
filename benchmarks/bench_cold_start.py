"""How long does it take from the command to the first mask on the disk? New processes, in interleaved rounds.

    python benchmarks/bench_cold_start.py --bundle model.medseg --image picture.png [--ckpt best.pt] [--rounds 5]

`medseg-trt infer` with every back-end of the bundle, and PyTorch with the checkpoint: import, load, one image, one
mask. The first round, which fills the system's file cache, is not counted.
"""

import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from results_file import options, publish, table

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.metrics.intervals import median_of_rounds, speed_interval
from medseg_trt.processes import python_command
from medseg_trt.sessions.backends import is_installed

PROGRAM = (sys.executable, "-P", "-c")  # runs a text as a program, without the current folder in sys.path
PYTORCH = """
import sys
from pathlib import Path
from medseg_trt.imaging.images import Mask, read_image, write_mask
from medseg_trt.imaging.segment import segment
from medseg_trt.sessions.pytorch import open_reference
from medseg_trt.train.checkpoint import load_checkpoint
checkpoint, image = load_checkpoint(Path(sys.argv[1])), read_image(Path(sys.argv[2]))
with open_reference(checkpoint) as session:
    labels = segment(session.run, image, checkpoint.preprocessing, 4)
write_mask(Mask.of(image, labels, checkpoint.classes), Path(sys.argv[3]))
"""


def seconds_of(command: list[str]) -> float:
    """Return how long a command takes.

    Raises:
        SystemExit: it fails; its stderr is shown.
    """
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} …: {done.stderr}")
    return time.perf_counter() - began


def to_markdown(result: Any) -> str:
    """Return the results as a page."""
    rows = [
        (
            row["name"],
            f"{row['typical_s']:.2f}",
            f"{row['min_s']:.2f}",
            f"{row['speed']:.2f}x",
            f"{row['low']:.2f} … {row['high']:.2f}",
            str(len(row["seconds"])),
        )
        for row in result["rows"]
    ]
    header = ("from typing to the first mask", "s", "least s", "speed", "90 % interval", "runs")
    return "\n".join(
        ["# Cold start", "", f"One image, {result['image']}; the first row is 1.", "", *table(header, rows), ""]
    )


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--ckpt", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    backends = dict.fromkeys(execution.backend for execution in load_bundle(chosen.bundle).content.executions)
    with TemporaryDirectory() as out:
        commands: dict[str, list[str]] = {}
        if chosen.ckpt is not None:
            commands["PyTorch, checkpoint"] = [*PROGRAM, PYTORCH, str(chosen.ckpt), str(chosen.image), out]
        for backend in filter(is_installed, backends):
            infer = python_command("medseg_trt", "infer", str(chosen.image), "--bundle", str(chosen.bundle))
            commands[f"medseg-trt infer, {backend}"] = [*infer, "-o", out, "--backend", backend]
        times: dict[str, list[list[float]]] = {name: [] for name in commands}
        for number in range(chosen.rounds + 1):
            for name, command in commands.items():
                seconds = seconds_of(command)
                if number:
                    times[name].append([seconds])
    first, rows = next(iter(times.values())), []
    for name, seconds in times.items():
        speed = speed_interval(first, seconds, interleaved=True)
        rows.append(
            {
                "name": name,
                "typical_s": median_of_rounds(seconds),
                "min_s": float(np.min(seconds)),
                "seconds": [execution[0] for execution in seconds],
                "speed": speed.estimate,
                "low": speed.low,
                "high": speed.high,
            }
        )
    publish("cold_start", {"image": chosen.image.name, "rows": rows}, to_markdown, chosen)


if __name__ == "__main__":
    main()
