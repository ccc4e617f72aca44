"""The ways in which PyTorch runs a checkpoint: the reference, and what anyone would try first to make it faster."""

from collections.abc import Mapping
from dataclasses import dataclass

EAGER = "eager"


@dataclass(frozen=True, kw_only=True, slots=True)
class PyTorchForm:
    """One way, besides the number format."""

    words: str  # for the description
    channels_last: bool = False
    compile_mode: str | None = None  # of torch.compile
    cuda_graph: bool = False

    @property
    def overlaps(self) -> bool:
        """Whether two runs may be underway: a CUDA graph, also one of torch.compile, has one input and one output."""
        return self.compile_mode is None and not self.cuda_graph


FORMS: Mapping[str, PyTorchForm] = {
    EAGER: PyTorchForm(words="eager"),
    "channels-last": PyTorchForm(words="eager, channels_last", channels_last=True),
    "reduce-overhead": PyTorchForm(words="torch.compile, reduce-overhead", compile_mode="reduce-overhead"),
    "max-autotune": PyTorchForm(words="torch.compile, max-autotune", compile_mode="max-autotune"),
    "cuda-graph": PyTorchForm(words="CUDA graph", cuda_graph=True),
}

FORMATS: Mapping[str, str] = {  # of the arithmetic
    "fp32": "fp32, TF32 off",
    "tf32": "fp32, TF32 on",
    "fp16": "autocast fp16",
    "bf16": "autocast bf16",
}

# (format, form) of the rows beside the reference on a GPU. The forms that save the host's time are measured in the
# format that multiplies fastest and in the one whose masks hold where that one overflows.
PEERS_ON_GPU: tuple[tuple[str, str], ...] = (
    ("tf32", EAGER),
    ("bf16", EAGER),
    ("fp16", EAGER),
    ("fp16", "channels-last"),
    ("fp16", "cuda-graph"),
    ("fp16", "reduce-overhead"),
    ("fp16", "max-autotune"),
    ("tf32", "reduce-overhead"),
)
