"""Masks are written in the layout of their image, and areas are measured; Pillow and nibabel are the oracles."""

import gzip
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.nifti1 import Nifti1Extension
from stored_images import (
    opened,
    picture_image,
    some_labels,
    volume_image,
)
from tiny import TWO_ORGANS, write_nifti

from medseg_trt.errors import MedsegError
from medseg_trt.imaging.formats import nifti
from medseg_trt.imaging.images import Area, Mask, read_image, read_labels, write_mask
from medseg_trt.spec import Classes

LESION = Classes(names=("background", "lesion"))


def test_a_mask_refuses_labels_of_another_size_or_without_a_name(tmp_path):
    image = picture_image(tmp_path)
    with pytest.raises(ValueError, match=r"the labels are \(1, 6, 8\), but the image is \(1, 6, 9\)"):
        Mask.of(image, np.zeros((1, 6, 8), np.uint8), LESION)
    with pytest.raises(ValueError, match="label 2 has no name; there are 2 classes"):
        Mask.of(image, np.full((1, 6, 9), 2, np.uint8), LESION)


@pytest.mark.parametrize("count", [2, 3, 256])
def test_a_written_picture_shows_the_class_colours_and_gives_the_labels_back(count, tmp_path):
    classes = Classes(names=tuple(f"class {index}" for index in range(count)))
    image = picture_image(tmp_path, (16, 17))
    labels = (np.arange(16 * 17) % count).astype(np.uint8).reshape(1, 16, 17)
    path = write_mask(Mask.of(image, labels, classes), tmp_path / "masks")
    assert path == tmp_path / "masks" / "picture.png"
    picture = opened(path)
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), labels[0])
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), np.array(classes.colors)[labels[0]])
    np.testing.assert_array_equal(read_labels(path, image, count), labels)


def test_a_written_volume_gives_the_labels_back(tmp_path):
    image, labels = volume_image(tmp_path), some_labels()
    path = write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert path == tmp_path / "masks" / "volume.nii.gz"
    np.testing.assert_array_equal(read_labels(path, image, 3), labels)


def test_the_same_mask_is_the_same_file_at_any_time(tmp_path, monkeypatch):
    image, labels = volume_image(tmp_path), some_labels()
    days = itertools.count(0, 86_400)
    monkeypatch.setattr(nifti.gzip, "time", SimpleNamespace(time=lambda: next(days)))
    first, second = (write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / name) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_nothing_of_the_patient_in_the_header_is_copied_to_the_mask(tmp_path):
    volume = nibabel.Nifti1Image(np.zeros((5, 4, 3), np.int16), np.diag([2, 1.5, 3, 1]))
    volume.header["descrip"], volume.header["db_name"], volume.header["intent_name"] = b"Jane Doe", b"Doe", b"Jane"
    volume.header.extensions.append(Nifti1Extension("comment", b"Jane Doe"))
    nibabel.save(volume, tmp_path / "scan.nii")
    assert b"Jane Doe" in (tmp_path / "scan.nii").read_bytes()
    mask = Mask.of(read_image(tmp_path / "scan.nii"), some_labels(), TWO_ORGANS)
    content = gzip.decompress(write_mask(mask, tmp_path / "masks").read_bytes())
    assert b"Jane" not in content
    assert b"Doe" not in content


def stopped(*args: Any, **kwargs: Any) -> bytes:
    raise OSError("no space left")


@pytest.mark.parametrize("kind", ["picture", "volume"])
def test_an_error_while_writing_leaves_the_old_mask_and_nothing_half_done(kind, tmp_path, monkeypatch):
    image = picture_image(tmp_path) if kind == "picture" else volume_image(tmp_path)
    folder = tmp_path / "masks"
    old = write_mask(Mask.of(image, np.zeros(image.pixels.shape[:3], np.uint8), TWO_ORGANS), folder)
    content = old.read_bytes()
    monkeypatch.setattr("PIL.Image.Image.save", stopped)
    monkeypatch.setattr("medseg_trt.imaging.formats.nifti.gzip.compress", stopped)
    with pytest.raises(OSError, match="no space left"):
        write_mask(Mask.of(image, np.ones(image.pixels.shape[:3], np.uint8), TWO_ORGANS), folder)
    assert list(folder.iterdir()) == [old]
    assert old.read_bytes() == content


@pytest.mark.parametrize("fault", ["mirrored", "moved"])
def test_a_volume_mask_that_comes_out_wrong_is_not_written(fault, tmp_path, monkeypatch):
    image, labels = volume_image(tmp_path), some_labels()
    read_back = nifti.load

    def faulty(path: Path) -> Any:
        values, header, affine = read_back(path)
        if fault == "mirrored":
            return values[::-1], header, affine
        header["qoffset_x"] += 1
        return values, header, affine

    monkeypatch.setattr(nifti, "load", faulty)
    with pytest.raises(MedsegError, match="differs in geometry or labels when read back"):
        write_mask(Mask.of(image, labels, TWO_ORGANS), tmp_path / "masks")
    assert list((tmp_path / "masks").iterdir()) == []


def test_the_areas_of_a_picture_are_pixels(tmp_path):
    labels = np.zeros((1, 6, 9), np.uint8)
    labels[0, :2, :3], labels[0, 5, 5] = 1, 2
    areas = Mask.of(picture_image(tmp_path), labels, TWO_ORGANS).areas()
    assert areas == (Area(name="disc", pixels=6, mm2=None, ml=None), Area(name="bar", pixels=1, mm2=None, ml=None))


def test_the_areas_of_a_volume_are_millilitres(tmp_path):
    labels = np.zeros((3, 4, 5), np.uint8)
    labels[:, 0, 0] = 2
    areas = Mask.of(volume_image(tmp_path), labels, TWO_ORGANS).areas()  # voxels of 2 x 1.5 x 3 = 9 mm³
    assert areas[0] == Area(name="disc", pixels=0, mm2=None, ml=0.0)
    assert (areas[1].pixels, areas[1].mm2, areas[1].ml) == (3, None, pytest.approx(0.027, rel=1e-12))


def test_the_areas_of_a_single_slice_are_square_millimetres(tmp_path):
    image = read_image(write_nifti(tmp_path / "slice.nii", np.zeros((5, 4, 1), np.int16)))
    areas = Mask.of(image, np.ones((1, 4, 5), np.uint8), TWO_ORGANS).areas()
    assert areas[0] == Area(name="disc", pixels=20, mm2=60.0, ml=None)
