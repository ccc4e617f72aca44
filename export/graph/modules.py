"""Group the GEMMs of a graph by the layer of the network."""

import onnx_ir as ir

from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.trace import KEPT_METADATA, OnnxGraph


def groups_of(graph: OnnxGraph) -> dict[str, list[str]]:
    """Return the names of the GEMMs by layer, such as ``resnet.block2.0`` or ``layers.3``, in the order of the graph.

    A layer is the module that a node was traced from, up to the first number of its path.
    """
    nodes = {node.name: node for node in graph.model.graph}
    groups: dict[str, list[str]] = {}
    for gemm in gemms(graph):
        groups.setdefault(_layer(module_of(nodes[gemm.name])), []).append(gemm.name)
    return groups


def module_of(node: ir.Node) -> str:
    """Return the module that a node was traced from, such as ``decoder.3.conv1.0``; "network" outside all of them."""
    segments = node.metadata_props.get(KEPT_METADATA, "").split("/")
    modules = [segment.partition(": ")[0] for segment in segments[1:-1]]  # the last segment is an operator
    return modules[-1] if modules else "network"


def _layer(module: str) -> str:
    words = module.split(".")
    end = next((index + 1 for index, word in enumerate(words) if word.isdecimal()), len(words))
    return ".".join(words[:end])
