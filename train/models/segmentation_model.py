"""What every network of this package is, for the code that trains, stores and exports one."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from medseg_trt.network_spec import NetworkSpec


class SegmentationModel(nn.Module, ABC):
    """Segment a picture: pixels in, logits of the same height and width out."""

    spec: NetworkSpec
    insert: nn.Module | None  # what the tokens pass through at ``spec.insert.placement``: a language block, or nothing

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec

    @property
    def norm_after_insert(self) -> str | None:
        """The name of the LayerNorm that takes what the insert returns, and nothing else; None: there is none."""
        return None

    @abstractmethod
    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Tensor | tuple[Tensor, ...]:
        """Return the logits, (batch, classes, height, width).

        A network with deep supervision returns a tuple while it is trained: the logits, then those of auxiliary heads.

        Args:
            image: normalised pixels with 1 or 3 channels; one channel is repeated three times.
        """


def three_channels(image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Repeat the one channel of grey pictures."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def pass_pixels(
    insert: nn.Module | None, features: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch channels height width"]:
    """Send the pixels of a map through an insert as tokens, row by row."""
    if insert is None:
        return features
    tokens = insert(features.flatten(2).transpose(1, 2))
    return tokens.transpose(1, 2).unflatten(2, features.shape[2:])
