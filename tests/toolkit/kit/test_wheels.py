"""Which Python and which packages a kit is made of; pip itself runs in ``test_offline.py``."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
from stand_in_kit import write_wheel

from medseg_trt.errors import InputError, UsageError
from medseg_trt.kit.given import constrained, given_versions, write_stub
from medseg_trt.kit.interpreter import find_interpreter, probe
from medseg_trt.kit.make import make_kit
from medseg_trt.kit.parts import MANIFEST
from medseg_trt.kit.spec import KitSpec, parse_given
from medseg_trt.kit.wheel_file import read_wheel
from medseg_trt.kit.wheels import refuse_cuda_torch

ROOT = Path(__file__).parents[3]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
CONSTRAINTS = ["# a comment", "torch==2.13.0", "ml_dtypes==0.6.0", "numpy==2.4.6"]


def write_python(folder: Path, name: str, version: str | None) -> Path:
    """Write a stand-in for a Python: it prints what a probe prints, or fails as a switched-off shim of pyenv."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    numbers = ", ".join(version.split(".")) if version else ""
    printed = f'["{path}", [{numbers}], "cpython-generated"]'
    answer = f"echo '{printed}'" if version else "echo no such version >&2; exit 127"
    path.write_text(f"#!/bin/sh\n{answer}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_version_is_looked_for_on_path_first_and_then_in_pyenvs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'shims'}:{tmp_path / 'bin'}")
    for version in ("3.12.1", "3.12.10", "3.1.2"):
        write_python(tmp_path / "pyenv" / "versions" / version / "bin", "python", version)
    write_python(tmp_path / "pyenv" / "versions" / "3.12-mine" / "bin", "python", "3.12.99")  # not a version's folder
    write_python(tmp_path / "shims", "python3.12", None)
    assert find_interpreter("3.12").version == (3, 12, 10)
    assert find_interpreter("3.12.1").version == (3, 12, 1)
    on_path = write_python(tmp_path / "shims", "python3.12", "3.12.7")
    assert find_interpreter("3.12").path == on_path
    assert find_interpreter("3.12.1").version == (3, 12, 1)


