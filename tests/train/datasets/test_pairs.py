"""Images and masks are paired wherever they lie below their folders, and nothing is left out unsaid."""

import shutil

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner
from official import write_clinicdb, write_colondb
from tiny import write_pictures, write_volumes

from medseg_trt.cli import cli
from medseg_trt.errors import InputError
from medseg_trt.train.datasets.check import check_data
from medseg_trt.train.datasets.folder import open_folder, read_case
from medseg_trt.train.datasets.official import is_labelled, open_dataset
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.datasets.pairs import MASK_ENDINGS, find_pairs


def move(root, name, sub):
    """Put an image and its mask into a sub-folder."""
    for part in ("images", "masks"):
        (root / part / sub).mkdir(parents=True, exist_ok=True)
        shutil.move(root / part / name, root / part / sub / name)


def rename_all(folder, change):
    for path in list(folder.iterdir()):
        path.rename(folder / change(path.name))


def all_cases(data):
    return [case for cases in data.splits.values() for case in cases]


def test_a_pair_in_a_sub_folder_is_read_with_its_own_mask_and_said(tmp_path):
    root = write_pictures(tmp_path, 6)
    move(root, "case5.png", "p1")
    data = open_folder(root)
    assert sorted(case.name for case in all_cases(data)) == [*(f"case{n}" for n in range(5)), "p1/case5"]
    (nested,) = (case for case in all_cases(data) if "/" in case.name)
    with PIL.Image.open(root / "masks" / "p1" / "case5.png") as mask:
        np.testing.assert_array_equal(read_case(nested, 2)[1][0], np.asarray(mask) // 255)
    (remark,) = data.remarks
    assert remark.startswith("1 of 6 pairs lie in sub-folders, such as p1/case5, and are read too")
    assert remark in check_data(root).remarks


def test_files_of_one_name_in_two_sub_folders_are_two_cases(tmp_path, caplog):
    root = write_pictures(tmp_path, 4)
    for number, sub in enumerate(("a", "a", "b", "b/c")):
        move(root, f"case{number}.png", f"patient/{sub}")
    for part in ("images", "masks"):
        shutil.copy(root / part / "patient" / "a" / "case1.png", root / part / "patient" / "b" / "case1.png")
    data = open_dataset(None, root)
    assert len({case.name for case in all_cases(data)}) == 5
    assert len(data.manifest()["files"]) == 10
    assert "5 of 5 pairs lie in sub-folders" in caplog.text


def test_a_nested_image_without_its_mask_is_not_left_out(tmp_path):
    root = write_pictures(tmp_path, 3)
    move(root, "case2.png", "p1")
    shutil.move(root / "masks" / "p1" / "case2.png", root / "masks" / "case2.png")
    with pytest.raises(InputError, match=r"case2 has no image: .*the nearest name is p1/case2 \(2 pairs; without a"):
        open_folder(root)


@pytest.mark.parametrize("command", [["train", "--recipe", "folder", "--data"], ["data", "check"]])
def test_a_dangling_link_ends_train_and_check(tmp_path, command):
    root = write_pictures(tmp_path / "data", 4)
    for part in ("images", "masks"):
        (root / part / "case9.png").symlink_to("../../annex/case9.png")
    output = ["-o", str(tmp_path / "run")] if command[0] == "train" else []
    done = CliRunner().invoke(cli, [*command, str(root), *output])
    assert isinstance(done.exception, InputError)
    assert "case9.png is a link to ../../annex/case9.png, which does not exist" in str(done.exception)


def test_a_link_that_leads_back_is_refused(tmp_path):
    root = write_pictures(tmp_path)
    (root / "images" / "again").symlink_to(root / "images")
    with pytest.raises(InputError, match="again is a link that leads back to a folder above it"):
        open_folder(root)


def test_a_linked_folder_is_read(tmp_path):
    root = write_pictures(tmp_path / "data", 4)
    move(root, "case3.png", "p1")
    shutil.move(root / "images" / "p1", tmp_path / "elsewhere")
    (root / "images" / "p1").symlink_to(tmp_path / "elsewhere")
    assert "p1/case3" in find_pairs(root).pairs


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    root = write_pictures(tmp_path)
    move(root, "case3.png", "closed")
    iterdir = type(root).iterdir

    def refuse(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(type(root), "iterdir", refuse)
    with pytest.raises(InputError, match="images/closed cannot be read: Permission denied"):
        find_pairs(root)


def test_files_of_other_kinds_are_counted_and_named_and_junk_is_not(tmp_path):
    root = write_pictures(tmp_path)
    for name in ("b.webp", "c.gif", "d.mha", "notes.txt"):
        (root / "images" / name).write_bytes(b"-")
    for name in ("Thumbs.db", ".DS_Store", "._case1.png", "desktop.ini"):
        (root / "masks" / name).write_bytes(b"-")
    (remark,) = find_pairs(root).remarks
    assert remark == "images/ holds 4 files of other kinds, which are left out: b.webp, c.gif, d.mha, …"


def test_an_image_of_another_kind_beside_its_mask_is_named(tmp_path):
    root = write_pictures(tmp_path)
    (root / "images" / "case2.png").unlink()
    (root / "images" / "case2.webp").write_bytes(b"RIFF\x24\0\0\0WEBPVP8 ")
    with pytest.raises(InputError, match=r"case2 has no image: .*case2\.webp is of a kind that cannot be read \(3"):
        find_pairs(root)


@pytest.mark.parametrize("ending", MASK_ENDINGS[1:])
@pytest.mark.parametrize("of_images", ["", "_0000", "_image"])
def test_masks_with_one_ending_are_paired(tmp_path, ending, of_images):
    root = write_pictures(tmp_path, 3)
    rename_all(root / "masks", lambda name: name.replace(".png", f"{ending}.png"))
    rename_all(root / "images", lambda name: name.replace(".png", f"{of_images}.png"))
    scan = find_pairs(root)
    assert {name: pair.mask.path.name for name, pair in scan.pairs.items()} == {
        f"case{number}": f"case{number}{ending}.png" for number in range(3)
    }
    assert f"3 pairs: the names of all masks end with {ending}, which pairs them" in scan.remarks
    assert len(scan.remarks) == 1 + bool(of_images)


def test_an_ending_that_pairs_all_but_one_is_refused_with_the_nearest_name(tmp_path):
    root = write_pictures(tmp_path, 3)
    rename_all(root / "masks", lambda name: name.replace(".png", "_mask.png"))
    (root / "masks" / "case1_mask.png").rename(root / "masks" / "case1_seg.png")
    with pytest.raises(
        InputError,
        match=r"case0 has no mask: there is no file of that name under masks/; the nearest name is case0_mask",
    ):
        find_pairs(root)


@pytest.mark.parametrize(("count", "text"), [(1, "1 pair;"), (2, "2 pairs;")])
def test_unpaired_error_uses_singular_and_plural(tmp_path, count, text):
    root = write_pictures(tmp_path, count + 1)
    (root / "masks" / f"case{count}.png").unlink()
    with pytest.raises(InputError, match=rf"{text} without a partner: 1 image and 0 masks"):
        find_pairs(root)


def test_numbered_pictures_are_no_channels_and_channels_are_no_pictures(tmp_path):
    root = write_pictures(tmp_path / "numbered", 2)
    for part in ("images", "masks"):
        rename_all(root / part, lambda name: name.replace("case", "frame_000"))
    assert list(find_pairs(root).pairs) == ["frame_0000", "frame_0001"]
    root = write_pictures(tmp_path / "channels", 2)
    for number in range(2):
        shutil.copy(root / "images" / f"case{number}.png", root / "images" / f"case{number}_0001.png")
        (root / "images" / f"case{number}.png").rename(root / "images" / f"case{number}_0000.png")
    with pytest.raises(InputError, match=r"several channels of 2 images, as nnU-Net .*\(case0_0000, _0001"):
        find_pairs(root)


def test_seg_nrrd_suffix_is_stripped_when_pairing(tmp_path):
    root = write_volumes(tmp_path, 2)
    for number in range(2):
        (root / "masks" / f"scan{number}.nii.gz").unlink()
        (root / "masks" / f"scan{number}.seg.nrrd").write_bytes(b"NRRD0004\n")
    assert [pair.mask.path.name for pair in find_pairs(root).pairs.values()] == ["scan0.seg.nrrd", "scan1.seg.nrrd"]


def test_nnunets_folders_are_a_data_folder(tmp_path):
    root = write_pictures(tmp_path, 4)
    (root / "images").rename(root / "imagesTr")
    (root / "masks").rename(root / "labelsTr")
    rename_all(root / "imagesTr", lambda name: name.replace(".png", "_0000.png"))
    (root / "imagesTs").mkdir()
    assert is_labelled(root)
    data = open_dataset(None, root)
    assert sorted(case.name for case in all_cases(data)) == [f"case{number}" for number in range(4)]
    assert "only imagesTr/ and labelsTr/ are read; beside them lie, and are left out: imagesTs/" in data.remarks
    (root / "images").mkdir()
    (root / "masks").mkdir()
    with pytest.raises(InputError, match="images/masks and imagesTr/labelsTr; keep one pair"):
        open_folder(root)


def test_other_folders_and_images_of_a_data_folder_are_named(tmp_path):
    root = write_pictures(tmp_path)
    for name in ("test", ".cache", "__MACOSX"):
        (root / name).mkdir()
    shutil.copy(root / "images" / "case0.png", root / "loose.png")
    (root / "README.txt").write_text("-")
    (remark,) = find_pairs(root).remarks
    assert remark == "only images/ and masks/ are read; beside them lie, and are left out: loose.png, test/"


def test_the_readers_of_archives_leave_no_link_and_no_folder_out(tmp_path):
    options = DataOptions(count="any")
    root = write_clinicdb(tmp_path / "a", 6)
    for part in ("Original", "Ground Truth"):
        (root / part / "99.tif").symlink_to("nowhere.tif")
    with pytest.raises(InputError, match=r"99\.tif is a link to a file that does not exist \(1 such\)"):
        open_dataset("clinicdb", root, options)
    root = write_colondb(tmp_path / "b", 6, community=True)
    move(root, "6.png", "p1")
    with pytest.raises(InputError, match=r"images holds the folder p1 \(1 such\), which is not read"):
        open_dataset("colondb", root, options)
