"""NRRD volumes and pictures: ``.nrrd``, and ``.nhdr`` whose voxels are in one file beside it.

pynrrd reads the header; the voxels are read here, with limits, and never from outside the header's folder. Masks of
NRRD volumes are written as NIfTI, in the same place: see ``nifti``.
"""

import bz2
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import ArtefactError, InputError, require
from medseg_trt.files import inside
from medseg_trt.formats import nifti, pictures
from medseg_trt.formats.guard import MAX_HEADER_BYTES, MAX_PIXELS, check_size, naming, require_finite
from medseg_trt.images import Image
from medseg_trt.progress import LOG

MAGIC = b"NRRD000"
TEXT = ("ascii", "text", "txt")  # encodings whose numbers are split, not cut to bytes
TEXT_BYTES = 32  # of a number written out, at most
GZIP = 31  # zlib's window bits for a gzip stream
CHUNK_BYTES = 2**20
DTYPES: Mapping[str, str] = {  # NRRD's name of a type, without blanks -> NumPy's
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
    "right-anterior-superior": (1.0, 1.0, 1.0), "ras": (1.0, 1.0, 1.0),
    "left-anterior-superior": (-1.0, 1.0, 1.0), "las": (-1.0, 1.0, 1.0),
    "left-posterior-superior": (-1.0, -1.0, 1.0), "lps": (-1.0, -1.0, 1.0),
}  # fmt: skip
MM_PER_UNIT = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "": 1.0}
COLOURS = ("rgb-color", "rgba-color", "3-color", "4-color")


