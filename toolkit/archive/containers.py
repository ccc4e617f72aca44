"""Read the members of a zip or tar file, or the objects of a bucket, one by one, without unpacking the rest.

A member is copied into a private temporary folder while its image is read. Names that lead out of the archive, links,
devices and encrypted members are never copied. Python's list of members takes about 500 bytes each.
"""

import errno
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import gettempdir
from threading import Lock
from typing import IO, Any

from medseg_trt.archive.object_store import ObjectFolder, is_object_path
from medseg_trt.errors import InputError, UsageError
from medseg_trt.files import CHUNK_BYTES

MAX_MEMBERS = 1 << 20
MAX_DIRECTORY_BYTES = 1 << 27  # of a zip file's list of members; Python takes about ten times as much to read it
MAX_MEMBER_BYTES = 1 << 32  # an uncompressed image of the largest size, with its header, takes half
MAX_TAR_HEADER_BYTES = 1 << 17  # of long names and extended headers, which tarfile reads at once
MAX_GLOBAL_HEADERS = 64  # of a tar file; tarfile goes through all of them for every member
MAX_NAME_BYTES, MAX_PART_BYTES = 4096, 255  # of a member, and of a folder or file in it, as on disks
ZIP_SIGNATURES = (b"PK\x03\x04", b"PK\x05\x06")
END, END64, LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
END_BYTES, LONGEST_COMMENT, LOCATOR_BYTES, END64_BYTES = 22, 65535, 20, 56
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
LEADS_OUT = "its name leads out of the archive"
DAMAGED = "cannot be read from the archive: {}; make it again"
TOO_LONG = "its name is longer than one on a disk can be"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile inflates the others without a limit
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)  # types of headers that hold records
RECORD = re.compile(rb"([1-9][0-9]{0,6}) [^=\n]{1,256}=")  # the beginning of one: its length, and a keyword
LONG_NUMBER = re.compile(rb"[0-9]{129}")  # tarfile takes the square of the time for the digits of a number


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A member of an archive file that is not a folder."""

    name: str  # its path in the archive, with slashes, without "." and empty parts
    size: int  # bytes, as the archive states it
    reason: str | None  # why it cannot be used, or None
    mtime_ns: int | None = None  # None: that of the archive


class Container:
    """A zip or an uncompressed tar file, or a prefix of a bucket."""

    def __init__(self, path: Path) -> None:
        """Open an archive file and read its list of members.

        Raises:
            InputError: it is damaged, compressed as a whole, or has too many members; or the bucket cannot be reached.
        """
        self.path = path
        self._lock = Lock()  # members share one open file
        try:
            self._archive = _opened(path)
        except (OSError, ValueError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, struct.error) as error:
            raise InputError(f"{path} cannot be read as an archive: {error}; make it again, or unpack it") from error

    def members(self) -> Iterator[Member]:
        """Yield the files in the archive, in its order."""
        for member in self._archive.members():
            yield member if member.reason else _checked(member)

    def copy(self, name: str, target: Path, limit: int | None = None) -> None:
        """Write a member's bytes, or its first ``limit`` bytes, to a file.

        Raises:
            InputError: it is damaged, encrypted, or longer than it states.
            UsageError: there is no space for the copy.
        """
        try:
            with self._lock, self._archive.open(name) as source, target.open("xb") as file:
                _copy(source, file, MAX_MEMBER_BYTES if limit is None else limit, limit is not None)
        except (OSError, EOFError, ValueError, RuntimeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise UsageError(
                    f"no copy of {self.path / name} can be written into {gettempdir()}: {error.strerror}; free some "
                    "space, or choose another folder with TMPDIR"
                ) from error
            raise InputError(f"{self.path / name} {self._archive.FAILURE.format(error)}") from error

    @contextmanager
    def local(self, names: list[str], folder: Path) -> Iterator[tuple[Path, ...]]:
        """Copy members into a folder, under their own last names, and remove them when the block ends."""
        targets: list[Path] = []
        try:
            for number, name in enumerate(names):
                target = folder / str(number) / PurePosixPath(name).name
                target.parent.mkdir()
                targets.append(target)
                self.copy(name, target)
            yield tuple(targets)
        finally:
            for target in targets:
                target.unlink(missing_ok=True)
                target.parent.rmdir()

    def close(self) -> None:
        """Close the file."""
        self._archive.close()


class _ZipMembers:
    FAILURE = DAMAGED

    def __init__(self, path: Path) -> None:
        _require_short_directory(path)
        self._zip = zipfile.ZipFile(path)
        files = (info for info in self._zip.infolist() if not info.is_dir())
        self._infos = {str(PurePosixPath(info.filename)): info for info in files}

    def members(self) -> Iterator[Member]:
        for info in self._zip.infolist():
            if not info.is_dir():
                name = str(PurePosixPath(info.filename))
                yield Member(name=name, size=info.file_size, reason=self._reason(info, name))

    def open(self, name: str) -> Any:
        info = self._infos[name]
        if (reason := self._reason(info, name)) is not None:
            raise ValueError(reason)
        return self._zip.open(info)

    def close(self) -> None:
        self._zip.close()

    def _reason(self, info: zipfile.ZipInfo, name: str) -> str | None:
        if info.flag_bits & 1:
            return "an encrypted file"
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            return "a link or a device"
        if info.compress_type not in METHODS:
            return "compressed by another method than deflate; compress it again"
        return None if self._infos[name] is info else "a later member has the same name"


class _TarMembers:
    """A tar file; of members with the same name the last one counts, as for tar itself."""

    FAILURE = DAMAGED

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._extents: dict[str, tuple[int, int]] = {}
        self._others: list[Member] = []
        try:
            bounded: Any = _Bounded(self._file)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:
                start = -1
                while (info := tar.next()) is not None:
                    if info.size < 0 or tar.offset <= start or len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
                        raise ValueError(f"the header of {info.name[:99]!r} is not to be trusted")
                    start = tar.offset
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps all of them otherwise
                    self._note(info)
                self._require_end(tar.offset)
        except BaseException:
            self._file.close()
            raise

    def _require_end(self, position: int) -> None:
        """Refuse what is not zeros after the last member: tarfile takes a damaged header for the end."""
        self._file.seek(position)
        if self._file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise ValueError("a header is damaged or cut short")

    def _note(self, info: tarfile.TarInfo) -> None:
        if info.isdir():
            return
        name = str(PurePosixPath(info.name))
        if info.isreg() and not info.issparse():
            self._extents[name] = (info.offset_data, info.size)
        else:
            self._others.append(Member(name=name, size=0, reason="a link, a device or a sparse file"))
        if len(self._extents) + len(self._others) > MAX_MEMBERS:
            raise ValueError(f"it has more than {MAX_MEMBERS} members; divide it")

    def members(self) -> Iterator[Member]:
        yield from (Member(name=name, size=size, reason=None) for name, (_, size) in self._extents.items())
        yield from self._others

    def open(self, name: str) -> "_Extent":
        return _Extent(self._file, *self._extents[name])

    def close(self) -> None:
        self._file.close()


class _Objects:
    """The objects below a prefix; folders without objects of their own do not exist."""

    FAILURE = "cannot be fetched: {}"

    def __init__(self, path: Path) -> None:
        self._folder = ObjectFolder(path)

    def members(self) -> Iterator[Member]:
        for item in self._folder.objects():
            yield Member(name=item.name, size=item.size, reason=None, mtime_ns=item.mtime_ns)

    def open(self, name: str) -> Any:
        return self._folder.open(name)

    def close(self) -> None:
        self._folder.close()


class _Bounded:
    """A file for tarfile, which reads a header of any stated length at once, and believes the records in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._type = file, b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_TAR_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes is too long")
        block = self._file.read(size)
        if size > tarfile.BLOCKSIZE and self._type in EXTENDED:
            _check_records(block)
        self._type = block[156:157] if size == tarfile.BLOCKSIZE else b""  # of the header, if it is one
        return block


