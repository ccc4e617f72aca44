"""PTX's state spaces: parameters, global arrays, shared and local variables; loads and stores with their checks."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from gpu_free.memory import REGION, Access, GlobalArray, Segment, Threads
from gpu_free.ptx import Address, Function, Instruction, Module, PtxError, Symbol, Variable
from gpu_free.races import SharedLog
from gpu_free.report import Report

if TYPE_CHECKING:
    from gpu_free.machine import Argument

HINTS = ("", ".ca", ".cg", ".cs", ".lu", ".cv", ".wb", ".wt")  # caching: no change in meaning
VECTORS = {"": 1, ".v2": 2, ".v4": 4}
TYPES = (*(f"{sign}{bits}" for sign in "bus" for bits in (8, 16, 32, 64)), "f32", "f64")


def _accesses() -> dict[str, Access]:
    accesses: dict[str, Access] = {}
    for kind in TYPES:
        bits = int(kind[1:])
        for vector, count in VECTORS.items():
            if bits * count > 128:
                continue
            for space in ("global", "shared", "local", *(("param",) if count == 1 else ())):
                for hint in HINTS if space == "global" else ("",):
                    load, store = f"ld.{space}{hint}{vector}.{kind}", f"st.{space}{hint}{vector}.{kind}"
                    accesses[load] = Access(True, space, kind, bits, count, False)
                    if space != "param":
                        accesses[store] = Access(False, space, kind, bits, count, False)
                    if space == "global":
                        accesses[f"ld.global{hint}.nc{vector}.{kind}"] = Access(True, space, kind, bits, count, True)
                        accesses[f"ld.global.nc{hint}{vector}.{kind}"] = Access(True, space, kind, bits, count, True)
    return accesses


ACCESSES: Mapping[str, Access] = _accesses()


class Spaces:
    """All memory that a launch sees."""

    def __init__(
        self,
        module: Module,
        function: Function,
        arguments: "Sequence[Argument | int]",
        shared_bytes: int,
        threads_per_block: int,
        report: Report,
    ) -> None:
        """Lay out the arguments' arrays and the module's variables."""
        self.report = report
        self.threads_per_block = threads_per_block
        variables = [*module.variables.values(), *function.variables.values()]
        self.arguments = arguments
        self.arrays: list[GlobalArray] = []
        self.parameters: dict[str, bytes] = {}
        for name, argument in zip(function.parameters, arguments, strict=True):
            if isinstance(argument, int):
                self.parameters[name] = (argument % (1 << 32)).to_bytes(4, "little")
                continue
            array = GlobalArray(
                argument.name,
                argument.values,
                is_output=argument.is_output,
                start=argument.start,
                threads_per_block=threads_per_block,
            )
            self.parameters[name] = (self._base("global", len(self.arrays)) + argument.start).to_bytes(8, "little")
            self.arrays.append(array)
        constants = [variable for variable in variables if variable.space in ("global", "const")]
        self.outside = {
            variable.name: self._base("global", len(self.arrays) + at) for at, variable in enumerate(constants)
        }
        for variable in constants:
            if not variable.content:
                raise PtxError(f"{variable.name}: a global variable without a value")
            self.arrays.append(GlobalArray(variable.name, np.frombuffer(variable.content, np.uint8), is_output=False))
        self.shared = [variable for variable in variables if variable.space == "shared"]
        self.local = [variable for variable in variables if variable.space == "local"]
        self.dynamic_bytes = shared_bytes
        self.segments: dict[str, list[Segment]] = {"global": list(self.arrays)}
        self.log = SharedLog()

    @staticmethod
    def _base(space: str, number: int) -> int:
        return (number + 1) * REGION[space]

    def symbols(self) -> dict[str, int]:
        """Return every variable's address."""
        addresses = dict(self.outside)
        for space, variables in (("shared", self.shared), ("local", self.local)):
            addresses |= {variable.name: self._base(space, number) for number, variable in enumerate(variables)}
        return addresses

    def start_batch(self, blocks: int, lanes: int) -> None:
        """Lay out shared and local variables, unwritten."""
        for space, variables, copies in (("shared", self.shared, blocks), ("local", self.local, lanes)):
            self.segments[space] = [
                Segment(variable.name, self._bytes(variable), copies=copies) for variable in variables
            ]
        self.log = SharedLog()

    def _bytes(self, variable: Variable) -> int:
        return self.dynamic_bytes if variable.size is None else variable.size

    def end_batch(self) -> None:
        """Look for races in what shared memory saw."""
        self.log.check(self.report)

    def finish(self) -> None:
        """Copy the outputs back, sum the traffic, and report what was never written."""
        for array in self.arrays:
            for table in (self.report.loads, self.report.stores):
                direction = "loads" if table is self.report.loads else "stores"
                if array.name in table:
                    table[array.name].distinct_bytes = int(np.count_nonzero(array.touched[direction]))
            if array.is_output:
                written = array.written[array.start : array.start + array.size]
                if missing := int(np.count_nonzero(~written)):
                    text = f"{missing} of {array.size} bytes of {array.name} were not written"
                    self.report.add("unwritten_output", None, text)
        for argument in self.arguments:
            if not isinstance(argument, int) and argument.is_output:
                array = next(candidate for candidate in self.arrays if candidate.name == argument.name)
                argument.values[...] = array.values().view(argument.values.dtype).reshape(argument.values.shape)

    def load(
        self,
        access: Access,
        where: np.ndarray | Address,
        threads: Threads,
        block_of: np.ndarray,
        warp_epochs: np.ndarray,
        instruction: Instruction,
    ) -> np.ndarray:
        """Return (threads, bytes); what is outside or misaligned reads as zero."""
        if isinstance(where, Address):
            return np.broadcast_to(self._parameter(where, access, instruction), (len(threads.lanes), access.width))
        result = np.zeros((len(threads.lanes), access.width), np.uint8)
        for segment, rows, index, some in self._segments_of(access, where, threads, instruction):
            result[rows] = segment.read(index, access.width)
            missing = segment.has_unwritten(index, access.width)
            if missing.any():
                text = f"{segment.name} is read where nothing was written"
                self.report.add("uninitialised_read", instruction, text, int(missing.sum()))
            if isinstance(segment, GlobalArray):
                segment.loaded(some, block_of[rows], index, access, instruction, self.report)
            elif access.space == "shared":
                self._note(access, where[rows], some, warp_epochs[rows], False, instruction)
        return result

    def store(
        self,
        access: Access,
        where: np.ndarray | Address,
        values: np.ndarray,
        threads: Threads,
        block_of: np.ndarray,
        warp_epochs: np.ndarray,
        instruction: Instruction,
    ) -> None:
        """Write (threads, bytes); what is outside or misaligned is not written."""
        assert not isinstance(where, Address)
        for segment, rows, index, some in self._segments_of(access, where, threads, instruction):
            if isinstance(segment, GlobalArray):
                segment.stored(some, block_of[rows], index, access, instruction, self.report)
                if not segment.is_output:
                    continue
            elif access.space == "shared":
                self._note(access, where[rows], some, warp_epochs[rows], True, instruction)
            segment.write(index, access.width, values[rows])

    def _segments_of(self, access: Access, where: np.ndarray, threads: Threads, instruction: Instruction):
        """Yield every segment that is meant, which threads mean it, and where: index in units of the access."""
        region = REGION[access.space]
        numbers = (where + region // 2) // region - 1
        segments = self.segments[access.space]
        chosen = np.unique(numbers) if (numbers != numbers[0]).any() else numbers[:1]
        for number in chosen:
            rows = np.arange(len(where)) if len(chosen) == 1 else np.flatnonzero(numbers == number)
            if not 0 <= number < len(segments):
                text = f"address {where[rows][0]:#x} belongs to no array"
                self.report.add("out_of_bounds", instruction, text, len(rows))
                continue
            segment = segments[number]
            offsets = where[rows] - (number + 1) * region
            good = segment.checked(offsets, access, instruction, self.report)
            if good is not None:
                rows, offsets = rows[good], offsets[good]
            if not len(rows):
                continue
            some = threads if len(rows) == len(where) else threads.of(rows)
            copy = {"global": 0, "shared": some.blocks, "local": some.lanes}[access.space]
            yield segment, rows, (copy * segment.stride + offsets) // access.width, some

    def _note(self, access, addresses, threads: Threads, warp_epochs, is_write: bool, instruction) -> None:
        self.log.note(
            threads.blocks,
            threads.epochs,
            addresses,
            access.width,
            threads.lanes,
            warp_epochs,
            is_write,
            instruction,
        )

    def _parameter(self, where: Address, access: Access, instruction: Instruction) -> np.ndarray:
        if not isinstance(where.base, Symbol) or where.base.name not in self.parameters:
            raise PtxError(f"line {instruction.line}: no parameter: {instruction.text}")
        content = self.parameters[where.base.name][where.offset : where.offset + access.width]
        if len(content) != access.width:
            raise PtxError(f"line {instruction.line}: wider than the parameter: {instruction.text}")
        return np.frombuffer(content, np.uint8)
