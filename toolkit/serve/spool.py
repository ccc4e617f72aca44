"""What was accepted, on disk before it is acknowledged: files, and their state in SQLite.

Every change is one transaction with ``synchronous=FULL`` in WAL mode, after the file that it names is complete. A job's
name is derived from its input, so that the same input makes the same job. A process that is killed at any instant
leaves either nothing that was acknowledged, or a row from which a restart goes on.
"""

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medseg_trt.errors import MedsegError, UsageError
from medseg_trt.files import lock

State = Literal["queued", "running", "done", "failed"]
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL,
    finished REAL, error TEXT, study TEXT, series TEXT);
CREATE TABLE IF NOT EXISTS instances (
    uid TEXT PRIMARY KEY, study TEXT NOT NULL, series TEXT NOT NULL, sop_class TEXT NOT NULL, sha256 TEXT NOT NULL,
    file TEXT NOT NULL, received REAL NOT NULL, job TEXT);
CREATE INDEX IF NOT EXISTS instances_of_series ON instances (series);
CREATE TABLE IF NOT EXISTS sends (
    job TEXT NOT NULL, destination TEXT NOT NULL, file TEXT NOT NULL, state TEXT NOT NULL, attempts INTEGER NOT NULL,
    next REAL NOT NULL, PRIMARY KEY (job, destination, file));
