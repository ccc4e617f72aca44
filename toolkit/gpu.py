"""Find the NVIDIA GPUs of this machine through the driver library, without any package.

PyTorch, TensorRT and ONNX Runtime ask the same library, with the same numbers and under the same
``CUDA_VISIBLE_DEVICES``.
"""

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg_trt.errors import DeviceError
from medseg_trt.progress import plural

COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
DRIVER_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU of this machine."""

    name: str
    sm: str  # "sm86"
    cuda: str  # the newest CUDA version that the driver supports, "13.0"
    driver: str | None  # None: unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedGpus:
    """What the driver lists."""

    count: int
    words: str


def listed_gpus() -> ListedGpus:
    """Return how many GPUs the driver lists; without any, the words say what is wrong."""
    driver = _driver()
    if driver is None:
        return ListedGpus(count=0, words="no NVIDIA driver is installed")
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status not in (0, NO_DEVICE):
        return ListedGpus(count=0, words=f"the NVIDIA driver does not start (CUDA error {status})")
    listed = 0 if status else count.value
    return ListedGpus(count=listed, words=f"the NVIDIA driver lists {plural(listed, 'GPU') if listed else 'no GPUs'}")


def find_gpu(number: int = 0) -> Gpu | None:
    """Return a GPU by the driver's number; None: there is no driver or no such device."""
    driver = _driver()
    if driver is None or number >= listed_gpus().count:
        return None
    device, cuda = ctypes.c_int(0), ctypes.c_int(0)
    major, minor, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(256)
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


def require_gpu(number: int = 0) -> Gpu:
    """Return a GPU by the driver's number; every command and back-end says here that there is none.

    Raises:
        DeviceError: there is none.
    """
    gpu = find_gpu(number)
    if gpu is None:
        raise DeviceError(
            f"there is no GPU cuda:{number}: {listed_gpus().words}; see medseg-trt doctor, or choose --device cpu"
        )
    return gpu


def not_enough_memory(name: str, details: str, remedy: str = "") -> DeviceError:
    """Return the error of a network or kernel that a GPU has no memory for.

    Args:
        name: of what needs it.
        details: what the library reports.
        remedy: what helps besides ending other programs.
    """
    also = f", or {remedy}" if remedy else ""
    return DeviceError(f"{name}: the GPU has not enough memory ({details}). End what else runs on it{also}")


def pci_bus_id(number: int) -> str | None:
    """Return the place of a GPU on the PCI bus, by CUDA's number; None: there is no driver or no such device.

    NVML and nvidia-smi find a GPU by it. They number GPUs in another order than CUDA, which begins with the fastest,
    and know nothing of ``CUDA_VISIBLE_DEVICES``.
    """
    driver = _driver()
    if driver is None:
        return None
    device, place = ctypes.c_int(0), ctypes.create_string_buffer(32)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), number):
        return None
    if driver.cuDeviceGetPCIBusId(place, len(place), device):
        return None
    return place.value.decode()


def _driver() -> Any | None:
    try:
        return ctypes.CDLL(DRIVER_LIBRARY)
    except OSError:
        return None


def _driver_version() -> str | None:
    if not DRIVER_FILE.is_file():
        return None
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", DRIVER_FILE.read_text(errors="replace"))
    return match[1] if match else None
