"""Write files atomically, lock them, read them with limits, and identify their content by digest.

Locks are ``flock``: the system releases them when their process ends, however it ends. ``flock`` belongs to an open
file, so it works across containers that share a disk, and a reused process number does no harm. Windows has no
``flock``; it refuses to replace or delete a file that another process has open.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.progress import LOG

CHUNK_BYTES = 1 << 20
PARTIAL = ".partial-"  # how the names of temporary files begin
POLL_S = 0.05
FOLDER_WAIT_S = 60.0  # merging a table of areas takes milliseconds; a longer wait means that its holder hangs
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | NO_WAIT
MAX_SUFFIX = 16  # characters of a suffix that a temporary file keeps: its name stays shorter than any limit


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of the bytes of files, one file after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            for chunk in _chunks(file):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of(file: BinaryIO) -> str:
    """Return the SHA-256 of the rest of an open file, from its position to its end."""
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Generator[Path, None, None]:
    """Yield a temporary path beside ``path``; rename it there when the block ends without an error.

    The suffix is kept, so that libraries that look at it choose the right format.
    On an error or an interrupt the temporary file is removed and ``path`` is as it was before.
    The temporary file is locked meanwhile, so that ``remove_abandoned`` can tell it from a dead process's.

    Args:
        path: the file.
        durable: wait until the content is on the disk, so that a loss of power leaves a whole file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary, descriptor = _create_temporary(path)
    except OSError as error:  # the name of the temporary file says nothing to the user
        error.filename = str(path)
        raise
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk has no file name, and the temporary name means nothing to the user
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def made_folder(path: Path) -> Generator[Path, None, None]:
    """Make a folder and those above it; after an error or an interrupt remove what was made, unless it holds files."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # a folder that holds something stays, and so do those above it
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def atomic_folder(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary folder beside ``path``; put it in ``path``'s place when the block ends without an error.

    An older folder at ``path`` stays until the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path, "")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{PARTIAL}old-")) / path.name
            path.replace(old)
            try:
                temporary.replace(path)
            except BaseException:
                old.replace(path)
                raise
            finally:
                shutil.rmtree(old.parent, ignore_errors=True)
        else:
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder(*parts: str) -> Path:
    """Return a folder below the user's cache, ``$XDG_CACHE_HOME`` or ``~/.cache``; it need not exist yet.

    A relative ``$XDG_CACHE_HOME`` does not count. Source: XDG Base Directory Specification.
    """
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache").joinpath("medseg-trt", *parts)


def state_folder() -> Path:
    """Return this program's folder for what should outlive a cache, ``$XDG_STATE_HOME``; it need not exist yet."""
    chosen = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".local" / "state") / "medseg-trt"


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write ``value`` as JSON atomically; with ``indent=None`` on one line, for large files."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file, or of one behind a link.

    Raises:
        ArtefactError: there are more than ``max_bytes``, or it cannot be read: a FIFO or a device would never end.
    """
    try:
        with open_regular(path, follow_links=True) as file:
            size = os.fstat(file.fileno()).st_size  # read() allocates what it is asked for
            content = file.read(min(size, max_bytes) + 1)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise ArtefactError(f"{path} is larger than {size_text(max_bytes)}; it is not to be trusted")
    return content


def size_text(num_bytes: int) -> str:
    """Return a limit in words: whole MiB, or bytes where it is less than one."""
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes} bytes"


def parse_json(path: Path, content: bytes) -> Any:
    """Parse the bytes of a JSON file. Infinity and NaN are refused, as in RFC 8259.

    Raises:
        ArtefactError: the bytes are no JSON, or a number is too large for a double.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is no valid JSON: {error}") from error


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name`` if it lies inside ``folder``.

    Raises:
        ArtefactError: ``name`` is absolute, leads out of the folder, also through a link, or is no valid name.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a zero byte
        raise ArtefactError(f"{name!r} is no name of a file in {folder}; it is not to be trusted") from error
    if not path.is_relative_to(folder.resolve()):
        raise ArtefactError(f"{name!r} leads out of {folder}; the file is not to be trusted")
    return path


def open_regular(path: Path, *, follow_links: bool = False) -> BinaryIO:
    """Open a file to read, provided that it is a regular file and, unless ``follow_links``, no link.

    Raises:
        OSError: it is not a regular file, such as a FIFO, which would block, or it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | (NO_WAIT if follow_links else NO_LINKS))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


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
    """Return whether ``path`` is still the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def remove_abandoned(path: Path) -> bool:
    """Delete a temporary file whose writer has died, and return whether it was deleted.

    A file stays if its writer is alive, or if that is unknown: on a file system without locks, or if the file is a link
    or cannot be opened.
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


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _create_temporary(path: Path) -> tuple[Path, int | None]:
    """Create a file beside ``path`` and lock it; return it with the descriptor that holds the lock.

    The permissions are those of every new file: the system applies the umask.
    """
    suffix = "".join(part for part in path.suffixes[-2:] if len(part) <= MAX_SUFFIX)
    while True:
        temporary = _temporary_name(path, suffix)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666)
        if sys.platform == "win32":  # which renames no file that is open
            os.close(descriptor)
            return temporary, None
        try:
            lock(descriptor, wait=True)
        except OSError:  # no locks on this file system, so no other process can delete the file
            return temporary, descriptor
        if is_open_file(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)  # ``remove_abandoned`` deleted it between its creation and its lock


def _temporary_name(path: Path, suffix: str) -> Path:
    return path.parent / f"{PARTIAL}{secrets.token_hex(8)}{suffix}"


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
