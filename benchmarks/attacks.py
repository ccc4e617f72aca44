"""Attack an older version and this one with hostile files; measure memory and processor time, and say what came of it.

    python benchmarks/attacks.py --before OLDER_CHECKOUT

Every attack runs in a process of its own with limits on address space (``ulimit -v``) and processor time; reaching one
of them counts as a success of the attack. The bundle is that of ``tests/fixtures``.
"""

import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import PIL.Image
from onnx import TensorProto, helper, numpy_helper
from results_file import options, publish, table

ROOT = Path(__file__).parents[1]
PACKAGES = ("train", "export", "kernels")  # that lie beside toolkit in a checkout, and below it in the package
MAX_ADDRESS_SPACE = 16 << 30
MAX_PROCESSOR_S = 10
LAST = 100  # characters of a message in the table
INFER = shlex.split("-P -m medseg_trt infer image.png --bundle model.medseg -o masks --backend onnxruntime")
PLANT = """
import hashlib, pathlib, subprocess, sys

run = [sys.executable, "-P", *sys.argv[1:]]
subprocess.run(run, check=True)
record, mask = next(pathlib.Path("masks/.finished").iterdir()), pathlib.Path("masks/image.png")
before = hashlib.sha256(mask.read_bytes()).hexdigest()
mask.write_bytes(mask.read_bytes() + b" ")
assert before in record.read_text()
record.write_text(record.read_text().replace(before, hashlib.sha256(mask.read_bytes()).hexdigest()))
subprocess.run([*run, "--continue"], check=True)
if mask.read_bytes().endswith(b" "):
    sys.exit("the planted mask is kept")
print("segmented again")
"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of an attack."""

    exit_code: int  # negative: the signal
    peak_mb: float  # of resident memory
    processor_s: float
    last_line: str


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rehash(bundle: Path) -> None:
    """Write true digests, as whoever may write to a bundle can."""
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in sorted(bundle.iterdir())
        if path.name != "manifest.json"
    }
    edit_json(bundle / "manifest.json", lambda manifest: manifest.update(files=files))


def edit_graphs(bundle: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change every graph."""
    for path in bundle.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())
    rehash(bundle)


def golden_bomb(folder: Path) -> list[str]:
    """A golden file of 0.5 MB that inflates to 512 MiB."""
    bundle = folder / "model.medseg"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**27,)})
    with zipfile.ZipFile(bundle / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("pixel_values.npy", "logits.npy"):
            with archive.open(name, "w", force_zip64=True) as file:
                file.write(header.getvalue())
                for _ in range(2**29 >> 20) if name == "pixel_values.npy" else ():
                    file.write(bytes(1 << 20))
    rehash(bundle)
    return INFER


def golden_claim(folder: Path) -> list[str]:
    """A golden file whose header claims 10.9 TiB."""
    bundle = folder / "model.medseg"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (3 * 10**12,)})
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive:
        for name in ("pixel_values.npy", "logits.npy"):
            archive.writestr(name, header.getvalue())
    rehash(bundle)
    return INFER


def image_size(folder: Path) -> list[str]:
    """A manifest whose network takes 131072 x 131072 pixels."""

    def change(manifest: dict[str, Any]) -> None:
        for part in ("model", "preprocessing"):
            manifest[part]["image_size"] = [2**17, 2**17]

    edit_json(folder / "model.medseg" / "manifest.json", change)
    return INFER


def golden_error(folder: Path) -> list[str]:
    """A manifest that allows every error of the golden output, and weights of noise."""
    bundle = folder / "model.medseg"
    weights = bundle / "weights-fp32.bin"
    weights.write_bytes(np.random.default_rng(0).normal(0, 0.1, weights.stat().st_size // 4).astype("<f4").tobytes())
    rehash(bundle)

    def change(manifest: dict[str, Any]) -> None:
        for execution in manifest["executions"]:
            execution["golden_error"] = float("inf")

    edit_json(bundle / "manifest.json", change)
    return INFER


def unknown_backend(folder: Path) -> list[str]:
    """A manifest whose first execution has a back-end that does not exist."""
    edit_json(
        folder / "model.medseg" / "manifest.json", lambda manifest: manifest["executions"][0].update(backend="tpu")
    )
    return INFER[:-2]


def endless_loop(folder: Path) -> list[str]:
    """A graph with a Loop of 2^62 steps whose result is added to the logits."""

    def change(model: onnx.ModelProto) -> None:
        value = helper.make_tensor_value_info
        kept = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])]
        body = helper.make_graph(
            kept,
            "body",
            [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, [1])],
            [value("c2", TensorProto.BOOL, []), value("v2", TensorProto.FLOAT, [1])],
        )
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(2**62, np.int64), "steps"),
                numpy_helper.from_array(np.array(True), "go"),
                numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
            ]
        )
        _before_logits(model, [helper.make_node("Loop", ["steps", "go", "zero"], ["more"], body=body)])

    edit_graphs(folder / "model.medseg", change)
    return INFER


def expand(folder: Path) -> list[str]:
    """A graph that expands one number to 32 GiB."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2**16, 2**17], np.int64), "sizes"))
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), "plane"))
        nodes = [
            helper.make_node("ReduceMax", ["before", "plane"], ["one"]),
            helper.make_node("Expand", ["one", "sizes"], ["huge"]),
            helper.make_node("ReduceMax", ["huge", "plane"], ["more"]),
        ]
        _before_logits(model, nodes)

    edit_graphs(folder / "model.medseg", change)
    return INFER


