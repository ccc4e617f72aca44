"""Two trainings never write to one run folder, and a training that was killed leaves no lock behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_recipe

from medseg_trt.errors import UsageError
from medseg_trt.train import loop
from medseg_trt.train.loop import train
from medseg_trt.train.run_lock import LOCK, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from medseg_trt.train.run_lock import run_lock

with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / "run"``."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_training_in_a_folder_gets_one_line_and_changes_nothing(holder, source, tmp_path):
    data, block = source
    (tmp_path / "run" / ".partial-slices-1").mkdir()  # of the training that goes on, and not a leftover
    with pytest.raises(UsageError) as caught:
        train(tiny_recipe(), data, tmp_path / "run", block=block)
    assert str(caught.value) == (
        f"another training, process {holder.pid}, is writing to {tmp_path / 'run'}. "
        "Wait until it ends, or choose another folder with -o"
    )
    assert {path.name for path in (tmp_path / "run").iterdir()} == {LOCK, ".partial-slices-1"}


def test_a_killed_training_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).is_file()
    with run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).is_file()
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_lock_is_gone_after_a_training_and_after_an_error(source, tmp_path, no_curve, monkeypatch):
    data, block = source
    train(tiny_recipe("train.epochs=0"), data, tmp_path / "run", block=block)
    assert not (tmp_path / "run" / LOCK).exists()
    with pytest.raises(UsageError, match="holds a run already"):
        train(tiny_recipe(), data, tmp_path / "run", block=block)
    with pytest.raises(UsageError, match="needs a frozen block"):
        train(tiny_recipe(), data, tmp_path / "other")
    assert not (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "other").exists()


def test_a_training_holds_its_folder_while_it_trains(source, tmp_path, no_curve, monkeypatch):
    data, block = source
    seen = []

    def epoch(*arguments, real=loop.train_epoch):
        with pytest.raises(UsageError, match="another training"), run_lock(tmp_path / "run"):
            pass
        seen.append(True)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_epoch", epoch)
    train(tiny_recipe("train.epochs=1"), data, tmp_path / "run", block=block)
    assert seen == [True]


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """As where another training ends between our opening the file and locking it."""
    import fcntl

    removals = iter([True])

    def flock(descriptor, operation, real=fcntl.flock):
        if next(removals, False):
            (tmp_path / LOCK).unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock(tmp_path), pytest.raises(UsageError, match="another training"), run_lock(tmp_path):
        pass


def link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def hard_link(path: Path, victim: Path) -> None:
    path.hardlink_to(victim)


def dangling_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim.parent / "absent")


def note(path: Path, victim: Path) -> None:
    path.write_text("buy milk")


def fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def folder(path: Path, victim: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("plant", [link, hard_link, dangling_link, note, fifo, folder])
def test_run_lock_refuses_foreign_files_and_links(tmp_path, plant):
    run, victim = tmp_path / "run", tmp_path / "victim"
    run.mkdir()
    victim.write_text("12345\n")  # which looks like a lock, so that links to it are told by being links
    plant(run / LOCK, victim)
    before = (run / LOCK).lstat()
    with pytest.raises(UsageError, match=r"\.training was not written by a training"), run_lock(run):
        pass
    after = (run / LOCK).lstat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)
    assert victim.read_text() == "12345\n"
    assert not (tmp_path / "absent").exists()
