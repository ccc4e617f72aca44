"""Use the very bytes of a bundle that its manifest's digests cover.

A file that is checked and then opened again by its name may be another one by then. So a small file is read once, and
these bytes are compared with its digest and used. A library that opens files by name, to map weights into memory, gets
a private copy: a folder that only this user may enter, whose bytes are digested while they are copied.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from medseg_trt.bundles.manifest import FileEntry
from medseg_trt.errors import ArtefactError
from medseg_trt.files import CHUNK_BYTES, inside, open_regular

REMEDY = "copy the bundle again, or rebuild it: medseg-trt build --ckpt run/best.pt"
PREFIX = "medseg-trt-"  # of private folders, in the system's folder of temporary files ($TMPDIR)


def check_file(folder: Path, name: str, entry: FileEntry) -> None:
    """Compare a file with its manifest entry.

    Raises:
        ArtefactError: it is missing, leads out of the folder, is no regular file, or is another one.
    """
    _digest_into(folder, name, entry, None)


def read_file(folder: Path, name: str, entry: FileEntry) -> bytes:
    """Return the bytes of a file, which are those that its manifest entry describes.

    Raises:
        ArtefactError: as ``check_file`` does.
    """
    with _opened(folder, name, entry) as file:
        content = file.read(entry.bytes + 1)
    if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise _changed(folder, name)
    return content


@contextmanager
def private_copy(folder: Path, names: Iterable[str], entries: Mapping[str, FileEntry]) -> Generator[Path, None, None]:
    """Yield a private folder with copies of these files, whose bytes are those that the manifest describes.

    The folder is removed at the end; what a library has mapped or opened by then stays readable to it.

    Raises:
        ArtefactError: as ``check_file`` does, or the disk is full.
    """
    private = Path(tempfile.mkdtemp(prefix=PREFIX))  # with permissions 0700
    try:
        for name in dict.fromkeys(names):
            _copy(folder, name, entries[name], private)
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _copy(folder: Path, name: str, entry: FileEntry, private: Path) -> None:
    copy = private / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        with copy.open("xb") as file:
            _digest_into(folder, name, entry, file)
    except OSError as error:
        raise ArtefactError(
            f"{folder / name} cannot be copied to {private}: {error.strerror}; make room there, or set TMPDIR"
        ) from error


def _digest_into(folder: Path, name: str, entry: FileEntry, copy: BinaryIO | None) -> None:
    """Digest at most as many bytes as the entry has, and write them to a copy.

    Raises:
        ArtefactError: they are not the entry's.
    """
    digest, left = hashlib.sha256(), entry.bytes
    with _opened(folder, name, entry) as file:
        while left and (chunk := file.read(min(CHUNK_BYTES, left))):
            digest.update(chunk)
            left -= len(chunk)
            if copy is not None:
                copy.write(chunk)
        is_longer = bool(file.read(1))
    if left or is_longer or digest.hexdigest() != entry.sha256:
        raise _changed(folder, name)


def _opened(folder: Path, name: str, entry: FileEntry) -> BinaryIO:
    path = inside(folder, name)
    try:
        file = open_regular(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise ArtefactError(f"{folder} is not complete: {path.name} is missing; {REMEDY}") from error
        raise ArtefactError(f"{path} cannot be read: {error.strerror}; {REMEDY}") from error
    if path.stat().st_size != entry.bytes:
        file.close()
        raise _changed(folder, name)
    return file


def _changed(folder: Path, name: str) -> ArtefactError:
    return ArtefactError(f"{folder / name} is not what manifest.json says it is; {REMEDY}")