class _Extent:
    """Part of an open file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._left = file, size
        file.seek(start)

    def read(self, size: int) -> bytes:
        block = self._file.read(min(size, self._left))
        if not block and self._left:
            raise EOFError("the archive is cut short")
        self._left -= len(block)
        return block

    def __enter__(self) -> "_Extent":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the file open: other members follow."""


def is_container(path: Path) -> bool:
    """Return whether a file is a zip file by its name and first bytes, or a tar file by its name or its header.

    Raises:
        InputError: it is a compressed tar file, in which no member can be read by itself.
    """
    name = path.name.lower()
    if name.endswith(COMPRESSED_TARS):
        raise InputError(f"{path} is a compressed tar file, whose members cannot be read in place; decompress it first")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return False  # reading it gives the reason
    return (name.endswith(".zip") and head[:4] in ZIP_SIGNATURES) or head[257:262] == b"ustar" or name.endswith(".tar")


def _opened(path: Path) -> _ZipMembers | _TarMembers | _Objects:
    if is_object_path(path):
        return _Objects(path)
    return _ZipMembers(path) if _is_zip(path) else _TarMembers(path)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in ZIP_SIGNATURES


def _check_records(block: bytes) -> None:
    """Refuse an extended header of a tar file that would take tarfile much time or memory; see pax(1)."""
    position = 0
    while block[position : position + 1] not in (b"", b"\0"):
        record = RECORD.match(block, position)
        end = position + int(record[1]) if record else 0
        if record is None or end <= record.end() or block[end - 1 : end] != b"\n":
            raise ValueError("an extended header is damaged")
        position = end
    if LONG_NUMBER.search(block):
        raise ValueError("an extended header has a number of more than 128 digits")


