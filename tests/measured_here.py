"""Stand-ins with which ``bench`` needs no processes and no time: its masks are real, its times are made up."""

import os
from dataclasses import replace

import numpy as np
import pytest

from medseg_trt.bench import profiling, timings
from medseg_trt.bench.layer_times import Step, summed_up
from medseg_trt.bench.profile_schema import Peak
from medseg_trt.bench.timed_session import STAGES, MeasuredSession
from medseg_trt.bench.timing_schema import Tier
from medseg_trt.sessions.base import Session
from medseg_trt.sessions.device_times import DeviceTimes
from medseg_trt.sessions.session_request import SessionRequest
from medseg_trt.sessions.subprocess_session import open_network

SHORT = Tier(name="short", warmup_ms=0.0, warmup_runs=1, duration_s=0.0, min_runs=10, starts=1)


class MeasuredHere(MeasuredSession):
    """A measured session of this process whose times are made up: its answers are real, and nothing waits."""

    def __init__(self, request: SessionRequest) -> None:
        self._session: Session = open_network(replace(request, threads=1))
        self._request = request
        self.backend, self.device, self.description = request.backend, self._session.device, self._session.description
        self.open_ms, self.load_ms = 300.0, 200.0
        self._milliseconds = float(len(self.description))
        self.is_closed = False

    @property
    def process_id(self) -> int:
        return os.getpid()

    def run(self, batch: np.ndarray) -> np.ndarray:
        return self._session.run(batch)

    def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> list[float]:
        return [self._milliseconds + 0.125 * number for number in range(min_runs)]

    def time_on_device(self, batch: np.ndarray, duration_s: float, min_runs: int) -> DeviceTimes | None:
        return self._session.time_on_device(batch, duration_s, min_runs)

    def time_end_to_end(self, case, duration_s, min_runs):
        return [self._milliseconds + 8.0] * min_runs, {stage: [2.0] * min_runs for stage in STAGES}

    def throughput(self, batch, streams, threads, duration_s):
        return 10 * streams, 2.0

    def memory(self) -> dict[str, float]:
        return {"anonymous_mb": 50.0, "resident_mb": 80.0, "peak_resident_mb": 90.0}

    def close(self) -> None:
        if not self.is_closed:
            self._session.close()
        self.is_closed = True


def measure_here(patch: pytest.MonkeyPatch) -> None:
    """Make ``bench`` fast: real answers, made-up times, profiles and peaks."""

    def steps(_path, backend, _precision, _compute, _image, costs, _cuda):
        named = [cost for cost in costs if cost.macs]
        return summed_up(
            f"{backend}, made up",
            [Step(name=cost.names[0], kind="Conv", kernel="made up", ms=0.5, bytes=cost.bytes) for cost in named],
            costs,
        )

    peak = Peak(arithmetic="", gmacs_per_s=50.0, gemm="made up", gbytes_per_s=20.0, copy="made up")
    patch.setattr(timings, "MeasuredSession", MeasuredHere)
    patch.setattr(profiling, "profile", steps)
    patch.setattr(
        profiling,
        "peaks",
        lambda formats: tuple(replace(peak, arithmetic=name) for name in dict.fromkeys(w[1] for w in formats)),
    )
