"""The check of a data set counts what is there, and names everything that is wrong with it."""

import shutil
from dataclasses import replace

import nibabel
import numpy as np
import PIL.Image
import pytest
from official import (
    colour_picture,
    load_nifti,
    write_acdc,
    write_busi,
    write_clinicdb,
    write_colondb,
    write_isic2017,
    write_synapse,
)
from tiny import LESION, picture, write_description, write_pictures, write_volumes

from medseg_trt.errors import InputError
from medseg_trt.train.datasets.check import check_data
from medseg_trt.train.datasets.folder import manifest_sha256
from medseg_trt.train.datasets.official import open_dataset
from medseg_trt.train.datasets.options import DataOptions

ANY = DataOptions(count="any")


def test_a_good_data_set_is_counted(tmp_path):
    root = write_synapse(tmp_path)
    report = check_data(root, ANY)
    assert report.problems == ()
    assert report.remarks == ()
    counts = report.to_dict()
    assert {split: facts["cases"] for split, facts in counts["splits"].items()} == {"train": 3, "test": 2}
    assert {split: facts["slices"] for split, facts in counts["splits"].items()} == {"train": 9, "test": 6}
    assert counts["splits"]["train"]["height"] == [32, 32]
    assert counts["splits"]["train"]["spacing_mm"] == [[3, 3], pytest.approx([0.8, 0.8]), pytest.approx([0.8, 0.8])]
    pixels = counts["pixels_of_class"]
    assert sum(pixels[name]["train"] for name in pixels) == 9 * 32 * 40
    assert pixels["liver"]["train"] == 9 * 16 * 2  # its stripe is two of the 40 columns, over half of the rows
    assert counts["manifest_sha256"] == manifest_sha256(open_dataset("synapse", root, ANY).manifest())
    assert len(counts["cases"]) == 5
    header, rows = report.table()
    assert rows[0] == ["train", "3", "9", "3", "0", "32", "40", "3 x 0.8 x 0.8", rows[0][-1]]
    assert len(header) == len(rows[0])


@pytest.mark.parametrize(
    "write",
    [
        write_isic2017,
        write_busi,
        write_clinicdb,
        write_colondb,
        write_acdc,
        lambda root: write_synapse(root, prepared=True),
        lambda root: write_acdc(root, prepared=True),
    ],
)
def test_check_data_finds_no_problems_in_generated_archives(tmp_path, write):
    assert check_data(write(tmp_path), ANY).problems == ()


def test_the_wrong_number_of_cases_is_one_fault_among_others(tmp_path):
    root = write_busi(tmp_path)
    (root / "benign" / "benign (4)_mask.png").unlink()
    (root / "malignant" / "malignant (3).png").write_bytes(b"half a file")
    report = check_data(root)
    missing, count, damaged = report.problems
    assert "benign (4).png" in missing
    assert "17 cases, but 647" in count
    assert "malignant (3).png cannot be read" in damaged
    assert len(report.cases) == 16
    assert report.digest is None


def test_check_data_names_every_unreadable_file(tmp_path):
    root = write_acdc(tmp_path, prepared=True)
    for name in ("patient001_frame01", "patient021_frame01"):
        (root / "ACDC_training_volumes" / f"{name}.h5").write_bytes(b"nothing")
    first, second = check_data(root, ANY).problems
    assert "patient021_frame01.h5 cannot be read" in first
    assert "patient001_frame01.h5 cannot be read" in second


def enlarged(path, factor=8):
    """Enlarge a generated picture, which is too small to be known again once it is made smaller still."""
    with PIL.Image.open(path) as small:
        return small.resize((small.width * factor, small.height * factor), PIL.Image.Resampling.BICUBIC)


