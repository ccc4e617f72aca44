"""Floating-point opcodes: IEEE 754 to the last bit, but for the approximate ones, which are exact to one rounding."""

import operator
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from gpu_free.rounding import MODES, canonical, flush, fma_float64, fma_odd, narrow, saturate, to_odd, two_sum
from gpu_free.values import DTYPES, Operation, pack, unpack

WORKING = {"f16": np.float64, "bf16": np.float64, "f32": np.float64, "f64": np.float64}


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return to_odd(*two_sum(_wide(a), _wide(b)))


def _subtract(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return to_odd(*two_sum(_wide(a), -_wide(b)))


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _wide(a) * _wide(b)


EXACT: Mapping[str, Callable[..., np.ndarray]] = {"add": _add, "sub": _subtract, "mul": _multiply, "fma": fma_odd}
IN_FLOAT64: Mapping[str, Callable[..., np.ndarray]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "fma": fma_float64,
    "div": operator.truediv,
    "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a,
}
IN_FLOAT32: Mapping[str, Callable[..., np.ndarray]] = {  # the CPU rounds these as IEEE 754 asks
    name: IN_FLOAT64[name] for name in ("add", "sub", "mul", "div", "sqrt", "rcp")
}


def _rounded(*arguments: np.ndarray, name: str, kind: str, mode: str, ftz: bool, sat: bool) -> np.ndarray:
    """Compute exactly and round once."""
    if ftz:
        arguments = tuple(flush(argument) for argument in arguments)
    if kind == "f32" and mode == "rn" and name in IN_FLOAT32:
        result = canonical(IN_FLOAT32[name](*arguments), kind)
    else:
        result = narrow(EXACT[name](*arguments), kind, mode)
        if mode == "rm" and name != "mul":
            result = np.where(_cancelled(name, *arguments), result.dtype.type(-0.0), result)
    result = flush(result) if ftz else result
    return saturate(result) if sat else result


def _cancelled(name: str, *arguments: np.ndarray) -> np.ndarray:
    """Return where terms of opposite signs add up to exactly zero: -0 towards minus infinity, else +0."""
    first = _multiply(*arguments[:2]) if name == "fma" else _wide(arguments[0])
    second = -_wide(arguments[-1]) if name == "sub" else _wide(arguments[-1])
    return (first == -second) & (np.signbit(first) != np.signbit(second))


def _in_float64(*arguments: np.ndarray, name: str) -> np.ndarray:
    return IN_FLOAT64[name](*arguments)


def _packed(*arguments: np.ndarray, kind: str, compute: Callable[..., np.ndarray]) -> np.ndarray:
    """Apply a function of 16-bit values to both halves."""
    lows, highs = zip(*(unpack(argument, kind) for argument in arguments), strict=True)
    return pack(compute(*lows), compute(*highs))


def _approximate(*arguments: np.ndarray, function: Callable[..., np.ndarray], ftz: bool) -> np.ndarray:
    """Compute in float64 and round to float32: nearer to the exact result than a card comes (2 ulps and more)."""
    if ftz:
        arguments = tuple(flush(argument) for argument in arguments)
    result = narrow(function(*map(_wide, arguments)), "f32")
    return flush(result) if ftz else result


def _extreme(a: np.ndarray, b: np.ndarray, *, name: str, kind: str, ftz: bool, nan: bool) -> np.ndarray:
    """Return the larger or smaller number: the one that is not NaN (with ``.NaN``: NaN), +0 above -0."""
    if ftz:
        a, b = flush(a), flush(b)
    largest = name == "max"
    wide_a, wide_b = _wide(a), _wide(b)
    first = (wide_a > wide_b) if largest else (wide_a < wide_b)
    same = wide_a == wide_b
    first |= same & (np.signbit(wide_a) != largest)  # among zeros: max takes the one without a sign
    first |= np.isnan(wide_b)
    result = np.where(first, a, b)
    if nan:
        result = np.where(np.isnan(wide_a) | np.isnan(wide_b), np.array(np.nan, result.dtype), result)
    return canonical(result, kind)


def _negated(a: np.ndarray, *, kind: str, ftz: bool) -> np.ndarray:
    return -(flush(a) if ftz else a)


def _absolute(a: np.ndarray, *, kind: str, ftz: bool) -> np.ndarray:
    return np.abs(flush(a) if ftz else a)


APPROXIMATE: Mapping[str, tuple[Callable[..., np.ndarray], int]] = {  # function, number of arguments
    "ex2.approx": (np.exp2, 1),
    "lg2.approx": (np.log2, 1),
    "rcp.approx": (lambda a: 1 / a, 1),
    "rsqrt.approx": (lambda a: 1 / np.sqrt(a), 1),
    "sqrt.approx": (np.sqrt, 1),
    "sin.approx": (np.sin, 1),
    "cos.approx": (np.cos, 1),
    "tanh.approx": (np.tanh, 1),
    "div.approx": (operator.truediv, 2),
    "div.full": (operator.truediv, 2),
}


def _float32() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}
    for name, count in {"add": 2, "sub": 2, "mul": 2, "fma": 3, "div": 2, "sqrt": 1, "rcp": 1}.items():
        exact_modes = name in EXACT
        modes = {f".{mode}": mode for mode in (MODES if exact_modes else MODES[:1])}
        modes |= {} if name in ("fma", "div", "sqrt", "rcp") else {"": "rn"}
        for spelled, mode in modes.items():
            for ftz in ("", ".ftz"):
                for sat in ("", ".sat") if exact_modes else ("",):
                    compute = partial(_rounded, name=name, kind="f32", mode=mode, ftz=bool(ftz), sat=bool(sat))
                    operations[f"{name}{spelled}{ftz}{sat}.f32"] = Operation(("f32",), ("f32",) * count, compute)
    for name, (function, count) in APPROXIMATE.items():
        for ftz in ("",) if name.startswith("tanh") else ("", ".ftz"):
            compute = partial(_approximate, function=function, ftz=bool(ftz))
            operations[f"{name}{ftz}.f32"] = Operation(("f32",), ("f32",) * count, compute)
    for name in ("min", "max"):
        for ftz in ("", ".ftz"):
            for nan in ("", ".NaN"):
                compute = partial(_extreme, name=name, kind="f32", ftz=bool(ftz), nan=bool(nan))
                operations[f"{name}{ftz}{nan}.f32"] = Operation(("f32",), ("f32", "f32"), compute)
    for ftz in ("", ".ftz"):
        operations[f"neg{ftz}.f32"] = Operation(("f32",), ("f32",), partial(_negated, kind="f32", ftz=bool(ftz)))
        operations[f"abs{ftz}.f32"] = Operation(("f32",), ("f32",), partial(_absolute, kind="f32", ftz=bool(ftz)))
    return operations


