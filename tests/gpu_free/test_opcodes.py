"""Every opcode of the table, against integers and fractions; an opcode that no oracle knows fails."""

import math
import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from gpu_free.families import FAMILIES, WIDTH, is_nan
from gpu_free.opcodes import OPCODES
from gpu_free.oracles import (
    FORMATS,
    NAN,
    Bits,
    to_float,
)
from gpu_free.values import DTYPES, Operation

SAMPLES = 60
APPROXIMATE_ULPS = 0.51  # one rounding to float32, and what float64 functions leave


def specials(kind: str) -> list[Bits]:
    """Return the corners of a type: zeros, ends, ties, subnormals, infinities, NaN."""
    width = WIDTH[kind]
    if width == 1:
        return [0, 1]
    if kind in FORMATS:
        number_format = FORMATS[kind]
        one, sign, quiet = encode_one(kind), 1 << width - 1, 1 << number_format.precision - 2
        size = [
            0,
            1,
            3,
            (1 << number_format.precision - 1) - 1,
            1 << number_format.precision - 1,
            one,
            one + 1,
            one - 1,
        ]
        size += [
            one + (1 << number_format.precision - 1),
            one + (3 << number_format.precision - 3),
            one - (1 << number_format.precision - 1),
        ]
        size += [number_format.infinity - 1, number_format.infinity, number_format.infinity | quiet]
        return [*size, *(bits | sign for bits in size)]
    return sorted(
        {0, 1, 2, 3, (1 << width) - 1, (1 << width) - 2, 1 << width - 1, (1 << width - 1) - 1, 0xFF % (1 << width)}
    )


def encode_one(kind: str) -> Bits:
    return FORMATS[kind].bias << FORMATS[kind].precision - 1


def draw(kind: str, generator: random.Random) -> Bits:
    """Return a corner, or any bits; floats mostly of sizes that meet each other in a sum."""
    if kind in ("f16x2", "bf16x2"):
        return draw(kind[:-2], generator) | draw(kind[:-2], generator) << 16
    choice = generator.random()
    if choice < 0.4:
        return generator.choice(specials(kind))
    bits = generator.getrandbits(WIDTH[kind])
    if kind in FORMATS and choice < 0.85:
        number_format = FORMATS[kind]
        exponent = number_format.bias + generator.randint(-12, 12)
        bits = (
            bits & (1 << number_format.precision - 1) - 1
            | exponent << number_format.precision - 1
            | bits >> number_format.width - 1 << number_format.width - 1
        )
    return bits


def arguments_for(name: str, operation: Operation) -> list[tuple[Bits, ...]]:
    """Return argument tuples: random, but shift counts near the width, and no division by zero."""
    generator = random.Random(name)
    rows = []
    family = name.split(".")[0]
    for _ in range(SAMPLES):
        row = [draw(kind, generator) for kind in operation.takes]
        if family in ("neg", "abs") and operation.takes[0].endswith("x2"):  # which NaN comes out is not defined
            row = [0 if {bits & 0x7FFF > 0x7C00, bits >> 16 & 0x7FFF > 0x7C00} & {True} else bits for bits in row]
        if family in ("shl", "shr", "shf"):
            row[-1] = generator.choice([0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1 << 31])
        if family in ("bfe", "bfi"):
            row[-2:] = (
                generator.choice([0, 1, 7, 16, 31, 32, 63, 64, 255, 256]),
                generator.choice([0, 1, 5, 16, 32, 64, 255]),
            )
        if family in ("div", "rem") and operation.takes[0][0] in "us" and row[1] == 0:
            row[1] = 3
        rows.append(tuple(row))
    return rows


def computed(operation: Operation, rows: list[tuple[Bits, ...]]) -> list[tuple[Bits, ...]]:
    """Return the bits that the interpreter gives, and check that its types are those that the table promises."""
    columns = []
    for kind, column in zip(operation.takes, zip(*rows, strict=True), strict=True):
        width = np.bool_ if WIDTH[kind] == 1 else f"u{WIDTH[kind] // 8}"
        columns.append(np.array(column, np.uint64).astype(width).view(DTYPES[kind]))
    with np.errstate(all="ignore"):
        results = operation.compute(*columns)
    results = results if isinstance(results, tuple) else (results,)
    bits = []
    for kind, result in zip(operation.gives, results, strict=True):
        assert result.dtype.itemsize == DTYPES[kind].itemsize
        assert (result.dtype == bool) == (WIDTH[kind] == 1)
        view = result if result.dtype == bool else np.ascontiguousarray(result).view(f"u{result.dtype.itemsize}")
        bits.append([int(value) for value in view])
    return list(zip(*bits, strict=True))


