"""Say what every node of a graph costs: multiply-accumulates, and the bytes that its product must move at least."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from medseg_trt.export.graph.gemms import macs_of, shape_of, stored_weight
from medseg_trt.export.graph.parts import part_of
from medseg_trt.export.graph.trace import KEPT_METADATA, OnnxGraph


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCost:
    """What a node costs for one image."""

    names: tuple[str, ...]  # of the node and of the values it makes
    part: str  # of the network: resnet, vit, block or decoder
    macs: int  # 0 where it multiplies no matrices
    bytes: int  # of its weight as stored, its input and its output, each once; 0 where it multiplies no matrices


def node_costs(graph: OnnxGraph) -> tuple[NodeCost, ...]:
    """Return the costs of all nodes that come from the network's modules, in the graph's order.

    What lies between the products is taken to be fused with them, so it moves nothing. The sum is therefore less than
    what any back-end really moves.
    """
    return tuple(
        NodeCost(
            names=tuple(str(each) for each in (node.name, *(value.name for value in node.outputs)) if each),
            part=part_of(namespace), macs=macs_of(node), bytes=_moved(node) if macs_of(node) else 0,
        )
        for node in graph.model.graph
        if (namespace := node.metadata_props.get(KEPT_METADATA, ""))
    )  # fmt: skip


def _moved(node: ir.Node) -> int:
    values: Sequence[ir.Value | None] = [*node.inputs[:3], *node.outputs[:1]]
    return sum(_bytes(stored_weight(value) or value) for value in values if value is not None)


def _bytes(value: ir.Value) -> int:
    bits = value.dtype.bitwidth if value.dtype is not None else 32
    return -(-prod(shape_of(value)) * bits // 8)
