"""Declare ``logits_to_mask``: logits, resized to the source's pixels, and their labels, like ``preprocess.restore``.

Of equal logits the lowest class wins, as in ``preprocess.labels_of``. The kernel and the reference add in different
orders and formats, so logits that differ only by rounding may be exchanged. On each axis a weight, a product and a sum
are rounded to float32, each by at most 2**-24 of the largest logit. The difference of two logits is then off by at most
12 * 2**-24 = 7e-7 of it; ``TIE`` allows 14 times as much. Without rounding, as at the network's own size, ties are
exact, and the tests allow no exchange.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from medseg_trt.kernels.image_to_tensor import (
    BLOCK_THREADS,
    MAX_PIXELS,
    STRIP,
    num_blocks,
    resampled_size,
    triangle,
)
from medseg_trt.kernels.kernel import (
    C_TYPES,
    Array,
    Entry,
    Expected,
    Floats,
    Kernel,
    Scalars,
    Tolerance,
    bytes_of_shapes,
    pointer,
    scalar,
)
from medseg_trt.spec import Preprocessing

MAX_CLASSES = 256
TIE = 1e-5  # logits closer than this times the largest magnitude (at least 1) may be exchanged
SCALARS = (
    "batch",
    "classes",
    "image_height",
    "image_width",
    "resampled_height",
    "resampled_width",
    "height",
    "width",
)


def scalars(
    p: Preprocessing,
    batch: int,
    classes: int,
    source_size: tuple[int, int],
    spacing_mm: tuple[float, float] | None = None,
) -> dict[str, int]:
    """Return the kernel's scalars for logits of ``p.image_size`` and images of ``source_size``.

    Raises:
        ValueError: too many classes or pixels, or a resize with splines.
    """
    if p.resizes_with_splines:
        raise ValueError(f"logits_to_mask resizes logits linearly; resize={p.resize} resizes labels")
    resampled = resampled_size(source_size, p, spacing_mm)
    sizes = (*source_size, *resampled, *p.image_size)
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"{classes} classes; a uint8 mask can hold 1 to {MAX_CLASSES}")
    if min(sizes) < 1 or max(sizes) > MAX_PIXELS:
        raise ValueError(f"{source_size} pixels from {resampled}: an axis may have 1 to {MAX_PIXELS}")
    return {
        "batch": batch,
        "classes": classes,
        "image_height": p.image_size[0],
        "image_width": p.image_size[1],
        "resampled_height": resampled[0],
        "resampled_width": resampled[1],
        "height": source_size[0],
        "width": source_size[1],
    }


def _reference(_entry: Entry, inputs: Mapping[str, Array], s: Scalars) -> dict[str, Expected]:
    logits = inputs["logits"].astype(np.float64)
    rows = _back(s["height"], s["resampled_height"], s["image_height"])
    columns = _back(s["width"], s["resampled_width"], s["image_width"])
    restored = rows @ logits @ columns.T
    scores = np.concatenate([np.zeros_like(restored), restored], axis=1) if s["classes"] == 1 else restored
    near_best = scores >= scores.max(axis=1, keepdims=True) - TIE * np.maximum(
        1.0, np.abs(scores).max(axis=1, keepdims=True)
    )
    labels = scores.argmax(axis=1)
    numbers = np.arange(scores.shape[1], dtype=np.float64).reshape(1, -1, 1, 1)
    furthest = np.where(near_best, np.abs(numbers - labels[:, np.newaxis]), 0).max(axis=1)
    inside = np.outer(
        _inside(s["height"], s["resampled_height"], s["image_height"]),
        _inside(s["width"], s["resampled_width"], s["image_width"]),
    )
    value = (labels * inside).astype(np.float64)
    return {"mask": Expected(value=value, largest_term=value, slack=(furthest * inside).astype(np.float64))}


def _back(source: int, resampled: int, canvas: int) -> Floats:
    """Return the weights, (source, canvas), that resize an axis to the source; the filled part's edge is extended."""
    offset = (canvas - resampled) // 2
    at = np.clip(np.arange(resampled) + offset, max(offset, 0), min(offset + resampled, canvas) - 1)
    weights = np.zeros((source, canvas))
    np.add.at(weights.T, at, triangle(resampled, source, antialias=False).T)
    return weights


def _inside(source: int, resampled: int, canvas: int) -> Array:
    """Return which source pixels have their centre on the canvas."""
    centre = (2 * np.arange(source) + 1) * resampled + 2 * source * ((canvas - resampled) // 2)
    return (centre >= 0) & (centre < 2 * source * canvas)


def _grid(s: Scalars) -> tuple[int, int, int]:
    sizes = {(s[f"{kind}height"], s[f"{kind}width"]) for kind in ("", "resampled_", "image_")}
    pixels = s["height"] * s["width"]
    return num_blocks(pixels, copies=len(sizes) == 1 and pixels % STRIP == 0), s["batch"], 1


def _shapes(s: Scalars, _entry: Entry) -> dict[str, tuple[int, ...]]:
    return {
        "logits": (s["batch"], s["classes"], s["image_height"], s["image_width"]),
        "mask": (s["batch"], s["height"], s["width"]),
    }


def _bytes_moved(s: Scalars, entry: Entry) -> int:
    return bytes_of_shapes(_shapes(s, entry), entry)


def _entry(dtype: str) -> Entry:
    name = f"logits_to_mask_{dtype}"
    return Entry(
        name=name,
        dtype=dtype,
        defines={"ENTRY": f"medseg_{name}", "SCALAR": C_TYPES[dtype]},
        min_arch=75,
        parameters=(pointer("logits", dtype), *map(scalar, SCALARS), pointer("mask", "uint8", "out")),
    )


KERNEL = Kernel(
    name="logits_to_mask",
    source=Path(__file__).with_suffix(".cu"),
    entries=tuple(_entry(dtype) for dtype in ("float16", "bfloat16", "float32")),
    block=(BLOCK_THREADS, 1, 1),
    grid=_grid,
    grid_rule="(ceil(height * width / (copies ? 2048 : 128)), batch, 1)",
    shared_bytes=0,
    shapes=_shapes,
    reference=_reference,
    tolerance={
        "uint8": Tolerance(
            ulps=0.5,
            reason="labels are exact, except between logits within 1e-5 of each other",
        ),
    },
    bytes_moved=_bytes_moved,
    onnx="",
    max_width=MAX_PIXELS,
)
