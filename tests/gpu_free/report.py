"""What a run leaves behind besides its results: findings of the checkers, and counts of what memory moved."""

from dataclasses import dataclass, field

import numpy as np
from gpu_free.ptx import Instruction

KINDS = (
    "race",
    "out_of_bounds",
    "misaligned",
    "divergent_barrier",
    "shuffle",
    "uninitialised_read",
    "unwritten_output",
    "write_to_input",
    "stale_read",
    "launch",
)


@dataclass(slots=True)
class Finding:
    """A fault: what, where in the PTX, in how many threads (or elements), and one example."""

    kind: str  # one of KINDS
    line: int  # of the PTX; 0: of no instruction
    instruction: str
    example: str
    count: int

    def __str__(self) -> str:
        where = f"line {self.line}: {self.instruction}: " if self.line else ""
        return f"{self.kind}: {where}{self.example} ({self.count} times)"


@dataclass(slots=True)
class Traffic:
    """What went between one array and the threads, in one direction.

    A warp asks for an element once, however many of its lanes want it (``requested_bytes``). What a block asks for
    twice moves twice; what several blocks ask for (a weight, a table) is taken to stay in the cache (``moved_bytes``).
    """

    requested_bytes: int = 0
    distinct_bytes: int = 0
    shared_by_blocks: bool = False
    sectors: int = 0  # of 32 bytes, as the warps touched them
    ideal_sectors: int = 0  # if every warp's elements lay side by side on a boundary
    widths: dict[int, int] = field(default_factory=dict)  # bytes of one thread's access -> accesses

    @property
    def moved_bytes(self) -> int:
        """Return the bytes that have to come from, or go to, the card's memory."""
        return self.distinct_bytes if self.shared_by_blocks else self.requested_bytes


@dataclass(slots=True)
class Report:
    """The findings and the traffic by array name."""

    findings: list[Finding] = field(default_factory=list)
    loads: dict[str, Traffic] = field(default_factory=dict)
    stores: dict[str, Traffic] = field(default_factory=dict)
    instructions: int = 0  # steps of the scheduler, each for many threads

    def add(self, kind: str, instruction: Instruction | None, example: str, count: int = 1) -> None:
        """Note a fault; the same fault of the same instruction only counts up."""
        line, text = (instruction.line, instruction.text) if instruction else (0, "")
        for finding in self.findings:
            if (finding.kind, finding.line) == (kind, line) and (line or finding.example == example):
                finding.count += count
                return
        self.findings.append(Finding(kind, line, text, example, count))

    @property
    def kinds(self) -> set[str]:
        """Return the kinds of faults found."""
        return {finding.kind for finding in self.findings}

    @property
    def moved_bytes(self) -> int:
        """Return the bytes moved between the card's memory and the kernel."""
        return sum(traffic.moved_bytes for table in (self.loads, self.stores) for traffic in table.values())


def count_traffic(traffic: Traffic, warps: np.ndarray, offsets: np.ndarray, width: int) -> None:
    """Add one instruction's accesses: the warp and the byte offset of each thread, ``width`` bytes from there."""
    traffic.widths[width] = traffic.widths.get(width, 0) + len(offsets)
    key = warps.astype(np.int64) << 40 | offsets
    if (key[1:] < key[:-1]).any():
        key = np.sort(key)
    first = np.ones(len(key), bool)
    np.not_equal(key[1:], key[:-1], out=first[1:])
    key = key[first]
    traffic.requested_bytes += len(key) * width
    traffic.sectors += 1 + int(np.count_nonzero(np.diff(key >> 5)))
    starts = np.flatnonzero(np.diff(key >> 40, prepend=-1))
    of_warp = np.diff(starts, append=len(key)) * width
    traffic.ideal_sectors += int(((of_warp + 31) // 32).sum())
