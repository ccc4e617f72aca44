"""LayerNorm of the ViT with int8 output, the input of an INT8 GEMM, without a floating tensor in between.

Contract: mean, variance (the mean of the squared differences), division, weight and bias are float32, and the result is
rounded once, to 8 bits (``output_formats.py``). ``epsilon`` is added to the variance.
Source: Ba et al. 2016, "Layer Normalization"; ONNX ``LayerNormalization``-17 and ``QuantizeLinear``-21.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg_trt.kernels.kernel import (
    Array,
    Entry,
    Expected,
    Kernel,
    Scalars,
    Tolerance,
    bytes_of_shapes,
    float_from_bits,
)
from medseg_trt.kernels.output_formats import INT8_TOLERANCE, inverse_root, make_entries, quantise


def shapes(scalars: Scalars, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array: rows of ``width`` elements, one weight and one bias for each column."""
    special = {"weight": (scalars["width"],), "bias": (scalars["width"],), "scales": (scalars["rows"],)}
    arrays = (parameter.name for parameter in entry.parameters if parameter.kind == "pointer")
    return {name: special.get(name, (scalars["rows"], scalars["width"])) for name in arrays}


def bytes_moved(scalars: Scalars, entry: Entry) -> int:
    """Return the minimum memory traffic in bytes: every array once."""
    return bytes_of_shapes(shapes(scalars, entry), entry)


def reference(entry: Entry, inputs: Mapping[str, Array], scalars: Scalars) -> dict[str, Expected]:
    """Return ``y`` (rows, width) in steps, and ``scales`` (rows,) for the formats with a scale per row."""
    x, weight, bias = (inputs[name].astype(np.float64) for name in ("x", "weight", "bias"))
    with np.errstate(invalid="ignore", over="ignore"):
        mean = np.mean(x, axis=1, keepdims=True)
        variance = np.mean((x - mean) ** 2, axis=1)
        inverse = inverse_root(variance, float_from_bits(scalars["epsilon_bits"]), x.shape[1])[:, None]
        value = (x - mean) * inverse * weight + bias
        size = np.maximum(np.abs(x), np.mean(np.abs(x), axis=1, keepdims=True))  # of the terms of x - mean
        largest_term = np.maximum(size * inverse * np.abs(weight), np.abs(bias))
    return quantise(value, largest_term, entry, scalars)


KERNEL = Kernel(
    name="layernorm_quant",
    source=Path(__file__).with_suffix(".cu"),
    entries=make_entries(
        "layernorm_quant", ("_int8", "_int8_token"), ("x", "weight", "bias"), ("rows", "width", "epsilon_bits")
    ),
    block=(128, 1, 1),
    grid=lambda scalars: (scalars["rows"], 1, 1),
    grid_rule="(rows, 1, 1)",
    shared_bytes=0,
    shapes=shapes,
    reference=reference,
    tolerance={
        "int8": INT8_TOLERANCE,
        "float32": Tolerance(
            ulps=4.0, of="largest_term", reason="of a row's scale; measured: 2.9 ulps in README.md's runs"
        ),
    },
    bytes_moved=bytes_moved,
    onnx="",
)
