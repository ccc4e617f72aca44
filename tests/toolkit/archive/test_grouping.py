"""DICOM series of an archive are found by their UIDs, in whatever folders and under whatever names their files lie."""

import os
from pathlib import Path

import numpy as np
import pytest
from archive_runs import planned, reasons, save_picture, save_slices, slices
from dicoms import CT, dataset, placed, save
from pydicom.fileset import FileSet
from pydicom.uid import generate_uid

from medseg_trt.archive import media_directory
from medseg_trt.archive.request import Condition
from medseg_trt.errors import UsageError
from medseg_trt.imaging.formats.dicom_file import EXPLICIT_LITTLE
from medseg_trt.imaging.images import Source, read_image

UIDS = [f"1.2.3.{number}" for number in range(1, 9)]


def scattered(root: Path) -> dict[str, np.ndarray]:
    """Write three series of two patients under names that say nothing, each over several folders; return the pixels."""
    volumes = {series: slices(seed) for seed, series in enumerate(UIDS[:3])}
    for position, (series, pixels) in enumerate(volumes.items()):
        names = [root / f"{(7 * position + 3 * number) % 4:02}" / f"{13 * number + position:04}" for number in range(3)]
        patient = "A" if position < 2 else "B"
        save_slices(
            names, pixels, SeriesInstanceUID=series, StudyInstanceUID=f"9.{patient == 'B':d}", PatientID=patient
        )
    return volumes


def test_a_series_over_several_folders_is_one_volume_of_all_its_slices(tmp_path):
    volumes = scattered(tmp_path / "in")
    files_by_stem = planned([tmp_path / "in"], tmp_path / "out")
    assert sorted(files_by_stem) == sorted(volumes)
    for series, names in files_by_stem.items():
        files = tuple(next((tmp_path / "in").rglob(name)) for name in names)
        image = read_image(Source(path=tmp_path / "in", files=files, stem=series))
        np.testing.assert_array_equal(np.sort(image.pixels, axis=None), np.sort(volumes[series], axis=None))
        assert image.num_slices == 3


def test_masks_may_be_named_by_patient_study_and_series(tmp_path):
    scattered(tmp_path / "in")
    save_picture(tmp_path / "in" / "sub" / "photo.png")
    assert sorted(planned([tmp_path / "in"], tmp_path / "out", names="dicom")) == [
        *(f"A/9.0/{series}" for series in UIDS[:2]),
        f"B/9.1/{UIDS[2]}",
        "sub/photo",
    ]


def test_dicom_patient_id_in_mask_names_is_sanitised_against_path_traversal(tmp_path):
    pixels = slices(0)
    for number, patient in enumerate(("../../etc", ".hidden", "a/b\\c", "")):
        paths = [tmp_path / "in" / f"s{number}" / str(index) for index in range(3)]
        save_slices(paths, pixels, SeriesInstanceUID=UIDS[number], StudyInstanceUID="9", PatientID=patient)
    stems = planned([tmp_path / "in"], tmp_path / "out", names="dicom")
    assert sorted(stem.split("/")[0] for stem in stems) == ["_._.._etc", "_hidden", "a_b_c", "unknown"]
    assert all(len(stem.split("/")) == 3 for stem in stems)


def test_folders_that_repeat_a_uid_are_read_by_themselves(tmp_path):
    for seed, name in enumerate(("p1/scan", "p2/scan")):  # the same positions, as after a careless anonymiser
        paths = [tmp_path / "in" / name / str(index) for index in range(3)]
        save_slices(paths, slices(seed), SeriesInstanceUID=UIDS[0])
    assert planned([tmp_path / "in"], tmp_path / "out") == {"p1/scan": ("0", "1", "2"), "p2/scan": ("0", "1", "2")}


def test_several_series_of_a_folder_are_named_by_their_numbers_and_files_by_themselves(tmp_path):
    for number in (3, 7):
        paths = [tmp_path / "in" / "a" / "st" / f"{number}-{index}" for index in range(3)]
        save_slices(paths, slices(number), SeriesInstanceUID=UIDS[number], SeriesNumber=number)
    save(tmp_path / "in" / "a" / "st" / "frames.dcm", dataset(slices(1), SeriesInstanceUID=UIDS[1]))
    assert [*planned([tmp_path / "in"], tmp_path / "out")] == ["a/st/frames", "a/st-series3", "a/st-series7"]


