"""A real kit for Python 3.12: made from this clone, installed where no index can be reached, and used there."""

import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from stored_bundle import stored_bundle
from tiny import picture

from medseg_trt.errors import UsageError
from medseg_trt.kit.components import normalised
from medseg_trt.kit.interpreter import Interpreter, find_interpreter
from medseg_trt.kit.make import COMPONENTS, LICENCES, make_kit
from medseg_trt.kit.parts import MANIFEST
from medseg_trt.kit.spec import KitSpec
from medseg_trt.samples.catalogue import NetworkError

ROOT = Path(__file__).parents[3]
PART_BYTES = 8 << 20  # about eight parts
pytestmark = [
    pytest.mark.network,
    pytest.mark.slow,
]  # 40 s of processor time, most of it pip


@pytest.fixture(scope="module")
def python() -> Interpreter:
    try:
        return find_interpreter("3.12")
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def kit(python, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    spec = KitSpec(source=ROOT, python=str(python.path), extras=("cpu",), part_bytes=PART_BYTES, with_tests=True)
    try:
        make_kit(spec, folder)
    except NetworkError as error:
        pytest.skip(str(error))
    return folder


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command whose environment variables lead pip to no index; port 9 is discard: nobody listens."""
    environment = {
        "PATH": os.defpath,
        "HOME": str(folder),
        "PIP_NO_INDEX": "1",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_kit_installs_without_a_network_and_segments(kit, python, tmp_path):
    done = run(tmp_path, "sh", kit / "install.sh", "medseg", "--python", python.path)
    assert (done.returncode, done.stderr) == (0, "")
    program = tmp_path / "medseg" / "bin" / "medseg-trt"
    assert "Research use only" in run(tmp_path, program, "--help").stdout
    absent = "import importlib.util as u; print([n for n in ('torch', 'onnx', 'nibabel') if u.find_spec(n)])"
    assert run(tmp_path, program.with_name("python"), "-c", absent).stdout == "[]\n"
    PIL.Image.fromarray(picture(0, size=(40, 48))[0]).save(tmp_path / "generated.png")
    bundle = stored_bundle(tmp_path / "stored.medseg")
    done = run(tmp_path, program, "infer", "generated.png", "--bundle", bundle, "-o", "masks")
    assert done.returncode == 0, done.stderr
    assert np.asarray(PIL.Image.open(tmp_path / "masks" / "generated.png")).shape[:2] == (40, 48)
    project = tmp_path / "medseg" / "project"
    assert (
        project / "benchmarks" / "gpu_check.py"
    ).is_file()  # it needs the extra kernels, which is hundreds of megabytes


def test_the_lists_name_every_wheel_with_its_digest_and_its_licence(kit, tmp_path):
    archive = tmp_path / "kit.tar"
    with archive.open("wb") as file:
        for path in sorted(kit.glob("kit.tar.*")):
            with path.open("rb") as part:
                shutil.copyfileobj(part, file)
    subprocess.run(["tar", "-xf", archive, "wheels"], cwd=tmp_path, check=True)
    listed = json.loads((kit / COMPONENTS).read_text(encoding="utf-8"))["components"]
    by_file = {component["bom-ref"]: component for component in listed}
    assert set(by_file) == {path.name for path in (tmp_path / "wheels").iterdir()}
    names = {normalised(component["name"]) for component in listed}
    assert {"medseg-trt", "onnxruntime", "numpy", "pip", "pytest"} <= names
    assert "torch" not in names
    wheels = [tmp_path / "wheels" / name for name in by_file]
    output = subprocess.run(["sha256sum", *wheels], capture_output=True, text=True, check=True).stdout
    for line in output.splitlines():
        digest, _, path = line.partition("  ")
        assert by_file[Path(path).name]["hashes"] == [{"alg": "SHA-256", "content": digest}]
    licences = (kit / LICENCES).read_text(encoding="utf-8")
    for component in listed:
        assert f"{component['name']} {component['version']}: " in licences
    with zipfile.ZipFile(next((tmp_path / "wheels").glob("numpy-*"))) as numpy_wheel:
        stated = [name for name in numpy_wheel.namelist() if ".dist-info/licenses/" in name and not name.endswith("/")]
    assert stated
    for name in stated:
        assert f"    {name}\n" in licences
    versions = (ROOT / "tests" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {normalised(line.partition("==")[0]): line.partition("==")[2] for line in versions if "==" in line}
    pinned = {normalised(part["name"]): part["version"] for part in listed if normalised(part["name"]) in tested}
    assert pinned == {name: tested[name] for name in pinned}
    assert (kit / MANIFEST).is_file()
