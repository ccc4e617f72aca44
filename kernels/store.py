"""Keep what a compiler made in the user's cache: found again by the digest of everything it was made from."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from medseg_trt.files import atomic_file, cache_folder


def remember(key: object, make: Callable[[], str]) -> str:
    """Return what ``make`` returns; from the cache where it was made from the same ``key`` before.

    A file in the cache that is damaged is made again. Several processes may do the same at the same time.

    Args:
        key: everything that the result depends on, as JSON can hold it.
        make: what makes it.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_folder("kernels") / name
    text = _read(path)
    if text is None:
        text = make()
        with atomic_file(path) as temporary:
            temporary.write_text(_seal(text), encoding="utf-8")
    return text


def _seal(text: str) -> str:
    """Put the digest of the text on a line before it."""
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _read(path: Path) -> str | None:
    """Return what a file of the cache holds, or None where there is none or it is damaged."""
    try:
        sealed = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    text = sealed.partition("\n")[2]
    return text if sealed == _seal(text) else None
