"""What a reader of an official archive is and what it finds; and the few things that all readers do with folders."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg_trt.errors import InputError
from medseg_trt.imaging.images import READERS, natural_key, output_stem
from medseg_trt.spec import Classes
from medseg_trt.train.datasets.folder import Case
from medseg_trt.train.datasets.mask_classes import LESION
from medseg_trt.train.datasets.options import DataOptions

ALL = "all"  # the part of a data set that comes undivided
MAX_DEPTH = 3  # archives unzip into folders of their own, and are unzipped into folders
IGNORED_FOLDERS = ("__MACOSX",)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetScan:
    """What lies in a data set's folder, before it is checked and divided."""

    parts: Mapping[str, tuple[Case, ...]]  # "train", "val", "test" where the data set comes divided, else ALL
    official: Mapping[str, int]  # how many cases each part has in the official archives
    classes: Classes = LESION
    window: tuple[float, float] | None = None  # lower and upper end of the values that matter; None: 8-bit pictures
    problems: tuple[str, ...] = ()  # why it cannot be used; none where it can
    remarks: tuple[str, ...] = ()  # what to know of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way in which a data set lies on disks."""

    what: str  # in words, for people
    locate: Callable[[Path], Path | None]  # from the folder that was named to the one that is read, if it is this one
    read: Callable[[Path, DataOptions], DatasetScan]
    is_telling: bool = True  # whether it gives away which data set it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A data set of the paper."""

    title: str
    modality: str
    layouts: tuple[Layout, ...]
    groups: str = "none"  # what the group of a case is: "sequence" or "patient"
    choices: tuple[str, ...] = ()  # the fields of DataOptions that mean something to it, beyond those of all
    other_counts: Mapping[int, str] = field(default_factory=dict)  # numbers of cases in use that are not the official


def locator(*wanted: str) -> Callable[[Path], Path | None]:
    """Return a function that finds the folder, the given one or one shortly below, that has all ``wanted`` in it.

    ``wanted`` are relative paths of folders, in lower case; upper case in names on the disk does not matter.
    """

    def locate(root: Path) -> Path | None:
        return next((base for base in folders(root) if all(below(base, path) for path in wanted)), None)

    return locate


def folders(root: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield ``root`` and the folders below it, level by level, down to ``depth`` levels."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        level = [each for folder in level for each in _subfolders(folder)]


def below(base: Path, path: str) -> Path | None:
    """Return the folder at a relative path, in lower case, whatever the case of the names on the disk.

    A folder that holds nothing but a folder of its own name, as some unpackers leave it, is passed through.
    """
    for name in path.split("/"):
        found = next((each for each in _subfolders(base) if each.name.lower() == name), None)
        if found is None:
            return None
        base = found
    return next((each for each in _subfolders(base) if each.name == base.name), base)


def files(folder: Path | None, pattern: str = r".*") -> list[Path]:
    """Return the images of a folder whose stem matches ``pattern`` whole, in natural order; hidden files are left out.

    The case of letters does not matter. None has no files.

    Raises:
        InputError: a link leads nowhere.
    """
    if folder is None:
        return []
    if lost := [path for path in folder.iterdir() if path.is_symlink() and not path.exists()]:
        raise InputError(
            f"{lost[0]} is a link to a file that does not exist ({len(lost)} such); fetch it or remove the link"
        )
    return sorted(
        (
            path for path in folder.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.name.lower().endswith(tuple(READERS))
            and re.fullmatch(pattern, output_stem(path), re.IGNORECASE)
        ),
        key=lambda path: natural_key(path.name),
    )  # fmt: skip


def by_name(paths: Sequence[Path], pattern: str, problems: list[str]) -> dict[str, Path]:
    """Return the files by what the first group of ``pattern`` finds in their stem; say where two are named alike."""
    found: dict[str, Path] = {}
    for path in paths:
        match = re.fullmatch(pattern, output_stem(path), re.IGNORECASE)
        if match is not None and (other := found.setdefault(match[1], path)) is not path:
            problems.append(f"{other} and {path} are two files for {match[1]!r}; keep one of them")
    return found


def paired(images: Mapping[str, Path], masks: Mapping[str, Path], problems: list[str]) -> list[tuple[str, Path, Path]]:
    """Return (name, image, mask) of every image that has a mask, and say which have none, and the reverse."""
    for kind, other, alone in (
        ("image", "mask", [images[name] for name in images if name not in masks]),
        ("mask", "image", [masks[name] for name in masks if name not in images]),
    ):
        if alone:
            problems.append(
                f"{len(alone)} {kind}(s) have no {other}, {alone[0]} for one; "
                "is the archive half unzipped? Unzip it again, or delete them"
            )
    return [(name, image, masks[name]) for name, image in images.items() if name in masks]


def _subfolders(folder: Path) -> list[Path]:
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(
        (path for path in inside if path.name not in IGNORED_FOLDERS), key=lambda path: natural_key(path.name)
    )
