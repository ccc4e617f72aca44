"""Declare ``image_to_tensor``: 8-bit images, resized, clipped and normalised like ``preprocess.prepare``.

An image may have any row, pixel and image stride (a crop, a padded frame, three of the four channels of BGRA). One
channel is repeated to three. Padding is the lower end of the window.

Error bound, with u = 2**-24, float32's unit roundoff, for a pixel with n weights (rows and columns together):

1. A pixel's distance from the window's lower end is one difference: u.
2. A row's sum adds non-negative terms x_k, and to each the rounding error e_(k-1) of the addition before it:
   ``term_k = fma(weight, value, e_(k-1))`` rounds once, by at most u (x_k + |e_(k-1)|). TwoSum returns s_k and e_k with
   s_k + e_k = s_(k-1) + term_k exactly, and |e_k| <= u s_k. The e_k cancel from term to term, so that s_n differs from
   the sum by e_n and by the roundings of the terms: at most 2 u + n u**2 of it.
3. The sum of the rows' sums, likewise: 2 u + n u**2.
4. The weights and their total are integers; the total is rounded once to float32: u. The quotient: u.

Together ``ROUNDINGS`` u = 7 u of the mean, and so of its product with the scale, whatever n is. That product and the
bias are added in one fused operation, whose rounding is half an ulp of the result; to float16 it is rounded once more.
Sources: Knuth, TAOCP 2, 4.2.2, theorem B, for TwoSum; Higham 2002, "Accuracy and Stability", §4.3.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg_trt.kernels.kernel import (
    C_TYPES,
    DTYPES,
    Array,
    Entry,
    Expected,
    Floats,
    Kernel,
    Scalars,
    Tolerance,
    float_bits,
    float_from_bits,
    pointer,
    scalar,
)
from medseg_trt.spec import Preprocessing

CHANNELS = 3
BLOCK_THREADS = 128
STRIP = 16  # pixels of a thread that copies; one that resizes has one pixel
MAX_PIXELS = 16384  # of an axis; the integer weights of a longer axis exceed 32 bits
UNIT_ROUNDOFF = 2.0**-24  # of float32
ROUNDINGS = 7  # of the mean of a pixel, in units of UNIT_ROUNDOFF; derived above
SECOND_ORDER = 64  # in units of UNIT_ROUNDOFF**2: more than the 21 products of two of those roundings
SCALARS = (
    "batch",
    "height",
    "width",
    "channels",
    "image_stride",
    "row_stride",
    "pixel_stride",
    "resampled_height",
    "resampled_width",
    "image_height",
    "image_width",
    "antialias",
    "low_bits",
    "high_bits",
    "scale0_bits",
    "scale1_bits",
    "scale2_bits",
    "bias0_bits",
    "bias1_bits",
    "bias2_bits",
)


def scalars(
    p: Preprocessing,
    shape: tuple[int, int, int, int],
    spacing_mm: tuple[float, float] | None = None,
    strides: tuple[int, int, int] | None = None,
) -> dict[str, int]:
    """Return the kernel's scalars for a preprocessing.

    Args:
        p: the preprocessing; ``nearest``, splines and reversed channels are not supported.
        shape: images, rows, columns, channels; 1 or 3 channels.
        spacing_mm: distance between rows and between columns; None: unknown.
        strides: bytes from image to image, row to row, pixel to pixel; None: contiguous.

    Raises:
        ValueError: the kernel does not support it; the message gives the reason.
    """
    batch, height, width, channels = shape
    resampled = resampled_size((height, width), p, spacing_mm)
    if channels not in (1, CHANNELS):
        raise ValueError(f"the image has {channels} channels; 1 or 3 are possible")
    if p.resize not in ("linear", "linear_antialias"):
        raise ValueError(f"image_to_tensor resizes with linear or linear_antialias, not with {p.resize}")
    if p.own_window:
        raise ValueError("image_to_tensor uses one window for all images; windows per image are not supported")
    if p.channel_order != "rgb":
        raise ValueError(f"image_to_tensor keeps the channel order rgb; {p.channel_order} is not supported")
    if not min(height, width, *resampled, *p.image_size) > 0 or max(height, width, *resampled) > MAX_PIXELS:
        raise ValueError(f"{height} x {width} pixels to {resampled}: an axis may have 1 to {MAX_PIXELS}")
    image_stride, row_stride, pixel_stride = strides or (height * width * channels, width * channels, channels)
    low, high = p.window
    factors = {
        name: float_bits(value)
        for c, (mean, std) in enumerate(zip(p.mean, p.std, strict=True))
        for name, value in ((f"scale{c}_bits", 1 / ((high - low) * std)), (f"bias{c}_bits", -mean / std))
    }
    return {
        "batch": batch,
        "height": height,
        "width": width,
        "channels": channels,
        "image_stride": image_stride,
        "row_stride": row_stride,
        "pixel_stride": pixel_stride,
        "resampled_height": resampled[0],
        "resampled_width": resampled[1],
        "image_height": p.image_size[0],
        "image_width": p.image_size[1],
        "antialias": int(p.resize == "linear_antialias"),
        "low_bits": float_bits(low),
        "high_bits": float_bits(high),
        **factors,
    }


def resampled_size(
    source_size: tuple[int, int], p: Preprocessing, spacing_mm: tuple[float, float] | None
) -> tuple[int, int]:
    """Return rows and columns of the source at the preprocessing's spacing, before padding and cropping."""
    if p.spacing_mm is None or spacing_mm is None:
        return p.image_size
    rows, columns = (
        max(1, round(n * step_mm / p.spacing_mm)) for n, step_mm in zip(source_size, spacing_mm, strict=True)
    )
    return rows, columns


