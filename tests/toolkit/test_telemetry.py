"""No library sends telemetry: no process of ours looks up a name, connects to a network or writes its files.

Without ``telemetry.switch_off`` ONNX Runtime 1.30 and OpenVINO 2026.4 do all three as soon as they are imported.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stored_bundle import GRAPH, stored_bundle
from tiny import tiny_changes, write_pictures

from medseg_trt.processes import python_command
from medseg_trt.telemetry import MODULES, VARIABLES

# All that a child gets: neither ours of VARIABLES nor CI, GITHUB_ACTIONS and others, with which ONNX Runtime is silent
KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH")
NETWORK = ("AF_INET", "AF_INET6")
TRIES = 5  # OpenVINO stops its sender after 3 s, which on a busy machine can be before its first call
THEIRS = ("Microsoft", "intel", "onnxruntime", "huggingface")  # parts of the paths of files that they write
IMPORT_ALL = """
import onnxruntime, openvino
onnxruntime.InferenceSession({graph!r}, providers=["CPUExecutionProvider"])
openvino.Core().read_model({graph!r})
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def traced(command: list[str], home: Path, cwd: Path) -> tuple[list[str], list[str]]:
    """Run a command under strace; return its calls to a network, and the files of libraries in its home folder."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace: apt-get install strace")
    log = home.parent / "strace.txt"
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment = {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=socket,connect,sendto,sendmsg", "-o", log, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    calls = [line for line in log.read_text(errors="replace").splitlines() if any(name in line for name in NETWORK)]
    files = [str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()]
    return calls, [name for name in files if any(part in name for part in THEIRS)]


def test_the_libraries_alone_would_send_telemetry(tmp_path, home):
    """The other tests would show nothing if the libraries were silent, or strace blind."""
    program = IMPORT_ALL.format(graph=str(stored_bundle(tmp_path / "bundle") / "fp32-plain.onnx"))
    for _ in range(TRIES):
        calls, files = traced([sys.executable, "-c", program], home, tmp_path)
        if calls:
            break
    assert calls
    assert files


def test_importing_medseg_trt_first_is_enough(tmp_path, home):
    program = "import medseg_trt" + IMPORT_ALL.format(graph=str(stored_bundle(tmp_path / "bundle") / "fp32-plain.onnx"))
    assert traced([sys.executable, "-c", program], home, tmp_path) == ([], [])


def test_infer_sends_no_telemetry(tmp_path, home):
    """The command with a stored bundle: both back-ends."""
    images = write_pictures(tmp_path / "data", count=1) / "images"
    bundle = stored_bundle(tmp_path / "model.medseg")
    assert (bundle / GRAPH).is_file()
    for backend in ("onnxruntime", "openvino"):
        command = python_command("medseg_trt", "infer", str(images), "--bundle", str(bundle), "-o", "masks")
        assert traced([*command, "--backend", backend], home, tmp_path) == ([], [])


def test_train_build_evaluate_and_bench_are_silent(tmp_path, home):
    data = write_pictures(tmp_path / "data")
    unet = tiny_changes("train.epochs=1", "architecture=unet-tiny")
    changes = [argument for change in unet for argument in ("--set", change)]
    commands = (
        ("train", "--recipe", "folder", "--data", data, "-o", "run", *changes),
        ("build", "--ckpt", "run/best.pt", "--data", data, "-o", "model.medseg"),
        ("evaluate", "--ckpt", "run/best.pt", "--bundle", "model.medseg", "--data", data),
        ("bench", "--ckpt", "run/best.pt", "--bundle", "model.medseg", "--data", data, "--duration-s", "0.1"),
    )
    for arguments in commands:
        assert traced(python_command("medseg_trt", *map(str, arguments)), home, tmp_path) == ([], []), arguments[0]


def test_telemetry_variables_override_the_user_environment(monkeypatch):
    program = "import medseg_trt, os, sys; print([os.environ[n] for n in sys.argv[1:]], sys.modules[{!r}])"
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    command = [sys.executable, "-P", "-c", program.format(MODULES[0]), *VARIABLES]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{list(VARIABLES.values())} None"
