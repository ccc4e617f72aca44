"""The values of ``--device``: where a command computes."""

import re
from dataclasses import dataclass
from typing import Literal

from medseg_trt.errors import UsageError

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
