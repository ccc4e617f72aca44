"""Everything in a folder but hidden files is an image, is refused, or is left out with a reason."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dicoms import dataset, save, save_series
from pydicom.uid import GrayscaleSoftcopyPresentationStateStorage

from medseg_trt.errors import InputError
from medseg_trt.imaging import listing
from medseg_trt.imaging.images import find_images
from medseg_trt.imaging.listing import (
    CLOSED,
    DEEPER,
    DICOM_WITHOUT_IMAGE,
    IRREGULAR,
    OTHER_KIND,
    UNSEEN,
    Listing,
    list_images,
    sources_in,
)

NOBODY = 65534


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(listing: Listing, root: Path) -> dict[str, list[str]]:
    """Return all that was found below ``root``, relative to it, by what became of it."""
    became: dict[str, list[str]] = {}
    for source in listing.sources:
        became.setdefault("images", []).append(source.path.relative_to(root).as_posix())
    for refused in listing.refused:
        became.setdefault("refused", []).append(refused.path.relative_to(root).as_posix())
    for item in listing.left_out:
        became.setdefault(item.reason, []).append(f"{item.path.relative_to(root).as_posix()} {item.count}")
    return became


def scan(folder: Path) -> Path:
    """Write a DICOM series without suffixes and return its folder."""
    return save_series(folder, np.zeros((3, 8, 8), np.int16))


def test_every_folder_entry_is_listed_as_image_refused_or_left_out(tmp_path):
    touch(
        tmp_path, "a.png", "b.webp", "notes", ".hidden.png", "more/b.png", "more/c.nii.gz", "more/deep/d.png", "x/y.txt"
    )
    scan(tmp_path / "ct")
    scan(tmp_path / "study" / "ct2")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        listed = list_images([tmp_path])
    assert names(listed, tmp_path) == {
        "images": ["a.png", "ct"],
        "refused": ["gone.png", "loop.png"],
        OTHER_KIND: ["b.webp 1", "notes 1"],
        IRREGULAR: ["pipe.png 1", "s 1"],
        DEEPER: ["more 2", "more/deep 1", "study/ct2 3"],
    }
    assert listed.warnings() == [
        f"{tmp_path}: 6 image file(s) in 3 sub-folder(s) are left out; only DICOM is searched for in sub-folders, one "
        "level deep, unless infer is given --tree. To use them, name: "
        f"{tmp_path}/more {tmp_path}/more/deep {tmp_path}/study/ct2",
        f"{tmp_path}: 2 item(s) that are neither a file nor a folder are left out (pipe.png, s)",
        f"{tmp_path}: 2 file(s) of other kinds are left out (b.webp, notes); supported: "
        f"{', '.join(listing.READERS)} and DICOM",
    ]


def test_folder_advised_for_nested_dicom_series_is_usable(tmp_path):
    """The tree of a patient's disc; for several series their common folder is named, where one level is searched."""
    for number in (1, 2):
        scan(tmp_path / "DICOM" / "PA 1" / "ST1" / f"SE{number}")
    with pytest.raises(InputError, match="DICOM itself holds no image: 6 image file") as caught:
        find_images([tmp_path / "DICOM"])
    advised = Path(str(caught.value).split("name: ")[1].strip("'"))
    assert advised == tmp_path / "DICOM" / "PA 1" / "ST1"
    assert [source.stem for source in find_images([advised])] == ["SE1", "SE2"]


@pytest.mark.parametrize("target", ["nowhere", "loop.dcm"])
def test_a_broken_link_among_slices_is_refused_and_not_left_away(tmp_path, target):
    """Without the last slice the series would still be even, and its mask too short."""
    folder = scan(tmp_path / "images" / "ct")
    for name in ("loop.dcm", "without_suffix"):
        (folder / name).symlink_to(target)
    listing = list_images([tmp_path / "images"])
    assert {refused.path for refused in listing.refused} == {folder / "loop.dcm", folder / "without_suffix"}
    assert [source.path for source in listing.sources] == [folder]


def test_a_broken_link_says_what_it_leads_to_and_others_are_still_listed(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to("../.git/annex/b")
    broken = (
        f"{tmp_path}/b.png is a link to ../.git/annex/b, which does not exist; "
        "fetch or mount the target, or remove the link"
    )
    listing = list_images([tmp_path, tmp_path / "b.png", tmp_path / "absent.png", tmp_path / "a.png"])
    assert [source.path.name for source in listing.sources] == ["a.png"]
    assert [str(refused.error) for refused in listing.refused] == [
        broken,
        broken,
        f"{tmp_path}/absent.png does not exist",
    ]
    with pytest.raises(InputError, match=r"b\.png is a link to .* \(and 1 more\)"):
        find_images([tmp_path, tmp_path / "absent.png"])


def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="is neither a file nor a folder"):
        find_images([tmp_path / "a.png"])


