"""``shfl.sync``: lanes of a warp read each other's registers.

Source: NVIDIA, "PTX ISA", shfl.sync (the pseudo-code of its semantics).
"""

from collections.abc import Callable, Mapping

import numpy as np
from gpu_free.ptx import Instruction
from gpu_free.registers import Registers
from gpu_free.report import Report

SOURCES: Mapping[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {  # lane, b, lowest, highest -> source, in range
    "up": lambda lane, b, low, high: (lane - b, lane - b >= high),
    "down": lambda lane, b, low, high: (lane + b, lane + b <= high),
    "bfly": lambda lane, b, low, high: (lane ^ b, lane ^ b <= high),
    "idx": lambda lane, b, low, high: (low | b, low | b <= high),
}
SHUFFLES = {f"shfl.sync.{mode}.b32" for mode in SOURCES}


def shuffle(
    instruction: Instruction, lanes: np.ndarray, masks: np.ndarray, registers: Registers, report: Report
) -> None:
    """Give each thread the value of the lane that it asks for; a lane that takes no part is a finding."""
    has_predicate = len(instruction.operands) == 6
    target, source, *others = (instruction.operands[0], *instruction.operands[1 + has_predicate :])
    values = registers.read(source, "b32", lanes, instruction)
    b, c = (registers.read(operand, "b32", lanes, instruction).astype(np.int64) for operand in others[:2])
    lane, segment = lanes % 32, c >> 8 & 31
    low, b = lane & segment, b & 31
    high = low | (c & 31 & ~segment)
    mode = instruction.opcode.split(".")[2]
    source_lane, in_range = SOURCES[mode](lane, b & ~segment if mode == "idx" else b, low, high)
    source_lane = np.where(in_range, source_lane, lane)
    everyone = np.zeros(registers.size, np.uint32)
    is_covered = np.zeros(registers.size, bool)
    everyone[lanes], is_covered[lanes] = values, True
    from_lane = lanes - lane + source_lane
    absent = ~is_covered[from_lane] | (masks >> source_lane.astype(np.uint32) & np.uint32(1) == 0)
    if absent.any():
        example = np.flatnonzero(absent)[0]
        text = f"lane {lane[example]} reads lane {source_lane[example]}, which takes no part"
        report.add("shuffle", instruction, text, int(absent.sum()))
    registers.write(target, "b32", everyone[from_lane], lanes, instruction)
    if has_predicate:
        registers.write(instruction.operands[1], "pred", in_range, lanes, instruction)
