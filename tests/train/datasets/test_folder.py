"""A data folder is read as it lies or as ``dataset.json`` describes it, and whatever is wrong with it is named."""

import json
import logging
import shutil

import nibabel
import numpy as np
import PIL.Image
import pytest
from tiny import LESION, TWO_ORGANS, picture, write_description, write_nifti, write_pictures, write_volumes

from medseg_trt.errors import InputError
from medseg_trt.train.datasets.folder import Case, manifest_sha256, open_folder, read_case
from medseg_trt.train.datasets.splits import GAP_SLICES


def describe(root, **fields):
    (root / "dataset.json").write_text(json.dumps(fields), encoding="utf-8")


def write_mask(path, labels):
    PIL.Image.fromarray(np.asarray(labels, np.uint8)).save(path)


def names(cases):
    return [case.name for case in cases]


def test_pictures_without_a_description_are_divided_by_file(tmp_path):
    data = open_folder(write_pictures(tmp_path / "polyps", 10))
    assert (data.name, data.classes, data.window) == ("polyps", LESION, None)
    assert [len(data.cases(split)) for split in ("train", "val")] == [8, 2]
    assert sorted(names(data.cases("train") + data.cases("val"))) == [f"case{index}" for index in range(10)]
    assert open_folder(tmp_path / "polyps").splits == data.splits


def test_a_picture_comes_with_its_own_mask(tmp_path):
    root = write_pictures(tmp_path, 12)  # case10 sorts before case2 by letters: images and masks are paired by name
    data = open_folder(root)
    for case in data.cases("train") + data.cases("val"):
        image, labels = read_case(case, 2)
        pixels, truth = picture(int(case.name.removeprefix("case")))
        np.testing.assert_array_equal(image.pixels[0, ..., 0], pixels)
        np.testing.assert_array_equal(labels[0], truth == 1)


def test_volumes_are_read_as_dataset_json_says(tmp_path):
    data = open_folder(write_volumes(tmp_path))
    assert (data.name, data.note, data.classes) == ("generated", "generated shapes", TWO_ORGANS)
    assert {split: names(cases) for split, cases in data.splits.items()} == {"train": ["scan0"], "val": ["scan1"]}
    image, labels = read_case(data.cases("val")[0], 3)
    pixels, truth = picture(103, (36, 28))
    np.testing.assert_array_equal(image.pixels[3, ..., 0], pixels)
    np.testing.assert_array_equal(labels[3], truth)
    assert image.spacing_in_plane == pytest.approx((1.5, 2.0))


def test_every_field_of_dataset_json_arrives(tmp_path):
    root = write_volumes(tmp_path, 1, slices=9)
    describe(
        root,
        name="abdomen",
        classes=["background", "disc", "bar"],
        colors=[[0, 0, 0], [255, 0, 0], [0, 0, 255]],
        window=[-100, 240.5],
        note="one scanner",
        splits={"train": [{"image": "scan0", "slices": [0, 4]}], "test": [{"image": "scan0", "slices": [6, 9]}]},
        split_notes={"test": "the same patient"},
    )
    data = open_folder(root)
    assert (data.name, data.note, data.window) == ("abdomen", "one scanner", (-100.0, 240.5))
    assert data.classes.colors == ((0, 0, 0), (255, 0, 0), (0, 0, 255))
    assert data.split_notes == {"test": "the same patient"}
    assert names(data.cases("test")) == ["scan0[6:9]"]
    image, labels = read_case(data.cases("test")[0], 3)
    whole, whole_labels = read_case(Case(image=data.cases("test")[0].image, mask=data.cases("test")[0].mask), 3)
    np.testing.assert_array_equal(image.pixels, whole.pixels[6:9])
    np.testing.assert_array_equal(labels, whole_labels[6:9])
    assert image.spacing_mm == whole.spacing_mm


def test_slices_count_from_the_feet_however_the_file_is_stored(tmp_path):
    root = tmp_path
    for part in ("images", "masks"):
        (root / part).mkdir()
    height_in_mm = np.broadcast_to(np.arange(6, dtype=np.uint8), (4, 5, 6))  # axes: right, anterior, superior
    upside_down = nibabel.Nifti1Image(height_in_mm[..., ::-1].copy(), np.diag([1, 1, -1, 1.0]))
    nibabel.save(upside_down, root / "images" / "scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), upside_down.affine), root / "masks" / "scan.nii.gz")
    describe(root, classes=["background", "lesion"], splits={"train": [{"image": "scan", "slices": [0, 2]}]})
    image, _ = read_case(open_folder(root).cases("train")[0], 2)
    assert [int(value) for value in image.pixels[:, 0, 0, 0]] == [0, 1]


def test_a_single_volume_is_divided_into_blocks_with_a_gap(tmp_path, caplog):
    root = write_volumes(tmp_path, 1, slices=10)
    (root / "dataset.json").unlink()
    data = open_folder(root)
    assert {split: names(cases) for split, cases in data.splits.items()} == {
        "train": [f"scan0[0:{8 - GAP_SLICES}]"],
        "val": ["scan0[8:10]"],
    }
    assert "same patient" in caplog.text


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([[0, 255]], ("background", "lesion")),
        ([[0, 1]], ("background", "lesion")),
        ([[0, 0]], ("background", "lesion")),
        ([[0, 1], [0, 2], [0, 3]], ("background", "class 1", "class 2", "class 3")),
    ],
)
def test_classes_are_found_in_the_masks(tmp_path, masks, expected):
    root = write_pictures(tmp_path, max(len(masks), 2), size=(1, 2))
    for index in range(max(len(masks), 2)):
        write_mask(root / "masks" / f"case{index}.png", [masks[index % len(masks)]])
    assert open_folder(root).classes.names == expected


