"""Find the directories and arrays of a TIFF file that are the slices of one image.

tifffile's series decide: they interpret ImageJ's, OME's and tifffile's own descriptions, in which one directory may
hold many slices, and volumetric directories. A file that does not form one stack is refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from medseg_trt.errors import InputError
from medseg_trt.imaging.formats.limits import MAX_PIXELS, MAX_SLICES, check_size
from medseg_trt.progress import LOG

SLICE_AXES = "ZIQT"  # tifffile's codes: depth, a sequence, unknown, time; each page is segmented for itself
REDUCED, MASK = 1, 4  # bits of NewSubfileType: a smaller version of another page; a page's transparency mask
DESCRIBED = ("shaped", "ome", "imagej")  # descriptions that name the axes, in the order in which tifffile tries them
IMAGEJ_CHANNELS = 7  # at most, in ImageJ; tifffile names the slices of an ImageJ stack so if it is not told the axes
MAX_TILE_PIXELS = 2**22  # a tile may be larger than a small image is: 2048 x 2048
OME_COUNT = re.compile(r"\b(?:Size[ZCT]|PlaneCount|NumPlanes|First[ZCT]|IFD)\s*=\s*[\"'](\d+)[\"']")
OME_MODULO = "ModuloAlong"  # axes within axes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Layout:
    """The pages or the series that hold the slices of the image."""

    pages: tuple[Any, ...]  # tifffile's: one per slice, or a single one that holds all slices
    series: Any  # tifffile's, which decodes them where one page holds several slices
    axes: str  # of the series, without axes of one: of Y, X, S and one of SLICE_AXES
    shape: tuple[int, ...]
    num_slices: int

    @property
    def one_page_each(self) -> bool:
        """Whether every slice has a directory of its own."""
        return len(self.pages) == self.num_slices and set(self.pages[0].axes) <= set("YXS")


def find_layout(path: Path, file: Any, directories: int) -> Layout:
    """Return where the slices of a TIFF file are.

    Pages that are marked as reduced in resolution (thumbnails, the levels of a pyramid) or as transparency masks are
    no slices; the page of full resolution is read.

    Args:
        path: the file.
        file: tifffile's.
        directories: how many the file has, see ``tiff_directories``.

    Raises:
        InputError: the file holds several images, channels or series in time and depth, or less than it says.
    """
    if len(file.pages) != directories:
        raise InputError(f"{path} has {directories} pages, of which {len(file.pages)} can be read; save it again")
    require_description(path, file)
    kept = [series for series in file.series if not series.keyframe.subfiletype & (REDUCED | MASK)]
    if not kept:
        raise InputError(f"{path} holds no image of full resolution; save it again as a plain TIFF")
    described = next((kind for kind in DESCRIBED if getattr(file, f"is_{kind}")), None)
    if described is not None and any(series.kind != described for series in kept):
        raise InputError(f"{path} does not hold what its {described} description says; save it again as a plain TIFF")
    pages = tuple(page for series in kept for page in series.pages)
    if any(page is None for page in pages):
        missing = sum(page is None for page in pages)
        raise InputError(f"{path} lacks {missing} of the {len(pages)} pages that its description names; save it again")
    series = kept[0]
    axes, shape = _without_ones(series.axes, series.shape)
    if len(kept) > 1:
        axes, shape = _joined(path, kept, pages)
        pages = tuple(sorted(pages, key=lambda page: page.index))
    stack_axes = [axis for axis in axes if axis not in "YXS"]
    if file.is_imagej and stack_axes == ["C"] and shape[axes.index("C")] > IMAGEJ_CHANNELS:
        LOG.info("%s calls its slices channels, of which ImageJ has at most %d", path, IMAGEJ_CHANNELS)
    elif not {"Y", "X"} <= set(axes) or len(stack_axes) > 1 or not set(stack_axes) <= set(SLICE_AXES):
        sizes = ", ".join(f"{axis} {size}" for axis, size in zip(axes, shape, strict=True))
        raise InputError(
            f"{path} has the axes {sizes}; one stack of grey or RGB slices is supported: save each channel (C) or time "
            "(T) as a file of its own, in ImageJ by Image > Color > Split Channels; Image > Properties names slices"
        )
    num_slices = shape[axes.index(stack_axes[0])] if stack_axes else 1
    metadata: dict[str, Any] = file.imagej_metadata or {}
    promised = metadata.get("images", 1)
    if isinstance(promised, int) and promised > num_slices:
        raise InputError(
            f"{path} names {promised} images in its ImageJ description, but holds {num_slices}; save it again"
        )
    _check_sizes(path, pages[0], num_slices, shape[axes.index("Y")], shape[axes.index("X")])
    layout = Layout(pages=pages, series=series, axes=axes, shape=shape, num_slices=num_slices)
    if not layout.one_page_each and len(pages) > 1:
        raise InputError(f"{path} has {len(pages)} pages for {num_slices} slices; save it again as a plain TIFF")
    _require_complete(path, file, layout)
    return layout


def require_description(path: Path, file: Any) -> None:
    """Refuse an OME description that tifffile would allocate too much for, or whose axes lie within others."""
    description = file.ome_metadata if file.is_ome else None
    if description is not None:
        if any(len(number) > 6 or int(number) > MAX_SLICES for number in OME_COUNT.findall(description)):
            raise InputError(f"{path} says in its OME description that it has more than {MAX_SLICES} planes")
        if OME_MODULO in description:
            raise InputError(f"{path} has axes within axes by its OME description; save each as a file of its own")


def _without_ones(axes: str, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Drop axes of one value, rows and columns apart."""
    kept = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size > 1 or axis in "YX"]
    return "".join(axis for axis, _ in kept), tuple(size for _, size in kept)


