"""What does the server cost, and what does it hold under load?

    python benchmarks/bench_serve.py --bundle model.medseg --volume ct.nii.gz [--seconds 600] [--clients 16]

Four parts: the overhead of HTTP for one small image; throughput of 8 clients against decoding, running and encoding
one image after another in this process; latency of small images at 80 % of that throughput, with a volume beside them
and without; and ``--clients`` mixed clients for ``--seconds``, whose every mask is compared by SHA-256. Where FastAPI
is installed, ``serve_peer.py`` answers the same small images. ``--backend`` measures another one than ONNX Runtime.
"""

import hashlib
import importlib.util
import logging
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL.Image
from results_file import options, publish, table
from serve_clients import PERCENTILES, Tally, free_port, run_clients, serving, small_client, volume_client

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.imaging.images import Mask, read_image, write_mask
from medseg_trt.imaging.segment import segment
from medseg_trt.pipeline import infer
from medseg_trt.progress import LOG
from medseg_trt.sessions.open import open_session

SIZE = (256, 256)
PICTURES, WARM_UP = 8, 20
PEER_BACKEND = "onnxruntime"
LOAD = 0.8  # of the measured throughput


def pictures(folder: Path) -> list[Path]:
    """Write seeded PNG pictures of smooth shapes and noise."""
    rows, columns = np.indices(SIZE) / np.array(SIZE).reshape(2, 1, 1)
    paths: list[Path] = []
    for index in range(PICTURES):
        rng = np.random.default_rng(index)
        values = 60 + 20 * rng.standard_normal(SIZE)
        for _ in range(4):
            row, column, radius = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.05, 0.2)
            values[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] += rng.uniform(40, 140)
        paths.append(folder / f"picture{index}.png")
        PIL.Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return paths


@dataclass(frozen=True, kw_only=True, slots=True)
class Alone:
    """Images of a single process, one after another."""

    session: str
    seconds: float  # the median of an image
    digests: list[str]  # of the masks


def one_after_another(bundle_folder: Path, backend: str, paths: Sequence[Path], seconds: float, folder: Path) -> Alone:
    """Decode, run, finish and encode in this process."""
    bundle = load_bundle(bundle_folder)
    taken: list[float] = []
    digests: dict[Path, str] = {}
    with open_session(bundle, backend) as session:
        masks = session.masks if session.gives_masks else None
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(digests) < len(paths):
            for path in paths:
                began = time.perf_counter()
                image = read_image(path)
                labels = segment(session.run, image, bundle.preprocessing, 4, None, masks)
                finished, remark = bundle.finish(image, labels), bundle.unusual(image)
                content = write_mask(Mask.of(image, finished, bundle.classes, remark), folder).read_bytes()
                taken.append(time.perf_counter() - began)
                digests[path] = hashlib.sha256(content).hexdigest()
        description = session.description
    return Alone(session=description, seconds=statistics.median(taken), digests=[digests[path] for path in paths])


def sha_of_volume(bundle_folder: Path, backend: str, path: Path, folder: Path) -> str:
    """Return the digest of a volume's mask as ``infer`` writes it."""
    (mask,) = infer([path], bundle_folder, backend=backend)
    return hashlib.sha256(write_mask(mask, folder).read_bytes()).hexdigest()


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process in 10^6 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


def measure(chosen: Any, folder: Path) -> dict[str, Any]:
    """Measure all parts."""
    masks = folder / "masks"  # beside the pictures, they would replace them
    masks.mkdir()
    paths = pictures(folder)
    bodies = [path.read_bytes() for path in paths]
    alone = one_after_another(chosen.bundle, chosen.backend, paths, chosen.part_seconds, masks)
    volume = chosen.volume.read_bytes()
    volume_digest = sha_of_volume(chosen.bundle, chosen.backend, chosen.volume, masks)
    port = free_port()
    command = [sys.executable, "-P", "-m", "medseg_trt", "serve", "--bundle", str(chosen.bundle), "--port", str(port)]
    command += ["--spool", str(folder / "spool"), "--backend", chosen.backend]
    result: dict[str, Any] = {
        "session": alone.session,
        "one_after_another_ms": 1000 * alone.seconds,
        "seconds": chosen.seconds,
        "clients": chosen.clients,
    }

    def small(tally: Tally, seconds: float, pause_s: float = 0.0, at: int = port, path: str = "/v1/segment"):
        until = time.perf_counter() + seconds
        return lambda: small_client(at, path, bodies, alone.digests, until, tally, pause_s)

    with serving(command, port) as process:
        run_clients([small(Tally(), 0.2 * WARM_UP)])
        single = Tally()
        run_clients([small(single, chosen.part_seconds)])
        result["single"] = single.row()
        eight = [Tally() for _ in range(8)]
        taken = run_clients([small(tally, chosen.part_seconds) for tally in eight])
        rate = sum(len(tally.seconds) for tally in eight) / taken
        result |= {"throughput_per_s": rate, "throughput_ratio": rate * alone.seconds}
        for name, beside in (("without a volume", False), ("with a volume", True)):
            tallies = [Tally() for _ in range(8)]
            targets = [small(tally, chosen.part_seconds, 8 / (LOAD * rate)) for tally in tallies]
            if beside:
                until = time.perf_counter() + chosen.part_seconds
                targets.append(lambda until=until: volume_client(port, volume, volume_digest, until, Tally()))
            run_clients(targets)
            result[name] = Tally(seconds=[s for tally in tallies for s in tally.seconds]).row()
        result["mixed"] = mixed(
            chosen, process.pid, small, lambda until, tally: volume_client(port, volume, volume_digest, until, tally)
        )
    if chosen.backend == PEER_BACKEND and importlib.util.find_spec("fastapi") is not None:
        port = free_port()
        peer = [sys.executable, "-P", str(Path(__file__).with_name("serve_peer.py")), str(chosen.bundle), str(port)]
        with serving(peer, port):
            run_clients([small(Tally(), 0.2 * WARM_UP, at=port, path="/segment")])
            single, eight = Tally(), [Tally() for _ in range(8)]
            run_clients([small(single, chosen.part_seconds, at=port, path="/segment")])
            taken = run_clients([small(tally, chosen.part_seconds, at=port, path="/segment") for tally in eight])
        rate = sum(len(tally.seconds) for tally in eight) / taken
        result["peer"] = {
            "single": single.row(),
            "throughput_per_s": rate,
            "wrong": single.wrong + sum(t.wrong for t in eight),
        }
    return result


