"""When a series is complete, and how it becomes a job.

A job is named after its objects and its bundle: the same objects make the same job, and objects that arrive later make
a new one of the whole series, whose segmentation has other UIDs.
"""

import hashlib
import logging
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

from medseg_trt.serve.jobs import DICOM_JOB, SERIES, JobRunner
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.settings import DicomSettings
from medseg_trt.serve.spool import Job, Spool

LOG = logging.getLogger("medseg_trt.serve")
POLL_S = 0.1
ID_LENGTH = 32


class OpenTransfers:
    """The series that open associations or requests have brought; threads may share it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._series: dict[object, set[str]] = {}  # by association or request

    def note(self, transfer: object, series: str) -> None:
        """Note that a transfer has brought an object of a series."""
        with self._mutex:
            self._series.setdefault(transfer, set()).add(series)

    def release(self, transfer: object) -> None:
        """Note the end of a transfer, however it ended."""
        with self._mutex:
            self._series.pop(transfer, None)

    def series(self) -> set[str]:
        """Return the series of all open transfers."""
        with self._mutex:
            return set[str]().union(*self._series.values())


class SeriesWatcher:
    """Turns received series into jobs, in a thread.

    A series is complete a short time after the end of its associations, or a longer one after the last object of an
    open one, which may stay open for ever. A request that stores objects ends by itself: it completes no series before.
    """

    def __init__(
        self, spool: Spool, jobs: JobRunner, model: ServedModel, settings: DicomSettings, storing: OpenTransfers
    ) -> None:
        self._spool, self._jobs, self._model, self._settings = spool, jobs, model, settings
        self.associations, self._storing = OpenTransfers(), storing
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="series", daemon=True)

    def start(self) -> None:
        """Start the thread; series that an earlier run has received are completed as well."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stopping.wait(POLL_S):
            associated, stored = self.associations.series(), self._storing.series()
            now = time.time()
            try:
                waiting = self._spool.open_series()
            except sqlite3.Error as error:
                self._wait_after(error)
                continue
            for series, last in waiting.items():
                pause_s = self._settings.quiet_s if series in associated else self._settings.released_s
                if series not in stored and now - last >= pause_s:
                    try:
                        self._complete(series)
                    except (OSError, sqlite3.Error) as error:  # the other series go on
                        self._wait_after(error)

    def _wait_after(self, error: Exception) -> None:
        LOG.warning("a series cannot be prepared: %s; it is tried again", error)
        self._stopping.wait(self._settings.retry_s)

    def _complete(self, series: str) -> None:
        instances = self._spool.instances(series)
        text = "\n".join((self._model.digest, series, *(instance.uid for instance in instances)))
        job = Job(
            id=hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH],
            kind=DICOM_JOB,
            model=self._model.name,
            state="queued",
            created=time.time(),
            study=instances[0].study,
            series=series,
        )
        if self._spool.job(job.id) is None:
            folder = self._spool.job_folder(job.id) / SERIES
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for index, instance in enumerate(instances):
                link_or_copy(self._spool.folder / instance.file, folder / f"{index:05}.dcm")
        if self._spool.add_job(job, [instance.uid for instance in instances]):
            LOG.info("series complete", extra={"job": job.id, "count": len(instances)})
        self._jobs.wake()


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file, or copy it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
