"""SwiGLU: ``silu(gate) · up``, from rows of ``[gate | up]``, the output of one GEMM.

Contract: ``gate / (1 + exp(-gate)) · up`` in float32, rounded once. LLaMA also rounds the SiLU to 16 bits; one
rounding is more accurate. A gate below -173 counts as -0 (in PyTorch's float32 SiLU below -88.7). Quantised formats
round once, to 8 bits (``output_formats.py``).
Sources: Shazeer 2020, "GLU Variants Improve Transformer"; meta-llama/llama ``model.py``, class ``FeedForward``.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg_trt.kernels.kernel import Array, Entry, Expected, Kernel, Scalars, Tolerance, bytes_of_shapes
from medseg_trt.kernels.output_formats import FP8_TOLERANCE, INT8_TOLERANCE, make_entries, plain, quantise

SMALLEST_GATE = -173.0
SIXTEEN_BITS = Tolerance(ulps=0.505, reason="one rounding; the float32 error before it is below 0.005 ulp")


def shapes(scalars: Scalars, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array; ``width`` is that of ``y``, half a row of ``gate_up``."""
    rows, width = scalars["rows"], scalars["width"]
    arrays = {parameter.name for parameter in entry.parameters if parameter.kind == "pointer"}
    all_shapes = {"gate_up": (rows, 2 * width), "y": (rows, width), "scales": (rows,)}
    return {name: shape for name, shape in all_shapes.items() if name in arrays}


def bytes_moved(scalars: Scalars, entry: Entry) -> int:
    """Return the minimum memory traffic in bytes: every array once."""
    return bytes_of_shapes(shapes(scalars, entry), entry)


def reference(entry: Entry, inputs: Mapping[str, Array], scalars: Scalars) -> dict[str, Expected]:
    """Return ``y`` (rows, width), and ``scales`` (rows,) for the formats with a scale per row."""
    gate, up = np.split(inputs["gate_up"].astype(np.float64), 2, axis=1)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        sigmoid = np.where(gate < SMALLEST_GATE, 0.0, 1 / (1 + np.exp(-np.maximum(gate, SMALLEST_GATE))))
        value = gate * sigmoid * up
    if entry.defines["SCALE"] != "SCALE_NONE":
        return quantise(value, np.abs(value), entry, scalars)
    return {"y": plain(value)}


KERNEL = Kernel(
    name="swiglu",
    source=Path(__file__).with_suffix(".cu"),
    entries=make_entries("swiglu", ("", "_int8", "_int8_token", "_fp8"), ("gate_up",), ("rows", "width")),
    block=(256, 1, 1),
    grid=lambda scalars: (scalars["rows"], 1, 1),
    grid_rule="(rows, 1, 1)",
    shared_bytes=0,
    shapes=shapes,
    reference=reference,
    tolerance={
        "float16": SIXTEEN_BITS,
        "bfloat16": SIXTEEN_BITS,
        "float32": Tolerance(
            ulps=8.0,
            reason="measured: 4.2 ulps at most in README.md's runs; exp(gate / 2), to 0.9, enters up to 4 times",
        ),
        "int8": INT8_TOLERANCE,
        "float8_e4m3": FP8_TOLERANCE,
    },
    bytes_moved=bytes_moved,
    onnx="SwiGLU",
)
