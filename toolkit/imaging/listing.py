"""List the images among the inputs, and everything else in their folders.

An image is a file directly in a given folder, or a DICOM series there or one folder below. Other files are refused
where they should be images but cannot be opened, and left out otherwise. Hidden files are ignored.
"""

import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import DICOM, READERS, Source, kind_of, natural_key, source_of_file, suffix_of

MAX_SEARCHED = 10_000  # files and folders below the first level; a disk lists so many in about a second
EXAMPLES = 3  # names in a message
DETACHED_HEADER = ".nhdr"  # its voxels are in another file

OTHER_KIND = "of another kind"
IRREGULAR = "neither a file nor a folder"
DEEPER = "in a sub-folder, which is not searched"
CLOSED = "a folder that cannot be opened"
UNSEEN = "in a sub-folder that was not searched"
DICOM_WITHOUT_IMAGE = "DICOM without an image of its own"


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedInput:
    """An unusable input and the reason."""

    path: Path
    error: InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A file or folder that is not used as an image."""

    folder: Path  # the input
    path: Path  # the file or folder, or the folder that holds it
    reason: str  # one of the constants above
    count: int = 1  # files


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """The images of the inputs, and everything else in them."""

    sources: tuple[Source, ...]
    refused: tuple[RefusedInput, ...]
    left_out: tuple[LeftOut, ...]

    def warnings(self) -> list[str]:
        """Return one line per input and reason, with the number of files left out, examples and a remedy."""
        in_order = sorted(self.left_out, key=lambda item: (str(item.folder), item.reason))
        grouped = groupby(in_order, key=lambda item: (item.folder, item.reason))
        lines = [_warning(folder, reason, list(items)) for (folder, reason), items in grouped]
        return [line for line in lines if line is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entries:
    """The content of one folder without hidden names."""

    files: list[Path] = field(default_factory=list[Path])
    folders: list[Path] = field(default_factory=list[Path])
    irregular: list[Path] = field(default_factory=list[Path])
    refused: list[RefusedInput] = field(default_factory=list[RefusedInput])


@dataclass(kw_only=True, slots=True)
class _Lists:
    """The lists that a listing is collected in."""

    sources: list[Source] = field(default_factory=list[Source])
    refused: list[RefusedInput] = field(default_factory=list[RefusedInput])
    left_out: list[LeftOut] = field(default_factory=list[LeftOut])


def list_images(inputs: Sequence[Path], ignored: Sequence[Path] = ()) -> Listing:
    """List the images of files and folders, in the order of ``inputs``, and in natural order within a folder.

    An image that is given twice is listed once.

    Args:
        inputs: files and folders.
        ignored: folders to skip where they lie below an input, such as the output folder.

    Raises:
        MissingExtraError: there are DICOM files and pydicom is not installed.
    """
    seen = {identity for folder in ignored if (identity := _identity(folder)) is not None}
    lists = _Lists()
    for path in inputs:
        try:
            if _is_folder(path):
                _list_folder(path, set(seen), lists)
            else:
                lists.sources.append(source_of_file(path))
        except InputError as error:
            lists.refused.append(RefusedInput(path=path, error=error))
    return Listing(
        sources=tuple(dict.fromkeys(lists.sources)),
        refused=tuple(lists.refused),
        left_out=tuple(dict.fromkeys(lists.left_out)),
    )


def sources_in(folder: Path) -> list[Source]:
    """Return the images and DICOM series directly in a folder, in natural order; there may be none.

    Raises:
        InputError: the folder cannot be listed, or a file in it cannot be read.
        MissingExtraError: there are DICOM files and pydicom is not installed.
    """
    entries = _entries(folder)
    if entries.refused:
        raise entries.refused[0].error
    known, _, dicom_files = _by_kind(entries.files)
    sources = [source_of_file(path) for path in known]
    sources += _series(folder, dicom_files, lambda _reason, _paths: None)  # the caller reports the rest
    return sorted(sources, key=lambda source: natural_key(source.name))


def _is_folder(path: Path) -> bool:
    """Return whether the input is a folder; otherwise it is a readable file.

    Raises:
        InputError: it is neither.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(why_unusable(path, error)) from error
    if stat.S_ISDIR(mode):
        return True
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is neither a file nor a folder; save the image to a file")
    _require_readable(path)
    return False


