"""One training at a time in a run folder: a second one would overwrite its checkpoints and remove its slices."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from medseg_trt.errors import UsageError

LOCK = ".training"  # holds the number of the process; it is gone when the training is


@contextmanager
def run_lock(out: Path) -> Generator[None, None, None]:
    """Hold the run folder while the block runs; the system lets go of it when a process dies, however it does.

    Raises:
        UsageError: another training holds it.
    """
    if sys.platform == "win32":  # Windows has no flock; it refuses to replace a file that another process has open
        yield
        return
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    descriptor = _take(out / LOCK, out)
    try:
        yield
    finally:
        (out / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        if made and not any(out.iterdir()):
            out.rmdir()


def _take(path: Path, out: Path) -> int:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 20).decode(errors="replace").strip()
            os.close(descriptor)
            raise UsageError(
                f"another training, process {holder or 'unknown'}, is writing to {out}. "
                "Wait until it ends, or choose another folder with -o"
            ) from error
        if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
            return descriptor
        os.close(descriptor)  # its holder removed the file between our opening and locking it