def mixed(chosen: Any, pid: int, small: Any, volume: Callable[[float, Tally], None]) -> dict[str, Any]:
    """Run small clients and one that sends volumes, and watch the server's memory."""
    tallies = [Tally() for _ in range(chosen.clients)]
    until = time.perf_counter() + chosen.seconds
    memory: list[float] = []

    def watch() -> None:
        while time.perf_counter() < until:
            memory.append(resident_mb(pid))
            time.sleep(1.0)

    targets = [small(tally, chosen.seconds) for tally in tallies[1:]]
    run_clients([*targets, lambda: volume(until, tallies[0]), watch])
    settled = memory[min(60, len(memory) // 3) :]
    return {
        "requests": sum(len(tally.seconds) for tally in tallies),
        "volumes": tallies[0].volumes,
        **{name: sum(getattr(tally, name) for tally in tallies) for name in ("wrong", "lost", "refused")},
        "memory_mb": [memory[0], settled[0], max(settled), memory[-1]],
    }


def to_markdown(result: Mapping[str, Any]) -> str:
    """Return the page of a result."""
    rows = [("one after another, in process", "", f"{result['one_after_another_ms']:.1f}", "", "")]
    parts = [
        ("serve, one client", "single"),
        ("serve, 8 clients at 80 % load", "without a volume"),
        ("… and a volume", "with a volume"),
    ]
    rows += [(title, *_cells(result[name])) for title, name in parts]
    if "peer" in result:
        rows.append(("FastAPI peer, one client", *_cells(result["peer"]["single"])))
    done = result["mixed"]
    first, settled, most, last = done["memory_mb"]
    overhead_ms = result["single"]["p50_ms"] - result["one_after_another_ms"]
    peer = f"; the peer: {result['peer']['throughput_per_s']:.1f} a second" if "peer" in result else ""
    lines = [
        "# The server",
        "",
        f"PNG pictures of {SIZE[0]} x {SIZE[1]} pixels, {result['session']} on the CPU.",
        "",
        *table(("small images", "requests", "p50 ms", "p90 ms", "p99 ms"), rows),
        "",
        f"HTTP overhead at the median: {overhead_ms:.1f} ms. Throughput of 8 clients: {result['throughput_per_s']:.1f} "
        f"a second, {result['throughput_ratio']:.2f} times one after another{peer}.",
        "",
        f"{result['clients']} clients for {result['seconds']:.0f} s: {done['requests']} small images and "
        f"{done['volumes']} volumes, {done['wrong']} wrong masks, {done['lost']} lost, {done['refused']} refused with "
        f"429. Memory: {first:.0f} MB at the start, {settled:.0f} MB when settled, {most:.0f} MB at most, {last:.0f} "
        "MB at the end.",
        "",
        *_overload(result["machine"]),
    ]
    return "\n".join(lines)


def _overload(machine: Mapping[str, Any]) -> list[str]:
    """Say that times mean nothing where other work filled the machine before the run."""
    if (machine.get("load") or 0) <= machine["cores"]:
        return []
    return [
        f"**Other work filled the machine before this run** (load {machine['load']:.1f} on {machine['cores']} cores): "
        "the times show nothing, the counts of wrong and lost masks do.",
        "",
    ]


def _cells(row: dict[str, float]) -> tuple[str, ...]:
    return (str(row["requests"]), *(f"{row[f'p{percent}_ms']:.1f}" for percent in PERCENTILES))


def main() -> None:
    """Measure and publish."""
    parser = options(__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--volume", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the mixed clients")
    parser.add_argument("--part-seconds", type=float, default=30.0, help="of every other part")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--backend", default=PEER_BACKEND, help="of another one, give the result a folder with -o")
    chosen = parser.parse_args()
    LOG.setLevel(logging.ERROR)  # a picture may have a size that the steps of post-processing were not learnt at
    with TemporaryDirectory() as folder:
        publish("serve", measure(chosen, Path(folder)), to_markdown, chosen)


if __name__ == "__main__":
    main()
