"""The spool: what is full or damaged is refused, what is done expires, what was never acknowledged goes."""

import os
import sqlite3
import time
from io import BytesIO

import numpy as np
import pydicom
import pytest
from dicoms import AXIAL, save_series

from medseg_trt.errors import UsageError
from medseg_trt.serve.jobs import JobRunner
from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.objects import RefusedError, accept
from medseg_trt.serve.settings import Limits
from medseg_trt.serve.spool import DATABASE, FullError, Job, Send, Spool
from medseg_trt.serve.uploads import UPLOAD


@pytest.fixture
def spool(tmp_path):
    opened = Spool(tmp_path / "spool", 0)
    yield opened
    opened.close()


@pytest.fixture
def contents(tmp_path) -> list[bytes]:
    save_series(tmp_path / "ct", np.arange(60, dtype=np.int16).reshape(3, 4, 5), AXIAL, StudyInstanceUID="1.2.3")
    return [path.read_bytes() for path in sorted((tmp_path / "ct").iterdir())]


def job(name: str, **changes) -> Job:
    return Job(**({"id": name, "kind": "http", "model": "m", "state": "queued", "created": time.time()} | changes))


def taken(spool: Spool) -> str | None:
    job = spool.next_job()
    return None if job is None else job.id


def test_a_second_server_and_another_version_are_refused(spool, tmp_path):
    with pytest.raises(UsageError, match="in use"):
        Spool(spool.folder, 0)
    (tmp_path / "other").mkdir()
    with sqlite3.connect(tmp_path / "other" / DATABASE) as database:
        database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(UsageError, match="another version"):
        Spool(tmp_path / "other", 0)


def test_jobs_run_in_order_and_running_ones_are_queued_again(tmp_path):
    spool = Spool(tmp_path / "spool", 0)
    assert spool.add_job(job("b", created=2.0))
    assert spool.add_job(job("a", created=1.0))
    assert not spool.add_job(job("a"))
    assert taken(spool) == "a"
    spool.close()
    spool = Spool(tmp_path / "spool", 0)
    assert [taken(spool), taken(spool), taken(spool)] == ["a", "b", None]
    with pytest.raises(FullError):
        spool.add_job(job("c"), max_open=2)
    spool.close()


def test_a_full_disk_accepts_nothing_and_loses_nothing(contents, tmp_path, monkeypatch):
    spool = Spool(tmp_path / "spool", 0)
    kept = accept(spool, contents[0])
    spool.close()
    spool = Spool(tmp_path / "spool", 1 << 62)
    with pytest.raises(FullError):
        accept(spool, contents[1])
    spool.close()
    spool = Spool(tmp_path / "spool", 0)

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(FullError):
            accept(spool, contents[1])
    assert [instance.uid for instance in spool.instances()] == [kept.uid]
    assert os.listdir(spool.folder / "objects") == [f"{kept.sha256}.dcm"]
    spool.close()


def test_an_object_is_accepted_twice_and_another_with_its_uid_is_not(spool, contents):
    first = accept(spool, contents[0])
    assert accept(spool, contents[0]) == first
    dataset = pydicom.dcmread(BytesIO(contents[0]))
    dataset.PixelData = bytes(len(dataset.PixelData))
    buffer = BytesIO()
    dataset.save_as(buffer)
    with pytest.raises(RefusedError, match="another object"):
        accept(spool, buffer.getvalue())
    with pytest.raises(RefusedError, match="other UIDs than were announced"):
        accept(spool, contents[1], ("1.2", "1.2"))


def test_a_seeded_stream_of_damaged_objects_never_gets_in(spool, contents):
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(contents[0])
        for position in rng.integers(0, len(damaged), 8):
            damaged[position] = rng.integers(0, 256)
        damaged = damaged[: rng.integers(1, len(damaged) + 1)]
        try:
            accept(spool, bytes(damaged))
        except RefusedError:
            continue
    for instance in spool.instances():
        assert (spool.folder / instance.file).is_file()
    accept(spool, contents[1])