def plant_copy(root, source, target, *, shrink=1):
    """Put a copy of one frame in another's place; with ``shrink`` smaller, and compressed on the way."""
    large = enlarged(root / "images" / f"{source}.png")
    large.save(root / "images" / f"{source}.png")
    mask = PIL.Image.new("L", large.size)
    mask.save(root / "masks" / f"{source}.png")
    small = large.resize((large.width // shrink, large.height // shrink))
    if shrink > 1:
        small.save(root / "copy.jpg", quality=60)
        small = PIL.Image.open(root / "copy.jpg")
    small.save(root / "images" / f"{target}.png")
    mask.resize(small.size).save(root / "masks" / f"{target}.png")
    small.close()


@pytest.mark.parametrize(("shrink", "problem"), [(1, "hold the same pixels"), (2, "look alike")])
def test_a_copy_in_two_splits_is_wrong_and_in_one_a_remark(tmp_path, shrink, problem):
    splits = open_dataset("colondb", write_colondb(tmp_path / "clean", community=True), ANY).splits
    train, test = splits["train"], splits["test"]
    for other, is_leak in ((test[0], True), (train[1], False)):
        root = write_colondb(tmp_path / other.name, community=True)
        plant_copy(root, train[0].name, other.name, shrink=shrink)
        report = check_data(root, replace(ANY, dataset="colondb"))
        lines = report.problems if is_leak else report.remarks
        (line,) = [line for line in lines if problem in line]
        assert f"1 pair of images {problem}, in {'two splits' if is_leak else 'one split'}" in line
        assert train[0].name in line
        assert other.name in line
        assert bool(report.problems) == is_leak
        assert ("Put all images of a patient into one split" in line) == is_leak


def test_check_data_reports_sequence_leakage_and_group_by_fixes_it(tmp_path):
    root = write_clinicdb(tmp_path, 30, kaggle=True)
    (problem,) = check_data(root, ANY).problems
    assert "sequences are in two splits: sequence " in problem
    assert "--set data.group_by=sequence" in problem
    assert check_data(root, replace(ANY, group_by="sequence")).problems == ()


def test_slices_in_two_splits_are_wrong(tmp_path):
    root = write_volumes(tmp_path, 2, slices=9)
    overlapping = {"train": [{"image": "scan0", "slices": [0, 5]}], "val": [{"image": "scan0", "slices": [4, 9]}]}
    write_description(root, overlapping)
    assert "share slices: scan0[4:9] (train and val)" in check_data(root).problems[0]


def test_check_data_lists_remarks_that_are_no_problems(tmp_path):
    root = write_pictures(tmp_path, 6)
    PIL.Image.fromarray(np.zeros((32, 32), np.uint8)).save(root / "masks" / "case1.png")
    PIL.Image.fromarray(np.full((32, 32), 7, np.uint8)).save(root / "images" / "case2.png")
    grey = (255 * (picture(3)[1] == 1)).astype(np.uint8)
    grey[0, :5] = (3, 60, 126, 130, 250)
    PIL.Image.fromarray(grey).save(root / "masks" / "case3.png")
    report = check_data(root, replace(ANY, dataset="colondb"))
    assert report.problems == ()
    remarks = " | ".join(report.remarks)
    assert "1 masks are empty: case1" in remarks
    assert "1 images are of one value: case2" in remarks
    assert "1 masks hold greys between black and white" in remarks
    assert "case3" in remarks


def test_classes_that_never_occur_and_mixed_axes_are_remarked_on(tmp_path):
    root = write_volumes(tmp_path, 2)
    described = {"train": [{"image": "scan0"}], "val": [{"image": "scan1"}]}
    write_description(root, described, replace(LESION, names=("background", "disc", "bar", "ghost"), colors=()))
    for part in ("images", "masks"):
        stored = load_nifti(root / part / "scan1.nii.gz")
        mirrored = np.array([[0, -1], [1, 1], [2, 1]])
        reoriented = stored.as_reoriented(mirrored)  # pyright: ignore[reportArgumentType]  # it takes an array
        nibabel.save(reoriented, root / part / "scan1.nii.gz")
    report = check_data(root)
    assert report.problems == ()
    assert any("occur in no mask: ghost" in remark for remark in report.remarks)
    assert any("axes are mixed" in remark and "RAS 1, LAS 1" in remark for remark in report.remarks)


def test_given_splits_are_checked_too(tmp_path):
    root = write_pictures(tmp_path, 4)
    write_description(root, {"train": [{"image": "case0"}], "test": [{"image": "case1"}]}, LESION)
    shutil.copy(root / "images" / "case0.png", root / "images" / "case1.png")
    assert "same pixels, in two splits: case0 (train) and case1 (test)" in check_data(root).problems[0]


def test_check_data_refuses_a_folder_without_data_set(tmp_path):
    with pytest.raises(InputError, match="holds no known data set"):
        check_data(tmp_path)


def test_generated_pictures_differ():
    assert not np.array_equal(colour_picture(1)[0], colour_picture(2)[0])
