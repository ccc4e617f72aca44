"""TIFF files: one picture, or a stack of equal pages that become slices; and the masks of stacks.

Pillow decodes what it keeps whole (8-bit, and grey of 16 bits, 32 bits or floats); tifffile the rest: 16-bit colours,
floats of other widths, unsigned 32 bits. BigTIFF, tiles, and the usual compressions are theirs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, MedsegError, require
from medseg_trt.files import atomic_file
from medseg_trt.formats.guard import MAX_PAGES, check_size, naming, require_finite
from medseg_trt.formats.pictures import (
    as_palette,
    as_stored,
    grey,
    labels_like,
    numbers,
    opened,
    orientation,
    require_mode,
    upright,
)
from medseg_trt.images import Image, Mask

BITS, PHOTOMETRIC, SAMPLE_FORMAT, ORIENTATION = 258, 262, 339, 274  # tags
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # kinds of pages that tifffile is asked for
KEPT_WHOLE = {  # Pillow's mode, bits and sample format of pages that Pillow neither cuts nor takes for something else
    ("I;16", 12, UNSIGNED), ("I;16", 16, UNSIGNED), ("I;16B", 16, UNSIGNED), ("I", 16, SIGNED), ("I", 32, SIGNED),
    ("F", 32, FLOAT),
}  # fmt: skip
COLOURS = 3


def read(path: Path) -> Image:
    """Read a picture, or a stack of equal pages.

    Raises:
        InputError: it is damaged or too large, its pages differ, or neither Pillow nor tifffile can decode it.
        MissingExtraError: tifffile is needed and not installed.
    """
    pages, exif = _decode(path, indices=False)
    return Image(path=path, pixels=pages.reshape(*pages.shape[:3], -1), exif=exif)


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the mask of a picture or a stack, turned as it is.

    Raises:
        InputError: it is damaged, in colour, or of another size.
    """
    pages, exif = _decode(path, indices=True)
    stored = as_stored(np.stack([grey(path, page) for page in pages]), exif)
    return labels_like(path, stored, exif, like)


def write(mask: Mask, path: Path) -> None:
    """Write a TIFF whose pages are the slices, with the class colours, stored as the stack is stored.

    Raises:
        MedsegError: what was written is not what was meant, so nothing is there.
    """
    stored = as_stored(mask.labels, mask.exif)
    first, *others = (as_palette(labels, mask) for labels in stored)
    with atomic_file(path) as temporary:
        first.save(temporary, format="TIFF", save_all=True, append_images=others, compression="tiff_adobe_deflate")
        written, _ = _decode(temporary, indices=True)
        if not np.array_equal(written, stored):
            raise MedsegError(f"the mask of {mask.path} did not come out as it was meant; nothing was written")


def _decode(path: Path, indices: bool) -> tuple[ndarray, int]:
    """Return the pages (pages, height, width, …), upright, and how they are stored."""
    import PIL

    try:
        decoded = _with_pillow(path, indices)
    except InputError as error:
        if not isinstance(error.__cause__, PIL.UnidentifiedImageError):
            raise
        decoded = None
    return _with_tifffile(path) if decoded is None else decoded


def _with_pillow(path: Path, indices: bool) -> tuple[ndarray, int] | None:
    """Return None where Pillow would not keep the numbers whole."""
    with opened(path, "TIFF") as picture:
        exif = orientation(picture)
        if not _is_kept_whole(picture):
            return None
        count = _count_pages(path, picture)
        check_size(path, (count, *picture.size))
        pages: list[ndarray] = []
        for index in range(count):
            picture.seek(index)
            inverted = picture.mode in ("I;16", "I;16B") and picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
            bits = _bits(picture)[0]
            values = numbers(picture, indices)
            pages.append((2**bits - 1 - values).astype(values.dtype) if inverted and not indices else values)
        stacked = np.stack(pages)
        require_finite(path, stacked)
    return stacked, exif


def _is_kept_whole(picture: Any) -> bool:
    bits, formats = _bits(picture), _formats(picture)
    if max(bits) <= 8:
        return set(formats) <= {UNSIGNED}
    return len(bits) == 1 and (picture.mode, bits[0], formats[0]) in KEPT_WHOLE


def _bits(picture: Any) -> Sequence[int]:
    return np.atleast_1d(picture.tag_v2.get(BITS, 1)).tolist()


def _formats(picture: Any) -> Sequence[int]:
    return np.atleast_1d(picture.tag_v2.get(SAMPLE_FORMAT, UNSIGNED)).tolist()


def _count_pages(path: Path, picture: Any) -> int:
    """Count the pages, which must be alike, and return to the first one."""
    require_mode(path, picture.mode)
    first = _page(picture)
    count = 1
    for count in range(1, MAX_PAGES + 1):
        try:
            picture.seek(count)
        except EOFError:
            break
        _require_alike(path, count, first, _page(picture))
    else:
        raise InputError(f"{path} has more than {MAX_PAGES} pages")
    picture.seek(0)
    return count


def _page(picture: Any) -> tuple[object, ...]:
    return (picture.size, picture.mode, _bits(picture), picture.tag_v2.get(ORIENTATION, 1))


def _require_alike(path: Path, index: int, first: object, other: object) -> None:
    if first != other:
        raise InputError(f"{path}: page {index + 1} is not like page 1; equal pages become slices: save each as a file")


def _with_tifffile(path: Path) -> tuple[ndarray, int]:
    tifffile = require("tifffile", "medical")
    with naming(path, Exception), tifffile.TiffFile(path) as file:
        first = file.pages[0]
        exif = first.tags.valueof(ORIENTATION, 1)
        exif = exif if exif in range(1, 9) else 1
        if len(first.shape) not in (2, 3) or first.axes not in ("YX", "YXS", "SYX"):
            raise InputError(f"{path} has the axes {first.axes}; a page is a grey or RGB picture")
        if first.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
            raise InputError(
                f"{path} is of the kind {first.photometric.name}, with deep numbers; save it as grey or RGB"
            )
        pages = list(_pages(path, file, first))
        check_size(path, (len(pages), *first.shape))
        check_size(path, first.chunks)
        stacked = np.stack([_values(path, page) for page in pages])
    require_finite(path, stacked)
    return upright(stacked, exif), exif


def _pages(path: Path, file: Any, first: Any) -> Iterator[Any]:
    for index, page in enumerate(file.pages):
        if index >= MAX_PAGES:
            raise InputError(f"{path} has more than {MAX_PAGES} pages")
        _require_alike(path, index, (first.shape, first.dtype), (page.shape, page.dtype))
        yield page


def _values(path: Path, page: Any) -> ndarray:
    if page.dtype is None or page.dtype.kind not in "iufb":
        raise InputError(f"{path} holds {page.dtype} numbers; integers and floats are possible")
    values = page.asarray()
    if page.axes == "SYX":
        values = values.transpose(1, 2, 0)
    if values.ndim == 3:
        values = values[..., :COLOURS] if values.shape[2] >= COLOURS else values[..., 0]
    if page.photometric == WHITE_IS_ZERO and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("=") if values.dtype.kind != "b" else np.uint8)
