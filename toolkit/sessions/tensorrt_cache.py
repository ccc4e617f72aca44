"""Keep the kernels that TensorRT-RTX compiles on a GPU, so that the next session starts at once.

The library itself refuses what was compiled for another GPU, driver or version. A damaged file is made again.
"""

import hashlib
from pathlib import Path

from medseg_trt.files import atomic_file, cache_folder
from medseg_trt.progress import LOG
from medseg_trt.sessions.tensorrt_engine import Engine

DIGEST_BYTES = 32
MAX_BYTES = 1 << 30


def cache_file(plan_sha256: str, gpu: str) -> Path:
    """Return where the kernels of an engine for a GPU are kept."""
    name = hashlib.sha256(f"{plan_sha256} {gpu}".encode()).hexdigest()
    return cache_folder("tensorrt-rtx") / name


def load_kernels(engine: Engine, path: Path) -> bool:
    """Give an engine the kernels of an earlier session, and say whether it took them."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        return False
    content = path.read_bytes()
    digest, blob = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    return hashlib.sha256(blob).digest() == digest and engine.load_kernels(blob)


def save_kernels(engine: Engine, path: Path) -> None:
    """Keep what an engine has compiled; a cache that cannot be written is none."""
    blob = engine.compiled_kernels()
    if blob is None:
        return
    try:
        with atomic_file(path) as temporary:
            temporary.write_bytes(hashlib.sha256(blob).digest() + blob)
    except OSError as error:
        LOG.debug("the compiled kernels are not kept: %s", error)
