"""Read TIFF files (one 2-D image or a stack of slices), and write the masks of stacks.

tifffile finds the slices, see ``tiff_layout``. Pillow decodes the pages whose values it keeps (8-bit, and grey of
16 bits, 32 bits or floats); tifffile decodes the rest: 16-bit colours, other floats, unsigned 32 bits, and directories
that hold several slices. Both support BigTIFF, tiles and the usual compressions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, MedsegError, require
from medseg_trt.files import atomic_file
from medseg_trt.imaging.formats.images_2d import (
    as_palette,
    as_stored,
    grey,
    labels_like,
    numbers,
    open_image,
    orientation,
    require_mode,
    upright,
)
from medseg_trt.imaging.formats.limits import convert_decoder_errors, require_finite
from medseg_trt.imaging.formats.segment_bytes import DEFLATED, OTHER_PACKED, require_segments_fit
from medseg_trt.imaging.formats.tiff_directories import count_directories
from medseg_trt.imaging.formats.tiff_layout import Layout, find_layout
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.signatures import require_kind

BITS, PHOTOMETRIC, SAMPLE_FORMAT, ORIENTATION = 258, 262, 339, 274  # tags
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # photometric interpretations
KEPT_WHOLE = {  # Pillow's mode, bits and sample format of pages whose values Pillow keeps
    ("I;16", 12, UNSIGNED),
    ("I;16", 16, UNSIGNED),
    ("I;16B", 16, UNSIGNED),
    ("I", 16, SIGNED),
    ("I", 32, SIGNED),
    ("F", 32, FLOAT),
}
COLOURS = 3
UNSPECIFIED, ALPHA = 0, (1, 2)  # ExtraSamples of unknown meaning; those that are transparency, associated or not


def read(path: Path) -> Image:
    """Read a 2-D image or a stack of slices; of a pyramid or an image with a thumbnail, the page of full resolution.

    Raises:
        InputError: it is damaged or too large, holds several images or channels, or neither Pillow nor tifffile can
            decode it.
        MissingExtraError: tifffile is not installed.
    """
    pages, exif = _decode(path, indices=False)
    return Image(path=path, pixels=pages.reshape(*pages.shape[:3], -1), exif=exif)


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the mask of a 2-D image or a stack, rotated as its image.

    Raises:
        InputError: it is damaged, in colour, or of another size.
    """
    pages, exif = _decode(path, indices=True)
    stored = as_stored(np.stack([grey(path, page) for page in pages]), exif)
    return labels_like(path, stored, exif, like)


def write(mask: Mask, path: Path, *, durable: bool = True) -> None:
    """Write a TIFF of one page per slice with the class colours, in the stack's stored orientation.

    Raises:
        MedsegError: the file read back differs from the mask; nothing is written.
    """
    stored = as_stored(mask.labels, mask.exif)
    first, *others = (as_palette(labels, mask) for labels in stored)
    with atomic_file(path, durable=durable) as temporary:
        first.save(temporary, format="TIFF", save_all=True, append_images=others, compression="tiff_adobe_deflate")
        written, _ = _decode(temporary, indices=True)
        if not np.array_equal(written, stored):
            raise MedsegError(f"the mask of {mask.path} differs when read back; nothing was written")


def _decode(path: Path, indices: bool) -> tuple[ndarray, int]:
    """Return the pages (pages, height, width, …), upright, and how they are stored."""
    tifffile = require("tifffile", "medical")
    require_kind(path, ".tif")
    directories = count_directories(path)  # its errors on truncated files are clearer than tifffile's
    with convert_decoder_errors(path, Exception), tifffile.TiffFile(path, _multifile=False) as file:
        layout = find_layout(path, file, directories)
        _require_alike(path, layout)
        require_colours(path, layout.pages[0])
        for page in layout.pages:
            require_segments_fit(path, file, page, DEFLATED)
        decoded = _with_pillow(path, layout, indices) if layout.one_page_each else None
        stacked, exif = _with_tifffile(path, file, layout) if decoded is None else decoded
    require_finite(path, stacked)
    return stacked, exif


def _require_alike(path: Path, layout: Layout) -> None:
    """Refuse pages with another orientation or other channels than the first page.

    Raises:
        InputError: one is.
    """
    first = _how_stored(layout.pages[0])
    for page in layout.pages:
        if _how_stored(page) != first:
            raise InputError(
                f"{path}: page {page.index + 1} has another orientation or other channels than page 1; equal pages "
                "become slices: save each as a file"
            )


def _how_stored(page: Any) -> tuple[object, ...]:
    key = page.keyframe  # has the tags of a page that tifffile reads without its own
    colours = BLACK_IS_ZERO if key.photometric == WHITE_IS_ZERO else key.photometric  # each page is inverted by itself
    return key.tags.valueof(ORIENTATION, 1), colours, key.extrasamples


def require_colours(path: Path, page: Any) -> None:
    """Refuse samples that are neither colours nor transparency, which the decoders would drop.

    Raises:
        InputError: there are some.
    """
    extra = tuple(page.extrasamples)
    if not extra and page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        extra = (UNSPECIFIED,) * (page.samplesperpixel - 1)
    is_alpha = len(extra) == 1 and (extra[0] in ALPHA or page.photometric == RGB)  # writers do not always mark it
    if extra and not is_alpha:
        raise InputError(f"{path} has {page.samplesperpixel} channels; grey and RGB are supported: save one of them")


