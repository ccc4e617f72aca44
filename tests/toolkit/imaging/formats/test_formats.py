"""Every kind of file goes the whole way: found, segmented, and with a mask that lies as its source."""

import csv
import importlib
import sys

import nibabel
import nrrd
import numpy as np
import PIL.Image
import pytest
import tifffile
from dicoms import save_series
from infer_folder import infer_to_folder
from tiny import picture, write_nifti

from medseg_trt.errors import InputError, MissingExtraError
from medseg_trt.imaging.images import READERS, find_images, output_stem, read_image, read_labels
from medseg_trt.train.datasets.folder import open_folder, read_case


def test_every_reader_in_the_table_reads_images_and_masks():
    for module in set(READERS.values()):
        for function in ("read", "read_labels"):
            assert callable(getattr(importlib.import_module(module), function)), module


@pytest.mark.parametrize(("suffix", "package"), [(".dcm", "pydicom"), (".nrrd", "pynrrd"), (".nii", "nibabel")])
def test_a_missing_package_is_named_with_the_extra_that_installs_it(suffix, package, tmp_path, monkeypatch):
    module = {"pynrrd": "nrrd"}.get(package, package)
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"NRRD0004\n" if suffix == ".nrrd" else b"\0" * 400)
    with pytest.raises(MissingExtraError, match=rf"{module} is not installed.*medseg-trt\[medical\]"):
        read_image(path)


def test_files_of_all_kinds_in_a_folder_are_found_with_their_stems(tmp_path):
    for suffix in READERS:
        if suffix != ".dcm":
            (tmp_path / f"case{suffix.replace('.', '_')}{suffix.upper()}").touch()
    sources = find_images([tmp_path])
    assert sorted(source.stem for source in sources) == sorted(
        f"case{suffix.replace('.', '_')}" for suffix in READERS if suffix != ".dcm"
    )


def test_a_folder_in_place_of_a_mask_or_with_nothing_in_it_is_refused(tmp_path):
    PIL.Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is a folder; give one mask file"):
        read_labels(tmp_path / "empty", read_image(tmp_path / "a.png"), 2)
    with pytest.raises(InputError, match="empty holds no image"):
        read_image(tmp_path / "empty")
    volume = read_image(write_nifti(tmp_path / "b.nii.gz", np.zeros((5, 4, 3), np.int16)))
    assert output_stem(volume) == "b"


def test_inputs_of_every_kind_are_segmented_each_into_a_mask_that_lies_as_it_does(tiny_bundle, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    stack = np.stack([picture(index)[0] for index in range(3)])
    for name in ("photo.jpg", "grey.png", "screen.bmp"):
        PIL.Image.fromarray(stack[0]).save(folder / name)
    tifffile.imwrite(folder / "stack.tif", stack.astype(np.uint16) * 7, photometric="minisblack")
    nrrd.write(str(folder / "volume.nrrd"), stack.transpose(2, 1, 0))
    save_series(folder / "exam", stack.astype(np.int16))
    failed: list[object] = []
    written = infer_to_folder(
        [folder], tiny_bundle, tmp_path / "masks", overlay=True, on_error=lambda path, error: failed.append(error)
    )
    assert failed == []
    assert [path.name for path in written.masks] == [
        "exam.nii.gz",
        "grey.png",
        "photo.png",
        "screen.png",
        "stack.tif",
        "volume.nii.gz",
    ]
    for source, path in zip(find_images([folder]), written.masks, strict=True):
        image = read_image(source)
        assert read_labels(path, image, 3).shape == image.pixels.shape[:3]
    with written.areas.open(newline="", encoding="utf-8") as file:
        assert {row["file"] for row in csv.DictReader(file)} >= {"exam", "photo.jpg", "volume.nrrd"}
    again = infer_to_folder(
        [folder], tiny_bundle, tmp_path / "masks", overlay=True, resume=True, on_error=lambda *_: None
    )
    assert again.kept == 6
    slice_file = next((folder / "exam").iterdir())
    slice_file.write_bytes(slice_file.read_bytes()[:-2] + b"\1\0")
    changed = infer_to_folder(
        [folder], tiny_bundle, tmp_path / "masks", overlay=True, resume=True, on_error=lambda *_: None
    )
    assert changed.kept == 5  # one slice of the series is another one


def test_a_data_folder_may_hold_series_with_nifti_masks(tmp_path):
    (tmp_path / "masks").mkdir()
    for name in ("scan1", "scan2"):
        pixels = np.stack([picture(index)[0] for index in range(3)]).astype(np.int16)
        labels = np.stack([picture(index)[1] for index in range(3)])
        image = read_image(save_series(tmp_path / "images" / name, pixels))
        assert image.geometry is not None
        nibabel.save(
            nibabel.Nifti1Image(labels.transpose(2, 1, 0), None, image.geometry.header),
            tmp_path / "masks" / f"{name}.nii",
        )
    data = open_folder(tmp_path)
    (case,) = data.cases("train")
    image, labels_read = read_case(case, 3)
    np.testing.assert_array_equal(labels_read, labels)
    assert len(data.manifest()["files"]) == 2 * 3 + 2
