"""Read pictures and volumes into one shape, and write masks back the way the source lies.

Whatever the file, an image is an array (slices, height, width, channels) of raw values. A volume is turned to LPS: its
slices follow one another from the feet up, rows run from front to back, columns from the patient's right to left. Files
from outside are not trusted: sizes are taken from the header and checked before anything is decoded.
"""

import gzip
import re
import warnings
import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Num, UInt8
from numpy import ndarray

from medseg_trt.errors import InputError, MedsegError, require
from medseg_trt.files import atomic_file
from medseg_trt.progress import LOG
from medseg_trt.spec import Classes

MAX_PIXELS = 2**28  # of one picture or volume; as float32 they take 1 GiB
MAX_HEADER_BYTES = 2**20  # of a NIfTI header with its extensions
SPACING_RANGE_MM = (1e-6, 1e6)
SINGULAR = 1e-3  # determinant of the axes' directions; 1 where they are at right angles
AFFINE_TOLERANCE_MM = 1e-3  # between an image and its mask; headers hold float32

PNG_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB"}  # Pillow's mode -> ours
MM_PER_UNIT = {"mm": 1.0, "unknown": 1.0, "meter": 1e3, "micron": 1e-3}
GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Geometry:
    """How a volume is stored in its NIfTI file."""

    shape: tuple[int, ...]  # as stored, closing ones included
    header: Any  # a NIfTI header with the shape and GEOMETRY_FIELDS of the source and nothing else of it
    affine_mm: Float64[ndarray, "4 4"]  # from (column, row, slice, 1) of our array to the scanner's millimetres


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Image:
    """A picture (one slice) or a volume, with its raw values."""

    path: Path
    pixels: Num[ndarray, "slices height width channels"]  # 1 or 3 channels
    spacing_mm: tuple[float, float, float] | None = None  # between slices, rows and columns
    geometry: Geometry | None = None  # of a volume

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
            path=image.path, labels=labels, classes=classes, spacing_mm=image.spacing_mm, geometry=image.geometry
        )

    def areas(self) -> tuple[Area, ...]:
        """Measure every class but the background."""
        counts = sum(np.bincount(labels.ravel(), minlength=len(self.classes.names)) for labels in self.labels)
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
            for name, count in list(zip(self.classes.names, np.asarray(counts).tolist(), strict=True))[1:]
        )


def find_images(inputs: Sequence[Path]) -> list[Path]:
    """Return the files that are named, and the files of a kind we read that lie directly in a folder that is named.

    The order is that of ``inputs``; in a folder numbers count as numbers (``img2`` before ``img10``) and hidden files
    are left out. A file that is named twice comes once.

    Raises:
        InputError: a path does not exist, a named file is of a kind we do not read, or a folder has no image.
    """
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = [each for each in path.iterdir() if each.is_file() and not each.name.startswith(".")]
            images = sorted((each for each in inside if _suffix(each)), key=_natural_key)
            if not images:
                raise InputError(f"{path} holds no image; files that can be read end with {', '.join(READERS)}")
            found += images
        elif path.is_file():
            _entry(READERS, path)
            found.append(path)
        else:
            raise InputError(f"{path} does not exist")
    return list(dict.fromkeys(found))


def output_stem(path: Path) -> str:
    """Return the file's name without the suffix of its kind; ``.nii.gz`` is one suffix."""
    return path.name[: len(path.name) - len(_suffix(path) or path.suffix)]


def read_image(path: Path) -> Image:
    """Read a picture or a volume.

    A PNG has 8 bits; a palette becomes RGB and transparency is dropped. A NIfTI volume keeps its integers, unless the
    header scales them; everything else becomes float32.

    Raises:
        InputError: the file is damaged, too large, of a kind we do not read, or holds NaN or infinite values.
        MissingExtraError: it is a NIfTI file and nibabel is not installed.
    """
    return _entry(READERS, path)(path)


