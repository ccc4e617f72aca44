"""Every mask is checked before anything is written, and the prepared slices are those of the one preprocessing."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from tiny import picture, write_description, write_nifti, write_pictures, write_volumes

from medseg_trt.errors import InputError
from medseg_trt.imaging.preprocess import prepare, prepare_labels
from medseg_trt.spec import Preprocessing
from medseg_trt.train.datasets.folder import Case, open_folder, read_case
from medseg_trt.train.datasets.prepared import prepare_slices

PICTURES = Preprocessing(image_size=(32, 48))
SCANS = Preprocessing(image_size=(32, 32), spacing_mm=2.0, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))


def cases_of(root):
    data = open_folder(root)
    return [case for cases in data.splits.values() for case in cases]


def test_slices_of_pictures_and_volumes_are_prepared_in_the_order_of_the_cases(tmp_path):
    cases = cases_of(write_volumes(tmp_path / "data", 2, slices=3))
    slices = prepare_slices(cases, SCANS, 3, tmp_path / "out")
    assert (len(slices.images), slices.images[0].shape) == (6, (3, 32, 32))
    assert slices.images[0].dtype == np.float32
    for index, (volume, number) in enumerate((volume, number) for volume in (0, 1) for number in range(3)):
        pixels, labels = picture(100 * volume + number, (36, 28))
        spacing_mm = (1.5, 2.0)  # rows, columns, as write_nifti's x, y, z of 2, 1.5 and 3 mm lie
        np.testing.assert_array_equal(slices.images[index], prepare(pixels[..., np.newaxis], SCANS, spacing_mm))
        np.testing.assert_array_equal(slices.labels[index], prepare_labels(labels, SCANS, spacing_mm))


def test_the_slices_lie_in_files_not_in_memory(tmp_path):
    slices = prepare_slices(cases_of(write_pictures(tmp_path / "data")), PICTURES, 2, tmp_path / "out")
    assert isinstance(slices.images, np.memmap)
    assert isinstance(slices.labels, np.memmap)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "images.npy"), slices.images)
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "labels.npy"), slices.labels)


def test_slices_of_class_hold_their_class_and_no_other_slice_does(tmp_path):
    root = write_volumes(tmp_path / "data", 1, slices=4)
    labels = np.zeros((28, 36, 4), np.uint8)
    labels[8:20, 8:20, 1] = 2
    labels[8:20, 8:20, 3] = 2
    labels[20:24, 8:12, 3] = 4
    write_nifti(root / "masks" / "scan0.nii.gz", labels)
    slices = prepare_slices(
        [Case(image=root / "images" / "scan0.nii.gz", mask=root / "masks" / "scan0.nii.gz")], SCANS, 5, tmp_path / "out"
    )
    assert [indices.tolist() for indices in slices.slices_of_class] == [[0, 1, 2, 3], [], [1, 3], [], [3]]


def test_a_class_that_the_canvas_cuts_away_is_in_no_slice(tmp_path):
    labels = np.zeros((40, 40, 2), np.uint8)
    labels[16:24, 16:24] = 1
    labels[:3, :3] = 2  # a corner, and 32 of the 40 pixels remain
    image, mask = tmp_path / "image.nii.gz", tmp_path / "mask.nii.gz"
    write_nifti(image, np.zeros_like(labels), spacing_mm=(1, 1, 1))
    write_nifti(mask, labels, spacing_mm=(1, 1, 1))
    cropped = Preprocessing(image_size=(32, 32), spacing_mm=1.0)
    slices = prepare_slices([Case(image=image, mask=mask)], cropped, 3, tmp_path / "out")
    assert [indices.tolist() for indices in slices.slices_of_class] == [
        [0, 1],
        [0, 1],
        [],
    ]  # balancing would draw it in vain


def test_a_bad_label_in_the_last_file_is_found_before_anything_is_written(tmp_path):
    root = write_pictures(tmp_path / "data", 5)
    write_description(root, {"train": [{"image": f"case{index}"} for index in range(5)]})
    cases = cases_of(root)
    for index in range(5):
        PIL.Image.fromarray(picture(index)[1]).save(root / "masks" / f"case{index}.png")
    labels = np.zeros((32, 32), np.uint8)
    labels[5, 5:7] = (9, 200)
    PIL.Image.fromarray(labels).save(root / "masks" / "case4.png")
    with pytest.raises(InputError, match=r"masks/case4.png holds the values 9, 200"):
        prepare_slices(cases, PICTURES, 3, tmp_path / "out")
    assert not list(tmp_path.glob("out/**/*.npy"))
    assert len(prepare_slices(cases[:-1], PICTURES, 3, tmp_path / "out").images) == 4  # the others were good


def test_prepare_slices_refuses_before_writing_if_the_disk_is_too_full(tmp_path, monkeypatch):
    cases = cases_of(write_pictures(tmp_path / "data", 5))
    bytes_wanted = 5 * 32 * 48 * (3 * 4 + 1)
    usage = {"free": bytes_wanted - 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(**usage))
    with pytest.raises(InputError, match=r"no room for 0\.1 GB.*-o") as raised:
        prepare_slices(cases, Preprocessing(image_size=(1024, 1024)), 2, tmp_path / "out")
    assert str(tmp_path) in str(raised.value)
    with pytest.raises(InputError, match="no room"):
        prepare_slices(cases, PICTURES, 2, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
    usage["free"] += 1
    prepare_slices(cases, PICTURES, 2, tmp_path / "out")
    written = sum(path.stat().st_size for path in tmp_path.glob("out/*"))
    assert bytes_wanted <= written <= bytes_wanted + 1024  # the two headers of .npy


def volume_of(tmp_path, values):
    image, mask = tmp_path / "ct.nii.gz", tmp_path / "mask.nii.gz"
    write_nifti(image, values)
    write_nifti(mask, np.zeros(values.shape, np.uint8))
    return Case(image=image, mask=mask)


@pytest.mark.parametrize(
    ("low", "high", "kind", "window", "warned"),
    [
        (-1000, 800, np.int16, (0.0, 255.0), True),
        (0, 1, np.float32, (0.0, 255.0), True),
        (0, 250, np.int16, (0.0, 255.0), False),
        (0, 1, np.uint8, (0.0, 255.0), False),
        (-1000, 800, np.int16, (-100.0, 240.0), False),
    ],
)
def test_values_unlike_the_window_are_pointed_out_once(tmp_path, caplog, low, high, kind, window, warned):
    caplog.set_level(logging.WARNING, "medseg_trt")
    case = volume_of(tmp_path, np.linspace(low, high, 16 * 16 * 2).reshape(16, 16, 2).astype(kind))
    prepare_slices([case, case], Preprocessing(image_size=(16, 16), window=window), 2, tmp_path / "out")
    if not warned:
        assert caplog.text == ""
        return
    (record,) = caplog.records
    assert f"ct runs from {low} to {high}" in record.getMessage()
    assert 'set "window" in dataset.json' in record.getMessage()


def test_only_the_block_of_a_case_is_prepared(tmp_path):
    root = write_volumes(tmp_path / "data", 1, slices=9)
    write_description(root, {"train": [{"image": "scan0", "slices": [2, 5]}]})
    cases = open_folder(root).cases("train")
    slices = prepare_slices(cases, SCANS, 3, tmp_path / "out")
    image, _ = read_case(cases[0], 3)
    assert len(slices.images) == image.num_slices == 3
    expected = prepare(picture(4, (36, 28))[0][..., np.newaxis], SCANS, (1.5, 2.0))
    np.testing.assert_array_equal(slices.images[2], expected)
