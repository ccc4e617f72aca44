"""Pictures: PNG, JPEG and BMP, as Pillow decodes them, and PNG masks.

Grey and colours keep their 8 or 16 bits; a palette and CMYK become RGB, one bit becomes 0 and 255, and transparency is
dropped, not blended. A photograph that says by EXIF that it lies on its side is turned upright for the network; its
mask is stored as the photograph is stored, so that pixel i of the file belongs to pixel i of the mask.
"""

import importlib
import mmap
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, MedsegError
from medseg_trt.files import atomic_file
from medseg_trt.imaging.formats.limits import check_size, convert_decoder_errors, require_finite
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.signatures import require_kind

PLUGINS = {  # Pillow's classes by the kind of file. They are opened directly, because ``PIL.Image.open`` applies
    # ``MAX_IMAGE_PIXELS``, a limit of the whole process that is lower than ours and that others may rely on.
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
}
END_MARKS = {"PNG": b"IEND\xae\x42\x60\x82", "JPEG": b"\xff\xd9"}  # a file without its mark is cut short
SUFFIXES = (".png", ".jpg", ".bmp")
LOSSY = "JPEG"
MODES = {  # Pillow's mode -> the one it is turned to; None keeps its numbers
    "1": "L",
    "L": None,
    "LA": "L",
    "P": "RGB",
    "PA": "RGB",
    "RGB": None,
    "RGBA": "RGB",
    "RGBX": "RGB",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "LAB": "RGB",
    "I;16": None,
    "I;16B": None,
    "I;16L": None,
    "I": None,
    "F": None,
}
DEEP_MODES = {  # how a PNG of 16 bits a channel is stored -> mode and raw modes that give its upper and lower bytes
    "RGB;16B": ("RGB", "RGB;16B", "RGB;16L"),
    "RGBA;16B": ("RGBA", "RGBA;16B", "RGBA;16L"),
    "LA;16B": ("RGBA", "RGBA", "RGBA"),  # the four bytes of a pixel, as they are
}
ORIENTATION = 0x0112
UPRIGHT = 1
BESIDE = (5, 6, 7, 8)  # orientations whose rows are columns
UNDONE_BY = {6: 8, 8: 6}  # all others undo themselves


def read(path: Path) -> Image:
    """Read a picture; of a file with several, the first one.

    Raises:
        InputError: it is damaged, too large, or of a kind that Pillow does not know.
    """
    values, exif = _decode(path, indices=False)
    pixels = upright(values[np.newaxis], exif)
    return Image(path=path, pixels=pixels.reshape(*pixels.shape[:3], -1), exif=exif)


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the mask of a picture, turned as the picture is.

    Raises:
        InputError: it is damaged, in colour, stored with loss, or of another size.
    """
    if require_kind(path, *SUFFIXES).name == LOSSY:
        raise InputError(f"{path} is a JPEG, whose numbers are not exact; save the mask as PNG")
    labels, exif = _decode(path, indices=True)
    return labels_like(path, grey(path, labels)[np.newaxis], exif, like)


def write(mask: Mask, path: Path) -> None:
    """Write a palette PNG with the class colours, stored as the picture is stored.

    Raises:
        MedsegError: what was written is not what was meant, so nothing is there.
    """
    (labels,) = as_stored(mask.labels, mask.exif)
    with atomic_file(path) as temporary:
        as_palette(labels, mask).save(temporary, format="PNG")
        written, _ = _decode(temporary, indices=True)
        if not np.array_equal(written, labels):
            raise MedsegError(f"the mask of {mask.path} did not come out as it was meant; nothing was written")


def as_palette(labels: ndarray, mask: Mask) -> Any:
    """Return Pillow's picture of labels (height, width) with the class colours."""
    import PIL.Image

    picture = PIL.Image.fromarray(np.ascontiguousarray(labels))
    picture.putpalette([value for color in mask.classes.colors for value in color])
    return picture


@contextmanager
def opened(path: Path, kind: str) -> Generator[Any, None, None]:
    """Yield Pillow's picture, of which only the header was read and found of a possible size.

    Args:
        path: the file.
        kind: a key of ``PLUGINS``.

    Raises:
        InputError: it is of another kind, damaged, or too large; also while it is decoded in the block.
    """
    module, plugin = PLUGINS[kind]
    # By a name, Pillow maps the file, and maps a TIFF that lies on its side with height and width the wrong way round.
    with convert_decoder_errors(path, Exception), path.open("rb") as file:
        if kind in END_MARKS:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                if content.rfind(END_MARKS[kind]) < 0:
                    raise EOFError
        with getattr(importlib.import_module(module), plugin)(file) as picture:
            check_size(path, picture.size, samples=len(picture.getbands()))
            yield picture


