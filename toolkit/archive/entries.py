"""List the files of the inputs of an archive, and what cannot be used, without reading any of them.

An input is a folder, searched to any depth; a pattern such as ``archive/**/*.dcm``; a zip or tar file; a prefix of a
bucket; a DICOMDIR; or an image. Hidden files are ignored. Links are followed, and every folder is listed once, under
its own name before that of a link, so links in a circle end.
"""

import os
import stat
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from medseg_trt.archive.containers import COMPRESSED_TARS, Container, is_container
from medseg_trt.archive.media_directory import is_media_directory, referenced_files
from medseg_trt.archive.object_store import is_object_path
from medseg_trt.errors import InputError, UsageError
from medseg_trt.imaging.listing import IRREGULAR, why_unusable
from medseg_trt.inference.resume import RECORDS_FOLDER

Identity = tuple[int, int]  # device and number
MAGIC = frozenset("*?[")
ANY_DEPTH = "**"
IN_OUTPUT = "it lies in the folder of the masks, which could replace it; choose another folder with -o"
SEEN = "a link to a folder that is listed under another name"
ARCHIVE_SUFFIXES = (".zip", ".tar")
INNER_ARCHIVE = "an archive; give it as an input of its own"
STDIN = "-"
TABLE = ".csv"  # all that a run without images writes


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A file that may be an image or a part of one."""

    path: Path  # of a member of an archive file: below the path of that file
    parent: str  # the folder among the outputs, with slashes; empty for the top
    size: int  # bytes
    mtime_ns: int
    alone: bool = False  # an image by itself, although it may look like a slice of a series


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What is not used, and why."""

    path: str  # of the file or folder; of a member of an archive file, below the path of that file
    reason: str
    refused: bool  # an error; otherwise it is left out
    is_folder: bool = False  # which may hold images