def read_labels(path: Path, like: Image, num_labels: int | None) -> UInt8[ndarray, "slices height width"]:
    """Read the mask of ``like``, turned the way its pixels are.

    A palette mask gives indices, not colours. With two labels, a mask of 0 and 255 is read as one of 0 and 1.

    Args:
        path: the mask.
        like: the image that it belongs to.
        num_labels: how many labels there are, background included; None allows 0 … 255.

    Raises:
        InputError: the file is damaged, a colour picture, of another size or place than the image, or holds a value
            that is no label.
    """
    return _as_labels(_entry(LABEL_READERS, path)(path, like), path, num_labels)


def write_mask(mask: Mask, folder: Path) -> Path:
    """Write the mask under the image's stem: a PNG with the class colours, or a NIfTI file that lies as its source."""
    if mask.geometry is None:
        path = folder / f"{output_stem(mask.path)}.png"
        _write_png(mask, path)
    else:
        path = folder / f"{output_stem(mask.path)}.nii.gz"
        _write_nifti(mask, mask.geometry, path)
    return path


def _suffix(path: Path) -> str | None:
    """Return the suffix, in lower case, if it is one that we read."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def _entry(table: "dict[str, Callable[..., Any]]", path: Path) -> Callable[..., Any]:
    suffix = _suffix(path)
    if suffix not in table:
        raise InputError(f"{path} is of a kind that cannot be read here; known are {', '.join(table)}")
    return table[suffix]


def _natural_key(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], path.name


@contextmanager
def _naming(path: Path, *kinds: type[Exception]) -> Generator[None, None, None]:
    """Turn what a decoder says of a bad file into one line that names the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, *kinds) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{path} cannot be read: {reason}") from error


def _check_size(path: Path, shape: Sequence[int]) -> None:
    if prod(shape) > MAX_PIXELS or min(shape) < 1:
        raise InputError(f"{path} says it has {' x '.join(map(str, shape))} pixels; 1 to {MAX_PIXELS} are possible")


def _decode_png(path: Path, modes: Sequence[str]) -> Any:
    """Return Pillow's picture, decoded, if it has one of ``modes``."""
    import PIL.Image

    bombs = (PIL.Image.DecompressionBombWarning, PIL.Image.DecompressionBombError)
    with warnings.catch_warnings(), _naming(path, SyntaxError, *bombs):
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        with PIL.Image.open(path, formats=["PNG"]) as picture:
            picture.verify()  # the checksums, up to the last; decoding stops before it
        with PIL.Image.open(path, formats=["PNG"]) as picture:
            _check_size(path, picture.size)
            stored_as = str(picture.tile[0].args) if picture.tile else ""  # "RGB;16B": Pillow would drop the lower bits
            bits = 16 if "16" in stored_as else 8
            if picture.mode not in modes or (bits == 16 and picture.mode != "I;16"):
                raise InputError(
                    f"{path} is a PNG of mode {picture.mode} with {bits} bits a channel, which is not supported here; "
                    f"save it with 8 bits as one of {', '.join(modes)}"
                )
            picture.load()
            picture.info.pop("transparency", None)
            return picture.copy()


def _read_png(path: Path) -> Image:
    picture = _decode_png(path, list(PNG_MODES))
    pixels = np.array(picture.convert(PNG_MODES[picture.mode]))
    return Image(path=path, pixels=pixels.reshape(1, *pixels.shape[:2], -1))


def _read_png_labels(path: Path, like: Image) -> ndarray:
    labels = np.array(_decode_png(path, [*PNG_MODES, "I;16"]))
    if labels.ndim == 3:
        colours = labels[..., : 1 if labels.shape[2] == 2 else 3]
        labels = colours[..., 0]
        if (colours != labels[..., np.newaxis]).any():
            raise InputError(f"{path} is a colour picture; a mask holds label numbers: save it as grey or palette PNG")
    if like.geometry is not None:
        raise InputError(f"{path} is a picture, but its image {like.path} is a volume; give a NIfTI mask")
    if labels.shape != like.size:
        (height, width), (image_height, image_width) = labels.shape, like.size
        raise InputError(f"{path} is {width} x {height} pixels, but its image is {image_width} x {image_height}")
    return labels[np.newaxis]


