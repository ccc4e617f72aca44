"""Remember which images of an output folder are finished, so that a run that was killed goes on where it stopped.

There is one small record an image in ``.finished/``, written after the image's files and renamed into place. It is
believed only if this user wrote it and nobody else may change it, the image, the bundle and the options are the same,
and the mask and the overlay are still what they were. It names no file: their names follow from the image's.
"""

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import ArtefactError
from medseg_trt.files import PARTIAL, open_regular, remove_abandoned, sha256_of, write_json
from medseg_trt.imaging.images import MASK_SUFFIXES
from medseg_trt.progress import LOG
from medseg_trt.spec import from_dict, to_dict

FOLDER = ".finished"
OVERLAYS = "overlays"
MAX_RECORD_BYTES = 1 << 20
MAX_NAME_BYTES = 255  # of a file, on every common file system
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What was made of one image."""

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
    """Return where the overlay of an image is written."""
    return folder / OVERLAYS / f"{stem}.png"


def save_record(folder: Path, stem: str, finished: Record) -> None:
    """Write the record of the image that is called ``stem`` in the output folder."""
    path = _record(folder, stem)
    write_json(path, to_dict(finished))
    if (mode := path.stat().st_mode) & OTHERS_MAY_WRITE:  # the umask allows a group to write
        path.chmod(stat.S_IMODE(mode) & ~OTHERS_MAY_WRITE)


def load_record(folder: Path, stem: str, key: str) -> Record | None:
    """Return an image's record if it can be believed; a damaged one is as good as none."""
    path = _record(folder, stem)
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_RECORD_BYTES + 1)
        if not _is_own(status):
            LOG.warning("%s may have been written by others, so its image is segmented again", path)
            return None
        finished = from_dict(Record, json.loads(content), str(path))
        files = {folder / f"{stem}{finished.mask_suffix}": finished.mask_sha256}
        if finished.overlay_sha256 is not None:
            files[overlay_path(folder, stem)] = finished.overlay_sha256
        unchanged = all(_digest(file) == digest for file, digest in files.items())
    except (OSError, ValueError, RecursionError, ArtefactError):
        return None
    return finished if finished.key == key and unchanged else None


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs were writing when they died; what a living process is writing stays."""
    for place in (folder, folder / FOLDER, folder / OVERLAYS):
        if place.is_dir() and (place == folder or not place.is_symlink()):
            for path in place.glob(f"{PARTIAL}*"):
                remove_abandoned(path)


def _record(folder: Path, stem: str) -> Path:
    name = f"{stem}.json"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        name = f"{hashlib.sha256(os.fsencode(stem)).hexdigest()}.json"
    return folder / FOLDER / name


def _is_own(status: os.stat_result) -> bool:
    """Say whether this user wrote the file and nobody else may write to it; Windows keeps neither in the status."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & OTHERS_MAY_WRITE


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return sha256_of(file)
