"""Meters are folders and programs made up here; no machine of the tests has one that may be read."""

import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from medseg_trt.bench import energy as energy_module
from medseg_trt.bench.energy import Meter, Rapl, Tegrastats, energy, input_watts, open_meter
from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timing_schema import Energy

RANGE_UJ = 1_000_000


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two processor packages, each with a part that is in its sum already."""
    monkeypatch.setenv("PATH", str(tmp_path))  # without tegrastats
    for name, energy_uj in (("intel-rapl:0", 900_000), ("intel-rapl:0:0", 5), ("intel-rapl:1", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{energy_uj}\n")
        (tmp_path / name / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return tmp_path


def count(powercap: Path, name: str, energy_uj: int) -> None:
    (powercap / name / "energy_uj").write_text(f"{energy_uj}\n")


def test_packages_are_added_up_and_their_parts_are_not_counted_twice(powercap):
    meter = open_meter("CPU", powercap=powercap)
    assert isinstance(meter, Rapl)
    before = meter.joules()
    count(powercap, "intel-rapl:0", 950_000)
    count(powercap, "intel-rapl:0:0", 40_000)
    count(powercap, "intel-rapl:1", 20_010)
    assert meter.joules() - before == pytest.approx(0.07)
    assert meter.name == "RAPL, 2 processor package(s), without memory and fans"


def test_rapl_counter_overflow_is_handled(powercap):
    meter = open_meter("CPU", powercap=powercap)
    assert isinstance(meter, Rapl)
    before = meter.joules()
    count(powercap, "intel-rapl:0", 100_000)
    assert meter.joules() - before == pytest.approx((RANGE_UJ + 1 - 900_000 + 100_000) / 1e6)


class Counter(Meter):
    name = "made up"

    def __init__(self, *joules: float) -> None:
        self._joules = iter(joules)

    def joules(self) -> float:
        return next(self._joules)


def test_energy_is_that_of_one_image():
    clock = iter([100.0, 102.0])
    measured = energy(lambda: 20, Counter(50.0, 110.0), clock=lambda: next(clock))
    assert measured == Energy(joules_per_image=3.0, watts=30.0, meter="made up")


def test_a_counter_that_does_not_move_is_no_zero():
    clock = iter([100.0, 102.0])
    measured = energy(lambda: 20, Counter(50.0, 50.0), clock=lambda: next(clock))
    assert measured == Missing(reason="made up: the counter did not move")


def test_failing_energy_meter_is_reported_as_missing_with_its_error(powercap):
    meter = open_meter("CPU", powercap=powercap)
    assert isinstance(meter, Rapl)
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert energy(lambda: 1, meter) == Missing(reason="the meter failed: No such file or directory")


def test_without_counters_the_reason_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert open_meter("CPU", powercap=tmp_path) == Missing(
        reason=f"this machine has no energy counters: {tmp_path} has no RAPL domain"
    )


def test_counters_that_only_root_may_read_are_named(powercap, monkeypatch):
    def refuse(_self: Rapl) -> None:
        raise PermissionError

    monkeypatch.setattr(Rapl, "_read", refuse)  # the tests may run as root, whom no mode stops
    assert open_meter("CPU", powercap=powercap) == Missing(
        reason=f"this user may not read the energy counters: {powercap / 'intel-rapl:0' / 'energy_uj'}"
    )


def test_missing_nvml_is_reported_as_missing_meter(powercap, monkeypatch):
    monkeypatch.setattr(energy_module, "NVML", "libnone.so.1")
    assert open_meter("CUDA:0", powercap=powercap) == Missing(
        reason="no NVIDIA driver is installed: there is no libnone.so.1"
    )


@pytest.mark.parametrize(
    ("line", "watts"),
    [
        ("RAM 2448/7620MB GPU@42C VDD_IN 4890mW/4756mW VDD_CPU_GPU_CV 830mW/801mW VDD_SOC 1400mW/1400mW", 4.89),
        ("RAM 1903/3964MB POM_5V_IN 2532/2532 POM_5V_GPU 0/0 POM_5V_CPU 451/451", 2.532),
        ("RAM 1903/3964MB", 0),
    ],
)
def test_the_boards_input_is_read_from_tegrastats(line, watts):
    assert input_watts(line) == pytest.approx(watts)


def test_tegrastats_is_run_and_summed_up(tmp_path, monkeypatch):
    program = tmp_path / "tegrastats"
    program.write_text("#!/bin/sh\nwhile :; do echo 'VDD_IN 5000mW/5000mW'; /bin/sleep 0.01; done\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    meter = open_meter("CUDA:0")
    assert isinstance(meter, Tegrastats)
    try:
        while meter.joules() == 0:
            pass
    finally:
        meter.close()


def test_the_meter_of_a_gpu_is_that_of_its_number(monkeypatch):
    asked = list[int]()

    def handle(number, _device):
        asked.append(number)
        return number > 1

    library = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByIndex_v2=handle,
        nvmlDeviceGetHandleByPciBusId_v2=lambda place, _device: places.append(place),
        nvmlDeviceGetTotalEnergyConsumption=lambda device, total: 0,
    )
    places = list[bytes]()
    monkeypatch.setattr(energy_module, "pci_bus_id", lambda _: None)
    monkeypatch.setattr(energy_module.ctypes, "CDLL", lambda _: library)
    meter = open_meter("GPU A", 1)
    assert isinstance(meter, Meter)
    assert meter.name == "NVML, GPU 1"
    assert open_meter("GPU A", 2) == Missing(reason="NVML finds no GPU 2")
    assert asked == [1, 2]
    monkeypatch.setattr(energy_module, "pci_bus_id", {1: "0000:41:00.0"}.get)
    meter = open_meter("GPU A", 1)
    assert isinstance(meter, Meter)
    assert meter.name == "NVML, GPU 1"
    assert (asked, places) == ([1, 2], [b"0000:41:00.0"])  # NVML counts GPUs in another order than CUDA


@pytest.mark.gpu
def test_nvml_energy_meter_reads_a_positive_value():
    meter = open_meter("CUDA:0")
    if isinstance(meter, Missing):
        pytest.skip(meter.reason)
    assert meter.joules() > 0
