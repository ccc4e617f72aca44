"""Find pairs of accesses to shared memory that nothing orders: one of them a write, by two threads, no barrier between.

Accesses of one block are ordered by ``bar.sync``; of one warp also by ``bar.warp.sync`` (a shuffle orders no memory).
Every access is kept, and sorted by address once at the end.
Source: NVIDIA, "PTX ISA", "Memory Consistency Model".
"""

from dataclasses import dataclass, field

import numpy as np
from gpu_free.ptx import Instruction
from gpu_free.report import Report

COLUMNS = ("place", "lane", "warp_epoch", "is_write", "instruction")
CANDIDATES = 200  # places looked at pair by pair; a correct kernel has none


@dataclass(slots=True)
class SharedLog:
    """Accesses to shared memory."""

    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)

    def note(
        self,
        blocks: np.ndarray,
        epochs: np.ndarray,
        addresses: np.ndarray,
        width: int,
        lanes: np.ndarray,
        warp_epochs: np.ndarray,
        is_write: bool,
        instruction: Instruction,
    ) -> None:
        """Keep one instruction's accesses: ``width`` bytes at each address, which names variable and offset."""
        self.instructions.append(instruction)
        number = len(self.instructions) - 1
        key = (blocks.astype(np.int64) << 44) | (epochs.astype(np.int64) << 28) | addresses
        self.parts.append((key, lanes, warp_epochs, np.full(len(lanes), is_write), np.full(len(lanes), number)))
        self.widths.append(width)

    def check(self, report: Report) -> None:
        """Report the races."""
        if not any(part[3].any() for part in self.parts):
            return
        unit = min(self.widths)
        columns = [[] for _ in COLUMNS]
        for arrays, width in zip(self.parts, self.widths, strict=True):
            for step in range(0, width, unit):
                for column, array in zip(columns, (arrays[0] + step, *arrays[1:]), strict=True):
                    column.append(array)
        joined = [np.concatenate(column) for column in columns]
        order = np.argsort(joined[0], kind="stable")
        key, lane, warp_epoch, is_write, number = (array[order] for array in joined)
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        several = np.minimum.reduceat(lane, starts) != np.maximum.reduceat(lane, starts)
        suspicious = np.flatnonzero(several & np.logical_or.reduceat(is_write, starts))
        ends = np.append(starts[1:], len(key))
        for group in suspicious[:CANDIDATES]:
            chosen = slice(starts[group], ends[group])
            self._pairs(lane[chosen], warp_epoch[chosen], is_write[chosen], number[chosen], report)

    def _pairs(self, lane, warp_epoch, is_write, number, report: Report) -> None:
        other = lane[:, None] != lane[None, :]
        same_warp = lane[:, None] // 32 == lane[None, :] // 32
        ordered = same_warp & (warp_epoch[:, None] != warp_epoch[None, :])
        clash = other & (is_write[:, None] | is_write[None, :]) & ~ordered
        if not clash.any():
            return
        first, second = (int(axis[0]) for axis in np.nonzero(clash))
        verbs = ["written" if is_write[which] else "read" for which in (first, second)]
        before = self.instructions[number[first]]
        text = f"shared memory is {verbs[0]} by lane {lane[first]} (line {before.line}: {before.text}) and "
        text += f"{verbs[1]} by lane {lane[second]}, with no barrier between"
        report.add("race", self.instructions[number[second]], text, int(clash.sum()) // 2)
