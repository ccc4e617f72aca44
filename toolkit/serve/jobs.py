"""Accepted jobs, one after the other: each is read, segmented and written in all its forms, then noted as done.

The results of a job depend on its input and its bundle alone, so a job that was interrupted is simply run again.
"""

import logging
import shutil
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import InputError, MedsegError
from medseg_trt.files import atomic_file
from medseg_trt.imaging.listing import list_images
from medseg_trt.serve.batching import CancelledError, RequestQueue
from medseg_trt.serve.metrics import Metrics
from medseg_trt.serve.model import ServedModel
from medseg_trt.serve.protocol_v2 import ProtocolError
from medseg_trt.serve.result_formats import (
    DICOM,
    JSON,
    NIFTI,
    PNG,
    TIFF,
    VIEW,
    Segmentation,
    encode,
    native_type,
)
from medseg_trt.serve.settings import Limits
from medseg_trt.serve.spool import Job, Spool
from medseg_trt.serve.uploads import UPLOAD, open_upload, public_message, read_upload

LOG = logging.getLogger("medseg_trt.serve")
HTTP_JOB, DICOM_JOB = "http", "dicom"
SERIES, RESULTS, WORK = "series", "results", "work"  # folders of a job
RESULT_FILES: Mapping[str, str] = {
    PNG: "mask.png",
    TIFF: "mask.tif",
    NIFTI: "mask.nii.gz",
    DICOM: "mask.seg.dcm",
    JSON: "mask.json",
    VIEW: "mask.view",
}
POLL_S, SWEEP_S = 0.2, 10.0
GRACE_S = 5.0  # for a job that decodes or encodes and cannot be interrupted; it is run again

