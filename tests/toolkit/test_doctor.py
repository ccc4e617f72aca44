import ctypes
import importlib.util
import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from medseg_trt import doctor
from medseg_trt.cli import cli
from medseg_trt.doctor import ABILITIES, Finding, examine
from medseg_trt.gpu import ListedGpus
from medseg_trt.pytorch_build import PyTorchBuild

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))


def test_doctor_lists_installed_packages_with_versions():
    findings = {finding.ability: finding for finding in examine()}
    # The tests need all of the others.
    assert {name for name in ABILITIES if not findings[name].ready} <= {
        "build engines with TensorRT-RTX",
        "infer on an NVIDIA GPU with TensorRT-RTX",
        "infer on an NVIDIA GPU with ONNX Runtime",
    }
    assert re.search(r"torch \d+\.\d+", findings["train"].detail)
    assert re.search(r"nvidia-cuda-nvrtc 13\.0\.\d+", findings["compile CUDA kernels"].detail)


def test_what_is_missing_comes_with_the_command_that_installs_it(monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else original(name))
    findings = {finding.ability: finding for finding in examine()}
    assert findings["train"].detail == "torch missing; install: pip install 'medseg-trt[train]'"
    assert not findings["build bundles"].ready
    assert findings["infer on the CPU with ONNX Runtime"].ready


def test_doctor_extras_contain_the_packages_they_install():
    extras = PYPROJECT["project"]["optional-dependencies"]
    for ability in ABILITIES.values():
        names = {re.split(r"[>=<\[]", requirement)[0] for requirement in extras[ability.extra]}
        assert set(ability.packages) <= names


@pytest.mark.parametrize(
    ("module", "ability", "command"),
    [
        ("openvino", "infer on the CPU with OpenVINO", "pip install 'medseg-trt[openvino]'"),
        ("tensorrt_rtx", "build engines with TensorRT-RTX", "pip install 'medseg-trt[tensorrt-rtx]'"),
        ("ml_dtypes", "compile CUDA kernels", "pip install 'medseg-trt[kernels]'"),
    ],
)
def test_doctor_gives_the_install_command_of_a_missing_backend_or_compiler(monkeypatch, module, ability, command):
    original = importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == module else original(name))
    finding = {item.ability: item for item in examine()}[ability]
    assert not finding.ready
    assert finding.detail.endswith(command)


def test_a_wheel_without_a_module_of_its_own_is_missed_too(monkeypatch):
    original = doctor.version

    def version(package: str) -> str:
        if package == "nvidia-cuda-nvcc":
            raise PackageNotFoundError(package)
        return original(package)

    monkeypatch.setattr(doctor, "version", version)
    findings = {finding.ability: finding for finding in examine()}["compile CUDA kernels"]
    assert findings.detail == "nvidia-cuda-nvcc missing; install: pip install 'medseg-trt[kernels]'"


def test_doctor_reports_a_missing_nvidia_driver(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    *_, gpu = examine()
    assert (gpu.ready, gpu.detail) == (False, "no NVIDIA driver is installed")


@pytest.mark.parametrize(
    ("cuda", "gpus", "says_cpu"), [(None, 1, True), (None, 0, False), ("13.0", 1, False)], ids=["cpu", "no gpu", "cuda"]
)
def test_doctor_says_of_a_cpu_build_of_pytorch_beside_a_gpu_that_it_trains_on_the_cpu(
    cuda, gpus, says_cpu, monkeypatch
):
    monkeypatch.setattr(doctor, "listed_gpus", lambda: ListedGpus(count=gpus, words="generated"))
    monkeypatch.setattr(doctor, "pytorch_build", lambda: PyTorchBuild(version="2.13.0", cuda=cuda))
    findings = {finding.ability: finding for finding in examine()}
    detail = findings["train"].detail
    assert findings["train"].ready
    assert (
        "; on the CPU only, as this PyTorch is built without CUDA: install one for CUDA, see http" in detail
    ) is says_cpu
    assert findings["an NVIDIA GPU"] == Finding(ability="an NVIDIA GPU", ready=gpus > 0, detail="generated")


def test_the_command_prints_the_same_as_json():
    as_json, as_text = (CliRunner().invoke(cli, ["doctor", *option]) for option in (["--json"], []))
    abilities = json.loads(as_json.stdout)["abilities"]
    assert len(abilities) == len(as_text.stdout.splitlines())
    assert all(finding["ability"] in as_text.stdout and finding["detail"] in as_text.stdout for finding in abilities)
