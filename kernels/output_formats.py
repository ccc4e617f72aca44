"""The output formats of a kernel: the inputs' own type, or 8 bits, quantised while the result is in registers.

A quantised format rounds once: the float32 result is divided by the scale, rounded to the nearest, ties to even, and
saturated, as in ONNX's QuantizeLinear. NaN becomes the integer 0, and stays NaN in float8.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from medseg_trt.kernels.kernel import (
    C_TYPES,
    Entry,
    Expected,
    Floats,
    Parameter,
    Scalars,
    Tolerance,
    float_from_bits,
    pointer,
    scalar,
)

FLOAT32_MAX = (2.0**24 - 1) * 2.0**104
TINY, SUBNORMAL_ERROR = 2.0**-126, 2.0**-150  # of float32: the smallest normal number, half a step below it


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputFormat:
    """The type of an output, and the source of its scale."""

    dtype: str  # of the output; "" is the inputs' own
    c_type: str
    scale: str  # SCALE_NONE; SCALE_TENSOR: an argument; SCALE_TOKEN: per row, an output: largest magnitude / 127
    min_arch: int = 80
    defines: tuple[tuple[str, str], ...] = ()


OUTPUT_FORMATS: Mapping[str, OutputFormat] = {
    "": OutputFormat(dtype="", c_type="SCALAR", scale="SCALE_NONE"),
    "_int8": OutputFormat(dtype="int8", c_type="int8", scale="SCALE_TENSOR"),
    "_int8_token": OutputFormat(dtype="int8", c_type="int8", scale="SCALE_TOKEN"),
    "_fp8": OutputFormat(
        dtype="float8_e4m3", c_type="__nv_fp8_e4m3", scale="SCALE_TENSOR", min_arch=89, defines=(("WITH_FP8", "1"),)
    ),
}
INT8_TOLERANCE = Tolerance(
    ulps=0.5,
    tie=1e-5,
    reason="one rounding to the nearest step; the float32 error before it is below 1e-5 of the largest term",
)
FP8_TOLERANCE = Tolerance(ulps=0.505, reason="one rounding; the float32 error before it is below 0.005 ulp")


def make_entries(
    kernel: str,
    formats: tuple[str, ...],
    inputs: tuple[str, ...],
    scalars: tuple[str, ...],
    extra: tuple[str, ...] = (),
) -> tuple[Entry, ...]:
    """Return an entry for every floating type and output format.

    Args:
        kernel: its name.
        formats: keys of ``OUTPUT_FORMATS``.
        inputs: names of the input arrays, all of the floating type.
        scalars: names of the int32 arguments; ``scale_bits`` is added where a format needs it.
        extra: names of output arrays of the floating type, after ``y`` and ``scales``.
    """
    return tuple(_entry(kernel, dtype, suffix, inputs, scalars, extra) for dtype in C_TYPES for suffix in formats)


def _entry(
    kernel: str, dtype: str, suffix: str, inputs: tuple[str, ...], scalars: tuple[str, ...], extra: tuple[str, ...]
) -> Entry:
    output_format = OUTPUT_FORMATS[suffix]
    name = f"{kernel}_{dtype}{suffix}"
    parameters: list[Parameter] = [pointer(array, dtype) for array in inputs]
    parameters += [scalar(number) for number in scalars]
    parameters += [scalar("scale_bits")] if output_format.scale == "SCALE_TENSOR" else []
    parameters += [pointer("y", output_format.dtype or dtype, "out")]
    parameters += [pointer("scales", "float32", "out")] if output_format.scale == "SCALE_TOKEN" else []
    parameters += [pointer(array, dtype, "out") for array in extra]
    defines = {
        "ENTRY": f"medseg_{name}",
        "SCALAR": C_TYPES[dtype],
        "OUTPUT": output_format.c_type,
        "SCALE": output_format.scale,
    }
    return Entry(
        name=name,
        dtype=dtype,
        defines={**defines, **dict(output_format.defines)},
        parameters=tuple(parameters),
        min_arch=output_format.min_arch,
    )


def quantise(value: Floats, largest_term: Floats, entry: Entry, scalars: Scalars) -> dict[str, Expected]:
    """Return the expected ``y`` of a quantised entry, and ``scales`` if the format has a scale per row.

    Args:
        value: the exact results, (rows, width).
        largest_term: as in ``Expected``, of ``value``.
        entry: of a format with a scale.
        scalars: its int32 arguments.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if entry.defines["SCALE"] == "SCALE_TENSOR":
            scale = np.float64(float_from_bits(scalars["scale_bits"]))
            return {"y": plain(value / scale, largest_term / scale)}
        largest = np.max(np.abs(value), axis=1, initial=0.0)  # NaN if one is
        scales = largest / 127
        terms = np.max(largest_term, axis=1, initial=0.0)
        steps = value / scales[:, None]
        share = np.abs(steps) / 127 * (terms / scales)[:, None]  # the effect of an error of the scale on a result
        y = plain(steps, largest_term / scales[:, None] + share)
        return {
            "y": replace(y, slack=np.abs(steps) * _lost_bits(scales)[:, None]),
            "scales": plain(scales, terms / 127),
        }


def _lost_bits(scales: Floats) -> Floats:
    """Return the relative effect on a row's results of rounding a subnormal scale."""
    error = np.where(scales < TINY, SUBNORMAL_ERROR / np.maximum(scales, SUBNORMAL_ERROR / 2), 0.0)
    return np.where(error < 0.5, error / np.maximum(1 - error, 0.5), 2.0)  # no bound if half of the scale is lost


def plain(value: Floats, largest_term: Floats | None = None) -> Expected:
    """Return an expectation without slack; the largest term defaults to the value."""
    return Expected(
        value=value,
        largest_term=np.abs(value) if largest_term is None else largest_term,
        slack=np.zeros_like(value),
    )


def inverse_root(mean: Floats, epsilon: float, width: int) -> Floats:
    """Return ``1 / sqrt(mean + epsilon)``; 0 where the sum of squares overflows float32, as in PyTorch."""
    with np.errstate(divide="ignore", over="ignore"):
        return 1 / np.sqrt(np.where(mean * width > FLOAT32_MAX, np.inf, mean) + epsilon)
