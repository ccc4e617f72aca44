"""Rung 0: the block as one matrix and a bias, ``u = L t + c``."""

import torch
from torch import Tensor, nn

from medseg_trt.export.compress.ridge import AffineMap, Moments, fit_ridge
from medseg_trt.export.compress.tokens import Tokens, normalised


def fit_affine(insert: nn.Module, tokens: Tokens) -> nn.Linear:
    """Fit one affine map to the block's normalised output.

    Args:
        insert: the block with its two maps.
        tokens: that enter it, by image.

    Raises:
        UsageError: there are too few tokens.
    """
    moments = Moments(tokens.shape[-1], tokens.shape[-1])
    with torch.no_grad():
        for image in tokens:
            moments.add(image, normalised(insert(image[None])[0].double()))
    return linear_of(fit_ridge(moments), tokens)


def linear_of(fitted: AffineMap, like: Tensor) -> nn.Linear:
    """Return an affine map as a layer, rounded once to the type of ``like``."""
    rows, columns = fitted.weight.shape
    layer = nn.Linear(columns, rows, device="meta")
    layer.weight = nn.Parameter(fitted.weight.to(like.dtype), requires_grad=False)
    layer.bias = nn.Parameter(fitted.bias.to(like.dtype), requires_grad=False)
    return layer
