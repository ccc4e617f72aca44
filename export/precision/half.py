"""Put GEMMs and attention into 16-bit floats, and leave norms, softmax and residual sums in float32.

What only moves or clips numbers between two of them follows in 16 bits, so that no cast is left between them. The
graph's input and output stay float32. What multiplies codes gets them decoded to 16 bits, with scales of 16 bits.

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
MOVERS = frozenset({  # of numbers, or one step from a product: they add no error but a rounding
    ("", "Relu"), ("", "Reshape"), ("", "Transpose"), ("", "Split"), ("", "Concat"), ("", "Slice"), ("", "MaxPool"),
    ("", "Pad"), ("", "Resize"), ("", "Squeeze"), ("", "Unsqueeze"), ("", "Gelu"), (DOMAIN, "SwiGLU"),
})  # fmt: skip
BIASES = frozenset({("", "Add"), ("", "Mul")})  # with a constant; of two activations, they are sums and scales
CODERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
MAX_SCALE_ERROR = 2.0**-10  # relative, a quarter of what a code of eight bits is off by; small scales lose bits
KEPT_INPUTS: Mapping[str, frozenset[int]] = {"Resize": frozenset({1, 2})}  # float32 whatever the data is


def to_half(graph: OnnxGraph, names: Collection[str], *, dtype: str = "fp16") -> OnnxGraph:
    """Return a copy in which the named GEMMs, and the attention that feeds one of them, compute in 16 bits.

    Args:
        graph: float32, with every value typed and shaped; its functions must take any float type.
        names: of its GEMMs.
        dtype: a key of ``TYPES``.
    """
    model = graph.model.clone()
    chosen = {gemm.name for gemm in gemms(graph) if gemm.name in names}
    chosen -= {node.name for node in model.graph if not all(_holds(scale, TYPES[dtype]) for scale in _scales(node))}
    narrow = _Narrow(model.graph, TYPES[dtype])
    for node in list(model.graph):
        is_product = node.name in chosen or (node.op_type == "Attention" and _feeds(node, chosen))
        moved = [value for value in narrow.floats(node) if not _fixed(value)]
        follows = _is_mover(node) or (node.op_type in CODERS and _is_read_by(node, chosen))
        if is_product or (follows and all(map(narrow.is_widened, moved))):
            narrow(node)
    RemoveUnusedNodesPass()(model)
    return OnnxGraph(model=model)


class _Narrow:
    """Turns nodes to 16 bits one by one, with a cast before and after unless the neighbour is 16 bits already."""

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
        """Return the inputs that take part in the arithmetic."""
        kept = KEPT_INPUTS.get(node.op_type, frozenset())
        return [v for i, v in enumerate(node.inputs) if v is not None and v.dtype == FLOAT and i not in kept]

    def is_widened(self, value: ir.Value) -> bool:
        """Whether a float32 value is a 16-bit one that was cast back."""
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        return source is not None and source.dtype == self.dtype

    def _narrow(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value not in self._narrowed:
            if _fixed(value):
                self._narrowed[value] = self._constant(value)
            else:
                self._narrowed[value] = self._cast(value, reader, self.dtype, f"{value.name}_{self.dtype.name.lower()}")
                self.graph.insert_before(reader, _producer(self._narrowed[value]))
        return self._narrowed[value]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}_{self.dtype.name.lower()}"
        with np.errstate(over="ignore"):  # an infinite weight makes infinite logits, which no gate lets pass
            rounded = value.const_value.numpy().astype(self.dtype.numpy())
        if any(use.node.op_type in CODERS for use in value.uses()):  # whoever still reads it must decode the same
            value.const_value = ir.tensor(rounded.astype(np.float32), name=value.name)
        tensor = ir.tensor(rounded, dtype=self.dtype, name=name)
        constant = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.dtype), const_value=tensor)
        self.graph.register_initializer(constant)
        return constant

    def _widen(self, value: ir.Value, node: ir.Node) -> None:
        """Let the node make 16 bits, and whoever read its output read that, cast back and under the old name."""
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
        node = ir.node(
            "Cast", [value], {"to": int(dtype)}, outputs=[output], name=f"Cast_{name}",
            metadata_props={KEPT_METADATA: like.metadata_props.get(KEPT_METADATA, "")},
        )  # fmt: skip
        return node.outputs[0]


def _is_mover(node: ir.Node) -> bool:
    kind = (node.domain, node.op_type)
    constants = [value for value in node.inputs if value is not None and _fixed(value) and value.dtype == FLOAT]
    return kind in MOVERS or (kind in BIASES and len(constants) == 1)


def _feeds(node: ir.Node, chosen: Collection[str]) -> bool:
    """Whether one of the chosen GEMMs reads what a node made, perhaps after it was moved about."""
    readers = [reader for reader, _ in node.outputs[0].uses()]
    return any(
        reader.name in chosen or (reader.op_type in ("Transpose", "Reshape", *CODERS) and _feeds(reader, chosen))
        for reader in readers
    )


def _scales(node: ir.Node) -> list[ir.Value]:
    """Return the scales by which the operands of a node are decoded."""
    producers = [value.producer() for value in node.inputs if value is not None]
    decoders = [each for each in producers if each is not None and each.op_type == "DequantizeLinear"]
    return [scale for each in decoders if (scale := each.inputs[1]) is not None]


def _holds(scale: ir.Value, dtype: ir.DataType) -> bool:
    """Whether 16 bits hold a scale well enough."""
    assert scale.const_value is not None  # a quantiser of this package writes no other
    exact = scale.const_value.numpy().astype(np.float64)
    with np.errstate(over="ignore"):
        rounded = exact.astype(dtype.numpy()).astype(np.float64)
    return bool((np.abs(rounded - exact) <= MAX_SCALE_ERROR * np.abs(exact)).all())


def _is_read_by(coder: ir.Node, chosen: Collection[str]) -> bool:
    """Whether only chosen GEMMs multiply what a node codes or decodes."""
    readers = [use.node for use in coder.outputs[0].uses()]
    return all(each.name in chosen or (each.op_type in CODERS and _is_read_by(each, chosen)) for each in readers)


def _fixed(value: ir.Value) -> bool:
    return value.is_initializer()


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # it was just made
    return node
