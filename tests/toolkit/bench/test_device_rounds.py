"""What a time on a GPU consists of, and which of it binds a row."""

import subprocess
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from measured_here import SHORT

from medseg_trt.bench import gpu_clocks, measure, timings
from medseg_trt.bench.device_rounds import NO_COPIES, DeviceRounds, binding_warnings
from medseg_trt.bench.gpu_clocks import GpuClock, parse_clock, read_clock
from medseg_trt.bench.measure import SETTLE_S, RoundTimes, interleaved_rounds, latency, tier
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timed_session import MeasuredSession
from medseg_trt.bench.timing_schema import OnGpu
from medseg_trt.sessions.device_times import DeviceTimes

GOOD = OnGpu(enqueue_ms=0.1, upload_ms=0.2, download_ms=0.3, sm_mhz=(1980, 1965), held_back_by=())


def alone_of(ms: float):
    times = latency(RoundTimes(rounds_ms=[[ms] * 5] * 5), "GPU")
    assert times is not None
    return times


@pytest.mark.parametrize(
    ("line", "clock"),
    [
        ("1980, 0x0000000000000000\n", GpuClock(1980, ())),
        ("345, 0x0000000000000001\n", GpuClock(345, ())),  # idle
        ("1200, 0x0000000000000024\n", GpuClock(1200, ("power limit", "temperature"))),
        ("[N/A], [N/A]\n", None),
        ("", None),
    ],
)
def test_the_line_of_nvidia_smi_is_read(line, clock):
    assert parse_clock(line) == clock


def test_read_clock_falls_back_to_the_old_nvidia_smi_query(monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        if "event_reasons" in command[1]:
            raise subprocess.CalledProcessError(2, command)
        return SimpleNamespace(stdout="1500, 0x4\n")

    monkeypatch.setattr(gpu_clocks.subprocess, "run", run)
    monkeypatch.setattr(gpu_clocks, "pci_bus_id", lambda _: None)
    assert read_clock(1) == GpuClock(1500, ("power limit",))
    assert [command[-1] for command in asked] == ["--id=1", "--id=1"]
    monkeypatch.setattr(gpu_clocks, "pci_bus_id", {1: "0000:41:00.0"}.get)
    assert read_clock(1) == GpuClock(1500, ("power limit",))
    assert asked[-1][-1] == "--id=0000:41:00.0"  # nvidia-smi counts GPUs in another order than CUDA


def test_rounds_are_summed_up_as_medians():
    rounds = DeviceRounds()
    assert isinstance(rounds.summary(), Missing)
    for enqueue_ms in (0.1, 0.3, 0.2):
        rounds.add(DeviceTimes(compute_ms=[1.0], enqueue_ms=[enqueue_ms], upload_ms=[0.5], images_per_s=[8.0]))
        rounds.look(GpuClock(1980, ("power limit",)))
    rounds.look(None)
    assert rounds.summary() == OnGpu(
        enqueue_ms=0.2,
        upload_ms=0.5,
        images_per_s=8.0,
        download_ms=NO_COPIES,
        sm_mhz=(1980, 1980, 1980),
        held_back_by=("power limit",),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"enqueue_ms": 0.9}, "bound by the host, which takes 0.900 ms to enqueue 1.000 ms of work"),
        ({"upload_ms": 1.5}, "bound by the upload, which takes 1.500 ms"),
        ({"download_ms": 1.5}, "bound by the download"),
        ({"held_back_by": ("temperature",)}, "held back by temperature"),
        ({"sm_mhz": (1980, 1200)}, "varied from 1200 to 1980 MHz; lock it"),
    ],
)
def test_binding_warnings_name_what_limits_a_row(change, words):
    warnings = binding_warnings(alone_of(1.0), replace(GOOD, **change))
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]


def test_a_row_on_a_gpu_warms_up_before_every_turn():
    turns: list[tuple[str, float, int]] = []
    ended: list[str] = []

    def row(name):
        return lambda seconds, runs: turns.append((name, seconds, runs)) or [1.0]

    waits: list[float] = []
    short = tier("quick", duration_s=0.0)
    rows = {"gpu": row("gpu"), "cpu": row("cpu")}
    interleaved_rounds(rows, short, waits.append, turn_warmup_s={"gpu": 0.2}, after_turn=ended.append)
    assert turns[2:6] == [("gpu", 0.2, 1), ("gpu", 0.0, 2), ("cpu", 0.0, 1), ("cpu", 0.0, 2)]
    assert ended == ["gpu", "cpu"] * measure.MIN_ROUNDS
    assert set(waits) == {SETTLE_S}


def test_the_clock_is_read_while_the_network_runs(monkeypatch):
    """After a turn the clock falls, and nothing holds it back any more."""
    is_running, has_looked = threading.Event(), threading.Event()

    class Running(MeasuredSession):
        def __init__(self) -> None:
            self.device = "GPU Fake GPU"

        def time_on_device(self, batch, seconds, runs):
            is_running.set()
            assert has_looked.wait(10)
            is_running.clear()
            return DeviceTimes(compute_ms=[1.0] * max(runs, 1), enqueue_ms=[0.1])

    def look(number):
        assert is_running.wait(10)
        has_looked.set()
        return GpuClock(1000 + number, ())

    monkeypatch.setattr(timings, "read_clock", look)
    measured = {"engine": timings.Timings(start=Missing(reason="not asked for"))}
    timings._time_on_devices({"engine": Running()}, measured, np.zeros((1, 3, 4, 4), np.float32), SHORT, 3)
    on_gpu = measured["engine"].on_gpu
    assert isinstance(on_gpu, OnGpu)
    assert set(on_gpu.sm_mhz) == {1003}
