"""Find 2-D images, volumes and DICOM series, read them into one array layout, and write masks in the source's layout.

An image is an array (slices, height, width, channels) of raw values, whatever its file format. A volume is reoriented
to LPS: slices run from inferior to superior, rows from anterior to posterior, columns from the patient's right to left.
A photograph is rotated upright. Files are untrusted: sizes are read from the header and checked before decoding. Each
format has a module in ``formats``, which is imported on first use.
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
from medseg_trt.imaging.areas import Area, areas_of
from medseg_trt.imaging.dicom_signature import SIGNATURE_BYTES, starts_like_dicom
from medseg_trt.imaging.label_values import as_labels, pixels_per_label
from medseg_trt.imaging.signatures import SAME_KIND, identify, readable
from medseg_trt.progress import LOG
from medseg_trt.spec import Classes

READERS: Mapping[str, str] = {  # suffix of a format -> module that reads it
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
DICOM = ".dcm"  # files with other names are DICOM too if their first bytes say so
SEGMENTATION_SUFFIX = ".seg.dcm"  # of ``formats.dicom_seg``
MASK_SUFFIXES = (".png", ".tif", ".nii.gz", SEGMENTATION_SUFFIX)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The files of one image: a 2-D image, a volume or a DICOM series."""

    path: Path  # the file, or the folder of a series
    files: tuple[Path, ...]  # all files of the image
    stem: str  # name of its output files, without suffix

    @property
    def is_series(self) -> bool:
        """Whether it is a DICOM series of one file per slice."""
        return self.path not in self.files

    @property
    def name(self) -> str:
        """The file name; for a series the stem, which is unique in its folder."""
        return self.stem if self.is_series else self.path.name

    @property
    def label(self) -> str:
        """The path, with the stem appended where a folder holds several series."""
        return f"{self.path} ({self.stem})" if self.is_series and self.stem != self.path.name else str(self.path)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Geometry:
    """How a volume is stored and where it lies in space."""

    shape: tuple[int, ...]  # as stored, with trailing axes of length 1
    header: Any  # a NIfTI header with the source's shape and geometry only
    affine_mm: Float64[ndarray, "4 4"]  # from (column, row, slice, 1) of ``Image.pixels`` to scanner coordinates
    reorientation: Float64[ndarray, "3 2"]  # nibabel's orientation transform, stored axes -> (column, row, slice)

    @property
    def is_known(self) -> bool:
        """Whether the file states where the patient's sides are; a NIfTI header may leave it open."""
        return bool(self.header["sform_code"] or self.header["qform_code"])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Image:
    """The raw values of a 2-D image (one slice) or a volume."""

    path: Path
    pixels: Num[ndarray, "slices height width channels"]  # 1 or 3 channels
    spacing_mm: tuple[float, float, float] | None = None  # between slices, rows and columns
    geometry: Geometry | None = None  # None for a 2-D image
    exif: int = 1  # EXIF's Orientation, 1 to 8, by which a photograph was rotated upright
    stem: str | None = None  # of output files, where ``path`` does not give it: for a DICOM series

    @property
    def num_slices(self) -> int:
        """Number of slices; 1 for a 2-D image."""
        return self.pixels.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.pixels.shape[1:3]

    @property
    def spacing_in_plane(self) -> tuple[float, float] | None:
        """Distance between rows and between columns in millimetres, where known."""
        return self.spacing_mm and self.spacing_mm[1:]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mask:
    """The label of every pixel of an image, and the geometry needed to write them in the image's layout."""

    path: Path  # of the image
    labels: UInt8[ndarray, "slices height width"]
    classes: Classes
    spacing_mm: tuple[float, float, float] | None = None  # between slices, rows and columns
    geometry: Geometry | None = None
    exif: int = 1
    stem: str | None = None
    unusual: str | None = None  # in which way the image is unlike the training images; None: no such way is known

    @property
    def name(self) -> str:
        """The image's name, for messages."""
        return self.stem or self.path.name

    def __post_init__(self) -> None:
        if self.labels.max(initial=0) >= len(self.classes.names):
            raise ValueError(f"label {self.labels.max()} has no name; there are {len(self.classes.names)} classes")

    @classmethod
    def of(
        cls,
        image: Image,
        labels: UInt8[ndarray, "slices height width"],
        classes: Classes,
        unusual: str | None = None,
    ) -> "Mask":
        """Create the mask of ``image`` without keeping a reference to its pixels.

        Raises:
            ValueError: the labels differ in size from the image, or a label has no class name.
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
            unusual=unusual,
        )

    def areas(self) -> tuple[Area, ...]:
        """Measure every class except the background."""
        counts = pixels_per_label(self.labels, len(self.classes.names))
        return areas_of(counts.tolist(), self.classes, self.spacing_mm, is_slice=len(self.labels) == 1)


def find_images(inputs: Sequence[Path]) -> list[Source]:
    """Return the images among the given files and in the given folders; see ``listing.list_images``.

    Skipped files and folders are logged as warnings.

    Raises:
        InputError: an input or a file in a folder is unusable, or a folder holds no image.
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
    """Return the name of an image's output files, without suffix.

    It is the file name without its format's suffix (``.nii.gz`` is one suffix). For a DICOM series it is the folder's
    name, with the series number appended where there are several. Nothing else of a DICOM header enters it.
    """
    if not isinstance(image, Path):
        return output_stem(image.path) if image.stem is None else image.stem
    return image.name[: len(image.name) - len(suffix_of(image) or image.suffix)]


