"""What a network costs: multiply-accumulates and weight bytes, from its architecture alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from medseg_trt.network_spec import NetworkSpec
from medseg_trt.train.models.model import build_model, count_parameters


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a network costs."""

    parameters: Mapping[str, int]  # total, trainable, frozen
    macs: int  # multiply-accumulates for one image
    weight_bytes_fp32: int


def cost(spec: NetworkSpec) -> Cost:
    """Count what an architecture costs.

    Only matrix products and convolutions are counted, attention's two products included; norms, resizing and
    element-wise work are not. Nothing is allocated.
    """
    with torch.device("meta"):  # shapes without memory
        model = build_model(spec).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.zeros(1, 3, *spec.image_size))
    parameters = count_parameters(model)
    return Cost(
        parameters=parameters,
        macs=counter.get_total_flops() // 2,  # PyTorch counts a multiplication and an addition as two
        weight_bytes_fp32=4 * parameters["total"],
    )
