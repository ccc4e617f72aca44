"""Find pictures, volumes and DICOM series, read them into one shape, and write masks back the way the source lies.

Whatever the file, an image is an array (slices, height, width, channels) of raw values. A volume is turned to LPS: its
slices follow one another from the feet up, rows run from front to back, columns from the patient's right to left. A
photograph is turned upright. Files from outside are not trusted: sizes are taken from the header and checked before
anything is decoded. Each kind of file has a module in ``formats``, which is imported when such a file is met.
"""

import importlib
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import Float64, Num, UInt8
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.imaging.dicom_signature import SIGNATURE_BYTES, starts_like_dicom
from medseg_trt.imaging.label_values import as_labels, pixels_per_label
from medseg_trt.imaging.signatures import SAME_KIND, identify, readable
from medseg_trt.progress import LOG
from medseg_trt.spec import Classes

READERS: Mapping[str, str] = {  # the suffix of a kind of file -> the module that reads it
    ".png": "medseg_trt.imaging.formats.images_2d",
    ".jpg": "medseg_trt.imaging.formats.images_2d",
    ".jpeg": "medseg_trt.imaging.formats.images_2d",
    ".bmp": "medseg_trt.imaging.formats.images_2d",
    ".tif": "medseg_trt.imaging.formats.tiff",
    ".tiff": "medseg_trt.imaging.formats.tiff",
    ".nii": "medseg_trt.imaging.formats.nifti",
    ".nii.gz": "medseg_trt.imaging.formats.nifti",
    ".nrrd": "medseg_trt.imaging.formats.nrrd",
    ".nhdr": "medseg_trt.imaging.formats.nrrd",
    ".npz": "medseg_trt.imaging.formats.arrays",
    ".h5": "medseg_trt.imaging.formats.arrays",
    ".npy.h5": "medseg_trt.imaging.formats.arrays",
    ".dcm": "medseg_trt.imaging.formats.dicom",
}
DICOM = ".dcm"  # files with other names are DICOM too if they begin like one
MASK_SUFFIXES = (".png", ".tif", ".nii.gz")  # of what ``write_mask`` writes


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A picture, a volume or a DICOM series on the disk, which becomes one image."""

    path: Path  # the file, or the folder of a series
    files: tuple[Path, ...]  # all that it consists of
    stem: str  # what is written for it is called so

    @property
    def is_series(self) -> bool:
        """Whether it is a DICOM series, one file a slice."""
        return self.path not in self.files

    @property
    def name(self) -> str:
        """The file's name; of a series the stem, which tells it from others in its folder."""
        return self.stem if self.is_series else self.path.name

    @property
    def label(self) -> str:
        """The path, with the stem where several series lie in one folder."""
        return f"{self.path} ({self.stem})" if self.is_series and self.stem != self.path.name else str(self.path)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Geometry:
    """How a volume is stored."""

    shape: tuple[int, ...]  # as stored, closing ones included
    header: Any  # a NIfTI header with the source's shape and place, and nothing else of it
    affine_mm: Float64[ndarray, "4 4"]  # from (column, row, slice, 1) of our array to the scanner's millimetres
    reorientation: Float64[ndarray, "3 2"]  # nibabel's orientation: how the stored axes became columns, rows and slices


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Image:
    """A picture (one slice) or a volume, with its raw values."""

    path: Path
    pixels: Num[ndarray, "slices height width channels"]  # 1 or 3 channels
    spacing_mm: tuple[float, float, float] | None = None  # between slices, rows and columns
    geometry: Geometry | None = None  # of a volume
    exif: int = 1  # how a photograph was turned upright: EXIF's Orientation, 1 to 8
    stem: str | None = None  # of what is written, where ``path`` alone does not tell: of a DICOM series

    @property
    def num_slices(self) -> int:
        """Slices of the volume; 1 for a picture."""
        return self.pixels.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1:3]

    @property
    def spacing_in_plane(self) -> tuple[float, float] | None:
        """Millimetres between rows and between columns, where they are known."""
        return self.spacing_mm and self.spacing_mm[1:]


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """How much of an image one class covers."""

    name: str
    pixels: int
    mm2: float | None  # of a single slice with a known spacing
    ml: float | None  # millilitres, of a volume with a known spacing


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mask:
    """The label of every pixel of an image, and what is needed to write it the way the image lies."""

    path: Path  # of the image
    labels: UInt8[ndarray, "slices height width"]
    classes: Classes
    spacing_mm: tuple[float, float, float] | None = None  # between slices, rows and columns
    geometry: Geometry | None = None
    exif: int = 1
    stem: str | None = None

    @property
    def name(self) -> str:
        """The image's name, for people."""
        return self.stem or self.path.name

    def __post_init__(self) -> None:
        if self.labels.max(initial=0) >= len(self.classes.names):
            raise ValueError(f"label {self.labels.max()} has no name; there are {len(self.classes.names)} classes")

    @classmethod
    def of(cls, image: Image, labels: UInt8[ndarray, "slices height width"], classes: Classes) -> "Mask":
        """Make the mask of ``image``, without holding on to its pixels.

        Raises:
            ValueError: the labels are not of the image's size, or one of them has no name.
        """
        if labels.shape != image.pixels.shape[:3]:
            raise ValueError(f"the labels are {labels.shape}, but the image is {image.pixels.shape[:3]}")
        return cls(
            path=image.path,
            labels=labels,
            classes=classes,
            spacing_mm=image.spacing_mm,
            geometry=image.geometry,
            exif=image.exif,
            stem=image.stem,
        )

    def areas(self) -> tuple[Area, ...]:
        """Measure every class but the background."""
        counts = pixels_per_label(self.labels, len(self.classes.names))
        between_slices, between_rows, between_columns = self.spacing_mm or (float("nan"),) * 3
        pixel_mm2 = between_rows * between_columns
        is_slice, known = len(self.labels) == 1, self.spacing_mm is not None
        return tuple(
            Area(
                name=name,
                pixels=count,
                mm2=count * pixel_mm2 if known and is_slice else None,
                ml=count * pixel_mm2 * between_slices / 1000 if known and not is_slice else None,
            )
            for name, count in list(zip(self.classes.names, counts.tolist(), strict=True))[1:]
        )


