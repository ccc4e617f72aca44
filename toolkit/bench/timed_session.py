"""A session in a process of its own that is measured: the network alone, a whole image from file to file, many callers.

The times are taken in the child, beside the network, so that no pipe is in them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.imaging.images import Mask, find_images, read_image, write_mask
from medseg_trt.imaging.segment import Run, segment
from medseg_trt.processes import Connection
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.subprocess_session import HANDLERS, ChildSession, Reply, open_network, serve
from medseg_trt.spec import Classes, Preprocessing, from_dict, to_dict
from medseg_trt.timing import timed_runs

STAGES = ("read", "prepare and restore", "run", "write")


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeWay:
    """What a network is given and asked for from file to file."""

    image: Path
    preprocessing: Preprocessing
    classes: Classes
    output: Path  # masks are written below it, and removed


class MeasuredSession(ChildSession):
    """A child session with more questions."""

    module: ClassVar[str] = "medseg_trt.bench.timed_session"

    def __init__(self, path: Path, precision: str, backend: str, threads: int | None, compute: str) -> None:
        began = time.perf_counter()
        super().__init__(path, precision, backend, threads, compute)
        self.open_ms = 1000 * (time.perf_counter() - began)  # from the start of the process until it is loaded
        self._opened = {"path": str(path), "precision": precision, "compute": compute}

    def __enter__(self) -> "MeasuredSession":
        return self

    def time_on_device(
        self, batch: Float32[ndarray, "batch 3 height width"], duration_s: float, min_runs: int
    ) -> list[float] | None:
        """Return the milliseconds of the network alone by the device's clock, or None, see ``Session``."""
        request = {"do": "time_on_device", "duration_s": duration_s, "min_runs": min_runs}
        return self._child.call(request, batch)["samples_ms"]

    def whole_way(self, way: WholeWay, duration_s: float, min_runs: int) -> tuple[list[float], dict[str, list[float]]]:
        """Go from the image's file to the mask's again and again; return milliseconds, and those of every stage."""
        request = {
            "do": "whole_way", "image": str(way.image), "preprocessing": to_dict(way.preprocessing),
            "classes": to_dict(way.classes), "output": str(way.output), "duration_s": duration_s, "min_runs": min_runs,
        }  # fmt: skip
        reply = self._child.call(request)
        return reply["samples_ms"], reply["stages_ms"]

    def throughput(
        self, batch: Float32[ndarray, "batch 3 height width"], streams: int, threads: int | None, duration_s: float
    ) -> tuple[int, float]:
        """Let ``streams`` callers run the batch at the same time; return how many batches went through, and seconds.

        With ``threads`` every caller has a session of its own, of so many threads; without, they share this one.
        """
        request = {"do": "throughput", "backend": self.backend, "opened": self._opened, "streams": streams,
                   "threads": threads, "duration_s": duration_s}  # fmt: skip
        reply = self._child.call(request, batch)
        return reply["batches"], reply["seconds"]


def _whole_way(
    session: Session, _connection: Connection, image: str, preprocessing: Mapping[str, Any], classes: Mapping[str, Any],
    output: str, duration_s: float, min_runs: int,
) -> Reply:  # fmt: skip
    (source,) = find_images([Path(image)])
    contract, names = from_dict(Preprocessing, preprocessing, "request"), from_dict(Classes, classes, "request")
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with TemporaryDirectory(dir=output, prefix=".partial-") as folder:

        def go() -> None:
            began = time.perf_counter()
            read = read_image(source)
            was_read = time.perf_counter()
            run, spent = _watched(session.run)
            masks, spent_on_masks = _watched(session.masks)
            pixels = session.device_pipeline(read.pixels, read.spacing_in_plane)
            on_device, spent_there = _watched(pixels) if pixels is not None else (None, [])
            labels = segment(
                run, read, contract, 1, masks=masks if session.gives_masks else None, pixels_to_masks=on_device
            )
            was_run = time.perf_counter()
            write_mask(Mask.of(read, labels, names), Path(folder))
            network = sum(spent) + sum(spent_on_masks) + sum(spent_there)
            parts = (was_read - began, was_run - was_read - network, network, time.perf_counter() - was_run)
            for stage, seconds in zip(STAGES, parts, strict=True):
                stages[stage].append(1000 * seconds)

        samples = timed_runs(go, duration_s, min_runs)
    return {"samples_ms": samples, "stages_ms": stages}, None


def _watched(function: Callable[..., ndarray]) -> tuple[Callable[..., ndarray], list[float]]:
    """Return the function, and a list of the seconds that its calls will have taken."""
    spent: list[float] = []

    def watched(*arguments: Any) -> ndarray:
        began = time.perf_counter()
        answer = function(*arguments)
        spent.append(time.perf_counter() - began)
        return answer

    return watched, spent


def _throughput(
    session: Session, connection: Connection, shape: Sequence[int], dtype: str, backend: str, opened: Mapping[str, str],
    streams: int, threads: int | None, duration_s: float,
) -> Reply:  # fmt: skip
    batch = connection.receive_array(shape, dtype)
    with ExitStack() as stack:
        runs: list[Run] = [session.run]
        if streams > 1 and threads is None:
            runs = [session.run] * streams
        elif streams > 1:
            runs = [stack.enter_context(_opened(backend, opened, threads)).run for _ in range(streams)]
        pool = stack.enter_context(ThreadPoolExecutor(streams))
        list(pool.map(lambda run: run(batch), runs))  # warm
        began = time.perf_counter()
        end = began + duration_s

        def keep_running(run: Run) -> int:
            count = 0
            while time.perf_counter() < end or count == 0:
                run(batch)
                count += 1
            return count

        counts = list(pool.map(keep_running, runs))
        seconds = time.perf_counter() - began
    return {"batches": sum(counts), "seconds": seconds}, None


def _opened(backend: str, opened: Mapping[str, str], threads: int | None) -> Session:
    return open_network(backend, Path(opened["path"]), opened["precision"], threads, opened["compute"])


def _time_on_device(
    session: Session, connection: Connection, shape: Sequence[int], dtype: str, duration_s: float, min_runs: int
) -> Reply:
    batch = connection.receive_array(shape, dtype)
    return {"samples_ms": session.time_on_device(batch, duration_s, min_runs)}, None


CALLS: Mapping[str, Callable[..., Reply]] = {
    **HANDLERS,
    "time_on_device": _time_on_device,
    "whole_way": _whole_way,
    "throughput": _throughput,
}


if __name__ == "__main__":
    serve(CALLS)