"""
DATABASE, LOCK = "spool.sqlite", "spool.lock"
FULL = (errno.ENOSPC, errno.EDQUOT)


class FullError(MedsegError):
    """The disk of the spool is full, or as many jobs wait as are allowed; nothing was accepted."""


@contextmanager
def refused_when_full() -> Generator[None, None, None]:
    """Refuse what cannot be written in the block because the disk is full.

    Raises:
        FullError: it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise FullError("the disk of the spool is full") from error
        raise


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request that was accepted and is segmented later."""

    id: str
    kind: str  # "http" or "dicom"
    model: str
    state: State
    created: float  # seconds since 1970
    finished: float | None = None
    error: str | None = None
    study: str | None = None
    series: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """A DICOM object that was received."""

    uid: str
    study: str
    series: str
    sop_class: str
    sha256: str
    file: str  # below the spool
    received: float
    job: str | None = None  # the last job that used it


@dataclass(frozen=True, kw_only=True, slots=True)
class Send:
    """A file that a destination must get."""

    job: str
    destination: str
    file: str  # below the spool
    attempts: int
    next: float  # when to try next


class Spool:
    """The folder of a server's accepted work; one process at a time."""

    def __init__(self, folder: Path, min_free_bytes: int) -> None:
        """Open the spool, and put jobs that were running back into the queue.

        Raises:
            UsageError: another process uses the folder.
        """
        self.folder = folder
        self._min_free_bytes = min_free_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock_file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        if not lock(self._lock_file):
            os.close(self._lock_file)
            raise UsageError(f"{folder} is in use by another server; give each one a folder of its own with --spool")
        self._mutex = threading.RLock()
        self._database = sqlite3.connect(folder / DATABASE, check_same_thread=False, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA_VERSION):
            raise UsageError(f"{folder} was written by another version of medseg-trt; give another folder with --spool")
        self._database.executescript(SCHEMA)
        self._database.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self.queue_running()

    def close(self) -> None:
        """Close the database and release the folder."""
        with self._mutex:
            self._database.close()
            os.close(self._lock_file)

    def job_folder(self, job_id: str) -> Path:
        """Return the folder of a job's files; it need not exist."""
        return self.folder / "jobs" / job_id

    @property
    def is_there(self) -> bool:
        """Whether the database is still in its folder."""
        return (self.folder / DATABASE).is_file()

    def require_space(self, num_bytes: int = 0) -> None:
        """Refuse new work where the disk is nearly full.

        Raises:
            FullError: fewer bytes than ``min_free_bytes`` would be left, or the folder is gone.
        """
        try:
            status = os.statvfs(self.folder)
        except OSError as error:
            raise FullError(f"the spool cannot be used ({error.strerror})") from error
        if status.f_bavail * status.f_frsize - num_bytes < self._min_free_bytes:
            raise FullError("the disk of the spool is full")

    def add_job(self, job: Job, instances: Iterable[str] = (), max_open: int | None = None) -> bool:
        """Add a job whose files are complete, and note it at its instances; return False where it is there already.

        Raises:
            FullError: ``max_open`` jobs wait or run.
        """
        with self._transaction() as database:
            if max_open is not None and self._count_open() >= max_open:
                raise FullError(f"{max_open} jobs are waiting")
            added = database.execute(
                "INSERT OR IGNORE INTO jobs (id, kind, model, state, created, study, series) VALUES (?,?,?,?,?,?,?)",
                (job.id, job.kind, job.model, job.state, job.created, job.study, job.series),
            ).rowcount
            database.executemany("UPDATE instances SET job=? WHERE uid=?", [(job.id, uid) for uid in instances])
            return added == 1

    def queue_running(self) -> None:
        """Put jobs that were interrupted while they ran back into the queue."""
        with self._transaction() as database:
            database.execute("UPDATE jobs SET state='queued' WHERE state='running'")

    def next_job(self) -> Job | None:
        """Mark the oldest queued job as running and return it."""
        with self._transaction() as database:
            row = database.execute("SELECT * FROM jobs WHERE state='queued' ORDER BY created, id LIMIT 1").fetchone()
            if row is None:
                return None
            database.execute("UPDATE jobs SET state='running' WHERE id=?", (row["id"],))
            values: dict[str, Any] = dict(row) | {"state": "running"}
            return Job(**values)

    def finish(self, job_id: str, error: str | None, sends: Iterable[tuple[str, str]] = ()) -> None:
        """Note that a job is done or failed, and queue its files for their destinations, in one transaction.

        Args:
            job_id: the job.
            error: why it failed; None: it is done.
            sends: pairs of destination and file below the spool.
        """
        state = "done" if error is None else "failed"
        with self._transaction() as database:
            database.execute(
                "UPDATE jobs SET state=?, finished=?, error=? WHERE id=?", (state, time.time(), error, job_id)
            )
            database.executemany(
                "INSERT OR IGNORE INTO sends (job, destination, file, state, attempts, next) "
                "VALUES (?,?,?,'waiting',0,0)",
                [(job_id, destination, file) for destination, file in sends],
            )

    def job(self, job_id: str) -> Job | None:
        """Return a job by its name."""
        rows = self._query("SELECT * FROM jobs WHERE id=?", job_id)
        return Job(**rows[0]) if rows else None

    def jobs(self) -> list[Job]:
        """Return all jobs, the oldest first."""
        return [Job(**row) for row in self._query("SELECT * FROM jobs ORDER BY created, id")]

    def count_jobs(self, state: str) -> int:
        """Return how many jobs are in a state."""
        return self._query("SELECT COUNT(*) AS n FROM jobs WHERE state=?", state)[0]["n"]

    def remove_job(self, job_id: str) -> bool:
        """Forget a job that does not run and has nothing left to send; return whether it was there."""
        with self._transaction() as database:
            removed = database.execute(
                "DELETE FROM jobs WHERE id=? AND state<>'running' AND NOT EXISTS "
                "(SELECT 1 FROM sends WHERE sends.job=jobs.id AND sends.state='waiting')",
                (job_id,),
            ).rowcount
            if removed:
                database.execute("DELETE FROM sends WHERE job=?", (job_id,))
                database.execute("DELETE FROM instances WHERE job=?", (job_id,))
            return removed == 1

    def add_instance(self, instance: Instance) -> bool:
        """Add a received object whose file is complete; return False where it is there already."""
        with self._transaction() as database:
            return (
                database.execute(
                    "INSERT OR IGNORE INTO instances (uid, study, series, sop_class, sha256, file, received, job) "
                    "VALUES (?,?,?,?,?,?,?,NULL)",
                    (
                        instance.uid,
                        instance.study,
                        instance.series,
                        instance.sop_class,
                        instance.sha256,
                        instance.file,
                        instance.received,
                    ),
                ).rowcount
                == 1
            )

    def instance(self, uid: str) -> Instance | None:
        """Return a received object by its SOP instance UID."""
        rows = self._query("SELECT * FROM instances WHERE uid=?", uid)
        return Instance(**rows[0]) if rows else None

    def instances(self, series: str | None = None) -> list[Instance]:
        """Return the received objects, of one series or all, in the order of their UIDs."""
        condition, values = ("WHERE series=?", (series,)) if series is not None else ("", ())
        return [Instance(**row) for row in self._query(f"SELECT * FROM instances {condition} ORDER BY uid", *values)]

    def open_series(self) -> dict[str, float]:
        """Return the series with objects that no job has used, and when the last one arrived."""
        rows = self._query("SELECT series, MAX(received) AS last FROM instances WHERE job IS NULL GROUP BY series")
        return {row["series"]: row["last"] for row in rows}

    def sends(self, destination: str) -> list[Send]:
        """Return what a destination must still get, the next one first."""
        rows = self._query(
            "SELECT job, destination, file, attempts, next FROM sends WHERE destination=? AND state='waiting' "
            "ORDER BY next, job, file",
            destination,
        )
        return [Send(**row) for row in rows]

    def sent(self, send: Send) -> None:
        """Note that a destination has acknowledged a file."""
        with self._transaction() as database:
            database.execute(
                "UPDATE sends SET state='sent', attempts=attempts+1 WHERE job=? AND destination=? AND file=?",
                (send.job, send.destination, send.file),
            )

    def postpone(self, send: Send, until: float) -> None:
        """Note a failed transfer, and when to try again."""
        with self._transaction() as database:
            database.execute(
                "UPDATE sends SET attempts=attempts+1, next=? WHERE job=? AND destination=? AND file=?",
                (until, send.job, send.destination, send.file),
            )

    def _count_open(self) -> int:
        return self._query("SELECT COUNT(*) AS n FROM jobs WHERE state IN ('queued', 'running')")[0]["n"]

    def _query(self, text: str, *values: Any) -> list[dict[str, Any]]:
        with self._mutex:
            return [dict(row) for row in self._database.execute(text, values).fetchall()]

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection, None, None]:
        with self._mutex:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