def test_results_expire_unless_they_must_still_be_sent(spool):
    runner = JobRunner(spool, {}, Limits(keep_s=0.0), Metrics())
    spool.add_job(job("old"))
    spool.add_job(job("unsent"))
    for _ in range(2):
        spool.next_job()
    spool.finish("old", None)
    spool.finish("unsent", None, [("A@b:1", "file")])
    time.sleep(0.01)
    runner._sweep()
    assert [left.id for left in spool.jobs()] == ["unsent"]
    (send,) = spool.sends("A@b:1")
    assert send == Send(job="unsent", destination="A@b:1", file="file", attempts=0, next=0.0)
    spool.postpone(send, time.time() + 60)
    assert spool.sends("A@b:1")[0].attempts == 1
    spool.sent(send)
    assert spool.sends("A@b:1") == []
    runner._sweep()
    assert spool.jobs() == []


def test_a_job_whose_result_must_still_be_sent_is_not_removed(spool):
    runner = JobRunner(spool, {}, Limits(), Metrics())
    spool.add_job(job("unsent"))
    spool.next_job()
    spool.finish("unsent", None, [("A@b:1", "file")])
    assert not runner.cancel("unsent")
    assert [left.id for left in spool.jobs()] == ["unsent"]
    (send,) = spool.sends("A@b:1")
    spool.sent(send)
    assert runner.cancel("unsent")
    assert spool.jobs() == []
    assert runner.cancel("unsent")  # gone already


def test_files_that_were_never_acknowledged_are_removed_at_the_start(spool, contents):
    kept = accept(spool, contents[0])
    (spool.folder / "objects" / "orphan.dcm").write_bytes(b"x")
    (spool.job_folder("0" * 32)).mkdir(parents=True)
    runner = JobRunner(spool, {}, Limits(), Metrics())
    runner.start()
    runner.stop(time.monotonic() + 10)
    assert os.listdir(spool.folder / "objects") == [f"{kept.sha256}.dcm"]
    assert os.listdir(spool.folder / "jobs") == []


def failing_once(function):
    """Return a function that fails as on a full disk, and from then on does what it should."""
    calls: list[tuple] = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise sqlite3.OperationalError("database or disk is full")
        return function(*arguments)

    return call


@pytest.mark.parametrize("failing", ["finish", "next_job", "sweep"])
def test_a_spool_that_fails_for_a_moment_leaves_no_job_behind(spool, failing, monkeypatch):
    """A job that cannot be noted as finished would run for ever, and without the thread none would run."""
    runner = JobRunner(spool, {}, Limits(), Metrics())
    owner, name = (runner, "_sweep") if failing == "sweep" else (spool, failing)
    monkeypatch.setattr(owner, name, failing_once(getattr(owner, name)))
    spool.add_job(job("waiting"))
    runner.start()
    deadline = time.monotonic() + 10
    while (waiting := spool.job("waiting")) is not None and waiting.finished is None:
        assert time.monotonic() < deadline, waiting
        time.sleep(0.05)
    runner.stop(time.monotonic() + 10)
    assert waiting is not None
    assert waiting.error == "the model 'm' is not served any more"


class KilledError(BaseException):
    """Stands for a kill at this instant."""


def test_an_upload_stays_until_its_job_is_noted_as_finished(spool, monkeypatch):
    """A kill between the two would leave an accepted job without its image."""
    upload = spool.job_folder("killed") / UPLOAD
    upload.parent.mkdir(parents=True)
    upload.write_bytes(b"not an image")
    spool.add_job(job("killed"))
    runner = JobRunner(spool, {}, Limits(), Metrics())
    finish = spool.finish

    def killed(*_arguments) -> None:
        raise KilledError

    monkeypatch.setattr(spool, "finish", killed)
    with pytest.raises(KilledError):
        runner._run(spool.next_job())
    assert upload.is_file()
    monkeypatch.setattr(spool, "finish", finish)
    runner._run(spool.job("killed"))
    assert not upload.exists()


def test_the_upload_of_a_finished_job_is_removed_at_the_start(spool):
    upload = spool.job_folder("killed") / UPLOAD
    upload.parent.mkdir(parents=True)
    upload.write_bytes(b"an image")
    spool.add_job(job("killed"))
    spool.next_job()
    spool.finish("killed", None)
    runner = JobRunner(spool, {}, Limits(), Metrics())
    runner.start()
    runner.stop(time.monotonic() + 10)
    assert not upload.exists()
    assert [left.id for left in spool.jobs()] == ["killed"]
