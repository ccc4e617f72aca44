"""Take away what chooses labels at the end of a network, so that it gives the logits that they were chosen from."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PASSED = ("Cast", "Identity", "Squeeze", "Unsqueeze")  # change the type and the axes of labels, not the labels
CHANNEL_AXIS = 1

Makers = Mapping[str, onnx.NodeProto]


def reveal_logits(model: onnx.ModelProto) -> bool:
    """Let a network that gives labels give its logits instead, and say whether it did give labels.

    Labels are the largest of the logits of a pixel, or whether the only one is above 0. Other networks, and those that
    choose labels in another way, are left as they are.
    """
    graph = model.graph
    if len(graph.output) != 1:
        return False
    makers = {name: node for node in graph.node for name in node.output}
    node = makers.get(graph.output[0].name)
    for _ in graph.node:  # a damaged graph may lead in circles
        if node is None or node.op_type not in PASSED or not node.input:
            break
        node = makers.get(node.input[0])
    logits = None if node is None or node.domain else _logits(node, makers, graph)
    if logits is None:
        return False
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(logits, TensorProto.FLOAT, None))
    return True


def _logits(node: onnx.NodeProto, makers: Makers, graph: onnx.GraphProto) -> str | None:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "ArgMax" and len(node.input) == 1:
        first = attributes.get("axis") == CHANNEL_AXIS and not attributes.get("select_last_index", 0)
        return node.input[0] if first else None
    if node.op_type == "Greater" and len(node.input) == 2 and _is_zero(node.input[1], makers, graph):
        before = makers.get(node.input[0])
        squeezed = before is not None and before.op_type == "Squeeze" and before.input
        return before.input[0] if before is not None and squeezed else node.input[0]
    return None


def _is_zero(name: str, makers: Makers, graph: onnx.GraphProto) -> bool:
    tensors = [tensor for tensor in graph.initializer if tensor.name == name]
    node = makers.get(name)
    if node is not None and node.op_type == "Constant":
        tensors += [attribute.t for attribute in node.attribute if attribute.name == "value"]
    inside = [tensor for tensor in tensors if tensor.data_location != TensorProto.EXTERNAL]
    return len(inside) == 1 and not np.any(numpy_helper.to_array(inside[0]))