def triangle(source: int, resampled: int, antialias: bool) -> Floats:
    """Return the weights, (resampled, source), that resize an axis; every row adds up to one.

    Source: the triangle filter at half-pixel centres, as PyTorch's ``interpolate(antialias=…)`` has it.
    """
    centre = (np.arange(resampled)[:, np.newaxis] + 0.5) * source / resampled
    support = max(source / resampled, 1.0) if antialias else 1.0
    weights = np.maximum(1.0 - np.abs(np.arange(source) + 0.5 - centre) / support, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def _reference(entry: Entry, inputs: Mapping[str, Array], s: Scalars) -> dict[str, Expected]:
    low, high = float_from_bits(s["low_bits"]), float_from_bits(s["high_bits"])
    images = np.lib.stride_tricks.as_strided(
        inputs["pixels"].reshape(-1),
        (s["batch"], s["height"], s["width"], s["channels"]),
        (s["image_stride"], s["row_stride"], s["pixel_stride"], 1),
        writeable=False,
    )
    above_low = np.clip(images.astype(np.float64), low, high) - low
    rows = triangle(s["height"], s["resampled_height"], bool(s["antialias"]))
    columns = triangle(s["width"], s["resampled_width"], bool(s["antialias"]))
    resampled = np.moveaxis(np.moveaxis(above_low, 3, 1) @ columns.T, 2, 3) @ rows.T  # (batch, channel, column, row)
    canvas = np.zeros((s["batch"], s["channels"], s["image_height"], s["image_width"]))
    (to_rows, from_rows), (to_columns, from_columns) = (
        _overlap(s[f"resampled_{axis}"], s[f"image_{axis}"]) for axis in ("height", "width")
    )
    canvas[:, :, to_rows, to_columns] = np.moveaxis(resampled, 3, 2)[:, :, from_rows, from_columns]
    scale, bias = (
        np.array([float_from_bits(s[f"{name}{c}_bits"]) for c in range(CHANNELS)]).reshape(1, CHANNELS, 1, 1)
        for name in ("scale", "bias")
    )
    taps = np.count_nonzero(rows, axis=1).max() + np.count_nonzero(columns, axis=1).max()
    relative = ROUNDINGS * UNIT_ROUNDOFF + (taps + SECOND_ORDER) * UNIT_ROUNDOFF**2
    value = canvas * scale + bias
    slack = relative * np.abs(canvas * scale)
    if entry.dtype != "float32":
        slack += UNIT_ROUNDOFF * (np.abs(value) + slack)  # the result in float32, before the last rounding
    # The last rounding is of a number that may exceed the value by the slack, with a larger ulp.
    return {"tensor": Expected(value=value, largest_term=np.abs(value) + slack, slack=slack)}


def _overlap(resampled: int, canvas: int) -> tuple[slice, slice]:
    """Return the filled part of the canvas and the part of the resampled axis that fills it."""
    offset = (canvas - resampled) // 2
    start, stop = max(offset, 0), min(offset + resampled, canvas)
    return slice(start, stop), slice(start - offset, stop - offset)


def _grid(s: Scalars) -> tuple[int, int, int]:
    sizes = {(s[f"{kind}height"], s[f"{kind}width"]) for kind in ("", "resampled_", "image_")}
    copies = len(sizes) == 1 and s["pixel_stride"] == s["channels"] and (s["row_stride"] | s["width"]) % STRIP == 0
    return num_blocks(s["image_height"] * s["image_width"], copies), s["batch"], 1


def num_blocks(pixels: int, copies: bool) -> int:
    """Return the blocks for so many pixels: one pixel per thread, or a strip where no pixel is resized."""
    return -(-pixels // (BLOCK_THREADS * (STRIP if copies else 1)))


def _shapes(s: Scalars, _entry: Entry) -> dict[str, tuple[int, ...]]:
    return {
        "pixels": (s["batch"], s["image_stride"]),
        "tensor": (s["batch"], CHANNELS, s["image_height"], s["image_width"]),
    }


def _bytes_moved(s: Scalars, entry: Entry) -> int:
    read = s["height"] * s["width"] * s["channels"]
    written = CHANNELS * s["image_height"] * s["image_width"] * DTYPES[entry.dtype].itemsize
    return s["batch"] * (read + written)


def _entry(dtype: str) -> Entry:
    name = f"image_to_tensor_{dtype}"
    return Entry(
        name=name,
        dtype=dtype,
        defines={"ENTRY": f"medseg_{name}", "SCALAR": C_TYPES[dtype]},
        min_arch=75,
        parameters=(
            pointer("pixels", "uint8"),
            *map(scalar, SCALARS),
            pointer("tensor", dtype, "out"),
        ),
    )


KERNEL = Kernel(
    name="image_to_tensor",
    source=Path(__file__).with_suffix(".cu"),
    entries=tuple(_entry(dtype) for dtype in ("float16", "float32")),
    block=(BLOCK_THREADS, 1, 1),
    grid=_grid,
    grid_rule="(ceil(image_height * image_width / (copies ? 2048 : 128)), batch, 1)",
    shared_bytes=0,
    shapes=_shapes,
    reference=_reference,
    tolerance={
        dtype: Tolerance(ulps=0.5, of="largest_term", reason="the last rounding; the others are slack, as derived")
        for dtype in ("float16", "float32")
    },
    bytes_moved=_bytes_moved,
    onnx="",
    max_width=MAX_PIXELS,
)
