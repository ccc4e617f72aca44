"""Sort the planes of a volume, drop copies, and compute the vector between slices.

Order and distance of slices come from their positions along their normal. File names, instance numbers, UIDs and
SliceThickness are ignored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.dicom_file import Plane

SAME_DIRECTION = 1e-3  # largest difference between orientations or spacings in one volume
SAME_PLACE_MM = 1e-3
UNEVEN_WARNED = 0.01  # deviation from the distance between slices, as a share of it, above which a warning is given
UNEVEN_REFUSED = 0.1  # and above which the volume is refused
ROUNDED_MM = 0.02  # positions are written with few decimals
DEFAULT_THICKNESS_MM = 1.0  # of a single slice that does not state it
MAX_NAMED = 12  # frames listed one by one in a message


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stack:
    """Sorted, evenly spaced planes."""

    planes: tuple[Plane, ...]
    step_mm: ndarray  # vector from a plane's corner to the next one's
    remarks: tuple[str, ...]  # warnings for the user


def same_direction(one: Plane, other: Plane) -> bool:
    """Return whether two planes have the same orientation and pixel spacing."""
    directions = [np.array([plane.along_row, plane.along_column]) for plane in (one, other)]
    spacings = np.array([one.spacing_mm, other.spacing_mm])
    return bool(
        np.abs(directions[0] - directions[1]).max() < SAME_DIRECTION
        and np.abs(spacings[0] - spacings[1]).max() < SAME_DIRECTION
    )


def normal_of(plane: Plane) -> ndarray:
    """Return the unit normal of a plane (left, posterior, superior)."""
    normal = np.cross(plane.along_row, plane.along_column)
    return normal / np.linalg.norm(normal)


def in_order(planes: Sequence[Plane]) -> list[Plane]:
    """Return parallel planes sorted by their position along the normal."""
    depths_mm = np.array([plane.corner_mm for plane in planes]) @ normal_of(planes[0])
    order: list[int] = np.argsort(depths_mm, kind="stable").tolist()
    return [planes[index] for index in order]


def without_copies(
    planes: Sequence[Plane], pixels_of: Callable[[Plane], ndarray]
) -> tuple[list[Plane], list[tuple[Plane, Plane]]]:
    """Return sorted planes without copies, and the copies with their originals.

    A copy has the position and the pixels of another plane.

    Args:
        planes: sorted along their normal.
        pixels_of: decodes a plane; called only for planes at the same position.
    """
    kept: list[Plane] = []
    copies: list[tuple[Plane, Plane]] = []
    for plane in planes:
        original = kept[-1] if kept else None
        if original is None or not _same_place(original, plane):
            kept.append(plane)
        elif np.array_equal(pixels_of(original), pixels_of(plane)):
            copies.append((plane, original))
        else:
            kept.append(plane)
    return kept, copies


def stack_of(path: Path, planes: Sequence[Plane]) -> Stack:
    """Check that sorted planes are parallel, evenly spaced and on a straight line.

    Raises:
        InputError: two have the same position or different orientations, or one is missing.
    """
    _require_one_direction(path, planes)
    normal = normal_of(planes[0])
    if len(planes) == 1:
        thickness_mm = planes[0].thickness_mm
        unknown = f"{planes[0].path} does not state its slice thickness; {DEFAULT_THICKNESS_MM:g} mm is assumed"
        return Stack(
            planes=tuple(planes),
            step_mm=normal * (thickness_mm or DEFAULT_THICKNESS_MM),
            remarks=() if thickness_mm else (unknown,),
        )
    corners_mm = np.array([plane.corner_mm for plane in planes])
    gaps_mm = np.diff(corners_mm @ normal)
    if gaps_mm.min() < SAME_PLACE_MM:
        raise InputError(_at_the_same_place(path, planes, gaps_mm))
    usual_mm = float(np.median(gaps_mm))
    index = int(np.abs(gaps_mm - usual_mm).argmax())
    worst_mm = abs(gaps_mm[index] - usual_mm)
    if worst_mm > UNEVEN_REFUSED * usual_mm + ROUNDED_MM:
        missing = round(gaps_mm[index] / usual_mm) - 1
        reason = f"{missing} slice(s) may be missing" if missing > 0 else "the slices are not evenly spaced"
        raise InputError(
            f"{path}: the distance between {_name(planes[index])} and {_name(planes[index + 1])} is "
            f"{gaps_mm[index]:.4g} mm, elsewhere {usual_mm:.4g} mm; {reason}: export the whole series, or resample it"
        )
    step_mm = (corners_mm[-1] - corners_mm[0]) / (len(planes) - 1)
    on_line_mm = corners_mm[0] + np.arange(len(planes))[:, np.newaxis] * step_mm
    off_mm = float(np.abs(corners_mm - on_line_mm).max())
    if off_mm > min(usual_mm, *planes[0].spacing_mm) / 2 + ROUNDED_MM:
        raise InputError(f"{path}: its slices are up to {off_mm:.3g} mm off a straight line; resample it")
    remarks: tuple[str, ...] = ()
    if worst_mm > UNEVEN_WARNED * usual_mm + ROUNDED_MM:
        remarks = (f"{path}: the distances between slices differ by up to {worst_mm:.3g} mm; their mean is used",)
    return Stack(planes=tuple(planes), step_mm=step_mm, remarks=remarks)


def _same_place(one: Plane, other: Plane) -> bool:
    is_near = np.abs(np.subtract(one.corner_mm, other.corner_mm)).max() < SAME_PLACE_MM
    return bool(is_near) and same_direction(one, other)


def _require_one_direction(path: Path, planes: Sequence[Plane]) -> None:
    directions: list[list[Plane]] = []
    for plane in planes:
        group = next((group for group in directions if same_direction(group[0], plane)), None)
        if group is None:
            directions.append([plane])
        else:
            group.append(plane)
    if len(directions) == 1:
        return
    if len({plane.path for plane in planes}) > 1:
        first, second = directions[0][0], directions[1][0]
        raise InputError(f"{path}: {first.path.name} and {second.path.name} lie in different directions; separate them")
    groups = sorted(sorted(plane.frame + 1 for plane in group) for group in directions)
    raise InputError(
        f"{path}: frames {' and frames '.join(map(_listed, groups))} lie in different directions, so they are "
        f"{len(groups)} images; save every frame as a file of its own and give their folder, for example with dcm4che: "
        f"emf2sf --out-dir FOLDER {path.name}"
    )


def _at_the_same_place(path: Path, planes: Sequence[Plane], gaps_mm: ndarray) -> str:
    index = int(gaps_mm.argmin())
    one, other = planes[index], planes[index + 1]
    if one.path != other.path:
        return (
            f"{path}: {_name(one)} and {_name(other)} lie at the same place with different pixels; separate what was "
            "taken at different times or with different settings into folders of their own"
        )
    is_new_place = np.concatenate([[True], gaps_mm >= SAME_PLACE_MM])
    firsts = sorted(plane.frame + 1 for plane, is_new in zip(planes, is_new_place, strict=True) if is_new)
    return (
        f"{path}: frames {one.frame + 1} and {other.frame + 1} lie at the same place with different pixels "
        f"({len(planes)} frames at {len(firsts)} places), so it holds several times or settings; save the frames of "
        "each as files in a folder of their own, for example with dcm4che: "
        f"emf2sf --frame {_listed(firsts)} --out-dir FOLDER {path.name}"
    )


def _listed(frames: Sequence[int]) -> str:
    """Return frame numbers as "1,2,3"; of many only the first and the last."""
    if len(frames) > MAX_NAMED:
        return f"{','.join(map(str, frames[: MAX_NAMED - 2]))},…,{frames[-1]}"
    return ",".join(map(str, frames))


def _name(plane: Plane) -> str:
    return f"{plane.path.name}" + (f" (frame {plane.frame + 1})" if plane.frame else "")
