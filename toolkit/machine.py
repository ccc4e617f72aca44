"""Describe the properties of this machine that affect measurements."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "medseg-trt",
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
)
CONTROL_GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """The machine of a measurement."""

    processor: str
    cores: int  # that this process may use
    memory_mb: float | None
    system: str
    python: str
    governor: str | None  # of the processor's clock; None: unknown
    load: float | None  # load average of the last minute
    gpus: tuple[str, ...] = ()

    __pydantic_config__ = {"extra": "forbid"}


def this_machine() -> Machine:
    """Describe the machine that this process runs on."""
    return Machine(
        processor=_processor(),
        cores=cores(),
        memory_mb=_memory_mb(),
        system=platform.platform(terse=True),
        python=platform.python_version(),
        governor=_text(GOVERNOR),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        gpus=_gpus(),
    )


def cores() -> int:
    """Return the number of processors that this process may use: by its affinity, and by its container's quota."""
    return cpu_quota() or _affinity()


def cpu_quota() -> int | None:
    """Return how many processors' time this process gets, rounded up, by container or service.

    None: there is no limit, or it is no lower than the number of processors that the process may run on.

    Source: the kernel's documentation of control groups: ``cpu.max`` of version 2, ``cpu.cfs_quota_us`` of version 1.
    """
    lines = (_text(OWN_GROUP) or "").splitlines()
    own = CONTROL_GROUPS / next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folders = [folder for folder in (own, *own.parents) if folder.is_relative_to(CONTROL_GROUPS)]
    first_version = [_text(CONTROL_GROUPS / "cpu" / name) or "" for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]
    values = [
        text.split() for text in (*(_text(folder / "cpu.max") or "" for folder in folders), " ".join(first_version))
    ]
    quotas = [
        max(-(-int(pair[0]) // int(pair[1])), 1)
        for pair in values
        if len(pair) == 2 and all(value.isdecimal() for value in pair) and int(pair[1])  # "max" and -1 are no limit
    ]
    return min((quota for quota in quotas if quota < _affinity()), default=None)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that measurements depend on."""
    return {name: number for name in PACKAGES if (number := _version(name)) is not None}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_mb() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def _gpus() -> tuple[str, ...]:
    """Return name, driver, throttle reasons and power limit of each GPU, as nvidia-smi reports them."""
    query = "--query-gpu=name,driver_version,clocks_throttle_reasons.active,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
