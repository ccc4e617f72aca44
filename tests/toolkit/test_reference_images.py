from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from tiny import LESION, make_checkpoint, write_pictures, write_volumes

from medseg_trt.errors import InputError
from medseg_trt.images import read_image
from medseg_trt.preprocess import prepare
from medseg_trt.reference_images import MAX_IMAGES, reference_images
from medseg_trt.train.checkpoint import Checkpoint, load_checkpoint
from medseg_trt.train.datasets.folder import manifest_sha256, open_folder


def trained_on(data: Path, folder: Path) -> Checkpoint:
    recorded = {"name": "generated", "root": str(data), "sha256": manifest_sha256(open_folder(data).manifest())}
    return load_checkpoint(make_checkpoint(folder, architecture="transunet-tiny", provenance={"data": recorded}))


def test_the_folder_of_the_training_is_used(tmp_path):
    data = write_volumes(tmp_path / "data")
    checkpoint = trained_on(data, tmp_path)
    inputs, images = reference_images(checkpoint, None)
    assert images == "5 real images of generated, split val"
    scan = read_image(data / "images" / "scan1.nii.gz")
    for found, pixels in zip(inputs, scan.pixels, strict=True):
        np.testing.assert_array_equal(found, prepare(pixels, checkpoint.preprocessing, scan.spacing_in_plane))


def test_a_folder_that_has_moved_or_changed_is_not_used_and_said_to_be(tmp_path, caplog):
    data = write_volumes(tmp_path / "data")
    checkpoint = trained_on(data, tmp_path)
    (data / "masks" / "scan0.nii.gz").write_bytes((data / "masks" / "scan1.nii.gz").read_bytes())
    assert reference_images(checkpoint, None)[1] == "generated noise"
    assert "has changed since the training" in caplog.text
    data.rename(tmp_path / "moved")
    assert reference_images(checkpoint, None)[1] == "generated noise"
    assert "give real images: --data DIR" in caplog.text
    assert reference_images(checkpoint, tmp_path / "moved")[1] == "5 real images of generated, split val"


def test_a_checkpoint_without_a_record_is_verified_on_noise(tmp_path, caplog):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, architecture="transunet-tiny"))
    inputs, images = reference_images(checkpoint, None)
    assert (inputs.shape[1:], images) == ((3, 32, 32), "generated noise")
    assert "does not say what it was trained on" in caplog.text


def test_many_pictures_are_a_few_and_all_different(tmp_path):
    write_pictures(tmp_path / "data", count=60)
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, classes=LESION, architecture="transunet-tiny"))
    inputs, images = reference_images(checkpoint, tmp_path / "data")
    assert images == f"{MAX_IMAGES} real images of data, split val"
    assert len({image.tobytes() for image in inputs}) == MAX_IMAGES


def test_a_folder_that_was_named_and_cannot_be_used_is_an_error(tmp_path):
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, architecture="transunet-tiny"))
    with pytest.raises(InputError, match="does not exist"):
        reference_images(checkpoint, tmp_path / "nowhere")


def test_the_test_split_is_never_used(tmp_path):
    """Its images must not take part in any choice; here they are plainly black."""
    data = write_pictures(tmp_path / "data", count=3)
    for index in (1, 2):
        PIL.Image.new("L", (32, 32)).save(data / "images" / f"case{index}.png")
    names = [{"image": f"case{index}"} for index in range(3)]
    from tiny import write_description

    write_description(data, {"train": names[1:2], "val": names[:1], "test": names[2:]}, LESION)
    checkpoint = load_checkpoint(make_checkpoint(tmp_path, classes=LESION, architecture="transunet-tiny"))
    inputs, _ = reference_images(checkpoint, data)
    assert len(inputs) == 1
    assert inputs.max() > 0.5
