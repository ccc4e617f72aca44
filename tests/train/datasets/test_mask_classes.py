"""Masks without named classes: whole numbers are classes, soft edges and empty masks are none."""

import json

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from tiny import picture, tiny_changes, write_pictures

from medseg_trt.cli import cli
from medseg_trt.errors import InputError
from medseg_trt.train.datasets.check import NOTHING_TO_LEARN, check_data, require_usable
from medseg_trt.train.datasets.folder import open_folder, read_case
from medseg_trt.train.datasets.official import open_dataset


def write_masks(root, make, count=4):
    for index in range(count):
        labels = (picture(index)[1] == 1).astype(np.uint8)
        PIL.Image.fromarray(make(labels, index)).save(root / "masks" / f"case{index}.png")
    return root


def few_greys(labels, _index):
    large = PIL.Image.fromarray(labels * 255).resize((64, 64), PIL.Image.Resampling.BICUBIC)
    return np.asarray(large.resize((32, 32), PIL.Image.Resampling.BICUBIC))


def all_greys(labels, index):
    ramp = labels * np.uint8(255)
    ramp[-8:] = np.arange(256, dtype=np.uint8).reshape(8, 32)  # no hole: 256 classes by the numbers alone
    return ramp


@pytest.mark.parametrize("make", [few_greys, all_greys])
@pytest.mark.parametrize("command", [["train", "--recipe", "folder", "--data"], ["data", "check"]])
def test_soft_edges_are_refused_by_train_and_check(tmp_path, make, command):
    root = write_masks(write_pictures(tmp_path / "data"), make)
    changes = [word for change in tiny_changes("architecture=transunet-tiny") for word in ("--set", change)]
    more = ["-o", str(tmp_path / "run"), *changes] if command[0] == "train" else []
    done = CliRunner().invoke(cli, [*command, str(root), *more])
    assert isinstance(done.exception, InputError)
    assert "masks/case0.png looks like 0/255 with soft edges; threshold it, or name the classes" in str(done.exception)
    assert "(4 such masks, with" in str(done.exception)
    assert not (tmp_path / "run" / "best.pt").exists()


def test_soft_edges_where_two_classes_are_named_are_explained_too(tmp_path):
    root = write_masks(write_pictures(tmp_path), few_greys)
    (root / "dataset.json").write_text(json.dumps({"classes": ["background", "lesion"]}))
    with pytest.raises(InputError, match="soft edges; threshold it, or name the classes"):
        read_case(open_folder(root).cases("train")[0], 2)


def test_0_and_1_in_some_files_and_0_and_255_in_others_mean_the_same(tmp_path):
    root = write_masks(write_pictures(tmp_path), lambda labels, index: labels * np.uint8(255 if index else 1))
    data = open_dataset(None, root)
    assert data.classes.names == ("background", "lesion")
    assert data.remarks == ("masks hold 0 and 1 in 1 file and 0 and 255 in 3; both mean one class",)
    for case in data.splits["train"] + data.splits["val"]:
        truth = picture(int(case.name.removeprefix("case")))[1] == 1
        np.testing.assert_array_equal(read_case(case, 2)[1][0], truth)


def test_a_file_with_0_1_and_255_is_not_read_as_both(tmp_path):
    root = write_masks(
        write_pictures(tmp_path), lambda labels, _: np.pad(labels[1:] * 255, ((1, 0), (0, 0)), constant_values=1)
    )
    with pytest.raises(InputError, match="the masks hold the values 0, 1, 255, but not 2, 3"):
        open_folder(root)


@pytest.mark.parametrize("named", [True, False])
def test_masks_that_are_all_empty_are_wrong(tmp_path, named):
    root = write_masks(write_pictures(tmp_path / "data"), lambda labels, _: labels * 0)
    if named:
        (root / "dataset.json").write_text(json.dumps({"classes": ["background", "disc", "bar"]}))
    assert NOTHING_TO_LEARN in check_data(root).problems
    with pytest.raises(InputError, match="nothing can be learnt"):
        require_usable(open_folder(root))
    changes = [word for change in tiny_changes("architecture=transunet-tiny") for word in ("--set", change)]
    done = CliRunner().invoke(
        cli, ["train", "--recipe", "folder", "--data", str(root), "-o", str(tmp_path / "r"), *changes]
    )
    assert isinstance(done.exception, InputError)


def test_one_labelled_pixel_in_one_training_mask_is_enough(tmp_path):
    root = write_masks(write_pictures(tmp_path), lambda labels, _: labels * 0)
    name = open_folder(root).cases("train")[-1].name
    PIL.Image.fromarray(np.eye(32, dtype=np.uint8) * np.eye(1, 32, 5, dtype=np.uint8)).save(
        root / "masks" / f"{name}.png"
    )
    assert NOTHING_TO_LEARN not in check_data(root).problems
    require_usable(open_folder(root))
