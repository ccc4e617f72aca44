"""Arrays as a kernel sees them: addresses, bounds, alignment, who wrote what, and what was never written.

Every array or variable lives far from every other (``REGION`` bytes), so that an address says which one was meant
and a step outside cannot land in a neighbour. Shared and local variables have one copy per block or thread.
"""

from dataclasses import dataclass

import numpy as np
from gpu_free.ptx import Instruction, PtxError
from gpu_free.report import Report, Traffic, count_traffic

REGION = {"global": 1 << 40, "shared": 1 << 19, "local": 1 << 19}  # bytes; an array is at most half as large
PADDING = 16  # bytes: the widest access


@dataclass(frozen=True, slots=True)
class Access:
    """A load or store opcode, taken apart."""

    is_load: bool
    space: str  # "global", "shared", "local", "param"
    kind: str  # type of one element: "u32"
    bits: int  # of one element
    count: int  # elements: 1, 2, 4
    not_coherent: bool  # ld.global.nc: the array must not change while the kernel runs

    @property
    def width(self) -> int:
        """Return the bytes of one thread's access."""
        return self.bits // 8 * self.count


@dataclass(slots=True)
class Threads:
    """The threads that execute an instruction: equally long arrays."""

    lanes: np.ndarray  # of this batch
    ids: np.ndarray  # of the whole grid, from 1
    blocks: np.ndarray  # of the batch
    epochs: np.ndarray  # barriers that the thread's block has passed

    def of(self, chosen: np.ndarray) -> "Threads":
        """Return some of them."""
        return Threads(self.lanes[chosen], self.ids[chosen], self.blocks[chosen], self.epochs[chosen])


