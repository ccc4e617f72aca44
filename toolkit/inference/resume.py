"""Record which images of an output folder are finished, so that an interrupted run can resume.

Each image has one record in ``.finished/``, written after the image's files and renamed into place. A record is valid
only if it is sealed with this user's key (``record_seal``); this user wrote it and nobody else may change it; the
image, the bundle and the options are the same; and the mask and the overlay are unchanged. A record holds no file name:
names follow from the image's.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from medseg_trt.errors import ArtefactError
from medseg_trt.files import PARTIAL, open_regular, remove_abandoned, sha256_of, write_json
from medseg_trt.imaging.images import MASK_SUFFIXES
from medseg_trt.inference.record_seal import is_sealed, seal
from medseg_trt.progress import LOG
from medseg_trt.spec import from_dict, to_dict

RECORDS_FOLDER = ".finished"
RECORD_SUFFIX = ".json"
OVERLAYS = "overlays"
MAX_RECORD_BYTES = 1 << 20
SEAL = "seal"  # beside the fields of a record
MAX_NAME_BYTES = 255  # of a file, on every common file system
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The files that a run wrote for one image."""

    key: str  # digest of the image, the bundle, and the options that its files depend on
    mask_suffix: str  # one of MASK_SUFFIXES
    mask_sha256: str
    overlay_sha256: str | None  # None: there is no overlay
    areas: tuple[tuple[str, ...], ...]  # rows of the table of areas

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.mask_suffix not in MASK_SUFFIXES:
            raise ValueError(f"a mask's name does not end with {self.mask_suffix!r}")


def overlay_path(folder: Path, stem: str) -> Path:
    """Return the path of an image's overlay."""
    return folder / OVERLAYS / f"{stem}.png"


def save_record(folder: Path, stem: str, record: Record, seal_key: bytes) -> None:
    """Write the record of an image.

    Args:
        folder: the output folder.
        stem: the image's name there, without suffix.
        record: of its files.
        seal_key: from ``record_seal.record_key``.
    """
    path, fields = _record_path(folder, stem), to_dict(record)
    write_json(path, {**fields, SEAL: seal(seal_key, _sealed_content(stem, fields))})
    if (mode := path.stat().st_mode) & OTHERS_MAY_WRITE:  # the umask allows a group to write
        path.chmod(stat.S_IMODE(mode) & ~OTHERS_MAY_WRITE)


def load_record(folder: Path, stem: str, key: str | None, seal_key: bytes) -> Record | None:
    """Return an image's record if it is valid; None if it is missing, damaged, another user's or out of date.

    Args:
        folder: the output folder.
        stem: the image's name there, without suffix.
        key: of the image, the bundle and the options; None leaves its comparison to the caller.
        seal_key: from ``record_seal.record_key``.
    """
    record = read_record(folder, stem, key, seal_key)
    return record if record is not None and has_its_files(folder, stem, record) else None


def read_record(folder: Path, stem: str, key: str | None, seal_key: bytes) -> Record | None:
    """Return an image's record as ``load_record`` does, whatever became of the files that it is of."""
    path = _record_path(folder, stem)
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_RECORD_BYTES + 1)
        if not _is_own(status):
            LOG.warning("%s may have been written by others, so its image is segmented again", path)
            return None
        fields = _fields(content)
        digits = fields.pop(SEAL, None)
        if not is_sealed(seal_key, _sealed_content(stem, fields), digits):
            LOG.warning("%s was not written by a run of this user on this machine; its image is segmented again", path)
            return None
        record = from_dict(Record, fields, str(path))
    except (OSError, ValueError, RecursionError, ArtefactError):
        return None
    return record if key in (None, record.key) else None


def has_its_files(folder: Path, stem: str, record: Record) -> bool:
    """Return whether the files that a record is of are unchanged."""
    try:
        return all(_digest(folder / name) == digest for name, digest in digests_of(stem, record).items())
    except OSError:
        return False


def digests_of(stem: str, record: Record) -> dict[str, str]:
    """Return the digests of the files of an image, the mask and an overlay, by their names in the output folder."""
    digests = {f"{stem}{record.mask_suffix}": record.mask_sha256}
    if record.overlay_sha256 is not None:
        digests[f"{OVERLAYS}/{stem}.png"] = record.overlay_sha256
    return digests


def remove_leftovers(folder: Path) -> None:
    """Delete partial files of runs that have ended; those of a running process stay."""
    for directory in (folder, folder / RECORDS_FOLDER, folder / OVERLAYS):
        if directory.is_dir() and (directory == folder or not directory.is_symlink()):
            for path in directory.glob(f"{PARTIAL}*"):
                remove_abandoned(path)


def _fields(content: bytes) -> dict[str, Any]:
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise ValueError("a record is an object")
    return cast("dict[str, Any]", fields)


def _sealed_content(stem: str, fields: Mapping[str, Any]) -> bytes:
    """Return what a seal covers: a record is of one image, so that it cannot be copied to another."""
    return json.dumps([stem, fields], sort_keys=True).encode()


def record_name(stem: str) -> str:
    """Return the name of an image's record in the output folder."""
    name = f"{stem}{RECORD_SUFFIX}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f"{hashlib.sha256(os.fsencode(stem)).hexdigest()}{RECORD_SUFFIX}"
    return f"{RECORDS_FOLDER}/{name}"


def _record_path(folder: Path, stem: str) -> Path:
    return folder / record_name(stem)


def _is_own(status: os.stat_result) -> bool:
    """Return whether only this user may write the file; True on Windows, whose status lacks owner and mode."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & OTHERS_MAY_WRITE


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return sha256_of(file)
