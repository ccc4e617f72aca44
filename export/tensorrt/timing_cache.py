"""Load and save the timing cache of the classic builder, which makes later builds on the same GPU faster.

TensorRT-RTX measures nothing during a build; its cache belongs to the runtime.
"""

from pathlib import Path
from typing import Any

from medseg_trt.files import atomic_file
from medseg_trt.progress import LOG

MAX_BYTES = 1 << 30


def load_cache(config: Any, path: Path | None) -> Any:
    """Load a timing cache from a file; an empty cache, with a warning, where the file is of another GPU or version."""
    content = b""
    if path is not None and path.is_file() and path.stat().st_size <= MAX_BYTES:
        content = path.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):  # False: reject a cache of another GPU or version
        LOG.warning("%s is of another GPU or version and is not used", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def save_cache(config: Any, path: Path) -> None:
    """Write the timings that the builder has measured."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