@dataclass(kw_only=True, slots=True)
class Entries:
    """Lists inputs; the archive files among them stay open in ``containers``."""

    ignored: Collection[Identity]  # folders that are not listed, such as the output folder
    output: Path  # the folder of the masks, in which no image may lie
    containers: dict[Path, Container] = field(default_factory=dict[Path, Container])

    def of(self, path: Path) -> Iterator[Entry | Problem]:
        """List one input that the user named."""
        if is_object_path(path):
            yield from self._file(path, "")
            return
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if isinstance(error, FileNotFoundError) and MAGIC & set(str(path)) and not path.is_symlink():
                yield from self._matching(path)
            else:
                yield Problem(path=str(path), reason=why_unusable(path, error), refused=True)
            return
        if stat.S_ISDIR(mode):
            yield from self._tree(path)
        elif not stat.S_ISREG(mode):
            yield Problem(path=str(path), reason=f"{path} is {IRREGULAR}; save the image to a file", refused=True)
        else:
            yield from self._file(path, "", alone=True)

    def listed(self, lines: Iterable[str]) -> Iterator[Entry | Problem]:
        """List the files and folders that lines name, under the paths as they are written, without a leading slash."""
        for line in lines:
            path = Path(line)
            parts = path.parts[1:] if path.is_absolute() else path.parts
            if ".." in parts:
                reason = f"{line} leads out of the folder; write it without .., or as an absolute path"
                yield Problem(path=line, reason=reason, refused=True)
            elif "\0" in line:
                reason = f"{line[:99]} has a zero byte; write one path a line, for example with find -print"
                yield Problem(path=line[:99], reason=reason, refused=True)
            elif _is(stat.S_ISDIR, path):
                yield from self._tree(path, "/".join(parts))
            elif _is(stat.S_ISREG, path):
                yield from self._file(path, "/".join(parts[:-1]))
            else:
                yield from self.of(path)  # it says why it cannot be used

    def _file(self, path: Path, parent: str, alone: bool = False) -> Iterator[Entry | Problem]:
        try:
            if self._is_in_output(path):
                yield Problem(path=str(path), reason=f"{path}: {IN_OUTPUT}", refused=True)
            elif is_object_path(path) or is_container(path):
                yield from self._members(path, parent)
            elif is_media_directory(path):
                yield from self._referenced(path, parent)
            elif path.name.lower().endswith(ARCHIVE_SUFFIXES):
                yield Problem(path=str(path), reason=f"{path} is no zip file, whatever its name says", refused=True)
            else:
                yield replace(_entry(path, parent, path.stat()), alone=alone)
        except InputError as error:
            yield Problem(path=str(path), reason=str(error), refused=True)
        except OSError as error:
            yield Problem(path=str(path), reason=why_unusable(path, error), refused=True)

    def _members(self, path: Path, parent: str) -> Iterator[Entry | Problem]:
        container = self.containers.get(path) or Container(path)
        self.containers[path] = container
        is_bucket = is_object_path(path)
        changed_ns = 0 if is_bucket else path.stat().st_mtime_ns  # a changed archive changes all of its members
        for member in container.members():
            inside = PurePosixPath(member.name)
            is_output = is_bucket and self._is_in_output(path / inside)
            if member.reason is not None:
                inner = f"{path}/{member.name}"
                yield Problem(path=inner, reason=f"{inner}: {member.reason}", refused=True)
            elif not is_output and not any(part.startswith(".") for part in inside.parts):
                below = joined(parent, str(inside.parent) if len(inside.parts) > 1 else "")
                mtime_ns = changed_ns if member.mtime_ns is None else member.mtime_ns
                yield Entry(path=path / inside, parent=below, size=member.size, mtime_ns=mtime_ns)

    def _matching(self, pattern: Path) -> Iterator[Entry | Problem]:
        """List what a pattern matches, and everything in folders that it matches."""
        parts = pattern.parts
        first = next(index for index, part in enumerate(parts) if MAGIC & set(part))
        root, wanted, count = Path(*parts[:first]), parts[first:], 0
        for item in self._tree(root):
            inside = Path(item.path).relative_to(root).parts
            if any(_matches(inside[:depth], wanted) for depth in range(1, len(inside) + 1)):
                count += 1
                is_named = wanted[-1] != ANY_DEPTH and _matches(inside, wanted)  # not merely in a folder that is
                if is_named and isinstance(item, Entry) and _may_hold_images(item.path):
                    yield from self._file(item.path, item.parent)
                else:
                    yield item
            elif isinstance(item, Problem) and item.is_folder:
                yield item
        if not count:
            yield Problem(path=str(pattern), reason=f"{pattern} matches no file", refused=True)

    def _tree(self, root: Path, top: str = "") -> Iterator[Entry | Problem]:
        if self._is_in_output(root):
            yield Problem(path=str(root), reason=f"{root}: {IN_OUTPUT}", refused=True, is_folder=True)
            return
        seen: set[Identity] = set()
        folders, links = [(root, top)], list[tuple[Path, str]]()
        while folders or links:
            is_link = not folders
            path, relative = links.pop() if is_link else folders.pop()
            try:
                status = path.stat()
                identity = (status.st_dev, status.st_ino)
                if is_output := self._is_in_output(path):  # by name: another run may have made it just now
                    self._require_own_output()
                if is_output or identity in self.ignored:
                    continue
                if identity in seen:
                    yield Problem(path=str(path), reason=SEEN, refused=False)
                    continue
                seen.add(identity)
                inner: list[os.DirEntry[str]] = []
                with os.scandir(path) as listed:
                    for item in listed:
                        if not item.name.startswith("."):
                            yield from self._listed(item, relative, inner)
            except OSError as error:
                yield Problem(path=str(path), reason=why_unusable(path, error), refused=True, is_folder=True)
                continue
            for item in sorted(inner, key=lambda item: item.name, reverse=True):
                target = links if item.is_symlink() else folders
                target.append((Path(item.path), joined(relative, item.name)))

    def _listed(
        self, item: os.DirEntry[str], parent: str, folders: list[os.DirEntry[str]]
    ) -> Iterator[Entry | Problem]:
        path = Path(item.path)
        try:
            status = item.stat()
        except OSError as error:
            yield Problem(path=str(path), reason=why_unusable(path, error), refused=True)
            return
        if stat.S_ISDIR(status.st_mode):
            folders.append(item)
        elif not stat.S_ISREG(status.st_mode):
            yield Problem(path=str(path), reason=IRREGULAR, refused=False)
        elif item.is_symlink() and self._is_in_output(path):
            yield Problem(path=str(path), reason=f"{path}: {IN_OUTPUT}", refused=True)
        else:
            yield _entry(path, parent, status)

    def _referenced(self, path: Path, parent: str) -> Iterator[Entry | Problem]:
        for relative in referenced_files(path):
            file = path.parent / relative
            below = str(PurePosixPath(relative).parent)
            try:
                # A name such as ../cd/a.png ends in the folder, but the mask would be written out of the output.
                is_outside = relative.startswith("/") or ".." in PurePosixPath(relative).parts
                if is_outside or not file.resolve().is_relative_to(path.parent.resolve()):
                    reason = f"{path} names {relative}, which leads out of its folder"
                    yield Problem(path=str(file), reason=reason, refused=True)
                elif not stat.S_ISREG((status := file.stat()).st_mode):
                    yield Problem(path=str(file), reason=f"{path} names {relative}, which is no file", refused=True)
                elif self._is_in_output(file):
                    yield Problem(path=str(file), reason=f"{file}: {IN_OUTPUT}", refused=True)
                else:
                    yield _entry(file, joined(parent, "" if below == "." else below), status)
            except OSError as error:
                yield Problem(path=str(file), reason=why_unusable(file, error), refused=True)
            except (ValueError, RuntimeError):  # a zero byte; a loop of links
                reason = f"{path} names {relative!r}, which is no name of a file"
                yield Problem(path=str(path), reason=reason, refused=True)

    def _is_in_output(self, path: Path) -> bool:
        if is_object_path(path) or is_object_path(self.output):
            return path.is_relative_to(self.output)
        return path.resolve().is_relative_to(self.output.resolve())

    def _require_own_output(self) -> None:
        """Refuse an output folder among the inputs whose files no run has written: they may be images."""
        names = os.listdir(self.output) if self.output.is_dir() else []
        if RECORDS_FOLDER not in names and any(not name.startswith(".") and not name.endswith(TABLE) for name in names):
            raise UsageError(
                f"{self.output} lies in the folder of the images and holds other files than masks; choose an empty or "
                f"new folder, such as -o {self.output / 'masks'}"
            )


