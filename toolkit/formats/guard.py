"""What every reader does with a file that is not to be trusted: limits, and one line where it cannot be used."""

import logging
import warnings
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
from numpy import ndarray

from medseg_trt.errors import InputError, MedsegError

MAX_PIXELS = 2**28  # of one picture or volume; as float32 they take 1 GiB
MAX_HEADER_BYTES = 2**20  # of a NIfTI header with its extensions, or an NRRD header
MAX_PAGES = 4096  # of a TIFF file
MAX_REASON = 200  # characters of what a decoder says
DECODERS = ("imagecodecs",)  # packages that decoders ask for by name

for _library in ("PIL", "tifffile"):  # without any handler, what they say of a bad file goes to stderr
    logging.getLogger(_library).addHandler(logging.NullHandler())


class _Quiet:
    """Silence warnings. Python's filters are one for all threads: the first reader sets them, the last one restores."""

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
def naming(path: Path, *kinds: type[Exception]) -> Generator[None, None, None]:
    """Turn what a decoder says of a bad file into one line that names the file, and keep its warnings quiet.

    Our own errors pass as they are.
    """
    try:
        with _QUIET:  # warnings may quote the patient
            yield
    except MedsegError:
        raise
    except (OSError, EOFError, ValueError, OverflowError, MemoryError, zlib.error, *kinds) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:MAX_REASON] or type(error).__name__
        remedy = next((f"; install it: pip install {package}" for package in DECODERS if package in reason), "")
        raise InputError(f"{path} cannot be read: {reason}{remedy}") from error


def check_size(path: Path, shape: Sequence[int]) -> None:
    """Refuse a file whose header promises too much, before it is decoded.

    Raises:
        InputError: there are more than ``MAX_PIXELS`` pixels, or none.
    """
    if prod(shape) > MAX_PIXELS or min(shape, default=0) < 1:
        raise InputError(f"{path} says it has {' x '.join(map(str, shape))} pixels; 1 to {MAX_PIXELS} are possible")


def require_finite(path: Path, values: ndarray) -> None:
    """Refuse NaN and infinite values.

    Raises:
        InputError: there are some.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        count = np.count_nonzero(~np.isfinite(values))
        raise InputError(f"{path} holds {count} NaN or infinite voxels; replace them, for CT by -1024")
