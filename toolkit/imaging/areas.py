"""How much of an image every class of its mask covers."""

from collections.abc import Sequence
from dataclasses import dataclass

from medseg_trt.spec import Classes


@dataclass(frozen=True, kw_only=True, slots=True)
class Area:
    """How much of an image one class covers; None where the spacing is unknown or the unit does not apply."""

    name: str
    pixels: int
    mm2: float | None  # for a single slice with a known spacing
    ml: float | None  # millilitres, for a volume with a known spacing


def areas_of(
    counts: Sequence[int], classes: Classes, spacing_mm: tuple[float, float, float] | None, *, is_slice: bool
) -> tuple[Area, ...]:
    """Return the area or volume of every class except the background.

    Args:
        counts: pixels of every class.
        classes: their names.
        spacing_mm: between slices, rows and columns, where known.
        is_slice: there is one slice alone.
    """
    known = spacing_mm is not None
    between_slices, between_rows, between_columns = spacing_mm or (float("nan"),) * 3
    pixel_mm2 = between_rows * between_columns
    return tuple(
        Area(
            name=name,
            pixels=count,
            mm2=count * pixel_mm2 if known and is_slice else None,
            ml=count * pixel_mm2 * between_slices / 1000 if known and not is_slice else None,
        )
        for name, count in list(zip(classes.names, counts, strict=True))[1:]
    )
