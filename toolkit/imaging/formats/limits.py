"""Limits for untrusted files, and one-line errors for files that cannot be read; shared by all readers."""

import logging
import warnings
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy import ndarray
from numpy.typing import DTypeLike

from medseg_trt.errors import InputError, MedsegError

MAX_PIXELS = 2**28  # of one image, all slices together: 16384 x 16384, or 1024 slices of 512 x 512; 1 GiB of float32
MAX_SIDE = 2**16  # pixels; JPEG's longest side, and the tables that resize it to a network's image stay below 50 MB
MAX_SLICES = 4096  # the network runs once per slice; a whole body at 0.5 mm has fewer
WORKING_BYTES_PER_PIXEL = 20  # peak memory of reading an image, with the result, without the libraries
MAX_BYTES = 2**31  # decoded: MAX_PIXELS of 64 bits, or of RGBA with 16 bits
MAX_HEADER_BYTES = 2**20  # of a NIfTI header with its extensions, or an NRRD header
CHUNK_BYTES = 2**22  # read and converted at once
PADDING_BYTES = 2**16  # of zeros after the voxels, as tapes and block devices leave them
MAX_REASON = 200  # characters of a decoder's message
CUT_SHORT = (
    "truncated",
    "end-of-stream",
    "unexpected end",
    "ended before",
)  # in decoders' messages for truncated files
DECODERS = ("imagecodecs",)  # packages that decoders' messages ask for by name

for _library in ("PIL", "tifffile"):  # without a handler, their messages on bad files go to stderr
    logging.getLogger(_library).addHandler(logging.NullHandler())


class _Quiet:
    """Silence warnings. All threads share Python's filters: the first reader sets them, the last one restores them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.__exit__(None, None, None)


_QUIET = _Quiet()


@contextmanager
def convert_decoder_errors(path: Path, *kinds: type[Exception]) -> Generator[None, None, None]:
    """Convert a decoder's exceptions to an ``InputError`` of one line that names the file, and silence its warnings.

    ``MedsegError`` passes unchanged.
    """
    try:
        with _QUIET:  # warnings may contain the patient's name
            yield
    except MedsegError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, *kinds) as error:
        if is_cut_short(error):
            raise InputError(f"{path} is cut short; copy it again from its source") from error
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        is_of_system = isinstance(error, OSError) and error.errno is not None
        default = "" if is_of_system else "; export it again"
        remedy = next((f"; install it: pip install {package}" for package in DECODERS if package in reason), default)
        raise InputError(f"{path} cannot be read: {reason}{remedy}") from error


def is_cut_short(error: Exception) -> bool:
    """Return whether a decoder reports that the file ends too early."""
    return isinstance(error, EOFError) or any(words in str(error).lower() for words in CUT_SHORT)


def check_size(
    path: Path, shape: Sequence[int], *, slices: int = 1, samples: int = 1, dtype: DTypeLike = np.uint8
) -> None:
    """Refuse a file whose header declares too many pixels, before it is decoded. All formats have the same limits.

    Args:
        path: the file.
        shape: pixels along every axis, in any order.
        slices: the number of slices, where known before decoding.
        samples: per pixel.
        dtype: of a sample as it is stored.

    Raises:
        InputError: there are no pixels, or more than ``MAX_PIXELS``, ``MAX_SIDE``, ``MAX_SLICES`` or ``MAX_BYTES``
            allow.
    """
    pixels = prod(shape)
    if (
        not 0 < pixels <= MAX_PIXELS
        or not 0 < min(shape) <= max(shape) <= MAX_SIDE
        or slices > MAX_SLICES
        or pixels * samples * np.dtype(dtype).itemsize > MAX_BYTES
    ):
        stored = f" of {samples} x {np.dtype(dtype).name}" if pixels <= MAX_PIXELS and samples > 1 else ""
        raise InputError(
            f"{path} says it has {' x '.join(map(str, shape))} pixels{stored}; 1 to {MAX_PIXELS} are possible, at most "
            f"{MAX_SIDE} a side, {MAX_SLICES} slices and {MAX_BYTES >> 20} MiB: reduce it, or cut it into parts"
        )


def read_chunks(
    path: Path, file: Any, count: int, dtype: np.dtype[Any], *, more_allowed: bool = False
) -> Generator[tuple[slice, ndarray], None, None]:
    """Yield the values that the header declares, a few MiB at a time, with their position; check that no more follow.

    Of a compressed file no more than that is inflated. Reading to its end checks the checksum.

    Args:
        path: the file, for messages.
        file: open at the first value.
        count: the number of values that the header declares.
        dtype: as they are stored.
        more_allowed: other content may follow the values.

    Raises:
        InputError: there are fewer, or more that are not zero.
    """
    done, step = 0, max(CHUNK_BYTES // dtype.itemsize, 1)
    while done < count:
        size = min(step, count - done)
        content = file.read(size * dtype.itemsize)
        if len(content) < size * dtype.itemsize:
            held = done * dtype.itemsize + len(content)
            raise InputError(
                f"{path} is cut short: it holds {held} of {count * dtype.itemsize} bytes of pixels; copy it again"
            )
        yield slice(done, done + size), np.frombuffer(content, dtype)
        done += size
    behind = b"" if more_allowed else file.read(PADDING_BYTES + 1)
    if len(behind) > PADDING_BYTES or behind.strip(b"\0"):
        raise InputError(
            f"{path} holds more pixels than the {count * dtype.itemsize} bytes that its header declares; repair the "
            "header, or save the image again"
        )


def read_values(path: Path, file: Any, count: int, dtype: np.dtype[Any], *, more_allowed: bool = False) -> ndarray:
    """Return what ``read_chunks`` yields as one array, in the byte order of this machine.

    Raises:
        InputError: there are fewer or more values than the header declares.
    """
    values = np.empty(count, dtype.newbyteorder("="))
    for position, chunk in read_chunks(path, file, count, dtype, more_allowed=more_allowed):
        values[position] = chunk
    return values


def require_finite(path: Path, values: ndarray, remedy: str = "for CT by -1024") -> None:
    """Refuse NaN and infinite values; ``remedy`` says what to replace them by.

    Raises:
        InputError: a value is NaN or infinite.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise InputError(f"{path} holds {count} NaN or infinite voxels, as float32; replace them, {remedy}")
