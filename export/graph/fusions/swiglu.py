"""Fuse the gate of a LLaMA layer to SwiGLU."""

import onnx_ir as ir

from medseg_trt.export.graph.functions import call
from medseg_trt.export.graph.fusions.columns import columns_of, cover_one_tensor
from medseg_trt.export.graph.fusions.fusion_result import FusionResult, fusion_result
from medseg_trt.export.graph.fusions.nodes import operand_orders, replace_nodes


def fuse_swiglu(graph: ir.Graph) -> FusionResult:
    """Replace ``silu(gate) * up`` where gate and up are the two halves of one tensor, in this order."""
    count = 0
    for product in [node for node in graph if node.op_type == "Mul"]:
        for silu, up in operand_orders(product):
            gate = _silu_input(silu)
            if gate is None:
                continue
            halves = [columns_of(gate), columns_of(up)]
            if cover_one_tensor(halves) and halves[0].width == halves[1].width:
                node = call("SwiGLU", [halves[0].source], list(product.outputs), {}, product)
                replace_nodes(graph, product, [product], node, list(product.outputs))
                count += 1
                break
    return fusion_result(count, "the graph has no silu(gate) * up whose gate and up are the two halves of one tensor")


def _silu_input(value: ir.Value) -> ir.Value | None:
    """Return x where ``value`` is ``x * sigmoid(x)``."""
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        for x, factor in operand_orders(node):
            sigmoid = factor.producer()
            if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x:
                return x
    return None
