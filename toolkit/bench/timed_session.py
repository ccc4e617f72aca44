"""Measure a session in a child process: the network alone, an image from file to file, several concurrent callers.

The child takes the times itself, so that they include no inter-process communication.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from jaxtyping import Float32
from numpy import ndarray

from medseg_trt.imaging.images import Mask, find_images, read_image, write_mask
from medseg_trt.imaging.segment import Run, segment
from medseg_trt.postprocess.apply import postprocess, unsuited
from medseg_trt.postprocess.steps import Postprocessing
from medseg_trt.processes import Connection
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.device_times import DeviceTimes
from medseg_trt.sessions.pytorch_forms import FORMS
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import HANDLERS, ChildSession, Reply, open_network, serve
from medseg_trt.spec import Classes, Preprocessing, from_dict, to_dict
from medseg_trt.tiling.segment import tiled
from medseg_trt.tiling.windows import recorded_tiles
from medseg_trt.timing import timed_runs

STAGES = ("read", "prepare and restore", "run", "write")


@dataclass(frozen=True, kw_only=True, slots=True)
class EndToEndCase:
    """The input and the output folder of the end-to-end timing."""

    image: Path
    preprocessing: Preprocessing
    classes: Classes
    postprocessing: Postprocessing | None = None
    output: Path  # masks are written to a temporary folder inside it


class MeasuredSession(ChildSession):
    """A child session that can be timed in more ways."""

    module: ClassVar[str] = "medseg_trt.bench.timed_session"

    def __init__(self, request: SessionRequest) -> None:
        began = time.perf_counter()
        super().__init__(request)
        self.open_ms = 1000 * (time.perf_counter() - began)  # from the start of the process until it is loaded
        self._request = request

    @property
    def takes_callers(self) -> bool:
        """Whether several callers may share it; a CUDA graph of PyTorch has one input and one output."""
        return FORMS[self._request.form].overlaps

    def __enter__(self) -> "MeasuredSession":
        return self

    def time_on_device(
        self, batch: Float32[ndarray, "batch 3 height width"], duration_s: float, min_runs: int
    ) -> DeviceTimes | None:
        """Return the times by the device's clock, or None as ``Session.time_on_device``."""
        request = {"do": "time_on_device", "duration_s": duration_s, "min_runs": min_runs}
        times = self._child.call(request, batch)["times"]
        return None if times is None else DeviceTimes(**times)

    def time_end_to_end(
        self, case: EndToEndCase, duration_s: float, min_runs: int
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Return the milliseconds from image file to mask file of every run, in total and by stage."""
        fields = {
            "image": str(case.image),
            "preprocessing": to_dict(case.preprocessing),
            "classes": to_dict(case.classes),
            "postprocessing": None if case.postprocessing is None else to_dict(case.postprocessing),
            "output": str(case.output),
        }
        reply = self._child.call({"do": "end_to_end", "case": fields, "duration_s": duration_s, "min_runs": min_runs})
        return reply["samples_ms"], reply["stages_ms"]

    def throughput(
        self, batch: Float32[ndarray, "batch 3 height width"], streams: int, threads: int | None, duration_s: float
    ) -> tuple[int, float]:
        """Let ``streams`` callers run the batch concurrently; return the number of batches and the seconds.

        With ``threads`` every caller opens a session with so many threads; without, all callers share this session.
        """
        own = None if threads is None else replace(self._request, threads=threads).to_dict()
        reply = self._child.call({"do": "throughput", "streams": streams, "own": own, "duration_s": duration_s}, batch)
        return reply["batches"], reply["seconds"]


def _end_to_end(
    session: Session, _connection: Connection, case: Mapping[str, Any], duration_s: float, min_runs: int
) -> Reply:
    request = from_dict(EndToEndCase, case, "the request")
    (source,) = find_images([request.image])
    stages: dict[str, list[float]] = {stage: [] for stage in STAGES}
    with TemporaryDirectory(dir=request.output, prefix=".partial-") as folder:

        def run_once() -> None:
            began = time.perf_counter()
            image = read_image(source)
            read_end = time.perf_counter()
            run, run_s = _timed_calls(session.run)
            masks, masks_s = _timed_calls(session.masks)
            tiles = recorded_tiles(request.preprocessing)
            pipeline, device_s = None, list[float]()
            if tiles is not None:
                pipeline = tiled(run, image, request.preprocessing, tiles)
            elif (on_device := session.device_pipeline(image.pixels, image.spacing_in_plane)) is not None:
                pipeline, device_s = _timed_calls(on_device)
            labels = segment(
                run,
                image,
                request.preprocessing,
                1,
                masks=masks if session.gives_masks else None,
                pixels_to_masks=pipeline,
            )
            post = request.postprocessing
            has_spacing = image.spacing_mm is not None
            if post is not None and unsuited(post, image.num_slices, image.size, has_spacing) is None:
                labels = postprocess(labels, post, request.classes, image.spacing_mm)
            segment_end = time.perf_counter()
            write_mask(Mask.of(image, labels, request.classes), Path(folder))
            network = sum(run_s) + sum(masks_s) + sum(device_s)
            parts = (read_end - began, segment_end - read_end - network, network, time.perf_counter() - segment_end)
            for stage, seconds in zip(STAGES, parts, strict=True):
                stages[stage].append(1000 * seconds)

        samples = timed_runs(run_once, duration_s, min_runs)
    return {"samples_ms": samples, "stages_ms": stages}, None


def _timed_calls(function: Callable[..., ndarray]) -> tuple[Callable[..., ndarray], list[float]]:
    """Return the function, and a list to which every call appends its seconds."""
    seconds: list[float] = []

    def timed(*arguments: Any) -> ndarray:
        began = time.perf_counter()
        output = function(*arguments)
        seconds.append(time.perf_counter() - began)
        return output

    return timed, seconds


def _throughput(
    session: Session,
    connection: Connection,
    shape: Sequence[int],
    dtype: str,
    streams: int,
    own: Mapping[str, Any] | None,
    duration_s: float,
) -> Reply:
    batch = connection.receive_array(shape, dtype)
    with ExitStack() as stack:
        runs: list[Run] = [session.run]
        if streams > 1 and own is None:
            runs = [session.run] * streams
        elif streams > 1 and own is not None:
            request = SessionRequest.parse(own)
            runs = [stack.enter_context(open_network(request)).run for _ in range(streams)]
        pool = stack.enter_context(ThreadPoolExecutor(streams))
        each = pool.map if streams > 1 else map  # a CUDA graph of torch.compile belongs to the thread that made it
        list(each(lambda run: run(batch), runs))  # warm-up
        began = time.perf_counter()
        end = began + duration_s

        def keep_running(run: Run) -> int:
            count = 0
            while time.perf_counter() < end or count == 0:
                run(batch)
                count += 1
            return count

        counts = list(each(keep_running, runs))
        seconds = time.perf_counter() - began
    return {"batches": sum(counts), "seconds": seconds}, None


def _time_on_device(
    session: Session, connection: Connection, shape: Sequence[int], dtype: str, duration_s: float, min_runs: int
) -> Reply:
    batch = connection.receive_array(shape, dtype)
    times = session.time_on_device(batch, duration_s, min_runs)
    return {"times": None if times is None else to_dict(times)}, None


CALLS: Mapping[str, Callable[..., Reply]] = {
    **HANDLERS,
    "time_on_device": _time_on_device,
    "end_to_end": _end_to_end,
    "throughput": _throughput,
}


if __name__ == "__main__":
    serve(CALLS)
