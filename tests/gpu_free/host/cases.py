"""Launches for the host build: few and small, yet every path of a kernel is taken.

Widths that are a multiple of 16 bytes and ones that are not, rows shorter than a block and longer than what its
threads keep in registers, pictures as they are and resized, padded and cropped. The first launch of a row kernel has
magnitudes 1, 1e-3 and 1e3, the second rows at the end of float16, of zeros, with an infinity and with a NaN.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from gpu_free.cases import scaled_rows
from gpu_free.host.host import Case

from medseg_trt.kernels import image_to_tensor, logits_to_mask
from medseg_trt.kernels.kernel import DTYPES, FLOAT_FORMATS, Array, Entry, Kernel, float_bits
from medseg_trt.spec import Preprocessing

EPSILON = float_bits(1e-6)
SCALE = float_bits(0.02)
ROWS = ("x", "residual", "gate_up", "qkv")  # inputs whose rows differ in magnitude


def rows_of(*shapes: tuple[int, int]) -> list[dict[str, int]]:
    return [{"rows": rows, "width": width, "epsilon_bits": EPSILON, "scale_bits": SCALE} for rows, width in shapes]


def heads_of(batch: int, tokens: int, query: int, key: int, dim: int, first: int, copied: bool) -> dict[str, int]:
    names = ("batch", "tokens", "first_position", "num_heads", "num_kv_heads", "head_dim", "copy_values")
    return dict(zip(names, (batch, tokens, first, query, key, dim, int(copied)), strict=True))


def preprocessing(
    size: tuple[int, int], resize: Literal["linear", "linear_antialias"] = "linear", spacing: float | None = None
) -> Preprocessing:
    return Preprocessing(image_size=size, resize=resize, window=(10.0, 240.0), spacing_mm=spacing)


SCALARS: Mapping[str, Sequence[Mapping[str, int]]] = {
    "rmsnorm": rows_of((3, 33), (4, 768), (1, 4093), (1, 8200)),
    "add_rmsnorm": rows_of((3, 33), (4, 768), (1, 4093), (1, 8200)),
    "layernorm_quant": rows_of((3, 33), (4, 768), (1, 1101), (1, 4104)),
    "swiglu": rows_of((3, 33), (4, 768), (1, 4093), (1, 12296)),
    "rotary": [
        heads_of(2, 3, 4, 2, 64, 7, copied=True),
        heads_of(2, 2, 3, 1, 10, 4095, copied=True),
        heads_of(1, 3, 4, 4, 64, 0, copied=False),
        heads_of(1, 1, 2, 1, 1040, 5, copied=True),  # angles in three chunks
        heads_of(1, 1, 2, 1, 530, 5, copied=True),
    ],
    "image_to_tensor": [
        image_to_tensor.scalars(preprocessing((16, 48)), (2, 16, 48, 3)),  # as it is, 16 bytes at a time
        image_to_tensor.scalars(preprocessing((5, 33)), (2, 5, 33, 1)),
        image_to_tensor.scalars(preprocessing((24, 40)), (2, 17, 29, 3)),
        image_to_tensor.scalars(preprocessing((9, 18), "linear_antialias"), (1, 40, 61, 1)),
        image_to_tensor.scalars(preprocessing((20, 24), spacing=1.5), (1, 19, 31, 3), (1.0, 1.2), (2600, 130, 4)),
    ],
    "logits_to_mask": [
        logits_to_mask.scalars(preprocessing((8, 48)), 2, 4, (8, 48)),  # as it is, 16 bytes at a time
        logits_to_mask.scalars(preprocessing((8, 48)), 2, 1, (8, 48)),
        logits_to_mask.scalars(preprocessing((7, 9)), 2, 3, (19, 33)),
        logits_to_mask.scalars(preprocessing((16, 16)), 1, 1, (11, 64)),
        logits_to_mask.scalars(preprocessing((20, 24), spacing=1.5), 1, 5, (19, 48), (1.0, 1.2)),
    ],
}


def cases(kernel: Kernel, entry: Entry, seed: int = 0) -> list[Case]:
    """Return the launches of one entry with generated inputs."""
    rng = np.random.default_rng(seed)
    named = {parameter.name for parameter in entry.parameters}
    launches = enumerate(SCALARS[kernel.name])
    used = [(index, {name: value for name, value in scalars.items() if name in named}) for index, scalars in launches]
    return [case(kernel, entry, scalars, rng, 3 if index == 1 else 0) for index, scalars in used]


def case(
    kernel: Kernel, entry: Entry, scalars: Mapping[str, int], rng: np.random.Generator, first_scale: int = 0
) -> Case:
    """Return one launch: floats are normal, rows as in ``gpu_free.cases``, integers uniform over their type."""
    shapes = kernel.shapes(scalars, entry)
    inputs: dict[str, Array] = {}
    for parameter in entry.parameters:
        if parameter.kind == "pointer" and parameter.direction == "in":
            dtype, shape = DTYPES[parameter.dtype], shapes[parameter.name]
            if parameter.name in ROWS:
                rows = scaled_rows(rng, (math.prod(shape[:-1]), shape[-1]), parameter.dtype, first_scale)
                inputs[parameter.name] = rows.reshape(shape)
            elif parameter.dtype in FLOAT_FORMATS:
                inputs[parameter.name] = rng.normal(size=shape).astype(dtype)
            else:
                limits = np.iinfo(dtype)
                inputs[parameter.name] = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    return Case(inputs=inputs, scalars=scalars)
