"""Limit what opening a network and its first run may take, for graphs that were made to take everything.

The operators of a graph are checked when its bundle is loaded, but not the sizes that they compute. Time is that of the
processor, so that a busy machine refuses nothing. A library cannot be interrupted: after the time limit its thread goes
on until the process ends, and the caller gets the error.
"""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Generic, TypeVar

from medseg_trt.errors import ArtefactError

# `infer` takes 0.4 to 2.1 GB with the full-size network, weights of 0.2 to 0.9 GB (benchmarks/results/bench_cpu.md).
BASE_S, S_PER_WEIGHT_MB = 60.0, 0.5
BASE_BYTES, BYTES_PER_WEIGHT_BYTE = 2 << 30, 8
POLL_S = 0.05
STATUS, DATA = Path("/proc/self/status"), "VmData"  # Linux: private writable memory, which RLIMIT_DATA limits

Result = TypeVar("Result")


def limited_run(action: Callable[[], Result], name: str, weight_bytes: int) -> Result:
    """Return what ``action`` returns, unless it takes more time or memory than a network with such weights.

    Args:
        action: opens a network and runs it for the first time; it runs in a thread of its own.
        name: of the network, for messages.
        weight_bytes: size of its weights.

    Raises:
        ArtefactError: it takes more, or there is not so much memory.
    """
    seconds = BASE_S + S_PER_WEIGHT_MB * weight_bytes / 1e6
    outcome = _Outcome(action)
    with _limited_memory(BASE_BYTES + BYTES_PER_WEIGHT_BYTE * weight_bytes):
        deadline = time.process_time() + seconds
        outcome.thread.start()
        while outcome.thread.is_alive():
            outcome.thread.join(POLL_S)
            if time.process_time() > deadline and outcome.thread.is_alive():
                raise ArtefactError(
                    f"{name} takes more than {seconds:.0f} s of processor time for one image; it is not used"
                )
    if isinstance(outcome.error, MemoryError):
        raise ArtefactError(f"{name} takes more memory for one image than is allowed or free; it is not used")
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


class _Outcome(Generic[Result]):
    """The result of an action in a thread, or its error."""

    result: Result
    error: BaseException | None = None

    def __init__(self, action: Callable[[], Result]) -> None:
        self._action = action
        self.thread = Thread(target=self._run, name="first run", daemon=True)

    def _run(self) -> None:
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error


@contextmanager
def _limited_memory(num_bytes: int) -> Generator[None, None, None]:
    """Let this process allocate at most so much more; without effect where the system has no such limit."""
    if sys.platform != "linux":
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + num_bytes
    if soft != resource.RLIM_INFINITY and soft <= limit:
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _data_bytes() -> int:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return 1024 * int(lines[DATA].split()[0])
