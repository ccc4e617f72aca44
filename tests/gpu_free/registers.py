"""Registers of many threads: bits, read and written as any type of their width, and which were never written."""

from collections.abc import Mapping

import numpy as np
from gpu_free.memory import Access
from gpu_free.ptx import Address, Discard, Immediate, Instruction, Operand, PtxError, Register, Special, Symbol, Vector
from gpu_free.report import Report
from gpu_free.values import DTYPES

BITS = {
    1: np.dtype(bool),
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
}
CARRY = Register("%carry", 1)


class Registers:
    """The register file of a batch of threads."""

    def __init__(
        self, size: int, special: Mapping[str, np.ndarray], symbols: Mapping[str, int], report: Report
    ) -> None:
        """Start with nothing written; ``special``: %tid.x …; ``symbols``: a variable's address."""
        self.size, self.special, self.symbols, self.report = size, special, symbols, report
        self.bits: dict[str, np.ndarray] = {}
        self.unwritten: dict[str, np.ndarray] = {}  # only of registers that not every thread has written

    def read(
        self, operand: Operand, kind: str, lanes: np.ndarray, instruction: Instruction, *, any_width: bool = False
    ) -> np.ndarray:
        """Return an operand as a type, one element for each of the threads ``lanes``.

        With ``any_width`` the low bits of a wider register count.
        """
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            bits = self._bits(operand, lanes, instruction)
            if operand.negated:
                bits = ~bits
            if bits.dtype.itemsize != dtype.itemsize or (operand.bits == 1) != (dtype.kind == "b"):
                if not any_width or bits.dtype.itemsize < dtype.itemsize or operand.bits == 1:
                    raise PtxError(f"line {instruction.line}: {operand.name} is no {kind}: {instruction.text}")
                bits = bits.astype(f"u{dtype.itemsize}")
            return bits.view(dtype)
        if isinstance(operand, Immediate):
            width = BITS[8 * dtype.itemsize] if dtype.kind != "b" else BITS[1]
            value = operand.value % (1 << 8 * dtype.itemsize)
            return np.full(len(lanes), value, width).view(dtype)
        if isinstance(operand, Special):
            return self._resized(self.special[operand.name][lanes], dtype)
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return np.full(len(lanes), self.symbols[operand.name], f"u{dtype.itemsize}").view(dtype)
        raise PtxError(f"line {instruction.line}: no value: {instruction.text}")

    def write(
        self,
        operand: Operand,
        kind: str,
        values: np.ndarray,
        lanes: np.ndarray,
        instruction: Instruction,
        *,
        any_width: bool = False,
    ) -> None:
        """Store a typed result; with ``any_width`` a wider register gets it extended by its sign or by zeros."""
        if isinstance(operand, Discard):
            return
        if not isinstance(operand, Register):
            raise PtxError(f"line {instruction.line}: no register: {instruction.text}")
        dtype = BITS[operand.bits]
        if values.dtype.itemsize != dtype.itemsize or (values.dtype == bool) != (operand.bits == 1):
            if not any_width or values.dtype.itemsize > dtype.itemsize or operand.bits == 1:
                raise PtxError(f"line {instruction.line}: {operand.name} holds no {kind}: {instruction.text}")
            signed = values.dtype.kind == "i"
            values = values.view(f"{'i' if signed else 'u'}{values.dtype.itemsize}")
            values = values.astype(f"{'i' if signed else 'u'}{dtype.itemsize}")
        bits = values.view(dtype)
        if len(lanes) == self.size:
            self.bits[operand.name] = bits
            self.unwritten.pop(operand.name, None)
            return
        old = self.bits.get(operand.name)
        if old is None:
            new, unwritten = np.zeros(self.size, dtype), np.ones(self.size, bool)
        else:
            new, unwritten = old.copy(), self.unwritten.get(operand.name)  # what another register shares stays as it is
            unwritten = None if unwritten is None else unwritten.copy()
        new[lanes] = bits
        self.bits[operand.name] = new
        if unwritten is not None:
            unwritten[lanes] = False
            self.unwritten[operand.name] = unwritten
            if not unwritten.any():
                del self.unwritten[operand.name]

    def read_carry(self, lanes: np.ndarray, instruction: Instruction) -> np.ndarray:
        """Return the carry flag."""
        return self.read(CARRY, "pred", lanes, instruction)

    def write_carry(self, values: np.ndarray, lanes: np.ndarray) -> None:
        """Set the carry flag."""
        self.write(CARRY, "pred", values, lanes, Instruction("", (), None, 0, "carry"))

    def address(
        self, operand: Operand, space: str, lanes: np.ndarray, instruction: Instruction
    ) -> np.ndarray | Address:
        """Return the addresses of ``[register + offset]`` as int64; a parameter's as it is written."""
        if not isinstance(operand, Address):
            raise PtxError(f"line {instruction.line}: no address: {instruction.text}")
        if space == "param":
            return operand
        if isinstance(operand.base, Symbol):
            base = np.full(len(lanes), self.symbols[operand.base.name])
        else:
            base = self.read(operand.base, f"u{operand.base.bits}", lanes, instruction).astype(np.int64)
        return base + operand.offset

    def read_elements(
        self, operand: Operand, access: Access, lanes: np.ndarray, instruction: Instruction
    ) -> np.ndarray:
        """Return what a store writes: (threads, bytes)."""
        parts = [
            self.read(part, f"u{access.bits}", lanes, instruction, any_width=True)
            for part in _parts(operand, access, instruction)
        ]
        return np.ascontiguousarray(np.stack(parts, axis=1)).view(np.uint8)

    def write_elements(
        self, operand: Operand, access: Access, values: np.ndarray, lanes: np.ndarray, instruction: Instruction
    ) -> None:
        """Store what a load read, (threads, bytes); a wider register gets it extended as the type says."""
        sign = "i" if access.kind.startswith("s") else "u"
        elements = np.ascontiguousarray(values).view(f"{sign}{access.bits // 8}")
        for column, part in enumerate(_parts(operand, access, instruction)):
            self.write(part, access.kind, np.ascontiguousarray(elements[:, column]), lanes, instruction, any_width=True)

    def move(self, instruction: Instruction, lanes: np.ndarray) -> None:
        """Copy, pack a vector into one register, or unpack one; an address's space is no part of it."""
        target, source = instruction.operands
        kind = "pred" if instruction.opcode == "mov.pred" else f"b{instruction.opcode.rpartition('.')[2][1:]}"
        if isinstance(source, Vector):
            bits = int(kind[1:]) // len(source.parts)
            parts = [self.read(part, f"b{bits}", lanes, instruction) for part in source.parts]
            packed = np.ascontiguousarray(np.stack(parts, axis=1)).view(DTYPES[kind])[:, 0]
            self.write(target, kind, packed, lanes, instruction)
        elif isinstance(target, Vector):
            bits = int(kind[1:]) // len(target.parts)
            values = np.ascontiguousarray(self.read(source, kind, lanes, instruction)).view(f"u{bits // 8}")
            for column, part in enumerate(target.parts):
                column_values = np.ascontiguousarray(values.reshape(len(lanes), -1)[:, column])
                self.write(part, f"b{bits}", column_values, lanes, instruction)
        else:
            self.write(target, kind, self.read(source, kind, lanes, instruction), lanes, instruction)

    def _bits(self, register: Register, lanes: np.ndarray, instruction: Instruction) -> np.ndarray:
        name = register.name
        if name not in self.bits:
            text = f"{name} was never written"
            self.report.add("uninitialised_read", instruction, text, len(lanes))
            return np.zeros(len(lanes), BITS[register.bits])
        unwritten = self.unwritten.get(name)
        if unwritten is not None and (missing := unwritten[lanes]).any():
            self.report.add("uninitialised_read", instruction, f"{name} was never written", int(missing.sum()))
        bits = self.bits[name]
        return bits if len(lanes) == self.size else bits[lanes]

    @staticmethod
    def _resized(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return values.astype(f"u{dtype.itemsize}").view(dtype)


def _parts(operand: Operand, access: Access, instruction: Instruction) -> tuple[Operand, ...]:
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != access.count:
        raise PtxError(f"line {instruction.line}: {access.count} elements are expected: {instruction.text}")
    return parts
