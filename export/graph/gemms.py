"""List the matrix products of a graph, with their weights, parts of the network and costs.

A *GEMM* is a MatMul, Gemm or Conv whose second input is a constant, stored directly or behind Cast and DequantizeLinear
nodes. Only GEMMs are quantised. The products of attention have no constant, and transposed convolutions stay in float;
both are part of the total only.
MACs are multiply-accumulate operations of one image: every free dimension counts as 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OnnxGraph
from medseg_trt.export.graph.parts import PART_NAMES as PART_NAMES
from medseg_trt.export.graph.parts import part_of

STORED_BEHIND = ("DequantizeLinear", "Cast")  # between a stored weight and the GEMM that reads it


@dataclass(frozen=True, kw_only=True, slots=True)
class Gemm:
    """A matrix product or convolution with a constant weight."""

    name: str  # of the node
    part: str  # of the network: resnet, vit, block or decoder
    op_type: str  # MatMul, Gemm or Conv
    activation: str  # the input value
    output: str  # the output value
    weight: str  # the initializer
    weight_shape: tuple[int, ...]
    output_axis: int  # axis of the weight that holds the output channels
    macs: int  # of one image

    @property
    def input_axis(self) -> int:
        """The axis of the weight over which products are summed; for a convolution, that of the input channels."""
        return 1 - self.output_axis

    @property
    def channel_axis(self) -> int:
        """The axis of the activation that corresponds to ``input_axis``."""
        return 1 if self.op_type == "Conv" else -1


def gemms(graph: OnnxGraph) -> tuple[Gemm, ...]:
    """Return the GEMMs of a graph in the order of its nodes."""
    return tuple(_gemms(graph.model.graph))


def total_macs(graph: OnnxGraph) -> int:
    """Return the MACs of one image: GEMMs, transposed convolutions, and products of two activations."""
    return sum(macs_of(node) for node in graph.model.graph)


def stored_weight(value: ir.Value | None) -> ir.Value | None:
    """Return the initializer that a value is, or is dequantised or cast from; else None."""
    while value is not None and not value.is_initializer():
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in STORED_BEHIND else None
    return value


def _gemms(graph: ir.Graph) -> Iterator[Gemm]:
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain:
            continue
        activation, weight = node.inputs[0], stored_weight(node.inputs[1])
        if activation is None or weight is None or stored_weight(activation) is not None:
            continue
        shape = shape_of(weight)
        if node.op_type == "MatMul" and len(shape) != 2:
            continue  # a batch of matrices has no axis of output channels
        namespace = node.metadata_props.get(KEPT_METADATA, "")
        yield Gemm(
            name=_name(node),
            part=part_of(namespace),
            op_type=node.op_type,
            activation=_name(activation),
            output=_name(node.outputs[0]),
            weight=_name(weight),
            weight_shape=shape,
            output_axis=_output_axis(node),
            macs=macs_of(node),
        )


def _output_axis(node: ir.Node) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0)):
        return 0
    return 1


def macs_of(node: ir.Node) -> int:
    """Return the multiply-accumulates of a node for one image, 0 where it is no matrix product."""
    if node.domain or node.op_type not in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"):
        return 0
    first, second = (shape_of(value) for value in node.inputs[:2])
    outputs = prod(shape_of(node.outputs[0]))
    if node.op_type == "Conv":
        return outputs * prod(second[1:])
    if node.op_type == "ConvTranspose":
        return prod(first) * prod(second[1:])
    if node.op_type == "Gemm":
        return outputs * first[0 if node.attributes.get_int("transA", 0) else 1]
    if node.op_type == "MatMul":
        return outputs * first[-1]
    queries, keys = (
        prod(first),
        second[-2],
    )  # every query and output element has one product per key
    return (queries + outputs) * keys


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    """Return the shape of a value for one image: every free dimension is 1."""
    assert value is not None  # these inputs are not optional
    assert value.shape is not None  # ``trace.check`` requires it
    return tuple(size if isinstance(size, int) else 1 for size in value.shape)


def _name(named: ir.Node | ir.Value) -> str:
    assert named.name is not None  # ``trace.check`` requires it
    return named.name