def test_find_interpreter_accepts_a_path():
    found = find_interpreter(sys.executable)
    assert (str(found.path), found.minor) == (sys.executable, HERE)
    assert found.abi.startswith(f"cpython-{HERE.replace('.', '')}")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("3.12", r"there is no Python 3.12 \(not on PATH as python3.12, not in .*/versions\). Install it, or name"),
        ("/nowhere/python", r"there is no Python /nowhere/python \(it does not run\)"),
        ("3.10", "is Python 3.10; medseg-trt needs 3.11 or newer"),
    ],
)
def test_no_suitable_python_is_one_line(wanted, message, tmp_path, monkeypatch):
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    write_python(tmp_path / "bin", "python3.10", "3.10.1")
    with pytest.raises(UsageError, match=message):
        find_interpreter(wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extras": ("cpu", "cuda")}, "--extras: there is no extra cuda. Choose from: cpu, gpu, "),
        ({"samples": ("organ",)}, "--samples: there is no sample organ. Choose from: organs, "),
        ({"given": ("torch>=2",)}, "--given torch>=2: give NAME or NAME==VERSION"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_before_anything_is_fetched(change, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        make_kit(KitSpec(source=ROOT, python=HERE, **change), tmp_path / "kit")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_files_is_never_replaced(tmp_path):
    (tmp_path / "scan.nii").touch()
    with pytest.raises(InputError, match="exists and is no kit"):
        make_kit(KitSpec(source=ROOT, python=HERE), tmp_path)
    assert os.listdir(tmp_path) == ["scan.nii"]


def test_an_older_kit_with_a_file_of_the_users_beside_it_is_never_replaced(tmp_path):
    for name in (MANIFEST, "kit.tar.001", "install.sh"):
        (tmp_path / name).touch()
    (tmp_path / "model.medseg").mkdir()
    with pytest.raises(InputError, match=r"holds 'model.medseg' beside an older kit"):
        make_kit(KitSpec(source=ROOT, python=HERE), tmp_path)
    assert (tmp_path / "model.medseg").is_dir()


def test_a_program_that_prints_something_else_is_no_python(tmp_path):
    path = write_python(tmp_path, "python", None)
    path.write_text("#!/bin/sh\necho 5\n", encoding="utf-8")
    assert probe(path) is None


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no clone of medseg-trt"):
        make_kit(KitSpec(source=tmp_path, python=HERE), tmp_path / "kit")


def test_a_given_package_takes_the_place_of_the_tested_version():
    given = given_versions(["torch==2.11.0", "ML-dtypes"], CONSTRAINTS)
    assert given == {"torch": "2.11.0+given", "ml-dtypes": "0.6.0+given"}
    assert constrained(CONSTRAINTS, given) == [
        "# a comment",
        "numpy==2.4.6",
        "torch==2.11.0+given",
        "ml-dtypes==0.6.0+given",
    ]
    assert given_versions(["torch==2.11.0+cu130"], CONSTRAINTS) == {"torch": "2.11.0+cu130"}
    with pytest.raises(UsageError, match="its version is not known here; give NAME==VERSION"):
        given_versions(["flash-attn"], CONSTRAINTS)


@pytest.mark.parametrize("text", ["torch=2", "==2", "torch==", "torch==2 3", "a b"])
def test_parse_given_refuses_invalid_package_specifications(text):
    with pytest.raises(UsageError, match=r"for example --given torch==2\.11\.0"):
        parse_given(text)


def test_a_stub_stands_for_a_package_and_has_no_content(tmp_path):
    stub = write_stub(tmp_path, "ml-dtypes", "0.6.0+given")
    assert stub.name == "ml_dtypes-0.6.0+given-py3-none-any.whl"
    assert (read_wheel(stub).name, read_wheel(stub).version) == ("ml-dtypes", "0.6.0+given")
    assert all(".dist-info/" in name for name in zipfile.ZipFile(stub).namelist())


def entry(name: str, *requires: str) -> dict[str, object]:
    return {"metadata": {"name": name, "version": "1.0", "requires_dist": list(requires)}}


CUDNN = entry("nvidia-cudnn-cu13")
CUDA_TORCH = entry("torch", "filelock", 'nvidia-cudnn-cu13==9.2; platform_system == "Linux"')


def test_only_a_pytorch_whose_cuda_libraries_come_too_is_refused():
    choices = {
        "a PyTorch for CPUs, and cuDNN of the extra gpu": [entry("torch", "filelock"), CUDNN],
        "its marker did not hold: macOS": [CUDA_TORCH],
        "cuDNN alone": [CUDNN],
        "nothing": [],
        "a PyTorch with CUDA": [CUDA_TORCH, CUDNN],
    }
    refused: list[str] = []
    for name, chosen in choices.items():
        try:
            refuse_cuda_torch(chosen)
        except UsageError:
            refused.append(name)
    assert refused == ["a PyTorch with CUDA"]


def test_a_pytorch_with_cuda_is_refused_with_what_to_do():
    message = r"torch 1.0 with CUDA \(nvidia-cudnn-cu13 …\).*--given torch, or take it: --cuda-torch"
    with pytest.raises(UsageError, match=message):
        refuse_cuda_torch([CUDA_TORCH, CUDNN])


@pytest.mark.parametrize(
    ("headers", "licence", "is_spdx"),
    [
        (["License-Expression: MIT AND BSD-3-Clause"], "MIT AND BSD-3-Clause", True),
        (["License: MIT"], "MIT", False),
        (["License: " + "x" * 200, "Classifier: License :: OSI Approved :: MIT License"], "MIT License", False),
        (["Classifier: Typing :: Typed"], "", False),
    ],
)
def test_a_licence_is_what_the_wheel_states(headers, licence, is_spdx, tmp_path):
    files = {"a/COPYING": "", "a/license_check.py": "", "a-1.dist-info/licenses/deep/MIT.txt": ""}
    wheel = read_wheel(write_wheel(tmp_path, "a", "1", files, *headers))
    assert (wheel.licence, wheel.is_spdx) == (licence, is_spdx)
    assert wheel.licence_files == ("a/COPYING", "a-1.dist-info/licenses/deep/MIT.txt")
