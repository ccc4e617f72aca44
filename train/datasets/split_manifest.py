"""Restore splits from the ``data.json`` of a run, or the order of files from a list of names."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.spec import from_dict
from medseg_trt.train.datasets.folder import DataFolder

MAX_BYTES = 1 << 28  # ISIC 2017 takes 0.6 MiB


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitManifest:
    """The parsed form of ``DataFolder.manifest``."""

    classes: tuple[str, ...]
    window: tuple[float, float] | None = None
    splits: Mapping[str, tuple[str, ...]]
    files: Mapping[str, str]  # SHA-256 by name relative to the data set's folder
    how: Mapping[str, str | int] = field(default_factory=dict)

    __pydantic_config__ = {"extra": "forbid"}


def read_split_manifest(path: Path) -> SplitManifest:
    """Read the manifest of a run.

    Raises:
        InputError: it cannot be read, or is no manifest.
    """
    try:
        return from_dict(SplitManifest, json.loads(_text(path)), str(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON; a split manifest is the data.json of a run folder") from error
    except ArtefactError as error:
        raise InputError(f"{error}; a split manifest is the data.json of a run folder") from error


def with_recorded_splits(data: DataFolder, recorded: SplitManifest, path: str) -> DataFolder:
    """Return the data set with the splits of a manifest, after comparing the digest of every file.

    Args:
        data: the data set.
        recorded: the manifest.
        path: of the manifest, for messages.

    Raises:
        InputError: classes or files are not those of the manifest.
    """
    if recorded.classes != data.classes.names:
        raise InputError(
            f"{path} is of the classes {', '.join(recorded.classes)}, "
            f"but {data.root} has {', '.join(data.classes.names)}"
        )
    cases = {case.name: case for part in data.splits.values() for case in part}
    names = [name for part in recorded.splits.values() for name in part]
    if missing := [name for name in names if name not in cases]:
        raise InputError(f"{path} names {missing[0]}, which is not in {data.root} ({len(missing)} such case(s))")
    splits = {split: tuple(cases[name] for name in part) for split, part in recorded.splits.items()}
    divided = replace(data, splits=splits, how=dict(recorded.how), has_given_splits=True)
    digests = divided.manifest()["files"]
    differing = [name for name in {**digests, **recorded.files} if digests.get(name) != recorded.files.get(name)]
    if differing:
        raise InputError(f"{data.root / differing[0]} is not the file of {path} ({len(differing)} such file(s))")
    return divided


def read_order(path: Path) -> list[str]:
    """Return the names of cases in a text file, one per line.

    Raises:
        InputError: it cannot be read, or a name occurs twice.
    """
    names = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if len(set(names)) < len(names):
        raise InputError(f"{path} names a case twice: {next(name for name in names if names.count(name) > 1)}")
    return names


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB; it should only name cases")
    try:
        return path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise InputError(f"{path} is no text: {error}") from error