def upright(values: ndarray, exif: int) -> ndarray:
    """Turn an array (slices, height, width, …) the way EXIF's Orientation asks for.

    Source: CIPA DC-008 (Exif 2.32), tag Orientation.
    """
    turned = values.swapaxes(1, 2) if exif in BESIDE else values
    if exif in (3, 4, 7, 8):
        turned = turned[:, ::-1]
    if exif in (2, 3, 6, 7):
        turned = turned[:, :, ::-1]
    return np.ascontiguousarray(turned)


def as_stored(values: ndarray, exif: int) -> ndarray:
    """Undo ``upright``."""
    return upright(values, UNDONE_BY.get(exif, exif))


def orientation(picture: Any) -> int:
    """Return EXIF's Orientation; what cannot be counts as upright, as in every viewer."""
    value = picture.getexif().get(ORIENTATION, UPRIGHT)
    return value if isinstance(value, int) and UPRIGHT <= value <= 8 else UPRIGHT


def grey(path: Path, labels: ndarray) -> ndarray:
    """Return the label numbers of a decoded mask, whose colour channels must be alike.

    Raises:
        InputError: they are not.
    """
    if labels.ndim == 3:
        colours = labels[..., : 1 if labels.shape[2] == 2 else 3]
        labels = colours[..., 0]
        if (colours != labels[..., np.newaxis]).any():
            raise InputError(f"{path} is a colour picture; a mask holds label numbers: save it as grey or palette PNG")
    return labels


def labels_like(path: Path, labels: ndarray, exif: int, like: Image) -> ndarray:
    """Return labels (slices, height, width), stored as the picture is stored, turned as the picture is.

    Args:
        path: the mask.
        labels: as they are stored.
        exif: the mask's own orientation; where it has none, it is turned as its picture is.
        like: the picture.

    Raises:
        InputError: the sizes differ.
    """
    if like.geometry is not None:
        raise InputError(f"{path} is a picture, but its image {like.path} is a volume; give a NIfTI mask")
    turned = upright(labels, exif if exif != UPRIGHT else like.exif)
    if turned.shape != like.pixels.shape[:3]:
        (count, height, width), (image_count, image_height, image_width) = turned.shape, like.pixels.shape[:3]
        pages = f", {count} page(s)" if (count, image_count) != (1, 1) else ""
        image_pages = f", {image_count} page(s)" if pages else ""
        on_its_side = " once both are turned upright" if like.exif in BESIDE else ""
        raise InputError(
            f"{path} is {width} x {height} pixels{pages}, but its image is {image_width} x {image_height}{image_pages}"
            f"{on_its_side}"
        )
    return turned


def numbers(picture: Any, indices: bool) -> ndarray:
    """Decode Pillow's picture: (height, width) or (height, width, channels).

    Args:
        picture: of a mode in ``MODES``.
        indices: keep the indices of a palette, and all channels.
    """
    picture.load()
    picture.info.pop("transparency", None)  # it would be blended or spread over the colours
    mode = None if indices else MODES[picture.mode]
    values = np.array(picture if mode is None else picture.convert(mode))
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def require_mode(path: Path, mode: str, modes: Sequence[str] = tuple(MODES)) -> None:
    """Refuse a mode of Pillow's that is not known here.

    Raises:
        InputError: it is not known.
    """
    if mode not in modes:
        raise InputError(f"{path} is of Pillow's mode {mode}, which cannot be read here; save it as grey or RGB")


def _decode(path: Path, indices: bool) -> tuple[ndarray, int]:
    """Return the numbers of a picture as it is stored, and its orientation."""
    kind = require_kind(path, *SUFFIXES).name
    if kind == "PNG":
        with opened(path, kind) as picture:
            picture.verify()  # the checksums, up to the last; decoding stops before it
    with opened(path, kind) as picture:
        require_mode(path, picture.mode)
        stored_as = str(picture.tile[0].args) if picture.tile else ""
        exif = orientation(picture)
        if kind == "PNG" and stored_as in DEEP_MODES:
            values = _deep_numbers(path, stored_as)
        else:
            values = numbers(picture, indices)
        require_finite(path, values)
    return values, exif


def _deep_numbers(path: Path, stored_as: str) -> ndarray:
    """Decode a PNG of 16 bits a channel, of which Pillow keeps 8 at a time; transparency is dropped."""
    mode, *raw_modes = DEEP_MODES[stored_as]
    halves: list[ndarray] = []
    for raw_mode in raw_modes:
        with opened(path, "PNG") as picture:
            require_mode(path, picture.mode, [mode])
            picture.tile = [tile._replace(args=raw_mode) for tile in picture.tile]
            picture.info.pop("transparency", None)
            picture.load()
            halves.append(np.array(picture).astype(np.uint16))
    upper, lower = halves
    if stored_as == "LA;16B":
        return upper[..., 0] << 8 | lower[..., 1]
    return (upper << 8 | lower)[..., :3]
