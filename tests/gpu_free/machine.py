"""Execute PTX on NumPy arrays: all threads of many blocks at once, one instruction after the other.

Threads that stand at the same instruction move together; of several places in the program the first one goes on, so
that branches come together again (the order is one that a card might choose). Threads wait at barriers and shuffles
until those they wait for are there; a wait that cannot end is a finding.
Source: NVIDIA, "PTX ISA"; Collange 2011, "Stack-less SIMT reconvergence at low cost" (the first place goes on).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from gpu_free.memory import Threads
from gpu_free.opcodes import OPCODES
from gpu_free.ptx import Function, Instruction, PtxError, Symbol, parse
from gpu_free.registers import Registers
from gpu_free.report import Report
from gpu_free.spaces import ACCESSES, Spaces
from gpu_free.values import Operation
from gpu_free.warps import SHUFFLES, shuffle

LANES_AT_ONCE = 1 << 16  # threads in one batch of blocks: arrays of this length stay in the cache
BRANCHES = ("bra", "bra.uni")
EXITS = ("ret", "exit", "ret.uni")
BARRIERS = ("bar.sync", "barrier.sync", "barrier.sync.aligned")
WARP_BARRIER = "bar.warp.sync"
ADDRESS_CASTS = tuple(f"cvta{to}.{space}.u64" for to in ("", ".to") for space in ("global", "shared", "local", "const"))
MOVES = tuple(
    f"mov.{kind}" for kind in (*(f"{sign}{bits}" for sign in "bus" for bits in (16, 32, 64)), "f32", "f64", "pred")
)
KNOWN = (
    OPCODES.keys() | ACCESSES.keys() | SHUFFLES | {*BRANCHES, *EXITS, *BARRIERS, WARP_BARRIER, *ADDRESS_CASTS, *MOVES}
)


@dataclass(frozen=True, slots=True)
class Argument:
    """An array that a kernel reads or writes."""

    name: str
    values: np.ndarray  # an output's are overwritten after the run
    is_output: bool = False
    start: int = 0  # bytes between a 16-byte boundary and the first element


def run_ptx(
    text: str,
    entry: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    arguments: Sequence[Argument | int],
    *,
    shared_bytes: int = 0,
    lanes_at_once: int = LANES_AT_ONCE,
) -> Report:
    """Run a kernel; outputs are written into their arguments' ``values``.

    Args:
        text: PTX.
        entry: the function's name.
        grid: blocks along x, y, z.
        block: threads along x, y, z.
        arguments: in the order of the parameter list; integers are 32-bit scalars.
        shared_bytes: dynamic shared memory.
        lanes_at_once: how many threads are computed side by side.

    Raises:
        PtxError: the PTX has an opcode, a modifier or a form that the interpreter does not know.
    """
    module = parse(text)
    if entry not in module.functions:
        raise PtxError(f"there is no entry {entry}; there are {', '.join(module.functions)}")
    function = module.functions[entry]
    report = Report()
    _check_launch(function, block, arguments, report)
    threads = int(np.prod(block))
    spaces = Spaces(module, function, arguments, shared_bytes, threads, report)
    blocks = np.indices(grid[::-1]).reshape(3, -1)[::-1].T  # (blocks, 3): x runs fastest
    at_once = max(lanes_at_once // (-(-threads // 32) * 32), 1)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), at_once):
            batch = _Batch(function, spaces, report, grid, block, blocks[first : first + at_once], first)
            batch.run()
    spaces.finish()
    return report


def _check_launch(function: Function, block, arguments: Sequence[Argument | int], report: Report) -> None:
    sizes = [8 if isinstance(argument, Argument) else 4 for argument in arguments]
    if sizes != list(function.parameters.values()):
        raise PtxError(f"{function.name} takes parameters of {list(function.parameters.values())} bytes, not {sizes}")
    if function.max_threads and np.prod(block) > function.max_threads:
        report.add("launch", None, f"{np.prod(block)} threads a block; the kernel allows {function.max_threads}")
    for instruction in function.code:
        if instruction.opcode not in KNOWN:
            raise PtxError(f"line {instruction.line}: unknown opcode {instruction.opcode}: {instruction.text}")


class _Batch:
    """Some blocks of the grid, thread by thread in lanes; a warp has 32 lanes even where the block's end cuts it."""

    def __init__(
        self, function: Function, spaces: Spaces, report: Report, grid, block, blocks: np.ndarray, first: int
    ) -> None:
        self.function, self.spaces, self.report = function, spaces, report
        threads = int(np.prod(block))
        self.block_lanes = -(-threads // 32) * 32
        self.size = len(blocks) * self.block_lanes
        lane = np.arange(self.size)
        self.block_of, thread = lane // self.block_lanes, lane % self.block_lanes
        exists = thread < threads
        self.ids = (first + self.block_of) * threads + thread + 1
        self.number_of_block = self.block_of + first + 1
        self.exited = ~exists
        self.epochs = np.zeros(self.size, np.int64)
        self.warp_epochs = np.zeros(self.size, np.int64)
        self.waiting = np.full(self.size, -1)  # the barrier at which a thread waits
        slots: Mapping[str, np.ndarray] = {
            "%tid": np.stack([thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1])]),
            "%ctaid": blocks[self.block_of].T,
            "%ntid": np.broadcast_to(np.array(block)[:, None], (3, self.size)),
            "%nctaid": np.broadcast_to(np.array(grid)[:, None], (3, self.size)),
        }
        special = {f"{name}.{axis}": rows[part] for name, rows in slots.items() for part, axis in enumerate("xyz")}
        special["%laneid"] = lane % 32
        symbols = spaces.symbols()
        self.registers = Registers(
            self.size, {name: value.astype(np.uint32) for name, value in special.items()}, symbols, report
        )
        spaces.start_batch(len(blocks), self.size)
        self.ready: dict[int, np.ndarray] = {0: lane[exists]}
        self.parked: dict[int, np.ndarray] = {}  # at a shuffle, waiting for lanes of their warp

    def run(self) -> None:
        """Run until every thread has left."""
        while True:
            while self.ready:
                position = min(self.ready)
                self._advance(position, self.ready.pop(position))
            if self.parked:
                self._meet_anyway()
            elif (self.waiting >= 0).any():
                self._pass_barriers()
            else:
                break
        self.spaces.end_batch()

    def _advance(self, position: int, lanes: np.ndarray) -> None:
        """Execute from ``place`` until a branch, a wait or the end."""
        code = self.function.code
        while position < len(code):
            if position in self.ready:
                lanes = np.sort(np.concatenate([lanes, self.ready.pop(position)]))
            instruction = code[position]
            self.report.instructions += 1
            active = self._guarded(instruction, lanes)
            opcode = instruction.opcode
            if opcode in BRANCHES:
                rest = _without(lanes, active)
                self._at(position + 1, rest)
                self._at(self._target(instruction), active)
                return
            if opcode in EXITS:
                self.exited[active] = True
                lanes = _without(lanes, active)
                if not len(lanes):
                    return
            elif opcode in BARRIERS:
                self._wait(instruction, position, active)
                self._at(position + 1, _without(lanes, active))
                return
            elif opcode in SHUFFLES or opcode == WARP_BARRIER:
                rest = _without(lanes, active)
                self._at(position + 1, rest)
                if len(active):
                    self._meet(instruction, position, active)
                return
            elif len(active):
                self._execute(instruction, active)
            position += 1
        self.exited[lanes] = True

    def _at(self, position: int, lanes: np.ndarray) -> None:
        """Let threads go on from ``place``, together with those that stand there."""
        if len(lanes):
            others = self.ready.get(position)
            self.ready[position] = lanes if others is None else np.sort(np.concatenate([lanes, others]))

    def _guarded(self, instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
        if instruction.guard is None:
            return lanes
        chosen = self.registers.read(instruction.guard, "pred", lanes, instruction)
        return lanes if chosen.all() else lanes[chosen]

    def _target(self, instruction: Instruction) -> int:
        (target,) = instruction.operands
        if not isinstance(target, Symbol) or target.name not in self.function.labels:
            raise PtxError(f"line {instruction.line}: no label: {instruction.text}")
        return self.function.labels[target.name]

    def _execute(self, instruction: Instruction, lanes: np.ndarray) -> None:
        opcode = instruction.opcode
        if opcode in OPCODES:
            self._compute(OPCODES[opcode], instruction, lanes)
        elif opcode in ACCESSES:
            self._access(instruction, lanes)
        elif opcode in MOVES or opcode in ADDRESS_CASTS:
            self.registers.move(instruction, lanes)

    def _compute(self, operation: Operation, instruction: Instruction, lanes: np.ndarray) -> None:
        named = sum(kind != "cc" for kind in operation.gives)
        if len(instruction.operands) != named + sum(kind != "cc" for kind in operation.takes):
            raise PtxError(f"line {instruction.line}: another number of operands is expected: {instruction.text}")
        sources = iter(instruction.operands[named:])
        values = [
            self.registers.read_carry(lanes, instruction)
            if kind == "cc"
            else self.registers.read(next(sources), kind, lanes, instruction, any_width=operation.any_width)
            for kind in operation.takes
        ]
        results = operation.compute(*values)
        results = results if isinstance(results, tuple) else (results,)
        targets = iter(instruction.operands[:named])
        for kind, result in zip(operation.gives, results, strict=True):
            if kind == "cc":
                self.registers.write_carry(result, lanes)
            else:
                self.registers.write(next(targets), kind, result, lanes, instruction, any_width=operation.any_width)

    def _threads(self, lanes: np.ndarray) -> Threads:
        return Threads(lanes, self.ids[lanes], self.block_of[lanes], self.epochs[lanes])

    def _access(self, instruction: Instruction, lanes: np.ndarray) -> None:
        access = ACCESSES[instruction.opcode]
        threads = self._threads(lanes)
        pointer = instruction.operands[1 if access.is_load else 0]
        where = self.registers.address(pointer, access.space, lanes, instruction)
        if access.is_load:
            values = self.spaces.load(
                access, where, threads, self.number_of_block[lanes], self.warp_epochs[lanes], instruction
            )
            self.registers.write_elements(instruction.operands[0], access, values, lanes, instruction)
        else:
            values = self.registers.read_elements(instruction.operands[1], access, lanes, instruction)
            self.spaces.store(
                access, where, values, threads, self.number_of_block[lanes], self.warp_epochs[lanes], instruction
            )

    # Waiting for others.

    def _meet(self, instruction: Instruction, position: int, lanes: np.ndarray) -> None:
        """Shuffle, or synchronise a warp, where every thread that the mask names is here; the others wait."""
        if position in self.parked:
            lanes = np.sort(np.concatenate([lanes, self.parked.pop(position)]))
        masks = self.registers.read(instruction.operands[-1], "b32", lanes, instruction)
        missing = masks & ~self._bits(self.exited)[lanes // 32] & ~self._bits_of(lanes)[lanes // 32]
        warp_waits = np.zeros(self.size // 32, bool)
        warp_waits[lanes[missing != 0] // 32] = True
        waits = warp_waits[lanes // 32]
        if waits.any():
            self.parked[position] = lanes[waits]
        if not waits.all():
            self._execute_together(instruction, lanes[~waits], masks[~waits])
            self._at(position + 1, lanes[~waits])

    def _execute_together(self, instruction: Instruction, lanes: np.ndarray, masks: np.ndarray) -> None:
        own = masks >> (lanes % 32).astype(np.uint32) & np.uint32(1)
        if not own.all():
            text = f"lane {lanes[own == 0][0] % 32} is not in its own mask {masks[own == 0][0]:#010x}"
            self.report.add("shuffle", instruction, text, int((own == 0).sum()))
        arrived = self._bits_of(lanes)
        for mask in np.unique(masks):
            same = self._bits_of(lanes[masks == mask])
            if ((same != 0) & (arrived & mask != same)).any():
                self.report.add("shuffle", instruction, f"not every lane that {mask:#010x} names has this mask")
        if instruction.opcode == WARP_BARRIER:
            if (masks & ~self._bits(self.exited)[lanes // 32] != ~self._bits(self.exited)[lanes // 32]).any():
                raise PtxError(f"line {instruction.line}: a barrier of a part of a warp: {instruction.text}")
            self.warp_epochs[lanes] += 1
        else:
            shuffle(instruction, lanes, masks, self.registers, self.report)

    def _bits(self, flags: np.ndarray) -> np.ndarray:
        """Return one flag a lane as 32 bits a warp."""
        return np.packbits(flags.reshape(-1, 32), axis=1, bitorder="little").view("<u4")[:, 0]

    def _bits_of(self, lanes: np.ndarray) -> np.ndarray:
        flags = np.zeros(self.size, bool)
        flags[lanes] = True
        return self._bits(flags)

    def _meet_anyway(self) -> None:
        """End a wait for lanes that never come."""
        position = min(self.parked)
        lanes, instruction = self.parked.pop(position), self.function.code[position]
        masks = self.registers.read(instruction.operands[-1], "b32", lanes, instruction)
        mask = self._bits_of(lanes)[lanes // 32]
        absent = int((masks & ~mask)[0])
        self.report.add("shuffle", instruction, f"the mask names lanes that do not come: {absent:#010x}", len(lanes))
        if instruction.opcode != WARP_BARRIER:
            shuffle(instruction, lanes, masks & mask, self.registers, self.report)
        self._at(position + 1, lanes)

    def _wait(self, instruction: Instruction, position: int, lanes: np.ndarray) -> None:
        number, *count = (self.registers.read(operand, "u32", lanes, instruction) for operand in instruction.operands)
        if count or (number != 0).any():
            raise PtxError(f"line {instruction.line}: only barrier 0 of a whole block is known: {instruction.text}")
        self.waiting[lanes] = position

    def _pass_barriers(self) -> None:
        """Let the blocks go on, all of whose remaining threads wait."""
        exists = np.arange(self.size) % self.block_lanes < self.spaces.threads_per_block
        left = (self.exited & exists).reshape(-1, self.block_lanes)
        waiting = self.waiting.reshape(-1, self.block_lanes)
        for row in np.flatnonzero((waiting >= 0).any(axis=1)):
            positions = np.unique(waiting[row][waiting[row] >= 0])
            instruction = self.function.code[positions[0]]
            if left[row].any():
                text = f"{int(left[row].sum())} threads of the block have left before it"
                self.report.add("divergent_barrier", instruction, text)
            if len(positions) > 1:
                lines = ", ".join(str(self.function.code[position].line) for position in positions)
                self.report.add("divergent_barrier", instruction, f"threads of one block wait at lines {lines}")
        lanes = np.flatnonzero(self.waiting >= 0)
        self.epochs[lanes] += 1
        for position in np.unique(self.waiting[lanes]):
            self._at(int(position) + 1, lanes[self.waiting[lanes] == position])
        self.waiting[lanes] = -1


def _without(lanes: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Return the lanes that are not among ``removed``, a part of them in the same order."""
    if len(removed) == len(lanes):
        return lanes[:0]
    return np.setdiff1d(lanes, removed, assume_unique=True) if len(removed) else lanes
