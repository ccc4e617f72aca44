"""One fault of a kernel: the text that it replaces, and the checks that must detect it."""

from dataclasses import dataclass

from medseg_trt.kernels import load
from medseg_trt.kernels.kernel import Kernel


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Attributes:
        entry: the entry that it is shown on.
        file: where it is.
        checks: keys of ``CHECKS``, tried in this order until one sees it.
        old: the text that is replaced; it occurs once.
        new: the text in its place.
    """

    entry: str
    file: str
    checks: tuple[str, ...]
    old: str
    new: str

    @property
    def kernel(self) -> Kernel:
        """Return the kernel that it breaks, as it ships."""
        return load(kernel_name(self.entry))


def kernel_name(entry: str) -> str:
    """Return the kernel of an entry's name, which begins with it and the type."""
    return entry.split("_float")[0].split("_bfloat")[0]
