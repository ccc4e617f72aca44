"""Keep what the classic builder measured, so that the next build on this GPU is faster.

TensorRT-RTX measures nothing when it builds; its cache is one of the runtime.
"""

from pathlib import Path
from typing import Any

from medseg_trt.files import atomic_file
from medseg_trt.progress import LOG

MAX_BYTES = 1 << 30


def load_cache(config: Any, path: Path | None) -> Any:
    """Give the builder what a file holds, or an empty cache where it is stale; a note says so."""
    content = b""
    if path is not None and path.is_file() and path.stat().st_size <= MAX_BYTES:
        content = path.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):  # False: another GPU's or version's is no match
        LOG.warning("%s is of another GPU or version and is dropped", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def save_cache(config: Any, path: Path) -> None:
    """Write what the builder has measured by now."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
