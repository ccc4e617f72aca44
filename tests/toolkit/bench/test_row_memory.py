"""Each row is a process with a CUDA context: it is closed when nothing more is measured, and fails alone."""

from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from measured_here import SHORT

from medseg_trt.bench import timings
from medseg_trt.bench.candidates import Candidate
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timed_session import MeasuredSession
from medseg_trt.bench.timing_schema import Latency
from medseg_trt.bench.timings import Timings, open_candidates, time_all
from medseg_trt.errors import DeviceError
from medseg_trt.sessions.device_times import DeviceTimes
from medseg_trt.sessions.session_request import SessionRequest

NO_MEMORY = "fake: the GPU has not enough memory (none is free). End what else runs on it"
IMAGE = np.zeros((1, 3, 8, 8), np.float32)


class Row(MeasuredSession):
    """A measured session on a GPU that runs out of memory at one call."""

    device, open_ms, load_ms, process_id, takes_callers = "GPU Fake", 3.0, 2.0, 4711, False  # pyright: ignore

    def __init__(self, name: str, log: list[tuple[str, str]], fails_at: str = "") -> None:
        self.name, self.log, self.fails_at = name, log, fails_at

    def _note(self, call: str) -> None:
        self.log.append((self.name, call))
        if call == self.fails_at:
            raise DeviceError(NO_MEMORY)

    def time(self, batch: np.ndarray, duration_s: float, min_runs: int) -> list[float]:
        self._note("time")
        return [1.0 + 0.125 * number for number in range(min_runs)]

    def time_on_device(self, batch: np.ndarray, duration_s: float, min_runs: int) -> DeviceTimes:
        self._note("time_on_device")
        return DeviceTimes(compute_ms=[1.0] * min_runs)

    def throughput(self, batch: np.ndarray, streams: int, threads: int | None, duration_s: float) -> tuple[int, float]:
        self._note("throughput")
        return 10, 1.0

    def memory(self) -> dict[str, float]:
        return {"anonymous_mb": 50.0, "resident_mb": 80.0, "peak_resident_mb": 90.0}

    def close(self) -> None:
        self.log.append((self.name, "close"))

    def __enter__(self) -> "Row":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture(autouse=True)
def no_gpu_is_asked(monkeypatch):
    monkeypatch.setattr(timings, "read_clock", lambda _: None)
    monkeypatch.setattr(timings, "used_memory_mb", lambda _: 512.0)
    monkeypatch.setattr(timings, "open_meter", lambda *_: Missing(reason="generated"))


def measured(fails_at: str) -> tuple[dict[str, Timings], list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []
    rows = {"one": Row("one", log), "two": Row("two", log, fails_at), "three": Row("three", log)}
    results = {name: Timings(start=Missing(reason="generated")) for name in rows}
    time_all(rows, results, IMAGE, Missing(reason="generated"), SHORT)
    return results, log


@pytest.mark.parametrize("fails_at", ["time", "time_on_device", "throughput"])
def test_too_little_memory_ends_one_row_and_gives_its_memory_to_the_others(fails_at):
    results, log = measured(fails_at)
    assert results["two"].failure == NO_MEMORY
    for name in ("one", "three"):
        assert results[name].failure is None
        assert isinstance(results[name].latency["model"], Latency)
        assert results[name].throughput
        assert results[name].memory is not None
    failed = log.index(("two", fails_at))
    assert log[failed + 1] == ("two", "close")
    assert [call for name, call in log[failed + 2 :] if name == "two" and call != "close"] == []


def test_a_row_is_closed_after_its_last_measurement_and_before_the_next_ones():
    _, log = measured("")
    closed = {name: log.index((name, "close")) for name in ("one", "two", "three")}
    assert closed["one"] < log.index(("two", "throughput")) < closed["two"] < log.index(("three", "throughput"))
    for name, place in closed.items():
        assert {call for other, call in log[place:] if other == name} == {"close"}


def candidate(name: str, role: Literal["reference", "variant", "peer"]) -> Candidate:
    return Candidate(
        name=name,
        role=role,
        backend="tensorrt-rtx",
        path=Path(name),
        graph=None,
        precision="fp32",
        compute="fp32",
        variant="canonical",
        files=(),
        executed=True,
        execution_note="",
        allowed=0.0,
    )


def test_peers_are_opened_last_and_are_the_rows_that_run_out_of_memory(monkeypatch):
    log: list[tuple[str, str]] = []

    def opened(request: SessionRequest) -> Row:
        log.append((request.path.name, "open"))
        if sum(call == "open" for _, call in log) > 2:
            raise DeviceError(NO_MEMORY)
        return Row(request.path.name, log)

    monkeypatch.setattr(timings, "MeasuredSession", opened)
    chosen = [candidate("reference", "reference"), candidate("peer", "peer"), candidate("engine", "variant")]
    with ExitStack() as stack:
        sessions, results = open_candidates(chosen, IMAGE, 1, stack)
    assert list(sessions) == ["reference", "engine"]
    assert results["peer"].failure == NO_MEMORY