def _write_png(mask: Mask, path: Path) -> None:
    import PIL.Image

    (labels,) = mask.labels
    picture = PIL.Image.fromarray(labels)
    picture.putpalette([value for color in mask.classes.colors for value in color])
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")


def _load_nifti(path: Path) -> tuple[ndarray, Geometry]:
    """Return the values (slice, row, column), scaled as the header says, and how they were stored."""
    nibabel = require("nibabel", "medical")
    with _naming(path, nibabel.spatialimages.HeaderDataError, KeyError):
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            header = _nifti_header(path, file.read(nibabel.Nifti2Header.sizeof_hdr))
            file.seek(header.get_data_offset())
            shape, dtype = header.get_data_shape(), header.get_data_dtype()
            expected = prod(shape) * dtype.itemsize
            data = file.read(expected)
            if len(data) < expected:
                raise InputError(f"{path} is cut short: it holds {len(data)} of {expected} bytes of voxels")
            file.read(1)  # at the end of a gzip file its checksum is compared
        values = _scaled(np.frombuffer(data, dtype).reshape(shape[:3], order="F"), *header.get_slope_inter())
        affine_mm = _affine_mm(path, header)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise InputError(f"{path} holds {count} NaN or infinite voxels; replace them, for CT by -1024")
    orientations = require("nibabel.orientations", "medical")
    axes = orientations.io_orientation(affine_mm)
    turn = orientations.ornt_transform(axes, orientations.axcodes2ornt("LPS"))
    pixels = np.ascontiguousarray(orientations.apply_orientation(values, turn).transpose(2, 1, 0))
    kept = type(header)()
    kept.set_data_shape(shape)
    for field in GEOMETRY_FIELDS:
        kept[field] = header[field]
    lps_affine_mm = affine_mm @ orientations.inv_ornt_aff(turn, values.shape)
    return pixels, Geometry(shape=shape, header=kept, affine_mm=lps_affine_mm)


def _nifti_header(path: Path, block: bytes) -> Any:
    nibabel = require("nibabel", "medical")
    kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    kind = next((kind for kind in kinds if kind.may_contain_header(block)), None)
    if kind is None:
        raise InputError(f"{path} is not a NIfTI file")
    header = kind(block[: kind.sizeof_hdr])
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    if len(shape) < 3 or prod(shape[3:]) != 1:
        raise InputError(f"{path} has the shape {shape}; a volume has three axes: split a series into its volumes")
    _check_size(path, shape)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(f"{path} holds {dtype} voxels; integers and floats of up to 64 bits are possible")
    if not kind.sizeof_hdr <= offset <= MAX_HEADER_BYTES:
        raise InputError(f"{path} says its voxels start at byte {offset}, which cannot be")
    return header


def _scaled(stored: ndarray, slope: float | None, intercept: float | None) -> ndarray:
    trivial = slope is None or (slope, intercept) == (1, 0)
    if trivial and stored.dtype.kind in "iu":
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    values = np.empty(stored.shape, np.float32, order="F")
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is infinite, and refused as such
        np.multiply(stored, 1 if slope is None else slope, out=values, dtype=np.float64, casting="same_kind")
        np.add(values, intercept or 0, out=values, dtype=np.float64, casting="same_kind")
    return values


def _affine_mm(path: Path, header: Any) -> ndarray:
    """Return the header's affine in millimetres, if it puts every voxel somewhere else."""
    unit = MM_PER_UNIT[header.get_xyzt_units()[0]]
    with np.errstate(all="ignore"):  # what overflows is refused below
        affine_mm = np.diag([unit, unit, unit, 1.0]) @ header.get_best_affine()
        sides_mm = np.linalg.norm(affine_mm[:3, :3], axis=0)
    shortest, longest = SPACING_RANGE_MM
    if not (np.isfinite(affine_mm).all() and (shortest < sides_mm).all() and (sides_mm < longest).all()):
        sides = " x ".join(f"{side:g}" for side in sides_mm)
        raise InputError(f"{path} says its voxels are {sides} mm; repair its affine")
    if abs(np.linalg.det(affine_mm[:3, :3] / sides_mm)) < SINGULAR:
        raise InputError(f"{path} has an affine whose axes fall together; repair it")
    return affine_mm


