"""Round exactly: sums and products that float64 cannot hold are kept as "rounded to odd", which rounds again safely.

A number rounded to odd (the neighbour with an odd last bit unless it is exact) in a format at least two bits longer
rounds to the same result as the exact number in every mode.
Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
odd".
"""

from fractions import Fraction

import ml_dtypes
import numpy as np

FLOAT32_SMALLEST_NORMAL = np.float32(2**-126)
NAN_BITS = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF}  # the NaN that NVIDIA's units return
MODES = ("rn", "rz", "rm", "rp")  # to nearest even, towards zero, minus infinity, plus infinity


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded sum and its exact error (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def to_odd(rounded: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return ``rounded + error`` rounded to odd, where ``rounded`` is it rounded to nearest."""
    integer = np.int64 if rounded.dtype == np.float64 else np.int32
    bits = rounded.view(integer)
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(rounded) & (bits & 1 == 0)
    away = ((error > 0) == (rounded > 0)) | (rounded == 0)  # a product too small for the format keeps its sign
    return np.where(inexact, bits + np.where(away, 1, -1).astype(integer), bits).view(rounded.dtype)


def fma_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return ``a * b + c`` of float32 (or shorter) values as float64 rounded to odd."""
    product = a.astype(np.float64) * b.astype(np.float64)  # 48 bits: exact
    return to_odd(*two_sum(product, c.astype(np.float64)))


def fma_float64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return ``a * b + c`` rounded once; in rational numbers where an intermediate could leave float64's range."""
    high, low = _two_product(a, b)
    third, third_low = two_sum(c, low)
    total, total_low = two_sum(high, third)
    result = total + to_odd(*two_sum(third_low, total_low))
    size = np.maximum(np.abs(a), np.abs(b))
    product = np.abs(a * b)
    plain = np.isfinite(c) & (product > 2.0**-900) & (product < 2.0**900) & (size < 2.0**900) & (np.abs(c) < 2.0**900)
    plain &= np.abs(c) > 2.0**-900
    others = np.flatnonzero(~plain & np.isfinite(a) & np.isfinite(b) & np.isfinite(c))
    result = np.where(plain, result, a * b + c)
    for index in others:
        exact = Fraction(float(a[index])) * Fraction(float(b[index])) + Fraction(float(c[index]))
        if exact:
            result[index] = _nearest_float64(exact)
    return result


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rounded product and its exact error (Dekker)."""
    product = a * b
    (ah, al), (bh, bl) = _halves(a), _halves(b)
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def _halves(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scaled = a * 134217729.0  # 2**27 + 1
    high = scaled - (scaled - a)
    return high, a - high


def _nearest_float64(exact: Fraction) -> float:
    try:
        return float(exact)  # Python divides integers with one rounding
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def narrow(values: np.ndarray, kind: str, mode: str = "rn") -> np.ndarray:
    """Round float64 (exact, or rounded to odd) to ``f16``, ``bf16`` or ``f32`` (``f64`` stays); NaN is NVIDIA's."""
    if kind == "f64":
        return values
    if kind == "bf16":
        near = to_odd(single := values.astype(np.float32), values - single.astype(np.float64))
        rounded = near.astype(ml_dtypes.bfloat16)
    else:
        rounded = values.astype(np.float16 if kind == "f16" else np.float32)
    if mode != "rn":
        rounded = _directed(rounded, values, mode)
    return canonical(rounded, kind)


def _directed(rounded: np.ndarray, exact: np.ndarray, mode: str) -> np.ndarray:
    nearest = rounded.astype(np.float64)
    too_high = (nearest > exact) & ((mode == "rm") | ((mode == "rz") & (exact > 0)))
    too_low = (nearest < exact) & ((mode == "rp") | ((mode == "rz") & (exact < 0)))
    finite = np.isfinite(exact)
    down, up = (np.nextafter(rounded, np.array(end, rounded.dtype)) for end in (-np.inf, np.inf))
    return np.where(too_high & finite, down, np.where(too_low & finite, up, rounded))


def canonical(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the values with every NaN as NVIDIA's floating-point units write it."""
    if kind not in NAN_BITS or not (nan := np.isnan(values)).any():
        return values
    nans = np.array([NAN_BITS[kind]], np.uint16 if values.dtype.itemsize == 2 else np.uint32).view(values.dtype)
    return np.where(nan, nans, values)


def flush(values: np.ndarray) -> np.ndarray:
    """Return float32 values with subnormals replaced by zeros of the same sign (``.ftz``)."""
    small = np.abs(values) < FLOAT32_SMALLEST_NORMAL
    return np.where(small, np.copysign(np.float32(0), values), values)


def saturate(values: np.ndarray) -> np.ndarray:
    """Return values limited to [0, 1], NaN as +0 (``.sat``)."""
    one = values.dtype.type(1)
    return np.where(values > 0, np.minimum(values, one), values.dtype.type(0))