def _joined(path: Path, kept: Sequence[Any], pages: Sequence[Any]) -> tuple[str, tuple[int, ...]]:
    """Return axes and shape of pages that differ in how they are stored alone.

    Raises:
        InputError: they differ otherwise, or lie below other pages.
    """
    first = pages[0]
    for page in pages:
        if (page.shape, page.axes, page.dtype) != (first.shape, first.axes, first.dtype):
            index = page.index if isinstance(page.index, int) else page.index[0]
            raise InputError(
                f"{path}: page {index + 1} is not like page 1; equal pages become slices: save each as a file"
            )
    if any(not isinstance(page.index, int) for page in pages) or len(pages) != sum(
        len(series.pages) for series in kept
    ):
        raise InputError(f"{path} holds {len(kept)} images; save each as a file")
    return "I" + first.axes, (len(pages), *first.shape)


def _check_sizes(path: Path, page: Any, num_slices: int, height: int, width: int) -> None:
    if num_slices == 1 and height * width > MAX_PIXELS:
        raise InputError(
            f"{path} has {width} x {height} pixels, and {MAX_PIXELS} are read as a whole: reduce it, or give "
            "--tile auto to infer, which reads it by rows"
        )
    check_size(path, (num_slices, height, width), slices=num_slices, samples=page.samplesperpixel, dtype=page.dtype)
    if prod(page.chunks) > max(num_slices * height * width * page.samplesperpixel, MAX_TILE_PIXELS):
        raise InputError(f"{path} is stored in tiles of {' x '.join(map(str, page.chunks))} pixels; save it again")


def _require_complete(path: Path, file: Any, layout: Layout) -> None:
    """Refuse a file that ends before its pixels do.

    Raises:
        InputError: it does.
    """
    first = layout.series.dataoffset
    if layout.one_page_each or first is None:
        ends = [end for page in layout.pages for end in _ends(page)]
    else:
        ends = [first + layout.series.nbytes]
    if max(ends, default=0) > file.filehandle.size:
        raise InputError(f"{path} is cut short: its pixels end at byte {max(ends)}, the file at {file.filehandle.size}")


def _ends(page: Any) -> list[int]:
    return [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
