"""RMSNorm: every row divided by its root mean square, then scaled by a weight.

Contract of the floating formats, with LLaMA's order of roundings: the mean of the squares, the addition of ``epsilon``
to it (not to the root) and the division are float32; the quotient is rounded to the inputs' type and multiplied by the
weight, and the product is rounded again. Quantised formats round once, to 8 bits (``output_formats.py``). A row whose
sum of squares overflows float32 becomes 0.
Sources: Zhang & Sennrich 2019, eq. 4; meta-llama/llama ``model.py``, class ``RMSNorm``; ONNX ``RMSNormalization``-23.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg_trt.kernels.kernel import (
    Array,
    Entry,
    Expected,
    Floats,
    Kernel,
    Scalars,
    Tolerance,
    bytes_of_shapes,
    float_from_bits,
    rounded,
)
from medseg_trt.kernels.output_formats import FP8_TOLERANCE, INT8_TOLERANCE, inverse_root, make_entries, plain, quantise

# Relative, of float32, in rows of up to 8192. A square passes 22 roundings of 2**-24 in the sum: 8 in its chain, 2
# between chains, 5 in the warp, 7 between warps. The mean and epsilon add 2; the root halves all, and 3 follow: root,
# reciprocal and product. That is 15 * 2**-24; the limit is 16 * 2**-24. Measured: at most 4e-7, see README.md.
QUOTIENT_ERROR = 2.0**-20
SIXTEEN_BITS = Tolerance(ulps=0.505, reason="the last rounding; the first one is slack where it is at a tie")
TOLERANCE: Mapping[str, Tolerance] = {
    "float16": SIXTEEN_BITS,
    "bfloat16": SIXTEEN_BITS,
    "float32": Tolerance(
        ulps=8.0,
        reason="measured: 3.4 ulps at most in README.md's runs; 16 roundings can add up to 16 ulps",
    ),
    "int8": INT8_TOLERANCE,
    "float8_e4m3": FP8_TOLERANCE,
}


def shapes(scalars: Scalars, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array: rows of ``width`` elements, and one weight per column."""
    special = {"weight": (scalars["width"],), "scales": (scalars["rows"],)}
    arrays = (parameter.name for parameter in entry.parameters if parameter.kind == "pointer")
    return {name: special.get(name, (scalars["rows"], scalars["width"])) for name in arrays}


def bytes_moved(scalars: Scalars, entry: Entry) -> int:
    """Return the minimum memory traffic in bytes: every array once."""
    return bytes_of_shapes(shapes(scalars, entry), entry)


def reference(entry: Entry, inputs: Mapping[str, Array], scalars: Scalars) -> dict[str, Expected]:
    """Return ``y`` (rows, width), and ``scales`` (rows,) for the formats with a scale per row."""
    return normalised(inputs["x"].astype(np.float64), inputs["weight"].astype(np.float64), entry, scalars)


def normalised(x: Floats, weight: Floats, entry: Entry, scalars: Scalars) -> dict[str, Expected]:
    """Normalise rows whose values are exact in the entry's type; see ``reference``."""
    with np.errstate(invalid="ignore", over="ignore"):
        inverse = inverse_root(np.mean(x * x, axis=1), float_from_bits(scalars["epsilon_bits"]), x.shape[1])
        quotient = x * inverse[:, None]
        if entry.defines["SCALE"] != "SCALE_NONE":
            return quantise(quotient * weight, np.abs(quotient * weight), entry, scalars)
        if entry.dtype == "float32":
            return {"y": plain(quotient * weight)}
        first = rounded(quotient, entry.dtype).astype(np.float64)
        others = [
            rounded(quotient * factor, entry.dtype).astype(np.float64)
            for factor in (1 - QUOTIENT_ERROR, 1 + QUOTIENT_ERROR)
        ]
        slack = np.nan_to_num(np.maximum(*(np.abs(other - first) for other in others)) * np.abs(weight))
        value = first * weight
        return {"y": Expected(value=value, largest_term=np.abs(value), slack=slack)}


KERNEL = Kernel(
    name="rmsnorm",
    source=Path(__file__).with_suffix(".cu"),
    entries=make_entries(
        "rmsnorm", ("", "_int8", "_int8_token", "_fp8"), ("x", "weight"), ("rows", "width", "epsilon_bits")
    ),
    block=(256, 1, 1),
    grid=lambda scalars: (scalars["rows"], 1, 1),
    grid_rule="(rows, 1, 1)",
    shared_bytes=0,
    shapes=shapes,
    reference=reference,
    tolerance=TOLERANCE,
    bytes_moved=bytes_moved,
    onnx="RMSNorm",
)
