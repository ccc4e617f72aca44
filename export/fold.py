"""Replace layers by cheaper ones that compute the same function, before the network is traced.

Every rule puts new layers in the place of old ones and says how many places it found; it changes no tensor in place.
New weights are computed in float64 and rounded once, to the type that the old ones had.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks …", §3.2, for BatchNorm.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from medseg_trt.train.transunet import ConvNormReLU, StdConv2d

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")  # of a Conv2d
Layer = TypeVar("Layer", bound=nn.Module)
Network = TypeVar("Network", bound=nn.Module)


def fold(model: Network) -> tuple[Network, dict[str, int]]:
    """Apply every rule of ``RULES`` to a copy of ``model``, in evaluation mode.

    The copy shares the tensors that no rule replaces, so that a large frozen block is not in memory twice.

    Returns:
        The copy, and how many places each rule changed.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    folded = copy.deepcopy(model, shared).eval()
    return folded, {name: rule(folded) for name, rule in RULES.items()}


def fold_standardisation(model: nn.Module) -> int:
    """Replace every StdConv2d by a plain convolution with the standardised kernel."""
    places = list(_places(model, StdConv2d))
    for parent, name, layer in places:
        setattr(parent, name, _convolution(layer, copy.deepcopy(layer).double().standardised(), layer.bias))
    return len(places)


def fold_batch_norm(model: nn.Module) -> int:
    """Scale the kernel before every BatchNorm, and turn the rest of the BatchNorm into the convolution's bias."""
    places = list(_places(model, ConvNormReLU))
    for parent, name, layer in places:
        convolution, norm, relu = cast("tuple[nn.Conv2d, nn.BatchNorm2d, nn.ReLU]", tuple(layer))
        assert norm.running_mean is not None  # ConvNormReLU keeps statistics
        assert norm.running_var is not None
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        kernel = convolution.weight.double() * scale[:, None, None, None]
        bias = norm.bias.double() - norm.running_mean.double() * scale
        setattr(parent, name, nn.Sequential(_convolution(convolution, kernel, bias), relu))
    return len(places)


RULES: Mapping[str, Callable[[nn.Module], int]] = {
    "standardised_convolutions": fold_standardisation,
    "batch_norms": fold_batch_norm,
}


def _places(model: nn.Module, kind: type[Layer]) -> Iterator[tuple[nn.Module, str, Layer]]:
    """Yield (parent, attribute, layer) for every layer of one class."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, kind):
                yield parent, name, layer


def _convolution(like: nn.Conv2d, kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a plain convolution with the geometry and the type of ``like``."""
    geometry: dict[str, Any] = {name: getattr(like, name) for name in GEOMETRY}
    plain = nn.Conv2d(**geometry, device="meta")
    plain.weight = _constant(kernel, like.weight)
    plain.bias = None if bias is None else _constant(bias, like.weight)
    return plain


def _constant(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().to(like.dtype), requires_grad=False)