@pytest.mark.parametrize(
    ("values", "absent"), [([0, 128, 255], "1, 2, 3, 4, 5, …"), ([0, 2], "1"), ([0, 1, 255], "2,")]
)
def test_masks_with_a_hole_in_their_values_are_no_classes(tmp_path, values, absent):
    # Grey borders of a scaled mask, or an "ignore" of 255, would otherwise make a network with 256 logits.
    root = write_pictures(tmp_path, 2, size=(1, len(values)))
    write_mask(root / "masks" / "case1.png", [values])
    with pytest.raises(InputError, match=f"values 0, .*but not {absent}.*name every class in dataset.json"):
        open_folder(root)
    describe(root, classes=[f"value {value}" for value in range(256)])
    assert len(open_folder(root).classes.names) == 256


def test_an_image_without_a_mask_is_named_and_so_is_a_mask_without_an_image(tmp_path):
    root = write_pictures(tmp_path)
    (root / "masks" / "case2.png").unlink()
    with pytest.raises(InputError, match="case2 has no mask"):
        open_folder(root)
    (root / "images" / "case2.png").unlink()
    (root / "images" / "case3.png").unlink()
    with pytest.raises(InputError, match="case3 has no image"):
        open_folder(root)


def test_two_images_of_one_name_are_refused(tmp_path):
    root = write_pictures(tmp_path)
    write_nifti(root / "images" / "case1.nii.gz", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(InputError, match=r"case1.nii.gz and .*case1.png"):
        open_folder(root)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_a_missing_folder_is_named(tmp_path, part):
    root = write_pictures(tmp_path)
    shutil.rmtree(root / part)
    with pytest.raises(InputError, match=f"{part} does not exist"):
        open_folder(root)


def test_a_mask_of_another_size_is_named_with_both_sizes(tmp_path):
    root = write_pictures(tmp_path)
    write_mask(root / "masks" / "case0.png", np.zeros((8, 9)))
    case = Case(image=root / "images" / "case0.png", mask=root / "masks" / "case0.png")
    with pytest.raises(InputError, match=r"masks/case0.png is 9 x 8 pixels, but its image is 32 x 32"):
        read_case(case, 2)


def test_labels_out_of_range_are_named_with_file_and_values(tmp_path):
    root = write_pictures(tmp_path)
    labels = np.zeros((32, 32))
    labels[0, :3] = (1, 3, 7)
    write_mask(root / "masks" / "case1.png", labels)
    case = Case(image=root / "images" / "case1.png", mask=root / "masks" / "case1.png")
    with pytest.raises(InputError, match=r"masks/case1.png holds the values 3, 7 .*from 0 to 2"):
        read_case(case, 3)


def test_a_block_beyond_the_volume_is_named(tmp_path):
    root = write_volumes(tmp_path, 1, slices=9)
    write_description(root, {"train": [{"image": "scan0", "slices": [4, 10]}]})
    with pytest.raises(InputError, match=r"scan0.nii.gz has 9 slices; the block 4:10"):
        read_case(open_folder(root).cases("train")[0], 3)


def test_an_unknown_split_lists_the_known_ones(tmp_path):
    with pytest.raises(InputError, match="no split 'test'; it has: train, val"):
        open_folder(write_pictures(tmp_path)).cases("test")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_names": ["a", "b"]}, "class_names"),
        ({"splits": {"train": [{"image": "case0", "slice": [0, 1]}]}}, "slice"),
        (
            {"splits": {"train": [{"image": "case9"}]}},
            r"'case9'.*no such file; its names, without suffix: case0, case1",
        ),
        ({"splits": {"train": [{"image": "case0.png"}]}}, "without suffix"),
        ({"splits": {"train": [{"image": "../masks/case0"}]}}, "no such file"),
        ({"splits": {"val": [{"image": "case0"}]}}, "'train' is missing"),
        ({"splits": {}}, "'train' is missing"),
        ({"splits": {"train": []}}, "'train' is empty"),
        ({"splits": {"train": [{"image": "case0"}], "val": []}}, "'val' is empty"),
        ({"window": [5, 5]}, "window"),
        ({"window": [0, float("nan")]}, "window"),
        ({"window": [0, float("inf")]}, "window"),
        ({"classes": []}, "0 class names"),
        ({"classes": ["background"]}, "1 class names"),
        ({"classes": ["background", "liver", "liver"]}, "same name: background, liver, liver"),
        ({"classes": ["background", "liver"], "colors": [[0, 0, 0]]}, "2 class names but 1 colours"),
        ({"colors": [[0, 0, 0]]}, "no classes"),
        ({"classes": "background"}, "classes"),
    ],
)
def test_a_mistake_in_dataset_json_is_explained(tmp_path, fields, message):
    root = write_pictures(tmp_path)
    describe(root, **fields)
    with pytest.raises(InputError, match=rf"dataset\.json.*{message}"):
        open_folder(root)


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"null", b"", b"\xff\xfe{}", b"[" * 100_000, b'{"window": [' + b"9" * 5000 + b", 1]}"],
    ids=["open", "list", "null", "empty", "not UTF-8", "deep", "long number"],
)
def test_a_dataset_json_that_is_none_is_an_error_of_one_kind(tmp_path, content):
    root = write_pictures(tmp_path)
    (root / "dataset.json").write_bytes(content)
    with pytest.raises(InputError, match=r"dataset\.json"):
        open_folder(root)


