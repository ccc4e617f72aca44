"""What every opcode should give, bit by bit, in Python's integers and fractions: slow, and no line of the interpreter.

An oracle takes the bits of the arguments (integers) and returns the bits of the result, or ``NAN`` for any NaN.
Source: NVIDIA, "PTX ISA", chapter 9; IEEE 754-2019.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

NAN = -1
Bits = int


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format of IEEE 754."""

    width: int
    precision: int  # with the hidden bit
    nan: int  # as NVIDIA writes it

    @property
    def bias(self) -> int:
        return (1 << self.width - self.precision - 1) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.width - self.precision) - 1) << self.precision - 1


FORMATS: Mapping[str, Format] = {
    "f16": Format(16, 11, 0x7FFF),
    "bf16": Format(16, 8, 0x7FFF),
    "f32": Format(32, 24, 0x7FFFFFFF),
    "f64": Format(64, 53, NAN),
}
Real = Fraction | float  # a float only for infinity and NaN


def decode(bits: Bits, kind: str) -> tuple[bool, Real]:
    """Return the sign and the magnitude."""
    number_format = FORMATS[kind]
    negative, rest = bool(bits >> number_format.width - 1), bits & (1 << number_format.width - 1) - 1
    if rest >= number_format.infinity:
        return negative, math.inf if rest == number_format.infinity else math.nan
    exponent, fraction = rest >> number_format.precision - 1, rest & (1 << number_format.precision - 1) - 1
    if exponent:
        fraction |= 1 << number_format.precision - 1
    return negative, Fraction(fraction) * Fraction(2) ** (
        max(exponent, 1) - number_format.bias - number_format.precision + 1
    )


def value(bits: Bits, kind: str) -> Real:
    negative, magnitude = decode(bits, kind)
    return -magnitude if negative else magnitude