def _list_folder(folder: Path, seen: set[tuple[int, int]], lists: _Lists) -> None:
    entries = _entries(folder)
    first = len(lists.left_out)

    def leave_out(reason: str, paths: Sequence[Path]) -> None:
        lists.left_out += [LeftOut(folder=folder, path=path, reason=reason) for path in paths]

    known, others, dicom_files = _by_kind(entries.files)
    sources = [source_of_file(path) for path in known]
    sources += _series(folder, dicom_files, leave_out)
    leave_out(OTHER_KIND, without_detached(others, known))
    leave_out(IRREGULAR, entries.irregular)
    refused = entries.refused
    budget = iter(range(MAX_SEARCHED))
    seen.add(_identity(folder) or (0, 0))
    for below in entries.folders:
        if (identity := _identity(below)) in seen or identity is None:
            continue
        seen.add(identity)
        try:
            inside = _entries(below)
        except InputError:
            leave_out(CLOSED, [below])
            continue
        known, others, dicom_files = _by_kind(inside.files)
        sources += _series(below, dicom_files, leave_out)
        refused += [item for item in inside.refused if _may_be_dicom(item.path, bool(dicom_files))]
        broken = [item for item in inside.refused if suffix_of(item.path) not in (None, DICOM)]
        if count := len(known) + len(broken):
            lists.left_out.append(LeftOut(folder=folder, path=below, reason=DEEPER, count=count))
        lists.left_out += _deeper(folder, inside.folders, seen, budget)
    if not sources and not refused:
        raise InputError(_no_image_message(folder, lists.left_out[first:]))
    lists.sources += sorted(sources, key=lambda source: natural_key(source.name))
    lists.refused += refused


def _entries(folder: Path) -> _Entries:
    """List a folder, sorted by type.

    Raises:
        InputError: the folder cannot be listed.
    """
    try:
        paths = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
    except OSError as error:
        raise InputError(why_unusable(folder, error)) from error
    entries = _Entries()
    for path in paths:
        if path.name.startswith("."):
            continue
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                entries.folders.append(path)
            elif stat.S_ISREG(mode):
                _require_readable(path)
                entries.files.append(path)
            else:
                entries.irregular.append(path)
        except OSError as error:
            entries.refused.append(RefusedInput(path=path, error=InputError(why_unusable(path, error))))
        except InputError as error:
            entries.refused.append(RefusedInput(path=path, error=error))
    return entries


def _by_kind(files: Sequence[Path]) -> tuple[list[Path], list[Path], list[Path]]:
    """Divide files into images other than DICOM, unsupported files, and DICOM."""
    kinds = {path: kind_of(path) for path in files}
    known = [path for path, kind in kinds.items() if kind not in (None, DICOM)]
    return known, [path for path in files if kinds[path] is None], [path for path in files if kinds[path] == DICOM]


def _series(folder: Path, dicom_files: Sequence[Path], leave_out: Any) -> list[Source]:
    """Return the DICOM images of a folder; the DICOM reader logs why a file is not an image."""
    if not dicom_files:
        return []
    series = import_module(READERS[DICOM]).find_series(folder, sorted(dicom_files))
    sources = [
        source_of_file(members[0]) if stem is None else Source(path=folder, files=members, stem=stem)
        for stem, members in series
    ]
    used = {path for source in sources for path in source.files}
    leave_out(DICOM_WITHOUT_IMAGE, [path for path in dicom_files if path not in used])
    return sources


def without_detached(others: Sequence[Path], known: Sequence[Path]) -> list[Path]:
    """Return the unsupported files of a folder without those that hold the voxels of a detached header."""
    headers = {path.stem for path in known if path.suffix.lower() == DETACHED_HEADER}
    return [path for path in others if path.name.split(".")[0] not in headers and path.stem not in headers]


def _may_be_dicom(path: Path, beside_dicom: bool) -> bool:
    suffix = suffix_of(path)
    return suffix == DICOM or (suffix is None and beside_dicom)


