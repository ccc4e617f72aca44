"""A network of another package from training to masks, and a checkpoint that names foreign code."""

import json
import sys

import pytest
from click.testing import CliRunner
from tiny import write_pictures

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.cli import cli
from medseg_trt.errors import ArtefactError
from medseg_trt.train.checkpoint import load_checkpoint

UNET = "monai:BasicUNet(features=(8,8,16,16,16,8),norm=('batch',{}),upsample='nontrainable')"
SWIN = "monai:SwinUNETR(feature_size=12,depths=(1,1,1,1),num_heads=(1,1,2,2))"
OWN = """
from torch import nn

def net(num_classes, image_size):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, num_classes, 1),
    )
"""


def invoke(*arguments: object) -> str:
    ran = CliRunner().invoke(cli, [*map(str, arguments)])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    return ran.stdout


def run_all(folder, architecture: str, size: int, *build_options: str, precisions: str = "fp32,int8") -> None:
    """Train one epoch, build, segment and evaluate."""
    data = write_pictures(folder / "data", count=10, size=(40, 48))
    changes = [f"architecture={architecture}", f"preprocessing.image_size=[{size},{size}]", "train.epochs=1"]
    options = [word for change in (*changes, "train.batch_size=4") for word in ("--set", change)]
    invoke("train", "--recipe", "folder", "--data", data, "-o", folder / "run", *options)
    bundle = folder / "net.medseg"
    options = ["--precision", precisions, "--max-dice-drop", "0.5", *(build_options or ("--backend", "onnxruntime"))]
    invoke("build", "--ckpt", folder / "run" / "best.pt", "--data", data, "-o", bundle, *options)
    content = load_bundle(bundle).content
    assert content.model.architecture == architecture
    assert {variant.passes["fused"]["rms_norms"] for variant in content.variants.values()} == {0}
    shares = {variant.precision: variant.passes["int8_share"] for variant in content.variants.values()}
    assert shares[precisions.split(",")[1]] > 0.5
    assert next(item for item in content.executions if item.variant == "fp32").verification.max_abs_error < 1e-3
    masks = json.loads(invoke("infer", data / "images", "--bundle", bundle, "-o", folder / "masks", "--json"))
    assert len(list((folder / "masks").glob("*.png"))) == 10, masks
    evaluation = ["evaluate", "--ckpt", folder / "run" / "best.pt", "--data", data, "--split", "val", "--json"]
    (scores,) = json.loads(invoke(*evaluation))["splits"][0]["networks"].values()
    assert 0 <= scores["mean_dice"] <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_network_of_monai_is_trained_built_and_used(tmp_path):
    run_all(tmp_path, UNET, 32)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process", "measured_here")
def test_swin_unetr_is_trained_built_used_and_measured(tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'medseg-trt[tensorrt-rtx]'")
    run_all(tmp_path, SWIN, 64, "--target", "sm89")
    bundle, data = tmp_path / "net.medseg", tmp_path / "data"
    content = load_bundle(bundle).content
    assert {content.variants[engine.variant].precision for engine in content.engines} == {"fp32", "int8"}
    measuring = ["--tier", "quick", "--duration-s", "0.1", "--warmup-ms", "0", "--no-profile", "--max-dice-drop", "0.5"]
    checkpoint = tmp_path / "run" / "best.pt"
    invoke("bench", "--bundle", bundle, "--ckpt", checkpoint, "--data", data, "-o", tmp_path / "report", *measuring)
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["rows"]
    assert {row["precision"] for row in rows} >= {"fp32", "int8"}
    assert all(row["failure"] is None for row in rows), rows


@pytest.mark.usefixtures("in_process")
def test_ones_own_network_is_used_here_and_refused_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    try:
        run_all(tmp_path, "mynets:net", 32)
        sys.modules.pop("mynets")
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another-user"))
        with pytest.raises(ArtefactError, match="runs only if you have named it here"):
            load_checkpoint(tmp_path / "run" / "best.pt")
        assert "mynets" not in sys.modules
    finally:
        sys.modules.pop("mynets", None)
