from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tiny import LESION, make_checkpoint, picture, write_pictures, write_volumes

from medseg_trt.building.reference_images import (
    MAX_CALIBRATION,
    MAX_JUDGED,
    MAX_VERIFIED,
    JudgedImages,
    reference_images,
)
from medseg_trt.errors import InputError, UsageError
from medseg_trt.imaging.digest import image_digests
from medseg_trt.imaging.images import read_image
from medseg_trt.imaging.preprocess import prepare
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.datasets.folder import manifest_sha256, open_folder


def trained_on(data: Path, folder: Path) -> Checkpoint:
    recorded = {"name": "generated", "root": str(data), "sha256": manifest_sha256(open_folder(data).manifest())}
    return load_checkpoint(make_checkpoint(folder, architecture="transunet-tiny", provenance={"data": recorded}))


def lesions(folder: Path) -> Checkpoint:
    return load_checkpoint(make_checkpoint(folder, classes=LESION, architecture="transunet-tiny"))


def test_the_folder_of_the_training_is_used(tmp_path):
    data = write_volumes(tmp_path / "data")
    checkpoint = trained_on(data, tmp_path)
    images = reference_images(checkpoint, None)
    assert images.description == "5 real images of generated, split val"
    scan = read_image(data / "images" / "scan1.nii.gz")
    for verified, judged, pixels in zip(images.verified, images.judged.inputs, scan.pixels, strict=True):
        np.testing.assert_array_equal(verified, prepare(pixels, checkpoint.preprocessing, scan.spacing_in_plane))
        np.testing.assert_array_equal(verified, judged)
    train = read_image(data / "images" / "scan0.nii.gz")
    assert images.calibration is not None
    np.testing.assert_array_equal(
        images.calibration[0], prepare(train.pixels[0], checkpoint.preprocessing, train.spacing_in_plane)
    )


def test_a_folder_that_has_moved_or_changed_is_not_used_and_said_to_be(tmp_path, caplog):
    data = write_volumes(tmp_path / "data")
    checkpoint = trained_on(data, tmp_path)
    (data / "masks" / "scan0.nii.gz").write_bytes((data / "masks" / "scan1.nii.gz").read_bytes())
    assert reference_images(checkpoint, None).description == "generated noise"
    assert "has changed since the training" in caplog.text
    data.rename(tmp_path / "moved")
    assert reference_images(checkpoint, None).description == "generated noise"
    assert "give real images: --data DIR" in caplog.text
    assert reference_images(checkpoint, tmp_path / "moved").description == "5 real images of generated, split val"


def test_a_checkpoint_without_a_record_is_verified_on_noise_and_cannot_be_calibrated(tmp_path, caplog):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, architecture="transunet-tiny"))
    images = reference_images(checkpoint, None)
    assert (images.verified.shape[1:], images.description) == ((3, 32, 32), "generated noise")
    assert images.calibration is None
    assert images.judged.truths is None
    assert "does not say what it was trained on" in caplog.text


def test_reference_images_are_distinct_and_limited_in_number(tmp_path):
    write_pictures(tmp_path / "data", count=400)
    images = reference_images(lesions(tmp_path), tmp_path / "data")
    assert images.description == f"{MAX_VERIFIED} real images of data, split val"
    assert images.calibration is not None
    for inputs, count in (
        (images.verified, MAX_VERIFIED),
        (images.judged.inputs, MAX_JUDGED),
        (images.calibration, MAX_CALIBRATION),
    ):
        assert len(set(image_digests(inputs))) == len(inputs) == count
    assert not set(image_digests(images.judged.inputs)) & set(image_digests(images.calibration))
    assert len(set(images.judged.cases)) == MAX_JUDGED


def test_constant_slices_are_excluded_from_reference_images(tmp_path):
    data = write_pictures(tmp_path / "data", count=20)
    splits = open_folder(data)
    for case in (*splits.cases("val")[:2], *splits.cases("train")[:8]):
        PIL.Image.new("L", (32, 32), 0).save(case.files[0])  # they would be found in both splits, and all look alike
    images = reference_images(lesions(tmp_path), data)
    assert images.calibration is not None
    assert len(images.judged.inputs) + len(images.calibration) == 10
    for path in (data / "images").iterdir():
        PIL.Image.new("L", (32, 32), 0).save(path)
    with pytest.raises(InputError, match="of one grey"):
        reference_images(lesions(tmp_path), data)


def test_an_image_that_calibrates_and_judges_is_refused(tmp_path):
    data = write_pictures(tmp_path / "data", count=10)
    val = open_folder(data).cases("val")[0]
    train = open_folder(data).cases("train")[0]
    train.files[0].write_bytes(val.files[0].read_bytes())
    with pytest.raises(UsageError, match=r"1 of the images .* are also calibration images"):
        reference_images(lesions(tmp_path), data)


def test_a_folder_without_masks_serves_with_pytorch_as_the_truth(tmp_path, caplog):
    data = write_pictures(tmp_path / "data", count=10)
    images = reference_images(lesions(tmp_path), data / "images")
    assert images.judged.truths is None
    assert images.judged.metric == "agreement with PyTorch in Dice"
    assert len(images.judged.inputs) == 2
    assert images.calibration is not None
    assert len(images.calibration) == 8
    assert "has no masks" in caplog.text


def test_other_classes_than_the_checkpoints_are_refused(tmp_path):
    write_pictures(tmp_path / "data")
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, architecture="transunet-tiny"))
    with pytest.raises(UsageError, match="background, lesion, the checkpoint background, disc, bar"):
        reference_images(checkpoint, tmp_path / "data")


def test_a_folder_that_was_named_and_cannot_be_used_is_an_error(tmp_path):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, architecture="transunet-tiny"))
    with pytest.raises(InputError, match="does not exist"):
        reference_images(checkpoint, tmp_path / "nowhere")


def test_pixels_are_counted_by_class(tmp_path):
    truth = np.zeros((4, 4), np.uint8)
    truth[0] = 1
    mask = truth.copy()
    mask[0, 0], mask[3, :2] = 0, 2
    judged = JudgedImages(
        inputs=np.zeros((1, 3, 16, 16), np.float32), sizes=((4, 4),), spacings=(None,), cases=("a",), truths=(truth,)
    )
    assert judged.counts([mask], [mask], 3).tolist() == [[[3, 3, 4], [0, 2, 0]]]
    without = replace(judged, truths=None)
    assert without.counts([mask], [truth], 3).tolist() == [[[3, 3, 4], [0, 2, 0]]]
    assert without.counts([mask], [mask], 3).tolist() == [[[3, 3, 3], [2, 2, 2]]]


def test_masks_are_at_the_images_own_size(tmp_path):
    data = write_pictures(tmp_path / "data", count=5, size=(40, 24))
    checkpoint = lesions(tmp_path)
    judged = reference_images(checkpoint, data).judged
    assert judged.truths is not None
    logits = np.full((len(judged.inputs), 1, 32, 32), -1, np.float32)
    logits[..., :16] = 1
    (mask, *_), (truth, *_) = judged.masks(logits, checkpoint.preprocessing), judged.truths
    assert mask.shape == truth.shape == (40, 24)
    assert mask[:, :12].all()
    assert not mask[:, 12:].any()
    cases = {f"case{seed}.png": picture(seed, (40, 24))[1] == 1 for seed in range(5)}
    np.testing.assert_array_equal(truth, cases[judged.cases[0] + ".png"])
