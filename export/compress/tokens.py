"""Collect the tokens that enter the block on calibration images, and what the block makes of them.

The LayerNorm after the block cancels the scale of a token, so the block's output is compared after that division:
``u = (y - mean(y)) / std(y)``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from numpy import ndarray
from torch import Tensor, nn

from medseg_trt.train.models.segmentation_model import SegmentationModel

Tokens = Float[Tensor, "_ tokens hidden"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTokens:
    """The tokens that enter the block, by image."""

    fitted: Tokens  # replacements are fitted to these
    held_out: Tokens  # their error is measured on these; every image differs from the fitted ones

    @property
    def count(self) -> int:
        """How many tokens replacements are fitted to."""
        return self.fitted.shape[0] * self.fitted.shape[1]

    @property
    def held_out_count(self) -> int:
        """How many tokens the error is measured on."""
        return self.held_out.shape[0] * self.held_out.shape[1]


class _ReachedBlockError(Exception):
    """Ends a forward pass where the block begins; what follows is not needed."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def tokens_before_block(network: SegmentationModel, images: Float32[ndarray, "images 3 height width"]) -> Tokens:
    """Return the tokens that enter ``network.insert``, image by image."""
    return torch.cat([_tokens_of(network, torch.from_numpy(image[None])) for image in images])


def normalised(tokens: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch hidden"]:
    """Return tokens without their mean and scale, as the LayerNorm after the block computes them."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=torch.finfo(tokens.dtype).tiny)


def _tokens_of(network: SegmentationModel, image: Tensor) -> Tensor:
    with torch.no_grad(), _stopped_at(network.insert):
        try:
            network(image)
        except _ReachedBlockError as reached:
            return reached.tokens
    raise AssertionError("a TransUNet with a block calls it")


@contextmanager
def _stopped_at(module: nn.Module | None) -> Iterator[None]:
    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        raise _ReachedBlockError(inputs[0])

    assert module is not None  # ``rungs.replaceable_block`` requires a block
    handle = module.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()
