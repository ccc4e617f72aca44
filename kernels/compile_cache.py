"""Cache the output of compilers under the digest of all their inputs."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from medseg_trt.files import atomic_file, cache_folder


def cached(key: object, make: Callable[[], str]) -> str:
    """Return the result of ``make``, from the user's cache if it was computed for the same ``key`` before.

    A damaged cache file is replaced. Several processes may use the cache at the same time.

    Args:
        key: everything that the result depends on, as JSON-serialisable data.
        make: computes the result.
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
    """Prefix a text with a line that holds its digest."""
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def _read(path: Path) -> str | None:
    """Return the text of a cache file; None if it is missing or damaged."""
    try:
        sealed = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    text = sealed.partition("\n")[2]
    return text if sealed == _seal(text) else None
