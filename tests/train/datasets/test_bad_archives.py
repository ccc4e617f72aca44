"""Whatever is wrong with an archive is named and explained before anything is trained."""

import re
import shutil

import nibabel
import numpy as np
import PIL.Image
import pytest
from official import (
    load_nifti,
    save_nifti,
    write_acdc,
    write_busi,
    write_clinicdb,
    write_colondb,
    write_isic2017,
    write_synapse,
)
from tiny import tiny_recipe, write_block, write_nifti, write_pictures

from medseg_trt.errors import InputError
from medseg_trt.train.datasets.check import require_usable
from medseg_trt.train.datasets.folder import read_case
from medseg_trt.train.datasets.official import open_dataset
from medseg_trt.train.datasets.options import DataOptions
from medseg_trt.train.loop import train

ANY = DataOptions(count="any")


def refused(name, root, message, options=ANY):
    with pytest.raises(InputError, match=message):
        open_dataset(name, root, options)


def read_all(data):
    for cases in data.splits.values():
        for case in cases:
            read_case(case, len(data.classes.names))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("isic2017", write_isic2017, r"6 train cases, but 2000.*3 val cases, but 150.*3 test cases, but 600"),
        ("busi", write_busi, r"18 cases, but 647.*unzip the rest.*data.count=any"),
        ("clinicdb", write_clinicdb, "12 cases, but 612"),
        ("colondb", write_colondb, "12 cases, but 380"),
        ("synapse", write_synapse, "3 train cases, but 18.*2 test cases, but 12"),
        ("synapse", lambda root: write_synapse(root, prepared=True), "9 train cases, but 2211"),
        ("acdc", write_acdc, "6 train cases, but 140.*4 val cases, but 20.*4 test cases, but 40"),
        ("acdc", lambda root: write_acdc(root, prepared=True), "67 of the 70 training patients.*patient034"),
    ],
)
def test_an_archive_with_too_few_cases_is_half_unzipped(tmp_path, name, write, message):
    refused(name, write(tmp_path), message, DataOptions())


def test_both_numbers_of_colondb_are_in_use_and_explained(tmp_path):
    root = write_colondb(tmp_path, 300, size=(4, 4))
    refused("colondb", root, r"300 cases, which is the CVC's own number.*--set data.count=300", DataOptions())
    data = open_dataset("colondb", root, DataOptions(count=300))
    assert [len(cases) for cases in data.splits.values()] == [192, 48, 60]
    refused("colondb", root, "300 cases, not 380", DataOptions(count=380))


@pytest.mark.parametrize(
    ("name", "write", "gone", "message"),
    [
        ("isic2017", write_isic2017, "ISIC-2017_*_Part1_GroundTruth/ISIC_0000002_segmentation.png", "image.*_0000002"),
        ("isic2017", write_isic2017, "ISIC-2017_*_Data/ISIC_0000001.jpg", "mask.*ISIC_0000001_segmentation"),
        ("busi", write_busi, "benign/benign (3)_mask.png", r"image.*benign \(3\).png"),
        ("busi", write_busi, "malignant/malignant (2).png", r"mask.*malignant \(2\)_mask.png"),
        ("busi", write_busi, "malignant/malignant (1)_mask.png", r"malignant \(1\)_mask_1.png has no first mask"),
        ("clinicdb", write_clinicdb, "Ground Truth/7.tif", "image.*7.tif"),
        ("colondb", write_colondb, "p11.bmp", "image.*11.bmp"),
        ("synapse", write_synapse, "Training/label/label0006.nii.gz", "image.*img0006"),
        ("acdc", write_acdc, "training/patient031/patient031_frame01_gt.nii.gz", r"image.*frame01.nii.gz"),
        ("acdc", write_acdc, "training/patient022/Info.cfg", "Info.cfg does not exist"),
    ],
)
def test_an_image_without_its_mask_and_the_reverse_are_named(tmp_path, name, write, gone, message):
    root = write(tmp_path)
    (path,) = root.glob(gone)
    path.unlink()
    refused(name, root, message)


