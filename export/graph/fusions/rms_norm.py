"""Replace the RMS norms that no residual sum precedes by RMSNorm."""

import onnx_ir as ir

from medseg_trt.export.graph.functions import call
from medseg_trt.export.graph.fusions.fusion_result import FusionResult, fusion_result
from medseg_trt.export.graph.fusions.nodes import replace_nodes
from medseg_trt.export.graph.fusions.norm_pattern import norm_weight, rms_norms


def fuse_rms_norm(graph: ir.Graph) -> FusionResult:
    """Replace the RMS norms that ``fuse_add_rms_norm`` left."""
    norms = list(rms_norms(graph))
    for norm in norms:
        weight = norm_weight(graph, norm)
        node = call("RMSNorm", [norm.x, weight], [norm.y], {"epsilon": norm.epsilon}, norm.nodes[0])
        replace_nodes(graph, norm.nodes[-1], norm.nodes, node, [norm.y])
    return fusion_result(len(norms), "no RMSNormalization over the last axis with one weight per column is left")
