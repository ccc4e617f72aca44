"""Read NIfTI volumes, and write the masks of all volumes.

A volume is reoriented to LPS: slices from inferior to superior, rows from anterior to posterior, columns from the
patient's right to left. Masks of DICOM and NRRD volumes are NIfTI files too: there is one writer and one check, and
viewers overlay them on their source by the geometry of both.
"""

import gzip
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, MedsegError, require
from medseg_trt.files import atomic_file
from medseg_trt.imaging.formats.label_grid import labels_on_grid
from medseg_trt.imaging.formats.limits import (
    MAX_HEADER_BYTES,
    check_size,
    convert_decoder_errors,
    read_chunks,
    read_values,
    require_finite,
)
from medseg_trt.imaging.formats.qform import RIGHT_ANGLED, SCANNER, set_qform
from medseg_trt.imaging.images import Geometry, Image, Mask
from medseg_trt.imaging.signatures import readable
from medseg_trt.progress import LOG

SPACING_RANGE_MM = (1e-6, 1e6)
SINGULAR = 1e-3  # smallest determinant of the axes' unit vectors; 1 for orthogonal axes
SLICES = 2  # the superior-inferior axis in nibabel's orientations

UNIT_BITS = 7  # of xyzt_units; the others are the unit of time
MM_PER_UNIT = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # NIfTI's codes: unknown, metre, millimetre, micron
GEOMETRY_FIELDS = (
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)


def read(path: Path) -> Image:
    """Read a volume or a slice: integers as stored unless the header scales them, everything else as float32.

    A slice has two axes, or three with the last of length 1. It stays one slice in any orientation.

    Raises:
        InputError: it is damaged, too large, not a single volume, or holds NaN or infinite values.
    """
    stored, header, affine_mm = load(path)
    require_finite(path, stored)
    if not header["sform_code"] and not header["qform_code"]:
        LOG.warning("%s has no orientation; its axes are assumed to run left, anterior and superior", path)
    elif not header["qform_code"]:
        _complete_qform(path, header)
    if _unit(header) not in MM_PER_UNIT:
        LOG.warning("%s has an unknown unit of length (xyzt_units %d); mm is assumed", path, header["xyzt_units"])
    return reoriented(path, stored, header, affine_mm)


