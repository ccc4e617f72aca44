"""Gather the GEMMs of a graph by the layer of the network that they are in."""

from medseg_trt.export.gemms import gemms
from medseg_trt.export.trace import KEPT_METADATA, OnnxGraph


def groups_of(graph: OnnxGraph) -> dict[str, list[str]]:
    """Return the names of the GEMMs by layer, such as ``resnet.block2.0`` or ``layers.3``, in the order of the graph.

    A layer is the module that a node was traced from, cut after the first number of its path.
    """
    nodes = {node.name: node for node in graph.model.graph}
    groups: dict[str, list[str]] = {}
    for gemm in gemms(graph):
        groups.setdefault(_layer(nodes[gemm.name].metadata_props.get(KEPT_METADATA, "")), []).append(gemm.name)
    return groups


def _layer(namespace: str) -> str:
    modules = [segment.partition(": ")[0] for segment in namespace.split("/")[1:-1]]  # the last one is an operator
    words = modules[-1].split(".") if modules else ["network"]
    end = next((place + 1 for place, word in enumerate(words) if word.isdecimal()), len(words))
    return ".".join(words[:end])
