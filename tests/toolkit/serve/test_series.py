"""When a received series is complete: after pauses, but never while a request is storing it."""

import time

import numpy as np
import pytest
from dicoms import AXIAL, save_series

from medseg_trt.serve.jobs import JobRunner
from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.objects import accept
from medseg_trt.serve.series import POLL_S, OpenTransfers, SeriesWatcher
from medseg_trt.serve.settings import DicomSettings, Limits
from medseg_trt.serve.spool import Spool

PAUSE_S = 0.1
LONG_S = 10 * (PAUSE_S + POLL_S)  # ten times as long as a series waits


@pytest.fixture
def spool(tmp_path):
    opened = Spool(tmp_path / "spool", 0)
    yield opened
    opened.close()


def wait_for_jobs(spool: Spool, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while not spool.jobs() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return len(spool.jobs())


def watcher_of(spool: Spool, storing: OpenTransfers) -> SeriesWatcher:
    settings = DicomSettings(port=0, quiet_s=PAUSE_S, released_s=PAUSE_S, retry_s=PAUSE_S)
    runner = JobRunner(spool, {}, Limits(), Metrics())
    model = ServedModel.__new__(ServedModel)  # its bundle is not opened: a job takes its name and its digest
    for name in ("name", "digest"):
        object.__setattr__(model, name, "0")
    return SeriesWatcher(spool, runner, model, settings, storing)


def test_a_request_that_stores_slowly_makes_one_job_of_the_whole_series(spool, tmp_path):
    save_series(tmp_path / "ct", np.arange(60, dtype=np.int16).reshape(3, 4, 5), AXIAL, StudyInstanceUID="1.2.3")
    first, *others = [path.read_bytes() for path in sorted((tmp_path / "ct").iterdir())]
    storing, request = OpenTransfers(), object()
    watcher = watcher_of(spool, storing)
    watcher.start()
    try:
        series = accept(spool, first).series
        storing.note(request, series)
        assert wait_for_jobs(spool, LONG_S) == 0  # a busy machine's pause between two objects
        for content in others:
            accept(spool, content)
        storing.release(request)
        assert wait_for_jobs(spool, 60) == 1
    finally:
        watcher.stop()
    (job,) = spool.jobs()
    assert len(list((spool.job_folder(job.id) / "series").iterdir())) == 3


@pytest.mark.parametrize("broken", [0, 1])
def test_a_series_that_cannot_be_prepared_holds_up_no_other(spool, tmp_path, broken):
    accepted = []
    for number in range(2):
        folder, uid = tmp_path / f"ct{number}", f"1.2.3.{number}"
        pixels = np.full((1, 4, 5), number, np.int16)
        save_series(folder, pixels, AXIAL, StudyInstanceUID=uid, SeriesInstanceUID=f"{uid}.1")
        (path,) = folder.iterdir()
        accepted.append(accept(spool, path.read_bytes()))
    (spool.folder / accepted[broken].file).unlink()
    watcher = watcher_of(spool, OpenTransfers())
    watcher.start()
    try:
        assert wait_for_jobs(spool, 60) == 1
    finally:
        watcher.stop()
    assert [job.series for job in spool.jobs()] == [accepted[1 - broken].series]
