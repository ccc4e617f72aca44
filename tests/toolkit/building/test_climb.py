"""The climb from the cheapest rung to one that passes, on generated networks and volumes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TWO_ORGANS, make_checkpoint, write_description, write_volumes
from torch import Tensor, nn

from medseg_trt.building import block_ladder, bundle_steps
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.bundles.tables import execution_table
from medseg_trt.errors import AccuracyGateError, UsageError
from medseg_trt.export.compress import rungs
from medseg_trt.export.compress.affine import fit_affine
from medseg_trt.pipeline import build
from medseg_trt.sessions.open import open_session
from medseg_trt.spec import BuildSpec
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.models.transunet import TransUNet

SIZE = (64, 64)  # 16 tokens
LOOSE = {"max_dice_drop": 1.0}  # random networks draw arbitrary masks
NO_JUDGE = {"max_block_error": 1.0, "max_block_unexplained": 1.0}


pytestmark = pytest.mark.slow  # every test builds several bundles, which takes minutes


@pytest.fixture(autouse=True)
def short_ladder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try one narrow rung: each rung is a build of its own."""
    monkeypatch.setattr(rungs, "LADDER_SHARES", rungs.LADDER_SHARES[:1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes with a training, a validation and a test split."""
    folder = write_volumes(tmp_path_factory.mktemp("data"), count=3, slices=24, size=SIZE)
    write_description(
        folder, {name: [{"image": f"scan{index}"}] for index, name in enumerate(("train", "val", "test"))}
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    provenance = {"recipe": {"augmentation": [{"name": "flip", "probability": 1.0, "options": {}}]}}
    return make_checkpoint(tmp_path_factory.mktemp("model"), classes=TWO_ORGANS, size=SIZE, provenance=provenance)


class Shift(nn.Module):
    """Adds one large token to all tokens: nearly all energy is then in one common direction."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.size = size

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the shifted tokens."""
        ramp = torch.linspace(-1, 1, tokens.shape[-1], dtype=tokens.dtype)
        return tokens + self.size * ramp


class SubtractMean(nn.Module):
    """Subtracts the mean token of every image: no direction is common to all tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the centred tokens."""
        return 3 * (tokens - tokens.mean(1, keepdim=True))


def change_tokens(monkeypatch: pytest.MonkeyPatch, stage: nn.Module) -> None:
    """Let every network of a checkpoint pass its tokens through a stage before the block."""
    original = Checkpoint.model

    def changed(checkpoint: Checkpoint) -> TransUNet:
        network = original(checkpoint)
        assert isinstance(network, TransUNet)
        network.layers[-1] = nn.Sequential(network.layers[-1], stage)
        return network

    monkeypatch.setattr(Checkpoint, "model", changed)


def built(folder: Path, checkpoint: Path, data: Path | None, **fields: object) -> Mapping[str, Any]:
    spec = BuildSpec(**{"precisions": ("fp32", "int8"), "block": "auto", **LOOSE, **fields})  # pyright: ignore
    build(checkpoint, spec, folder / "model.medseg", data)
    manifest = load_bundle(folder / "model.medseg").manifest()
    assert manifest["block"] is not None
    return manifest["block"]


@pytest.mark.usefixtures("in_process")
def test_tokens_with_a_common_direction_need_one_matrix(
    tmp_path: Path, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_tokens(monkeypatch, Shift(60.0))
    block = built(tmp_path, checkpoint, data)
    assert block["rung"] == "affine"
    (rung,) = block["rungs"]
    assert rung["accepted"]
    assert rung["relative_error"] < 0.05
    assert {(verdict["split"], verdict["precision"]) for verdict in rung["verdicts"]} == {
        ("val", "fp32"),
        ("test", "fp32"),
        ("val", "int8"),
        ("test", "int8"),
    }
    assert block["calibration"]["files"] == ("scan0",)
    assert block["calibration"]["tokens"] == 12 * 16 * 3
    bundle = load_bundle(tmp_path / "model.medseg")
    assert all("affine" in row for row in execution_table(bundle)[1])


@pytest.mark.usefixtures("in_process")
def test_the_graphs_of_a_rung_are_verified_against_its_network_and_judged_against_the_checkpoint(
    tmp_path: Path, checkpoint: Path, data: Path
) -> None:
    built(tmp_path, checkpoint, data, block="affine", precisions=("fp32",), **NO_JUDGE)
    bundle = load_bundle(tmp_path / "model.medseg")
    images = np.random.default_rng(0).random((2, 3, *SIZE), dtype=np.float32)
    network = load_checkpoint(checkpoint).model()
    with torch.inference_mode(), open_session(bundle, "onnxruntime", 1) as session:
        difference = np.abs(session.run(images) - network(torch.from_numpy(images)).numpy()).max()
    assert difference > 1e-3  # it is another network
    verification = bundle.default.verification
    assert verification.max_abs_error > 1e-3  # against the checkpoint, not against itself
    assert verification.gate is not None
    assert verification.gate.holds


@pytest.mark.usefixtures("in_process")
def test_the_stress_network_keeps_the_exact_block(
    tmp_path: Path, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_tokens(monkeypatch, SubtractMean())
    block = built(tmp_path, checkpoint, data)
    assert block["rung"] == "exact"
    rejected = [rung for rung in block["rungs"] if not rung["accepted"]]
    assert rejected[0]["rung"] == "affine"
    assert all("on held-out tokens" in rung["reason"] for rung in rejected)
    assert all(rung["verdicts"] for rung in rejected)  # listed with its figures


@pytest.mark.usefixtures("in_process")
def test_without_the_judge_of_held_out_tokens_the_stress_network_gets_a_wrong_block(
    tmp_path: Path, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_tokens(monkeypatch, SubtractMean())
    block = built(tmp_path, checkpoint, data, precisions=("fp32",), **NO_JUDGE)
    assert block["rung"] == "affine"
    assert block["rungs"][0]["unexplained"] > 0.1


@pytest.mark.usefixtures("in_process")
def test_without_the_gate_a_replacement_that_draws_other_masks_is_used(
    tmp_path: Path, checkpoint: Path, data: Path
) -> None:
    fields = {"precisions": ("fp32",), "block": "affine", **NO_JUDGE}
    with pytest.raises(AccuracyGateError, match=r"block affine: .*falls by up to .*Nothing was written"):
        built(tmp_path, checkpoint, data, **{**fields, "max_dice_drop": 0.0})
    assert not (tmp_path / "model.medseg").exists()
    assert built(tmp_path, checkpoint, data, **fields)["rung"] == "affine"


@pytest.mark.usefixtures("in_process")
def test_a_fit_to_scrambled_tokens_is_caught_by_the_judge_of_held_out_tokens(
    tmp_path: Path, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_tokens(monkeypatch, Shift(60.0))

    def fit_to_other_tokens(insert: nn.Module, tokens: Tensor) -> nn.Module:
        return fit_affine(insert, tokens[..., torch.randperm(tokens.shape[-1])])

    monkeypatch.setattr(block_ladder, "fit_affine", fit_to_other_tokens)
    with pytest.raises(AccuracyGateError, match="block affine: on held-out tokens"):
        built(tmp_path, checkpoint, data, block="affine", precisions=("fp32",))


@pytest.mark.usefixtures("in_process")
def test_a_failing_second_split_rejects_a_rung(
    tmp_path: Path, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_tokens(monkeypatch, Shift(60.0))
    second = bundle_steps.second_judged_images

    def from_another_scanner(*arguments: object) -> object:
        """Return the second split as another scanner might have made it."""
        images = second(*arguments)  # pyright: ignore[reportArgumentType]
        assert images is not None
        return replace(images, inputs=images.inputs + np.float32(5))

    monkeypatch.setattr(bundle_steps, "second_judged_images", from_another_scanner)
    block = built(tmp_path, checkpoint, data, precisions=("fp32",), max_dice_drop=0.0, block="auto", **NO_JUDGE)
    assert block["rung"] == "exact"
    assert any("on test in fp32" in rung["reason"] for rung in block["rungs"])


@pytest.mark.usefixtures("in_process")
def test_invalid_block_requests_are_usage_errors(tmp_path: Path, checkpoint: Path, data: Path) -> None:
    with pytest.raises(UsageError, match="needs training images"):
        built(tmp_path, checkpoint, None)
    with pytest.raises(UsageError, match=r"narrow:r=64,k=96,heads=4 is no cheaper than the exact block"):
        built(tmp_path, checkpoint, data, block="narrow:r=64,k=96,heads=4", max_dice_drop=1.0, precisions=("fp32",))
    one = write_volumes(tmp_path / "one", slices=1, size=SIZE)
    with pytest.raises(UsageError, match=r"at least 2 training slices, .* the train split has 1"):
        built(tmp_path, checkpoint, one, block="affine", precisions=("fp32",))
    few = write_volumes(tmp_path / "few", slices=4, size=SIZE)
    with pytest.raises(UsageError, match=r"tokens are too few .* it needs \d+"):
        built(tmp_path, checkpoint, few, block="narrow:r=32,k=48,heads=2", max_dice_drop=1.0, precisions=("fp32",))
    with pytest.raises(UsageError, match="choose exact, auto"):
        built(tmp_path, checkpoint, data, block="half")
    plain = make_checkpoint(tmp_path / "plain", classes=TWO_ORGANS, size=SIZE, architecture="transunet-tiny")
    with pytest.raises(UsageError, match="no language block"):
        built(tmp_path, plain, data)
    assert not (tmp_path / "model.medseg").exists()
