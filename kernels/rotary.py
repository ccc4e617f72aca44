"""Rotary position embedding: pairs of columns of q and k, rotated by an angle proportional to the token's position.

Contract: ``(a, b) -> (a cos - b sin, b cos + a sin)`` in float32, rounded once to the inputs' type; Hugging Face also
rounds cosine, sine and both products to 16 bits. q, k and v are read from rows ``[q | k | v]``, the output of one GEMM,
and written as (batch, heads, tokens, head_dim), the input of attention; v is copied if ``copy_values`` is 1. Column i
is paired with i + head_dim / 2 (``half``, Hugging Face), or 2i with 2i + 1 (``interleaved``, Meta).

Angles come from tables of cosine and sine, or from ``frequency_words``: the product of the position and a 64-bit
fraction of a full rotation, modulo a full rotation, which is exact. Up to position 1e6 the angle is within 1.8e-13
radians of ``position · theta^(-2i / head_dim)``, while float32 angles are off by up to 0.06; cosine and sine are within
2 ulps.
Sources: Su et al. 2021 (RoFormer), eq. 15; Hugging Face ``modeling_llama.py``; meta-llama/llama ``model.py``.
"""

from collections.abc import Mapping
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

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
from medseg_trt.kernels.output_formats import plain

PI = Decimal("3.14159265358979323846264338327950288419716939937511")
LAYOUTS = ("half", "interleaved")
ANGLES: Mapping[str, tuple[str, ...]] = {"table": ("cos", "sin"), "frequency": ("frequencies",)}
SIXTEEN_BITS = Tolerance(ulps=0.505, of="largest_term", reason="one rounding; the two products may cancel")


