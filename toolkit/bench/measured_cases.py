"""The images of a measurement: a split with masks, a folder without masks, or generated noise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.bench.schema import CaseFile, Images
from medseg_trt.bundles.bundle import Bundle
from medseg_trt.errors import InputError, UsageError, require
from medseg_trt.files import sha256
from medseg_trt.imaging.images import Image, Source, find_images
from medseg_trt.train.datasets.folder import Case, read_case, read_case_image
from medseg_trt.train.datasets.official import is_labelled
from medseg_trt.train.provenance import parse_provenance
from medseg_trt.train.recorded_data import open_recorded

Shape = tuple[int, int, int]  # slices, height and width
NOISE_IMAGES = 8
SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredCases:
    """The cases that all networks run on."""

    cases: tuple[Case, ...]
    data: str
    split: str
    description: str  # begins with "of"
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

    def images(self, read: Sequence[tuple[str, Shape]], timed: str) -> Images:
        """Describe what was read: the name and shape of every case."""
        by_name = {case.name: case for case in self.cases}
        entries = tuple(
            CaseFile(
                case=name,
                slices=slices,
                height=height,
                width=width,
                sha256=sha256(*_files(by_name[name].image)),
            )
            for name, (slices, height, width) in read
        )
        total = sum(entry.slices for entry in entries)
        return Images(
            description=f"{total} slices {self.description}",
            timed=timed,
            data=self.data,
            split=self.split,
            labelled=self.labelled,
            slices=total,
            cases=entries,
        )


def measured_cases(data: Path | None, split: str, bundle: Bundle, scratch: Path) -> MeasuredCases:
    """Return the cases of a measurement.

    Args:
        data: a data set, or a folder of images without masks; None: seeded noise at the network's size.
        split: of the data set, which is divided as in training.
        bundle: of the network.
        scratch: the folder for generated noise.

    Raises:
        InputError: the data cannot be used.
        UsageError: the data have other classes than the network.
    """
    names = bundle.classes.names
    num_labels = len(names)
    if data is None:
        noise = _noise(scratch, bundle.preprocessing.image_size)
        cases = tuple(Case(image=source, mask=source) for source in find_images([noise]))
        return MeasuredCases(
            cases=cases,
            data="noise",
            split="none",
            description="of generated noise",
            labelled=False,
            num_labels=num_labels,
        )
    if not is_labelled(data):
        sources = find_images([data / "images" if (data / "images").is_dir() else data])
        cases = tuple(Case(image=source, mask=source) for source in sources)
        return MeasuredCases(
            cases=cases,
            data=data.resolve().name,
            split="none",
            labelled=False,
            description=f"of {data.resolve().name}, without masks",
            num_labels=num_labels,
        )
    folder = open_recorded(data, parse_provenance(bundle.content.source["provenance"], str(bundle.folder)))
    if folder.classes.names != names:
        raise UsageError(
            f"{data} has the classes {', '.join(folder.classes.names)}, but the network knows {', '.join(names)}; "
            "give the data it was trained for"
        )
    cases = folder.cases(split)
    if not cases:
        raise InputError(f"the split {split!r} of {data} is empty; it has: {', '.join(folder.splits)}")
    return MeasuredCases(
        cases=cases,
        data=folder.name,
        split=split,
        description=f"of {folder.name}, split {split}",
        labelled=True,
        num_labels=num_labels,
    )


def one_image_file(image: Image, scratch: Path, source: Source | Path) -> tuple[Path, str]:
    """Return the file of one image for the end-to-end timing, and its description; of a volume, the middle slice.

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
    integers = values.astype(np.int16)
    values = integers if np.array_equal(integers, values) else values.astype(np.float32)
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


def _files(source: Source | Path) -> tuple[Path, ...]:
    return tuple(source.files) if isinstance(source, Source) else (source,)
