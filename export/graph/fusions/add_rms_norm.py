"""Fuse a residual sum and the RMS norm that follows it to AddRMSNorm."""

import onnx_ir as ir

from medseg_trt.export.graph.functions import call
from medseg_trt.export.graph.fusions.fusion_result import FusionResult, fusion_result
from medseg_trt.export.graph.fusions.nodes import known_shape, replace_nodes, required_input
from medseg_trt.export.graph.fusions.norm_pattern import NO_NORM, norm_weight, rms_norms


def fuse_add_rms_norm(graph: ir.Graph) -> FusionResult:
    """Fuse every RMS norm with the residual sum before it; other nodes can still read the sum."""
    count, norms = 0, list(rms_norms(graph))
    for norm in norms:
        total = norm.x.producer()
        if total is None or total.graph is None or total.op_type != "Add" or not _is_residual_sum(total):
            continue  # without a graph: another norm of the same sum has replaced it
        inputs = [*total.inputs, norm_weight(graph, norm)]
        node = call("AddRMSNorm", inputs, [norm.y, norm.x], {"epsilon": norm.epsilon}, norm.nodes[0])
        replace_nodes(graph, total, [total, *norm.nodes], node, [norm.y, norm.x])
        count += 1
    return fusion_result(count, "no RMSNormalization follows a sum of two activations" if norms else NO_NORM)


def _is_residual_sum(node: ir.Node) -> bool:
    """Whether an Add has two activations of the same known shape."""
    terms = [required_input(node, index) for index in range(2)]
    shapes = [known_shape(term) for term in terms if term.const_value is None]
    return len(shapes) == 2 and shapes[0] is not None and shapes[0] == shapes[1]
