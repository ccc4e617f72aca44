"""DICOM: single files, and series of one file per slice.

Only pixels and geometry are kept: no name, UID or date. Colours and palettes become RGB. MONOCHROME1 is inverted except
in CT and PET, whose values are physical quantities.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.dicom_file import Header, Plane, read_header
from medseg_trt.imaging.formats.dicom_pixels import read_frames
from medseg_trt.imaging.formats.dicom_series import find_series
from medseg_trt.imaging.formats.dicom_stack import DEFAULT_THICKNESS_MM, Stack, in_order, stack_of, without_copies
from medseg_trt.imaging.formats.limits import check_size
from medseg_trt.imaging.formats.nifti import header_of, reoriented
from medseg_trt.imaging.images import Image
from medseg_trt.progress import LOG

__all__ = ["find_series", "read", "read_labels", "read_series", "sorted_planes"]

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_NAMED = 5  # copies listed in a warning


def read(path: Path) -> Image:
    """Read one file: a slice, a 2-D image, or the frames of a multi-frame file.

    Frames with positions become a volume; others a stack of 2-D images without geometry.

    Raises:
        InputError: it is damaged, too large, not an image, lacks frames, or holds several images.
        MissingExtraError: pydicom is not installed.
    """
    header = read_header(path)
    if header.planes:
        return _volume(path, [header])
    spacing = header.spacing_mm
    if header.shape[0] > 1:
        LOG.warning("%s gives no positions of its frames; they are read as a stack of 2-D images", path)
        spacing = None
    return Image(
        path=path, pixels=read_frames(header), spacing_mm=(DEFAULT_THICKNESS_MM, *spacing) if spacing else None
    )


def read_series(folder: Path, files: Sequence[Path]) -> Image:
    """Read the slices of a series, one per file.

    Of slices with the same position and pixels, one is used. UIDs are ignored.

    Raises:
        InputError: a slice is damaged or missing, two have the same position, or they are not evenly spaced.
        MissingExtraError: pydicom is not installed.
    """
    return _volume(folder, [read_header(path) for path in files])


def sorted_planes(path: Path, files: Sequence[Path]) -> tuple[Plane, ...]:
    """Return the planes of a volume in the order of its stored slices, without copies; empty for a 2-D image.

    Raises:
        InputError: as ``read`` and ``read_series`` raise it.
    """
    headers = [read_header(file) for file in files]
    if not all(header.planes for header in headers):
        return ()
    return stack_of(path, _different_planes(path, headers)).planes


def read_labels(path: Path, like: Image) -> ndarray:
    """Refuse DICOM masks.

    Raises:
        InputError: always.
    """
    raise InputError(f"{path} is DICOM; give the mask of {like.path} as NIfTI or NRRD: convert it")


def _volume(path: Path, headers: Sequence[Header]) -> Image:
    """Sort the planes, check that none is missing, and decode them to one volume."""
    shapes = {header.shape[1:] for header in headers}
    if len(shapes) > 1:
        raise InputError(f"{path}: its slices differ in size: {', '.join(str(shape) for shape in sorted(shapes))}")
    check_size(path, (sum(header.shape[0] for header in headers), *headers[0].shape[1:]))
    stack = stack_of(path, _different_planes(path, headers))
    for remark in stack.remarks:
        LOG.warning("%s", remark)
    first = stack.planes[0]
    between_rows, between_columns = first.spacing_mm
    affine_mm = np.eye(4)
    affine_mm[:3, 0] = np.array(first.along_row) * between_columns
    affine_mm[:3, 1] = np.array(first.along_column) * between_rows
    affine_mm[:3, 2] = stack.step_mm
    affine_mm[:3, 3] = first.corner_mm
    affine_mm = LPS_TO_RAS @ affine_mm
    stored = _decode(headers, stack).swapaxes(0, 2)  # (slices, rows, columns, …) -> (columns, rows, slices, …)
    header = header_of(path, stored.shape[:3], affine_mm)
    return reoriented(path, stored, header, affine_mm, keep=len(stack.planes) == 1)


def _different_planes(path: Path, headers: Sequence[Header]) -> list[Plane]:
    """Return the sorted planes without copies; warn of copies and of UIDs that different slices share."""
    by_path = {header.path: header for header in headers}

    @lru_cache(maxsize=2)
    def frames_of(file: Path) -> ndarray:
        return read_frames(by_path[file])

    planes = in_order([plane for header in headers for plane in header.planes])
    kept, copies = without_copies(planes, lambda plane: frames_of(plane.path)[plane.frame])
    if copies:
        named = ", ".join(f"{_name(copy)} of {_name(original)}" for copy, original in copies[:MAX_NAMED])
        more = " …" if len(copies) > MAX_NAMED else ""
        LOG.warning(
            "%s: left out as copies, with the same position and pixels: %s%s (%d in all)",
            path,
            named,
            more,
            len(copies),
        )
    instances = [by_path[file].instance for file in dict.fromkeys(plane.path for plane in kept)]
    instances = [instance for instance in instances if instance]
    if len(set(instances)) < len(instances):
        LOG.warning(
            "%s: slices share a SOPInstanceUID (%d UIDs for %d files), which should be unique; all slices are used",
            path,
            len(set(instances)),
            len(instances),
        )
    return kept


def _decode(headers: Sequence[Header], stack: Stack) -> ndarray:
    """Decode the planes of a stack in order to (slices, rows, columns, channels)."""
    positions = {(plane.path, plane.frame): index for index, plane in enumerate(stack.planes)}
    decoded: ndarray | None = None
    for header in headers:
        used = [plane for plane in header.planes if (plane.path, plane.frame) in positions]
        if not used:
            continue
        frames = read_frames(header)
        if decoded is None:
            decoded = np.empty((len(stack.planes), *frames.shape[1:]), frames.dtype)
        elif frames.shape[1:] != decoded.shape[1:]:
            raise InputError(
                f"{header.path} has other color channels than the rest of its series; export the series again"
            )
        kind = np.result_type(decoded, frames)
        decoded = decoded.astype(np.float32 if kind.kind == "f" else kind, copy=False)
        for plane in used:
            decoded[positions[plane.path, plane.frame]] = frames[plane.frame]
    assert decoded is not None
    return decoded


def _name(plane: Plane) -> str:
    return f"frame {plane.frame + 1}" if plane.frame else plane.path.name
