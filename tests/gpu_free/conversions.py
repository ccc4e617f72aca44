"""``cvt``: between integers, between floats, and across, with every rounding and saturation spelled out."""

from collections.abc import Callable, Mapping
from functools import partial

import ml_dtypes
import numpy as np
from gpu_free.rounding import MODES, canonical, flush, narrow, saturate, to_odd
from gpu_free.values import DTYPES, Operation, pack, unpack

INTEGERS = tuple(f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64))
FLOATS = ("f16", "bf16", "f32", "f64")
TO_INTEGER: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
FLOAT8 = {"e4m3": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}  # dtype, largest


def _limits(kind: str) -> tuple[int, int]:
    limits = np.iinfo(DTYPES[kind])
    return int(limits.min), int(limits.max)


def _integer_to_integer(a: np.ndarray, *, source: str, target: str, sat: bool) -> np.ndarray:
    if sat:
        low = max(_limits(source)[0], _limits(target)[0])
        high = min(_limits(source)[1], _limits(target)[1])
        a = np.clip(a, DTYPES[source].type(low), DTYPES[source].type(high))
    return a.astype(DTYPES[target])


def _integer_to_float(a: np.ndarray, *, target: str, mode: str) -> np.ndarray:
    near = a.astype(np.float64)
    if a.dtype.itemsize == 8:  # float64 may have rounded: keep the error
        if target == "f64":
            return near
        past = near >= 2.0 ** (64 if a.dtype.kind == "u" else 63)  # no integer of this type
        back = np.where(past, 0, near).astype(a.dtype)
        error = np.where(past, -1.0, (a - back).view(np.int64).astype(np.float64))
        near = to_odd(near, error)
    return narrow(near, target, mode)


def _float_to_integer(a: np.ndarray, *, source: str, target: str, mode: str, ftz: bool) -> np.ndarray:
    """Round and clamp; NaN becomes 0, or the top bit alone where a float64 or a 64-bit integer takes part."""
    wide = (flush(a) if ftz else a).astype(np.float64)
    whole = TO_INTEGER[mode](wide)
    low, high = _limits(target)
    inside = (whole >= low) & (whole <= high) & (whole < 2.0 ** (64 if target == "u64" else 63))
    result = np.where(inside, whole, 0).astype(DTYPES[target])
    result = np.where(whole > 0, np.where(inside, result, DTYPES[target].type(high)), result)
    result = np.where((whole < 0) & ~inside, DTYPES[target].type(low), result)
    bits = DTYPES[target].itemsize * 8
    top = np.array([1 << (bits - 1)], f"u{bits // 8}").view(DTYPES[target])
    special = source == "f64" or bits == 64
    return np.where(np.isnan(wide), top if special else DTYPES[target].type(0), result)


def _float_to_float(a: np.ndarray, *, source: str, target: str, mode: str, ftz: bool, sat: bool) -> np.ndarray:
    a = flush(a) if ftz and source == "f32" else a
    result = narrow(a.astype(np.float64), target, mode)
    result = flush(result) if ftz and target == "f32" else result
    return saturate(result) if sat else result


def _to_whole(a: np.ndarray, *, kind: str, mode: str, ftz: bool, sat: bool) -> np.ndarray:
    whole = canonical(TO_INTEGER[mode](flush(a) if ftz else a), kind)
    return saturate(whole) if sat else whole


def _clamped(a: np.ndarray, *, ftz: bool) -> np.ndarray:
    return saturate(flush(a) if ftz else a)


def _pair(high: np.ndarray, low: np.ndarray, *, kind: str, mode: str, satfinite: bool) -> np.ndarray:
    """Convert two float32 values; the first operand goes into the high half."""
    parts = [narrow(part.astype(np.float64), kind, mode) for part in (low, high)]
    if satfinite:
        largest = np.array(np.inf, parts[0].dtype).view(np.uint16) - np.uint16(1)
        parts = [np.where(np.isinf(part), _with_sign(largest, part), part) for part in parts]
    return pack(*parts)


