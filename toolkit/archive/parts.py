"""Parts of a run that have ended: each leaves a sealed note, from which the parts are joined."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from medseg_trt.archive.request import Part
from medseg_trt.errors import ArtefactError, UsageError
from medseg_trt.files import read_limited, write_json
from medseg_trt.inference.record_seal import is_sealed, seal
from medseg_trt.inference.resume import RECORDS_FOLDER, SEAL
from medseg_trt.spec import from_dict, to_dict

PARTS = ".parts"  # in the folder of the records; no image has a name that begins with a dot
MAX_NOTE_BYTES = 1 << 28  # a million refused images
MAX_NAMED = 10  # parts in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRefused:
    """An image that a part could not use."""

    position: int  # in the order of all images
    file: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PartNote:
    """What a part leaves when it has ended."""

    images: str  # digest of the names of all images, which the parts must agree on
    made_by: str  # bundle, back-end and options, which the parts must agree on
    refused: tuple[PartRefused, ...]

    __pydantic_config__ = {"extra": "forbid"}


def write_note(folder: Path, part: Part, note: PartNote, seal_key: bytes) -> None:
    """Write the note of a part that has ended."""
    path, fields = _path(folder, part), to_dict(note)
    write_json(path, {"note": fields, SEAL: seal(seal_key, _sealed(part, fields))}, indent=None)


def remove_note(folder: Path, part: Part) -> None:
    """Remove the note of a part that is run again."""
    _path(folder, part).unlink(missing_ok=True)


def notes_of(folder: Path, count: int, images: str, seal_key: bytes) -> dict[int, PartNote]:
    """Return the valid notes of the parts of a run, by number; those of other images are left out.

    Args:
        folder: the output folder.
        count: the number of parts.
        images: digest of the names of all images.
        seal_key: from ``record_seal.record_key``.
    """
    notes: dict[int, PartNote] = {}
    for number in range(1, count + 1):
        part = Part(number=number, of=count)
        note = _read_note(_path(folder, part), part, seal_key)
        if note is not None and note.images == images:
            notes[number] = note
    return notes


def counts_of_parts(folder: Path, seal_key: bytes) -> list[int]:
    """Return the numbers of parts that the sealed notes in a folder speak of, the most recent last."""
    ended: list[tuple[int, int]] = []
    for path in (folder / RECORDS_FOLDER / PARTS).glob("*-of-*.json"):
        with suppress(UsageError):  # of a name that no part has
            part = Part.parse(path.stem.replace("-of-", "/"))
            if _read_note(path, part, seal_key) is not None:
                ended.append((path.stat().st_mtime_ns, part.of))
    return [*dict.fromkeys(count for _, count in sorted(ended, reverse=True))][::-1]


def require_complete(notes: Mapping[int, PartNote], count: int) -> None:
    """Refuse to join parts of which some are missing, or which were run in different ways.

    Raises:
        UsageError: a part is missing, or the parts had different bundles, back-ends or options.
    """
    missing = [number for number in range(1, count + 1) if number not in notes]
    if missing:
        named = ", ".join(f"{number}/{count}" for number in missing[:MAX_NAMED])
        more = " …" if len(missing) > MAX_NAMED else ""
        raise UsageError(
            f"{len(missing)} of {count} parts have not ended, or were run on other inputs or by another user: "
            f"{named}{more}; run them with --part and --continue"
        )
    if len({note.made_by for note in notes.values()}) > 1:
        raise UsageError(
            "the parts were run with different bundles, back-ends or options; run them again with the same ones"
        )


def _read_note(path: Path, part: Part, seal_key: bytes) -> PartNote | None:
    if not path.exists():
        return None
    try:
        content = json.loads(read_limited(path, MAX_NOTE_BYTES))
        fields = content["note"]
        if not is_sealed(seal_key, _sealed(part, fields), content[SEAL]):
            return None
        return from_dict(PartNote, fields, str(path))
    except (ArtefactError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _sealed(part: Part, fields: object) -> bytes:
    return json.dumps([str(part), fields], sort_keys=True).encode()


def _path(folder: Path, part: Part) -> Path:
    return folder / RECORDS_FOLDER / PARTS / f"{part.number}-of-{part.of}.json"
