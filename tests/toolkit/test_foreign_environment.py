"""Networks of SMP, timm, nnU-Net and Ultralytics, in an environment of their own with PyPI's torch and torchvision.

PyPI has no torchvision for PyTorch's CPU wheel, so the environment has 7 GB of CUDA, and is deleted at the end. Nothing
is fetched but packages: every network starts from random weights, and is trained for seconds on generated pictures.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import PIL.Image
import pytest
from tiny import write_pictures

ROOT = Path(__file__).parents[2]
EXPORTS = ROOT / "tests" / "exports_of_others.py"
NETWORKS = ("smp:Unet/resnet34", "smp:Segformer/mit_b0", "timm:Unet/resnet18d")
PACKAGES = ("ultralytics", "nnunetv2")
QUICK = ("--tier", "quick", "--duration-s", "0.2", "--no-profile")
GREY = {"image_size": [64, 64], "channel_order": "grey", "mean": [0.25] * 3, "std": [0.25] * 3}
COLOUR = {"image_size": [64, 64]}

pytestmark = [pytest.mark.slow, pytest.mark.network]


class Environment:
    """The programs of an environment, each run in a folder of its own without a home."""

    def __init__(self, programs: Path, home: Path) -> None:
        self._programs = programs
        self._variables = os.environ | {
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "YOLO_CONFIG_DIR": str(home / "ultralytics"),
            "YOLO_OFFLINE": "1",  # no look for a newer release, no events
            "YOLO_AUTOINSTALL": "0",
            "nnUNet_raw": str(home),  # nnU-Net prints a warning without them
            "nnUNet_preprocessed": str(home),
            "nnUNet_results": str(home),
        }

    def run(self, program: str, *arguments: object, expected: int = 0, timeout_s: int = 1800) -> str:
        """Return what a program printed to stdout, or to stderr where it is expected to fail."""
        command = [str(self._programs / program), *map(str, arguments)]
        ran = subprocess.run(
            command, env=self._variables, capture_output=True, text=True, check=False, timeout=timeout_s
        )
        assert ran.returncode == expected, f"{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
        return ran.stderr if expected else ran.stdout

    def export(self, name: str, data: Path, output: Path) -> Path:
        self.run("python", EXPORTS, name, data, output)
        return output


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[Environment]:
    """The wheel of this tree with its extras, and the packages that export networks."""
    folder = tmp_path_factory.mktemp("environment")
    for command in (
        [sys.executable, "-m", "venv", folder / "venv"],
        [folder / "venv" / "bin" / "pip", "install", "-q", f"{ROOT}[train,export,cpu,report,smp]", *PACKAGES],
    ):
        ran = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=3600)
        assert ran.returncode == 0, ran.stderr[-4000:]
    (folder / "home").mkdir()
    yield Environment(folder / "venv" / "bin", folder / "home")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", count=10, size=(64, 64))


@pytest.mark.parametrize("architecture", NETWORKS)
def test_a_network_of_smp_is_trained_built_used_and_measured(environment, data, tmp_path, architecture):
    changes = [f"architecture={architecture}", "preprocessing.image_size=[64,64]", "train.epochs=1"]
    options = [word for change in (*changes, "train.batch_size=4") for word in ("--set", change)]
    checkpoint, bundle = tmp_path / "run" / "best.pt", tmp_path / "net.medseg"
    environment.run("medseg-trt", "train", "--recipe", "folder", "--data", data, "-o", tmp_path / "run", *options)
    precision = ["--precision", "fp32,int8", "--max-dice-drop", "0.5", "--backend", "onnxruntime"]
    environment.run("medseg-trt", "build", "--ckpt", checkpoint, "--data", data, "-o", bundle, *precision)
    shares = int8_shares(bundle)
    assert shares["int8"] > 0.8  # transposed convolutions and the sensitive layers stay in float
    environment.run("medseg-trt", "infer", data / "images", "--bundle", bundle, "-o", tmp_path / "masks")
    assert len(list((tmp_path / "masks").glob("*.png"))) == 10
    measured(environment, bundle, data, tmp_path, "--ckpt", checkpoint, "--max-dice-drop", "0.5")


@pytest.mark.parametrize(
    ("name", "preprocessing"), [("nnunet", GREY), ("semantic", COLOUR), ("semantic_of_one_class", COLOUR)]
)
def test_a_network_of_others_is_built_from_its_onnx_file(environment, data, tmp_path, name, preprocessing):
    file = environment.export(name, data, tmp_path / "net.onnx")
    description = write_description(tmp_path / "net.json", preprocessing)
    bundle = tmp_path / "net.medseg"
    source = ["--onnx", file, "--preprocessing", description, "--data", data, "-o", bundle]
    options = ["--precision", "fp32,int8", "--backend", "onnxruntime", "--max-dice-drop", "0.05"]
    environment.run("medseg-trt", "build", *source, *options)
    assert int8_shares(bundle)["int8"] > 0.8
    masks = ["infer", data / "images", "--bundle", bundle, "-o", tmp_path / "masks"]
    environment.run("medseg-trt", *masks, "--precision", "fp32", "--no-postprocess")
    for path in sorted((data / "images").glob("*.png")):
        mask = np.asarray(PIL.Image.open(tmp_path / "masks" / path.name)) > 0
        truth = np.asarray(PIL.Image.open(data / "masks" / path.name)) > 0
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > 0.7  # it did learn, on these very pictures
        assert (mask == labels_of_file(file, path, preprocessing)).mean() > 0.999  # where logits tie, a pixel may flip
    measured(environment, bundle, data, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("instances", "gives boxes and prototypes (output0 "),
        ("older_instances", "gives boxes and prototypes (output0 "),
        ("semantic_of_fixed_batch", "the batch is fixed at 1; export it again with a free batch axis"),
    ],
)
def test_build_refuses_unusable_onnx_exports_in_one_line(environment, data, tmp_path, name, message):
    file = environment.export(name, data, tmp_path / "net.onnx")
    command = ["build", "--onnx", file, "--preprocessing", write_description(tmp_path / "net.json", COLOUR)]
    (line,) = environment.run("medseg-trt", *command, expected=5).splitlines()
    assert message in line
    assert not (tmp_path / "net.medseg").exists()


def write_description(path: Path, preprocessing: Mapping[str, object]) -> Path:
    path.write_text(json.dumps({"preprocessing": preprocessing, "classes": {"names": ["background", "lesion"]}}))
    return path


def int8_shares(bundle: Path) -> dict[str, float]:
    variants = json.loads((bundle / "manifest.json").read_text())["variants"].values()
    return {variant["precision"]: variant["passes"]["int8_share"] for variant in variants}


def measured(environment: Environment, bundle: Path, data: Path, folder: Path, *options: object) -> None:
    environment.run(
        "medseg-trt", "bench", "--bundle", bundle, "--data", data, "-o", folder / "report", *QUICK, *options
    )
    report = json.loads((folder / "report" / "report.json").read_text())
    assert [(case["height"], case["width"]) for case in report["images"]["cases"]] == [(64, 64)] * 2
    assert [row["failure"] for row in report["rows"]] == [None] * len(report["rows"])


def labels_of_file(file: Path, picture: Path, preprocessing: dict[str, object]) -> np.ndarray:
    """Return the labels of the file itself, in another release of ONNX Runtime."""
    pixels = np.asarray(PIL.Image.open(picture), np.float32) / 255
    channels = 1 if preprocessing.get("channel_order") == "grey" else 3
    pixels = (pixels - 0.25) / 0.25 if channels == 1 else pixels
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    batch = np.ascontiguousarray(np.broadcast_to(pixels, (1, channels, *pixels.shape)))
    given = np.asarray(session.run(None, {session.get_inputs()[0].name: batch})[0])[0]
    return given.argmax(axis=0) == 1 if given.ndim == 3 else given == 1