def find_images(inputs: Sequence[Path]) -> list[Source]:
    """Return the files that are named, and the images of the folders that are named; see ``listing.list_images``.

    What is left out in a folder is logged as a warning.

    Raises:
        InputError: an input, or a file in a folder, cannot be used, or a folder has no image.
        MissingExtraError: there are DICOM files and pydicom is not installed.
    """
    listing = importlib.import_module("medseg_trt.imaging.listing").list_images(inputs)  # it imports kind_of from here
    for line in listing.warnings():
        LOG.warning("%s", line)
    if listing.refused:
        more = len(listing.refused) - 1
        raise InputError(f"{listing.refused[0].error}" + (f" (and {more} more)" if more else ""))
    return list(listing.sources)


def output_stem(image: "Path | Source | Image | Mask") -> str:
    """Return what files made of an image are called, without their suffix.

    It is the image's name without the suffix of its kind (``.nii.gz`` is one suffix), or the folder's of a DICOM
    series, with the number of the series where there are several. Nothing of a DICOM header but that number is in it.
    """
    if not isinstance(image, Path):
        return output_stem(image.path) if image.stem is None else image.stem
    return image.name[: len(image.name) - len(suffix_of(image) or image.suffix)]


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a key that sorts names with their numbers as numbers: ``img2`` before ``img10``."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def read_image(source: Source | Path) -> Image:
    """Read a picture, a volume, a stack of pictures or a DICOM series; of a path, the only image that is there.

    Palettes become RGB and transparency is dropped. Numbers are kept as they are stored, unless the header scales them.

    Raises:
        InputError: a file is damaged, too large, of a kind we do not read, or holds NaN or infinite values; slices are
            missing; a folder holds several images.
        MissingExtraError: a package for this kind of file is not installed.
    """
    if isinstance(source, Path):
        source = _only(source)
    if source.is_series:
        image = _module(DICOM).read_series(source.path, source.files)
    else:
        image = _reader(source.path).read(source.path)
    return image if output_stem(image) == source.stem else replace(image, stem=source.stem)


