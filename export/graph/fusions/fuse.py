"""Replace groups of nodes by single nodes of domain ``medseg``, so that one kernel computes each group.

Every rule matches one pattern completely, or leaves the nodes unchanged, and reports its matches. Attention stays the
standard operator.

Source: the patterns are those of ``train/block/llama.py`` after ``fold`` and ``trace``; Su et al. 2021 for the rotary
embedding; Shazeer 2020, "GLU Variants Improve Transformer".
"""

from collections.abc import Callable, Mapping

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medseg_trt.export.graph.functions import attach, check_functions
from medseg_trt.export.graph.fusions.add_rms_norm import fuse_add_rms_norm
from medseg_trt.export.graph.fusions.fusion_result import FusionResult, fusion_result
from medseg_trt.export.graph.fusions.rms_norm import fuse_rms_norm
from medseg_trt.export.graph.fusions.rotary import fuse_rotary
from medseg_trt.export.graph.fusions.swiglu import fuse_swiglu
from medseg_trt.export.graph.trace import OnnxGraph


def fuse(graph: OnnxGraph) -> tuple[OnnxGraph, dict[str, FusionResult]]:
    """Apply every rule of ``RULES`` to a copy of a traced graph; the copy shares its tensors.

    Returns:
        The copy, with the functions that its nodes call, and the result of each rule.

    Raises:
        MedsegError: ``check_functions`` rejects the fused graph.
    """
    model = graph.model.clone()
    results = {name: rule(model.graph) for name, rule in RULES.items()}
    RemoveUnusedNodesPass()(model)
    model.graph.sort()  # a node with several outputs stands where the last of the replaced nodes stood
    attach(model)
    check_functions(model)
    return OnnxGraph(model=model), results


def count_attention(graph: ir.Graph) -> FusionResult:
    """Count the Attention nodes; nothing changes."""
    return fusion_result(sum(node.op_type == "Attention" for node in graph), "the graph has no Attention")


RULES: Mapping[str, Callable[[ir.Graph], FusionResult]] = {
    "add_rms_norms": fuse_add_rms_norm,  # before the norms without a sum
    "rms_norms": fuse_rms_norm,
    "rotary_embeddings": fuse_rotary,
    "swiglus": fuse_swiglu,
    "attentions": count_attention,
}
