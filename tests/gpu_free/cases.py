"""Generated inputs for every kernel, of chosen magnitudes: one row tiny, the next zero, infinite, NaN."""

from collections.abc import Callable, Mapping

import numpy as np

from medseg_trt.kernels import image_to_tensor, logits_to_mask
from medseg_trt.kernels.kernel import DTYPES, Array, Entry, float_bits
from medseg_trt.kernels.rotary import frequency_words
from medseg_trt.spec import Preprocessing

Case = tuple[dict[str, int], dict[str, Array]]  # scalars, input arrays
SCALES = ("1", "1e-3", "1e3", "fp16 max", "zeros", "inf", "nan")
FINITE = SCALES[:5]
FACTORS: Mapping[str, float] = {
    "1": 1.0,
    "1e-3": 1e-3,
    "1e3": 1e3,
    "fp16 max": 1.0,
    "zeros": 0.0,
    "inf": 1.0,
    "nan": 1.0,
}
HEADS: Mapping[int, tuple[int, int, int]] = {  # width -> heads, key and value heads, columns of a head
    1: (1, 1, 2),
    33: (3, 1, 22),
    64: (2, 1, 64),
    576: (9, 3, 64),
    768: (12, 12, 64),
    4093: (31, 31, 132),
    4096: (32, 8, 128),
    8192: (64, 8, 128),
}
EPSILON = 1e-6
SPACING_MM = (1.2, 0.9)  # of pictures whose contract asks for 1 mm: they do not fill, and exceed, the network's picture
OUTPUT_STEP = 0.03  # of the 8-bit outputs: values of magnitude 1 use a quarter of the steps, large ones saturate


def scaled_rows(
    rng: np.random.Generator, shape: tuple[int, int], dtype: str, first_scale: int, scales: tuple[str, ...] = SCALES
) -> Array:
    """Return rows of normal numbers; row i has the magnitude ``scales[first_scale + i]``, and so on in turn."""
    values = rng.standard_normal(shape)
    for row in range(shape[0]):
        scale = scales[(first_scale + row) % len(scales)]
        values[row] *= FACTORS[scale]
        if scale == "fp16 max":
            values[row] = rng.uniform(0.9, 0.999, shape[1]) * np.sign(values[row]) * 65504
        elif scale in ("inf", "nan"):
            values[row, rng.integers(shape[1])] = float(scale)
    return values.astype(np.float32).astype(DTYPES[dtype])


def _normalisation(entry: Entry, rows: int, width: int, first_scale: int, rng: np.random.Generator) -> Case:
    scalars = {"rows": rows, "width": width, "epsilon_bits": float_bits(EPSILON), "scale_bits": float_bits(OUTPUT_STEP)}
    inputs: dict[str, Array] = {}
    for parameter in entry.parameters:
        if parameter.kind == "pointer" and parameter.direction == "in":
            if parameter.name in ("weight", "bias"):
                inputs[parameter.name] = rng.normal(1, 0.5, width).astype(np.float32).astype(DTYPES[parameter.dtype])
            else:
                inputs[parameter.name] = scaled_rows(rng, (rows, width), parameter.dtype, first_scale)
    return _used(entry, scalars), inputs


def _swiglu(entry: Entry, rows: int, width: int, first_scale: int, rng: np.random.Generator) -> Case:
    scalars = {"rows": rows, "width": width, "scale_bits": float_bits(OUTPUT_STEP)}
    return _used(entry, scalars), {"gate_up": scaled_rows(rng, (rows, 2 * width), entry.dtype, first_scale)}


def _rotary(entry: Entry, rows: int, width: int, first_scale: int, rng: np.random.Generator) -> Case:
    heads, kv_heads, dim = HEADS[width]
    on_the_fly = entry.defines["ANGLES"] == "ANGLES_FREQUENCY"
    batch = 1 if rows < 8 else 2
    tokens = -(-rows // batch)  # an odd number of rows is one more
    scalars = {
        "batch": batch,
        "tokens": tokens,
        "first_position": 1_000_000 if on_the_fly else first_scale,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": dim,
        "copy_values": int(first_scale % 2 == 0),
    }
    qkv = scaled_rows(rng, (batch * tokens, (heads + 2 * kv_heads) * dim), entry.dtype, first_scale)
    inputs = {"qkv": qkv.reshape(batch, tokens, -1)}
    if on_the_fly:
        inputs["frequencies"] = frequency_words(dim, 10000.0)
    else:
        positions = np.arange(scalars["first_position"] + tokens)[:, None]
        angles = positions * 10000.0 ** (-2 * np.arange(dim // 2) / dim)
        inputs |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return scalars, inputs


def _image_to_tensor(entry: Entry, rows: int, width: int, first_scale: int, rng: np.random.Generator) -> Case:
    """Resize ``rows`` x ``width`` pixels: keep, enlarge and reduce in turn, some with padding or gaps in memory."""
    channels = (3, 1)[first_scale % 2]
    preprocessing = Preprocessing(
        image_size=_size(rows, width, first_scale),
        resize="linear_antialias" if first_scale % 4 in (1, 2) and width <= 1024 else "linear",
        window=(0.0, 255.0) if first_scale % 3 else (20.0, 180.0),
        spacing_mm=1.0 if first_scale % 4 == 3 else None,
    )
    pixel_stride, gap = (channels + 1, 5) if first_scale % 3 == 2 else (channels, 0)
    row_stride = width * pixel_stride + gap
    batch = 2 if rows * width < 4096 else 1
    strides = (rows * row_stride, row_stride, pixel_stride)
    scalars = image_to_tensor.scalars(preprocessing, (batch, rows, width, channels), SPACING_MM, strides)
    return scalars, {"pixels": rng.integers(0, 256, (batch, strides[0]), np.uint8)}


def _logits_to_mask(entry: Entry, rows: int, width: int, first_scale: int, rng: np.random.Generator) -> Case:
    """Label ``rows`` x ``width`` pixels from as many, more, and fewer logits; finite ones, as a network gives them."""
    classes = (4, 1, 9)[first_scale % 3]
    size = _size(rows, width, first_scale)
    preprocessing = Preprocessing(image_size=size, spacing_mm=1.0 if first_scale % 4 == 3 else None)
    batch = 2 if rows * width < 4096 else 1
    scalars = logits_to_mask.scalars(preprocessing, batch, classes, (rows, width), SPACING_MM)
    values = scaled_rows(rng, (batch, classes * size[0] * size[1]), entry.dtype, first_scale, FINITE)
    return scalars, {"logits": values.reshape(batch, classes, *size)}


def _size(rows: int, width: int, first_scale: int) -> tuple[int, int]:
    """Return the network's picture for a source: the same, larger, or smaller."""
    some = min(width, 900)
    return ((rows, width), (rows + 3, some + 5), (max(rows // 2, 1), max(some // 3, 1)))[first_scale % 3]


def _used(entry: Entry, scalars: Mapping[str, int]) -> dict[str, int]:
    names = {parameter.name for parameter in entry.parameters}
    return {name: value for name, value in scalars.items() if name in names}


CASES: Mapping[str, Callable[[Entry, int, int, int, np.random.Generator], Case]] = {
    "rmsnorm": _normalisation,
    "add_rmsnorm": _normalisation,
    "layernorm_quant": _normalisation,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "image_to_tensor": _image_to_tensor,
    "logits_to_mask": _logits_to_mask,
}
