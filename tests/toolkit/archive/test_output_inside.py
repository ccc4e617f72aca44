"""What is named is used or refused; masks lie in the output alone, and replace no input, wherever that lies."""

import zipfile
from pathlib import Path

import pytest
from archive_runs import content, planned, reasons, refused, save_picture, segment_tree
from dicoms import CT
from infer_folder import infer_to_folder
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID

from medseg_trt.archive import plan as plan_module
from medseg_trt.errors import InputError, UsageError
from medseg_trt.imaging.formats.dicom_file import EXPLICIT_LITTLE

pytestmark = pytest.mark.filterwarnings("ignore:.*for VR CS")


def write_dicomdir(folder: Path, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a DICOMDIR that names one file; its name need not be one that the standard allows."""
    monkeypatch.setattr(config.settings, "writing_validation_mode", config.WARN)
    record, directory = Dataset(), Dataset()
    record.ReferencedFileID = parts
    directory.DirectoryRecordSequence = [record]
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = UID(EXPLICIT_LITTLE)
    directory.file_meta.MediaStorageSOPClassUID = UID(CT)
    directory.file_meta.MediaStorageSOPInstanceUID = UID("1.2")
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return folder / "DICOMDIR"


@pytest.mark.parametrize("start", [["..", "cd"], ["sub", "..", "..", "cd"], None])
def test_a_dicomdir_names_no_file_by_a_path_that_leads_out_of_the_output(tmp_path, monkeypatch, start):
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / "cd" / "a.png")
    (tmp_path / "cd" / "sub").mkdir()
    parts = [*(start if start is not None else ["", *(tmp_path / "cd").parts[1:]]), "a.png"]
    path = write_dicomdir(Path("cd"), parts, monkeypatch)
    assert planned([path], Path("masks")) == {}
    ((reason, is_error),) = reasons([path], Path("masks")).values()
    assert is_error
    assert "leads out of its folder" in reason
    write_dicomdir(Path("cd"), ["a.png"], monkeypatch)
    assert planned([path], Path("masks")) == {"a": ("a.png",)}


@pytest.mark.parametrize("asked", ["folder", "pattern", "link"])
def test_an_output_folder_among_the_inputs_that_holds_images_is_refused(tiny_bundle, tmp_path, asked):
    archive = tmp_path / "archive"
    save_picture(archive / "scan.png", 1)
    save_picture(archive / "p1" / "scan.png", 2)
    (tmp_path / "link").symlink_to(archive)
    inputs = {"folder": archive, "pattern": archive / "**" / "*.png", "link": tmp_path / "link"}
    before = content(archive)
    with pytest.raises(UsageError, match=r"p1 lies in the folder of the images .* such as -o .*p1/masks$"):
        segment_tree([inputs[asked]], tiny_bundle, archive / "p1")
    assert content(archive) == before


def test_an_output_folder_among_the_inputs_that_holds_masks_or_nothing_is_not_listed(tiny_bundle, tmp_path):
    archive = tmp_path / "archive"
    (archive / "masks").mkdir(parents=True)
    with pytest.raises(InputError, match="hold no image"):
        segment_tree([archive], tiny_bundle, archive / "masks")  # it writes skipped.csv
    save_picture(archive / "scan.png", 1)
    for _ in range(2):
        assert segment_tree([archive], tiny_bundle, archive / "masks").num_masks == 1
    (archive / "masks" / "areas.csv").unlink()
    assert segment_tree([archive], tiny_bundle, archive / "masks").num_masks == 1


def test_a_run_that_writes_its_first_mask_has_marked_its_folder(tiny_bundle, tmp_path, monkeypatch):
    archive = tmp_path / "archive"
    save_picture(archive / "scan.png", 1)
    held: list[dict[str, tuple[str, ...]]] = []

    def save_record(*_: object) -> None:  # another run lists the inputs between a mask and its record
        assert (archive / "masks" / "scan.png").exists()
        held.append(planned([archive], archive / "masks"))

    monkeypatch.setattr("medseg_trt.inference.to_folder.save_record", save_record)
    segment_tree([archive], tiny_bundle, archive / "masks")
    assert held == [{"scan": ("scan.png",)}]


def test_masks_that_another_part_writes_meanwhile_are_no_images(tmp_path, monkeypatch):
    archive = tmp_path / "archive"
    save_picture(archive / "scan.png", 1)
    (archive / "old").symlink_to(archive / "masks" / "sub")

    def open_index(key: str, real=plan_module.open_index):  # it waits for the first part
        (archive / "masks" / ".finished").mkdir(parents=True, exist_ok=True)
        save_picture(archive / "masks" / "sub" / "scan.png", 2)
        return real(key)

    monkeypatch.setattr(plan_module, "open_index", open_index)
    for _ in range(2):  # the second has the link alone to go by
        assert planned([archive], archive / "masks") == {"scan": ("scan.png",)}


def test_inputs_that_are_named_and_cannot_be_used_are_refused(tiny_bundle, tmp_path):
    broken, notes, image = tmp_path / "broken.zip", tmp_path / "notes.txt", save_picture(tmp_path / "a.png")
    broken.write_text("<html>")
    notes.write_text("no image")
    errors: list[str] = []
    inputs = [broken, notes, image]
    written = segment_tree(inputs, tiny_bundle, tmp_path / "out", on_error=lambda _, error: errors.append(str(error)))
    assert errors == [f"{broken} is no zip file, whatever its name says", f"{notes}: of another kind"]
    assert (written.num_masks, written.num_left_out, len(written.refused)) == (1, 0, 2)
    (tmp_path / "in").mkdir()
    for file in inputs:
        file.rename(tmp_path / "in" / file.name)
    assert {is_error for _, is_error in reasons([tmp_path / "in"], tmp_path / "out").values()} == {False}


def test_a_pattern_names_archive_files_and_dicomdirs(tmp_path, monkeypatch):
    image = save_picture(tmp_path / "in" / "cd1" / "a.png")
    with zipfile.ZipFile(tmp_path / "in" / "z1.zip", "w") as archive:
        archive.write(image, "p/x.png")
    (tmp_path / "in" / "z2.zip").write_text("<html>")
    write_dicomdir(tmp_path / "in" / "cd1", ["a.png"], monkeypatch)
    out = tmp_path / "out"
    assert planned([tmp_path / "in" / "z*.zip"], out) == {"p/x": ("x.png",)}
    (reason, is_error) = reasons([tmp_path / "in" / "z*.zip"], out)["z2.zip"]
    assert is_error
    assert "z2.zip is no zip file" in reason
    assert planned([tmp_path / "in" / "cd*" / "DICOMDIR"], out) == {"cd1/a": ("a.png",)}
    assert planned([tmp_path / "in" / "**"], out) == {"cd1/a": ("a.png",)}


@pytest.mark.parametrize("segment", [segment_tree, infer_to_folder])
def test_an_output_folder_that_is_a_loop_of_links_is_refused(tiny_bundle, tmp_path, segment):
    (tmp_path / "loop").symlink_to("loop")
    image = save_picture(tmp_path / "a.png")
    with pytest.raises((UsageError, FileExistsError), match="loop"):
        segment([image], tiny_bundle, tmp_path / "loop", on_error=refused)
