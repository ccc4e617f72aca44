"""Run a session in a child process: a back-end that dies takes nothing with it, and its memory is its own.

The child is ``python -P -m medseg_trt.sessions.subprocess_session``; ``medseg_trt.processes`` describes the messages.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, ClassVar

from jaxtyping import Float32, UInt8
from numpy import ndarray

from medseg_trt.bundles.bundle import load_bundle
from medseg_trt.imaging.preprocess import Size
from medseg_trt.processes import ChildProcess, Connection, parent, process_memory
from medseg_trt.sessions.backends import BACKENDS
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.open import choose, open_execution, open_graph
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.timing import timed_runs

REFERENCES = {"pytorch": "medseg_trt.sessions.pytorch"}  # opens checkpoints, and is in no bundle
Reply = tuple[dict[str, Any], ndarray | None]  # a message, and the array after it


class ChildSession(Session):
    """A session of any back-end, in a child process.

    Raises:
        ArtefactError: the child died; the message names the signal. Any other error is raised as in the child.
    """

    module: ClassVar[str] = "medseg_trt.sessions.subprocess_session"  # that the child runs

    def __init__(self, request: SessionRequest) -> None:
        self.backend, self.device, self.description = request.backend, "", request.name
        self._child = ChildProcess(self.module, request.to_dict(), request.name)
        try:
            opened = self._child.receive()
        except BaseException:
            self.close()
            raise
        self.device, self.description = opened["device"], opened["description"]
        self.gives_masks = opened["gives_masks"]
        self.load_ms: float = opened["load_ms"]

    def __enter__(self) -> "ChildSession":
        return self

    @property
    def process_id(self) -> int:
        """The child's."""
        return self._child.process_id

    def run(self, batch: Float32[ndarray, "batch 3 height width"]) -> Float32[ndarray, "batch classes height width"]:
        """Return the logits of a batch of prepared images."""
        return self._child.call_for_array({"do": "run"}, batch)

    def masks(
        self, batch: Float32[ndarray, "batch 3 _ _"], size: Size, resampled: Size
    ) -> UInt8[ndarray, "batch height width"]:
        """Return the labels of a batch of prepared images at the size of their sources, see ``Session``."""
        return self._child.call_for_array({"do": "masks", "size": size, "resampled": resampled}, batch)

    def time(self, batch: Float32[ndarray, "batch 3 height width"], duration_s: float, min_runs: int) -> list[float]:
        """Run one batch for ``duration_s`` and at least ``min_runs`` times; return milliseconds.

        With streams, the batch runs in each of them, and the milliseconds are those of all, divided by their number.
        """
        return self._child.call({"do": "time", "duration_s": duration_s, "min_runs": min_runs}, batch)["samples_ms"]

    def memory(self) -> dict[str, float]:
        """Return what the child takes, see ``processes.process_memory``."""
        return self._child.call({"do": "memory"})["memory"]

    def close(self) -> None:
        """End the child."""
        self._child.close()


def open_network(request: SessionRequest) -> Session:
    """Open a network in this process.

    Raises:
        MedsegError: as ``sessions.open.open_session`` does.
    """
    graph = (request.path, request.precision, request.threads, request.compute_dtype)
    if request.backend in REFERENCES:
        return import_module(REFERENCES[request.backend]).open_graph(*graph, request.device, request.form)
    if BACKENDS[request.backend].engines:
        bundle = load_bundle(request.path)
        execution = choose(bundle, request.backend, request.precision)
        return open_execution(bundle, execution, cuda=request.device.number)
    return open_graph(request.backend, *graph, request.device.number, streams=request.streams)


def serve(handlers: Mapping[str, Callable[..., Reply]]) -> None:
    """Open the session that the parent asks for, and answer its calls until it hangs up."""
    with parent() as (request, connection):
        began = time.perf_counter()
        with open_network(SessionRequest.parse(request)) as session:
            load_ms = 1000 * (time.perf_counter() - began)
            opened = {name: getattr(session, name) for name in ("device", "description", "gives_masks")}
            connection.send({**opened, "load_ms": load_ms})
            while (call := connection.receive()) is not None:
                connection.send(*handlers[call.pop("do")](session, connection, **call))


def _run(session: Session, connection: Connection, shape: Sequence[int], dtype: str) -> Reply:
    return {}, session.run(connection.receive_array(shape, dtype))


def _masks(
    session: Session, connection: Connection, shape: Sequence[int], dtype: str, size: Size, resampled: Size
) -> Reply:
    batch = connection.receive_array(shape, dtype)
    return {}, session.masks(batch, (size[0], size[1]), (resampled[0], resampled[1]))


def _time(
    session: Session, connection: Connection, shape: Sequence[int], dtype: str, duration_s: float, min_runs: int
) -> Reply:
    batch = connection.receive_array(shape, dtype)
    if session.streams == 1:
        return {"samples_ms": timed_runs(lambda: session.run(batch), duration_s, min_runs)}, None
    with ThreadPoolExecutor(session.streams) as pool:
        samples_ms = timed_runs(lambda: [*pool.map(session.run, [batch] * session.streams)], duration_s, min_runs)
    return {"samples_ms": [sample_ms / session.streams for sample_ms in samples_ms]}, None


def _memory(session: Session, connection: Connection) -> Reply:
    return {"memory": process_memory()}, None


HANDLERS: Mapping[str, Callable[..., Reply]] = {"run": _run, "masks": _masks, "time": _time, "memory": _memory}


if __name__ == "__main__":
    serve(HANDLERS)