@pytest.fixture
def ordinary_folder() -> Iterator[Path]:
    """A folder of an ordinary user, as whom the test runs: the administrator may read everything."""
    folder = Path(tempfile.mkdtemp())
    is_administrator = os.geteuid() == 0
    if is_administrator:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    yield folder
    if is_administrator:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_what_may_not_be_read_is_refused_or_warned_of_and_the_rest_is_listed(ordinary_folder):
    touch(ordinary_folder, "a.png", "b.png", "IM0001", "closed/c.png", "more/deep/d.png")
    for name in ("b.png", "IM0001", "closed", "more/deep"):
        (ordinary_folder / name).chmod(0)
    listing = list_images([ordinary_folder])
    assert names(listing, ordinary_folder) == {
        "images": ["a.png"],
        "refused": ["b.png", "IM0001"],
        CLOSED: ["closed 1", "more/deep 1"],
    }
    assert str(listing.refused[1].error) == f"{ordinary_folder}/IM0001 cannot be read: Permission denied"
    assert listing.warnings() == [
        f"{ordinary_folder}: 2 sub-folder(s) cannot be opened and are left out (closed, more/deep); "
        "check the permissions"
    ]
    for path in ("closed", "b.png"):
        with pytest.raises(InputError, match=f"{path} cannot be read: Permission denied"):
            find_images([ordinary_folder / path])


def test_of_a_data_folder_no_unreadable_file_is_left_out(ordinary_folder):
    touch(ordinary_folder, "a.png", "b.png")
    assert [source.name for source in sources_in(ordinary_folder)] == ["a.png", "b.png"]
    (ordinary_folder / "b.png").chmod(0)
    with pytest.raises(InputError, match=r"b\.png cannot be read: Permission denied"):
        sources_in(ordinary_folder)


def test_dicom_that_holds_no_image_is_left_out_by_name(tmp_path):
    folder = scan(tmp_path / "ct")
    kind = GrayscaleSoftcopyPresentationStateStorage
    save(folder / "zstate", dataset(np.zeros((8, 8), np.int16), SOPClassUID=kind, Modality="PR", PixelData=None))
    listing = list_images([folder])
    assert names(listing, folder)[DICOM_WITHOUT_IMAGE] == ["zstate 1"]
    assert listing.warnings() == []  # the reader of DICOM says what it is


def test_our_own_folders_are_no_input_under_whatever_name(tmp_path):
    touch(tmp_path, "a.png", "masks/a.png", "model.medseg/golden.npz", "masks/overlays/a.png")
    (tmp_path / "again").symlink_to("masks")
    listing = list_images([tmp_path], ignored=[tmp_path / "again", tmp_path / "model.medseg"])
    assert names(listing, tmp_path) == {"images": ["a.png"]}


def test_folder_search_follows_no_cycles_and_has_a_limit(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", *(f"more/{number}/b.png" for number in range(9)))
    (tmp_path / "more" / "0" / "up").symlink_to("../..")  # a ring
    assert len(names(list_images([tmp_path]), tmp_path)[DEEPER]) == 9
    monkeypatch.setattr(listing, "MAX_SEARCHED", 5)
    listed = list_images([tmp_path])
    assert len(names(listed, tmp_path)[UNSEEN]) == 1
    assert any("sub-folders hold more than 5 files and were not all searched" in line for line in listed.warnings())


def test_the_voxels_beside_a_detached_header_belong_to_it(tmp_path):
    touch(tmp_path, "scan.nhdr", "scan.raw.gz", "scan.raw", "other.raw")
    assert names(list_images([tmp_path]), tmp_path) == {"images": ["scan.nhdr"], OTHER_KIND: ["other.raw 1"]}


def test_a_folder_of_other_kinds_says_what_it_holds(tmp_path):
    touch(tmp_path, "a.gif", "b.mha")
    with pytest.raises(InputError, match=r"holds no image; .* or are DICOM\. It holds: 2 of another kind$"):
        find_images([tmp_path])


def test_finding_images_warns_of_what_it_leaves_out(tmp_path, caplog):
    touch(tmp_path, "a.png", "b.webp", "more/c.png")
    assert [source.name for source in find_images([tmp_path])] == ["a.png"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "name:" in caplog.text
    assert "(b.webp)" in caplog.text
