"""The user's own data: a folder with ``images/``, ``masks/`` (same names) and an optional ``dataset.json``.

``imagesTr/`` and ``labelsTr/`` are read as well, with the ``dataset.json`` of nnU-Net or the Medical Segmentation
Decathlon, from which the classes come.

``dataset.json`` may hold ``name``, ``classes`` (label names, the background first), ``colors``, ``window`` (lower and
upper end of the values that matter), ``note``, ``split_notes`` (a description of each split) and ``splits``:
``{"train": [{"image": "ct_A", "slices": [0, 80]}, …], "val": […], "test": […]}``. ``slices`` is half-open, counted
along the canonical axis (feet to head), and may be left out. Without ``splits`` a fifth of the files is for validation;
without ``classes`` they are counted in the masks.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.files import sha256
from medseg_trt.imaging.images import Image, Source, output_stem, read_image, read_labels
from medseg_trt.progress import LOG, track
from medseg_trt.spec import Classes
from medseg_trt.train.datasets.description import SplitEntry, read_description, require_cases
from medseg_trt.train.datasets.mask_classes import count_classes
from medseg_trt.train.datasets.pairs import find_pairs
from medseg_trt.train.datasets.splits import split_files, split_volume

SPLIT_SEED = 41
HALF_BRIGHT = 127  # of 255: the rule of UNeXt's loader, mask / 255 > 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One image with its mask, or a block of slices of them."""

    image: Source | Path
    mask: Source | Path
    slices: tuple[int, int] | None = None
    more_masks: tuple[Path, ...] = ()  # of further lesions in the same image
    is_binary: bool = False  # the masks are greyscale images: values above the middle are label 1
    relabel: tuple[int, ...] | None = None  # a stored value v is the label relabel[v]
    group: str | None = None  # the patient or the video sequence that it comes from
    relative_name: str | None = None  # of a data folder: the name with the sub-folders that it lies in

    @property
    def name(self) -> str:
        """The image's name with its sub-folders, and with the slice range of a part."""
        block = "" if self.slices is None else f"[{self.slices[0]}:{self.slices[1]}]"
        return (self.relative_name or output_stem(self.image)) + block

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the image and the mask."""
        parts = (self.image, self.mask, *self.more_masks)
        return tuple(file for source in parts for file in (source.files if isinstance(source, Source) else (source,)))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFolder:
    """A labelled data set on disk and how it is divided."""

    root: Path
    name: str
    classes: Classes
    splits: Mapping[str, tuple[Case, ...]]  # "train", "val" and perhaps "test"
    window: tuple[float, float] | None = None
    note: str = ""
    split_notes: Mapping[str, str] = field(
        default_factory=dict
    )  # a description of each split for readers of its figures
    modality: str = ""  # as the data set states it, such as CT
    layout: str = ""  # the layout on disk
    how: Mapping[str, object] = field(default_factory=dict)  # the options behind these splits and labels
    remarks: tuple[str, ...] = ()  # facts about how it was read
    has_given_splits: bool = True  # False: this program divided the files

    def cases(self, split: str) -> tuple[Case, ...]:
        """Return the cases of a split; the error lists the splits."""
        if split not in self.splits:
            raise InputError(f"{self.root} has no split {split!r}; it has: {', '.join(self.splits)}")
        return self.splits[split]

    def manifest(self) -> dict[str, Any]:
        """Return everything that training depends on: classes, window, splits, and the SHA-256 of every file.

        The path and name of the folder are not included.
        """
        files = sorted({file for cases in self.splits.values() for case in cases for file in case.files})
        return {
            **({"how": dict(self.how)} if self.how else {}),
            "classes": list(self.classes.names),
            "window": self.window,
            "splits": {split: [case.name for case in cases] for split, cases in self.splits.items()},
            "files": {file.relative_to(self.root).as_posix(): sha256(file) for file in track(files, "hash the data")},
        }


def open_folder(root: Path) -> DataFolder:
    """Find the images and masks of a data folder and their splits.

    Raises:
        InputError: a folder, a mask or a name in ``dataset.json`` is missing, or it cannot be understood.
    """
    root = Path(root)
    read = read_description(root / "dataset.json")
    described, scan = read.description, find_pairs(root)
    require_cases(read, list(scan.pairs), root / "dataset.json")
    remarks = list(scan.remarks)
    if read.origin:
        remarks.append(f"dataset.json is {read.origin}; its classes are taken: {', '.join(described.classes or ())}")
    if described.classes is None:
        classes, more = count_classes(scan.pairs.values())
        remarks += more
    else:
        classes = Classes(names=described.classes, colors=described.colors, codes=described.codes)
    pairs = {name: Case(image=pair.image, mask=pair.mask, relative_name=name) for name, pair in scan.pairs.items()}
    if described.splits is not None:
        splits = {
            name: tuple(_case(pairs, entry, root) for entry in entries) for name, entries in described.splits.items()
        }
        used = {case.relative_name for cases in splits.values() for case in cases}
        if unused := [name for name in pairs if name not in used]:
            count = f"{len(unused)} of {len(pairs)} pairs"
            remarks.append(f"{count} are in no split of dataset.json and are left out: {_first(unused)}")
    else:
        splits = _divide(tuple(pairs.values()))
    if leaks := shared_slices(splits):
        LOG.warning(
            "the splits share slices, so figures do not tell how the model does on new images: %s", _first(leaks)
        )
    return DataFolder(
        root=root,
        name=described.name or root.resolve().name,
        classes=classes,
        splits=splits,
        window=described.window,
        note=described.note,
        split_notes=described.split_notes,
        remarks=tuple(remarks),
        has_given_splits=described.splits is not None,
    )


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Return one digest for a whole manifest."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_case(case: Case, num_labels: int) -> tuple[Image, ndarray]:
    """Return the case's image and its labels, (slices, height, width) uint8, both cut to the case's slices.

    Raises:
        InputError: a file cannot be read, the sizes differ, or the mask holds a label that does not exist.
    """
    image = read_image(case.image)
    labels = _labels(case, image, num_labels)
    return _cut(case, image), labels[slice(*case.slices)] if case.slices else labels


def read_case_image(case: Case) -> Image:
    """Return the case's image alone, cut to the case's slices.

    Raises:
        InputError: the file cannot be read.
    """
    return _cut(case, read_image(case.image))


def _labels(case: Case, image: Image, num_labels: int) -> UInt8[ndarray, "slices height width"]:
    if case.is_binary:
        masks = [_thresholded(mask, image) for mask in (case.mask, *case.more_masks)]
        return np.maximum.reduce(masks)
    if case.relabel is None:
        return read_labels(case.mask, image, num_labels)
    return np.array(case.relabel, np.uint8)[read_labels(case.mask, image, len(case.relabel))]


def _thresholded(mask: Source | Path, image: Image) -> UInt8[ndarray, "slices height width"]:
    """Binarise a greyscale mask at half of its range; a mask of 0 and 1 is unchanged."""
    values = read_labels(mask, image, None)
    brightest = values.max(initial=0)
    if 1 < brightest <= HALF_BRIGHT:
        path = mask.path if isinstance(mask, Source) else mask
        raise InputError(f"{path} goes from 0 to {brightest}, which is neither 0 and 255 nor 0 and 1; check the mask")
    return values if brightest <= 1 else (values > HALF_BRIGHT).astype(np.uint8)


def _cut(case: Case, image: Image) -> Image:
    if case.slices is None:
        return image
    start, end = case.slices
    if not 0 <= start < end <= image.num_slices:
        raise InputError(f"{image.path} has {image.num_slices} slices; the block {start}:{end} does not lie within")
    return replace(image, pixels=image.pixels[start:end], geometry=None)


def _case(pairs: Mapping[str, Case], entry: SplitEntry, root: Path) -> Case:
    if entry.image not in pairs:
        raise InputError(
            f"{root / 'dataset.json'} names the image {entry.image!r}, but there is no such file; "
            f"its names, without suffix: {_first(list(pairs))}"
        )
    return replace(pairs[entry.image], slices=entry.slices)


def _divide(cases: Sequence[Case]) -> dict[str, tuple[Case, ...]]:
    if len(cases) > 1:
        train, val = split_files(cases, SPLIT_SEED)
        return {"train": train, "val": val}
    only = cases[0]
    blocks = split_volume(read_image(only.image).num_slices)
    LOG.warning(
        "there is one volume only: a block of its slices serves for validation, so figures are of the same patient"
    )
    return {name: (replace(only, slices=block),) for name, block in zip(("train", "val"), blocks, strict=True)}


def shared_slices(splits: Mapping[str, Sequence[Case]]) -> list[str]:
    """Return the slices that two splits share, which make their figures too good."""
    seen: dict[Source | Path, list[tuple[str, Case]]] = {}
    leaks: list[str] = []
    for split, cases in splits.items():
        for case in cases:
            others = seen.setdefault(case.image, [])
            leaks += [
                f"{case.name} ({other} and {split})" for other, old in others if other != split and _overlap(case, old)
            ]
            others.append((split, case))
    return leaks


def _overlap(case: Case, other: Case) -> bool:
    start, end = case.slices or (0, math.inf)
    other_start, other_end = other.slices or (0, math.inf)
    return start < other_end and other_start < end


def _first(items: Sequence[object], count: int = 5) -> str:
    return ", ".join(str(item) for item in items[:count]) + (", …" if len(items) > count else "")
