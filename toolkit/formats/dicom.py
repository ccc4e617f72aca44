"""DICOM: single files, and the series that the files of a folder make up.

Slices are put in order by where they lie along their normal, and the distance between them comes from there too: file
names, instance numbers and SliceThickness do not count. Nothing but pixels and places goes on: no name, UID or date.
Colours become RGB, palettes too; MONOCHROME1 is inverted but in CT and PET, whose numbers mean something.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.formats.dicom_file import Header, NoPicturesError, Plane, read_frames, read_header
from medseg_trt.formats.guard import check_size
from medseg_trt.formats.nifti import header_of, turned
from medseg_trt.images import Image
from medseg_trt.progress import LOG

SAME_DIRECTION = 1e-3  # between the orientations of slices of one volume
SAME_PLACE_MM = 1e-3
UNEVEN_SILENT, UNEVEN_POSSIBLE = (
    0.01,
    0.1,
)  # of the step from slice to slice: warned from the first, refused from the second
ROUNDED_MM = 0.02  # positions are written with few decimals
DEFAULT_THICKNESS_MM = 1.0  # of a slice that lies alone and does not say
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read(path: Path) -> Image:
    """Read one file: a slice, a picture, or the frames of a multi-frame file.

    Frames that say where they lie are a volume; others are a stack of pictures without geometry.

    Raises:
        InputError: it is damaged, too large, holds no pictures, or frames are missing.
        MissingExtraError: pydicom is not installed.
    """
    header = read_header(path)
    if header.planes:
        return _volume(path, [header])
    spacing = header.spacing_mm
    if header.shape[0] > 1:
        LOG.warning("%s does not say where its frames lie; they become a stack of pictures", path)
        spacing = None
    return Image(
        path=path, pixels=read_frames(header), spacing_mm=(DEFAULT_THICKNESS_MM, *spacing) if spacing else None
    )


def read_series(folder: Path, files: Sequence[Path]) -> Image:
    """Read the slices of a series, one a file.

    Raises:
        InputError: one is damaged, two lie at the same place, one is missing, or they are not evenly spaced.
        MissingExtraError: pydicom is not installed.
    """
    return _volume(folder, [read_header(path) for path in files])


def read_labels(path: Path, like: Image) -> ndarray:
    """Refuse DICOM masks.

    Raises:
        InputError: always.
    """
    raise InputError(f"{path} is DICOM; masks of {like.path} can be read from NIfTI or NRRD: convert it")


def find_series(folder: Path, files: Sequence[Path]) -> Iterator[tuple[str | None, tuple[Path, ...]]]:
    """Divide DICOM files into images: what each is called, and its files; files that stand alone have no name yet.

    One series is called like its folder; of several, each has its SeriesNumber appended. Slices of one series that lie
    in different directions or differ in size, such as a scout view, are images of their own. A file that cannot be read
    stands alone, so that reading it says why; DICOM files without pictures are left out.

    Raises:
        MissingExtraError: pydicom is not installed.
    """
    headers: list[Header] = []
    without_pictures = 0
    for path in files:
        try:
            headers.append(read_header(path))
        except NoPicturesError:
            without_pictures += 1
        except InputError:
            yield None, (path,)
    if without_pictures:
        LOG.info("%s: %d DICOM file(s) without pictures are left out", folder, without_pictures)
    groups: list[list[Header]] = []
    for header in sorted(headers, key=_series_key):
        if header.shape[0] > 1 or not header.planes:
            yield None, (header.path,)
            continue
        group = next((group for group in reversed(groups) if _belong_together(group[0], header)), None)
        if group is None:
            groups.append([header])
        elif all(header.instance != other.instance or not header.instance for other in group[-1:]):
            group.append(header)
        else:
            LOG.warning("%s is a copy of %s and is left out", header.path, group[-1].path)
    name = folder.resolve().name or "series"
    if len(groups) == 1:
        yield name, tuple(header.path for header in groups[0])
        return
    for number, same_number in groupby(groups, key=lambda group: group[0].number):
        parts = sorted(same_number, key=len, reverse=True)
        for index, group in enumerate(parts, 1):
            stem = f"{name}-series{'' if number is None else number}" + (f"-{index}" if len(parts) > 1 else "")
            yield stem, tuple(header.path for header in group)


def _series_key(header: Header) -> tuple[int, str, str, str]:
    return (-1 if header.number is None else header.number, header.series, header.instance, str(header.path))


def _belong_together(one: Header, other: Header) -> bool:
    if (one.series, one.number, one.shape) != (other.series, other.number, other.shape):
        return False
    return _same_direction(one.planes[0], other.planes[0])


def _same_direction(one: Plane, other: Plane) -> bool:
    directions = [np.array([plane.along_row, plane.along_column]) for plane in (one, other)]
    spacings = np.array([one.spacing_mm, other.spacing_mm])
    return bool(
        np.abs(directions[0] - directions[1]).max() < SAME_DIRECTION
        and np.abs(spacings[0] - spacings[1]).max() < SAME_DIRECTION
    )


def _volume(path: Path, headers: Sequence[Header]) -> Image:
    """Put the planes in order, check that none is missing, and decode them to one volume."""
    planes = [plane for header in headers for plane in header.planes]
    first = planes[0]
    for plane in planes:
        if not _same_direction(first, plane):
            raise InputError(
                f"{path}: {first.path.name} and {plane.path.name} lie in different directions; separate them"
            )
    shapes = {header.shape[1:] for header in headers}
    if len(shapes) > 1:
        raise InputError(f"{path}: its slices differ in size: {', '.join(str(shape) for shape in sorted(shapes))}")
    check_size(path, (len(planes), *headers[0].shape[1:]))
    normal = np.cross(first.along_row, first.along_column)
    depths_mm = np.array([plane.corner_mm for plane in planes]) @ normal
    order: list[int] = np.argsort(depths_mm, kind="stable").tolist()
    in_order = [planes[index] for index in order]
    step_mm = _step(path, in_order, depths_mm[order], normal)

    place = {(plane.path, plane.frame): index for index, plane in enumerate(in_order)}
    decoded: ndarray | None = None
    for header in headers:
        frames = read_frames(header)
        if decoded is None:
            decoded = np.empty((len(planes), *frames.shape[1:]), frames.dtype)
        elif frames.shape[1:] != decoded.shape[1:]:
            raise InputError(f"{header.path} is in other colours than the rest of its series")
        kind = np.result_type(decoded, frames)
        decoded = decoded.astype(np.float32 if kind.kind == "f" else kind, copy=False)
        for plane, frame in zip(header.planes, frames, strict=True):
            decoded[place[plane.path, plane.frame]] = frame
    assert decoded is not None

    between_rows, between_columns = first.spacing_mm
    affine_mm = np.eye(4)
    affine_mm[:3, 0] = np.array(first.along_row) * between_columns
    affine_mm[:3, 1] = np.array(first.along_column) * between_rows
    affine_mm[:3, 2] = step_mm
    affine_mm[:3, 3] = in_order[0].corner_mm
    affine_mm = LPS_TO_RAS @ affine_mm
    stored = decoded.swapaxes(0, 2)  # (slices, rows, columns, channels) -> (columns, rows, slices, channels)
    header = header_of(path, stored.shape[:3], affine_mm)
    return turned(path, stored, header, affine_mm, keep=len(planes) == 1)


def _step(path: Path, planes: Sequence[Plane], depths_mm: ndarray, normal: ndarray) -> ndarray:
    """Return the vector from a slice to the next, of slices in order.

    Raises:
        InputError: two lie at the same place, one is missing, or they are not on a line of even steps.
    """
    if len(planes) == 1:
        if planes[0].thickness_mm is None:
            LOG.warning("%s does not say how thick its slice is; it is taken to be %g mm", path, DEFAULT_THICKNESS_MM)
        return normal * (planes[0].thickness_mm or DEFAULT_THICKNESS_MM)
    gaps_mm = np.diff(depths_mm)
    if gaps_mm.min() < SAME_PLACE_MM:
        index = int(gaps_mm.argmin())
        raise InputError(
            f"{path}: {_which(planes[index])} and {_which(planes[index + 1])} lie at the same place; separate what was "
            "taken at different times or with different settings into folders of their own"
        )
    usual_mm = float(np.median(gaps_mm))
    index = int(np.abs(gaps_mm - usual_mm).argmax())
    worst_mm = abs(gaps_mm[index] - usual_mm)
    if worst_mm > UNEVEN_POSSIBLE * usual_mm + ROUNDED_MM:
        missing = round(gaps_mm[index] / usual_mm) - 1
        reason = f"{missing} slice(s) may be missing" if missing > 0 else "the slices are not evenly spaced"
        raise InputError(
            f"{path}: between {_which(planes[index])} and {_which(planes[index + 1])} are {gaps_mm[index]:.4g} mm, "
            f"elsewhere {usual_mm:.4g} mm; {reason}: export the whole series, or resample it"
        )
    corners_mm = np.array([plane.corner_mm for plane in planes])
    step_mm = (corners_mm[-1] - corners_mm[0]) / (len(planes) - 1)
    on_line_mm = corners_mm[0] + np.arange(len(planes))[:, np.newaxis] * step_mm
    off_mm = float(np.abs(corners_mm - on_line_mm).max())
    if off_mm > min(usual_mm, *planes[0].spacing_mm) / 2 + ROUNDED_MM:
        raise InputError(f"{path}: its slices do not lie on a line, but up to {off_mm:.3g} mm beside; resample it")
    if worst_mm > UNEVEN_SILENT * usual_mm + ROUNDED_MM:
        LOG.warning("%s: the steps between slices differ by up to %.3g mm; their mean is used", path, worst_mm)
    if np.linalg.norm(np.cross(step_mm, normal)) > UNEVEN_SILENT * usual_mm + ROUNDED_MM:
        LOG.warning("%s: the slices are tilted against the direction they follow one another in; so is the mask", path)
    return step_mm


def _which(plane: Plane) -> str:
    return f"{plane.path.name}" + (f" (frame {plane.frame + 1})" if plane.frame else "")
