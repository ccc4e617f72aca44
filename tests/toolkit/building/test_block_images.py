"""The slices that a replacement of the block is fitted to: none is judged, and no copy of a held-out one is fitted."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import TWO_ORGANS, make_checkpoint, write_description, write_pictures, write_volumes

from medseg_trt.building import block_images as module
from medseg_trt.building.block_images import BlockImages, block_images, training_augmentation
from medseg_trt.building.reference_images import block_fitting_cases, reference_images, second_judged_images
from medseg_trt.errors import UsageError
from medseg_trt.spec import Classes
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.datasets.folder import open_folder
from medseg_trt.train.provenance import Provenance, parse_provenance

RECIPE = {"recipe": {"augmentation": [{"name": "noise", "probability": 1.0, "options": {"deviation": 0.2}}]}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    return load_checkpoint(make_checkpoint(folder, classes=TWO_ORGANS, provenance=RECIPE))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volumes(tmp_path_factory.mktemp("data"), count=3, slices=6)


def test_every_second_slice_is_held_out_with_all_its_copies(
    checkpoint: Checkpoint, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(image: np.ndarray, labels: np.ndarray, *_: object) -> tuple[np.ndarray, np.ndarray]:
        return image * 2, labels  # exact in binary

    monkeypatch.setattr(module, "augment", doubled)
    images = block_images(checkpoint, data, [])
    assert images.slices == 12  # two training volumes of six slices
    assert images.files == ("scan0", "scan1")
    assert len(images.fitted) == len(images.held_out) == 6 * (1 + module.COPIES)
    assert images.augmented == 12 * module.COPIES
    plain = {slice_.tobytes() for slice_ in images.fitted[:6]}
    assert not plain & {slice_.tobytes() for slice_ in images.held_out[:6]}
    for part in (images.fitted, images.held_out):
        originals = {slice_.tobytes() for slice_ in part[:6]}
        assert {(copy / 2).tobytes() for copy in part[6:]} == originals


def test_without_a_recorded_augmentation_only_plain_slices_are_used(
    checkpoint: Checkpoint, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = block_images(replace(checkpoint, provenance=Provenance()), data, [])
    assert images.augmented == 0
    assert "records no augmentation" in caplog.text


def test_augmentation_at_source_resolution_is_not_used_for_block_images(checkpoint: Checkpoint) -> None:
    at_source = {"recipe": {**RECIPE["recipe"], "augment_at": "source"}}
    assert [step.name for step in training_augmentation(checkpoint)] == ["noise"]
    assert training_augmentation(replace(checkpoint, provenance=parse_provenance(at_source, "a test"))) == ()


def test_slices_that_are_judged_are_refused(checkpoint: Checkpoint, data: Path) -> None:
    images = block_images(checkpoint, data, [])
    with pytest.raises(UsageError, match=r"^1 of the slices .* also judged"):
        block_images(checkpoint, data, [images.held_out[:1]])


def test_block_images_detects_calibration_cases_taken_from_the_gate_split(
    checkpoint: Checkpoint, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = reference_images(checkpoint, data).judged.inputs
    assert block_images(checkpoint, data, [judged]).slices == 12

    monkeypatch.setattr(module, "block_fitting_cases", lambda _, data: open_folder(data).cases("val"))
    with pytest.raises(UsageError, match="also judged"):
        block_images(checkpoint, data, [judged])


def test_without_a_training_split_that_is_not_judged_there_is_nothing_to_fit_to(
    checkpoint: Checkpoint, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--block needs training images that are not judged"):
        block_images(checkpoint, None, [])
    binary = load_checkpoint(make_checkpoint(tmp_path, classes=Classes(names=("background", "lesion"))))
    unlabelled = write_pictures(tmp_path / "data", count=8) / "images"
    shutil.rmtree(unlabelled.parent / "masks")
    assert block_images(binary, unlabelled.parent, []).slices == len(block_fitting_cases(binary, unlabelled.parent))


def test_the_second_split_is_the_test_split(checkpoint: Checkpoint, data: Path, tmp_path: Path) -> None:
    assert second_judged_images(checkpoint, data) is None
    assert second_judged_images(checkpoint, None) is None
    three = write_volumes(tmp_path / "three", count=3, slices=6)
    write_description(three, {name: [{"image": f"scan{index}"}] for index, name in enumerate(("train", "val", "test"))})
    second = second_judged_images(checkpoint, three)
    assert second is not None
    assert set(second.cases) == {"scan2"}
    images: BlockImages = block_images(checkpoint, three, [second.inputs])
    assert images.files == ("scan0",)