class Segment:
    """One array or variable, in one or several copies."""

    def __init__(
        self, name: str, size: int, *, start: int = 0, copies: int = 1, content: np.ndarray | None = None
    ) -> None:
        """Lay out ``size`` bytes ``start`` bytes after an address that is a multiple of 16; no content: unwritten."""
        self.name, self.size, self.start = name, size, start
        self.stride = -(-(start + size) // PADDING) * PADDING
        self.bytes = np.zeros(max(copies * self.stride, PADDING), np.uint8)
        self.written = np.zeros(len(self.bytes), bool)
        if content is not None:
            self.bytes[start : start + size] = content
            self.written[:] = True

    def checked(
        self, offsets: np.ndarray, access: Access, instruction: Instruction, report: Report
    ) -> np.ndarray | None:
        """Return which accesses are inside and aligned, or None if all are; report the others."""
        width = access.width
        inside = (offsets >= self.start) & (offsets + width <= self.start + self.size)
        aligned = offsets % width == 0
        good = inside & aligned
        if good.all():
            return None
        if not inside.all():
            example = int(offsets[~inside][0]) - self.start
            text = f"{width} bytes at offset {example} of {self.name}, which has {self.size}"
            report.add("out_of_bounds", instruction, text, int((~inside).sum()))
        if not aligned.all():
            example = int(offsets[~aligned][0])
            text = f"{width} bytes at offset {example - self.start} of {self.name}, {example % width} past a boundary"
            report.add("misaligned", instruction, text, int((~aligned).sum()))
        return good

    def read(self, index: np.ndarray, width: int) -> np.ndarray:
        """Return ``width`` bytes for each index, which counts in widths: (threads, width) uint8."""
        return np.take(self.bytes.reshape(-1, width), index, axis=0)

    def write(self, index: np.ndarray, width: int, values: np.ndarray) -> None:
        """Store (threads, width) uint8."""
        self.bytes.reshape(-1, width)[index] = values
        self.written.reshape(-1, width)[index] = True

    def has_unwritten(self, index: np.ndarray, width: int) -> np.ndarray:
        """Return which reads touch a byte that was never written."""
        return np.logical_not(np.take(self.written.reshape(-1, width), index, axis=0).all(axis=1))


class GlobalArray(Segment):
    """An array in the card's memory, with a shadow that remembers for every element who wrote and read it."""

    def __init__(
        self, name: str, values: np.ndarray, *, is_output: bool, start: int = 0, threads_per_block: int = 1
    ) -> None:
        """Copy ``values``; an output's are taken as unwritten."""
        self.threads_per_block = threads_per_block
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        super().__init__(name, content.size, start=start, content=content)
        self.is_output, self.granule = is_output, values.dtype.itemsize
        elements = len(self.bytes) // self.granule
        self.touched = {direction: np.zeros(len(self.bytes), bool) for direction in ("loads", "stores")}
        self.reading_block = np.zeros(elements, np.int64)
        if is_output:
            self.written[:] = False
            self.writer, self.writer_epoch = np.zeros(elements, np.int32), np.zeros(elements, np.int32)
            self.reader, self.reader_epoch = np.zeros(elements, np.int32), np.zeros(elements, np.int32)

    def values(self) -> np.ndarray:
        """Return the bytes of the array."""
        return self.bytes[self.start : self.start + self.size]

    def loaded(
        self,
        threads: Threads,
        block_of: np.ndarray,
        index: np.ndarray,
        access: Access,
        instruction: Instruction,
        report: Report,
    ) -> None:
        """Check a load against earlier stores and count it; ``block_of``: the block's number in the grid, from 1."""
        self._count(report.loads, "loads", threads, index, access)
        traffic = report.loads[self.name]
        if not traffic.shared_by_blocks:
            first = index * access.width // self.granule
            before = self.reading_block[first]
            self.reading_block[first] = block_of
            others = ((before != 0) & (before != block_of)).any() or (self.reading_block[first] != block_of).any()
            traffic.shared_by_blocks = bool(others)
        if not self.is_output:
            return
        if access.not_coherent:
            report.add("stale_read", instruction, f"ld.global.nc of {self.name}, which the kernel writes", len(index))
        elements = self._elements(index, access, instruction)
        ids, blocks, epochs = (array[:, None] for array in (threads.ids, block_of, threads.epochs))
        writer = self.writer[elements]
        other = (writer != 0) & (writer != ids)
        ordered = (self.writer_block(writer) == blocks) & (self.writer_epoch[elements] < epochs)
        self._race(other & ~ordered, "read", "written", writer, threads, instruction, report)
        self.reader[elements] = ids
        self.reader_epoch[elements] = epochs

    def stored(
        self,
        threads: Threads,
        block_of: np.ndarray,
        index: np.ndarray,
        access: Access,
        instruction: Instruction,
        report: Report,
    ) -> None:
        """Check a store against earlier accesses and count it."""
        self._count(report.stores, "stores", threads, index, access)
        if not self.is_output:
            report.add("write_to_input", instruction, f"{self.name} is an input", len(index))
            return
        elements = self._elements(index, access, instruction)
        ids, blocks, epochs = (array[:, None] for array in (threads.ids, block_of, threads.epochs))
        for verb, who, when in (("written", self.writer, self.writer_epoch), ("read", self.reader, self.reader_epoch)):
            earlier = who[elements]
            other = (earlier != 0) & (earlier != ids)
            if other.any():
                ordered = (self.writer_block(earlier) == blocks) & (when[elements] < epochs)
                self._race(other & ~ordered, "written", verb, earlier, threads, instruction, report)
        self.writer[elements] = ids
        self.writer_epoch[elements] = epochs
        at_once = self.writer[elements]
        self._race(at_once != ids, "written", "written", at_once, threads, instruction, report)

    def writer_block(self, writer: np.ndarray) -> np.ndarray:
        """Return the number in the grid, from 1, of the block that a thread belongs to."""
        return (writer - 1) // self.threads_per_block + 1

    def _elements(self, index: np.ndarray, access: Access, instruction: Instruction) -> np.ndarray:
        if access.width % self.granule:
            raise PtxError(f"line {instruction.line}: narrower than an element of {self.name}: {instruction.text}")
        step = access.width // self.granule
        return index[:, None] * step + np.arange(step)

    def _race(self, which, verb: str, before: str, earlier, threads: Threads, instruction, report: Report) -> None:
        if which.any():
            row, column = (int(axis[0]) for axis in np.nonzero(which))
            text = f"{self.name} is {verb} by thread {threads.ids[row] - 1} and {before} by {earlier[row, column] - 1}"
            report.add("race", instruction, f"{text} of the grid, in no order", int(which.sum()))

    def _count(self, table, direction: str, threads: Threads, index: np.ndarray, access: Access) -> None:
        traffic = table.setdefault(self.name, Traffic())
        count_traffic(traffic, threads.lanes // 32, index * access.width, access.width)
        self.touched[direction].reshape(-1, access.width)[index] = True
