"""Read ``golden.npz``: the shapes in its headers are compared with the model before any array is made.

Source: NumPy, ``numpy.lib.format`` (NPY format); ``np.savez`` stores its arrays without compression.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError

import numpy as np
from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.errors import ArtefactError

PIXEL_VALUES, LOGITS = "pixel_values", "logits"
HEADER_BYTES = 1 << 10  # more than any header of an array of four axes
DAMAGES = (  # what NumPy and zipfile raise for damaged files
    ValueError,
    KeyError,
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TokenError,
    zipfile.BadZipFile,
)
ARCHIVE_BYTES = 1 << 12  # more than what the archive adds to its two arrays

Shape = tuple[int, ...]


def max_golden_bytes(shapes: Mapping[str, Shape]) -> int:
    """Return how large the file may be for arrays of these shapes."""
    return ARCHIVE_BYTES + sum(_array_bytes(shape) + HEADER_BYTES for shape in shapes.values())


def parse_golden(
    path: Path, content: bytes, shapes: Mapping[str, Shape]
) -> tuple[Float32[ndarray, "1 3 height width"], Float32[ndarray, "1 classes height width"]]:
    """Return the golden input and PyTorch's logits.

    Args:
        path: of the file, for messages.
        content: of the file.
        shapes: of both arrays, by name.

    Raises:
        ArtefactError: the file holds other arrays, or values that are not finite.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            pixel_values, logits = (_read(archive, name, shapes[name]) for name in (PIXEL_VALUES, LOGITS))
    except DAMAGES as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{path} holds no golden input and logits of the model: {reason}") from error
    return pixel_values, logits


def _read(archive: zipfile.ZipFile, name: str, shape: Shape) -> ndarray:
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    if entry.file_size > _array_bytes(shape) + HEADER_BYTES:
        raise ValueError(f"{name} has {entry.file_size} bytes, more than {shape} of float32")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} has version {version} of the format")
        stored, is_fortran, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=HEADER_BYTES)
        if (stored, is_fortran, dtype) != (shape, False, np.dtype(np.float32)):
            raise ValueError(f"{name} is {dtype} {stored}, not float32 {shape}")
        array = np.frombuffer(file.read(_array_bytes(shape)), np.float32).reshape(shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite")
    return array


def _array_bytes(shape: Shape) -> int:
    return 4 * int(np.prod(shape, dtype=object))
