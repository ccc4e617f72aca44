"""Make checkpoints, peers' graphs and bundles of the CPU benchmarks, and keep them in the user's cache.

The name of a folder has the digest of the code and the packages that made it. Folders of older code are deleted: a set
takes several gigabytes.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import medseg_trt
from medseg_trt.files import atomic_folder, cache_folder, write_json
from medseg_trt.processes import python_command

PACKAGES = ("numpy", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "openvino", "nncf")
NETWORK_FILES = ("benchmarks/bench_cpu_network.py", "benchmarks/bench_cpu_weights.py")
SOURCES: Mapping[str, tuple[str, ...]] = {  # of each folder of the cache: folders and files below the repository
    "networks": ("train", *NETWORK_FILES, "benchmarks/bench_cpu_peers.py"),
    "bundles": ("train", "export", "toolkit", *NETWORK_FILES),
}
ROOT = Path(__file__).parents[1]
SECONDS_BETWEEN_LOOKS = 0.2  # at the memory of a build


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBundle:
    """A bundle to build."""

    architecture: str
    precisions: str  # as ``build --precision`` takes them


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a benchmark needs."""

    folder: tuple[str, ...]  # of the cache
    architectures: tuple[str, ...]  # keys of ``train.models.model.MODELS``; peers run the first
    image_size: tuple[int, int]  # height and width in pixels
    bundles: Mapping[str, PlannedBundle]  # by name
    has_limit: bool = False  # whether a chain of matrix products is timed beside the networks


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefacts:
    """Where everything lies."""

    networks: Path
    bundles: Path

    def checkpoint(self, architecture: str) -> Path:
        """Return the checkpoint of an architecture."""
        return self.networks / architecture / "model.pt"

    def images(self) -> dict[str, np.ndarray]:
        """Return ``calibration`` and ``judged`` images, and PyTorch's logits of the latter by architecture."""
        with np.load(self.networks / "images.npz") as file:
            return dict(file)

    def bundle(self, name: str) -> Path:
        """Return a bundle of the plan."""
        return self.bundles / f"{name}.medseg"

    def build_figures(self, name: str) -> dict[str, Any]:
        """Return what building a bundle took."""
        return json.loads((self.bundles / f"{name}.json").read_text())


def artefacts(plan: Plan, *, fresh_bundles: bool = False) -> Artefacts:
    """Return everything, made where it is not in the cache.

    Args:
        plan: what is wanted.
        fresh_bundles: build the bundles anew, so that the time they take is that of this moment.
    """
    import bench_cpu_peers

    networks, bundles = (_folder(plan, name) for name in SOURCES)
    if fresh_bundles and bundles.exists():
        shutil.rmtree(bundles)
    if not networks.exists():
        with _only(networks) as partial:
            in_own_process(bench_cpu_peers.write_networks, partial, plan.architectures, plan.image_size)
            in_own_process(bench_cpu_peers.write_unfolded, partial, plan.architectures[0])
            in_own_process(bench_cpu_peers.write_nncf, partial, plan.architectures[0])
            if plan.has_limit:
                in_own_process(bench_cpu_peers.write_gemm, partial)
    made = Artefacts(networks=networks, bundles=bundles)
    if not bundles.exists():
        with _only(bundles) as partial:
            for name, planned in plan.bundles.items():
                checkpoint = made.checkpoint(planned.architecture)
                figures = _build(made, checkpoint, planned.precisions, partial / f"{name}.medseg")
                write_json(partial / f"{name}.json", figures)
    return made


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process that ends with it, so that its memory is free again; return what it returns."""
    context = get_context("spawn")
    pipe, far_end = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(far_end, function, arguments))
    process.start()
    far_end.close()
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__} failed; see above") from None
    finally:
        process.join()


def _send(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def _folder(plan: Plan, name: str) -> Path:
    content = hashlib.sha256("".join(f"{package} {version(package)}\n" for package in PACKAGES).encode())
    content.update(repr(plan).encode())
    for source in SOURCES[name]:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            content.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return cache_folder(*plan.folder) / f"{name}-{content.hexdigest()[:12]}"


def _only(folder: Path) -> Any:
    """Make a folder, whole or not at all, after those of its kind that other code made are gone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(f"{folder.name.partition('-')[0]}-*"):
        shutil.rmtree(old)
    return atomic_folder(folder)


def _build(made: Artefacts, checkpoint: Path, precisions: str, output: Path) -> dict[str, Any]:
    """Run ``medseg-trt build`` and return how long it took and the most memory that all of its processes had.

    The weights are random and the truth is PyTorch's own mask, so the gate judges nothing here and is left open.
    """
    command = [
        *python_command("medseg_trt", "build", "--ckpt", str(checkpoint)),
        *("--data", str(made.networks / "scans"), "--precision", precisions, "--max-dice-drop", "1"),
        *("-o", str(output)),
    ]
    load = os.getloadavg()[0]
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(_resident_bytes, _family(process.pid))))
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if process.returncode:
        raise SystemExit(f"the build failed with exit code {process.returncode}: {' '.join(command)}")
    return {
        "precisions": precisions,
        "seconds": time.perf_counter() - began,
        "peak_resident_mb": peak / 1e6,
        "load_average_before": load,
        "medseg_trt": medseg_trt.__version__,
    }


def _family(pid: int) -> Sequence[int]:
    """Return a process and all that come from it."""
    try:
        children = [
            int(word)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for word in (task / "children").read_text().split()
        ]
    except OSError:  # it is gone
        return []
    return [pid, *(member for child in children for member in _family(child))]


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