@pytest.mark.parametrize("gone", ["train_npz/case0006_slice001.npz", "test_vol_h5/case0022.npy.h5"])
def test_a_case_on_the_list_without_a_file_is_named(tmp_path, gone):
    root = write_synapse(tmp_path, prepared=True)
    (root / gone).unlink()
    refused("synapse", root, rf"{re.split('[/.]', gone)[1]} is on the list, but not among the files")


def test_a_case_on_the_wrong_side_of_the_lists_is_named(tmp_path):
    root = write_synapse(tmp_path, train=("0005", "0008"), test=("0022",), prepared=True)
    refused("synapse", root, r"case0008_slice000 is on the other side of TransUNet's lists")
    raw = write_synapse(tmp_path, train=("0005", "0011"), test=("0008",))
    refused("synapse", raw, r"img0011.nii.gz is none of the 30 cases")


def test_frames_that_info_cfg_does_not_name_are_named(tmp_path):
    root = write_acdc(tmp_path)
    (root / "training" / "patient001" / "Info.cfg").write_text("ED: 1\nES: 12\n")
    refused("acdc", root, r"Info.cfg names the frames \[1, 12\], but there are images and masks of \[1, 9\]")


@pytest.mark.parametrize(
    ("name", "write", "double"),
    [
        ("isic2017", write_isic2017, ("ISIC-2017_Training_Data/ISIC_0000001.jpg", ".jpeg")),
        ("clinicdb", write_clinicdb, ("Original/3.tif", ".tiff")),
        ("colondb", lambda root: write_colondb(root, community=True), ("images/5.png", ".bmp")),
    ],
)
def test_two_files_of_one_name_are_named(tmp_path, name, write, double):
    root = write(tmp_path)
    path = root / double[0]
    shutil.copy(path, path.with_suffix(double[1]))
    refused(name, root, rf"{path.name} and .*two files for|{path.stem}{double[1]} and .*{path.name} are two files")


def test_macs_hidden_files_are_no_images(tmp_path):
    root = write_busi(tmp_path)
    (root / "benign" / "._benign (1).png").write_bytes(b"resource fork")
    (tmp_path / "__MACOSX" / "benign").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "malignant").mkdir()
    assert open_dataset("busi", tmp_path, ANY).splits == open_dataset("busi", root, ANY).splits


def test_an_empty_archive_is_refused_whatever_the_count(tmp_path):
    for kind in ("benign", "malignant"):
        (tmp_path / kind).mkdir()
    refused("busi", tmp_path, "no case to train on")


def test_255_in_a_label_map_is_named_with_its_file(tmp_path):
    root = write_acdc(tmp_path)
    path = root / "training" / "patient032" / "patient032_frame01_gt.nii.gz"
    labels = np.zeros((3, 32, 40), np.uint8)
    labels[1, 4] = 255
    save_nifti(path, labels, (10.0, 1.5, 1.5))
    with pytest.raises(InputError, match=r"patient032_frame01_gt.nii.gz holds the values 255 .*from 0 to 3"):
        read_all(open_dataset("acdc", root, ANY))


def test_a_label_that_the_raw_scans_do_not_have_is_named(tmp_path):
    root = write_synapse(tmp_path)
    path = root / "Training" / "label" / "label0007.nii.gz"
    save_nifti(path, np.full((3, 32, 40), 14, np.uint8), (3.0, 0.8, 0.8))
    with pytest.raises(InputError, match=r"label0007.nii.gz holds the values 14 .*from 0 to 13"):
        read_all(open_dataset("synapse", root, ANY))


def test_prepared_files_of_another_number_of_classes_are_named(tmp_path):
    root = write_synapse(tmp_path, prepared=True)  # with all 13 organs, as some conversions leave them
    np.savez(
        root / "train_npz" / "case0006_slice002.npz", image=np.ones((4, 14)), label=np.tile(np.arange(14.0), (4, 1))
    )
    with pytest.raises(InputError, match=r"case0006_slice002.npz holds the values 9, 10, 11, 12, 13 .*from 0 to 8"):
        read_all(open_dataset("synapse", root, ANY))


def test_mask_with_maximum_90_is_refused(tmp_path):
    root = write_busi(tmp_path)
    path = root / "benign" / "benign (2)_mask.png"
    PIL.Image.fromarray(np.full((32, 40), 90, np.uint8)).save(path)
    with pytest.raises(InputError, match=r"benign \(2\)_mask.png goes from 0 to 90"):
        read_all(open_dataset("busi", root, ANY))


