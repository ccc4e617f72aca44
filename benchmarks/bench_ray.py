"""How fast is `infer --ray` against `infer` on the same machine?

    python benchmarks/bench_ray.py --bundle model.medseg [--pictures 8000] [--rounds 2] [--threads 2]
    python benchmarks/bench_ray.py --bundle model.medseg --recovery [--pictures 400]

Needs the extra `ray`. The pictures are those of bench_archive.py. Every run is the command in a process of its own, in
interleaved rounds, local and on a cluster of this machine, whose one actor has as many threads as the local session.
Rate: pictures per second from the first record on the disk to the last, when the sessions are open in both. Apart from
it: seconds from the command to the first mask, which for Ray are those of the driver and the actor on a cluster that
runs already, and from the last mask to the end, when the tables are written. Masks, tables and records must be the same
bytes.

``--recovery`` kills the worker process once half of the masks are there, in a result of its own: the run must end with
the bytes of a local one.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench_archive import RECORDS, write_tree
from results_file import options, publish, table

from medseg_trt.files import sha256
from medseg_trt.metrics.intervals import median_of_rounds, speed_interval
from medseg_trt.processes import python_command

LEAST_S = 60.0  # of work, without start-up
CPUS = 2  # of the cluster: one for the actor, and one that Ray needs beside it


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """One run."""

    start_s: float  # from the command to the first mask
    work_s: float  # from the first mask to the last
    end_s: float  # from the last mask to the end


def run_once(command: Sequence[str], out: Path) -> Timed:
    """Run ``infer`` once.

    Raises:
        SystemExit: it fails; its stderr is shown.
    """
    began = time.time()
    done = subprocess.run([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    written = [path.stat().st_mtime for path in (out / RECORDS).rglob("*.json")]
    first, last = min(written), max(written)
    return Timed(start_s=first - began, work_s=last - first, end_s=ended - last)


def content(folder: Path) -> dict[str, str]:
    """Return the digest of every file, records included."""
    return {str(path.relative_to(folder)): sha256(path) for path in folder.rglob("*") if path.is_file()}


def commands_of(tree: Path, address: str, chosen: Any) -> dict[str, list[str]]:
    """Return the command that segments a tree, without Ray and with it."""
    infer = [*python_command("medseg_trt"), "infer", str(tree), "--tree", "--bundle", str(chosen.bundle), "-q"]
    infer += ["--backend", chosen.backend, "--threads", str(chosen.threads)]
    return {"local": infer, "ray": [*infer, "--ray", address]}


def measure(root: Path, address: str, chosen: Any) -> dict[str, Any]:
    """Return the runs of both ways, and whether they wrote the same bytes."""
    commands = commands_of(write_tree(root / "tree", chosen.pictures, 0), address, chosen)
    runs: dict[str, list[Timed]] = {name: [] for name in commands}
    contents: dict[str, dict[str, str]] = {}
    for number in range(chosen.rounds):
        for name in sorted(commands, reverse=bool(number % 2)):
            out = root / name
            runs[name].append(run_once(commands[name], out))
            contents[name] = content(out)
            shutil.rmtree(out)
    rates = {name: [[run.work_s] for run in timed] for name, timed in runs.items()}
    interval = speed_interval(rates["local"], rates["ray"], interleaved=True)
    return {
        "runs": {name: [asdict(run) for run in timed] for name, timed in runs.items()},
        "pictures_per_s": {name: (chosen.pictures - 1) / median_of_rounds(rows) for name, rows in rates.items()},
        "speed": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "same_bytes": contents["local"] == contents["ray"],
    }


def recover(root: Path, address: str, chosen: Any) -> dict[str, Any]:
    """Kill the worker of a run on the cluster in the middle; return whether the files are those of a local run."""
    commands = commands_of(write_tree(root / "tree", chosen.pictures, 0), address, chosen)
    run_once(commands["local"], root / "local")
    out, began = root / "ray", time.time()
    running = subprocess.Popen([*commands["ray"], "-o", str(out)], stderr=subprocess.PIPE, text=True)
    at_kill, killed_at = 0, began
    while running.poll() is None:
        done = sum(1 for _ in (out / RECORDS).rglob("*.json"))
        if not at_kill and done >= chosen.pictures // 2 and kill_worker():
            at_kill, killed_at = done, time.time()
        time.sleep(0.05)
    error = running.stderr.read() if running.stderr else ""
    if running.returncode:
        raise SystemExit(f"the run with a killed worker failed: {error}")
    written = [path.stat().st_mtime for path in (out / RECORDS).rglob("*.json")]
    return {
        "masks_at_kill": at_kill,
        "masks": len(written),
        "pause_s": min((moment for moment in written if moment > killed_at), default=killed_at) - killed_at,
        "seconds": time.time() - began,
        "same_bytes": content(root / "local") == content(out),
    }


def kill_worker() -> bool:
    """Kill a process of this script's cluster that segments; return whether there was one."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "MapWorker" in " ".join(process.cmdline()):
                process.kill()
                return True
    return False