def needs_archive(path: Path) -> bool:
    """Return whether an input is an archive file, a bucket, a DICOMDIR, or a pattern that matches no file by name."""
    if is_object_path(path):
        return True
    if not path.exists():
        return bool(MAGIC & set(str(path))) and not path.is_symlink()
    try:
        return path.is_file() and (is_container(path) or is_media_directory(path))
    except InputError:
        return True  # listing the inputs gives the reason


def _may_hold_images(path: Path) -> bool:
    """Return whether a file is an archive file or a DICOMDIR by its name."""
    return path.name.lower().endswith((*ARCHIVE_SUFFIXES, *COMPRESSED_TARS)) or is_media_directory(path)


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    try:
        return kind(path.stat().st_mode)
    except OSError:
        return False


def read_list(name: str) -> Iterator[str]:
    """Yield the lines of a list of inputs that are not empty; ``-`` is standard input.

    Raises:
        InputError: it cannot be read.
    """
    if name == STDIN and sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison]  # it was closed
        raise InputError("standard input is closed, so no list of files can be read from it")
    try:
        source: Any = sys.stdin.buffer if name == STDIN else open(name, "rb")  # noqa: SIM115  # closed below
        with source:
            for line in source:
                if stripped := line.rstrip(b"\r\n"):
                    yield os.fsdecode(stripped)
    except OSError as error:
        raise InputError(f"{name} cannot be read as a list of files: {error.strerror}") from error


def _entry(path: Path, parent: str, status: os.stat_result) -> Entry:
    return Entry(path=path, parent=parent, size=status.st_size, mtime_ns=status.st_mtime_ns)


def joined(parent: str, name: str) -> str:
    """Return the path of a name below a folder, either of which may be empty."""
    return f"{parent}/{name}" if parent and name else parent or name


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a pattern, in which ``**`` stands for any number of folders."""
    if not wanted:
        return not parts
    if wanted[0] == ANY_DEPTH:
        return any(_matches(parts[start:], wanted[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])
