"""Put the nodes of domain ``medseg`` in the place of what they compute, so that a kernel can do it in one pass.

Every rule looks for one form, checks all of it, and says how often it found it; what differs in any part stays as it
is. The attention itself stays the standard operator.

Source: the forms are those of ``train/models/llama.py`` after ``fold`` and ``trace``; Su et al. 2021 for the rotation;
Shazeer 2020, "GLU Variants Improve Transformer".
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medseg_trt.export.graph.functions import attach, call, check_functions
from medseg_trt.export.graph.onnx_graph import add_constant
from medseg_trt.export.graph.trace import OnnxGraph

HEADS_FIRST = [0, 2, 1, 3]  # (batch, tokens, heads, head_dim) -> (batch, heads, tokens, head_dim)


def fuse(graph: OnnxGraph) -> tuple[OnnxGraph, dict[str, int]]:
    """Apply every rule of ``RULES`` to a copy of a traced graph; the copy shares its tensors.

    Returns:
        The copy, with the functions that its nodes call, and how many places each rule changed: a rule that found
        nothing says 0.

    Raises:
        MedsegError: ``check_functions`` refuses the outcome.
    """
    model = graph.model.clone()
    counts = {name: rule(model.graph) for name, rule in RULES.items()}
    RemoveUnusedNodesPass()(model)
    model.graph.sort()  # a node that makes several values stands where the last of them stood
    attach(model)
    check_functions(model)
    return OnnxGraph(model=model), counts


def fuse_add_rms_norm(graph: ir.Graph) -> int:
    """Join every RMS norm with the residual sum in front of it; the sum stays available to others."""
    count = 0
    for norm in list(_rms_norms(graph)):
        total = norm.x.producer()
        if total is None or total.graph is None or total.op_type != "Add" or not _is_residual_sum(total):
            continue  # without a graph: another norm of the same sum has replaced it
        inputs = [*total.inputs, _weight(graph, norm)]
        node = call("AddRMSNorm", inputs, [norm.y, norm.x], {"epsilon": norm.epsilon}, norm.nodes[0])
        _replace(graph, total, [total, *norm.nodes], node, [norm.y, norm.x])
        count += 1
    return count


def fuse_rms_norm(graph: ir.Graph) -> int:
    """Replace the RMS norms that have no residual sum in front of them."""
    norms = list(_rms_norms(graph))
    for norm in norms:
        node = call("RMSNorm", [norm.x, _weight(graph, norm)], [norm.y], {"epsilon": norm.epsilon}, norm.nodes[0])
        _replace(graph, norm.nodes[-1], norm.nodes, node, [norm.y])
    return len(norms)


def fuse_rotary(graph: ir.Graph) -> int:
    """Replace what lies between the fused projection and an attention that sees rotated queries and keys."""
    count = 0
    for attention in [node for node in graph if node.op_type == "Attention"]:
        query, key, value = (_input(attention, index) for index in range(3))
        turned = [_rotation(query), _rotation(key)]
        if turned[0] is None or turned[1] is None:
            continue
        heads = [each for each in map(_heads, (turned[0].heads, turned[1].heads, value)) if each is not None]
        if len(heads) < 3 or heads[1].number != heads[2].number or len({each.head_dim for each in heads}) > 1:
            continue
        columns = [_columns(each.columns) for each in heads]
        cos, sin = (_half_table(turned[0].cos, turned[1].cos), _half_table(turned[0].sin, turned[1].sin))
        if not _side_by_side(columns) or cos is None or sin is None:
            continue
        tables = [add_constant(graph, f"{query.name}_{kind}", table) for kind, table in (("cos", cos), ("sin", sin))]
        attributes = {"num_heads": heads[0].number, "num_kv_heads": heads[1].number, "interleaved": 0}
        producer = query.producer()
        assert producer is not None  # _rotation looked at it
        node = call("Rotary", [columns[0].source, *tables], [query, key, value], attributes, producer)
        graph.insert_before(attention, node)
        _take_over(graph, [query, key, value], node)
        count += 1
    return count


def fuse_swiglu(graph: ir.Graph) -> int:
    """Replace ``silu(gate) * up`` where gate and up are the two halves of one tensor, in this order."""
    count = 0
    for product in [node for node in graph if node.op_type == "Mul"]:
        for silu, up in _both_orders(product):
            gate = _silu(silu)
            if gate is None:
                continue
            halves = [_columns(gate), _columns(up)]
            if _side_by_side(halves) and halves[0].width == halves[1].width:
                node = call("SwiGLU", [halves[0].source], list(product.outputs), {}, product)
                _replace(graph, product, [product], node, list(product.outputs))
                count += 1
                break
    return count


def count_attention(graph: ir.Graph) -> int:
    """Count the attentions; nothing changes."""
    return sum(node.op_type == "Attention" for node in graph)


RULES: Mapping[str, Callable[[ir.Graph], int]] = {
    "add_rms_norms": fuse_add_rms_norm,  # before the norms on their own
    "rms_norms": fuse_rms_norm,
    "rotary_embeddings": fuse_rotary,
    "swiglus": fuse_swiglu,
    "attentions": count_attention,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Norm:
    x: ir.Value
    weight: ir.Value | None  # None: ones
    epsilon: float
    y: ir.Value
    nodes: list[ir.Node]


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
class _Columns:
    """Columns ``start`` to ``stop`` of ``source``, on its last axis."""

    source: ir.Value
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


def _rms_norms(graph: ir.Graph) -> Iterator[_Norm]:
    """Yield the standard RMS norms over the last axis, with the scale that PyTorch traces as a product after them."""
    for node in [node for node in graph if node.op_type == "RMSNormalization" and node.domain == ""]:
        x, scale, y = _input(node, 0), _input(node, 1), node.outputs[0]
        width = _width(x)
        if node.attributes.get_int("axis", -1) not in (-1, len(x.shape or ()) - 1) or width is None:
            continue
        nodes = [node]
        if _is_one(scale):
            product, scale = _scaled(y, width)
            if product is not None:
                nodes, y = [node, product], product.outputs[0]
        if scale is None or (scale.const_value is not None and list(scale.const_value.shape) == [width]):
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            yield _Norm(x=x, weight=scale, epsilon=epsilon, y=y, nodes=nodes)


def _weight(graph: ir.Graph, norm: _Norm) -> ir.Value:
    if norm.weight is not None:
        return norm.weight
    assert norm.x.dtype is not None  # ``check`` asks for it
    return add_constant(graph, f"{norm.y.name}_ones", np.ones(_width(norm.x) or 0, norm.x.dtype.numpy()))


def _scaled(value: ir.Value, width: int) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the product that scales every column of ``value``, and the scale, if nothing else uses ``value``."""
    users = value.consumers()
    if len(users) == 1 and users[0].op_type == "Mul" and not value.is_graph_output():
        for other, weight in _both_orders(users[0]):
            if other is value and weight.const_value is not None and list(weight.const_value.shape) == [width]:
                return users[0], weight
    return None, None