def read_labels(path: Source | Path, like: Image, num_labels: int | None) -> UInt8[ndarray, "slices height width"]:
    """Read the mask of ``like``, turned the way its pixels are: a PNG, BMP, TIFF, NIfTI or NRRD file.

    A palette mask gives indices, not colours. With two labels, a mask of 0 and 255 is read as one of 0 and 1. Values
    within 1e-3 of a whole number are rounded.

    Args:
        path: the mask.
        like: the image that it belongs to.
        num_labels: how many labels there are, background included; None allows 0 … 255.

    Raises:
        InputError: the file is damaged, a colour picture, of another size or place than the image, or holds a value
            that is no label.
    """
    if isinstance(path, Source):
        path = path.path
    if path.is_dir():
        raise InputError(f"{path} is a folder; a mask is one file: PNG or TIFF of a picture, NIfTI or NRRD of a volume")
    return as_labels(_reader(path).read_labels(path, like), path, num_labels)


def write_mask(mask: Mask, folder: Path) -> Path:
    """Write the mask under the image's stem, and check what was written before it takes its place.

    A volume's mask is a NIfTI file that lies as its source, whatever its format; a picture's is a PNG with the class
    colours, pixel for pixel as the file is stored; a stack's is a TIFF of as many pages.
    """
    if mask.geometry is not None:
        path = folder / f"{output_stem(mask)}.nii.gz"
        _module(".nii.gz").write(mask, mask.geometry, path)
    else:
        suffix = ".png" if len(mask.labels) == 1 else ".tif"
        path = folder / f"{output_stem(mask)}{suffix}"
        _module(suffix).write(mask, path)
    return path


def source_of_file(path: Path) -> Source:
    """Return the source of one file, of which nothing but its first bytes is read.

    Raises:
        InputError: it is of a kind that is not read.
    """
    if kind_of(path) is None:
        _reader(path)  # which says why
    return Source(path=path, files=(path,), stem=path.name if suffix_of(path) is None else output_stem(path))


def _only(path: Path) -> Source:
    """Return the only source that is in a folder, or a file's."""
    if not path.is_dir():
        return source_of_file(path)
    found = find_images([path])
    if len(found) > 1:
        names = ", ".join(source.name for source in found[:5])
        raise InputError(f"{path} holds {len(found)} images ({names} …); name one of them")
    return found[0]


def suffix_of(path: Path) -> str | None:
    """Return the suffix, in lower case, if it is one that we read."""
    return next((suffix for suffix in sorted(READERS, key=len)[::-1] if path.name.lower().endswith(suffix)), None)


def kind_of(path: Path) -> str | None:
    """Return the key of READERS by the first bytes; by the name where these are of no known kind or cannot be read."""
    with suppress(OSError):
        if (content := identify(path)) is not None and content.suffix is not None:
            return content.suffix
        if (suffix := suffix_of(path)) is not None or not path.is_file():
            return suffix
        with path.open("rb") as file:  # DICOM without a preamble has no signature
            return DICOM if starts_like_dicom(file.read(SIGNATURE_BYTES)) else None
    return suffix_of(path)


def _reader(path: Path) -> Any:
    """Return the module that reads a file: by its first bytes; by its name where these are of no known kind.

    Raises:
        InputError: neither says so, or the file is empty or of a kind that is not read.
    """
    content, named = readable(path), suffix_of(path)
    kind = kind_of(path) if content is None else content.suffix
    if kind is None:
        raise InputError(f"{path} is of a kind that cannot be read here; known are {', '.join(READERS)} and DICOM")
    if not path.stat().st_size:
        raise InputError(f"{path} cannot be read: it is empty; copy it again from where it came")
    if content is not None and SAME_KIND.get(named or "", named) != kind:
        LOG.info("%s is a %s file by its content, and is read as one", path, content.name)
    return _module(kind)


def _module(kind: str) -> Any:
    return importlib.import_module(READERS[kind])