def _float64() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}
    for name, count in {"add": 2, "sub": 2, "mul": 2, "fma": 3, "div": 2, "sqrt": 1, "rcp": 1}.items():
        for mode in ("", ".rn") if count == 2 and name != "div" else (".rn",):
            operations[f"{name}{mode}.f64"] = Operation(("f64",), ("f64",) * count, partial(_in_float64, name=name))
    for name in ("min", "max"):
        operations[f"{name}.f64"] = Operation(
            ("f64",), ("f64", "f64"), partial(_extreme, name=name, kind="f64", ftz=False, nan=False)
        )
    operations["neg.f64"] = Operation(("f64",), ("f64",), partial(_negated, kind="f64", ftz=False))
    operations["abs.f64"] = Operation(("f64",), ("f64",), partial(_absolute, kind="f64", ftz=False))
    return operations


def _half(kind: str) -> Mapping[str, Operation]:
    """Return the opcodes of ``f16`` or ``bf16`` and of pairs of them."""
    single: dict[str, tuple[int, Callable[..., np.ndarray]]] = {}
    for name, count in {"add": 2, "sub": 2, "mul": 2, "fma": 3}.items():
        for mode in ("", ".rn") if count == 2 else (".rn",):
            compute = partial(_rounded, name=name, kind=kind, mode="rn", ftz=False, sat=False)
            single[name + mode] = count, compute
    for name in ("min", "max"):
        for nan in ("", ".NaN"):
            single[name + nan] = 2, partial(_extreme, name=name, kind=kind, ftz=False, nan=bool(nan))
    single["neg"] = 1, partial(_negated, kind=kind, ftz=False)
    single["abs"] = 1, partial(_absolute, kind=kind, ftz=False)
    operations: dict[str, Operation] = {}
    for name, (count, compute) in single.items():
        operations[f"{name}.{kind}"] = Operation((kind,), (kind,) * count, compute)
        packed = partial(_packed, kind=kind, compute=compute)
        operations[f"{name}.{kind}x2"] = Operation((f"{kind}x2",), (f"{kind}x2",) * count, packed)
    return operations


def _compared(a: np.ndarray, b: np.ndarray, *rest: np.ndarray, name: str, ftz: bool, combine: str) -> np.ndarray:
    if ftz:
        a, b = flush(a), flush(b)
    a, b = _wide(a), _wide(b)
    unordered = np.isnan(a) | np.isnan(b)
    result = COMPARISONS[name.removesuffix("u")](a, b) if name not in ("num", "nan") else ~unordered
    if name == "nan":
        result = unordered
    elif name.endswith("u"):
        result = result | unordered
    else:
        result = result & ~unordered
    return COMBINATIONS[combine](result, *rest)


COMPARISONS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
COMBINATIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "": lambda result: result,
    ".and": lambda result, other: result & other,
    ".or": lambda result, other: result | other,
    ".xor": lambda result, other: result ^ other,
}


def _comparisons() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}
    names = (*COMPARISONS, *(f"{name}u" for name in COMPARISONS), "num", "nan")
    for kind in ("f16", "bf16", "f32", "f64"):
        for name in names:
            for ftz in ("", ".ftz") if kind == "f32" else ("",):
                for combine in COMBINATIONS:
                    takes = (kind, kind, "pred") if combine else (kind, kind)
                    compute = partial(_compared, name=name, ftz=bool(ftz), combine=combine)
                    operations[f"setp.{name}{combine}{ftz}.{kind}"] = Operation(("pred",), takes, compute)
    return operations


FLOATS: Mapping[str, Operation] = {**_float32(), **_float64(), **_half("f16"), **_half("bf16"), **_comparisons()}
assert all(kind in DTYPES for operation in FLOATS.values() for kind in operation.takes)