def _read_nifti(path: Path) -> Image:
    pixels, geometry = _load_nifti(path)
    if not geometry.header["sform_code"] and not geometry.header["qform_code"]:
        LOG.warning("%s does not say how it lies; its axes are taken to run left, anterior and superior", path)
    columns, rows, slices = np.linalg.norm(geometry.affine_mm[:3, :3], axis=0).tolist()
    return Image(path=path, pixels=pixels[..., np.newaxis], spacing_mm=(slices, rows, columns), geometry=geometry)


def _read_nifti_labels(path: Path, like: Image) -> ndarray:
    labels, geometry = _load_nifti(path)
    if like.geometry is None:
        raise InputError(f"{path} is a volume, but its image {like.path} is a picture; give a PNG mask")
    if labels.shape != like.pixels.shape[:3]:
        raise InputError(f"{path} is {labels.shape} slices, rows and columns, but its image is {like.pixels.shape[:3]}")
    distance = np.abs(geometry.affine_mm - like.geometry.affine_mm).max()
    if distance > AFFINE_TOLERANCE_MM:
        raise InputError(f"{path} does not lie where its image {like.path} lies: the affines differ by {distance:.4g}")
    return labels


def _write_nifti(mask: Mask, geometry: Geometry, path: Path) -> None:
    nibabel = require("nibabel", "medical")
    orientations = require("nibabel.orientations", "medical")
    axes = orientations.io_orientation(geometry.header.get_best_affine())
    turn_back = orientations.ornt_transform(orientations.axcodes2ornt("LPS"), axes)
    stored = orientations.apply_orientation(mask.labels.transpose(2, 1, 0), turn_back).reshape(geometry.shape)
    header = geometry.header.copy()
    header.set_data_dtype(np.uint8)
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    with atomic_file(path) as temporary:
        temporary.write_bytes(gzip.compress(kind(stored, None, header).to_bytes(), compresslevel=1, mtime=0))
        written, lies = _load_nifti(temporary)
        same_place = lies.shape == geometry.shape and all(
            lies.header[field].tobytes() == geometry.header[field].tobytes() for field in GEOMETRY_FIELDS
        )
        if not same_place or not np.array_equal(written, mask.labels):
            raise MedsegError(f"the mask of {mask.path} did not come out the way the image lies; nothing was written")


def _as_labels(values: ndarray, path: Path, num_labels: int | None) -> UInt8[ndarray, "slices height width"]:
    """Check that the values are labels, and return them as such."""
    limit = num_labels or 256
    wrong = (values < 0) | (values > 255)
    if values.dtype.kind == "f":
        wrong |= values != np.floor(values)
    if not wrong.any():
        labels = values.astype(np.uint8)
        if num_labels == 2 and not ((labels != 0) & (labels != 255)).any():
            labels //= 255
        wrong = labels >= limit
        if not wrong.any():
            return labels
    offending = [f"{value:g}" for value in np.unique(values[wrong])[:5].tolist()]
    raise InputError(
        f"{path} holds the values {', '.join(offending)} …, but labels go from 0 to {limit - 1}; "
        "check the mask and the list of classes"
    )


READERS: dict[str, Callable[[Path], Image]] = {".png": _read_png, ".nii": _read_nifti, ".nii.gz": _read_nifti}
LABEL_READERS: dict[str, Callable[[Path, Image], ndarray]] = {
    ".png": _read_png_labels,
    ".nii": _read_nifti_labels,
    ".nii.gz": _read_nifti_labels,
}