def encode(exact: Fraction, kind: str, mode: str = "rn", negative_zero: bool = False) -> Bits:
    """Round a real number; ``negative_zero``: which zero an exact zero is."""
    number_format = FORMATS[kind]
    sign = 1 << number_format.width - 1
    if exact == 0:
        return sign if negative_zero else 0
    negative, magnitude = exact < 0, abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, 1 - number_format.bias) - number_format.precision + 1)
    whole, rest = divmod(magnitude, step)
    up = {
        "rn": rest * 2 > step or (rest * 2 == step and whole % 2 == 1),
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    rounded = (whole + up) * step
    largest = (2 - Fraction(2) ** (1 - number_format.precision)) * Fraction(2) ** number_format.bias
    if rounded > largest:
        infinite = mode == "rn" or (mode == "rm" and negative) or (mode == "rp" and not negative)
        bits = number_format.infinity if infinite else number_format.infinity - 1
    else:
        smallest = Fraction(2) ** (1 - number_format.bias)
        if rounded < smallest:
            bits = int(rounded / (smallest / (1 << number_format.precision - 1)))
        else:
            exponent = rounded.numerator.bit_length() - rounded.denominator.bit_length()
            exponent -= rounded < Fraction(2) ** exponent
            bits = (exponent + number_format.bias << number_format.precision - 1) + int(
                (rounded / Fraction(2) ** exponent - 1) * (1 << number_format.precision - 1)
            )
    return bits | sign if negative else bits


def flush(bits: Bits, kind: str) -> Bits:
    number_format = FORMATS[kind]
    subnormal = bits >> number_format.precision - 1 & (1 << number_format.width - number_format.precision) - 1 == 0
    return bits & 1 << number_format.width - 1 if subnormal else bits


def saturate(bits: Bits, kind: str) -> Bits:
    if bits == FORMATS[kind].nan or bits == NAN:
        return 0
    number = value(bits, kind)
    return encode(Fraction(1), kind) if number > 1 else bits if number > 0 else 0


def arithmetic(name: str, arguments: tuple[Bits, ...], kind: str, mode: str) -> Bits:
    """Return add, sub, mul, fma, div, rcp or sqrt, rounded once."""
    if name == "rcp":
        return arithmetic("div", (encode(Fraction(1), kind), *arguments), kind, mode)
    number_format = FORMATS[kind]
    parts = [decode(bits, kind) for bits in arguments]
    if any(isinstance(size, float) and math.isnan(size) for _, size in parts):
        return number_format.nan
    if name == "sub":
        parts[1] = (not parts[1][0], parts[1][1])
        name = "add"
    if name == "sqrt":
        return _square_root(parts[0], arguments[0], kind)
    if name in ("mul", "fma"):
        (s, x), (t, y) = parts[:2]
        infinite = math.nan if 0 in (x, y) else math.inf
        product = (s != t, infinite if math.inf in (x, y) else x * y)
        if name == "mul":
            return _finished(product, kind, mode)
        parts = [product, parts[2]]
    if name == "div":
        (s, x), (t, y) = parts
        if x == y and x in (0, math.inf):
            return number_format.nan
        quotient = math.inf if y == 0 or x == math.inf else Fraction(0) if y == math.inf else x / y
        return _finished((s != t, quotient), kind, mode)
    (s, x), (t, y) = parts
    if math.nan in (x, y) or any(isinstance(size, float) and math.isnan(size) for size in (x, y)):
        return number_format.nan
    if x == math.inf or y == math.inf:
        if x == y and s != t:
            return number_format.nan
        return _finished((s if x == math.inf else t, math.inf), kind, mode)
    total = Fraction(-x if s else x) + Fraction(-y if t else y)
    if total == 0:
        return encode(Fraction(0), kind, negative_zero=s if s == t else mode == "rm")
    return encode(total, kind, mode)


def _finished(result: tuple[bool, Real], kind: str, mode: str) -> Bits:
    negative, size = result
    number_format = FORMATS[kind]
    if isinstance(size, float):
        return number_format.nan if math.isnan(size) else number_format.infinity | negative << number_format.width - 1
    return encode(Fraction(-size if negative else size), kind, mode, negative_zero=negative)


def _square_root(part: tuple[bool, Real], bits: Bits, kind: str) -> Bits:
    negative, size = part
    if size == 0:
        return bits
    if negative:
        return FORMATS[kind].nan
    if isinstance(size, float):
        return bits
    scale = 1 << 200
    number = size * scale * scale * (1 << 1200)
    root = math.isqrt(number.numerator // number.denominator)
    exact = root * root == number
    return encode(Fraction(2 * root + (not exact), 2 * scale * (1 << 600)), kind)


def compare(name: str, a: Bits, b: Bits, kind: str) -> bool:
    """Return setp's comparison."""
    if kind in FORMATS:
        x, y = value(a, kind), value(b, kind)
        unordered = any(isinstance(operand, float) and math.isnan(operand) for operand in (x, y))
        if name in ("num", "nan"):
            return unordered == (name == "nan")
        if unordered:
            return name.endswith("u")
        name = name.removesuffix("u")
    else:
        x, y = integer(a, kind), integer(b, kind)
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    return {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}[name]


def integer(bits: Bits, kind: str) -> int:
    """Return the number that the bits of an integer type mean."""
    width = int(kind[1:])
    return bits - (1 << width) if kind[0] == "s" and bits >> width - 1 else bits


def extreme(name: str, a: Bits, b: Bits, kind: str, nan: bool) -> Bits:
    """Return min or max."""
    if kind not in FORMATS:
        pick = min if name == "min" else max
        return pick((a, b), key=lambda bits: integer(bits, kind))
    numbers = [bits for bits in (a, b) if not _is_nan(bits, kind)]
    if not numbers or (nan and len(numbers) < 2):
        return FORMATS[kind].nan
    pick = min if name == "min" else max
    return pick(numbers, key=lambda bits: (value(bits, kind), not decode(bits, kind)[0]))


def _is_nan(bits: Bits, kind: str) -> bool:
    size = decode(bits, kind)[1]
    return isinstance(size, float) and math.isnan(size)


ROUND_TO_WHOLE: Mapping[str, Callable[[Fraction], int]] = {
    "rni": round,  # Python rounds ties to even
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


def to_integer(bits: Bits, source: str, target: str, mode: str) -> Bits:
    """Return a float as an integer: clamped; NaN as PTX defines it."""
    width = int(target[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if target[0] == "s" else (0, (1 << width) - 1)
    number = value(bits, source)
    if isinstance(number, float):
        if math.isnan(number):
            return 1 << width - 1 if source == "f64" or width == 64 else 0
        return (high if number > 0 else low) % (1 << width)
    return min(max(ROUND_TO_WHOLE[mode](Fraction(number)), low), high) % (1 << width)


def to_whole(bits: Bits, kind: str, mode: str) -> Bits:
    """Return a float rounded to a whole number in its own format."""
    negative, size = decode(bits, kind)
    if isinstance(size, float):
        return FORMATS[kind].nan if math.isnan(size) else bits
    whole = Fraction(ROUND_TO_WHOLE[mode](Fraction(-size if negative else size)))
    return encode(whole, kind, negative_zero=negative)


def to_float(bits: Bits, source: str, target: str, mode: str) -> Bits:
    """Return a float or an integer in another floating format."""
    if source not in FORMATS:
        return encode(Fraction(integer(bits, source)), target, mode)
    negative, size = decode(bits, source)
    return _finished((negative, size), target, mode)


def float8(bits: Bits, kind: str) -> Bits:
    """Return a float32 as e4m3 (fn) or e5m2, clamped to its largest number, from the table of all its numbers."""
    if _is_nan(bits, "f32"):
        return 0x7F
    number = value(bits, "f32")
    codes = [(number8, code) for code in range(128) if (number8 := float8_value(code, kind)) is not None]
    size = abs(number)
    best = (
        min(codes, key=lambda size_and_code: (abs(size_and_code[0] - size), size_and_code[1] % 2))
        if size <= codes[-1][0]
        else codes[-1]
    )
    return best[1] | (bits >> 31) << 7


def float8_value(code: Bits, kind: str) -> Fraction | None:
    """Return the magnitude that 7 bits mean; None for infinity and NaN."""
    fraction_bits, bias = {"e4m3": (3, 7), "e5m2": (2, 15)}[kind]
    exponent, fraction = code >> fraction_bits, code & (1 << fraction_bits) - 1
    if (kind == "e4m3" and code == 0x7F) or (kind == "e5m2" and exponent == 31):
        return None
    hidden = (1 << fraction_bits) if exponent else 0
    return Fraction(hidden + fraction) * Fraction(2) ** (max(exponent, 1) - bias - fraction_bits)