def _complete_qform(path: Path, header: Any) -> None:
    """Add a qform to a header that has only an sform, if ITK could not open a mask with its axes otherwise."""
    affine = header.get_best_affine()  # in the header's unit
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(directions.T @ directions - np.eye(3)).max() >= RIGHT_ANGLED:
        set_qform(path, header, affine)


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the mask of a volume, reoriented as its image.

    Raises:
        InputError: it cannot be read, or differs from its image in size or geometry.
    """
    stored, header, affine_mm = load(path)
    require_finite(path, stored, "in a mask by 0, the background")
    return labels_like(reoriented(path, stored, header, affine_mm, like.geometry), like)


def labels_like(mask: Image, like: Image, *, may_be_cropped: bool = False) -> ndarray:
    """Return the values of a mask that was read as a volume, on its image's grid.

    Raises:
        InputError: the mask is in colour, its image is 2-D, or they differ in size or geometry.
    """
    if like.geometry is None or mask.geometry is None:
        raise InputError(f"{mask.path} is a volume, but its image {like.path} is a 2-D image; give a PNG mask")
    if mask.pixels.shape[3] != 1:
        raise InputError(f"{mask.path} is in colour; a mask holds label numbers")
    return labels_on_grid(mask, like, may_be_cropped=may_be_cropped)


def stored_axes(path: Path) -> str:
    """Return the orientation of the stored axes, such as "LPS" or "RAS", or nothing where the header has none.

    Raises:
        InputError: the header cannot be read.
    """
    nibabel = require("nibabel", "medical")
    with convert_decoder_errors(path, nibabel.spatialimages.HeaderDataError), _open(path) as file:
        header = _header(path, file.read(nibabel.Nifti2Header.sizeof_hdr))
        if not header["sform_code"] and not header["qform_code"]:
            return ""
        return "".join(require("nibabel.orientations", "medical").aff2axcodes(header.get_best_affine()))


def load(path: Path) -> tuple[ndarray, Any, ndarray]:
    """Return the scaled values (column, row, slice) in stored order, the header, and its affine in millimetres.

    A file of two axes is one slice.
    """
    nibabel = require("nibabel", "medical")
    with convert_decoder_errors(path, nibabel.spatialimages.HeaderDataError), _open(path) as file:
        header = _header(path, file.read(nibabel.Nifti2Header.sizeof_hdr))
        affine_mm = _affine_mm(path, header)
        shape, dtype = (*header.get_data_shape(), 1)[:3], header.get_data_dtype()
        check_size(path, shape, slices=shape[slice_axis(shape, affine_mm)], dtype=dtype)
        file.seek(header.get_data_offset())
        slope, intercept = header.get_slope_inter()
        is_unscaled = slope is None or (slope, intercept) == (1, 0)
        if is_unscaled and dtype.kind in "iu":
            stored = read_values(path, file, prod(shape), dtype)
        else:
            stored = np.empty(prod(shape), np.float32)
            for position, chunk in read_chunks(path, file, stored.size, dtype):
                stored[position] = _scaled(chunk, slope, intercept)
    return stored.reshape(shape, order="F"), header, affine_mm


def _open(path: Path) -> Any:
    """Open a volume, through gzip where its first bytes are those of gzip."""
    content = readable(path)
    return gzip.open(path) if content is not None and content.gzipped else path.open("rb")


def _header(path: Path, block: bytes) -> Any:
    nibabel = require("nibabel", "medical")
    kinds = (nibabel.Nifti1Header, nibabel.Nifti2Header)
    kind = next((kind for kind in kinds if kind.may_contain_header(block)), None)
    if kind is None:
        raise InputError(f"{path} is not a NIfTI file, whatever its name says; export it again as NIfTI")
    if len(block) < kind.sizeof_hdr:
        raise InputError(f"{path} is cut short: it ends within its header")
    header = kind(block[: kind.sizeof_hdr])
    shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    if len(shape) < 2 or prod(shape[3:]) != 1:
        raise InputError(
            f"{path} has the shape {shape}; a volume has three axes, a slice two: split a series into its volumes"
        )
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise InputError(f"{path} holds {dtype} voxels; integers and floats of up to 64 bits are supported")
    check_size(path, shape, dtype=dtype)
    if not kind.sizeof_hdr <= offset <= MAX_HEADER_BYTES:
        raise InputError(f"{path} has the impossible voxel offset {offset}; export it again")
    return header


def _affine_mm(path: Path, header: Any) -> ndarray:
    """Return the header's affine, from stored (column, row, slice, 1) to millimetres.

    Raises:
        InputError: it is degenerate.
    """
    unit_mm = MM_PER_UNIT.get(_unit(header), 1.0)
    with np.errstate(all="ignore"):  # overflowed values are refused below
        affine_mm = np.diag([unit_mm, unit_mm, unit_mm, 1.0]) @ header.get_best_affine()
    require_affine(path, affine_mm)
    return affine_mm


def _unit(header: Any) -> int:
    return int(header["xyzt_units"]) & UNIT_BITS


def slice_axis(shape: tuple[int, ...], affine_mm: ndarray) -> int:
    """Return the stored axis of the slices: the superior-inferior one, or the last one of a single slice."""
    axes = require("nibabel.orientations", "medical").io_orientation(affine_mm)[:, 0]
    return 2 if shape[2] == 1 else int(np.argmax(axes == SLICES))


def _scaled(stored: ndarray, slope: float | None, intercept: float | None) -> ndarray:
    values = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # values out of range become infinite and are refused
        np.multiply(stored, 1 if slope is None else slope, out=values, dtype=np.float64, casting="same_kind")
        np.add(values, intercept or 0, out=values, dtype=np.float64, casting="same_kind")
    return values


def require_affine(path: Path, affine_mm: ndarray) -> None:
    """Refuse a degenerate affine.

    Raises:
        InputError: a voxel side is out of range, or the axes are linearly dependent.
    """
    with np.errstate(all="ignore"):
        sides_mm = np.linalg.norm(affine_mm[:3, :3], axis=0)
    shortest, longest = SPACING_RANGE_MM
    if not (np.isfinite(affine_mm).all() and (shortest < sides_mm).all() and (sides_mm < longest).all()):
        sides = " x ".join(f"{side:g}" for side in sides_mm)
        raise InputError(f"{path} has voxels of {sides} mm; repair its affine")
    if abs(np.linalg.det(affine_mm[:3, :3] / sides_mm)) < SINGULAR:
        raise InputError(f"{path} has an affine with linearly dependent axes; repair it")


def header_of(path: Path, shape: tuple[int, ...], affine_mm: ndarray) -> Any:
    """Return a NIfTI header for a volume of another format, in scanner coordinates.

    Args:
        path: the volume.
        shape: columns, rows and slices.
        affine_mm: from (column, row, slice, 1) to millimetres right, anterior, superior.

    Raises:
        InputError: the affine is degenerate.
    """
    nibabel = require("nibabel", "medical")
    require_affine(path, affine_mm)
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    set_qform(path, header, affine_mm)
    header.set_sform(affine_mm, SCANNER)
    header.set_xyzt_units("mm")
    return header


def reoriented(
    path: Path, stored: ndarray, header: Any, affine_mm: ndarray, like: Geometry | None = None, keep: bool = False
) -> Image:
    """Return the image of a volume, reoriented to LPS.

    Args:
        path: its file or folder.
        stored: values (column, row, slice) or (column, row, slice, channel).
        header: NIfTI header, of which only the geometry is kept.
        affine_mm: from stored (column, row, slice, 1) to millimetres right, anterior, superior.
        like: reorient to the axes of this volume, which need not be LPS.
        keep: keep the stored axes. Those of a single slice that is not axial are always kept, so that it stays one.
    """
    orientations = require("nibabel.orientations", "medical")
    axes = orientations.io_orientation(affine_mm)
    if keep or (like is None and stored.shape[2] == 1 and axes[2, 0] != SLICES):
        reorientation = orientations.ornt_transform(axes, axes)
    elif like is None:
        reorientation = orientations.ornt_transform(axes, orientations.axcodes2ornt("LPS"))
    else:
        reorientation = orientations.ornt_transform(axes, orientations.io_orientation(like.affine_mm))
    pixels = np.ascontiguousarray(orientations.apply_orientation(stored, reorientation).swapaxes(0, 2))
    kept = type(header)()
    kept.set_data_shape(header.get_data_shape())
    for field in GEOMETRY_FIELDS:
        kept[field] = header[field]
    our_affine_mm = affine_mm @ orientations.inv_ornt_aff(reorientation, stored.shape[:3])
    columns, rows, slices = np.linalg.norm(our_affine_mm[:3, :3], axis=0).tolist()
    return Image(
        path=path,
        pixels=pixels.reshape(*pixels.shape[:3], -1),
        spacing_mm=(slices, rows, columns),
        geometry=Geometry(
            shape=header.get_data_shape(), header=kept, affine_mm=our_affine_mm, reorientation=reorientation
        ),
    )


def write(mask: Mask, geometry: Geometry, path: Path, *, durable: bool = True) -> None:
    """Write a gzipped NIfTI mask in the geometry of its source.

    Raises:
        MedsegError: the file read back differs from the mask; nothing is written.
    """
    nibabel = require("nibabel", "medical")
    orientations = require("nibabel.orientations", "medical")
    ours = orientations.io_orientation(geometry.affine_mm)
    axes = orientations.io_orientation(geometry.header.get_best_affine())
    turn_back = orientations.ornt_transform(ours, axes)
    stored = orientations.apply_orientation(mask.labels.transpose(2, 1, 0), turn_back).reshape(geometry.shape)
    header = geometry.header.copy()
    header.set_data_dtype(np.uint8)
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_bytes(gzip.compress(kind(stored, None, header).to_bytes(), compresslevel=1, mtime=0))
        written, written_header, _ = load(temporary)
        is_same_geometry = written_header.get_data_shape() == geometry.shape and all(
            written_header[field].tobytes() == geometry.header[field].tobytes() for field in GEOMETRY_FIELDS
        )
        labels = orientations.apply_orientation(written, geometry.reorientation).swapaxes(0, 2)
        if not is_same_geometry or not np.array_equal(labels, mask.labels):
            raise MedsegError(
                f"the mask of {mask.path} differs in geometry or labels when read back; nothing was written"
            )
