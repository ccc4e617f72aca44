"""A network as an ONNX graph, and the names that every pass uses. This module does not need PyTorch."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from numpy import ndarray

OPSET = 23  # the first that has Attention and RMSNormalization
KEPT_METADATA = "namespace"  # of a node: its module; other metadata contain source lines and paths of this machine


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxGraph:
    """A traced network, or one read from a bundle."""

    model: ir.Model

    @property
    def num_nodes(self) -> Mapping[str, int]:
        """The number of nodes of each operator."""
        return Counter(node.op_type for node in self.model.graph)


def add_constant(graph: ir.Graph, name: str, values: ndarray) -> ir.Value:
    """Add an initializer and return it; underscores make its name unique."""
    used_names = {value.name for value in graph.inputs} | graph.initializers.keys()
    while name in used_names:
        name += "_"
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
