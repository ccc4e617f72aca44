"""The device of PyTorch that ``--device`` names."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from medseg_trt.devices import ComputeDevice, require_device
from medseg_trt.errors import DeviceError
from medseg_trt.gpu import not_enough_memory, require_gpu

SENTENCES = 3  # of PyTorch's message: what it tried to allocate, and how much is free


def torch_device(device: ComputeDevice) -> torch.device:
    """Return PyTorch's device; ``auto`` is the first GPU where PyTorch has one.

    Raises:
        DeviceError: a GPU is asked for that PyTorch does not have; the message says why.
    """
    if not device.gpu_allowed or (device.kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        require_device(device, pytorch=True)  # says what is missing
        raise DeviceError(
            f"--device {device}: PyTorch {torch.__version__}, built for CUDA {torch.version.cuda}, does not start on "
            f"{require_gpu(device.number).name}: its driver may be too old for it; see medseg-trt doctor, or choose "
            "--device cpu"
        )
    count = torch.cuda.device_count()
    if device.number >= count:
        raise DeviceError(f"--device {device}: PyTorch finds {count} GPU(s); the last one is cuda:{count - 1}")
    return torch.device("cuda", device.number)


def device_name(device: torch.device) -> str:
    """Name a device as all sessions do: ``CPU``, or ``GPU`` and the driver's name for it."""
    return f"GPU {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type.upper()


@contextmanager
def memory_errors(name: str, remedy: str = "") -> Generator[None, None, None]:
    """Turn PyTorch's error of a GPU without free memory, which is a paragraph, into one line.

    Raises:
        DeviceError: there is too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        details = ". ".join(" ".join(str(error).split()).rstrip(".").split(". ")[:SENTENCES])
        raise not_enough_memory(name, details, remedy) from error
