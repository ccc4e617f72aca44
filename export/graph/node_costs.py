"""Compute the cost of every node: multiply-accumulates, and the least number of bytes that a product moves."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from medseg_trt.export.graph.gemms import macs_of, shape_of, stored_weight
from medseg_trt.export.graph.parts import part_of
from medseg_trt.export.graph.trace import KEPT_METADATA, OnnxGraph


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCost:
    """The cost of a node for one image."""

    names: tuple[str, ...]  # of the node and of its outputs
    part: str  # of the network: resnet, vit, block or decoder
    macs: int  # 0 where it is no matrix product
    bytes: int  # of its stored weight, input and output, each moved once; 0 where it multiplies no matrices


def node_costs(graph: OnnxGraph) -> tuple[NodeCost, ...]:
    """Return the costs of all nodes that come from the network's modules, in the graph's order.

    Nodes between the products count as fused with them and move no bytes, so the sum is a lower bound for every
    back-end.
    """
    return tuple(
        NodeCost(
            names=tuple(str(name) for name in (node.name, *(value.name for value in node.outputs)) if name),
            part=part_of(namespace),
            macs=macs_of(node),
            bytes=_moved_bytes(node) if macs_of(node) else 0,
        )
        for node in graph.model.graph
        if (namespace := node.metadata_props.get(KEPT_METADATA, ""))
    )


def _moved_bytes(node: ir.Node) -> int:
    values: Sequence[ir.Value | None] = [*node.inputs[:3], *node.outputs[:1]]
    return sum(_bytes(stored_weight(value) or value) for value in values if value is not None)


def _bytes(value: ir.Value) -> int:
    bits = value.dtype.bitwidth if value.dtype is not None else 32
    return -(-prod(shape_of(value)) * bits // 8)