def recovery_page(result: Any) -> str:
    """Return what came of a lost worker as a page."""
    return "\n".join(
        [
            "# infer on a Ray cluster whose worker is killed",
            "",
            f"{result['pictures']} pictures of 64 x 64 pixels, {result['network']} with {result['backend']}; Ray "
            f"{result['ray']}, {CPUS} CPUs. The worker was killed after {result['masks_at_kill']} masks; the next mask "
            f"followed {result['pause_s']:.1f} s later, and {result['masks']} masks were there at the end. Masks, "
            f"tables and records are {'byte-identical with' if result['same_bytes'] else 'DIFFERENT from'} those of a "
            "local run.",
            "",
        ]
    )


def to_markdown(result: Any) -> str:
    """Return the results as a page."""
    header = ("run", "pictures/s", "s to the first mask", "s of work", "s after the last mask")
    rows = [
        (
            name,
            f"{result['pictures_per_s'][name]:.1f}",
            *(", ".join(f"{run[key]:.1f}" for run in runs) for key in ("start_s", "work_s", "end_s")),
        )
        for name, runs in result["runs"].items()
    ]
    shortest = min(run["work_s"] for runs in result["runs"].values() for run in runs)
    few = "" if shortest >= LEAST_S else f" The work is shorter than {LEAST_S:g} s: give more pictures."
    return "\n".join(
        [
            "# infer on a Ray cluster of one machine",
            "",
            f"{result['pictures']} pictures of 64 x 64 pixels, {result['network']} with {result['backend']} and "
            f"{result['threads']} threads in one actor; Ray {result['ray']}, {CPUS} CPUs.{few}",
            "",
            *table(header, rows),
            "",
            f"With Ray, the rate from the first mask to the last is {result['speed']:.3f} times that of a local run "
            f"({result['low']:.3f} … {result['high']:.3f}, the range of the rounds). Masks, tables and records are "
            f"{'byte-identical' if result['same_bytes'] else 'DIFFERENT'}.",
            "",
        ]
    )


def main() -> None:
    """Measure and write the results."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--pictures", type=int, help="[default: 8000; with --recovery 400]")
    parser.add_argument("--recovery", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    chosen.pictures = chosen.pictures or (400 if chosen.recovery else 8000)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
    import ray  # pyright: ignore[reportMissingImports]  # an extra of its own
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    from medseg_trt.bundles.bundle import load_bundle

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
    try:
        with TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
            measured = (recover if chosen.recovery else measure)(Path(folder), cluster.address, chosen)
    finally:
        cluster.shutdown()
    result = {
        "pictures": chosen.pictures,
        "network": load_bundle(chosen.bundle).content.model.architecture,
        "backend": chosen.backend,
        "threads": chosen.threads,
        "ray": ray.__version__,
        **measured,
    }
    if chosen.recovery:
        publish("ray_recovery", result, recovery_page, chosen)
    else:
        publish("ray", result, to_markdown, chosen)


if __name__ == "__main__":
    main()
