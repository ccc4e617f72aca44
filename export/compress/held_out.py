"""Measure how far a replacement is from the block, on tokens that it was not fitted to.

Two errors are needed. In many networks most of the energy of the normalised output lies in one direction that all
tokens share. There, even a constant output has a small error relative to the energy, so the error relative to the
variance about the mean token is limited too: a constant output has 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medseg_trt.export.compress.tokens import Tokens, normalised


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutError:
    """The error of a replacement's normalised output."""

    relative: float  # root of: squared error / energy of the block's output
    unexplained: float  # squared error / variance of the block's output about its mean token

    def within(self, max_relative: float, max_unexplained: float) -> bool:
        """Whether both errors are within their limits; false where one is not a number."""
        return self.relative <= max_relative and self.unexplained <= max_unexplained


def held_out_error(replacement: nn.Module, insert: nn.Module, tokens: Tokens) -> HeldOutError:
    """Compare a replacement with the block on the same tokens, image by image."""
    squared_error = energy = 0.0
    rows, total = 0, torch.zeros(tokens.shape[-1], dtype=torch.float64)
    with torch.no_grad():
        for image in tokens:
            wanted, given = (_output(module, image) for module in (insert, replacement))
            squared_error += float((wanted - given).square().sum())
            energy += float(wanted.square().sum())
            total += wanted.sum(0)
            rows += len(wanted)
    variance = energy - float(total.square().sum()) / rows
    return HeldOutError(relative=(squared_error / energy) ** 0.5, unexplained=squared_error / variance)


def _output(module: nn.Module, image: Tensor) -> Tensor:
    return normalised(module(image[None])[0].double())
