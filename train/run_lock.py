"""A lock on the run folder: a second training would overwrite the checkpoints and remove the prepared slices."""

import errno
import os
import re
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from medseg_trt.errors import UsageError
from medseg_trt.files import NO_LINKS, is_open_file, lock

LOCK = ".training"  # holds the process id; removed at the end of the training
MAX_LOCK_BYTES = 20  # of a process id and a newline
WRITTEN = re.compile(rb"(\d{1,19}\n)?")


@contextmanager
def run_lock(out: Path) -> Generator[None, None, None]:
    """Hold the lock of a run folder during a ``with`` block; the operating system releases it when the process ends.

    Raises:
        UsageError: another training holds it.
    """
    if sys.platform == "win32":  # no flock; Windows does not replace a file that another process has open
        yield
        return
    was_missing = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    descriptor = _take(out / LOCK, out)
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        if was_missing and not any(out.iterdir()):
            out.rmdir()


def _take(path: Path, out: Path) -> int:
    while True:
        descriptor = _open(path)
        if not lock(descriptor):
            holder = os.read(descriptor, MAX_LOCK_BYTES).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(
                f"another training, process {holder or 'unknown'}, is writing to {out}. "
                "Wait until it ends, or choose another folder with -o"
            )
        if is_open_file(descriptor, path):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder removed the file before it was locked


def _open(path: Path) -> int:
    """Open the lock file: a regular file that is empty or holds a process id.

    Raises:
        UsageError: it is another kind of file.
    """
    foreign = UsageError(f"{path} was not written by a training; move it away, or choose another folder with -o")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise foreign from error
        raise
    status = os.fstat(descriptor)
    content = os.pread(descriptor, MAX_LOCK_BYTES + 1, 0) if stat.S_ISREG(status.st_mode) else b"?"
    if status.st_nlink > 1 or not WRITTEN.fullmatch(content):
        os.close(descriptor)
        raise foreign
    return descriptor
