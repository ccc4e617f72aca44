"""CUDA kernels: ``NAME.cu`` is the code, ``NAME.py`` the reference and declaration; ``KERNELS`` lists them by name."""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medseg_trt.kernels.kernel import Kernel

KERNELS: Mapping[str, str] = {
    "rmsnorm": "medseg_trt.kernels.rmsnorm",
    "add_rmsnorm": "medseg_trt.kernels.add_rmsnorm",
    "rotary": "medseg_trt.kernels.rotary",
    "swiglu": "medseg_trt.kernels.swiglu",
    "layernorm_quant": "medseg_trt.kernels.layernorm_quant",
    "image_to_tensor": "medseg_trt.kernels.image_to_tensor",
    "logits_to_mask": "medseg_trt.kernels.logits_to_mask",
}


def load(name: str) -> "Kernel":
    """Import a kernel's declaration.

    Raises:
        UsageError: no kernel has this name; the message lists the names.
    """
    if name not in KERNELS:
        from medseg_trt.errors import UsageError

        raise UsageError(f"there is no kernel {name!r}; choose one of: {', '.join(KERNELS)}")
    kernel: Kernel = importlib.import_module(KERNELS[name]).KERNEL
    return kernel
