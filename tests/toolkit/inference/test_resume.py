"""A record is believed only if its user wrote it, and it says of nothing but its own image's files."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from medseg_trt.files import sha256
from medseg_trt.inference.record_seal import KEY_FILE, record_key, seal, state_folder
from medseg_trt.inference.resume import OVERLAYS, RECORDS_FOLDER, SEAL, Record, load_record, overlay_path, save_record

STEM = "a"
KEY = bytes(range(32))


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
    save_record(tmp_path, STEM, finished, KEY)
    assert load_record(tmp_path, STEM, "key", KEY) == finished
    assert load_record(tmp_path, STEM, "other key", KEY) is None
    return tmp_path / RECORDS_FOLDER / "a.json"


def group_may_write(record: Path) -> None:
    record.chmod(0o664)


def anyone_may_write(record: Path) -> None:
    record.chmod(0o646)


def another_user(record: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only the administrator can give files away")
    os.chown(record, 65534, -1)


@pytest.mark.parametrize("change", [group_may_write, anyone_may_write, another_user])
def test_record_writable_by_others_is_ignored_with_a_warning(record, change, caplog):
    change(record)
    assert load_record(record.parents[1], STEM, "key", KEY) is None
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
@pytest.mark.parametrize("name", [f"{RECORDS_FOLDER}/a.json", "a.png", f"{OVERLAYS}/a.png"])
def test_record_or_mask_that_is_no_regular_file_is_ignored(record, change: Callable[[Path], None], name):
    change(record.parents[1] / name)
    assert load_record(record.parents[1], STEM, "key", KEY) is None


@pytest.mark.parametrize(
    "changes", [{"mask_suffix": "/../../secret"}, {"mask_suffix": ".exe"}, {"files": {}}, {"key": 5}, {"areas": [[1]]}]
)
def test_a_record_names_no_other_file_and_has_no_other_fields(record, changes):
    fields = json.loads(record.read_text()) | changes
    del fields[SEAL]
    record.write_text(json.dumps({**fields, SEAL: seal(KEY, json.dumps([STEM, fields], sort_keys=True).encode())}))
    assert load_record(record.parents[1], STEM, "key", KEY) is None


def test_record_is_written_with_mode_0644_despite_umask_0(tmp_path, record):
    finished = load_record(tmp_path, STEM, "key", KEY)
    assert finished is not None
    before = os.umask(0)
    try:
        save_record(tmp_path, STEM, replace(finished, key="new"), KEY)
    finally:
        os.umask(before)
    assert stat.S_IMODE(record.stat().st_mode) == 0o644
    assert load_record(tmp_path, STEM, "new", KEY) is not None


@pytest.mark.parametrize("stem", ["b" * 251, "ü" * 125, "M\udcfcller"])
def test_every_name_whose_mask_fits_has_a_record(tmp_path, record, stem):
    finished = load_record(tmp_path, STEM, "key", KEY)
    assert finished is not None
    (tmp_path / "a.png").rename(tmp_path / f"{stem}.png")
    overlay_path(tmp_path, STEM).rename(overlay_path(tmp_path, stem))
    save_record(tmp_path, stem, finished, KEY)
    assert load_record(tmp_path, stem, "key", KEY) == finished
    assert len(list((tmp_path / RECORDS_FOLDER).iterdir())) == 2


def without_seal(fields: dict) -> None:
    del fields[SEAL]


def other_key(fields: dict) -> None:
    rest = {name: value for name, value in fields.items() if name != SEAL}
    fields[SEAL] = seal(bytes(32), json.dumps([STEM, rest], sort_keys=True).encode())


def changed_areas(fields: dict) -> None:
    fields["areas"] = [["a.png", "disc", "1", "6", "", ""]]


def no_text(fields: dict) -> None:
    fields[SEAL] = 5


@pytest.mark.parametrize("change", [without_seal, other_key, changed_areas, no_text])
def test_record_without_a_valid_seal_of_the_user_is_ignored(record, change: Callable[[dict], None], caplog):
    """Its files belong to this user, as after unpacking an archive, and its mask has the right digest."""
    fields = json.loads(record.read_text())
    change(fields)
    record.write_text(json.dumps(fields))
    assert load_record(record.parents[1], STEM, "key", KEY) is None
    assert "was not written by a run of this user on this machine" in caplog.text


def test_a_record_is_of_one_image(tmp_path, record):
    """Copied to another image's name, with that image's key inside, it would keep a wrong mask."""
    for name in ("{}.png", f"{OVERLAYS}/{{}}.png", f"{RECORDS_FOLDER}/{{}}.json"):
        (tmp_path / name.format("b")).write_bytes((tmp_path / name.format("a")).read_bytes())
    assert load_record(tmp_path, "b", "key", KEY) is None


def test_a_users_key_is_made_once_and_only_that_user_reads_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = record_key()
    path = state_folder() / KEY_FILE
    assert len(first) == 32
    assert record_key() == first == path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == [KEY_FILE]
    path.chmod(0o644)
    assert record_key() != first
    assert "may be known to others" in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_record_key_that_cannot_be_stored_is_temporary_with_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert record_key() != record_key()
    assert "this run cannot be continued later" in caplog.text
