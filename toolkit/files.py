"""Write files so that nobody ever sees half of one, and name their content by digest."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_trt.errors import ArtefactError

CHUNK_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path beside ``path``; rename it there when the block ends without an error.

    The suffix is kept, so that libraries that look at it choose the right format.
    On an error or an interrupt the temporary file is removed and ``path`` is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix="".join(path.suffixes[-2:]))
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk names no file, and nobody knows the temporary one
        if error.errno is not None and error.filename in (None, name):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary folder beside ``path``; put it in ``path``'s place when the block ends without an error.

    An older folder at ``path`` stays until the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".partial-"))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=".partial-old-")) / path.name
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


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_limited(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file.

    Raises:
        ArtefactError: there are more than ``max_bytes``.
    """
    if path.stat().st_size > max_bytes:
        raise ArtefactError(f"{path} is larger than {max_bytes >> 20} MiB; it is not to be trusted")
    return path.read_bytes()


def parse_json(path: Path, content: bytes) -> Any:
    """Return the value that the bytes of a file are.

    Raises:
        ArtefactError: they are no JSON.
    """
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is no valid JSON: {error}") from error


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``, provided that it really lies inside ``folder``.

    Raises:
        ArtefactError: ``name`` is absolute, climbs out, leads out through a link, or cannot be a name.
    """
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a zero byte
        raise ArtefactError(f"{name!r} is no name of a file in {folder}; it is not to be trusted") from error
    if not path.is_relative_to(folder.resolve()):
        raise ArtefactError(f"{name!r} leads out of {folder}; the file is not to be trusted")
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
