"""The values of ``--device``: where a command computes."""

import re
from dataclasses import dataclass
from typing import Literal

from medseg_trt.errors import DeviceError, UsageError
from medseg_trt.gpu import require_gpu
from medseg_trt.pytorch_build import INSTALL, pytorch_build

FORM = re.compile(r"(?P<kind>auto|cpu|cuda)(?::(?P<number>\d{1,3}))?")
DEVICE_HELP = "cpu, cuda or cuda:1, a GPU by its number; auto: the GPU where there is one."


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A processor, a GPU by its number, or the choice between them."""

    kind: Literal["auto", "cpu", "cuda"]
    number: int = 0  # of the GPU, as the driver counts them

    def __str__(self) -> str:
        return f"cuda:{self.number}" if self.kind == "cuda" else self.kind

    @property
    def gpu_allowed(self) -> bool:
        """Whether a GPU may be used."""
        return self.kind != "cpu"


AUTO, CPU = ComputeDevice("auto"), ComputeDevice("cpu")


def parse_device(text: str) -> ComputeDevice:
    """Read a value of ``--device``.

    Raises:
        UsageError: it is none.
    """
    match = FORM.fullmatch(text.strip().lower())
    if match is None or (match["number"] is not None and match["kind"] != "cuda"):
        raise UsageError(f"--device {text!r} is no device; write auto, cpu, cuda or cuda:1")
    kinds: dict[str, ComputeDevice] = {"auto": AUTO, "cpu": CPU}
    return kinds.get(match["kind"]) or ComputeDevice("cuda", int(match["number"] or 0))


def require_device(device: ComputeDevice, *, pytorch: bool = False) -> None:
    """Refuse a GPU that was asked for and is not there: within milliseconds, before anything is imported or read.

    Args:
        device: what was asked for; ``auto`` and ``cpu`` are always there.
        pytorch: whether PyTorch is to compute on it.

    Raises:
        DeviceError: the driver does not list the GPU, or PyTorch is built without CUDA.
    """
    if device.kind != "cuda":
        return
    require_gpu(device.number)
    build = pytorch_build() if pytorch else None
    if build is not None and build.cuda is None:
        raise DeviceError(
            f"--device {device}: PyTorch {build.version} is built without CUDA; {INSTALL}, or choose --device cpu"
        )
