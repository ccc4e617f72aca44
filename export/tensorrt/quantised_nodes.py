"""Fuse a norm or SwiGLU with the QuantizeLinear after it, so that one kernel writes int8.

For TensorRT with plugins: it does not fuse across plugins, so QuantizeLinear would be a separate kernel that reads and
writes the activation again. The input is the symmetric format of INT8, with one scale per activation.
"""

from collections.abc import Mapping

import onnx_ir as ir

from medseg_trt.export.graph.functions import DOMAIN, attach, call, check_functions
from medseg_trt.export.graph.onnx_graph import OnnxGraph

JOINED: Mapping[tuple[str, str], str] = {  # domain, operator -> fused operator
    (DOMAIN, "RMSNorm"): "QuantizedRMSNorm",
    (DOMAIN, "AddRMSNorm"): "QuantizedAddRMSNorm",
    (DOMAIN, "SwiGLU"): "QuantizedSwiGLU",
    ("", "LayerNormalization"): "QuantizedLayerNorm",
}


def join_quantisers(graph: OnnxGraph) -> tuple[OnnxGraph, int]:
    """Return a copy with every node of ``JOINED`` fused with a QuantizeLinear that is its only reader, and the count.

    The other nodes stay. The function is the same, except for one rounding less in a kernel.
    """
    model = graph.model.clone()
    joined = [node for node in list(model.graph) if _join(model.graph, node)]
    attach(model)
    check_functions(model)
    return OnnxGraph(model=model), len(joined)


def _join(graph: ir.Graph, node: ir.Node) -> bool:
    name = JOINED.get((node.domain, node.op_type))
    if name is None or not _is_plain(node):
        return False
    quantiser = _only_quantiser(node.outputs[0])
    scale = None if quantiser is None else _scale(quantiser)
    if quantiser is None or scale is None:
        return False
    attributes = {"scale": scale}
    if name != "QuantizedSwiGLU":
        attributes["epsilon"] = node.attributes.get_float("epsilon", 1e-5)
    old = [quantiser.outputs[0], *node.outputs[1:]]
    new = call(name, [value for value in node.inputs if value is not None], old, attributes, node)
    graph.insert_after(node, new)
    for before, after in zip(old, new.outputs, strict=True):
        kept = before.name
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        before.name = f"{kept}_replaced"  # until its node is removed, no name may occur twice
        after.name = kept
    graph.remove([quantiser, node], safe=True)
    return True


def _is_plain(node: ir.Node) -> bool:
    """Whether a LayerNormalization is over the last axis, with weight and bias, as the kernel computes it."""
    if node.op_type != "LayerNormalization":
        return True
    rank = len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
    present = len(node.inputs) == 3 and node.inputs[2] is not None and len(node.outputs) == 1
    return present and node.attributes.get_int("axis", -1) in (-1, rank - 1)


def _only_quantiser(value: ir.Value) -> ir.Node | None:
    users = value.consumers()
    only = len(users) == 1 and users[0].op_type == "QuantizeLinear" and not value.is_graph_output()
    return users[0] if only else None


def _scale(quantiser: ir.Node) -> float | None:
    """Return the scale of a QuantizeLinear to int8 with one scale and no zero point; else None."""
    scale, zero = quantiser.inputs[1], quantiser.inputs[2] if len(quantiser.inputs) > 2 else None
    if scale is None or scale.const_value is None or scale.const_value.size != 1:
        return None
    symmetric = zero is None or (zero.const_value is not None and not zero.const_value.numpy().any())
    kind = quantiser.outputs[0].dtype
    return float(scale.const_value.numpy().item()) if symmetric and kind == ir.DataType.INT8 else None
