"""What a network costs: multiply-accumulates and weight bytes, from its architecture alone."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from medseg_trt.spec import ModelSpec
from medseg_trt.train.model import build_model, count_parameters


def cost(spec: ModelSpec) -> dict[str, dict[str, int] | int]:
    """Return the parameters, the multiply-accumulates for one image, and the bytes of the weights in float32.

    Only matrix products and convolutions are counted, attention's two products included; norms, resizing and
    element-wise work are not. Nothing is allocated.
    """
    with torch.device("meta"):  # shapes without memory
        model = build_model(spec).eval()
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.zeros(1, 3, *spec.image_size))
    parameters = count_parameters(model)
    return {
        "parameters": parameters,
        "macs": counter.get_total_flops() // 2,  # PyTorch counts a multiplication and an addition as two
        "weight_bytes_fp32": 4 * parameters["total"],
    }