def _deeper(
    folder: Path, below: Sequence[Path], seen: set[tuple[int, int]], budget: Iterator[int]
) -> Iterator[LeftOut]:
    """Yield the folders of a tree that hold images; links are followed, and each folder is visited once."""
    waiting = list(reversed(below))
    while waiting:
        path = waiting.pop()
        identity = _identity(path)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        if next(budget, None) is None:
            yield LeftOut(folder=folder, path=path, reason=UNSEEN)
            return
        try:
            entries = _entries(path)
        except InputError:
            yield LeftOut(folder=folder, path=path, reason=CLOSED)
            continue
        files = [file for file in entries.files if next(budget, None) is not None]
        count = sum(kind_of(file) is not None for file in files)
        count += sum(suffix_of(item.path) is not None for item in entries.refused)
        if count:
            yield LeftOut(folder=folder, path=path, reason=DEEPER, count=count)
        if len(files) < len(entries.files):
            yield LeftOut(folder=folder, path=path, reason=UNSEEN)
            return
        waiting += reversed(entries.folders)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None  # it does not exist, so it equals no other folder
    return status.st_dev, status.st_ino


def _require_readable(path: Path) -> None:
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f"{path} cannot be read: Permission denied")


def why_unusable(path: Path, error: OSError) -> str:
    """Return one line for a file or folder that cannot be used, with what to do about a broken link."""
    if isinstance(error, FileNotFoundError):
        if not path.is_symlink():
            return f"{path} does not exist"
        target = os.readlink(path)
        return f"{path} is a link to {target}, which does not exist; fetch or mount the target, or remove the link"
    return f"{path} cannot be read: {error.strerror}"


def _warning(folder: Path, reason: str, items: Sequence[LeftOut]) -> str | None:
    count = sum(item.count for item in items)
    names = [str(item.path.relative_to(folder)) for item in items]
    examples = ", ".join(names[:EXAMPLES]) + (" …" if len(names) > EXAMPLES else "")
    if reason == DICOM_WITHOUT_IMAGE:
        return None  # the reader has logged why
    if reason == OTHER_KIND:
        known = ", ".join(READERS)
        return f"{folder}: {count} file(s) of other kinds are left out ({examples}); supported: {known} and DICOM"
    if reason == DEEPER:
        return f"{folder}: {_deep_images(items)}"
    if reason == CLOSED:
        return f"{folder}: {count} sub-folder(s) cannot be opened and are left out ({examples}); check the permissions"
    if reason == UNSEEN:
        return f"{folder}: sub-folders hold more than {MAX_SEARCHED} files and were not all searched ({examples})"
    return f"{folder}: {count} item(s) that are {reason} are left out ({examples})"


def _deep_images(items: Sequence[LeftOut]) -> str:
    """Return a message with the number of images in sub-folders and the folders to give instead."""
    folders = [item.path for item in items]
    parents = list(dict.fromkeys(folder.parent for folder in folders))
    is_shorter = len(parents) < len(folders) and not {item.folder for item in items} & set(parents)
    named = parents if is_shorter else folders  # DICOM is also searched one level below
    commands = " ".join(shlex.quote(str(path)) for path in named[:EXAMPLES]) + (" …" if len(named) > EXAMPLES else "")
    return (
        f"{sum(item.count for item in items)} image file(s) in {len(items)} sub-folder(s) are left out; only DICOM is "
        f"searched for in sub-folders, one level deep, unless infer is given --tree. To use them, name: {commands}"
    )


def _no_image_message(folder: Path, left_out: Sequence[LeftOut]) -> str:
    deeper = [item for item in left_out if item.reason == DEEPER]
    if deeper:
        return f"{folder} itself holds no image: {_deep_images(deeper)}"
    text = f"{folder} holds no image; supported files end with {', '.join(READERS)}, or are DICOM"
    counts = {reason: sum(item.count for item in left_out if item.reason == reason) for reason in _REASONS}
    summary = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    return text + (f". It holds: {summary}" if summary else "")


_REASONS = (OTHER_KIND, IRREGULAR, CLOSED, UNSEEN, DICOM_WITHOUT_IMAGE)
