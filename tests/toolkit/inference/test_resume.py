"""A record is believed only if its user wrote it, and it says of nothing but its own image's files."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medseg_trt.files import sha256
from medseg_trt.inference.resume import FOLDER, OVERLAYS, Record, load_record, overlay_path, save_record

STEM = "a"


@pytest.fixture
def record(tmp_path) -> Path:
    """The record of an image whose mask and overlay are there."""
    (tmp_path / "a.png").write_bytes(b"mask")
    (tmp_path / OVERLAYS).mkdir()
    overlay_path(tmp_path, STEM).write_bytes(b"overlay")
    finished = Record(
        key="key",
        mask_suffix=".png",
        mask_sha256=sha256(tmp_path / "a.png"),
        overlay_sha256=sha256(overlay_path(tmp_path, STEM)),
        areas=(("a.png", "disc", "1", "5", "", ""),),
    )
    save_record(tmp_path, STEM, finished)
    assert load_record(tmp_path, STEM, "key") == finished
    assert load_record(tmp_path, STEM, "other key") is None
    return tmp_path / FOLDER / "a.json"


def group_may_write(record: Path) -> None:
    record.chmod(0o664)


def anyone_may_write(record: Path) -> None:
    record.chmod(0o646)


def another_user(record: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only the administrator can give files away")
    os.chown(record, 65534, -1)


@pytest.mark.parametrize("change", [group_may_write, anyone_may_write, another_user])
def test_what_others_may_have_written_is_not_believed_and_said(record, change, caplog):
    change(record)
    assert load_record(record.parents[1], STEM, "key") is None
    assert "may have been written by others, so its image is segmented again" in caplog.text


def linked(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("change", [linked, fifo, folder])
@pytest.mark.parametrize("name", [f"{FOLDER}/a.json", "a.png", f"{OVERLAYS}/a.png"])
def test_only_regular_files_are_read(record, change: Callable[[Path], None], name):
    change(record.parents[1] / name)
    assert load_record(record.parents[1], STEM, "key") is None


@pytest.mark.parametrize(
    "changes", [{"mask_suffix": "/../../secret"}, {"mask_suffix": ".exe"}, {"files": {}}, {"key": 5}, {"areas": [[1]]}]
)
def test_a_record_names_no_other_file_and_has_no_other_fields(record, changes):
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    assert load_record(record.parents[1], STEM, "key") is None


def test_records_can_be_believed_whatever_the_umask(tmp_path, record):
    finished = load_record(tmp_path, STEM, "key")
    assert finished is not None
    before = os.umask(0)
    try:
        save_record(tmp_path, STEM, replace(finished, key="new"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(record.stat().st_mode) == 0o644
    assert load_record(tmp_path, STEM, "new") is not None


@pytest.mark.parametrize("stem", ["b" * 251, "ü" * 125, "M\udcfcller"])
def test_every_name_whose_mask_fits_has_a_record(tmp_path, record, stem):
    finished = load_record(tmp_path, STEM, "key")
    assert finished is not None
    (tmp_path / "a.png").rename(tmp_path / f"{stem}.png")
    overlay_path(tmp_path, STEM).rename(overlay_path(tmp_path, stem))
    save_record(tmp_path, stem, finished)
    assert load_record(tmp_path, stem, "key") == finished
    assert len(list((tmp_path / FOLDER).iterdir())) == 2