def frequency_words(head_dim: int, theta: float) -> Int32[ndarray, "2 half"]:
    """Return the rotation per position of every pair, in 2**-64 of a full rotation: upper, then lower 32 bits.

    Args:
        head_dim: columns of a head, even.
        theta: the base, more than 1: 10000 for LLaMA-1 and -2.
    """
    with localcontext() as context:
        context.prec = 50
        frequencies = [Decimal(theta) ** (Decimal(-2 * pair) / head_dim) / (2 * PI) for pair in range(head_dim // 2)]
        fractions = np.array([round(frequency * 2**64) for frequency in frequencies], np.uint64)
    words = np.stack([fractions >> np.uint64(32), fractions & np.uint64(0xFFFFFFFF)])
    return words.astype(np.uint32).view(np.int32)


def shapes(scalars: Scalars, entry: Entry) -> dict[str, tuple[int, ...]]:
    """Return the shape of every array; a table has a row per position, and ``v`` is empty unless it is copied."""
    batch, tokens, dim, kv_heads = (scalars[name] for name in ("batch", "tokens", "head_dim", "num_kv_heads"))
    table = (scalars["first_position"] + tokens, dim // 2)
    all_shapes = {
        "qkv": (batch, tokens, (scalars["num_heads"] + 2 * kv_heads) * dim),
        "cos": table,
        "sin": table,
        "frequencies": (2, dim // 2),
        "q": (batch, scalars["num_heads"], tokens, dim),
        "k": (batch, kv_heads, tokens, dim),
        "v": (batch, kv_heads if scalars["copy_values"] else 0, tokens, dim),
    }
    return {parameter.name: all_shapes[parameter.name] for parameter in entry.parameters if parameter.kind == "pointer"}


def bytes_moved(scalars: Scalars, entry: Entry) -> int:
    """Return the minimum memory traffic in bytes: inputs and outputs once, and the used angles once."""
    used = shapes(scalars, entry)
    outputs = {name: used[name] for name in ("q", "k", "v")}
    angles = {name: used[name] for name in ("cos", "sin", "frequencies") if name in used}
    in_use = {name: (scalars["tokens"], shape[1]) for name, shape in angles.items() if name != "frequencies"}
    empty = dict.fromkeys(used, (0,))
    return 2 * bytes_of_shapes({**empty, **outputs}, entry) + bytes_of_shapes({**empty, **angles, **in_use}, entry)


def reference(entry: Entry, inputs: Mapping[str, Array], scalars: Scalars) -> dict[str, Expected]:
    """Return ``q``, ``k`` and ``v`` (batch, heads, tokens, head_dim); ``v`` has no heads unless it is copied."""
    batch, tokens, heads, kv_heads = (scalars[name] for name in ("batch", "tokens", "num_heads", "num_kv_heads"))
    by_token = inputs["qkv"].astype(np.float64).reshape(batch, tokens, heads + 2 * kv_heads, scalars["head_dim"])
    query, key, value = np.split(by_token.transpose(0, 2, 1, 3), [heads, heads + kv_heads], axis=1)
    cosine, sine = _angles(inputs, scalars["first_position"] + np.arange(tokens))
    copied = value if scalars["copy_values"] else value[:, :0]
    layout = entry.defines["LAYOUT"]
    return {"q": _rotated(query, cosine, sine, layout), "k": _rotated(key, cosine, sine, layout), "v": plain(copied)}


def _angles(inputs: Mapping[str, Array], positions: Array) -> tuple[Floats, Floats]:
    """Return cosine and sine, (tokens, pairs)."""
    if "cos" in inputs:
        return inputs["cos"][positions].astype(np.float64), inputs["sin"][positions].astype(np.float64)
    words = inputs["frequencies"].view(np.uint32).astype(object)
    fractions = positions.astype(object)[:, None] * (words[0] * 2**32 + words[1])[None, :]
    angles = (fractions % 2**64).astype(np.float64) * (2 * np.pi / 2**64)  # Python integers: exact
    return np.cos(angles), np.sin(angles)


def _rotated(heads: Floats, cosine: Floats, sine: Floats, layout: str) -> Expected:
    pairs = cosine.shape[1]
    split, axis = ((2, pairs), -2) if layout == "LAYOUT_HALF" else ((pairs, 2), -1)
    first, second = (np.take(heads.reshape(*heads.shape[:-1], *split), index, axis=axis) for index in (0, 1))
    with np.errstate(invalid="ignore", over="ignore"):
        terms = (first * cosine, -second * sine), (second * cosine, first * sine)
        value = np.stack([left + right for left, right in terms], axis=axis)
        largest = np.stack([np.maximum(np.abs(left), np.abs(right)) for left, right in terms], axis=axis)
    return plain(value.reshape(heads.shape), largest.reshape(heads.shape))


def _entry(dtype: str, layout: str, angles: str) -> Entry:
    name = f"rotary_{dtype}_{layout}_{angles}"
    kind = "int32" if angles == "frequency" else "float32"
    numbers = ("batch", "tokens", "first_position", "num_heads", "num_kv_heads", "head_dim", "copy_values")
    return Entry(
        name=name,
        dtype=dtype,
        defines={
            "ENTRY": f"medseg_{name}",
            "SCALAR": C_TYPES[dtype],
            "LAYOUT": f"LAYOUT_{layout.upper()}",
            "ANGLES": f"ANGLES_{angles.upper()}",
        },
        parameters=(
            pointer("qkv", dtype),
            *(pointer(array, kind) for array in ANGLES[angles]),
            *(scalar(number) for number in numbers),
            *(pointer(array, dtype, "out") for array in ("q", "k", "v")),
        ),
    )


KERNEL = Kernel(
    name="rotary",
    source=Path(__file__).with_suffix(".cu"),
    entries=tuple(_entry(dtype, layout, angles) for dtype in C_TYPES for layout in LAYOUTS for angles in ANGLES),
    block=(128, 1, 1),
    grid=lambda scalars: (scalars["batch"] * scalars["tokens"], 1, 1),
    grid_rule="(batch * tokens, 1, 1)",
    shared_bytes=0,
    shapes=shapes,
    reference=reference,
    tolerance={
        "float16": SIXTEEN_BITS,
        "bfloat16": SIXTEEN_BITS,
        "float32": Tolerance(
            ulps=4.0,
            of="largest_term",
            reason="measured: 3.2 ulps at most in README.md's runs; cosine and sine are within 2",
        ),
    },
    bytes_moved=bytes_moved,
    onnx="Rotary",
)
