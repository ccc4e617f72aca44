"""The objects of an S3 bucket below a prefix: listed a folder at a time, fetched and sent one at a time.

pyarrow finds the keys, the region and the address of the service as AWS's own tools do: in ``AWS_ACCESS_KEY_ID``,
``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``~/.aws`` and the metadata of the machine.
"""

import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any
from weakref import finalize

from medseg_trt.errors import DeviceError, InputError, require
from medseg_trt.files import CHUNK_BYTES

SCHEME = "s3:"  # a ``Path`` keeps one of the two slashes of s3://bucket/folder
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
MAX_KEY_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An object below a prefix."""

    name: str  # below the prefix, with slashes
    size: int  # bytes
    mtime_ns: int


def is_object_path(path: Path) -> bool:
    """Return whether a path names an object or a prefix of a bucket."""
    return path.parts[:1] == (SCHEME,) and len(path.parts) > 1


def absolute(path: Path) -> Path:
    """Return a path that holds in every folder."""
    return path if is_object_path(path) else path.absolute()


def shown(path: Path) -> str:
    """Return a path as a user writes it."""
    return f"s3://{'/'.join(path.parts[1:])}" if is_object_path(path) else str(path)


class ObjectFolder:
    """The objects of a bucket below a prefix."""

    def __init__(self, path: Path) -> None:
        """Connect to the bucket; nothing is read.

        Raises:
            InputError: it is no name of a bucket, or no bucket can be reached.
            MissingExtraError: pyarrow is not installed.
        """
        self._files: Any = require("pyarrow.fs", "s3")
        self._path = path
        self._prefix = "/".join(path.parts[1:])
        bucket = path.parts[1]
        if not BUCKET.fullmatch(bucket):
            raise InputError(f"{shown(path)}: {bucket!r} is no name of a bucket; write s3://bucket/folder")
        with self._explained("cannot be opened"):
            self._store, _ = self._files.FileSystem.from_uri(f"s3://{bucket}?allow_delayed_open=true")

    def objects(self) -> Iterator[StoredObject]:
        """Yield all objects, a folder at a time.

        Raises:
            InputError: the prefix holds none, or the bucket cannot be listed.
        """
        folders = [self._prefix]
        while folders:
            folder = folders.pop()
            with self._explained("cannot be listed"):
                found = self._store.get_file_info(self._files.FileSelector(folder, allow_not_found=True))
            if folder == self._prefix and not found:
                raise InputError(f"{shown(self._path)} holds no objects, or there is no such bucket; name a folder")
            for item in sorted(found, key=lambda item: item.path):
                if item.type == self._files.FileType.Directory:
                    folders.append(item.path)
                else:
                    name = item.path[len(self._prefix) + 1 :]
                    yield StoredObject(name=name, size=item.size, mtime_ns=item.mtime_ns or 0)

    def open(self, name: str) -> Any:
        """Open an object to read its bytes in order.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        return self._store.open_input_stream(f"{self._prefix}/{name}")

    def fetch(self, name: str, target: Path) -> bool:
        """Copy an object to a file; return False where there is no such object.

        Raises:
            DeviceError: it cannot be read.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.open(name) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK_BYTES)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DeviceError(f"{shown(self._path / name)} cannot be read: {error}") from error
        return True

    def send(self, source: Path, name: str) -> None:
        """Copy a file to an object, which has all of the bytes or is as before.

        Raises:
            InputError: the name of the object would be too long.
            DeviceError: it cannot be written.
        """
        key = f"{self._prefix}/{name}"
        if len(key.encode()) > MAX_KEY_BYTES:
            raise InputError(f"{shown(self._path / name)}: a bucket has names of {MAX_KEY_BYTES} bytes; rename it")
        try:
            with source.open("rb") as file, self._store.open_output_stream(key) as target:
                shutil.copyfileobj(file, target, CHUNK_BYTES)
        except OSError as error:
            raise DeviceError(f"{shown(self._path / name)} cannot be written: {error}") from error

    def close(self) -> None:
        """Do nothing: pyarrow closes the connection with the object."""

    @contextmanager
    def _explained(self, what: str) -> Generator[None, None, None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise InputError(f"{shown(self._path)} {what}: {error}") from error


class ObjectOutput:
    """An output folder in a bucket: files are made in a temporary folder here, and sent once they are complete."""

    def __init__(self, path: Path) -> None:
        """Connect to the bucket; nothing is written.

        Raises:
            InputError: no bucket can be reached.
            MissingExtraError: pyarrow is not installed.
        """
        self._objects = ObjectFolder(path)
        self.folder = Path(mkdtemp(prefix="medseg-trt-"))
        self._remove_folder = finalize(self, shutil.rmtree, self.folder, ignore_errors=True)  # also without ``close``

    def fetch(self, name: str) -> bool:
        """Copy a file of the output here, and return whether there is one."""
        return self._objects.fetch(name, self.folder / name)

    def send(self, names: Sequence[str]) -> None:
        """Send files in this order, and then remove them here.

        Raises:
            InputError: a name is too long.
            DeviceError: the bucket cannot be written.
        """
        for name in names:
            self._objects.send(self.folder / name, name)
        self.remove(names)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files here; those in the bucket stay."""
        for name in names:
            (self.folder / PurePosixPath(name)).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the temporary folder."""
        self._remove_folder()
