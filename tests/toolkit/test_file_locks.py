"""What a living process is writing stays; what a dead one left goes; a folder has one holder at a time."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny import write_pictures

from medseg_trt import files
from medseg_trt.errors import UsageError
from medseg_trt.files import atomic_file, folder_lock, remove_abandoned
from medseg_trt.inference.resume import OVERLAYS, RECORDS_FOLDER, remove_leftovers

WRITER = """
import sys, time
from pathlib import Path
from medseg_trt.files import atomic_file

with atomic_file(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    time.sleep(60)
"""
HOLDER = """
import sys, time
from pathlib import Path
from medseg_trt.files import folder_lock

with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def process(program: str, argument: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a program until the block ends, and yield the first line that it says."""
    command = [sys.executable, "-c", program, str(argument)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        try:
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


def test_a_temporary_file_stays_while_its_process_lives_and_goes_when_it_was_killed(tmp_path):
    with process(WRITER, tmp_path / "mask.nii.gz") as (writer, name):
        assert name.startswith(".partial-")
        remove_leftovers(tmp_path)
        assert (tmp_path / name).read_text() == "half"
        writer.kill()
        writer.wait()
        assert (tmp_path / name).exists()
        remove_leftovers(tmp_path)
        assert not (tmp_path / name).exists()


def test_a_run_loses_nothing_while_leftovers_are_removed_beside_it(tiny_bundle, tmp_path):
    """As another ``infer --continue`` into the same folder does at its start, here without a pause."""
    data, out = write_pictures(tmp_path / "data", count=30, size=(64, 64)) / "images", tmp_path / "out"
    command = [sys.executable, "-m", "medseg_trt", "infer", data, "--bundle", tiny_bundle, "-o", out, "--overlay"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        while running.poll() is None:
            remove_leftovers(out)
        assert running.stderr is not None
        assert running.returncode == 0, running.stderr.read()
    for folder, suffix in ((out, ".png"), (out / OVERLAYS, ".png"), (out / RECORDS_FOLDER, ".json")):
        assert len(list(folder.glob(f"case*{suffix}"))) == 30
        assert list(folder.glob(".partial-*")) == []


def test_only_leftovers_in_our_own_folders_go(tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out / RECORDS_FOLDER, out / "mine", elsewhere):
        folder.mkdir(parents=True)
    (out / OVERLAYS).symlink_to(elsewhere)
    for folder in (out, out / RECORDS_FOLDER, out / "mine", elsewhere):
        (folder / ".partial-1").touch()
    (out / ".partial-link").symlink_to(elsewhere / ".partial-1")
    (out / ".partial-folder").mkdir()
    os.mkfifo(out / ".partial-fifo")
    remove_leftovers(out)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".partial-*")}
    assert left == {
        "out/mine/.partial-1",
        "elsewhere/.partial-1",
        "out/.partial-link",
        "out/.partial-folder",
        "out/.partial-fifo",
    }


def no_locks(descriptor: int, *, wait: bool = False) -> bool:
    raise OSError(38, "Function not implemented")


def test_without_locks_files_are_written_and_leftovers_stay(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "lock", no_locks)
    (tmp_path / ".partial-1").touch()
    with atomic_file(tmp_path / "a") as temporary:
        temporary.touch()
        assert not remove_abandoned(temporary)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", ".partial-1"}
    with folder_lock(tmp_path):
        assert "cannot be locked (Function not implemented); let no two commands write to it at once" in caplog.text


def test_a_temporary_file_that_was_removed_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    removals = iter([True])

    def late(descriptor, *, wait=False, real=files.lock):
        if next(removals, False):
            (path,) = tmp_path.glob(".partial-*")
            assert remove_abandoned(path)
        return real(descriptor, wait=wait)

    monkeypatch.setattr(files, "lock", late)
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("whole")
        assert not remove_abandoned(temporary)
    assert (tmp_path / "a").read_text() == "whole"


def test_a_folder_has_one_holder_who_is_waited_for(tmp_path, monkeypatch):
    with process(HOLDER, tmp_path) as (holder, said):
        assert said == "held"
        monkeypatch.setattr(files, "FOLDER_WAIT_S", 0.1)
        with pytest.raises(UsageError, match="is locked by another process"), folder_lock(tmp_path):
            pass
        monkeypatch.setattr(files, "FOLDER_WAIT_S", 60.0)
        monkeypatch.setattr(time, "sleep", lambda _: holder.kill())  # it dies while we wait
        with folder_lock(tmp_path):
            holder.wait()
    assert list(tmp_path.iterdir()) == []
