"""Read 2-D images (PNG, JPEG and BMP) with Pillow, and read and write PNG masks.

Grey and colours keep their 8 or 16 bits; palettes and CMYK become RGB, one bit becomes 0 and 255, and transparency is
dropped, not blended. A photograph is rotated upright by its EXIF orientation for the network. Its mask is stored in the
photograph's stored orientation, so that pixel i of the mask file belongs to pixel i of the image file.
"""

import importlib
import mmap
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, MedsegError
from medseg_trt.files import atomic_file
from medseg_trt.imaging.formats.limits import check_size, convert_decoder_errors, require_finite
from medseg_trt.imaging.images import Image, Mask
from medseg_trt.imaging.signatures import require_kind
from medseg_trt.progress import LOG

PLUGINS = {  # format -> Pillow's class. They are opened directly, because ``PIL.Image.open`` applies
    # ``MAX_IMAGE_PIXELS``, a limit of the whole process that is lower than ours and that others may rely on.
    "PNG": ("PIL.PngImagePlugin", "PngImageFile"),
    "JPEG": ("PIL.JpegImagePlugin", "JpegImageFile"),
    "BMP": ("PIL.BmpImagePlugin", "BmpImageFile"),
    "TIFF": ("PIL.TiffImagePlugin", "TiffImageFile"),
}
END_MARKS = {"PNG": b"IEND\xae\x42\x60\x82", "JPEG": b"\xff\xd9"}  # a file without its mark is cut short
SUFFIXES = (".png", ".jpg", ".bmp")
LOSSY = "JPEG"
CHECKED_AS = {"Gray": "GRAY", "YCbCr": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "YCCK": "CMYK"}  # JPEG's colour spaces
HARMLESS = "extraneous bytes before marker"  # a warning of libjpeg; all pixels before them are whole
MODES = {  # Pillow's mode -> mode to convert to; None keeps the values
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
TRANSPOSED = (5, 6, 7, 8)  # orientations that swap rows and columns
UNDONE_BY = {6: 8, 8: 6}  # orientation -> its inverse; all others are their own inverse


def read(path: Path) -> Image:
    """Read a 2-D image; of an animation the first frame, with a warning.

    Raises:
        InputError: it is damaged, too large, or of a mode that is not supported.
    """
    values, exif = _decode(path, indices=False)
    pixels = upright(values[np.newaxis], exif)
    return Image(path=path, pixels=pixels.reshape(*pixels.shape[:3], -1), exif=exif)


def read_labels(path: Path, like: Image) -> ndarray:
    """Read the mask of a 2-D image, rotated as the image.

    Raises:
        InputError: it is damaged, in colour, stored with loss, or of another size.
    """
    if require_kind(path, *SUFFIXES).name == LOSSY:
        raise InputError(f"{path} is a JPEG, whose compression changes label numbers; save the mask as PNG")
    labels, exif = _decode(path, indices=True)
    return labels_like(path, grey(path, labels)[np.newaxis], exif, like)


def write(mask: Mask, path: Path, *, durable: bool = True) -> None:
    """Write a palette PNG with the class colours, in the image's stored orientation.

    Raises:
        MedsegError: the file read back differs from the mask; nothing is written.
    """
    (labels,) = as_stored(mask.labels, mask.exif)
    with atomic_file(path, durable=durable) as temporary:
        as_palette(labels, mask).save(temporary, format="PNG")
        written, _ = _decode(temporary, indices=True)
        if not np.array_equal(written, labels):
            raise MedsegError(f"the mask of {mask.path} differs when read back; nothing was written")


def as_palette(labels: ndarray, mask: Mask) -> Any:
    """Return labels (height, width) as Pillow's palette image with the class colours."""
    import PIL.Image

    image = PIL.Image.fromarray(np.ascontiguousarray(labels))
    image.putpalette([value for color in mask.classes.colors for value in color])
    return image


@contextmanager
def open_image(path: Path, kind: str, content: bytes | None = None) -> Generator[Any, None, None]:
    """Yield Pillow's image, of which only the header has been read and the size checked.

    Args:
        path: the file.
        kind: a key of ``PLUGINS``.
        content: a part of the file that is an image of this kind by itself; None: the whole file.

    Raises:
        InputError: it is of another format, damaged, or too large; also where decoding fails in the block.
    """
    module, plugin = PLUGINS[kind]
    # Given a name, Pillow maps the file into memory, and swaps height and width of a TIFF that is to be rotated.
    with convert_decoder_errors(path, Exception), path.open("rb") if content is None else BytesIO(content) as file:
        if content is None and kind in END_MARKS:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                if mapped.rfind(END_MARKS[kind]) < 0:
                    raise EOFError
        with getattr(importlib.import_module(module), plugin)(file) as image:
            check_size(path, image.size, samples=len(image.getbands()))
            yield image


def upright(values: ndarray, exif: int) -> ndarray:
    """Rotate or flip an array (slices, height, width, …) by EXIF's Orientation.

    Source: CIPA DC-008 (Exif 2.32), tag Orientation.
    """
    rotated = values.swapaxes(1, 2) if exif in TRANSPOSED else values
    if exif in (3, 4, 7, 8):
        rotated = rotated[:, ::-1]
    if exif in (2, 3, 6, 7):
        rotated = rotated[:, :, ::-1]
    return np.ascontiguousarray(rotated)


def as_stored(values: ndarray, exif: int) -> ndarray:
    """Undo ``upright``."""
    return upright(values, UNDONE_BY.get(exif, exif))


def orientation(image: Any) -> int:
    """Return EXIF's Orientation; an invalid value counts as upright, as in viewers."""
    value = image.getexif().get(ORIENTATION, UPRIGHT)
    return value if isinstance(value, int) and UPRIGHT <= value <= 8 else UPRIGHT


def grey(path: Path, labels: ndarray) -> ndarray:
    """Return the label numbers of a decoded mask, whose colour channels must be equal.

    Raises:
        InputError: they differ.
    """
    if labels.ndim == 3:
        colours = labels[..., : 1 if labels.shape[2] == 2 else 3]
        labels = colours[..., 0]
        if (colours != labels[..., np.newaxis]).any():
            raise InputError(f"{path} is a colour image; a mask holds label numbers: save it as grey or palette PNG")
    return labels


def labels_like(path: Path, labels: ndarray, exif: int, like: Image) -> ndarray:
    """Rotate stored labels (slices, height, width) as their image.

    Args:
        path: the mask.
        labels: as they are stored.
        exif: the mask's own orientation; without one, that of its image applies.
        like: the image.

    Raises:
        InputError: the sizes differ.
    """
    if like.geometry is not None:
        raise InputError(f"{path} is a 2-D image, but its image {like.path} is a volume; give a NIfTI mask")
    rotated = upright(labels, exif if exif != UPRIGHT else like.exif)
    if rotated.shape != like.pixels.shape[:3]:
        (count, height, width), (image_count, image_height, image_width) = rotated.shape, like.pixels.shape[:3]
        pages = f", {count} page(s)" if (count, image_count) != (1, 1) else ""
        image_pages = f", {image_count} page(s)" if pages else ""
        note = " once both are rotated upright" if like.exif in TRANSPOSED else ""
        raise InputError(
            f"{path} is {width} x {height} pixels{pages}, but its image is {image_width} x {image_height}{image_pages}"
            f"{note}; export it in the size of its image"
        )
    return rotated


def numbers(image: Any, indices: bool) -> ndarray:
    """Decode Pillow's image to (height, width) or (height, width, channels).

    Args:
        image: of a mode in ``MODES``.
        indices: keep the indices of a palette, and all channels.
    """
    image.load()
    image.info.pop("transparency", None)  # ``convert`` would apply it to the colours
    mode = None if indices else MODES[image.mode]
    values = np.array(image if mode is None else image.convert(mode))
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def require_mode(path: Path, mode: str, modes: Sequence[str] = tuple(MODES)) -> None:
    """Refuse an unsupported mode of Pillow's.

    Raises:
        InputError: the mode is not among ``modes``.
    """
    if mode not in modes:
        raise InputError(f"{path} has Pillow's mode {mode}, which is not supported; save it as grey or RGB")


def _decode(path: Path, indices: bool) -> tuple[ndarray, int]:
    """Return the stored values of a 2-D image, and its orientation."""
    kind = require_kind(path, *SUFFIXES).name
    if kind == "PNG":
        with open_image(path, kind) as image:
            if (frames := getattr(image, "n_frames", 1)) > 1:
                LOG.warning("%s is an animation of %d frames; only the first is used", path, frames)
            image.verify()  # all checksums; decoding stops before the last
    with open_image(path, kind) as image:
        require_mode(path, image.mode)
        if kind == "JPEG":
            _require_whole_jpeg(path)
        stored_as = str(image.tile[0].args) if image.tile else ""
        exif = orientation(image)
        if kind == "PNG" and stored_as in DEEP_MODES:
            values = _deep_numbers(path, stored_as)
        else:
            values = numbers(image, indices)
        require_finite(path, values)
    return values, exif


def _require_whole_jpeg(path: Path) -> None:
    """Refuse a JPEG whose pixels are damaged: Pillow fills what is missing with grey, and says nothing.

    Raises:
        InputError: libjpeg warns of its data.
    """
    import simplejpeg  # pyright: ignore[reportMissingTypeStubs]

    content = path.read_bytes()
    try:
        space = simplejpeg.decode_jpeg_header(content)[2]
        simplejpeg.decode_jpeg(content, CHECKED_AS[space], strict=True)
    except ValueError as error:
        if HARMLESS not in str(error):
            raise InputError(f"{path} is damaged ({error}); copy it again") from error


def _deep_numbers(path: Path, stored_as: str) -> ndarray:
    """Decode a PNG of 16 bits a channel, of which Pillow keeps 8 at a time; transparency is dropped."""
    mode, *raw_modes = DEEP_MODES[stored_as]
    halves: list[ndarray] = []
    for raw_mode in raw_modes:
        with open_image(path, "PNG") as image:
            require_mode(path, image.mode, [mode])
            image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
            image.info.pop("transparency", None)
            image.load()
            halves.append(np.array(image).astype(np.uint16))
    upper, lower = halves
    if stored_as == "LA;16B":
        return upper[..., 0] << 8 | lower[..., 1]
    return (upper << 8 | lower)[..., :3]
