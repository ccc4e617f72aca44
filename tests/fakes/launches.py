"""What the tests of launches share: arrays that say they are on a GPU, and a call that is right."""

from medseg_trt.kernels import logits_to_mask
from medseg_trt.spec import Preprocessing

LOGITS_TO_MASK = logits_to_mask.KERNEL
PREPROCESSING = Preprocessing(image_size=(48, 64), std=(0.25, 0.5, 1.0), mean=(0.5, 0.25, 0.125))


class OnDevice:
    """An array that says it is on a GPU, as PyTorch's and CuPy's do; nothing is behind the address."""

    def __init__(self, shape, typestr, address=0x7000, strides=None, read_only=False):
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (address, read_only),
            "strides": strides,
            "version": 3,
        }


def ptx_of(kernel, entry, capability, cuda) -> str:
    return f"{entry.name} for sm_{capability}, CUDA {cuda[0]}.{cuda[1]}"


def mask_call(**changes):
    """Return good arguments of logits_to_mask_float16 for two pictures of 100 x 80, changed as asked."""
    scalars = logits_to_mask.scalars(PREPROCESSING, 2, 9, (100, 80))
    arrays = {
        "logits": OnDevice((2, 9, 48, 64), "<f2", 0x100000),
        "mask": OnDevice((2, 100, 80), "|u1", 0x900000),
    }
    return LOGITS_TO_MASK.entries[0], {**arrays, **changes}, scalars