def test_dicom_filters_select_series_and_report_localizers_and_other_objects(tmp_path):
    kinds = {
        "venous": {"SeriesDescription": "Abdomen VENOUS 3mm"},
        "plain": {"SeriesDescription": "Abdomen native"},
        "mr": {"SeriesDescription": "venous", "Modality": "MR"},
        "scout": {"SeriesDescription": "venous", "ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
    }
    for number, (name, elements) in enumerate(kinds.items()):
        paths = [tmp_path / "in" / name / f"{name}{index}" for index in range(3)]
        save_slices(paths, slices(number), SeriesInstanceUID=UIDS[number], **elements)
    save(
        tmp_path / "in" / "venous" / "seg",
        dataset(slices(0)[0], Modality="SEG", SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"),
    )
    save_picture(tmp_path / "in" / "photo.png")
    where = (Condition.parse("Modality=CT"), Condition.parse("SeriesDescription ~ venous"))
    assert [*planned([tmp_path / "in"], tmp_path / "out", where=where)] == ["venous"]
    reason_by_name = reasons([tmp_path / "in"], tmp_path / "out", where=where)
    assert reason_by_name["plain0"] == ("not chosen by --where SeriesDescription~venous", False)
    assert reason_by_name["mr0"] == ("not chosen by --where Modality=CT", False)
    assert reason_by_name["scout2"] == ("a localizer", False)
    assert reason_by_name["seg"] == ("DICOM without an image of its own: a segmentation", False)
    assert "it is not DICOM" in reason_by_name["photo.png"][0]
    assert [*planned([tmp_path / "in"], tmp_path / "out")] == ["mr", "photo", "plain", "venous"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("Modality", "is no condition; write Modality=CT"), ("Modalty=CT", "DICOM has no attribute 'Modalty'")],
)
def test_a_condition_that_cannot_be_checked_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        Condition.parse(text)


def write_dicomdir(folder: Path) -> Path:
    files = FileSet()
    for seed in (0, 1):
        elements = {"SOPClassUID": CT, "StudyInstanceUID": generate_uid(), "StudyDate": "20200101", "StudyTime": "1200"}
        more = {"SeriesInstanceUID": UIDS[seed], "SeriesNumber": seed, "StudyID": "1", "AccessionNumber": ""}
        for index, values in enumerate(slices(seed)):
            where = placed(corner=(0, 0, 3.0 * index))
            files.add(
                dataset_file(
                    folder.parent / f"{seed}{index}.dcm", values, InstanceNumber=index, **elements, **more, **where
                )
            )
    files.write(folder)
    files._stage["t"].cleanup()  # pydicom leaves its copies to the garbage collector
    return folder / "DICOMDIR"


def dataset_file(path: Path, values: np.ndarray, **elements: object) -> Path:
    return save(path, dataset(values, **elements))


def test_a_dicomdir_names_the_files_of_a_medium(tmp_path):
    path = write_dicomdir(tmp_path / "cd")
    whole_folder = planned([tmp_path / "cd"], tmp_path / "out")
    assert len(whole_folder) == 2
    files_by_stem = planned([path], tmp_path / "out")
    assert files_by_stem == whole_folder
    assert all(len(names) == 3 for names in files_by_stem.values())
    (tmp_path / "cd" / "beside.png").symlink_to(save_picture(tmp_path / "x.png"))
    assert planned([path], tmp_path / "out") == files_by_stem  # only what the DICOMDIR names
    gone = next(
        file
        for file in (tmp_path / "cd").rglob("*")
        if file.is_file() and file.name == next(iter(files_by_stem.values()))[0]
    )
    gone.unlink()
    assert reasons([path], tmp_path / "out")[gone.name][1]


def test_a_dicomdir_leads_to_no_file_outside_of_its_folder(tmp_path):
    path = write_dicomdir(tmp_path / "cd")
    stolen = save(tmp_path / "IM000000", dataset(slices(3)[0], SeriesInstanceUID=UIDS[5]))
    inner = next(name for name in (tmp_path / "cd").iterdir() if name.is_dir())
    file = next(file for file in inner.rglob("*") if file.is_file())
    file.unlink()
    file.symlink_to(stolen)
    (reason, is_error) = reasons([path], tmp_path / "out")[file.name]
    assert is_error
    assert "which leads out of its folder" in reason


def test_what_a_dicomdir_names_must_be_a_regular_file(tmp_path):
    path = write_dicomdir(tmp_path / "cd")
    first, second = [file for file in sorted((tmp_path / "cd").rglob("*")) if file.is_file() and file != path][:2]
    for file in (first, second):
        file.unlink()
    os.mkfifo(first)
    second.symlink_to(second.name)
    reason_by_name = reasons([path], tmp_path / "out")
    assert "which is no file" in reason_by_name[first.name][0]
    assert reason_by_name[first.name][1]
    assert any(
        "which is no name of a file" in reason or "Too many levels" in reason for reason, _ in reason_by_name.values()
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MAX_RECORDS", 2, "has more than 2 records"),
        ("DEFLATED", EXPLICIT_LITTLE, "it is deflated"),  # the syntax that the file has stands for it
    ],
)
def test_a_dicomdir_that_would_take_much_memory_is_refused(tmp_path, monkeypatch, name, value, words):
    path = write_dicomdir(tmp_path / "cd")
    monkeypatch.setattr(media_directory, name, value)
    (reason, is_error) = reasons([path], tmp_path / "out")["DICOMDIR"]
    assert is_error
    assert words in reason
