"""Find the standard RMS norms over the last axis, as PyTorch traces them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from medseg_trt.export.graph.fusions.nodes import operand_orders, required_input, width_of
from medseg_trt.export.graph.onnx_graph import add_constant

NO_NORM = "the graph has no RMSNormalization over the last axis with one weight per column"


@dataclass(frozen=True, kw_only=True, slots=True)
class Norm:
    """An RMS norm, with the product that scales it where that is a node of its own."""

    x: ir.Value
    weight: ir.Value | None  # None: ones
    epsilon: float
    y: ir.Value
    nodes: list[ir.Node]


def rms_norms(graph: ir.Graph) -> Iterator[Norm]:
    """Yield the standard RMS norms over the last axis, with the scale that PyTorch traces as a product after them."""
    for node in [node for node in graph if node.op_type == "RMSNormalization" and node.domain == ""]:
        x, scale, y = required_input(node, 0), required_input(node, 1), node.outputs[0]
        width = width_of(x)
        if node.attributes.get_int("axis", -1) not in (-1, len(x.shape or ()) - 1) or width is None:
            continue
        nodes = [node]
        if _is_one(scale):
            product, scale = _scaled(y, width)
            if product is not None:
                nodes, y = [node, product], product.outputs[0]
        if scale is None or (scale.const_value is not None and list(scale.const_value.shape) == [width]):
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            yield Norm(x=x, weight=scale, epsilon=epsilon, y=y, nodes=nodes)


def norm_weight(graph: ir.Graph, norm: Norm) -> ir.Value:
    """Return the weight of a norm; ones are added to the graph where it has none."""
    if norm.weight is not None:
        return norm.weight
    assert norm.x.dtype is not None  # ``check`` requires it
    return add_constant(graph, f"{norm.y.name}_ones", np.ones(width_of(norm.x) or 0, norm.x.dtype.numpy()))


def _scaled(value: ir.Value, width: int) -> tuple[ir.Node | None, ir.Value | None]:
    """Return the product that scales every column of ``value``, and the scale, if nothing else uses ``value``."""
    users = value.consumers()
    if len(users) == 1 and users[0].op_type == "Mul" and not value.is_graph_output():
        for other, weight in operand_orders(users[0]):
            if other is value and weight.const_value is not None and list(weight.const_value.shape) == [width]:
                return users[0], weight
    return None, None


def _is_one(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type == "ConstantOfShape":
        fill = node.attributes.get_tensor("value", None)
        return fill is not None and bool((fill.numpy() == 1).all())
    return value.const_value is not None and bool((value.const_value.numpy() == 1).all())
