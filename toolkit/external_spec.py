"""The specification of a network that this package did not make: an ONNX file, or a class of another package."""

from dataclasses import dataclass
from typing import Literal

from medseg_trt.network_spec import NetworkSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ExternalSpec(NetworkSpec):
    """A network from elsewhere: ``architecture`` names where it is from, as in "onnx:model".

    Nothing is known of its layers, so it has no tokens that a language block could be given.
    """

    network: Literal["external"] = "external"

    def check_sizes(self) -> None:
        """Raise ValueError for an image without pixels; the network itself refuses other sizes when it is run."""
        if min(self.image_size) < 1:
            raise ValueError(f"the image is {min(self.image_size)} pixels on a side; it must be at least 1")

    def check_placement(self) -> None:
        """Raise ValueError: the network has no position for a language block."""
        raise ValueError(f"{self.architecture} has no token map that this version knows, so it can have no block")

    @property
    def token_width(self) -> int:
        """No token is known."""
        return 0

    @property
    def grid(self) -> tuple[int, int]:
        """No token is known."""
        return 0, 0

    @property
    def depth(self) -> int:
        """The file or the package decides, not the spec."""
        return 1
