"""Oracles by family of opcodes: the parts of an opcode's name choose a function of the arguments' bits."""

import math
from collections.abc import Callable, Mapping

from gpu_free.oracles import (
    FORMATS,
    NAN,
    Bits,
    arithmetic,
    compare,
    decode,
    encode,
    extreme,
    float8,
    float8_value,
    flush,
    integer,
    saturate,
    to_float,
    to_integer,
    to_whole,
)
from gpu_free.values import DTYPES

Oracle = Callable[..., Bits]
WIDTH = {kind: dtype.itemsize * 8 for kind, dtype in DTYPES.items()} | {"pred": 1, "cc": 1}


def is_nan(bits: Bits, kind: str) -> bool:
    size = decode(bits, kind)[1]
    return isinstance(size, float) and math.isnan(size)


def floating(name: str, parts: list[str], kind: str) -> Oracle:
    mode = next((part for part in parts if part in ("rn", "rz", "rm", "rp")), "rn")

    def oracle(*row: Bits) -> Bits:
        if "ftz" in parts:
            row = tuple(flush(bits, kind) for bits in row)
        result = arithmetic(name, row, kind, mode)
        if "ftz" in parts:
            result = flush(result, kind)
        return saturate(result, kind) if "sat" in parts else result

    return oracle


def pairwise(oracle: Oracle) -> Oracle:
    def both(*row: Bits) -> Bits:
        return oracle(*(bits & 0xFFFF for bits in row)) | oracle(*(bits >> 16 for bits in row)) << 16

    return both


def sum_or_product(name: str, parts: list[str], kind: str) -> Oracle:
    if kind.endswith("x2"):
        return pairwise(floating(name, parts, kind[:-2]))
    if kind in FORMATS:
        return floating(name, parts, kind)
    if name in ("add", "sub", "addc", "subc"):
        return carried(name, parts, kind)
    width = WIDTH[kind]
    if name in ("mul", "mad", "madc"):
        half = next(part for part in parts if part in ("lo", "hi", "wide"))

        def product(*row: Bits) -> Bits:
            full = integer(row[0], kind) * integer(row[1], kind)
            total = full >> width if half == "hi" else full
            size = 2 * width if half == "wide" else width
            total %= 1 << size
            return (total + sum(row[2:])) if "cc" in parts else (total + sum(row[2:])) % (1 << size)

        return product
    return {
        "div": lambda a, b: truncated(integer(a, kind), integer(b, kind)) % (1 << width),
        "rem": lambda a, b: (
            (integer(a, kind) - truncated(integer(a, kind), integer(b, kind)) * integer(b, kind)) % (1 << width)
        ),
    }[name]


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def carried(name: str, parts: list[str], kind: str) -> Oracle:
    """Return sums beyond the width too: the carry is in the next bit."""
    keep = "cc" in parts

    def oracle(*row: Bits) -> Bits:
        total = row[0] - sum(row[1:]) if name.startswith("sub") else sum(row)
        return total if keep else total % (1 << WIDTH[kind])

    return oracle


def sign_change(name: str, parts: list[str], kind: str) -> Oracle:
    if kind.endswith("x2"):
        return pairwise(sign_change(name, parts, kind[:-2]))
    if kind not in FORMATS:
        change = abs if name == "abs" else int.__neg__
        return lambda a: change(integer(a, kind)) % (1 << WIDTH[kind])
    sign = 1 << WIDTH[kind] - 1

    def oracle(a: Bits) -> Bits:
        if is_nan(a, kind):
            return NAN
        a = flush(a, kind) if "ftz" in parts else a
        return a & ~sign if name == "abs" else a ^ sign

    return oracle


def extremes(name: str, parts: list[str], kind: str) -> Oracle:
    if kind.endswith("x2"):
        return pairwise(extremes(name, parts, kind[:-2]))

    def oracle(a: Bits, b: Bits) -> Bits:
        if "ftz" in parts:
            a, b = flush(a, kind), flush(b, kind)
        return extreme(name, a, b, kind, "NaN" in parts)

    return oracle


def approximate(name: str, parts: list[str], kind: str) -> Oracle:
    return lambda *row: NAN  # see test_approximate_opcodes


