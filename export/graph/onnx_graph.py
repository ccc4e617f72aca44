"""A network as an ONNX graph, and the names that every pass relies on. Nothing here needs PyTorch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from numpy import ndarray

OPSET = 23  # the first with Attention and RMSNormalization
KEPT_METADATA = "namespace"  # of a node: the module it came from; the rest holds source lines and paths of this machine


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxGraph:
    """A network that was traced, or that a bundle holds."""

    model: ir.Model

    @property
    def num_nodes(self) -> Mapping[str, int]:
        """How often each operator occurs."""
        return Counter(node.op_type for node in self.model.graph)


def add_constant(graph: ir.Graph, name: str, values: ndarray) -> ir.Value:
    """Add an initializer under a name that is free, and return it."""
    taken = {value.name for value in graph.inputs} | graph.initializers.keys()
    while name in taken:
        name += "_"
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