def test_a_huge_dataset_json_is_not_read(tmp_path):
    root = write_pictures(tmp_path)
    with (root / "dataset.json").open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk, but reading it would take all memory
    with pytest.raises(InputError, match="larger than 16 MiB"):
        open_folder(root)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    root = write_pictures(tmp_path)
    (root / "dataset.json").write_text('{"name": "from Windows"}', encoding="utf-8-sig")
    assert open_folder(root).name == "from Windows"


@pytest.mark.parametrize(
    ("val", "leaks"),
    [
        ({"image": "scan0", "slices": [4, 9]}, True),
        ({"image": "scan0"}, True),
        ({"image": "scan0", "slices": [5, 9]}, False),
        ({"image": "scan1"}, False),
    ],
)
def test_slices_in_two_splits_are_reported(tmp_path, caplog, val, leaks):
    root = write_volumes(tmp_path, 2, slices=9)
    write_description(root, {"train": [{"image": "scan0", "slices": [0, 5]}], "val": [val]})
    open_folder(root)
    assert ("share slices" in caplog.text) == leaks
    assert ("(train and val)" in caplog.text) == leaks


def test_pairs_that_no_split_names_are_counted_and_named(tmp_path):
    root = write_volumes(tmp_path, 3)
    write_description(root, {"train": [{"image": "scan0"}], "val": [{"image": "scan2"}]})
    assert "1 of 3 pairs are in no split of dataset.json and are left out: scan1" in open_folder(root).remarks
    write_description(root, {"train": [{"image": "scan0"}, {"image": "scan1"}], "val": [{"image": "scan2"}]})
    assert open_folder(root).remarks == ()


def digest(root):
    return manifest_sha256(open_folder(root).manifest())


def test_data_digest_is_independent_of_the_folder_path(tmp_path):
    root = write_volumes(tmp_path / "here")
    before = digest(root)
    assert digest(shutil.copytree(root, tmp_path / "there" / "renamed")) == before
    without_name = write_pictures(tmp_path / "one")
    assert digest(shutil.copytree(without_name, tmp_path / "two")) == digest(without_name)


def stored(path):
    volume = nibabel.load(path)
    assert isinstance(volume, nibabel.Nifti1Image)
    return np.asarray(volume.dataobj).copy()


def one_pixel_of_one_mask(root):
    path = root / "masks" / "scan1.nii.gz"
    values = stored(path)
    values[3, 4, 2] = 2 - values[3, 4, 2]
    write_nifti(path, values)


def one_pixel_of_one_image(root):
    path = root / "images" / "scan0.nii.gz"
    values = stored(path)
    values[0, 0, 0] ^= 1
    write_nifti(path, values)


def another_window(root):
    describe(root, **json.loads((root / "dataset.json").read_text()), window=[0, 200])


def other_class_names(root):
    describe(root, **json.loads((root / "dataset.json").read_text()) | {"classes": ["background", "a", "b"]})


def another_split(root):
    write_description(root, {"train": [{"image": "scan1"}], "val": [{"image": "scan0"}]})


@pytest.mark.parametrize(
    "change", [one_pixel_of_one_mask, one_pixel_of_one_image, another_window, other_class_names, another_split]
)
def test_the_digest_changes_with_whatever_training_depends_on(tmp_path, change):
    root = write_volumes(tmp_path)
    before = digest(root)
    assert digest(root) == before
    change(root)
    assert digest(root) != before


def test_valid_data_folder_logs_no_warnings(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "medseg_trt")
    open_folder(write_volumes(tmp_path))
    assert caplog.text == ""
