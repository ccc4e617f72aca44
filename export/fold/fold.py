"""Replace layers by cheaper ones that compute the same function, before the network is traced.

Every rule replaces layers and reports how many, or why none; it changes no tensor in place. New weights are computed in
float64 and rounded once, to the type of the old ones.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks …", §3.2, for BatchNorm.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from medseg_trt.export.fold.fold_rule import FoldResult, constant, counted, layers_of_type, stacked
from medseg_trt.export.fold.language import (
    cancel_final_norm,
    fold_mapper1,
    fold_mapper2,
    merge_language_projections,
    tabulate_rotary,
    use_single_node_norms,
)
from medseg_trt.export.fold.layers import Attend, TabulatedWindowAttention
from medseg_trt.spec import to_dict
from medseg_trt.train.models.segmentation_model import SegmentationModel
from medseg_trt.train.models.swin import WindowAttention
from medseg_trt.train.models.transunet import Attention, StdConv2d

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")  # of a Conv2d


def fold(model: SegmentationModel) -> tuple[SegmentationModel, dict[str, FoldResult]]:
    """Apply every rule of ``RULES`` to a copy of ``model``, in evaluation mode.

    The copy shares the tensors that no rule replaces, so that a large frozen block is not in memory twice.

    Returns:
        The copy, and the result of each rule.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    folded = copy.deepcopy(model, shared).eval()
    with torch.no_grad():  # else float64 products would be kept for a backward pass
        return folded, {name: rule(folded) for name, rule in RULES.items()}


def plain_report(report: Mapping[str, FoldResult]) -> dict[str, dict[str, Any]]:
    """Return the result of each rule as JSON data: ``{"count": 1, "reason": ""}``."""
    return {name: to_dict(result) for name, result in report.items()}


def fold_standardisation(model: nn.Module) -> FoldResult:
    """Replace every StdConv2d by a plain convolution with the standardised kernel."""
    replaced = layers_of_type(model, StdConv2d)
    for parent, name, layer in replaced:
        setattr(parent, name, _convolution(layer, copy.deepcopy(layer).double().standardised(), layer.bias))
    return counted(len(replaced), "no convolution is standardised")


def fold_batch_norm(model: nn.Module) -> FoldResult:
    """Fold every BatchNorm into the kernel and the bias of the convolution before it."""
    count = 0
    for parent, name, layers in layers_of_type(model, nn.Sequential):
        if type(layers).forward is not nn.Sequential.forward:
            continue  # a class of another package may call its layers in its own way
        kept: list[nn.Module] = []
        for layer in layers:
            before = kept[-1] if kept else None
            if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                kept[-1] = _with_norm(before, layer)
            else:
                kept.append(layer)
        if len(kept) < len(layers):
            count += len(layers) - len(kept)
            setattr(parent, name, nn.Sequential(*kept))
    return counted(count, "no convolution is followed by a BatchNorm")


def _with_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    assert norm.running_mean is not None  # the networks' norms keep statistics
    assert norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    old_bias = 0 if convolution.bias is None else convolution.bias.double()
    bias = norm.bias.double() + (old_bias - norm.running_mean.double()) * scale
    return _convolution(convolution, convolution.weight.double() * scale[:, None, None, None], bias)


def tabulate_window_biases(model: nn.Module) -> FoldResult:
    """Compute once what windowed attention adds to its scores: relative positions and the mask of shifted windows."""
    replaced = layers_of_type(model, WindowAttention)
    for parent, name, layer in replaced:
        setattr(parent, name, TabulatedWindowAttention(layer))
    return counted(len(replaced), "the network has no windowed attention")


def merge_transformer_projections(model: nn.Module) -> FoldResult:
    """Merge the query, key and value projections of every transformer layer into one product."""
    replaced = layers_of_type(model, Attention)
    for parent, name, layer in replaced:
        stages = {
            "qkv": stacked(layer.query, layer.key, layer.value),
            "attend": Attend(layer.num_heads, layer.num_heads),
            "out": layer.out,
        }
        setattr(parent, name, nn.Sequential(OrderedDict(stages)))
    return counted(len(replaced), "the network has no transformer layer")


RULES: Mapping[
    str, Callable[[SegmentationModel], FoldResult]
] = {  # in this order: rules use the output of those before them
    "standardised_convolutions": fold_standardisation,
    "batch_norms": fold_batch_norm,
    "transformer_projections": merge_transformer_projections,
    "window_biases": tabulate_window_biases,
    "language_projections": merge_language_projections,
    "mapper1": fold_mapper1,
    "final_norm": cancel_final_norm,
    "mapper2": fold_mapper2,
    "rotary_tables": tabulate_rotary,
    "norm_weights": use_single_node_norms,
}


def _convolution(like: nn.Conv2d, kernel: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """Return a plain convolution with the geometry and the type of ``like``."""
    geometry: dict[str, Any] = {name: getattr(like, name) for name in GEOMETRY}
    plain = nn.Conv2d(**geometry, device="meta")
    plain.weight = constant(kernel, like.weight)
    plain.bias = None if bias is None else constant(bias, like.weight)
    return plain
