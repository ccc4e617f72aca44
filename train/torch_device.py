"""The device of PyTorch that ``--device`` names."""

import torch

from medseg_trt.devices import ComputeDevice
from medseg_trt.errors import DeviceError


def torch_device(device: ComputeDevice) -> torch.device:
    """Return PyTorch's device; ``auto`` is the first GPU where PyTorch has one.

    Raises:
        DeviceError: a GPU is asked for that PyTorch does not have; the message says why.
    """
    if not device.gpu_allowed or (device.kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = torch.version.cuda  # None: for CPUs alone
        reason = f"is built for CUDA {built} and finds no GPU or driver" if built else "is built for CPUs alone"
        step = "see medseg-trt doctor" if built else "install one for CUDA, see https://pytorch.org/get-started/locally"
        raise DeviceError(f"--device {device}: PyTorch {torch.__version__} {reason}; {step}, or choose --device cpu")
    count = torch.cuda.device_count()
    if device.number >= count:
        raise DeviceError(f"--device {device}: PyTorch finds {count} GPU(s); the last one is cuda:{count - 1}")
    return torch.device("cuda", device.number)


def device_name(device: torch.device) -> str:
    """Name a device as all sessions do: ``CPU``, or ``GPU`` and the driver's name for it."""
    return f"GPU {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type.upper()
