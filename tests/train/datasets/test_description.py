"""``dataset.json`` of nnU-Net and of the Medical Segmentation Decathlon gives the classes, or one line says why not."""

import json
import shutil

import pytest
from tiny import write_pictures, write_volumes

from medseg_trt.errors import InputError
from medseg_trt.train.datasets.folder import open_folder

LABELS = {"background": 0, "disc": 1, "bar": 2}
NNUNET = {"channel_names": {"0": "CT"}, "labels": LABELS, "numTraining": 2, "file_ending": ".nii.gz"}
TRAINING = [{"image": f"./imagesTr/scan{n}.nii.gz", "label": f"./labelsTr/scan{n}.nii.gz"} for n in range(2)]
DECATHLON = {
    "name": "Shapes",
    "modality": {"0": "CT"},
    "labels": {"0": "background", "1": "disc", "2": "bar"},
    "numTraining": 2,
    "training": TRAINING,
    "test": [],
    "tensorImageSize": "3D",
}


def describe(root, content):
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "name", "origin"),
    [
        (NNUNET, "data", "nnU-Net's"),
        (DECATHLON, "Shapes", "Decathlon's"),
        ({key: value for key, value in DECATHLON.items() if key in ("labels", "modality")}, "data", "Decathlon's"),
    ],
)
def test_classes_are_read_from_nnunet_and_decathlon_dataset_json(tmp_path, content, name, origin):
    root = write_volumes(tmp_path / "data", 2)
    (root / "images").rename(root / "imagesTr")
    (root / "masks").rename(root / "labelsTr")
    describe(root, content)
    data = open_folder(root)
    assert data.classes.names == ("background", "disc", "bar")
    assert data.name == name
    assert any(origin in remark and "background, disc, bar" in remark for remark in data.remarks)


def test_labels_are_ordered_by_their_number_not_by_their_place(tmp_path):
    root = write_volumes(tmp_path, 2)
    describe(root, NNUNET | {"labels": {"bar": 2, "background": 0, "disc": "1"}})
    assert open_folder(root).classes.names == ("background", "disc", "bar")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NNUNET | {"channel_names": {"0": "T1", "1": "T2"}}, r"is nnU-Net's, and it has 2 channels"),
        (NNUNET | {"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "regions"),
        (NNUNET | {"labels": LABELS | {"ignore": 3}}, "is to be ignored"),
        (NNUNET | {"labels": {"background": 0, "disc": 2}}, "its labels are 0, 2, but they must be 0, 1, 2"),
        (NNUNET | {"labels": {}}, "names no labels"),
        (NNUNET | {"labels": {"background": 0}}, "1 class names"),
        (DECATHLON | {"training": [{"label": "x"}]}, "not listed as pairs"),
    ],
)
def test_unsupported_nnunet_or_decathlon_json_error_lists_the_own_fields(tmp_path, content, message):
    root = write_volumes(tmp_path, 2)
    describe(root, content)
    with pytest.raises(
        InputError, match=rf"dataset\.json.*{message}.*whose fields are name, classes, colors"
    ) as caught:
        open_folder(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DECATHLON | {"training": TRAINING[:1]}, "lists 1 cases .*holds 2 pairs: scan1 is in the folder, but not"),
        (DECATHLON | {"training": [*TRAINING, "./imagesTr/scan7.nii.gz"]}, "scan7 is listed, but not in the folder"),
        (NNUNET | {"numTraining": 3}, "numTraining is 3, but there are 2 pairs"),
    ],
)
def test_cases_that_the_file_promises_must_be_there(tmp_path, content, message):
    root = write_volumes(tmp_path, 2)
    describe(root, content)
    with pytest.raises(InputError, match=message):
        open_folder(root)


def test_a_description_that_is_a_dangling_link_or_a_folder_is_not_ignored(tmp_path):
    root = write_pictures(tmp_path)
    (root / "dataset.json").symlink_to("nowhere.json")
    with pytest.raises(InputError, match=r"dataset\.json is no file that can be read"):
        open_folder(root)
    (root / "dataset.json").unlink()
    (root / "dataset.json").mkdir()
    with pytest.raises(InputError, match=r"dataset\.json is no file that can be read"):
        open_folder(root)
    shutil.rmtree(root / "dataset.json")
    open_folder(root)