def same(actual: Bits, expected: Bits, kind: str) -> bool:
    return actual == expected or (expected == NAN and kind in FORMATS and is_nan(actual, kind))


def is_approximate(name: str) -> bool:
    return "approx" in name.split(".") or "full" in name.split(".")


@pytest.mark.parametrize("family", sorted({name.split(".")[0] for name in OPCODES}))
def test_opcodes_give_the_oracle_s_bits(family: str) -> None:
    for name, operation in OPCODES.items():
        if name.split(".")[0] != family or is_approximate(name):
            continue
        oracle = FAMILIES[family](family, name.split(".")[1:], name.split(".")[-1])
        rows = arguments_for(name, operation)
        for row, results in zip(rows, computed(operation, rows), strict=True):
            actual = results[0]
            expected = oracle(*row)
            if operation.gives[-1] == "cc":  # the oracle's number is longer than the register
                width = WIDTH[operation.gives[0]]
                assert results[1] == (expected >> width & 1), (name, [f"{bits:#x}" for bits in row])
                expected %= 1 << width
            shown = [f"{bits:#x}" for bits in row]
            assert same(actual, expected, operation.gives[0]), f"{name} {shown}: {actual:#x}, not {expected:#x}"


APPROXIMATE: Mapping[str, Callable[..., float]] = {
    "ex2": lambda a: 2.0**a,
    "lg2": math.log2,
    "rcp": lambda a: 1 / a,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "sqrt": math.sqrt,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "div": lambda a, b: a / b,
}


@pytest.mark.parametrize("name", [name for name in OPCODES if is_approximate(name)])
def test_approximate_opcodes_are_exact_to_one_rounding(name: str) -> None:
    operation, generator = OPCODES[name], random.Random(name)
    rows = [tuple(generator.uniform(0.01, 20) for _ in operation.takes) for _ in range(SAMPLES)]
    values = np.array(rows, np.float32)
    results = operation.compute(*values.T)
    for row, result in zip(values.tolist(), results, strict=True):
        exact = APPROXIMATE[name.split(".")[0]](*row)
        assert abs(float(result) - exact) <= APPROXIMATE_ULPS * np.spacing(np.float32(abs(exact))), (name, row)


@pytest.mark.parametrize(
    ("name", "argument", "expected"),
    [
        ("ex2.approx.f32", -np.inf, 0.0),
        ("ex2.approx.f32", np.inf, np.inf),
        ("ex2.approx.f32", -140.0, 2.0**-140),
        ("ex2.approx.ftz.f32", -140.0, 0.0),
        ("lg2.approx.f32", 0.0, -np.inf),
        ("rcp.approx.f32", 0.0, np.inf),
        ("rcp.approx.ftz.f32", 2.0**-140, np.inf),
        ("rsqrt.approx.f32", 0.0, np.inf),
        ("rsqrt.approx.f32", np.inf, 0.0),
        ("rsqrt.approx.f32", -1.0, np.nan),
    ],
)
def test_approximate_opcodes_at_the_ends(name: str, argument: float, expected: float) -> None:
    with np.errstate(all="ignore"):
        (result,) = OPCODES[name].compute(np.array([argument], np.float32))
    np.testing.assert_equal(float(result), expected)


def test_the_oracle_agrees_with_numpy_s_own_rounding() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 2000, np.uint64).astype(np.uint32)
    with np.errstate(all="ignore"):
        halves = bits.view(np.float32).astype(np.float16).view(np.uint16)
    for single, half in zip(bits.tolist(), halves.tolist(), strict=True):
        if not is_nan(single, "f32"):
            assert to_float(single, "f32", "f16", "rn") == half
