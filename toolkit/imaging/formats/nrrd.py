"""Read NRRD volumes and 2-D images: ``.nrrd``, and ``.nhdr`` with its voxels in one file in the same folder.

pynrrd reads the header. The voxels are read here, with limits, and never from outside the header's folder. Masks of
NRRD volumes are written as NIfTI in the same geometry: see ``nifti``.
"""

import bz2
import gzip
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import ArtefactError, InputError, require
from medseg_trt.files import inside
from medseg_trt.imaging.formats import images_2d, nifti
from medseg_trt.imaging.formats.limits import (
    MAX_HEADER_BYTES,
    MAX_PIXELS,
    check_size,
    convert_decoder_errors,
    read_values,
    require_finite,
)
from medseg_trt.imaging.images import Image
from medseg_trt.progress import LOG

MAGIC = b"NRRD000"
TEXT = ("ascii", "text", "txt")  # encodings of numbers separated by blanks
TEXT_BYTES = 32  # of a number written out, at most
MAX_TEXT_VALUES = 2**23  # each is an object of some 40 bytes while it is parsed: 320 MiB
DATA_FILE = re.compile(r"data ?file:", re.IGNORECASE)
LIST_OF_FILES = re.compile(r"data ?file:\s*LIST", re.IGNORECASE)
DTYPES: Mapping[str, str] = {  # NRRD type name without blanks -> NumPy type
    **dict.fromkeys(("signedchar", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsignedchar", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "shortint", "signedshort", "signedshortint", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsignedshort", "unsignedshortint", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signedint", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsignedint", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "longlongint", "signedlonglong", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsignedlonglong", "unsignedlonglongint", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
SPACES = {  # to millimetres right, anterior, superior
    "right-anterior-superior": (1.0, 1.0, 1.0),
    "ras": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0),
    "las": (-1.0, 1.0, 1.0),
    "left-posterior-superior": (-1.0, -1.0, 1.0),
    "lps": (-1.0, -1.0, 1.0),
}
MM_PER_UNIT = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "": 1.0}
COLOURS = ("rgb-color", "rgba-color", "3-color", "4-color")
SPATIAL = ("", "domain", "space", "none", "???")  # kinds of axes that may be spatial
SLICER_SEGMENT = "Segment0_"  # how keys of 3D Slicer's segmentations begin


def read(path: Path) -> Image:
    """Read a volume, or a 2-D image of two axes.

    Raises:
        InputError: it is damaged, too large, has more axes or an unknown space, or its voxels are in another folder.
        MissingExtraError: pynrrd is not installed.
    """
    with convert_decoder_errors(path, Exception):
        values, spatial, affine_mm = _load(path)
        values = np.moveaxis(values, spatial, range(len(spatial))).reshape(
            *(values.shape[axis] for axis in spatial), -1
        )
        require_finite(path, values)
        if affine_mm is None:
            return Image(path=path, pixels=np.ascontiguousarray(values.swapaxes(0, 1))[np.newaxis])
        kept = nifti.header_of(path, values.shape[:3], affine_mm)
        return nifti.reoriented(path, values, kept, affine_mm)


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the mask of a volume or a 2-D image, reoriented as its image; it may cover a part of the volume.

    Raises:
        InputError: it cannot be read, or differs from its image in size or geometry.
    """
    mask = read(path)
    if mask.geometry is None:
        return images_2d.labels_like(path, images_2d.grey(path, mask.pixels[0]).squeeze()[np.newaxis], 1, like)
    return nifti.labels_like(mask, like, may_be_cropped=True)  # as 3D Slicer saves segments


def voxel_files(path: Path) -> list[Path]:
    """Return the file beside a detached header that holds its voxels; of any other file none.

    Raises:
        InputError: the header is damaged, or there is no such file.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return []
        file.seek(0)
        lines = _header_lines(path, file)
    names = [line.partition(":")[2].strip() for line in lines if DATA_FILE.match(line)]
    return [_beside(path, name) for name in names[:1]]


def _load(path: Path) -> tuple[ndarray, list[int], ndarray | None]:
    """Return the values with the fastest axis first, their spatial axes, and a volume's affine."""
    nrrd = require("nrrd", "medical")
    with path.open("rb") as file:
        header = nrrd.read_header(_header_lines(path, file))
        shape = tuple(int(size) for size in header["sizes"])
        if len(shape) != header["dimension"]:
            raise InputError(f"{path} declares {header['dimension']} axes, but the sizes of {len(shape)}")
        kind = DTYPES.get(str(header["type"]).replace(" ", "").lower())
        if kind is None:
            raise InputError(f"{path} holds values of the type {header['type']}, which is not supported; save it again")
        dtype = np.dtype(kind).newbyteorder("<" if header.get("endian", "little").lower() == "little" else ">")
        check_size(path, shape, dtype=dtype)
        spatial = _spatial_axes(path, header, shape)
        affine_mm = _affine_mm(path, header, spatial) if len(spatial) == 3 else None
        if affine_mm is not None:
            nifti.require_affine(path, affine_mm)
            sizes = tuple(shape[axis] for axis in spatial)
            check_size(path, shape, slices=sizes[nifti.slice_axis(sizes, affine_mm)], dtype=dtype)
        name = header.get("data file", header.get("datafile"))
        if name is None:
            content = _content(path, file, header, prod(shape), dtype, detached=False)
        else:
            with _beside(path, name).open("rb") as beside:
                content = _content(path, beside, header, prod(shape), dtype, detached=True)
    return content.reshape(shape, order="F"), spatial, affine_mm


def _header_lines(path: Path, file: Any) -> list[str]:
    """Read up to the empty line that ends the header, or to the end of a detached one."""
    if file.read(len(MAGIC)) != MAGIC:
        raise InputError(f"{path} is not an NRRD file, or of a later version than 9; save it again as NRRD")
    file.seek(0)
    lines: list[str] = []
    left = MAX_HEADER_BYTES
    while (raw := file.readline(left)) and (line := raw.decode("ascii", "replace").rstrip()):
        if LIST_OF_FILES.match(line):
            _beside(path, "LIST")
        lines.append(line)
        left -= len(line) + 1
        if left <= 0:
            raise InputError(f"{path} has a header of more than {MAX_HEADER_BYTES} bytes")
    if not raw and not any(DATA_FILE.match(line) for line in lines):
        raise InputError(f"{path} is cut short: it ends within its header")
    return lines


def _beside(path: Path, name: Any) -> Path:
    """Return the file of the voxels, which must lie in the header's folder.

    Raises:
        InputError: it does not.
    """
    if not isinstance(name, str) or "%" in name or name.split()[:1] == ["LIST"]:
        raise InputError(f"{path} has its voxels in several files; save it as one .nrrd file")
    try:
        voxel_file = inside(path.parent, name)
    except ArtefactError as error:
        raise InputError(f"{path} has its voxels in {name!r}, outside its folder; save it as one .nrrd file") from error
    if not voxel_file.is_file():
        raise InputError(f"{path} has its voxels in {name!r}, which is not in its folder; copy it there")
    return voxel_file


def _content(
    path: Path, file: Any, header: Mapping[str, Any], count: int, dtype: np.dtype[Any], detached: bool
) -> ndarray:
    """Read and inflate ``count`` values and no more; in a detached file other content may follow raw voxels."""
    encoding = str(header["encoding"]).lower()
    if encoding not in DECODERS and encoding not in TEXT:
        raise InputError(f"{path} is encoded as {encoding}; supported: {', '.join((*DECODERS, *TEXT))}")
    for _ in range(min(int(header.get("line skip", header.get("lineskip", 0))), MAX_HEADER_BYTES)):
        file.readline(MAX_HEADER_BYTES)
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    if encoding in TEXT:
        return _from_text(path, file, count, dtype)
    is_raw = encoding == RAW
    if skip < 0:
        if not is_raw:
            raise InputError(f"{path}: byte skip {skip} is supported with raw voxels only")
        file.seek(-count * dtype.itemsize, 2)
        skip = 0
    if skip > MAX_PIXELS:
        raise InputError(f"{path} has the impossible byte skip {skip}; export it again")
    stream = file if is_raw else DECODERS[encoding](file)
    stream.seek(skip, 1)
    return read_values(path, stream, count, dtype, more_allowed=detached and is_raw)


def _from_text(path: Path, file: Any, count: int, dtype: np.dtype[Any]) -> ndarray:
    if count > MAX_TEXT_VALUES:
        raise InputError(
            f"{path} has {count} values as text, at most {MAX_TEXT_VALUES} are read; save it as raw or gzip"
        )
    words = file.read(count * TEXT_BYTES).split()
    if len(words) < count:
        raise InputError(f"{path} is cut short: it holds {len(words)} of {count} values")
    values = np.array(words[:count], np.float64 if dtype.kind == "f" else object)
    return values.astype(dtype.newbyteorder("="))


def _spatial_axes(path: Path, header: Mapping[str, Any], shape: tuple[int, ...]) -> list[int]:
    """Return the spatial axes; at most one other axis, of colours, has more than one value.

    Raises:
        InputError: there are others, or more or fewer than two or three.
    """
    kinds = [str(kind).lower() for kind in header.get("kinds", [])]
    kinds += [""] * (len(shape) - len(kinds))
    colours = [axis for axis, kind in enumerate(kinds) if kind in COLOURS and shape[axis] >= 3]
    spatial = [axis for axis, kind in enumerate(kinds) if kind in SPATIAL]
    while len(spatial) > 3 and shape[spatial[-1]] == 1:  # closing axes of one, as in NIfTI
        spatial.pop()
    if len(colours) == 1 and shape[colours[0]] != 3:
        raise InputError(f"{path} has {shape[colours[0]]} channels; 1 or 3 are supported")
    layers = prod(size for axis, size in enumerate(shape) if axis not in (*colours, *spatial))
    if layers > 1 and any(key.startswith(SLICER_SEGMENT) for key in header):
        raise InputError(
            f"{path} is a segmentation of 3D Slicer in {layers} layers, because its segments overlap; export it as a "
            "label map: module Segmentations, 'Export to files', file format NRRD"
        )
    if layers > 1 or len(colours) > 1 or len(spatial) not in (2, 3):
        raise InputError(f"{path} has the sizes {shape}; a volume has three axes: split a series into its volumes")
    return spatial


def _affine_mm(path: Path, header: Mapping[str, Any], axes: Sequence[int]) -> ndarray:
    """Return the affine from (column, row, slice, 1) as stored to millimetres right, anterior, superior.

    Source: teem.sourceforge.net/nrrd/format.html, section 5, orientation.
    """
    affine_mm = np.eye(4)
    space = str(header.get("space", "")).lower()
    directions = header.get("space directions")
    if directions is not None:
        if space not in SPACES:
            raise InputError(
                f"{path} has the space {space or 'unnamed'!r}; supported: left-posterior-superior, "
                "right-anterior-superior and left-anterior-superior: repair its header"
            )
        vectors = [directions[axis] for axis in axes]
        affine_mm[:3, :3] = np.array(vectors, np.float64).T
        affine_mm[:3, 3] = header.get("space origin", (0, 0, 0))
        units = {str(unit).lower() for unit in header.get("space units", [])} or {"mm"}
        unit = units.pop()
        if units or unit not in MM_PER_UNIT:
            raise InputError(
                f"{path} has the unit of length {unit!r}; supported: {', '.join(filter(None, MM_PER_UNIT))}"
            )
        affine_mm[:3] *= MM_PER_UNIT[unit]
    else:
        LOG.warning("%s has no orientation; its axes are assumed to run left, posterior and superior", path)
        spacings = np.asarray(header.get("spacings", np.full(int(header["dimension"]), np.nan)), np.float64)[axes]
        if not np.isfinite(spacings).all():
            LOG.warning("%s does not state all distances between its voxels; 1 mm is assumed for the others", path)
        affine_mm[:3, :3] = np.diag(np.where(np.isfinite(spacings), spacings, 1.0))
        space = "lps"
    return np.diag([*SPACES[space], 1.0]) @ affine_mm


RAW = "raw"
DECODERS: Mapping[str, Callable[[Any], Any]] = {  # encoding -> decoder, which inflates only as much as is read
    RAW: lambda file: file,
    **dict.fromkeys(("gzip", "gz"), lambda file: gzip.GzipFile(fileobj=file)),
    **dict.fromkeys(("bzip2", "bz2"), bz2.BZ2File),
}
