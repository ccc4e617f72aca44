"""Remember which images of an output folder are finished, so that a run that was killed goes on where it stopped.

There is one small record an image in ``.finished/``, written after the image's files and renamed into place. It is
believed only if the image, the bundle and the options are the same, and every file that it names is still what it was.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.errors import ArtefactError
from medseg_trt.files import inside, sha256, write_json
from medseg_trt.spec import from_dict, to_dict

FOLDER = ".finished"
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What was made of one image."""

    key: str  # digest of the image, the bundle, and the options that its files depend on
    files: Mapping[str, str]  # SHA-256 by name, relative to the output folder; the mask first
    areas: tuple[tuple[str, ...], ...]  # rows of the table of areas

    __pydantic_config__ = {"extra": "forbid"}

    @property
    def mask(self) -> str:
        """The mask's name."""
        return next(iter(self.files))


def remember(folder: Path, stem: str, finished: Finished) -> None:
    """Write the record of the image that is called ``stem`` in the output folder."""
    write_json(_place(folder, stem), to_dict(finished))


def recall(folder: Path, stem: str, key: str) -> Finished | None:
    """Return an image's record if it can be believed; a damaged one is as good as none."""
    path = _place(folder, stem)
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        finished = from_dict(Finished, json.loads(path.read_text(encoding="utf-8")), str(path))
        unchanged = all(sha256(inside(folder, name)) == digest for name, digest in finished.files.items())
    except (OSError, ValueError, RecursionError, ArtefactError):
        return None
    return finished if finished.key == key and finished.files and unchanged else None


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run was writing when it died: hidden files that were never renamed into place."""
    for path in folder.rglob(".partial-*"):
        path.unlink(missing_ok=True)


def _place(folder: Path, stem: str) -> Path:
    return folder / FOLDER / f"{stem}.json"
