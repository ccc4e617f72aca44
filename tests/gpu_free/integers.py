"""Integer, logic and selection opcodes, exact modulo their width."""

import operator
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from gpu_free.floats import COMBINATIONS, COMPARISONS
from gpu_free.values import DTYPES, Operation

WIDTHS = (16, 32, 64)
BYTE = np.uint32(0xFF)


def _wrapped(*arguments: np.ndarray, compute: Callable[..., np.ndarray], kind: str) -> np.ndarray:
    """Compute without regard to overflow: NumPy's integers wrap like the card's."""
    return compute(*arguments).astype(DTYPES[kind])


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "u":
        return a // b
    magnitude = _magnitude(a) // _magnitude(b)
    return np.where((a < 0) != (b < 0), -magnitude.view(a.dtype), magnitude.view(a.dtype))


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _quotient(a, b) * b


def _magnitude(a: np.ndarray) -> np.ndarray:
    return np.abs(a).view(f"u{a.dtype.itemsize}")


def _left(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), np.zeros_like(a))


def _right(a: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Shift right; a count past the width leaves zeros, or copies of the sign."""
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(count, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(count < bits, shifted, np.zeros_like(a))


def _wide_product(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    twice = DTYPES[f"{kind[0]}{2 * int(kind[1:])}"]
    return a.astype(twice) * b.astype(twice)


def _high_product(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    bits = int(kind[1:])
    if bits < 64:
        return (_wide_product(a, b, kind) >> bits).astype(DTYPES[kind])
    low, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    (ua, ub) = a.view(np.uint64), b.view(np.uint64)
    a1, a0, b1, b0 = ua >> low, ua & mask, ub >> low, ub & mask
    middle = a1 * b0 + (a0 * b0 >> low)
    middle_low = a0 * b1 + (middle & mask)
    high = a1 * b1 + (middle >> low) + (middle_low >> low)
    if kind == "s64":  # a negative factor counts as itself plus 2**64
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return high.view(DTYPES[kind])


def _multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray, *, half: str, kind: str) -> np.ndarray:
    return PRODUCTS[half](a, b, kind) + c


PRODUCTS: Mapping[str, Callable[[np.ndarray, np.ndarray, str], np.ndarray]] = {
    "lo": lambda a, b, kind: a * b,
    "hi": _high_product,
    "wide": _wide_product,
}


def _with_carry(*arguments: np.ndarray, name: str, carry_in: bool, carry_out: bool, half: str, kind: str):
    """Add, subtract or multiply-add with the carry flag (set by a borrow for sub) in, out, or both."""
    carry = arguments[-1].astype(DTYPES[kind]) if carry_in else DTYPES[kind].type(0)
    if name == "sub":
        first, second = arguments[:2]
        total = first - second - carry
        overflowed = (first < second) | ((first == second) & (carry != 0))
    else:
        first = arguments[0] if name == "add" else PRODUCTS[half](arguments[0], arguments[1], kind)
        second = arguments[1] if name == "add" else arguments[2]
        total = first + second + carry
        overflowed = (total < first) | ((total == first) & (carry != 0))
    return (total, overflowed) if carry_out else total


def _field_extracted(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    start, count = (position & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
    unsigned = a.view(f"u{a.dtype.itemsize}")
    mask = _ones(count, bits)
    field = _right(unsigned, start) & mask
    if a.dtype.kind == "u":
        return field
    sign_at = np.minimum(start + count - 1, bits - 1)
    negative = (count > 0) & ((_right(unsigned, np.maximum(sign_at, 0)) & unsigned.dtype.type(1)) == 1)
    width = np.clip(bits - start, 0, count)  # beyond the top of a, copies of the sign
    return np.where(negative, (field & _ones(width, bits)) | ~_ones(width, bits), field).view(a.dtype)


def _field_inserted(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    start, count = (position & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
    mask = _left(_ones(count, bits), start)
    return (b & ~mask) | (_left(a, start) & mask)


def _ones(count: np.ndarray, bits: int) -> np.ndarray:
    """Return the number whose lowest ``count`` bits are set."""
    full = np.full(count.shape, (1 << bits) - 1, f"u{bits // 8}")
    return np.where(count >= bits, full, ~_left(full, np.minimum(count, bits)))


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Pick four of eight bytes; the selector's fourth bit asks for the byte's sign instead."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for part in range(4):
        nibble = selector >> np.uint32(4 * part) & np.uint32(0xF)
        byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)))).astype(np.uint32) & BYTE
        byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint32(0x80), BYTE, np.uint32(0)), byte)
        result |= byte << np.uint32(8 * part)
    return result


def _funnel(a: np.ndarray, b: np.ndarray, count: np.ndarray, *, left: bool, wrap: bool) -> np.ndarray:
    """Shift b:a and return the high (left) or the low (right) half."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    amount = (count & np.uint32(31) if wrap else np.minimum(count, np.uint32(32))).astype(np.uint64)
    shifted = (both << amount) >> np.uint64(32) if left else both >> amount
    return shifted.astype(np.uint32)


def _table_lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Apply the function of three bits whose truth table is ``table``, bit by bit."""
    result = np.zeros_like(a)
    for row in range(8):
        match = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        result |= np.where(table >> np.uint32(row) & np.uint32(1), match, np.uint32(0))
    return result


def _leading_zeros(a: np.ndarray) -> np.ndarray:
    bits = 8 * a.dtype.itemsize
    count = np.zeros(a.shape, np.uint32)
    for step in (shift for shift in (32, 16, 8, 4, 2, 1) if shift < bits):
        high = a >> a.dtype.type(bits - step) == 0
        count += np.where(high, np.uint32(step), np.uint32(0))
        a = np.where(high, a << a.dtype.type(step), a)
    return count + (a == 0)


def _reversed_bits(a: np.ndarray) -> np.ndarray:
    size = a.dtype.itemsize
    flipped = np.packbits(np.unpackbits(np.ascontiguousarray(a).view(np.uint8)).reshape(-1, 8 * size)[:, ::-1], axis=1)
    bits = np.unpackbits(flipped.reshape(-1, size)[:, ::-1], axis=1)  # bytes are little-endian, bits are not
    return np.packbits(bits.reshape(-1, size, 8)[:, ::-1].reshape(-1, 8 * size), axis=1).view(a.dtype)[:, 0]


def _select(a: np.ndarray, b: np.ndarray, choice: np.ndarray) -> np.ndarray:
    return np.where(choice, a, b)


def _compared(a: np.ndarray, b: np.ndarray, *rest: np.ndarray, name: str, combine: str) -> np.ndarray:
    return COMBINATIONS[combine](COMPARISONS[name](a, b), *rest)


def _plain() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}
    for bits in WIDTHS:
        for kind in (f"s{bits}", f"u{bits}"):
            two: dict[str, Callable[..., np.ndarray]] = {
                "add": operator.add,
                "sub": operator.sub,
                "mul.lo": operator.mul,
                "div": _quotient,
                "rem": _remainder,
                "min": np.minimum,
                "max": np.maximum,
            }
            for name, compute in two.items():
                wrapped = partial(_wrapped, compute=compute, kind=kind)
                operations[f"{name}.{kind}"] = Operation((kind,), (kind, kind), wrapped)
            operations[f"mul.hi.{kind}"] = Operation((kind,), (kind, kind), partial(_high_product, kind=kind))
            operations[f"shr.{kind}"] = Operation((kind,), (kind, "u32"), _right)
            for half in ("lo", "hi"):
                compute = partial(_multiply_add, half=half, kind=kind)
                operations[f"mad.{half}.{kind}"] = Operation((kind,), (kind,) * 3, compute)
            if bits < 64:
                twice = f"{kind[0]}{2 * bits}"
                operations[f"mul.wide.{kind}"] = Operation((twice,), (kind, kind), partial(_wide_product, kind=kind))
                compute = partial(_multiply_add, half="wide", kind=kind)
                operations[f"mad.wide.{kind}"] = Operation((twice,), (kind, kind, twice), compute)
        operations[f"neg.s{bits}"] = Operation((f"s{bits}",), (f"s{bits}",), np.negative)
        operations[f"abs.s{bits}"] = Operation((f"s{bits}",), (f"s{bits}",), np.abs)
        operations[f"shl.b{bits}"] = Operation((f"b{bits}",), (f"b{bits}", "u32"), _left)
        operations[f"shr.b{bits}"] = Operation((f"b{bits}",), (f"b{bits}", "u32"), _right)
    return operations


def _logic() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}
    for kind in ("pred", "b16", "b32", "b64"):
        for name, compute in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
            operations[f"{name}.{kind}"] = Operation((kind,), (kind, kind), compute)
        operations[f"not.{kind}"] = Operation((kind,), (kind,), np.invert)
    for kind in ("b32", "b64"):
        operations[f"clz.{kind}"] = Operation(("u32",), (kind,), _leading_zeros)
        operations[f"popc.{kind}"] = Operation(("u32",), (kind,), lambda a: np.bitwise_count(a).astype(np.uint32))
        operations[f"brev.{kind}"] = Operation((kind,), (kind,), _reversed_bits)
        operations[f"bfi.{kind}"] = Operation((kind,), (kind, kind, "u32", "u32"), _field_inserted)
        for sign in "us":
            typed = sign + kind[1:]
            operations[f"bfe.{typed}"] = Operation((typed,), (typed, "u32", "u32"), _field_extracted)
    operations["prmt.b32"] = Operation(("b32",), ("b32",) * 3, _permuted)
    operations["lop3.b32"] = Operation(("b32",), ("b32",) * 4, _table_lookup)
    for direction in "lr":
        for limit in ("wrap", "clamp"):
            compute = partial(_funnel, left=direction == "l", wrap=limit == "wrap")
            operations[f"shf.{direction}.{limit}.b32"] = Operation(("b32",), ("b32", "b32", "u32"), compute)
    return operations


def _choices() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}
    for bits in WIDTHS:
        for kind in (f"b{bits}", f"u{bits}", f"s{bits}", *((f"f{bits}",) if bits > 16 else ())):
            operations[f"selp.{kind}"] = Operation((kind,), (kind, kind, "pred"), _select)
        for kind in (f"b{bits}", f"u{bits}", f"s{bits}"):
            names = ("eq", "ne") if kind.startswith("b") else tuple(COMPARISONS)
            aliases = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"} if kind.startswith("u") else {}
            for name, meaning in {**{other: other for other in names}, **aliases}.items():
                for combine in COMBINATIONS:
                    takes = (kind, kind, "pred") if combine else (kind, kind)
                    compute = partial(_compared, name=meaning, combine=combine)
                    operations[f"setp.{name}{combine}.{kind}"] = Operation(("pred",), takes, compute)
    return operations


def _carries() -> Mapping[str, Operation]:
    operations: dict[str, Operation] = {}
    for bits in (32, 64):
        for kind in (f"u{bits}", f"s{bits}"):
            unsigned = f"u{bits}"  # the carry is that of unsigned addition for both
            for spelled, (carry_in, carry_out) in {
                ".cc": (False, True),
                "c": (True, False),
                "c.cc": (True, True),
            }.items():
                flags = {"carry_in": carry_in, "carry_out": carry_out, "kind": unsigned}
                gives = (unsigned, "cc") if carry_out else (unsigned,)
                extra = ("cc",) if carry_in else ()
                for name in ("add", "sub"):
                    compute = partial(_with_carry, name=name, half="", **flags)
                    operations[f"{name}{spelled}.{kind}"] = Operation(gives, (unsigned,) * 2 + extra, compute)
                for half in ("lo", "hi"):
                    if half == "hi" and kind[0] == "s":
                        continue  # a signed high product is another function
                    compute = partial(_with_carry, name="mad", half=half, **flags)
                    carry, tail = ("c", ".cc") if spelled == "c.cc" else (("c", "") if carry_in else ("", ".cc"))
                    name = f"mad{carry}.{half}{tail}.{kind}"
                    operations[name] = Operation(gives, (unsigned,) * 3 + extra, compute)
    return operations


INTEGERS: Mapping[str, Operation] = {**_plain(), **_logic(), **_choices(), **_carries()}
