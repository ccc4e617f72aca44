"""PTX's types as NumPy dtypes, and the shape of an opcode that only computes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES: Mapping[str, np.dtype] = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f16x2": np.dtype(np.uint32),  # two packed values, the first in the low half
    "bf16x2": np.dtype(np.uint32),
    "pred": np.dtype(bool),
    "cc": np.dtype(bool),  # the carry flag, a register that no operand names
}


@dataclass(frozen=True, slots=True)
class Operation:
    """What an opcode does: typed arrays in (one element a thread), typed arrays out.

    Attributes:
        gives: types of the results, in the order of the operands.
        takes: types of the arguments; ``cc`` is the carry flag.
        compute: the function of the arguments.
        any_width: registers may be wider than the types (cvt).
    """

    gives: tuple[str, ...]
    takes: tuple[str, ...]
    compute: Callable[..., np.ndarray | tuple[np.ndarray, ...]]
    any_width: bool = False


def unpack(pair: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the low and the high half of packed values, for example of ``f16x2`` with kind ``f16``."""
    halves = np.ascontiguousarray(pair).view(np.uint16).reshape(-1, 2)
    return tuple(np.ascontiguousarray(halves[:, part]).view(DTYPES[kind]) for part in (0, 1))  # pyright: ignore


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return 16-bit values side by side in 32 bits."""
    return np.stack([low.view(np.uint16), high.view(np.uint16)], axis=1).view(np.uint32)[:, 0]
