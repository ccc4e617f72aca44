"""The field numbers of an ONNX model's nodes, functions and weights, and where a tensor's values are.

Source: ONNX, ``onnx.proto``, "External Data" in IR.md.
"""

from medseg_trt.export.graph.onnx_wire import grouped, messages, text

MODEL_TRAINING, MODEL_FUNCTIONS = 20, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_SPARSE = 1, 5, 15
NODE_OPERATOR, NODE_ATTRIBUTE, NODE_DOMAIN = 4, 5, 7
ATTRIBUTE_TENSOR, ATTRIBUTE_TENSORS = 5, 10
ATTRIBUTE_BODIES = (6, 11, 22, 23)  # graphs and sparse tensors
FUNCTION_NAME, FUNCTION_NODE, FUNCTION_DOMAIN, FUNCTION_ATTRIBUTE = 1, 7, 10, 11
TENSOR_EXTERNAL, ENTRY_KEY, ENTRY_VALUE = 13, 1, 2


def external_entries(tensor: memoryview) -> tuple[dict[str, str], bool]:
    """Return the location, offset and length of values in another file, and whether one of them is said twice.

    Empty where the values are in the model itself.
    """
    external = [grouped(entry) for entry in messages(tensor, TENSOR_EXTERNAL)]
    pairs = [(text(entry, ENTRY_KEY), text(entry, ENTRY_VALUE)) for entry in external]
    entries = dict(pairs)
    return entries, len(entries) < len(pairs)
