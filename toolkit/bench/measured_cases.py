"""The images of a measurement: a split with masks, a folder without, or generated noise."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.bench.schema import CaseFile, Images
from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import InputError, UsageError, require
from medseg_trt.files import CHUNK_BYTES
from medseg_trt.imaging.images import Image, Source, find_images
from medseg_trt.train.datasets.folder import Case, read_case, read_case_image
from medseg_trt.train.datasets.official import is_labelled, open_recorded

NOISE_IMAGES = 8
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCases:
    """What all networks are shown."""

    cases: tuple[Case, ...]
    data: str
    split: str
    what: str  # in words, between "of" and the end
    labelled: bool
    num_labels: int

    def read(self) -> Iterator[tuple[str, Image, ndarray | None]]:
        """Yield every case's name, image and labels, if it has any.

        Raises:
            InputError: a file cannot be used.
        """
        for case in self.cases:
            if self.labelled:
                yield case.name, *read_case(case, self.num_labels)
            else:
                yield case.name, read_case_image(case), None

    def images(self, read: Sequence[tuple[str, Image]], timed: str) -> Images:
        """Describe what was read."""
        by_name = {case.name: case for case in self.cases}
        entries = tuple(
            CaseFile(
                case=name,
                slices=image.num_slices,
                height=image.size[0],
                width=image.size[1],
                sha256=_digest(by_name[name].image),
            )
            for name, image in read
        )
        slices = sum(entry.slices for entry in entries)
        return Images(
            description=f"{slices} slices {self.what}",
            timed=timed,
            data=self.data,
            split=self.split,
            labelled=self.labelled,
            slices=slices,
            cases=entries,
        )


def measured_cases(data: Path | None, split: str, bundle: Bundle, scratch: Path) -> MeasuredCases:
    """Find the images.

    Args:
        data: a data set, or a folder of images without masks; None: seeded noise of the network's size.
        split: of the data set, which is divided as it was for the training.
        bundle: of the network.
        scratch: where noise is written.

    Raises:
        InputError: the data cannot be used.
        UsageError: it has other classes than the network.
    """
    names = bundle.classes.names
    num_labels = len(names)
    if data is None:
        noise = _noise(scratch, bundle.preprocessing.image_size)
        cases = tuple(Case(image=source, mask=source) for source in find_images([noise]))
        return MeasuredCases(
            cases=cases, data="noise", split="none", what="of generated noise", labelled=False, num_labels=num_labels
        )
    if not is_labelled(data):
        sources = find_images([data / "images" if (data / "images").is_dir() else data])
        cases = tuple(Case(image=source, mask=source) for source in sources)
        return MeasuredCases(
            cases=cases,
            data=data.resolve().name,
            split="none",
            labelled=False,
            what=f"of {data.resolve().name}, without masks",
            num_labels=num_labels,
        )
    folder = open_recorded(data, bundle.content.source["provenance"])
    if folder.classes.names != names:
        raise UsageError(
            f"{data} has the classes {', '.join(folder.classes.names)}, but the network knows {', '.join(names)}; "
            "give the data it was made for"
        )
    cases = folder.cases(split)
    if not cases:
        raise InputError(f"the split {split!r} of {data} is empty; it has: {', '.join(folder.splits)}")
    return MeasuredCases(
        cases=cases,
        data=folder.name,
        split=split,
        what=f"of {folder.name}, split {split}",
        labelled=True,
        num_labels=num_labels,
    )


def one_image_file(image: Image, scratch: Path, source: Source | Path) -> tuple[Path, str]:
    """Return the file of one image to time the whole way with, and what it is: of a volume, its middle slice alone.

    Raises:
        MissingExtraError: nibabel, which writes the slice, is not installed.
    """
    if image.num_slices == 1 and image.geometry is None:
        path = source.path if isinstance(source, Source) else source
        return path, f"one image of {image.size[0]} x {image.size[1]} pixels, {path.name}"
    nibabel = require("nibabel", "medical")
    middle = image.num_slices // 2
    spacing = image.spacing_mm or (1.0, 1.0, 1.0)
    path = scratch / "slice.nii.gz"
    values = image.pixels[middle, ::-1, ::-1, 0].T[..., np.newaxis]  # LPS becomes NIfTI's RAS
    whole = values.astype(np.int16)
    values = whole if np.array_equal(whole, values) else values.astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(values), np.diag([*spacing[::-1], 1.0])), path)
    return path, f"one slice of {image.size[0]} x {image.size[1]} pixels, as a compressed NIfTI file of its own"


def _noise(scratch: Path, size: tuple[int, int]) -> Path:
    import PIL.Image

    folder = scratch / "noise"
    folder.mkdir()
    random = np.random.default_rng(SEED)
    for index in range(NOISE_IMAGES):
        PIL.Image.fromarray(random.integers(0, 256, size, np.uint8)).save(folder / f"noise{index}.png")
    return folder


def _digest(source: Source | Path) -> str:
    digest = hashlib.sha256()
    for path in source.files if isinstance(source, Source) else (source,):
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