def set_predicate(name: str, parts: list[str], kind: str) -> Oracle:
    def oracle(a: Bits, b: Bits, *rest: Bits) -> Bits:
        if "ftz" in parts:
            a, b = flush(a, kind), flush(b, kind)
        result = compare(parts[0], a, b, kind)
        for word, combine in (("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)):
            if word in parts:
                return combine(int(result), rest[0])
        return int(result)

    return oracle


def shift(name: str, parts: list[str], kind: str) -> Oracle:
    width = WIDTH[kind]
    if name == "shl":
        return lambda a, count: (a << count) % (1 << width) if count < width else 0
    return lambda a, count: (integer(a, kind) >> min(count, width)) % (1 << width)


def funnel(name: str, parts: list[str], kind: str) -> Oracle:
    def oracle(a: Bits, b: Bits, count: Bits) -> Bits:
        count = count % 32 if "wrap" in parts else min(count, 32)
        both = b << 32 | a
        return (both << count >> 32 if parts[0] == "l" else both >> count) % (1 << 32)

    return oracle


def field_extract(name: str, parts: list[str], kind: str) -> Oracle:
    top = WIDTH[kind] - 1

    def oracle(a: Bits, position: Bits, length: Bits) -> Bits:
        position, length = position & 0xFF, length & 0xFF
        sign = 0 if kind[0] == "u" or length == 0 else a >> min(position + length - 1, top) & 1
        bits = [
            a >> position + index & 1 if index < length and position + index <= top else sign
            for index in range(top + 1)
        ]
        return sum(bit << index for index, bit in enumerate(bits))

    return oracle


def field_insert(name: str, parts: list[str], kind: str) -> Oracle:
    def oracle(a: Bits, b: Bits, position: Bits, length: Bits) -> Bits:
        position, length = position & 0xFF, length & 0xFF
        for index in range(length):
            if position + index < WIDTH[kind]:
                b = b & ~(1 << position + index) | (a >> index & 1) << position + index
        return b

    return oracle


def permute(name: str, parts: list[str], kind: str) -> Oracle:
    def oracle(a: Bits, b: Bits, selector: Bits) -> Bits:
        source = (b << 32 | a).to_bytes(8, "little")
        chosen = [(selector >> 4 * part & 7, selector >> 4 * part & 8) for part in range(4)]
        return int.from_bytes(
            bytes((0xFF if source[at] & 0x80 else 0) if sign else source[at] for at, sign in chosen), "little"
        )

    return oracle


def logic(name: str, parts: list[str], kind: str) -> Oracle:
    width = WIDTH[kind]
    return {
        "and": int.__and__,
        "or": int.__or__,
        "xor": int.__xor__,
        "not": lambda a: ~a % (1 << width),
        "clz": lambda a: width - a.bit_length(),
        "popc": lambda a: a.bit_count(),
        "brev": lambda a: int(f"{a:0{width}b}"[::-1], 2),
        "lop3": lambda a, b, c, table: sum(
            (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
        ),
        "selp": lambda a, b, choice: a if choice else b,
    }[name]


def convert(name: str, parts: list[str], kind: str) -> Oracle:
    source, target = parts[-1], parts[-2]
    mode = next((part for part in parts if part in ("rn", "rz", "rm", "rp")), "rn")
    whole = next((part for part in parts if part in ("rni", "rzi", "rmi", "rpi")), None)
    if target.startswith("e"):
        if source == "f32":
            return lambda high, low: float8(high, target[:4]) << 8 | float8(low, target[:4])
        return lambda pair: float8_of_half(pair >> 16, target[:4]) << 8 | float8_of_half(pair & 0xFFFF, target[:4])
    if source.startswith("e"):
        return lambda pair: half_of_float8(pair >> 8, source[:4]) << 16 | half_of_float8(pair & 0xFF, source[:4])
    if target.endswith("x2"):
        return lambda high, low: half_of(high, target, mode, parts) << 16 | half_of(low, target, mode, parts)

    def oracle(a: Bits) -> Bits:
        if source not in FORMATS and target not in FORMATS:
            number = integer(a, source)
            if "sat" in parts:
                low, high = limits(target)
                number = min(max(number, low), high)
            return number % (1 << WIDTH[target])
        if "ftz" in parts and source == "f32":
            a = flush(a, source)
        if target not in FORMATS:
            return to_integer(a, source, target, str(whole))
        result = to_float(a, source, target, mode) if source != target else to_whole(a, source, whole) if whole else a
        if "ftz" in parts and target == "f32":
            result = flush(result, target)
        if "sat" in parts:
            return 0 if is_nan(a, source) else saturate(result, target)
        return result

    return oracle


def limits(kind: str) -> tuple[int, int]:
    width = WIDTH[kind]
    return (-(1 << width - 1), (1 << width - 1) - 1) if kind[0] == "s" else (0, (1 << width) - 1)


def half_of(bits: Bits, target: str, mode: str, parts: list[str]) -> Bits:
    kind = target[:-2]
    result = to_float(bits, "f32", kind, mode)
    if is_nan(result, kind):
        return result
    if "satfinite" in parts and result & 0x7FFF == FORMATS[kind].infinity:
        result -= 1
    return result


def float8_of_half(bits: Bits, kind: str) -> Bits:
    return float8(to_float(bits, "f16", "f32", "rn"), kind)


def half_of_float8(bits: Bits, kind: str) -> Bits:
    size = float8_value(bits & 0x7F, kind)
    if size is None:
        infinite = kind == "e5m2" and bits & 0x7F == 0x7C
        return (FORMATS["f16"].infinity | bits >> 7 << 15) if infinite else FORMATS["f16"].nan
    return encode(-size if bits >> 7 else size, "f16", negative_zero=bool(bits >> 7))


FAMILIES: Mapping[str, Callable[[str, list[str], str], Oracle]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "fma", "div", "rem", "rcp", "sqrt", "mad", "madc", "addc", "subc"), sum_or_product
    ),
    **dict.fromkeys(("neg", "abs"), sign_change),
    **dict.fromkeys(("min", "max"), extremes),
    **dict.fromkeys(("ex2", "lg2", "rsqrt", "sin", "cos", "tanh"), approximate),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("and", "or", "xor", "not", "clz", "popc", "brev", "lop3", "selp"), logic),
    "setp": set_predicate,
    "shf": funnel,
    "bfe": field_extract,
    "bfi": field_insert,
    "prmt": permute,
    "cvt": convert,
}
