"""``--device cuda`` without a GPU: one line, at once, the same from every command, and nothing is left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from medseg_trt import devices
from medseg_trt.cli import cli
from medseg_trt.devices import AUTO, CPU, ComputeDevice, require_device
from medseg_trt.errors import DeviceError
from medseg_trt.gpu import Gpu
from medseg_trt.inference.to_folder import MaskFolder
from medseg_trt.pipeline import infer
from medseg_trt.pytorch_build import PyTorchBuild

GPU = Gpu(name="A10", sm="sm86", cuda="13.0", driver=None)
COMMANDS = {
    "train": ["train", "--recipe", "folder", "--data", "data"],
    "build": ["build", "--ckpt", "model.pt"],
    "build an engine": ["build", "--ckpt", "model.pt", "--backend", "tensorrt-rtx"],
    "build from ONNX": ["build", "--onnx", "net.onnx", "--preprocessing", "net.json"],
    "evaluate": ["evaluate", "--ckpt", "model.pt", "--data", "data"],
    "evaluate a bundle": ["evaluate", "--bundle", "model.medseg", "--data", "data"],
    "infer": ["infer", "images", "--bundle", "model.medseg", "-o", "out/masks"],
    "infer again": ["infer", "images", "--bundle", "model.medseg", "-o", "out/masks", "--rebuild", "--continue"],
    "infer a tree": ["infer", "images", "--bundle", "model.medseg", "-o", "out/masks", "--tree"],
    "infer with a back-end": [
        *["infer", "images", "--bundle", "model.medseg", "-o", "out/masks"],
        *["--backend", "onnxruntime-cuda"],
    ],
    "bench": ["bench", "--bundle", "model.medseg", "-o", "out/report"],
    "bench a checkpoint": ["bench", "--bundle", "model.medseg", "--ckpt", "model.pt", "-o", "out/report"],
}
WITH_PYTORCH = ("train", "build", "build an engine", "evaluate", "bench a checkpoint")


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a bundle."""
    (tmp_path / "model.medseg").symlink_to(tiny_bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("device", ["cuda", "cuda:7"])
def test_a_missing_gpu_is_refused_by_every_command_in_the_same_words(name, device, folder, monkeypatch):
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: None)
    before = sorted(folder.rglob("*"))
    error = CliRunner().invoke(cli, [*COMMANDS[name], "--device", device]).exception
    assert isinstance(error, DeviceError), error
    assert error.exit_code == 6
    assert str(error).startswith(f"there is no GPU cuda:{device.partition(':')[2] or 0}: ")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_pytorch_without_cuda_is_refused_where_pytorch_is_to_compute(name, folder, monkeypatch):
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: GPU)
    monkeypatch.setattr(devices, "pytorch_build", lambda: PyTorchBuild(version="2.13.0+cpu", cuda=None))
    command = [word.replace("model.medseg", "nowhere.medseg") for word in COMMANDS[name]]  # not to run it
    error = CliRunner().invoke(cli, [*command, "--device", "cuda"]).exception
    words = "--device cuda:0: PyTorch 2.13.0+cpu is built without CUDA; install one for CUDA"
    assert str(error).startswith(words) is (name in WITH_PYTORCH), error


@pytest.mark.parametrize("name", ["train", "build", "evaluate", "bench a checkpoint"])
def test_a_missing_gpu_is_said_before_pytorch_is_imported(name, folder):
    code = (
        "import json, sys\nfrom click.testing import CliRunner\nfrom medseg_trt.cli import cli\n"
        f"ran = CliRunner().invoke(cli, {[*COMMANDS[name], '--device', 'cuda:99']!r})\n"
        "print(json.dumps([str(ran.exception), sorted({'torch', 'onnx', 'numpy'} & sys.modules.keys())]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, imported = json.loads(ran.stdout)
    assert message.startswith("there is no GPU cuda:99: ")
    assert imported == []


def test_a_session_that_cannot_be_opened_leaves_an_earlier_runs_masks_as_they_were(folder, monkeypatch):
    from tiny import write_pictures

    images = write_pictures(folder / "data", count=2) / "images"
    out = folder / "masks"
    assert len(list(infer([images], "model.medseg", destination=MaskFolder(out), device=CPU))) == 2
    (out / "areas.csv").chmod(0o600)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}

    def refuse(*_: object) -> None:
        raise DeviceError("the card is gone")

    monkeypatch.setattr("medseg_trt.pipeline.open_session", refuse)
    for resume in (False, True):
        with pytest.raises(DeviceError, match="the card is gone"):
            list(infer([images], "model.medseg", destination=MaskFolder(out, resume=resume)))
        with pytest.raises(DeviceError, match="the card is gone"):
            list(infer([images], "model.medseg", destination=MaskFolder(folder / "new/masks", resume=resume)))
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    assert after == before
    assert not (folder / "new").exists()


def test_a_bench_that_fails_leaves_no_folder_and_keeps_one_that_was_there(folder, monkeypatch):
    command = ["bench", "--bundle", "model.medseg", "--data", "nowhere", "-o"]
    assert CliRunner().invoke(cli, [*command, "out/report"]).exit_code
    assert not os.path.lexists("out")
    os.makedirs("there")
    assert CliRunner().invoke(cli, [*command, "there"]).exit_code
    assert os.listdir("there") == []


@pytest.mark.parametrize("device", [AUTO, CPU])
def test_a_device_that_is_always_there_asks_neither_the_driver_nor_pytorch(device, monkeypatch):
    monkeypatch.setattr("medseg_trt.gpu._driver", lambda: pytest.fail("the driver was asked"))
    monkeypatch.setattr(devices, "pytorch_build", lambda: pytest.fail("PyTorch was asked"))
    require_device(device, pytorch=True)


def test_a_gpu_that_is_there_is_accepted(monkeypatch):
    monkeypatch.setattr("medseg_trt.gpu.find_gpu", lambda number: GPU)
    monkeypatch.setattr(devices, "pytorch_build", lambda: PyTorchBuild(version="2.13.0", cuda="13.0"))
    require_device(ComputeDevice("cuda"), pytorch=True)
