"""``dataset.json``: medseg-trt's own fields, or those of nnU-Net and the Medical Segmentation Decathlon."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg_trt.errors import ArtefactError, InputError
from medseg_trt.imaging.images import output_stem
from medseg_trt.spec import ClassCode, Classes, from_dict

MAX_JSON_BYTES = 1 << 24
FIRST_CHANNEL = "_0000"
FOREIGN = ("channel_names", "modality", "labels", "numTraining", "training", "file_ending", "tensorImageSize")
OURS = "name, classes, colors, codes, window, note, split_notes and splits"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitEntry:
    """An image of a split, or a block of its slices."""

    image: str
    slices: tuple[int, int] | None = None

    __pydantic_config__ = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """The content of ``dataset.json``."""

    name: str | None = None
    classes: tuple[str, ...] | None = None
    colors: tuple[tuple[int, int, int], ...] = ()
    codes: tuple[ClassCode, ...] = ()
    window: tuple[float, float] | None = None
    note: str = ""
    split_notes: dict[str, str] = field(default_factory=dict)
    splits: dict[str, tuple[SplitEntry, ...]] | None = None

    __pydantic_config__ = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError(f"the window {self.window} is empty; give its lower end first")
        if self.classes is not None:
            Classes(names=self.classes, colors=self.colors, codes=self.codes)
        elif self.colors or self.codes:
            raise ValueError("colors or codes are given, but no classes to go with them")
        for name, entries in (self.splits or {}).items():
            if not entries:
                raise ValueError(f"the split {name!r} is empty")
        if self.splits is not None and "train" not in self.splits:
            raise ValueError("the split 'train' is missing")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadDescription:
    """A description, with further facts from another program's file."""

    description: Description = Description()
    origin: str = ""  # the program whose file it is; empty: medseg-trt's, or no file
    cases: frozenset[str] | None = None  # names listed for training
    count: int | None = None  # number of cases according to the file


def read_description(path: Path) -> ReadDescription:
    """Read ``dataset.json``; without the file, the description is empty.

    Raises:
        InputError: it is no file, too large, no valid JSON, or contradictory.
    """
    if not path.exists() and not path.is_symlink():
        return ReadDescription()
    if not path.is_file():
        raise InputError(f"{path} is no file that can be read; repair the link, or remove it")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; it should only name classes and splits")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and "classes" not in content and any(key in content for key in FOREIGN):
            return _foreign(content, path)
        return ReadDescription(description=from_dict(Description, content, str(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    except ArtefactError as error:
        raise InputError(str(error)) from error


def require_cases(read: ReadDescription, names: Sequence[str], path: Path) -> None:
    """Refuse a folder without the cases that another program's file lists.

    Raises:
        InputError: cases are missing or not listed, or their number differs.
    """
    if read.cases is not None and (differing := sorted(read.cases ^ set(names))):
        where = "is listed, but not in the folder" if differing[0] in read.cases else "is in the folder, but not listed"
        raise InputError(
            f"{path} ({read.origin}) lists {len(read.cases)} cases for training, and the folder holds {len(names)} "
            f"pairs: {differing[0]} {where} ({len(differing)} such); correct the list or the folder"
        )
    if read.count is not None and read.count != len(names):
        raise InputError(
            f"{path} ({read.origin}) says that numTraining is {read.count}, but there are {len(names)} pairs; "
            "correct the number or the folder"
        )


def _foreign(content: Mapping[str, Any], path: Path) -> ReadDescription:
    is_nnunet = any(key in content for key in ("channel_names", "file_ending"))
    origin = "nnU-Net's" if is_nnunet else "the Medical Segmentation Decathlon's, or nnU-Net 1's"

    def refuse(reason: str) -> InputError:
        return InputError(
            f"{path} is {origin}, and {reason}; write our own instead, whose fields are {OURS}, "
            'for example {"classes": ["background", "liver"]}'
        )

    channels = content.get("channel_names", content.get("modality"))
    if isinstance(channels, dict) and len(channels) > 1:
        raise refuse(f"it has {len(channels)} channels, but an image here is one: keep one channel's files")
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise refuse("it names no labels")
    numbers = dict(labels.items() if is_nnunet or not all(map(str.isdecimal, labels)) else _name_of_label(labels))
    if not all(str(number).isdecimal() for number in numbers.values()):
        raise refuse("a label is no single number (regions are lists of them), but a voxel here has one label")
    names = {int(number): name for name, number in numbers.items()}
    if "ignore" in numbers:
        raise refuse("a label is to be ignored, which training does not do here")
    if sorted(names) != list(range(len(numbers))):
        raise refuse(f"its labels are {', '.join(map(str, sorted(names)))}, but they must be 0, 1, 2 … without a hole")
    name = content.get("name")
    try:
        description = Description(
            name=name if isinstance(name, str) and name else None, classes=tuple(names[key] for key in sorted(names))
        )
    except ValueError as error:
        raise refuse(str(error)) from error
    count = content.get("numTraining")
    return ReadDescription(
        description=description,
        origin=origin,
        cases=_listed(content.get("training"), refuse),
        count=count if isinstance(count, int) else None,
    )


def _name_of_label(labels: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), number) for number, name in labels.items()]


def _listed(training: Any, refuse: Any) -> frozenset[str] | None:
    """Return the names of the cases in the Decathlon's list of pairs."""
    if not isinstance(training, list) or not training:
        return None
    images = [entry.get("image") if isinstance(entry, dict) else entry for entry in training]
    names = [output_stem(Path(image)).removesuffix(FIRST_CHANNEL) for image in images if isinstance(image, str)]
    if len(names) < len(images):
        raise refuse("its training cases are not listed as pairs of image and label")
    return frozenset(names)