def read(path: Path) -> Image:
    """Read a volume, or a picture of two axes.

    Raises:
        InputError: it is damaged, too large, of more axes, lies in an unknown space, or its voxels are elsewhere.
        MissingExtraError: pynrrd is not installed.
    """
    with naming(path, Exception):
        header, values = _load(path)
        channels = _channel_axis(path, header, values.shape)
        values = np.moveaxis(values, channels, -1) if channels is not None else values[..., np.newaxis]
        require_finite(path, values)
        if values.ndim == 3:
            return Image(path=path, pixels=np.ascontiguousarray(values.swapaxes(0, 1))[np.newaxis])
        affine_mm = _affine_mm(path, header, channels)
        kept = nifti.header_of(path, values.shape[:3], affine_mm)
        return nifti.turned(path, values, kept, affine_mm)


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the mask of a volume or a picture, turned as it is; it may cover a part of the volume.

    Raises:
        InputError: it cannot be read, or does not lie where its image lies.
    """
    mask = read(path)
    if mask.geometry is None:
        return pictures.labels_like(path, pictures.grey(path, mask.pixels[0]).squeeze()[np.newaxis], 1, like)
    return nifti.labels_like(mask, like, may_be_cropped=True)  # as 3D Slicer saves segments


def _load(path: Path) -> tuple[dict[str, Any], ndarray]:
    """Return the header, and the values with the fastest axis first."""
    nrrd = require("nrrd", "medical")
    with path.open("rb") as file:
        header = nrrd.read_header(_header_lines(path, file))
        shape = tuple(int(size) for size in header["sizes"])
        check_size(path, shape)
        if len(shape) != header["dimension"]:
            raise InputError(f"{path} says it has {header['dimension']} axes, but names the sizes of {len(shape)}")
        kind = DTYPES.get(str(header["type"]).replace(" ", "").lower())
        if kind is None:
            raise InputError(f"{path} holds values of the type {header['type']}, which cannot be read")
        dtype = np.dtype(kind).newbyteorder("<" if header.get("endian", "little").lower() == "little" else ">")
        name = header.get("data file", header.get("datafile"))
        if name is None:
            content = _content(path, file, header, prod(shape), dtype)
        else:
            with _beside(path, name).open("rb") as detached:
                content = _content(path, detached, header, prod(shape), dtype)
    values = content.reshape(shape, order="F")
    return header, values.astype(dtype.newbyteorder("="), copy=False)


def _header_lines(path: Path, file: Any) -> list[str]:
    """Read up to the empty line that ends the header, or to the end of a detached one."""
    if file.read(len(MAGIC)) != MAGIC:
        raise InputError(f"{path} is not an NRRD file")
    file.seek(0)
    lines: list[str] = []
    left = MAX_HEADER_BYTES
    while line := file.readline(left).decode("ascii", "replace").rstrip():
        lines.append(line)
        left -= len(line) + 1
        if left <= 0:
            raise InputError(f"{path} has a header of more than {MAX_HEADER_BYTES} bytes")
    return lines


def _beside(path: Path, name: Any) -> Path:
    """Return the file of the voxels, which must lie in the header's folder.

    Raises:
        InputError: it does not.
    """
    if not isinstance(name, str) or "%" in name or name.split()[:1] == ["LIST"]:
        raise InputError(f"{path} has its voxels in several files; save it as one .nrrd file")
    try:
        found = inside(path.parent, name)
    except ArtefactError as error:
        raise InputError(f"{path} has its voxels in {name!r}, outside its folder; save it as one .nrrd file") from error
    if not found.is_file():
        raise InputError(f"{path} has its voxels in {name!r}, which is not beside it")
    return found


def _content(path: Path, file: Any, header: Mapping[str, Any], count: int, dtype: np.dtype[Any]) -> ndarray:
    """Read and inflate ``count`` values and no more."""
    encoding = str(header["encoding"]).lower()
    if encoding not in DECODERS and encoding not in TEXT:
        raise InputError(f"{path} is encoded as {encoding}; known are {', '.join((*DECODERS, *TEXT))}")
    for _ in range(min(int(header.get("line skip", header.get("lineskip", 0))), MAX_HEADER_BYTES)):
        file.readline(MAX_HEADER_BYTES)
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    expected = count * dtype.itemsize
    if encoding in TEXT:
        words = file.read(count * TEXT_BYTES).split()
        if len(words) < count:
            raise InputError(f"{path} is cut short: it holds {len(words)} of {count} values")
        return np.array(words[:count], np.float64 if dtype.kind == "f" else object).astype(dtype)
    if skip < 0:
        if DECODERS[encoding] is not _raw:
            raise InputError(f"{path}: byte skip {skip} is possible with raw voxels only")
        file.seek(-expected, 2)
        skip = 0
    if skip > MAX_PIXELS:
        raise InputError(f"{path} says that {skip} bytes lie before its voxels, which cannot be")
    content = DECODERS[encoding](file, skip + expected)[skip:]
    if len(content) < expected:
        raise InputError(f"{path} is cut short: it holds {len(content)} of {expected} bytes of voxels")
    return np.frombuffer(content, dtype)


def _raw(file: Any, size: int) -> bytes:
    return file.read(size)


def _gzip(file: Any, size: int) -> bytes:
    """Inflate up to ``size`` bytes; where the stream ends there, its checksum is compared."""
    inflater = zlib.decompressobj(GZIP)
    parts: list[bytes] = []
    left = size
    while left > 0 and not inflater.eof and (chunk := inflater.unconsumed_tail or file.read(CHUNK_BYTES)):
        parts.append(inflater.decompress(chunk, left))
        left -= len(parts[-1])
    while not inflater.eof and (chunk := inflater.unconsumed_tail or file.read(CHUNK_BYTES)):
        if inflater.decompress(chunk, 1):
            break  # there is more than the header says
    return b"".join(parts)


def _bzip2(file: Any, size: int) -> bytes:
    inflater = bz2.BZ2Decompressor()
    parts: list[bytes] = []
    left = size
    while left > 0 and not inflater.eof:
        chunk = file.read(CHUNK_BYTES) if inflater.needs_input else b""
        if inflater.needs_input and not chunk:
            break
        parts.append(inflater.decompress(chunk, left))
        left -= len(parts[-1])
    return b"".join(parts)


def _channel_axis(path: Path, header: Mapping[str, Any], shape: tuple[int, ...]) -> int | None:
    """Return the axis that is no direction in space, if there is one.

    Raises:
        InputError: it is not one of colours, or there are too many axes.
    """
    kinds = [str(kind).lower() for kind in header.get("kinds", [])]
    if "list" in kinds and any(name.startswith("Segment") for name in header):
        raise InputError(
            f"{path} has {shape[kinds.index('list')]} layers of overlapping segments, as 3D Slicer saves them; export "
            "them as one labelmap: Segmentations, Export to labelmap, with the image as reference volume"
        )
    axes = [axis for axis, kind in enumerate(kinds) if kind in COLOURS and shape[axis] >= 3]
    spatial = len(shape) - len(axes)
    if len(axes) > 1 or spatial not in (2, 3):
        raise InputError(f"{path} has the sizes {shape}; a volume has three axes: split a series into its volumes")
    if axes and shape[axes[0]] != 3:
        raise InputError(f"{path} has {shape[axes[0]]} channels; 1 or 3 are possible")
    return axes[0] if axes else None


def _affine_mm(path: Path, header: Mapping[str, Any], channels: int | None) -> ndarray:
    """Return the affine from (column, row, slice, 1) as stored to millimetres right, anterior, superior.

    Source: teem.sourceforge.net/nrrd/format.html, section 5, orientation.
    """
    axes = [axis for axis in range(int(header["dimension"])) if axis != channels]
    affine_mm = np.eye(4)
    space = str(header.get("space", "")).lower()
    directions = header.get("space directions")
    if directions is not None:
        if space not in SPACES:
            raise InputError(
                f"{path} lies in the space {space or 'unnamed'!r}; known are left-posterior-superior, "
                "right-anterior-superior and left-anterior-superior: repair its header"
            )
        vectors = [directions[axis] for axis in axes]
        affine_mm[:3, :3] = np.array(vectors, np.float64).T
        affine_mm[:3, 3] = header.get("space origin", (0, 0, 0))
        units = {str(unit).lower() for unit in header.get("space units", [])} or {"mm"}
        unit = units.pop()
        if units or unit not in MM_PER_UNIT:
            raise InputError(f"{path} is measured in {unit!r}; known are {', '.join(filter(None, MM_PER_UNIT))}")
        affine_mm[:3] *= MM_PER_UNIT[unit]
    else:
        LOG.warning("%s does not say how it lies; its axes are taken to run left, posterior and superior", path)
        spacings = np.asarray(header.get("spacings", np.ones(int(header["dimension"]))), np.float64)[axes]
        affine_mm[:3, :3] = np.diag(np.where(np.isfinite(spacings), spacings, 1.0))
        space = "lps"
    return np.diag([*SPACES[space], 1.0]) @ affine_mm


DECODERS: Mapping[str, Callable[[Any, int], bytes]] = {
    "raw": _raw, "gzip": _gzip, "gz": _gzip, "bzip2": _bzip2, "bz2": _bzip2,
}  # fmt: skip