def _checked(member: Member) -> Member:
    parts = member.name.replace("\\", "/").split("/")
    is_absolute = member.name.startswith(("/", "\\")) or (len(parts[0]) == 2 and parts[0][1] == ":")
    if is_absolute or ".." in parts or "\0" in member.name or member.name == ".":
        return Member(name=member.name, size=member.size, reason=LEADS_OUT)
    sizes = [len(os.fsencode(part)) for part in parts]
    if max(sizes) > MAX_PART_BYTES or sum(sizes) + len(sizes) > MAX_NAME_BYTES:
        return Member(name=member.name, size=member.size, reason=TOO_LONG)
    if member.size > MAX_MEMBER_BYTES:
        return Member(name=member.name, size=member.size, reason=f"longer than {MAX_MEMBER_BYTES >> 20} MiB")
    return member


def _copy(source: Any, file: IO[bytes], limit: int, may_end: bool) -> None:
    left = limit
    while block := source.read(min(CHUNK_BYTES, left) if left else 1):
        if not left:
            if may_end:
                return
            raise ValueError(f"it is longer than {limit >> 20} MiB")
        file.write(block)
        left -= len(block)


def _require_short_directory(path: Path) -> None:
    """Refuse a zip file with a list of members that would take much memory to read.

    Source: PKWARE's APPNOTE 6.3.10, sections 4.3.14 to 4.3.16.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(size - END_BYTES - LONGEST_COMMENT - LOCATOR_BYTES, 0)
        file.seek(start)
        tail = file.read(END_BYTES + LONGEST_COMMENT + LOCATOR_BYTES)
        has_no_comment = tail[-END_BYTES:].startswith(END) and tail.endswith(b"\0\0")
        at = len(tail) - END_BYTES if has_no_comment else tail.rfind(END)
        if at < 0 or len(tail) < at + END_BYTES:
            raise ValueError("its list of members is missing, so it is cut short")
        count, num_bytes = struct.unpack_from("<HL", tail, at + 10)
        locator = at - LOCATOR_BYTES
        if locator >= 0 and tail[locator : locator + 4] == LOCATOR64:
            end64_at = start + locator - END64_BYTES  # zipfile looks there, whatever the locator says
            file.seek(max(end64_at, 0))
            end64 = file.read(END64_BYTES)
            if end64[:4] != END64 or struct.unpack_from("<Q", tail, locator + 8)[0] != end64_at:
                raise ValueError("its list of members is damaged")
            count, num_bytes = struct.unpack_from("<QQ", end64, 32)
    if count > MAX_MEMBERS or num_bytes > MAX_DIRECTORY_BYTES:
        raise ValueError(f"it has {count} members, whose list takes {num_bytes} bytes; divide it")
