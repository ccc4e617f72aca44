"""Run a session in a process of its own: a back-end that dies takes nothing with it, and its memory is its own.

The two processes talk through pipes: a line of JSON, then the array whose shape and type it announces. The child is
``python -m medseg_trt.sessions.subprocess_session``.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray

from medseg_trt import errors
from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.errors import ArtefactError, MedsegError
from medseg_trt.imaging.preprocess import Size
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import choose, open_execution, open_graph

STATUS = Path("/proc/self/status")  # Linux
FIELDS = {"anonymous_mb": "RssAnon", "resident_mb": "VmRSS", "peak_resident_mb": "VmHWM"}
REFERENCES = {"pytorch": "medseg_trt.sessions.pytorch"}  # opens checkpoints, and is in no bundle


class ChildSession(Session):
    """A session of any back-end, in a child process.

    Raises:
        ArtefactError: the child died; the message says by which signal. Anything else is raised as in the child.
    """

    module: ClassVar[str] = "medseg_trt.sessions.subprocess_session"  # that the child runs

    def __init__(self, path: Path, precision: str, backend: str, threads: int | None, compute: str) -> None:
        arguments = {"path": str(path), "precision": precision, "threads": threads, "compute": compute}
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module, backend, json.dumps(arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._what = f"{backend} with {path.name}"
        self.backend, self.device, self.description = backend, "", self._what
        try:
            hello = self._answer()
        except BaseException:
            self.close()
            raise
        self.device, self.description, self.gives_masks = hello["device"], hello["description"], hello["gives_masks"]
        self.load_ms: float = hello["load_ms"]

    def __enter__(self) -> "ChildSession":
        return self

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images."""
        self._ask({"do": "run"}, batch)
        return self._array()

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """Return the labels of a batch of prepared images at the size of their sources, see ``Session``."""
        self._ask({"do": "masks", "size": size, "resampled": resampled}, batch)
        return self._array()

    def time(self, batch: Float32[ndarray, "batch 3 height width"], duration_s: float, min_runs: int) -> list[float]:
        """Run one batch again and again, for ``duration_s`` and at least ``min_runs`` times; return milliseconds."""
        self._ask({"do": "time", "duration_s": duration_s, "min_runs": min_runs}, batch)
        return self._answer()["samples_ms"]

    def memory(self) -> dict[str, float]:
        """Return what the child takes, in 10^6 bytes, by the keys of ``FIELDS``; nothing where there is no /proc."""
        self._ask({"do": "memory"})
        return self._answer()["memory"]

    def close(self) -> None:
        """End the child."""
        self._process.kill()
        self._process.communicate()

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def _ask(self, request: Mapping[str, Any], batch: ndarray | None = None) -> None:
        try:
            _send(self._pipes[0], request, batch)
        except BrokenPipeError:
            raise self._death() from None

    def _answer(self) -> dict[str, Any]:
        line = self._pipes[1].readline()
        if not line.endswith(b"\n"):
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise getattr(errors, answer["kind"])(answer["error"])
        return answer

    def _array(self) -> ndarray:
        announced = self._answer()
        try:
            return read_array(self._pipes[1], announced["shape"], announced["dtype"])
        except BrokenPipeError:
            raise self._death() from None

    def _death(self) -> ArtefactError:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return ArtefactError(f"{self._what} {how}; it is not used")


def open_network(backend: str, path: Path, precision: str, threads: int | None, compute: str) -> Session:
    """Open a network here.

    Args:
        backend: a key of ``sessions.backends.BACKENDS`` or of ``REFERENCES``.
        path: the graph, the checkpoint, or for an engine the folder of its bundle.
        precision: of the stored weights.
        threads: CPU threads; None leaves it to the back-end.
        compute: what float parts are computed in.

    Raises:
        MedsegError: as ``sessions.open.open_session`` does.
    """
    if backend in REFERENCES:
        return import_module(REFERENCES[backend]).open_graph(path, precision, threads, compute)
    if BACKENDS[backend].engines:
        bundle = load_bundle(path)
        return open_execution(bundle, choose(bundle, backend, precision))
    return open_graph(backend, path, precision, threads, compute)


def serve(answering: Mapping[str, Callable[..., Any]]) -> None:
    """Open the session that the command line names, say so, and answer until the parent hangs up."""
    backend, arguments, requests = sys.argv[1], json.loads(sys.argv[2]), sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")  # a back-end that prints must not print into the conversation
    os.dup2(2, 1)
    try:
        began = time.perf_counter()
        with open_network(backend, Path(arguments.pop("path")), **arguments) as session:
            load_ms = 1000 * (time.perf_counter() - began)
            hello = {name: getattr(session, name) for name in ("device", "description", "gives_masks")}
            _send(answers, {**hello, "load_ms": load_ms})
            while line := requests.readline():
                request = json.loads(line)
                _send(answers, *answering[request.pop("do")](session, requests, **request))
    except MedsegError as error:
        _send(answers, {"error": str(error), "kind": type(error).__name__})


def _run(session: Session, requests: IO[bytes], shape: Sequence[int], dtype: str) -> tuple[dict[str, Any], ndarray]:
    return {}, session.run(read_array(requests, shape, dtype))


def _masks(
    session: Session, requests: IO[bytes], shape: Sequence[int], dtype: str, size: Size, resampled: Size
) -> tuple[dict[str, Any], ndarray]:
    return {}, session.masks(read_array(requests, shape, dtype), (size[0], size[1]), (resampled[0], resampled[1]))


def _time(
    session: Session, requests: IO[bytes], shape: Sequence[int], dtype: str, duration_s: float, min_runs: int
) -> tuple[dict[str, Any]]:
    batch, samples = read_array(requests, shape, dtype), list[float]()
    end = time.perf_counter() + duration_s
    while len(samples) < min_runs or time.perf_counter() < end:
        began = time.perf_counter()
        session.run(batch)
        samples.append(1000 * (time.perf_counter() - began))
    return ({"samples_ms": samples},)


def _memory(session: Session, requests: IO[bytes]) -> tuple[dict[str, Any]]:
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines()) if STATUS.is_file() else {}
    kilobytes = {name: lines[field].split()[0] for name, field in FIELDS.items() if field in lines}
    return ({"memory": {name: int(value) * 1024 / 1e6 for name, value in kilobytes.items()}},)


ANSWERS = {"run": _run, "masks": _masks, "time": _time, "memory": _memory}


def _send(pipe: IO[bytes], message: Mapping[str, Any], array: ndarray | None = None) -> None:
    announced = {} if array is None else {"shape": array.shape, "dtype": array.dtype.name}
    pipe.write(json.dumps({**message, **announced}).encode() + b"\n")
    if array is not None:
        pipe.write(np.ascontiguousarray(array).data)
    pipe.flush()


def read_array(pipe: IO[bytes], shape: Sequence[int], dtype: str) -> ndarray:
    """Return the array that follows a request.

    Raises:
        BrokenPipeError: the other side ended before it was through.
    """
    array = np.empty(shape, dtype)
    if pipe.readinto(array.data.cast("B")) != array.nbytes:  # pyright: ignore[reportAttributeAccessIssue]  # buffered
        raise BrokenPipeError
    return array


if __name__ == "__main__":
    serve(ANSWERS)
