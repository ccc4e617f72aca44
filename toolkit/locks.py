"""Locks that the system releases when their process ends, however it ends.

``flock`` belongs to an open file, so it works across containers that share a disk, and a process number that is used
again means nothing. Windows has no ``flock``; it refuses to replace or delete a file that another process has open.
"""

import os
import stat
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from medseg_trt.errors import UsageError
from medseg_trt.progress import LOG

POLL_S = 0.05
FOLDER_WAIT_S = 60.0  # a table of areas is merged in milliseconds; after this long its holder hangs
NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file; return False where another process holds the lock.

    Args:
        descriptor: of the file.
        wait: wait for the other process instead.

    Raises:
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        raise OSError("Windows has no flock")
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_open_file(descriptor: int, path: Path) -> bool:
    """Say whether the open file is still the one that is called ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def remove_abandoned(path: Path) -> bool:
    """Delete a file that its writer locked and died over; return whether it was deleted.

    A file whose writer lives stays, and so does one whose writer cannot be judged: on a file system without locks, or
    where the file is a link or may not be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | NO_LINKS)
    except OSError:
        return False
    try:
        if not (stat.S_ISREG(os.fstat(descriptor).st_mode) and lock(descriptor)):
            return False
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def folder_lock(folder: Path) -> Generator[None, None, None]:
    """Hold the lock on a folder while the block runs; wait for another process that holds it.

    Raises:
        UsageError: another process has held it for ``FOLDER_WAIT_S``.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _wait_for(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, folder: Path) -> None:
    deadline = time.monotonic() + FOLDER_WAIT_S
    while True:
        try:
            if lock(descriptor):
                return
        except OSError as error:
            LOG.warning("%s cannot be locked (%s); let no two commands write to it at once", folder, error.strerror)
            return
        if time.monotonic() > deadline:
            raise UsageError(f"{folder} is locked by another process; end it, or choose another folder with -o")
        time.sleep(POLL_S)