def _with_sign(bits: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Return a 16-bit magnitude with the signs of other values."""
    return (bits | (of.view(np.uint16) & np.uint16(0x8000))).view(of.dtype)


def _to_float8_pair(high: np.ndarray, low: np.ndarray, *, kind: str) -> np.ndarray:
    dtype, largest = FLOAT8[kind]
    codes = []
    for part in (low, high):
        code = np.clip(part, np.float32(-largest), np.float32(largest)).astype(dtype).view(np.uint8)
        codes.append(np.where(np.isnan(part), np.uint8(0x7F), code).astype(np.uint16))
    return codes[0] | codes[1] << np.uint16(8)


def _half_pair_to_float8(pair: np.ndarray, *, kind: str) -> np.ndarray:
    low, high = (part.astype(np.float32) for part in unpack(pair, "f16"))
    return _to_float8_pair(high, low, kind=kind)


def _float8_pair_to_halves(pair: np.ndarray, *, kind: str) -> np.ndarray:
    dtype, _ = FLOAT8[kind]
    parts = [((pair >> np.uint16(8 * part)) & np.uint16(0xFF)).astype(np.uint8).view(dtype) for part in (0, 1)]
    return pack(*(canonical(part.astype(np.float16), "f16") for part in parts))


def _table() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}

    def put(name: str, target: str, source: str, compute: Callable[..., np.ndarray], count: int = 1) -> None:
        operations[f"cvt.{name}.{target}.{source}".replace("..", ".")] = Operation(
            (target,), (source,) * count, compute, any_width=True
        )

    for source in INTEGERS:
        for target in INTEGERS:
            for sat in ("", ".sat"):
                compute = partial(_integer_to_integer, source=source, target=target, sat=bool(sat))
                put(sat.lstrip("."), target, source, compute)
        for target in FLOATS:
            for mode in MODES if target in ("f16", "f32") else ("rn",):
                put(mode, target, source, partial(_integer_to_float, target=target, mode=mode))
    for source in FLOATS:
        for target in INTEGERS:
            for mode in TO_INTEGER:
                for ftz in ("", ".ftz") if source == "f32" else ("",):
                    compute = partial(_float_to_integer, source=source, target=target, mode=mode, ftz=bool(ftz))
                    for sat in ("", ".sat"):  # a conversion to an integer clamps with and without
                        put(f"{mode}{ftz}{sat}", target, source, compute)
    for source, target in (("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("f32", "f64")):
        for ftz in ("", ".ftz") if "f32" in (source, target) and "bf16" not in (source, target) else ("",):
            compute = partial(_float_to_float, source=source, target=target, mode="rn", ftz=bool(ftz), sat=False)
            put(ftz.lstrip("."), target, source, compute)
    for source, target in (("f32", "f16"), ("f32", "bf16"), ("f64", "f32"), ("f64", "f16")):
        for mode in ("rn", "rz") if target == "bf16" else MODES:
            for ftz in ("", ".ftz") if target != "bf16" and "f32" in (source, target) else ("",):
                for sat in ("", ".sat") if target != "bf16" else ("",):
                    compute = partial(
                        _float_to_float, source=source, target=target, mode=mode, ftz=bool(ftz), sat=bool(sat)
                    )
                    put(f"{mode}{ftz}{sat}", target, source, compute)
    for kind in ("f16", "f32", "f64"):
        for mode in TO_INTEGER:
            for ftz in ("", ".ftz") if kind == "f32" else ("",):
                for sat in ("", ".sat"):
                    compute = partial(_to_whole, kind=kind, mode=mode, ftz=bool(ftz), sat=bool(sat))
                    put(f"{mode}{ftz}{sat}", kind, kind, compute)
    for ftz in ("", ".ftz"):
        put(f"{ftz}.sat".lstrip("."), "f32", "f32", partial(_clamped, ftz=bool(ftz)))
    for kind in ("f16", "bf16"):
        for mode in ("rn", "rz"):
            for satfinite in ("", ".satfinite"):
                compute = partial(_pair, kind=kind, mode=mode, satfinite=bool(satfinite))
                put(f"{mode}{satfinite}", f"{kind}x2", "f32", compute, count=2)
    for kind in FLOAT8:
        into = partial(_to_float8_pair, kind=kind)
        operations[f"cvt.rn.satfinite.{kind}x2.f32"] = Operation(("b16",), ("f32", "f32"), into)
        halves = partial(_half_pair_to_float8, kind=kind)
        operations[f"cvt.rn.satfinite.{kind}x2.f16x2"] = Operation(("b16",), ("f16x2",), halves)
        out = partial(_float8_pair_to_halves, kind=kind)
        operations[f"cvt.rn.f16x2.{kind}x2"] = Operation(("f16x2",), ("b16",), out)
    return operations


CONVERSIONS: Mapping[str, Operation] = _table()
