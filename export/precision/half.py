"""Convert GEMMs and attention to 16-bit floats; norms, softmax and residual sums stay in float32.

Nodes between two converted nodes that only move or clip values are converted as well, so that no cast is left between
them. The graph's input and output stay float32. Quantised values are dequantised to 16 bits, with scales of 16 bits.

Source: Micikevicius et al. 2018, "Mixed precision training", §3.3, for what is kept in float32.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from medseg_trt.export.graph.functions import DOMAIN
from medseg_trt.export.graph.gemms import gemms
from medseg_trt.export.graph.onnx_graph import KEPT_METADATA, OnnxGraph

TYPES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
FLOAT = ir.DataType.FLOAT
MOVERS = frozenset(  # operators that move values or directly follow a product: they add one rounding error at most
    {("", name) for name in ("Relu", "Reshape", "Transpose", "Split", "Concat", "Slice", "MaxPool", "Pad", "Resize")}
    | {("", "Squeeze"), ("", "Unsqueeze"), ("", "Gelu"), (DOMAIN, "SwiGLU")}
)
BIASES = frozenset({("", "Add"), ("", "Mul")})  # only with a constant: a bias or a scale
QDQ_OPERATORS = frozenset({"QuantizeLinear", "DequantizeLinear"})
MAX_SCALE_ERROR = 2.0**-10  # relative, a quarter of the error of an 8-bit value; small scales lose bits
KEPT_INPUTS: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2})}  # float32 for any type of the data


def to_half(graph: OnnxGraph, names: Collection[str], *, dtype: str = "fp16") -> OnnxGraph:
    """Return a copy in which the named GEMMs, and every Attention that feeds one of them, compute in 16 bits.

    Args:
        graph: float32; every value has a type and a shape, and its functions accept any float type.
        names: of its GEMMs.
        dtype: a key of ``TYPES``.
    """
    model = graph.model.clone()
    chosen = {gemm.name for gemm in gemms(graph) if gemm.name in names}
    chosen -= {node.name for node in model.graph if not all(_fits(scale, TYPES[dtype]) for scale in _scales(node))}
    narrow = _Narrower(model.graph, TYPES[dtype])
    for node in list(model.graph):
        is_product = node.name in chosen or (node.op_type == "Attention" and _feeds(node, chosen))
        activations = [value for value in narrow.floats(node) if not _is_constant(value)]
        can_follow = _is_mover(node) or (node.op_type in QDQ_OPERATORS and _is_read_by(node, chosen))
        if is_product or (can_follow and all(map(narrow.is_widened, activations))):
            narrow(node)
    RemoveUnusedNodesPass()(model)
    return OnnxGraph(model=model)


class _Narrower:
    """Converts nodes to 16 bits, with casts before and after where the neighbour is not in 16 bits."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self._narrowed: dict[ir.Value, ir.Value] = {}

    def __call__(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None and value in self.floats(node):
                node.replace_input_with(index, self._narrow(value, node))
        if node.op_type == "Attention":
            node.attributes["softmax_precision"] = ir.AttrInt64("softmax_precision", int(FLOAT))
        for value in [output for output in node.outputs if output.dtype == FLOAT]:
            self._widen(value, node)

    def floats(self, node: ir.Node) -> list[ir.Value]:
        """Return the float32 inputs that the node computes with."""
        kept = KEPT_INPUTS.get(node.op_type, frozenset())
        return [
            value
            for index, value in enumerate(node.inputs)
            if value is not None and value.dtype == FLOAT and index not in kept
        ]

    def is_widened(self, value: ir.Value) -> bool:
        """Whether a float32 value is the cast of a 16-bit value."""
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        return source is not None and source.dtype == self.dtype

    def _narrow(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self._narrowed:
            if _is_constant(value):
                self._narrowed[value] = self._constant(value)
            else:
                self._narrowed[value] = self._cast(value, reader, self.dtype, f"{value.name}_{self.dtype.name.lower()}")
                self.graph.insert_before(reader, _producer(self._narrowed[value]))
        return self._narrowed[value]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}_{self.dtype.name.lower()}"
        with np.errstate(over="ignore"):  # an infinite weight makes infinite logits, which the accuracy gate rejects
            rounded = value.const_value.numpy().astype(self.dtype.numpy())
        if any(use.node.op_type in QDQ_OPERATORS for use in value.uses()):  # the float32 readers must decode the same
            value.const_value = ir.tensor(rounded.astype(np.float32), name=value.name)
        tensor = ir.tensor(rounded, dtype=self.dtype, name=name)
        constant = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.dtype), const_value=tensor)
        self.graph.register_initializer(constant)
        return constant

    def _widen(self, value: ir.Value, node: ir.Node) -> None:
        """Let a node make 16 bits; its readers get the output cast to float32, under the old name."""
        name = value.name
        value.name, value.type = f"{name}_{self.dtype.name.lower()}", ir.TensorType(self.dtype)
        widened = self._cast(value, node, FLOAT, str(name))
        ir.convenience.replace_all_uses_with(value, widened, replace_graph_outputs=True)
        cast = _producer(widened)
        cast.replace_input_with(0, value)
        self.graph.insert_after(node, cast)
        self._narrowed[widened] = value

    def _cast(self, value: ir.Value, like: ir.Node, dtype: ir.DataType, name: str) -> ir.Value:
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        metadata = {KEPT_METADATA: like.metadata_props.get(KEPT_METADATA, "")}
        attributes = {"to": int(dtype)}
        node = ir.node("Cast", [value], attributes, outputs=[output], name=f"Cast_{name}", metadata_props=metadata)
        return node.outputs[0]


def _is_mover(node: ir.Node) -> bool:
    kind = (node.domain, node.op_type)
    constants = [value for value in node.inputs if value is not None and _is_constant(value) and value.dtype == FLOAT]
    return kind in MOVERS or (kind in BIASES and len(constants) == 1)


def _feeds(node: ir.Node, chosen: Collection[str]) -> bool:
    """Whether a chosen GEMM reads the output of a node, directly or after a Transpose, Reshape or Q/DQ node."""
    readers = [reader for reader, _ in node.outputs[0].uses()]
    return any(
        reader.name in chosen or (reader.op_type in ("Transpose", "Reshape", *QDQ_OPERATORS) and _feeds(reader, chosen))
        for reader in readers
    )


def _scales(node: ir.Node) -> list[ir.Value]:
    """Return the scales with which the inputs of a node are dequantised."""
    producers = [value.producer() for value in node.inputs if value is not None]
    dequantisers = [node for node in producers if node is not None and node.op_type == "DequantizeLinear"]
    return [scale for dequantiser in dequantisers if (scale := dequantiser.inputs[1]) is not None]


def _fits(scale: ir.Value, dtype: ir.DataType) -> bool:
    """Whether a scale keeps its precision in 16 bits."""
    assert scale.const_value is not None  # this package writes constant scales only
    exact = scale.const_value.numpy().astype(np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype.numpy()).astype(np.float64)
    return bool((np.abs(rounded - exact) <= MAX_SCALE_ERROR * np.abs(exact)).all())


def _is_read_by(qdq_node: ir.Node, chosen: Collection[str]) -> bool:
    """Whether only chosen GEMMs read a Q/DQ node, directly or through the other node of the pair."""
    readers = [use.node for use in qdq_node.outputs[0].uses()]
    return all(
        reader.name in chosen or (reader.op_type in QDQ_OPERATORS and _is_read_by(reader, chosen)) for reader in readers
    )


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer()


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # ``_cast`` made it
    return node