def _with_pillow(path: Path, layout: Layout, indices: bool) -> tuple[ndarray, int] | None:
    """Return None where Pillow does not open the file, would not keep the numbers whole, or finds it too large."""
    import PIL.Image

    try:
        with open_image(path, "TIFF") as image:
            image.seek(layout.pages[0].index)
            exif = orientation(image)
            limit = PIL.Image.MAX_IMAGE_PIXELS  # of the process; Pillow raises at twice this number
            if not is_kept_whole(image) or (limit is not None and image.width * image.height > 2 * limit):
                return None
            require_mode(path, image.mode)
            first, stacked = _page(image), None
            for slice_index, page in enumerate(layout.pages):
                image.seek(page.index)
                if _page(image) != first:
                    raise InputError(
                        f"{path}: page {page.index + 1} is not like page 1; equal pages become slices: save each as a "
                        "file"
                    )
                values = page_values(image, indices)
                if stacked is None:
                    stacked = np.empty((layout.num_slices, *values.shape), values.dtype)
                stacked[slice_index] = values
    except InputError as error:
        if not is_unknown_mode(error):
            raise
        return None
    return None if stacked is None else (stacked, exif)


def is_unknown_mode(error: InputError) -> bool:
    """Return whether Pillow has no mode for the values, which tifffile may decode."""
    return isinstance(error.__cause__, SyntaxError)


def page_values(image: Any, indices: bool) -> ndarray:
    """Decode a page of Pillow's image; of grey values the largest is white, unless they are ``indices``."""
    inverted = image.mode in ("I;16", "I;16B") and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    bits = _bits(image)[0]
    values = numbers(image, indices)
    return (2**bits - 1 - values).astype(values.dtype) if inverted and not indices else values


def is_kept_whole(image: Any) -> bool:
    """Return whether Pillow keeps the values of its TIFF image as they are stored."""
    bits, formats = _bits(image), _formats(image)
    if max(bits) <= 8:
        return set(formats) <= {UNSIGNED}
    is_swapped_twice = (  # by libtiff, and by Pillow once more
        image.mode in ("I", "F") and image.tag_v2.prefix == b"MM" and image.info.get("compression") != "raw"
    )
    return len(bits) == 1 and (image.mode, bits[0], formats[0]) in KEPT_WHOLE and not is_swapped_twice


def _bits(image: Any) -> Sequence[int]:
    return np.atleast_1d(image.tag_v2.get(BITS, 1)).tolist()


def _formats(image: Any) -> Sequence[int]:
    return np.atleast_1d(image.tag_v2.get(SAMPLE_FORMAT, UNSIGNED)).tolist()


def _page(image: Any) -> tuple[object, ...]:
    return (image.size, image.mode, _bits(image), image.tag_v2.get(ORIENTATION, 1))


def _with_tifffile(path: Path, file: Any, layout: Layout) -> tuple[ndarray, int]:
    first = layout.pages[0]
    exif = first.tags.valueof(ORIENTATION, 1)
    exif = exif if exif in range(1, 9) else 1
    if first.dtype is None or first.dtype.kind not in "iufb":
        raise InputError(f"{path} holds {first.dtype} values; integers and floats are supported")
    if first.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        raise InputError(
            f"{path} has the colours {first.photometric.name}, which are not supported; save it as grey or RGB"
        )
    for page in layout.pages:
        require_segments_fit(path, file, page, OTHER_PACKED)
    if layout.one_page_each:
        pages = [(page.keyframe, page.asarray(maxworkers=1), page.axes) for page in layout.pages]
    else:
        pages = [(first, layout.series.asarray(maxworkers=1).reshape(layout.shape), layout.axes)]
    values = [as_numbers(path, page, *slices_first(stored, axes)) for page, stored, axes in pages]
    return upright(np.concatenate(values), exif), exif


def slices_first(values: ndarray, axes: str) -> tuple[ndarray, bool]:
    """Return values (slices, height, width, samples) or without samples, and whether there are samples."""
    stack = [axis for axis in axes if axis not in "YXS"]
    order = [*stack, *(axis for axis in "YXS" if axis in axes)]
    ordered = values.transpose([axes.index(axis) for axis in order])
    return (ordered if stack else ordered[np.newaxis]), "S" in axes


def as_numbers(path: Path, page: Any, values: ndarray, has_samples: bool) -> ndarray:
    """Drop transparency, make white the largest value, and return native byte order; floats become float32.

    Raises:
        InputError: there are more channels than colours and transparency.
    """
    if has_samples:
        colours = COLOURS if page.photometric == RGB else 1
        if values.shape[3] > colours + 1:
            raise InputError(f"{path} has {values.shape[3]} channels; grey and RGB are supported: save one of them")
        values = values[..., :COLOURS] if colours == COLOURS else values[..., 0]
    if page.photometric == WHITE_IS_ZERO and values.dtype.kind == "u":
        values = np.iinfo(values.dtype).max - values
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("=") if values.dtype.kind != "b" else np.uint8)
