"""RMSNorm of a residual sum: ``sum = x + residual`` and its RMSNorm, in one pass over memory.

Contract: the sum is rounded to the inputs' type and written to an output of its own; the rounded sum is normalised, as
in a graph where the sum is a tensor. The rest of the contract is that of ``rmsnorm.py``.
Sources: as ``rmsnorm.py``; Hugging Face ``modeling_llama.py``, class ``LlamaDecoderLayer``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg_trt.kernels.kernel import Array, Entry, Expected, Kernel, Scalars, rounded
from medseg_trt.kernels.output_formats import make_entries, plain
from medseg_trt.kernels.rmsnorm import TOLERANCE, bytes_moved, normalised, shapes


def reference(entry: Entry, inputs: Mapping[str, Array], scalars: Scalars) -> dict[str, Expected]:
    """Return ``sum`` and ``y`` (rows, width), and ``scales`` (rows,) for the formats with a scale per row."""
    with np.errstate(invalid="ignore"):
        total = inputs["x"].astype(np.float64) + inputs["residual"].astype(np.float64)
    exact = rounded(total, entry.dtype).astype(np.float64)
    outputs = normalised(exact, inputs["weight"].astype(np.float64), entry, scalars)
    return {**outputs, "sum": plain(total)}


KERNEL = Kernel(
    name="add_rmsnorm",
    source=Path(__file__).with_suffix(".cu"),
    entries=make_entries(
        "add_rmsnorm",
        ("", "_int8", "_int8_token", "_fp8"),
        ("x", "residual", "weight"),
        ("rows", "width", "epsilon_bits"),
        extra=("sum",),
    ),
    block=(256, 1, 1),
    grid=lambda scalars: (scalars["rows"], 1, 1),
    grid_rule="(rows, 1, 1)",
    shared_bytes=0,
    shapes=shapes,
    reference=reference,
    tolerance=TOLERANCE,
    bytes_moved=bytes_moved,
    onnx="AddRMSNorm",
)
