"""Read the energy meters of a machine: RAPL of Intel and AMD, NVML of NVIDIA GPUs, Jetson's tegrastats.

A meter covers all processes: measure on an idle machine.
"""

import ctypes
import re
import shutil
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_trt.bench.missing import Missing
from medseg_trt.bench.timing_schema import Energy
from medseg_trt.gpu import pci_bus_id

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
TEGRASTATS_MS = 100
TEGRASTATS_INPUT = re.compile(r"\b(?:VDD_IN|POM_5V_IN|VIN_SYS_5V0|VDD_GPU_SOC)\s+(\d+)(?:mW)?/")  # milliwatts, now/mean


class Meter(ABC):
    """An energy meter."""

    name: str  # and what it covers

    @abstractmethod
    def joules(self) -> float:
        """Return the energy since an arbitrary time; only differences are meaningful."""

    def close(self) -> None:  # noqa: B027  # most meters hold no resources
        """Stop counting."""


@dataclass
class Rapl(Meter):
    """The packages' counters in ``/sys/class/powercap``, which wrap around."""

    domains: tuple[Path, ...]

    def __post_init__(self) -> None:
        self.name = f"RAPL, {len(self.domains)} processor package(s), without memory and fans"
        self._ranges = [int((domain / "max_energy_range_uj").read_text()) for domain in self.domains]
        self._last, self._total = self._read(), 0

    def joules(self) -> float:
        """Return the energy of all packages since the meter was opened; call it at least once per wrap-around."""
        now = self._read()
        steps = zip(now, self._last, self._ranges, strict=True)
        self._total += sum((new - old) % (limit + 1) for new, old, limit in steps)
        self._last = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [int((domain / "energy_uj").read_text()) for domain in self.domains]


@dataclass
class Nvml(Meter):
    """The total energy counter of a GPU, in millijoules since the driver was loaded."""

    library: Any
    device: ctypes.c_void_p
    number: int  # of the GPU, as CUDA counts them

    def __post_init__(self) -> None:
        self.name = f"NVML, GPU {self.number}"

    def joules(self) -> float:
        """Return the energy of the GPU."""
        total = ctypes.c_ulonglong()
        if self.library.nvmlDeviceGetTotalEnergyConsumption(self.device, ctypes.byref(total)):
            raise OSError("NVML stopped counting")
        return total.value / 1e3


class Tegrastats(Meter):
    """The board's input power, sampled ten times per second and integrated."""

    name = "tegrastats, the whole board"

    def __init__(self, command: str) -> None:
        self._joules = 0.0
        self._process = subprocess.Popen(
            [command, "--interval", str(TEGRASTATS_MS)], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._counting = threading.Thread(target=self._count, daemon=True)
        self._counting.start()

    def joules(self) -> float:
        """Return the energy of the board since the meter was opened."""
        return self._joules

    def close(self) -> None:
        """Stop tegrastats."""
        self._process.kill()
        self._counting.join()
        self._process.communicate()

    def _count(self) -> None:
        assert self._process.stdout is not None
        last = time.monotonic()
        for line in self._process.stdout:
            now = time.monotonic()
            self._joules += input_watts(line) * (now - last)
            last = now


def input_watts(line: str) -> float:
    """Return the input power in a line of tegrastats, or 0."""
    return sum(int(milliwatts) for milliwatts in TEGRASTATS_INPUT.findall(line)) / 1000


def open_meter(device: str, number: int = 0, powercap: Path = POWERCAP) -> Meter | Missing:
    """Open the meter for a device, for a GPU the one of its number, or return the reason why there is none."""
    if command := shutil.which("tegrastats"):
        return Tegrastats(command)
    return _rapl(powercap) if device.upper().startswith("CPU") else _nvml(number)


def energy(run: Callable[[], int], meter: Meter, clock: Callable[[], float] = time.perf_counter) -> Energy | Missing:
    """Measure the energy of ``run``, which returns its number of images."""
    try:
        began, before = clock(), meter.joules()
        images = run()
        joules, seconds = meter.joules() - before, clock() - began
    except OSError as error:
        return Missing(reason=f"the meter failed: {error.strerror or error}")
    if joules <= 0 or seconds <= 0:
        return Missing(reason=f"{meter.name}: the counter did not move")
    return Energy(joules_per_image=joules / images, watts=joules / seconds, meter=meter.name)


def _rapl(powercap: Path) -> Meter | Missing:
    domains = sorted(path for path in powercap.glob("*-rapl:*") if path.name.count(":") == 1)
    if not domains:
        return Missing(reason=f"this machine has no energy counters: {powercap} has no RAPL domain")
    try:
        return Rapl(tuple(domains))
    except PermissionError:
        return Missing(reason=f"this user may not read the energy counters: {domains[0] / 'energy_uj'}")
    except (OSError, ValueError) as error:
        return Missing(reason=f"the energy counters cannot be read: {error}")


def _nvml(number: int) -> Meter | Missing:
    try:
        library = ctypes.CDLL(NVML)
    except OSError:
        return Missing(reason=f"no NVIDIA driver is installed: there is no {NVML}")
    device, total = ctypes.c_void_p(), ctypes.c_ulonglong()
    place = pci_bus_id(number)
    by_place, by_index = library.nvmlDeviceGetHandleByPciBusId_v2, library.nvmlDeviceGetHandleByIndex_v2
    find, name = (by_index, number) if place is None else (by_place, place.encode())
    if library.nvmlInit_v2() or find(name, ctypes.byref(device)):
        return Missing(reason=f"NVML finds no GPU {number}")
    if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(total)):
        return Missing(reason="this GPU has no energy counter")
    return Nvml(library, device, number)