def file_stem(path: Path) -> str:
    """Return the name of a single file's output files: as ``output_stem``, but whole where no known suffix ends it."""
    return path.name if suffix_of(path) is None else output_stem(path)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that compares digits as numbers: ``img2`` before ``img10``."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def read_image(source: Source | Path) -> Image:
    """Read a 2-D image, a volume, a stack of 2-D images or a DICOM series; a folder must hold exactly one image.

    Palettes become RGB and transparency is dropped. Values are kept as stored, unless the header scales them.

    Raises:
        InputError: a file is damaged, too large, of an unsupported format, or holds NaN or infinite values; slices are
            missing; a folder holds several images.
        MissingExtraError: a package for this format is not installed.
    """
    if isinstance(source, Path):
        source = _only(source)
    if source.is_series:
        image = _module(DICOM).read_series(source.path, source.files)
    else:
        image = _reader(source.path).read(source.path)
    return image if output_stem(image) == source.stem else replace(image, stem=source.stem)


def read_labels(path: Source | Path, like: Image, num_labels: int | None) -> UInt8[ndarray, "slices height width"]:
    """Read the mask of ``like``, reoriented as its pixels are, from a PNG, BMP, TIFF, NIfTI or NRRD file.

    A palette mask gives indices, not colours. With two labels, a mask of 0 and 255 is read as one of 0 and 1. Values
    within 1e-3 of a whole number are rounded.

    Args:
        path: the mask.
        like: its image.
        num_labels: the number of labels, background included; None allows 0 … 255.

    Raises:
        InputError: the file is damaged or in colour, differs from the image in size or position, or holds a value that
            is not a label.
    """
    if isinstance(path, Source):
        path = path.path
    if path.is_dir():
        raise InputError(
            f"{path} is a folder; give one mask file: PNG or TIFF for 2-D images, NIfTI or NRRD for volumes"
        )
    return as_labels(_reader(path).read_labels(path, like), path, num_labels)


def write_mask(mask: Mask, folder: Path, *, durable: bool = True) -> Path:
    """Write the mask under the image's stem; the file is read back and compared before it replaces an older one.

    The mask of a volume is a NIfTI file in the source's geometry, whatever its format. The mask of a 2-D image is a PNG
    with the class colours, pixel for pixel as the image file is stored. The mask of a stack is a TIFF with one page per
    slice.

    Args:
        mask: the mask.
        folder: where to.
        durable: see ``files.atomic_file``.
    """
    if mask.geometry is not None:
        path = folder / f"{output_stem(mask)}.nii.gz"
        _module(".nii.gz").write(mask, mask.geometry, path, durable=durable)
    else:
        suffix = ".png" if len(mask.labels) == 1 else ".tif"
        path = folder / f"{output_stem(mask)}{suffix}"
        _module(suffix).write(mask, path, durable=durable)
    return path


def source_of_file(path: Path) -> Source:
    """Return the source of one file; only its first bytes are read.

    Raises:
        InputError: its format is not supported.
    """
    if kind_of(path) is None:
        _reader(path)  # raises with the reason
    return Source(path=path, files=(path,), stem=file_stem(path))


def _only(path: Path) -> Source:
    """Return the source of a file, or the only source in a folder."""
    if not path.is_dir():
        return source_of_file(path)
    sources = find_images([path])
    if len(sources) > 1:
        names = ", ".join(source.name for source in sources[:5])
        raise InputError(f"{path} holds {len(sources)} images ({names} …); name one of them")
    return sources[0]


def suffix_of(path: Path) -> str | None:
    """Return the suffix in lower case if it is a key of ``READERS``."""
    return next((suffix for suffix in sorted(READERS, key=len)[::-1] if path.name.lower().endswith(suffix)), None)


def kind_of(path: Path) -> str | None:
    """Return the key of ``READERS`` by the first bytes, or by the name where they match no format or are unreadable."""
    with suppress(OSError):
        if (content := identify(path)) is not None and content.suffix is not None:
            return content.suffix
        if (suffix := suffix_of(path)) is not None or not path.is_file():
            return suffix
        with path.open("rb") as file:  # DICOM without a preamble has no signature
            return DICOM if starts_like_dicom(file.read(SIGNATURE_BYTES)) else None
    return suffix_of(path)


def _reader(path: Path) -> Any:
    """Return the module that reads a file, by its first bytes, or by its name where they match no format.

    Raises:
        InputError: neither matches, or the file is empty or of an unsupported format.
    """
    content, named = readable(path), suffix_of(path)
    kind = kind_of(path) if content is None else content.suffix
    if kind is None:
        raise InputError(f"{path} is of an unsupported format; supported: {', '.join(READERS)} and DICOM")
    if not path.stat().st_size:
        raise InputError(f"{path} cannot be read: it is empty; copy it again from its source")
    if content is not None and named is not None and SAME_KIND.get(named, named) != kind:
        LOG.info("%s is a %s file by its content and is read as such", path, content.name)
    return _module(kind)


def _module(kind: str) -> Any:
    return importlib.import_module(READERS[kind])