def silence(path):
    """Remove what a NIfTI header says of where the volume lies."""
    volume = load_nifti(path)
    values = np.asarray(volume.dataobj).copy()
    silent = nibabel.Nifti1Image(values, None)
    silent.header.set_zooms(volume.header.get_zooms())
    silent.set_qform(None, 0)
    silent.set_sform(None, 0)
    nibabel.save(silent, path)


def test_volumes_that_do_not_say_how_they_lie_are_not_mixed_with_those_that_do(tmp_path, caplog):
    root = write_synapse(tmp_path)
    require_usable(open_dataset("synapse", root, ANY))
    for part in ("img", "label"):
        silence(root / "Training" / part / f"{part}0022.nii.gz")
    with pytest.raises(InputError, match=r"img0022.nii.gz does not say how it lies \(1 such.*cannot be turned alike"):
        require_usable(open_dataset("synapse", root, ANY))
    for name in ("0005", "0006", "0007", "0008"):  # where none says so, it is the reader's warning alone
        for part in ("img", "label"):
            silence(root / "Training" / part / f"{part}{name}.nii.gz")
    require_usable(open_dataset("synapse", root, ANY))


def test_a_mask_that_lies_elsewhere_than_its_image_is_named(tmp_path):
    root = write_synapse(tmp_path)
    path = root / "Training" / "label" / "label0008.nii.gz"
    mirrored = np.diag([0.8, -0.8, 3.0, 1.0])
    save_nifti(path, np.zeros((3, 32, 40), np.uint8), (3.0, 0.8, 0.8), mirrored)
    with pytest.raises(InputError, match=r"label0008.nii.gz has another geometry than its image"):
        require_usable(open_dataset("synapse", root, ANY))


@pytest.mark.parametrize("wrong", ["val", "test"])
def test_training_does_not_start_where_a_later_case_cannot_be_read(tmp_path, wrong):
    data = open_dataset("colondb", write_pictures(tmp_path / "data", 12), ANY)
    data.splits[wrong][0].files[1].write_bytes(b"no picture")
    block = write_block(tmp_path)
    with pytest.raises(InputError, match=f"masks/{data.splits[wrong][0].name}.png"):
        train(tiny_recipe(), data, tmp_path / "run", block=block)
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_training_does_not_start_with_a_wrong_label(tmp_path):
    write_pictures(tmp_path / "data", 12)
    data = open_dataset("colondb", tmp_path / "data", ANY)
    PIL.Image.fromarray(np.full((32, 32), 60, np.uint8)).save(data.splits["train"][2].files[1])
    with pytest.raises(InputError, match=f"{data.splits['train'][2].name}.png goes from 0 to 60"):
        train(tiny_recipe(), data, tmp_path / "run", block=write_block(tmp_path))
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_metadata_file_that_is_none_is_named(tmp_path):
    root = write_clinicdb(tmp_path, kaggle=True)
    for content, message in ((b"frame,sequence\n1,2\n", "must have the columns"), (b"\xff\xfe\0", "cannot be read")):
        (root / "metadata.csv").write_bytes(content)
        refused("clinicdb", root, rf"metadata.csv {message}")


def test_two_cases_of_one_name_are_refused(tmp_path):
    root = write_isic2017(tmp_path)
    for folder, name in (("Data", "ISIC_0000001.jpg"), ("Part1_GroundTruth", "ISIC_0000001_segmentation.png")):
        shutil.copy(root / f"ISIC-2017_Training_{folder}" / name, root / f"ISIC-2017_Validation_{folder}" / name)
    refused("isic2017", root, "two cases are called ISIC_0000001")


def test_a_volume_among_pictures_is_named(tmp_path):
    root = write_colondb(tmp_path, community=True)
    (root / "masks" / "5.png").unlink()
    write_nifti(root / "masks" / "5.nii.gz", np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(InputError, match=r"5.nii.gz is a volume, but its image .* is a 2-D image"):
        read_all(open_dataset("colondb", root, ANY))
