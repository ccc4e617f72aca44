"""Trace a value to the columns of the tensor that it was split or sliced from."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from medseg_trt.export.graph.fusions.nodes import required_input, width_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Columns ``start`` to ``stop`` of ``source``, on its last axis."""

    source: ir.Value
    start: int
    stop: int

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.stop - self.start


def columns_of(value: ir.Value) -> Columns:
    """Return the columns that a Split or a Slice on the last axis makes a value of; else the value's own columns."""
    node, last_axis = value.producer(), len(value.shape or ()) - 1
    if node is not None and node.op_type == "Split" and node.attributes.get_int("axis", 0) in (-1, last_axis):
        widths = [width_of(output) for output in node.outputs]
        start = sum(width or 0 for width in widths[: value.index()])
        if None not in widths:
            return Columns(source=required_input(node, 0), start=start, stop=start + (width_of(value) or 0))
    if node is not None and node.op_type == "Slice":
        start, _, *axes_and_steps = (_constant_ints(operand) for operand in node.inputs[1:])
        width = width_of(required_input(node, 0))
        is_on_last_axis = axes_and_steps in ([[last_axis]], [[-1]], [[last_axis], [1]], [[-1], [1]])
        if start is not None and len(start) == 1 and width and is_on_last_axis:
            first = start[0] % width if start[0] < 0 else start[0]
            return Columns(source=required_input(node, 0), start=first, stop=first + (width_of(value) or 0))
    return Columns(source=value, start=0, stop=width_of(value) or 0)


def cover_one_tensor(columns: Sequence[Columns]) -> bool:
    """Whether the columns follow each other and make up the whole of one tensor."""
    ends = [0, *(part.stop for part in columns)]
    source = columns[0].source
    return (
        all(part.source is source for part in columns)
        and [part.start for part in columns] == ends[:-1]
        and ends[-1] == width_of(source)
    )


def _constant_ints(value: ir.Value | None) -> list[int] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy().tolist()
