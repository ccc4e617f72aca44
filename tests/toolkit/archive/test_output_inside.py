"""Masks are written only into the output folder, and replace no input, however inputs and output lie in each other."""

from pathlib import Path

import pytest
from archive_runs import planned, reasons, save_picture
from dicoms import CT
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset

from medseg_trt.imaging.formats.dicom_file import EXPLICIT_LITTLE


def write_dicomdir(folder: Path, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a DICOMDIR that names one file; its name need not be one that the standard allows."""
    monkeypatch.setattr(config.settings, "writing_validation_mode", config.WARN)
    record, directory = Dataset(), Dataset()
    record.ReferencedFileID = parts
    directory.DirectoryRecordSequence = [record]
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = EXPLICIT_LITTLE
    directory.file_meta.MediaStorageSOPClassUID = CT
    directory.file_meta.MediaStorageSOPInstanceUID = "1.2"
    directory.save_as(folder / "DICOMDIR", enforce_file_format=True)
    return folder / "DICOMDIR"


@pytest.mark.filterwarnings("ignore:.*for VR CS")
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