Deliver = Callable[[Job, Segmentation, Path], Iterable[tuple[str, str]]]  # -> pairs of destination and file


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a running job is, in slices."""

    done: int = 0
    total: int = 0


class JobRunner:
    """Runs the jobs of a spool in a thread."""

    def __init__(
        self,
        spool: Spool,
        models: Mapping[str, ServedModel],
        limits: Limits,
        metrics: Metrics,
        deliver: Deliver = lambda _job, _result, _folder: (),
    ) -> None:
        """Prepare the thread; ``start`` starts it.

        Args:
            spool: holds the jobs.
            models: by name.
            limits: of one image, and how long results are kept.
            metrics: counts failures.
            deliver: called with every finished DICOM job, before it is noted as done; returns what must be sent.
        """
        self._spool, self._models, self._limits, self._metrics, self._deliver = spool, models, limits, metrics, deliver
        self._progress: dict[str, Progress] = {}
        self._current: tuple[str, RequestQueue] | None = None
        self._cancelled: set[str] = set()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)

    def start(self) -> None:
        """Remove what was never acknowledged, and go on with what was."""
        self._remove_orphans()
        self._thread.start()

    def wake(self) -> None:
        """Say that there may be a new job."""
        self._wake.set()

    def progress(self, job_id: str) -> Progress:
        """Return how far a job is; zeros before it runs, and after a restart."""
        return self._progress.get(job_id, Progress())

    def new_id(self) -> str:
        """Return the name of a new job; it cannot be guessed, since it gives access to the result."""
        return uuid.uuid4().hex

    def cancel(self, job_id: str) -> bool:
        """Remove a job and its files; a running one stops first. Return False where its result must still be sent."""
        self._cancelled.add(job_id)
        if (current := self._current) is not None and current[0] == job_id:
            current[1].cancel()
            return True  # the thread removes it
        if self._remove(job_id):
            return True
        job = self._spool.job(job_id)
        if job is None or job.finished is None:
            return True  # it is gone, or the thread, which has just taken it, removes it
        self._cancelled.discard(job_id)
        return False

    def stop(self, deadline: float) -> None:
        """Take no new job, and wait for the running one until ``deadline`` (``time.monotonic``).

        A job that is not done by then is run again after the next start.
        """
        self._stopping.set()
        self._wake.set()
        if not self._thread.is_alive():
            return
        self._thread.join(max(deadline - time.monotonic(), 0))
        given_up = time.monotonic() + GRACE_S
        while self._thread.is_alive() and time.monotonic() < given_up:
            if (current := self._current) is not None:
                current[1].cancel()
            self._thread.join(POLL_S)

    def _work(self) -> None:
        swept, is_interrupted = 0.0, False
        while not self._stopping.is_set():
            try:
                if is_interrupted:
                    self._spool.queue_running()
                    is_interrupted = False
                if time.monotonic() - swept > SWEEP_S:
                    swept = time.monotonic()
                    self._sweep()
                job = self._spool.next_job()
                if job is not None:
                    self._run(job)
                    continue
            except (sqlite3.Error, OSError):  # without this thread, no job would ever run again
                LOG.exception("the spool cannot be used; it is tried again")
                is_interrupted = True  # a job that could not be noted as finished is run again
            self._wake.wait(POLL_S)
            self._wake.clear()

    def _run(self, job: Job) -> None:
        folder = self._spool.job_folder(job.id)
        started = time.monotonic()
        error: str | None = None
        sends: list[tuple[str, str]] = []
        try:
            sends = list(self._segment(job, folder))
        except CancelledError:
            if job.id not in self._cancelled:
                return  # the server stops: the job stays in the queue of the next start
            error = "cancelled"
        except MedsegError as problem:
            error = public_message(problem, folder)
            self._metrics.failures.labels("input" if isinstance(problem, InputError) else "job").inc()
        except Exception as problem:
            error = f"internal error: {type(problem).__name__}"
            self._metrics.failures.labels("internal").inc()
            LOG.exception("a job failed", extra={"job": job.id})
        finally:
            shutil.rmtree(folder / WORK, ignore_errors=True)
        self._spool.finish(job.id, error, sends)
        self._remove_upload(job)  # last: until the job is noted as finished, a restart runs it again
        if job.id in self._cancelled:
            self._remove(job.id)
        seconds = round(time.monotonic() - started, 3)
        fields = {"job": job.id, "kind": job.kind, "model": job.model, "seconds": seconds}
        if error is None:
            LOG.info("job done", extra=fields)
        else:
            LOG.warning("job failed: %s", error, extra=fields)

    def _segment(self, job: Job, folder: Path) -> Iterable[tuple[str, str]]:
        model = self._models.get(job.model)
        if model is None:
            raise InputError(f"the model {job.model!r} is not served any more")
        shutil.rmtree(folder / WORK, ignore_errors=True)
        (folder / WORK).mkdir(parents=True)
        if job.kind == HTTP_JOB:
            source = open_upload(folder / UPLOAD, folder / WORK, self._limits)
        else:
            listing = list_images([folder / SERIES])
            if listing.refused:
                raise listing.refused[0].error
            if len(listing.sources) != 1:
                raise InputError(f"the series holds {len(listing.sources)} images; one volume was expected")
            source = listing.sources[0]
        image = read_upload(source, self._limits)

        def note(done: int, total: int) -> None:
            self._progress[job.id] = Progress(done=done, total=total)

        note(0, image.num_slices)
        with model.queue.open(is_job=True) as request:
            self._current = (job.id, request)
            try:
                if job.id in self._cancelled or self._stopping.is_set():
                    raise CancelledError("the job was cancelled")
                mask = model.segment(image, request, note)
            finally:
                self._current = None
        result = Segmentation(source=source, image=image, mask=mask, model=model)
        self._write(result, folder)
        return self._deliver(job, result, folder) if job.kind == DICOM_JOB else ()

    def _write(self, result: Segmentation, folder: Path) -> None:
        """Write every form that exists for the image; a DICOM segmentation exists for DICOM alone."""
        for media_type in (native_type(result.mask), JSON, VIEW, DICOM):
            try:
                encoded = encode(media_type, result, folder / WORK)
            except ProtocolError:
                continue
            with atomic_file(folder / RESULTS / RESULT_FILES[media_type]) as temporary:
                temporary.write_bytes(encoded.content)

    def _remove_upload(self, job: Job) -> None:
        if job.kind == HTTP_JOB:
            (self._spool.job_folder(job.id) / UPLOAD).unlink(missing_ok=True)

    def _remove(self, job_id: str) -> bool:
        """Remove a job, then its files; ``_remove_orphans`` finishes what is interrupted between the two."""
        objects = [instance.file for instance in self._spool.instances() if instance.job == job_id]
        if not self._spool.remove_job(job_id):
            return False
        self._cancelled.discard(job_id)
        self._progress.pop(job_id, None)
        for file in objects:
            (self._spool.folder / file).unlink(missing_ok=True)
        shutil.rmtree(self._spool.job_folder(job_id), ignore_errors=True)
        return True

    def _sweep(self) -> None:
        """Remove finished jobs that are older than ``keep_s`` and have nothing left to send."""
        limit = time.time() - self._limits.keep_s
        for job in self._spool.jobs():
            if job.finished is not None and job.finished < limit:
                self._remove(job.id)

    def _remove_orphans(self) -> None:
        """Remove the files of uploads that were never acknowledged, or whose job is finished or gone."""
        jobs = self._spool.jobs()
        known = {job.id for job in jobs}
        for job in jobs:
            if job.finished is not None:
                self._remove_upload(job)
        for folder in (self._spool.folder / "jobs").glob("*"):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        objects = {instance.file for instance in self._spool.instances()}
        for path in (self._spool.folder / "objects").glob("*"):
            if path.relative_to(self._spool.folder).as_posix() not in objects:
                path.unlink(missing_ok=True)
