"""Which network a process opens, and how; parents send it to children as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medseg_trt.devices import CPU, ComputeDevice, parse_device
from medseg_trt.sessions.pytorch_forms import EAGER


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRequest:
    """A network, and how it is to be run."""

    backend: str  # a key of ``sessions.backends.BACKENDS``, or "pytorch"
    path: Path  # the graph, the checkpoint, or for an engine the folder of its bundle
    precision: str  # of the stored weights
    compute_dtype: str  # what float parts are computed in
    threads: int | None = None  # CPU threads; None leaves it to the back-end
    device: ComputeDevice = CPU  # where PyTorch runs, and which GPU a back-end of GPUs takes
    streams: int = 1  # images beside each other, for a back-end that has streams
    form: str = EAGER  # of PyTorch, a key of ``pytorch_forms.FORMS``

    @property
    def name(self) -> str:
        """The network in messages."""
        return f"{self.backend} with {self.path.name}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {**asdict(self), "path": str(self.path), "device": str(self.device)}

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> "SessionRequest":
        """Return the request of ``to_dict``."""
        return cls(**{**fields, "path": Path(fields["path"]), "device": parse_device(fields["device"])})
