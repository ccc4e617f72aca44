"""Fuse the rotary embedding of queries and keys, with the split into heads, to Rotary."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medseg_trt.export.graph.functions import call
from medseg_trt.export.graph.fusions.columns import Columns, columns_of, cover_one_tensor
from medseg_trt.export.graph.fusions.fusion_result import FusionResult, fusion_result
from medseg_trt.export.graph.fusions.nodes import (
    known_shape,
    operand_orders,
    replace_values,
    required_input,
    width_of,
)
from medseg_trt.export.graph.onnx_graph import add_constant

HEADS_FIRST = [0, 2, 1, 3]  # (batch, tokens, heads, head_dim) -> (batch, heads, tokens, head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rotation:
    heads: ir.Value
    cos: np.ndarray
    sin: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class _Heads:
    columns: ir.Value
    number: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _RotaryPattern:
    """The nodes between the fused q/k/v projection and an Attention."""

    source: ir.Value  # the projection's output
    num_heads: int
    num_kv_heads: int
    cos: np.ndarray  # (tokens, head_dim / 2)
    sin: np.ndarray


def fuse_rotary(graph: ir.Graph) -> FusionResult:
    """Replace the nodes between the fused projection and every Attention whose queries and keys are rotated."""
    count, attentions = 0, [node for node in graph if node.op_type == "Attention"]
    for attention in attentions:
        query, key, value = (required_input(attention, index) for index in range(3))
        pattern = _match(query, key, value)
        if pattern is None:
            continue
        tables = [
            add_constant(graph, f"{query.name}_{name}", table)
            for name, table in (("cos", pattern.cos), ("sin", pattern.sin))
        ]
        attributes = {"num_heads": pattern.num_heads, "num_kv_heads": pattern.num_kv_heads, "interleaved": 0}
        producer = query.producer()
        assert producer is not None  # ``_match`` read it
        node = call("Rotary", [pattern.source, *tables], [query, key, value], attributes, producer)
        graph.insert_before(attention, node)
        replace_values([query, key, value], node)
        count += 1
    unmatched = f"of the {len(attentions)} Attention nodes, none has queries and keys that are rotated as Rotary does"
    return fusion_result(count, unmatched if attentions else "the graph has no Attention")


def _match(query: ir.Value, key: ir.Value, value: ir.Value) -> _RotaryPattern | None:
    rotations = [_rotation(query), _rotation(key)]
    if rotations[0] is None or rotations[1] is None:
        return None
    inputs = [_heads(tensor) for tensor in (rotations[0].heads, rotations[1].heads, value)]
    heads = [split for split in inputs if split is not None]
    if len(heads) < 3 or heads[1].number != heads[2].number or len({split.head_dim for split in heads}) > 1:
        return None
    columns = [columns_of(split.columns) for split in heads]
    cos = _half_table(rotations[0].cos, rotations[1].cos)
    sin = _half_table(rotations[0].sin, rotations[1].sin)
    if not cover_one_tensor(columns) or cos is None or sin is None:
        return None
    return _RotaryPattern(
        source=columns[0].source, num_heads=heads[0].number, num_kv_heads=heads[1].number, cos=cos, sin=sin
    )


def _rotation(value: ir.Value) -> _Rotation | None:
    """Match ``heads * cos + concat(-second half, first half) * sin``."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        return None
    for straight, crossed in operand_orders(node):
        (heads, cos), (swapped, sin) = _times_table(straight), _times_table(crossed)
        if heads is not None and swapped is not None and cos is not None and sin is not None:
            middle = (width_of(heads) or 0) // 2
            first = Columns(source=heads, start=0, stop=middle)
            second = Columns(source=heads, start=middle, stop=2 * middle)
            if _crossed_halves(swapped) == (first, second):
                return _Rotation(heads=heads, cos=cos, sin=sin)
    return None


def _times_table(value: ir.Value) -> tuple[ir.Value | None, np.ndarray | None]:
    """Return the two factors of a product with a constant table (tokens, head_dim), one row for every token."""
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        for factor, table in operand_orders(node):
            if table.const_value is not None and list(table.const_value.shape) == (known_shape(factor) or [])[2:]:
                return factor, table.const_value.numpy()
    return None, None


def _crossed_halves(value: ir.Value) -> tuple[Columns | None, Columns | None]:
    """Return (first, second) of ``concat(-second, first)`` on the last axis."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None, None
    negative = required_input(node, 0).producer()
    if node.attributes.get_int("axis") not in (-1, len(value.shape or ()) - 1) or negative is None:
        return None, None
    if negative.op_type != "Neg":
        return None, None
    return columns_of(required_input(node, 1)), columns_of(required_input(negative, 0))


def _half_table(for_query: np.ndarray, for_key: np.ndarray) -> np.ndarray | None:
    """Return the first half of a table (tokens, head_dim) that query and key share and whose halves are equal."""
    first, second = np.array_split(for_query, 2, axis=-1)
    is_shared = np.array_equal(for_query, for_key) and np.array_equal(first, second)
    return np.ascontiguousarray(first) if is_shared else None


def _heads(value: ir.Value) -> _Heads | None:
    """Match (batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or list(node.attributes.get_ints("perm", [])) != HEADS_FIRST:
        return None
    split = required_input(node, 0).producer()
    if split is None or split.op_type != "Reshape" or value.shape is None:
        return None
    batch, number, tokens, head_dim = value.shape
    if not isinstance(number, int) or not isinstance(head_dim, int):
        return None
    joined: Sequence[int | ir.SymbolicDim] = [batch, tokens, number * head_dim]
    if known_shape(required_input(split, 0)) != joined:  # the Reshape splits the columns and nothing else
        return None
    return _Heads(columns=required_input(split, 0), number=number, head_dim=head_dim)
