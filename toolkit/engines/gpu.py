"""Find the NVIDIA GPU of this machine through the driver library, without any package."""

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    sm: str  # "sm86"
    cuda: str  # the newest CUDA version that the driver supports, "13.0"
    driver: str | None  # None: unknown


def find_gpu(number: int = 0) -> Gpu | None:
    """Return a GPU by the driver's number; None: there is no driver or no such device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, cuda = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    major, minor, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    status_codes = [
        driver.cuDeviceGet(ctypes.byref(device), number),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDriverGetVersion(ctypes.byref(cuda)),
        *(
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            for number, attribute in zip((major, minor), COMPUTE_CAPABILITY, strict=True)
        ),
    ]
    if any(status_codes):
        return None
    return Gpu(
        name=name.value.decode(errors="replace"),
        sm=f"sm{major.value}{minor.value}",
        cuda=f"{cuda.value // 1000}.{cuda.value % 1000 // 10}",
        driver=_driver_version(),
    )


def pci_bus_id(number: int) -> str | None:
    """Return the place of a GPU on the PCI bus, by CUDA's number; None: there is no driver or no such device.

    NVML and nvidia-smi find a GPU by it. They number GPUs in another order than CUDA, which begins with the fastest,
    and know nothing of ``CUDA_VISIBLE_DEVICES``.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, place = ctypes.c_int(0), ctypes.create_string_buffer(32)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number):
        return None
    if driver.cuDeviceGetPCIBusId(place, len(place), device):
        return None
    return place.value.decode()


def _driver_version() -> str | None:
    if not DRIVER_FILE.is_file():
        return None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", DRIVER_FILE.read_text(errors="replace"))
    return match[1] if match else None
