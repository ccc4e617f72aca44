"""The types that describe an official data set and its layouts, and the folder operations that all readers share."""

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

ALL = "all"  # the only part of a data set that comes undivided
MAX_DEPTH = 3  # archives contain a top folder, and are often unzipped into a further one
IGNORED_FOLDERS = ("__MACOSX",)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetScan:
    """The contents of a data set's folder, before they are checked and divided into splits."""

    parts: Mapping[str, tuple[Case, ...]]  # "train", "val", "test" where the data set comes divided, else ALL
    official: Mapping[str, int]  # how many cases each part has in the official archives
    classes: Classes = LESION
    window: tuple[float, float] | None = None  # lower and upper limit of the values; None: 8-bit images
    problems: tuple[str, ...] = ()  # why it cannot be used; empty: it can
    remarks: tuple[str, ...] = ()  # facts about how it is read


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One folder layout of a data set."""

    description: str  # for people
    locate: Callable[[Path], Path | None]  # the folder to read, at or below the given one; None: another layout
    read: Callable[[Path, DataOptions], DatasetScan]
    identifies_dataset: bool = True  # whether the layout alone tells which data set it is


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A data set of the paper."""

    title: str
    modality: str
    layouts: tuple[Layout, ...]
    groups: str = "none"  # what a group of cases is: "sequence" or "patient"
    choices: tuple[str, ...] = ()  # fields of DataOptions that apply to it, beside those that apply to all
    other_counts: Mapping[int, str] = field(default_factory=dict)  # case counts in use other than the official one


def locator(*names: str) -> Callable[[Path], Path | None]:
    """Return a function that finds the folder, at or below the given one, that contains all ``wanted``.

    ``wanted`` are relative paths of folders, in lower case; the case of names on disk is ignored.
    """

    def locate(root: Path) -> Path | None:
        return next((base for base in folders(root) if all(below(base, path) for path in names)), None)

    return locate


def folders(root: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
    """Yield ``root`` and the folders below it, level by level, down to ``depth`` levels."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        level = [subfolder for folder in level for subfolder in _subfolders(folder)]


def below(base: Path, path: str) -> Path | None:
    """Return the folder at a relative path in lower case, ignoring the case of names on disk; None: there is none.

    If a folder contains a folder of its own name, as some unpackers create it, the inner one is returned.
    """
    for name in path.split("/"):
        subfolder = next((folder for folder in _subfolders(base) if folder.name.lower() == name), None)
        if subfolder is None:
            return None
        base = subfolder
    return next((folder for folder in _subfolders(base) if folder.name == base.name), base)


def files(folder: Path | None, pattern: str = r".*") -> list[Path]:
    """Return the images of a folder whose whole stem matches ``pattern``, in natural order, without hidden files.

    Case is ignored. The folder None has no files.

    Raises:
        InputError: a link is broken.
    """
    if folder is None:
        return []
    if broken_links := [path for path in folder.iterdir() if path.is_symlink() and not path.exists()]:
        raise InputError(
            f"{broken_links[0]} is a link to a file that does not exist ({len(broken_links)} such); "
            "fetch it or remove the link"
        )
    visible = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = (path for path in visible if path.name.lower().endswith(tuple(READERS)))
    matching = (path for path in images if re.fullmatch(pattern, output_stem(path), re.IGNORECASE))
    return sorted(matching, key=lambda path: natural_key(path.name))


def by_name(paths: Sequence[Path], pattern: str, problems: list[str]) -> dict[str, Path]:
    """Return the files by the first group of ``pattern`` in their stem; ``problems`` gets files of the same name."""
    path_of: dict[str, Path] = {}
    for path in paths:
        match = re.fullmatch(pattern, output_stem(path), re.IGNORECASE)
        if match is not None and (other := path_of.setdefault(match[1], path)) is not path:
            problems.append(f"{other} and {path} are two files for {match[1]!r}; keep one of them")
    return path_of


def paired(images: Mapping[str, Path], masks: Mapping[str, Path], problems: list[str]) -> list[tuple[str, Path, Path]]:
    """Return (name, image, mask) of every pair; ``problems`` gets images without mask and masks without image."""
    for kind, other, unpaired in (
        ("image", "mask", [images[name] for name in images if name not in masks]),
        ("mask", "image", [masks[name] for name in masks if name not in images]),
    ):
        if unpaired:
            problems.append(
                f"{len(unpaired)} {kind}(s) have no {other}, for example {unpaired[0]}; "
                "if the archive was unzipped incompletely, unzip it again, or delete them"
            )
    return [(name, image, masks[name]) for name, image in images.items() if name in masks]


def _subfolders(folder: Path) -> list[Path]:
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(
        (path for path in inside if path.name not in IGNORED_FOLDERS), key=lambda path: natural_key(path.name)
    )
