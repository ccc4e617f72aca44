"""What an archive holds and is not segmented has a row with the reason; nothing is lost in silence."""

import errno
import os
import tarfile
from contextlib import closing
from pathlib import Path
from tempfile import gettempdir
from typing import Any
from unittest.mock import MagicMock

import pytest
from archive_runs import planned, reasons, rows_of, save_picture, save_slices, slices
from dicoms import CT, dataset, placed, save
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from medseg_trt.archive import containers
from medseg_trt.archive.containers import Container
from medseg_trt.archive.grouping import SKIPPED
from medseg_trt.archive.plan import Skipped
from medseg_trt.archive.request import Condition
from medseg_trt.archive.skipped_table import require_own_tables, write_skipped
from medseg_trt.errors import UsageError
from medseg_trt.imaging.listing import DICOM_WITHOUT_IMAGE, OTHER_KIND

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = [f"{number}.png" for number in range(4)]
LONG = "long" * 30 + ".png"  # GNU and pax write a header of its own for it
PRIVATE = "1.3.12.2.1107.5.9.1"  # Siemens' class of objects that are not images


def tarred(tmp_path: Path, kind: str, names: list[str]) -> tuple[Path, int, int]:
    """Return a tar file, where the header of its second member is, and where its members end."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=FORMATS[kind]) as archive:
        for seed, name in enumerate(names):
            archive.add(save_picture(tmp_path / f"{seed}.png", seed), name)
        members_end = archive.offset
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    return path, second, members_end


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", ["a bit of the checksum", "cut within the header"])
def test_a_tar_file_with_a_damaged_header_is_refused(tmp_path, kind, damage):
    path, second, _ = tarred(tmp_path, kind, NAMES)
    content = bytearray(path.read_bytes())
    content[second + 149] ^= 1
    path.write_bytes(content if damage.startswith("a bit") else content[: second + 300])
    found = reasons([path], tmp_path / "out")
    assert found.keys() == {"a.tar"}
    assert found["a.tar"][1]
    assert "a header is damaged or cut short" in found["a.tar"][0]
    assert planned([path], tmp_path / "out") == {}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("end", ["as written", "no zero blocks", "part of a zero block", "more after the zero blocks"])
def test_a_complete_tar_file_is_read_however_it_ends(tmp_path, kind, end):
    names = [*NAMES, "folder/" * 20 + LONG[:90]] if kind == "ustar" else [*NAMES, LONG]
    path, _, members_end = tarred(tmp_path, kind, names)
    content = path.read_bytes()
    endings = {
        "as written": content,
        "no zero blocks": content[:members_end],
        "part of a zero block": content[: members_end + 100],
        "more after the zero blocks": content + b"x" * 512,
    }
    path.write_bytes(endings[end])
    with closing(Container(path)) as container:
        assert [member.name for member in container.members()] == names


def pixelless(path: Path, **elements: Any) -> Path:
    """Write a private object that holds no pixels, as scanners add to their series."""
    described = dataset(slices(0)[0], SOPClassUID=PRIVATE, Rows=None, Columns=None, PixelData=None, **elements)
    return save(path, described)


def test_dicom_without_pixels_has_a_row_at_every_run(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    save_slices([folder / "ct" / str(index) for index in range(3)], slices(4))
    pixelless(folder / "ct" / "private")
    row = {"private": (DICOM_WITHOUT_IMAGE, False)}
    for _ in range(2):
        assert reasons([folder], out) == row
        assert planned([folder], out) == {"ct": ("0", "1", "2")}
    save_picture(folder / "ct" / "new.png")  # the folder is grouped again
    assert reasons([folder], out) == row
    (folder / "ct" / "private").unlink()
    assert reasons([folder], out) == {}


def test_dicom_without_pixels_in_a_series_over_several_folders_has_a_row(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    save_slices([folder / "a" / str(index) for index in range(3)], slices(4), StudyInstanceUID="1.2.3")
    pixelless(folder / "b" / "private", StudyInstanceUID="1.2.3", **placed(corner=(1, 2, 3)))
    first = planned([folder], out)
    assert [*first.values()] == [("0", "1", "2")]
    assert reasons([folder], out) == {"private": (DICOM_WITHOUT_IMAGE, False)}
    save_picture(folder / "new.png")  # all is grouped again
    assert planned([folder], out) == first | {"new": ("new.png",)}
    assert reasons([folder], out) == {"private": (DICOM_WITHOUT_IMAGE, False)}


def test_the_voxels_of_a_header_that_was_removed_have_a_row(tmp_path):
    folder = tmp_path / "in"
    save_picture(folder / "a.png")
    (folder / "v.raw").write_bytes(bytes(16))
    header = folder / "v.nhdr"
    header.write_text("NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\ndata file: v.raw\n", "ascii")
    assert reasons([folder], tmp_path / "out") == {}
    header.unlink()
    assert reasons([folder], tmp_path / "out") == {"v.raw": (OTHER_KIND, False)}


def test_conditions_hold_for_attributes_of_the_file_meta_information(tmp_path):
    save_slices([tmp_path / "in" / "ct" / str(index) for index in range(3)], slices(4))
    for uid, found in ((ExplicitVRLittleEndian, ["ct"]), (JPEG2000Lossless, [])):
        where = (Condition.parse(f"TransferSyntaxUID={uid}"), Condition.parse(f"MediaStorageSOPClassUID={CT}"))
        assert [*planned([tmp_path / "in"], tmp_path / "out", where=where)] == found


def test_a_table_with_the_longest_lines_is_replaced_by_the_next_run(tmp_path):
    long = "é\x1b" * 200_000
    write_skipped(tmp_path, [Skipped(file=long, reason=f"{long} is too long", refused=True)])
    require_own_tables(tmp_path)
    (row,) = rows_of(tmp_path / SKIPPED)
    assert row["file"].startswith("é\\x1bé")
    assert row["reason"].startswith("é\\x1bé")
    assert row["reason"].endswith("é\\x1b is too long")


@pytest.mark.parametrize("records", [False, True])
def test_a_dicomdir_that_names_no_file_is_refused(tmp_path, records):
    described = dataset(slices(0)[0])
    if records:
        described.DirectoryRecordSequence = Sequence([Dataset()])
    path = save(tmp_path / "cd" / "DICOMDIR", described)
    (reason, is_error) = reasons([path], tmp_path / "out")["DICOMDIR"]
    assert is_error
    assert reason == f"{path} names no file; give its folder with --tree, or rename it if it is an image"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_no_space_for_a_copy_of_a_member_is_not_called_damage(tmp_path, monkeypatch, code):
    path, _, _ = tarred(tmp_path, "gnu", NAMES)
    monkeypatch.setattr(containers, "_copy", MagicMock(side_effect=OSError(code, os.strerror(code))))
    with closing(Container(path)) as container, pytest.raises(UsageError) as caught:
        container.copy("0.png", tmp_path / "copy")
    assert str(caught.value) == (
        f"no copy of {path}/0.png can be written into {gettempdir()}: {os.strerror(code)}; free some space, or choose "
        "another folder with TMPDIR"
    )
