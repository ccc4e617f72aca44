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


class KernelCache:
    """The file with the compiled kernels of one engine."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine, self._path = engine, path
        self._kept = b""  # digest of what the file holds, as far as this process knows

    def load(self) -> bool:
        """Give the engine, which has no context yet, the kernels of an earlier session; say whether it took them."""
        if not self._path.is_file() or self._path.stat().st_size > MAX_BYTES:
            return False
        content = self._path.read_bytes()
        digest, blob = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(blob).digest() != digest or not self._engine.load_kernels(blob):
            return False
        self._kept = digest
        return True

    def save(self) -> None:
        """Keep what the engine has compiled, if that is something new; a cache that cannot be written is none."""
        blob = self._engine.compiled_kernels()
        if blob is None or (digest := hashlib.sha256(blob).digest()) == self._kept:
            return
        try:
            with atomic_file(self._path) as temporary:
                temporary.write_bytes(digest + blob)
            self._kept = digest
        except OSError as error:
            LOG.debug("the compiled kernels are not kept: %s", error)