def _before_logits(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[list(last.output).index("logits")] = "before"
    model.graph.node.extend([*nodes, helper.make_node("Add", ["before", "more"], ["logits"])])


def unlisted_weights(folder: Path) -> list[str]:
    """Graphs that take their weights from a file without a digest."""
    bundle = folder / "model.medseg"

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "other.bin"

    edit_graphs(bundle, change)
    (bundle / "other.bin").write_bytes((bundle / "weights-fp32.bin").read_bytes())
    return INFER


def swapped_graph(folder: Path) -> list[str]:
    """A graph that is replaced between ``load_bundle`` and ``open_session``; its masks have other classes."""
    bundle = folder / "model.medseg"
    other = onnx.load(bundle / "fp32.onnx", load_external_data=False)
    other.producer_name = "attacker"
    (folder / "other.onnx").write_bytes(other.SerializeToString())
    program = (
        "import os, medseg_trt; bundle = medseg_trt.load_bundle('model.medseg'); "
        "os.replace('other.onnx', 'model.medseg/fp32.onnx'); "
        "medseg_trt.open_session(bundle, 'onnxruntime'); print('the swapped graph runs')"
    )
    return ["-P", "-c", program]


def planted_record(folder: Path) -> list[str]:
    """A record that came with the output folder and keeps another mask as finished."""
    return ["-P", "-c", PLANT, *INFER]


ATTACKS: Mapping[str, Callable[[Path], list[str]]] = {
    "golden data of 512 MiB in 0.5 MB": golden_bomb,
    "golden data that claim 10.9 TiB": golden_claim,
    "a network of 131072 x 131072 pixels": image_size,
    "weights of noise, golden_error Infinity": golden_error,
    "an unknown back-end": unknown_backend,
    "a graph with an endless loop": endless_loop,
    "a graph that expands to 32 GiB": expand,
    "weights from an unlisted file": unlisted_weights,
    "a graph swapped after the check": swapped_graph,
    "a planted record and --continue": planted_record,
}


def run(attack: Callable[[Path], list[str]], packages: Mapping[str, Path]) -> dict[str, Run]:
    """Attack every package, each in a copy of the same folder."""
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "made")
        with zipfile.ZipFile(ROOT / "tests" / "fixtures" / "bundle-schema-3.zip") as archive:
            archive.extractall(folder / "model.medseg")
        PIL.Image.open(ROOT / "tests" / "fixtures" / "image.png").save(folder / "image.png")
        arguments = attack(folder)
        for version, package in packages.items():
            runs[version] = _run(
                [sys.executable, "-P", *arguments], shutil.copytree(folder, Path(name, version)), package
            )
    return runs


def _run(command: list[str], folder: Path, package: Path) -> Run:
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, preexec_fn=_limit
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines() or [""]
    return Run(
        exit_code=process.returncode,
        peak_mb=usage.ru_maxrss * 1024 / 1e6,
        processor_s=usage.ru_utime + usage.ru_stime,
        last_line=" ".join(lines[-1].replace(str(folder), "").split())[:LAST],
    )


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_PROCESSOR_S, MAX_PROCESSOR_S))


def as_package(checkout: Path, folder: Path) -> Path:
    """Return a folder with a package ``medseg_trt`` of links to the files of a checkout."""
    package = folder / "medseg_trt"
    package.mkdir(parents=True)
    for path in (checkout / "toolkit").iterdir():
        (package / path.name).symlink_to(path)
    for name in PACKAGES:
        (package / name).symlink_to(checkout / name)
    return folder


def page(result: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    rows = [
        [name, _cell(outcomes["before"]), _cell(outcomes["after"]), outcomes["after"]["last_line"]]
        for name, outcomes in result["attacks"].items()
    ]
    lines = [
        "# Attacks",
        "",
        f"Each in a process of its own with {MAX_ADDRESS_SPACE >> 30} GiB of address space (`ulimit -v`) and "
        f"{MAX_PROCESSOR_S} s of processor time; one run each. Before: commit {result['before']}. Cells: exit code, "
        "peak of resident memory, processor time. Exit code 5: the bundle is refused in one line; -9 or -24: the limit "
        "of processor time was reached; 0: the attack is harmless, or was not noticed.",
        "",
        *table(["attack", "before", "after", "last line after"], rows),
        "",
    ]
    return "\n".join(lines)


def _cell(outcomes: Mapping[str, Any]) -> str:
    return f"exit {outcomes['exit_code']}, {outcomes['peak_mb']:.0f} MB, {outcomes['processor_s']:.1f} s"


def main() -> None:
    """Run all attacks on both versions."""
    parser = options(__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of the older version")
    chosen = parser.parse_args()
    commit = subprocess.run(
        ["git", "-C", str(chosen.before), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        packages = {
            "before": as_package(chosen.before.resolve(), Path(folder, "before")),
            "after": as_package(ROOT, Path(folder, "after")),
        }
        outcomes: dict[str, dict[str, Any]] = {}
        for name, attack in ATTACKS.items():
            outcomes[name] = {version: asdict(outcome) for version, outcome in run(attack, packages).items()}
            print(name, outcomes[name], file=sys.stderr, flush=True)
    publish("attacks", {"before": commit, "attacks": outcomes}, page, chosen)


if __name__ == "__main__":
    main()