def _is_residual_sum(node: ir.Node) -> bool:
    shapes = [_known_shape(_input(node, index)) for index in range(2) if _input(node, index).const_value is None]
    return len(shapes) == 2 and shapes[0] is not None and shapes[0] == shapes[1]


def _known_shape(value: ir.Value) -> list[int | ir.SymbolicDim] | None:
    """Return a shape; None where a size has neither a number nor a name, so that it may be any."""
    return None if value.shape is None or value.shape.has_unknown_dim() else list(value.shape)


def _is_one(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type == "ConstantOfShape":
        fill = node.attributes.get_tensor("value", None)
        return fill is not None and bool((fill.numpy() == 1).all())
    return value.const_value is not None and bool((value.const_value.numpy() == 1).all())


def _rotation(value: ir.Value) -> _Rotation | None:
    """Recognise ``heads * cos + concat(-second half, first half) * sin``."""
    node = value.producer()
    if node is None or node.op_type != "Add":
        return None
    for straight, crossed in _both_orders(node):
        (heads, cos), (swapped, sin) = _times_table(straight), _times_table(crossed)
        if heads is not None and swapped is not None and cos is not None and sin is not None:
            first, second = _crossed_halves(swapped)
            middle = (_width(heads) or 0) // 2
            if first == _Columns(source=heads, start=0, stop=middle) and second == _Columns(
                source=heads, start=middle, stop=2 * middle
            ):
                return _Rotation(heads=heads, cos=cos, sin=sin)
    return None


def _times_table(value: ir.Value) -> tuple[ir.Value | None, np.ndarray | None]:
    """Return the two factors of a product with a constant table (tokens, head_dim), one row for every token."""
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        for factor, table in _both_orders(node):
            if table.const_value is not None and list(table.const_value.shape) == (_known_shape(factor) or [])[2:]:
                return factor, table.const_value.numpy()
    return None, None


def _crossed_halves(value: ir.Value) -> tuple[_Columns | None, _Columns | None]:
    """Return (first, second) of ``concat(-second, first)`` on the last axis."""
    node = value.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return None, None
    negative = _input(node, 0).producer()
    if node.attributes.get_int("axis") not in (-1, len(value.shape or ()) - 1) or negative is None:
        return None, None
    if negative.op_type != "Neg":
        return None, None
    return _columns(_input(node, 1)), _columns(_input(negative, 0))


def _half_table(for_query: np.ndarray, for_key: np.ndarray) -> np.ndarray | None:
    """Return the first half of a table (tokens, head_dim) that serves query and key and whose halves are the same."""
    first, second = np.array_split(for_query, 2, axis=-1)
    same = np.array_equal(for_query, for_key) and np.array_equal(first, second)
    return np.ascontiguousarray(first) if same else None


def _heads(value: ir.Value) -> _Heads | None:
    """Recognise (batch, tokens, heads * head_dim) -> (batch, heads, tokens, head_dim)."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or list(node.attributes.get_ints("perm", [])) != HEADS_FIRST:
        return None
    split = _input(node, 0).producer()
    if split is None or split.op_type != "Reshape" or value.shape is None:
        return None
    batch, number, tokens, head_dim = value.shape
    if not isinstance(number, int) or not isinstance(head_dim, int):
        return None
    divided = _known_shape(_input(split, 0)) == [batch, tokens, number * head_dim]  # columns, and nothing else
    return _Heads(columns=_input(split, 0), number=number, head_dim=head_dim) if divided else None


def _silu(value: ir.Value) -> ir.Value | None:
    """Return x of ``x * sigmoid(x)``."""
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        for x, opening in _both_orders(node):
            sigmoid = opening.producer()
            if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x:
                return x
    return None


def _columns(value: ir.Value) -> _Columns:
    """Say which columns of which tensor a value holds: those of a Split or a Slice on the last axis, or its own."""
    node, last = value.producer(), len(value.shape or ()) - 1
    if node is not None and node.op_type == "Split" and node.attributes.get_int("axis", 0) in (-1, last):
        widths = [_width(output) for output in node.outputs]
        start = sum(width or 0 for width in widths[: value.index()])
        if None not in widths:
            return _Columns(source=_input(node, 0), start=start, stop=start + (_width(value) or 0))
    if node is not None and node.op_type == "Slice":
        start, _, *rest = (_constant_ints(each) for each in node.inputs[1:])
        width = _width(_input(node, 0))
        if start is not None and len(start) == 1 and width and rest in ([[last]], [[-1]], [[last], [1]], [[-1], [1]]):
            first = start[0] % width if start[0] < 0 else start[0]
            return _Columns(source=_input(node, 0), start=first, stop=first + (_width(value) or 0))
    return _Columns(source=value, start=0, stop=_width(value) or 0)


def _side_by_side(columns: list[_Columns]) -> bool:
    """Tell whether the columns follow each other and make up the whole of one tensor."""
    ends = [0, *(each.stop for each in columns)]
    source = columns[0].source
    return (
        all(each.source is source for each in columns)
        and [each.start for each in columns] == ends[:-1]
        and ends[-1] == _width(source)
    )


def _constant_ints(value: ir.Value | None) -> list[int] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy().tolist()


def _both_orders(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    first, second = _input(node, 0), _input(node, 1)
    return [(first, second), (second, first)]


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None  # no rule asks for an input that the operator may lack
    return value


def _width(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def _replace(graph: ir.Graph, place: ir.Node, old: list[ir.Node], new: ir.Node, values: list[ir.Value]) -> None:
    """Put ``new`` after ``place``, let it make ``values``, and remove the nodes that made them."""
    graph.insert_after(place, new)
    _take_over(graph, values, new)
    graph.remove(old, safe=True)


def _take_over(graph: ir.Graph, values: list[ir.Value], node: ir.Node) -> None:
    for old, new in zip(values, node.outputs, strict=True):
        name = old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name = f"{name}_replaced"  # until its node is removed, no name is there twice
        new.name = name
