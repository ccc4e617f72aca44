"""What is released: a wheel, built through an sdist, that holds the package whole and runs without torch."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import PIL.Image
import pytest
from tiny import picture

from medseg_trt.samples.catalogue import NO_NETWORK

ROOT = Path(__file__).parents[1]
PACKAGES = {"toolkit": "", "train": "train", "export": "export", "kernels": "kernels"}  # folder: below medseg_trt
DATA_SUFFIXES = {".cu", ".cuh", ".cpp", ".h", ".html", ".css", ".js", ".json", ".md", ".sh"}


def expected_files() -> set[str]:
    """Return every module, marker and data file of the source tree, as the wheel should name it."""
    files = [(folder, path) for folder in PACKAGES for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {
        str(PurePosixPath("medseg_trt", PACKAGES[folder], path.relative_to(ROOT / folder).as_posix()))
        for folder, path in files
        if path.suffix in {".py", *DATA_SUFFIXES} or path.name == "py.typed"
    }


def copy_sources(folder: Path) -> Path:
    """Copy what git knows, or would if it were added: nothing that was built."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    sources = copy_sources(tmp_path_factory.mktemp("sources"))
    stale = sources / "build" / "lib" / "medseg_trt" / "deleted.py"  # of an earlier build; a wheel must not pick it up
    stale.parent.mkdir(parents=True)
    stale.touch()
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", sources / "dist", sources],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [path.name.endswith(".tar.gz") for path in sorted((sources / "dist").iterdir())] == [False, True]
    return next((sources / "dist").glob("*.whl"))


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    inside = {str(name) for name in names if not name.parts[0].endswith(".dist-info")}
    assert inside == expected_files()
    for name in ("py.typed", "cli.py", "sessions/onnxruntime.py", "train/datasets/folder.py", "export/fold/fold.py"):
        assert f"medseg_trt/{name}" in inside


def test_the_wheel_names_its_command_its_licence_and_its_extras(wheel):
    with zipfile.ZipFile(wheel) as file:
        (entry_points,) = [name for name in file.namelist() if name.endswith("entry_points.txt")]
        assert "medseg-trt = medseg_trt.cli:main" in file.read(entry_points).decode()
        (metadata,) = [name for name in file.namelist() if name.endswith("METADATA")]
        lines = file.read(metadata).decode().splitlines()
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist())
    core = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert not [line for line in core if "extra ==" not in line and line.startswith(("torch", "onnx", "nibabel"))]
    assert {f"Provides-Extra: {extra}" for extra in ("cpu", "medical", "train", "export", "report")} <= set(lines)


@pytest.mark.network
def test_the_wheel_infers_in_an_empty_environment_without_torch(wheel, tiny_bundle, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    python = install(wheel, "cpu", tmp_path / "venv", environment)

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    absent = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'nibabel') if u.find_spec(n)])"
    assert run(python, "-c", absent).stdout == "[]\n"
    pixels, _ = picture(0, size=(40, 48))
    PIL.Image.fromarray(pixels).save(tmp_path / "generated.png")
    done = run(python.with_name("medseg-trt"), "infer", "generated.png", "--bundle", tiny_bundle, "-o", "masks")
    assert done.returncode == 0, done.stderr
    mask = np.asarray(PIL.Image.open(tmp_path / "masks" / "generated.png"))
    assert mask.shape[:2] == (40, 48)
    assert (tmp_path / "masks" / "areas.csv").is_file()
    refused = run(python.with_name("medseg-trt"), "build", "--ckpt", "model.pt")
    assert refused.returncode == 6
    assert "pip install 'medseg-trt[" in refused.stderr
    assert refused.stderr.count("\n") == 1


def install(wheel: Path, extra: str, folder: Path, environment: dict[str, str]) -> Path:
    """Make a virtual environment with the wheel in the tested versions, and return its Python."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "--quiet",
            "--no-compile",
            "--constraint",
            ROOT / "tests/constraints.txt",
            f"{wheel}[{extra}]",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and any(words in done.stderr for words in NO_NETWORK):
        pytest.skip("needs the package index, which pip cannot reach")
    assert done.returncode == 0, done.stderr
    return python
