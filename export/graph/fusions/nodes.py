"""Read and replace nodes: what every fusion rule needs."""

from collections.abc import Sequence

import onnx_ir as ir


def required_input(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the operator of ``node`` cannot lack."""
    value = node.inputs[index]
    assert value is not None  # no rule reads an optional input
    return value


def operand_orders(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """Return the two inputs of a commutative operator in both orders."""
    first, second = required_input(node, 0), required_input(node, 1)
    return [(first, second), (second, first)]


def width_of(value: ir.Value) -> int | None:
    """Return the size of the last axis; None where it is not a number."""
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def known_shape(value: ir.Value) -> list[int | ir.SymbolicDim] | None:
    """Return a shape; None where a size has neither a number nor a name, so that it may be any."""
    return None if value.shape is None or value.shape.has_unknown_dim() else list(value.shape)


def replace_nodes(
    graph: ir.Graph, after: ir.Node, old_nodes: Sequence[ir.Node], new: ir.Node, values: Sequence[ir.Value]
) -> None:
    """Insert ``new`` after ``after``, let its outputs replace ``values``, and remove the nodes that made them."""
    graph.insert_after(after, new)
    replace_values(values, new)
    graph.remove(old_nodes, safe=True)


def replace_values(values: Sequence[ir.Value], node: ir.Node) -> None:
    """Let the outputs of ``node`` take the readers and the names of ``values``."""
    for old, new in zip(values, node.outputs, strict=True):
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = f"{name}_replaced"  # until its node is removed, no name may occur twice
        new.name = name
